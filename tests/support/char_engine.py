"""An Engine in this process: real admission, text and pieces; answers from a script; no Ray."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from outrider.cluster.api import Collector, EngineError, GenerationRequest, Piece, Progress, Prompt, Segment
from outrider.configs.schema import Config
from outrider.workers.answer import Completion
from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.sequence import NONE_KEPT, KeptAccount, RequestStats
from support.char_admission import char_admission


class CharEngine:
    """Answers with `answer(prompt)`, two tokens a piece: the target's own, then a drafted one, which a lossy rule
    kept.

    death: with a text, every request ends in EngineError.
    """

    def __init__(
        self, config: Config, progress: Callable[[Sequence[Progress]], None], answer: Callable[[str], str]
    ) -> None:
        progress([Progress("target 0", "load", 1, 2), Progress("draft", "profile", 0, 0)])
        self.config = config
        self.asked: list[GenerationRequest] = []
        self.death = ""
        self.closed = False
        self._answer = answer
        self._admission = char_admission(config, lambda what, done, total: None)

    def stream(
        self,
        prompt: Prompt,
        sampling: Mapping[str, object] = {},
        draft: Mapping[str, object] = {},
        acceptance: Mapping[str, object] = {},
        template: Mapping[str, object] = {},
    ) -> Iterator[Piece]:
        asked = GenerationRequest(prompt, sampling, draft, acceptance, template)
        self.asked.append(asked)
        if self.death:
            raise EngineError(self.death)
        request = self._admission.admit("fake", asked)
        text = self._answer("".join(map(chr, request.prompt_tokens)))[: request.sampling.max_tokens]
        drafted = Origin.DRAFT if request.acceptance.rule == "exact" else Origin.KEPT
        for at in range(0, len(text), 2):
            yield _piece(text[at : at + 2], at + 2 >= len(text), at // 2 + 1, drafted)

    def completions(self, requests: Sequence[GenerationRequest]) -> Iterator[Completion]:
        for asked in requests:
            answer = Collector()
            try:
                pieces = self.stream(
                    asked.prompt, asked.sampling, asked.draft, asked.acceptance, asked.template
                )
                for piece in pieces:
                    answer.add(piece)
            except ValueError as error:
                yield Completion(finish_reason="error", error=str(error))
                continue
            yield answer.completion()

    def stats(self) -> dict[str, dict[str, Any]]:
        busy_s = {"forward": 1.0, "wait": 1.0}
        return {"draft": {"busy_s": busy_s}, "target 0": {"busy_s": busy_s}, "coordinator": {}}

    def trace(self) -> dict[str, list[dict[str, Any]]]:
        return {"draft": [{"name": "draft", "ph": "X", "ts": 0.0, "dur": 1.0, "args": {}}]}

    def __enter__(self) -> "CharEngine":
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True


def _piece(text: str, last: bool, num_rounds: int, drafted: Origin) -> Piece:
    origins = (Origin.TARGET, drafted)[: len(text)]
    segments = tuple(Segment(char, origin) for char, origin in zip(text, origins, strict=True))
    num_kept = num_rounds if drafted == Origin.KEPT else 0
    kept = KeptAccount(num_kept, 0.5 * num_kept, 0.7, 0.9 * num_kept, 0.6) if num_kept else NONE_KEPT
    stats = RequestStats(num_rounds=num_rounds, kept=kept)
    return Piece(
        segments=segments,
        tokens=tuple(map(ord, text)),
        origins=origins,
        finish_reason="stop" if last else "",
        stats=stats,
        num_prompt_tokens=1,
    )
