"""Where the runs of tokens of all running texts occurred before, in arrays: looked up for many tree nodes at once.

The idea is prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding), also transformers'
`prompt_lookup_num_tokens`. Here a hash table with linear probing leads from a run of `min_match` tokens to where
it ended last, and links lead from there to where it ended before, as in the match finders of Lempel-Ziv coders.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outrider.configs.schema import NgramConfig

_MAX_OCCURRENCES = 16  # the most recent ones are compared
_FEWEST_BUCKETS = 128
_PADDING = -1  # no token
_MULTIPLIER = -7046029254386353131  # 2**64 / golden ratio, odd: Fibonacci hashing, in wrapping int64
_HASH_SHIFT = 32  # the upper bits of a product depend on all bits of the token

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Continuations:
    """What followed the last tokens of M nodes before, at most C different continuations each, best first.

    Attributes:
        match_lengths: int64 [M, C], tokens that agree before the continuation; 0: there is none.
        tokens: int64 [M, C, L]; of each continuation as many as were asked for, then -1.
    """

    match_lengths: Ints
    tokens: Ints


class NgramTable:
    """The texts of all slots and their runs of tokens. A text of n tokens takes 16 to 32 n bytes.

    A slot has a block of one int32 array. Token number `end` of a text, counted from 1, lies `end` behind the
    block's beginning, and stands for the run that ends there; then come the links from each run to its previous
    occurrence (0: none), then the buckets, each with the last occurrence of one run (0: none).
    """

    def __init__(self, config: NgramConfig, num_slots: int) -> None:
        self._config = config
        self._memory = np.zeros(1, np.int32)  # a slot without a block has one bucket here, always empty
        self._free: dict[int, list[int]] = {}  # number of buckets -> blocks
        self._end_of_blocks = 1
        self._texts = np.zeros(num_slots, np.int64)
        self._links = np.zeros(num_slots, np.int64)
        self._buckets = np.zeros(num_slots, np.int64)
        self._masks = np.zeros(num_slots, np.int64)  # number of buckets - 1
        self._lengths = np.zeros(num_slots, np.int64)

    @property
    def num_bytes(self) -> int:
        """Memory of all blocks, those of finished slots included, which later ones take over."""
        return self._end_of_blocks * self._memory.itemsize

    def start(self, slot: int, tokens: Ints) -> None:
        """A text begins with `tokens`, int [n]; the slot is free."""
        assert self._masks[slot] == 0, f"slot {slot} was not finished"
        self._give_block(slot, len(tokens))
        self.extend(np.array([slot]), np.array([len(tokens)]), tokens)

    def finish(self, slot: int) -> None:
        """The text of a slot is done. A slot that was never started is ignored."""
        if self._masks[slot]:
            self._free.setdefault(int(self._masks[slot]) + 1, []).append(int(self._texts[slot]))
        for of_slots in (self._texts, self._links, self._buckets, self._masks, self._lengths):
            of_slots[slot] = 0

    def extend(self, slots: Ints, counts: Ints, tokens: Ints) -> None:
        """Append to texts: `counts` [B] tokens to each of the different `slots` [B], out of `tokens` [A] in turn."""
        lengths = self._lengths[slots] + counts
        for i in np.flatnonzero(2 * lengths > self._masks[slots] + 1):
            self._give_block(int(slots[i]), int(lengths[i]))
        owners = np.repeat(slots, counts)
        ends = np.repeat(lengths - np.cumsum(counts), counts) + np.arange(1, len(tokens) + 1)
        self._memory[self._texts[owners] + ends] = tokens
        self._lengths[slots] = lengths
        width = self._config.min_match
        if width > 1:  # fewer tokens are no run
            long_enough = ends >= width
            owners, ends = owners[long_enough], ends[long_enough]
        if len(ends):
            self._insert(owners, ends)

    def look_up(
        self, slots: Ints, tails: Ints, lengths: Ints, path_lengths: Ints, max_lengths: Ints
    ) -> Continuations:
        """Find what followed the last tokens of M nodes, longest match first, among equals the most recent first.

        Args:
            slots: [M], each node's text.
            tails: [M, T], the text's last tokens and behind them the draft tokens on the way to the node, itself
                included; T is at least max_match and at least every path length. What does not fill a row stands
                at its end.
            lengths: [M], tokens in each row.
            path_lengths: [M], draft tokens in each row: those that the table has not been given.
            max_lengths: [M], tokens that are wanted.
        """
        width, num_found = self._config.min_match, self._config.max_candidates
        longest = int(max_lengths.max(initial=0))
        found = Continuations(
            np.zeros((len(slots), num_found), np.int64),
            np.full((len(slots), num_found, longest), _PADDING, np.int64),
        )
        # Key column i is the token i before the last one.
        _, last = self._find(slots, tails[:, : -width - 1 : -1])
        totals = self._lengths[slots] + path_lengths
        before = np.where(last < totals, last, self._memory[self._links[slots] + last])  # not the tail itself
        nodes = np.flatnonzero((before > 0) & (lengths >= width) & (max_lengths > 0))
        if len(nodes):
            ends = self._occurrences(slots[nodes], last[nodes], totals[nodes])
            matches = self._match_lengths(slots[nodes], tails[nodes], lengths[nodes], ends)
            self._choose(found, nodes, slots, tails, path_lengths, max_lengths, ends, matches)
        return found

    def _occurrences(self, slots: Ints, last: Ints, totals: Ints) -> Ints:
        """Ends [M, up to _MAX_OCCURRENCES] of the same run, latest first; 0 where there is none."""
        links, ends = self._links[slots], [last]
        while len(ends) < _MAX_OCCURRENCES and ends[-1].any():
            ends.append(self._memory[links + ends[-1]])
        table = np.stack(ends, axis=1).astype(np.int64)
        table[table >= totals[:, None]] = 0
        return table

    def _match_lengths(self, slots: Ints, tails: Ints, lengths: Ints, ends: Ints) -> Ints:
        """How many tokens before each of `ends` [M, E] are the tail's; 0 where there is no end."""
        min_match, max_match = self._config.min_match, self._config.max_match
        matches = np.where(ends > 0, min_match, 0)
        flat = np.flatnonzero(matches)  # those that still agree, shrinking
        rows = flat // ends.shape[1]
        at = self._texts[slots][rows] + ends.ravel()[flat]
        limits = np.minimum(ends, np.minimum(lengths, max_match)[:, None]).ravel()[flat]
        for back in range(min_match, max_match):
            # What is read beyond the limit is another text's, or the memory's end: it does not count.
            same = (self._memory[at - back] == tails[rows, -1 - back]) & (back < limits)
            still = np.flatnonzero(same)
            flat, rows, at, limits = flat[still], rows[still], at[still], limits[still]
            if not len(flat):
                break
            matches.ravel()[flat] += 1
        return matches

    def _choose(
        self,
        found: Continuations,
        nodes: Ints,
        slots: Ints,
        tails: Ints,
        path_lengths: Ints,
        max_lengths: Ints,
        ends: Ints,
        matches: Ints,
    ) -> None:
        """Fill in the best different continuations of `nodes`, out of `ends` and `matches` [len(nodes), E]."""
        num_rows, num_ends = matches.shape
        at = matches.ravel().nonzero()[0]
        owners = nodes[at // num_ends]
        follow = np.empty((num_rows, num_ends, found.tokens.shape[2]), np.int64)
        follow.reshape(matches.size, -1)[at] = self._follow(
            slots[owners],
            ends.ravel()[at],
            tails[owners],
            path_lengths[owners],
            max_lengths[owners],
            found.tokens.shape[2],
        )
        rows = np.arange(num_rows)
        for rank in range(found.match_lengths.shape[1]):
            best = matches.argmax(axis=1)  # the first of the longest, and the latest come first
            longest = matches[rows, best]
            some = longest.nonzero()[0]
            if not len(some):
                break
            chosen = follow[rows, best]
            found.match_lengths[nodes[some], rank] = longest[some]
            found.tokens[nodes[some], rank] = chosen[some]
            matches[(follow == chosen[:, None]).all(axis=2)] = 0  # the same once more is no second candidate
            matches[rows, best] = 0

    def _follow(
        self, slots: Ints, ends: Ints, tails: Ints, path_lengths: Ints, max_lengths: Ints, longest: int
    ) -> Ints:
        """The tokens [M, longest] behind `ends`: the text's, then the path's, and then round again.

        A match that reaches the end repeats itself, so its continuation goes round with the period.
        """
        known = np.minimum(max_lengths, self._lengths[slots] - ends)
        reach = known + path_lengths
        at = np.broadcast_to(np.arange(longest), (len(ends), longest))
        if (reach < longest).any():
            at = at % np.maximum(reach, 1)[:, None]
        begins = self._texts[slots] + ends + 1
        follow = self._memory[np.where(at < known[:, None], begins[:, None] + at, 0)].astype(np.int64)
        rows, columns = np.nonzero(at >= known[:, None])
        in_path = at[rows, columns] - known[rows]
        in_tail = np.minimum(tails.shape[1] - path_lengths[rows] + in_path, tails.shape[1] - 1)
        follow[rows, columns] = tails[rows, in_tail]
        follow[np.arange(longest) >= max_lengths[:, None]] = _PADDING
        return follow

    def _insert(self, owners: Ints, ends: Ints) -> None:
        """Link the runs that end at `ends` [P] of the slots `owners` [P], ascending in each, to those before."""
        buckets, before = self._claim(owners, ends)
        order = np.argsort(buckets, kind="stable")
        buckets, before, owners, ends = buckets[order], before[order], owners[order], ends[order]
        same_as_last = buckets[1:] == buckets[:-1]
        before[1:][same_as_last] = ends[:-1][same_as_last]
        self._memory[self._links[owners] + ends] = before
        latest = np.append(~same_as_last, True)
        self._memory[buckets[latest]] = ends[latest]

    def _claim(self, owners: Ints, ends: Ints) -> tuple[Ints, Ints]:
        """The bucket [P] of each run, taken if it had none, and the end [P] that stood there (0: none)."""
        offsets = np.arange(self._config.min_match)
        keys = self._memory[(self._texts[owners] + ends)[:, None] - offsets]
        buckets, before = self._find(owners, keys)
        pending = np.flatnonzero(before == 0)
        while len(pending):
            self._memory[buckets[pending]] = ends[pending]
            # Another run may have taken the same empty bucket just now; equal ones go the same way together.
            taken = self._memory[buckets[pending]].astype(np.int64)
            pending = pending[self._differ(self._texts[owners[pending]], taken, keys[pending])]
            if len(pending):
                buckets[pending], before[pending] = self._find(owners[pending], keys[pending])
        return buckets, before

    def _find(self, slots: Ints, keys: Ints) -> tuple[Ints, Ints]:
        """Where in memory [P] the bucket of each run `keys` [P, min_match] is, or would be, and its end [P]."""
        hashes = keys[:, 0] * np.int64(_MULTIPLIER)
        for column in range(1, keys.shape[1]):
            hashes = (hashes ^ (hashes >> _HASH_SHIFT) ^ keys[:, column]) * np.int64(_MULTIPLIER)
        masks, texts, begins = self._masks[slots], self._texts[slots], self._buckets[slots]
        offsets = (hashes >> _HASH_SHIFT) & masks
        ends = self._memory[begins + offsets].astype(np.int64)
        pending = np.flatnonzero((ends > 0) & self._differ(texts, ends, keys))
        while len(pending):
            offsets[pending] = (offsets[pending] + 1) & masks[pending]
            ends[pending] = self._memory[begins[pending] + offsets[pending]]
            pending = pending[
                (ends[pending] > 0) & self._differ(texts[pending], ends[pending], keys[pending])
            ]
        return begins + offsets, ends

    def _differ(self, texts: Ints, ends: Ints, keys: Ints) -> NDArray[np.bool_]:
        """Whether the runs that end at `ends` [P] are others than `keys` [P, min_match]."""
        at = texts + ends
        differ = self._memory[at] != keys[:, 0]
        for back in range(1, keys.shape[1]):
            differ |= self._memory[np.maximum(at - back, 0)] != keys[:, back]
        return differ

    def _give_block(self, slot: int, num_tokens: int) -> None:
        """A block for twice as many buckets as tokens, with what the slot's block holds so far."""
        num_buckets = _FEWEST_BUCKETS
        while num_buckets < 2 * num_tokens:
            num_buckets *= 2
        column = num_buckets // 2 + 1
        block = self._block(num_buckets, 2 * column + num_buckets)
        length, memory = int(self._lengths[slot]), self._memory
        text, links, begin = (int(a[slot]) for a in (self._texts, self._links, self._buckets))
        for old, new in ((text, block), (links, block + column)):
            memory[new] = 0
            memory[new + 1 : new + 1 + length] = memory[old + 1 : old + 1 + length]
        memory[block + 2 * column : block + 2 * column + num_buckets] = 0
        latest = memory[begin : begin + int(self._masks[slot]) + 1]
        ends = latest[latest > 0].astype(np.int64)
        self.finish(slot)
        self._texts[slot], self._links[slot], self._buckets[slot] = block, block + column, block + 2 * column
        self._masks[slot], self._lengths[slot] = num_buckets - 1, length
        self._claim(np.full(len(ends), slot), ends)

    def _block(self, num_buckets: int, size: int) -> int:
        """Where a block begins that a finished slot left, or one at the end of the memory."""
        if self._free.get(num_buckets):
            return self._free[num_buckets].pop()
        block = self._end_of_blocks
        self._end_of_blocks += size
        if self._end_of_blocks > len(self._memory):
            memory = np.zeros(max(2 * len(self._memory), self._end_of_blocks), np.int32)
            memory[:block] = self._memory[:block]
            self._memory = memory
        return block
