"""Checkpoints of draft heads: what is written is read, what others write is read, and nothing is overlooked."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from outrider.workers.draft_heads.checkpoint import (
    read_eagle3,
    read_lm_head,
    read_medusa,
    write_eagle3,
    write_lm_head,
    write_medusa,
)
from outrider.workers.draft_heads.description import HeadDescription, fingerprint, fingerprint_ids
from outrider.workers.draft_heads.eagle3 import Eagle3Drafter, Eagle3Shape
from outrider.workers.draft_heads.layouts.eagle3 import Eagle3Layout, eagle3_config, tensor_names
from outrider.workers.draft_heads.layouts.medusa import MedusaLayout, medusa_names
from outrider.workers.draft_heads.lm_head import LmHeadShape, make_lm_head
from outrider.workers.draft_heads.medusa import MedusaHeads, MedusaShape
from outrider.workers.weights.config import Rope

VOCAB, HIDDEN = 40, 16
IDS = torch.tensor([0, 1, 5, 7, 30, 39])
ALL = torch.arange(VOCAB)
DESCRIPTION = HeadDescription("org/target", HIDDEN, 32, VOCAB, "abc", "chat", ((0.5, 0.25), (0.25, 0.125)))
SHAPE = Eagle3Shape(
    hidden_size=HIDDEN,
    target_hidden_size=HIDDEN,
    vocab_size=VOCAB,
    taps=(2, 16, 29),
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    rms_norm_eps=1e-5,
    rope=Rope(
        5e5,
        "llama3",
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    max_context=128,
    norm_before_residual=True,
    lm_head=LmHeadShape(HIDDEN, VOCAB, HIDDEN),
)
MEDUSA = MedusaShape(HIDDEN, VOCAB, 3, 2, LmHeadShape(HIDDEN, VOCAB, HIDDEN), False)


def randomized(module: nn.Module) -> None:
    for weight in module.parameters():
        nn.init.normal_(weight)


def eagle3(num_ids: int = VOCAB, rank: int = HIDDEN, taps: tuple[int, ...] = SHAPE.taps) -> Eagle3Drafter:
    shape = replace(SHAPE, taps=taps, lm_head=LmHeadShape(HIDDEN, num_ids, rank))
    drafter = Eagle3Drafter(shape, ALL if num_ids == VOCAB else IDS)
    randomized(drafter)
    return drafter


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(folder: Path, tensors: dict[str, Tensor], removed: tuple[str, ...] = ()) -> None:
    stored = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in stored.items() if name not in removed}
    save_file({**kept, **tensors}, folder / "model.safetensors")


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weight, atol=0, rtol=0)


@pytest.mark.parametrize("layout", ["specforge", "speculators"])
@pytest.mark.parametrize(("num_ids", "rank"), [(VOCAB, HIDDEN), (6, HIDDEN), (VOCAB, 2), (6, 7)])
def test_an_eagle3_drafter_comes_back(tmp_path: Path, layout: Eagle3Layout, num_ids: int, rank: int) -> None:
    drafter = eagle3(num_ids, rank)
    write_eagle3(tmp_path, drafter, DESCRIPTION, layout, torch.float32)
    back, description = read_eagle3(tmp_path)
    assert (back.shape, description) == (drafter.shape, DESCRIPTION)
    assert torch.equal(back.lm_head.ids, drafter.lm_head.ids)
    assert_same(drafter, back)


@pytest.mark.parametrize("layout", ["fasterdecoding", "vllm"])
def test_medusa_heads_come_back(tmp_path: Path, layout: MedusaLayout) -> None:
    heads = MedusaHeads(MEDUSA, ALL)
    randomized(heads)
    write_medusa(tmp_path, heads, DESCRIPTION, layout, torch.float32)
    back, description = read_medusa(tmp_path)
    assert (back.shape, description) == (MEDUSA, DESCRIPTION)
    assert_same(heads, back)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("rank", [HIDDEN, 2])
def test_trimmed_medusa_heads_come_back_and_need_vllms_layout(
    tmp_path: Path, shares: bool, rank: int
) -> None:
    heads = MedusaHeads(replace(MEDUSA, lm_head=LmHeadShape(HIDDEN, 6, rank), shares_lm_head=shares), IDS)
    write_medusa(tmp_path, heads, DESCRIPTION, "vllm", torch.float32)
    back, _ = read_medusa(tmp_path)
    assert back.shape == heads.shape
    assert torch.equal(back.ids, IDS)
    assert_same(heads, back)
    with pytest.raises(
        ValueError, match="fasterdecoding has no trimmed, low-rank or shared LM heads: use vllm"
    ):
        write_medusa(tmp_path, heads, DESCRIPTION, "fasterdecoding", torch.float32)


@pytest.mark.parametrize(("ids", "rank"), [(ALL, 2), (IDS, HIDDEN), (IDS, 7)])
def test_a_head_alone_comes_back(tmp_path: Path, ids: Tensor, rank: int) -> None:
    head = make_lm_head(LmHeadShape(HIDDEN, len(ids), rank), ids)
    write_lm_head(tmp_path, head, DESCRIPTION, torch.float32)
    back, description = read_lm_head(tmp_path)
    assert (back.shape, description) == (head.shape, DESCRIPTION)
    assert torch.equal(back.ids, ids)
    assert_same(head, back)


def test_weights_are_kept_in_the_type_that_is_asked_for_and_read_in_float32(tmp_path: Path) -> None:
    head = make_lm_head(LmHeadShape(HIDDEN, 6, HIDDEN), IDS)
    write_lm_head(tmp_path, head, DESCRIPTION, torch.bfloat16)
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    back, _ = read_lm_head(tmp_path)
    torch.testing.assert_close(back.matrix(), head.matrix().bfloat16().float(), atol=0, rtol=0)


def test_taps_are_inputs_here_and_in_speculators_and_outputs_in_specforge(tmp_path: Path) -> None:
    """The output of layer 1 is the input of layer 2."""
    for layout, ids in (("specforge", [1, 15, 28]), ("speculators", [2, 16, 29])):
        config = eagle3_config(SHAPE, DESCRIPTION, layout, torch.float32)  # type: ignore[arg-type]
        named = config.get("eagle_config", config)
        assert named["eagle_aux_hidden_state_layer_ids"] == ids
        write_eagle3(tmp_path, eagle3(), DESCRIPTION, layout, torch.float32)  # type: ignore[arg-type]
        assert read_eagle3(tmp_path)[0].shape.taps == (2, 16, 29)


def test_a_file_without_taps_has_the_published_ones_of_its_target(tmp_path: Path) -> None:
    write_eagle3(tmp_path, eagle3(), HeadDescription(), "specforge", torch.float32)
    edit_config(tmp_path, eagle_config=None)
    drafter, description = read_eagle3(tmp_path, 32)
    assert drafter.shape.taps == (2, 16, 29)
    assert description.target_num_layers == 32
    with pytest.raises(
        ValueError, match="layer_ids is missing, and without it the target's number of layers"
    ):
        read_eagle3(tmp_path)


def test_taps_must_be_layers_of_the_target(tmp_path: Path) -> None:
    write_eagle3(tmp_path, eagle3(), DESCRIPTION, "speculators", torch.float32)
    with pytest.raises(ValueError, match=r"layers of the target, which has 20, got inputs of \[2, 16, 29\]"):
        read_eagle3(tmp_path, 20)


def test_rows_and_ids_are_sorted_together(tmp_path: Path) -> None:
    drafter = eagle3(6)
    write_eagle3(tmp_path, drafter, DESCRIPTION, "specforge", torch.float32)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    weight = drafter.lm_head.matrix().detach()[order].contiguous()
    edit_tensors(tmp_path, {"lm_head.weight": weight, "d2t": IDS[order] - torch.arange(6)})
    back, _ = read_eagle3(tmp_path)
    assert torch.equal(back.lm_head.ids, IDS)
    assert_same(drafter, back)


def test_vllms_rows_of_all_tokens_are_cut_to_its_token_map(tmp_path: Path) -> None:
    heads = MedusaHeads(replace(MEDUSA, shares_lm_head=True), ALL)
    randomized(heads)
    write_medusa(tmp_path, heads, DESCRIPTION, "vllm", torch.float32)
    edit_config(tmp_path, truncated_vocab_size=6)
    token_map = IDS.flip(0).contiguous()
    full = heads.lm_heads[0].weight.detach()
    edit_tensors(
        tmp_path,
        {"token_map": token_map, "lm_head.weight": full},
        removed=("medusa_heads.lm_heads.0.weight",),
    )
    back, _ = read_medusa(tmp_path)
    assert torch.equal(back.ids, IDS)
    torch.testing.assert_close(back.lm_heads[0].weight, full[IDS], atol=0, rtol=0)


def test_the_heads_of_a_medusa_2_model_are_read_and_its_target_is_not(tmp_path: Path) -> None:
    heads = MedusaHeads(MEDUSA, ALL)
    write_medusa(tmp_path, heads, DESCRIPTION, "fasterdecoding", torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    whole = {f"medusa_head.{name}": x for name, x in stored.items()} | {
        "model.norm.weight": torch.ones(HIDDEN)
    }
    (tmp_path / "model.safetensors").unlink()
    torch.save(whole, tmp_path / "pytorch_model.bin")
    # Published configurations say 2 heads where there are 5.
    edit_config(tmp_path, medusa_num_heads=2)
    back, _ = read_medusa(tmp_path)
    assert_same(heads, back)


def test_vllm_blocks_without_bias_have_a_zero_one(tmp_path: Path) -> None:
    heads = MedusaHeads(MEDUSA, ALL)
    write_medusa(tmp_path, heads, DESCRIPTION, "vllm", torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    edit_tensors(tmp_path, {}, removed=tuple(name for name in stored if name.endswith("bias")))
    edit_config(tmp_path, medusa_fc_bias=False)
    assert_same(heads, read_medusa(tmp_path)[0])


def test_one_error_lists_everything_that_is_wrong(tmp_path: Path) -> None:
    write_eagle3(tmp_path, eagle3(6), DESCRIPTION, "specforge", torch.float32)
    edit_config(tmp_path, surprise=1, other=2)
    edit_tensors(
        tmp_path,
        {
            "midlayer.self_attn.q_proj.weight": torch.ones(4, 4),
            "midlayer.self_attn.q_proj.bias": torch.ones(4),
            "norm.weight": torch.ones(HIDDEN, dtype=torch.int8),
            "lm_head.scale": torch.ones(1),
        },
        removed=("fc.weight", "d2t"),
    )
    with pytest.raises(ValueError, match="tensors missing") as error:
        read_eagle3(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: fields not known here, so what they ask for would be left out: other, surprise; "
        "tensors missing: d2t, fc.weight; "
        "tensors of another shape: midlayer.self_attn.q_proj.weight [4, 4] instead of [16, 32]; "
        "tensors not known here: lm_head.scale, midlayer.self_attn.q_proj.bias; "
        "tensors stored in a type that cannot be read: norm.weight (torch.int8)"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 2}, "drafters of several layers are not supported"),
        ({"attention_bias": True}, "attention_bias must be false"),
        ({"mlp_bias": True}, "mlp_bias must be false"),
        ({"norm_before_fc": True}, "norm_before_fc must be false"),
        ({"fc_norm": True}, "fc_norm must be false"),
        ({"norm_output": True}, "norm_output must be null"),
        ({"model_type": "qwen3"}, "model_type must be llama"),
        ({"architectures": ["Qwen3Eagle"]}, "architectures must be"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised by the method fp8"),
        ({"layer_types": ["sliding_attention"]}, "layer_types must be"),
        ({"draft_vocab_size": 41}, "draft_vocab_size must be at most vocab_size"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "eagle_config.use_aux_hidden_state must be true"),
        ({"num_aux_hidden_states": 4}, "num_aux_hidden_states must be 3"),
        ({"lm_head_rank_divisor": 1}, "lm_head_rank_divisor must be an integer from 2 to 16"),
        ({"outrider": {"template": "none"}}, "outrider.template must be one of chat, raw, both, unknown"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    write_eagle3(tmp_path, eagle3(), DESCRIPTION, "specforge", torch.float32)
    if "outrider" in fields:
        fields = {"outrider": {**DESCRIPTION.to_json(), "template": "none"}}
    edit_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        read_eagle3(tmp_path)


def test_tables_that_disagree_are_refused(tmp_path: Path) -> None:
    write_eagle3(tmp_path, eagle3(6), DESCRIPTION, "specforge", torch.float32)
    edit_tensors(tmp_path, {"t2d": torch.arange(VOCAB) < 6})
    with pytest.raises(ValueError, match="d2t and t2d do not name the same tokens"):
        read_eagle3(tmp_path)
    edit_tensors(tmp_path, {"d2t": torch.full((6,), VOCAB)})
    with pytest.raises(ValueError, match="d2t must name distinct tokens below 40"):
        read_eagle3(tmp_path)


def test_a_copy_of_the_embedding_says_which_target_it_was(tmp_path: Path) -> None:
    write_eagle3(tmp_path, eagle3(), HeadDescription(), "specforge", torch.float32)
    embedding = torch.randn(VOCAB, HIDDEN)
    edit_tensors(tmp_path, {"embed_tokens.weight": embedding})
    _, description = read_eagle3(tmp_path, 32)
    assert description.target_fingerprint == fingerprint(embedding[fingerprint_ids(VOCAB)])


def test_names_and_sizes_are_those_of_the_published_8b_drafter() -> None:
    """SafeAILab's EAGLE3-LLaMA3.1-Instruct-8B."""
    shape = replace(
        SHAPE,
        hidden_size=4096,
        target_hidden_size=4096,
        vocab_size=128256,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        lm_head=LmHeadShape(4096, 32000, 4096),
    )
    with torch.device("meta"):
        drafter = Eagle3Drafter(shape, torch.arange(32000, device="cpu"))
    sizes = {name: list(x.shape) for name, x in drafter.state_dict().items()}
    assert sizes == {
        "fc.weight": [4096, 12288],
        "midlayer.hidden_norm.weight": [4096],
        "midlayer.input_layernorm.weight": [4096],
        "midlayer.post_attention_layernorm.weight": [4096],
        "midlayer.self_attn.q_proj.weight": [4096, 8192],
        "midlayer.self_attn.k_proj.weight": [1024, 8192],
        "midlayer.self_attn.v_proj.weight": [1024, 8192],
        "midlayer.self_attn.o_proj.weight": [4096, 4096],
        "midlayer.mlp.gate_proj.weight": [14336, 4096],
        "midlayer.mlp.up_proj.weight": [14336, 4096],
        "midlayer.mlp.down_proj.weight": [4096, 14336],
        "norm.weight": [4096],
        "lm_head.weight": [32000, 4096],
    }
    names = list(sizes)
    assert tensor_names(names, [], "specforge") == {name: name for name in names}
    renamed = set(tensor_names(names, [], "speculators").values())
    assert renamed == {name.replace("midlayer.", "layers.0.") for name in names}
    low_rank = replace(shape, lm_head=LmHeadShape(4096, 128256, 512))
    with torch.device("meta"):
        weights = Eagle3Drafter(low_rank, torch.arange(128256, device="cpu")).state_dict()
    assert list(weights["lm_head.down.weight"].shape) == [512, 4096]
    assert list(weights["lm_head.up.weight"].shape) == [128256, 512]
    assert eagle3_config(low_rank, DESCRIPTION, "specforge", torch.bfloat16)["lm_head_rank_divisor"] == 8


def test_names_are_those_of_published_medusa_heads() -> None:
    """FasterDecoding/medusa-vicuna-7b-v1.3 and vLLM."""
    shape = MedusaShape(4096, 32000, 2, 1, LmHeadShape(4096, 32000, 4096), False)
    with torch.device("meta"):
        heads = MedusaHeads(shape, torch.arange(32000, device="cpu"))
    sizes = {name: list(x.shape) for name, x in heads.state_dict().items()}
    names = medusa_names(list(sizes), 1, "fasterdecoding", "")
    assert {names[name]: size for name, size in sizes.items()} == {
        "0.0.linear.weight": [4096, 4096],
        "0.0.linear.bias": [4096],
        "0.1.weight": [32000, 4096],
        "1.0.linear.weight": [4096, 4096],
        "1.0.linear.bias": [4096],
        "1.1.weight": [32000, 4096],
    }
    assert set(medusa_names(list(sizes), 1, "vllm", "medusa_heads.").values()) == {
        "medusa_heads.blocks.0.layers.0.weight",
        "medusa_heads.blocks.0.layers.0.bias",
        "medusa_heads.lm_heads.0.weight",
        "medusa_heads.blocks.1.layers.0.weight",
        "medusa_heads.blocks.1.layers.0.bias",
        "medusa_heads.lm_heads.1.weight",
    }
