"""What Ray leaves in /tmp/ray: folders go with their sessions, and those of killed processes later."""

import os
import subprocess
import sys
from pathlib import Path

from outrider.cluster.session_folder import SessionFolder, remove_abandoned

DAYS = 24 * 3600.0


def folder(root: Path, name: str) -> Path:
    path = root / f"session_{name}"
    (path / "logs").mkdir(parents=True)
    return path


def aged(path: Path) -> Path:
    """Its mark is two days old."""
    mark = path / "outrider"
    before = mark.stat().st_mtime - 2 * DAYS
    os.utime(mark, (before, before))
    return path


def test_a_folder_goes_with_its_session_unless_that_failed(tmp_path: Path) -> None:
    gone, kept = (SessionFolder(folder(tmp_path, name)) for name in "ab")
    assert gone.path.stat().st_mode & 0o777 == 0o700
    gone.close(keep=False)
    kept.close(keep=True)
    assert not gone.path.exists()
    assert (kept.path / "logs").exists()


def test_folders_of_dead_processes_go_after_a_day_and_others_stay(tmp_path: Path) -> None:
    living = SessionFolder(folder(tmp_path, "living"))
    aged(living.path)
    killed, recent, foreign = (folder(tmp_path, name) for name in ("killed", "recent", "foreign"))
    script = "import os, sys\nfrom pathlib import Path\nfrom outrider.cluster.session_folder import SessionFolder\n"
    script += "SessionFolder(Path(sys.argv[1]))\nos._exit(0)"
    for path in (killed, recent):
        subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=120)
    aged(killed)
    latest = tmp_path / "session_latest"
    latest.symlink_to(killed)
    remove_abandoned(tmp_path)
    assert not killed.exists()
    assert all(path.exists() for path in (living.path, recent, foreign))
    living.close(keep=False)
    remove_abandoned(tmp_path)  # a link that leads nowhere is nothing
