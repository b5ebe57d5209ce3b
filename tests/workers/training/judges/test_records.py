"""Span records: what is refused and how that is said; characters of a mistake become tokens."""

import json
from pathlib import Path
from typing import Any

import pytest

from outrider.workers.training.judges.labels import encode_answer, mistake_labels, shared_tokens, texts_of
from outrider.workers.training.judges.records import SpanRecord, read_records, write_records
from outrider.workers.weights.random_tokenizer import tokenizer_of_size

TOKENIZER = tokenizer_of_size(320)  # a token a byte

RECORD: dict[str, Any] = {
    "id": "1",
    "domain": "gsm8k",
    "question": "How many?",
    "right": "3 * 4 = 12",
    "wrong": "3 + 4 = 7",
    "span": {"start": 2, "end": 3},
    "kind": "operator",
}


def written(folder: Path, *rows: object) -> Path:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    rows = [
        RECORD,
        RECORD | {"id": "2", "span": "+", "problem": "1"},
        {"id": "3", "domain": "code", "question": messages, "right": "é", "kind": "as written"},
    ]
    records = list(read_records(written(tmp_path, *rows)))
    assert [record.group for record in records] == ["gsm8k/1", "gsm8k/1", "code/3"]
    assert records[0].mistake() == records[1].mistake() == (2, 3)
    assert records[2].messages == messages
    assert write_records(tmp_path / "again.jsonl", records) == 3
    assert list(read_records(tmp_path / "again.jsonl")) == records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"right": 5}, "right: Input should be a valid string"),
        ({"rigth": "x"}, "rigth: Extra inputs are not permitted"),
        ({"question": []}, "question"),
        ({"span": None}, "wrong and span must come together"),
        (
            {"span": {"start": 3, "end": 30}},
            "span must have start < end <= 9 (characters of wrong), got 3 and 30",
        ),
        ({"span": "="[:0]}, "span must be a text that occurs once in wrong"),
        ({"span": " "}, "span must be a text that occurs once in wrong, got ' ': 4 times"),
        ({"span": {"start": -1, "end": 3}}, "span.Span.start: Input should be greater than or equal to 0"),
        ({"id": "0"}, "id must be unique in the file, got '0' again"),
    ],
)
def test_a_mistake_names_line_and_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = written(tmp_path, RECORD | {"id": "0"}, RECORD | change)
    with pytest.raises(ValueError, match="line 2: ") as raised:
        list(read_records(path))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_tokens_before_a_mistake_are_good_its_own_bad_and_later_ones_unused() -> None:
    record = SpanRecord.model_validate(RECORD | {"right": "so 48 + 1", "wrong": "so 46 + 1", "span": "46"})
    right, wrong = texts_of(record, TOKENIZER)
    assert right.labels == "g" * len("so 48 + 1")
    # The 4 is what the right answer says, too; the text ends with the mistake.
    assert wrong.labels == "gggg" + "b"
    assert TOKENIZER.decode(wrong.output_tokens) == "so 46"
    assert wrong.prompt_tokens == right.prompt_tokens
    assert "How many?" in TOKENIZER.decode(wrong.prompt_tokens)


def test_of_a_missing_character_the_token_behind_it_is_mistaken() -> None:
    record = SpanRecord.model_validate(
        RECORD | {"right": "90 + 22 = 112", "wrong": "90 + 2 = 112", "span": "2 ="}
    )
    _, wrong = texts_of(record, TOKENIZER)
    assert wrong.labels == "gggggg" + "bb"
    short = SpanRecord.model_validate(
        RECORD | {"right": "90 + 22 = 112", "wrong": "90 + 2 = 112", "span": {"start": 5, "end": 6}}
    )
    _, wrong = texts_of(short, TOKENIZER)
    assert wrong.labels == "gggggg" + "b"


def test_a_token_with_any_character_of_the_mistake_is_mistaken() -> None:
    places = [(0, 4), (4, 9), (9, 10), (10, 14)]
    assert mistake_labels(places, (8, 10), 0) == "gbb."
    assert mistake_labels(places, (8, 10), 2) == "ggb."


def test_a_character_of_several_tokens_is_mistaken_as_a_whole() -> None:
    tokens, places = encode_answer("a é b", TOKENIZER)
    mistaken = [index for index, label in enumerate(mistake_labels(places, (2, 3), 0)) if label == "b"]
    assert TOKENIZER.decode([tokens[index] for index in mistaken]) == "é"


def test_what_two_texts_share_is_counted_from_their_beginning() -> None:
    assert shared_tokens([1, 2, 3], [1, 2, 4, 3]) == 2
    assert shared_tokens([1, 2], [1, 2, 4]) == 2
