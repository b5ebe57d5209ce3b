"""Reads of large parts of files by several threads at once, straight into place.

One thread waits for one read at a time: disks, and file systems behind a network more so, give a multiple of that to
several. Threads help because reading, and converting what was read, leave Python's lock alone. What is in flight is
bounded: a part for each thread.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from outrider.workers.weights.data_file import DataFile
from outrider.workers.weights.source import read_rectangle

NUM_THREADS = 8
PART_BYTES = 4 << 20


class Reader:
    """Threads that read together. Several threads may ask; those of this reader may not."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(NUM_THREADS, "read weights")

    def rectangle(
        self,
        file: DataFile,
        offset: int,
        row_bytes: int,
        rows: tuple[int, int],
        window: tuple[int, int],
        out: torch.Tensor,
    ) -> None:
        """`read_rectangle`, in parts of some rows."""
        start, stop = rows

        def read(first: int, last: int) -> None:
            part = (start + first, start + last)
            read_rectangle(file, offset, row_bytes, part, window, out[first:last])

        self.each(stop - start, max(1, PART_BYTES // max(1, window[1] - window[0])), read)

    def each(self, count: int, step: int, work: Callable[[int, int], None]) -> None:
        """`work(first, last)` for all parts of up to `step` of `count`, in any order; the first error is raised."""
        parts = [(first, min(first + step, count)) for first in range(0, count, step)]
        if len(parts) == 1:  # nothing to share out, and so what is shared out may ask for it
            work(*parts[0])
            return
        for _ in self._threads.map(work, *zip(*parts, strict=True)):
            pass
