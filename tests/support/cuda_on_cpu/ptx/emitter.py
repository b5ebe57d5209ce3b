"""Turns PTX kernels into C++ functions for the CPU runtime: registers become unsigned locals, statements C++ ones."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

from support.cuda_on_cpu.ptx.parser import PtxError, PtxKernel, PtxModule, Statement, parse_ptx

CPP_TYPES = {
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
}
TYPES = {*CPP_TYPES, "pred", "f16", "bf16", "f16x2", "bf16x2", "e4m3x2"}
SPECIAL_REGISTERS = {
    **{
        f"%{name}.{axis}": f"cuda_on_cpu::{variable}->{axis}"
        for name, variable in (
            ("tid", "thread_index"),
            ("ctaid", "block_index"),
            ("ntid", "block_size"),
            ("nctaid", "grid_size"),
        )
        for axis in "xyz"
    },
    "%laneid": "cuda_on_cpu::lane_number()",
    "%warpid": "(cuda_on_cpu::thread_number >> 5)",
}
# Registers start as something that is neither zero nor a valid address; as a float it is NaN.
POISON = {1: "false", 16: "0xdead", 32: "0xffdeadffu", 64: "0xdeadffffdeadffffull"}


@dataclass(frozen=True)
class Opcode:
    """`root.modifier.type`, e.g. setp.lt.and.s32. `types` are those of its parts that name a type."""

    text: str

    @cached_property
    def root(self) -> str:
        return self.text.split(".")[0]

    @cached_property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.text.split(".")[1:])

    @cached_property
    def types(self) -> tuple[str, ...]:
        return tuple(part for part in self.parts if part in TYPES)

    @cached_property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(part for part in self.parts if part not in TYPES)

    @cached_property
    def type(self) -> str:
        if not self.types:
            raise PtxError(f"{self.text} names no type")
        return self.types[-1]

    @cached_property
    def is_float(self) -> bool:
        return self.type in ("f32", "f64")

    def one_of(self, choices: dict[str, str], default: str) -> str:
        """What the modifier that occurs in `choices` stands for."""
        return next((choices[m] for m in self.modifiers if m in choices), default)


@cache
def opcode_of(text: str) -> Opcode:
    """One for all statements that have it: taking it apart is a third of a translation."""
    return Opcode(text)


class Emitter:
    """C++ of one kernel's operands."""

    def __init__(self, kernel: PtxKernel, shared: dict[str, int]) -> None:
        self.kernel = kernel
        self.shared = shared

    def read(self, operand: str, kind: str) -> str:
        """The operand as a C++ expression of a PTX type (`pred` is bool)."""
        if operand.startswith("!") and kind == "pred":
            return f"!{self.read(operand[1:].strip(), kind)}"
        if operand in SPECIAL_REGISTERS:
            return f"({CPP_TYPES[kind]})({SPECIAL_REGISTERS[operand]})"
        if operand.startswith("%"):
            self._width(operand)
            name = identifier(operand)
            if kind == "pred":
                return name
            return f"as_{kind}({name})" if kind in ("f32", "f64") else f"({CPP_TYPES[kind]}){name}"
        if operand in self.shared:
            return f"({CPP_TYPES[kind]}){self.shared[operand]}"
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            return f"as_f32(0x{match[1]}u)" if kind == "f32" else f"({CPP_TYPES[kind]})0x{match[1]}u"
        if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand):
            return f"as_f64(0x{match[1]}ull)" if kind == "f64" else f"({CPP_TYPES[kind]})0x{match[1]}ull"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            number = operand.rstrip("U")
            if kind == "pred":
                return "false" if int(number, 0) == 0 else "true"
            if kind not in ("f32", "f64"):
                return f"({CPP_TYPES[kind]}){int(number, 0) & (1 << 64) - 1}ull"
        raise PtxError(f"operand {operand} as {kind}")

    def write(self, register: str, kind: str, value: str) -> str:
        """A C++ statement that assigns an expression of a PTX type to a register."""
        if register == "_":
            return f"(void)({value});"
        width = self._width(register)
        if kind in ("f32", "f64"):
            return f"{identifier(register)} = bits_{kind}({value});"
        if kind == "pred":
            return f"{identifier(register)} = ({value});"
        return f"{identifier(register)} = (uint{width}_t)({CPP_TYPES[kind]})({value});"

    def address(self, operand: str, space: str) -> str:
        """`[base + offset]` as a char*; shared addresses are offsets into the block's shared memory."""
        match = re.fullmatch(r"\[\s*([^+\-\s]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if not match:
            raise PtxError(f"address {operand}")
        base, offset = match[1], match[2] or "0"
        if space == "param":
            return f"((char*)parameters[{self.kernel.parameters.index(base)}] + {offset})"
        if space == "shared":
            return f"(shared_memory + (uint32_t)({self.read(base, 'u32')} + {offset}))"
        return f"((char*)({self.read(base, 'u64')}) + (int64_t){offset})"

    def _width(self, register: str) -> int:
        if register not in self.kernel.registers:
            raise PtxError(f"register {register} is not declared")
        return self.kernel.registers[register]


def identifier(name: str) -> str:
    return name.replace("%", "R_").replace("$", "L_")


Handler = Callable[[Emitter, Opcode, tuple[str, ...], int], str]
HANDLERS: dict[str, tuple[Handler, frozenset[str]]] = {}


def instruction(*roots: str, modifiers: str = "") -> Callable[[Handler], Handler]:
    """Registers the translation of instructions. A modifier that is not listed makes them unknown."""

    def register(handler: Handler) -> Handler:
        for root in roots:
            HANDLERS[root] = (handler, frozenset(modifiers.split()))
        return handler

    return register


def emit_statement(emitter: Emitter, statement: Statement) -> str:
    labels = "".join(f"{identifier(label)}:; " for label in statement.labels)
    if not statement.opcode:
        return labels
    opcode = opcode_of(statement.opcode.replace("::", "_"))
    try:
        if opcode.root not in HANDLERS:
            raise PtxError("unknown instruction")
        handler, known = HANDLERS[opcode.root]
        unknown = [m for m in opcode.modifiers if m not in known]
        if unknown:
            raise PtxError(f"unknown modifier {unknown[0]}")
        code = handler(emitter, opcode, statement.operands, statement.line)
    except (PtxError, ValueError, KeyError, IndexError) as error:
        where = f"{emitter.kernel.name} line {statement.line}: {statement.opcode}"
        raise PtxError(f"{error}, {where} {', '.join(statement.operands)}") from error
    guard = f"if ({emitter.read(statement.guard, 'pred')}) " if statement.guard else ""
    return f"{labels}{guard}{{ {code} }}"


def emit_kernel(kernel: PtxKernel, shared: dict[str, int]) -> str:
    emitter = Emitter(kernel, shared)
    lines = [
        f"static void {kernel.name}(void** parameters) {{",
        "char* const shared_memory = (char*)cuda_on_cpu::dynamic_shared();",
    ]
    for width, poison in POISON.items():
        names = [f"{identifier(r)} = {poison}" for r, w in kernel.registers.items() if w == width]
        if names:
            lines.append(f"{'bool' if width == 1 else f'uint{width}_t'} {', '.join(names)};")
    lines += [emit_statement(emitter, statement) for statement in kernel.statements]
    return "\n  ".join([*lines, "(void)shared_memory; (void)parameters;"]) + "\n}\n"


def translate(ptx: str, names: list[str]) -> str:
    """C++ of some kernels of a PTX module, or of all where `names` is empty. Raises PtxError."""
    module: PtxModule = parse_ptx(ptx)
    kernels = [k for k in module.kernels if not names or k.name in names]
    missing = set(names) - {k.name for k in kernels}
    if missing or not kernels:
        raise PtxError(f"no kernels {sorted(missing)} in the PTX")
    return '#include "ptx_prelude.h"\n' + "".join(emit_kernel(k, module.shared) for k in kernels)
