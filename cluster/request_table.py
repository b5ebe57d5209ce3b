"""The requests of a deployment, from admission to the last token: what the Coordinator knows of each."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from outrider.cluster.api import Completion, Piece, Segment
from outrider.cluster.text import Decoder, TextAssembler
from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.sequence import Request, RequestStats, TokenEvent, TokenLogprobs


class OpenRequest:
    """One request: its text so far and the pieces nobody fetched yet."""

    def __init__(self, request: Request, decoder: Decoder) -> None:
        self.request = request
        self.text = TextAssembler(decoder, request.sampling.stop)
        self.pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self.start_s = time.monotonic()
        self.token_times_s: list[float] = []


class RequestTable:
    """Takes TokenEvents, gives Pieces. Belongs to one event loop.

    cancel: tells the DraftWorker that a request ended here, at a stop string. It must not block.
    """

    def __init__(self, cancel: Callable[[str], None]) -> None:
        self._cancel = cancel
        self._open: dict[str, OpenRequest] = {}

    @property
    def num_open(self) -> int:
        return len(self._open)

    def open(self, request: Request, decoder: Decoder) -> OpenRequest:
        assert request.id not in self._open, request.id
        entry = self._open[request.id] = OpenRequest(request, decoder)
        return entry

    def forget(self, request_id: str) -> None:
        """Drops a request that never reached the DraftWorker."""
        del self._open[request_id]

    def deliver(self, event: TokenEvent) -> None:
        """What a round gave to one request. Events of requests that are no longer here are dropped."""
        entry = self._open.get(event.request_id)
        if entry is None:
            return
        was_stopped = entry.text.stopped
        segments, num_kept = _append(entry, event)
        stopped = entry.text.stopped
        if event.finish_reason:
            del self._open[event.request_id]
            segments += entry.text.finish()
        elif stopped and not was_stopped:
            # The last piece waits for the DraftWorker's last event, which carries the final counts.
            self._cancel(event.request_id)
        entry.token_times_s += [time.monotonic() - entry.start_s] * num_kept
        reason = "stop" if stopped and event.finish_reason in ("cancelled", "length") else event.finish_reason
        if not (num_kept or segments or reason):
            return
        piece = Piece(
            segments=tuple(segments),
            tokens=event.tokens[:num_kept],
            from_draft=tuple(origin is not Origin.TARGET for origin in event.origins[:num_kept]),
            logprobs=event.logprobs[:num_kept],
            finish_reason=reason,
            error=event.error,
            stats=event.stats,
        )
        entry.pieces.put_nowait(piece)

    def fail_all(self, reason: str) -> None:
        """The deployment broke: every open request ends with this error."""
        for entry in self._open.values():
            segments = tuple(entry.text.finish())
            entry.pieces.put_nowait(Piece(segments, (), (), (), "error", reason, RequestStats()))
        self._open.clear()


def _append(entry: OpenRequest, event: TokenEvent) -> tuple[list[Segment], int]:
    """Adds the event's tokens to the text, up to one that completes a stop string; how many were kept."""
    segments: list[Segment] = []
    num_kept = 0
    for token, from_draft in zip(event.tokens, event.origins, strict=True):
        if entry.text.stopped:
            break
        segments += entry.text.add(token, from_draft)
        num_kept += 1
    return segments, num_kept


async def pieces_of(entry: OpenRequest) -> AsyncIterator[Piece]:
    """The pieces of a request as they come, up to the one with a finish reason."""
    while True:
        piece = await entry.pieces.get()
        yield piece
        if piece.finish_reason:
            return


async def completion_of(entry: OpenRequest) -> Completion:
    """Waits for the whole answer."""
    text: list[str] = []
    tokens: list[int] = []
    from_draft: list[bool] = []
    logprobs: list[TokenLogprobs] = []
    async for piece in pieces_of(entry):
        text.append(piece.text)
        tokens += piece.tokens
        from_draft += piece.from_draft
        logprobs += piece.logprobs
    return Completion(
        text="".join(text),
        tokens=tuple(tokens),
        from_draft=tuple(from_draft),
        logprobs=tuple(logprobs),
        token_times_s=tuple(entry.token_times_s),
        finish_reason=piece.finish_reason,
        error=piece.error,
        num_prompt_tokens=len(entry.request.prompt_tokens),
        stats=piece.stats,
        total_s=time.monotonic() - entry.start_s,
    )
