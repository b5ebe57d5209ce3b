"""Texts written thousands at a time are what the target says one by one."""

import torch

from outrider.workers.training.features import TargetFeatures
from outrider.workers.weights.random_source import RandomSource
from support.batched_texts import Asked, BatchedWriter

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
