"""A growing tree node by node, as plain as can be: the reference that `GrowingTrees` is compared with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class PlainNode:
    """See `GrowingTrees`."""

    token: int
    parent: int
    depth: int
    acceptance: float
    source: int


class PlainTree:
    """One tree; node 0 is the root, and a node's number is its place in `nodes`."""

    def __init__(self, token: int, position: int, capacity: int) -> None:
        self.nodes = [PlainNode(token, 0, 0, 1.0, 0)]
        self.root_position = position
        self.capacity = capacity

    def children(self, node: int) -> list[int]:
        """Oldest first."""
        return [n for n in range(1, len(self.nodes)) if self.nodes[n].parent == node]

    def child(self, node: int, token: int) -> int:
        """The child that holds this token; 0 if there is none."""
        return next((n for n in self.children(node) if self.nodes[n].token == token), 0)

    def path(self, node: int) -> list[int]:
        """From below the root down to `node`."""
        return [*self.path(self.nodes[node].parent), node] if node else []

    def path_tokens(self, node: int) -> list[int]:
        """The tokens of `path`."""
        return [self.nodes[n].token for n in self.path(node)]

    def value(self, node: int) -> float:
        """Product of the acceptances along the path."""
        value = 1.0
        for above in self.path(node):
            value *= self.nodes[above].acceptance
        return value

    def add_child(self, parent: int, token: int, acceptance: float, source: int) -> int:
        """Add a continuation, or raise the estimate of the one that is there; 0 where the tree is full."""
        known = self.child(parent, token)
        if known:
            if acceptance > self.nodes[known].acceptance:
                self.nodes[known].acceptance, self.nodes[known].source = acceptance, source
            return known
        if len(self.nodes) == self.capacity:
            return 0
        self.nodes.append(PlainNode(token, parent, self.nodes[parent].depth + 1, acceptance, source))
        return len(self.nodes) - 1

    def add_chain(self, below: int, tokens: list[int], acceptances: list[float], sources: list[int]) -> None:
        """One child below the other, as far as they fit."""
        for token, acceptance, source in zip(tokens, acceptances, sources, strict=True):
            below = self.add_child(below, token, acceptance, source)
            if not below:
                return

    def best(self, max_nodes: int, max_depth: int) -> list[int]:
        """The most valuable nodes below the root, best first."""
        inside = [n for n in range(1, len(self.nodes)) if self.nodes[n].depth <= max_depth]
        return sorted(inside, key=lambda n: (-self.value(n), n))[:max_nodes]

    def cut(self, chosen: list[int]) -> list[int]:
        """The root, the best path below it, and the rest of `chosen` (a result of `best`) in its order."""
        first, node = [0], 0
        while below := [n for n in chosen if self.nodes[n].parent == node]:
            node = below[0]
            first.append(node)
        return first + [n for n in chosen if n not in first]

    def reroot(self, last: int, next_token: int, num_emitted: int) -> list[int]:
        """Follow what came out; the old numbers of what is left, empty if the tree starts afresh."""
        self.root_position += num_emitted
        new_root = self.child(last, next_token)
        if not new_root:
            self.nodes = [PlainNode(next_token, 0, 0, 1.0, 0)]
            return []
        left = [n for n in range(len(self.nodes)) if n == new_root or new_root in self.path(n)]
        depth, old_nodes = self.nodes[new_root].depth, self.nodes
        self.nodes = [old_nodes[n] for n in left]
        for node in self.nodes:
            node.parent = left.index(node.parent) if node.parent in left else 0
            node.depth -= depth
        self.nodes[0].acceptance = 1.0
        return left
