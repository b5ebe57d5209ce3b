"""Texts with a label per token: what `outrider judge label` writes and `outrider judge train` reads.

A directory as in `lines`: `labels.json` and `labels-00000.jsonl`, …, a text a line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outrider.workers.training.judges.records import SpanRecord
from outrider.workers.training.lines import (
    FORMAT,
    Description,
    Layout,
    LineWriter,
    read_description,
    read_objects,
)

GOOD, BAD, UNUSED = "gb."
"""What stands for a token in `LabelledText.labels`."""

MINED, READ = "mined", "read"
"""Kinds of texts that mining gives: up to a mismatch of drafter and target, and what was read in search of them."""

LABELS = Layout("labels.json", "labels", "outrider judge label")


@dataclass(frozen=True)
class LabelledText:
    """An answer, or the beginning of one, with labels.

    Attributes:
        id: unique in its directory.
        problem: texts of one problem are trained on or measured on together.
        domain: kind of task.
        kind: of mistake or variation, or MINED or READ.
        prompt_tokens: token ids, those of the chat template included.
        output_tokens: token ids of the answer.
        labels: a character per output token: GOOD, BAD or UNUSED.
    """

    id: str
    problem: str
    domain: str
    kind: str
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    labels: str

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and output."""
        return self.prompt_tokens + self.output_tokens


class LabelWriter(LineWriter):
    """Appends labelled texts to a directory."""

    def __init__(self, directory: Path, description: Description) -> None:
        """As a `LineWriter`."""
        super().__init__(directory, LABELS, description)

    def write(self, text: LabelledText) -> None:
        assert len(text.labels) == len(text.output_tokens)
        self.append(asdict(text))


def load_labels(directory: Path) -> tuple[Description, list[LabelledText]]:
    """A directory's texts, in the order in which they were written.

    Raises ValueError naming file and line of what is no labelled text.
    """
    described = read_description(directory, LABELS)
    return described, list(iter_labels(directory))


def iter_labels(directory: Path) -> Iterator[LabelledText]:
    """As `load_labels`, of a directory that may be empty yet."""
    for path in LABELS.files(directory):
        for number, fields in read_objects(path):
            try:
                yield _text_of(fields)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: no labelled text of format {FORMAT} ({error!r})"
                ) from error


def texts_of(record: SpanRecord, tokenizer: Any) -> list[LabelledText]:
    """The right answer and, where there is one, the wrong one up to the end of its mistake.

    Args:
        tokenizer: the target's, a fast one: it must say which characters a token stands for.

    Raises:
        ValueError: no token is mistaken that the right answer has not there, too.
    """
    prompt = prompt_of(record.messages, tokenizer)
    right, _ = encode_answer(record.right, tokenizer)
    whole = [_text(record, "right", prompt, right, GOOD * len(right))]
    if record.wrong is None:
        return whole
    wrong, places = encode_answer(record.wrong, tokenizer)
    labels = mistake_labels(places, record.mistake(), shared_tokens(right, wrong))
    if BAD not in labels:
        raise ValueError(
            f"{record.id}: span must have tokens that the right answer has not in the same place"
        )
    end = labels.rindex(BAD) + 1
    return [*whole, _text(record, "wrong", prompt, wrong[:end], labels[:end])]


def prompt_of(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a conversation up to the answer; without a chat template of the texts, a line each."""
    if not tokenizer.chat_template:
        text = "".join(f"{message['content']}\n" for message in messages)
        return tuple(tokenizer.encode(text, add_special_tokens=False))
    return tuple(
        tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    )


def encode_answer(text: str, tokenizer: Any) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Token ids, and of each the first character that it stands for and the one behind its last."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return tuple(found["input_ids"]), [tuple(place) for place in found["offset_mapping"]]


def mistake_labels(places: Sequence[tuple[int, int]], mistake: tuple[int, int], num_shared: int) -> str:
    """Of each token what it is.

    A token is mistaken if it has a character of the mistake. Of these the first ones may say what a right answer
    says, too (the 4 of 48 for 46, digit by digit): they are good, as nothing is wrong when they are read. If they all
    are (the 2 of 22, whose second digit is missing), the token behind them is mistaken.

    Args:
        places: first character of each token and the one behind its last.
        mistake: the same of the mistake.
        num_shared: leading tokens that stand in the right answer, too.
    """
    start, end = mistake
    labels = []
    for index, (first, behind) in enumerate(places):
        is_mistaken = (first < end and behind > start) or (first >= end and index == num_shared)
        if is_mistaken and index >= num_shared:
            labels.append(BAD)
        else:
            labels.append(UNUSED if BAD in labels else GOOD)
    return "".join(labels)


def shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginnings on."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _text(
    record: SpanRecord, side: str, prompt: tuple[int, ...], tokens: tuple[int, ...], labels: str
) -> LabelledText:
    return LabelledText(
        f"{record.id}/{side}", record.group, record.domain, record.kind, prompt, tokens, labels
    )


def _text_of(fields: Mapping[str, Any]) -> LabelledText:
    text = LabelledText(
        id=fields["id"],
        problem=fields["problem"],
        domain=fields["domain"],
        kind=fields["kind"],
        prompt_tokens=tuple(fields["prompt_tokens"]),
        output_tokens=tuple(fields["output_tokens"]),
        labels=fields["labels"],
    )
    if len(text.labels) != len(text.output_tokens) or not set(text.labels) <= {GOOD, BAD, UNUSED}:
        raise ValueError("labels must have one of g, b and . for each output token")
    return text


def match_rate(texts: Iterable[LabelledText]) -> float:
    """Fraction of the read tokens at which drafter and target agreed; 0 where nothing was mined. Of tasks that were
    read to their ends: mining may have been cut off in others."""
    num_read: dict[str, int] = {}
    mismatches: dict[str, set[str]] = {}
    for text in texts:
        if text.kind == READ:
            num_read[text.problem] = len(text.output_tokens)
        elif text.kind == MINED:
            mismatches.setdefault(text.problem, set()).add(text.id)
    num_mismatches = sum(len(mismatches.get(problem, ())) for problem in num_read)
    return 1 - num_mismatches / sum(num_read.values()) if num_read else 0.0
