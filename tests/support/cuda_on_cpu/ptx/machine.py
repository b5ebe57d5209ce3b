"""PTX instructions that touch memory, control flow or other lanes. (PTX ISA, chapters 9.7.9 to 9.7.15.)"""

from support.cuda_on_cpu.ptx.emitter import CPP_TYPES, Emitter, Opcode, identifier, instruction
from support.cuda_on_cpu.ptx.parser import PtxError, elements

Operands = tuple[str, ...]
SPACES = {space: space for space in ("global", "shared", "param", "local")}


@instruction("ld", modifiers="global shared param nc volatile v2 v4 L1_evict_last L1_evict_first")
def load(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    targets, kind = elements(a[0]), CPP_TYPES[op.type]
    code = f"char* const from = {e.address(a[1], op.one_of(SPACES, 'generic'))}; "
    code += f"check_aligned(from, {len(targets)} * sizeof({kind}), {line}); "
    return code + " ".join(e.write(x, op.type, f"(({kind}*)from)[{i}]") for i, x in enumerate(targets))


@instruction("st", modifiers="global shared volatile v2 v4")
def store(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    values, kind = elements(a[1]), CPP_TYPES[op.type]
    code = f"char* const to = {e.address(a[0], op.one_of(SPACES, 'generic'))}; "
    code += f"check_aligned(to, {len(values)} * sizeof({kind}), {line}); "
    return code + " ".join(f"(({kind}*)to)[{i}] = {e.read(x, op.type)};" for i, x in enumerate(values))


@instruction("cvta", modifiers="to global shared")
def convert_address(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    """Global addresses are the CPU's own; shared ones count from the start of the block's shared memory."""
    if "shared" not in op.modifiers:
        return e.write(a[0], "u64", e.read(a[1], "u64"))
    sign = "-" if "to" in op.modifiers else "+"
    return e.write(a[0], "u64", f"{e.read(a[1], 'u64')} {sign} (uint64_t)shared_memory")


@instruction("bra", modifiers="uni")
def branch(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    return f"goto {identifier(a[0])};"


@instruction("ret", "exit")
def leave(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    return "return;"


@instruction("bar", "barrier", modifiers="sync warp")
def barrier(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    if op.parts[:2] == ("warp", "sync"):
        return f"cuda_on_cpu::warp_barrier({e.read(a[0], 'u32')}, {line});"
    if op.parts != ("sync",) or a != ("0",):
        raise PtxError("barrier of another kind than sync 0")
    return f"cuda_on_cpu::block_barrier({line});"


@instruction("shfl", modifiers="sync up down bfly idx")
def shuffle(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    mode = op.one_of({m: f"Shuffle::{m}" for m in ("up", "down", "bfly", "idx")}, "")
    targets = [x.strip() for x in a[0].split("|")]
    inputs = ", ".join(e.read(x, "u32") for x in a[1:5])
    code = f"bool valid; const uint32_t value = shuffle_ptx({inputs}, {mode}, &valid, {line}); "
    code += e.write(targets[0], "b32", "value")
    return code + (e.write(targets[1], "pred", "valid") if len(targets) > 1 else "")


@instruction("vote", modifiers="sync ballot any all")
def vote(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    mask = e.read(a[2], "u32")
    votes = f"cuda_on_cpu::ballot({mask}, {e.read(a[1], 'pred')}, {line})"
    if "ballot" in op.modifiers:
        return e.write(a[0], "b32", votes)
    return e.write(a[0], "pred", f"{votes} != 0" if "any" in op.modifiers else f"{votes} == {mask}")


@instruction("mma", modifiers="sync aligned m16n8k16 row col")
def matrix_multiply(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    kind = op.types[1]
    if (
        op.types != ("f32", kind, kind, "f32")
        or kind not in ("bf16", "f16")
        or op.parts[3:5] != ("row", "col")
    ):
        raise PtxError("mma of these types")
    code = f"float d[4] = {{{', '.join(e.read(x, 'f32') for x in elements(a[3]))}}}; "
    code += f"const uint32_t A[4] = {{{', '.join(e.read(x, 'u32') for x in elements(a[1]))}}}; "
    code += f"const uint32_t B[2] = {{{', '.join(e.read(x, 'u32') for x in elements(a[2]))}}}; "
    code += f"cuda_on_cpu::multiply_accumulate({int(kind == 'bf16')}, d, A, B, {line}); "
    return code + " ".join(e.write(x, "f32", f"d[{i}]") for i, x in enumerate(elements(a[0])))


@instruction("ldmatrix", modifiers="sync aligned m8n8 x4 trans shared")
def load_matrices(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    targets = elements(a[0])
    if len(targets) != 4:
        raise PtxError("ldmatrix of other than four matrices")
    transposed = int("trans" in op.modifiers)
    code = f"uint32_t r[4]; load_matrices_at(r, {e.address(a[1], 'shared')}, {transposed}, {line}); "
    return code + " ".join(e.write(x, "b32", f"r[{i}]") for i, x in enumerate(targets))


@instruction("cp", modifiers="async ca cg shared global L2_128B commit_group wait_group wait_all")
def copy(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    if op.parts == ("async", "commit_group"):
        return "cuda_on_cpu::commit_copies();"
    if op.parts == ("async", "wait_group"):
        return f"land_copies({int(a[0])});"
    if op.parts == ("async", "wait_all"):
        return "cuda_on_cpu::commit_copies(); land_copies(0);"
    num_bytes = int(a[2], 0)
    from_source = e.read(a[3], "u32") if len(a) > 3 else f"{num_bytes}u"
    return (
        f"const uint32_t given = {from_source}; "
        f'if (given != 0 && given != {num_bytes}) cuda_on_cpu::fail("cp.async of a part of its bytes", {line}); '
        f"copy_async({e.address(a[0], 'shared')}, {e.address(a[1], 'global')}, {num_bytes}, given != 0, {line});"
    )
