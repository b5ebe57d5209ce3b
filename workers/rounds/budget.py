"""How many nodes to verify, and when to stop drafting: whatever gives the most tokens per second.

Expected tokens of a round are one per sequence (the target's own) plus the value of each verified node
(the estimated probability that its whole path is accepted). The costs are measured, not assumed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

_SMOOTHING = 0.1  # weight of the newest measurement
_SMOOTHING_ELSEWHERE = (
    0.05  # for other row counts: what slows one (contexts, a busy machine) slows the others
)


@dataclass(frozen=True)
class TargetProfile:
    """Seconds of one target pass for increasing numbers of rows."""

    num_rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, rows: int) -> float:
        """Linear between the measured counts, and beyond them with the last slope."""
        counts, times = self.num_rows, self.seconds
        if rows <= counts[0] or len(counts) == 1:
            return times[0]
        right = min(bisect_left(counts, rows), len(counts) - 1)
        left = right - 1
        slope = (times[right] - times[left]) / (counts[right] - counts[left])
        return times[left] + slope * (rows - counts[left])

    def shares(self, rows: int) -> list[float]:
        """How much each measured count has to do with `rows`, 0 to 1: the two around it by nearness, summing to 1.

        Beyond the last count none has.
        """
        counts = self.num_rows
        if rows <= counts[0]:
            return [1.0] + [0.0] * (len(counts) - 1)
        shares = [0.0] * len(counts)
        if rows <= counts[-1]:
            right = bisect_left(counts, rows)
            shares[right] = (rows - counts[right - 1]) / (counts[right] - counts[right - 1])
            shares[right - 1] = 1.0 - shares[right]
        return shares


class CostModel:
    """Seconds of a target pass and of a drafter step, from the start-up profile and what is measured since.

    Rows cost more in long contexts and in many sequences than in the profile's one chain: every row count learns
    from the rounds near it.
    """

    def __init__(self, profile: TargetProfile) -> None:
        self.profile = _monotone(profile.num_rows, profile.seconds)
        self.draft_step_s = 0.0  # one drafter step; 0 until seen
        self.draft_round_s = 0.0  # all drafting of one lane in one round

    def target_s(self, rows: int) -> float:
        """Predicted seconds from sending a round of `rows` rows to having its scores."""
        return self.profile.at(rows)

    def observe_target(self, rows: int, seconds: float) -> None:
        """A served round; outliers (a stalled machine) count at most double."""
        excess = min(seconds / max(self.profile.at(rows), 1e-9), 2.0) - 1.0
        near = _SMOOTHING - _SMOOTHING_ELSEWHERE
        weights = [_SMOOTHING_ELSEWHERE + near * share for share in self.profile.shares(rows)]
        times = [s * (1.0 + w * excess) for s, w in zip(self.profile.seconds, weights, strict=True)]
        self.profile = _monotone(self.profile.num_rows, times)

    def observe_draft_step(self, seconds: float) -> None:
        self.draft_step_s = self._smooth(self.draft_step_s, seconds)

    def doubt_draft_step(self) -> None:
        """A step was not worth it; let its cost fade, so that one bad measurement is tried again some day."""
        self.draft_step_s *= 0.995

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

    def best_num_nodes(
        self, values: SequenceABC[float], num_base_rows: int, num_sequences: int, drafted_s: float
    ) -> int:
        """How many of the nodes, most valuable first, give the most expected tokens per second.

        values: descending; num_base_rows: rows the round has anyway; drafted_s: spent on drafting, which
        counts because a round that costs more anyway may well verify more.
        """
        best_count, expected = 0, float(num_sequences)
        best_rate = expected / (self.target_s(num_base_rows) + drafted_s)
        for count, value in enumerate(values, start=1):
            expected += value
            rate = expected / (self.target_s(num_base_rows + count) + drafted_s)
            if rate > best_rate:
                best_count, best_rate = count, rate
        return best_count

    def another_step_pays(
        self,
        values: SequenceABC[float],
        num_base_rows: int,
        num_sequences: int,
        drafted_s: float,
        step_gains: SequenceABC[float],
        step_s: float,
    ) -> bool:
        """Whether one more drafter step of `step_s` beats sending what there is.

        step_gains: expected accepted tokens of each proposal that the step makes, descending. To verify one
        takes a row of the target; a full batch pays for rows long before one sequence does, so as many
        proposals count as are worth their rows.
        """
        count = self.best_num_nodes(values, num_base_rows, num_sequences, drafted_s)
        seconds = self.target_s(num_base_rows + count) + drafted_s
        rate = (num_sequences + sum(values[:count])) / seconds
        best_net = net = 0.0
        for row, gain in enumerate(step_gains, start=num_base_rows + count):
            net += gain - rate * (self.target_s(row + 1) - self.target_s(row))
            best_net = max(best_net, net)
        return best_net > rate * step_s

    @staticmethod
    def _smooth(old: float, new: float) -> float:
        """Outliers count at most double: one stalled step must not end drafting for thousands of rounds."""
        return new if old == 0.0 else old + _SMOOTHING * (min(new, 2.0 * old) - old)


def _monotone(num_rows: tuple[int, ...], seconds: SequenceABC[float]) -> TargetProfile:
    """A pass over more rows is never cheaper; a noisy measurement must not say so."""
    return TargetProfile(num_rows, tuple(max(seconds[: i + 1]) for i in range(len(seconds))))
