"""Tasks as files, and what answers to them come to."""

import json
from pathlib import Path
from typing import Any

import pytest

from outrider.workers.training.judges.sandbox import Limits, Sandbox
from outrider.workers.training.judges.tasks import (
    FAILED,
    PASSED,
    Coding,
    code_of,
    has_code,
    number_of,
    read_tasks,
    spread,
)

GSM8K = {"question": "How many?", "answer": "3 * 4 = <<3*4=12>>12\n#### 1,012"}
HUMANEVAL = {
    "task_id": "H/0",
    "prompt": "def inc(x):\n    '''One more.'''\n",
    "entry_point": "inc",
    "canonical_solution": "    return x + 1\n",
    "test": "def check(f):\n    assert f(1) == 2\n",
}
MBPP = {
    "task_id": 7,
    "text": "Write inc.",
    "code": "def inc(x):\r\n\treturn x + 1",
    "test_list": ["assert inc(1) == 2"],
    "test_setup_code": "",
}


def written(folder: Path, *rows: object) -> Path:
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("First 3, then 4.\nThe answer is 12.", "12"),
        ("The answer is: **$1,200.50** for 3 days.", "1200.5"),
        (r"So \boxed{42} of 50", "42"),
        ("#### -7", "-7"),
        ("It makes 5 and 06.0", "6"),
        ("The answer is 12. Check: 3 * 4 = 12, so the answer is 13.", "13"),
        ("none", ""),
    ],
)
def test_the_number_of_an_answer(answer: str, number: str) -> None:
    assert number_of(answer) == number


def test_the_code_of_an_answer() -> None:
    answer = "So:\n```python\nx = 1\n```\nand\n```python\ndef inc(x):\n    return x\n```\nor\n```\ny\n```"
    assert code_of(answer, "inc") == "def inc(x):\n    return x\n"
    assert code_of(answer, "dec") == "y\n"
    assert code_of("```py\ncut o", "inc") == "cut o"
    assert code_of("def inc(x): ...", "inc") == "def inc(x): ..."


def test_tasks_of_all_forms_know_right_answers(tmp_path: Path) -> None:
    sandbox = Sandbox.open(Limits())
    path = written(tmp_path, GSM8K, HUMANEVAL, MBPP)
    assert has_code(path)
    words, human, mbpp = read_tasks(path, sandbox)
    assert (words.id, words.domain) == ("tasks/1", "gsm8k")
    assert words.prompt.endswith("The answer is N.")
    assert read_tasks(path, sandbox, "Be brief.")[0].prompt.endswith("\nBe brief.")
    assert words.is_right(words.outcome("The answer is 1012."))
    assert not words.is_right(words.outcome("The answer is 1013."))
    for task in (human, mbpp):
        assert isinstance(task, Coding)
        assert task.passes(task.solution)
        assert task.outcome("```python\ndef inc(x):\n    return 1 + x\n```") == PASSED
        assert task.outcome("```python\ndef inc(x):\n    return x\n```") == FAILED
    assert "assert inc(1) == 2" in mbpp.prompt
    assert not has_code(written(tmp_path, GSM8K))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x"}, "line 2: answer must be a text, got None"),
        ({"question": "x", "answer": "12"}, "line 2: answer must end with #### and a number"),
        ({"text": "x", "code": "y", "test_list": []}, "line 2: test_list must be a list of texts"),
        ({"what": 1}, "line 2: must have question and answer, or"),
    ],
)
def test_a_mistake_names_line_and_field(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("#", "#")):
        read_tasks(written(tmp_path, GSM8K, row), Sandbox("audit", Limits()))


def test_a_part_is_spread_over_the_whole() -> None:
    assert spread(range(10), 5) == [0, 2, 4, 6, 8]
    assert list(spread(range(3), 0)) == [0, 1, 2]
