"""A judge's checkpoint: what it says, that it says it again, and whom it is refused to."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from outrider.configs import loader
from outrider.workers.judging.head import (
    JudgeDescription,
    JudgeHead,
    ThresholdRow,
    check_models,
    read_judge,
    write_judge,
)
from outrider.workers.judging.identity import identify
from outrider.workers.weights import resolver
from outrider.workers.weights.progress import silent
from outrider.workers.weights.resolver import open_source, resolve_judge
from support.tiny import tiny_drafter, tiny_target

TARGET = identify("the target", open_source(tiny_target()), "{{ messages }}")
DRAFTER = identify("the drafter", open_source(tiny_drafter()), None)
ROWS = (ThresholdRow(0.5, 0.9, 0.7, 5.5, 1.2), ThresholdRow(0.8, 0.99, 0.4))
DESCRIPTION = JudgeDescription("target", TARGET, None, 0.5, ROWS, ("arithmetic",), {"commit": "abc"})
BOTH = replace(DESCRIPTION, kind="target_and_draft", drafter=DRAFTER)


@pytest.mark.parametrize("description", [DESCRIPTION, BOTH])
def test_a_judge_is_read_as_it_was_written(tmp_path: Path, description: JudgeDescription) -> None:
    head = JudgeHead(description.num_columns)
    write_judge(tmp_path, head, description)
    again, said = read_judge(tmp_path)
    assert said == description
    assert again.state_dict().keys() == head.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], x) for name, x in head.state_dict().items())


def test_scaling_is_folded_into_the_weights() -> None:
    rows = torch.randn(50, 8) * 30 + 7
    mean, scale, weight = rows.mean(dim=0), rows.std(dim=0), torch.randn(8)
    expected = ((rows - mean) / scale) @ weight + 0.25
    folded = JudgeHead.folded(weight, 0.25, mean, scale)
    torch.testing.assert_close(folded(rows), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(folded(rows.half()), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "mlp"}, r"kind must be one of target, target_and_draft, got 'mlp'"),
        ({"threshold": 1.5}, "threshold must be from 0 to 1, got 1.5"),
        ({"layer": 3}, "layer is not known here"),
        ({"tasks": "all"}, "tasks must be a list of texts"),
        ({"thresholds": [{"threshold": 0.5}]}, r"thresholds\[0\]\.harmful_recall must be from 0 to 1"),
        ({"target": None}, "target must be an object"),
        ({"kind": "target_and_draft"}, "drafter must be an object"),
    ],
)
def test_a_field_that_is_not_what_it_may_be_is_named(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    write_judge(tmp_path, JudgeHead(DESCRIPTION.num_columns), DESCRIPTION)
    path = tmp_path / "judge.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"^{tmp_path}: {said}") as caught:
        read_judge(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    write_judge(tmp_path, JudgeHead(BOTH.num_columns), BOTH)
    head_of_both = (tmp_path / "judge.safetensors").read_bytes()
    write_judge(tmp_path, JudgeHead(DESCRIPTION.num_columns), DESCRIPTION)
    (tmp_path / "judge.safetensors").write_bytes(head_of_both)
    with pytest.raises(ValueError, match=r"judge\.safetensors must hold .*\(1, 80\)"):
        read_judge(tmp_path)
    (tmp_path / "judge.safetensors").write_bytes(head_of_both[:50])
    with pytest.raises(ValueError, match=r"judge\.safetensors cannot be read"):
        read_judge(tmp_path)


def test_a_judge_of_other_models_is_refused_with_all_causes() -> None:
    check_models("judges.a", DESCRIPTION, replace(TARGET, model="elsewhere/the-same"), None)
    check_models("judges.a", BOTH, TARGET, DRAFTER)
    other = replace(TARGET, hidden_size=96, num_layers=3, template_sha256="")
    with pytest.raises(
        ValueError,
        match=r"^judges\.a must be .*hidden size 80, not 96; .*number of layers 2, not 3; .*another chat template$",
    ):
        check_models("judges.a", DESCRIPTION, other, None)
    retrained = replace(TARGET, fingerprint="0")
    with pytest.raises(ValueError, match=r"embedding has other values"):
        check_models("judges.a", DESCRIPTION, retrained, None)
    with pytest.raises(ValueError, match=r"reads a draft model's rows, and draft\.methods has no `model`"):
        check_models("judges.a", BOTH, TARGET, None)
    with pytest.raises(ValueError, match=r"draft model the drafter: .*other values"):
        check_models("judges.a", BOTH, TARGET, replace(DRAFTER, fingerprint="0"))


def test_judges_that_come_with_the_package_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_judge(tmp_path / "mine", JudgeHead(DESCRIPTION.num_columns), DESCRIPTION)
    for module in (loader, resolver):
        monkeypatch.setattr(module, "JUDGES_DIR", tmp_path)
    assert resolve_judge("shipped:mine", silent, "judges.a") == tmp_path / "mine"
    assert resolve_judge(str(tmp_path / "mine"), silent, "judges.a") == tmp_path / "mine"
    with pytest.raises(ValueError, match=r"^judges\.a: no judges of that name .*there are: shipped:mine"):
        resolve_judge("shipped:yours", silent, "judges.a")
    with pytest.raises(ValueError, match=r"^judges\.a: .* is not a directory with judge\.json"):
        resolve_judge(str(tmp_path), silent, "judges.a")
