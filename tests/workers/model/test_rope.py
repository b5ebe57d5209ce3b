import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from outrider.workers.model.rope import RotaryEmbedding, rope_frequencies
from outrider.workers.weights.config import Rope, to_hf_config
from support.tensor_source import ROPES, tiny_config


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.kind)
def test_frequencies_are_those_of_transformers(rope: Rope) -> None:
    config = tiny_config(rope=rope)
    theirs = LlamaRotaryEmbedding(to_hf_config(config))
    assert torch.equal(rope_frequencies(config, rope)[0], theirs.inv_freq)
    positions = torch.tensor([0, 1, 17, 900])
    cos, sin = RotaryEmbedding(config, rope, torch.float32, torch.device("cpu"))(positions)
    their_cos, their_sin = theirs(torch.zeros(1), positions[None])
    torch.testing.assert_close(cos, their_cos[0, :, :8])
    torch.testing.assert_close(sin, their_sin[0, :, :8])
