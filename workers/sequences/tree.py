"""Token trees: the one that keeps growing in the drafter, and the cut of it that one round verifies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DraftTree:
    """What one round verifies for one sequence. Node 0 is the last known token; `parents[i] < i`."""

    tokens: tuple[int, ...]  # [num_nodes]
    parents: tuple[int, ...]  # [num_nodes]; the root is its own parent
    growing_nodes: tuple[int, ...]  # [num_nodes] the same nodes in the `GrowingTree`

    @staticmethod
    def root_only(token: int) -> DraftTree:
        """Plain decoding."""
        return DraftTree((token,), (0,), (0,))

    @property
    def num_drafted(self) -> int:
        return len(self.tokens) - 1

    def depths(self) -> list[int]:
        """Depth of every node; the root has 0."""
        depths = [0] * len(self.tokens)
        for node in range(1, len(self.tokens)):
            depths[node] = depths[self.parents[node]] + 1
        return depths


@dataclass
class GrowingNode:
    """A possible continuation.

    `acceptance` is the estimated probability that the target samples this token after its parent;
    `value` is the product along the path: the probability that the whole path is accepted.
    """

    token: int
    parent: int
    depth: int
    acceptance: float
    value: float
    source: tuple[int, ...]  # key of the acceptance estimate, so that the outcome can teach it
    position: int  # index in the sequence of this token
    children: dict[int, int]  # token -> node


class GrowingTree:
    """A best-first tree over continuations of a sequence; node 0 is the sequence's last token.

    Growing it never looks at the target. A verdict re-roots it: what hangs below the tokens that came out
    survives (SwiftSpec, arXiv 2506.11309).
    """

    def __init__(self, root_token: int, root_position: int) -> None:
        root = GrowingNode(root_token, 0, 0, 1.0, 1.0, (), root_position, {})
        self.nodes: list[GrowingNode] = [root]

    def __len__(self) -> int:
        return len(self.nodes)

    def add_child(self, parent: int, token: int, acceptance: float, source: tuple[int, ...]) -> int:
        """Add a continuation, or raise the estimate of the one that is there; returns the node.

        Several methods may propose the same token: their trees merge here.
        """
        parent_node = self.nodes[parent]
        known = parent_node.children.get(token)
        if known is not None:
            if acceptance > self.nodes[known].acceptance:
                self.nodes[known].acceptance = acceptance
                self.nodes[known].source = source
                self._revalue(known)
            return known
        node = GrowingNode(
            token=token,
            parent=parent,
            depth=parent_node.depth + 1,
            acceptance=acceptance,
            value=parent_node.value * acceptance,
            source=source,
            position=parent_node.position + 1,
            children={},
        )
        self.nodes.append(node)
        parent_node.children[token] = len(self.nodes) - 1
        return len(self.nodes) - 1

    def path_tokens(self, node: int) -> list[int]:
        """Tokens from below the root down to `node`."""
        tokens = []
        while node:
            tokens.append(self.nodes[node].token)
            node = self.nodes[node].parent
        return tokens[::-1]

    def best(self, max_nodes: int, max_depth: int) -> list[int]:
        """The most valuable nodes below the root, best first; with every node its parents come earlier."""
        inside = [n for n in range(1, len(self.nodes)) if self.nodes[n].depth <= max_depth]
        # A child is never worth more than its parent and is younger, so the order is topological.
        inside.sort(key=lambda n: (-self.nodes[n].value, n))
        return inside[:max_nodes]

    def cut(self, chosen: list[int]) -> DraftTree:
        """The tree of the root and `chosen` (a result of `best`), best path first.

        Depth-first order puts the likeliest path right behind the root: when it is accepted its KV rows
        are in place already and the commit moves nothing.
        """
        kept = set(chosen)
        tokens: list[int] = []
        parents: list[int] = []
        order: list[int] = []
        stack = [(0, 0)]
        while stack:
            node, parent_index = stack.pop()
            index = len(order)
            order.append(node)
            tokens.append(self.nodes[node].token)
            parents.append(parent_index)
            children = [c for c in self.nodes[node].children.values() if c in kept]
            children.sort(key=lambda c: self.nodes[c].value)
            stack += [(child, index) for child in children]
        return DraftTree(tuple(tokens), tuple(parents), tuple(order))

    def reroot(self, emitted: list[int]) -> dict[int, int]:
        """Follow the tokens that came out; keep what hangs below the last of them.

        Returns old node -> new node for the survivors (the new root included); empty when the tree held no
        such path, and then only the new root is left.
        """
        node = 0
        for token in emitted:
            child = self.nodes[node].children.get(token)
            if child is None:
                root_position = self.nodes[0].position + len(emitted)
                self.nodes = GrowingTree(emitted[-1], root_position).nodes
                return {}
            node = child
        new_index = {node: 0}
        survivors = [node]
        for old in survivors:  # grows while it is read: breadth first
            for child in self.nodes[old].children.values():
                new_index[child] = len(survivors)
                survivors.append(child)
        old_nodes = self.nodes
        root = old_nodes[node]
        root.parent, root.depth, root.value, root.acceptance = 0, 0, 1.0, 1.0
        self.nodes = [root]
        for old in survivors[1:]:
            moved = old_nodes[old]
            moved.parent = new_index[moved.parent]
            parent = self.nodes[moved.parent]
            moved.depth = parent.depth + 1
            moved.value = parent.value * moved.acceptance
            self.nodes.append(moved)
        for kept in self.nodes:
            kept.children = {token: new_index[child] for token, child in kept.children.items()}
        return new_index

    def _revalue(self, node: int) -> None:
        changed = [node]
        for current in changed:
            self.nodes[current].value = (
                self.nodes[self.nodes[current].parent].value * self.nodes[current].acceptance
            )
            changed += self.nodes[current].children.values()
