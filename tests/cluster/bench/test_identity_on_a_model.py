"""The check against the real workers in one process: forced tokens, log-probabilities and noise fit together."""

from collections.abc import Iterator, Sequence

import pytest
import torch

from outrider.cluster.bench.first_token import check_first_tokens
from outrider.cluster.bench.identity import Question, check_identity, explain
from outrider.cluster.bench.runner import EncodedPrompt
from outrider.kernels.noise import gumbel
from outrider.workers.answer import Completion
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request
from outrider.workers.weights.reference import load_transformers
from outrider.workers.weights.resolver import open_source
from support.local_engine import LocalEngine, output_tokens
from support.models import random_model

MODEL = random_model("hidden_size=32&num_layers=2&num_heads=4&num_kv_heads=2&vocab_size=96&seed=0")
PROMPTS = [EncodedPrompt("loop", "qa", (5, 9, 7) * 5), EncodedPrompt("other", "qa", (80, 3, 80, 3, 80, 4))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
SAMPLED = SamplingParams(temperature=0.8, max_tokens=16, seed=3)


class LocalAnswerer:
    """Questions as requests of a LocalEngine."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._num_asked = 0

    def answer(self, questions: Sequence[Question]) -> list[Completion]:
        requests = []
        for question in questions:
            self._num_asked += 1
            draft = DraftOptions(("ngram",), 6 if question.speculative else 0, 4)
            requests.append(Request(f"r{self._num_asked}", question.prompt_tokens, question.sampling, draft))
        events = self._engine.generate(requests)
        return [
            Completion(
                tokens=tuple(output_tokens(events[request.id])),
                logprobs=tuple(logprob for event in events[request.id] for logprob in event.logprobs),
                stats=events[request.id][-1].stats,
            )
            for request in requests
        ]


@pytest.fixture(scope="module")
def answerer() -> Iterator[LocalAnswerer]:
    torch.set_num_threads(1)
    with LocalEngine(open_source(MODEL)) as engine:
        yield LocalAnswerer(engine)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_speculation_by_lookup_changes_nothing(answerer: LocalAnswerer, sampling: SamplingParams) -> None:
    result = check_identity(answerer, PROMPTS, [sampling], tolerance=1e-4)
    assert result.holds
    assert result.num_drafted > 0


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_gap_of_a_made_up_token_is_the_one_of_the_reference(
    answerer: LocalAnswerer, sampling: SamplingParams
) -> None:
    prompt = PROMPTS[0]
    (answer,) = answerer.answer([Question(prompt.tokens, sampling, speculative=False)])
    index, wrong = 6, 90
    assert answer.tokens[index] != wrong
    made_up = (*answer.tokens[:index], wrong, *answer.tokens[index + 1 :])
    mismatch = explain(answerer, prompt, sampling, answer.tokens, made_up, tolerance=1e-4)

    context = prompt.tokens + answer.tokens[:index]
    with torch.inference_mode():
        logits = load_transformers(MODEL, torch.float32)(torch.tensor([context])).logits[0, -1]
    scores = logits.log_softmax(-1)
    if not sampling.is_greedy:
        scores = scores / sampling.temperature + gumbel(sampling.seed, len(context), torch.arange(96))
    assert int(scores.argmax()) == answer.tokens[index]
    assert mismatch.index == index
    assert not mismatch.is_tie
    assert mismatch.plain_gap == pytest.approx(0.0, abs=1e-5)
    assert mismatch.speculative_gap == pytest.approx(float(scores.max() - scores[wrong]), abs=1e-4)


def test_first_tokens_follow_the_law(answerer: LocalAnswerer) -> None:
    for result in check_first_tokens(answerer, PROMPTS, num_prompts=2, num_draws=200):
        assert result.holds
        assert result.num_classes > 1
