"""The door: what a user sends becomes a `Request` that the DraftWorker can run, or a one-line ValueError."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from outrider.cluster.api import GenerationRequest, ServedModel
from outrider.cluster.chat import read_messages, render, require_unicode
from outrider.cluster.request_options import request_acceptance, request_draft, request_sampling
from outrider.cluster.text import Decoder
from outrider.cluster.text_bound import TextBound
from outrider.configs.schema import Config
from outrider.workers.sequences.grammar import Grammar
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request
from outrider.workers.weights.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from outrider.workers.sampling.grammars import Grammars

_CALIBRATION_PROMPT = "Explain in a few sentences how a lighthouse works."
_CALIBRATION_TOKENS = 48
_END_OF_PROMPT = 8  # last tokens of a prompt, among which templates write <think>, or empty thoughts


@dataclass(frozen=True)
class Admission:
    """Turns prompts and options into requests, with the config's defaults and limits.

    vocab_size: of the target. max_context: tokens, prompt and output together.
    eos_token_ids: the model's end-of-text tokens; they stop every request that does not say `ignore_eos`.
    grammars: over the target's tokens.
    judge_thresholds: calibrated, of the judges by name, for requests that name none.
    """

    config: Config
    tokenizer: "PreTrainedTokenizerFast"
    text_bound: TextBound
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    grammars: "Grammars"
    judge_thresholds: Mapping[str, float] = field(default_factory=dict)

    def admit(self, request_id: str, asked: GenerationRequest) -> Request:
        """Raises ValueError naming the field and what it may be."""
        sampling = self._sampling(asked.sampling)
        draft = request_draft(self.config, asked.draft)
        acceptance = request_acceptance(self.config, asked.acceptance, self.judge_thresholds)
        prompt_tokens = self.tokens(asked.prompt, asked.template)
        if not prompt_tokens:
            raise ValueError("prompt must have at least one token, got an empty one")
        if len(prompt_tokens) + sampling.max_tokens > self.max_context:
            raise ValueError(
                f"prompt and sampling.max_tokens must be at most {self.max_context} tokens together (the "
                "least of target.max_context, the model's limit and the KV cache), "
                f"got {len(prompt_tokens)} + {sampling.max_tokens}"
            )
        if sampling.grammar.text:
            sampling = replace(sampling, grammar=self._grammar(sampling.grammar, asked.prompt, prompt_tokens))
        return Request(request_id, prompt_tokens, sampling, draft, acceptance)

    def calibration(self) -> Request:
        """A short text in the target's own manner, by which draft heads are tried: greedy, through the chat template
        where there is one."""
        try:
            prompt = self._chat_tokens([{"role": "user", "content": _CALIBRATION_PROMPT}], {})
        except ValueError:  # no template, or one that wants other messages
            tokens = self.tokenizer.encode(_CALIBRATION_PROMPT, add_special_tokens=True)
            prompt = tuple(token for token in tokens if token < self.vocab_size)
        prompt = prompt[-(self.max_context // 2) :]
        max_tokens = min(_CALIBRATION_TOKENS, self.max_context - len(prompt))
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop_token_ids=self.eos_token_ids)
        return Request("calibration", prompt, sampling, DraftOptions((), 0, 0))

    def warning(self, request: Request) -> str:
        """What its user should know about a request that can be run; empty: nothing."""
        bos = self.tokenizer.bos_token_id
        if bos is None or request.prompt_tokens[:2] != (bos, bos):
            return ""
        name = self.tokenizer.bos_token
        return f"the prompt begins with two {name}: the tokenizer puts one before a text, leave yours out"

    def describe(self) -> ServedModel:
        """What there is to know of the target without looking into its weights."""
        from outrider.workers.weights.tokenizer import vocabulary_bytes

        template = str(self.tokenizer.chat_template or "")
        is_bare = "<tool_call>" not in template and ("python_tag" in template or '"parameters":' in template)
        vocabulary = vocabulary_bytes(self.tokenizer, self.vocab_size)
        return ServedModel(self.max_context, vocabulary, "llama3" if is_bare else "hermes")

    def decoder(self) -> Decoder:
        """For the text of one answer."""
        from outrider.workers.weights.tokenizer import IncrementalDecoder

        return IncrementalDecoder(self.tokenizer)

    def _grammar(self, grammar: Grammar, prompt: object, prompt_tokens: Sequence[int]) -> Grammar:
        """A grammar that the library takes, and where in the answer to this prompt it begins: behind the thoughts,
        if the model is one that thinks and the prompt leaves it the choice."""
        try:
            self.grammars.check(grammar.text)
        except ValueError as error:
            raise ValueError(
                f"sampling.structured_outputs must be what llguidance can follow: {error}"
            ) from error
        texts, thoughts = self.grammars.texts, self.config.server.thoughts
        if not is_chat(prompt) or thoughts == "none":
            return grammar
        if not texts.think:
            if thoughts == "open":
                raise ValueError(
                    "sampling.structured_outputs must be left out where server.thoughts is open and the tokenizer "
                    "has no tokens <think> and </think>"
                )
            return grammar
        tags = [
            token for token in prompt_tokens[-_END_OF_PROMPT:] if token in (*texts.think, *texts.end_think)
        ]
        if tags and tags[-1] in texts.end_think:  # the template has written empty thoughts
            return grammar
        return replace(grammar, thoughts="open" if tags or thoughts == "open" else "tags")

    def _sampling(self, asked: Mapping[str, object]) -> SamplingParams:
        sampling = request_sampling(self.config, asked, self.vocab_size)
        if sampling.ignore_eos:
            return sampling
        return replace(sampling, stop_token_ids=sampling.stop_token_ids + self.eos_token_ids)

    def tokens(self, prompt: object, template: Mapping[str, object]) -> tuple[int, ...]:
        """Of a prompt as users give it. Raises ValueError for one that cannot be read, or is surely too long."""
        if template and not is_chat(prompt):
            raise ValueError("template must be empty where the prompt is no list of messages")
        if isinstance(prompt, str):
            require_unicode("prompt", prompt)
            return self._encode(prompt, add_special_tokens=True)
        if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray | memoryview):
            if all(type(item) is int for item in prompt):
                return self._token_ids(prompt)
            if prompt and all(isinstance(item, Mapping) for item in prompt):
                return self._chat_tokens(prompt, template)
        raise ValueError(
            "prompt must be a text, a list of messages or a list of token ids, got "
            f"{type(prompt).__name__} {reprlib.repr(prompt)}"
        )

    def _token_ids(self, tokens: Sequence[int]) -> tuple[int, ...]:
        # The length is checked before the ids: a list that is far too long is not looked at.
        if len(tokens) <= self.max_context:
            for token in tokens:
                _require_in_range("prompt token ids", token, 0, self.vocab_size - 1)
        return tuple(tokens)

    def _chat_tokens(
        self, messages: Sequence[Mapping[object, object]], template: Mapping[str, object]
    ) -> tuple[int, ...]:
        conversation = read_messages(messages)
        # The template writes special tokens itself.
        return self._encode(render(self.tokenizer, conversation, template), add_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        # Tokenizing takes 5 us and 200 bytes for each character.
        if self.text_bound.exceeds(text, self.max_context):
            raise ValueError(
                f"prompt must be at most {self.max_context} tokens (the least of target.max_context, the "
                f"model's limit and the KV cache), got a text of {len(text)} characters, which are more"
            )
        tokens = tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        largest = max(tokens, default=0)
        if largest >= self.vocab_size:
            # Tokenizers may know more tokens than the model has rows for: added ones, for padding mostly.
            name = self.tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"prompt must be made of the model's {self.vocab_size} tokens, got {name!r} (token id {largest})"
            )
        return tokens


def prepare_admission(config: Config, report: Progress) -> Admission:
    """Loads the tokenizer and reads what the target is; fetches no weights.

    Raises ValueError when a model is missing or the drafter's tokenizer is another one.
    """
    # torch comes with these; the driver, which only names this function, does without.
    from outrider.workers.capacity import max_sequence_tokens
    from outrider.workers.sampling.grammars import Grammars
    from outrider.workers.weights.resolver import read_config, resolve_description, resolve_tokenizer
    from outrider.workers.weights.token_texts import token_texts
    from outrider.workers.weights.tokenizer import end_token_ids, load_tokenizer, same_tokenizer

    cache_dir = Path(config.cluster.model_cache_dir).expanduser()
    target = resolve_description(config.target.model, cache_dir, report, "target.model")
    speaks = target
    if config.target.tokenizer:
        speaks = resolve_tokenizer(config.target.tokenizer, cache_dir, report, "target.tokenizer")
    tokenizer = load_tokenizer(speaks)
    if "model" in config.draft.methods:
        draft = resolve_description(config.draft.model, cache_dir, report, "draft.model")
        difference = same_tokenizer(tokenizer, load_tokenizer(draft))
        if difference:
            raise ValueError(
                f"draft.model must have the target's tokenizer, got {config.draft.model!r}: {difference}"
            )
    model = read_config(target)
    max_context = max_sequence_tokens(config, model)
    end_ids = end_token_ids(model, tokenizer, speaks)
    bound = TextBound(tokenizer)
    thresholds = _judge_thresholds(config, report)
    grammars = Grammars(model.vocab_size, partial(token_texts, tokenizer, model.vocab_size, end_ids))
    return Admission(config, tokenizer, bound, model.vocab_size, max_context, end_ids, grammars, thresholds)


def is_chat(prompt: object) -> bool:
    """Whether a prompt is messages."""
    return isinstance(prompt, Sequence) and any(isinstance(item, Mapping) for item in prompt)


def _judge_thresholds(config: Config, report: Progress) -> dict[str, float]:
    """What the configured judges were calibrated to; whether they fit the target is for the DraftWorker to say."""
    if not config.acceptance.judges:
        return {}
    from outrider.workers.judging.head import judge_field, read_judge
    from outrider.workers.weights.resolver import resolve_judge

    found = {}
    for judge in config.acceptance.judges:
        folder = resolve_judge(judge.model, report, judge_field(judge.name))
        _, description = read_judge(folder)
        found[judge.name] = description.threshold
    return found


def _require_in_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{field} must be in [{low}, {high}], got {value}")
