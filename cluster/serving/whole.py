"""One job from its pieces to the object that answers it."""

from collections.abc import Callable
from typing import Any

from outrider.cluster.api import Piece
from outrider.cluster.serving.answers import Answers
from outrider.cluster.serving.jobs import Job
from outrider.cluster.serving.usage import Tally
from outrider.cluster.serving.writers import Writer


async def whole_answer(
    answers: Answers, job: Job, writer: Writer, tally: Tally, note: Callable[[int, Piece], None]
) -> dict[str, Any]:
    """All choices, with usage. `note` sees every piece as it comes; errors are those of `Answers`."""
    pieces: list[list[Piece]] = [[] for _ in job.requests]
    async for index, piece in answers:
        note(index, piece)
        pieces[index].append(piece)
    return writer.whole(pieces, tally)
