"""What PyPI's speculators writes is read, and gives its logits; what is written in its layout gives ours there."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from outrider.workers.draft_heads.checkpoint import read_eagle3, write_eagle3
from outrider.workers.draft_heads.description import HeadDescription
from outrider.workers.draft_heads.eagle3 import Eagle3Drafter
from support.speculators_oracle import EXPECTED, FOLDER, IDS, logits_of


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """x [N, heads, D]."""
    D = x.shape[-1]
    angles = positions[:, None].float() * 10000.0 ** -(torch.arange(0, D, 2) / D)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    one, two = x.chunk(2, dim=-1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)


class Rows:
    """Keys and values of all steps so far: a row sees step 0 up to its own place, of later steps its own place."""

    def __init__(self) -> None:
        self.step = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        N = len(q)
        positions = torch.arange(N) + self.step
        repeat = q.shape[1] // k.shape[1]
        self.keys.append(rotated(k, positions).repeat_interleave(repeat, dim=1))
        self.values.append(v.repeat_interleave(repeat, dim=1))
        causal, own = torch.ones(N, N).tril().bool(), torch.eye(N).bool()
        seen = torch.cat([causal] + [own] * self.step, dim=1)
        scores = (
            torch.einsum("qhd,khd->hqk", rotated(q, positions), torch.cat(self.keys)) * q.shape[-1] ** -0.5
        )
        law = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        self.step += 1
        return torch.einsum("hqk,khd->qhd", law, torch.cat(self.values)).flatten(1)


def unrolled(
    drafter: Eagle3Drafter, taps: Tensor, tokens: Tensor, embedding: Tensor, num_steps: int
) -> list[Tensor]:
    rows, features, logits = Rows(), drafter.features(taps), []
    for _ in range(num_steps):
        features = drafter(embedding[tokens], features, rows.attend)
        logits.append(drafter.logits(features))
        tokens = torch.cat((tokens[1:], tokens.new_zeros(1)))
    return logits


@torch.no_grad()
def test_what_speculators_wrote_is_read_and_gives_its_logits() -> None:
    drafter, description = read_eagle3(FOLDER)
    assert drafter.shape.taps == (2, 16, 29)
    assert drafter.lm_head.ids.tolist() == list(IDS)
    assert (description.target_hidden_size, description.target_vocab_size) == (16, 40)
    assert len(description.target_fingerprint) == 64
    expected = load_file(FOLDER / EXPECTED)
    inputs = (expected[name] for name in ("taps", "tokens", "embedding"))
    for step, logits in enumerate(unrolled(drafter, *inputs, num_steps=2)):
        torch.testing.assert_close(logits, expected[f"logits_{step}"], atol=1e-5, rtol=1e-5)


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
