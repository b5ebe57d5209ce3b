"""Which matrices of a checkpoint are stored as narrow numbers, and how: what `quantization_config` comes to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from outrider.workers.weights.scaled import ScaledMatrix

Span = tuple[int, int]  # from, and up to without
Shape = tuple[int, ...]

_PLAIN = ("norm", "embed_tokens")  # how modules end that have a weight and are no linear layers


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file must have it.

    Attributes:
        shapes: any of these.
        formats: the types that it may have, as safetensors names them; None: any whose values mean themselves.
    """

    shapes: tuple[Shape, ...]
    formats: tuple[str, ...] | None


class NumberFormat(Protocol):
    """How the matrices of some modules are stored. Implementations are frozen dataclasses.

    A format knows its tensors by the ends of their names, those behind the module's: "weight", "weight_scale".
    """

    def tensors(self, rows: int, columns: int) -> Mapping[str, StoredTensor]:
        """What a matrix of that size is stored in; the tensor with the values comes first."""
        ...

    def parts(self, rows: Span, columns: Span) -> Mapping[str, tuple[Span, Span]]:
        """Rows and columns of each tensor that a part of the matrix is made of. A vector is one column, and a number
        one of one row."""
        ...

    def scaled(self, tensors: Mapping[str, Tensor], rows: Span, columns: Span) -> ScaledMatrix:
        """That part of the matrix, out of its `parts`, each of two dimensions."""
        ...

    def loaded_bytes(self, rows: int, columns: int) -> int:
        """What a `ScaledMatrix` of that size takes in memory."""
        ...


@dataclass(frozen=True)
class ModuleNames:
    """A set of modules by their names.

    Attributes:
        every: all of them, whatever their names.
        starting: regular expressions, which match at the start of a name.
        ending: ends of names.
    """

    every: bool = False
    starting: tuple[str, ...] = ()
    ending: tuple[str, ...] = ()

    def __contains__(self, module: str) -> bool:
        if self.every or module.endswith(self.ending):
            return True
        return bool(self.starting) and _any_of(self.starting).match(module) is not None


@dataclass(frozen=True)
class FormatRule:
    """Modules, and the format of those among them that no rule before has taken."""

    modules: ModuleNames
    format: NumberFormat


@dataclass(frozen=True)
class Quantization:
    """What a model's `quantization_config` says.

    Attributes:
        method: its name there.
        rules: the first one that has a module decides.
        plain: modules that are stored plainly, whatever the rules say.
        cache_is_fp8: the checkpoint was made for a KV cache in FP8, and has a scale for the keys and one for the
            values of each layer.
    """

    method: str
    rules: tuple[FormatRule, ...]
    plain: ModuleNames
    cache_is_fp8: bool = False

    def format_of(self, name: str) -> NumberFormat | None:
        """Of a tensor by its Hugging Face name; None: it is stored plainly, or is no matrix of a linear layer."""
        module = name.removesuffix(".weight")
        if module == name or module.endswith(_PLAIN) or module in self.plain:
            return None
        return next((rule.format for rule in self.rules if module in rule.modules), None)


def format_of(quantization: Quantization | None, name: str) -> NumberFormat | None:
    """`Quantization.format_of`, of a model that may have none."""
    return None if quantization is None else quantization.format_of(name)


def stem(name: str) -> str:
    """What the names of the tensors of a matrix begin with: its own without "weight" at the end."""
    return name.removesuffix("weight")


def check_expressions(key: str, expressions: Sequence[str]) -> None:
    """Raises ValueError for what is no regular expression; `key` names the field that it comes from."""
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(f"{key} must hold regular expressions, got {expression!r}: {error}") from error


@lru_cache(maxsize=8)
def _any_of(expressions: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{expression})" for expression in expressions))
