"""What PyPI's speculators writes is read, and gives its logits; what is written in its layout gives ours there."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from outrider.workers.draft_heads.checkpoint import read_eagle3, write_eagle3
from outrider.workers.draft_heads.description import HeadDescription
from outrider.workers.training.head_rows import unrolled
from support.speculators_oracle import EXPECTED, FOLDER, IDS, logits_of


@torch.no_grad()
def test_what_speculators_wrote_is_read_and_gives_its_logits() -> None:
    drafter, description = read_eagle3(FOLDER)
    assert drafter.shape.taps == (2, 16, 29)
    assert drafter.lm_head.ids.tolist() == list(IDS)
    assert (description.target_hidden_size, description.target_vocab_size) == (16, 40)
    assert len(description.target_fingerprint) == 64
    expected = load_file(FOLDER / EXPECTED)
    inputs = (expected[name] for name in ("taps", "tokens", "embedding"))
    for step, output in enumerate(unrolled(drafter, *inputs, num_steps=2)):
        logits = drafter.logits(output)
        rows = len(logits) - step  # the last of step 1 has read no token of the text
        torch.testing.assert_close(logits[:rows], expected[f"logits_{step}"][:rows], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("speculators") is None,
    reason="speculators wants transformers <= 5.19 and datasets; what it computes is in a file, see the test above",
)
@torch.no_grad()
def test_what_is_written_in_its_layout_gives_the_same_logits_in_speculators(tmp_path: Path) -> None:
    drafter, _ = read_eagle3(FOLDER)
    write_eagle3(tmp_path, drafter, HeadDescription(), "speculators", torch.float32)
    expected = load_file(FOLDER / EXPECTED)
    for step, logits in enumerate(
        logits_of(tmp_path, *(expected[x] for x in ("taps", "tokens", "embedding")))
    ):
        torch.testing.assert_close(logits, expected[f"logits_{step}"], atol=1e-5, rtol=1e-5)
