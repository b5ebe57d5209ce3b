"""Medusa heads propose from the newest true row, each at its own position; what guesses are worth is learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from outrider.kernels.noise import gumbel
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.method import Verified, VerifiedStep
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.sequences.hidden import HiddenRows
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.weights.random_source import RandomSource
from support.drafted import GREEDY, answer, cut_of, node_at, path_of, sequence_of
from support.tiny_heads import NOT_COUNTED, medusa_heads, medusa_method, read

VOCAB = 96
TARGET = RandomSource(
    f"random:llama?hidden_size=32&num_layers=3&num_heads=4&num_kv_heads=2&vocab_size={VOCAB}"
)
PROMPT = [5, 6, 7, 8]
NUM_HEADS, NUM_CHILDREN = 3, 3


class Drafting:
    """The method alone, with the target's rows given by hand."""

    def __init__(self, accuracies: np.ndarray = NOT_COUNTED) -> None:
        self.engine = DraftEngine(DraftedSlots(4, 12, 16))
        self.trees = self.engine.trees
        self.medusa = medusa_method(
            self.engine.slots,
            self.engine.estimator,
            TARGET,
            medusa_heads(TARGET, NUM_HEADS),
            accuracies,
            packed=False,
        )
        self.engine.add(self.medusa)

    def start(self, slot: int = 0, sampling: SamplingParams = GREEDY, max_depth: int = 4) -> Sequence:
        sequence = sequence_of(PROMPT, slot, ("medusa",), 12, max_depth, sampling)
        self.engine.start(sequence)
        return sequence

    def observe(self, sequences: list[Sequence], rows: torch.Tensor) -> None:
        """The last row of each; before it one more that must not be read."""
        steps = tuple(
            VerifiedStep(s, i, len(s.tokens) - 3, np.arange(2), 2, np.zeros(1, dtype=np.int64))
            for i, s in enumerate(sequences)
        )
        both = torch.stack([torch.full_like(rows, torch.nan), rows], dim=1).flatten(0, 1)
        hidden = HiddenRows({3: both}, np.zeros(len(rows), np.int64), 2 * np.arange(len(rows)))
        self.engine.observe(Verified(steps, hidden))

    def expand(self, *slots: int) -> bool:
        return self.engine.expand(self.medusa, np.array(slots))


def some_rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, TARGET.config.hidden_size, generator=torch.Generator().manual_seed(seed))


def scores_by_hand(row: torch.Tensor, sampling: SamplingParams, root: int) -> torch.Tensor:
    """[NUM_HEADS, VOCAB]: what each head says at its position, with the noise that is the target's there."""
    config = TARGET.config
    normed = row * (row.square().mean() + config.rms_norm_eps).rsqrt() * read(TARGET, "model.norm.weight")
    logits = medusa_heads(TARGET, NUM_HEADS)(normed[None])[:, 0].detach()
    if sampling.is_greedy:
        return logits
    noise = [gumbel(sampling.seed, root + 1 + head, torch.arange(VOCAB)) for head in range(NUM_HEADS)]
    return logits / sampling.temperature + torch.stack(noise)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_node_is_a_candidate_of_the_head_of_its_depth(temperature: float) -> None:
    drafting = Drafting()
    samplings = [SamplingParams(temperature=temperature, seed=seed, max_tokens=50) for seed in (3, 4)]
    sequences = [drafting.start(slot, sampling) for slot, sampling in enumerate(samplings)]
    assert not drafting.expand(0, 1)  # the target has not spoken yet
    rows = some_rows(2)
    drafting.observe(sequences, rows)
    assert drafting.expand(0, 1)
    trees = drafting.trees
    for slot, (row, sampling) in enumerate(zip(rows, samplings, strict=True)):
        scores = scores_by_hand(row, sampling, len(PROMPT) - 1)
        best = scores.topk(NUM_CHILDREN).indices.tolist()
        assert trees.num_nodes[slot] == 13
        assert trees.depths[slot].max() > 1
        for node in range(1, 13):
            path = path_of(trees, slot, node)
            assert all(token in best[head] for head, token in enumerate(path))
        # The first guess of every head stands behind the first of the one before.
        assert node_at(trees, slot, [best[0][0], best[1][0]])
    assert not drafting.expand(0, 1)  # all that one row has to say was said


def test_a_logit_bias_counts_and_what_the_law_removes_is_not_proposed() -> None:
    drafting = Drafting()
    sampling = SamplingParams(temperature=1.0, top_k=2, logit_bias=((9, 50.0), (11, 49.0)), max_tokens=50)
    drafting.observe([drafting.start(0, sampling)], some_rows(1))
    assert drafting.expand(0)
    proposed = drafting.trees.tokens[0, 1 : drafting.trees.num_nodes[0]]
    assert set(proposed.tolist()) == {9, 11}


@pytest.mark.parametrize(
    ("max_depth", "max_tokens", "deepest"), [(2, 50, 2), (8, 50, 3), (8, 2, 1), (8, 1, 0)]
)
def test_no_guess_is_deeper_than_a_round_verifies(max_depth: int, max_tokens: int, deepest: int) -> None:
    drafting = Drafting()
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    sequence = drafting.start(0, sampling, max_depth)
    drafting.observe([sequence], some_rows(1))
    assert drafting.expand(0) == (deepest > 0)
    assert drafting.trees.depths[0].max() == deepest


def test_calibrated_accuracies_shape_the_first_trees_and_verdicts_the_later_ones() -> None:
    drafting = Drafting(np.array([[0.9, 0.05], [0.8, 0.05], [0.7, 0.05]]))
    sequence = drafting.start()
    drafting.observe([sequence], some_rows(1))
    forecast = drafting.medusa.forecast(np.array([0]))
    np.testing.assert_allclose(forecast.gains[:3], [0.9, 0.72, 0.504])
    assert forecast.num_rows == 1
    assert drafting.expand(0)
    at_first = drafting.trees.values[0, 1:].sum()
    np.testing.assert_allclose(np.sort(drafting.trees.values[0])[::-1][:4], [1.0, 0.9, 0.72, 0.504])
    # Whatever head 0 says is wrong: its guesses lose their value, and so does the step.
    for seed in range(1, 40):
        never = next(t for t in range(VOCAB) if t not in drafting.trees.tokens[0])
        answer(drafting.engine, [0], cut_of(drafting.trees, {0: []}), [{0: never}])
        drafting.observe([sequence], some_rows(1, seed))
        assert drafting.expand(0)
    assert drafting.trees.values[0, 1:].sum() < at_first / 2
    answer(drafting.engine, [0], cut_of(drafting.trees, {0: []}), [{0: never}])
    drafting.observe([sequence], some_rows(1))
    assert drafting.medusa.forecast(np.array([0])).gains.sum() < 0.7 * at_first
    assert drafting.medusa.root_gains(np.array([1])).sum() > 2.0  # others get what is assumed at first


def test_a_sequence_that_starts_in_a_used_slot_knows_no_row() -> None:
    drafting = Drafting()
    drafting.observe([drafting.start()], some_rows(1))
    drafting.engine.finish(drafting.engine.slots.sequence(0))
    drafting.start()
    assert drafting.medusa.forecast(np.array([0])).num_rows == 0
    assert not drafting.expand(0)


def test_a_step_can_be_timed_before_anybody_runs() -> None:
    assert Drafting().medusa.time_step(4) > 0.0
