"""What LM heads are fitted on is read of the target that wrote the texts, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from outrider.workers.draft_heads.checkpoint import write_medusa, write_mtp
from outrider.workers.draft_heads.description import HeadDescription
from outrider.workers.draft_heads.mtp import MtpDrafter
from outrider.workers.training.head_source import HeadKind, read_head_texts
from outrider.workers.training.lines import Description
from outrider.workers.training.slimming import SlimData, read_slim_data
from outrider.workers.training.texts import TextWriter, read_texts
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import ResolvedModel, open_source
from outrider.workers.weights.tensors import FINAL_NORM
from support.models import random_tensors, write_safetensors
from support.tiny_heads import medusa_heads, mtp_drafter, read
from support.training import write_texts

DESCRIPTION = HeadDescription("its target", 64, 2, 160)


@pytest.fixture
def target(tmp_path: Path) -> ResolvedModel:
    """With a final norm that is not trivial, and texts in `tmp_path / "texts"`."""
    model, tensors = random_tensors("llama", "num_layers=2&hidden_size=64&vocab_size=160")
    tensors[FINAL_NORM] = torch.linspace(0.5, 1.5, 64)
    write_safetensors(tmp_path / "target", model, tensors)
    resolved = ResolvedModel(str(tmp_path / "target"), "safetensors", tmp_path / "target")
    write_texts(tmp_path / "texts", resolved)
    return resolved


def slim_data(kind: HeadKind, folder: Path, texts: str = "texts") -> SlimData:
    corpus = read_head_texts([str(folder / texts)], 0)
    return read_slim_data(kind, str(folder / kind), False, corpus, 2, torch.float32, 1, folder, silent)


def test_features_of_a_head_for_multi_token_prediction_are_under_the_target_s_final_norm(
    target: ResolvedModel, tmp_path: Path
) -> None:
    source = open_source(target)
    write_mtp(tmp_path / "mtp", mtp_drafter(source), DESCRIPTION, "deepseek", torch.float32)
    heads = slim_data("mtp", tmp_path).checkpoint.heads
    assert isinstance(heads, MtpDrafter)
    assert torch.equal(heads.target_norm, read(source, FINAL_NORM))


def test_texts_without_a_token_for_a_head_to_guess_are_refused(target: ResolvedModel, tmp_path: Path) -> None:
    heads = medusa_heads(open_source(target), num_heads=2)
    write_medusa(tmp_path / "medusa", heads, DESCRIPTION, "vllm", torch.float32)
    with TextWriter(tmp_path / "short", Description(target.model, 160, "", {}, "")) as writer:
        for text in read_texts(tmp_path / "texts"):
            writer.write(replace(text, output_tokens=text.output_tokens[:2]))
    with pytest.raises(ValueError, match=r"^--texts must hold longer answers: .* for LM head 2 to guess$"):
        slim_data("medusa", tmp_path, "short")
    used = slim_data("medusa", tmp_path).used
    # Of fourteen tokens the first is the target's own; nine of ten texts are learned from.
    assert [len(rows.rows) for rows in used] == [9 * 13, 9 * 12]


def test_heads_for_another_target_are_refused(target: ResolvedModel, tmp_path: Path) -> None:
    heads = medusa_heads(open_source(target))
    write_medusa(tmp_path / "medusa", heads, replace(DESCRIPTION, target_num_layers=3), "vllm", torch.float32)
    with pytest.raises(ValueError, match=r"^SOURCE must be for the target .* has 2 layers, got 3$"):
        slim_data("medusa", tmp_path)
