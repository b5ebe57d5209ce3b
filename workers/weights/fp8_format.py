"""FP8 matrices: e4m3 values with a scale for the whole matrix, for each row, or for each block.

Three layouts in files, which differ in names, in what shares a scale, and in how activations are rounded:
`fbgemm_fp8` (transformers' FbgemmFp8Linear over FBGEMM), `compressed-tensors` with format float-quantized, and `fp8`
(DeepSeek-V3's, arXiv:2412.19437, in blocks; AutoFP8's without).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from outrider.workers.weights.inputs import DynamicInputs, Inputs, StaticInputs
from outrider.workers.weights.quantization import Span, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from outrider.workers.weights.scaled import ScaledMatrix

Scope = Literal["tensor", "row", "block"]

_VALUES = ("F8_E4M3",)
_SCALES = ("F32", "BF16", "F16")
_ONE = ((), (1,), (1, 1))  # shapes of a single number
_WEIGHT = "weight"


@dataclass(frozen=True)
class Fp8Format:
    """See `NumberFormat`.

    Attributes:
        scope: what shares a scale.
        block: (rows, columns) of a block; of scope `block` only.
        scale_name: end of the name of the scales' tensor.
        inputs: how rows are rounded; None: they are not, or with the scale that is stored.
        input_scale_name: end of the name of the stored scale of the rows; empty: there is none.
    """

    scope: Scope
    block: tuple[int, int] = (0, 0)
    scale_name: str = "weight_scale"
    inputs: Inputs | None = None
    input_scale_name: str = ""

    def __post_init__(self) -> None:
        assert (self.scope == "block") == (min(self.block) > 0), (self.scope, self.block)
        assert not (self.inputs and self.input_scale_name), "dynamic or static"

    def tensors(self, rows: int, columns: int) -> Mapping[str, StoredTensor]:
        if self.scope == "tensor":
            shapes: tuple[tuple[int, ...], ...] = _ONE
        elif self.scope == "row":
            shapes = ((rows, 1), (rows,))
        else:
            shapes = ((-(-rows // self.block[0]), -(-columns // self.block[1])),)
        found = {
            _WEIGHT: StoredTensor(((rows, columns),), _VALUES),
            self.scale_name: StoredTensor(shapes, _SCALES),
        }
        if self.input_scale_name:
            found[self.input_scale_name] = StoredTensor(_ONE, _SCALES)
        return found

    def parts(self, rows: Span, columns: Span) -> Mapping[str, tuple[Span, Span]]:
        one = (0, 1)
        scales = {"tensor": (one, one), "row": (rows, one), "block": self._blocks(rows, columns)}
        parts = {_WEIGHT: (rows, columns), self.scale_name: scales[self.scope]}
        if self.input_scale_name:
            parts[self.input_scale_name] = (one, one)
        return parts

    def scaled(self, tensors: Mapping[str, Tensor], rows: Span, columns: Span) -> ScaledMatrix:
        import torch  # who asks for sizes alone does without

        from outrider.workers.weights.scaled import ScaledMatrix

        values, scales = tensors[_WEIGHT], tensors[self.scale_name].float()
        num_rows, num_columns = values.shape
        inputs = self.inputs
        if self.input_scale_name:
            inputs = StaticInputs(float(tensors[self.input_scale_name].float()))
        if self.scope != "block":
            scales = scales.expand(num_rows, 1).contiguous()
            return ScaledMatrix(values, scales, max(1, num_columns), inputs=inputs)
        height, width = self.block
        of_rows = torch.arange(*rows) // height - rows[0] // height
        # A part that begins inside a block has a shorter one first: its blocks become several of equal width.
        into = columns[0] % width
        fine = math.gcd(width, into)
        scales = scales.repeat_interleave(width // fine, dim=1)[:, into // fine :]
        scales = scales[of_rows, : -(-num_columns // fine)].contiguous()
        return ScaledMatrix(values, scales, fine, inputs=inputs)

    def loaded_bytes(self, rows: int, columns: int) -> int:
        groups = -(-columns // self.block[1]) if self.scope == "block" else 1
        return rows * columns + 4 * rows * groups

    def _blocks(self, rows: Span, columns: Span) -> tuple[Span, Span]:
        if self.scope != "block":
            return (0, 1), (0, 1)
        height, width = self.block
        return (rows[0] // height, -(-rows[1] // height)), (columns[0] // width, -(-columns[1] // width))


# FBGEMM's quantize_fp8_per_row: https://github.com/pytorch/FBGEMM, fbgemm_gpu/experimental/gen_ai/src/quantize
FBGEMM_LEAST_SCALE = 1 / (448.0 * 512.0)


def fbgemm_fp8(activation_scale_ub: float) -> Fp8Format:
    """A scale per row; activations have one per token, which covers at most `activation_scale_ub`."""
    return Fp8Format("row", inputs=DynamicInputs(bound=activation_scale_ub, least_scale=FBGEMM_LEAST_SCALE))


def block_fp8(height: int, width: int) -> Fp8Format:
    """A scale per block; activations have one for each `width` columns of a token."""
    inputs = DynamicInputs(by_group=True)
    return Fp8Format("block", (height, width), "weight_scale_inv", inputs)
