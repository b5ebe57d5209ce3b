"""`outrider trim` and `outrider slim` on tiny models: what they write is read again, with where it comes from."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from outrider.cluster.cli.main import app
from outrider.workers.draft_heads.checkpoint import (
    read_eagle3,
    read_lm_head,
    read_medusa,
    write_eagle3,
    write_medusa,
)
from outrider.workers.draft_heads.description import HeadDescription
from outrider.workers.draft_heads.eagle3 import Eagle3Drafter, Eagle3Shape
from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.draft_heads.medusa import MedusaHeads, MedusaShape
from outrider.workers.training.head_source import head_of_model
from outrider.workers.training.lines import Description
from outrider.workers.training.texts import DistilledText, TextWriter
from outrider.workers.weights.config import Rope
from support.tiny import VOCAB_SIZE, tiny_drafter, tiny_target

HIDDEN = 80
END = 3
SHAPE = Eagle3Shape(
    HIDDEN,
    HIDDEN,
    VOCAB_SIZE,
    (0, 1, 2),
    5,
    1,
    16,
    64,
    1e-5,
    Rope(),
    512,
    False,
    LmHeadShape(HIDDEN, VOCAB_SIZE, HIDDEN),
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    generator = torch.Generator().manual_seed(0)
    description = Description(tiny_target().model, VOCAB_SIZE, "tokenizer", {}, "0")
    with TextWriter(folder, description) as writer:
        for number in range(20):
            # The lower half of the vocabulary, low ids more often.
            tokens = (torch.rand(40, generator=generator) ** 2 * 160).long().tolist()
            writer.write(
                DistilledText(str(number), tuple(tokens[:8]), (*tokens[8:], END), 0.0, True, "file", "stop")
            )
    return str(folder)


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, words)


def test_a_model_s_head_is_trimmed(texts: str, tmp_path: Path) -> None:
    out = tmp_path / "head"
    drafter = tiny_drafter()
    done = invoke(
        "trim", drafter.model, "--texts", texts, "--out", str(out), "--size", "100", "--dtype", "float32"
    )
    assert done.exit_code == 0, done.output
    head, description = read_lm_head(out)
    ids = head.ids
    assert len(ids) == 100
    assert END in ids.tolist()
    assert description.target_model == tiny_target().model
    torch.testing.assert_close(head.matrix(), head_of_model(drafter).matrix()[ids], atol=0, rtol=0)
    assert json.loads((out / "ids.json").read_text()) == ids.tolist()
    assert (out / "coverage.png").stat().st_size > 1000
    record = json.loads((out / "provenance.json").read_text())
    assert record["measured"]["size"] == 100
    assert 0.5 < record["measured"]["coverage_held_out"] <= record["measured"]["coverage_counted"] < 1
    assert set(record["measured"]["new_head_ms"]) == {"1", "8"}
    assert "100 of 320 tokens" in done.output
    assert "times as fast" in done.output


def test_heads_of_both_kinds_are_trimmed_by_coverage(texts: str, tmp_path: Path) -> None:
    described = HeadDescription("", HIDDEN, 2, VOCAB_SIZE)
    write_eagle3(
        tmp_path / "e",
        Eagle3Drafter(SHAPE, torch.arange(VOCAB_SIZE)),
        described,
        "speculators",
        torch.float32,
    )
    shape = MedusaShape(HIDDEN, VOCAB_SIZE, 2, 1, SHAPE.lm_head, False)
    write_medusa(
        tmp_path / "m", MedusaHeads(shape, torch.arange(VOCAB_SIZE)), described, "vllm", torch.float32
    )
    sizes = []
    for kind, source in (("eagle3", "e"), ("medusa", "m")):
        out = tmp_path / kind
        words = ("--texts", texts, "--out", str(out), "--of", kind, "--coverage", "0.9", "--low-ids", "4")
        done = invoke("trim", str(tmp_path / source), *words)
        assert done.exit_code == 0, done.output
        ids = read_eagle3(out)[0].lm_head.ids if kind == "eagle3" else read_medusa(out)[0].ids
        assert ids[:4].tolist() == [0, 1, 2, 3]
        sizes.append(len(ids))
        assert json.loads((out / "provenance.json").read_text())["measured"]["coverage_counted"] >= 0.9
    assert sizes[0] == sizes[1] < 160


def test_a_model_s_head_is_slimmed_to_the_target_s_law(texts: str, tmp_path: Path) -> None:
    out = tmp_path / "head"
    words = ("--texts", texts, "--out", str(out), "--divisor", "5", "--passes", "30", "--batch-rows", "32")
    done = invoke("slim", tiny_drafter().model, *words, "--compute-dtype", "float32", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    head, _ = read_lm_head(out)
    assert head.shape == LmHeadShape(HIDDEN, VOCAB_SIZE, 16)
    record = json.loads((out / "provenance.json").read_text())
    measured = record["measured"]
    assert measured["distilled"]["kl"] < measured["start"]["kl"]
    assert record["step"] == 30 * 19
    assert "acceptance" in done.output


def test_an_eagle3_drafter_is_slimmed_on_its_unrolled_outputs(texts: str, tmp_path: Path) -> None:
    drafter = Eagle3Drafter(SHAPE, torch.arange(VOCAB_SIZE))
    write_eagle3(
        tmp_path / "e", drafter, HeadDescription("", HIDDEN, 2, VOCAB_SIZE), "speculators", torch.float32
    )
    out = tmp_path / "slim"
    words = (
        "--texts",
        texts,
        "--out",
        str(out),
        "--of",
        "eagle3",
        "--steps",
        "2",
        "--compute-dtype",
        "float32",
    )
    done = invoke("slim", str(tmp_path / "e"), *words)
    assert done.exit_code == 0, done.output
    back, _ = read_eagle3(out)
    assert back.shape.lm_head == LmHeadShape(HIDDEN, VOCAB_SIZE, 10)
    measured = json.loads((out / "provenance.json").read_text())["measured"]
    assert measured["distilled"]["kl"] < measured["start"]["kl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trim", "SOURCE", "--size", "5", "--coverage", "0.5"), "one of --size and --coverage"),
        (("trim", "SOURCE", "--size", "321"), "--size must be from 2"),
        (("slim", "SOURCE", "--of", "eagle3", "--teacher", "own"), "--teacher must be target for an EAGLE-3"),
        (("slim", "SOURCE", "--divisor", "81"), "--divisor must be from 2 to 80, got 81"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    texts: str, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    command, _, *rest = words
    done = invoke(command, tiny_drafter().model, "--texts", texts, "--out", str(tmp_path / "x"), *rest)
    assert done.exit_code == 2
    assert message in done.stderr.splitlines()[-1]
