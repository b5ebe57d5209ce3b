"""The same checkpoint as a transformers model: what equality tests and baselines compare with."""

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from outrider.workers.weights.config import to_hf_config
from outrider.workers.weights.resolver import ResolvedModel, open_source


def load_transformers(resolved: ResolvedModel, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' own class on CPU in eval mode, its parameters read one by one from our source.

    Its generation configuration holds the checkpoint's end ids and no sampling defaults.
    Raises ValueError when the source lacks a parameter of the transformers class, or has one more.
    """
    source = open_source(resolved)
    config = to_hf_config(source.config)
    # Built without memory, so that the peak is the weights and not twice them.
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    left = source.names()
    for name, parameter in dict(model.named_parameters()).items():
        if name == "lm_head.weight" and source.config.tied_embeddings:
            continue
        if name not in left:
            raise ValueError(f"{resolved.model} has no tensor {name}, which {type(model).__name__} needs")
        left.remove(name)
        weight = source.read(name, slice(None), slice(None), dtype)
        if weight.shape != parameter.shape:
            raise ValueError(f"{resolved.model}: {name} is {list(weight.shape)}, not {list(parameter.shape)}")
        _set_parameter(model, name, weight)
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


def _set_parameter(model: PreTrainedModel, name: str, weight: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, torch.nn.Parameter(weight, requires_grad=False))
