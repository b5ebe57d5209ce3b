"""The judge: whether a drafted token may stand although the target would have said another one.

One linear layer on the row that leaves the target's last layer, before the final norm, at the drafted token's own
position (Judge Decoding, arXiv 2501.19309); or on that row and the draft model's at the same place (AutoJudge,
arXiv 2504.20039, garipovroma/autojudge). A judge belongs to one target and to the tasks that it was calibrated on.

A checkpoint is a folder with judge.safetensors (`linear.weight` float32 [1, columns], `linear.bias` float32 [1]) and
judge.json, which is `JudgeDescription`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from outrider.workers.judging.identity import ModelIdentity, differences, read_identity
from outrider.workers.weights.fields import Fields, read_json
from outrider.workers.weights.safetensors_writer import write_tensors

JudgeKind = Literal["target", "target_and_draft"]
KINDS = ("target", "target_and_draft")
CONFIG = "judge.json"
WEIGHTS = "judge.safetensors"


@dataclass(frozen=True)
class ThresholdRow:
    """What a threshold was measured to do, on texts that were held out.

    Attributes:
        threshold: drafted tokens with a higher score are kept.
        harmful_recall: fraction of the harmful tokens that are refused.
        benign_kept: fraction of the harmless mismatches that are kept.
        acceptance_length: tokens per target step; 0: not measured.
        speed: tokens per second, in units of those of `exact` with the same drafter; 0: not measured.
    """

    threshold: float
    harmful_recall: float
    benign_kept: float
    acceptance_length: float = 0.0
    speed: float = 0.0


@dataclass(frozen=True)
class JudgeDescription:
    """What a judge is, besides its weights.

    Attributes:
        kind: which rows it reads.
        target: whose rows; the layer that they leave is its last one.
        drafter: whose rows it reads besides, identified without a chat template; None for kind `target`.
        threshold: calibrated; holds where a request names none.
        thresholds: what else can be chosen, ascending.
        tasks: what it was calibrated on, e.g. "GSM8K train, mined". It does not carry over unless measured.
        provenance: how it was made.
    """

    kind: JudgeKind
    target: ModelIdentity
    drafter: ModelIdentity | None
    threshold: float
    thresholds: tuple[ThresholdRow, ...]
    tasks: tuple[str, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_columns(self) -> int:
        """Of the rows that the head reads, side by side."""
        return self.target.hidden_size + (self.drafter.hidden_size if self.drafter else 0)


class JudgeHead(nn.Module):
    """A linear layer in float32; its logit's sigmoid is the score, near 1 for tokens that do no harm."""

    def __init__(self, num_columns: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_columns, 1, dtype=torch.float32)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [N, columns] of any float type -> logits float32 [N].

        Columns: the target's row, then for kind `target_and_draft` the drafter's; both before the final norm.
        """
        logits: Tensor = self.linear(rows.float()).squeeze(-1)
        return logits

    @classmethod
    def folded(cls, weight: Tensor, bias: float, mean: Tensor, scale: Tensor) -> JudgeHead:
        """The head that reads rows as they are, from one fitted to (row - mean) / scale; [columns] each."""
        assert weight.shape == mean.shape == scale.shape
        head = cls(len(weight))
        of_rows = weight.double() / scale.double()
        with torch.no_grad():
            head.linear.weight.copy_(of_rows[None])
            head.linear.bias.copy_(bias - (of_rows * mean.double()).sum())
        return head


def write_judge(folder: Path, head: JudgeHead, description: JudgeDescription) -> None:
    """Writes both files; a folder that holds a judge is overwritten."""
    assert head.linear.in_features == description.num_columns
    assert (description.drafter is None) == (description.kind == "target")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: x.float() for name, x in head.state_dict().items()}
    write_tensors(folder / WEIGHTS, weights, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(asdict(description), indent=2) + "\n", encoding="utf-8")


def read_judge(folder: Path) -> tuple[JudgeHead, JudgeDescription]:
    """A judge as `write_judge` wrote it.

    Raises ValueError, one line with the folder: a file is missing or damaged, a field or tensor is missing, unknown
    or not what it may be.
    """
    try:
        description = read_description(read_json(folder / CONFIG))
        stored = _read_weights(folder / WEIGHTS)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    with torch.device("meta"):
        head = JudgeHead(description.num_columns)
    expected = {name: tuple(x.shape) for name, x in head.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in stored.items()}
    if expected != found or not all(bool(x.isfinite().all()) for x in stored.values()):
        raise ValueError(f"{folder}: {WEIGHTS} must hold {expected} and finite numbers, got {found}")
    head.load_state_dict({name: x.float() for name, x in stored.items()}, assign=True)
    return head.requires_grad_(False), description


def read_description(raw: Mapping[str, Any]) -> JudgeDescription:
    """Of the object in judge.json; ValueError names a field that is not what it may be."""
    fields = Fields(raw)
    kind: Any = fields.text("kind", KINDS)
    target = read_identity(fields.object("target"), "target")
    drafter = read_identity(fields.object("drafter"), "drafter") if kind == "target_and_draft" else None
    if drafter is None and fields.given("drafter"):
        raise fields.wrong("drafter", "null for kind target")
    rows = fields.value("thresholds")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise fields.wrong("thresholds", "a list of objects")
    thresholds = tuple(_read_row(row, i) for i, row in enumerate(rows))
    if any(a.threshold >= b.threshold for a, b in pairwise(thresholds)):
        raise fields.wrong("thresholds", "sorted by ascending threshold")
    description = JudgeDescription(
        kind=kind,
        target=target,
        drafter=drafter,
        threshold=_fraction(fields, "threshold"),
        thresholds=thresholds,
        tasks=tuple(fields.texts("tasks")),
        provenance=fields.object("provenance"),
    )
    fields.refuse_unread()
    return description


def judge_field(name: str) -> str:
    """The configuration key of a judge, for messages."""
    return f"acceptance.judges {name}"


def check_models(
    name: str, description: JudgeDescription, target: ModelIdentity, drafter: ModelIdentity | None
) -> None:
    """Refuses a judge of other models than those that are served.

    Args:
        name: of the judge, as messages name it.
        drafter: that of `draft.model`; None where no draft model is served.

    Raises:
        ValueError: one line with all that is different.
    """
    found = differences("target", description.target, target)
    if description.drafter is not None:
        found += (
            ["it reads a draft model's rows, and draft.methods has no `model`"]
            if drafter is None
            else differences("draft model", description.drafter, drafter)
        )
    if found:
        raise ValueError(
            f"{name} must be a judge of the models that are served, got one for other ones: "
            + "; ".join(found)
        )


def check_methods(name: str, without_rows: Sequence[str]) -> None:
    """Refuses a judge that reads the draft model's rows beside draft methods that have none at their nodes."""
    if without_rows:
        raise ValueError(
            f"{name} reads the draft model's rows, so draft.methods must be [model], got also "
            f"{', '.join(without_rows)}, which has none at the nodes that it proposes"
        )


def _read_row(raw: Mapping[str, Any], index: int) -> ThresholdRow:
    fields = Fields(raw, f"thresholds[{index}].")

    def measured(key: str) -> float:
        return fields.number(key, "at least 0", lambda value: value >= 0)

    row = ThresholdRow(
        threshold=_fraction(fields, "threshold"),
        harmful_recall=_fraction(fields, "harmful_recall"),
        benign_kept=_fraction(fields, "benign_kept"),
        acceptance_length=measured("acceptance_length"),
        speed=measured("speed"),
    )
    fields.refuse_unread()
    return row


def _fraction(fields: Fields, key: str) -> float:
    return fields.number(key, "from 0 to 1", lambda value: 0 <= value <= 1)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path.name}") from error
    except SafetensorError as error:
        raise ValueError(f"{path.name} cannot be read: {str(error).splitlines()[0]}") from error
