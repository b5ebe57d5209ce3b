"""The door on fake workers: who is let in, in which order, and who is refused, alone."""

import asyncio
import pickle
import re
import threading
from typing import Any

import pytest
import yaml

from outrider.cluster.api import GenerationRequest, Piece, Refusal, Ticket
from outrider.cluster.coordinator import Coordinator
from outrider.configs.loader import config_from_dict, config_to_yaml
from outrider.configs.schema import Config
from outrider.workers.answer import Completion
from outrider.workers.sequences.sequence import Request
from support.fake_workers import FAKE_CONFIG, FakeDeployment, endless, fake_deployment
from support.waiting import until

LONG = [1] * 20_000  # more ids than the context holds


def echo(prompt: str) -> str:
    return prompt.upper()


def ticket(name: str, prompt: Any, sampling: Any = (), whole: bool = True) -> Ticket:
    return Ticket(name, pickle.dumps(GenerationRequest(prompt, sampling or {})), whole)


async def last_answers(coordinator: Coordinator, number: int) -> dict[str, Any]:
    """Waits for the last answers to so many requests, by their names."""
    last: dict[str, Any] = {}
    while len(last) < number:
        for name, answer in (await coordinator.take(1.0)).answers:
            if not isinstance(answer, Piece) or answer.finish_reason:
                assert name not in last
                last[name] = answer
    return last


WRONG_PROMPTS = [
    (None, "prompt must be a text, a list of messages or a list of token ids, got NoneType"),
    (5, "prompt must be a text"),
    (0.5, "prompt must be a text"),
    ({1, 2}, "prompt must be a text"),
    ({"role": "user", "content": "hi"}, "prompt must be a text"),
    ([True], "prompt must be a text"),
    ([1, "a"], "prompt must be a text"),
    (["a"], "prompt must be a text"),
    (b"hello", "prompt must be a text"),
    (bytearray(b"hello"), "prompt must be a text"),
    ("\ud800", "prompt must be valid Unicode, got half of a surrogate pair at character 0"),
    ([{"role": "user", "content": "a\udfff"}], "content of a message must be valid Unicode"),
    ([{"role": "user", "content": 5}], "a message must have the texts role and content"),
    ([{"role": "user", "content": "a", "nam": "b"}], "a message may have the fields role, content, name"),
    ([{"role": "user", "content": "a", "name": 5}], "name of a message must be a text, got 5"),
    ([{"role": "assistant", "content": None}], "a message must have the texts role and content"),
    ([{"role": "assistant", "tool_calls": ["f"]}], "tool_calls of a message must be a list of objects"),
    ([{"role": "assistant", "tool_calls": [{"f": "\ud800"}]}], "tool_calls of a message must be valid Uni"),
    ([{"role": "assistant", "tool_calls": [{"f": {1}}]}], "tool_calls of a message must be what JSON can"),
    ([], "prompt must have at least one token"),
    ([10**30], "prompt token ids must be in"),
    (LONG, "prompt and sampling.max_tokens must be at most 200 tokens together"),
    ("x" * 8_000_000, "prompt must be at most 200 tokens"),
]
WRONG_SAMPLING = [
    ([1], r"sampling must be a mapping of keys to values, got \[1\]"),
    ({"stop": 5}, "sampling.stop must be a list of texts"),
    ({"stop": [f"{'a' * 9}{i}" for i in range(300)]}, "sampling.stop must have at most 128 strings, got 300"),
    ({"stop": ["a" * 5000]}, "sampling.stop must have at most 4096 characters, got 5000"),
    ({"stop_token_ids": list(range(128)) * 20}, "sampling.stop_token_ids must have at most 1024 ids"),
    ({"logit_bias": [[1, 1.0]] * 400}, "sampling.logit_bias must be at most 300 entries"),
    ({"temperature": "x" * 10_000}, "sampling.temperature must be a number"),
    ({"temperature": 10**400}, "sampling.temperature must be a number of less than 309 digits"),
    ({5: 1}, "unknown key sampling.5"),
]


@pytest.mark.parametrize("whole", [True, False])
def test_each_bad_request_is_refused_alone_with_one_short_line(whole: bool) -> None:
    wrong = [(p, {}, m) for p, m in WRONG_PROMPTS] + [("x", s, m) for s, m in WRONG_SAMPLING]

    async def scenario() -> None:
        async with fake_deployment(echo) as fake:
            tickets = [ticket(str(i), p, s, whole) for i, (p, s, _) in enumerate(wrong)]
            tickets += [Ticket("no pickle", b"gibberish", whole), ticket("good", "hello", {}, whole)]
            await fake.coordinator.submit(tickets)
            answers = await last_answers(fake.coordinator, len(tickets))
            for i, (_, _, message) in enumerate(wrong):
                answer = answers[str(i)]
                assert isinstance(answer, Completion if whole else Refusal)
                assert re.match(message, answer.error), answer.error
                assert "\n" not in answer.error
                assert len(answer.error) <= 500
            assert answers["no pickle"].error.startswith("the request could not be read: UnpicklingError")
            assert answers["good"].finish_reason == "stop"
            assert [request.id for request in fake.draft.submitted] == ["good"]

    asyncio.run(scenario())


def test_a_chat_template_that_raises_refuses_its_own_messages_only() -> None:
    async def scenario() -> None:
        async with fake_deployment(echo) as fake:
            tokenizer: Any = fake.coordinator._door._admission.tokenizer

            def raising(messages: Any, add_generation_prompt: bool, tokenize: bool) -> str:
                raise TypeError("roles must alternate\nuser, assistant")

            tokenizer.apply_chat_template = raising
            bad = ticket("bad", [{"role": "user", "content": "hi"}])
            await fake.coordinator.submit([bad, ticket("good", "hi")])
            answers = await last_answers(fake.coordinator, 2)
            assert answers["bad"].error == (
                "the model's chat template refuses these messages: roles must alternate"
            )
            assert answers["good"].text == "HI"

    asyncio.run(scenario())


class SlowReading:
    """Holds the reading of some requests until it is told to go on."""

    def __init__(self, fake: FakeDeployment, held: str) -> None:
        self.go_on = threading.Event()
        self.reached = threading.Event()
        door = fake.coordinator._door
        admission = door._admission
        self._held = held

        class Slow(type(admission)):  # type: ignore[misc]
            def admit(inner, request_id: str, asked: GenerationRequest) -> Request:
                if request_id == self._held:
                    self.reached.set()
                    self.go_on.wait()
                return super().admit(request_id, asked)

        door._admission = Slow(**{name: getattr(admission, name) for name in admission.__dataclass_fields__})


def test_requests_enter_in_the_order_of_their_arrival_and_no_short_one_waits_for_a_long_one() -> None:
    async def scenario() -> None:
        async with fake_deployment(echo, config(target={"max_context": 30_000})) as fake:
            slow = SlowReading(fake, "long")
            names = [f"short {i}" for i in range(40)]
            tickets = [ticket("long", LONG, {"max_tokens": 1}), *(ticket(name, "hi") for name in names)]
            await fake.coordinator.submit(tickets)
            await last_answers(fake.coordinator, len(names))
            assert [request.id for request in fake.draft.submitted] == names
            slow.go_on.set()
            await last_answers(fake.coordinator, 1)

    asyncio.run(scenario())


def test_a_request_is_cancelled_wherever_it_is() -> None:
    async def scenario() -> None:
        async with fake_deployment(endless) as fake:
            slow = SlowReading(fake, "read")
            endless_one = {"max_tokens": 150}
            names = ("read", "waits", "submitted")
            await fake.coordinator.submit([ticket("read", "x", endless_one)])
            await asyncio.to_thread(slow.reached.wait)
            await fake.coordinator.submit([ticket("waits", "x", endless_one)])
            await fake.coordinator.cancel(["read", "waits", "unknown"])
            slow.go_on.set()
            await fake.coordinator.submit([ticket("submitted", "x", endless_one)])
            await fake.coordinator.cancel(["submitted"])  # right after: it has not been read yet
            answers = await last_answers(fake.coordinator, 3)
            assert {answers[name].finish_reason for name in names} == {"cancelled"}
            assert not fake.draft.submitted
            await fake.coordinator.submit([ticket("runs", "x", endless_one, whole=False)])
            await fake.coordinator.take(1.0)
            await fake.coordinator.cancel(["runs"])
            assert (await last_answers(fake.coordinator, 1))["runs"].finish_reason == "cancelled"

    asyncio.run(scenario())


def test_one_that_is_cancelled_while_it_is_sent_is_cancelled_after_it() -> None:
    async def scenario() -> None:
        async with fake_deployment(endless) as fake:
            sending, go_on = threading.Event(), threading.Event()
            submit = fake.draft.submit

            def slow(epoch: int, requests: list[Request]) -> None:
                sending.set()
                go_on.wait()
                submit(epoch, requests)

            fake.draft.submit = slow  # type: ignore[method-assign]
            await fake.coordinator.submit([ticket("a", "x", {"max_tokens": 150})])
            await asyncio.to_thread(sending.wait)
            await fake.coordinator.cancel(["a"])
            assert not fake.draft.cancelled
            go_on.set()
            assert (await last_answers(fake.coordinator, 1))["a"].finish_reason == "cancelled"

    asyncio.run(scenario())


def test_open_requests_have_a_bound_and_control_does_not_wait_for_them() -> None:
    async def scenario() -> None:
        async with fake_deployment(endless, config(cluster={"max_open_requests": 3})) as fake:
            tickets = [ticket(str(i), "x", {"max_tokens": 150}) for i in range(4)]
            await fake.coordinator.submit(tickets)
            refused = await last_answers(fake.coordinator, 1)
            assert "cluster.max_open_requests = 3 requests are open already" in refused["3"].error
            assert (await fake.coordinator.stats())["coordinator"]["num_open_requests"] == 3

    asyncio.run(scenario())


def test_a_request_that_is_read_while_the_deployment_breaks_ends_with_the_reason() -> None:
    async def scenario() -> None:
        async with fake_deployment(endless, config(cluster={"max_restarts": 0})) as fake:
            slow = SlowReading(fake, "read")
            await fake.coordinator.submit([ticket("read", "x"), ticket("waits", "x", whole=False)])
            await asyncio.to_thread(slow.reached.wait)
            fake.draft.stop()
            fake.targets[1].die("out of memory")
            answers = await last_answers(fake.coordinator, 2)
            slow.go_on.set()
            assert all("out of memory" in answer.error for answer in answers.values())
            assert {answer.finish_reason for answer in answers.values()} == {"error"}

    asyncio.run(scenario())


def test_a_fault_in_the_text_of_one_request_ends_that_one_only() -> None:
    async def scenario() -> None:
        async with fake_deployment(echo) as fake:
            admission = fake.coordinator._door._admission

            class Broken:
                def add(self, token: int) -> str:
                    raise KeyError(token)

                def finish(self) -> str:
                    return ""

            decoders = iter([Broken(), admission.decoder()])
            object.__setattr__(admission, "decoder", lambda: next(decoders))
            await fake.coordinator.submit([ticket("bad", "one"), ticket("good", "two")])
            answers = await last_answers(fake.coordinator, 2)
            assert answers["bad"].error.startswith("its text failed: KeyError")
            assert answers["good"].text == "TWO"
            # The answer goes out before the worker hears that nobody waits for the rest.
            await until(lambda: fake.draft.cancelled == ["bad"])

    asyncio.run(scenario())


def config(**sections: dict[str, Any]) -> Config:
    """The fakes' configuration with some keys changed."""
    values = yaml.safe_load(config_to_yaml(FAKE_CONFIG))
    for section, changes in sections.items():
        values[section].update(changes)
    return config_from_dict(values)
