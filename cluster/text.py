"""Token ids to streamed text, cut at the first stop string.

Text that may turn out to be the beginning of a stop string is held back until it is known not to be one.
"""

from collections.abc import Sequence
from typing import Protocol

from outrider.cluster.api import Segment
from outrider.cluster.stop_strings import StopStrings
from outrider.workers.sequences.origin import Origin


class Decoder(Protocol):
    """Text of a growing token sequence (`IncrementalDecoder` of the weights folder)."""

    def add(self, token: int) -> str:
        """The text that this token completes; empty in the middle of a character."""

    def finish(self) -> str:
        """What is left at the end, an incomplete character as U+FFFD."""


class TextAssembler:
    """Text of one answer as it may be shown.

    stop: stop strings, none of them empty; the answer ends before the first that occurs.
    min_tokens: of the answer; a stop string that the first so many complete means nothing, as vLLM has it.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str], min_tokens: int = 0) -> None:
        self._decoder = decoder
        self._stop = StopStrings(stop)
        self._held: list[Segment] = []  # decoded, not shown yet
        self._num_held = 0  # characters
        self._num_deaf = min_tokens  # tokens to come in which no stop string counts
        self.stopped = False

    def add(self, token: int, origin: Origin) -> list[Segment]:
        """The text that can be shown now. Sets `stopped` when the token completes a stop string."""
        assert not self.stopped
        return self._take(Segment(self._decoder.add(token), origin))

    def finish(self) -> list[Segment]:
        """The rest, at the end of the answer: nothing is held back any longer."""
        if self.stopped:
            return []
        segments = self._take(Segment(self._decoder.finish(), Origin.TARGET))
        segments += self._held
        self._held, self._num_held = [], 0
        return segments

    def _take(self, new: Segment) -> list[Segment]:
        begin = self._stop.find(new.text)
        if self._num_deaf > 0:
            self._num_deaf, begin = self._num_deaf - 1, None
        num_before = self._num_held
        if new.text:
            self._held.append(new)
            self._num_held += len(new.text)
        if begin is not None:
            self.stopped = True
            ready = _split(self._held, num_before + begin)[0]
            self._held, self._num_held = [], 0
            return ready
        num_doubtful = self._stop.num_doubtful
        if num_doubtful == self._num_held:
            return []
        ready, self._held = _split(self._held, self._num_held - num_doubtful)
        self._num_held = num_doubtful
        return ready


def _split(segments: Sequence[Segment], position: int) -> tuple[list[Segment], list[Segment]]:
    """The segments before and after character `position` of their joined text."""
    before: list[Segment] = []
    after: list[Segment] = []
    for segment in segments:
        head, tail = segment.text[: max(position, 0)], segment.text[max(position, 0) :]
        if head:
            before.append(Segment(head, segment.origin))
        if tail:
            after.append(Segment(tail, segment.origin))
        position -= len(segment.text)
    return before, after
