"""Token trees: those that keep growing in the drafter, and the cut of them that one round verifies.

The trees of all running sequences are one structure of arrays, a row per slot: methods propose, and rounds are
cut, verified and re-rooted, for all sequences at once. Nothing here is done node by node in Python.
"""

from __future__ import annotations

import numpy as np

from outrider.workers.sequences.cuts import (
    Bools,
    DraftTrees,
    FlatNodes,
    Floats,
    Ints,
    Offers,
    Survivors,
    Window,
    best_path_first,
    path_products,
)


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
        flat: the arrays of nodes once more, over slots and nodes: node n of slot s is at `s * capacity + n`.
        root_positions: int64 [S], index in the sequence of the root's token.
        version: another number after every change.
    """

    def __init__(self, num_slots: int, capacity: int) -> None:
        """`capacity`: most nodes of a tree, the root included."""
        shape = (num_slots, capacity)
        self.capacity = capacity
        self.tokens, self.parents, self.depths, self.sources = (np.zeros(shape, np.int64) for _ in range(4))
        self.acceptances, self.values, self.child_mass = (np.zeros(shape) for _ in range(3))
        ints = (self.tokens, self.parents, self.depths, self.sources)
        tokens, parents, depths, sources = (array.reshape(-1) for array in ints)
        acceptances, values, mass = (
            array.reshape(-1) for array in (self.acceptances, self.values, self.child_mass)
        )
        self.flat = FlatNodes(tokens, parents, depths, sources, acceptances, values, mass)
        self.num_nodes = np.zeros(num_slots, dtype=np.int64)
        self.root_positions = np.zeros(num_slots, dtype=np.int64)
        self.version = 0
        self._window: tuple[tuple[int, bytes], Window] | None = None

    def start(self, slot: int, token: int, position: int) -> None:
        """A tree of its root alone."""
        self._set_roots(np.array([slot]), np.array([token]), np.array([position]))

    def width(self, slots: Ints) -> int:
        """Nodes of the largest of these trees: the columns worth looking at."""
        return max(self.num_nodes[slots].tolist(), default=0)

    def window(self, slots: Ints) -> Window:
        """Where the nodes of these trees are, made once for all that look at them before they change."""
        key = (self.version, slots.tobytes())
        if self._window is None or self._window[0] != key:
            width = self.width(slots)
            places = (slots * self.capacity)[:, None] + np.arange(width)
            self._window = key, Window(width, np.arange(0, places.size, max(1, width)), places)
        return self._window[1]

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
        above = slots * self.capacity + parents
        known = self.flat.child_mass[above] > 0.0
        if not np.count_nonzero(known):
            return self._add_new(slots, above, tokens, acceptances, sources)
        candidates = np.flatnonzero(known)
        nodes, found = self.find_children(slots[candidates], parents[candidates], tokens[candidates])
        known[candidates] = found
        nodes = nodes[found]
        self._raise(slots[known], nodes, acceptances[known], sources[known])
        new, values = ~known, np.zeros(len(slots))
        if new.any():
            values[new] = self._add_new(slots[new], above[new], tokens[new], acceptances[new], sources[new])
        values[known] = self.values[slots[known], nodes]
        return values

    def _add_new(self, slots: Ints, above: Ints, tokens: Ints, acceptances: Floats, sources: Ints) -> Floats:
        values = self.flat.values[above] * acceptances
        depths = self.flat.depths[above] + 1
        values *= self._append(slots, above, tokens, depths, acceptances, values, sources)
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
        followed: list[tuple[Ints, Ints, Ints]] = []
        c = np.flatnonzero((lengths > 0) & (self.child_mass[slots, nodes] > 0.0))
        while len(c):
            children, found = self.find_children(slots[c], nodes[c], tokens[c, at[c]])
            c, children = c[found], children[found]
            followed.append((c, at[c], children))
            nodes[c], at[c] = children, at[c] + 1
            c = c[(at[c] < lengths[c]) & (self.child_mass[slots[c], children] > 0.0)]
        if followed:
            # All at once: what hangs below a node is worth something else each time.
            of, at_link, met = (np.concatenate(parts) for parts in zip(*followed, strict=True))
            self._raise(slots[of], met, acceptances[of, at_link], sources[of, at_link])
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
        parents = np.where(column == at[chain], nodes[chain], self._next_nodes(flat_slots)[0] - 1)
        self._append(
            flat_slots,
            flat_slots * self.capacity + parents,
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
        window = self.window(slots)
        values = self._offered_values(window, depth_limits)
        most = min(window.width, max(node_limits.tolist(), default=0))
        # A child is never worth more than its parent and is younger, so the order is topological.
        order = (-values).argsort(axis=1, kind="stable")[:, :most]
        ordered = values.reshape(-1)[order + window.starts[:, None]]
        ordered[np.arange(most) >= node_limits[:, None]] = 0.0
        return Offers(order, ordered)

    def count_offers(self, slots: Ints, depth_limits: Ints) -> Ints:
        """[B]: the nodes that `offers` has to give where there is no limit on their number."""
        values = self._offered_values(self.window(slots), depth_limits)
        return np.add.reduce(values > 0.0, axis=1, dtype=np.int64)

    def _offered_values(self, window: Window, depth_limits: Ints) -> Floats:
        """[B, width]; 0 of nodes that are too deep, and of roots."""
        values = self.flat.values[window.places]
        values *= self.flat.depths[window.places] <= depth_limits[:, None]
        values[:, :1] = 0.0
        return values

    def cut(self, slots: Ints, offers: Offers, counts: Ints) -> DraftTrees:
        """The trees of the roots and the first `counts[b]` offered nodes, best path first.

        The likeliest path stands right behind the root: when it is accepted its KV rows are in place already and
        the commit moves nothing.
        """
        width = max(counts.tolist(), default=0) + 1
        columns = np.arange(width)
        exists = columns <= counts[:, None]
        nodes = np.zeros(exists.shape, dtype=np.int64)
        nodes[:, 1:] = offers.nodes[:, : width - 1]
        nodes *= exists
        window = self.window(slots)
        if width > 2:
            nodes = best_path_first(window, nodes, self.flat.parents[window.places[:, :1] + nodes], exists)
        starts, firsts = window.starts[:, None], window.places[:, :1]
        column_of = np.zeros(window.places.size, dtype=np.int64)  # of a growing node in the cut
        # Padding repeats the root, and so says what the root does.
        column_of[starts + nodes] = columns * exists
        here = firsts + nodes
        parents = column_of[starts + self.flat.parents[here]]
        return DraftTrees(counts + 1, self.flat.tokens[here], parents, nodes)

    def reroot(self, slots: Ints, lasts: Ints, next_tokens: Ints, num_emitted: Ints) -> Survivors:
        """Follow the tokens that came out; keep what hangs below the last of them.

        Args:
            slots: int64 [B], distinct.
            lasts: int64 [B], the last node of each path that came out.
            next_tokens: int64 [B], the token that came out after it.
            num_emitted: int64 [B], tokens that came out in all.
        """
        window = self.window(slots)
        parents = self.flat.parents[window.places]
        is_next = self.flat.tokens[window.places] == next_tokens[:, None]
        is_next &= parents == lasts[:, None]
        is_next[:, 0] = False  # a root is its own parent, not its own child
        new_roots = is_next.argmax(axis=1)
        root_places = slots * self.capacity + new_roots
        root_values = self.flat.values[root_places]
        # Padding has no value. Below nodes so deep that theirs is 0 nothing tells good from bad.
        found = is_next.reshape(-1)[window.starts + new_roots] & (root_values > 0.0)
        alive = np.zeros(parents.shape, dtype=np.bool_)
        alive[:, 0] = True  # stands for a root that starts afresh
        is_any_found = np.count_nonzero(found)
        if is_any_found:
            below = self._below(window, parents, new_roots, self.flat.depths[root_places])
            below &= self.exists(slots, window.width)
            alive[found] = below[found]
        counts = np.add.reduce(alive, axis=1, dtype=np.int64)
        old_nodes = (~alive).argsort(axis=1, kind="stable")[:, : max(counts.tolist(), default=1)]
        survivors = Survivors(slots, old_nodes, counts, found, self._paths(window, parents, lasts))
        new_positions = self.root_positions[slots] + num_emitted
        if is_any_found:
            self._keep(survivors, alive, np.where(found, root_values, 1.0))
        lost = ~found
        if np.count_nonzero(lost):
            self._set_roots(slots[lost], next_tokens[lost], new_positions[lost])
        self.root_positions[slots] = new_positions
        return survivors

    def _below(self, window: Window, parents: Ints, roots: Ints, root_depths: Ints) -> Bools:
        """[B, width]: these nodes ([B]) and what hangs below them; padding means nothing."""
        depths = self.flat.depths[window.places]
        starts = window.starts[:, None]
        # Of every node, its ancestor at the depth of the new root, by doubling.
        above = starts + np.where(depths > root_depths[:, None], parents, np.arange(window.width))
        for _ in range(int(depths.max(initial=0)).bit_length()):
            above = above.reshape(-1)[above]
        return above == starts + roots[:, None]

    def _paths(self, window: Window, parents: Ints, lasts: Ints) -> Bools:
        """[B, width]: the nodes from the roots down to `lasts`."""
        on_path = np.zeros(parents.shape, dtype=np.bool_)
        on_path[:, 0] = True
        flat_path, flat_parents, current = on_path.reshape(-1), parents.reshape(-1), lasts
        while np.count_nonzero(current):
            places = window.starts + current
            flat_path[places] = True
            current = flat_parents[places]
        return on_path

    def _keep(self, survivors: Survivors, alive: Bools, root_values: Floats) -> None:
        slots, old, width = survivors.slots, survivors.old_nodes, survivors.old_nodes.shape[1]
        flat, firsts = self.flat, (slots * self.capacity)[:, None]
        here, there = firsts + np.arange(width), firsts + old
        new_index = alive.cumsum(axis=1) - 1
        starts = np.arange(0, alive.size, alive.shape[1])[:, None]
        moved = new_index.reshape(-1)[starts + flat.parents[there]]
        self.version += 1
        depths = flat.depths[there]
        flat.depths[here] = depths - depths[:, :1]
        values = flat.values[there] / root_values[:, None] * survivors.exists
        self.values[slots, : alive.shape[1]] = 0.0
        flat.values[here] = values
        for array in (flat.tokens, flat.acceptances, flat.sources, flat.child_mass):
            array[here] = array[there]
        flat.parents[here] = np.maximum(moved, 0)
        self.num_nodes[slots] = survivors.counts
        first = firsts[:, 0]
        flat.parents[first] = 0
        flat.values[first] = flat.acceptances[first] = 1.0

    def _set_roots(self, slots: Ints, tokens: Ints, positions: Ints) -> None:
        self.version += 1
        flat, first = self.flat, slots * self.capacity
        self.values[slots] = 0.0
        flat.tokens[first] = tokens
        flat.parents[first] = flat.depths[first] = flat.sources[first] = 0
        flat.values[first] = flat.acceptances[first] = 1.0
        flat.child_mass[first] = 0.0
        self.root_positions[slots] = positions
        self.num_nodes[slots] = 1

    def _next_nodes(self, slots: Ints) -> tuple[Ints, Ints]:
        """The nodes that new ones of these slots become ([M], those of a slot together), and [S] all nodes then."""
        index = np.arange(len(slots))
        num_nodes = self.num_nodes + np.bincount(slots, minlength=len(self.num_nodes))
        # Of several assignments to one place the last holds: every slot's last node becomes its tree's last.
        shifts = num_nodes.copy()
        shifts[slots] = index
        return index + (num_nodes - 1 - shifts)[slots], num_nodes

    def _append(
        self,
        slots: Ints,
        above: Ints,
        tokens: Ints,
        depths: Ints,
        acceptances: Floats,
        values: Floats,
        sources: Ints,
    ) -> Bools:
        """Write new nodes ([M] each, those of a slot together, parents first); returns which of them fitted.

        above: their parents' places in `flat`.
        """
        self.version += 1
        own, num_nodes = self._next_nodes(slots)
        fits = own < self.capacity
        if np.count_nonzero(fits) < len(fits):
            slots, above, tokens, depths = slots[fits], above[fits], tokens[fits], depths[fits]
            acceptances, values, sources, own = acceptances[fits], values[fits], sources[fits], own[fits]
            num_nodes = np.minimum(num_nodes, self.capacity)
        flat, firsts = self.flat, slots * self.capacity
        here = firsts + own
        flat.tokens[here], flat.parents[here], flat.depths[here] = tokens, above - firsts, depths
        flat.sources[here], flat.acceptances[here], flat.values[here] = sources, acceptances, values
        flat.child_mass[here] = 0.0
        np.add.at(flat.child_mass, above, acceptances)
        self.num_nodes[:] = num_nodes
        return fits

    def _raise(self, slots: Ints, nodes: Ints, acceptances: Floats, sources: Ints) -> None:
        """Where a proposal is trusted more than before, so is all that hangs below it. Nodes may come repeatedly."""
        flat, places = self.flat, slots * self.capacity + nodes
        higher = acceptances > flat.acceptances[places]
        if not np.count_nonzero(higher):
            return
        self.version += 1
        places, new, sources = places[higher], acceptances[higher], sources[higher]
        raised, changed = np.unique(places), np.unique(slots[higher])
        before = flat.acceptances[raised]
        # Of several assignments to one place the last holds: that of the highest, the first of equals.
        order = (-new).argsort(kind="stable")[::-1]
        flat.acceptances[places[order]], flat.sources[places[order]] = new[order], sources[order]
        above = raised - raised % self.capacity + flat.parents[raised]
        np.add.at(flat.child_mass, above, flat.acceptances[raised] - before)
        window = self.window(changed)
        own = flat.acceptances[window.places] * self.exists(changed, window.width)
        above = window.starts[:, None] + flat.parents[window.places]
        flat.values[window.places] = path_products(own, above, int(flat.depths[window.places].max()))
