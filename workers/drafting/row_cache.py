"""KV rows of growing trees in a drafter's own paged cache: committed ones, then one for each expanded node."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from outrider.workers.drafting.frontier import Frontier
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.model.batch import TreeRows, num_mask_words
from outrider.workers.sequences.page_tables import PageTables
from outrider.workers.sequences.pages import PagePool, Prefix, num_unseen_pages
from outrider.workers.sequences.segments import starts_of
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import Bools, Ints, Survivors

_WORD_BITS = 64
_TOKEN_BITS = 32
UInt64s = npt.NDArray[np.uint64]


class Expansion(NamedTuple):
    """Nodes whose rows one forward computes, those of a slot together, parents first.

    Attributes:
        slots: int64 [B] the sequences.
        num_nodes: int64 [B] expanded nodes of each.
        num_catching_up: int64 [B] known tokens before the root that each has to read on the way.
        nodes, node_slots: int64 [M].
        places: int64 [M], of each node in flat arrays over slots and nodes.
        node_rows: int64 [M], of each node its row within the forward.
        rows: the forward.
    """

    slots: Ints
    num_nodes: Ints
    num_catching_up: Ints
    nodes: Ints
    node_slots: Ints
    places: Ints
    node_rows: Ints
    rows: TreeRows


class RowCache:
    """Which rows of a paged cache belong to which sequence and node. Tree row 0 is the root's.

    A model of tokens has a row for each. One whose rows stand for a token and what came before it has none for the
    first: `num_rowless` is 1, and row i is that of token i + 1, which tells of all tokens up to there.

    Attributes:
        tables: pages by slot.
        context_lens: int64 [S], committed rows.
        has_row: bool [S, N], whether a node was expanded.
        flat_has_row: the same over slots and nodes, as `GrowingTrees.flat`.
    """

    def __init__(self, slots: DraftedSlots, pool: PagePool, num_rowless: int = 0, window: int = 0) -> None:
        """window: the model's widest, see `ModelConfig`: pages that it has left behind are given back."""
        self._slots = slots
        self._num_rowless = num_rowless
        self._window = window
        self._trees = slots.trees
        self.pool = pool
        shape = self._trees.tokens.shape
        self.tables = PageTables(len(slots), pool.page_size)
        self.context_lens = np.zeros(len(slots), dtype=np.int64)
        self.has_row = np.zeros(shape, dtype=np.bool_)
        self.flat_has_row = self.has_row.reshape(-1)
        self._row_of = np.zeros(shape, dtype=np.int64)
        self._flat_row_of = self._row_of.reshape(-1)
        self._num_rows = np.zeros(len(slots), dtype=np.int64)  # tree rows
        num_words = -(-shape[1] // _WORD_BITS)
        self._own_bits = _bits(np.arange(shape[1]), num_words)  # of every tree row
        # Of a node its ancestors, by tree row, itself included; nothing where it has no row.
        self._masks: UInt64s = np.zeros((*shape, num_words), dtype=np.uint64)
        self._flat_masks = self._masks.reshape(-1, num_words)
        self._pages: list[list[int]] = [[] for _ in range(len(slots))]
        self._remembered = [Prefix()] * len(slots)
        self._num_freed = [0] * len(slots)

    def start(self, sequence: Sequence) -> None:
        """Take the shared pages that hold the beginning of the text."""
        slot = sequence.slot
        texts = self._texts(sequence)
        pages, remembered = self.pool.share_prefix(texts, len(texts) - 1)
        self._pages[slot], self._remembered[slot] = pages, remembered
        self.tables.clear(slot)
        self.tables.append(slot, pages)
        self.context_lens[slot] = len(pages) * self.pool.page_size
        self.has_row[slot] = False
        self._masks[slot] = 0
        self._num_rows[slot] = 0

    def num_shared(self, sequence: Sequence) -> int:
        """The rows that `start` would take from shared pages."""
        texts = self._texts(sequence)
        return len(self.pool.find_prefix(texts, len(texts) - 1)[0]) * self.pool.page_size

    def finish(self, slot: int) -> None:
        """Give the pages back."""
        self.pool.release(self._pages[slot][self._num_freed[slot] :])
        self._pages[slot], self._num_freed[slot] = [], 0
        self.tables.clear(slot)

    def num_unread(self, slots: Ints) -> Ints:
        """[B]: known tokens before the root that have no row; none once the root has been expanded."""
        return self._slots.num_tokens[slots] - self.context_lens[slots] - (1 + self._num_rowless)

    def next_tokens(self, slot: int, count: int) -> list[int]:
        """The tokens of the next rows behind the committed ones."""
        begin = int(self.context_lens[slot]) + self._num_rowless
        return self._slots.sequence(slot).tokens[begin : begin + count]

    def lags(self, slots: Ints) -> Ints:
        """[B]: known tokens without a row, the root included; 0 once the root has been expanded."""
        return self.num_unread(slots) + ~self.has_row[slots, 0]

    def take_pages(self, slot: int, num_tree_rows: int) -> bool:
        """Hold pages for this many rows behind the committed ones; False when there are none."""
        num_rows = int(self.context_lens[slot]) + num_tree_rows
        missing = self.pool.pages_for(num_rows) - len(self._pages[slot])
        if missing > self.pool.num_available:
            return False
        if missing > 0:
            pages = self.pool.allocate(missing)
            self._pages[slot] += pages
            self.tables.append(slot, pages)
        return True

    def lacks_pages(self, slots: Ints, num_nodes: Ints) -> Bools:
        """Which slots ([B]) do not hold the pages yet for the tokens that they lack and these further nodes."""
        num_rows = self._slots.num_tokens[slots] + self._num_rows[slots] + num_nodes
        return num_rows - (1 + self._num_rowless) > self.tables.num_pages[slots] * self.pool.page_size

    def take_rows(self, slot: int, num_nodes: int) -> bool:
        """Hold pages for these further nodes, and what has to be read before them."""
        num_unread = int(self.num_unread(np.array([slot]))[0])
        return self.take_pages(slot, int(self._num_rows[slot]) + num_unread + num_nodes)

    def plan(self, frontier: Frontier) -> Expansion:
        """Rows for these nodes; see `Expansion`."""
        slots, num_nodes, extra = frontier.slots, frontier.counts, frontier.num_unread
        nodes, places = frontier.nodes, frontier.places
        contexts, num_before = self.context_lens[slots], self._num_rows[slots]
        node_rows = np.arange(len(nodes))
        tree_rows = node_rows + (num_before - starts_of(num_nodes)).repeat(num_nodes)
        self._flat_row_of[places] = tree_rows
        tree_lens, query_lens = num_before + num_nodes, num_nodes
        masks = self._new_masks(nodes, places, tree_rows)
        tokens, depths = self._trees.flat.tokens[places], self._trees.flat.depths[places]
        if np.count_nonzero(extra):
            tree_lens, query_lens = extra + tree_lens, extra + num_nodes
            num_words = num_mask_words(tree_lens)
            node_extra = extra.repeat(num_nodes)
            node_rows = node_rows + extra.cumsum().repeat(num_nodes)
            tokens, tree_rows, depths, masks = self._behind_known_tokens(
                slots,
                extra,
                query_lens,
                node_rows,
                (tokens, tree_rows + node_extra, depths + node_extra),
                _behind_chains(masks[:, :num_words], node_extra, num_words),
            )
        rows = TreeRows(
            slots=slots,
            context_lens=contexts,
            tree_lens=tree_lens,
            query_lens=query_lens,
            tokens=tokens,
            tree_rows=tree_rows,
            depths=depths,
            ancestors=np.ascontiguousarray(masks[:, : num_mask_words(tree_lens)]),
        )
        return Expansion(slots, num_nodes, extra, nodes, frontier.node_slots, places, node_rows, rows)

    def num_free_rows(self, slots: Ints) -> Ints:
        """[B]: tree rows that these slots' masks can still tell of."""
        return self._trees.capacity - self._num_rows[slots]

    def grown(
        self, slots: Ints, num_each: int, nodes: Ints, places: Ints, owners: Ints, columns: Ints
    ) -> None:
        """Further rows were computed, `num_each` behind those of each of these slots; nodes ([M], parents have rows)
        have those of the slots `owners` at `columns`, the others stand for none."""
        begins = np.zeros(len(self._num_rows), dtype=np.int64)
        begins[slots] = self._num_rows[slots]
        tree_rows = begins[owners] + columns
        self._flat_row_of[places] = tree_rows
        self._new_masks(nodes, places, tree_rows)
        self.flat_has_row[places] = True
        self._num_rows[slots] += num_each

    def _texts(self, sequence: Sequence) -> SequenceABC[int]:
        """Numbers of which the first n tell all that rows 0 to n - 1 depend on, in order."""
        tokens = sequence.tokens
        if not self._num_rowless:
            return tokens
        return [tokens[0] << _TOKEN_BITS | tokens[1], *tokens[2:]] if len(tokens) > 1 else []

    def _behind_known_tokens(
        self,
        slots: Ints,
        extra: Ints,
        query_lens: Ints,
        node_rows: Ints,
        of_nodes: tuple[Ints, Ints, Ints],
        node_masks: UInt64s,
    ) -> tuple[Ints, Ints, Ints, UInt64s]:
        """Tokens, tree rows, depths and masks of all rows: of nodes, and before them of known tokens."""
        num_rows = sum(query_lens.tolist())
        tokens, tree_rows, depths = (np.zeros(num_rows, dtype=np.int64) for _ in range(3))
        tokens[node_rows], tree_rows[node_rows], depths[node_rows] = of_nodes
        masks: UInt64s = np.zeros((num_rows, node_masks.shape[1]), dtype=np.uint64)
        masks[node_rows] = node_masks
        begins = starts_of(query_lens)
        chain = chain_masks(max(extra.tolist()), masks.shape[1])
        # Mostly one token each: the target's own of the last round.
        for slot, begin, count in zip(slots.tolist(), begins.tolist(), extra.tolist(), strict=True):
            if count:
                tokens[begin : begin + count] = self._slots.sequence(slot).tokens[-1 - count : -1]
                tree_rows[begin : begin + count] = depths[begin : begin + count] = np.arange(count)
                masks[begin : begin + count] = chain[:count]
        return tokens, tree_rows, depths, masks

    def computed(self, expansion: Expansion) -> None:
        """The forward was run: its nodes have rows, what came before the roots is committed."""
        self.flat_has_row[expansion.places] = True
        self._num_rows[expansion.slots] += expansion.num_nodes
        if np.count_nonzero(expansion.num_catching_up):
            self.commit(expansion.slots, expansion.num_catching_up)

    def commit(self, slots: Ints, counts: Ints) -> None:
        """The next rows of these sequences hold known tokens; later sequences may share full pages of them."""
        before = self.context_lens[slots]
        after = before + counts
        self.context_lens[slots] = after
        page_size = self.pool.page_size
        for slot in slots[after // page_size > before // page_size].tolist():
            self._remembered[slot] = self.pool.remember_prefix(
                self._pages[slot],
                self._texts(self._slots.sequence(slot)),
                int(self.context_lens[slot]),
                self._remembered[slot],
            )
            self._free_unseen_pages(slot)

    def drop_trees(self, slots: Ints) -> None:
        """Of these trees the roots' rows hold known tokens, where they were expanded; no other row is kept."""
        self.commit(slots, self.has_row[slots, 0].astype(np.int64))
        self.has_row[slots] = False
        self._masks[slots] = 0
        self._num_rows[slots] = 0

    def reroot(self, survivors: Survivors) -> tuple[Ints, Ints]:
        """Keep the rows of the paths that came out, and of the survivors below them, contiguous again.

        Returns source and target cache slots (int64 [M] each) of the rows that have to move.
        """
        slots, paths = survivors.slots, survivors.paths
        width = paths.shape[1]
        starts = np.arange(0, paths.size, width)
        has_row = self.has_row[slots, :width]
        came_out = has_row & paths
        # A node has a row only if its parent has one, so without the new root's nothing below it is kept.
        goes_on = survivors.has_old_root & has_row.reshape(-1)[starts + survivors.old_nodes[:, 0]]
        kept, old_nodes, keeps = came_out, starts[:, None] + survivors.old_nodes, None
        if np.count_nonzero(goes_on):
            keeps = has_row.reshape(-1)[old_nodes] & survivors.exists & goes_on[:, None]
            kept = came_out.copy()
            kept.reshape(-1)[old_nodes[keeps]] = True
        # Ancestors are older than what hangs below them: by node, the path comes first.
        old_rows, new_rows = self._row_of[slots, :width], kept.cumsum(axis=1) - 1
        owners, nodes = (kept & (old_rows != new_rows)).nonzero()
        sources = targets = owners
        if len(nodes):
            owner_slots = slots[owners]
            contexts = self.context_lens[owner_slots]
            sources = self.tables.kv_rows(owner_slots, contexts + old_rows[owners, nodes])
            targets = self.tables.kv_rows(owner_slots, contexts + new_rows[owners, nodes])
        num_committed = np.add.reduce(came_out, axis=1, dtype=np.int64)
        self.commit(slots, num_committed)
        self.has_row[slots, :width] = False
        self._masks[slots, :width] = 0
        self._num_rows[slots] = 0
        if keeps is not None:
            self._keep(slots, keeps, new_rows.reshape(-1)[old_nodes] - num_committed[:, None])
        return sources, targets

    def _free_unseen_pages(self, slot: int) -> None:
        freed = self._num_freed[slot]
        unseen = num_unseen_pages(int(self.context_lens[slot]), self._window, self.pool.page_size)
        if unseen > freed:
            self.pool.release(self._pages[slot][freed:unseen])
            self._num_freed[slot] = unseen

    def _keep(self, slots: Ints, has_row: Bools, rows: Ints) -> None:
        """Survivors ([B, M]) have these tree rows where they have any."""
        width = has_row.shape[1]
        rows = rows * has_row
        self.has_row[slots, :width] = has_row
        self._row_of[slots, :width] = rows
        self._num_rows[slots] = np.add.reduce(has_row, axis=1, dtype=np.int64)
        masks = self._own_bits[rows]
        masks[~has_row] = 0
        parents = self._trees.parents[slots, :width]
        row = np.arange(len(slots))[:, None]
        for _ in range(int(self._trees.depths[slots, :width].max(initial=0)).bit_length()):
            masks |= masks[row, parents]
            parents = parents[row, parents]
        masks[~has_row] = 0
        self._masks[slots, :width] = masks

    def _new_masks(self, nodes: Ints, places: Ints, tree_rows: Ints) -> UInt64s:
        """[M, W]: the ancestors, by tree row, of nodes that get rows, parents first."""
        known = self._flat_masks
        parent_places = places - nodes + self._trees.flat.parents[places]
        masks: UInt64s = self._own_bits[tree_rows]
        masks |= known[parent_places]
        known[places] = masks
        if np.count_nonzero(self.flat_has_row[parent_places]) < len(nodes):
            # Parents that are among these nodes: what they see comes down to their children step by step.
            while True:
                seen = masks | known[parent_places]
                if np.array_equal(seen, masks):
                    break
                masks = known[places] = seen
        return masks


def chain_masks(length: int, num_words: int) -> UInt64s:
    """[length, num_words]: row i of a chain sees rows 0 to i."""
    rows = np.arange(length)[:, None]
    words = np.arange(num_words) * _WORD_BITS
    num_bits = np.clip(rows + 1 - words, 0, _WORD_BITS).astype(np.uint64)
    full = num_bits == _WORD_BITS
    masks = (np.uint64(1) << np.where(full, np.uint64(0), num_bits)) - np.uint64(1)
    masks[full] = np.uint64(0xFFFFFFFFFFFFFFFF)
    return masks


def _bits(rows: Ints, num_words: int) -> UInt64s:
    """[M, W]: the bit of each row."""
    bits: UInt64s = np.zeros((len(rows), num_words), dtype=np.uint64)
    bits[np.arange(len(rows)), rows // _WORD_BITS] = np.uint64(1) << (rows % _WORD_BITS).astype(np.uint64)
    return bits


def _behind_chains(masks: UInt64s, lengths: Ints, num_words: int) -> UInt64s:
    """[M, num_words]: the masks of trees behind chains of fewer than 64 rows, all of which they see."""
    wide = np.zeros((len(masks), num_words + 1), dtype=np.uint64)  # a word before the first
    wide[:, 1 : 1 + masks.shape[1]] = masks
    shift = lengths.astype(np.uint64)[:, None]
    # What leaves the word before; in two steps, because no shift moves all 64 bits.
    out: UInt64s = wide[:, :-1] >> np.uint64(1) >> (np.uint64(_WORD_BITS - 1) - shift)
    out |= wide[:, 1:] << shift
    out[:, :1] |= (np.uint64(1) << shift) - np.uint64(1)
    return out


def chains(slots: Ints, contexts: Ints, lengths: Ints, tokens: Ints) -> TreeRows:
    """Rows of known tokens ([sum of lengths]) behind the committed ones."""
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows = np.arange(len(tokens)) - first
    num_words = max(1, -(-int(lengths.max()) // 64))
    ancestors = np.concatenate([chain_masks(int(length), num_words) for length in lengths])
    return TreeRows(slots, contexts, lengths, lengths, tokens, rows, rows, ancestors)
