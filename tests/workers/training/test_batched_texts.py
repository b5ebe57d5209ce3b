"""Texts written thousands at a time are what the target says one by one."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.lines import Description
from outrider.workers.training.texts import read_texts
from outrider.workers.weights.random_source import RandomSource
from outrider.workers.weights.resolver import open_source
from support.batched_texts import Asked, Author, BatchedWriter, keep
from support.models import random_model

TARGET = "random:llama?hidden_size=64&num_layers=2&num_heads=4&num_kv_heads=2&vocab_size=96"
CPU = torch.device("cpu")


def test_slots_take_text_after_text_and_greedy_ones_are_the_target_s_own() -> None:
    source = RandomSource(TARGET)
    prompts = [[5, 9, 2 + n] + [7] * (n % 4) for n in range(9)]
    asked = [Asked(prompt, 20 + n, 0.0) for n, prompt in enumerate(prompts)]
    asked.append(Asked([3], 30, 1.0))
    torch.manual_seed(1)
    texts = BatchedWriter(source, 4, 32, CPU).write(asked, end_token=11, seconds=120.0)
    assert [len(text.tokens) for text in texts if not text.stopped] == [
        by.limit for by, text in zip(asked, texts, strict=True) if not text.stopped
    ]
    target = TargetFeatures(source, (source.config.num_layers,), torch.float32, threads=1)
    for by, text in zip(asked[:-1], texts, strict=False):
        assert text.tokens[: len(by.tokens)] == by.tokens
        rows = target.rows([text.tokens])[0][source.config.num_layers]
        likeliest = target.model.weights.head(target.model.normed(rows)).argmax(-1).tolist()
        start = len(by.tokens)
        assert text.tokens[start:] == likeliest[start - 1 : -1]
        assert text.stopped == (text.tokens[-1] == 11)
        assert 11 not in text.tokens[start:-1]


def test_an_author_writes_prompts_and_passages_asks_about_them_and_answers(tmp_path: Path) -> None:
    source = open_source(random_model("hidden_size=64&num_layers=1"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"?": 0, "<end>": 1, "Ann": 2, "saw": 3, "Bob": 4}, "?")),
        eos_token="<end>",
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.chat_template = (
        "{% for message in messages %}Ann {{ message['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}Bob {% endif %}"
    )
    author = Author(source, tokenizer, slots=8, seconds=60.0, seed=3)
    questions = [{"before": "saw ", "after": " saw"}]
    about = author.prompts_about_passages(6, ["Ann saw Bob"], questions)
    assert len(about) == 6
    assert all(prompt[0] == prompt[-1] == 3 for prompt in about)
    texts = author.answers([(prompt, "written") for prompt in about], longest=10_000, max_tokens=9)
    assert sorted(asked.source for asked, _ in texts) == ["written"] * 6
    for asked, text in texts:
        assert text.tokens[: len(asked.tokens)] == asked.tokens
        assert len(text.tokens) <= len(asked.tokens) + 9
    described = Description("random", 160, "", {}, "test")
    num_tokens = keep(tmp_path, described, texts, "mine")
    kept = list(read_texts(tmp_path))
    assert num_tokens == sum(len(text.tokens) for text in kept)
    assert all(text.id.startswith("mine-") for text in kept)
