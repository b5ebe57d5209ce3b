"""`quantization_config` of `compressed-tensors`: groups of modules, each with a scheme of its own.

Format: https://github.com/vllm-project/compressed-tensors, `quantization/quant_config.py` and `quant_args.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from outrider.workers.weights.fields import Fields
from outrider.workers.weights.fp8_format import Fp8Format, Scope
from outrider.workers.weights.inputs import DynamicInputs
from outrider.workers.weights.packed_format import Layout, PackedFormat
from outrider.workers.weights.quantization import (
    FormatRule,
    ModuleNames,
    NumberFormat,
    Quantization,
    check_expressions,
)

_REGEX = "re:"
_LINEAR = "Linear"
_SCOPES: Mapping[str, Scope] = {"tensor": "tensor", "channel": "row", "block": "block"}
# How scales and zero points were found, and what they are kept as: the tensors say it.
_HARMLESS = ("observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype")


def read_compressed_tensors(fields: Fields) -> Quantization:
    """Raises ValueError for what is not supported; names the field and what is."""
    fields.ignore(("version", "global_compression_ratio"))
    fields.require_off(
        {
            "sparsity_config": ({},),
            "transform_config": ({},),
            "moe_sparsity_config": ({},),
            "dequantize": (False,),
        }
    )
    if fields.has("quantization_status"):
        fields.text("quantization_status", ("compressed", "frozen"))
    overall = fields.text("format", (*_FORMATS, "mixed-precision"))
    ignored = fields.texts("ignore") if fields.given("ignore") else []
    groups = fields.object("config_groups")
    if not groups:
        raise fields.wrong("config_groups", "an object with at least one group")
    by_target: dict[str, NumberFormat] = {}
    for name in groups:
        prefix = f"{fields.prefix}config_groups."
        group = Fields(Fields(groups, prefix).object(name), f"{prefix}{name}.")
        targets = group.texts("targets")
        own = group.text("format", tuple(_FORMATS)) if group.given("format") else overall
        if own not in _FORMATS:
            raise group.wrong("format", f"one of {', '.join(_FORMATS)}")
        form = _FORMATS[own](group)
        group.require_off({"output_activations": ()})
        group.refuse_unread()
        by_target |= dict.fromkeys(targets, form)
    # A name goes before an expression, and both before a class: compressed-tensors' `match_targets`.
    order = sorted(by_target, key=lambda target: (target == _LINEAR, _REGEX in target, target))
    rules = tuple(
        FormatRule(_names(fields, "config_groups", [target]), by_target[target]) for target in order
    )
    plain = _names(fields, "ignore", ignored)
    return Quantization("compressed-tensors", rules, plain, _cache_is_fp8(fields))


def _names(fields: Fields, key: str, targets: list[str]) -> ModuleNames:
    """Modules that targets name: by a class, exactly, or by an expression that matches at their start."""
    expressions = [
        target.removeprefix(_REGEX) if target.startswith(_REGEX) else f"{re.escape(target)}$"
        for target in targets
    ]
    check_expressions(f"{fields.prefix}{key}", expressions)
    return ModuleNames(every=_LINEAR in targets, starting=tuple(expressions))


def _float_quantized(group: Fields) -> Fp8Format:
    weights = _scheme(group, "weights")
    _require_fp8(weights)
    weights.require_off({"dynamic": (False,)})
    strategy = weights.text("strategy", ("tensor", "channel", "block"))
    block = (0, 0)
    if strategy == "block":
        sizes = weights.integers("block_structure")
        if len(sizes) != 2 or min(sizes) < 1:
            raise weights.wrong("block_structure", "two integers of at least 1")
        block = (sizes[0], sizes[1])
    weights.require_off(
        {"group_size": (), "block_structure": ()} if strategy != "block" else {"group_size": ()}
    )
    weights.refuse_unread()
    scope = _SCOPES[strategy]
    if not group.given("input_activations"):
        return Fp8Format(scope, block)
    inputs = _scheme(group, "input_activations")
    _require_fp8(inputs)
    strategy = inputs.text("strategy", ("tensor", "token", "group"))
    is_dynamic = inputs.flag("dynamic")
    inputs.ignore(("block_structure",))
    if strategy == "group":
        if not is_dynamic or inputs.integer("group_size") != block[1]:
            raise inputs.wrong(
                "group_size", f"the columns of a block of the weights ({block[1]}), and dynamic"
            )
        inputs.refuse_unread()
        return Fp8Format(scope, block, inputs=DynamicInputs(by_group=True))
    inputs.require_off({"group_size": ()})
    inputs.refuse_unread()
    if not is_dynamic:
        return Fp8Format(scope, block, input_scale_name="input_scale")
    # A dynamic scale for a whole tensor would make a row depend on those computed with it: one per token is finer,
    # and is what vLLM computes.
    return Fp8Format(scope, block, inputs=DynamicInputs())


def _scheme(group: Fields, key: str) -> Fields:
    fields = Fields(group.object(key), f"{group.prefix}{key}.")
    fields.ignore(_HARMLESS)
    return fields


def _require_fp8(scheme: Fields) -> None:
    scheme.text("type", ("float",))
    if scheme.integer("num_bits") != 8:
        raise scheme.wrong("num_bits", "8")
    if not scheme.flag("symmetric"):
        raise scheme.wrong("symmetric", "true")


def _cache_is_fp8(fields: Fields) -> bool:
    if not fields.given("kv_cache_scheme"):
        return False
    scheme = _scheme(fields, "kv_cache_scheme")
    _require_fp8(scheme)
    scheme.text("strategy", ("tensor",))
    scheme.require_off({"dynamic": (False,), "group_size": (), "block_structure": ()})
    scheme.refuse_unread()
    return True


def _integers(group: Fields, layout: Layout) -> PackedFormat:
    """Weights alone: with 8-bit activations it would be another product."""
    weights = _scheme(group, "weights")
    weights.text("type", ("int",))
    bits = weights.integer("num_bits")
    if bits not in ((4, 8) if layout == "packed" else (8,)):
        raise weights.wrong("num_bits", "4 or 8" if layout == "packed" else "8")
    weights.require_off({"dynamic": (False,), "block_structure": ()})
    is_grouped = weights.text("strategy", ("channel", "group")) == "group"
    size = weights.integer("group_size") if is_grouped else 0
    if not is_grouped:
        weights.require_off({"group_size": ()})
    symmetric = weights.flag("symmetric")
    weights.refuse_unread()
    group.require_off({"input_activations": ()})
    return PackedFormat(layout, 4 if bits == 4 else 8, size, zeros=not symmetric)


def _pack_quantized(group: Fields) -> PackedFormat:
    return _integers(group, "packed")


def _int_quantized(group: Fields) -> PackedFormat:
    return _integers(group, "bytes")


_FORMATS: Mapping[str, Callable[[Fields], NumberFormat]] = {
    "float-quantized": _float_quantized,
    "naive-quantized": _float_quantized,
    "pack-quantized": _pack_quantized,
    "int-quantized": _int_quantized,
}
