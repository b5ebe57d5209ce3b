"""Models with random weights, described by one line: `random:llama?hidden_size=64&num_layers=2&...&seed=0`.

For tests, demonstrations and timing without a checkpoint. Every tensor is a pure function of (seed, name), so
all ranks and a transformers reference see the same model, and a drafter with the same seed and `perturb` > 0
is a noisy copy of its target that agrees with it often, but not always.
"""

import hashlib
import math

import torch

from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.random_spec import parse_spec, random_config
from outrider.workers.weights.source import Stored, bounds
from outrider.workers.weights.tensors import EMBEDDING, HEAD, tensor_shapes

# How much a token likes each of its successors, how much the layers add to the embedding, and roughly the
# cosine of the last hidden state with the head's row of the likeliest token, which follows from the two.
# Top-1 agreement of target and drafter with 2 to 4 layers, measured for perturb = 0.1, 0.2, 0.3:
# 0.84-0.93, 0.72-0.87, 0.63-0.80.
SUCCESSOR_WEIGHTS = (1.0, 0.8, 0.6)
CONTEXT_WEIGHT = 1.6
HEAD_ALIGNMENT = 0.5


class RandomSource:
    """See the module. Raises ValueError for an unknown architecture, key or value."""

    def __init__(self, spec: str) -> None:
        architecture, options = parse_spec(spec)
        self._seed = int(options["seed"])
        self._perturb = float(options["perturb"])
        self._config = random_config(architecture, options)
        self._shapes = tensor_shapes(self._config)
        # The tensor made last: a matrix is often read in pieces, and an embedding row by row.
        self._last = ("", torch.empty(0))  # read at a time by the ranks of a test, which are threads

    @property
    def config(self) -> ModelConfig:
        return self._config

    def names(self) -> set[str]:
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise ValueError(f"a random {self._config.architecture} has no tensor {name}")
        return self._shapes[name]

    def read(self, name: str, rows: slice, columns: slice, dtype: torch.dtype) -> torch.Tensor:
        whole = self._whole(name)
        part = whole[slice(*bounds(rows, whole.shape[0]))]
        if whole.dim() == 2:
            part = part[:, slice(*bounds(columns, whole.shape[1]))]
        return part.to(dtype, copy=True).contiguous()

    def read_stored(self, name: str, rows: slice, columns: slice) -> Stored:
        return Stored(self.read(name, rows, columns, torch.float32), "F32", {})

    def read_rows(self, name: str, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self._whole(name)[ids].to(dtype)

    def total_bytes(self, dtype: torch.dtype) -> int:
        return sum(math.prod(shape) for shape in self._shapes.values()) * dtype.itemsize

    def _whole(self, name: str) -> torch.Tensor:
        last = self._last
        if name != last[0]:
            last = self._last = (name, self._make(name))
        return last[1]

    def _make(self, name: str) -> torch.Tensor:
        shape = self.shape(name)
        values = self._successors() if name == HEAD else _normal(f"{self._seed}:{name}", shape)
        if self._perturb:
            noise = _normal(f"{self._seed}:noise:{name}", shape)
            values = (values + self._perturb * noise) / math.sqrt(1 + self._perturb**2)
        return values * self._scale(name, shape) + (1.0 if name.endswith("norm.weight") else 0.0)

    def _successors(self) -> torch.Tensor:
        """An untied head, [vocab_size, hidden] with entries of unit variance, that makes some tokens likely.

        Row t mixes the embeddings of the tokens that t likes to follow, so that each token has a few likely
        successors among which the layers, that is the context, decide. Independent rows would give nearly
        flat laws, whose argmax any perturbation changes. Each order of succession is a ring through all
        tokens: in a plain permutation greedy text soon falls into a short cycle.
        """
        config = self._config
        embedding = _normal(f"{self._seed}:{EMBEDDING}", (config.vocab_size, config.hidden_size))
        head = torch.zeros_like(embedding)
        for i, weight in enumerate(SUCCESSOR_WEIGHTS):
            generator = _generator(f"{self._seed}:successor {i}")
            ring = torch.randperm(config.vocab_size, generator=generator)
            head[ring] += weight * embedding[ring.roll(1)]
        return head / math.sqrt(sum(weight**2 for weight in SUCCESSOR_WEIGHTS))

    def _scale(self, name: str, shape: tuple[int, ...]) -> float:
        """Standard deviation of a tensor's entries; activations come out of order 1."""
        config = self._config
        if name.endswith(("norm.weight", "bias")):
            return 0.1
        if name == EMBEDDING:
            return 1.0 if not config.tied_embeddings else 1 / math.sqrt(config.hidden_size)
        if name == HEAD:
            # The likeliest token gets about half of the probability.
            return (math.log(config.vocab_size) + 1) / (HEAD_ALIGNMENT * config.hidden_size)
        fan_in = 1 / math.sqrt(shape[1])
        is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        return fan_in * CONTEXT_WEIGHT / math.sqrt(config.num_layers) if is_residual else fan_in


def _normal(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 values that depend on `key` alone."""
    return torch.randn(shape, generator=_generator(key))


def _generator(key: str) -> torch.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
