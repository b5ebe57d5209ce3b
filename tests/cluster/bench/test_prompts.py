import json
from pathlib import Path
from typing import Any

import pytest

from outrider.cluster.bench.prompts import Prompt, encode, load_prompts, select


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def test_spec_bench_rows_give_their_first_turn(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "spec_bench.jsonl",
        [{"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}],
    )
    assert load_prompts(path) == [Prompt("spec_bench/81", "writing", "Write.")]


def test_humaneval_rows_are_code(tmp_path: Path) -> None:
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "assert"}
    path = write_lines(tmp_path / "humaneval.jsonl", [row])
    assert load_prompts(path) == [Prompt("HumanEval/0", "humaneval", "def f():\n", is_code=True)]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Why?", "answer": "#### 3"},
        {"prompt": "Why?"},
        {"text": None, "input": "Why?"},
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
        {"prompt": "Why?", "messages": [{"role": "system", "content": "Be brief."}]},
        "Why?",
    ],
)
def test_other_rows_give_their_text(tmp_path: Path, row: object) -> None:
    assert load_prompts(write_lines(tmp_path / "some.jsonl", [row])) == [Prompt("some/1", "some", "Why?")]


def test_a_text_file_has_a_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Why?\n\n  How?\n")
    assert [prompt.text for prompt in load_prompts(path)] == ["Why?", "How?"]


def test_characters_that_are_no_line_ends_stay_in_their_prompts(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four\x0cfive\x1csix"
    lines, rows = tmp_path / "lines.txt", tmp_path / "rows.jsonl"
    lines.write_text(f"{text}\r\nlast\n", encoding="utf-8", newline="")
    # As json.dumps(..., ensure_ascii=False) and other writers leave them: raw inside the string.
    rows.write_text('{"prompt": "one\u2028two\u2029three\x85four"}\r\n"last"\n', encoding="utf-8", newline="")
    assert [prompt.text for prompt in load_prompts(lines)] == [text, "last"]
    assert [prompt.text for prompt in load_prompts(rows)] == ["one\u2028two\u2029three\x85four", "last"]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    for name, content in (("lines.txt", "Why?"), ("rows.jsonl", '{"prompt": "Why?"}')):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8-sig")
        assert [prompt.text for prompt in load_prompts(path)] == ["Why?"]


@pytest.mark.parametrize("name", ["bad.txt", "bad.jsonl"])
def test_a_file_that_is_not_utf8_is_named_with_the_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'"fine"\n"caf\xe9"\n')
    with pytest.raises(ValueError, match=rf"{name}, line 2: must be UTF-8, got the byte 0xe9"):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{]", "line 1: not JSON"),
        ('{"a": 1}', "must have one of the fields turns, prompt, .*; has a"),
        ("{}", "has none"),
        ("3", "object"),
        ("", "holds no"),
        ('{"prompt": 5}', "bad.jsonl, line 1: prompt must be a text, got 5"),
        ('{"prompt": null, "entry_point": "f"}', "prompt must be a text, got None"),
        ('{"turns": []}', "turns must be a list of texts"),
        ('{"turns": [["a"]]}', r"turns\[0\] must be a text"),
        ('{"messages": []}', "messages must be a list that begins with a user's message, got None"),
        (
            '{"messages": [{"role": "system", "content": "Be brief."}]}',
            "begins with a user's message, got .*system",
        ),
        ('{"messages": [{"role": "user"}]}', r"content of messages\[0\] must be a text, got None"),
        (r'{"question": "a\ud800"}', "question must be valid Unicode"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_prompts(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data must be"):
        load_prompts(tmp_path / "none.jsonl")


def prompts_of(**counts: int) -> list[Prompt]:
    return [
        Prompt(f"{category}/{index}", category, f"{index}")
        for category, count in counts.items()
        for index in range(count)
    ]


def test_a_limit_is_shared_by_the_categories_and_spread_over_each() -> None:
    chosen = select(prompts_of(math=40, writing=2, qa=40), limit=10)
    assert [prompt.id for prompt in chosen] == [
        *["math/0", "math/10", "math/20", "math/30"],
        *["writing/0", "writing/1"],
        *["qa/0", "qa/10", "qa/20", "qa/30"],
    ]


def test_fewer_prompts_than_categories_are_spread_over_the_categories() -> None:
    chosen = select(prompts_of(a=5, b=5, c=5, d=5), limit=2)
    assert [prompt.id for prompt in chosen] == ["a/0", "c/0"]


@pytest.mark.parametrize("limit", [0, 7, 100])
def test_a_limit_that_does_not_bind_keeps_all_in_order(limit: int) -> None:
    prompts = prompts_of(a=3, b=4)
    assert select(prompts, limit) == prompts


def test_categories_are_chosen_and_checked() -> None:
    prompts = prompts_of(a=3, b=4)
    assert {prompt.category for prompt in select(prompts, 0, ["b"])} == {"b"}
    with pytest.raises(ValueError, match="--category must be one of a, b"):
        select(prompts, 0, ["c"])


class FakeTokenizer:
    """Bytes as tokens; a chat is wrapped in < and >."""

    def __init__(self, chat_template: str) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, messages: list[dict[str, str]], **_options: bool) -> list[int]:
        return list(f"<{messages[0]['content']}>".encode())


def test_chat_style_wraps_code_in_a_request_and_raw_leaves_it() -> None:
    prompt = Prompt("HumanEval/0", "humaneval", "def f():\n", is_code=True)
    tokenizer: Any = FakeTokenizer("template")
    assert bytes(encode(prompt, tokenizer, "raw")) == b"def f():\n"
    text = bytes(encode(prompt, tokenizer, "chat")).decode()
    assert text.startswith("<Complete this Python function.")
    assert "```python\ndef f():\n```>" in text


def test_a_model_without_a_chat_template_gets_raw_text() -> None:
    tokenizer: Any = FakeTokenizer("")
    assert bytes(encode(Prompt("1", "qa", "Why?"), tokenizer, "chat")) == b"Why?"
