"""A tiny target's own texts, and runs on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from outrider.configs.training import (
    Eagle3Config,
    EngineConfig,
    MedusaConfig,
    OptimizerConfig,
    TextsConfig,
    TrainedHeadConfig,
    TrainedTargetConfig,
    TrainingConfig,
)
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.lines import Description
from outrider.workers.training.texts import DistilledText, TextWriter, read_texts
from outrider.workers.weights.resolver import ResolvedModel, open_source
from support.equality import Case
from support.models import random_model

TARGET = random_model("num_layers=8&vocab_size=160&hidden_size=64")
# Its texts are longer than its window, so that a head like its windowed layers has to be trained with one.
MELLUM = random_model(
    "num_layers=4&vocab_size=160&hidden_size=64&window=6&full_every=2&yarn_factor=4&num_experts=3&expert_size=48",
    "mellum",
)
NUM_TEXTS, PROMPT, OUTPUT = 10, 4, 14


def write_texts(folder: Path, model: ResolvedModel = TARGET) -> None:
    """Greedy continuations of random prompts."""
    source = open_source(model)
    target = TargetFeatures(source, (source.config.num_layers,), torch.float32, 1)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(3, 160, (NUM_TEXTS, PROMPT), generator=generator).tolist()
    for _ in range(OUTPUT):
        last = torch.cat([rows[source.config.num_layers][-1:] for rows in target.rows(texts)])
        for text, token in zip(texts, target.model.logits(last).argmax(-1).tolist(), strict=True):
            text.append(token)
    with TextWriter(folder, Description(model.model, 160, "", {}, "")) as writer:
        for number, text in enumerate(texts):
            tokens = tuple(text)
            writer.write(
                DistilledText(str(number), tokens[:PROMPT], tokens[PROMPT:], 0.0, False, "tiny", "length")
            )


def cases(folder: Path) -> list[Case]:
    """Their prompts, as requests for what they go on with."""
    sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT)
    return [Case(text.id, text.prompt_tokens, sampling) for text in read_texts(folder)]


def tiny_run(texts: Path, out: Path, steps: int, model: ResolvedModel = TARGET) -> TrainingConfig:
    """A run that measures on what it trains on: it shall learn the texts by heart."""
    folder = str(texts)
    return TrainingConfig(
        target=TrainedTargetConfig(model.model, dtype="float32"),
        texts=TextsConfig((folder,), eval_directories=(folder,), top_k=8),
        out=str(out),
        head=TrainedHeadConfig(kind="low_rank", rank_divisor=2),
        eagle3=Eagle3Config(unrolled_steps=3),
        medusa=MedusaConfig(num_heads=2, lambda0=0.5, lora_rank=4, lora_dropout=0.05),
        optimizer=OptimizerConfig(
            steps=steps, batch_tokens=90, micro_tokens=90, lr=3e-3, warmup_steps=5, clip=1.0
        ),
        engine=EngineConfig(dtype="float32", num_threads=1),
        log_every=1,
        eval_every=1000,
        checkpoint_every=1000,
    )


def with_steps(config: TrainingConfig, steps: int) -> TrainingConfig:
    """The same run, so many steps long."""
    return replace(config, optimizer=replace(config.optimizer, steps=steps))
