"""Token ids to streamed text, cut at the first stop string.

Text that may turn out to be the beginning of a stop string is held back until it is known not to be one.
"""

from collections.abc import Sequence
from typing import Protocol

from outrider.cluster.api import Segment


class Decoder(Protocol):
    """Text of a growing token sequence (`IncrementalDecoder` of the weights folder)."""

    def add(self, token: int) -> str:
        """The text that this token completes; empty in the middle of a character."""

    def finish(self) -> str:
        """What is left at the end, an incomplete character as U+FFFD."""


class TextAssembler:
    """Text of one answer as it may be shown.

    stop: stop strings, none of them empty; the answer ends before the first that occurs.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str]) -> None:
        assert all(stop), stop
        self._decoder = decoder
        self._stop = tuple(stop)
        self._held: list[Segment] = []  # decoded, not shown yet
        self.stopped = False

    def add(self, token: int, from_draft: bool) -> list[Segment]:
        """The text that can be shown now. Sets `stopped` when the token completes a stop string."""
        assert not self.stopped
        return self._take(Segment(self._decoder.add(token), from_draft))

    def finish(self) -> list[Segment]:
        """The rest, at the end of the answer: nothing is held back any longer."""
        if self.stopped:
            return []
        segments = self._take(Segment(self._decoder.finish(), from_draft=False))
        segments += self._held
        self._held = []
        return segments

    def _take(self, new: Segment) -> list[Segment]:
        if new.text:
            self._held.append(new)
        if not self._stop:
            ready, self._held = self._held, []
            return ready
        text = "".join(segment.text for segment in self._held)
        ends = [position for position in (text.find(stop) for stop in self._stop) if position >= 0]
        if ends:
            self.stopped = True
            ready, self._held = _split(self._held, min(ends))[0], []
        else:
            ready, self._held = _split(self._held, len(text) - self._num_doubtful(text))
        return ready

    def _num_doubtful(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def _split(segments: Sequence[Segment], position: int) -> tuple[list[Segment], list[Segment]]:
    """The segments before and after character `position` of their joined text."""
    before: list[Segment] = []
    after: list[Segment] = []
    for segment in segments:
        head, tail = segment.text[: max(position, 0)], segment.text[max(position, 0) :]
        if head:
            before.append(Segment(head, segment.from_draft))
        if tail:
            after.append(Segment(tail, segment.from_draft))
        position -= len(segment.text)
    return before, after
