"""Heads that guess at chance are told of, with what may be the cause; heads that guess right are not."""

import pytest

from outrider.workers.rounds.calibration import warning_of
from outrider.workers.sequences.sequence import RequestStats


@pytest.mark.parametrize(
    ("num_offered", "num_accepted", "warns"),
    [(40, 1, True), (40, 0, True), (40, 8, False), (5, 0, False), (0, 0, False)],
)
def test_a_warning_names_the_likely_causes(num_offered: int, num_accepted: int, warns: bool) -> None:
    stats = RequestStats(depth_drafted=(num_offered,), depth_accepted=(num_accepted,))
    said = warning_of("eagle3", "somebody/heads", stats)
    assert bool(said) == warns
    if warns:
        for word in (
            "draft.eagle3.model (somebody/heads)",
            f"{num_accepted} were right",
            "target",
            "taps",
            "template",
        ):
            assert word in said
