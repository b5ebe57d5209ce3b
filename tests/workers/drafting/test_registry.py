"""What a configuration may name is what there is."""

from typing import get_args

from outrider.configs.loader import load_config
from outrider.configs.schema import DraftMethod
from outrider.workers.drafting.registry import METHODS, layers_needed
from outrider.workers.weights.random_source import RandomSource


def test_every_method_that_a_configuration_may_name_is_registered() -> None:
    assert set(METHODS) == set(get_args(DraftMethod))
    assert all(method.name == name for name, method in METHODS.items())


def test_methods_that_read_tokens_ask_for_no_hidden_rows() -> None:
    config = load_config("tiny-random", [])
    assert layers_needed(config, RandomSource(config.target.model).config) == ()
