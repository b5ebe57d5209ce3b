"""What commands do to a terminal, and to who waits before one."""

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import TaskProgressColumn, TimeElapsedColumn
from typer.testing import CliRunner

from outrider.cluster.api import Piece, Progress, Segment
from outrider.cluster.cli import main
from outrider.cluster.cli.main import app
from outrider.cluster.cli.show import legend, show_stream
from outrider.cluster.cli.start import StartBars
from outrider.cluster.cli.terminal import progress_bars, signs_of_life
from outrider.cluster.engine import Engine
from outrider.cluster.interrupts import interrupts_deferred
from outrider.configs.schema import Config
from outrider.workers.sequences.origin import Origin
from support.char_engine import CharEngine

EVIL = "a\x1b]0;title\x07b\x1b[2Jc\x9b31md\re\x7f"


@pytest.fixture
def interrupts() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored; here it counts in any case."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def pieces(*texts: str) -> Iterator[Piece]:
    for text in texts:
        yield Piece(segments=(Segment(text, Origin.TARGET),), tokens=(1,), origins=(Origin.TARGET,))


def test_an_answer_has_no_power_over_the_terminal() -> None:
    console = terminal()
    answer = show_stream(console, pieces(EVIL, "\x1b", "c"))
    assert written(console) == "a␛]0;title␇b␛[2Jc\ufffd31md␍e␡␛c\n"
    assert answer.text == f"{EVIL}\x1bc"


def test_what_a_rule_kept_has_a_colour_of_its_own() -> None:
    console = Console(
        file=io.StringIO(), force_terminal=True, width=80, color_system="standard", no_color=False
    )
    said = tuple(Segment(origin.label, origin) for origin in Origin)
    show_stream(console, iter([Piece(segments=said, tokens=(1, 2, 3), origins=tuple(Origin))]))
    coloured = written(console)
    assert "\x1b[32mdraft\x1b[0m" in coloured
    assert "\x1b[33mkept\x1b[0m" in coloured
    assert "kept against the target" in legend({"rule": "judge"}).plain
    assert "kept" not in legend({}).plain


def test_a_pipe_gets_the_answer_as_it_is() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    show_stream(console, pieces(EVIL))
    assert written(console) == f"{EVIL}\n"


@pytest.mark.parametrize("width", [20, 40, 100])
def test_bars_show_their_figures_at_any_width(width: int) -> None:
    console = terminal(width)
    with progress_bars(console, TaskProgressColumn(), TimeElapsedColumn()) as bars:
        StartBars(bars).show([Progress("target 0", "download", 37, 100)])
        bars.refresh()
        drawn = terminal(width)
        drawn.print(bars.get_renderable())
    assert "37%" in written(drawn)
    assert max(map(len, written(drawn).splitlines())) <= width


def test_off_a_terminal_a_line_now_and_then_says_what_is_under_way(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe = Console(file=io.StringIO(), force_terminal=False)
    with progress_bars(pipe, TaskProgressColumn()) as bars:
        start_bars = StartBars(bars)
        start_bars.show([Progress("target 0", "load", 1, 4), Progress("draft", "profile", 0, 0)])
        with signs_of_life(pipe, start_bars.state, every_s=0.01):
            while "profile" not in (said := capsys.readouterr().err):
                time.sleep(0.01)
    assert said.splitlines()[0] == "starting: target 0: load 25 %, draft: profile"
    assert written(pipe) == ""


def test_on_a_terminal_there_are_bars_and_no_such_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with signs_of_life(terminal(), lambda: "alive", every_s=0.001):
        time.sleep(0.02)
    assert capsys.readouterr().err == ""


def test_ctrl_c_while_starting_is_answered_at_once_and_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], interrupts: None
) -> None:
    said = ""

    def start(config: Config, progress: Callable[[Sequence[Progress]], None]) -> CharEngine:
        nonlocal said
        with interrupts_deferred():  # as Ray is started
            os.kill(os.getpid(), signal.SIGINT)
            while not said:
                said = capfd.readouterr().err
            os.kill(os.getpid(), signal.SIGINT)  # an impatient user
        raise AssertionError("the interrupt comes at the end of the block")

    monkeypatch.setattr(Engine, "start", start)
    monkeypatch.setattr(sys, "argv", ["outrider", "generate", "quickstart", "--prompt", "x"])
    with pytest.raises(SystemExit) as ended:
        main.run()
    assert ended.value.code == main.INTERRUPTED
    assert said == "Interrupted\n"
    assert capfd.readouterr().err == ""


def test_ctrl_c_in_an_answer_is_told_on_a_line_of_its_own_before_processes_end(
    monkeypatch: pytest.MonkeyPatch, interrupts: None
) -> None:
    order = []

    class Interrupted(CharEngine):
        def stream(self, *asked: object) -> Iterator[Piece]:  # type: ignore[override]
            yield from pieces("half an ans")
            raise KeyboardInterrupt

        def __exit__(self, *error: object) -> None:
            order.append(type(error[1]).__name__)

    monkeypatch.setattr(Engine, "start", lambda config, progress: Interrupted(config, progress, str.upper))
    result = CliRunner().invoke(app, ["generate", "quickstart", "--prompt", "x"])
    assert result.exit_code == main.INTERRUPTED
    assert result.output == "half an ans\nInterrupted\n"
    assert order == ["AnsweredInterrupt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["outrider", "config", "tiny-random"])
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended:
            main.run()
    assert ended.value.code == main.ENGINE_ERROR
    assert capsys.readouterr().err == "Error: [Errno 28] No space left on device\n"
