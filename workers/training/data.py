"""Texts as token arrays, the held-out ones apart, and which of them make up each optimizer step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from outrider.configs.training import TextsConfig
from outrider.workers.training.texts import read_texts

_WINDOW_BATCHES = 16
_LEAST_TOKENS = 3  # one to read, one to guess from, one to guess


@dataclass(frozen=True, eq=False)
class TrainingText:
    """One text.

    Attributes:
        tokens: int32 [T], prompt and output.
        num_unlearned: the first tokens, which no loss is on: the prompt's, where prompts are not learned.
        template: whether the prompt went through the chat template.
        folder, id: where it is from, and which of the texts there.
    """

    tokens: npt.NDArray[np.int32]
    num_unlearned: int
    template: bool
    folder: Path
    id: str

    def digested(self) -> bytes:
        """What of it decides the target's rows."""
        return len(self.tokens).to_bytes(4, "little") + self.tokens.tobytes()


@dataclass(frozen=True)
class Manifest:
    """How many texts of each folder a run uses, so that a run that goes on sees those it began with, though more
    have been written since.

    Attributes:
        counts: by folder as the configuration names it.
    """

    counts: dict[str, int]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.counts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        return cls(json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Corpus:
    """What is trained on, and what is measured on.

    Attributes:
        training, held_out: texts of at least three tokens, one of which is learned.
        manifest: what was read.
        digest: SHA-256 of all their tokens, hexadecimal.
    """

    training: list[TrainingText]
    held_out: list[TrainingText]
    manifest: Manifest
    digest: str


def read_corpus(config: TextsConfig, manifest: Manifest | None) -> Corpus:
    """Reads the texts that a configuration names.

    Args:
        manifest: of a run that goes on: only so many texts of each folder; None: all that are there.

    Raises:
        ValueError: a folder or its texts cannot be read, or there is nothing to learn or to measure.
    """
    counts: dict[str, int] = {}

    def read(directories: Sequence[str]) -> list[TrainingText]:
        texts: list[TrainingText] = []
        for directory in directories:
            limit = None if manifest is None else manifest.counts[directory]
            before = len(texts)
            path = Path(directory).expanduser()
            if not path.is_dir():
                raise ValueError(f"texts.directories must be folders with texts-*.jsonl, got {directory!r}")
            for text in islice(read_texts(path), limit):
                tokens = np.array(text.tokens[: config.max_tokens], dtype=np.int32)
                num_prompt = min(len(text.prompt_tokens), len(tokens))
                unlearned = 0 if config.loss_on_prompts else num_prompt
                texts.append(TrainingText(tokens, unlearned, text.template, path, text.id))
            counts[directory] = len(texts) - before
        return texts

    training = read(config.directories)
    if config.eval_directories:
        held_out = read(config.eval_directories)
    else:
        if 0 < len(training) < config.eval_every:
            raise ValueError(
                f"texts.eval_every must be at most {len(training)}, the texts that there are, so that some are held "
                f"out to measure on, got {config.eval_every}; or texts.eval_directories names others"
            )
        held_out = training[config.eval_every - 1 :: config.eval_every]
        del training[config.eval_every - 1 :: config.eval_every]
    training = [text for text in training if _is_useful(text)]
    held_out = [text for text in held_out if _is_useful(text)][: config.max_eval_texts]
    for name, texts in (("train", training), ("measure", held_out)):
        if not texts:
            raise ValueError(
                f"texts.directories must hold texts to train on and to measure on: none to {name} on in "
                f"{', '.join(config.directories)}"
            )
    digest = hashlib.sha256()
    for text in (*training, *held_out):
        digest.update(text.tokens.tobytes() + bytes([0, text.num_unlearned & 255]))
    return Corpus(training, held_out, Manifest(counts), digest.hexdigest())


class BatchPlan:
    """Which texts each optimizer step reads, and which rank reads them in which forward.

    Every step has `num_groups` groups of texts of similar lengths, with about as many tokens each: one for each
    rank and forward. The order depends on the seed alone.
    """

    def __init__(self, lengths: Sequence[int], batch_tokens: int, num_groups: int, seed: int) -> None:
        """lengths: tokens of each text; batch_tokens: of a step."""
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._batch_tokens = batch_tokens
        self._num_groups = num_groups
        self._seed = seed
        self._epoch = -1
        self._epoch_begins = 0
        self._batches: list[npt.NDArray[np.int64]] = []

    def groups(self, step: int) -> list[list[int]]:
        """Of optimizer step 0, 1, …: `num_groups` lists of text indices; a list may be empty. Steps are asked for
        in ascending order."""
        while step >= self._epoch_begins + len(self._batches):
            self._epoch_begins += len(self._batches)
            self._epoch += 1
            self._batches = self._shuffled(self._epoch)
        assert step >= self._epoch_begins
        batch = self._batches[step - self._epoch_begins]
        batch = batch[np.argsort(self._lengths[batch], kind="stable")]
        middles = self._lengths[batch].cumsum() - self._lengths[batch] / 2
        groups = (middles * self._num_groups / self._lengths[batch].sum()).astype(np.int64)
        return [batch[groups == group].tolist() for group in range(self._num_groups)]

    def passes(self, step: int) -> float:
        """How many times the texts have been read after `step` steps, about."""
        return step * self._batch_tokens / float(self._lengths.sum())

    def _shuffled(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """All texts in batches. Those of one batch are alike in length, as far as a window of some batches goes."""
        generator = np.random.default_rng((self._seed, epoch))
        order = generator.permutation(len(self._lengths))
        batches = []
        for window in _cut(order, self._lengths, _WINDOW_BATCHES * self._batch_tokens):
            window = window[np.argsort(self._lengths[window], kind="stable")]
            batches += _cut(window, self._lengths, self._batch_tokens)
        return [batches[index] for index in generator.permutation(len(batches))]


def _cut(
    order: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], num_tokens: int
) -> list[npt.NDArray[np.int64]]:
    """Pieces of about `num_tokens` tokens, as even as they go."""
    ends = lengths[order].cumsum()
    count = max(1, round(float(ends[-1]) / num_tokens))
    piece = np.minimum(((ends - lengths[order] / 2) * count / ends[-1]).astype(np.int64), count - 1)
    return [order[piece == index] for index in range(count) if np.any(piece == index)]


def _is_useful(text: TrainingText) -> bool:
    return len(text.tokens) >= _LEAST_TOKENS and len(text.tokens) > max(1, text.num_unlearned)
