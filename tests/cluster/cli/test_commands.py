"""The command line on a fake engine: what is printed where, and exit codes."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from outrider import __version__
from outrider.cluster.api import Progress
from outrider.cluster.cli.main import COMMANDS, app
from outrider.cluster.engine import Engine
from outrider.configs.schema import Config
from support.char_engine import CharEngine

ROOT = Path(__file__).parents[3]
runner = CliRunner()


class Engines:
    """The engines that commands started; set `death` to make the next one fail."""

    def __init__(self) -> None:
        self.started: list[CharEngine] = []
        self.death = ""

    def start(self, config: Config, progress: Callable[[Sequence[Progress]], None]) -> CharEngine:
        engine = CharEngine(config, progress, str.upper)
        engine.death = self.death
        self.started.append(engine)
        return engine


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    started = Engines()
    monkeypatch.setattr(Engine, "start", started.start)
    return started


def run(*arguments: str, stdin: str = "") -> Any:
    return runner.invoke(app, list(arguments), input=stdin)


def test_config_prints_what_it_reads() -> None:
    result = run("config", "quickstart", "target.tp_size=1")
    assert result.exit_code == 0
    assert yaml.safe_load(result.stdout)["target"]["tp_size"] == 1


def test_the_version_is_the_package_s() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"outrider {__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_a_piped_answer_is_the_text_and_a_line_feed(engines: Engines) -> None:
    result = run("generate", "quickstart", "--prompt", "hello")
    assert result.exit_code == 0
    assert result.stdout == "<USER>HELLO\n"
    assert engines.started[0].closed


def test_raw_prompts_pass_by_the_chat_template(engines: Engines) -> None:
    assert run("generate", "quickstart", "--raw", "--prompt", "hello").stdout == "HELLO\n"


def test_options_reach_the_request(engines: Engines) -> None:
    sampling = ["--temperature", "0.5", "--top-p", "0.9", "--seed", "7", "--stop", "END"]
    draft = ["--draft-nodes", "4", "--draft-method", "ngram"]
    run("generate", "quickstart", "target.tp_size=1", "--prompt", "x", *sampling, *draft)
    (asked,) = engines.started[0].asked
    assert asked.sampling == {"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["END"]}
    assert asked.draft == {"max_nodes": 4, "methods": ["ngram"]}
    assert engines.started[0].config.target.tp_size == 1


def test_what_an_answer_must_be_reaches_the_request(engines: Engines, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "integer"}')
    run("generate", "quickstart", "--prompt", "x", "--json-schema", str(schema), "--min-tokens", "2")
    run("generate", "quickstart", "--prompt", "x", "--choice", "a", "--choice", "b")
    schema_asked, choice_asked = (engine.asked[0].sampling for engine in engines.started)
    assert schema_asked == {"min_tokens": 2, "structured_outputs": {"json": '{"type": "integer"}'}}
    assert choice_asked == {"structured_outputs": {"choice": ["a", "b"]}}


def test_plain_is_a_tree_of_the_root_alone(engines: Engines) -> None:
    run("generate", "quickstart", "--prompt", "x", "--plain")
    assert engines.started[0].asked[0].draft == {"max_nodes": 0}


def test_json_is_one_object_per_prompt_bad_ones_included(engines: Engines, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f"one\n{'x' * 5000}\nthree\n")
    result = run("generate", "quickstart", "--prompts", str(path), "--json", "--raw")
    assert result.exit_code == 1  # an answer was refused
    first, long, last = map(json.loads, result.stdout.splitlines())
    assert (first["text"], last["text"]) == ("ONE", "THREE")
    assert first["origins"] == ["target", "draft", "target"]
    assert first["stats"]["num_rounds"] == 2
    assert long["finish_reason"] == "error"
    assert long["error"].startswith("prompt and sampling.max_tokens must be at most")


def test_a_lossy_rule_is_asked_for_and_labels_what_it_kept(engines: Engines) -> None:
    allowed = ["acceptance.rules=[exact,typical]", "--rule", "typical", "--epsilon", "0.2"]
    result = run("generate", "quickstart", "--prompt", "four", "--raw", "--json", *allowed)
    assert engines.started[0].asked[0].acceptance == {"rule": "typical", "epsilon": 0.2}
    answer = json.loads(result.stdout)
    assert answer["origins"] == ["target", "kept", "target", "kept"]
    assert answer["stats"]["kept"] == {
        "num": 2,
        "mean_logprob_gap": 0.5,
        "worst_logprob_gap": 0.7,
        "mean_score": 0.9,
        "least_score": 0.6,
    }
    result = run("generate", "quickstart", "--prompt", "x", "--rule", "typical")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: acceptance.rule must be among the deployment's")


def test_prompt_files_may_be_rows_of_spec_bench_and_humaneval(engines: Engines, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows: list[dict[str, object]] = [
        {"question_id": 1, "category": "qa", "turns": ["first", "second"]},
        {"task_id": "HumanEval/0", "prompt": "def f", "entry_point": "f"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    result = run("generate", "quickstart", "--prompts", str(path), "--raw")
    assert result.stdout == "## prompts/1\nFIRST\n## HumanEval/0\nDEF F\n"


def test_one_bad_prompt_among_streamed_ones_is_one_line(engines: Engines, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f"{'x' * 5000}\nfine\n")
    result = run("generate", "quickstart", "--prompts", str(path), "--raw")
    assert result.exit_code == 1
    assert "FINE" in result.stdout
    assert len(result.stderr.splitlines()) == 1


def test_trace_is_written_and_switched_on(engines: Engines, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    assert run("generate", "quickstart", "--prompt", "x", "--trace", str(path)).exit_code == 0
    assert engines.started[0].config.rounds.trace
    names = {event["name"] for event in json.loads(path.read_text())["traceEvents"]}
    assert "draft" in names


@pytest.mark.parametrize(
    "arguments",
    [
        ("config", "quickstart", "target.tp_sise=2"),
        ("config", "nowhere.yaml"),
        ("generate", "quickstart"),
        ("generate", "quickstart", "--prompt", "x", "--prompts", "y"),
        ("generate", "quickstart", "--prompts", "missing.txt"),
        ("generate", "quickstart", "--prompt", "x", "--top-p", "2"),
        ("generate", "quickstart", "--prompt", "x", "--draft-nodes", "1000"),
        ("generate", "quickstart", "--prompt", "x", "--plain", "--draft-nodes", "1"),
        ("generate", "quickstart", "--prompt", "x", "--top-logprobs", "1"),
        ("generate", "quickstart", "--prompt", "x" * 5000),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(engines: Engines, arguments: Sequence[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("generate", ["--json", "--temperature", "nan"], "sampling.temperature must be 0 (greedy) or in"),
        ("generate", ["--top-k", "-1"], "sampling.top_k must be"),
        ("generate", ["--stop", ""], "sampling.stop entries must be"),
        ("generate", ["--min-tokens", "999"], "sampling.min_tokens must be"),
        (
            "generate",
            ["--regex", "a", "--choice", "b"],
            "sampling.structured_outputs must be an object with exactly one of",
        ),
        ("generate", ["--grammar", "/nowhere"], "--grammar must be a file of text"),
        ("generate", ["--draft-method", "model"], "draft.methods must be among"),
        ("generate", ["--draft-depth", "0"], "draft.max_depth must be in"),
        ("generate", ["--max-tokens", "5000"], "prompt and sampling.max_tokens must be at most"),
        ("chat", ["--top-p", "0"], "sampling.top_p must be in"),
        ("demo", ["--max-tokens", "0"], "sampling.max_tokens must be"),
        ("demo", ["sampling.seed=-1"], "sampling.seed must be"),
    ],
)
def test_mistakes_in_sampling_are_found_before_anything_starts(
    engines: Engines, command: str, options: list[str], message: str
) -> None:
    prompt = ["--prompt", "x"] if command == "generate" else []
    result = run(command, "quickstart", "target.max_context=4096", *prompt, *options)
    assert (result.exit_code, engines.started) == (2, [])
    assert result.stderr.startswith(f"Error: {message}")


def test_a_dead_worker_is_one_line_and_exit_code_1(engines: Engines) -> None:
    engines.death = "target 1 died during run: its process is gone"
    result = run("generate", "quickstart", "--prompt", "x")
    assert (result.exit_code, result.stderr) == (1, f"Error: {engines.death}\n")
    assert engines.started[0].closed


def test_chat_remembers_the_conversation_and_starts_over(engines: Engines) -> None:
    result = run("chat", "quickstart", "--system", "be brief", stdin="one\n\ntwo\n/new\nthree\n/exit\n")
    assert result.exit_code == 0
    conversations = [
        [dict(message)["content"] for message in asked.prompt] for asked in engines.started[0].asked
    ]  # type: ignore[arg-type]
    first_answer = "<SYSTEM>BE BRIEF<USER>ONE"
    assert conversations == [
        ["be brief", "one"],
        ["be brief", "one", first_answer, "two"],
        ["be brief", "three"],
    ]


def test_a_turn_that_does_not_fit_leaves_the_conversation_as_it_was(engines: Engines) -> None:
    result = run("chat", "quickstart", stdin=f"{'x' * 5000}\nfine\n")
    assert result.exit_code == 1
    assert "Error: prompt and sampling.max_tokens" in result.stderr
    assert result.stdout == "<USER>FINE\n"


def test_demo_compares_every_prompt_and_shows_how_busy_the_workers_were(engines: Engines) -> None:
    result = run("demo", "--max-tokens", "10")
    assert result.exit_code == 0
    assert result.stdout.count("│ yes") == 5
    assert "target 0" in result.stdout
    plain = [asked.draft == {"max_nodes": 0} for asked in engines.started[0].asked]
    assert plain == [False] * 6 + [True] * 5


def test_demo_shows_what_a_lossy_rule_kept(engines: Engines) -> None:
    lossy = ["acceptance.rules=[exact,typical]", "--rule", "typical", "--epsilon", "0.2"]
    result = run("demo", "quickstart", "--max-tokens", "10", *lossy)
    assert result.exit_code == 0
    assert "kept against the target" in result.stdout
    first, *shown = engines.started[0].asked
    asked = [dict(request.acceptance) for request in shown]
    assert (first.acceptance, asked) == ({}, [{"rule": "typical", "epsilon": 0.2}] * 5 + [{}] * 5)
    (total,) = re.findall(r"│ all .*│ +(\d+) │ +│", result.stdout)
    assert int(total) > 0


def documented_commands() -> list[tuple[str, str]]:
    """(file, command line) of every `outrider ...` line in the documents and presets."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "configs").glob("*.yaml"))]
    found = []
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            for command in re.findall(r"^[\s#$|`]*(?:\.venv/bin/)?outrider ([^`|]*)", line):
                found.append((path.name, command))
            for command in re.findall(r"`outrider ([^`]*)`", line):
                found.append((path.name, command))
    return found


@pytest.mark.parametrize(("file", "command"), documented_commands())
def test_documented_commands_and_options_exist(file: str, command: str) -> None:
    name, *arguments = command.split("#")[0].split()
    assert name in COMMANDS
    words = [name, *arguments[:1]] if name == "judge" else [name]  # of a group, its command has options
    help_text = run(*words, "--help").stdout
    for argument in arguments:
        if argument.startswith("--"):
            assert re.search(rf"{argument}\b", help_text), f"{file}: {argument}"


def test_documented_make_targets_exist() -> None:
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"`make ([\w-]+)", path.read_text(encoding="utf-8")):
            assert re.search(rf"^{target}:", rules, re.MULTILINE), f"{path.name}: make {target}"


def test_arguments_of_the_chat_template_reach_it(engines: Engines) -> None:
    asked = ["--template", "enable_thinking=false", "--template", 'tools=[{"name": "f"}]']
    result = run("generate", "quickstart", "--prompt", "hi", *asked)
    assert result.exit_code == 0
    assert "[TOOLS=[{'NAME': 'F'}]]" in result.stdout
    assert "[ENABLE_THINKING=FALSE]<USER>HI" in result.stdout.replace("[TOOLS=[{'NAME': 'F'}]]", "")
    assert "[ENABLE_THINKING=FALSE]<USER>HI" in run("chat", "quickstart", *asked[:2], stdin="hi\n").stdout
    for wrong, message in (
        (["--raw", *asked], "without --raw"),
        (["--template", "x"], "NAME=VALUE, got 'x'"),
    ):
        result = run("generate", "quickstart", "--prompt", "hi", *wrong)
        assert result.exit_code != 0
        assert message in str(result.exception) + result.output
