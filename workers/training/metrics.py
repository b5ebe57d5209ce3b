"""What is counted while a drafter is trained and measured: losses, acceptances, ranks of the right token, runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_RANKS = 10


@dataclass(frozen=True)
class Guesses:
    """What a head did with M labels.

    Attributes:
        losses: float32 [M], of each label; zero where it is not learned.
        acceptances: float32 [M], sum of min(p, q); zero where the target's choice is no token of the head.
        ranks: int64 [M], place of the target's choice among the head's guesses, 0 the first, NUM_RANKS: not among
            the first NUM_RANKS; None where it was not looked at.
    """

    losses: Tensor
    acceptances: Tensor
    ranks: Tensor | None

    def split(self, sizes: Sequence[int]) -> list[Guesses]:
        """Those of the first sizes[0] labels, of the next sizes[1], …"""
        ranks = [None] * len(sizes) if self.ranks is None else self.ranks.split(list(sizes))
        parts = zip(self.losses.split(list(sizes)), self.acceptances.split(list(sizes)), ranks, strict=True)
        return [Guesses(*part) for part in parts]


class StepCounts:
    """Sums over a batch, by step (or head). Those of several batches and ranks are added up as one tensor."""

    def __init__(self, num_steps: int, num_places: int, device: torch.device) -> None:
        """num_places: positions at which guesses begin."""
        # By step: labels, labels learned, loss, acceptance, then how often the rank was 0..NUM_RANKS - 1.
        self.sums = torch.zeros(num_steps, 4 + NUM_RANKS, device=device)
        self._runs = torch.ones(num_places, dtype=torch.bool, device=device)
        # By step: positions at which this many guesses exist, and those at which all up to here were right.
        self.chains = torch.zeros(num_steps, 2, device=device)

    @torch.no_grad()
    def add(self, step: int, num_learned: int, guesses: Guesses, places: Tensor) -> None:
        """Of one step. Steps come in ascending order.

        Args:
            num_learned: labels that the loss is over.
            places: int64 [M], where each chain of guesses began.
        """
        line = self.sums[step]
        line[0] += len(guesses.acceptances)
        line[1] += num_learned
        line[2:4] += torch.stack((guesses.losses.sum(), guesses.acceptances.sum()))
        if guesses.ranks is not None:
            line[4:] += torch.bincount(guesses.ranks, minlength=NUM_RANKS + 1)[:NUM_RANKS]
            right = torch.zeros_like(self._runs)
            right[places] = guesses.ranks == 0
            self._runs &= right
            self.chains[step, 0] += len(places)
            self.chains[step, 1] += self._runs.sum()


@dataclass(frozen=True)
class Measurement:
    """What some texts say about a drafter.

    Attributes:
        losses: by step, mean per label learned.
        acceptances: by step, mean of sum of min(p, q), given that the earlier tokens were right.
        accuracies: by step and rank: how often the guess of this rank is the target's choice, the earlier tokens
            being right.
        acceptance_length: tokens per round that a chain of the first guesses would give on these texts, the
            target's own included.
    """

    losses: tuple[float, ...]
    acceptances: tuple[float, ...]
    accuracies: tuple[tuple[float, ...], ...]
    acceptance_length: float

    def top(self, count: int) -> tuple[float, ...]:
        """By step: how often the target's choice is among the first `count` guesses."""
        return tuple(sum(ranks[:count]) for ranks in self.accuracies)


def measurement(sums: Tensor, chains: Tensor) -> Measurement:
    """Of added-up `StepCounts`."""
    labels = sums[:, 0].clamp(min=1)
    accuracies = (sums[:, 4:] / labels[:, None]).tolist()
    # A chain of k guesses adds a token for every k up to which all are right.
    survival = chains[:, 1] / chains[:, 0].clamp(min=1)
    return Measurement(
        losses=tuple((sums[:, 2] / sums[:, 1].clamp(min=1)).tolist()),
        acceptances=tuple((sums[:, 3] / labels).tolist()),
        accuracies=tuple(tuple(ranks) for ranks in accuracies),
        acceptance_length=1.0 + float(survival.sum()),
    )
