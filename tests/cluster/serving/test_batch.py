"""A batch on workers without models: one line for each request, however often it is cut off."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider.cluster.api import EngineError
from outrider.cluster.serving.batch import Batch, Output, read_input
from support.fake_workers import FAKE_CONFIG, endless
from support.posted_engine import PostedEngine, posted_engine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def engine() -> Iterator[PostedEngine]:
    with posted_engine(str.upper) as engine:
        yield engine


def request(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path: Path, requests: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(entry) for entry in requests) + "\n")
    return path


def run(engine: PostedEngine, source: Path, target: Path) -> list[bool]:
    done: list[bool] = []
    output = Output(target)
    try:
        asyncio.run(Batch(engine, FAKE_CONFIG).run(read_input(source), output, done.append))
    finally:
        output.close()
    return done


def answers(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {line["custom_id"]: line for line in lines}
    assert len(by_id) == len(lines)
    return by_id


def test_every_request_gets_one_line_the_refused_ones_too(engine: PostedEngine, tmp_path: Path) -> None:
    requests = [
        request("a", prompt="one"),
        request("b", CHAT, messages=[{"role": "user", "content": "two"}], n=2),
        request("c", prompt="three", top_p=7),
        request("d", prompt="four", nonsense=1),
        request("e", "/v1/embeddings", input="five"),
        request("f", prompt="six", stream=True),
        request("g", prompt="seven", model="another"),
        {"custom_id": "h", "url": COMPLETIONS, "body": None},
        {**request("i", prompt="nine"), "priority": 1},
    ]
    target = tmp_path / "out.jsonl"
    done = run(engine, write(tmp_path / "in.jsonl", requests), target)
    said = answers(target)
    assert sorted(said) == list("abcdefghi")
    assert sorted(done) == [False] * 7 + [True] * 2
    assert said["a"]["response"]["body"]["choices"][0]["text"] == "ONE"
    contents = [choice["message"]["content"] for choice in said["b"]["response"]["body"]["choices"]]
    assert contents == ["<USER>TWO"] * 2
    params = {key: said[key]["response"]["body"]["error"]["param"] for key in "cdefgi"}
    assert params == {
        "c": "top_p",
        "d": "nonsense",
        "e": "url",
        "f": "stream",
        "g": "model",
        "i": "priority",
    }
    assert {key: said[key]["response"]["status_code"] for key in "acg"} == {"a": 200, "c": 400, "g": 404}
    assert all(line["error"] is None for line in said.values())


def test_a_run_goes_on_behind_whatever_cut_the_last_one_off(engine: PostedEngine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [request(str(number), prompt=f"p{number}") for number in range(20)])
    whole = tmp_path / "whole.jsonl"
    run(engine, source, whole)
    content = whole.read_bytes()
    first_line = content.index(b"\n")
    target = tmp_path / "out.jsonl"
    for kept in (0, 1, first_line, first_line + 1, first_line + 9, len(content) - 1, len(content)):
        target.write_bytes(content[:kept])
        before = content[:kept].count(b"\n")
        assert len(run(engine, source, target)) == 20 - before
        assert answers(target).keys() == {str(number) for number in range(20)}


def test_an_engine_that_dies_ends_the_run_and_the_next_one_goes_on(
    engine: PostedEngine, tmp_path: Path
) -> None:
    source = write(
        tmp_path / "in.jsonl", [request("short", prompt="x", max_tokens=3), request("long", prompt="y")]
    )
    target = tmp_path / "out.jsonl"
    with posted_engine(endless) as dying:
        output = Output(target)

        def die(answered: bool) -> None:
            dying.inbox.close("target 0 died")

        with pytest.raises(EngineError, match="target 0 died"):
            asyncio.run(Batch(dying, FAKE_CONFIG).run(read_input(source), output, die))
        output.close()
    assert list(answers(target)) == ["short"]
    assert run(engine, source, target) == [True]
    assert answers(target).keys() == {"short", "long"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1 has none"),
        ("[1]", "text custom_id in each line, line 1 has none"),
        ('{"custom_id": 5}', "text custom_id in each line, line 1 has none"),
        ('{"custom_id": "a"}\n\n{"custom_id": "a"}', "line 3 repeats 'a'"),
    ],
)
def test_a_file_that_is_no_batch_is_refused_before_anything_runs(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_input(path)


def test_two_runs_do_not_write_one_file_and_nothing_else_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    output = Output(path)
    with pytest.raises(ValueError, match="is written by another run already"):
        Output(path)
    output.close()
    path.write_text("my notes\n")
    with pytest.raises(ValueError, match="must have answers of a batch, line 1 is none"):
        Output(path)
    assert path.read_text() == "my notes\n"
