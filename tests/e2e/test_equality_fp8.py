"""A checkpoint in FP8, without and with a KV cache in FP8: speculative text is plain text, and transformers' of the
same checkpoint, which compressed-tensors has written and computes."""

from pathlib import Path

import pytest

from outrider.cluster.bench.identity import Mismatch
from outrider.workers.weights.safetensors_source import SafetensorsSource
from support.equality import PLAIN, Reference, assert_same_texts, decode, num_accepted
from support.local_engine import LocalEngine
from support.quantised import compressed_tensors, fp8
from support.tensor_source import reference_model, tiny_config
from support.tiny import BOTH, SLOW_TARGET, VOCAB_SIZE, loop_options, tiny_cases


@pytest.mark.parametrize("cache", [None, fp8("tensor")], ids=["float32 cache", "FP8 cache"])
def test_text_of_fp8_weights_is_that_of_transformers(
    tmp_path: Path, ties: list[Mismatch], cache: object
) -> None:
    config = tiny_config("llama", num_heads=5, num_kv_heads=1, vocab_size=VOCAB_SIZE)
    written = compressed_tensors(
        tmp_path, config, fp8("channel"), fp8("token", dynamic=True), cache=fp8("tensor") if cache else None
    )
    target, reference = SafetensorsSource(tmp_path), Reference(written.reference)
    # What the target was before it was quantised drafts: often right, not always.
    drafter, cases = reference_model(config)[1], tiny_cases((5, 17, 40, 64))
    with LocalEngine(
        target,
        drafter,
        options=loop_options("1 lane, ahead", False),
        profile=SLOW_TARGET,
        fp8_cache=cache is not None,
    ) as engine:
        plain = decode(engine, cases, PLAIN)
        assert_same_texts(reference, cases, plain, ties, "plain, FP8")
        drafted = decode(engine, cases, BOTH)
        assert_same_texts(reference, cases, drafted, ties, "drafted, FP8")
        assert num_accepted(drafted) > len(cases)
