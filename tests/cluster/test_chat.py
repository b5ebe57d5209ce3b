"""What goes through a chat template comes out byte for byte as from transformers."""

from typing import Any

import pytest

from outrider.cluster.admission import Admission, prepare_admission
from outrider.cluster.api import GenerationRequest
from outrider.configs.loader import load_config
from outrider.workers.weights.progress import silent
from outrider.workers.weights.random_tokenizer import tokenizer_of_size
from outrider.workers.weights.tokenizer import load_tokenizer
from support.models import smollm2

# What templates of models that think and call tools do: tools in the system turn, thoughts kept only behind the
# user's last turn, calls with arguments as they stand, an empty thought where thinking is off.
THINKING = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- set last = namespace(user=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}
{% if m.reasoning_content and loop.index0 > last.user %}<think>
{{ m.reasoning_content }}
</think>
{% endif %}{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}
<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>{% endfor %}
{%- if m.tool_call_id %} for {{ m.tool_call_id }}{% endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's, for “Zürich” & <others>",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
CALL = {
    "type": "function",
    "id": "1",
    "function": {"name": "weather", "arguments": {"city": "Bern", "days": 2}},
}
HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi", "reasoning_content": "old thoughts"},
    {"role": "user", "content": "is it nice in Bern?"},
    {"role": "assistant", "content": None, "reasoning_content": "I must ask", "tool_calls": [CALL]},
    {"role": "tool", "content": "21 °C", "name": "weather", "tool_call_id": "1"},
]


@pytest.fixture(scope="module")
def admission() -> Admission:
    prepared = prepare_admission(load_config("tiny-random", ["draft.methods=[ngram]"]), silent)
    prepared.tokenizer.chat_template = THINKING
    return prepared


@pytest.mark.parametrize("messages", [HISTORY, HISTORY[:4], HISTORY[:2]], ids=len)
@pytest.mark.parametrize(
    "template",
    [{}, {"enable_thinking": False}, {"enable_thinking": True}, {"tools": [TOOL], "enable_thinking": False}],
    ids=str,
)
def test_arguments_of_the_template_come_from_the_request(
    admission: Admission, messages: list[dict[str, Any]], template: dict[str, Any]
) -> None:
    tokenizer = tokenizer_of_size(320)
    tokenizer.chat_template = THINKING
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False, **template
    )
    request = admission.admit("a", GenerationRequest(messages, {"max_tokens": 1}, {}, {}, template))
    assert list(request.prompt_tokens) == list(expected)
    text = tokenizer.decode(request.prompt_tokens)
    assert ("<think>\n\n</think>\n\n" in text) == (template.get("enable_thinking") is False)
    assert ("“Zürich”" in text) == ("tools" in template)
    assert "old thoughts" not in text or len(messages) < 4


def test_the_template_of_smollm2_is_rendered_as_transformers_does() -> None:
    tokenizer = load_tokenizer(smollm2())
    prepared = prepare_admission(
        load_config("quickstart", ["sampling.max_tokens=1", f"target.model={smollm2().model}"]), silent
    )
    for messages in (HISTORY[:2], HISTORY[:4]):
        request = prepared.admit("a", GenerationRequest(messages, {}, {}, {}, {"enable_thinking": False}))
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert list(request.prompt_tokens) == list(expected)


@pytest.mark.parametrize(
    ("prompt", "template", "message"),
    [
        ("hello", {"tools": [TOOL]}, "template must be empty where the prompt is no list of messages"),
        (HISTORY, {"tokenize": True}, "template must name arguments of .* got 'tokenize'"),
        (HISTORY, {"add_generation_prompt": False}, "template must name arguments of"),
        (HISTORY, {"chat_template": "x"}, "template must name arguments of"),
        (HISTORY, {"not a name": 1}, "template must name arguments of"),
        (HISTORY, {"tools": TOOL}, "template.tools must be a list of objects"),
        (HISTORY, {"enable_thinking": {1, 2}}, "template.enable_thinking must be what JSON can say"),
        (HISTORY, {"enable_thinking": "\ud800"}, "template.enable_thinking must be valid Unicode"),
        (HISTORY, [1], "template must be a mapping of names to values"),
    ],
    ids=str,
)
def test_what_is_no_argument_of_a_template_is_refused(
    admission: Admission, prompt: Any, template: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        admission.admit("a", GenerationRequest(prompt, {}, {}, {}, template))
    assert "\n" not in str(error.value)
