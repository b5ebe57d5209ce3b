"""The files of distilled texts: there and back, after a run that was cut off, and refused where they do not fit."""

from dataclasses import replace
from pathlib import Path

import pytest

from outrider.workers.training.lines import Description, read_dropped
from outrider.workers.training.texts import DistilledText, TextWriter, load_description, read_texts

DESCRIPTION = Description("random:llama", 300, "abc", {"seed": 0, "temperatures": [0.0, 1.0]}, "1.0")


def text(number: int, kept: str = "") -> DistilledText:
    return DistilledText(f"t-{number}", (1, number), (number, 2), 0.5, True, "written", "stop", kept)


def write(directory: Path, *numbers: int) -> None:
    with TextWriter(directory, DESCRIPTION, texts_per_file=2) as writer:
        for number in numbers:
            writer.write(text(number))


def test_what_was_written_is_read_over_several_files(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 2, 3, 4)
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == [
        "dropped.jsonl",
        *(f"texts-{number:05d}.jsonl" for number in range(3)),
    ]
    assert list(read_texts(tmp_path)) == [text(number) for number in range(5)]
    assert load_description(tmp_path) == DESCRIPTION


def test_text_is_kept_only_where_it_is_given(tmp_path: Path) -> None:
    with TextWriter(tmp_path, DESCRIPTION) as writer:
        writer.write(text(0))
        writer.write(text(1, "kept"))
    bare, full = (tmp_path / "texts-00000.jsonl").read_text().splitlines()
    assert "text" not in bare.replace("texts", "")
    assert [item.text for item in read_texts(tmp_path)] == ["", "kept"]
    assert "kept" in full


@pytest.mark.parametrize("cut", [1, 20, 10_000])
def test_a_run_goes_on_behind_the_last_whole_line(tmp_path: Path, cut: int) -> None:
    write(tmp_path, 0, 1, 2)
    last = tmp_path / "texts-00001.jsonl"
    last.write_bytes(last.read_bytes()[:-cut])
    assert list(read_texts(tmp_path)) == [text(0), text(1)]
    write(tmp_path, 2, 3, 4)
    assert list(read_texts(tmp_path)) == [text(number) for number in range(5)]


def test_dropped_texts_are_remembered(tmp_path: Path) -> None:
    with TextWriter(tmp_path, DESCRIPTION) as writer:
        writer.drop("t-7", "loop of 3 tokens")
    assert read_dropped(tmp_path) == {"t-7": "loop of 3 tokens"}
    assert list(read_texts(tmp_path)) == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(DESCRIPTION, model="another"), "model must be 'random:llama', got 'another'"),
        (replace(DESCRIPTION, settings={"seed": 1, "temperatures": [0.0, 1.0]}), "seed must be 0, got 1"),
        (replace(DESCRIPTION, settings={"seed": 0}), r"temperatures must be \[0.0, 1.0\], got null"),
    ],
)
def test_a_run_with_other_settings_is_refused_by_field(
    tmp_path: Path, other: Description, message: str
) -> None:
    write(tmp_path, 0)
    with pytest.raises(ValueError, match=f"begun with other settings: {message}"):
        TextWriter(tmp_path, other)
    TextWriter(tmp_path, replace(DESCRIPTION, outrider="2.0")).close()


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    with (
        TextWriter(tmp_path, DESCRIPTION),
        pytest.raises(ValueError, match="--out must be a directory that no other run writes to"),
    ):
        TextWriter(tmp_path, DESCRIPTION)


def test_what_is_no_text_is_named_with_its_line(tmp_path: Path) -> None:
    write(tmp_path, 0, 1)
    path = tmp_path / "texts-00000.jsonl"
    for line, message in (("{}", "no text of format 1"), ("[", "not JSON"), ("3", "must be an object")):
        path.write_text(f"{path.read_text().splitlines()[0]}\n{line}\n")
        with pytest.raises(ValueError, match=f"texts-00000.jsonl, line 2: {message}"):
            list(read_texts(tmp_path))
    with pytest.raises(ValueError, match=r"no distill\.json"):
        load_description(tmp_path / "elsewhere")
