import pytest
import torch

from outrider.workers.weights.random_source import RandomSource
from outrider.workers.weights.reference import load_transformers
from support.models import random_model

EVERY = slice(None)
UP = "model.layers.0.mlp.up_proj.weight"


def read(spec: str, name: str) -> torch.Tensor:
    return RandomSource(spec).read(name, EVERY, EVERY, torch.float32)


def test_a_tensor_depends_on_seed_and_name_only() -> None:
    first = read("random:llama?seed=3", UP)
    assert torch.equal(first, read("random:llama?seed=3&num_layers=5", UP))
    assert not torch.equal(first, read("random:llama?seed=4", UP))
    assert not torch.equal(first, read("random:llama?seed=3", UP.replace("up_proj", "gate_proj")))


def test_slices_are_parts_of_the_whole() -> None:
    source = RandomSource("random:qwen3?seed=1")
    whole = source.read(UP, EVERY, EVERY, torch.float32)
    assert torch.equal(
        source.read(UP, slice(3, 9), slice(10, 20), torch.bfloat16), whole[3:9, 10:20].bfloat16()
    )
    ids = torch.tensor([5, 0, 319])
    embedding = "model.embed_tokens.weight"
    whole = source.read(embedding, EVERY, EVERY, torch.float32)
    assert torch.equal(source.read_rows(embedding, ids, torch.float32), whole[ids])


def test_options() -> None:
    options = "num_layers=3&hidden_size=96&intermediate_size=80&num_heads=6&num_kv_heads=3&vocab_size=500"
    config = RandomSource(f"random:qwen2?{options}&tied=1&head_dim=8&max_context=777&rope_theta=5e5").config
    assert (config.num_layers, config.hidden_size, config.layers[0].mlp.intermediate_size) == (3, 96, 80)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (6, 3, 8)
    assert (config.vocab_size, config.max_context, config.layers[0].rope.theta) == (500, 777, 5e5)
    assert config.tied_embeddings
    assert config.qkv_bias


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("random:gpt2", "random:gpt2 is unknown; allowed: llama, qwen2, qwen3"),
        ("random:llama?layers=2", "has no option layers; allowed: head_dim, hidden_size"),
        ("random:llama?num_layers=two", "num_layers must be a number .int., got 'two'"),
        ("random:llama?num_heads=0", "num_heads must be positive, got 0"),
        ("random:llama?num_heads=3", "must be a multiple of num_kv_heads=2"),
        ("random:llama?num_heads=6", "hidden_size=64 must be a multiple of num_heads=6"),
    ],
)
def test_bad_options_are_named(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        RandomSource(spec)
    assert "\n" not in str(error.value)


@torch.inference_mode()
def test_text_is_varied_and_a_perturbed_copy_agrees_often_but_not_always() -> None:
    torch.set_num_threads(1)
    target = load_transformers(random_model("seed=0"), torch.float32)
    prompts = torch.randint(3, 320, (4, 8), generator=torch.Generator().manual_seed(0))
    target.generation_config.eos_token_id = None
    texts = target.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=60)
    # Neither one token for ever nor a short cycle.
    assert min(len(set(text[8:].tolist())) for text in texts) > 20
    chosen = target(texts).logits.argmax(-1)
    for perturb, least, most in ((0.1, 0.75, 0.97), (0.3, 0.5, 0.85)):
        drafter = load_transformers(random_model(f"seed=0&perturb={perturb}"), torch.float32)
        agreement = (drafter(texts).logits.argmax(-1) == chosen).float().mean().item()
        assert least < agreement < most
