"""A small language model without a network, decoded honestly or dishonestly, for `outrider check`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from outrider.cluster.bench.identity import Question
from outrider.kernels.noise import gumbel
from outrider.workers.answer import Completion
from outrider.workers.sequences.sequence import RequestStats, TokenLogprobs

VOCAB_SIZE = 40


@dataclass
class FakeAnswerer:
    """Logits are a function of the last two tokens.

    num_repeats: how often the likeliest token occurs in the vocabulary (2: every choice is an exact tie).
    rounding: added to odd tokens' logits when decoding speculatively, as another order of sums would.
    lie_at: position in the output at which speculative decoding takes the fifth best token.
    sharpness: what speculative sampling multiplies the logits with; anything but 1 is another law.
    ends_early: speculative texts miss their last token.
    knows_logprobs: whether log-probabilities are given at all.
    drafts: whether speculative decoding proposes anything.
    """

    num_repeats: int = 1
    rounding: float = 0.0
    lie_at: int = 10**9
    sharpness: float = 1.0
    ends_early: bool = False
    knows_logprobs: bool = True
    drafts: bool = True
    num_answers: int = 0

    def answer(self, questions: Sequence[Question]) -> list[Completion]:
        self.num_answers += len(questions)
        return [self._answer(question) for question in questions]

    def logits(self, context: Sequence[int]) -> torch.Tensor:
        """float64 [VOCAB_SIZE]"""
        generator = torch.Generator().manual_seed(
            1000 * context[-1] + (context[-2] if len(context) > 1 else 0)
        )
        logits = 2 * torch.randn(VOCAB_SIZE, generator=generator, dtype=torch.float64)
        order = logits.argsort(descending=True)
        logits[order[1 : self.num_repeats]] = logits[order[0]].clone()
        return logits

    def _answer(self, question: Question) -> Completion:
        sampling = question.sampling
        context = list(question.prompt_tokens)
        logprobs = []
        for index in range(sampling.max_tokens):
            logits = self.logits(context)
            if question.speculative:
                logits[1::2] += self.rounding
            law = torch.log_softmax(logits, dim=-1)
            scores = law.clone()
            if question.speculative:
                scores *= self.sharpness
            for token, bias in sampling.logit_bias:
                scores[token] += bias
            if not sampling.is_greedy:
                noise = gumbel(sampling.seed, len(context), torch.arange(VOCAB_SIZE))
                scores = scores / sampling.temperature + noise
            rank = 4 if question.speculative and index == self.lie_at else 0
            token = int(scores.argsort(descending=True, stable=True)[rank])
            context.append(token)
            top = law.topk(sampling.top_logprobs)
            logprobs.append(
                TokenLogprobs(
                    float(law[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
                )
            )
        tokens = tuple(context[len(question.prompt_tokens) :])
        if question.speculative and self.ends_early:
            tokens = tokens[:-1]
        drafts = question.speculative and self.drafts
        return Completion(
            tokens=tokens,
            logprobs=tuple(logprobs) if sampling.logprobs and self.knows_logprobs else (),
            finish_reason="length",
            stats=RequestStats(
                num_rounds=len(tokens),
                num_drafted=2 * len(tokens) if drafts else 0,
                num_accepted=len(tokens) if drafts else 0,
            ),
        )
