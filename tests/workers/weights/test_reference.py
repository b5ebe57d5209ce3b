from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from outrider.workers.weights.progress import silent
from outrider.workers.weights.reference import load_transformers
from outrider.workers.weights.resolver import resolve
from outrider.workers.weights.tokenizer import load_tokenizer
from support.models import random_model, random_tensors, smollm2, write_gguf, write_safetensors

IDS = torch.arange(5, 45).view(2, 20)


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mellum"])
@pytest.mark.parametrize("tied", [0, 1])
def test_it_is_the_model_that_transformers_loads(tmp_path: Path, architecture: str, tied: int) -> None:
    options = f"tied={tied}&num_heads=6&num_kv_heads=3&hidden_size=96"
    config, tensors = random_tensors(architecture, options)
    write_safetensors(tmp_path, config, tensors)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(IDS).logits
    write_gguf(tmp_path / "other" / "m.gguf", config, tensors)
    for model in (str(tmp_path), str(tmp_path / "other"), f"random:{architecture}?{options}"):
        loaded = load_transformers(resolve(model, tmp_path, silent, "target.model"), torch.float32)
        assert torch.equal(loaded(IDS).logits, expected)


def test_it_generates_greedily_until_an_end_id() -> None:
    model = load_transformers(random_model("seed=1"), torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [2]
    assert not model.generation_config.do_sample
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_tensors_that_are_missing_are_named(tmp_path: Path) -> None:
    config, tensors = random_tensors("llama")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_safetensors(tmp_path, config, tensors)
    resolved = resolve(str(tmp_path), tmp_path, silent, "target.model")
    with pytest.raises(ValueError, match=r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load_transformers(resolved, torch.float32)


@torch.inference_mode()
def test_smollm2_answers() -> None:
    torch.set_num_threads(1)
    resolved = smollm2()
    tokenizer = load_tokenizer(resolved)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = load_transformers(resolved, torch.float32).generate(**prompt, max_new_tokens=20)
    assert "The capital of France is Paris." in tokenizer.decode(answer[0])
