"""Answers on a terminal, a pipe or as JSON."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from outrider.cluster.printable import printable
from outrider.workers.sequences.origin import Origin

if TYPE_CHECKING:
    from outrider.cluster.api import Piece
    from outrider.workers.answer import Completion

STYLES = {Origin.TARGET: "default", Origin.DRAFT: "green", Origin.KEPT: "yellow"}
LEGEND = Text.assemble(
    ("accepted draft tokens", STYLES[Origin.DRAFT]), ", ", ("the target's own", STYLES[Origin.TARGET])
)
_KEPT = ("kept against the target", STYLES[Origin.KEPT])


def legend(acceptance: Mapping[str, object]) -> Text:
    """What the colours mean in answers to a request with these options."""
    return LEGEND if acceptance.get("rule", "exact") == "exact" else Text.assemble(LEGEND, ", ", _KEPT)


def show_stream(console: Console, pieces: "Iterable[Piece]", visible: bool = True) -> "Completion":
    """Prints an answer as it comes, draft tokens coloured on a terminal, and a line feed after it."""
    from outrider.cluster.api import Collector

    answer = Collector()
    begun = False
    try:
        for piece in pieces:
            answer.add(piece)
            begun = True
            for segment in piece.segments if visible else ():
                show_segment(console, segment.text, segment.origin)
    finally:
        # Also where an answer breaks off: what is said then gets a line of its own.
        if visible and begun:
            console.file.write("\n")
            console.file.flush()
    return answer.completion()


def show_segment(console: Console, text: str, origin: Origin) -> None:
    """Text of one origin. A pipe gets exactly the text; a terminal none that it would obey."""
    if not console.is_terminal:
        console.file.write(text)
        console.file.flush()
        return
    console.print(Text(printable(text), STYLES[origin]), end="", soft_wrap=True, highlight=False)


def summary(answer: "Completion") -> str:
    """One line about an answer's speed, and what a lossy rule kept."""
    kept = answer.stats.kept
    cost = (
        f", {kept.num} kept ({kept.mean_gap:.2f} nats off, at worst {kept.worst_gap:.2f})" if kept.num else ""
    )
    return (
        f"{len(answer.tokens)} tokens, {answer.tokens_per_s:.1f} tokens/s, "
        f"acceptance length {answer.acceptance_length:.2f}{cost}"
    )


def completion_json(completion: "Completion", prompt: str, prompt_id: str) -> str:
    """One line of JSON for machines."""
    record: dict[str, Any] = {"id": prompt_id, "prompt": prompt, **asdict(completion)}
    record["stats"]["kept"] = completion.stats.kept.summary()
    record["origins"] = [origin.label for origin in completion.origins]
    return json.dumps(record, ensure_ascii=False)
