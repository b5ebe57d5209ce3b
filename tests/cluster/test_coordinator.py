"""The Coordinator on fake workers: no Ray, no model; a token is a character."""

import asyncio
import pickle
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from outrider.cluster.api import (
    Answer,
    EngineError,
    GenerationRequest,
    Notice,
    Piece,
    Refusal,
    Ticket,
)
from outrider.cluster.coordinator import Coordinator
from outrider.configs.schema import ClusterConfig
from outrider.workers.answer import Completion
from outrider.workers.sequences.origin import Origin
from support.char_admission import EOS_TOKEN_IDS, char_admission
from support.fake_workers import (
    FAKE_CONFIG,
    FakeCrew,
    FakeTarget,
    endless,
    fake_deployment,
)
from support.waiting import until

NO_RESTARTS = replace(FAKE_CONFIG, cluster=ClusterConfig(max_restarts=0))


def echo(prompt: str) -> str:
    return prompt.upper()


async def answers_to(
    coordinator: Coordinator, asked: GenerationRequest, name: str, whole: bool
) -> AsyncIterator[Answer]:
    """What the Coordinator says about one request; nothing else may be open."""
    await coordinator.submit([Ticket(name, pickle.dumps(asked), whole)])
    while True:
        for request_id, answer in (await coordinator.take(1.0)).answers:
            assert request_id == name
            yield answer
            if not isinstance(answer, Piece | Notice) or (isinstance(answer, Piece) and answer.finish_reason):
                return


async def pieces_of(coordinator: Coordinator, asked: GenerationRequest, name: str = "a") -> list[Piece]:
    """Raises ValueError for a request that is refused."""
    pieces = []
    async for answer in answers_to(coordinator, asked, name, whole=False):
        if isinstance(answer, Refusal):
            raise ValueError(answer.error)
        assert isinstance(answer, Piece)
        pieces.append(answer)
    return pieces


async def complete(coordinator: Coordinator, asked: GenerationRequest, name: str = "a") -> Completion:
    (answer,) = [answer async for answer in answers_to(coordinator, asked, name, whole=True)]
    assert isinstance(answer, Completion)
    return answer


async def complete_all(coordinator: Coordinator, requests: Sequence[GenerationRequest]) -> list[Completion]:
    tickets = [Ticket(str(i), pickle.dumps(asked), whole=True) for i, asked in enumerate(requests)]
    await coordinator.submit(tickets)
    answers: dict[str, Any] = {}
    while len(answers) < len(tickets):
        answers.update(dict((await coordinator.take(1.0)).answers))
    return [answers[ticket.request_id] for ticket in tickets]


def test_the_start_tells_once_what_the_ranks_found_out_and_what_the_draft_heads_are_like() -> None:
    async def scenario() -> None:
        async with fake_deployment(echo) as fake:
            num_tokens = len(char_admission(FAKE_CONFIG, lambda *_: None).calibration().prompt_tokens)
            assert fake.warnings == ["this target is slow", f"a text after {num_tokens} tokens was hard"]

    asyncio.run(scenario())


def test_streams_text_tokens_and_origins_as_rounds_give_them() -> None:
    async def scenario() -> None:
        async with fake_deployment(echo) as fake:
            pieces = await pieces_of(fake.coordinator, GenerationRequest("hello"))
            assert [piece.text for piece in pieces] == ["HEL", "LO"]
            assert pieces[0].tokens == tuple(map(ord, "HEL"))
            assert pieces[0].origins == (Origin.DRAFT, Origin.DRAFT, Origin.TARGET)
            assert [(s.text, s.origin) for s in pieces[0].segments] == [
                ("H", Origin.DRAFT),
                ("E", Origin.DRAFT),
                ("L", Origin.TARGET),
            ]
            assert [piece.finish_reason for piece in pieces] == ["", "stop"]
            assert pieces[-1].stats.num_rounds == 2

    asyncio.run(scenario())


def test_messages_go_through_the_chat_template() -> None:
    async def scenario() -> None:
        async with fake_deployment(echo) as fake:
            asked = GenerationRequest([{"role": "user", "content": "hi"}])
            completion = await complete(fake.coordinator, asked)
            assert completion.text == "<USER>HI"

    asyncio.run(scenario())


def test_a_stop_string_ends_the_answer_before_it_and_cancels_the_request() -> None:
    async def scenario() -> None:
        async with fake_deployment(endless) as fake:
            asked = GenerationRequest("x", {"stop": [" so"], "max_tokens": 150})
            completion = await complete(fake.coordinator, asked)
            assert completion.text == "and"
            assert completion.finish_reason == "stop"
            # The tokens up to the one that completes the stop string; of its round, those after it are gone.
            assert completion.tokens == tuple(map(ord, "and so"))
            assert len(completion.token_times_s) == len(completion.tokens)
            await until(lambda: fake.draft.cancelled == ["a"])

    asyncio.run(scenario())


def test_the_end_of_text_stops_a_request_unless_it_says_otherwise() -> None:
    async def scenario() -> None:
        async with fake_deployment(echo) as fake:
            await complete(fake.coordinator, GenerationRequest("x", {"stop_token_ids": [7]}), "a")
            await complete(fake.coordinator, GenerationRequest("x", {"ignore_eos": True}), "b")
            stops = [request.sampling.stop_token_ids for request in fake.draft.submitted]
            assert stops == [(7, *EOS_TOKEN_IDS), ()]

    asyncio.run(scenario())


def test_log_probabilities_come_with_their_tokens() -> None:
    async def scenario() -> None:
        async with fake_deployment(echo) as fake:
            asked = GenerationRequest("hello", {"logprobs": True})
            completion = await complete(fake.coordinator, asked)
            assert [entry.logprob for entry in completion.logprobs] == [-0.5] * 5

    asyncio.run(scenario())


def test_cancelling_closes_the_stream() -> None:
    async def scenario() -> None:
        async with fake_deployment(endless) as fake:
            reasons = []
            asked = GenerationRequest("x", {"max_tokens": 150})
            async for piece in answers_to(fake.coordinator, asked, "a", whole=False):
                assert isinstance(piece, Piece)
                if not reasons:
                    await fake.coordinator.cancel(["a"])
                reasons.append(piece.finish_reason)
            assert reasons[-1] == "cancelled"

    asyncio.run(scenario())


def test_a_bad_request_fails_alone_among_good_ones() -> None:
    async def scenario() -> None:
        async with fake_deployment(echo) as fake:
            asked = [
                GenerationRequest("one"),
                GenerationRequest("two", {"top_p": 2.0}),
                GenerationRequest("three"),
            ]
            first, bad, last = await complete_all(fake.coordinator, asked)
            assert (first.text, last.text) == ("ONE", "THREE")
            assert bad.finish_reason == "error"
            assert bad.error.startswith("sampling.top_p must be in (0, 1]")
            assert "\n" not in bad.error

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (GenerationRequest(""), "prompt must have at least one token"),
        (GenerationRequest("x" * 300), "prompt and sampling.max_tokens must be at most 200 tokens"),
        (GenerationRequest("x", {"max_tokens": 200}), r"got 1 \+ 200"),
        (GenerationRequest("x", {"max_tokens": "many"}), "sampling.max_tokens must be an integer"),
        (
            GenerationRequest("x", {"temprature": 1}),
            r"unknown key sampling.temprature \(did you mean temperature",
        ),
        (GenerationRequest("x", {"logit_bias": [[1, 2, 3]]}), r"sampling.logit_bias\[0\] must be a list of"),
        (GenerationRequest("x", {}, {"methods": ["model"]}), r"draft.methods must be among .* \(ngram\)"),
        (GenerationRequest("x", {}, {"max_nodes": 99}), r"draft.max_nodes must be in \[0, 16\], got 99"),
        (GenerationRequest("x", {}, {"max_depth": 0}), "draft.max_depth must be in"),
        (GenerationRequest([1, 500]), "prompt token ids must be in"),
        (GenerationRequest([{"role": "user"}]), "a message must have the texts role and content"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_at_the_door(asked: GenerationRequest, message: str) -> None:
    async def scenario() -> None:
        async with fake_deployment(echo) as fake:
            with pytest.raises(ValueError, match=message):
                await pieces_of(fake.coordinator, asked)
            assert not fake.draft.submitted

    asyncio.run(scenario())


def test_where_nothing_is_restarted_the_death_of_a_worker_ends_all_requests_with_its_reason() -> None:
    async def scenario() -> None:
        async with fake_deployment(endless, NO_RESTARTS) as fake:
            asked = GenerationRequest("x", {"max_tokens": 150})
            answers = asyncio.create_task(complete_all(fake.coordinator, [asked, asked]))
            while len(fake.draft.submitted) < 2:
                await asyncio.sleep(0.001)
            fake.draft.stop()  # or the answers end before the death is noticed
            fake.targets[1].die("out of memory")
            for completion in await answers:
                assert completion.finish_reason == "error"
                assert completion.error.startswith(
                    "target 1 failed during run: RuntimeError: out of memory ("
                )
            assert "out of memory" in (await fake.coordinator.take(0.0)).failure
            with pytest.raises(EngineError, match="out of memory"):
                await fake.coordinator.submit([])

    asyncio.run(scenario())


def test_a_rank_that_outlives_another_is_told_so() -> None:
    """It may wait for the other one: on a GPU for ever, unless another thread of its process ends that."""

    async def scenario() -> None:
        async with fake_deployment(endless, NO_RESTARTS) as fake:
            fake.targets[1].die("out of memory")
            async with asyncio.timeout(30.0):
                while not fake.targets[0].was_aborted:
                    await asyncio.sleep(0.01)
            assert not fake.targets[1].was_aborted
            assert "out of memory" in (await fake.coordinator.take(0.0)).failure

    asyncio.run(scenario())


def test_a_worker_that_cannot_load_stops_the_start_with_one_line() -> None:
    def fail(target: FakeTarget) -> None:
        target.death = "no space left\nand a second line"

    async def scenario() -> None:
        with ThreadPoolExecutor(16) as threads:
            crew = FakeCrew(echo, threads)
            crew.prepare_next["target 0"] = fail
            message = r"^target 0 failed during load: RuntimeError: no space left \(\S+, line \d+\)$"
            with pytest.raises(EngineError, match=message):
                await Coordinator(FAKE_CONFIG, crew, char_admission).start(crew.make_all())

    asyncio.run(scenario())


def test_stats_and_trace_are_by_worker() -> None:
    async def scenario() -> None:
        async with fake_deployment(echo) as fake:
            assert list(await fake.coordinator.stats()) == ["draft", "target 0", "target 1", "coordinator"]
            assert list(await fake.coordinator.trace()) == ["draft", "target 0", "target 1"]
            assert [stage.worker for stage in await fake.coordinator.progress()] == ["coordinator"]

    asyncio.run(scenario())
