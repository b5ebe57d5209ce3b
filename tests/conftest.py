"""Settings of all tests, and the count of numerical ties at the end of the run."""

import gc
from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import settings

from outrider.cluster.bench.identity import Mismatch

# The same examples in every run: a test that fails, fails for everybody. No deadline per example: machines
# are shared. To search further, raise `max_examples` and unset `derandomize` for a while.
settings.register_profile("outrider", deadline=None, derandomize=True)
settings.load_profile("outrider")

# Until all is imported and collected nothing becomes garbage, and looking for it takes a tenth of the time.
gc.disable()

_TIES: pytest.StashKey[list[Mismatch]] = pytest.StashKey()


def pytest_configure() -> None:
    """One thread from the start: cases are prepared while tests are collected, and two processes share the machine.
    Threads that wait for each other on processors which both processes want take far longer than one alone."""
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported and collected stays, and is not looked at again; and tests make much that is soon gone."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)
    gc.enable()


@pytest.fixture(scope="session")
def ties(request: pytest.FixtureRequest) -> list[Mismatch]:
    """Where texts parted at a numerical tie; reported when the run ends."""
    return request.config.stash.setdefault(_TIES, [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its ties to the process that reports."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["ties"] = [asdict(tie) for tie in session.config.stash.get(_TIES, [])]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes them."""
    found = getattr(node, "workeroutput", {}).get("ties", [])
    node.config.stash.setdefault(_TIES, []).extend(Mismatch(**tie) for tie in found)


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
