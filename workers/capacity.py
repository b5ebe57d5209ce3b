"""How many pages of KV rows there are, and so how long a text may be: from configurations alone."""

from outrider.configs.schema import Config
from outrider.workers.model.shard import ShardPlan, bytes_per_page
from outrider.workers.weights.config import ModelConfig

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def cache_is_fp8(config: Config, model: ModelConfig) -> bool:
    """Whether the target's KV cache is in FP8: asked for, or what the checkpoint was made for."""
    is_made_for_fp8 = model.quantization is not None and model.quantization.cache_is_fp8
    return config.target.kv_cache_dtype != "auto" or is_made_for_fp8


def num_target_pages(config: Config, model: ModelConfig) -> int:
    """KV pages of the target: the same on every rank, so the rank with the most KV heads decides.

    Raises:
        ValueError: `target.kv_cache_bytes` does not hold one page.
    """
    target = config.target
    element_bytes = 1 if cache_is_fp8(config, model) else _ELEMENT_BYTES[target.dtype]
    plans = [ShardPlan(model, rank, target.tp_size) for rank in range(target.tp_size)]
    per_page = max(bytes_per_page(plan, element_bytes, target.page_size) for plan in plans)
    return _num_pages("target", target.kv_cache_bytes, per_page)


def num_draft_pages(config: Config, model: ModelConfig, tp_size: int = 1) -> int:
    """KV pages of a drafter, `draft.model` on its `draft.tp_size` ranks or draft heads on one; the same on each.

    Raises:
        ValueError: `draft.kv_cache_bytes` does not hold one page.
    """
    draft = config.draft
    element_bytes, page_size = _ELEMENT_BYTES[draft.dtype], config.target.page_size
    plans = [ShardPlan(model, rank, tp_size, "draft") for rank in range(tp_size)]
    per_page = max(bytes_per_page(plan, element_bytes, page_size) for plan in plans)
    return _num_pages("draft", draft.kv_cache_bytes, per_page)


def max_sequence_tokens(config: Config, model: ModelConfig) -> int:
    """Longest sequence (prompt and output, tokens) that can be served: context limits and the whole KV cache."""
    rows = num_target_pages(config, model) * config.target.page_size
    return min(config.target.max_context, model.max_context, rows)


def _num_pages(role: str, kv_cache_bytes: int, bytes_per_page: int) -> int:
    if kv_cache_bytes < bytes_per_page:
        raise ValueError(
            f"{role}.kv_cache_bytes must be at least {bytes_per_page} (one page), got {kv_cache_bytes}"
        )
    return kv_cache_bytes // bytes_per_page
