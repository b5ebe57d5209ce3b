"""Memory of weights and caches: huge pages, and freed memory given back.

With 4 KB pages a product with a large matrix spends part of its time on page-table walks. Linux gives processes
2 MB pages only on request in its usual setting; where the allocation is made inside a library, the request comes
afterwards.
"""

import ctypes
import sys

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20
MADV_HUGEPAGE = 14
MADV_COLLAPSE = 25


def collapse(address: int, num_bytes: int) -> bool:
    """Moves memory that is in use to huge pages now, at most one huge page more at a time (Linux 6.1 or later).

    Returns:
        Whether the kernel did; when it did not, nothing has changed but the speed that is not gained.
    """
    return _advise(address, num_bytes, MADV_COLLAPSE)


def collapse_packed(packed: Tensor) -> bool:
    """`collapse` of a matrix in one of oneDNN's layouts."""
    return collapse(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))


def prefer(tensor: Tensor) -> bool:
    """Asks for huge pages for the memory of a tensor that is not written yet; a request only on the CPU."""
    return tensor.device.type == "cpu" and _advise(tensor.data_ptr(), tensor.nbytes, MADV_HUGEPAGE)


def release_freed() -> None:
    """Gives freed memory inside the heap back to the system: packing leaves holes of the size of a matrix."""
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))


def _advise(address: int, num_bytes: int, advice: int) -> bool:
    """madvise(2) on the whole huge pages inside a range, so that nothing beside it is touched."""
    first = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    last = (address + num_bytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if sys.platform != "linux" or last <= first:
        return False
    libc = ctypes.CDLL(None)
    return libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(advice)) == 0
