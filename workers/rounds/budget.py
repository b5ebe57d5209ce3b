"""How many nodes to verify, and when to stop drafting: whatever gives the most tokens per second.

Expected tokens of a round are one per sequence (the target's own) plus the value of each verified node
(the estimated probability that its whole path is accepted). The costs are measured, not assumed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

import numpy as np

from outrider.workers.sequences.tree import Floats, Ints

_SMOOTHING = 0.1  # weight of the newest measurement
_SHAPE_SMOOTHING = 0.03  # its further weight for the row counts next to its own
_SHAPE_RANGE = 0.3  # relative error beyond which a whole profile is off, not its shape
_FADING = 0.995  # of what a drafter step is taken to cost, each time it seems too much

_Rows = TypeVar("_Rows", int, Ints)


@dataclass(frozen=True)
class PassProfile:
    """Seconds of one pass, of the target or the drafter, for increasing numbers of rows.

    row_step: it computes multiples of so many rows, whatever it is given.
    """

    num_rows: tuple[int, ...]
    seconds: tuple[float, ...]
    row_step: int = 1

    def at(self, rows: int) -> float:
        """Linear between the measured counts, and beyond them with the last slope."""
        counts, times, rows = self.num_rows, self.seconds, self._computed(rows)
        if rows <= counts[0] or len(counts) == 1:
            return times[0]
        right = min(bisect_left(counts, rows), len(counts) - 1)
        left = right - 1
        slope = (times[right] - times[left]) / (counts[right] - counts[left])
        return times[left] + slope * (rows - counts[left])

    def of_range(self, first: int, count: int) -> Floats:
        """[count]: seconds for `first`, `first` + 1, … rows."""
        rows = self._computed(np.arange(first, first + count))
        seconds: Floats = np.interp(rows, self.num_rows, self.seconds)
        if len(self.num_rows) > 1 and rows[-1] > self.num_rows[-1]:
            slope = (self.seconds[-1] - self.seconds[-2]) / (self.num_rows[-1] - self.num_rows[-2])
            seconds += slope * np.maximum(rows - self.num_rows[-1], 0)
        return seconds

    def shares(self, rows: int) -> list[float]:
        """How much each measured count has to do with `rows`, 0 to 1: the two around it by nearness, summing to 1.

        Beyond the last count none has.
        """
        counts, rows = self.num_rows, self._computed(rows)
        if rows <= counts[0]:
            return [1.0] + [0.0] * (len(counts) - 1)
        shares = [0.0] * len(counts)
        if rows <= counts[-1]:
            right = bisect_left(counts, rows)
            shares[right] = (rows - counts[right - 1]) / (counts[right] - counts[right - 1])
            shares[right - 1] = 1.0 - shares[right]
        return shares

    def _computed(self, rows: _Rows) -> _Rows:
        return -(-rows // self.row_step) * self.row_step

    def with_seconds(self, seconds: SequenceABC[float]) -> PassProfile:
        """Another measurement of the same counts. More rows are never cheaper; a noisy one must not say so."""
        return replace(self, seconds=tuple(accumulate(seconds, max)))


@dataclass(frozen=True)
class Profiles:
    """What was measured at a start."""

    target: PassProfile
    methods: Mapping[str, PassProfile]  # steps of draft methods, by their names


class CostModel:
    """Seconds of a target pass, and of each draft method's steps and reading, from start-up profiles and what is
    measured since.

    Rows cost more in long contexts and in many sequences than in a profile's one chain, so serving teaches the
    profiles: mostly their scale, slowly their shape.
    """

    def __init__(self, target: PassProfile, methods: Mapping[str, PassProfile] | None = None) -> None:
        """`methods`: profiles of steps by method; one that is missing counts as free until its first step is seen."""
        self.target = target.with_seconds(target.seconds)
        self.methods = {name: p.with_seconds(p.seconds) for name, p in (methods or {}).items()}
        self.draft_round_s = 0.0  # all drafting of one lane in one round
        self._read_token_s: dict[str, float] = {}  # one token of a prompt, read by a method

    def target_s(self, rows: int) -> float:
        """Predicted seconds of the target for a round of `rows` rows."""
        return self.target.at(rows)

    def step_s(self, method: str, rows: int) -> float:
        """Predicted seconds of a method's step over `rows` rows."""
        return self.methods[method].at(rows) if method in self.methods else 0.0

    def read_s(self, method: str, tokens: int) -> float:
        """Predicted seconds in which a method reads `tokens` tokens without proposing any."""
        if method in self._read_token_s:
            return tokens * self._read_token_s[method]
        return self.step_s(method, tokens)

    def observe_target(self, rows: int, seconds: float) -> None:
        """A served round without long prompts; outliers (a stalled machine) count at most double."""
        self.target = _learned(self.target, rows, seconds)

    def observe_step(self, method: str, rows: int, seconds: float) -> None:
        """A method's step; outliers count at most double: one stalled step must not end drafting for long."""
        self.methods[method] = _learned(
            self.methods.get(method, PassProfile((1,), (seconds,))), rows, seconds
        )

    def observe_reading(self, method: str, tokens: int, seconds: float) -> None:
        """A method has read a chunk."""
        self._read_token_s[method] = self._smooth(self._read_token_s.get(method, 0.0), seconds / tokens)

    def doubt_steps(self, method: str) -> None:
        """A step was not worth it; let its cost fade, so that one bad measurement is tried again some day."""
        if method in self.methods:
            profile = self.methods[method]
            self.methods[method] = profile.with_seconds([_FADING * seconds for seconds in profile.seconds])

    def observe_draft_round(self, seconds: float) -> None:
        self.draft_round_s = self._smooth(self.draft_round_s, seconds)

    def one_lane_is_faster(self, rows: int) -> bool:
        """Whether all sequences in one lane beat two lanes of half the rows each.

        Serial cycle: draft + verify everything. Two lanes: each of two halves waits for the slower side.
        When passes cost nearly the same for half the rows, which holds as long as memory reads dominate,
        two passes cost more than the drafting they hide.
        """
        half = self.target_s(max(1, rows // 2))
        one_lane = self.draft_round_s + self.target_s(rows)
        two_lanes = max(2.0 * half, 2.0 * self.draft_round_s, self.draft_round_s + half)
        return one_lane <= two_lanes

    def best_num_nodes(self, values: Floats, num_base_rows: int, num_sequences: int, drafted_s: float) -> int:
        """How many of the nodes, most valuable first, give the most expected tokens per second.

        values: float64 [M] descending; num_base_rows: rows the round has anyway; drafted_s: spent on drafting, which
        counts because a round that costs more anyway may well verify more.
        """
        return self._best(values, num_base_rows, num_sequences, drafted_s)[0]

    def saved_by_step(
        self,
        values: Floats,
        num_base_rows: int,
        num_sequences: int,
        drafted_s: float,
        step_gains: Floats,
        step_s: float,
    ) -> float:
        """Seconds that one more draft step of `step_s` saves against sending what there is; negative: loses.

        step_gains: float64 [G], expected accepted tokens of each proposal that the step makes, descending. To verify
        one takes a row of the target; a full batch pays for rows long before one sequence does, so as many
        proposals count as are worth their rows.
        """
        assert num_sequences > 0
        count, rate = self._best(values, num_base_rows, num_sequences, drafted_s)
        seconds = self.target.of_range(num_base_rows + count, len(step_gains) + 1)
        net = np.cumsum(step_gains - rate * np.diff(seconds))
        return float(net.max(initial=0.0)) / rate - step_s

    def _best(
        self, values: Floats, num_base_rows: int, num_sequences: int, drafted_s: float
    ) -> tuple[int, float]:
        """How many nodes to verify, and the tokens per second against which more time has to be weighed.

        These are the round's own, but at least those of plain decoding: in a round that also reads a long prompt
        tokens are few for its time, but all time spent on more of them is lost to the rounds after it.
        """
        seconds = self.target.of_range(num_base_rows, len(values) + 1) + drafted_s
        expected = np.full(len(values) + 1, float(num_sequences))
        expected[1:] += np.cumsum(values)
        rate = max(num_sequences / self.target_s(num_sequences), float((expected / seconds).max()))
        return int((expected - rate * seconds).argmax()), rate

    @staticmethod
    def _smooth(old: float, new: float) -> float:
        """Outliers count at most double."""
        return new if old == 0.0 else old + _SMOOTHING * (min(new, 2.0 * old) - old)


def _learned(profile: PassProfile, rows: int, seconds: float) -> PassProfile:
    """The profile after one more measurement.

    All row counts follow it: a busy machine spoils whole profiles, and what looks too expensive is never tried.
    Those next to it follow a little more, so that many rounds change the profile's shape.
    """
    excess = min(seconds / max(profile.at(rows), 1e-9), 2.0) - 1.0
    near = _SHAPE_SMOOTHING if abs(excess) < _SHAPE_RANGE else 0.0
    shares = zip(profile.seconds, profile.shares(rows), strict=True)
    return profile.with_seconds([s * (1.0 + (_SMOOTHING + near * share) * excess) for s, share in shares])
