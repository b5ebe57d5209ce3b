"""`outrider distill` on a fake engine that says what a tiny tokenizer can read."""

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from outrider.cluster.api import EngineError, GenerationRequest
from outrider.cluster.cli.main import app
from outrider.cluster.engine import Engine
from outrider.configs.schema import Config
from outrider.workers.answer import Completion
from outrider.workers.training.kept_rows import KeptFiles
from outrider.workers.training.lines import read_dropped
from outrider.workers.training.texts import load_description, read_texts
from outrider.workers.weights.random_tokenizer import tokenizer_of_size
from support.started_engines import StartedEngines

TOKENIZER = tokenizer_of_size(320)  # that of tiny-random


class DistillingEngine:
    """Answers with tokens drawn by the request's seed. `num_answers` of them, then it dies."""

    def __init__(self, config: Config, num_answers: int) -> None:
        self.config = config
        self.asked: list[GenerationRequest] = []
        self.most_at_once = 0
        self._at_once = 0
        self._num_answers = num_answers
        self._lock = threading.Lock()

    def completions(self, requests: Sequence[GenerationRequest]) -> Iterator[Completion]:
        (asked,) = requests
        with self._lock:
            self.asked.append(asked)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            dead = len(self.asked) > self._num_answers
        try:
            if dead:
                raise EngineError("target 0 died")
            yield self._answer(asked)
        finally:
            with self._lock:
                self._at_once -= 1

    def _answer(self, asked: GenerationRequest) -> Completion:
        seed, prompt = asked.sampling["seed"], TOKENIZER.decode(asked.prompt)
        assert isinstance(seed, int)
        tokens = np.random.default_rng(seed).integers(100, 125, 20).tolist()  # letters
        if "LOOP" in prompt:
            tokens = [100] * 60
        if "SAME" in prompt:
            tokens = list(range(100, 120))
        answer = (*tokens, TOKENIZER.eos_token_id)
        text = TOKENIZER.decode(tokens)
        return Completion(tokens=answer, finish_reason="stop", text=text)

    def __enter__(self) -> "DistillingEngine":
        return self

    def __exit__(self, *error: object) -> None: ...


Engines = StartedEngines[DistillingEngine]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    engines = Engines(DistillingEngine)
    monkeypatch.setattr(Engine, "start", engines.start)
    return engines


def run(out: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["distill", "tiny-random", "--out", str(out), *options])


@pytest.fixture
def questions(tmp_path: Path) -> str:
    path = tmp_path / "questions.txt"
    path.write_text("".join(f"question {number}\n" for number in range(7)))
    return str(path)


def test_prompts_are_answered_at_every_temperature_with_many_in_flight(
    engines: Engines, questions: str, tmp_path: Path
) -> None:
    result = run(tmp_path / "out", "--prompts", questions, "--temperatures", "0,0.7", "--style", "both")
    assert result.exit_code == 0, result.output
    texts = list(read_texts(tmp_path / "out"))
    assert len({text.id for text in texts}) == len(texts) == 7 * 2 * 2
    by_way = {(text.temperature, text.template) for text in texts}
    assert by_way == {(0.0, True), (0.0, False), (0.7, True), (0.7, False)}
    for text in texts:
        prompt = TOKENIZER.decode(text.prompt_tokens)
        assert prompt.startswith("<|im_start|>user\nquestion" if text.template else "question")
        assert (text.source, text.finish_reason, text.text) == ("questions", "stop", "")
        assert text.output_tokens[-1] == TOKENIZER.eos_token_id
    (engine,) = engines.started
    assert {asked.sampling["temperature"] for asked in engine.asked} == {0.0, 0.7}
    described = load_description(tmp_path / "out")
    assert (described.vocab_size, described.settings["temperatures"]) == (320, [0.0, 0.7])


def test_the_target_writes_prompts_and_answers_them(engines: Engines, tmp_path: Path) -> None:
    beginnings = tmp_path / "beginnings.jsonl"
    beginnings.write_text(json.dumps("Summarize:\n") + "\n")
    raw = tmp_path / "raw.txt"
    raw.write_text("def \n")
    out = tmp_path / "out"
    files = ["--beginnings", str(beginnings), "--raw-beginnings", str(raw)]
    result = run(out, "--free", "3", "--begun", "2", "--raw", "2", *files, "--with-text", "--plain")
    assert result.exit_code == 0, result.output
    texts = {text.id: text for text in read_texts(out)}
    prompts = {text_id: TOKENIZER.decode(text.prompt_tokens) for text_id, text in texts.items()}
    assert sorted(texts) == [
        *(f"begun-{n:07d}" for n in range(2)),
        *(f"free-{n:07d}" for n in range(3)),
        *(f"raw-{n:07d}" for n in range(2)),
    ]
    # What it wrote of the user's turn stands in the prompt of the answer.
    (engine,) = engines.started
    opening = "<|im_start|>user\n"
    openings = [asked for asked in engine.asked if TOKENIZER.decode(asked.prompt) == opening]
    assert [asked.sampling["temperature"] for asked in openings] == [1.0] * 3
    assert all(asked.sampling["stop_token_ids"] == [TOKENIZER.eos_token_id] for asked in openings)
    assert all(asked.draft == {"max_nodes": 0} for asked in engine.asked)
    assert all(len(prompts[f"free-{n:07d}"]) > len(opening) + 20 for n in range(3))
    assert all(prompts[f"begun-{n:07d}"].startswith(f"{opening}Summarize:\n") for n in range(2))
    assert {prompts[f"raw-{n:07d}"] for n in range(2)} == {"def"}
    assert all(text.text == TOKENIZER.decode(text.output_tokens[:-1]) for text in texts.values())
    assert [texts[text_id].template for text_id in sorted(texts)] == [True] * 5 + [False] * 2


def test_a_run_that_died_goes_on_without_writing_a_text_twice(
    engines: Engines, questions: str, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--prompts", questions, "--free", "4"]
    assert run(whole, *options).exit_code == 0
    engines.num_answers = 12
    result = run(cut, *options, "--concurrency", "2")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "Error: target 0 died")
    before = list(read_texts(cut))
    assert before
    last = cut / "texts-00000.jsonl"
    last.write_bytes(last.read_bytes()[:-5])  # killed while it wrote
    engines.num_answers = 10_000
    result = run(cut, *options)
    assert result.exit_code == 0, result.output
    texts = list(read_texts(cut))
    assert texts[: len(before) - 1] == before[:-1]
    assert sorted(texts, key=lambda text: text.id) == sorted(read_texts(whole), key=lambda text: text.id)
    started = len(engines.started)
    assert run(cut, *options).exit_code == 0
    assert len(engines.started) == started  # nothing was left to do
    assert run(cut, *options, "--free", "5").exit_code == 0  # more of the same
    assert len(list(read_texts(cut))) == len(texts) + 1


def test_loops_and_near_duplicates_are_dropped_and_stay_dropped(engines: Engines, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("SAME one\nLOOP\nSAME two\nfine\n")
    options = ["--prompts", str(path), "--temperatures", "1", "--concurrency", "1"]
    result = run(tmp_path / "out", *options)
    assert "2 texts, 42 tokens; dropped: 1 repeats itself, 1 near-duplicate" in result.output
    dropped = read_dropped(tmp_path / "out")
    assert dropped == {
        "prompts-000001-chat-1": "repeats itself",
        "prompts-000002-chat-1": "near-duplicate: of prompts-000000-chat-1",
    }
    assert run(tmp_path / "out", *options).output == result.output
    assert len(engines.started) == 1


def test_a_run_ends_with_the_wanted_tokens(engines: Engines, questions: str, tmp_path: Path) -> None:
    options = ["--prompts", questions, "--concurrency", "1"]
    assert run(tmp_path, *options, "--tokens", "100").exit_code == 0
    assert sum(len(text.output_tokens) for text in read_texts(tmp_path)) == 105
    assert run(tmp_path, *options, "--tokens", "200").exit_code == 0
    assert sum(len(text.output_tokens) for text in read_texts(tmp_path)) == 210


def test_hidden_rows_are_kept_once_their_size_was_said(
    engines: Engines, questions: str, tmp_path: Path
) -> None:
    options = [
        "--prompts",
        questions,
        "--temperatures",
        "1",
        "--keep-hidden",
        "0,2",
        "--hidden-dtype",
        "bfloat16",
    ]
    result = run(tmp_path, *options)
    assert (result.exit_code, engines.started) == (2, [])
    assert "224 tokens x 2 layers x 64 x 2 bytes = 57.3 kB" in result.stderr
    assert "--keep-hidden must come with --yes" in result.stderr
    result = run(tmp_path, *options, "--yes")
    assert result.exit_code == 0, result.output
    files = KeptFiles(tmp_path)
    for text in read_texts(tmp_path):
        assert files.num_rows(text.id) == len(text.tokens)
        rows = files.rows(text.id, (0, 2), len(text.tokens))
        assert {layer: tuple(found.shape) for layer, found in rows.items()} == {
            layer: (len(text.tokens), 64) for layer in (0, 2)
        }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "distill must get at least one of --prompts, --free, --begun and --raw"),
        (["--begun", "3"], "--begun and --beginnings must come together"),
        (["--raw", "3", "--raw-beginnings", "nowhere.txt"], "--raw-beginnings must be a .jsonl or .txt file"),
        (["--free", "3", "--temperatures", "0,hot"], "--temperatures must be numbers"),
        (["--free", "3", "--temperatures", "1,1.0"], "--temperatures must be different ones"),
        (["--free", "3", "--temperatures", "-1"], "sampling.temperature must be"),
        (["--free", "3", "--max-tokens", "5000"], "prompt and sampling.max_tokens must be at most"),
        (["--free", "3", "--keep-hidden", "7"], "--keep-hidden must be medusa, eagle3"),
    ],
)
def test_mistakes_are_found_before_anything_starts(
    engines: Engines, tmp_path: Path, options: list[str], message: str
) -> None:
    result = run(tmp_path / "out", *options)
    assert (result.exit_code, engines.started) == (2, [])
    assert result.stderr.startswith(f"Error: {message}")


def test_a_run_with_other_settings_is_refused(engines: Engines, questions: str, tmp_path: Path) -> None:
    assert run(tmp_path, "--prompts", questions).exit_code == 0
    result = run(tmp_path, "--prompts", questions, "--seed", "1")
    assert result.exit_code == 2
    assert "begun with other settings: seed must be 0, got 1" in result.stderr
