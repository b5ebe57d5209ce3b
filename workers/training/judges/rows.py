"""What a judge learns from: of every labelled token the model's reaction to having read it.

Texts of one problem have most of their tokens in common, so each problem is a tree that the target reads once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from outrider.workers.sequences.segments import Int64Array
from outrider.workers.training.feature_store import keep_rows, row_files
from outrider.workers.training.features import TargetFeatures, TokenTree
from outrider.workers.training.judges.labels import BAD, UNUSED, LabelledText
from outrider.workers.weights.progress import Progress

_TREES_PER_FILE = 16  # what a pass that is cut off loses
_LOGIT_ROWS = 256
_KEPT_OF_SAME = 8

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LabelledTree:
    """All labelled texts with one prompt.

    Attributes:
        problem, domain: of the texts.
        tree: their tokens.
        nodes: int64 [E], those with a label.
        is_good: bool [E].
        kinds: of each of them, as in `LabelledText`.
        num_contradictory: nodes that are good in one text and bad in another; they have no label.
    """

    problem: str
    domain: str
    tree: TokenTree
    nodes: Int64Array
    is_good: Bools
    kinds: tuple[str, ...]
    num_contradictory: int

    def digested(self) -> bytes:
        """What of it decides the target's rows."""
        arrays = (self.tree.tokens, self.tree.parents, self.nodes)
        return b"".join(len(array).to_bytes(4, "little") + array.tobytes() for array in arrays)


def trees_of(texts: Iterable[LabelledText]) -> list[LabelledTree]:
    """Texts of one problem and prompt become one tree; in the order in which they first come.

    Where a text goes on to its end as the first one of its tree does, its tokens are left out after the first few:
    they are the same tokens once more, behind a beginning that differs.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[LabelledText]] = {}
    for text in texts:
        groups.setdefault((text.problem, text.prompt_tokens), []).append(text)
    return [_tree_of(group) for group in groups.values()]


def _tree_of(texts: Sequence[LabelledText]) -> LabelledTree:
    tokens: list[int] = []
    parents: list[int] = []
    node_of: dict[tuple[int, int], int] = {}
    said: dict[int, set[bool]] = {}
    kinds: dict[int, str] = {}
    for text in texts:
        node = -1
        labels = UNUSED * len(text.prompt_tokens) + text.labels
        num_same = 0 if text is texts[0] else _num_same_at_end(text.output_tokens, texts[0].output_tokens)
        num_read = len(labels) - max(0, num_same - _KEPT_OF_SAME)
        for token, label in zip(text.tokens[:num_read], labels[:num_read], strict=True):
            place = (node, token)
            if place not in node_of:
                node_of[place] = len(tokens)
                tokens.append(token)
                parents.append(max(node, 0))
            node = node_of[place]
            if label != UNUSED:
                said.setdefault(node, set()).add(label != BAD)
                kinds.setdefault(node, text.kind)
    clear = sorted(node for node, found in said.items() if len(found) == 1)
    return LabelledTree(
        problem=texts[0].problem,
        domain=texts[0].domain,
        tree=TokenTree(np.array(tokens, dtype=np.int64), np.array(parents, dtype=np.int64)),
        nodes=np.array(clear, dtype=np.int64),
        is_good=np.array([True in said[node] for node in clear], dtype=bool),
        kinds=tuple(kinds[node] for node in clear),
        num_contradictory=len(said) - len(clear),
    )


def _num_same_at_end(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(reversed(one), reversed(other), strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


class JudgeRowComputer:
    """Runs the target, and the draft model where the judge reads its rows, too."""

    def __init__(self, target: TargetFeatures, draft: TargetFeatures | None) -> None:
        """Both give the rows that leave their last layer."""
        self._target = target
        self._draft = draft

    @torch.inference_mode()
    def compute(self, texts: Sequence[LabelledTree]) -> list[dict[str, Tensor]]:
        """Of each tree, over its labelled nodes:

        target, draft: [E, hidden] as they leave the last layer, before the final norm; draft without columns where
            its rows are not read.
        logprob: float32 [E], log p (nats) of the token after its parent.
        choice_logprob: float32 [E], of the target's own choice there.
        entropy: float32 [E], nats, of its law there.
        """
        trees = [text.tree for text in texts]
        last = self._target.model.config.num_layers
        found = [rows[last] for rows in self._target.tree_rows(trees)]
        drafted: list[Tensor | None] = [None] * len(texts)
        if self._draft is not None:
            draft_last = self._draft.model.config.num_layers
            drafted = [rows[draft_last] for rows in self._draft.tree_rows(trees)]
        return [self._of_tree(text, rows, own) for text, rows, own in zip(texts, found, drafted, strict=True)]

    def _of_tree(self, text: LabelledTree, rows: Tensor, drafted: Tensor | None) -> dict[str, Tensor]:
        nodes = torch.from_numpy(text.nodes)
        parents = torch.from_numpy(text.tree.parents)[nodes]
        tokens = torch.from_numpy(text.tree.tokens)[nodes]
        laws = [
            self._law(rows[parents[start : start + _LOGIT_ROWS]], tokens[start : start + _LOGIT_ROWS])
            for start in range(0, len(nodes), _LOGIT_ROWS)
        ]
        law = torch.cat(laws) if laws else torch.empty(0, 3)
        return {
            "target": rows[nodes].clone(),
            "draft": torch.empty(len(nodes), 0) if drafted is None else drafted[nodes].clone(),
            "logprob": law[:, 0].clone(),
            "choice_logprob": law[:, 1].clone(),
            "entropy": law[:, 2].clone(),
        }

    def _law(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """[n, 3]: log p of these tokens, of the likeliest ones, and the entropy."""
        log_probs = self._target.model.logits(rows).float().log_softmax(-1)
        own = log_probs.gather(1, tokens[:, None])[:, 0]
        entropy = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1)
        return torch.stack((own, log_probs.amax(-1), entropy), dim=1)


@dataclass(frozen=True, eq=False)
class JudgeRows:
    """N labelled tokens and what a judge, or a trivial one in its place, may read of them.

    Attributes:
        rows: float32 [N, columns], the target's last row at the token, then the draft model's if it is read.
        is_good: bool [N].
        logprobs, choice_logprobs, entropies: float32 [N], as `JudgeRowComputer` gives them.
        tokens: int64 [N].
        problems, domains, kinds: of each.
        num_contradictory: tokens without a label, as texts say both.
    """

    rows: Floats
    is_good: Bools
    logprobs: Floats
    choice_logprobs: Floats
    entropies: Floats
    tokens: Int64Array
    problems: npt.NDArray[np.str_]
    domains: npt.NDArray[np.str_]
    kinds: npt.NDArray[np.str_]
    num_contradictory: int

    @property
    def is_mismatch(self) -> Bools:
        """Tokens that `exact` refuses, as the target (greedy) says another one: those that a judge is asked about."""
        return self.logprobs < self.choice_logprobs

    def __len__(self) -> int:
        return len(self.is_good)

    def at(self, chosen: Bools) -> JudgeRows:
        """These of them."""
        return JudgeRows(
            self.rows[chosen],
            self.is_good[chosen],
            self.logprobs[chosen],
            self.choice_logprobs[chosen],
            self.entropies[chosen],
            self.tokens[chosen],
            self.problems[chosen],
            self.domains[chosen],
            self.kinds[chosen],
            self.num_contradictory,
        )


def judge_rows(
    trees: Sequence[LabelledTree],
    open_computer: Callable[[], JudgeRowComputer],
    folder: Path,
    identity: str,
    progress: Progress,
) -> JudgeRows:
    """Rows of all labelled tokens; what is in `folder` already is not computed again.

    Args:
        open_computer: called where something is to be computed.
        identity: what else than the texts decides the rows: the models and their number formats.
    """
    files = row_files(trees, folder, identity, _TREES_PER_FILE)
    if not all(path.exists() for path in files):
        keep_rows(trees, files, open_computer(), progress, _TREES_PER_FILE)
    tensors = [load_file(path) for path in files]

    def joined(name: str) -> Floats:
        return torch.cat([found[name].float() for found in tensors]).numpy()

    def of_each(values: Iterable[str]) -> npt.NDArray[np.str_]:
        counts = [len(tree.nodes) for tree in trees]
        return np.array(list(values)).repeat(counts)

    return JudgeRows(
        rows=np.concatenate([joined("target"), joined("draft")], axis=1),
        is_good=np.concatenate([tree.is_good for tree in trees]),
        logprobs=joined("logprob"),
        choice_logprobs=joined("choice_logprob"),
        entropies=joined("entropy"),
        tokens=np.concatenate([tree.tree.tokens[tree.nodes] for tree in trees]),
        problems=of_each(tree.problem for tree in trees),
        domains=of_each(tree.domain for tree in trees),
        kinds=np.array([kind for tree in trees for kind in tree.kinds]),
        num_contradictory=sum(tree.num_contradictory for tree in trees),
    )
