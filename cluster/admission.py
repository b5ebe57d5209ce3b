"""The door: what a user sends becomes a `Request` that the DraftWorker can run, or a one-line ValueError."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from outrider.cluster.api import GenerationRequest, Prompt
from outrider.cluster.text import Decoder
from outrider.configs.loader import convert_fields
from outrider.configs.schema import Config
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request
from outrider.workers.weights.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Admission:
    """Turns prompts and options into requests, with the config's defaults and limits.

    vocab_size: of the target. max_context: tokens, prompt and output together.
    eos_token_ids: the model's end-of-text tokens; they stop every request that does not say `ignore_eos`.
    """

    config: Config
    tokenizer: "PreTrainedTokenizerFast"
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]

    def admit(self, request_id: str, asked: GenerationRequest) -> Request:
        """Raises ValueError naming the field and what it may be."""
        sampling = self._sampling(asked.sampling)
        draft = self._draft(asked.draft)
        prompt_tokens = self._tokens(asked.prompt)
        if not prompt_tokens:
            raise ValueError("prompt must have at least one token, got an empty one")
        if len(prompt_tokens) + sampling.max_tokens > self.max_context:
            raise ValueError(
                f"prompt and sampling.max_tokens must be at most {self.max_context} tokens together (the "
                "least of target.max_context, the model's limit and the KV cache), "
                f"got {len(prompt_tokens)} + {sampling.max_tokens}"
            )
        return Request(request_id, prompt_tokens, sampling, draft)

    def decoder(self) -> Decoder:
        """For the text of one answer."""
        from outrider.workers.weights.tokenizer import IncrementalDecoder

        return IncrementalDecoder(self.tokenizer)

    def _sampling(self, asked: Mapping[str, object]) -> SamplingParams:
        defaults = SamplingParams(**asdict(self.config.sampling))
        sampling = replace(defaults, **convert_fields(SamplingParams, asked, "sampling"))
        sampling.validate(self.vocab_size)
        if sampling.ignore_eos:
            return sampling
        return replace(sampling, stop_token_ids=sampling.stop_token_ids + self.eos_token_ids)

    def _draft(self, asked: Mapping[str, object]) -> DraftOptions:
        draft, tree = self.config.draft, self.config.tree
        defaults = DraftOptions(draft.methods, tree.max_nodes, tree.max_depth)
        options = replace(defaults, **convert_fields(DraftOptions, asked, "draft"))
        for method in options.methods:
            if method not in draft.methods:
                allowed = ", ".join(draft.methods) or "none"
                raise ValueError(f"draft.methods must be among the deployment's ({allowed}), got {method!r}")
        _require_in_range("draft.max_nodes", options.max_nodes, 0, tree.max_nodes)
        _require_in_range("draft.max_depth", options.max_depth, 1, tree.max_depth)
        return options

    def _tokens(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt))
        if all(isinstance(item, int) for item in prompt):
            return self._token_ids(prompt)
        if all(isinstance(item, Mapping) for item in prompt):
            return self._chat_tokens(prompt)
        raise ValueError(f"prompt must be a text, messages or token ids, got {prompt!r}")

    def _token_ids(self, prompt: Sequence[object]) -> tuple[int, ...]:
        tokens = tuple(item for item in prompt if isinstance(item, int))
        for token in tokens:
            _require_in_range("prompt token ids", token, 0, self.vocab_size - 1)
        return tokens

    def _chat_tokens(self, messages: Sequence[object]) -> tuple[int, ...]:
        conversation = [dict(message) for message in messages if isinstance(message, Mapping)]
        for message in conversation:
            if set(message) != {"role", "content"} or not all(isinstance(v, str) for v in message.values()):
                raise ValueError(f"a message must have the texts role and content, got {message!r}")
        if not self.tokenizer.chat_template:
            raise ValueError("messages need a chat template, which this model lacks; send a text (--raw)")
        text = self.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        assert isinstance(text, str)
        # The template writes special tokens itself.
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def prepare_admission(config: Config, report: Progress) -> Admission:
    """Loads the tokenizer and reads what the target is; fetches no weights.

    Raises ValueError when a model is missing or the drafter's tokenizer is another one.
    """
    # torch comes with these; the driver, which only names this function, does without.
    from outrider.workers.setup import max_sequence_tokens
    from outrider.workers.weights.resolver import read_config, resolve_description, resolve_tokenizer
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
    return Admission(config, tokenizer, model.vocab_size, max_context, end_ids)


def _require_in_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{field} must be in [{low}, {high}], got {value}")
