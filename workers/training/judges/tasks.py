"""Tasks whose answers a machine can check: word problems by their number, programs by their tests."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from outrider.workers.training.judges.sandbox import Sandbox
from outrider.workers.training.lines import read_objects

Item = TypeVar("Item")
PASSED, FAILED = "passed", "failed"
INSTRUCTION = "Think step by step. End with: The answer is N."
"""What stands below the question of a word problem, unless another text is given."""

_ANSWER = re.compile(r"(?:answer is|answer:|####)\D{0,20}?(-?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{\D{0,10}?(-?\d[\d,]*(?:\.\d+)?)")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BLOCK = re.compile(r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_COMPLETE = "Complete this Python function. Answer with the complete function.\n```python\n{code}```"
_WRITE = "{text}\nAnswer with a complete Python program that passes this test:\n```python\n{test}\n```"


@dataclass(frozen=True)
class Task(ABC):
    """Something to answer.

    Attributes:
        id: unique in its file.
        domain: kind of task.
        prompt: the user's message.
    """

    id: str
    domain: str
    prompt: str

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}]

    @abstractmethod
    def outcome(self, answer: str) -> str:
        """What an answer comes to; answers of the same outcome are worth the same. Empty: to nothing."""

    @abstractmethod
    def is_right(self, outcome: str) -> bool:
        """Whether that is what was asked for."""


@dataclass(frozen=True)
class WordProblem(Task):
    """A question with a number for an answer.

    Attributes:
        result: the right number, as `number_of` writes it.
    """

    result: str

    def outcome(self, answer: str) -> str:
        return number_of(answer)

    def is_right(self, outcome: str) -> bool:
        return outcome == self.result


@dataclass(frozen=True)
class Coding(Task):
    """A function to write.

    Attributes:
        entry: its name.
        before: code that stands before the answer's.
        test: code that fails where the function is wrong.
        solution: code that passes.
        sandbox: where it is tried.
    """

    entry: str
    before: str
    test: str
    solution: str
    sandbox: Sandbox

    def outcome(self, answer: str) -> str:
        return PASSED if self.passes(code_of(answer, self.entry)) else FAILED

    def is_right(self, outcome: str) -> bool:
        return outcome == PASSED

    def passes(self, code: str) -> bool:
        """Whether a program stands the tests, by running it."""
        return self.sandbox.run(f"{self.before}\n{code}\n\n{self.test}\n").passed


def number_of(answer: str) -> str:
    """The number that an answer ends with: the one it calls its answer, else its last; as "-1.5" or "12000"."""
    for pattern in (_ANSWER, _BOXED):
        found = pattern.findall(answer)
        if found:
            return _plain(found[-1])
    numbers = _NUMBER.findall(answer)
    return _plain(numbers[-1]) if numbers else ""


def _plain(number: str) -> str:
    digits = number.replace(",", "")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    sign = "-" if digits.startswith("-") else ""
    return sign + (digits.lstrip("-").lstrip("0") or "0")


def code_of(answer: str, entry: str) -> str:
    """The code of an answer: of its blocks the first with the function, else the last one, else all of it."""
    blocks: list[str] = _BLOCK.findall(answer)
    for block in blocks:
        if re.search(rf"^def {re.escape(entry)}\b", block, re.MULTILINE):
            return block
    return blocks[-1] if blocks else answer


def read_tasks(path: Path, sandbox: Sandbox | None, instruction: str = INSTRUCTION) -> list[Task]:
    """Tasks of a .jsonl file in the form of GSM8K (`question`, `answer`), HumanEval (`prompt`, `entry_point`, `test`)
    or MBPP (`text`, `code`, `test_list`).

    Args:
        sandbox: needed for code.
        instruction: below the question of a word problem.

    Raises:
        ValueError: naming file, line and field.
    """
    if not path.is_file():
        raise ValueError(f"--tasks must be a .jsonl file, got {str(path)!r} (no such file)")
    tasks = [
        _task(row, f"{path}, line {number}", f"{path.stem}/{number}", sandbox, instruction)
        for number, row in read_objects(path)
    ]
    if not tasks:
        raise ValueError(f"{path} holds no tasks")
    return tasks


def spread(items: Sequence[Item], limit: int) -> Sequence[Item]:
    """At most `limit` of them (0: all), evenly spaced."""
    if not limit or limit >= len(items):
        return items
    return [items[index * len(items) // limit] for index in range(limit)]


def has_code(path: Path) -> bool:
    """Whether a file's tasks need a sandbox."""
    return path.is_file() and any("question" not in row for _, row in read_objects(path))


def _task(row: Mapping[str, Any], where: str, name: str, sandbox: Sandbox | None, instruction: str) -> Task:
    def text(field: str) -> str:
        if not isinstance(row.get(field), str):
            raise ValueError(f"{where}: {field} must be a text, got {row.get(field)!r}")
        return str(row[field])

    if "question" in row:
        answer = text("answer")
        if "####" not in answer:
            raise ValueError(f"{where}: answer must end with #### and a number, got {answer[-40:]!r}")
        result = number_of(answer[answer.rindex("####") :])
        return WordProblem(name, "gsm8k", f"{text('question')}\n{instruction}", result)
    assert sandbox is not None, "a file with code comes with a sandbox"
    if "entry_point" in row:
        code, entry = text("prompt"), text("entry_point")
        return Coding(
            id=str(row.get("task_id", name)),
            domain="code",
            prompt=_COMPLETE.format(code=code),
            entry=entry,
            before=code,
            test=f"{text('test')}\ncheck({entry})",
            solution=code + text("canonical_solution"),
            sandbox=sandbox,
        )
    if "test_list" in row:
        tests = row["test_list"]
        if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
            raise ValueError(f"{where}: test_list must be a list of texts, got {tests!r}")
        functions = re.findall(r"^def (\w+)", text("code"), re.MULTILINE)
        called = [name for name in functions if re.search(rf"\b{name}\(", tests[0])]
        return Coding(
            id=f"mbpp/{row.get('task_id', name)}",
            domain="code",
            prompt=_WRITE.format(text=text("text"), test=tests[0]),
            entry=called[-1] if called else "",
            before=str(row.get("test_setup_code", "")),
            test="\n".join(tests),
            solution=text("code").replace("\r\n", "\n").replace("\t", "    "),
            sandbox=sandbox,
        )
    raise ValueError(
        f"{where}: must have question and answer, or prompt, entry_point and test, or text, code and test_list; has "
        f"{', '.join(row) or 'none'}"
    )
