"""How the rows that a matrix in FP8 is multiplied with are rounded."""

import math
from dataclasses import dataclass

_LEAST_NORMAL = 2.0**-126  # of float32


@dataclass(frozen=True)
class DynamicInputs:
    """Rows are rounded to FP8 before they are multiplied; their scales follow from the rows themselves.

    Attributes:
        by_group: a scale for each group of columns that share one in the matrix; else one for the row.
        bound: greatest magnitude that a scale covers; what is above it is cut to it.
        least_scale: smallest scale.
    """

    by_group: bool = False
    bound: float = math.inf
    least_scale: float = _LEAST_NORMAL


@dataclass(frozen=True)
class StaticInputs:
    """Rows are rounded to FP8 before they are multiplied, all with one scale that was calibrated."""

    scale: float


Inputs = DynamicInputs | StaticInputs
