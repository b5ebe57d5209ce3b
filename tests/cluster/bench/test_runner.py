from outrider.cluster.bench.runner import EncodedPrompt, Plan, count_turns, run_turns, warm_up
from outrider.workers.sequences.params import SamplingParams
from support.fake_decoder import FakeDecoder

PROMPTS = [EncodedPrompt(f"p{index}", "qa", (index, 10 * index)) for index in range(3)]
SAMPLING = SamplingParams(temperature=0.0, max_tokens=4)


def decoders_that_share_a_log(*modes: str) -> tuple[list[FakeDecoder], list[tuple[str, int]]]:
    calls: list[tuple[str, int]] = []
    return [FakeDecoder(mode, calls=calls) for mode in modes], calls


def test_modes_take_turns_prompt_by_prompt_and_the_first_one_rotates() -> None:
    decoders, calls = decoders_that_share_a_log("a", "b", "c")
    run_turns(decoders, PROMPTS, SAMPLING, Plan((1,), repeats=1))
    assert calls == [
        *[("a", 0), ("b", 0), ("c", 0)],
        *[("b", 1), ("c", 1), ("a", 1)],
        *[("c", 2), ("a", 2), ("b", 2)],
    ]


def test_with_several_requests_in_flight_a_turn_is_all_prompts() -> None:
    decoders, calls = decoders_that_share_a_log("a", "b")
    turns = run_turns(decoders, PROMPTS, SAMPLING, Plan((2,), repeats=2))
    assert [(turn.mode, turn.repeat, len(turn.runs)) for turn in turns] == [
        *[("a", 0, 3), ("b", 0, 3)],
        *[("b", 1, 3), ("a", 1, 3)],
    ]
    assert len(calls) == 12
    assert all(decoder.most_in_flight <= 2 for decoder in decoders)
    assert [run.prompt_id for run in turns[0].runs] == ["p0", "p1", "p2"]


def test_a_mode_for_one_request_sits_out_higher_concurrencies() -> None:
    decoders = [FakeDecoder("engine"), FakeDecoder("transformers", is_concurrent=False)]
    plan = Plan((1, 8), repeats=1)
    turns = run_turns(decoders, PROMPTS, SAMPLING, plan)
    assert {(turn.mode, turn.concurrency) for turn in turns} == {
        ("engine", 1),
        ("transformers", 1),
        ("engine", 8),
    }
    assert count_turns(decoders, PROMPTS, plan) == len(turns)


def test_a_turn_is_charged_only_with_what_it_did() -> None:
    decoder = FakeDecoder("a")
    turns = run_turns([decoder], PROMPTS, SAMPLING, Plan((1, 3), repeats=1))
    assert [turn.busy_s["target 0"]["forward"] for turn in turns] == [0.5, 0.5, 0.5, 1.5]
    assert [turn.num_tokens for turn in turns] == [4, 4, 4, 12]


def test_turns_are_reported_while_they_run() -> None:
    seen: list[str] = []
    run_turns(
        [FakeDecoder("a")],
        PROMPTS,
        SAMPLING,
        Plan((1,), repeats=1),
        on_turn=lambda turn: seen.append(turn.runs[0].prompt_id),
    )
    assert seen == ["p0", "p1", "p2"]


def test_warm_up_is_short_and_uses_the_shortest_prompt() -> None:
    decoders, calls = decoders_that_share_a_log("a", "b")
    prompts = [EncodedPrompt("long", "qa", (7, 7, 7)), EncodedPrompt("short", "qa", (3,))]
    warm_up(decoders, prompts, SAMPLING, num_tokens=2)
    assert calls == [("a", 3), ("b", 3)]
