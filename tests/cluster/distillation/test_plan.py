"""Which texts a run asks for: all of them once, mixed, and the same ones every time."""

from dataclasses import replace

import pytest

from outrider.cluster.bench.prompts import Prompt
from outrider.cluster.distillation.plan import Plan, Task
from outrider.cluster.distillation.template import UserTurn, user_turn
from outrider.workers.weights.random_tokenizer import tokenizer_of_size

PLAN = Plan(
    prompts={"questions": [Prompt(str(n), "qa", f"question {n}") for n in range(6)]},
    temperatures=(0.0, 1.0),
    templates=(True, False),
    num_free=8,
    num_begun=6,
    beginnings=[Prompt("0", "", "Summarize"), Prompt("1", "", "Translate")],
    num_raw=2,
    raw_beginnings=[Prompt("0", "", "def")],
)


def test_every_prompt_meets_every_temperature_and_template() -> None:
    tasks = list(PLAN.tasks())
    assert len(tasks) == len({task.id for task in tasks}) == PLAN.num_texts == 24 + 8 + 6 + 2
    answered = {(t.text, t.temperature, t.template) for t in tasks if t.kind == "prompt"}
    assert len(answered) == 24
    assert {task.source for task in tasks} == {"questions", "written"}


def test_beginnings_and_temperatures_take_turns_and_meet() -> None:
    begun = [(task.text, task.temperature) for task in PLAN.tasks() if task.kind == "begun"]
    assert set(begun) == {(text, t) for text in ("Summarize", "Translate") for t in (0.0, 1.0)}
    assert [t.template for t in PLAN.tasks() if t.kind == "raw"] == [False, False]


def test_the_first_half_has_half_of_every_kind() -> None:
    kinds = [task.kind for task in PLAN.tasks()][:20]
    assert {kind: kinds.count(kind) for kind in kinds} == {"prompt": 12, "free": 4, "begun": 3, "raw": 1}


def test_a_larger_run_has_the_tasks_of_a_smaller_one() -> None:
    larger = {task.id: task for task in replace(PLAN, num_free=20, num_begun=9, num_raw=7).tasks()}
    assert all(larger[task.id] == task for task in PLAN.tasks())


def test_seeds_differ_by_text_purpose_and_run() -> None:
    task, other = list(PLAN.tasks())[:2]
    seeds = [task.seed(0, "prompt"), task.seed(0, "answer"), task.seed(1, "answer"), other.seed(0, "answer")]
    assert len(set(seeds)) == 4
    assert task.seed(0, "answer") == Task(**vars(task)).seed(0, "answer")


def test_what_stands_around_a_message_is_read_from_the_template() -> None:
    tokenizer = tokenizer_of_size(300)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}[assistant]"
    tokenizer.chat_template = template
    assert user_turn(tokenizer) == UserTurn(
        "[user]", f"{tokenizer.eos_token}[assistant]", tokenizer.eos_token_id
    )
    tokenizer.chat_template = template.replace("{{ eos_token }}", " [/user] ")
    assert user_turn(tokenizer) == UserTurn("[user]", "[/user] [assistant]", -1)
    tokenizer.chat_template = "nothing"
    with pytest.raises(ValueError, match="holds a user's message once"):
        user_turn(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="must have a chat template for --free and --begun"):
        user_turn(tokenizer)
