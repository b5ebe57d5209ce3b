"""What a decoder-only transformer is here: one record for every family."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from outrider.workers.weights.families import FAMILIES
from outrider.workers.weights.quantization import Quantization

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
class RoutedMlp:
    """A mixture of experts (Shazeer et al., arXiv:1701.06538): each token goes through a few of many SwiGLU MLPs.

    Attributes:
        num_experts: that a router chooses from, by a softmax over all of them.
        experts_per_token: the likeliest ones, whose outputs are added up by their probabilities.
        intermediate_size: columns of gate and up of each expert.
        renormalised: the probabilities of a token's experts are divided by their sum.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    renormalised: bool


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
    mlp: DenseMlp | RoutedMlp


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
        quantization: which matrices are stored as narrow numbers; None: none.
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
    quantization: Quantization | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def widest_window(self) -> int:
        """Positions that a query sees in the layer that sees most, its own included; 0 where some layer sees all."""
        windows = [layer.window for layer in self.layers]
        return max(windows) if all(windows) else 0


def to_hf_config(config: ModelConfig) -> "PreTrainedConfig":
    """The same model as a transformers configuration, for comparison with transformers' own model."""
    from transformers import AutoConfig

    first = config.layers[0]
    described: dict[str, Any] = {}
    if FAMILIES[config.architecture].has_layer_kinds:
        described = _layer_kinds(config.layers)
    else:
        windows = {layer.window for layer in config.layers} - {0}
        assert all((layer.rope, layer.mlp) == (first.rope, first.mlp) for layer in config.layers)
        assert len(windows) <= 1, windows
        described |= {
            "rope_parameters": hf_rope_parameters(first.rope),
            "intermediate_size": first.mlp.intermediate_size,
        }
        if windows:
            described |= {
                "use_sliding_window": True,
                "sliding_window": windows.pop(),
                "layer_types": [_kind(layer) for layer in config.layers],
            }
    return AutoConfig.for_model(
        config.architecture,
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_context,
        tie_word_embeddings=config.tied_embeddings,
        bos_token_id=config.bos_token_ids[0] if config.bos_token_ids else None,
        eos_token_id=list(config.eos_token_ids) or None,
        pad_token_id=None,
        **described,
    )


def hf_rope_parameters(rope: Rope) -> dict[str, Any]:
    """As `rope_parameters` of a transformers configuration."""
    return {"rope_theta": rope.theta, "rope_type": rope.kind, **rope.parameters}


def _layer_kinds(layers: tuple[LayerConfig, ...]) -> dict[str, Any]:
    """Fields of a family that names the kind of each layer, and gives positions by kind of attention."""
    windows = {layer.window for layer in layers} - {0}
    ropes = {_kind(layer): layer.rope for layer in layers}
    experts = {layer.mlp for layer in layers if isinstance(layer.mlp, RoutedMlp)}
    dense = {layer.mlp for layer in layers if isinstance(layer.mlp, DenseMlp)}
    assert all(ropes[_kind(layer)] == layer.rope for layer in layers)
    assert max(len(windows), len(experts), len(dense)) <= 1, (windows, experts, dense)
    described: dict[str, Any] = {
        "layer_types": [_kind(layer) for layer in layers],
        "mlp_layer_types": ["sparse" if isinstance(layer.mlp, RoutedMlp) else "dense" for layer in layers],
        "rope_parameters": {kind: hf_rope_parameters(rope) for kind, rope in ropes.items()},
        "sliding_window": windows.pop() if windows else None,
    }
    if dense:
        described["intermediate_size"] = dense.pop().intermediate_size
    if experts:
        mlp = experts.pop()
        described |= {
            "num_experts": mlp.num_experts,
            "num_experts_per_tok": mlp.experts_per_token,
            "moe_intermediate_size": mlp.intermediate_size,
            "norm_topk_prob": mlp.renormalised,
        }
    return described


def _kind(layer: LayerConfig) -> str:
    return "sliding_attention" if layer.window else "full_attention"
