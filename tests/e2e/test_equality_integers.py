"""Integers as weights: speculative text is plain text, and transformers' with the values that they stand for. A
drafter of integers changes nothing."""

import copy

import torch

from outrider.cluster.bench.identity import Mismatch
from outrider.workers.weights.integers import with_weights
from support.equality import PLAIN, Reference, assert_same_texts, decode, num_accepted
from support.local_engine import LocalEngine
from support.tensor_source import reference_model, tiny_config
from support.tiny import BOTH, SLOW_TARGET, VOCAB_SIZE, loop_options, tiny_cases

ALL = slice(None)


def test_text_of_eight_bits_is_that_of_transformers(ties: list[Mismatch]) -> None:
    config = tiny_config("llama", num_heads=5, num_kv_heads=1, vocab_size=VOCAB_SIZE)
    original, plain_source = reference_model(config)
    model = copy.deepcopy(original)  # the source reads from the other
    target = with_weights(plain_source, "int8", "target")
    # What drafts is in 4 bits: often right, not always.
    drafter = with_weights(plain_source, "int4", "draft")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in target.names():
                parameter.copy_(target.read(name, ALL, ALL, torch.float32))
    reference, cases = Reference(model), tiny_cases((5, 17, 40, 64))
    with LocalEngine(
        target, drafter, options=loop_options("1 lane, ahead", False), profile=SLOW_TARGET
    ) as engine:
        plain = decode(engine, cases, PLAIN)
        assert_same_texts(reference, cases, plain, ties, "plain, int8")
        drafted = decode(engine, cases, BOTH)
        assert_same_texts(reference, cases, drafted, ties, "drafted, int8")
        assert num_accepted(drafted) > len(cases)
