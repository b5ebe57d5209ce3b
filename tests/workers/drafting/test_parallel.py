"""The parallel drafter played by hand: a block behind true context rows after every verdict, else nothing."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC

import numpy as np
import pytest
import torch

from outrider.workers.draft_heads.convolutions import ConvolutionShape
from outrider.workers.draft_heads.pairs import PairShape
from outrider.workers.draft_heads.parallel import BlockLayer, ParallelDrafter
from outrider.workers.drafting.parallel import ParallelMethod
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.weights.tensors import EMBEDDING
from support.drafted import children_of, node_at, path_of, sequence_of
from support.parallel_reference import block_output, logits_after, visible
from support.tapped_target import PROMPT, TAPS, TARGET, TappedDrafting, tap_rows
from support.tiny_heads import parallel_drafter, parallel_method, read

EMBEDDED = read(TARGET, EMBEDDING)
CAUSAL, FULL = BlockLayer(is_causal=True), BlockLayer(is_causal=False)
KINDS = {
    "causal, Markov": parallel_drafter(TARGET, TAPS, pair=PairShape("markov", 8), num_ids=80),
    "causal, gated": parallel_drafter(TARGET, TAPS, pair=PairShape("gated", 8)),
    "causal, alone, slot 0 idle": parallel_drafter(TARGET, TAPS, first_slot=1),
    "bidirectional, Markov, slot 0 idle": parallel_drafter(
        TARGET, TAPS, (FULL, FULL), first_slot=1, pair=PairShape("markov", 8)
    ),
    "windows by slot": parallel_drafter(TARGET, TAPS, (BlockLayer(True, 6), BlockLayer(False, 7))),
    "windows by anchor": parallel_drafter(
        TARGET,
        TAPS,
        (FULL, BlockLayer(True, 7, True), BlockLayer(False, 6, True)),
        pair=PairShape("markov", 8),
    ),
    "selector, convolutions": parallel_drafter(
        TARGET,
        TAPS,
        (FULL, FULL),
        first_slot=1,
        pair=PairShape("selector", 8, top_k=10),
        convolution=ConvolutionShape(2, 8),
    ),
}
MARKOV = KINDS["causal, Markov"]


class Drafting(TappedDrafting):
    """Every row of logits is checked."""

    method: ParallelMethod

    def __init__(self, drafter: ParallelDrafter = MARKOV, num_pages: int = 64, max_nodes: int = 8) -> None:
        super().__init__(max_nodes)
        self.drafter = drafter
        self.method = parallel_method(
            self.engine.slots, self.engine.estimator, TARGET, drafter, num_pages, page_size=4, packed=False
        )
        self.engine.add(self.method)
        self.num_checked = 0
        self._after, self.method._candidates_of = self.method._candidates_of, self._checked  # type: ignore[method-assign]

    def ready(self, prompt: SequenceABC[int] = PROMPT, slot: int = 0, **how) -> Sequence:  # type: ignore[no-untyped-def]
        sequence = self.start(prompt, slot, **how)
        self.target_reads(sequence, len(prompt) - 1)
        return sequence

    def _checked(self, slots, owners, nodes, level, rows):  # type: ignore[no-untyped-def]
        for owner, node, row in zip(owners, nodes, rows, strict=True):
            slot = int(slots[owner])
            tokens, path = self.engine.slots.sequence(slot).tokens, path_of(self.trees, slot, int(node))
            assert len(path) == level
            expected = logits_after(self.drafter, EMBEDDED, tap_rows(tokens).flatten(1), tokens, path)
            torch.testing.assert_close(row, expected, atol=5e-5, rtol=5e-5)
            self.num_checked += 1
        return self._after(slots, owners, nodes, level, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_every_level_is_what_the_modules_say_of_the_whole_text(kind: str) -> None:
    """Of two sequences of different length at once, twice; the second block stands behind rows that a verdict
    brought."""
    drafting = Drafting(KINDS[kind])
    one, two = drafting.ready(), drafting.ready([11, *PROMPT, 12, 13], slot=1)
    for _ in range(3):
        assert drafting.expand(0, 1)
        assert not drafting.expand(0, 1)  # there is nothing to say before a verdict
        assert drafting.forecast() == (0, 0.0)
        for sequence in (one, two):
            first, *_ = children_of(drafting.trees, sequence.slot)
            child = node_at(drafting.trees, sequence.slot, [first])
            drafting.verdict(sequence, [child], {0: first, child: 17})
    depths = drafting.drafter.shape.num_levels
    assert drafting.num_checked >= 3 * 2 * min(4, depths)
    assert drafting.method._rows.context_lens[:2].tolist() == [len(PROMPT) + 3, len(PROMPT) + 6]


def test_with_a_pair_term_children_depend_on_their_parent_without_one_they_do_not() -> None:
    for drafter, depends in ((MARKOV, True), (KINDS["causal, alone, slot 0 idle"], False)):
        drafting = Drafting(drafter)
        drafting.ready(sampling=SamplingParams(temperature=4.0, seed=2, max_tokens=100))
        assert drafting.expand()
        nodes = [node_at(drafting.trees, 0, [token]) for token in children_of(drafting.trees, 0)]
        found = [children_of(drafting.trees, 0, node) for node in nodes]
        grown = [tokens for tokens in found if tokens]
        assert len(grown) > 1
        assert (len({tuple(tokens) for tokens in grown}) > 1) == depends


def test_slots_see_what_is_written_out_here() -> None:
    """Three context rows and a block of four: which keys each slot sees."""

    def seen(layer: BlockLayer) -> list[str]:
        drafter = parallel_drafter(TARGET, TAPS, (layer,), block_size=4)
        return ["".join(".x"[int(bit)] for bit in row) for row in visible(drafter, 0, 3)]

    assert seen(CAUSAL) == ["xxxx...", "xxxxx..", "xxxxxx.", "xxxxxxx"]
    assert seen(FULL) == ["xxxxxxx"] * 4
    # A window of 4 has the slot itself and three before it, of a block 4 long all of the block.
    assert seen(BlockLayer(True, 4)) == ["xxxx...", ".xxxx..", "..xxxx.", "...xxxx"]
    assert seen(BlockLayer(False, 4)) == ["xxxxxxx", ".xxxxxx", "..xxxxx", "...xxxx"]
    assert seen(BlockLayer(False, 3, True)) == [".xxxxxx"] * 4


def test_slot_0_reads_the_anchor_and_the_others_the_mask() -> None:
    """A block of masks alone, or one whose slot 0 is taken for the first guess, says something else by far."""
    taps = tap_rows(PROMPT)[:-1].flatten(1)
    own = block_output(MARKOV, EMBEDDED, taps, PROMPT[-1])
    masked = block_output(MARKOV, EMBEDDED, taps, MARKOV.shape.mask_token_id)
    assert (own - masked).abs().max() > 0.1
    idle = KINDS["causal, alone, slot 0 idle"]
    assert (idle.shape.num_levels, MARKOV.shape.num_levels) == (4, 5)
    drafting = Drafting(idle)
    drafting.ready(max_depth=10)
    assert drafting.expand()
    assert drafting.trees.depths[0].max() == 4  # a block of 5 with an idle slot guesses 4 levels


def test_nothing_is_proposed_before_the_target_has_read_the_whole_text() -> None:
    drafting = Drafting()
    sequence = drafting.start([*PROMPT, 11])
    assert not drafting.expand()
    drafting.target_reads(sequence, 4)
    assert not drafting.expand()
    drafting.target_reads(
        sequence, 2
    )  # all but the last, which is the anchor: its own features are not known
    assert drafting.forecast()[0] == 1
    assert drafting.expand()
    assert len(children_of(drafting.trees, 0)) == 3
    alone = drafting.start([5], slot=1)
    assert alone.num_committed == 0
    assert drafting.expand(1)  # behind no context at all


def test_candidates_are_ranked_under_the_noise_of_their_positions() -> None:
    """Sampled with penalties that look at the path: the first child is what the sampler takes from the node's law."""
    sampling = SamplingParams(temperature=0.9, seed=4, repetition_penalty=1.5, max_tokens=100)
    drafting = Drafting()
    drafting.ready(sampling=sampling)
    assert drafting.expand()
    greedy = Drafting()
    greedy.ready()
    assert greedy.expand()
    assert children_of(drafting.trees, 0) != children_of(greedy.trees, 0)
    other = Drafting()
    other.ready(sampling=SamplingParams(temperature=0.9, seed=5, repetition_penalty=1.5, max_tokens=100))
    assert other.expand()
    assert children_of(drafting.trees, 0) != children_of(other.trees, 0)


def test_prompts_are_written_in_chunks_as_far_as_the_target_has_read_them() -> None:
    drafting = Drafting()
    prompt = [1 + i % 90 for i in range(150)]
    sequence, slots = drafting.start(prompt), np.array([0])
    drafting.target_reads(sequence, 40)
    assert drafting.engine.unread(drafting.method, slots).tolist() == [40]
    assert drafting.engine.read(drafting.method, slots) == 40
    drafting.target_reads(sequence, 109)
    assert drafting.engine.unread(drafting.method, slots).tolist() == [109]
    assert not drafting.expand()
    assert drafting.engine.read(drafting.method, slots) == 64
    assert drafting.engine.read(drafting.method, slots) == 45
    assert drafting.engine.read(drafting.method, slots) == 0
    assert drafting.expand()
    assert drafting.num_checked >= 4


@pytest.mark.parametrize(("num_alike", "num_shared"), [(13, 12), (12, 12), (11, 8), (4, 4), (3, 0)])
def test_context_rows_of_a_shared_prefix_are_kept_not_shifted(num_alike: int, num_shared: int) -> None:
    """Pages of four rows. Logits are compared with those of the whole text: a row too few or one place off shows."""
    drafting = Drafting()
    prompt = list(range(1, 21))
    sequence = drafting.ready(prompt)
    assert drafting.expand()
    drafting.engine.finish(sequence)
    other = [*prompt[:num_alike], *range(60, 80 - num_alike)]
    assert drafting.engine.prefix_kept(sequence_of(other, 0, ("parallel",))) == num_shared
    again = drafting.start(other, num_shared=num_shared)
    drafting.target_reads(again, 19 - num_shared)
    checked = drafting.num_checked
    assert drafting.expand()
    assert drafting.num_checked > checked
    # A target that shares more than the drafter has rows of would leave it without context: it proposes nothing.
    third = drafting.start([*range(30, 50)], slot=1, num_shared=8)
    drafting.target_reads(third, 11)
    assert not drafting.expand(1)


def test_rows_of_a_block_are_scratch() -> None:
    """The next block is written over the last, and no prefix of them is ever shared."""
    drafting = Drafting()
    sequence = drafting.ready()
    num_pages = drafting.method._rows.pool.num_pages
    for _ in range(20):
        assert drafting.expand()
        first, *_ = children_of(drafting.trees, 0)
        drafting.verdict(sequence, [], {0: first})
        assert drafting.method._rows.context_lens[0] <= len(sequence.tokens) - 1
        used = num_pages - drafting.method._rows.pool.num_available
        assert used == -(-(int(drafting.method._rows.context_lens[0]) + 5) // 4)


def test_beyond_what_its_positions_are_meant_for_it_is_silent() -> None:
    drafting = Drafting()
    object.__setattr__(drafting.method._shape, "max_context", 11)
    try:
        drafting.ready()  # 6 tokens and a block of 5
        assert drafting.expand()
        drafting.ready([*PROMPT, 11], slot=1)
        assert not drafting.expand(1)
    finally:
        object.__setattr__(drafting.method._shape, "max_context", 4096)


def test_without_pages_or_features_nothing_is_proposed_and_nobody_fails() -> None:
    drafting = Drafting(num_pages=5)  # 20 rows, and as many features
    sequence = drafting.ready(list(range(1, 15)))
    assert drafting.expand()
    other = drafting.ready(list(range(30, 40)), slot=1)
    assert not drafting.expand(1)
    for s in (sequence, other):
        drafting.engine.finish(s)
    again = drafting.ready(list(range(30, 40)), slot=1)
    assert drafting.expand(1)
    drafting.engine.finish(again)
    pool = drafting.method._rows.pool
    assert pool.num_available == pool.num_pages


def test_a_step_can_be_timed_before_anybody_runs() -> None:
    drafting = Drafting(num_pages=4)
    assert drafting.method.time_step(1) > 0.0
    assert drafting.method.time_step(50) > 0.0  # as many as there are pages for
    assert drafting.method._rows.pool.num_available == 4
