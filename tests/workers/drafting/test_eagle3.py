"""The EAGLE-3 drafter played by hand: true features where there are any, guesses below, else nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from outrider.workers.drafting.eagle3 import Eagle3Method
from outrider.workers.drafting.row_cache import Expansion
from outrider.workers.weights.tensors import EMBEDDING
from support.drafted import children_of, node_at, path_of, sequence_of
from support.eagle3_reference import logits_along
from support.tapped_target import PROMPT, TAPS, TARGET, TappedDrafting, tap_rows
from support.tiny_heads import eagle3_drafter, eagle3_method, read

DRAFTER = eagle3_drafter(TARGET, TAPS)


class Drafting(TappedDrafting):
    """Every expansion is checked."""

    method: Eagle3Method

    def __init__(self, num_pages: int = 64) -> None:
        super().__init__(max_nodes=8)
        self.method = eagle3_method(
            self.engine.slots, self.engine.estimator, TARGET, DRAFTER, num_pages, page_size=4, packed=False
        )
        self.engine.add(self.method)
        self.num_checked = 0
        self._logits, self.method._logits = self.method._logits, self._checked  # type: ignore[method-assign]

    def _checked(
        self, expansion: Expansion, others: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits, there = self._logits(expansion, others)
        for slot, node, row in zip(expansion.node_slots, expansion.nodes, logits, strict=True):
            tokens = self.engine.slots.sequence(slot).tokens
            taps = tap_rows(tokens).flatten(1)
            path = path_of(self.trees, slot, int(node))
            expected = logits_along(DRAFTER, read(TARGET, EMBEDDING), taps, tokens, path)[-1]
            torch.testing.assert_close(row, expected, atol=5e-5, rtol=5e-5)
            self.num_checked += 1
        return logits, there


def test_nothing_is_proposed_before_the_target_has_read_the_whole_text() -> None:
    drafting = Drafting()
    sequence = drafting.start([*PROMPT, 11])
    assert not drafting.expand()
    drafting.target_reads(sequence, 4)
    assert not drafting.expand()
    drafting.target_reads(sequence, 2)  # all but the last, which the next round computes
    assert drafting.expand()
    assert drafting.num_checked == 1
    assert len(children_of(drafting.trees, 0)) == 3


def test_a_text_of_one_token_waits_for_its_second() -> None:
    drafting = Drafting()
    sequence = drafting.start([5])
    assert drafting.forecast() == (0, 0.0)
    assert not drafting.expand()
    drafting.verdict(sequence, [], {0: 17})
    assert sequence.tokens == [5, 17]
    assert drafting.expand()
    assert drafting.num_checked == 1


def test_a_verdict_keeps_proposals_and_computes_the_known_rows_again() -> None:
    drafting = Drafting()
    sequence = drafting.start()
    drafting.target_reads(sequence, len(PROMPT) - 1)
    while drafting.expand():
        pass
    assert drafting.trees.depths[0].max() > 2  # also of nodes whose feature is a guess of a guess
    first, *_ = children_of(drafting.trees, 0)
    child = node_at(drafting.trees, 0, [first])
    (second, *_), before = children_of(drafting.trees, 0, child), drafting.trees.num_nodes[0]
    kept = children_of(drafting.trees, 0, node_at(drafting.trees, 0, [first, second]))
    drafting.verdict(sequence, [child], {0: first, child: second})
    assert sequence.tokens[-2:] == [first, second]
    assert children_of(drafting.trees, 0) == kept
    assert drafting.trees.num_nodes[0] < before
    assert not drafting.method._rows.has_row[0].any()
    # The old root's row is one of known text; what came out below it is computed with the target's features.
    assert drafting.method._rows.context_lens[0] == len(PROMPT) - 1
    num_checked = drafting.num_checked
    rows, gains = drafting.forecast()
    assert rows == 2
    assert gains > 0.0
    assert drafting.expand()
    assert drafting.num_checked > num_checked
    assert drafting.method._rows.context_lens[0] == len(sequence.tokens) - 2


def test_what_hangs_deep_is_reached_step_by_step_and_promises_a_share_of_each() -> None:
    drafting = Drafting()
    sequence = drafting.start()
    drafting.target_reads(sequence, len(PROMPT) - 1)
    # Another method is sure of a chain: nothing is left to gain at its nodes, much at its end.
    chain = np.array([[20, 21, 22]])
    drafting.trees.add_chains(
        np.array([0]), np.array([0]), chain, np.array([3]), np.full(chain.shape, 0.995), np.zeros_like(chain)
    )
    whole = drafting.method._yields[1].sum() * 0.995**3
    rows, gains = drafting.forecast()
    assert rows == len(PROMPT) - 1  # the root, and what has to be read before it
    np.testing.assert_allclose(gains, whole / 4, rtol=1e-6)
    for _ in range(4):
        assert not children_of(drafting.trees, 0, node_at(drafting.trees, 0, [20, 21, 22]))
        assert drafting.expand()
    assert len(children_of(drafting.trees, 0, node_at(drafting.trees, 0, [20, 21, 22]))) == 3


def test_prompts_are_read_in_chunks_as_far_as_the_target_has_read_them() -> None:
    drafting = Drafting()
    prompt = [1 + i % 90 for i in range(150)]
    sequence, slots = drafting.start(prompt), np.array([0])
    drafting.target_reads(sequence, 40)
    assert drafting.engine.unread(drafting.method, slots).tolist() == [40]
    assert drafting.engine.read(drafting.method, slots) == 40
    drafting.target_reads(sequence, 109)
    assert drafting.engine.unread(drafting.method, slots).tolist() == [108]
    assert not drafting.expand()
    assert drafting.engine.read(drafting.method, slots) == 64
    assert drafting.engine.read(drafting.method, slots) == 44
    assert drafting.engine.read(drafting.method, slots) == 0
    assert drafting.expand()
    assert drafting.num_checked == 1


@pytest.mark.parametrize(("num_alike", "num_shared"), [(13, 12), (12, 8), (5, 4), (4, 0)])
def test_a_row_tells_of_one_token_more_than_its_index(num_alike: int, num_shared: int) -> None:
    """Pages of four rows: the first holds what depends on five tokens."""
    drafting = Drafting()
    prompt = list(range(1, 21))
    sequence = drafting.start(prompt)
    drafting.target_reads(sequence, 19)
    assert drafting.expand()
    drafting.engine.finish(sequence)
    other = [*prompt[:num_alike], *range(60, 80 - num_alike)]
    assert drafting.engine.prefix_kept(sequence_of(other, 0, ("eagle3",))) == num_shared
    again = drafting.start(other, num_shared=num_shared)
    drafting.target_reads(again, 19 - num_shared)
    assert drafting.expand()
    assert drafting.num_checked == 2


def test_without_pages_or_features_nothing_is_proposed_and_nobody_fails() -> None:
    drafting = Drafting(num_pages=4)  # 16 rows, and as many features
    sequence = drafting.start(list(range(1, 15)))
    drafting.target_reads(sequence, 13)
    assert drafting.expand()
    other = drafting.start(list(range(30, 40)), slot=1)
    drafting.target_reads(other, 9)  # 9 features more than there is room for beside the others'
    assert not drafting.expand(1)
    assert drafting.forecast(1) == (0, 0.0)
    for s in (sequence, other):
        drafting.engine.finish(s)
    again = drafting.start(list(range(30, 40)), slot=1)
    drafting.target_reads(again, 9)
    assert drafting.expand(1)
    drafting.engine.finish(again)
    pool = drafting.method._rows.pool
    assert pool.num_available == pool.num_pages


def test_a_step_can_be_timed_before_anybody_runs() -> None:
    drafting = Drafting(num_pages=4)
    assert drafting.method.time_step(4) > 0.0
    assert drafting.method.time_step(50) > 0.0  # as many as there are pages for
