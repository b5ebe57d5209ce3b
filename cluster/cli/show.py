"""Answers on a terminal, a pipe or as JSON."""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from outrider.cluster.printable import printable
from outrider.workers.sequences.origin import Origin

if TYPE_CHECKING:
    from outrider.cluster.api import Completion, Piece
    from outrider.workers.sequences.sequence import RequestStats

STYLES = {Origin.TARGET: "default", Origin.DRAFT: "green", Origin.KEPT: "yellow"}
LEGEND = Text.assemble(
    ("accepted draft tokens", STYLES[Origin.DRAFT]), ", ", ("the target's own", STYLES[Origin.TARGET])
)


@dataclass(frozen=True)
class Answer:
    """A streamed answer, and how fast it came."""

    text: str
    num_tokens: int
    decode_s: float
    """From the first piece to the last."""
    num_decoded: int
    """Tokens after the first piece."""
    finish_reason: str
    error: str
    stats: "RequestStats"

    @property
    def tokens_per_s(self) -> float:
        """While decoding: the time to the first token is not in it. 0 for answers of one piece."""
        return self.num_decoded / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens per target step."""
        return self.num_tokens / self.stats.num_rounds if self.stats.num_rounds else 0.0


def show_stream(console: Console, pieces: "Iterable[Piece]", visible: bool = True) -> Answer:
    """Prints an answer as it comes, draft tokens coloured on a terminal, and a line feed after it."""
    text: list[str] = []
    num_tokens = num_first = 0
    first_s = last_s = time.perf_counter()
    try:
        for piece in pieces:
            last_s = time.perf_counter()
            if piece.tokens and not num_tokens:
                first_s, num_first = last_s, len(piece.tokens)
            num_tokens += len(piece.tokens)
            text.append(piece.text)
            for segment in piece.segments if visible else ():
                show_segment(console, segment.text, segment.origin)
    finally:
        # Also where an answer breaks off: what is said then gets a line of its own.
        if visible and text:
            console.file.write("\n")
            console.file.flush()
    return Answer(
        text="".join(text),
        num_tokens=num_tokens,
        decode_s=last_s - first_s,
        num_decoded=num_tokens - num_first,
        finish_reason=piece.finish_reason,
        error=piece.error,
        stats=piece.stats,
    )


def show_segment(console: Console, text: str, origin: Origin) -> None:
    """Text of one origin. A pipe gets exactly the text; a terminal none that it would obey."""
    if not console.is_terminal:
        console.file.write(text)
        console.file.flush()
        return
    console.print(Text(printable(text), STYLES[origin]), end="", soft_wrap=True, highlight=False)


def summary(answer: Answer) -> str:
    """One line about an answer's speed."""
    return (
        f"{answer.num_tokens} tokens, {answer.tokens_per_s:.1f} tokens/s, "
        f"acceptance length {answer.acceptance_length:.2f}"
    )


def completion_json(completion: "Completion", prompt: str, prompt_id: str) -> str:
    """One line of JSON for machines."""
    record: dict[str, Any] = {"id": prompt_id, "prompt": prompt, **asdict(completion)}
    record["origins"] = [origin.label for origin in completion.origins]
    return json.dumps(record, ensure_ascii=False)
