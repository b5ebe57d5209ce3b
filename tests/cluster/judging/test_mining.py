"""Mining with tiny models: each mismatch is tried, and what does no harm stays in the text."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from outrider.cluster.api import EngineError, GenerationRequest
from outrider.cluster.judging.mining import DraftModelChooser, Miner, Yield, mine, recall
from outrider.workers.answer import Completion
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.judges.labels import (
    MINED,
    READ,
    LabelledText,
    LabelWriter,
    iter_labels,
    match_rate,
)
from outrider.workers.training.judges.sandbox import Limits, Sandbox
from outrider.workers.training.judges.tasks import Coding, Task, WordProblem
from outrider.workers.training.lines import Description, read_dropped
from outrider.workers.weights.random_tokenizer import tokenizer_of_size
from outrider.workers.weights.resolver import open_source
from support.tiny import VOCAB_SIZE, tiny_drafter, tiny_target

TOKENIZER = tokenizer_of_size(VOCAB_SIZE)
LENGTH = 10
END = TOKENIZER.eos_token_id


class GreedyEngine:
    """The tiny target, greedily; it ends a text at its tenth token."""

    def __init__(self) -> None:
        source = open_source(tiny_target())
        self.model = TargetFeatures(source, (source.config.num_layers,), torch.float32, 1)
        self._lock = threading.Lock()
        self.num_left = 10_000
        self.prompts: list[tuple[int, ...]] = []

    def completions(self, requests: Sequence[GenerationRequest]) -> Iterator[Completion]:
        with self._lock:
            yield from map(self._answer, requests)

    def _answer(self, asked: GenerationRequest) -> Completion:
        self.num_left -= 1
        if self.num_left < 0:
            raise EngineError("target 0 died")
        prompt = tuple(token for token in asked.prompt if isinstance(token, int))
        self.prompts.append(prompt)
        return Completion(tokens=(*self.go_on(prompt), END), finish_reason="stop")

    def go_on(self, prompt: Sequence[int]) -> list[int]:
        tokens, begin = list(prompt), prompt_length(prompt)
        while len(tokens) - begin < LENGTH:
            (rows,) = self.model.rows([tokens])
            last = rows[self.model.layers[0]][-1:]
            tokens.append(int(self.model.model.logits(last)[0, :300].argmax()))
        return tokens[len(prompt) :]


def prompt_length(tokens: Sequence[int]) -> int:
    """Up to the answer: the template ends with a line's end behind its last special token."""
    text = TOKENIZER.decode(tokens)
    head = text[: text.rindex("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")]
    return len(TOKENIZER.encode(head, add_special_tokens=False))


def parity(answer: str) -> str:
    return str(sum(answer.encode()) % 2)


@dataclass(frozen=True)
class Parity(Task):
    """Whether its bytes come to an even number matters."""

    def outcome(self, answer: str) -> str:
        return "" if "LOST" in self.prompt else parity(answer)

    def is_right(self, outcome: str) -> bool:
        return True


def tasks(*prompts: str) -> list[Task]:
    return [Parity(f"t/{number}", "tiny", prompt) for number, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def chooser() -> DraftModelChooser:
    source = open_source(tiny_drafter())
    return DraftModelChooser(TargetFeatures(source, (source.config.num_layers,), torch.float32, 1), 300)


@pytest.fixture
def engine() -> GreedyEngine:
    return GreedyEngine()


def miner(engine: GreedyEngine, chooser: DraftModelChooser, most: int = 64) -> Miner:
    return Miner(engine, chooser, TOKENIZER, frozenset({END}), 100, most)


def mined(of: Miner, task: Task) -> list[LabelledText]:
    texts: list[LabelledText] = []
    assert of.mine(task, texts.append) == ""
    return texts


def test_each_mismatch_is_tried_behind_those_that_did_no_harm(
    engine: GreedyEngine, chooser: DraftModelChooser
) -> None:
    (task,) = tasks("a question of some length")
    found = mined(miner(engine, chooser), task)
    *mismatches, read = found
    assert (read.kind, {text.kind for text in mismatches}) == (READ, {MINED})
    assert {text.labels[-1] for text in mismatches} == {"g", "b"}
    prompt = read.prompt_tokens
    current, begin = [*engine.go_on(prompt), END], 0
    wanted = parity(TOKENIZER.decode(current, skip_special_tokens=True))
    for text in mismatches:
        choices = chooser.choices(prompt, current)
        place = next(i for i in range(begin, len(current)) if current[i] != choices[i])
        assert text.output_tokens == (*current[:place], choices[place])
        assert text.labels[:-1] == "." * place
        whole = [*text.output_tokens]
        if whole[-1] != END:
            whole += [*engine.go_on([*prompt, *whole]), END]
        is_harmless = parity(TOKENIZER.decode(whole, skip_special_tokens=True)) == wanted
        assert text.labels[-1] == ("g" if is_harmless else "b")
        begin = place + 1
        current = whole if is_harmless else current
    assert list(read.output_tokens) == current
    assert match_rate(found) == 1 - len(mismatches) / len(current)


def test_only_so_many_are_tried_and_only_what_was_read_counts(
    engine: GreedyEngine, chooser: DraftModelChooser
) -> None:
    (task,) = tasks("a question of some length")
    one, read = mined(miner(engine, chooser, 1), task)
    assert len(read.output_tokens) == len(one.output_tokens)


def test_what_comes_to_nothing_is_dropped(engine: GreedyEngine, chooser: DraftModelChooser) -> None:
    (task,) = tasks("LOST")
    texts: list[LabelledText] = []
    assert miner(engine, chooser).mine(task, texts.append) == "answer without a result"
    assert texts == []


def test_mining_that_died_goes_on_and_finds_the_same(
    engine: GreedyEngine, chooser: DraftModelChooser, tmp_path: Path
) -> None:
    all_tasks = tasks("one", "LOST", "two", "three")
    described = Description("m", 300, "t", {}, "0")

    def run(folder: Path) -> Yield:
        found = Yield(len(all_tasks))
        shown: list[float] = []
        with LabelWriter(folder, described) as writer:
            done = recall(folder, found)
            todo = [task for task in all_tasks if task.id not in done]
            work = miner(engine, chooser).mine
            mine(todo, work, writer, found, 2, lambda: shown.append(found.fraction))
        assert shown == sorted(shown)
        return found

    whole = run(tmp_path / "whole")
    assert (whole.num_done, whole.num_dropped, whole.fraction) == (3, {"answer without a result": 1}, 1.0)
    assert "3 of 4 tasks" in whole.summary()
    engine.num_left = 2 * len(engine.prompts) // 3
    with pytest.raises(EngineError):
        run(tmp_path / "cut")
    path = tmp_path / "cut" / "labels-00000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:-9])  # killed while it wrote the last text of a task
    engine.num_left = 10_000
    again = run(tmp_path / "cut")
    assert (again.num_done, again.num_harmful, again.num_harmless) == (
        whole.num_done,
        whole.num_harmful,
        whole.num_harmless,
    )
    expected = {text.id: text for text in iter_labels(tmp_path / "whole")}
    assert {text.id: text for text in iter_labels(tmp_path / "cut")} == expected
    assert read_dropped(tmp_path / "cut") == {"t/1": "answer without a result"}
    asked = len(engine.prompts)
    run(tmp_path / "cut")
    assert len(engine.prompts) == asked


def token_of(letter: str) -> int:
    (token,) = TOKENIZER.encode(letter, add_special_tokens=False)
    return int(token)


class ToldEngine:
    """Goes on as it is told: answers by the text so far, each with its end."""

    def __init__(self, answers: Mapping[str, str]) -> None:
        self.answers = answers

    def completions(self, requests: Sequence[GenerationRequest]) -> Iterator[Completion]:
        for asked in requests:
            prompt = [token for token in asked.prompt if isinstance(token, int)]
            said = TOKENIZER.decode(prompt[prompt_length(prompt) :], skip_special_tokens=True)
            tokens = TOKENIZER.encode(self.answers[said], add_special_tokens=False)
            yield Completion(tokens=(*tokens, END), finish_reason="stop")


class ToldChooser:
    """Says what the target said but at one place."""

    def __init__(self, place: int, token: int) -> None:
        self.place, self.token = place, token

    def choices(self, prompt: Sequence[int], output: Sequence[int]) -> Sequence[int]:
        return [self.token if place == self.place else token for place, token in enumerate(output)]


@pytest.mark.parametrize(
    ("answer", "place", "says", "goes_on", "label"),
    [
        ("ab 7", 2, "", {}, "b"),  # ends before the result
        ("is 7.", 4, "", {}, "g"),  # ends without the full stop
        ("is 7", 4, "0", {"is 70": "!"}, "b"),  # goes on where the target ends: another number
        ("is 7", 4, ".", {"is 7.": " So."}, "g"),  # says more, which changes nothing
    ],
)
def test_a_text_that_ends_sooner_or_later_is_a_mismatch_as_any_other(
    answer: str, place: int, says: str, goes_on: dict[str, str], label: str
) -> None:
    task = WordProblem("t", "gsm8k", "how many", "7")
    engine = ToldEngine({"": answer, **goes_on})
    token = token_of(says) if says else END
    own = Miner(engine, ToldChooser(place, token), TOKENIZER, frozenset({END}), 100, 1)
    mismatch, _ = mined(own, task)
    assert (len(mismatch.output_tokens), mismatch.output_tokens[-1]) == (place + 1, token)
    assert mismatch.labels[-1] == label


def test_labels_of_programs_come_from_their_tests_in_the_sandbox() -> None:
    """Twice x: a sum instead of the product does no harm, a difference does."""
    sandbox = Sandbox.open(Limits())
    code = "def twice(x):\n    return x * 2"
    task = Coding("t", "code", "double it", "twice", "", "assert twice(3) == 6", code, sandbox)
    beginning = code[: code.index("*")]
    place = len(TOKENIZER.encode(beginning, add_special_tokens=False))
    for sign, rest, label in (("+", " x", "g"), ("-", " 2", "b")):
        engine = ToldEngine({"": code, beginning + sign: rest})
        own = Miner(engine, ToldChooser(place, token_of(sign)), TOKENIZER, frozenset({END}), 100, 1)
        mismatch, _ = mined(own, task)
        assert mismatch.labels[-1] == label
