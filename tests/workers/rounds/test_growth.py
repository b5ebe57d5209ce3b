"""How many levels are asked for at once, of a method that takes them without a look at the trees in between."""

import numpy as np
import pytest

from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.method import Following, Forecast
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.rounds.budget import CostModel, PassProfile
from outrider.workers.rounds.growth import GrowthOptions, TreeGrower, _Drafted
from outrider.workers.rounds.scheduler import Scheduler, SchedulerLimits
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request, Sequence
from outrider.workers.trace import Tracer
from support.scripted import ScriptedMethod

FOLLOWING = Following(most=5, decay=0.5, rows_per_sequence=4, num_proposals=3)


def grower(fixed_budget: bool, step_s: float, max_nodes: int) -> tuple[TreeGrower, ScriptedMethod]:
    """With one sequence in slot 0, a target whose rounds take 10 ms and some, and steps of so many seconds."""
    slots = DraftedSlots(1, max_nodes, 8)
    drafting = DraftEngine(slots)
    method = ScriptedMethod(slots, drafting.estimator, step_s, lambda position: True)
    drafting.add(method)
    request = Request("0", (1, 2, 3), SamplingParams(), DraftOptions(("model",), max_nodes, 8))
    drafting.start(Sequence(request, [1, 2, 3], slot=0))
    scheduler = Scheduler(
        SchedulerLimits(1, 64, 64, 0), PagePool(8, 16, False), drafting.prefix_kept, drafting.finish
    )
    cost = CostModel(PassProfile((1, 64), (0.010, 0.012)), {"model": PassProfile((1,), (step_s,))})
    options = GrowthOptions(False, fixed_budget, True, 64)
    return TreeGrower(drafting, scheduler, cost, options, Tracer("draft", False), lambda: 0.0), method


def num_further(
    fixed_budget: bool, step_s: float = 1e-3, max_nodes: int = 16, following: Following = FOLLOWING
) -> int:
    trees, method = grower(fixed_budget, step_s, max_nodes)
    one = np.zeros(1, dtype=np.int64)
    drafted = _Drafted([0], one, one + 8, one + max_nodes, one, 1, 1, 0.0)
    gains = np.array([0.8, 0.1])
    return trees._num_further(method, Forecast(gains, 1, one, following), drafted)


@pytest.mark.parametrize(("max_nodes", "expected"), [(2, 0), (3, 0), (4, 1), (15, 1), (16, 2), (1000, 5)])
def test_a_fixed_budget_asks_for_the_levels_that_fill_it(max_nodes: int, expected: int) -> None:
    # One node gets three proposals, then four get three each.
    assert num_further(True, max_nodes=max_nodes) == expected


def test_a_method_that_takes_one_level_at_a_time_is_asked_for_one() -> None:
    assert num_further(False, following=Following(0)) == num_further(True, following=Following(0)) == 0


def test_levels_are_asked_for_as_long_as_they_pay() -> None:
    cheap, dear, hopeless = (num_further(False, step_s) for step_s in (1e-5, 1.2e-3, 1.0))
    assert cheap == FOLLOWING.most
    assert 0 < dear < cheap
    assert hopeless == 0


def test_levels_that_are_hardly_ever_accepted_are_not_asked_for() -> None:
    assert num_further(False, 1e-3, following=FOLLOWING._replace(decay=0.01)) == 0
