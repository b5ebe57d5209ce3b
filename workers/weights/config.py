"""What a decoder-only transformer is here: one record for every family."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a layer (Su et al., arXiv:2104.09864).

    Attributes:
        theta: base of the frequencies.
        kind: how they are stretched for contexts longer than those first trained on: "default" (not at all),
            "linear" (positions divided by a factor), "llama3" (Llama 3.1) or "yarn" (arXiv:2309.00071).
        parameters: of the stretch, under transformers' names (`factor`, `original_max_position_embeddings`, ...);
            empty for "default".
    """

    theta: float = 10000.0
    kind: str = "default"
    parameters: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class DenseMlp:
    """SwiGLU: down(silu(gate(x)) * up(x)).

    Attributes:
        intermediate_size: columns of gate and up.
    """

    intermediate_size: int


@dataclass(frozen=True)
class LayerConfig:
    """What may differ between the layers of a model.

    Attributes:
        window: positions that a query sees, its own included; 0 for all, as in `tree_attention`.
        rope: its rotary positions.
        mlp: its feed-forward part.
    """

    window: int
    rope: Rope
    mlp: DenseMlp


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: RMS norm, rotary positions, grouped-query attention, and an MLP per layer.

    Attributes:
        architecture: name of its family, see `weights.families`.
        layers: first to last.
        hidden_size, num_heads, num_kv_heads, head_dim, vocab_size: sizes.
        rms_norm_eps: added to the mean square.
        max_context: longest sequence, tokens.
        tied_embeddings: the output head is the embedding matrix.
        qkv_bias: q, k and v projections have a bias.
        qk_norm: RMS norm on each query and key head before rotary embedding.
        bos_token_ids, eos_token_ids: may be empty.
    """

    architecture: str
    layers: tuple[LayerConfig, ...]
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_context: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    bos_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def to_hf_config(config: ModelConfig) -> "PreTrainedConfig":
    """The same model as a transformers configuration, for comparison with transformers' own model."""
    from transformers import AutoConfig

    first = config.layers[0]
    windows = {layer.window for layer in config.layers} - {0}
    assert all((layer.rope, layer.mlp) == (first.rope, first.mlp) for layer in config.layers)
    assert len(windows) <= 1, windows
    windowed: dict[str, Any] = {}
    if windows:
        kinds = ["sliding_attention" if layer.window else "full_attention" for layer in config.layers]
        windowed = {"use_sliding_window": True, "sliding_window": windows.pop(), "layer_types": kinds}
    return AutoConfig.for_model(
        config.architecture,
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=first.mlp.intermediate_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=hf_rope_parameters(first.rope),
        max_position_embeddings=config.max_context,
        tie_word_embeddings=config.tied_embeddings,
        bos_token_id=config.bos_token_ids[0] if config.bos_token_ids else None,
        eos_token_id=list(config.eos_token_ids) or None,
        pad_token_id=None,
        **windowed,
    )


def hf_rope_parameters(rope: Rope) -> dict[str, Any]:
    """As `rope_parameters` of a transformers configuration."""
    return {"rope_theta": rope.theta, "rope_type": rope.kind, **rope.parameters}
