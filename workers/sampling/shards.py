"""What sampling asks of one rank's logits: on the host (`ShardLogits`), or where a GPU left them (`DeviceShard`).

Both answer for several rows at a time, with the same numbers but for the rounding of exp and log: all ranks of a
group use the same kind (`agreed_kernels`).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from outrider.kernels.noise import Float32Array, Int64Array, UInt32Array
from outrider.kernels.token_rows import UInt64Array


class Shard(Protocol):
    """Logits of several rows over the token ids of one rank; packed tokens are those of `pack_tokens`.

    `rows` are int64 [n], ascending. Rows without a finite maximum over the whole vocabulary may be asked for their
    maxima only.
    """

    def logits(self, rows: Int64Array, ids: Int64Array) -> Float32Array:
        """[n]: the logit of ids[i] in rows[i]; the ids are in this shard."""
        ...

    def maxima(self, rows: Int64Array) -> Float32Array:
        """[n]: the largest logit of each row; NaN if the row has one."""
        ...

    def exp_sums(
        self, rows: Int64Array, maxima: Float32Array, temperatures: Float32Array
    ) -> npt.NDArray[np.float64]:
        """[n]: of each row the sum of exp((logit - maximum) / temperature), for the finite maxima given."""
        ...

    def weighted_sums(
        self, rows: Int64Array, maxima: Float32Array, temperatures: Float32Array
    ) -> npt.NDArray[np.float64]:
        """[n]: of each row the sum of x * exp(x) where x = (logit - maximum) / temperature, finite maxima given."""
        ...

    def largest(self, rows: Int64Array, count: int) -> Float32Array:
        """[n, at most count]: the largest logits of each row in order; all, if there are fewer."""
        ...

    def top(self, rows: Int64Array, count: int) -> UInt64Array:
        """[n, at most count]: packed tokens of the largest logits in order; all, if there are fewer."""
        ...

    def best(
        self, rows: Int64Array, temperatures: Float32Array, keys: UInt32Array, count: int
    ) -> UInt64Array:
        """[n, count]: packed tokens of the best scores logit / temperature + noise of each row, in order.

        Temperature 0 ranks by the logits alone. `count` is at most the size of the shard.
        """
        ...

    def best_kept(
        self,
        rows: Int64Array,
        lowest: Float32Array,
        num_lowest: Int64Array,
        temperatures: Float32Array,
        keys: UInt32Array,
        count: int,
    ) -> UInt64Array:
        """As `best`, of rows that keep logits above lowest [n] and the first num_lowest [n] that equal it.

        The other tokens count as removed. Temperatures > 0.
        """
        ...
