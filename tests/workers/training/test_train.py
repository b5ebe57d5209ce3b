"""Whole training runs on a tiny target: they learn, go on after a kill as if nothing had been, and share batches."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from outrider.configs.loader import load_training
from outrider.configs.training import TrainingConfig, TrainingMethod
from outrider.workers.draft_heads.checkpoint import read_eagle3, read_medusa, write_eagle3
from outrider.workers.draft_heads.description import HeadDescription
from outrider.workers.draft_heads.eagle3 import Eagle3Drafter
from outrider.workers.sequences.sequence import DraftOptions
from outrider.workers.training.features import TargetFeatures
from outrider.workers.training.heads import read_ids
from outrider.workers.training.kept_rows import keep_features, parse_layers
from outrider.workers.training.launch import train
from outrider.workers.training.log import EvalLine, Line, TrainLine, read_log
from outrider.workers.training.metrics import Measurement
from outrider.workers.training.texts import read_texts
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import open_source
from support.equality import decode
from support.local_engine import LocalEngine
from support.tiny import SLOW_TARGET
from support.tiny_heads import building_eagle3
from support.training import TARGET, cases, tiny_run, with_steps, write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return folder


def run(config: TrainingConfig, tell: Callable[[Line], None] = lambda line: None) -> Measurement:
    return train(config, lambda text: None, silent, tell)


def weights(config: TrainingConfig) -> dict[str, Tensor]:
    """Of the last checkpoint, in float32: those beside the drafter are rounded."""
    folder = Path(config.out) / "checkpoints"
    tag = (folder / "latest").read_text()
    state = torch.load(folder / tag / "mp_rank_00_model_states.pt", weights_only=False)
    found: dict[str, Tensor] = state["module"]
    return found


def test_eagle3_learns_a_corpus_by_heart(texts: Path, tmp_path: Path) -> None:
    config = tiny_run(texts, tmp_path / "run", steps=150)
    found = run(config)
    assert found.top(1)[0] > 0.95
    assert min(found.top(1)) > 0.9
    assert found.acceptance_length > 3.4  # of 4: its own guess and three drafted
    drafter, description = read_eagle3(tmp_path / "run" / "drafter")
    assert description.accuracies == found.accuracies
    assert description.template == "raw"
    assert drafter.lm_head.shape.rank == 32
    # Training and serving agree: on these texts the server accepts nearly all.
    with LocalEngine(
        open_source(TARGET), methods=(building_eagle3(open_source(TARGET), drafter),), profile=SLOW_TARGET
    ) as engine:
        answers = decode(engine, cases(texts), DraftOptions(("eagle3",), 3, 3))
    for text in read_texts(texts):
        assert answers[text.id].tokens == text.output_tokens
    # A token with the prompt, then four in a round of one of its own and three drafted, where all are accepted.
    at_best = sum(1 + math.ceil((len(answer.tokens) - 1) / 4) for answer in answers.values())
    assert sum(answer.stats.num_rounds for answer in answers.values()) <= 1.1 * at_best
    provenance = json.loads((tmp_path / "run" / "drafter" / "provenance.json").read_text())
    assert provenance["step"] == 150
    assert provenance["num_texts"] == 10
    assert provenance["config"]["texts"]["directories"] == [str(texts)]
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize("method", ["medusa1", "medusa2"])
def test_medusa_learns_a_corpus_by_heart(texts: Path, tmp_path: Path, method: TrainingMethod) -> None:
    joint = method == "medusa2"
    config = replace(tiny_run(texts, tmp_path / "run", steps=50 if joint else 120), method=method)
    faster = replace(config.optimizer, lr=3e-3 if joint else 1e-2)
    found = run(replace(config, optimizer=faster))
    assert found.top(1)[0] > 0.95
    heads, description = read_medusa(tmp_path / "run" / "drafter")
    assert heads.shape.num_heads == 2
    assert description.accuracies == found.accuracies
    if method == "medusa2":
        assert (tmp_path / "run" / "drafter" / "adapter" / "adapter_model.safetensors").exists()
        assert load_file(tmp_path / "run" / "drafter" / "target" / "model.safetensors")
    files = list((tmp_path / "run" / "drafter").rglob("*.safetensors"))
    config_mode = (tmp_path / "run" / "config.yaml").stat().st_mode
    assert {path.stat().st_mode for path in files} == {
        config_mode
    }  # whoever may read the one, may read the others


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_dtypes_of_auto_are_decided_once_and_belong_to_the_run(
    texts: Path, tmp_path: Path, has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def processor(has_bfloat16: bool) -> None:
        found = {"architecture": "x86_64", "avx512_bf16": has_bfloat16}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)

    begun = tiny_run(texts, tmp_path / "run", steps=1)
    auto = replace(
        begun, target=replace(begun.target, dtype="auto"), engine=replace(begun.engine, dtype="auto")
    )
    processor(has_bfloat16)
    run(auto)
    written = load_training(tmp_path / "run" / "config.yaml")
    decided = "bfloat16" if has_bfloat16 else "float32"
    assert (written.target.dtype, written.engine.dtype) == (decided, decided)
    processor(not has_bfloat16)
    with pytest.raises(ValueError, match=rf"target\.dtype '{decided}' as in the run"):
        run(with_steps(auto, 2))


class KilledError(Exception):
    """Stands for a signal: nothing is written after it."""


@pytest.mark.parametrize("method", ["eagle3", "medusa2"])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(
    texts: Path, tmp_path: Path, method: TrainingMethod
) -> None:
    config = replace(tiny_run(texts, tmp_path / "a", steps=6), method=method, checkpoint_every=3)
    run(config)

    def kill(line: Line) -> None:
        if line.step == 5:
            raise KilledError

    interrupted = replace(config, out=str(tmp_path / "b"))
    with pytest.raises(KilledError):
        run(interrupted, kill)
    run(interrupted)
    whole, resumed = weights(config), weights(interrupted)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    steps = [line.step for line in read_log(tmp_path / "b") if isinstance(line, TrainLine)]
    assert steps == list(range(1, 7))


def test_texts_written_since_do_not_change_a_run_that_goes_on(texts: Path, tmp_path: Path) -> None:
    growing = tmp_path / "texts"
    growing.mkdir()
    lines = (texts / "texts-00000.jsonl").read_text().splitlines(keepends=True)
    (growing / "texts-00000.jsonl").write_text("".join(lines[:6]))
    config = replace(tiny_run(growing, tmp_path / "run", steps=2), checkpoint_every=1)
    run(config)
    (growing / "texts-00000.jsonl").write_text("".join(lines))
    run(with_steps(config, 3))
    assert json.loads((tmp_path / "run" / "texts.json").read_text()) == {str(growing): 6}


def test_a_run_goes_on_as_what_it_was_or_not_at_all(texts: Path, tmp_path: Path) -> None:
    begun = tiny_run(texts, tmp_path / "run", steps=1)
    run(begun)
    shutil.copytree(texts, tmp_path / "other texts")
    others = (
        (replace(begun, method="medusa1"), "method 'eagle3' as in the run that .* has, got 'medusa1'"),
        (
            replace(begun, texts=replace(begun.texts, directories=(str(tmp_path / "other texts"),))),
            "texts.directories .* as in the run",
        ),
        (replace(begun, head=replace(begun.head, rank_divisor=4)), "head.rank_divisor 2 as in .*, got 4"),
        (
            replace(begun, target=replace(begun.target, model=f"{TARGET.model}&seed=3")),
            "target.model .* as in the run",
        ),
        (replace(begun, optimizer=replace(begun.optimizer, lr=1.0)), "optimizer.lr 0.003 as in .*, got 1.0"),
    )
    for other, message in others:
        with pytest.raises(ValueError, match=f"out must be another folder, or {message}"):
            run(with_steps(other, 2))
    run(with_steps(replace(begun, log_every=2, texts=replace(begun.texts, features="computed")), 2))


def test_what_never_reached_a_checkpoint_begins_anew(texts: Path, tmp_path: Path) -> None:
    begun = tiny_run(texts, tmp_path / "run", steps=1)
    without = replace(begun, target=replace(begun.target, model=f"{TARGET.model}&seed=3"))
    run(without)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run(begun)
    run(replace(begun, out=str(tmp_path / "fresh")))
    for name, values in weights(replace(begun, out=str(tmp_path / "fresh"))).items():
        assert torch.equal(weights(begun)[name], values), name


def test_computed_rows_are_the_kept_ones_and_micro_batches_add_up(texts: Path, tmp_path: Path) -> None:
    kept = tiny_run(texts, tmp_path / "kept", steps=3)
    run(kept)
    computed = replace(
        kept,
        out=str(tmp_path / "computed"),
        texts=replace(kept.texts, features="computed"),
        optimizer=replace(kept.optimizer, micro_tokens=30),
    )
    run(computed)
    for name, values in weights(kept).items():
        # Sums over one forward and over three. Seen: up to 3e-6, where Adam divides a tiny gradient by a tiny one.
        torch.testing.assert_close(weights(computed)[name], values, atol=5e-5, rtol=1e-4)


def keep_rows(texts: Path, copy: Path, wanted: str) -> None:
    """The texts with their rows beside them."""
    shutil.copytree(texts, copy)
    source = open_source(TARGET)
    features = TargetFeatures(source, parse_layers(wanted, source.config.num_layers), torch.float32, 1)
    keep_features(features, read_texts(copy), copy, torch.float32, lambda tokens: None)


@pytest.mark.parametrize(("method", "wanted"), [("eagle3", "eagle3"), ("medusa1", "medusa")])
def test_rows_that_distillation_kept_are_learned_from_without_a_layer_of_the_target(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: TrainingMethod, wanted: str
) -> None:
    folder = tmp_path / "texts"
    keep_rows(texts, folder, wanted)
    cached = replace(tiny_run(folder, tmp_path / "cached", steps=3), method=method)
    said: list[str] = []
    train(cached, said.append, silent, lambda line: None)
    assert any("texts.features=kept reads those" in line for line in said)
    monkeypatch.setattr(TargetFeatures, "__init__", None)  # nobody loads the target
    kept = replace(cached, out=str(tmp_path / "kept"), texts=replace(cached.texts, features="kept"))
    run(kept)
    for name, values in weights(cached).items():
        torch.testing.assert_close(weights(kept)[name], values, atol=5e-5, rtol=1e-4)


def test_rows_that_are_not_kept_are_missed_before_anything_is_trained(texts: Path, tmp_path: Path) -> None:
    def message(config: TrainingConfig) -> str:
        with pytest.raises(
            ValueError, match=r"texts\.features must be cached, computed or held: "
        ) as refused:
            run(replace(config, texts=replace(config.texts, features="kept")))
        return str(refused.value)

    assert "must hold hidden rows" in message(tiny_run(texts, tmp_path / "run", steps=1))
    folder = tmp_path / "texts"
    keep_rows(texts, folder, "medusa")
    config = tiny_run(folder, tmp_path / "run", steps=1)
    assert f"{folder} holds rows of layers 8, none of 2, 4, 5" in message(config)
    other = replace(config, target=replace(config.target, model=f"{TARGET.model}&seed=3"), method="medusa1")
    assert f"holds rows of {TARGET.model}, target.model is {TARGET.model}&seed=3" in message(other)
    lines = (folder / "texts-00000.jsonl").read_text()
    more = json.loads(lines.splitlines()[0]) | {"id": "later"}
    (folder / "texts-00000.jsonl").write_text(lines + json.dumps(more) + "\n")
    assert "holds no rows of text 'later'" in message(replace(config, method="medusa1"))
    with pytest.raises(ValueError, match=r"texts\.features must be another one where method is medusa2"):
        replace(config, method="medusa2", texts=replace(config.texts, features="kept"))


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_two_ranks_are_one(texts: Path, tmp_path: Path, zero_stage: int) -> None:
    one = tiny_run(texts, tmp_path / "one", steps=20)
    run(one)
    two = replace(
        one,
        out=str(tmp_path / "two"),
        engine=replace(one.engine, ranks=2, zero_stage=zero_stage),
    )
    run(two)
    for name, values in weights(one).items():
        torch.testing.assert_close(weights(two)[name], values, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_weights_shared_out_train_the_same(texts: Path, tmp_path: Path) -> None:
    one = tiny_run(texts, tmp_path / "one", steps=5)
    three = replace(one, out=str(tmp_path / "three"), engine=replace(one.engine, zero_stage=3))
    drafters = []
    for config in (one, three):
        run(config)
        drafters.append(read_eagle3(Path(config.out) / "drafter")[0].state_dict())
    for name, values in drafters[0].items():
        torch.testing.assert_close(drafters[1][name], values, atol=1e-3, rtol=1e-2)  # stored in bfloat16


def test_a_drafter_is_started_from_another_of_its_shape_only(texts: Path, tmp_path: Path) -> None:
    first = tiny_run(texts, tmp_path / "first", steps=30)
    run(first)
    drafter = str(tmp_path / "first" / "drafter")
    lines: list[Line] = []
    run(replace(with_steps(first, 1), out=str(tmp_path / "second"), start_from=drafter), lines.append)
    assert isinstance(lines[0], TrainLine)
    firsts = [line.loss for line in read_log(tmp_path / "first") if isinstance(line, TrainLine)]
    assert lines[0].loss < 0.5 * firsts[0]
    # Another LM head begins anew, under all the rest.
    other = replace(with_steps(first, 1), out=str(tmp_path / "third"), start_from=drafter)
    run(replace(other, head=replace(first.head, rank_divisor=4)))
    begun = read_eagle3(tmp_path / "third" / "drafter")[0]
    trained = read_eagle3(Path(drafter))[0]
    assert begun.lm_head.shape != trained.lm_head.shape
    torch.testing.assert_close(begun.fc.weight, trained.fc.weight, atol=2e-2, rtol=0.1)
    narrow = Eagle3Drafter(replace(trained.shape, intermediate_size=8), trained.lm_head.ids)
    write_eagle3(tmp_path / "narrow", narrow, HeadDescription(), "specforge", torch.float32)
    with pytest.raises(
        ValueError, match=r"start_from must be a drafter of this run's shape; .* differs in .*mlp.down_proj"
    ):
        run(replace(other, out=str(tmp_path / "fourth"), start_from=str(tmp_path / "narrow")))


def test_trimmed_and_frozen_heads(texts: Path, tmp_path: Path) -> None:
    # As `outrider trim` writes them; a file alone does as well.
    (tmp_path / "ids.json").write_text(json.dumps(list(range(0, 160, 2))))
    config = tiny_run(texts, tmp_path / "run", steps=2)
    head = replace(config.head, kind="trimmed", ids=str(tmp_path), frozen=True)
    lines: list[Line] = []
    run(replace(config, head=head), lines.append)
    drafter, _ = read_eagle3(tmp_path / "run" / "drafter")
    assert drafter.lm_head.ids.tolist() == list(range(0, 160, 2))
    measured = lines[-1]
    assert isinstance(measured, EvalLine)
    # About half of the target's choices are no tokens of the head: they count as missed.
    assert max(sum(ranks) for ranks in measured.measured.accuracies) < 0.9


def test_a_trimmed_vocabulary_comes_with_the_package() -> None:
    recipe = load_training("smollm2-eagle3")
    assert recipe.head.ids == "shipped:smollm2"
    assert len(read_ids(recipe.head, 49_152)) == 8192
    with pytest.raises(
        ValueError, match=r"head.ids: no vocabularies of that name .* \(there are: shipped:smollm2\)"
    ):
        read_ids(replace(recipe.head, ids="shipped:other"), 49_152)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method=eagle"],
            "method must be one of eagle3, medusa1, medusa2, mtp, parallel; got 'eagle' (did you mean eagle3?)",
        ),
        (["optimizer.steps=0"], "optimizer.steps must be at least 1, got 0"),
        (["eagle3.loss=l2"], "eagle3.loss must be one of kl, tv, kl_tv, lk_alpha, lk_lambda; got 'l2'"),
        (["head.kind=trimmed"], "head.ids must be a file for a trimmed head, got ''"),
        (["engine.zero_stage=4"], "engine.zero_stage must be one of 0, 1, 2, 3; got 4"),
        (["texts.directories=[]"], "texts.directories must be at least one folder, got ()"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, overrides: list[str], message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("target: {model: m}\ntexts: {directories: [d]}\nout: o\n")
    assert load_training(str(path)).out == "o"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_training(str(path), overrides)
