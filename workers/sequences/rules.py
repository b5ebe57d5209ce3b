"""The verdict: which draft tokens are accepted. A pure function of the tree and the target's tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

from outrider.workers.sequences.tree import DraftTree


@dataclass(frozen=True)
class Verdict:
    """The accepted path, root first, and the token the target puts after it.

    The last token is the target's own: "bonus" when the path ends at a leaf, "recovered" when the tree
    offered other tokens there.
    """

    path: tuple[int, ...]  # nodes of the tree; path[0] == 0
    next_token: int

    def emitted(self, tree: DraftTree) -> list[int]:
        """Tokens that come out: the accepted drafts, then the target's own."""
        return [tree.tokens[node] for node in self.path[1:]] + [self.next_token]


def verify_exact(tree: DraftTree, target_tokens: SequenceABC[int]) -> Verdict:
    """Accept a draft token iff it is the token the target samples after its parent (architecture §4, `exact`).

    `target_tokens[i]` is the target's sample after node i. Siblings hold different tokens, so the path is
    unique, and the text is what plain decoding gives for the same seed.
    """
    child_of = {(tree.parents[node], tree.tokens[node]): node for node in range(1, len(tree.tokens))}
    path = [0]
    while True:
        token = target_tokens[path[-1]]
        child = child_of.get((path[-1], token))
        if child is None:
            return Verdict(tuple(path), token)
        path.append(child)
