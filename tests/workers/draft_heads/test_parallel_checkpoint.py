"""Checkpoints of parallel drafters: what others publish is read to the letter, what is not named is not guessed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.workers.draft_heads.checkpoint import read_parallel, write_parallel
from outrider.workers.draft_heads.convolutions import NO_CONVOLUTION, ConvolutionShape
from outrider.workers.draft_heads.description import HeadDescription
from outrider.workers.draft_heads.layouts.parallel import read_parallel_config, tensor_names
from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.draft_heads.pairs import NO_PAIR, PairShape
from outrider.workers.draft_heads.parallel import BlockLayer, ParallelDrafter, ParallelShape
from outrider.workers.weights.config import Rope
from support.parallel_oracle import EXPECTED, IDS, KINDS, NUM_TOKENS, folder_of
from support.parallel_reference import block_output

VOCAB, HIDDEN = 40, 16
ALL, SOME = torch.arange(VOCAB), torch.tensor(IDS)
DESCRIPTION = HeadDescription("org/target", HIDDEN, 32, VOCAB, "abc", "chat", ((0.5, 0.25), (0.25, 0.125)))
SHAPE = ParallelShape(
    hidden_size=HIDDEN,
    target_hidden_size=HIDDEN,
    vocab_size=VOCAB,
    taps=(2, 16, 29),
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    rms_norm_eps=1e-5,
    rope=Rope(5e5),
    max_context=128,
    layers=(BlockLayer(True),) * 2,
    block_size=7,
    first_slot=0,
    num_levels=7,
    mask_token_id=38,
    lm_head=LmHeadShape(HIDDEN, VOCAB, HIDDEN),
    pair=PairShape("markov", 5),
    confidence="hidden_and_pair",
    convolution=NO_CONVOLUTION,
)
# z-lab/Qwen3-8B-DFlash-b16; JetSpec's differs in `causal_head`.
QWEN3_8B: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "block_size": 16,
    "bos_token_id": 151643,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "layer_types": ["full_attention"] * 5,
    "max_position_embeddings": 40960,
    "max_window_layers": 5,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_target_layers": 36,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
DEEPSPEC_8B = {
    **{key: value for key, value in QWEN3_8B.items() if key != "dflash_config"},
    "architectures": ["Qwen3DSparkModel"],
    "block_size": 7,
    "confidence_head_with_markov": True,
    "enable_confidence_head": True,
    "markov_head_type": "vanilla",
    "markov_rank": 256,
    "mask_token_id": 151669,
    "num_anchors": 512,
    "target_layer_ids": [-1, 9, 17, 25, 33],
}


def drafter_of(shape: ParallelShape, ids: torch.Tensor) -> ParallelDrafter:
    torch.manual_seed(0)
    drafter = ParallelDrafter(shape, ids)
    for weight in drafter.parameters():
        torch.nn.init.normal_(weight)
    return drafter


def shapes_in_file(raw: dict[str, Any]) -> dict[str, list[int]]:
    shape = read_parallel_config(raw).shape
    with torch.device("meta"):
        drafter = ParallelDrafter(shape, torch.arange(shape.lm_head.num_ids, device="cpu"))
    weights = drafter.state_dict()
    names = tensor_names(list(weights))
    return {names[name]: list(x.shape) for name, x in weights.items() if name != "lm_head.weight"}


@pytest.mark.parametrize(
    ("num_ids", "rank", "shares"), [(VOCAB, HIDDEN, False), (6, HIDDEN, True), (6, 2, False)]
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "pair": NO_PAIR,
            "confidence": "none",
            "first_slot": 1,
            "num_levels": 6,
            "layers": (BlockLayer(False),),
        },
    ],
)
def test_a_parallel_drafter_comes_back(
    tmp_path: Path, num_ids: int, rank: int, shares: bool, changes: dict[str, Any]
) -> None:
    shape = replace(SHAPE, lm_head=LmHeadShape(HIDDEN, num_ids, rank), **changes)
    drafter = drafter_of(shape, ALL if num_ids == VOCAB else SOME)
    drafter.shares_lm_head = shares
    write_parallel(tmp_path, drafter, DESCRIPTION, torch.float32)
    back, description = read_parallel(tmp_path)
    assert (back.shape, description, back.shares_lm_head) == (shape, DESCRIPTION, shares)
    assert torch.equal(back.lm_head.ids, drafter.lm_head.ids)
    if shares:
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        back.take_target(drafter.lm_head.weight.data)
    for name, weight in drafter.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], weight, atol=0, rtol=0)


def test_real_sizes_and_names_of_z_lab_and_jetspec() -> None:
    layer = {
        "input_layernorm.weight": [4096],
        "post_attention_layernorm.weight": [4096],
        "self_attn.q_proj.weight": [4096, 4096],
        "self_attn.k_proj.weight": [1024, 4096],
        "self_attn.v_proj.weight": [1024, 4096],
        "self_attn.o_proj.weight": [4096, 4096],
        "self_attn.q_norm.weight": [128],
        "self_attn.k_norm.weight": [128],
        "mlp.gate_proj.weight": [12288, 4096],
        "mlp.up_proj.weight": [12288, 4096],
        "mlp.down_proj.weight": [4096, 12288],
    }
    expected = {"fc.weight": [4096, 20480], "hidden_norm.weight": [4096], "norm.weight": [4096]}
    expected |= {f"layers.{i}.{name}": shape for i in range(5) for name, shape in layer.items()}
    assert len(expected) == 58
    assert shapes_in_file(QWEN3_8B) == expected
    dflash = read_parallel_config(QWEN3_8B)
    assert (dflash.problems, dflash.description.target_num_layers) == ([], 36)
    # The outputs of layers 1, 9, … are what enters 2, 10, …; slot 0 guesses nothing.
    assert dflash.shape.taps == (2, 10, 18, 26, 34)
    assert (dflash.shape.first_slot, dflash.shape.num_levels) == (1, 15)
    assert dflash.shape.rope == Rope(1e6)
    assert not dflash.shape.layers[0].is_causal
    for key in ("causal_head", "causal"):
        inner = {**QWEN3_8B["dflash_config"], key: True}
        assert (
            read_parallel_config({**QWEN3_8B, "dflash_config": inner}).shape.layers == (BlockLayer(True),) * 5
        )
    assert read_parallel_config({**QWEN3_8B, "is_causal": True}).shape.layers[0].is_causal


def test_real_sizes_and_names_of_deepspec() -> None:
    found = shapes_in_file(DEEPSPEC_8B)
    assert (
        found.items()
        >= {
            "fc.weight": [4096, 20480],
            "markov_head.markov_w1.weight": [151936, 256],
            "markov_head.markov_w2.weight": [151936, 256],
            "confidence_head.proj.weight": [1, 4352],
            "confidence_head.proj.bias": [1],
        }.items()
    )
    assert len(found) == 58 + 4
    file = read_parallel_config(DEEPSPEC_8B)
    assert file.problems == []
    assert file.shape.taps == (0, 10, 18, 26, 34)  # -1 is the embedding
    assert (file.shape.first_slot, file.shape.num_levels) == (0, 7)
    assert file.shape.layers == (BlockLayer(False),) * 5
    plain = {**DEEPSPEC_8B, "markov_rank": 0, "enable_confidence_head": False}
    assert len(shapes_in_file(plain)) == 58


def test_deepspecs_copies_of_the_target_are_its_head_and_its_mark(tmp_path: Path) -> None:
    shape = replace(SHAPE, layers=(BlockLayer(False),) * 2)
    drafter = drafter_of(shape, ALL)
    write_parallel(tmp_path, drafter, HeadDescription(), torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    inner = config.pop("dflash_config")
    kept = {key: value for key, value in inner.items() if key not in ("causal", "sample_from_anchor")}
    del config["outrider"], config["draft_vocab_size"]
    (tmp_path / "config.json").write_text(
        json.dumps({**config, **kept, "architectures": ["Qwen3DSparkModel"]})
    )
    stored = load_file(tmp_path / "model.safetensors")
    save_file({**stored, "embed_tokens.weight": torch.randn(VOCAB, HIDDEN)}, tmp_path / "model.safetensors")
    back, description = read_parallel(tmp_path)
    assert (back.shape, back.shares_lm_head) == (shape, False)
    assert len(description.target_fingerprint) == 64
    assert torch.equal(back.lm_head.weight, drafter.lm_head.weight)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_speculators_wrote_is_read_and_gives_its_logits(kind: str) -> None:
    """Blocks behind random anchors of a text longer than the windows."""
    drafter, _ = read_parallel(folder_of(kind))
    shape, expected = drafter.shape, load_file(folder_of(kind) / EXPECTED)
    assert shape.taps == (2, 16, 29)  # inputs already
    window = {
        "dflash": BlockLayer(True, 6, True),
        "dspark": BlockLayer(False),
        "dflash2": BlockLayer(False, 6, True),
    }
    assert shape.layers == (BlockLayer(False), window[kind])
    assert (shape.first_slot, shape.num_levels) == ((0, 4) if kind == "dspark" else (1, 3))
    assert shape.confidence == ("hidden_and_pair" if kind == "dspark" else "none")
    assert shape.convolution == (ConvolutionShape(2, 8) if kind == "dflash2" else NO_CONVOLUTION)
    if drafter.shares_lm_head:
        assert kind != "dspark"
        drafter.take_target(expected["head"])
    else:
        assert drafter.lm_head.ids.tolist() == list(IDS)
        assert torch.equal(drafter.lm_head.weight, expected["head"])
    anchors = expected["anchors"].tolist()
    assert max(anchors) > 12
    for number, anchor in enumerate(anchors):
        tokens = expected["tokens"]
        output = block_output(drafter, expected["embedding"], expected["taps"][:anchor], int(tokens[anchor]))
        previous = tokens[anchor : anchor + shape.num_levels]
        pair_rows = drafter.pair_rows(previous, output)
        logits = drafter.with_pair(drafter.logits(output), pair_rows)
        own = expected["logits"][number, shape.first_slot :]
        torch.testing.assert_close(logits, own, atol=2e-5, rtol=2e-5)
        if kind == "dspark":
            said = drafter.confidence(output, pair_rows)
            torch.testing.assert_close(said, expected["confidence"][number], atol=2e-5, rtol=2e-5)
    assert len(expected["tokens"]) == NUM_TOKENS


SPECULATORS = json.loads((folder_of("dspark") / "config.json").read_text())
WINDOWED = {"layer_types": ["full_attention"] * 4 + ["sliding_attention"]}


def changed(raw: dict[str, Any], where: str, **fields: Any) -> dict[str, Any]:
    inner = raw[where] if where else raw
    inner = {key: value for key, value in {**inner, **fields}.items() if value != "gone"}
    return {**raw, where: inner} if where else inner


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (changed(QWEN3_8B, "dflash_config", target_layer_ids="gone"), r"\.target_layer_ids must be a list"),
        (changed(QWEN3_8B, "dflash_config", mask_token_id="gone"), r"\.mask_token_id must be an integer"),
        (changed(QWEN3_8B, "dflash_config", mask_token_id=151936), r"must be an integer from 0 to 151935"),
        (changed(QWEN3_8B, "dflash_config", mask_token_id=151645), r"must be a token that .*eos_token_id"),
        (changed(QWEN3_8B, "", is_causal=True, dflash_config={**QWEN3_8B["dflash_config"], "causal": False}),
         r"dflash_config\.causal and is_causal must be the same, got False, True"),
        (changed(QWEN3_8B, "dflash_config", draft_shift=True), r"dflash_config\.draft_shift must be false"),
        (changed(QWEN3_8B, "dflash_config", block_size=8), r"dflash_config\.block_size must be block_size \(16\)"),
        (changed(QWEN3_8B, "", rope_theta="gone"), r"rope_theta must be given: the target's"),
        (changed(QWEN3_8B, "", block_size=65), r"block_size must be an integer from 2 to 64, got 65"),
        (changed(QWEN3_8B, "", model_type="llama"), r"model_type must be qwen3, got 'llama'"),
        (changed(QWEN3_8B, "", **WINDOWED), r"sliding_window must be an integer of at least 16"),
        (changed(QWEN3_8B, "", **WINDOWED, sliding_window=2048), r"use_sliding_window must be true"),
        (changed(DEEPSPEC_8B, "", architectures=["Gemma4DSparkModel"]), r"must be \['Qwen3DSparkModel'\]"),
        (changed(DEEPSPEC_8B, "", markov_head_type="rnn"), r"must be one of vanilla, gated, got 'rnn'"),
        (changed(DEEPSPEC_8B, "", markov_rank=0), r"must be false without markov_rank"),
        (changed(SPECULATORS, "", aux_hidden_state_layer_ids=None), r"ids must be a list"),
        (changed(SPECULATORS, "", speculators_model_type="xpress"), r"must be one of dflash, dspark, dflash2"),
    ],
)  # fmt: skip
def test_what_a_file_does_not_say_is_not_guessed(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_parallel_config(raw)


def test_windows_are_kept() -> None:
    raw = {**QWEN3_8B, **WINDOWED, "sliding_window": 2048, "use_sliding_window": True}
    file = read_parallel_config(raw)
    assert file.shape.layers == (BlockLayer(False),) * 4 + (BlockLayer(False, 2048),)
    assert file.shape.model.widest_window == 0  # four layers see all


def test_a_tensor_that_is_missing_or_not_known_and_a_field_nobody_reads_are_refused(tmp_path: Path) -> None:
    write_parallel(tmp_path, drafter_of(SHAPE, ALL), DESCRIPTION, torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["hidden_norm.weight"]
    stored["layers.1.mlp.up_proj.weight"] = torch.zeros(3, HIDDEN)
    stored["layers.2.input_layernorm.weight"] = torch.zeros(HIDDEN)
    save_file(stored, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["dflash_config"]["projector_type"] = "gated"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="projector_type") as caught:
        read_parallel(tmp_path)
    for part in (
        "missing: hidden_norm.weight",
        "of another shape: layers.1.mlp.up_proj.weight [3, 16] instead of [24, 16]",
        "not known here: layers.2.input_layernorm.weight",
    ):
        assert part in str(caught.value)
