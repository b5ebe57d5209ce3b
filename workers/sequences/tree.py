"""Token trees: those that keep growing in the drafter, and the cut of them that one round verifies.

The trees of all running sequences are one structure of arrays, a row per slot: methods propose, and rounds are
cut, verified and re-rooted, for all sequences at once. Nothing here is done node by node in Python.
"""

from __future__ import annotations

import numpy as np

from outrider.workers.sequences.cuts import Bools, DraftTrees, Floats, Ints, Offers, Survivors


class GrowingTrees:
    """Best-first trees over continuations of sequences, one per slot; node 0 is the sequence's last token.

    Growing them never looks at the target. A verdict re-roots a tree: what hangs below the tokens that came out
    survives (SwiftSpec, arXiv 2506.11309). A full tree takes no further proposals until then.

    Attributes:
        tokens, parents, depths: int64 [S, N]; a parent is older than its children.
        acceptances: float64 [S, N], estimated probability that the target samples the token after its parent.
        values: float64 [S, N], the product along the path: probability that the whole path is accepted; 0 in the
            padding.
        sources: int64 [S, N], key of the acceptance estimate, so that the outcome can teach it.
        child_mass: float64 [S, N], sum of the acceptances of a node's children; 0 exactly where it has none.
        num_nodes: int64 [S]; what lies behind is padding.
        root_positions: int64 [S], index in the sequence of the root's token.
        version: another number after every change.
    """

    def __init__(self, num_slots: int, capacity: int) -> None:
        """`capacity`: most nodes of a tree, the root included."""
        shape = (num_slots, capacity)
        self.capacity = capacity
        self.tokens, self.parents, self.depths, self.sources = (np.zeros(shape, np.int64) for _ in range(4))
        self.acceptances, self.values, self.child_mass = (np.zeros(shape) for _ in range(3))
        self.num_nodes = np.zeros(num_slots, dtype=np.int64)
        self.root_positions = np.zeros(num_slots, dtype=np.int64)
        self.version = 0

    def start(self, slot: int, token: int, position: int) -> None:
        """A tree of its root alone."""
        self._set_roots(np.array([slot]), np.array([token]), np.array([position]))

    def width(self, slots: Ints) -> int:
        """Nodes of the largest of these trees: the columns worth looking at."""
        return int(np.maximum.reduce(self.num_nodes[slots])) if len(slots) else 0

    def exists(self, slots: Ints, width: int) -> Bools:
        """[B, width]: where there is a node."""
        return np.arange(width) < self.num_nodes[slots][:, None]

    def room(self, slots: Ints) -> Ints:
        """[B]: nodes that still fit."""
        return self.capacity - self.num_nodes[slots]

    def find_children(self, slots: Ints, parents: Ints, tokens: Ints) -> tuple[Ints, Bools]:
        """The children of `parents` that hold `tokens`, and whether there are any; [M] each."""
        width = self.width(slots)
        match = self.tokens[slots, :width] == tokens[:, None]
        match &= self.parents[slots, :width] == parents[:, None]
        match &= self.exists(slots, width)
        match[:, 0] = False  # a root is its own parent, not its own child
        children = match.argmax(axis=1)
        return children, match[np.arange(len(slots)), children]

    def add_children(
        self, slots: Ints, parents: Ints, tokens: Ints, acceptances: Floats, sources: Ints
    ) -> Floats:
        """Add continuations ([M] each), or raise the estimates of those that are there: methods' trees merge here.

        Proposals of a slot stand together, and no two of them are the same token below the same parent.

        Returns:
            float64 [M]: the value that each has in its tree; 0 where the tree was full.
        """
        known = self.child_mass[slots, parents] > 0.0
        if not np.count_nonzero(known):
            return self._add_new(slots, parents, tokens, acceptances, sources)
        candidates = np.flatnonzero(known)
        nodes, found = self.find_children(slots[candidates], parents[candidates], tokens[candidates])
        known[candidates] = found
        nodes = nodes[found]
        self._raise(slots[known], nodes, acceptances[known], sources[known])
        new, values = ~known, np.zeros(len(slots))
        if new.any():
            values[new] = self._add_new(slots[new], parents[new], tokens[new], acceptances[new], sources[new])
        values[known] = self.values[slots[known], nodes]
        return values

    def _add_new(
        self, slots: Ints, parents: Ints, tokens: Ints, acceptances: Floats, sources: Ints
    ) -> Floats:
        above = slots * self.capacity + parents
        values = self.values.reshape(-1)[above] * acceptances
        depths = self.depths.reshape(-1)[above] + 1
        values *= self._append(slots, parents, tokens, depths, acceptances, values, sources)
        return values

    def add_chains(
        self,
        slots: Ints,
        below: Ints,
        tokens: Ints,
        lengths: Ints,
        acceptances: Floats,
        sources: Ints,
    ) -> None:
        """Add a chain of continuations below each node, merging with what is there.

        Args:
            slots, below, lengths: int64 [C]; the chains of a slot stand together, each below another node.
            tokens, sources: int64 [C, L].
            acceptances: float64 [C, L].
        """
        nodes, at = below.copy(), np.zeros(len(slots), dtype=np.int64)
        following = (lengths > 0) & (self.child_mass[slots, nodes] > 0.0)
        while following.any():
            c = np.flatnonzero(following)
            children, found = self.find_children(slots[c], nodes[c], tokens[c, at[c]])
            following[c[~found]] = False
            c, children = c[found], children[found]
            self._raise(slots[c], children, acceptances[c, at[c]], sources[c, at[c]])
            nodes[c], at[c] = children, at[c] + 1
            following[c] = (at[c] < lengths[c]) & (self.child_mass[slots[c], children] > 0.0)
        unfinished = np.flatnonzero(at < lengths)
        if not len(unfinished):
            return
        # Of several chains that arrived at one node the first goes on; the others find its links there afterwards.
        _, first = np.unique(slots[unfinished] * self.capacity + nodes[unfinished], return_index=True)
        goes_on = np.zeros(len(slots), dtype=np.bool_)
        goes_on[unfinished[first]] = True
        columns = np.arange(tokens.shape[1])
        rest = (columns >= at[:, None]) & (columns < lengths[:, None]) & goes_on[:, None]
        steps = np.where(rest, acceptances, 1.0)
        values = self.values[slots, nodes][:, None] * np.cumprod(steps, axis=1)
        depths = self.depths[slots, nodes][:, None] + columns - at[:, None] + 1
        chain, column = np.nonzero(rest)
        flat_slots = slots[chain]
        # Every link hangs on the one before it, the first on the node that was reached.
        own = self.num_nodes[flat_slots] + _rank_in_group(flat_slots)
        parents = np.where(column == at[chain], nodes[chain], own - 1)
        self._append(
            flat_slots,
            parents,
            tokens[rest],
            depths[rest],
            acceptances[rest],
            values[rest],
            sources[rest],
        )
        again = unfinished[~goes_on[unfinished]]
        if len(again):
            self.add_chains(
                slots[again], below[again], tokens[again], lengths[again], acceptances[again], sources[again]
            )

    def tails(self, slots: Ints, nodes: Ints, recent: Ints) -> Ints:
        """[M, T]: the last T tokens before and including each node.

        recent: int64 [M, T], the last T tokens of each node's sequence, its root included.
        """
        num_last = recent.shape[1]
        depths = self.depths[slots, nodes]
        path = np.zeros((len(slots), num_last), dtype=np.int64)  # from the node upwards
        current = nodes
        for above in range(min(num_last, int(depths.max(initial=0)))):
            path[:, above] = self.tokens[slots, current]
            current = self.parents[slots, current]
        columns = np.arange(num_last)
        upwards = num_last - 1 - columns  # of each column of the result, how far above the node
        on_path = upwards < depths[:, None]
        shifted = np.minimum(columns + depths[:, None], num_last - 1)
        return np.where(on_path, path[:, upwards], np.take_along_axis(recent, shifted, axis=1))

    def offers(self, slots: Ints, depth_limits: Ints, node_limits: Ints) -> Offers:
        """The most valuable nodes below the roots: at most `node_limits[b]`, none deeper than `depth_limits[b]`."""
        width = self.width(slots)
        values = self._offered_values(slots, depth_limits, width)
        most = min(width, int(node_limits.max(initial=0)))
        # A child is never worth more than its parent and is younger, so the order is topological.
        order = (-values).argsort(axis=1, kind="stable")[:, :most]
        ordered = values.reshape(-1)[order + (np.arange(len(slots)) * width)[:, None]]
        ordered[np.arange(most) >= node_limits[:, None]] = 0.0
        return Offers(order, ordered)

    def count_offers(self, slots: Ints, depth_limits: Ints) -> Ints:
        """[B]: the nodes that `offers` has to give where there is no limit on their number."""
        values = self._offered_values(slots, depth_limits, self.width(slots))
        return np.add.reduce(values > 0.0, axis=1, dtype=np.int64)

    def _offered_values(self, slots: Ints, depth_limits: Ints, width: int) -> Floats:
        """[B, width]; 0 of nodes that are too deep, and of roots."""
        values = self.values[slots, :width]
        values *= self.depths[slots, :width] <= depth_limits[:, None]
        values[:, :1] = 0.0
        return values

    def cut(self, slots: Ints, offers: Offers, counts: Ints) -> DraftTrees:
        """The trees of the roots and the first `counts[b]` offered nodes, best path first.

        The likeliest path stands right behind the root: when it is accepted its KV rows are in place already and
        the commit moves nothing.
        """
        width = int(counts.max(initial=0)) + 1
        nodes = np.zeros((len(slots), width), dtype=np.int64)
        nodes[:, 1:] = offers.nodes[:, : width - 1]
        exists = np.arange(width) <= counts[:, None]
        nodes *= exists
        if width > 2:
            nodes = self._best_path_first(slots, nodes, exists)
        firsts = (np.arange(len(slots)) * self.width(slots))[:, None]
        place = np.zeros(len(slots) * self.width(slots), dtype=np.int64)  # of a growing node in the cut
        place[(firsts + nodes)[exists]] = exists.nonzero()[1]
        here = (slots * self.capacity)[:, None] + nodes
        parents = place[firsts + self.parents.reshape(-1)[here]]
        return DraftTrees(counts + 1, self.tokens.reshape(-1)[here], parents, nodes)

    def reroot(self, slots: Ints, lasts: Ints, next_tokens: Ints, num_emitted: Ints) -> Survivors:
        """Follow the tokens that came out; keep what hangs below the last of them.

        Args:
            slots: int64 [B], distinct.
            lasts: int64 [B], the last node of each path that came out.
            next_tokens: int64 [B], the token that came out after it.
            num_emitted: int64 [B], tokens that came out in all.
        """
        width = self.width(slots)
        row = np.arange(len(slots))
        parents, depths = self.parents[slots, :width], self.depths[slots, :width]
        new_roots, found = self.find_children(slots, lasts, next_tokens)
        root_values = self.values[slots, new_roots]
        found &= root_values > 0.0  # below nodes so deep that it is 0 nothing tells good from bad
        root_depths = depths[row, new_roots][:, None]
        # Of every node, its ancestor at the depth of the new root, by doubling.
        firsts = (row * width)[:, None]
        own = firsts + np.arange(width)
        above = np.where(depths > root_depths, firsts + parents, own)
        for _ in range(int(depths.max(initial=0)).bit_length()):
            above = above.reshape(-1)[above]
        alive = above == firsts + new_roots[:, None]
        alive &= self.exists(slots, width)
        alive &= found[:, None]
        paths = self._paths(slots, lasts, width)
        counts = np.maximum(np.add.reduce(alive, axis=1, dtype=np.int64), 1)
        old_nodes = (~alive).argsort(axis=1, kind="stable")[:, : int(counts.max(initial=1))]
        survivors = Survivors(slots, old_nodes, counts, found, paths)
        new_positions = self.root_positions[slots] + num_emitted
        if np.count_nonzero(found):
            self._keep(survivors, alive, root_depths, np.where(found, root_values, 1.0))
        lost = ~found
        if np.count_nonzero(lost):
            self._set_roots(slots[lost], next_tokens[lost], new_positions[lost])
        self.root_positions[slots] = new_positions
        return survivors

    def _paths(self, slots: Ints, lasts: Ints, width: int) -> Bools:
        """[B, width]: the nodes from the roots down to `lasts`."""
        on_path = np.zeros((len(slots), width), dtype=np.bool_)
        row, current = np.arange(len(slots)), lasts
        on_path[:, 0] = True
        flat_parents, firsts = self.parents.reshape(-1), slots * self.capacity
        while np.count_nonzero(current):
            on_path[row, current] = True
            current = flat_parents[firsts + current]
        return on_path

    def _keep(self, survivors: Survivors, alive: Bools, root_depths: Ints, root_values: Floats) -> None:
        slots, old, width = survivors.slots, survivors.old_nodes, survivors.old_nodes.shape[1]
        firsts = (slots * self.capacity)[:, None]
        here, there = firsts + np.arange(width), firsts + old
        new_index = alive.cumsum(axis=1) - 1
        old_parents = self.parents.reshape(-1)[there]
        moved = new_index.reshape(-1)[(np.arange(len(slots)) * alive.shape[1])[:, None] + old_parents]
        self.version += 1
        flat_values, flat_depths = self.values.reshape(-1), self.depths.reshape(-1)
        flat_depths[here] = flat_depths[there] - root_depths
        values = flat_values[there] / root_values[:, None] * survivors.exists
        self.values[slots, : alive.shape[1]] = 0.0
        flat_values[here] = values
        for array in (self.tokens, self.acceptances, self.sources, self.child_mass):
            flat = array.reshape(-1)
            flat[here] = flat[there]
        self.parents.reshape(-1)[here] = np.maximum(moved, 0)
        self.num_nodes[slots] = survivors.counts
        self.parents[slots, 0] = self.depths[slots, 0] = 0
        self.values[slots, 0] = self.acceptances[slots, 0] = 1.0

    def _set_roots(self, slots: Ints, tokens: Ints, positions: Ints) -> None:
        self.version += 1
        self.values[slots] = 0.0
        self.tokens[slots, 0] = tokens
        self.root_positions[slots] = positions
        self.parents[slots, 0] = self.depths[slots, 0] = self.sources[slots, 0] = 0
        self.values[slots, 0] = self.acceptances[slots, 0] = 1.0
        self.child_mass[slots, 0] = 0.0
        self.num_nodes[slots] = 1

    def _best_path_first(self, slots: Ints, nodes: Ints, exists: Bools) -> Ints:
        """Nodes ([B, K], root first, by value) in a topological order that starts with the best path."""
        num_rows, width = nodes.shape
        num_growing = self.width(slots)
        firsts = np.arange(num_rows) * num_growing
        places = firsts[:, None] + nodes
        best_child = np.zeros(num_rows * num_growing, dtype=np.int64)  # of a growing node
        parents = self.parents.reshape(-1)[(slots * self.capacity)[:, None] + nodes] + firsts[:, None]
        drafted = exists[:, 1:]
        # Of several assignments to one place the last holds: from the least valuable to the best. In copies, because
        # numpy assigns views of negative stride in the order of memory.
        best_child[parents[:, 1:][drafted][::-1].copy()] = nodes[:, 1:][drafted][::-1].copy()
        is_best = np.zeros(len(best_child), dtype=np.bool_)
        current = best_child[firsts]
        while np.count_nonzero(current):
            is_best[firsts + current] = True
            # Padding and leaves point at roots, from which no way leads on.
            current = best_child[firsts + current] * (current > 0)
        is_best[firsts] = True
        behind = ~is_best[places] + 2 * ~exists
        behind[:, 0] = 0
        order = behind.argsort(axis=1, kind="stable")
        return nodes.reshape(-1)[order + (np.arange(num_rows) * width)[:, None]]

    def _append(
        self,
        slots: Ints,
        parents: Ints,
        tokens: Ints,
        depths: Ints,
        acceptances: Floats,
        values: Floats,
        sources: Ints,
    ) -> Bools:
        """Write new nodes ([M] each, those of a slot together, parents first); returns which of them fitted."""
        self.version += 1
        own = self.num_nodes[slots] + _rank_in_group(slots)
        fits = own < self.capacity
        if np.count_nonzero(fits) < len(fits):
            slots, parents, tokens, depths = slots[fits], parents[fits], tokens[fits], depths[fits]
            acceptances, values, sources, own = acceptances[fits], values[fits], sources[fits], own[fits]
        first = slots * self.capacity
        here = first + own
        for array, new in (
            (self.tokens, tokens),
            (self.parents, parents),
            (self.depths, depths),
            (self.sources, sources),
            (self.acceptances, acceptances),
            (self.values, values),
        ):
            array.reshape(-1)[here] = new
        mass = self.child_mass.reshape(-1)
        mass[here] = 0.0
        np.add.at(mass, first + parents, acceptances)
        self.num_nodes += np.bincount(slots, minlength=len(self.num_nodes))
        return fits

    def _raise(self, slots: Ints, nodes: Ints, acceptances: Floats, sources: Ints) -> None:
        """Where a proposal is trusted more than before, so is all that hangs below it."""
        old = self.acceptances[slots, nodes]
        higher = acceptances > old
        if not higher.any():
            return
        self.version += 1
        slots, nodes, new, old = slots[higher], nodes[higher], acceptances[higher], old[higher]
        parents = self.parents[slots, nodes]
        self.acceptances[slots, nodes], self.sources[slots, nodes] = new, sources[higher]
        np.add.at(self.child_mass, (slots, parents), new - old)
        changed = np.unique(slots)
        width = self.width(changed)
        depths = self.depths[changed, :width]
        own, above = self.acceptances[changed, :width], self.parents[changed, :width]
        exists = self.exists(changed, width)
        values = np.zeros(depths.shape)
        values[:, 0] = 1.0
        for depth in range(1, int(depths.max()) + 1):
            level = (depths == depth) & exists
            values[level] = (own * np.take_along_axis(values, above, axis=1))[level]
        self.values[changed, :width] = values


def _rank_in_group(groups: Ints) -> Ints:
    """[M]: how many equal values stand before each, where equal ones stand together."""
    index = np.arange(len(groups))
    is_first = np.empty(len(groups), dtype=np.bool_)
    is_first[:1] = True
    np.not_equal(groups[1:], groups[:-1], out=is_first[1:])
    return index - np.maximum.accumulate(index * is_first)
