"""Bad parameters are refused in one line that names the field and what it allows."""

import math
from typing import Any

import pytest

from outrider.workers.sequences.params import SamplingParams

VOCAB_SIZE = 1000


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.01},
        {"temperature": 1},
        {"top_k": VOCAB_SIZE},
        {"top_p": 1e-6},
        {"top_p": 1},
        {"min_p": 1.0},
        {"logit_bias": ((0, -100.0), (999, 100.0))},
        {"seed": 2**64 - 1},
        {"logprobs": True, "top_logprobs": 20},
        {"stop_token_ids": (0, 999), "stop": ("\n\n",)},
    ],
)
def test_good_values_pass(fields: dict[str, Any]) -> None:
    SamplingParams(**fields).validate(VOCAB_SIZE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_p": 2}, "sampling.top_p must be in (0, 1], got 2"),
        ({"top_p": 0.0}, "sampling.top_p must be in (0, 1], got 0.0"),
        ({"top_p": "0.9"}, "sampling.top_p must be in (0, 1], got '0.9'"),
        ({"top_p": math.nan}, "sampling.top_p must be in (0, 1], got nan"),
        ({"temperature": -1.0}, "sampling.temperature must be 0 (greedy) or in [0.01, 100], got -1.0"),
        ({"temperature": 0.001}, "sampling.temperature must be 0 (greedy) or in [0.01, 100], got 0.001"),
        ({"temperature": True}, "sampling.temperature must be 0 (greedy) or in [0.01, 100], got True"),
        ({"top_k": -1}, "sampling.top_k must be an integer in [0, 1000], got -1"),
        ({"top_k": 2.0}, "sampling.top_k must be an integer in [0, 1000], got 2.0"),
        ({"min_p": 1.5}, "sampling.min_p must be in [0, 1], got 1.5"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty must be in [0.01, 100], got 0.0"),
        ({"repetition_penalty": 1e-40}, "sampling.repetition_penalty must be in [0.01, 100], got 1e-40"),
        ({"repetition_penalty": 1e40}, "sampling.repetition_penalty must be in [0.01, 100], got 1e+40"),
        ({"temperature": 10**400}, f"must be 0 (greedy) or in [0.01, 100], got {10**400}"),
        ({"presence_penalty": -math.inf}, "sampling.presence_penalty must be in [-2, 2], got -inf"),
        ({"presence_penalty": 3.0}, "sampling.presence_penalty must be in [-2, 2], got 3.0"),
        ({"frequency_penalty": -3.0}, "sampling.frequency_penalty must be in [-2, 2], got -3.0"),
        ({"logit_bias": ((1000, 1.0),)}, "logit_bias token ids must be an integer in [0, 999], got 1000"),
        ({"logit_bias": ((1, 101.0),)}, "sampling.logit_bias values must be in [-100, 100], got 101.0"),
        ({"logit_bias": ((1, math.nan),)}, "sampling.logit_bias values must be in [-100, 100], got nan"),
        ({"logit_bias": ((1,),)}, "sampling.logit_bias entries must be pairs (token id, value), got (1,)"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "sampling.logit_bias token ids must be distinct, got 1"),
        (
            {"logit_bias": tuple((i, 0.0) for i in range(301))},
            "logit_bias must be at most 300 entries, got 301",
        ),
        ({"seed": -1}, "sampling.seed must be an integer in [0, 18446744073709551615], got -1"),
        ({"max_tokens": 0}, "sampling.max_tokens must be an integer in [1, 2147483647], got 0"),
        ({"stop_token_ids": (5, -1)}, "stop_token_ids entries must be an integer in [0, 999], got -1"),
        ({"stop": ("",)}, "sampling.stop entries must be non-empty strings, got ''"),
        ({"ignore_eos": 1}, "sampling.ignore_eos must be true or false, got 1"),
        ({"logprobs": 3}, "sampling.logprobs must be true or false, got 3"),
        (
            {"logprobs": True, "top_logprobs": 21},
            "sampling.top_logprobs must be an integer in [0, 20], got 21",
        ),
        ({"top_logprobs": 2}, "sampling.top_logprobs must be 0 unless logprobs is true, got 2"),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared whole below
        SamplingParams(**fields).validate(VOCAB_SIZE)
    assert str(error.value).endswith(message)
    assert str(error.value).startswith("sampling.")
    assert "\n" not in str(error.value)


def test_what_parameters_imply() -> None:
    assert SamplingParams(temperature=0.0).is_greedy
    assert not SamplingParams(temperature=0.0, top_p=0.5, top_k=3).truncates
    assert SamplingParams(top_p=0.5).truncates
    assert not SamplingParams(logit_bias=((1, 1.0),)).uses_context
    assert SamplingParams(logit_bias=((1, 1.0),)).edits_logits
    assert SamplingParams(repetition_penalty=1.1).uses_context
