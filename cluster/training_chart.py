"""The curves of a training run as a picture."""

from pathlib import Path

from matplotlib.figure import Figure

from outrider.workers.training.log import EvalLine, TrainLine, read_log


def draw_training(run: Path, path: Path) -> None:
    """Loss, accuracy by depth (top 1 and 5) and tokens per round over steps, of the run in this folder."""
    lines = read_log(run)
    trained = [line for line in lines if isinstance(line, TrainLine)]
    measured = [line for line in lines if isinstance(line, EvalLine)]
    figure = Figure(figsize=(12, 4), layout="constrained")
    loss, accuracy, length = figure.subplots(1, 3)
    loss.plot([line.step for line in trained], [line.loss for line in trained], label="training")
    loss.set(title="Loss", xlabel="step")
    steps = [line.step for line in measured]
    num_guesses = len(measured[0].measured.losses) if measured else 0
    for depth in range(num_guesses):
        color = f"C{depth}"
        for count, style in ((1, "-"), (5, ":")):
            values = [line.measured.top(count)[depth] for line in measured]
            label = f"depth {depth + 1}" if count == 1 else None
            accuracy.plot(steps, values, style, color=color, label=label, marker=".")
    accuracy.set(title="Held out: right among the first 1 (solid), 5 (dotted)", xlabel="step", ylim=(0, 1))
    if num_guesses:
        accuracy.legend(fontsize="small")
    length.plot(steps, [line.measured.acceptance_length for line in measured], marker=".")
    length.set(title="Held out: tokens per round of a chain", xlabel="step")
    figure.savefig(path, dpi=110)
