"""Memory of this process."""

from __future__ import annotations

from pathlib import Path


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far, in bytes; 0 where /proc is missing.

    Not getrusage: a process that was spawned may inherit its parent's peak there.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
