"""The same configuration over several nodes: Ray's own test cluster, four raylets on this host."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import spread_nodes


@pytest.mark.slow
def test_ranks_on_different_nodes_give_the_text_of_one() -> None:
    script = Path(spread_nodes.__file__)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert len(set(seen["nodes"])) == 3  # a drafter, two ranks
    assert seen["drafted"] == seen["plain"]
    assert len(seen["plain"]) == 32
