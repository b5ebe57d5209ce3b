"""EAGLE-3 as PyPI's speculators computes it, to compare with: a small drafter as it writes it, and its logits.

It wants another transformers than ours, and datasets besides, so it is not among what tests install. The folder
`tests/workers/draft_heads/speculators_0_9_0/` was written by

    python tests/support/speculators_oracle.py          # with speculators 0.9.0 installed beside
"""

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "workers" / "draft_heads" / "speculators_0_9_0"
EXPECTED = "expected.safetensors"
VOCAB, HIDDEN, NUM_TOKENS, NUM_STEPS = 40, 16, 9, 2
IDS = (0, 1, 5, 7, 30, 39)
OF_THE_TARGET = {"embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight"}


def logits_of(folder: Path, taps: Tensor, tokens: Tensor, embedding: Tensor) -> list[Tensor]:
    """What speculators computes for a checkpoint, step by step: step 0 [NUM_TOKENS, V'] from the target's features,
    step 1 from the outputs of step 0 and the tokens one further, at each place of the text.

    Args:
        folder: a checkpoint in the layout of speculators.
        taps: [NUM_TOKENS, 3 * HIDDEN]; tokens: int64 [NUM_TOKENS], the token after each; embedding: [VOCAB, HIDDEN].
    """
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel

    # Not by from_pretrained, which asks the Hugging Face hub for the target.
    config = Eagle3SpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = Eagle3DraftModel(config).eval()
    loaded = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not loaded.unexpected_keys, loaded
    assert set(loaded.missing_keys) <= OF_THE_TARGET, loaded
    model.embed_tokens.weight.data = embedding
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, out: logits.append(out[0].detach()))
    with torch.no_grad():
        documents = torch.zeros(1, len(tokens), dtype=torch.long)
        model(taps[None], tokens[None], documents, ttt_steps=NUM_STEPS)
    return logits


def write(folder: Path) -> None:
    """A drafter with random weights as speculators saves it."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    layer = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    layer._attn_implementation = "eager"
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=len(IDS),
        norm_before_residual=True,
        eagle_aux_hidden_state_layer_ids=[2, 16, 29],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=[]),
        ),
    )
    model = Eagle3DraftModel(config)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.5
    ids = torch.tensor(IDS)
    model.load_vocab_mappings(torch.isin(torch.arange(VOCAB), ids), ids - torch.arange(len(IDS)))
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "model.safetensors"):  # its source lies beside them
            shutil.copyfile(Path(saved) / name, folder / name)


def main() -> None:
    write(FOLDER)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "taps": torch.randn(NUM_TOKENS, 3 * HIDDEN, generator=generator),
        "tokens": torch.randint(VOCAB, (NUM_TOKENS,), generator=generator),
        "embedding": torch.randn(VOCAB, HIDDEN, generator=generator),
    }
    logits = logits_of(FOLDER, **inputs)
    outputs = {f"logits_{step}": rows.contiguous() for step, rows in enumerate(logits)}
    save_file({**inputs, **outputs}, FOLDER / EXPECTED)


if __name__ == "__main__":
    main()
