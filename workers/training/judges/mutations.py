"""Changes of Python programs: faults that a programmer makes, and other ways to write the same.

Whether a change is what it is meant to be, tests decide: a fault must fail them and a variation pass.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from outrider.workers.training.judges.edits import Edit, apply_all

_BINARY: dict[type[ast.operator], tuple[str, tuple[str, ...]]] = {
    ast.Add: ("+", ("-", "*")),
    ast.Sub: ("-", ("+",)),
    ast.Mult: ("*", ("+", "//")),
    ast.Div: ("/", ("*",)),
    ast.FloorDiv: ("//", ("*", "%")),
    ast.Mod: ("%", ("//",)),
}
_COMPARED: dict[type[ast.cmpop], tuple[str, tuple[tuple[str, str], ...]]] = {
    ast.Lt: ("<", (("off by one", "<="), ("negated", ">="))),
    ast.LtE: ("<=", (("off by one", "<"), ("negated", ">"))),
    ast.Gt: (">", (("off by one", ">="), ("negated", "<="))),
    ast.GtE: (">=", (("off by one", ">"), ("negated", "<"))),
    ast.Eq: ("==", (("negated", "!="),)),
    ast.NotEq: ("!=", (("negated", "=="),)),
}
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_COMMUTING = (ast.Add, ast.Mult)


@dataclass(frozen=True)
class Variation:
    """A whole program that shall do the same."""

    kind: str
    code: str


class Program:
    """Python source and where its parts are.

    Attributes:
        code: the source.
    """

    def __init__(self, code: str) -> None:
        """Raises ValueError for what is not Python."""
        self.code = code
        try:
            self._tree = ast.parse(code)
        except (SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"not Python: {error}") from error
        self._lines = code.splitlines(keepends=True)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))

    def faults(self) -> Iterator[Edit]:
        """Operators swapped, comparisons off by one or negated, numbers off by one, wrong variables."""
        for function in _functions(self._tree):
            names = sorted(_own_names(function))
            for node in ast.walk(function):
                yield from self._faults_of(node, names)

    def variations(self) -> Iterator[Variation]:
        """Variables renamed, operands and comparisons the other way round, `x += y` written out."""
        for function in _functions(self._tree):
            for name in sorted(_own_names(function)):
                for other in (f"{name}_value", f"current_{name}", f"the_{name}"):
                    yield Variation("renamed", self._renamed(function, name, other))
            for node in ast.walk(function):
                for edit in self._rewritten(node):
                    yield Variation(edit.kind, edit.apply(self.code))

    def _faults_of(self, node: ast.AST, names: list[str]) -> Iterator[Edit]:
        match node:
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                symbol, others = _BINARY[type(op)]
                yield from self._swapped("operator", left, symbol, others, right)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARED:
                symbol, kinds = _COMPARED[type(op)]
                for kind, other in kinds:
                    yield from self._swapped(kind, left, symbol, (other,), right)
            case ast.BoolOp(op=op, values=[first, second, *_]):
                symbol, other = ("and", "or") if isinstance(op, ast.And) else ("or", "and")
                yield from self._swapped("operator", first, symbol, (other,), second)
            case ast.If(test=test) | ast.While(test=test):
                start, end = self._place(test)
                # The mistake is the negation; what stands in the brackets is as it was.
                yield Edit("negated", start, end, f"not ({self.code[start:end]})", num_marked=len("not ("))
            case ast.Constant(value=int() as number) if not isinstance(number, bool):
                start, end = self._place(node)
                for near in (number + 1, number - 1):
                    yield Edit("off by one", start, end, str(near))
            case ast.Name(id=name, ctx=ast.Load()) if name in names:
                start, end = self._place(node)
                for variable in names:
                    if variable != name:
                        yield Edit("variable", start, end, variable)
            case _:
                return

    def _swapped(
        self, kind: str, left: ast.expr, symbol: str, others: tuple[str, ...], right: ast.expr
    ) -> Iterator[Edit]:
        start, end = self._place(left)[1], self._place(right)[0]
        between = self.code[start:end]
        # Brackets may stand there, too; a comment would hide where the operator is.
        if between.count(symbol) == 1 and "#" not in between:
            place = start + between.index(symbol)
            for other in others:
                yield Edit(kind, place, place + len(symbol), other)

    def _rewritten(self, node: ast.AST) -> Iterator[Edit]:
        match node:
            case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _COMMUTING):
                symbol = _BINARY[type(op)][0]
                yield from self._turned("reordered", node, left, symbol, right)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARED:
                yield from self._turned("turned round", node, left, _TURNED[_COMPARED[type(op)][0]], right)
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value) if type(op) in _BINARY:
                start, end = self._place(node)
                first, behind = self._place(value)
                text = f"{name} = {name} {_BINARY[type(op)][0]} ({self.code[first:behind]})"
                if isinstance(value, ast.Constant | ast.Name):
                    text = text.replace("(", "").replace(")", "")
                yield Edit("written out", start, end, text)
            case _:
                return

    def _turned(
        self, kind: str, node: ast.expr, left: ast.expr, symbol: str, right: ast.expr
    ) -> Iterator[Edit]:
        simple = (ast.Name, ast.Constant, ast.Call, ast.Subscript, ast.Attribute)
        if isinstance(left, simple) and isinstance(right, simple):
            (start, end), (a, b), (c, d) = self._place(node), self._place(left), self._place(right)
            yield Edit(kind, start, end, f"{self.code[c:d]} {symbol} {self.code[a:b]}")

    def _renamed(self, function: ast.FunctionDef, name: str, other: str) -> str:
        edits = []
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and node.id == name:
                edits.append(Edit("renamed", *self._place(node), other))
            elif isinstance(node, ast.arg) and node.arg == name:
                start = self._place(node)[0]
                edits.append(Edit("renamed", start, start + len(name), other))
        return apply_all(edits, self.code)

    def _place(self, node: ast.expr | ast.stmt | ast.arg | ast.AST) -> tuple[int, int]:
        """First character and the one behind the last."""
        assert isinstance(node, ast.expr | ast.stmt | ast.arg)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._at(node.lineno, node.col_offset), self._at(node.end_lineno, node.end_col_offset)

    def _at(self, line: int, num_bytes: int) -> int:
        before = self._lines[line - 1].encode()[:num_bytes]
        return self._starts[line - 1] + len(before.decode())


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in tree.body if isinstance(node, ast.FunctionDef))


def _own_names(function: ast.FunctionDef) -> set[str]:
    """Arguments and variables of a function, as far as a change of them stays inside of it."""
    names = {argument.arg for argument in function.args.args}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            return set()
    return names
