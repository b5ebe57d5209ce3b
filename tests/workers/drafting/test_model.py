"""The draft model's rows: after any history of verdicts they are what a fresh forward over the same path gives."""

import random
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from outrider.configs.schema import NgramConfig
from outrider.workers.communicator import SoloCommunicator
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.model import ModelDrafter
from outrider.workers.model.batch import ForwardBatch, SequenceRows, build_batch, chain
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Hidden, Transformer
from outrider.workers.rounds.pages import PagePool
from outrider.workers.rounds.sequence import DraftOptions, Request, Sequence
from outrider.workers.rounds.tree import DraftTree, GrowingTree
from outrider.workers.rounds.verify import verify_exact
from outrider.workers.sampling.params import SamplingParams
from outrider.workers.sampling.sampler import RowContext, Sampler
from outrider.workers.trace import Tracer
from outrider.workers.weights.random_source import RandomSource

VOCAB = 96
# One row in a batch of several and the same row alone are summed in another order. Measured: 4e-6 at most.
TOLERANCE = 5e-5


@lru_cache
def draft_model() -> Transformer:
    torch.set_num_threads(1)
    spec = f"random:llama?hidden_size=32&intermediate_size=48&num_heads=4&num_kv_heads=2&vocab_size={VOCAB}"
    source = RandomSource(spec)
    plan, solo = ShardPlan(source.config, 0, 1), SoloCommunicator()
    weights = load_weights(plan, source, torch.float32, torch.device("cpu"), packed=False)
    return Transformer(weights, solo)


def cache_of(num_pages: int, page_size: int) -> PagedCache:
    model = draft_model()
    return PagedCache(model.config, model.plan, num_pages, page_size, torch.float32, torch.device("cpu"))


def fresh_logits(texts: SequenceABC[SequenceABC[int]]) -> torch.Tensor:
    """Logits after the last token of each text, computed from nothing: [num_texts, VOCAB]."""
    model, page_size = draft_model(), 16
    rows, first = [], 0
    for text in texts:
        num_pages = -(-len(text) // page_size)
        rows.append(SequenceRows(range(first, first + num_pages), 0, chain(len(text)), 0, list(text)))
        first += num_pages
    hidden = model.forward(build_batch(rows, page_size, model.device), cache_of(first, page_size)).last
    last = torch.tensor([len(text) for text in texts]).cumsum(0) - 1
    return model.logits(hidden[last])


class RecordingSampler(Sampler):
    """Keeps the logits from which children were proposed."""

    def __init__(self) -> None:
        super().__init__(VOCAB, range(VOCAB), SoloCommunicator())
        self.proposed: list[tuple[torch.Tensor, RowContext]] = []

    def propose(
        self, logits: torch.Tensor, rows: SequenceABC[RowContext], num: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.proposed += zip(logits.clone(), rows, strict=True)
        return super().propose(logits, rows, num)


class InOneBuffer:
    """A forward whose result is overwritten by the next call, as graphs do it."""

    def __init__(self, forward: Callable[[ForwardBatch], Hidden]) -> None:
        self.num_calls = 0
        self._forward = forward
        self._buffer = Hidden(torch.empty(0), {})

    @torch.inference_mode()
    def __call__(self, batch: ForwardBatch) -> Hidden:
        self.num_calls += 1
        self._buffer.last.fill_(torch.nan)
        self._buffer = self._forward(batch)
        return self._buffer


class Drafting:
    """A draft model and the engine around it, played by hand."""

    def __init__(
        self,
        num_pages: int = 64,
        page_size: int = 4,
        prefix_sharing: bool = True,
        num_target_tokens: int = VOCAB,
        rows_per_sequence: int = 4,
    ) -> None:
        self.engine = DraftEngine(NgramConfig(min_match=1))
        self.pool = PagePool(num_pages, page_size, prefix_sharing)
        self.sampler = RecordingSampler()
        self.model = ModelDrafter(
            model=draft_model(),
            cache=cache_of(num_pages, page_size),
            pool=self.pool,
            sampler=self.sampler,
            estimator=self.engine.estimator,
            num_target_tokens=num_target_tokens,
            max_children=3,
            rows_per_sequence=rows_per_sequence,
            max_rows=8,
            prefill_chunk=24,
            tracer=Tracer("draft", False),
        )
        self.forward = self.model._run = InOneBuffer(self.model._run)
        self.engine.add(self.model)
        self.sequences: dict[int, Sequence] = {}  # by the seed of their noise, which tells rows apart
        self.num_rows_checked = 0

    def start(
        self,
        prompt: SequenceABC[int],
        sampling: SamplingParams | None = None,
        methods: tuple[str, ...] = ("model",),
        max_depth: int = 4,
    ) -> Sequence:
        sampling = sampling or SamplingParams(temperature=0.0, max_tokens=1000)
        seed = 1 + max(self.sequences, default=0)
        options = DraftOptions(methods, 8, max_depth)
        request = Request(str(seed), tuple(prompt), replace(sampling, seed=seed), options)
        tree = GrowingTree(prompt[-1], len(prompt) - 1)
        sequence = Sequence(request, list(prompt), tree=tree)
        sequence.sent_tree = DraftTree.root_only(prompt[-1])
        self.sequences[seed] = sequence
        self.engine.start(sequence)
        return sequence

    def finish(self, sequence: Sequence) -> None:
        self.engine.finish(sequence)
        del self.sequences[sequence.request.sampling.seed]

    def step(self, *sequences: Sequence) -> bool:
        """A step, of which all rows are compared with a fresh forward over their paths."""
        self.sampler.proposed.clear()
        progress = self.engine.step(sequences or list(self.sequences.values()))
        if self.sampler.proposed:
            rows = [row for _, row in self.sampler.proposed]
            texts = [[*self.sequences[row.params.seed].tokens, *row.path_tokens] for row in rows]
            assert [row.position for row in rows] == [len(text) for text in texts]
            logits = torch.stack([logits for logits, _ in self.sampler.proposed])
            torch.testing.assert_close(logits, fresh_logits(texts), atol=TOLERANCE, rtol=0.0)
            self.num_rows_checked += len(rows)
        return progress

    def verdict(self, sequence: Sequence, chosen: list[int], target_tokens: dict[int, int]) -> list[int]:
        """Send the nodes `chosen`; the target says `target_tokens` by node, and token 0 after the others."""
        sequence.sent_tree = sequence.tree.cut(chosen)
        said = [target_tokens.get(node, 0) for node in sequence.sent_tree.growing_nodes]
        verdict = verify_exact(sequence.sent_tree, said)
        emitted = verdict.emitted(sequence.sent_tree)
        sequence.tokens += emitted
        self.engine.settle(sequence, verdict)
        return emitted


def children(sequence: Sequence, node: int = 0) -> list[int]:
    """Tokens proposed after a node, in the order of the proposals."""
    return list(sequence.tree.nodes[node].children)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("page_size", "num_pages"), [(4, 150), (1, 600), (16, 40), (4, 34)], ids=["4", "1", "16", "scarce"]
)
def test_rows_are_those_of_a_fresh_forward_after_any_history(
    seed: int, page_size: int, num_pages: int
) -> None:
    rng = random.Random(seed)
    drafting = Drafting(num_pages, page_size, rows_per_sequence=rng.choice([1, 3, 6]))
    stems = [[rng.randrange(VOCAB) for _ in range(60)] for _ in range(2)]

    def newcomer() -> None:
        prompt = rng.choice(stems)[: rng.randint(1, 60)] + [rng.randrange(VOCAB) for _ in range(3)]
        temperature = rng.choice([0.0, 0.8])
        methods = rng.choice([("model",), ("ngram", "model")])
        drafting.start(prompt, SamplingParams(temperature=temperature, max_tokens=1000), methods)

    newcomer()
    for _ in range(25):
        if len(drafting.sequences) < 3 and rng.random() < 0.3:
            newcomer()
        sequences = list(drafting.sequences.values())
        drafting.engine.look_up(sequences)
        for _ in range(rng.randint(0, 3)):
            drafting.step()
        for sequence in sequences:
            sequence.sent_tree = sequence.tree.cut(sequence.tree.best(rng.randint(0, 8), 4))
        drafting.engine.read_prompts(sequences)
        for _ in range(rng.randint(0, 2)):
            drafting.step()  # ahead of the verdict
        for sequence in sequences:
            chosen = list(sequence.sent_tree.growing_nodes[1:])
            said = {
                node: rng.choice(children(sequence, node) or [5])
                for node in sequence.sent_tree.growing_nodes
                if rng.random() < 0.8
            }
            drafting.verdict(sequence, chosen, said)
        if len(sequences) > 1 and rng.random() < 0.15:
            drafting.finish(rng.choice(sequences))
    assert drafting.num_rows_checked > (20 if num_pages == 34 else 60)
    assert drafting.forward.num_calls > 10
    for sequence in list(drafting.sequences.values()):
        drafting.finish(sequence)
    assert drafting.pool.num_available == num_pages


def test_a_step_expands_the_root_first() -> None:
    drafting = Drafting()
    sequence = drafting.start([3, 1, 4, 1, 5])
    assert drafting.step()
    best = fresh_logits([[3, 1, 4, 1, 5]])[0].topk(3).indices.tolist()
    assert children(sequence) == best


def test_what_survives_a_verdict_is_not_computed_again() -> None:
    drafting = Drafting()
    sequence = drafting.start([3, 1, 4, 1, 5])
    for _ in range(3):
        drafting.step()
    first = children(sequence)[0]
    child = sequence.tree.nodes[0].children[first]
    below = children(sequence, child)
    assert below  # the likeliest child has been expanded
    assert drafting.verdict(sequence, [], {0: first}) == [first]
    assert children(sequence) == below
    drafting.step()
    assert all(row.path_tokens for _, row in drafting.sampler.proposed)  # the new root was not among them


def test_tokens_that_were_not_proposed_are_read_with_the_next_step() -> None:
    drafting = Drafting()
    sequence = drafting.start([3, 1, 4, 1, 5])
    drafting.step()
    unlikely = next(token for token in range(VOCAB) if token not in children(sequence))
    drafting.verdict(sequence, [], {0: unlikely})
    assert len(sequence.tree) == 1
    assert drafting.step()  # compares with a fresh forward
    assert children(sequence)


def test_a_long_prompt_is_read_in_chunks_before_it_is_drafted() -> None:
    drafting = Drafting()
    sequence = drafting.start(list(range(1, 90)))
    assert not drafting.step()
    for chunk in (24, 24, 24):
        before = drafting.pool.num_available
        drafting.engine.read_prompts([sequence])
        assert before - drafting.pool.num_available == chunk // 4
    assert drafting.step()  # the other 17 come along


def test_prompts_that_begin_alike_share_pages() -> None:
    drafting = Drafting()
    first = drafting.start(list(range(1, 30)))
    drafting.step()
    before = drafting.pool.num_available
    drafting.start([*range(1, 25), 90, 91])
    assert drafting.pool.num_available == before
    second = drafting.sequences[2]
    drafting.step(second)
    assert before - drafting.pool.num_available <= 2  # 24 of 26 tokens were there
    drafting.finish(first)
    for _ in range(3):
        drafting.step(second)


def test_without_pages_nothing_is_proposed_and_nothing_fails() -> None:
    drafting = Drafting(num_pages=3, page_size=4)
    rich = drafting.start([3, 1, 4, 1, 5, 9, 2])
    assert drafting.step(rich)
    poor = drafting.start([2, 7, 1, 8, 2])
    assert not drafting.step(poor)
    assert len(poor.tree) == 1
    assert drafting.verdict(poor, [], {0: 7}) == [7]
    long = drafting.start(list(range(50)))
    drafting.engine.read_prompts([long])
    assert drafting.model.forecast([long]).gains == []
    assert drafting.model.unread([long]) == [49]  # all but the root
    assert drafting.model.survival([long]) == 0.0
    drafting.finish(rich)
    assert drafting.step(poor)  # there is room again


def test_a_step_for_many_does_what_there_is_room_for() -> None:
    drafting = Drafting(num_pages=3, page_size=4)
    a, b, c = (drafting.start([n, n + 1]) for n in (1, 11, 21))
    drafting.model._max_rows = 2
    assert drafting.step(a, b, c)
    assert sorted(len(s.tree) > 1 for s in (a, b, c)) == [False, True, True]


def test_nothing_is_drafted_that_could_not_be_used() -> None:
    drafting = Drafting()
    last = drafting.start([3, 1, 4], SamplingParams(temperature=0.0, max_tokens=1))
    assert drafting.model.forecast([last]).gains == []
    assert not drafting.step(last)  # the target's own token will be the last one
    two_left = drafting.start([3, 1, 4], SamplingParams(temperature=0.0, max_tokens=3))
    while drafting.step(two_left):
        pass
    assert max(node.depth for node in two_left.tree.nodes) == 2


def test_the_tree_grows_no_deeper_than_this_round_and_the_next_can_use() -> None:
    drafting = Drafting(num_pages=400)
    sequence = drafting.start([3, 1, 4], max_depth=2)
    while drafting.step(sequence):
        pass
    assert max(node.depth for node in sequence.tree.nodes) <= 2 * 2 + 1
    assert drafting.model.forecast([sequence]).gains == []


def test_ids_of_a_padded_vocabulary_are_not_proposed() -> None:
    every = Drafting()
    half = Drafting(num_target_tokens=VOCAB // 2)
    for prompt in ([3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5, 8]):
        whole, padded = every.start(prompt), half.start(prompt)
        every.step(whole)
        half.step(padded)
        assert children(padded) == [token for token in children(whole) if token < VOCAB // 2]


def test_tokens_that_the_request_excludes_are_not_proposed() -> None:
    drafting = Drafting()
    sequence = drafting.start([3, 1, 4], SamplingParams(temperature=0.8, top_k=2, max_tokens=100))
    drafting.step(sequence)
    assert len(children(sequence)) == 2


def test_the_first_proposal_is_what_the_target_would_sample_with_these_logits() -> None:
    # Same noise, same penalties: a drafter that equals its target is always right, at any temperature.
    drafting = Drafting()
    sampling = SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.3, max_tokens=1000)
    sequence = drafting.start([3, 1, 4, 1, 5], sampling)
    for _ in range(12):
        for _ in range(3):
            drafting.step(sequence)
        for logits, row in drafting.sampler.proposed:
            node = 0
            for token in row.path_tokens:
                node = sequence.tree.nodes[node].children[token]
            with torch.inference_mode():
                (sampled,) = drafting.sampler.sample(logits[None], [row]).tokens.tolist()
            assert children(sequence, node)[0] == sampled
        drafting.verdict(sequence, [], {0: children(sequence)[0]})


def test_a_step_ahead_spares_one_only_below_what_is_verified_now() -> None:
    drafting = Drafting(rows_per_sequence=1)
    sequence = drafting.start([3, 1, 4, 1, 5])
    assert drafting.model.survival([sequence]) == 0.0  # the root itself is with the target
    drafting.step(sequence)
    best = sequence.tree.best(1, 4)
    assert drafting.model.survival([sequence]) == sequence.tree.nodes[best[0]].value
    sequence.sent_tree = sequence.tree.cut(best)
    assert drafting.model.survival([sequence]) == 0.0
