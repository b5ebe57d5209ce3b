"""Models that several equality tests share, and the count of ties at the end of the run."""

from collections.abc import Iterator

import pytest
import torch

from outrider.cluster.bench.identity import Mismatch
from outrider.workers.weights.resolver import open_source
from outrider.workers.weights.source import WeightSource
from support.equality import Reference
from support.tiny import tiny_drafter, tiny_target

_TIES: pytest.StashKey[list[Mismatch]] = pytest.StashKey()


@pytest.fixture(scope="session")
def ties(request: pytest.FixtureRequest) -> list[Mismatch]:
    """Where texts parted at a numerical tie; reported when the run ends."""
    return request.config.stash.setdefault(_TIES, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if _TIES not in config.stash:
        return
    found = config.stash[_TIES]
    terminalreporter.section(f"equality: {len(found)} numerical ties")
    for tie in found:
        terminalreporter.line(
            f"{tie.prompt_id}, output token {tie.index}: {tie.plain_token} and {tie.speculative_token}, "
            f"{tie.plain_gap:.2g} and {tie.speculative_gap:.2g} below the best"
        )


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Several ranks and loops run in one process; more threads than processors only get in their way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def target() -> WeightSource:
    return open_source(tiny_target())


@pytest.fixture(scope="session")
def drafter() -> WeightSource:
    return open_source(tiny_drafter())


@pytest.fixture(scope="session")
def reference() -> Reference:
    """transformers' view of the tiny target."""
    return Reference(tiny_target())
