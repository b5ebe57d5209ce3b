"""The two ends of the link between DraftWorker and target rank 0: messages to buffers and back."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from outrider.workers.link.messages import Draft, Scores, decode_scores, encode_draft, encode_scores


class Packet(NamedTuple):
    """What travels on a link at once."""

    message: torch.Tensor  # int32 [any length]
    payload: torch.Tensor  # uint8 [any length], bytes of tensors; on a GPU where both ends are


NO_PAYLOAD = torch.empty(0, dtype=torch.uint8)


class PacketLink(Protocol):
    """Carries packets in order; raises PeerLostError when the other side is gone."""

    def send(self, packet: Packet) -> None:
        """The message may be changed afterwards, the payload not."""

    def receive(self) -> Packet: ...

    def poll(self) -> bool:
        """Whether `receive` would return at once."""

    def close(self) -> None: ...


class DraftSender:
    """The DraftWorker's end: drafts out, scores in."""

    def __init__(self, link: PacketLink) -> None:
        self._link = link

    def send(self, draft: Draft) -> None:
        self._link.send(Packet(encode_draft(draft), NO_PAYLOAD))

    def receive(self) -> Scores:
        return decode_scores(*self._link.receive())

    def poll(self) -> bool:
        """Whether scores are here."""
        return self._link.poll()

    def close(self) -> None:
        self._link.close()


class DraftReceiver:
    """The target's end: drafts in (still encoded: they go on to the other ranks), scores out."""

    def __init__(self, link: PacketLink) -> None:
        self._link = link

    def receive_message(self) -> torch.Tensor:
        """An encoded draft."""
        return self._link.receive().message

    def poll(self) -> bool:
        """Whether a draft is here."""
        return self._link.poll()

    def send(self, scores: Scores) -> None:
        payload = NO_PAYLOAD
        if scores.hidden is not None:
            payload = scores.hidden.contiguous().view(-1).view(torch.uint8)
        self._link.send(Packet(encode_scores(scores), payload))

    def close(self) -> None:
        self._link.close()
