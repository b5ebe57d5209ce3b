"""`outrider serve` on real Ray, spoken to by OpenAI's client, by ours and by plain HTTP."""

import asyncio
import json
import os
from collections.abc import Iterator

import openai
import psutil
import pytest

from outrider import AsyncClient, Client
from outrider.cluster.client.answers import RefusedError
from outrider.cluster.client.calls import Options
from support.serving import Server, running_server
from support.siege import gauges, vanish
from support.waiting import wait_until

pytestmark = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a server and its workers need two CPUs")

PROMPTS = ["once upon a time", "one two three one two three one two", "x"]
QUESTION = [{"role": "user", "content": "one two three"}]
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 3, "frequency_penalty": 0.5, "max_tokens": 40}
PLAIN = {"speculative": "off"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("tiny-random", ["server.model_name=tiny", "server.max_concurrent=80"]) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        yield server
    assert server.process.returncode in (143, -15, 0), "".join(server.lines)
    wait_until(lambda: all(is_gone(child) for child in children))


@pytest.fixture(scope="module")
def theirs(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def ours(server: Server) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def is_gone(child: psutil.Process) -> bool:
    try:
        return not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # between the two questions
        return True


def wait_until_idle(server: Server) -> None:
    wait_until(lambda: gauges(server.url) == (0, 0, 0))


def test_an_answer_is_what_it_must_be_and_the_same_however_it_is_drafted(
    theirs: openai.OpenAI, ours: Client
) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["ada", "bob"]}, "ages": {"type": "array", "maxItems": 3}},
        "required": ["name", "ages"],
        "additionalProperties": False,
    }
    schema["properties"]["ages"]["items"] = {"type": "integer", "minimum": 0, "maximum": 99}
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    said = []
    for speculative in ("off", {}):
        for temperature in (0.0, 1.0):
            answer = theirs.chat.completions.create(
                model="tiny",
                messages=QUESTION,
                response_format=form,
                temperature=temperature,
                max_tokens=300,
                seed=5,
                extra_body={"speculative": speculative, "min_tokens": 5},
            )
            said.append(answer.choices[0].message.content)
            if answer.choices[0].finish_reason == "stop":
                assert json.loads(said[-1])["name"] in ("ada", "bob")
    assert said[:2] == said[2:]
    asked = {"structured_outputs": {"choice": ["etaoin", "shrdlu"]}, "temperature": 1.0}
    assert {ours.generate("x", {**asked, "seed": seed}).text for seed in range(4)} <= {"etaoin", "shrdlu"}


def test_openais_client_streams_what_plain_decoding_says(theirs: openai.OpenAI) -> None:
    (model,) = theirs.models.list()
    assert model.id == "tiny"
    for options in ({"max_tokens": 40}, SAMPLED):
        asked = {"model": "tiny", "messages": QUESTION, **options}
        plain = theirs.chat.completions.create(**asked, extra_body=PLAIN)
        text, usage = "", None
        stream = theirs.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage
        assert text == plain.choices[0].message.content
        assert usage.completion_tokens == 40
        assert usage.speculative["accepted"] > 0
        assert plain.usage.speculative["drafted"] == 0
        assert usage.prompt_tokens == plain.usage.prompt_tokens


def test_a_stream_tells_the_tree_of_every_round_and_is_no_other_for_it(ours: Client) -> None:
    options: Options = {"max_tokens": 40, "temperature": 0.8, "seed": 3}
    untold = ours.generate(PROMPTS[1], options)
    told = ours.stream(PROMPTS[1], {**options, "speculative": {"tree": True}})
    parts = list(told)
    assert "".join(part.text for part in parts) == untold.text
    before, drafted, accepted = ours.tokenize(PROMPTS[1])[-1], 0, 0
    for part in parts:
        tree, ids = part.tree, [token.id for token in part.tokens]
        path = list(tree.accepted)
        assert (tree.token_ids[0], tree.parents[0]) == (before, 0)
        assert all(parent < node for node, parent in enumerate(tree.parents[1:], start=1))
        assert [tree.parents[node] for node in path] == [0, *path][: len(path)]
        assert [tree.token_ids[node] for node in path] == ids[: len(path)]
        assert len(ids) - len(path) <= 1
        before, drafted, accepted = ids[-1], drafted + len(tree.tokens) - 1, accepted + len(path)
    usage = told.answer().usage
    assert drafted == usage.drafted
    assert 0 < accepted <= usage.accepted


def test_openais_client_streams_responses(theirs: openai.OpenAI) -> None:
    asked = {"model": "tiny", "input": "one two three", "max_output_tokens": 30}
    whole = theirs.responses.create(**asked)
    chat = theirs.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=30)
    assert whole.output_text == chat.choices[0].message.content
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (whole.usage.output_tokens, whole.usage.input_tokens) == (30, chat.usage.prompt_tokens)
    events = list(theirs.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")


def test_choices_differ_by_seed_and_report_log_probabilities(theirs: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 10, "temperature": 1.0}
    both = theirs.completions.create(**asked, seed=5, n=2, logprobs=3)
    alone = [theirs.completions.create(**asked, seed=seed).choices[0].text for seed in (5, 6)]
    assert [choice.text for choice in both.choices] == alone
    assert alone[0] != alone[1]
    reported = both.choices[0].logprobs
    assert len(reported.tokens) == len(reported.token_logprobs) == 10
    assert all(logprob <= 0 for logprob in reported.token_logprobs)


def test_openais_client_gets_errors_it_knows(theirs: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        theirs.completions.create(model="tiny", prompt="x", temperature=1000)
    assert (refused.value.param, refused.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError):
        theirs.completions.create(model="gpt", prompt="x")
    many = ["x"] * 60
    with theirs.completions.create(model="tiny", prompt=many, max_tokens=400, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as full:
            theirs.completions.create(model="tiny", prompt=many)
    assert full.value.response.headers["retry-after"] == "1"


def test_our_client_says_who_chose_each_token(ours: Client) -> None:
    for prompt in (*PROMPTS, QUESTION, [5, 6, 7]):
        plain = ours.generate(prompt, {"max_tokens": 24, "speculative": {"budget": 0}})
        stream = ours.stream(prompt, {"max_tokens": 24, "top_logprobs": 2})
        parts = list(stream)
        answer = stream.answer()
        assert "".join(part.text for part in parts) == answer.text == plain.text
        assert [token.id for token in answer.tokens] == [token.id for token in plain.tokens]
        assert {token.origin for token in plain.tokens} == {"target"}
        drafted = [token for token in answer.tokens if token.origin == "draft"]
        assert len(drafted) == answer.usage.accepted
        assert answer.usage.acceptance_length >= 1
        assert all(token.logprob is not None and token.logprob <= 0 for token in answer.tokens)
        assert answer.finish_reason == "length"
    with pytest.raises(RefusedError, match="top_p must be in") as refused:
        ours.generate("x", {"top_p": 2.0})
    assert refused.value.param == "top_p"
    good, bad = ours.batch([{"prompt": "x"}, {"prompt": "x", "options": {"seed": -1}}])
    assert not isinstance(good, Exception)
    assert good.text == ours.generate("x").text
    assert isinstance(bad, RefusedError)
    assert ours.models() == ["tiny"]
    assert ours.generate(ours.tokenize("once upon")).text == ours.generate("once upon").text


def test_sixty_four_streams_at_once_are_each_the_text_of_plain_decoding(server: Server) -> None:
    async def scenario() -> None:
        async with AsyncClient(server.url) as client:
            plain = [await client.generate(p, {**SAMPLED, "speculative": {"budget": 0}}) for p in PROMPTS]

            async def one(number: int) -> str:
                prompt = PROMPTS[number % len(PROMPTS)]
                return "".join([part.text async for part in client.stream(prompt, {**SAMPLED})])

            texts = await asyncio.gather(*map(one, range(64)))
            assert texts == [plain[number % len(PROMPTS)].text for number in range(64)]

    asyncio.run(scenario())


def test_pages_come_back_from_clients_that_leave(server: Server, ours: Client) -> None:
    long = {"max_tokens": 450, "ignore_eos": True}
    streams = [ours.stream("go on", long) for _ in range(10)]
    for stream in streams:
        next(stream)
    assert gauges(server.url)[0] > 0
    for stream in streams:
        stream.close()

    async def scenario() -> None:
        async with AsyncClient(server.url) as client:
            tasks = [asyncio.create_task(client.generate("go on", long)) for _ in range(20)]
            await asyncio.sleep(0.2)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(scenario())
    wait_until_idle(server)
    vanish(server.url, 70)
    wait_until_idle(server)
