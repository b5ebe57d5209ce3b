"""What a request may ask of acceptance, within what the deployment allows."""

import pytest

from outrider.cluster.request_options import request_acceptance
from outrider.configs.loader import load_config
from outrider.configs.schema import Config
from outrider.workers.sequences.sequence import EXACTLY, AcceptanceOptions

CALIBRATED = {"maths": 0.8, "code": 0.6}
BOUNDS = [
    "acceptance.rules=[exact,typical,judge]",
    "acceptance.judges=[{name: maths, model: shipped:a}, {name: code, model: shipped:b}]",
    "acceptance.min_threshold=0.7",
    "acceptance.min_epsilon=0.05",
]


def deployment(*overrides: str) -> Config:
    return load_config("tiny-random", overrides)


def test_without_a_word_acceptance_is_exact() -> None:
    assert request_acceptance(deployment(), {}, {}) == EXACTLY
    assert request_acceptance(deployment(*BOUNDS), {}, CALIBRATED) == EXACTLY
    assert EXACTLY.rule == "exact"


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"rule": "typical"}, AcceptanceOptions("typical", 0.09, 0.3)),
        ({"rule": "typical", "epsilon": 0.05, "delta": 1}, AcceptanceOptions("typical", 0.05, 1.0)),
        ({"rule": "judge", "judge": "maths"}, AcceptanceOptions("judge", judge="maths", threshold=0.8)),
        # Calibrated to less than the deployment allows.
        ({"rule": "judge", "judge": "code"}, AcceptanceOptions("judge", judge="code", threshold=0.7)),
        (
            {"rule": "judge", "judge": "code", "threshold": 1},
            AcceptanceOptions("judge", judge="code", threshold=1.0),
        ),
    ],
)
def test_a_request_gets_the_rule_it_asks_for(asked: dict[str, object], options: AcceptanceOptions) -> None:
    assert request_acceptance(deployment(*BOUNDS), asked, CALIBRATED) == options


def test_an_only_judge_need_not_be_named() -> None:
    config = deployment("acceptance.rules=[exact,judge]", "acceptance.judges=[{name: a, model: shipped:a}]")
    assert request_acceptance(config, {"rule": "judge"}, {"a": 0.9}).judge == "a"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rule": "greedy"}, r"acceptance\.rule must be among .*\(exact, typical, judge\), got 'greedy'"),
        (
            {"rule": "judge", "judge": "maths", "threshold": 0.6},
            r"threshold must be in \[0\.7, 1\], .*got 0\.6",
        ),
        ({"rule": "judge", "judge": "maths", "threshold": float("nan")}, r"threshold must be in \[0\.7, 1\]"),
        ({"rule": "typical", "epsilon": 0.01}, r"acceptance\.epsilon must be in \[0\.05, 1\], .*min_epsilon"),
        ({"rule": "typical", "delta": 0.2}, r"acceptance\.delta must be in \[0\.3, 1\]"),
        (
            {"threshold": 0.9},
            r"acceptance\.threshold must be left out unless acceptance\.rule is judge, got 0\.9",
        ),
        ({"rule": "judge"}, r"acceptance\.judge must be one of maths, code, got ''"),
        ({"rule": "judge", "judge": "law"}, r"acceptance\.judge must be one of maths, code, got 'law'"),
        ({"rulle": "exact"}, r"unknown key acceptance\.rulle \(did you mean rule"),
    ],
)
def test_more_than_is_allowed_is_refused_with_the_field(asked: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        request_acceptance(deployment(*BOUNDS), asked, CALIBRATED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("acceptance.rules=[typical]", r"acceptance\.rules must be a list with exact"),
        ("acceptance.rules=[exact,judge]", r"acceptance\.judges must be at least one judge if"),
        (
            "acceptance.judges=[{name: a, model: b}]",
            r"acceptance\.judges must be at least one judge if .* else none",
        ),
        ("acceptance.judges=[{name: a}]", r"missing key .*model"),
        ("acceptance.judges=[{name: a, model: ''}]", r"acceptance\.judges model must be a text"),
        ("acceptance.min_threshold=0", r"acceptance\.min_threshold must be more than 0 and at most 1"),
    ],
)
def test_a_deployment_that_contradicts_itself_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deployment(override)
