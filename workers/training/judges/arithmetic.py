"""Records from solutions of word problems in the form of GSM8K: mistakes of several kinds, and right variations.

GSM8K (openai/grade-school-math) notes each step as `<<48/2=24>>24`; the notes say what was computed, so that a change
can be checked: a mistake changes the value of its step, another route to it does not.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from outrider.workers.training.judges.edits import Edit, mistake_record, of_all_kinds, right_record
from outrider.workers.training.judges.records import SpanRecord

DOMAIN = "gsm8k"

_NOTE = re.compile(r"<<([^<>=]+)=([^<>]+)>>")
_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_EXPRESSION = re.compile(r"[\d.$][-+*/()\d.$\s]*=\s*\$?$")
_NAME = re.compile(r"\b[A-Z][a-z]{2,}\b")
_CAPITALISED = """
The How What When Where Which Who Why Each Every After Before They She His Her Its Their This That There
These Those Then Thus Hence Therefore Since Because And But For From With Out Over Total Altogether Finally
First Second Third One Two Three Four Five Six Seven Eight Nine Ten Half Twice All Both Some Now Next Today
Yesterday Tomorrow Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May
June July August September October November December While During Not Only Also Answer Let You Your
Calculate Find Given Additionally However Later Once Another Other Everyone Currently Suppose
"""
_NO_NAMES = frozenset(_CAPITALISED.split())
_OTHER_NAMES = ("Robert", "Maria", "Kevin", "Susan")
_WORDS = {
    "more": "fewer",
    "less": "more",
    "fewer": "more",
    "hours": "minutes",
    "minutes": "hours",
    "days": "weeks",
    "weeks": "days",
    "months": "years",
    "years": "months",
    "dollars": "cents",
    "cents": "dollars",
    "twice": "half",
    "half": "twice",
    "left": "added",
    "remaining": "missing",
    "miles": "feet",
    "feet": "inches",
    "pounds": "ounces",
    "first": "last",
    "per": "minus",
    "boys": "girls",
    "girls": "boys",
    "bought": "sold",
    "sold": "bought",
    "earns": "loses",
    "spent": "earned",
    "spends": "earns",
}
_REWORDED = (
    ("altogether", "in total"),
    ("in total", "altogether"),
    ("So, ", "Therefore, "),
    ("So ", "Hence "),
    ("Thus, ", "So, "),
    ("Therefore, ", "So, "),
    ("a total of ", "altogether "),
    ("The total ", "The overall "),
    ("There are ", "We have "),
    ("there are ", "we have "),
    ("also ", "likewise "),
    ("each week", "every week"),
    ("each day", "every day"),
    ("per day", "a day"),
    ("per week", "a week"),
    ("needs to ", "has to "),
    ("will have ", "has "),
    ("children", "kids"),
    ("kids", "children"),
    ("big", "large"),
)
_ENDINGS = ("So the answer is {}.", "Therefore, the answer is {}.", "Answer: {}", "The final answer is {}.")
_OPERATORS = {"+": "-*", "-": "+", "*": "+/", "/": "*-"}


@dataclass(frozen=True)
class Step:
    """A computation that a solution shows: characters of its expression and of its result, and its value."""

    start: int
    end: int
    result_start: int
    result_end: int
    value: Fraction


@dataclass(frozen=True)
class Solution:
    """Text without notes, its steps and its result, with the characters of the latter."""

    text: str
    steps: tuple[Step, ...]
    result: str
    result_start: int


def read_solution(answer: str) -> Solution | None:
    """Of a GSM8K answer; None for one whose notes are not in its form."""
    body, mark, result = answer.partition("\n#### ")
    result = result.strip()
    if not mark or not result:
        return None
    text, steps, end = "", [], 0
    for note in _NOTE.finditer(body):
        text += body[end : note.start()]
        end = note.end()
        shown = _EXPRESSION.search(text)
        number = _NUMBER.match(body, end)
        value = value_of(note[1])
        if shown is None or number is None or value is None:
            continue
        expression = text[shown.start() :].rstrip("$ ").rstrip("=").rstrip()
        if value_of(expression) == value == Fraction(number[0]):
            first = shown.start()
            steps.append(Step(first, first + len(expression), len(text), len(text) + len(number[0]), value))
    text += body[end:]
    beginning = f"{text.strip()}\nThe answer is "
    lead = len(text) - len(text.lstrip())
    moved = tuple(
        Step(s.start - lead, s.end - lead, s.result_start - lead, s.result_end - lead, s.value) for s in steps
    )
    return Solution(f"{beginning}{result}.", moved, result, len(beginning))


def value_of(expression: str) -> Fraction | None:
    """Of sums, differences, products and quotients of numbers, exactly; None for anything else."""
    try:
        tree = ast.parse(expression.replace("$", "").strip(), mode="eval")
        return _value(tree.body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left) + _value(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _value(left) - _value(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left) * _value(right)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _value(left) / _value(right)
        case _:
            raise ValueError


def arithmetic_records(
    problem: str, question: str, answer: str, most_wrong: int, most_right: int, seed: int
) -> list[SpanRecord]:
    """Records of one problem: the answer itself, mistakes in it and right variations of it."""
    solution = read_solution(answer)
    if solution is None:
        return []
    generator = random.Random(f"{seed}/{problem}")
    text = solution.text
    wrong = of_all_kinds(list(mistakes(solution, question, generator)), most_wrong, generator)
    right = of_all_kinds(
        [edit for edit in variations(solution) if edit.apply(text) != text], most_right, generator
    )
    records = [right_record(problem, DOMAIN, question, text, "as written", 0)]
    for number, edit in enumerate(wrong, start=1):
        records.append(mistake_record(problem, DOMAIN, question, text, edit, number))
    for number, edit in enumerate(right, start=len(records)):
        records.append(right_record(problem, DOMAIN, question, edit.apply(text), edit.kind, number))
    return records


def mistakes(solution: Solution, question: str, generator: random.Random) -> Iterator[Edit]:
    """Wrong operators, numbers copied wrong, wrong results of steps, a wrong answer, wrong words and names."""
    text = solution.text
    asked = sorted({found[0] for found in _NUMBER.finditer(question)})
    for step in solution.steps:
        expression = text[step.start : step.end]
        for place, character in enumerate(expression):
            for other in _OPERATORS.get(character, ""):
                changed = expression[:place] + other + expression[place + 1 :]
                if place and value_of(changed) not in (None, step.value):
                    yield Edit("operator", step.start + place, step.start + place + 1, other)
        for number in _NUMBER.finditer(expression):
            others = [*asked, _misread(number[0], generator)]
            other = generator.choice([n for n in others if n != number[0]] or [f"{number[0]}0"])
            changed = expression[: number.start()] + other + expression[number.end() :]
            if value_of(changed) not in (None, step.value):
                yield Edit("number", step.start + number.start(), step.start + number.end(), other)
        result = text[step.result_start : step.result_end]
        yield Edit("result", step.result_start, step.result_end, _misread(result, generator))
    whole = solution.result_start, solution.result_start + len(solution.result)
    yield Edit("answer", *whole, _misread(solution.result, generator))
    before = text[: solution.result_start]
    for word in re.finditer(r"\b[a-z]+\b", before):
        if word[0] in _WORDS:
            yield Edit("word", word.start(), word.end(), _WORDS[word[0]])
    names = sorted({name for name in _NAME.findall(question) if name not in _NO_NAMES})
    for word in _NAME.finditer(before):
        if word[0] in names:
            others = [name for name in names if name != word[0]] or list(_OTHER_NAMES)
            yield Edit("name", word.start(), word.end(), generator.choice(others))


def _misread(number: str, generator: random.Random) -> str:
    """A number near this one, or with a digit changed or two swapped; another one than it."""
    digits = [place for place, character in enumerate(number) if character.isdigit()]
    choices = set()
    for place in digits:
        digit = int(number[place])
        for other in (digit + 1, digit - 1, generator.randrange(10)):
            if 0 <= other <= 9 and (other or place or len(number) == 1):
                choices.add(number[:place] + str(other) + number[place + 1 :])
    for one, two in pairwise(digits):
        if number[two] != "0" or one:
            swapped = list(number)
            swapped[one], swapped[two] = swapped[two], swapped[one]
            choices.add("".join(swapped))
    choices.add(f"{number}0")
    return generator.choice(sorted(choices - {number}))


def variations(solution: Solution) -> Iterator[Edit]:
    """Operands in another order, other routes to the same value (other digits), thousands marked, other words."""
    text = solution.text
    for step in solution.steps:
        expression = text[step.start : step.end]
        for kind, other in _other_routes(expression):
            if other != expression and value_of(other) == step.value:
                yield Edit(kind, step.start, step.end, other)
        result = text[step.result_start : step.result_end]
        if result.isdecimal() and int(result) >= 1000:
            yield Edit("thousands", step.result_start, step.result_end, f"{int(result):,}")
    for phrase, other in _REWORDED:
        place = text.find(phrase)
        if 0 <= place < solution.result_start:
            yield Edit("reworded", place, place + len(phrase), other)
    start = text.rindex("The answer is ")
    for ending in _ENDINGS:
        yield Edit("ending", start, len(text), ending.format(solution.result))


def _other_routes(expression: str) -> Iterator[tuple[str, str]]:
    """(kind, expression), not checked."""
    for operator in "+*":
        parts = [part.strip() for part in expression.split(operator)]
        if len(parts) > 1 and not set("+-*/()") & set("".join(parts)):
            space = " " if f" {operator} " in expression else ""
            joint = f"{space}{operator}{space}"
            yield "reordered", joint.join(reversed(parts))
            if len(parts) > 2:
                yield "reordered", joint.join([*parts[1:], parts[0]])
            if operator == "+" and len(parts) > 2:
                yield "route", f"({parts[0]}{joint}{parts[1]}){joint}{joint.join(parts[2:])}"
    match = re.fullmatch(r"(\$?)([\d.]+)(\s*)([*/])\s*([\d.]+)", expression)
    if match is None:
        return
    money, one, space, operator, two = match.groups()
    if operator == "*":
        if two in ("2", "3"):
            yield "route", f"{space}+{space}".join([money + one] * int(two))
        if two.isdecimal() and int(two) > 3:
            for factor in (2, 3, 5):
                if int(two) % factor == 0 and int(two) > factor:
                    yield "route", f"{money}{one}{space}*{space}{factor}{space}*{space}{int(two) // factor}"
        if two.isdecimal() and int(two) > 10:
            tens, rest = divmod(int(two), 10)
            if rest:
                product = f"{money}{one}{space}*{space}"
                yield "route", f"{product}{tens * 10}{space}+{space}{product}{rest}"
    elif two in ("2", "4", "5", "10"):
        share = {"2": "0.5", "4": "0.25", "5": "0.2", "10": "0.1"}[two]
        yield "route", f"{money}{one}{space}*{space}{share}"
        yield "route", f"{share}{space}*{space}{money}{one}"
        if two == "4":
            yield "route", f"{money}{one}{space}/{space}2{space}/{space}2"
