"""Reads PTX text, as NVRTC and Triton write it, into kernels and statements."""

import re
from dataclasses import dataclass
from functools import lru_cache


class PtxError(ValueError):
    """Something in the PTX that is not understood. Never skipped: what is not run is not checked."""


@dataclass(frozen=True)
class Statement:
    """`label: @!guard opcode operands;`, each part may be missing (then it is empty)."""

    line: int
    labels: tuple[str, ...]
    guard: str
    opcode: str
    operands: tuple[str, ...]


@dataclass(frozen=True)
class PtxKernel:
    """One `.entry`: parameter names in order, register widths in bits (1 = predicate), statements."""

    name: str
    parameters: tuple[str, ...]
    registers: dict[str, int]
    statements: tuple[Statement, ...]


@dataclass(frozen=True)
class PtxModule:
    """Kernels, and the offset in shared memory of every `.shared` symbol (static ones first, dynamic behind)."""

    kernels: tuple[PtxKernel, ...]
    shared: dict[str, int]


@lru_cache(1)  # a module is translated in parts
def parse_ptx(text: str) -> PtxModule:
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"(?m)^[ \t]*\.(loc|file)\b[^\n]*$", "", text)  # lines without a semicolon
    text = re.split(r"(?m)^\s*\.section", text)[0]  # debug information, at the end
    kernels = []
    for entry in re.finditer(r"\.entry\s+(\w+)\s*\(([^)]*)\)", text):
        begin = text.index("{", entry.end())
        end = _matching_brace(text, begin)
        parameters = tuple(re.sub(r"\[\d+\]", "", p.split()[-1]) for p in entry[2].split(",") if p.strip())
        first_line = text.count("\n", 0, begin) + 1
        registers, statements = _parse_body(text[begin + 1 : end], first_line)
        kernels.append(PtxKernel(entry[1], parameters, registers, tuple(statements)))
    return PtxModule(tuple(kernels), _shared_symbols(text))


def _shared_symbols(text: str) -> dict[str, int]:
    offsets: dict[str, int] = {}
    size = 0
    for symbol in re.finditer(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\]", text):
        alignment = int(symbol[1])
        size = -(-size // alignment) * alignment
        offsets[symbol[2]] = size
        size += int(symbol[3] or 0)
    return offsets


def _matching_brace(text: str, begin: int) -> int:
    depth = 0
    for brace in re.compile("[{}]").finditer(text, begin):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise PtxError("unbalanced braces")


def _parse_body(body: str, line: int) -> tuple[dict[str, int], list[Statement]]:
    """Cuts at semicolons. A brace that begins a statement opens a scope; its registers join the kernel's."""
    registers: dict[str, int] = {}
    statements: list[Statement] = []
    *pieces, end = body.split(";")
    for piece in (*pieces, end) if end.strip("{} \t\n") else pieces:  # labels may stand at the very end
        leading = re.match(r"[\s{}]*", piece)
        assert leading is not None
        start = line + leading[0].count("\n")
        line += piece.count("\n")
        source = piece[leading.end() :].replace("\n", " ").strip()
        if source.startswith(".reg"):
            _declare(registers, source, start)
        else:
            statements.append(_parse_statement(source, start))
    return registers, statements


def _declare(registers: dict[str, int], source: str, line: int) -> None:
    match = re.fullmatch(r"\.reg\s+\.(pred|[busf])(\d*)\s+(.*)", source, re.DOTALL)
    if not match:
        raise PtxError(f"line {line}: {source}")
    width = 1 if match[1] == "pred" else int(match[2])
    for name in match[3].split(","):
        family = re.fullmatch(r"(%\w+)<(\d+)>", name.strip())
        names = [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [name.strip()]
        for register in names:
            if registers.setdefault(register, width) != width:
                raise PtxError(f"line {line}: {register} is declared in two widths")


def _parse_statement(source: str, line: int) -> Statement:
    labels = []
    while match := re.match(r"([$\w]+):\s*", source):
        labels.append(match[1])
        source = source[match.end() :]
    guard = ""
    if match := re.match(r"@(!?%\w+)\s+", source):
        guard, source = match[1], source[match.end() :]
    if not source or source.startswith(".pragma"):
        return Statement(line, tuple(labels), "", "", ())
    match = re.fullmatch(r"([a-z][\w.:]*)\s*(.*)", source, re.DOTALL)
    if not match:
        raise PtxError(f"line {line}: {source[:80]}")
    return Statement(line, tuple(labels), guard, match[1], tuple(_split_operands(match[2])))


def _split_operands(text: str) -> list[str]:
    """Splits at commas outside braces and brackets."""
    if "{" not in text and "[" not in text:
        *others, last = map(str.strip, text.split(","))
        return [*others, last] if last else others
    operands, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            operands.append(current.strip())
            current = ""
        else:
            current += character
    return [*operands, current.strip()] if current.strip() else operands


def elements(operand: str) -> list[str]:
    """The members of `{a, b}`; a plain operand is its own only member."""
    return [x.strip() for x in operand.strip().removeprefix("{").removesuffix("}").split(",")]
