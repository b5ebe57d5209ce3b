"""Models that several equality tests share, and the count of ties at the end of the run."""

from collections.abc import Iterator

import pytest
import torch

from outrider.workers.weights.resolver import open_source
from outrider.workers.weights.source import WeightSource
from support.equality import Reference
from support.tiny import tiny_drafter, tiny_target


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
