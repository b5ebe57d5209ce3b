"""The two ends of the link between DraftWorker and target rank 0: messages to buffers and back."""

from __future__ import annotations

from typing import Protocol

import torch

from outrider.workers.link.messages import (
    Draft,
    MessageCapacity,
    Scores,
    decode_scores,
    encode_draft,
    encode_scores,
)


class BufferLink(Protocol):
    """Carries int32 buffers of fixed length in order; raises PeerLostError when the other side is gone."""

    def send(self, buffer: torch.Tensor) -> None: ...

    def receive(self) -> torch.Tensor: ...

    def poll(self) -> bool:
        """Whether `receive` would return at once."""

    def close(self) -> None: ...


class DraftSender:
    """The DraftWorker's end: drafts out, scores in."""

    def __init__(self, link: BufferLink, capacity: MessageCapacity) -> None:
        self._link = link
        self._buffer = torch.zeros(capacity.draft_ints, dtype=torch.int32)

    def send(self, draft: Draft) -> None:
        encode_draft(draft, self._buffer)
        self._link.send(self._buffer)

    def receive(self) -> Scores:
        return decode_scores(self._link.receive())

    def poll(self) -> bool:
        """Whether scores are here."""
        return self._link.poll()

    def close(self) -> None:
        self._link.close()


class DraftReceiver:
    """The target's end: drafts in (still encoded: they go on to the other ranks), scores out."""

    def __init__(self, link: BufferLink, capacity: MessageCapacity) -> None:
        self._link = link
        self._buffer = torch.zeros(capacity.scores_ints, dtype=torch.int32)

    def receive_buffer(self) -> torch.Tensor:
        return self._link.receive()

    def send(self, scores: Scores) -> None:
        encode_scores(scores, self._buffer)
        self._link.send(self._buffer)

    def close(self) -> None:
        self._link.close()
