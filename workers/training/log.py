"""What a run says while it goes: a line each so many steps, kept as log.jsonl and for TensorBoard."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outrider.workers.training.metrics import Measurement

LOG = "log.jsonl"


@dataclass(frozen=True)
class TrainLine:
    """A line of the log about the last `log_every` steps.

    Attributes:
        step: done so far.
        loss: mean of the objective.
        losses, acceptances: by guess, see `Measurement`.
        lr: learning rate.
        tokens_per_s: texts' tokens read by all ranks.
        passes: times that the texts have been read.
        left_s: estimate of the seconds to go.
    """

    step: int
    loss: float
    losses: tuple[float, ...]
    acceptances: tuple[float, ...]
    lr: float
    tokens_per_s: float
    passes: float
    left_s: float


@dataclass(frozen=True)
class EvalLine:
    """What the held-out texts say after a step."""

    step: int
    measured: Measurement


Line = TrainLine | EvalLine


class RunLog:
    """Writes lines to `log.jsonl` and to TensorBoard's files."""

    def __init__(self, folder: Path, step: int) -> None:
        """Goes on behind `step`: what an interrupted run said about later steps is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        path = folder / LOG
        kept = [line for line in read_log(folder) if line.step <= step]
        path.write_text("".join(_text_of(line) for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, line: Line) -> None:
        self._file.write(_text_of(line))
        self._file.flush()
        match line:
            case TrainLine():
                scalars = {
                    "train/loss": line.loss,
                    "train/lr": line.lr,
                    "train/tokens_per_s": line.tokens_per_s,
                }
                scalars |= {f"train/acceptance_{k}": value for k, value in enumerate(line.acceptances, 1)}
            case EvalLine(measured=found):
                scalars = {"eval/acceptance_length": found.acceptance_length}
                scalars |= {f"eval/loss_{k}": value for k, value in enumerate(found.losses, 1)}
                for count in (1, 5):
                    scalars |= {f"eval/top{count}_{k}": value for k, value in enumerate(found.top(count), 1)}
        for name, value in scalars.items():
            self._board.add_scalar(name, value, line.step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_log(folder: Path) -> list[Line]:
    """All whole lines of a run."""
    path = folder / LOG
    if not path.exists():
        return []
    lines: list[Line] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            fields = json.loads(text)
        except json.JSONDecodeError:
            continue  # cut off when the run was killed
        lines.append(_line_of(fields))
    return lines


def _text_of(line: Line) -> str:
    return json.dumps(asdict(line)) + "\n"


def _line_of(fields: dict[str, Any]) -> Line:
    if "measured" not in fields:
        return TrainLine(**fields | {name: tuple(fields[name]) for name in ("losses", "acceptances")})
    found = fields["measured"]
    accuracies = tuple(tuple(ranks) for ranks in found["accuracies"])
    measured = Measurement(
        tuple(found["losses"]), tuple(found["acceptances"]), accuracies, found["acceptance_length"]
    )
    return EvalLine(fields["step"], measured)
