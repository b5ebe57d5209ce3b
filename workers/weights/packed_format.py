"""Integers in files: packed into words of 32 bits, or a byte each, with scales and zero points.

Four layouts, in which value = (integer - zero) * scale, integers and zeros being counted from 0:

- `pack-quantized` of compressed-tensors: words along a row of [out, in]; zeros packed along the other side.
- `int-quantized` of compressed-tensors: a signed byte each.
- GPTQ (arXiv:2210.17323): words along a column of [in, out]; zeros along the other side, stored less 1 in files of
  its first version. https://github.com/ModelCloud/GPTQModel
- AWQ (arXiv:2306.00978), its layout GEMM: words along a row of [in, out], each with its integers interleaved; zeros
  alike. https://github.com/casper-hansen/AutoAWQ, `utils/packing_utils.py`
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from outrider.workers.weights.quantization import Span, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from outrider.workers.weights.scaled import ScaledMatrix

Layout = Literal["packed", "bytes", "gptq", "awq"]

_SCALES = ("F32", "BF16", "F16")
_WORD = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which integer of eight the four bits of a word hold, lowest first


@dataclass(frozen=True)
class PackedFormat:
    """See `NumberFormat`.

    Attributes:
        layout: of a file, see above.
        bits: of an integer, 4 or 8.
        group: columns that share a scale; 0: all of a row.
        zeros: whether there are zero points; without, zero is the middle integer.
        zero_offset: what is added to a stored zero point.
        has_order: whether there is a `g_idx`, the group of each column; it must be the column's own.
    """

    layout: Layout
    bits: Literal[4, 8]
    group: int
    zeros: bool
    zero_offset: int = 0
    has_order: bool = False

    @property
    def _per_word(self) -> int:
        return _WORD // self.bits

    @property
    def _is_transposed(self) -> bool:
        return self.layout in ("gptq", "awq")

    def tensors(self, rows: int, columns: int) -> Mapping[str, StoredTensor]:
        groups = -(-columns // self.group) if self.group else 1
        per_word = self._per_word
        if self._is_transposed:
            is_gptq = self.layout == "gptq"
            words = (-(-columns // per_word), rows) if is_gptq else (columns, -(-rows // per_word))
            found = {
                "qweight": StoredTensor((words,), ("I32",)),
                "scales": StoredTensor(((groups, rows),), _SCALES),
                "qzeros": StoredTensor(((groups, -(-rows // per_word)),), ("I32",)),
            }
            if self.has_order:
                found["g_idx"] = StoredTensor(((columns,),), ("I32", "I64"))
            return found
        scales = ((rows, groups), (rows,)) if groups == 1 else ((rows, groups),)
        if self.layout == "bytes":
            found = {"weight": StoredTensor(((rows, columns),), ("I8",))}
            zeros = StoredTensor(scales, ("I8",))
        else:
            found = {
                "weight_packed": StoredTensor(((rows, -(-columns // per_word)),), ("I32",)),
                "weight_shape": StoredTensor(((2,),), ("I64", "I32")),
            }
            zeros = StoredTensor(((-(-rows // per_word), groups),), ("I32",))
        found["weight_scale"] = StoredTensor(scales, _SCALES)
        return {**found, "weight_zero_point": zeros} if self.zeros else found

    def parts(self, rows: Span, columns: Span) -> Mapping[str, tuple[Span, Span]]:
        groups = _over(columns, self.group) if self.group else (0, 1)
        row_words, column_words = _over(rows, self._per_word), _over(columns, self._per_word)
        if self._is_transposed:
            words = (column_words, rows) if self.layout == "gptq" else (columns, row_words)
            found = {"qweight": words, "scales": (groups, rows), "qzeros": (groups, row_words)}
            return {**found, "g_idx": (columns, (0, 1))} if self.has_order else found
        if self.layout == "bytes":
            found = {"weight": (rows, columns)}
            zeros = rows, groups
        else:
            found = {"weight_packed": (rows, column_words), "weight_shape": ((0, 2), (0, 1))}
            zeros = row_words, groups
        found["weight_scale"] = rows, groups
        return {**found, "weight_zero_point": zeros} if self.zeros else found

    def scaled(self, tensors: Mapping[str, Tensor], rows: Span, columns: Span) -> ScaledMatrix:
        from outrider.workers.weights.scaled import (
            ScaledMatrix,  # with torch, which who asks for sizes does without
        )

        middle = 1 << (self.bits - 1)
        zeros: Tensor | None = None
        if self._is_transposed:
            words = tensors["qweight"]
            is_gptq = self.layout == "gptq"
            values = self._unpacked(words.t(), columns) if is_gptq else self._unpacked(words, rows).t()
            scales = tensors["scales"].float().t()
            # 15 and 1 are 0, as in ExLlama's kernels: what was stored is 0 less 1.
            stored = self._unpacked(tensors["qzeros"], rows).t() + self.zero_offset
            zeros = (stored & ((1 << self.bits) - 1)).float()
            if self.has_order:
                self._check_order(tensors["g_idx"].flatten(), columns)
        else:
            scales = tensors["weight_scale"].float()
            if self.layout == "bytes":
                values = tensors["weight"].int() + middle
                if self.zeros:
                    zeros = tensors["weight_zero_point"].float() + middle
            else:
                values = self._unpacked(tensors["weight_packed"], columns)
                if self.zeros:
                    zeros = self._unpacked(tensors["weight_zero_point"].t(), rows).t().float()
        width = max(1, columns[1] - columns[0])
        group = width
        if self.group:
            # A part that begins inside a group has a shorter one first: its groups become several of equal width.
            into = columns[0] % self.group
            group = math.gcd(self.group, into)
            kept = slice(into // group, into // group + -(-width // group))
            times = self.group // group
            scales = scales.repeat_interleave(times, dim=1)[:, kept]
            zeros = None if zeros is None else zeros.repeat_interleave(times, dim=1)[:, kept]
        scales = scales.contiguous()
        if self.bits == 4:
            shifts = (-middle if zeros is None else -zeros) * scales
            return ScaledMatrix(values.byte().contiguous(), scales, group, shifts)
        shifts_of_bytes = None if zeros is None else (middle - zeros) * scales
        return ScaledMatrix((values - middle).char().contiguous(), scales, group, shifts_of_bytes)

    def loaded_bytes(self, rows: int, columns: int) -> int:
        groups = -(-columns // self.group) if self.group else 1
        if self.bits == 8:
            return rows * (columns + 4 * groups)
        return rows * (-(-columns // 2) + 4 * groups)

    def _unpacked(self, words: Tensor, kept: Span) -> Tensor:
        """int32 [n, words] -> int32 [n, kept]: the integers `kept` of the rows that the words are a part of."""
        order = _AWQ_ORDER if self.layout == "awq" else range(self._per_word)
        at = words.new_tensor([order.index(place) * self.bits for place in range(self._per_word)])
        values = (words[:, :, None] >> at) & ((1 << self.bits) - 1)
        first = kept[0] % self._per_word
        return values.flatten(1)[:, first : first + kept[1] - kept[0]]

    def _check_order(self, groups: Tensor, columns: Span) -> None:
        own = [column // (self.group or columns[1]) for column in range(*columns)]
        if groups.tolist() != own:
            raise ValueError(
                "g_idx must be the group of each column in order: columns sorted by activations (desc_act) cannot be "
                "read"
            )


def _over(span: Span, unit: int) -> Span:
    return span[0] // unit, -(-span[1] // unit)
