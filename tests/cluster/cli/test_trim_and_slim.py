"""`outrider trim` and `outrider slim` on tiny models: what they write is read again, with where it comes from."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from outrider.cluster.cli.main import app
from outrider.configs.loader import load_config
from outrider.workers.draft_heads.checkpoint import (
    read_eagle3,
    read_lm_head,
    read_medusa,
    read_mtp,
    read_parallel,
    write_eagle3,
    write_medusa,
    write_mtp,
    write_parallel,
)
from outrider.workers.draft_heads.description import HeadDescription
from outrider.workers.draft_heads.eagle3 import Eagle3Drafter, Eagle3Shape
from outrider.workers.draft_heads.lm_head import LmHeadShape
from outrider.workers.draft_heads.medusa import MedusaHeads, MedusaShape
from outrider.workers.draft_heads.pairs import PairShape
from outrider.workers.drafting.acceptance import AcceptanceEstimator
from outrider.workers.drafting.method import MethodContext
from outrider.workers.drafting.mtp import MtpMethod
from outrider.workers.drafting.parallel import ParallelMethod
from outrider.workers.drafting.registry import METHODS
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.setup import read_model_config
from outrider.workers.trace import Tracer
from outrider.workers.training.head_source import head_of_model
from outrider.workers.training.lines import Description
from outrider.workers.training.texts import DistilledText, TextWriter
from outrider.workers.weights.config import Rope
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import open_source
from outrider.workers.weights.tensors import HEAD
from support.fake_hub import FakeHub
from support.models import random_tensors, write_safetensors
from support.parallel_oracle import folder_of
from support.tiny import VOCAB_SIZE, tiny_drafter, tiny_target
from support.tiny_heads import medusa_heads, mtp_drafter, parallel_drafter

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
    # The lower half of the vocabulary.
    write_texts(folder, tiny_target().model, VOCAB_SIZE, 160)
    return str(folder)


def write_texts(folder: Path, model: str, vocab_size: int, num_used: int) -> None:
    """Of the first `num_used` tokens, low ids more often."""
    generator = torch.Generator().manual_seed(0)
    with TextWriter(folder, Description(model, vocab_size, "tokenizer", {}, "0")) as writer:
        for number in range(20):
            tokens = (torch.rand(40, generator=generator) ** 2 * num_used).long().tolist()
            writer.write(
                DistilledText(str(number), tuple(tokens[:8]), (*tokens[8:], END), 0.0, True, "file", "stop")
            )


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


def test_what_a_trimmed_head_lacks_it_does_not_cover_once_it_is_trimmed_again(
    texts: str, tmp_path: Path
) -> None:
    written("mtp", tmp_path / "full", shares=False)
    words = ("--texts", texts, "--of", "mtp", "--out")
    first = invoke("trim", str(tmp_path / "full"), *words, str(tmp_path / "first"), "--size", "40")
    again = invoke("trim", str(tmp_path / "first"), *words, str(tmp_path / "again"), "--coverage", "1")
    assert (first.exit_code, again.exit_code) == (0, 0), again.output
    measured = [
        json.loads((tmp_path / name / "provenance.json").read_text())["measured"]
        for name in ("first", "again")
    ]
    for name in ("size", "coverage_counted", "coverage_held_out"):
        assert measured[0][name] == measured[1][name]
    assert measured[0]["coverage_counted"] < 1


def written(kind: str, folder: Path, shares: bool) -> None:
    """A head for multi-token prediction or a parallel drafter for the tiny target, whose LM head is the target's.

    With `shares` it is not stored.
    """
    target, described = open_source(tiny_target()), HeadDescription("", HIDDEN, 2, VOCAB_SIZE)
    if kind == "mtp":
        head = mtp_drafter(target)
        head.shares_lm_head = shares
        write_mtp(folder, head, described, "mtp", torch.float32)
    else:
        blocks = parallel_drafter(target, (1, 2), pair=PairShape("markov", 8))
        blocks.shares_lm_head = shares
        write_parallel(folder, blocks, described, torch.float32)


def served_logits(kind: str, folder: Path, rows: torch.Tensor) -> torch.Tensor:
    """Of the LM head of a checkpoint as the server loads it."""
    config = load_config(
        "tiny-random",
        [
            f"target.model={tiny_target().model}",
            f"draft.methods=[{kind}]",
            f"draft.{kind}.model={folder}",
            "draft.dtype=float32",
        ],
    )
    slots, tracer = DraftedSlots(2, 8, 16), Tracer("draft", False)
    model, device = read_model_config(config, "target", silent), torch.device("cpu")
    method = METHODS[kind].build(
        MethodContext(config, model, device, slots, AcceptanceEstimator(), tracer, silent)
    )
    assert isinstance(method, MtpMethod | ParallelMethod)
    return method._drafter.logits(rows)


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("kind", ["mtp", "parallel"])
def test_drafters_that_share_the_target_s_head_are_trimmed_and_served(
    texts: str, tmp_path: Path, kind: str, shares: bool
) -> None:
    written(kind, tmp_path / "full", shares)
    out = tmp_path / "small"
    words = ("--texts", texts, "--out", str(out), "--of", kind, "--size", "100", "--dtype", "float32")
    done = invoke("trim", str(tmp_path / "full"), *words)
    assert done.exit_code == 0, done.output
    read = read_mtp if kind == "mtp" else read_parallel
    drafter, description = read(out)
    assert description.target_model == tiny_target().model
    ids = drafter.lm_head.ids
    assert len(ids) == 100
    # Heads for multi-token prediction share whole LM heads only.
    assert drafter.shares_lm_head == (shares and kind == "parallel")
    full = read(tmp_path / "full")[0].state_dict()
    for name, weight in drafter.state_dict().items():
        if "lm_head" not in name:
            rows = full[name][ids] if name == "pair.markov_w2.weight" else full[name]
            assert torch.equal(weight, rows), name
    rows = torch.randn(3, HIDDEN)
    head = head_of_model(tiny_target()).matrix().detach()[ids]
    torch.testing.assert_close(served_logits(kind, out, rows), rows @ head.T, atol=1e-4, rtol=1e-4)


def test_of_the_target_only_the_file_with_its_lm_head_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(monkeypatch, tmp_path)
    model, tensors = random_tensors("llama", f"hidden_size={HIDDEN}&num_layers=2&vocab_size={VOCAB_SIZE}")
    write_safetensors(hub.remote, model, tensors, num_files=len(tensors))
    write_texts(tmp_path / "texts", "org/name", VOCAB_SIZE, 160)
    written("parallel", tmp_path / "full", shares=True)
    words = ("--texts", str(tmp_path / "texts"), "--out", str(tmp_path / "small"), "--size", "100")
    done = invoke("trim", str(tmp_path / "full"), "--of", "parallel", *words)
    assert done.exit_code == 0, done.output
    place = sorted(tensors).index(HEAD) + 1
    assert hub.fetched_weights() == [f"model-{place:05}-of-{len(tensors):05}.safetensors"]


def test_a_selector_needs_as_many_tokens_as_it_chooses_from(tmp_path: Path) -> None:
    target = "random:llama?num_layers=30&hidden_size=16&num_heads=2&num_kv_heads=1&vocab_size=40"
    write_texts(tmp_path / "texts", target, 40, 30)
    out = tmp_path / "small"
    words = ("--texts", str(tmp_path / "texts"), "--out", str(out), "--of", "parallel")
    done = invoke("trim", str(folder_of("dflash2")), *words, "--size", "7")
    assert done.exit_code == 2
    assert "--size must be at least 8, the tokens that the drafter's selector" in done.stderr.splitlines()[-1]
    done = invoke("trim", str(folder_of("dflash2")), *words, "--size", "8")
    assert done.exit_code == 0, done.output
    drafter, _ = read_parallel(out)
    assert drafter.shares_lm_head
    assert (drafter.shape.lm_head.num_ids, drafter.shape.pair) == (8, PairShape("selector", 6, 8))


def test_a_model_s_head_is_slimmed_to_the_target_s_law(texts: str, tmp_path: Path) -> None:
    out = tmp_path / "head"
    words = ("--texts", texts, "--out", str(out), "--divisor", "5", "--passes", "30", "--batch-rows", "32")
    done = invoke("slim", tiny_drafter().model, *words, "--compute-dtype", "float32", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    head, _ = read_lm_head(out)
    assert head.shape == LmHeadShape(HIDDEN, VOCAB_SIZE, 16)
    record = json.loads((out / "provenance.json").read_text())
    (measured,) = record["measured"]["lm_heads"]
    assert measured["distilled"]["kl"] < measured["start"]["kl"]
    assert record["step"] == 30 * 19
    assert "acceptance" in done.output


def slimmed(kind: str, texts: str, source: Path, out: Path) -> tuple[list[dict[str, dict[str, float]]], str]:
    """What was measured of each LM head, and what the command said."""
    words = ("--texts", texts, "--out", str(out), "--of", kind, "--steps", "2", "--compute-dtype", "float32")
    done = invoke("slim", str(source), *words)
    assert done.exit_code == 0, done.output
    return json.loads((out / "provenance.json").read_text())["measured"]["lm_heads"], done.output


def test_an_eagle3_drafter_is_slimmed_on_its_unrolled_outputs(texts: str, tmp_path: Path) -> None:
    drafter = Eagle3Drafter(SHAPE, torch.arange(VOCAB_SIZE))
    described = HeadDescription("", HIDDEN, 2, VOCAB_SIZE)
    write_eagle3(tmp_path / "full", drafter, described, "speculators", torch.float32)
    (measured,), _ = slimmed("eagle3", texts, tmp_path / "full", tmp_path / "slim")
    assert measured["distilled"]["kl"] < measured["start"]["kl"]
    back, _ = read_eagle3(tmp_path / "slim")
    assert back.shape.lm_head == LmHeadShape(HIDDEN, VOCAB_SIZE, 10)


@pytest.mark.parametrize("kind", ["mtp", "parallel"])
def test_drafters_that_share_the_target_s_head_are_slimmed_and_have_their_own(
    texts: str, tmp_path: Path, kind: str
) -> None:
    written(kind, tmp_path / "full", shares=True)
    (measured,), _ = slimmed(kind, texts, tmp_path / "full", tmp_path / "slim")
    assert measured["distilled"]["kl"] < measured["start"]["kl"]
    drafter, _ = (read_mtp if kind == "mtp" else read_parallel)(tmp_path / "slim")
    assert drafter.shape.lm_head == LmHeadShape(HIDDEN, VOCAB_SIZE, 10)
    assert not drafter.shares_lm_head
    rows = torch.randn(3, HIDDEN)
    own = drafter.lm_head(rows).detach()
    torch.testing.assert_close(served_logits(kind, tmp_path / "slim", rows), own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shares", [False, True])
def test_each_lm_head_of_medusa_heads_is_slimmed(texts: str, tmp_path: Path, shares: bool) -> None:
    heads = medusa_heads(open_source(tiny_target()), num_heads=2)
    if shares:
        alone = MedusaHeads(MedusaShape(HIDDEN, VOCAB_SIZE, 2, 1, SHAPE.lm_head, True), heads.ids)
        alone.blocks, alone.lm_heads[0] = heads.blocks, heads.lm_heads[0]
        heads = alone
    described = HeadDescription("", HIDDEN, 2, VOCAB_SIZE)
    write_medusa(tmp_path / "full", heads, described, "vllm", torch.float32)
    measured, said = slimmed("medusa", texts, tmp_path / "full", tmp_path / "slim")
    assert len(measured) == (1 if shares else 2)
    for of_head in measured:
        assert of_head["distilled"]["kl"] < of_head["start"]["kl"]
    assert ("distilled head 2 of 2, target law on other text" in said) != shares
    back, _ = read_medusa(tmp_path / "slim")
    assert back.shape.lm_head == LmHeadShape(HIDDEN, VOCAB_SIZE, 10)
    assert back.shape.shares_lm_head == shares
    torch.testing.assert_close(back.blocks.state_dict(), heads.blocks.state_dict(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trim", "SOURCE", "--size", "5", "--coverage", "0.5"), "one of --size and --coverage"),
        (("trim", "SOURCE", "--size", "321"), "--size must be from 2"),
        (("slim", "SOURCE", "--of", "mtp", "--teacher", "own"), "--teacher must be target with --of mtp"),
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
