"""What a request may ask of the sampler."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property

from outrider.workers.sequences.grammar import ANYTHING, Grammar

MAX_LOGIT_BIAS = 300  # entries of a request; the OpenAI API allows as many
MAX_TOP_LOGPROBS = 20
MIN_TEMPERATURE = 0.01  # below it logits / T leave the range where float32 still tells candidates apart
MIN_REPETITION_PENALTY = 0.01  # edits must leave finite float32 of any logits a model can mean


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request. The defaults are the model's own law: temperature 1 and nothing removed.

    The order is that of transformers: what grammar and least length forbid, logit bias, repetition penalty, presence
    and frequency penalties, temperature, top-k, top-p, min-p.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token (greedy)."""
    top_k: int = 0
    """Keep the k likeliest tokens (and those that tie with the k-th); 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens until their mass, after top-k, reaches this fraction; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token seen in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time the output has it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, value) pairs: each value is added to its token's logit."""
    seed: int = 0
    """Key of the noise: same seed, prompt and parameters, same text."""
    max_tokens: int = 256
    """Tokens to generate at most."""
    min_tokens: int = 0
    """Until the text has so many, the tokens that would end it are removed, and stop strings do not end it; where a
    grammar leaves nothing but the end, it ends."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends with any of these tokens, as with the model's own end-of-text tokens."""
    stop: tuple[str, ...] = ()
    """Generation ends before any of these strings."""
    ignore_eos: bool = False
    """Go on past the model's end-of-text tokens."""
    logprobs: bool = False
    """Report the log-probability of each token under the model's own law (before any of the above)."""
    top_logprobs: int = 0
    """With logprobs: also the likeliest tokens at each place, this many."""
    grammar: Grammar = ANYTHING
    """Tokens that the text cannot go on with in this language are removed, first of all."""

    def request_fields(self) -> dict[str, object]:
        """As a request names them, all but the grammar, so that no default of a configuration gets in."""
        assert not self.grammar.text, "a request says `structured_outputs`"
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "grammar"}

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p or min-p can make a difference; greedy takes the likeliest token anyway."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)

    @cached_property
    def uses_context(self) -> bool:
        """Whether the law depends on the tokens so far other than through the model."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @cached_property
    def law(self) -> tuple[float, ...]:
        """What law and report of every row depend on: temperature, top-k, top-p, min-p, whether they truncate,
        and how many of the likeliest are reported besides the token, -1 where nothing is."""
        num_reported = self.top_logprobs if self.logprobs else -1
        law = self.temperature, self.top_k, self.top_p, self.min_p, self.truncates, num_reported
        return tuple(float(number) for number in law)

    @cached_property
    def is_confined(self) -> bool:
        """Whether the text so far forbids tokens."""
        return bool(self.grammar.text) or self.min_tokens > 0

    @cached_property
    def follows_text(self) -> bool:
        """Whether a law depends on more of the text than the model reads: who samples keeps it, and learns it."""
        return self.uses_context or self.is_confined

    @cached_property
    def edits_logits(self) -> bool:
        return self.uses_context or bool(self.logit_bias)

    def validate(self, vocab_size: int) -> None:
        """Raise a one-line ValueError that names the first bad field and the values it allows."""
        temperatures = f"0 (greedy) or in [{MIN_TEMPERATURE}, 100]"
        _check_number("temperature", self.temperature, temperatures)
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature <= 100:
            raise _error("temperature", temperatures, self.temperature)
        _check_int("top_k", self.top_k, 0, vocab_size)
        _check_fraction("top_p", self.top_p, 1, above_zero=True)
        _check_fraction("min_p", self.min_p, 1, above_zero=False)
        _check_range("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, 100)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        self._check_logit_bias(vocab_size)
        _check_int("seed", self.seed, 0, 2**64 - 1)
        _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        for token in self.stop_token_ids:
            _check_int("stop_token_ids entries", token, 0, vocab_size - 1)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise _error("stop entries", "non-empty strings", text)
        _check_bool("ignore_eos", self.ignore_eos)
        _check_bool("logprobs", self.logprobs)
        _check_int("top_logprobs", self.top_logprobs, 0, min(MAX_TOP_LOGPROBS, vocab_size))
        if self.top_logprobs and not self.logprobs:
            raise _error("top_logprobs", "0 unless logprobs is true", self.top_logprobs)

    def _check_logit_bias(self, vocab_size: int) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise _error("logit_bias", f"at most {MAX_LOGIT_BIAS} entries", len(self.logit_bias))
        seen = set()
        for entry in self.logit_bias:
            if not isinstance(entry, (tuple, list)) or len(entry) != 2:
                raise _error("logit_bias entries", "pairs (token id, value)", entry)
            token, value = entry
            _check_int("logit_bias token ids", token, 0, vocab_size - 1)
            _check_range("logit_bias values", value, -100, 100)
            if token in seen:
                raise _error("logit_bias token ids", "distinct", token)
            seen.add(token)


def _error(field: str, allowed: str, value: object) -> ValueError:
    return ValueError(f"sampling.{field} must be {allowed}, got {value!r}")


def _check_number(field: str, value: object, allowed: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Whole numbers may be too large for a float to be made of them.
    if not number or (isinstance(value, float) and not math.isfinite(value)):
        raise _error(field, allowed, value)


def _check_range(field: str, value: float, low: float, high: float) -> None:
    allowed = f"in [{low}, {high}]"
    _check_number(field, value, allowed)
    if not low <= value <= high:
        raise _error(field, allowed, value)


def _check_fraction(field: str, value: float, high: float, above_zero: bool) -> None:
    allowed = f"in {'(' if above_zero else '['}0, {high}]"
    _check_number(field, value, allowed)
    if not 0 <= value <= high or (above_zero and value == 0):
        raise _error(field, allowed, value)


def _check_int(field: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _error(field, f"an integer in [{low}, {high}]", value)


def _check_bool(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise _error(field, "true or false", value)
