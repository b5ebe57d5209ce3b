"""Records made of right solutions: what is called a mistake changes a value or fails tests, what is not does not."""

import random
import re
from fractions import Fraction

import pytest

from outrider.workers.training.judges.arithmetic import (
    arithmetic_records,
    mistakes,
    read_solution,
    value_of,
    variations,
)
from outrider.workers.training.judges.mutations import Program
from outrider.workers.training.judges.programs import answer_with, program_records
from outrider.workers.training.judges.sandbox import Limits, Sandbox
from outrider.workers.training.judges.tasks import Coding, code_of

QUESTION = "Tom has 3 bags of 14 apples and Ann has 1000 apples. How many apples have Tom and Ann altogether?"
ANSWER = (
    "Tom has 3 * 14 = <<3*14=42>>42 apples.\nHalf of them are 42/2 = <<42/2=21>>21.\n"
    "Altogether there are 42 + 1000 = $<<42+1000=1042>>1042 apples.\n#### 1042"
)
EXPRESSION = re.compile(r"([\d.$][-+*/() \d.$]*?) = \$?([\d,]+)")


def steps_hold(text: str) -> bool:
    """Whether each step that a text shows is right."""
    found = EXPRESSION.findall(text)
    assert len(found) == 3
    return all(value_of(one) == Fraction(other.replace(",", "")) for one, other in found)


def test_a_solution_is_read_with_its_steps() -> None:
    solution = read_solution(ANSWER)
    assert solution is not None
    shown = [
        (solution.text[s.start : s.end], solution.text[s.result_start : s.result_end]) for s in solution.steps
    ]
    assert shown == [("3 * 14", "42"), ("42/2", "21"), ("42 + 1000", "1042")]
    assert solution.text.endswith("1042 apples.\nThe answer is 1042.")
    assert solution.text[solution.result_start :] == "1042."
    assert read_solution("no result") is None


def test_values_are_exact_and_of_numbers_alone() -> None:
    assert value_of("$1.1 + 2.2") == Fraction("3.3")
    assert value_of("2*(3 - 5)/4") == -1
    for text in ("1/0", "2**9999999", "x + 1", "__import__('os')", "1 +"):
        assert value_of(text) is None


def test_every_mistake_is_one_and_every_variation_is_none() -> None:
    solution = read_solution(ANSWER)
    assert solution is not None
    kinds = set()
    for edit in mistakes(solution, QUESTION, random.Random(0)):
        changed = edit.apply(solution.text)
        kinds.add(edit.kind)
        assert changed != solution.text
        if edit.kind in ("operator", "number", "result"):
            assert not steps_hold(changed), changed
        elif edit.kind == "answer":
            assert not changed.endswith("The answer is 1042.")
    assert kinds == {"operator", "number", "result", "answer", "name"}
    kinds = set()
    for edit in variations(solution):
        changed = edit.apply(solution.text)
        kinds.add(edit.kind)
        if edit.kind in ("reordered", "thousands"):
            assert steps_hold(changed), changed
        assert re.search(r"1042\.?$", changed)
    assert kinds == {"reordered", "route", "thousands", "reworded", "ending"}


def test_records_of_a_problem_mark_what_was_changed() -> None:
    records = arithmetic_records("train/1", QUESTION, ANSWER, 5, 4, 0)
    assert len({record.id for record in records}) == len(records) == 1 + 5 + 4
    assert {record.group for record in records} == {"gsm8k/train/1"}
    for record in records:
        if record.wrong is not None:
            start, end = record.mistake()
            assert record.wrong[:start] == record.right[:start]
            assert record.wrong[start:end] != record.right[start:end]
    assert records == arithmetic_records("train/1", QUESTION, ANSWER, 5, 4, 0)
    assert records != arithmetic_records("train/1", QUESTION, ANSWER, 5, 4, 1)


CODE = '''
def clip(values, low, high):
    """Those in reach (é)."""
    total = 0
    for value in values:
        if value >= low and value < high:
            total += value * 2
    return total + 1
'''
TEST = "assert clip([1, 5, 9, 10], 5, 10) == 29\nassert clip([], 1, 2) == 1"


@pytest.fixture(scope="module")
def task() -> Coding:
    sandbox = Sandbox.open(Limits(time_s=10))
    return Coding("clip", "code", "Write clip.", "clip", "", TEST, CODE, sandbox)


def passes(code: str) -> bool:
    """By another way than the sandbox: this code is ours."""
    try:
        exec(f"{code}\n{TEST}", {})
    except Exception:
        return False
    return True


def test_faults_and_variations_of_a_program_are_as_many_kinds_as_there_are() -> None:
    program = Program(CODE)
    faults = list(program.faults())
    assert {edit.kind for edit in faults} == {"operator", "off by one", "negated", "variable"}
    marked = {
        edit.apply(CODE)[edit.start : edit.start + (edit.num_marked or len(edit.text))] for edit in faults
    }
    assert {">", "<", "or", "+", "not (", "high", "1", "-"} <= marked
    found = {variation.kind: variation.code for variation in program.variations()}
    assert set(found) == {"renamed", "reordered", "turned round", "written out"}
    assert "total = total + (value * 2)" in found["written out"]
    with pytest.raises(ValueError, match="not Python"):
        Program("def f(:")


def test_records_of_programs_are_checked_by_running_them(task: Coding) -> None:
    records = program_records(task, 5, 4, 0, 1)
    assert [record.kind for record in records].count("as written") == 1
    assert len(records) == 1 + 5 + 4
    for record in records:
        assert passes(code_of(record.right, "clip"))
        if record.wrong is not None:
            assert not passes(code_of(record.wrong, "clip"))
            start, end = record.mistake()
            assert record.wrong[start:end].strip()
    assert records[0].right == answer_with(CODE)


def test_of_a_program_that_fails_itself_there_are_no_records(task: Coding) -> None:
    broken = Coding("x", "code", "Write.", "clip", "", TEST, CODE.replace("+ 1", "+ 2"), task.sandbox)
    assert program_records(broken, 5, 4, 0, 1) == []
