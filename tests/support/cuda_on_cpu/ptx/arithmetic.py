"""PTX instructions that compute: integers, floats, comparisons, conversions. (PTX ISA, chapter 9.7.)"""

from support.cuda_on_cpu.ptx.emitter import CPP_TYPES, Emitter, Opcode, instruction
from support.cuda_on_cpu.ptx.parser import PtxError, elements

Operands = tuple[str, ...]
PAIRS = ("f16x2", "bf16x2")
INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}


def unsigned(kind: str) -> str:
    """Integer arithmetic wraps, so it is done without sign."""
    return "u" + kind[1:]


def doubled(kind: str) -> str:
    return kind[0] + str(2 * int(kind[1:]))


@instruction("add", "sub", modifiers="rn rz ftz")
def add(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    kind = op.type if op.is_float else unsigned(op.type)
    sign = "" if op.root == "add" else "-"
    if "rz" in op.modifiers:
        return e.write(a[0], kind, f"add_toward_zero({e.read(a[1], 'f32')}, {sign}{e.read(a[2], 'f32')})")
    return e.write(a[0], kind, f"{e.read(a[1], kind)} {INFIX[op.root]} {e.read(a[2], kind)}")


@instruction("mul", modifiers="lo hi wide rn ftz")
def multiply(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    if op.type in PAIRS:
        return e.write(a[0], "b32", _of_pairs(op.type, "x * y", [e.read(x, "b32") for x in a[1:]]))
    if op.is_float:
        return e.write(a[0], op.type, f"{e.read(a[1], op.type)} * {e.read(a[2], op.type)}")
    return e.write(a[0], _product_type(op), _product(e, op, a))


@instruction("mad", modifiers="lo wide")
def multiply_add(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    kind = unsigned(_product_type(op))
    return e.write(a[0], kind, f"({CPP_TYPES[kind]})({_product(e, op, a)}) + {e.read(a[3], kind)}")


def _product_type(op: Opcode) -> str:
    return doubled(op.type) if "wide" in op.modifiers else op.type


def _product(e: Emitter, op: Opcode, a: Operands) -> str:
    if "wide" in op.modifiers:
        wide = CPP_TYPES[doubled(op.type)]
        return f"({wide}){e.read(a[1], op.type)} * ({wide}){e.read(a[2], op.type)}"
    if "hi" in op.modifiers:
        return f"high_product({e.read(a[1], op.type)}, {e.read(a[2], op.type)})"
    if "lo" in op.modifiers:
        kind = unsigned(op.type)
        return f"(uint64_t){e.read(a[1], kind)} * {e.read(a[2], kind)}"
    raise PtxError("which half of the product?")


def _of_pairs(kind: str, value: str, pairs: list[str]) -> str:
    """Of two 16-bit numbers in a register; a float holds enough of the result to round it once more."""
    element = kind.removesuffix("x2")
    halves = []
    for position in (16, 0):
        held = "; ".join(
            f"const float {x} = from_{element}((u16)({pair} >> {position}))"
            for x, pair in zip("xyz", pairs, strict=False)
        )
        halves.append(f"[&] {{ {held}; return (uint32_t)to_{element}({value}); }}() << {position}")
    return " | ".join(halves)


@instruction("fma", modifiers="rn rm ftz")
def fused_multiply_add(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    if op.type in PAIRS:
        values = [e.read(x, "b32") for x in a[1:]]
        return e.write(a[0], "b32", _of_pairs(op.type, "std::fma(x, y, z)", values))
    if not op.is_float:
        raise PtxError("fma of this type")
    name = "fma_toward_minus" if "rm" in op.modifiers else "std::fma"
    return e.write(a[0], op.type, f"{name}({', '.join(e.read(x, op.type) for x in a[1:])})")


@instruction("div", modifiers="rn full approx ftz")
def divide(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    x, y = e.read(a[1], op.type), e.read(a[2], op.type)
    return e.write(a[0], op.type, f"{x} / {y}" if op.is_float else f"divide({x}, {y}, {line})")


@instruction("rem")
def remainder(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    return e.write(a[0], op.type, f"remainder({e.read(a[1], op.type)}, {e.read(a[2], op.type)}, {line})")


@instruction("min", "max", modifiers="ftz")
def extreme(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    function = f"std::f{op.root}" if op.is_float else f"std::{op.root}<{CPP_TYPES[op.type]}>"
    return e.write(a[0], op.type, f"{function}({e.read(a[1], op.type)}, {e.read(a[2], op.type)})")


@instruction("and", "or", "xor")
def bitwise(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    return e.write(a[0], op.type, f"{e.read(a[1], op.type)} {INFIX[op.root]} {e.read(a[2], op.type)}")


@instruction("not")
def complement(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    return e.write(a[0], op.type, f"{'!' if op.type == 'pred' else '~'}{e.read(a[1], op.type)}")


@instruction("neg", modifiers="ftz")
def negate(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    kind = op.type if op.is_float else unsigned(op.type)
    return e.write(a[0], kind, f"-{e.read(a[1], kind)}")


@instruction("abs", modifiers="ftz")
def absolute(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    if not op.is_float:
        raise PtxError("abs of an integer")
    return e.write(a[0], op.type, f"std::fabs({e.read(a[1], op.type)})")


@instruction("shl", "shr")
def shift(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    name = "shift_left" if op.root == "shl" else "shift_right"
    return e.write(
        a[0], op.type, f"{name}<{CPP_TYPES[op.type]}>({e.read(a[1], op.type)}, {e.read(a[2], 'u32')})"
    )


@instruction("shf", modifiers="l r wrap clamp")
def funnel_shift(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    values = ", ".join(e.read(x, "u32") for x in a[1:4])
    left, wrap = int("l" in op.modifiers), int("wrap" in op.modifiers)
    return e.write(a[0], "b32", f"funnel_shift({values}, {left}, {wrap})")


@instruction("bfe")
def extract_bits(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    where = f"{e.read(a[2], 'u32')}, {e.read(a[3], 'u32')}"
    return e.write(a[0], op.type, f"extract_bits<{CPP_TYPES[op.type]}>({e.read(a[1], op.type)}, {where})")


@instruction("bfi")
def insert_bits(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    values = f"{e.read(a[1], op.type)}, {e.read(a[2], op.type)}, {e.read(a[3], 'u32')}, {e.read(a[4], 'u32')}"
    return e.write(a[0], op.type, f"insert_bits<{CPP_TYPES[op.type]}>({values})")


@instruction("popc")
def count_ones(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    return e.write(a[0], "u32", f"__builtin_popcountll({e.read(a[1], op.type)})")


@instruction("clz")
def count_leading_zeros(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    return e.write(a[0], "u32", f"std::countl_zero({e.read(a[1], unsigned(op.type))})")


@instruction("prmt")
def permute_bytes(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    return e.write(a[0], "b32", f"permute_bytes({', '.join(e.read(x, 'u32') for x in a[1:4])})")


@instruction("lop3")
def logic_table(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    return e.write(a[0], "b32", f"logic_table({', '.join(e.read(x, 'u32') for x in a[1:5])})")


@instruction("rcp", "sqrt", "ex2", "lg2", "tanh", modifiers="rn approx ftz")
def elementary(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    """Approximate instructions are computed exactly rounded: their error is trusted, not modelled."""
    x = e.read(a[1], op.type)
    value = {"rcp": f"1 / {x}", "sqrt": f"std::sqrt({x})", "ex2": f"std::exp2({x})", "lg2": f"std::log2({x})"}
    return e.write(a[0], op.type, f"({CPP_TYPES[op.type]})({value.get(op.root, f'std::tanh({x})')})")


COMPARISONS = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}


def comparison(relation: str, x: str, y: str, is_float: bool) -> str:
    """Ordered float relations are false with a NaN; those with a `u` behind them are true."""
    if relation == "num":
        return f"({x} == {x} && {y} == {y})"
    if relation == "nan":
        return f"({x} != {x} || {y} != {y})"
    if is_float and relation.endswith("u"):
        return f"({x} {COMPARISONS[relation[:-1]]} {y} || {x} != {x} || {y} != {y})"
    if is_float and relation == "ne":
        return f"({x} != {y} && {x} == {x} && {y} == {y})"
    return f"({x} {COMPARISONS[relation]} {y})"


@instruction(
    "setp", modifiers=" ".join([*COMPARISONS, *(f"{c}u" for c in COMPARISONS), "num nan ftz and or xor"])
)
def set_predicate(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    held = comparison(op.parts[0], e.read(a[1], op.type), e.read(a[2], op.type), op.is_float)
    combine = op.one_of({"and": "&&", "or": "||", "xor": "!="}, "")
    with_operand = f" {combine} {e.read(a[3], 'pred')}" if combine else ""
    targets = [x.strip() for x in a[0].split("|")]
    code = f"const bool held = {held}, result = held{with_operand}, opposite = !held{with_operand}; (void)opposite;"
    values = ("result", "opposite")
    return code + " ".join(e.write(x, "pred", value) for x, value in zip(targets, values, strict=False))


@instruction("selp")
def select(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    return e.write(
        a[0], op.type, f"{e.read(a[3], 'pred')} ? {e.read(a[1], op.type)} : {e.read(a[2], op.type)}"
    )


@instruction("mov")
def move(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    """Also packs and unpacks: `mov.b64 {low, high}, x` and `mov.b64 x, {low, high}`."""
    if op.type == "pred":
        return e.write(a[0], "pred", e.read(a[1], "pred"))
    total = int(op.type[1:])
    if a[0].startswith("{"):
        targets = elements(a[0])
        width = total // len(targets)
        parts = (e.write(x, f"b{width}", f"whole >> {width * i}") for i, x in enumerate(targets))
        return f"const uint64_t whole = {e.read(a[1], f'b{total}')}; {' '.join(parts)}"
    if a[1].startswith("{"):
        sources = elements(a[1])
        width = total // len(sources)
        parts = (f"((uint64_t){e.read(x, f'b{width}')} << {width * i})" for i, x in enumerate(sources))
        return e.write(a[0], f"b{total}", " | ".join(parts))
    return e.write(a[0], op.type, e.read(a[1], op.type))


@instruction("cvt", modifiers="rn rz rni rzi rmi rpi sat satfinite ftz")
def convert(e: Emitter, op: Opcode, a: Operands, line: int) -> str:
    target, source = op.types[0], op.types[-1]
    if source == "e4m3x2" and target == "f16x2":
        codes = e.read(a[1], "b16")
        low, high = (f"(uint32_t)to_f16(float_of_code({codes} >> {bits} & 255))" for bits in (0, 8))
        return e.write(a[0], "b32", f"{high} << 16 | {low}")
    if target == "e4m3x2" and "satfinite" in op.modifiers:  # cvt d, high, low
        high, low = (f"code_of_float({e.read(x, 'f32')})" for x in a[1:3])
        return e.write(a[0], "b16", f"{high} << 8 | {low}")
    if "e4m3x2" in op.types or "satfinite" in op.modifiers:
        raise PtxError("this conversion of 8-bit numbers")
    if target in ("f16x2", "bf16x2"):  # cvt d, high, low
        halves = [f"to_{target.removesuffix('x2')}({e.read(x, 'f32')})" for x in a[1:3]]
        return e.write(a[0], "b32", f"(uint32_t){halves[0]} << 16 | {halves[1]}")
    if target in ("f16", "bf16"):
        return e.write(a[0], "b16", f"to_{target}({e.read(a[1], 'f32')})")
    if source in ("f16", "bf16"):
        return e.write(a[0], target, f"from_{source}({e.read(a[1], 'b16')})")
    value = e.read(a[1], source)
    to_float, from_float = target in ("f32", "f64"), source in ("f32", "f64")
    if "sat" in op.modifiers:
        if not (to_float and from_float):
            raise PtxError("saturating conversion of integers")
        return e.write(a[0], target, f"saturate({value})")
    if from_float and not to_float:
        rounding = {"rni": "nearbyint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
        function = op.one_of(rounding, "")
        if not function:
            raise PtxError("conversion to an integer without rounding")
        return e.write(a[0], target, f"to_integer<{CPP_TYPES[target]}>(std::{function}({value}))")
    if (
        from_float
        and to_float
        and source == target
        and any(m in op.modifiers for m in ("rni", "rzi", "rmi", "rpi"))
    ):
        rounding = {"rni": "nearbyint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
        return e.write(a[0], target, f"std::{op.one_of(rounding, '')}({value})")
    if to_float and "rz" in op.modifiers:
        raise PtxError("conversion that rounds toward zero")
    return e.write(a[0], target, f"({CPP_TYPES[target]})({value})")
