"""Files that several threads and processes read parts of."""

import os
from pathlib import Path


class DataFile:
    """A file read at given offsets without a shared position, hence safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def require(self, num_bytes: int) -> None:
        """Raises ValueError when the file is shorter, e.g. because a download was interrupted."""
        size = os.fstat(self._descriptor).st_size
        if size < num_bytes:
            raise ValueError(f"{self.path} is truncated: it has {size} of {num_bytes} bytes")

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` (bytes) from `offset`.

        Raises ValueError when the file ends before, OSError with the file's name when it cannot be read.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            if count == 0:
                raise ValueError(
                    f"{self.path} ends before byte {offset + len(buffer)}: the file is truncated"
                )
            done += count

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
