"""The page at `/`: what it is served with, what it asks of the server, and what a person sees of it in a browser."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from outrider.cluster.serving.app import create_app
from outrider.cluster.serving.page import playground
from outrider.configs.acceptance import AcceptanceConfig
from outrider.configs.schema import Config, DraftConfig, ServerConfig
from support.chromium import CHROMIUM, Tab, running_chromium, tab_of
from support.fake_workers import FAKE_CONFIG, endless
from support.posted_engine import PostedEngine, posted_engine
from support.serving import running_server, served
from support.waiting import wait_until

PICTURES = Path(__file__).parents[3] / "build" / "playground"
ASKED = "why does a ship need a lighthouse"
SAID = "A lighthouse tells ships where the coast begins, and which coast it is.\nEach has a light of its own."
CODE = "Write a Python function that adds two numbers, with an example."
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;\"'`"
ANSWER_S = 120.0
WIDE, NARROW = (1280, 900), (360, 740)
LOSSY = replace(
    FAKE_CONFIG,
    draft=DraftConfig(methods=("ngram",)),
    acceptance=AcceptanceConfig(rules=("exact", "typical")),
    server=ServerConfig(model_name="lamps"),
)

needs_chromium = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium here: chromium, chromium-browser, google-chrome"
)


def answer(prompt: str) -> str:
    return HOSTILE if "hostile" in prompt else endless(prompt) if "forever" in prompt else SAID


@pytest.fixture(scope="module")
def engine() -> Iterator[PostedEngine]:
    with posted_engine(answer, LOSSY) as engine:
        usual = engine.stats

        def stats() -> dict[str, dict[str, Any]]:
            half = 0.5 * time.monotonic()
            return {**usual(), "target 0": {"busy_s": {"forward": half, "wait": half}}}

        engine.stats = stats
        yield engine


@pytest.fixture(scope="module")
def url(engine: PostedEngine) -> Iterator[str]:
    with served(create_app(engine, LOSSY)) as url:
        yield f"{url}/"


@pytest.fixture(scope="module")
def chromium() -> Iterator[str]:
    with running_chromium() as address:
        yield address


@pytest.fixture
def tab(chromium: str) -> Iterator[Tab]:
    with tab_of(chromium) as tab:
        yield tab


# Without a browser.


def test_it_is_one_page_that_may_load_nothing(engine: PostedEngine) -> None:
    client = TestClient(create_app(engine, LOSSY))
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert client.post("/").status_code == 405
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert not re.findall("unsafe|https?:|\\*", policy)
    assert "connect-src 'self'" in policy
    named = re.sub(r'"http://www.w3.org/2000/svg"', "", page.text)  # a name, which is never fetched
    assert not re.findall(r"https?://|//[a-z]+\.|@import|url\(", named)
    assert not re.findall(
        r'\s(?:src|on\w+|style)="|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(', named
    )
    assert len(re.findall(r"<(?:script|style)>", named)) == 2


def test_it_is_there_without_a_key_and_knows_none(engine: PostedEngine, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("open-sesame\n")
    client = TestClient(create_app(engine, replace(LOSSY, server=ServerConfig(api_keys_file=str(keys)))))
    assert "open-sesame" not in client.get("/").text
    assert client.get("/").status_code == 200
    assert client.get("/v1/models").status_code == client.get("/metrics").status_code == 401


def test_what_its_scripts_read_is_what_the_server_says(engine: PostedEngine) -> None:
    script = playground().content
    client = TestClient(create_app(engine, LOSSY))
    offered = client.get("/v1/models").json()["data"][0]["speculative"]
    assert offered == {
        "methods": ["ngram"],
        "max_budget": 16,
        "max_depth": 8,
        "rules": ["exact", "typical"],
        "judges": [],
        "min_epsilon": 0.09,
        "min_delta": 0.3,
        "min_threshold": 0.5,
    }
    for name in ("methods", "rules", "judges"):
        assert f"may.{name}" in script
    asked = {
        "prompt": ASKED,
        "logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "speculative": {"origins": True, "tree": True},
    }
    lines = client.post("/v1/completions", json=asked).text.split("\n\n")
    first = json.loads(lines[0].removeprefix("data: "))
    (choice,) = first["choices"]
    assert choice["speculative"]["tree"] == {
        "token_ids": [46, 65, 32, 63],
        "tokens": [".", "A", " ", "?"],
        "parents": [0, 0, 1, 2],
        "accepted": [1, 2],
    }
    for read in ("token_ids", "token_origins", "segments", "tree"):
        assert f"said.{read}" in script
        assert read in choice["speculative"]
    for read in ("tokens", "parents", "accepted"):
        assert f"tree.{read}" in script
    assert choice["logprobs"].keys() >= {"tokens", "token_logprobs", "top_logprobs"}
    assert {"rounds", "drafted", "accepted", "kept"} <= first["usage"]["speculative"].keys()
    metrics = client.get("/metrics").text
    for name in re.findall(r"outrider_busy_seconds_total|num_requests_\w+|kv_cache_usage_perc", script):
        assert name in metrics


def test_a_whole_answer_tells_the_tree_of_its_last_round_and_only_if_asked(engine: PostedEngine) -> None:
    client = TestClient(create_app(engine, LOSSY))
    body = {"messages": [{"role": "user", "content": ASKED}], "max_tokens": 5}
    asked = {**body, "speculative": {"tree": True}}
    (choice,) = client.post("/v1/chat/completions", json=asked).json()["choices"]
    assert choice["speculative"].keys() == {"tree"}
    assert choice["speculative"]["tree"]["tokens"] == [".", *SAID[3:5], "?"]
    # A stop string cuts the text, and with it what came out.
    stopped = {**asked, "stop": "i", "stream": True}
    lines = client.post("/v1/chat/completions", json=stopped).text.split("\n\n")
    trees = [
        json.loads(line[6:])["choices"][0]["speculative"] for line in lines if line.startswith("data: {")
    ]
    assert [said["tree"]["accepted"] for said in trees] == [[1, 2], [1]]
    for other in ({}, {"speculative": {"tree": False}}):
        (choice,) = client.post("/v1/chat/completions", json={**body, **other}).json()["choices"]
        assert "speculative" not in choice
    refused = client.post("/v1/responses", json={"input": "x", "speculative": {"tree": True}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "speculative.tree")


# In a browser.


def ask(tab: Tab, prompt: str) -> None:
    """Sends a prompt and waits for the end of the answer."""
    tab.type("#prompt", prompt)
    tab.click("#send")
    tab.wait("!['busy', undefined].includes(document.body.dataset.state)", ANSWER_S)


def choose(tab: Tab, selector: str, value: str) -> None:
    """Of a list or a slider."""
    found = f"document.querySelector({json.dumps(selector)})"
    tab.run(f"{found}.value = {json.dumps(value)}")
    tab.run(f"['input', 'change'].forEach(name => {found}.dispatchEvent(new Event(name)))")


def text_of(tab: Tab, selector: str) -> str:
    text: str = tab.run(f"document.querySelector({json.dumps(selector)}).textContent")
    return text


def count(tab: Tab, selector: str) -> int:
    number: int = tab.run(f"document.querySelectorAll({json.dumps(selector)}).length")
    return number


def visit(tab: Tab, url: str, size: tuple[int, int] = WIDE, is_dark: bool = False) -> None:
    tab.visit(url, *size, is_dark)
    tab.wait("document.querySelector('#model').textContent !== ''")


@needs_chromium
def test_an_answer_is_coloured_by_origin_and_tells_alternatives_tree_and_who_is_busy(
    tab: Tab, url: str
) -> None:
    for name, size, is_dark in (("light", WIDE, False), ("dark", WIDE, True), ("narrow", NARROW, False)):
        visit(tab, url, size, is_dark)
        assert text_of(tab, "#model") == "lamps, 200 tokens of context"
        ask(tab, ASKED)
        origins = "[...document.querySelectorAll('.answer .token')].map(span => span.className)"
        assert tab.run(origins)[:4] == ["token draft", "token draft", "token target", "token draft"]
        said = SAID[:50]  # sampling.max_tokens
        assert text_of(tab, ".answer").startswith(said)
        assert (text_of(tab, "#num-tokens"), text_of(tab, "#length")) == ("50", "2.94")
        assert text_of(tab, "#tree-said") == "3 drafted, 2 accepted."
        assert text_of(tab, "#round-number") == "17 of 17"
        kinds = "[...document.querySelectorAll('#tree g')].map(node => node.getAttribute('class'))"
        assert sorted(tab.run(kinds)) == ["draft", "draft", "refused", "root"]
        tab.wait(
            "[...document.querySelectorAll('.strip .share')].some(share => share.textContent === '50 %')"
        )
        tab.hover(".answer .token.target")
        assert count(tab, "#tip tr") == 3
        assert text_of(tab, "#tip .chosen") == "l61 %"
        assert tab.run("document.documentElement.scrollWidth <= innerWidth")
        tab.picture(PICTURES / f"{name}.png")
    assert tab.complaints == []
    assert {re.sub(r"^data:.*|^http://127.0.0.1:\d+", "", address) for address in tab.requested} <= {
        "",
        "/",
        "/v1/models",
        "/v1/chat/completions",
        "/metrics",
    }


@needs_chromium
def test_what_a_model_writes_stays_text(tab: Tab, url: str) -> None:
    visit(tab, url)
    tab.type("#max_tokens", "100")
    ask(tab, "hostile")
    assert text_of(tab, ".answer") == HOSTILE
    assert count(tab, "main img, main script") == 0
    # The browser itself refuses to make markup of a string on this page.
    assert (
        tab.run("(() => { try { document.body.innerHTML = '<b>x</b>'; } catch { return 'refused'; } })()")
        == "refused"
    )


@needs_chromium
def test_stopping_ends_the_request(tab: Tab, url: str, engine: PostedEngine) -> None:
    visit(tab, url)
    tab.type("#max_tokens", "100")
    num_before = len(engine.fake.draft.cancelled)
    engine.fake.draft.silent.set()
    tab.type("#prompt", "forever")
    tab.click("#send")
    wait_until(lambda: engine.posted[-1].prompt[-1]["content"] == "forever")
    tab.click("#stop")
    tab.wait("document.body.dataset.state === 'stopped'")
    wait_until(lambda: len(engine.fake.draft.cancelled) > num_before)
    engine.fake.draft.silent.clear()


@needs_chromium
def test_what_the_fields_say_is_asked_of_the_engine(tab: Tab, url: str, engine: PostedEngine) -> None:
    visit(tab, url)
    tab.click("[name=mode][value=text]")
    for field, value in (
        ("temperature", "0.5"),
        ("seed", "7"),
        ("max_tokens", "9"),
        ("budget", "4"),
        ("depth", "3"),
    ):
        tab.type(f"#{field}", value)
    choose(tab, "#rule", "typical")
    tab.type("#epsilon", "0.2")
    ask(tab, ASKED)
    asked = engine.posted[-1]
    assert asked.prompt == ASKED
    assert asked.sampling == {
        "temperature": 0.5,
        "seed": 7,
        "max_tokens": 9,
        "logprobs": True,
        "top_logprobs": 5,
    }
    assert asked.draft == {"methods": ["ngram"], "max_nodes": 4, "max_depth": 3, "tree": True}
    assert asked.acceptance == {"rule": "typical", "epsilon": 0.2}
    assert (count(tab, ".answer .token.kept"), count(tab, "#tree .kept")) == (3, 1)
    tab.picture(PICTURES / "kept.png")
    tab.click("#methods input")
    tab.click("#told")
    ask(tab, ASKED)
    asked = engine.posted[-1]
    assert asked.draft == {"max_nodes": 0, "max_depth": 3, "tree": False}
    assert "logprobs" not in asked.sampling


@needs_chromium
def test_keys_do_what_the_mouse_does(tab: Tab, url: str, engine: PostedEngine) -> None:
    visit(tab, url)
    tab.type("#prompt", ASKED)
    tab.press("Enter", modifiers=2)
    tab.wait("document.body.dataset.state === 'length'")
    tab.run("document.querySelector('.answer').focus()")
    for _ in range(3):
        tab.press("ArrowRight")
    assert tab.run("document.querySelector('.token.shown').textContent") == SAID[2]
    assert text_of(tab, "#tip small").startswith("target, round 1")
    tab.press("Escape")
    assert tab.run("document.querySelector('#tip').hidden")
    ask(tab, "and then")
    assert [message["role"] for message in engine.posted[-1].prompt] == ["user", "assistant", "user"]


@needs_chromium
def test_a_key_is_asked_for_where_one_is_wanted(tab: Tab, engine: PostedEngine, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("open-sesame\n")
    config: Config = replace(LOSSY, server=ServerConfig(api_keys_file=str(keys)))
    with served(create_app(engine, config)) as url:
        tab.visit(f"{url}/", *WIDE)
        tab.wait("!document.querySelector('#key-box').hidden")
        assert "401" in text_of(tab, "#error")
        tab.type("#key", "open-sesame")
        tab.run("document.querySelector('#prompt').focus()")
        tab.wait("document.querySelector('#model').textContent !== ''")
        ask(tab, ASKED)
        assert text_of(tab, ".answer").startswith(SAID[:50])


@needs_chromium
@pytest.mark.slow
def test_the_quickstart_shows_what_was_drafted(tab: Tab) -> None:
    """A real model; the picture in the documents is one of these."""
    with running_server("quickstart", ["server.model_name=SmolLM2-135M-Instruct"]) as server:
        for name, size, is_dark in (("light", WIDE, False), ("dark", WIDE, True), ("narrow", NARROW, False)):
            visit(tab, f"{server.url}/", size, is_dark)
            tab.type("#max_tokens", "90")
            ask(tab, CODE)
            assert int(text_of(tab, "#num-tokens")) > 10
            assert float(text_of(tab, "#length")) > 1.0
            assert count(tab, ".answer .token.draft") > 0
            num_rounds = int(tab.run("document.querySelector('#round').max"))
            num_accepted = [shown_round(tab, number) for number in range(num_rounds)]
            assert shown_round(tab, num_accepted.index(max(num_accepted))) > 1
            tab.wait("document.querySelectorAll('.strip').length === 3")
            tab.hover(".answer .token.target:nth-child(n + 9)")
            assert count(tab, "#tip tr") in (5, 6)
            tab.picture(PICTURES / f"quickstart-{name}.png")
    assert tab.complaints == []


def shown_round(tab: Tab, number: int) -> int:
    """Moves the slider to a round, from 0; how many drafted tokens its tree shows as accepted."""
    choose(tab, "#round", str(number + 1))
    return count(tab, "#tree g.draft")
