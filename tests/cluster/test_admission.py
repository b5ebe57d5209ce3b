"""The door with real tokenizers: what is loaded for it, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from outrider.cluster.admission import Admission, prepare_admission
from outrider.cluster.api import GenerationRequest
from outrider.cluster.cli.inputs import open_model
from outrider.configs.loader import load_config
from outrider.workers.draft import DraftWorker
from outrider.workers.judging.head import JudgeDescription, JudgeHead, write_judge
from outrider.workers.judging.identity import identify
from outrider.workers.sampling.grammars import Grammars
from outrider.workers.sequences.sequence import AcceptanceOptions
from outrider.workers.target import TargetWorker
from outrider.workers.weights.progress import silent
from outrider.workers.weights.random_source import RandomSource
from outrider.workers.weights.random_tokenizer import tokenizer_of_size
from support.fake_hub import FakeHub
from support.models import random_tensors, write_safetensors


def prepared(*overrides: str) -> Admission:
    return prepare_admission(load_config("tiny-random", overrides), silent)


def test_a_text_becomes_tokens_with_the_defaults_of_the_config() -> None:
    admission = prepared("sampling.temperature=0.5")
    request = admission.admit("a", GenerationRequest("hello"))
    assert admission.tokenizer.decode(request.prompt_tokens) == "hello"
    assert request.sampling.temperature == 0.5
    assert request.sampling.max_tokens == 32
    assert set(admission.eos_token_ids) <= set(request.sampling.stop_token_ids)
    assert (request.draft.methods, request.draft.max_nodes) == (("ngram", "model"), 8)


def test_the_chat_template_writes_its_special_tokens_once() -> None:
    admission = prepared()
    messages = [{"role": "user", "content": "hello"}]
    request = admission.admit("a", GenerationRequest(messages))
    expected = admission.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert list(request.prompt_tokens) == list(expected)


def test_messages_need_a_chat_template() -> None:
    admission = prepared()
    admission.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="messages need a chat template"):
        admission.admit("a", GenerationRequest([{"role": "user", "content": "hello"}]))


@pytest.mark.parametrize(
    ("thoughts", "end_of_prompt", "begins"),
    [
        ("tags", "", "tags"),
        ("tags", "T", "open"),
        ("tags", "TE", "none"),  # a template that writes empty thoughts
        ("open", "", "open"),
        ("none", "T", "none"),
    ],
)
def test_a_grammar_begins_behind_the_thoughts(thoughts: str, end_of_prompt: str, begins: str) -> None:
    """The letters T and E stand for the tokens <think> and </think>."""
    admission = prepared(f"server.thoughts={thoughts}")
    texts = admission.grammars.texts
    tags = {"think": (texts.tokens.index(b"T"),), "end_think": (texts.tokens.index(b"E"),)}
    spoken = Grammars(len(texts.tokens), lambda: replace(texts, **tags))
    admission.tokenizer.chat_template = "{{ messages[0].content }}: " + end_of_prompt
    asked = {"structured_outputs": {"choice": ["a"]}}
    chat = GenerationRequest([{"role": "user", "content": "hello"}], asked)
    assert replace(admission, grammars=spoken).admit("a", chat).sampling.grammar.thoughts == begins
    text = GenerationRequest("hello" + end_of_prompt, asked)
    assert replace(admission, grammars=spoken).admit("a", text).sampling.grammar.thoughts == "none"
    if thoughts == "open":
        with pytest.raises(
            ValueError, match=r"where server.thoughts is open and the tokenizer has no tokens"
        ):
            admission.admit("a", chat)


def test_what_the_library_cannot_follow_is_refused_with_its_reason() -> None:
    asked = {"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(ValueError, match=r"sampling.structured_outputs must be what .*uniqueItems"):
        prepared().admit("a", GenerationRequest("hello", asked))


def test_heads_are_tried_on_an_answer_through_the_template_or_without_one() -> None:
    admission = prepared()
    templated = admission.calibration()
    assert templated.sampling.is_greedy
    assert templated.sampling.stop_token_ids == admission.eos_token_ids
    admission.tokenizer.chat_template = None
    raw = admission.calibration()
    text = admission.tokenizer.decode(raw.prompt_tokens, skip_special_tokens=True)
    assert text in admission.tokenizer.decode(templated.prompt_tokens)
    assert len(templated.prompt_tokens) > len(raw.prompt_tokens)
    tiny = prepared("target.max_context=4").calibration()
    assert (len(tiny.prompt_tokens), tiny.sampling.max_tokens) == (2, 2)


def test_a_prompt_with_two_beginnings_is_warned_of() -> None:
    admission = prepared()
    bos, ids = admission.tokenizer.bos_token, [admission.tokenizer.bos_token_id] * 2
    assert admission.warning(admission.admit("a", GenerationRequest(f"{bos}hi"))) == ""
    two = admission.admit("a", GenerationRequest([*ids, 5]))
    assert admission.warning(two).startswith(f"the prompt begins with two {bos}")


def test_a_token_that_the_model_has_no_row_for_is_refused() -> None:
    admission = prepared()
    admission.tokenizer.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match=r"the model's 320 tokens, got '<extra>' \(token id 320\)"):
        admission.admit("a", GenerationRequest("hello <extra>"))


def test_a_text_that_no_context_holds_is_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    admission = prepared()
    text = "the lighthouse " * 500_000
    monkeypatch.setattr(type(admission.tokenizer), "encode", lambda *_, **__: pytest.fail("it was"))
    for prompt in (text, [{"role": "user", "content": text}]):
        with pytest.raises(
            ValueError, match=r"prompt must be at most 512 tokens .*, got a text of 75\d+ char"
        ):
            admission.admit("a", GenerationRequest(prompt))


def test_the_context_is_the_least_of_config_model_and_cache() -> None:
    model = "target.model=random:llama?hidden_size=64&num_layers=2&num_heads=4&num_kv_heads=2&seed=0"
    assert prepared().max_context == 512
    assert prepared(f"{model}&max_context=100").max_context == 100
    assert prepared("target.kv_cache_bytes=64KiB").max_context == 128


def test_a_drafter_with_another_tokenizer_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"draft\.model must have the target's tokenizer, got 'random:"
    ) as caught:
        prepared("draft.model=random:llama?vocab_size=2000")
    assert "\n" not in str(caught.value)
    assert prepared("draft.model=random:llama?vocab_size=2000", "draft.methods=[ngram]")


def test_a_missing_model_is_named_with_its_key(tmp_path: Path) -> None:
    for key in ("target.model", "draft.model", "target.tokenizer"):
        with pytest.raises(ValueError, match=key):
            prepared(f"{key}={tmp_path}/nothing.gguf")


def test_who_holds_no_weights_fetches_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, tmp_path)
    model, tensors = random_tensors("llama")
    write_safetensors(hub.remote, model, tensors, num_files=2)
    tokenizer_of_size(320).save_pretrained(hub.remote)
    config = load_config("tiny-random", ["target.model=org/name", "draft.methods=[ngram]"])
    assert prepare_admission(config, silent).vocab_size == open_model(config).vocab_size == 320
    DraftWorker(config).load(silent)
    assert hub.fetched_weights() == []
    TargetWorker(config, 0).load(silent)
    assert len(hub.fetched_weights()) == 2


def test_a_folder_with_only_a_tokenizer_is_a_tokenizer_and_its_end_of_text_ends_a_text(
    tmp_path: Path,
) -> None:
    tokenizer = tokenizer_of_size(320)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    admission = prepared(f"target.tokenizer={tmp_path}", "draft.methods=[ngram]")
    assert len(admission.tokenizer) == 320
    assert admission.eos_token_ids == (2, 0)


def test_a_request_that_names_no_threshold_gets_the_calibrated_one(tmp_path: Path) -> None:
    target = identify("elsewhere", RandomSource(load_config("tiny-random", []).target.model), None)
    description = JudgeDescription("target", target, None, 0.7, (), ("nothing",))
    write_judge(tmp_path, JudgeHead(description.num_columns), description)
    judged = prepared(
        "acceptance.rules=[exact,judge]", f"acceptance.judges=[{{name: mine, model: {tmp_path}}}]"
    )
    request = judged.admit("a", GenerationRequest("x", acceptance={"rule": "judge"}))
    assert request.acceptance == AcceptanceOptions("judge", judge="mine", threshold=0.7)
    assert judged.admit("b", GenerationRequest("x")).acceptance.rule == "exact"
    with pytest.raises(ValueError, match=r"^acceptance\.judges mine: no directory nowhere"):
        prepared("acceptance.rules=[exact,judge]", "acceptance.judges=[{name: mine, model: nowhere}]")
