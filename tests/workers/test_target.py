"""What a target rank answers besides sampled tokens: held against plain forwards of every path alone."""

import numpy as np
import pytest
import torch

from outrider.workers.link.communicator import Communicator, SoloCommunicator
from outrider.workers.link.messages import Draft, Scores, SequenceStep, Steps
from outrider.workers.link.starts import ScoreNeeds, SequenceStart
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.target_rank import TargetRank
from outrider.workers.trace import Tracer
from outrider.workers.weights.random_source import RandomSource
from support.rows import SequenceRows, batch_of, chain
from support.thread_group import ThreadCommunicator, run_ranks

CPU = torch.device("cpu")
SOURCE = RandomSource("random:llama?hidden_size=32&intermediate_size=48&num_heads=4&vocab_size=96")
PAGE, NUM_PAGES = 4, 32
LAST = SOURCE.config.num_layers
LAYERS = (LAST, 1)  # in the order in which rounds ask for them
GREEDY = SamplingParams(temperature=0.0)

PROMPT, LONG_PROMPT = (5, 6, 7), tuple(range(20, 31))
#        7             30
#       / \             |
#     10   11          12
#      |
#     13
TREE = SequenceStep(0, (0, 1), (), (7, 10, 11, 13), (0, 0, 0, 1), first_sampled=0, first_hidden=1)
PATHS = [(7,), (7, 10), (7, 11), (7, 10, 13)]


def model_of(communicator: Communicator) -> tuple[Transformer, PagedCache]:
    plan = ShardPlan(SOURCE.config, communicator.rank, communicator.size)
    model = Transformer(load_weights(plan, SOURCE, torch.float32, CPU, packed=False), communicator)
    return model, PagedCache(SOURCE.config, plan, NUM_PAGES, PAGE, torch.float32, CPU)


@pytest.fixture(scope="module")
def alone() -> tuple[Transformer, PagedCache]:
    return model_of(SoloCommunicator())


def hidden_of(alone: tuple[Transformer, PagedCache], tokens: tuple[int, ...]) -> torch.Tensor:
    """[len(LAYERS), num_tokens, hidden] of a text by itself."""
    model, cache = alone
    rows = SequenceRows(range(NUM_PAGES), 0, chain(len(tokens)), 0, tokens)
    taps = model.forward(batch_of([rows], PAGE, CPU), cache, LAYERS).taps
    return torch.stack([taps[layer] for layer in LAYERS])


def law_of(alone: tuple[Transformer, PagedCache], tokens: tuple[int, ...]) -> torch.Tensor:
    """float32 [vocab]: log-probabilities after a text."""
    return torch.log_softmax(alone[0].logits(hidden_of(alone, tokens)[0, -1:]), dim=1)[0]


def rounds(communicator: Communicator) -> list[Scores]:
    """A prompt in two rounds with a tree below it in slot 0, which needs everything; in slot 2 one that needs
    nothing in its first round."""
    rank = TargetRank(
        *model_of(communicator), 3, SOURCE.config.max_context, Tracer("target", False), taps=(1, 0)
    )
    starts = (
        SequenceStart(0, 3, 0, GREEDY, ScoreNeeds(child_logprobs=True, entropy=True)),
        SequenceStart(2, 11, 0, GREEDY, ScoreNeeds(entropy=True)),
    )
    chunk = SequenceStep(0, (), (3, 9), PROMPT[:2], (0, 0), first_sampled=2, first_hidden=0)
    whole = SequenceStep(2, (), (4, 5, 6, 7), (*LONG_PROMPT, 12), chain(12), first_sampled=10)
    first = rank.step(Draft(2**31, starts, (), Steps.of([chunk, whole]), layers=LAYERS))
    return [first, rank.step(Draft(2**31 + 1, (), (), Steps.of([TREE]), layers=LAYERS))]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_rules_and_methods_get_what_they_ask_for(
    num_ranks: int, alone: tuple[Transformer, PagedCache]
) -> None:
    def work(communicator: ThreadCommunicator) -> list[Scores]:
        return rounds(communicator)

    for first, second in run_ranks(num_ranks, work):
        assert (first.round_id, second.round_id) == (2**31, 2**31 + 1)
        # Hidden rows: of the chunk all, of the tree all but its root, in the order of the nodes.
        assert first.hidden is not None
        torch.testing.assert_close(first.hidden, hidden_of(alone, PROMPT[:2]), atol=1e-4, rtol=1e-4)
        expected = [hidden_of(alone, (*PROMPT[:2], *path))[:, -1] for path in PATHS[1:]]
        torch.testing.assert_close(second.hidden, torch.stack(expected, 1), atol=1e-4, rtol=1e-4)
        # The first round samples after the long prompt and after the drafted 12.
        laws = [law_of(alone, LONG_PROMPT), law_of(alone, (*LONG_PROMPT, 12))]
        assert first.tokens.tolist() == [int(law.argmax()) for law in laws]
        assert len(first.child_logprobs) == 0
        np.testing.assert_allclose(first.entropies, [-(law.exp() @ law) for law in laws], atol=1e-4)
        laws = [law_of(alone, (*PROMPT[:2], *path)) for path in PATHS]
        assert second.tokens.tolist() == [int(law.argmax()) for law in laws]
        children = [laws[0][10], laws[0][11], laws[1][13]]
        np.testing.assert_allclose(second.child_logprobs, children, atol=1e-4)
        np.testing.assert_allclose(second.entropies, [-(law.exp() @ law) for law in laws], atol=1e-4)
        assert not second.failed.any()
        assert len(second.logprobs) == 0


def test_nothing_is_sent_that_nobody_asked_for() -> None:
    rank = TargetRank(*model_of(SoloCommunicator()), 1, SOURCE.config.max_context, Tracer("target", False))
    start = SequenceStart(0, 3, 0, GREEDY)
    step = SequenceStep(0, (), (0, 1), (5, 6, 7, 8), (0, 0, 1, 2), first_sampled=2)
    scores = rank.step(Draft(1, (start,), (), Steps.of([step]), layers=(LAST,)))
    assert len(scores.tokens) == 2
    assert scores.hidden is None  # the round names a layer, its step no rows
    assert (len(scores.logprobs), len(scores.child_logprobs), len(scores.entropies)) == (0, 0, 0)
    heartbeat = rank.step(Draft(2, (), (0,), Steps.of([])))
    assert len(heartbeat.tokens) == 0


def test_a_law_that_is_none_fails_alone(alone: tuple[Transformer, PagedCache]) -> None:
    rank = TargetRank(*model_of(SoloCommunicator()), 2, SOURCE.config.max_context, Tracer("target", False))
    removed = SamplingParams(logit_bias=tuple((token, -np.inf) for token in range(96)))
    starts = (SequenceStart(0, 3, 0, removed), SequenceStart(1, 3, 0, GREEDY))
    steps = [SequenceStep(slot, (), (2 * slot,), PROMPT, (0, 0, 1), first_sampled=2) for slot in (0, 1)]
    scores = rank.step(Draft(1, starts, (), Steps.of(steps)))
    assert scores.failed.tolist() == [True, False]
    assert scores.tokens[1] == int(law_of(alone, PROMPT).argmax())
