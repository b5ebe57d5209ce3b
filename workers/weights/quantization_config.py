"""`quantization_config` of Hugging Face to a `Quantization`: read field by field, refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from outrider.workers.weights.compressed_tensors_config import read_compressed_tensors
from outrider.workers.weights.fields import Fields
from outrider.workers.weights.fp8_format import Fp8Format, block_fp8, fbgemm_fp8
from outrider.workers.weights.inputs import DynamicInputs
from outrider.workers.weights.packed_format import PackedFormat
from outrider.workers.weights.quantization import (
    FormatRule,
    ModuleNames,
    Quantization,
    check_expressions,
)

_KEYS = ("quantization_config", "compression_config", "quantization")
_METHOD = "quant_method"
# Where a key of `modules_to_not_convert` may end in a name: transformers' `should_convert_module`.
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"
_EVERY = ModuleNames(every=True)


def read_quantization(fields: Fields) -> Quantization | None:
    """What a model's configuration says of how its weights are stored; None: plainly.

    Raises:
        ValueError: a method, or a part of one, that is not supported; names the field and what is.
    """
    keys = [key for key in _KEYS if fields.given(key)]
    if not keys:
        return None
    if len(keys) > 1:
        raise ValueError(f"{keys[0]} and {keys[1]} must not both be given")
    described = Fields(fields.object(keys[0]), f"{keys[0]}.")
    if not described.given(_METHOD):
        raise ValueError(f"{keys[0]}: {_unsupported(fields.object(keys[0]))}")
    method = described.string(_METHOD)
    if method not in _READERS:
        raise ValueError(
            f"{keys[0]}: weights quantised by the method {method} cannot be read; readable: "
            f"{', '.join(_READERS)}, float32, float16, bfloat16, and GGUF"
        )
    quantization = _READERS[method](described)
    described.refuse_unread()
    return quantization


def refuse_quantization(fields: Fields) -> None:
    """For who has no use for scales, as a draft head: without them a model runs and is wrong."""
    for key in _KEYS:
        if fields.given(key):
            described = fields.value(key)
            names = described if isinstance(described, dict) else {}
            raise ValueError(f"{key}: {_unsupported(names)}")


def _unsupported(described: Mapping[str, Any]) -> str:
    method = described.get(_METHOD)
    if method is None:
        on = [name for name in ("load_in_8bit", "load_in_4bit") if described.get(name)]
        method = f"bitsandbytes ({on[0]})" if on else "without a name"
    return (
        f"weights quantised by the method {method} cannot be read; use float32, float16 or bfloat16 "
        "weights, or GGUF"
    )


def _fbgemm_fp8(fields: Fields) -> Quantization:
    bound = 1200.0
    if fields.has("activation_scale_ub"):
        bound = fields.number("activation_scale_ub", "a number above 0", lambda value: value > 0)
    return Quantization(
        "fbgemm_fp8",
        (FormatRule(_EVERY, fbgemm_fp8(bound)),),
        _not_converted(fields, "modules_to_not_convert"),
    )


def _fp8(fields: Fields) -> Quantization:
    """DeepSeek's and Qwen's, in blocks; AutoFP8's, whose matrices have a scale each, names no block."""
    if fields.has("fmt"):
        fields.text("fmt", ("e4m3",))
    scheme = (
        fields.text("activation_scheme", ("dynamic", "static"))
        if fields.has("activation_scheme")
        else "dynamic"
    )
    fields.require_off(
        {
            "dequantize": (False,),
            "scale_fmt": ("float",),
            "expert_dtype": ("fp8",),
            "modules_to_convert": ([],),
            "kv_cache_scheme": (),
        }
    )
    keys = [key for key in ("modules_to_not_convert", "ignored_layers") if fields.given(key)]
    if len(keys) > 1:
        raise ValueError("modules_to_not_convert and ignored_layers must not both be given")
    plain = _not_converted(fields, keys[0] if keys else "modules_to_not_convert")
    if fields.given("weight_block_size"):
        sizes = fields.integers("weight_block_size")
        if len(sizes) != 2 or min(sizes) < 1:
            raise fields.wrong("weight_block_size", "two integers of at least 1")
        if scheme != "dynamic":
            raise fields.wrong("activation_scheme", "dynamic where weights have blocks")
        form = block_fp8(sizes[0], sizes[1])
    else:
        form = _fp8_without_blocks(fields.has("weight_block_size"), scheme == "static")
    return Quantization("fp8", (FormatRule(_EVERY, form),), plain)


# How the integers were found, not what they mean.
_GPTQ_HARMLESS = (
    *(
        "damp_percent",
        "damp_auto_increment",
        "static_groups",
        "true_sequential",
        "act_group_aware",
        "mse",
        "sym",
    ),
    *("desc_act", "model_name_or_path", "model_file_base_name", "dataset", "tokenizer", "model_seqlen"),
    *("block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id", "meta"),
    *("use_cuda_fp16", "use_exllama", "exllama_config", "max_input_length", "cache_block_outputs", "backend"),
    *("quantizer", "offload_to_disk", "hyb_act"),
)


def _gptq(fields: Fields) -> Quantization:
    """`g_idx` says the order of columns, whatever `desc_act` says: it must be theirs."""
    fields.ignore(_GPTQ_HARMLESS)
    fields.require_off(
        {
            "dynamic": ({},),
            "is_marlin_format": (False,),
            "modules_in_block_to_quantize": (),
            "pack_dtype": ("int32",),
        }
    )
    version = "gptq"
    for key in ("checkpoint_format", "format"):
        if fields.has(key):
            version = fields.text(key, ("gptq", "gptq_v2"))
    lm_head = fields.flag("lm_head") if fields.has("lm_head") else False
    form = PackedFormat(
        "gptq",
        _bits(fields, (4, 8)),
        _group_size(fields),
        zeros=True,
        zero_offset=1 if version == "gptq" else 0,
        has_order=True,
    )
    return Quantization(
        "gptq", (FormatRule(_EVERY, form),), ModuleNames(ending=() if lm_head else ("lm_head",))
    )


def _awq(fields: Fields) -> Quantization:
    fields.ignore(("backend", "do_fuse", "fuse_max_seq_len", "exllama_config", "modules_to_fuse"))
    if fields.has("version"):
        fields.text("version", ("gemm", "GEMM"))
    fields.require_off({"zero_point": (True,)})
    form = PackedFormat("awq", _bits(fields, (4,)), _group_size(fields), zeros=True)
    return Quantization("awq", (FormatRule(_EVERY, form),), _not_converted(fields, "modules_to_not_convert"))


def _bits(fields: Fields, allowed: tuple[Literal[4, 8], ...]) -> Literal[4, 8]:
    key = "bits" if fields.has("bits") else "w_bit"
    given = fields.integer(key)
    for bits in allowed:
        if bits == given:
            return bits
    raise fields.wrong(key, " or ".join(map(str, allowed)))


def _group_size(fields: Fields) -> int:
    """0 for whole rows, which files say as -1."""
    key = "group_size" if fields.has("group_size") else "q_group_size"
    size = fields.integer(key, low=-1)
    if size == 0:
        raise fields.wrong(key, "-1 or at least 1")
    return max(0, size)


def _fp8_without_blocks(by_transformers: bool, is_static: bool) -> Fp8Format:
    """transformers says that there are no blocks and has names of its own."""
    scale, input_scale = (
        ("weight_scale_inv", "activation_scale") if by_transformers else ("weight_scale", "input_scale")
    )
    if is_static:
        return Fp8Format("tensor", scale_name=scale, input_scale_name=input_scale)
    # One dynamic scale for all rows would make each depend on those computed with it: one per row is finer.
    return Fp8Format("tensor", scale_name=scale, inputs=DynamicInputs())


def _not_converted(fields: Fields, key: str) -> ModuleNames:
    """Keys as transformers understands them; without any, the head is left out."""
    if not fields.given(key):
        fields.ignore((key,))
        return ModuleNames(ending=("lm_head",))
    names = fields.texts(key)
    check_expressions(key, names)
    return ModuleNames(starting=tuple(f"(?:{name}){_BOUNDARY}" for name in names), ending=tuple(names))


_READERS: Mapping[str, Callable[[Fields], Quantization]] = {
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _fp8,
    "compressed-tensors": read_compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
}
