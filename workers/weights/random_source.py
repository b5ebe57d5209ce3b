"""Models with random weights, described by one line: `random:llama?hidden_size=64&num_layers=2&...&seed=0`.

For tests, demonstrations and timing without a checkpoint. Every tensor is a pure function of (seed, name), so
all ranks and a transformers reference see the same model, and a drafter with the same seed and `perturb` > 0
is a noisy copy of its target that agrees with it often, but not always.
"""

import hashlib
import math
from typing import Any
from urllib.parse import parse_qsl

import torch

from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.families import FAMILIES
from outrider.workers.weights.hf_config import model_config_from_hf
from outrider.workers.weights.source import Stored, bounds
from outrider.workers.weights.tensors import EMBEDDING, HEAD, tensor_shapes

PREFIX = "random:"

# How much a token likes each of its successors, how much the layers add to the embedding, and roughly the
# cosine of the last hidden state with the head's row of the likeliest token, which follows from the two.
# Top-1 agreement of target and drafter with 2 to 4 layers, measured for perturb = 0.1, 0.2, 0.3:
# 0.84-0.93, 0.72-0.87, 0.63-0.80.
SUCCESSOR_WEIGHTS = (1.0, 0.8, 0.6)
CONTEXT_WEIGHT = 1.6
HEAD_ALIGNMENT = 0.5

_HF_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_context": "max_position_embeddings",
}
_INTEGERS = {
    "num_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 320,
    "max_context": 4096,
    "tied": 0,
    "seed": 0,
}
_FLOATS = {"rope_theta": 10000.0, "perturb": 0.0}
# Of families that name the kind of each layer. Layers have experts and a window, every `full_every`-th (0: none) sees
# all, with positions stretched by YaRN if `yarn_factor` is above 1.
_KIND_INTEGERS = {"num_experts": 4, "experts_per_token": 2, "expert_size": 64, "window": 16, "full_every": 4}
_KIND_FLOATS = {"yarn_factor": 1.0}
_MAY_BE_ZERO = ("full_every",)
_YARN_ORIGINAL_CONTEXT = 64


class RandomSource:
    """See the module. Raises ValueError for an unknown architecture, key or value."""

    def __init__(self, spec: str) -> None:
        architecture, options = parse_spec(spec)
        self._seed = int(options["seed"])
        self._perturb = float(options["perturb"])
        self._config = _model_config(architecture, options)
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


def parse_spec(spec: str) -> tuple[str, dict[str, float]]:
    """`random:llama?key=value&...` -> (architecture, all options with defaults filled in)."""
    architecture, _, query = spec.removeprefix(PREFIX).partition("?")
    if architecture not in FAMILIES:
        raise ValueError(f"random:{architecture} is unknown; allowed: {', '.join(FAMILIES)}")
    options: dict[str, float] = {**_INTEGERS, **_FLOATS}
    if FAMILIES[architecture].has_layer_kinds:
        options |= {**_KIND_INTEGERS, **_KIND_FLOATS}
    optional = {"head_dim"}
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in options and key not in optional:
            allowed = ", ".join(sorted({*options, *optional}))
            raise ValueError(f"random:{architecture} has no option {key}; allowed: {allowed}")
        kind = float if key in {**_FLOATS, **_KIND_FLOATS} else int
        try:
            options[key] = kind(text)
        except ValueError as error:
            raise ValueError(
                f"random:{architecture} option {key} must be a number ({kind.__name__}), got {text!r}"
            ) from error
        is_size = key in _HF_KEYS or (key in _KIND_INTEGERS and key not in _MAY_BE_ZERO)
        if not 0 <= options[key] < math.inf or (is_size and options[key] == 0):
            raise ValueError(f"random:{architecture} option {key} must be positive, got {text}")
    return architecture, options


def _model_config(architecture: str, options: dict[str, float]) -> ModelConfig:
    heads, kv_heads = int(options["num_heads"]), int(options["num_kv_heads"])
    if heads % kv_heads:
        raise ValueError(
            f"random:{architecture} num_heads={heads} must be a multiple of num_kv_heads={kv_heads}"
        )
    if "head_dim" not in options and options["hidden_size"] % heads:
        raise ValueError(
            f"random:{architecture} hidden_size={int(options['hidden_size'])} must be a multiple of "
            f"num_heads={heads}, or head_dim given"
        )
    fields: dict[str, Any] = {_HF_KEYS[key]: int(value) for key, value in options.items() if key in _HF_KEYS}
    fields.setdefault("head_dim", int(options["hidden_size"]) // heads)
    if FAMILIES[architecture].has_layer_kinds:
        fields |= _layer_kinds(options)
    else:
        fields["rope_theta"] = float(options["rope_theta"])
    return model_config_from_hf(
        {
            "model_type": architecture,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": bool(options["tied"]),
            "bos_token_id": 1,
            "eos_token_id": [2],
            **fields,
        }
    )


def _layer_kinds(options: dict[str, float]) -> dict[str, Any]:
    every, factor = int(options["full_every"]), options["yarn_factor"]
    plain = {"rope_type": "default", "rope_theta": options["rope_theta"]}
    stretched = {
        **plain,
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _YARN_ORIGINAL_CONTEXT,
    }
    return {
        "num_experts": int(options["num_experts"]),
        "num_experts_per_tok": int(options["experts_per_token"]),
        "moe_intermediate_size": int(options["expert_size"]),
        "sliding_window": int(options["window"]),
        "layer_types": [
            "full_attention" if every and (i + 1) % every == 0 else "sliding_attention"
            for i in range(int(options["num_layers"]))
        ],
        "rope_parameters": {
            "sliding_attention": plain,
            "full_attention": stretched if factor > 1 else plain,
        },
    }


def _normal(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float32 values that depend on `key` alone."""
    return torch.randn(shape, generator=_generator(key))


def _generator(key: str) -> torch.Generator:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
