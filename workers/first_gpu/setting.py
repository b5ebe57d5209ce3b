"""Where the check runs and how large it is: a GPU, or a CPU with everything tiny, for its own tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from outrider.kernels.gpu_check import Gpu, TorchGpu, all_cases
from outrider.kernels.kernel_cases import Preparation
from outrider.workers.first_gpu.expected import UNKNOWN, Figure
from outrider.workers.weights.config import DenseMlp, LayerConfig, ModelConfig, Rope

GIB = 1 << 30


def _llama(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        layers=(LayerConfig(window=0, rope=Rope(theta=500_000.0), mlp=DenseMlp(inner)),) * layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128 if hidden >= 8192 else hidden // heads,
        vocab_size=vocab,
        rms_norm_eps=1e-5,
        max_context=32_768 + 512,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
    )


@dataclass(frozen=True)
class Sizes:
    """How large the models and batches are.

    Attributes:
        large, num_ranks: the model of which rank 0 of so many is timed.
        rows, contexts: query rows and cached tokens of the timed batches.
        rows_per_sequence: of the batches of many sequences.
        one, many, one_long: the rounds of `expected.py`: rows, sequences, context.
        attended: rows, sequences and contexts of attention alone.
        attended_bytes: keys and values that it walks through: more than a GPU's cache.
        cache_bytes: of the timed rank's KV cache; batches that it cannot hold are left out.
        small: model of the comparisons, see `random_source`; drafter: the same with noise.
        trees: query rows at which graphs are compared with the forward without.
        new_tokens: of each answer.
        sampled_tokens: vocabulary of the samplers that are compared.
        repeats: launches of each kernel case compared bit by bit.
        replays: timed runs, of which the median counts.
        weight_bytes: memory that repeated products walk through: more than a GPU's cache.
    """

    large: ModelConfig
    num_ranks: int
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    rows_per_sequence: int
    one: tuple[int, int, int]
    many: tuple[int, int, int]
    one_long: tuple[int, int, int]
    attended: tuple[tuple[int, int, int], ...]
    attended_bytes: int
    cache_bytes: int
    small: str
    trees: tuple[int, ...]
    new_tokens: int
    sampled_tokens: int
    repeats: int
    replays: int
    weight_bytes: int


FULL = Sizes(
    # Rank 0 of 7 has 16 places for query heads, 2 KV heads, 4096 MLP columns and 18368 tokens.
    large=_llama(80, 8192, 28672, 64, 8, 128_256),
    num_ranks=7,
    rows=(8, 16, 32, 33, 64, 256),
    contexts=(1024, 2048, 8192, 32_768),
    rows_per_sequence=8,
    one=(33, 1, 1024),
    many=(256, 32, 2048),
    one_long=(33, 1, 8192),
    attended=(
        (8, 1, 8192),
        (8, 8, 8192),
        (33, 1, 1024),
        (33, 1, 8192),
        (64, 1, 8192),
        (64, 1, 32_768),
        (256, 32, 2048),
    ),
    attended_bytes=200 << 20,
    cache_bytes=40 * GIB,
    small="hidden_size=512&intermediate_size=1408&num_layers=4&num_heads=8&num_kv_heads=2&vocab_size=4096",
    trees=(1, 8, 33, 64, 256),
    new_tokens=64,
    sampled_tokens=18_368,
    repeats=20,
    replays=11,
    weight_bytes=GIB,
)
TINY = Sizes(
    large=_llama(2, 64, 256, 8, 2, 512),
    num_ranks=2,
    rows=(2, 8),
    contexts=(32,),
    rows_per_sequence=2,
    one=(3, 1, 20),
    many=(8, 4, 30),
    one_long=(3, 1, 50),
    attended=((3, 1, 50), (8, 4, 30)),
    attended_bytes=1 << 10,
    cache_bytes=1 << 20,
    small="hidden_size=64&num_layers=2&num_heads=4&num_kv_heads=2",
    trees=(1, 8),
    new_tokens=8,
    sampled_tokens=500,
    repeats=2,
    replays=2,
    weight_bytes=1 << 16,
)


@dataclass(frozen=True)
class Setting:
    """What the parts of the check are given.

    Attributes:
        device: where to run.
        sizes: how large.
        folder: for files beside the reports: traces, what the tools said.
        open_gpu: launches kernels on the device; tests stand in for it.
        cases: of the kernels.
    """

    device: torch.device
    sizes: Sizes
    folder: Path
    open_gpu: Callable[[torch.device], Gpu] = TorchGpu
    cases: list[Preparation] = field(default_factory=all_cases)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def has_kernels(self) -> bool:
        """Whether kernels can be launched: on a GPU, or by who stands in for one."""
        return self.on_gpu or self.open_gpu is not TorchGpu

    def figure(self, figures: Mapping[str, Figure], what: str) -> Figure:
        """Of `expected.py`, which speaks of the full sizes on a GPU."""
        return figures.get(what, UNKNOWN) if self.on_gpu else UNKNOWN

    @property
    def activities(self) -> list[ProfilerActivity]:
        """What torch's profiler should look at."""
        return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]

    def busiest(self, profiled: profile) -> list[FunctionEventAvg]:
        """What kept the device busy, most first: kernels on a GPU, operators on a CPU."""
        kind = DeviceType.CUDA if self.on_gpu else DeviceType.CPU
        # Operators on the host are charged for the kernels that they launch; those would count twice.
        events = [event for event in profiled.key_averages() if event.device_type == kind]
        return sorted(events, key=self.time_us, reverse=True)

    def time_us(self, event: FunctionEventAvg) -> float:
        """Microseconds on the device."""
        return float(event.self_device_time_total if self.on_gpu else event.self_cpu_time_total)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def model_spec(self, perturb: float = 0.0) -> str:
        """The small model, or its noisy copy, as a configuration names it."""
        return f"random:llama?{self.sizes.small}&seed=0&perturb={perturb}"
