"""The same checkpoint as a transformers model: what equality tests and baselines compare with."""

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from outrider.workers.weights.config import to_hf_config
from outrider.workers.weights.resolver import ResolvedModel, open_source
from outrider.workers.weights.scaled import rounded_inputs
from outrider.workers.weights.source import WeightSource, read_scaled
from outrider.workers.weights.tensors import CACHE_SCALES, expert_prefix


def load_transformers(resolved: ResolvedModel, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' own class on CPU in eval mode, its parameters read one by one from our source.

    Of quantised weights it has the numbers that they stand for, and layers round their inputs as the format has it;
    experts do not, nor is its cache in FP8. Its generation configuration holds the checkpoint's end ids and no
    sampling defaults.
    Raises ValueError when the source lacks a parameter of the transformers class, or has one more.
    """
    source = open_source(resolved)
    config = to_hf_config(source.config)
    # Built without memory, so that the peak is the weights and not twice them.
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    left = {name for name in source.names() if not name.endswith(CACHE_SCALES)}
    for name, parameter in dict(model.named_parameters()).items():
        if name == "lm_head.weight" and source.config.tied_embeddings:
            continue
        parts = _stored_names(name, left)
        missing = sorted(set(parts) - left)
        if missing or not parts:
            raise ValueError(
                f"{resolved.model} has no tensor {(*missing, name)[0]}, which {type(model).__name__} needs"
            )
        left -= set(parts)
        weight = torch.cat([source.read(part, slice(None), slice(None), dtype) for part in parts])
        if parts != [name]:
            weight = weight.view(parameter.shape[0], -1, weight.shape[-1])
        if weight.shape != parameter.shape:
            raise ValueError(f"{resolved.model}: {name} is {list(weight.shape)}, not {list(parameter.shape)}")
        _set_parameter(model, name, weight)
        if parts == [name]:
            _round_inputs(model, source, name)
    if left:
        raise ValueError(f"{resolved.model} has tensors that {type(model).__name__} lacks, e.g. {min(left)}")
    model.tie_weights()
    # Its frequencies are computed when it is made; on the meta device they came out empty.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    end_ids = list(source.config.eos_token_ids)
    model.generation_config = GenerationConfig(
        eos_token_id=end_ids or None, pad_token_id=end_ids[0] if end_ids else 0, do_sample=False
    )
    return model.eval().requires_grad_(False)


def _stored_names(name: str, stored: set[str]) -> list[str]:
    """The tensors of a checkpoint, in whose order they are one parameter: transformers keeps the matrices of all
    experts of a layer in one."""
    prefix, is_expert, matrices = name.partition("mlp.experts.")
    if not is_expert:
        return [name]
    kinds = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[matrices]
    num_experts = sum(
        other.startswith(prefix + is_expert) and other.endswith(f".{kinds[0]}.weight") for other in stored
    )
    return [f"{prefix}{expert_prefix(i)}{kind}.weight" for i in range(num_experts) for kind in kinds]


def _round_inputs(model: PreTrainedModel, source: WeightSource, name: str) -> None:
    """Before the product with a matrix whose format wants it."""
    some_rows = read_scaled(source, name, slice(1), slice(None))
    if some_rows is None or some_rows.inputs is None:
        return
    inputs, group = some_rows.inputs, some_rows.group
    model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
        lambda _, given: (rounded_inputs(given[0].flatten(0, -2), inputs, group).view(given[0].shape),)
    )


def _set_parameter(model: PreTrainedModel, name: str, weight: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, torch.nn.Parameter(weight, requires_grad=False))
