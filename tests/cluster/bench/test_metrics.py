import math

import pytest

from outrider.cluster.bench.metrics import (
    Spread,
    agreements,
    first_difference,
    non_model_share,
    summarise,
)
from outrider.cluster.bench.runner import Run, Turn
from outrider.workers.answer import Completion
from outrider.workers.sequences.sequence import RequestStats


def answered(tokens: tuple[int, ...], first_s: float = 0.5, per_token_s: float = 0.1) -> Completion:
    return Completion(
        tokens=tokens,
        token_times_s=tuple(first_s + per_token_s * index for index in range(len(tokens))),
        total_s=first_s + per_token_s * (len(tokens) - 1),
        stats=RequestStats(
            num_rounds=max(len(tokens) // 2, 1),
            num_drafted=len(tokens),
            num_accepted=len(tokens) - len(tokens) // 2,
        ),
    )


def counted(tokens: tuple[int, ...], stats: RequestStats) -> Completion:
    return Completion(tokens=tokens, token_times_s=(0.1,) * len(tokens), total_s=1.0, stats=stats)


def turn(
    mode: str,
    prompt_id: str,
    answer: Completion,
    wall_s: float = 2.0,
    category: str = "qa",
    concurrency: int = 1,
) -> Turn:
    run = Run(mode, concurrency, 0, prompt_id, category, answer)
    busy = {
        "draft": {"draft": 0.25 * wall_s, "forward": 0.25 * wall_s, "wait": 0.5 * wall_s},
        "target 0": {"forward": 0.75 * wall_s, "sample": 0.125 * wall_s, "commit": 0.0, "wait": 9 * wall_s},
    }
    return Turn(mode, concurrency, 0, wall_s, busy, (run,))


def test_throughput_is_all_tokens_over_all_time() -> None:
    (summary,) = summarise(
        [
            turn("a", "p0", answered((1,) * 10), wall_s=1.0),
            turn("a", "p1", answered((1,) * 20), wall_s=5.0),
        ]
    )
    assert summary.tokens_per_s == pytest.approx(30 / 6)
    assert (summary.num_runs, summary.num_tokens) == (2, 30)


def test_latencies_are_medians_with_quartiles() -> None:
    turns = [turn("a", f"p{i}", answered((1, 2, 3), first_s=float(i), per_token_s=0.1)) for i in range(1, 6)]
    (summary,) = summarise(turns)
    assert summary.ttft_s == Spread(3.0, 2.0, 4.0, 5)
    assert summary.time_per_token_s.median == pytest.approx(0.1)


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    (summary,) = summarise([turn("a", "p0", answered((1,)))])
    assert summary.time_per_token_s.num_values == 0
    assert math.isnan(summary.time_per_token_s.median)


def test_acceptance_length_counts_the_targets_own_token() -> None:
    answer = counted((1,) * 12, RequestStats(num_rounds=4, num_drafted=10, num_accepted=8))
    (summary,) = summarise([turn("a", "p0", answer)])
    assert summary.acceptance_length == 3.0
    assert summary.acceptance_rate == 0.8
    assert summary.nodes_per_step == 2.5


def test_acceptance_by_depth_adds_runs_of_different_depth() -> None:
    answers = [
        counted((1,), RequestStats(num_rounds=1, depth_drafted=(4, 2), depth_accepted=(2, 1))),
        counted((1,), RequestStats(num_rounds=1, depth_drafted=(4,), depth_accepted=(4,))),
        counted((1,), RequestStats(num_rounds=1)),
    ]
    (summary,) = summarise([turn("a", f"p{i}", answer) for i, answer in enumerate(answers)])
    assert summary.acceptance_by_depth == (0.75, 0.5)
    assert summary.rounds_by_depth == (8, 2)


def test_plain_decoding_has_no_acceptance_rate() -> None:
    (summary,) = summarise([turn("plain", "p0", counted((1,), RequestStats(num_rounds=1)))])
    assert math.isnan(summary.acceptance_rate)
    assert summary.acceptance_length == 1.0
    assert summary.acceptance_by_depth == ()


def test_a_worker_is_busy_when_it_does_not_wait_and_waiting_between_turns_does_not_count() -> None:
    (summary,) = summarise([turn("a", "p0", answered((1, 2)))])
    assert summary.busy_share == {"draft": 0.5, "target 0": 0.875}
    assert summary.time_share["target 0"] == {"forward": 0.75, "sample": 0.125, "wait": 0.125}


def test_non_model_share_lists_parts_over_the_workers_of_a_round() -> None:
    (summary,) = summarise([turn("a", "p0", answered((1, 2)))])
    assert non_model_share(summary, ["draft", "target 0"]) == {"draft": 0.25, "sample": 0.125}


def test_categories_have_their_own_throughput() -> None:
    (summary,) = summarise(
        [
            turn("a", "p0", answered((1,) * 11, first_s=1.0), category="math"),
            turn("a", "p1", answered((1,) * 11, first_s=4.0), category="qa"),
        ]
    )
    assert summary.tokens_per_s_by_category == {"math": pytest.approx(5.5), "qa": pytest.approx(2.2)}


def test_modes_and_concurrencies_are_summarised_apart() -> None:
    answer = answered((1, 2))
    summaries = summarise(
        [turn("b", "p0", answer), turn("a", "p0", answer), turn("b", "p0", answer, concurrency=8)]
    )
    assert [summary.label for summary in summaries] == ["b", "a", "b x8"]


@pytest.mark.parametrize(
    ("one", "other", "index"), [((1, 2, 3), (1, 5, 3), 1), ((1, 2), (1, 2, 3), 2), ((), (1,), 0)]
)
def test_first_difference(one: tuple[int, ...], other: tuple[int, ...], index: int) -> None:
    assert first_difference(one, other) == first_difference(other, one) == index


def test_agreement_names_the_prompts_that_differ_and_ignores_a_closing_stop_token() -> None:
    stop = 99
    turns = [
        turn("a", "p0", answered((1, 2, 3))),
        turn("b", "p0", answered((1, 2, 3, stop))),
        turn("a", "p1", answered((1, 2, 3))),
        turn("b", "p1", answered((1, 7, 3))),
    ]
    (agreement,) = agreements(turns, [stop])
    assert (agreement.one, agreement.other) == ("a", "b")
    assert (agreement.num_prompts, agreement.num_equal) == (2, 1)
    assert agreement.first_differences == {"p1": 1}
