"""What equality tests ask of a deployment on Ray."""

from collections.abc import Mapping
from dataclasses import asdict

from outrider.cluster.api import GenerationRequest
from outrider.cluster.engine import Engine
from outrider.workers.answer import Completion
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions
from support.equality import PLAIN, Case

WARM = SamplingParams(
    temperature=0.8,
    top_p=0.95,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.1,
    max_tokens=20,
)


def ask(engine: Engine, cases: list[Case], draft: DraftOptions) -> Mapping[str, Completion]:
    """All cases at once, their stop tokens instead of the model's."""
    answers = engine.generate(
        [
            GenerationRequest(
                case.prompt,
                {**case.sampling.request_fields(), "ignore_eos": True},
                {"max_nodes": 0} if draft == PLAIN else asdict(draft),
            )
            for case in cases
        ]
    )
    assert not any(answer.error for answer in answers), [answer.error for answer in answers]
    return {case.id: answer for case, answer in zip(cases, answers, strict=True)}
