"""Text to token ids and back, for every kind of checkpoint."""

import codecs
from collections.abc import Sequence

from tokenizers import decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from outrider.workers.weights.byte_alphabet import token_bytes
from outrider.workers.weights.gguf_header import read_gguf_header
from outrider.workers.weights.gguf_tokenizer import tokenizer_from_gguf
from outrider.workers.weights.random_source import RandomSource
from outrider.workers.weights.random_tokenizer import tokenizer_of_size
from outrider.workers.weights.resolver import ResolvedModel

# Tokens that the drafter may have beside the target's (added ones of a later release of the same tokenizer).
MAX_EXTRA_TOKENS = 512


def load_tokenizer(resolved: ResolvedModel) -> PreTrainedTokenizerFast:
    """The model's tokenizer, with its chat template if it has one.

    End ids are in `ModelConfig.eos_token_ids`, the end of a chat turn included; `eos_token_id` is just one.
    Raises ValueError, one line, when there is none or it is of a kind that is not supported.
    """
    if resolved.kind == "gguf":
        return tokenizer_from_gguf(read_gguf_header(resolved.path))
    if resolved.kind == "random":
        return tokenizer_of_size(RandomSource(resolved.model).config.vocab_size)
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolved.path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{resolved.path} has no usable tokenizer: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{resolved.path} has no fast tokenizer (tokenizer.json)")
    # "Cleaning" drops spaces before punctuation, so that decoding would not give the text back.
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def same_tokenizer(target: PreTrainedTokenizerFast, drafter: PreTrainedTokenizerFast) -> str:
    """Empty when the two give the same ids to the same tokens, else what differs, to go into a message.

    The drafter must know every id of the target, since it reads the target's tokens, and may have up to
    MAX_EXTRA_TOKENS more. Embeddings padded beyond the vocabulary do not matter here.
    """
    ours, theirs = target.get_vocab(), drafter.get_vocab()
    for token, token_id in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token, token_id) != token_id:
            return f"token {token!r} is {token_id} in the target, {theirs[token]} in the drafter"
    names = {token_id: token for token, token_id in theirs.items()}
    for token, token_id in sorted(ours.items(), key=lambda item: item[1]):
        if names.get(token_id, token) != token:
            return f"id {token_id} is {token!r} in the target, {names[token_id]!r} in the drafter"
    missing = ours.keys() - theirs.keys()
    if missing:
        token = min(missing, key=lambda name: ours[name])
        return (
            f"token {token!r} ({ours[token]}) of the target is unknown to the drafter ({len(missing)} such)"
        )
    if len(theirs) - len(ours) > MAX_EXTRA_TOKENS:
        return f"the target has {len(ours)} tokens, the drafter {len(theirs)}"
    return ""


class IncrementalDecoder:
    """Text of a growing token sequence, never half a character.

    What `push` and `add` return, followed by `finish`, is `tokenizer.decode(ids, skip_special_tokens=...)`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        special = {token_id for token_id, token in added.items() if token.special}
        self._skipped = frozenset(special if skip_special_tokens else ())
        self._is_byte_level = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # For other tokenizers: tokens whose text is not complete, after those that give them context.
        self._window: list[int] = []
        self._num_shown = 0

    def push(self, ids: Sequence[int]) -> str:
        """Text that these tokens complete."""
        return "".join(self.add(token) for token in ids)

    def add(self, token: int) -> str:
        """Text that this token completes; empty in the middle of a character."""
        if token in self._skipped:
            return ""
        if self._is_byte_level:
            text = self._tokenizer.backend_tokenizer.id_to_token(token)
            return self._utf8.decode(token_bytes(text)) if text is not None else ""
        self._window.append(token)
        shown, whole = self._texts()
        if whole.endswith("\ufffd"):
            return ""
        # The tokens shown last stay as context: some decoders treat the first token of a text differently.
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return whole[len(shown) :]

    def finish(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character."""
        if self._is_byte_level:
            return self._utf8.decode(b"", final=True)
        shown, whole = self._texts()
        self._window, self._num_shown = [], 0
        return whole[len(shown) :]

    def _texts(self) -> tuple[str, str]:
        backend = self._tokenizer.backend_tokenizer
        shown = backend.decode(self._window[: self._num_shown], skip_special_tokens=False)
        return shown, backend.decode(self._window, skip_special_tokens=False)
