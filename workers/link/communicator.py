"""What the ranks of a tensor-parallel group say to each other, whatever carries it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch

Role = Literal["target", "draft"]
"""Of which model the ranks of a group are."""

FIRST_BLOCK_INTS = 1024
"""Messages travel as a first block of this size, and the rest only where they are longer: most are not."""


class Communicator(Protocol):
    """Collectives of one tensor-parallel group. Every rank makes the same calls in the same order.

    All but `close` and `abort` raise PeerLostError when another rank is gone, after which the communicator
    is unusable: build a new one under a new epoch.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of `x` over the ranks, bit-identical on all of them. May reuse the memory of `x`."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[size, *x.shape]: the `x` of every rank, which all have the same shape and dtype."""
        ...

    def broadcast(self, x: torch.Tensor) -> None:
        """Overwrite `x` with the `x` of rank 0."""
        ...

    def abort(self) -> None:
        """Make calls that wait on any rank raise PeerLostError. May be called from any thread."""
        ...

    def close(self) -> None:
        """Release the group's resources. Other ranks that still wait for this one get PeerLostError."""
        ...


class SoloCommunicator:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(0)

    def broadcast(self, x: torch.Tensor) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def agreed(communicator: Communicator, mine: Sequence[bool]) -> list[bool]:
    """Of several yes-or-no questions, which of them every rank answers with yes; one exchange."""
    answers = torch.tensor(list(mine), dtype=torch.int64)
    return [bool(answer) for answer in communicator.all_gather(answers).amin(0)]


def broadcast_message(communicator: Communicator, message: torch.Tensor) -> torch.Tensor:
    """The int32 message of rank 0, of any length, on every rank. The others' `message` is not looked at."""
    first = torch.zeros(FIRST_BLOCK_INTS, dtype=torch.int32)  # the length, then the message
    if communicator.rank == 0:
        first[0] = len(message)
        beginning = message[: FIRST_BLOCK_INTS - 1]
        first[1 : 1 + len(beginning)] = beginning
    communicator.broadcast(first)
    length = int(first[0])
    num_more = length - (FIRST_BLOCK_INTS - 1)
    if num_more <= 0:
        return first[1 : 1 + length]
    # Few different lengths, which some transports keep something for.
    rest = torch.zeros(1 << (num_more - 1).bit_length(), dtype=torch.int32)
    if communicator.rank == 0:
        rest[:num_more] = message[FIRST_BLOCK_INTS - 1 :]
    communicator.broadcast(rest)
    return torch.cat([first[1:], rest[:num_more]])
