"""The server's routes on workers without models: an answer is the prompt in capitals, three tokens a round."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from outrider import __version__
from outrider.cluster.serving.app import create_app
from outrider.configs.acceptance import AcceptanceConfig
from outrider.configs.schema import ClusterConfig, ServerConfig
from support.fake_workers import FAKE_CONFIG, endless
from support.posted_engine import PostedEngine, posted_engine
from support.waiting import wait_until

HELLO = {"messages": [{"role": "user", "content": "hi"}]}
LONG = replace(FAKE_CONFIG, target=replace(FAKE_CONFIG.target, max_context=30_000))
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
CALLING = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>\n' + (
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def schema_format(schema: object) -> dict[str, Any]:
    """OpenAI's way to ask for JSON of a kind."""
    return {"type": "json_schema", "json_schema": {"name": "kind", "schema": schema, "strict": True}}


@pytest.fixture(scope="module")
def engine() -> Iterator[PostedEngine]:
    with posted_engine(str.upper) as engine:
        yield engine


def client_of(engine: PostedEngine, **server: Any) -> TestClient:
    return TestClient(create_app(engine, replace(FAKE_CONFIG, server=ServerConfig(**server))))


@pytest.fixture(scope="module")
def client(engine: PostedEngine) -> TestClient:
    return client_of(engine, model_name="capitals", max_choices=4, max_body_bytes=10_000)


def events(text: str) -> list[dict[str, Any]]:
    """The objects of a stream, which ends as OpenAI's do."""
    *chunks, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert last == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def test_a_chat_is_answered_with_usage(client: TestClient) -> None:
    body = client.post(CHAT, json={**HELLO, "model": "capitals"}).json()
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "<USER>HI", "refusal": None}
    assert (choice["finish_reason"], body["object"], body["model"]) == ("stop", "chat.completion", "capitals")
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (8, 8, 16)
    assert usage["speculative"] == {"rule": "exact", "rounds": 3, "drafted": 0, "accepted": 0, "kept": 0}


def test_a_stream_says_usage_last_and_only_if_asked(client: TestClient) -> None:
    asked = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(client.post(CHAT, json=asked).text)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "<US"},
        {"content": "ER>"},
        {"content": "HI"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 8)
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    assert all(
        "usage" not in chunk for chunk in events(client.post(CHAT, json={**HELLO, "stream": True}).text)
    )


def test_completions_of_several_prompts_stand_in_order_and_count_each_prompt_once(client: TestClient) -> None:
    asked = {"prompt": [[97, 98], [99, 100]], "n": 2, "echo": True}
    assert client.post(COMPLETIONS, json={"prompt": ["ab", "cd"]}).json()["usage"]["prompt_tokens"] == 4
    body = client.post(COMPLETIONS, json=asked).json()
    assert [choice["text"] for choice in body["choices"]] == ["abAB", "abAB", "cdCD", "cdCD"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (4, 8)
    streamed = [""] * 4
    for chunk in events(client.post(COMPLETIONS, json={**asked, "stream": True}).text):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == ["abAB", "abAB", "cdCD", "cdCD"]


def test_log_probabilities_have_the_shape_of_each_route(client: TestClient) -> None:
    chat = client.post(CHAT, json={**HELLO, "logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    assert chat[0] == {"token": "<", "logprob": -0.5, "bytes": [60], "top_logprobs": []}
    body = client.post(COMPLETIONS, json={"prompt": "ab", "logprobs": 0}).json()
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["A", "B"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"A": -0.5}, {"B": -0.5}],
        "text_offset": [0, 1],
    }


def test_thoughts_are_told_apart_from_what_is_said() -> None:
    said = "<think>\nfirst\n</think>\n\nthen"
    with posted_engine(lambda prompt: said) as engine:
        message = client_of(engine).post(CHAT, json=HELLO).json()["choices"][0]["message"]
        assert message["content"] == "then"
        assert message["reasoning"] == message["reasoning_content"] == "first\n"
        deltas = [
            chunk["choices"][0]["delta"]
            for chunk in events(client_of(engine).post(CHAT, json={**HELLO, "stream": True}).text)
        ]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "first\n"
        assert "".join(delta.get("content", "") for delta in deltas) == "then"
        plain = client_of(engine, thoughts="none").post(CHAT, json=HELLO).json()["choices"][0]["message"]
        assert plain == {"role": "assistant", "content": said, "refusal": None}


def test_responses_are_items_each_with_its_events() -> None:
    with posted_engine(lambda prompt: "<think>\nw\n</think>\n\n" + prompt) as engine:
        client = client_of(engine, model_name="capitals")
        asked = {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {
                    "type": "message",
                    "role": "assistant",
                    "content": "b",
                    "id": "msg_1",
                    "status": "completed",
                },
            ],
            "instructions": "c",
            "metadata": {"mine": "1"},
            "max_output_tokens": 100,
        }
        body = client.post("/v1/responses", json=asked).json()
        thoughts, message = body["output"]
        assert thoughts["content"][0]["text"] == "w\n"
        assert message["content"][0]["text"] == "<system>c<user>a<assistant>b"
        assert (body["status"], body["metadata"], body["store"]) == ("completed", {"mine": "1"}, False)
        text = client.post("/v1/responses", json={**asked, "stream": True}).text
        sent = [json.loads(block.split("data: ", 1)[1]) for block in text.split("\n\n") if block]
        assert [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")] == [
            said["type"] for said in sent
        ]
        kinds = [
            said["type"].removeprefix("response.") for said in sent if not said["type"].endswith("delta")
        ]
        item = ["output_item.added", "content_part.added"]
        ended = ["content_part.done", "output_item.done"]
        assert kinds == [
            *("created", "in_progress"),
            *(*item, "reasoning_text.done", *ended),
            *(*item, "output_text.done", *ended),
            "completed",
        ]
        assert sent[-1]["response"]["output"][1]["content"] == message["content"]
        assert [said["sequence_number"] for said in sent] == list(range(len(sent)))
        for bad, param in (
            ({"store": True}, "store"),
            ({"previous_response_id": "x"}, "previous_response_id"),
        ):
            assert client.post("/v1/responses", json={**asked, **bad}).json()["error"]["param"] == param
        error = client.post("/v1/responses", json={"input": "x" * 5000}).json()["error"]
        assert (error["param"], error["code"]) == ("input", "context_length_exceeded")


def test_tools_reach_the_template_and_calls_come_back_as_such() -> None:
    config = replace(FAKE_CONFIG, target=replace(FAKE_CONFIG.target, max_context=2000))
    history = [
        {"role": "user", "content": "in Ulm?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    asked = {"messages": history, "tools": [WEATHER], "max_tokens": 500}
    with posted_engine(lambda prompt: CALLING, config) as engine:
        client = TestClient(create_app(engine, config))
        arguments = {"enable_thinking": False}
        body = client.post(CHAT, json={**asked, "chat_template_kwargs": arguments}).json()
        (choice,) = body["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Let me see.\n"
        calls = choice["message"]["tool_calls"]
        said = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
        assert said == [("weather", {"city": "Ulm"}), ("time", {})]
        assert engine.posted[-1].template == {"enable_thinking": False, "tools": [WEATHER]}
        assert engine.posted[-1].prompt[1] == {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [CALL | {"function": {"name": "weather", "arguments": {"city": "Ulm"}}}],
        }
        streamed: list[dict[str, str]] = []
        chunks = events(client.post(CHAT, json={**asked, "stream": True}).text)
        for call in (c for chunk in chunks for c in chunk["choices"][0]["delta"].get("tool_calls", ())):
            if "id" in call:
                streamed.append({"name": call["function"]["name"], "arguments": ""})
            streamed[call["index"]]["arguments"] += call["function"]["arguments"]
        assert [(call["name"], json.loads(call["arguments"])) for call in streamed] == said
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        # The same through the other route, and back.
        flat = {"type": "function", **WEATHER["function"]}
        request = {"input": "in Ulm?", "tools": [flat], "max_output_tokens": 500}
        items = client.post("/v1/responses", json=request).json()["output"]
        assert [item["type"] for item in items] == ["message", "function_call", "function_call"]
        results = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "rain"}
            for item in items[1:]
        ]
        again = [{"role": "user", "content": "in Ulm?"}, *items, *results]
        assert client.post("/v1/responses", json={**request, "input": again}).status_code == 200
        roles = [message["role"] for message in engine.posted[-1].prompt]
        assert roles == ["user", "assistant", "tool", "tool"]
        assert len(engine.posted[-1].prompt[1]["tool_calls"]) == 2
        # Who does not want calls gets text.
        plain = client.post(CHAT, json={**asked, "tool_choice": "none"}).json()["choices"][0]
        assert (plain["message"]["content"], plain["finish_reason"]) == (CALLING, "stop")
        assert engine.posted[-1].template == {}


def test_every_option_reaches_the_engine_under_its_own_name(client: TestClient, engine: PostedEngine) -> None:
    sampling = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "stop_token_ids": [7],
        "ignore_eos": True,
    }
    asked = {
        **sampling,
        "max_completion_tokens": 9,
        "seed": 2**64 - 1,
        "n": 2,
        "stop": "END",
        "logit_bias": {"5": 1.5},
        "logprobs": True,
        "top_logprobs": 2,
        "speculative": {"method": "ngram", "budget": 3, "depth": 2},
        "user": "somebody",
        "store": False,
        "response_format": {"type": "text"},
        "tools": [],
        "min_tokens": None,
    }
    assert client.post(CHAT, json={**HELLO, **asked}).status_code == 200
    first, second = engine.posted[-2:]
    reported = {
        "max_tokens": 9,
        "stop": "END",
        "logit_bias": [(5, 1.5)],
        "logprobs": True,
        "top_logprobs": 2,
    }
    assert first.sampling == {**sampling, **reported, "seed": 2**64 - 1}
    assert second.sampling["seed"] == 0  # the next, in a circle
    assert first.draft == {"methods": ["ngram"], "max_nodes": 3, "max_depth": 2}
    assert client.post(CHAT, json={**HELLO, "speculative": "off"}).status_code == 200
    assert engine.posted[-1].draft == {"max_nodes": 0}


def test_a_rule_reaches_the_engine_as_far_as_the_deployment_allows_it(
    client: TestClient, engine: PostedEngine
) -> None:
    asked = {"prompt": "x", "speculative": {"rule": "typical", "epsilon": 0.2, "delta": 0.5}}
    error = client.post(COMPLETIONS, json=asked).json()["error"]
    assert (error["param"], error["code"]) == ("speculative.rule", "invalid_value")
    assert engine.posted[-1].acceptance == {"rule": "typical", "epsilon": 0.2, "delta": 0.5}
    lossy = replace(FAKE_CONFIG, acceptance=AcceptanceConfig(rules=("exact", "typical")))
    with posted_engine(str.upper, lossy) as allowed:
        lossy_client = TestClient(create_app(allowed, lossy))
        said = lossy_client.post(COMPLETIONS, json=asked).json()["usage"]["speculative"]
        assert (said["rule"], said["kept"], said["kept_worst_logprob_gap"]) == ("typical", 0, 0.0)
        strict = {"prompt": "x", "speculative": {"rule": "typical", "epsilon": 0.01}}
        error = lossy_client.post(COMPLETIONS, json=strict).json()["error"]
        assert error["param"] == "speculative.epsilon"


def test_origins_are_told_if_asked_for(client: TestClient) -> None:
    asked = {"prompt": "abcd", "speculative": {"origins": True}}
    said = client.post(COMPLETIONS, json=asked).json()["choices"][0]["speculative"]
    assert said["token_ids"] == [65, 66, 67, 68]
    assert said["token_origins"] == ["draft", "draft", "target", "draft"]
    assert said["segments"][0] == {"text": "A", "origin": "draft"}


def test_texts_in_parts_are_one_text(client: TestClient, engine: PostedEngine) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None}
    messages = [{"role": "user", "content": parts}, answer]
    assert client.post(CHAT, json={"messages": messages}).status_code == 200
    assert engine.posted[-1].prompt == [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "x"},
    ]


BAD = [
    ({"nonsense": 1}, "nonsense", "unknown_parameter"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream_options": {"chunked": True}, "stream": True}, "stream_options.chunked", "unknown_parameter"),
    ({"temperature": "hot"}, "temperature", "invalid_value"),
    ({"temperature": -1}, "temperature", "invalid_value"),
    ({"top_p": 2}, "top_p", "invalid_value"),
    ({"seed": -1}, "seed", "invalid_value"),
    ({"seed": 10**400}, "seed", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 5}, "n", "invalid_value"),
    ({"max_tokens": 10**6}, "PROMPT", "context_length_exceeded"),
    ({"stop": 5}, "stop", "invalid_value"),
    ({"stop": [""]}, "stop", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"999": 1}}, "logit_bias", "invalid_value"),
    ({"min_tokens": 10**6}, "min_tokens", "invalid_value"),
    ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
    ({"response_format": {"type": "json_schema"}}, None, "missing_required_parameter"),
    ({"response_format": schema_format({"type": "thing"})}, "response_format", "invalid_value"),
    ({"response_format": schema_format({"uniqueItems": True})}, "response_format", "invalid_value"),
    ({"guided_regex": "("}, "guided_regex", "invalid_value"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "invalid_value"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "invalid_value"),
    ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs", "invalid_value"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs", "invalid_value"),
    ({"structured_outputs": {"choice": ["a"]}, "ignore_eos": True}, "ignore_eos", "invalid_value"),
    ({"structured_outputs": {"structural_tag": "x"}}, None, "unsupported_parameter"),
    ({"speculative": "on"}, "speculative", "invalid_value"),
    ({"speculative": {"method": "magic"}}, "speculative.method", "invalid_value"),
    ({"speculative": {"budget": 1000}}, "speculative.budget", "invalid_value"),
    ({"speculative": {"speed": 1}}, "speculative.speed", "unknown_parameter"),
    ({"model": "another"}, "model", "model_not_found"),
]
BAD_CHAT = [
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages", "invalid_value"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "invalid_value"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, None),
    (
        {"messages": [{"role": "user", "content": "x", "mood": "good"}]},
        "messages.0.mood",
        "unknown_parameter",
    ),
    ({"tools": [{"type": "function"}]}, "tools.0.function", "missing_required_parameter"),
    ({"tools": [WEATHER], "parallel_tool_calls": False}, "parallel_tool_calls", "unsupported_parameter"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    (
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice",
        None,
    ),
    ({"tools": [WEATHER], "tool_choice": "must"}, "tool_choice", "invalid_value"),
    (
        {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
        "response_format",
        "invalid_value",
    ),
    ({"tools": [{**WEATHER, "function": {"name": "f", "strict": True}}]}, "tools.0.function.strict", None),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "invalid_value"),
    ({"chat_template_kwargs": {"no name": 1}}, "chat_template_kwargs", "invalid_value"),
    ({"chat_template_kwargs": {"documents": [{}]}}, "chat_template_kwargs.documents", "invalid_value"),
    (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "["}}]}
            ]
        },
        "messages.0.tool_calls.0.function.arguments",
        "invalid_value",
    ),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "invalid_value"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
]
BAD_COMPLETIONS = [
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": [1.5]}, None, "invalid_value"),
    ({"prompt": [10**30]}, "prompt", "invalid_value"),
    ({"prompt": "x" * 5000}, "prompt", "context_length_exceeded"),
    ({"prompt": ["a"] * 5}, "prompt", "invalid_value"),
    ({"suffix": "end"}, "suffix", "unsupported_parameter"),
    ({"echo": True, "logprobs": 1}, "echo", "unsupported_parameter"),
    ({"logprobs": 21}, None, "invalid_value"),
]


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": schema_format({"type": "integer"})}, {"json": {"type": "integer"}}),
        ({"guided_json": {"type": "integer"}}, {"json": {"type": "integer"}}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"regex": "[ab]+"}}, {"regex": "[ab]+"}),
        ({"structured_outputs": {"json": "{}", "disable_any_whitespace": True}}, ...),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, {"grammar": 'root ::= "a"'}),
    ],
)
def test_what_an_answer_must_be_reaches_the_engine_however_it_is_said(
    client: TestClient, engine: PostedEngine, asked: dict[str, Any], wanted: Any
) -> None:
    if wanted is ...:
        wanted = asked["structured_outputs"]
    for route, prompt in ((CHAT, HELLO), (COMPLETIONS, {"prompt": "hi"})):
        assert client.post(route, json={**prompt, **asked, "min_tokens": 3}).status_code == 200
        assert engine.posted[-1].sampling.get("structured_outputs") == wanted
        assert engine.posted[-1].sampling["min_tokens"] == 3


def test_a_response_says_which_form_it_was_to_have(client: TestClient, engine: PostedEngine) -> None:
    form = {"type": "json_schema", "name": "kind", "schema": {"type": "integer"}}
    body = client.post("/v1/responses", json={"input": "hi", "text": {"format": form}}).json()
    assert body["text"] == {"format": form}
    assert engine.posted[-1].sampling["structured_outputs"] == {"json": {"type": "integer"}}
    refused = client.post(
        "/v1/responses", json={"input": "hi", "text": {"format": form | {"schema": {"$ref": "#/x"}}}}
    )
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "text.format")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_model_that_must_call_is_confined_to_calls(
    client: TestClient, engine: PostedEngine, choice: object
) -> None:
    tools = [WEATHER, {"type": "function", "function": {"name": "time", "strict": True}}]
    asked = {**HELLO, "tools": tools, "tool_choice": choice, "chat_template_kwargs": {}}
    assert client.post(CHAT, json=asked).status_code in (200, 400)  # the fake's template reads no tools
    (calls,) = engine.posted[-1].sampling["structured_outputs"].values()
    names = [function["name"] for function in calls["functions"]]
    assert (calls["form"], names, calls["parallel"]) == (
        ("hermes", ["weather", "time"], True) if choice == "required" else ("hermes", ["weather"], False)
    )
    named = {"type": "function", "name": "weather"} if isinstance(choice, dict) else choice
    flat = [{"type": "function", **tool["function"]} for tool in tools]
    client.post("/v1/responses", json={"input": "hi", "tools": flat, "tool_choice": named})
    assert engine.posted[-1].sampling["structured_outputs"] == {"calls": calls}


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_refused_by_name_in_openais_shape(client: TestClient, stream: bool) -> None:
    cases = [(CHAT, HELLO | bad, param or "", code) for bad, param, code in BAD + BAD_CHAT]
    cases += [(COMPLETIONS, {"prompt": "x"} | bad, param, code) for bad, param, code in BAD + BAD_COMPLETIONS]
    for route, asked, param, code in cases:
        response = client.post(route, json={"stream": stream and "stream_options" not in asked, **asked})
        assert response.status_code >= 400, (asked, response.text)
        error = response.json()["error"]
        assert response.status_code == (404 if code == "model_not_found" else 400), (asked, error)
        assert error.keys() == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        if param:
            prompt_field = "messages" if route == CHAT else "prompt"
            assert error["param"] == param.replace("PROMPT", prompt_field), (asked, error)
        if code:
            assert error["code"] == code, (asked, error)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"[" * 4000,
        b'{"prompt": ' + b"9" * 5000 + b"}",
        b"NaN",
    ],
)
def test_a_body_that_is_no_request_is_a_bad_request(client: TestClient, content: bytes) -> None:
    for route in (CHAT, COMPLETIONS, "/tokenize"):
        response = client.post(route, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_half_a_character_is_refused_and_not_sent_back_as_it_is(client: TestClient) -> None:
    for text in ('{"prompt": "\\ud800"}', '{"prompt": "x", "\\ud800": 1}'):
        response = client.post(COMPLETIONS, content=text, headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert response.json()["error"]["message"]


def test_tokens_and_models_are_told(client: TestClient) -> None:
    text = client.post("/tokenize", json={"prompt": "ab", "return_token_strs": True}).json()
    assert text == {"count": 2, "max_model_len": 200, "tokens": [97, 98], "token_strs": ["a", "b"]}
    chat = client.post("/tokenize", json=HELLO).json()
    assert "".join(map(chr, chat["tokens"])) == "<user>hi"
    assert client.post("/tokenize", json={}).json()["error"]["param"] == "prompt"
    assert client.post("/detokenize", json={"tokens": [97, 98]}).json() == {"prompt": "ab"}
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    for bad in ([-1], [10**9], "ab", None):
        error = client.post("/detokenize", json={"tokens": bad}).json()["error"]
        assert error["param"].startswith("tokens")
    assert client.get("/version").json() == {"version": __version__}
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("capitals", 200)
    assert client.get("/v1/models/capitals").json() == model
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/nowhere").json()["error"]["code"] == "not_found"
    assert client.get(CHAT).status_code == 405


def test_a_large_body_is_refused_before_it_is_read(client: TestClient) -> None:
    response = client.post(COMPLETIONS, json={"prompt": "x" * 20_000})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_only_those_with_a_key_are_let_in(engine: PostedEngine, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# for tests\n\nfirst\nsecond\n")
    client = client_of(engine, api_keys_file=str(path))
    for key in ("first", "second"):
        headers = {"authorization": f"Bearer {key}"}
        assert client.post(CHAT, json=HELLO, headers=headers).status_code == 200
    wrong: list[Mapping[str, str]] = [{}, {"authorization": "Bearer third"}, {"authorization": "Basic first"}]
    for headers in wrong:
        response = client.post(CHAT, json=HELLO, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.get("/metrics", headers=headers).status_code == 401
    assert client.get("/health").status_code == 200
    path.write_text("# none\n")
    for bad in (str(path), str(tmp_path / "missing")):
        with pytest.raises(ValueError, match=r"server\.api_keys_file must"):
            client_of(engine, api_keys_file=bad)


def test_metrics_count_what_happened(engine: PostedEngine) -> None:
    client = client_of(engine, model_name="capitals")
    client.post(CHAT, json={**HELLO, "n": 2})
    client.post(CHAT, json={"messages": []})
    families = {f.name: f for f in text_string_to_metric_families(client.get("/metrics").text)}
    values = {sample.name: sample.value for family in families.values() for sample in family.samples}
    assert values["vllm:prompt_tokens_total"] == values["vllm:generation_tokens_total"] == 16
    assert values["vllm:request_success_total"] == 2
    assert values["vllm:time_to_first_token_seconds_count"] == 2
    assert values["outrider_refused_requests_total"] == 1
    assert (values["vllm:num_requests_running"], values["vllm:num_requests_waiting"]) == (1, 2)
    assert values["vllm:kv_cache_usage_perc"] == 0.6
    assert (values["outrider_restarts_total"], values["outrider_restarting"]) == (2, 0)


def test_a_request_has_an_id_the_clients_own_if_it_has_one(client: TestClient) -> None:
    assert client.get("/v1/models", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    first, second = (client.get("/v1/models").headers["x-request-id"] for _ in range(2))
    assert first != second


def test_an_answer_that_takes_too_long_is_ended_and_its_request_too() -> None:
    with posted_engine(endless, LONG) as engine:
        client = TestClient(create_app(engine, replace(LONG, server=ServerConfig(max_request_s=1.0))))
        asked = {"prompt": "x", "max_tokens": 20_000}
        response = client.post(COMPLETIONS, json=asked)
        assert (response.status_code, response.json()["error"]["code"]) == (408, "timeout")
        *chunks, last = events(client.post(COMPLETIONS, json={**asked, "stream": True}).text)
        assert chunks[0]["choices"][0]["text"].startswith("and")
        assert last["error"]["code"] == "timeout"
        wait_until(lambda: len(engine.fake.draft.cancelled) == 2)


def test_what_finds_no_place_is_told_to_come_again() -> None:
    limits = ServerConfig(max_concurrent=2, max_choices=2, retry_after_s=7)
    config = replace(FAKE_CONFIG, server=limits, cluster=ClusterConfig(max_open_requests=1))

    async def posts(app: Any, *choices: int) -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await asyncio.gather(*(client.post(CHAT, json={**HELLO, "n": n}) for n in choices))

    with posted_engine(str.upper, config) as engine:
        first, second = asyncio.run(posts(create_app(engine, config), 1, 2))
        assert first.status_code == 200
        assert (second.status_code, second.headers["retry-after"]) == (429, "7")
        assert "server.max_concurrent = 2" in second.json()["error"]["message"]
        # The engine's own bound.
        (third,) = asyncio.run(posts(create_app(engine, config), 2))
        assert third.status_code == 429
        assert "cluster.max_open_requests = 1" in third.json()["error"]["message"]
        # The place that one of its choices had taken is free as soon as the engine has heard that it is not wanted.
        wait_until(lambda: asyncio.run(posts(create_app(engine, config), 1))[0].status_code == 200)


def test_a_fault_of_ours_spoils_one_request(engine: PostedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(create_app(engine, FAKE_CONFIG), raise_server_exceptions=False)
    monkeypatch.setattr(engine, "post", lambda asked, box: 1 // 0)
    response = client.post(CHAT, json=HELLO)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    monkeypatch.undo()
    assert client.post(CHAT, json=HELLO).status_code == 200


def test_an_engine_that_is_gone_is_a_503_and_not_healthy() -> None:
    with posted_engine(str.upper) as engine:
        client = client_of(engine)
        assert client.get("/ready").text == "ok"
        engine.inbox.close("target 1 died")
        for response in (client.post(CHAT, json=HELLO), client.get("/ready"), client.get("/health")):
            assert response.status_code == 503
            assert response.json()["error"]["message"] == "the engine cannot be used: target 1 died"


def test_while_workers_are_started_again_the_server_is_well_but_not_ready() -> None:
    with posted_engine(str.upper) as engine:
        client, gate = client_of(engine), threading.Event()
        engine.fake.crew.prepare_next["target 1"] = lambda target: setattr(target, "load", gate.wait)
        engine.fake.targets[1].kill()
        wait_until(lambda: client.get("/ready").status_code == 503)
        message = client.get("/ready").json()["error"]["message"]
        assert message == "restarting: target 1 died during run: its process is gone"
        assert client.get("/health").text == "restarting"
        text = client.get("/metrics").text
        assert re.search(r"^outrider_restarting.* 1\.0$", text, re.MULTILINE)
        assert re.search(r"^vllm:num_requests_waiting.* 3\.0$", text, re.MULTILINE)
        gate.set()
        assert client.post(CHAT, json=HELLO).json()["choices"][0]["message"]["content"]
        assert client.get("/ready").text == "ok"


def test_the_document_describes_every_route(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert {CHAT, COMPLETIONS, "/v1/models", "/tokenize", "/health", "/ready", "/metrics"} <= set(
        document["paths"]
    )
    fields = document["components"]["schemas"]["ChatRequest"]
    assert fields["additionalProperties"] is False
    assert fields["properties"]["use_beam_search"]["enum"] == [None, False]
