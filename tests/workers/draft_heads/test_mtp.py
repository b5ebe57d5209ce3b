"""Heads for multi-token prediction: transformers' own as the judge, and checkpoints there and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from outrider.workers.draft_heads.checkpoint import read_mtp, write_mtp
from outrider.workers.draft_heads.description import HeadDescription
from outrider.workers.draft_heads.layouts.mtp import MtpLayout
from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.draft_heads.mtp import MtpDrafter, MtpShape, default_layer
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.draft_heads import for_serving
from outrider.workers.model.embedding import MatrixEmbedding
from outrider.workers.model.feature_drafter import CachedDrafter
from outrider.workers.model.shard import ShardPlan
from outrider.workers.sequences.vocabulary import VocabularyRange
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.safetensors_source import SafetensorsSource
from outrider.workers.weights.tensors import EMBEDDING, FINAL_NORM, HEAD
from support.models import write_safetensors
from support.rows import SequenceRows, batch_of, chain
from support.tensor_source import TensorSource, reference_model, tiny_config, tiny_mellum

CPU = torch.device("cpu")
EVERY = slice(None)
LAYOUTS: tuple[MtpLayout, ...] = ("deepseek", "mtp", "speculators")
DESCRIPTION = HeadDescription("org/target", 32, 3, 300, "abc", "chat", ((0.5, 0.25), (0.25, 0.125)))
MELLUM = tiny_mellum((12, 0, 12))
TARGETS = {
    "mellum": MELLUM,
    "llama": tiny_config("llama"),
    "qwen2": tiny_config("qwen2", tied_embeddings=True, windows=(0, 48)),
    "qwen3": tiny_config("qwen3"),
}


def random_head(target: ModelConfig, num_ids: int = 0, rank: int = 0) -> MtpDrafter:
    """Norms are not trivial, attention is peaked."""
    lm_head = LmHeadShape(target.hidden_size, num_ids or target.vocab_size, rank or target.hidden_size)
    generator = torch.Generator().manual_seed(7)
    ids = torch.randperm(target.vocab_size, generator=generator)[: lm_head.num_ids].sort().values
    drafter = MtpDrafter(MtpShape(target, default_layer(target), lm_head), ids)
    for name, weight in drafter.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1.5 * noise / weight.shape[-1] ** 0.5 if weight.dim() > 1 else 0.2 * noise
        if "norm" in name:
            weight.data += 1.0
    return drafter.requires_grad_(False)


def tensors_of(source: TensorSource) -> dict[str, torch.Tensor]:
    return {name: source.read(name, EVERY, EVERY, torch.float32) for name in source.names()}


def with_target(folder: Path, target: ModelConfig, source: TensorSource, drafter: MtpDrafter) -> None:
    """One folder with the target and the head, as Mellum 2's will be: the head has no LM head of its own."""
    drafter.shares_lm_head = True
    write_mtp(folder, drafter, HeadDescription(), "mtp", torch.float32)
    stored = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["outrider"], config["draft_vocab_size"]
    write_safetensors(folder, target, tensors_of(source) | stored)
    (folder / "config.json").write_text(json.dumps(config))


@torch.inference_mode()
def test_it_computes_what_transformers_computes_past_its_window_too(tmp_path: Path) -> None:
    _, source = reference_model(MELLUM)
    drafter = random_head(MELLUM)
    with_target(tmp_path, MELLUM, source, drafter)
    main = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    theirs = MtpModel.from_pretrained(main).eval()
    tokens = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    rows = main(tokens, output_hidden_states=True).hidden_states[-1]  # after the final norm
    read, positions = tokens[:, 1:], torch.arange(1, 40)[None]
    want = theirs.forward_layer(0, rows[:, :-1], positions, MtpCache(), input_ids=read)[0]

    found, _ = read_mtp(tmp_path)
    assert found.shares_lm_head
    found.take_target(source.read(FINAL_NORM, EVERY, EVERY, torch.float32), tensors_of(source)[HEAD])
    own = found.model
    assert own.layers == (MELLUM.layers[2],)
    embedding = MatrixEmbedding(tensors_of(source)[EMBEDDING], VocabularyRange(0, 300))
    cache = PagedCache(own, ShardPlan(own, 0, 1), 16, 7, torch.float32, CPU)
    cached = CachedDrafter(for_serving(found, 300, torch.float32, CPU, packed=True), embedding, cache)
    pages = [5, 2, 9, 0, 11, 7]
    batch = batch_of([SequenceRows(pages, 0, chain(39), 0, read[0].tolist())], 7, CPU)
    got = cached.forward(batch, rows[0, :-1])
    assert want.std() > 0.5
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(cached.logits(got), main.lm_head(want), atol=1e-4, rtol=0)
    # Fed back on itself: the row behind, of the output in the place of the target's.
    tree = [*chain(39)[:1]]
    next_batch = batch_of([SequenceRows(pages, 39, tree, 0, [17])], 7, CPU)
    want_next = theirs.forward_layer(
        0,
        torch.cat([rows[:, :-1], want[None, -1:]], dim=1),
        torch.arange(1, 41)[None],
        MtpCache(),
        input_ids=torch.cat([read, torch.tensor([[17]])], dim=1),
    )[0, -1:]
    torch.testing.assert_close(cached.forward(next_batch, got[-1:]), want_next, atol=1e-4, rtol=0)
    # The target beside the head is read as if the head were not there.
    assert SafetensorsSource(tmp_path).names() == source.names()
    assert SafetensorsSource(tmp_path).config.layers == MELLUM.layers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("head", ["full", "trimmed", "low rank", "low rank, trimmed"])
def test_what_is_written_is_read(tmp_path: Path, layout: MtpLayout, family: str, head: str) -> None:
    drafter = random_head(
        TARGETS[family], num_ids=120 if "trimmed" in head else 0, rank=9 if "low rank" in head else 0
    )
    write_mtp(tmp_path, drafter, DESCRIPTION, layout, torch.float32)
    found, description = read_mtp(tmp_path)
    assert found.shape == drafter.shape
    assert description == DESCRIPTION
    assert torch.equal(found.lm_head.ids, drafter.lm_head.ids)
    assert not found.shares_lm_head
    theirs = found.state_dict()
    for name, weight in drafter.state_dict().items():
        assert torch.equal(theirs[name], weight), name


def test_names_are_those_of_deepseek_and_of_speculators(tmp_path: Path) -> None:
    drafter = random_head(TARGETS["qwen3"])
    inner = {
        f"{part}.weight"
        for part in (
            *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
            "input_layernorm",
            "post_attention_layernorm",
        )
    }
    for layout, prefix, outer in (
        (
            "deepseek",
            "model.layers.2.",
            ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"),
        ),
        (
            "speculators",
            "mtp_layers.0.",
            ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
        ),
    ):
        write_mtp(tmp_path / layout, drafter, DESCRIPTION, layout, torch.bfloat16)  # type: ignore[arg-type]
        names = set(load_file(tmp_path / layout / "model.safetensors"))
        expected = {prefix + name for name in inner | {f"{name}.weight" for name in outer}}
        assert names == expected | ({"lm_head.weight"} if layout == "speculators" else set())
    config = json.loads((tmp_path / "speculators" / "config.json").read_text())
    assert (config["speculators_model_type"], config["architectures"]) == ("mtp", ["MTPDraftModel"])
    assert config["transformer_layer_config"]["model_type"] == "qwen3"


def change(folder: Path, fields: dict[str, Any], tensors: dict[str, torch.Tensor | None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    stored = load_file(folder / "model.safetensors")
    changed = {name: x for name, x in (stored | tensors).items() if x is not None}
    save_file(changed, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("layout", "fields", "tensors", "message"),
    [
        ("deepseek", {"num_nextn_predict_layers": 2}, {}, "num_nextn_predict_layers must be 1 .heads of sev"),
        (
            "deepseek",
            {},
            {"model.layers.3.enorm.weight": None},
            "tensors missing: model.layers.3.enorm.weight",
        ),
        (
            "deepseek",
            {},
            {"model.layers.4.enorm.weight": torch.ones(2)},
            "not known here: model.layers.4.eno",
        ),
        (
            "deepseek",
            {},
            {"model.layers.3.hnorm.weight": torch.ones(2)},
            "of another shape: model.layers.3.hn",
        ),
        ("deepseek", {"residual_scale": 2.0}, {}, "residual_scale is not known here"),
        (
            "mtp",
            {"mtp_layer_types": ["chunked"]},
            {},
            "mtp_layer_types must be one of full_attention, sliding",
        ),
        ("speculators", {"num_centroids": 4}, {}, "what they ask for would be left out: num_centroids"),
        ("speculators", {"speculators_model_type": "eagle3"}, {}, "speculators_model_type must be mtp"),
    ],
)
def test_what_nobody_reads_is_refused(
    tmp_path: Path,
    layout: MtpLayout,
    fields: dict[str, Any],
    tensors: dict[str, torch.Tensor | None],
    message: str,
) -> None:
    write_mtp(tmp_path, random_head(MELLUM), DESCRIPTION, layout, torch.float32)
    change(tmp_path, fields, tensors)
    with pytest.raises(ValueError, match=message) as error:
        read_mtp(tmp_path)
    assert "\n" not in str(error.value)


def test_a_head_for_full_layers_is_read_as_one(tmp_path: Path) -> None:
    drafter = MtpDrafter(MtpShape(MELLUM, 1, LmHeadShape(32, 300, 32)), torch.arange(300))
    write_mtp(tmp_path, drafter, DESCRIPTION, "mtp", torch.float32)
    assert read_mtp(tmp_path)[0].model.layers == (MELLUM.layers[1],)
