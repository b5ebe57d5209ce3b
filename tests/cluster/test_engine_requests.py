"""What callers of `Engine` may hand over: prompts in every form, with options of every form."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import pytest

from outrider.cluster.api import GenerationRequest
from outrider.cluster.engine import Engine
from outrider.cluster.engine_requests import requests_of
from outrider.cluster.request_options import request_sampling
from outrider.configs.loader import load_config
from outrider.configs.schema import Config
from outrider.workers.sequences.grammar import Grammar
from outrider.workers.sequences.params import SamplingParams

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("prompts", "each"),
    [
        ("hello", ["hello"]),
        (["hello"], ["hello"]),
        (("a", "b"), ["a", "b"]),
        ((text for text in ("a", "b")), ["a", "b"]),
        ([], []),
        ([1, 2], [[1, 2]]),
        (np.array([1, 2]), [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (MESSAGES, [MESSAGES]),
        ([MESSAGES, "a", [1]], [MESSAGES, "a", [1]]),
        (GenerationRequest("hello"), ["hello"]),
        # No prompts: the door says so of each.
        (b"hello", [b"hello"]),
        (None, [None]),
        ({"prompt": "a"}, [{"prompt": "a"}]),
    ],
)
def test_one_prompt_or_several(prompts: Any, each: list[object]) -> None:
    assert [asked.prompt for asked in requests_of(prompts)] == each


def test_options_are_those_of_every_prompt_and_a_request_brings_its_own() -> None:
    own = GenerationRequest("c", MappingProxyType({"seed": 3}))
    first, second, third = requests_of(["a", "b", own], {"max_tokens": 4}, {"max_nodes": 0})
    assert first == GenerationRequest("a", {"max_tokens": 4}, {"max_nodes": 0})
    assert second.sampling == {"max_tokens": 4}
    assert third == GenerationRequest("c", {"seed": 3})
    assert type(third.sampling) is dict  # can be pickled


def test_sampling_params_leave_nothing_to_the_configuration() -> None:
    config = load_config("tiny-random", ["sampling.temperature=0.5", "sampling.max_tokens=7"])
    params = SamplingParams(seed=2, logit_bias=((3, 1.5),), stop=("END",))
    (asked,) = requests_of("a", params)
    assert request_sampling(config, asked.sampling, 300) == params


def test_a_grammar_is_asked_for_by_its_text() -> None:
    with pytest.raises(ValueError, match=r"SamplingParams\.grammar must be left out: .*structured_outputs"):
        requests_of("a", SamplingParams(grammar=Grammar("start: /a/")))


@pytest.mark.parametrize(
    ("asked", "sampling"),
    [
        ({"stop": "END"}, SamplingParams(stop=("END",))),
        ({"stop": ["a", "b"]}, SamplingParams(stop=("a", "b"))),
        ({"logit_bias": {5: -1, 6: 0.5}}, SamplingParams(logit_bias=((5, -1.0), (6, 0.5)))),
        ({"logit_bias": [[5, -1]]}, SamplingParams(logit_bias=((5, -1.0),))),
    ],
)
def test_what_may_be_said_in_two_forms(asked: Mapping[str, object], sampling: SamplingParams) -> None:
    assert request_sampling(load_config("tiny-random"), asked, 300) == request_sampling(
        load_config("tiny-random"), {"stop": sampling.stop, "logit_bias": sampling.logit_bias}, 300
    )


def test_what_is_no_configuration_is_refused() -> None:
    with pytest.raises(
        ValueError, match="config must be a Config, as load_config gives it, got 'quickstart'"
    ):
        Engine.start(cast(Config, "quickstart"))
    with pytest.raises(
        ValueError, match=r"overrides must be a list of a\.b=c texts, got 'target\.tp_size=2'"
    ):
        load_config("tiny-random", "target.tp_size=2")
    with pytest.raises(ValueError, match=r"config must be a YAML file or one of .*tiny-random; got \{\}"):
        load_config(cast(str, {}))
