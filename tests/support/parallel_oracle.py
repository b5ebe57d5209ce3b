"""Parallel drafters as speculators computes them, to compare with: as it writes them, and their logits.

See `speculators_oracle`. The folders `tests/workers/draft_heads/speculators_0_9_0_{dflash,dspark,dflash2}/` were
written by

    python tests/support/parallel_oracle.py          # with speculators 0.9.0 installed beside
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "workers" / "draft_heads"
EXPECTED = "expected.safetensors"
KINDS = ("dflash", "dspark", "dflash2")
VOCAB, HIDDEN, NUM_TOKENS, BLOCK, WINDOW, NUM_ANCHORS = 40, 16, 24, 4, 5, 6
IDS = (0, 1, 5, 7, 30, 39)
TAPS = (2, 16, 29)


def folder_of(kind: str) -> Path:
    """Where what speculators wrote is."""
    return FOLDER / f"speculators_0_9_0_{kind}"


def _model_of(kind: str) -> Any:
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.dflash import DFlashSpeculatorConfig
    from speculators.models.dflash.core import DFlashDraftModel
    from speculators.models.dflash2.config import DFlash2SpeculatorConfig
    from speculators.models.dflash2.core import DFlash2DraftModel
    from speculators.models.dspark.config import DSparkSpeculatorConfig
    from speculators.models.dspark.core import DSparkDraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import Qwen3Config

    kinds = ["full_attention", "sliding_attention"]
    if kind == "dspark":
        kinds = ["full_attention"] * 2
    layer = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_sliding_window=kind != "dspark",
        sliding_window=WINDOW,
        layer_types=kinds,
    )
    layer._attn_implementation = "eager"
    shared = {
        "transformer_layer_config": layer,
        "draft_vocab_size": len(IDS) if kind == "dspark" else VOCAB,
        "block_size": BLOCK,
        "aux_hidden_state_layer_ids": list(TAPS),
        "mask_token_id": 38,
        "speculators_config": SpeculatorsConfig(
            algorithm=kind,
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=[]),
        ),
    }
    if kind == "dflash":
        return DFlashDraftModel(DFlashSpeculatorConfig(**shared))
    if kind == "dspark":
        return DSparkDraftModel(DSparkSpeculatorConfig(**shared, markov_rank=6))
    return DFlash2DraftModel(
        DFlash2SpeculatorConfig(**shared, selector_rank=6, selector_top_k=8, conv_group_size=8)
    )


@torch.no_grad()
def _outputs(kind: str, model: Any, taps: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Blocks behind random anchors: logits [A, BLOCK, V'] with what the text's token before each adds."""
    hidden, logits, _, _, indices = model._backbone_forward(
        taps[None],
        tokens[None],
        torch.ones(1, NUM_TOKENS),
        torch.zeros(1, NUM_TOKENS, HIDDEN),
        torch.zeros(1, NUM_TOKENS, dtype=torch.long),
        max_anchors=NUM_ANCHORS,
    )
    hidden = hidden.view(NUM_ANCHORS, BLOCK, HIDDEN)
    logits = logits.view(NUM_ANCHORS, BLOCK, -1)
    blocks = tokens[indices].view(NUM_ANCHORS, BLOCK)
    found = {"anchors": indices.view(NUM_ANCHORS, BLOCK)[:, 0].contiguous()}
    if kind == "dspark":
        before = model.markov_head.prev_embeddings(blocks)
        logits = logits + model.markov_head.block_bias(prev_token_ids=blocks, hidden_states=hidden)
        found["confidence"] = model.confidence_head(torch.cat([hidden, before], dim=-1))
    if kind == "dflash2":
        previous = torch.cat([blocks[:, :1], blocks[:, :-1]], dim=1)
        columns, scores = model.candidate_selector.select(logits, hidden, previous)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, columns, scores)
    return {**found, "logits": logits.contiguous()}


def write(kind: str) -> None:
    """A drafter with random weights as speculators saves it, and what it says."""
    model = _model_of(kind).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.5
    folder = folder_of(kind)
    if kind == "dspark":
        ids = torch.tensor(IDS)
        model.load_vocab_mappings(torch.isin(torch.arange(VOCAB), ids), ids - torch.arange(len(IDS)))
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors"):  # its source lies beside them
            shutil.copyfile(Path(saved) / name, folder / name)
    inputs = {
        "taps": torch.randn(NUM_TOKENS, len(TAPS) * HIDDEN, generator=generator),
        "tokens": torch.randint(VOCAB, (NUM_TOKENS,), generator=generator),
        "embedding": model.embed_tokens.weight.data,
        "head": model.lm_head.weight.data,
    }
    save_file({**inputs, **_outputs(kind, model, inputs["taps"], inputs["tokens"])}, folder / EXPECTED)


def main() -> None:
    for kind in KINDS:
        write(kind)


if __name__ == "__main__":
    main()
