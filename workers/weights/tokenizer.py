"""Text to token ids and back, for every kind of checkpoint."""

import codecs

from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from outrider.workers.weights.byte_alphabet import token_bytes
from outrider.workers.weights.config import ModelConfig
from outrider.workers.weights.gguf_config import gguf_end_ids
from outrider.workers.weights.gguf_header import read_gguf_header
from outrider.workers.weights.gguf_tokenizer import tokenizer_from_gguf
from outrider.workers.weights.hf_directory import generation_end_ids
from outrider.workers.weights.random_spec import parse_spec, random_config
from outrider.workers.weights.random_tokenizer import tokenizer_of_size
from outrider.workers.weights.resolver import ResolvedModel

# Tokens that the drafter may have beside the target's (added ones of a later release of the same tokenizer).
MAX_EXTRA_TOKENS = 512
MAX_REASON = 300  # characters of another library's message
ANSWER_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Text of answers even where they are special tokens, as some vocabularies have them: whoever reads an answer goes by
them."""
_METASPACE = "\u2581"  # stands for a space
# A tokenizer is in the first of these; transformers converts the others.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")


def load_tokenizer(resolved: ResolvedModel) -> PreTrainedTokenizerFast:
    """The model's tokenizer, with its chat template if it has one.

    What ends a text is said by `end_token_ids`; `eos_token_id` is just one of them.
    Raises ValueError, one line, when there is none or it is of a kind that is not supported.
    """
    if resolved.kind == "gguf":
        return tokenizer_from_gguf(read_gguf_header(resolved.path))
    if resolved.kind == "random":
        return tokenizer_of_size(random_config(*parse_spec(resolved.model)).vocab_size)
    if not any(path for pattern in _VOCABULARIES for path in resolved.path.glob(pattern)):
        raise ValueError(f"{resolved.path} has no usable tokenizer: there is no tokenizer.json")
    from transformers import AutoTokenizer  # with torch, which the other kinds do without

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolved.path, local_files_only=True, trust_remote_code=False
        )
    except (
        Exception
    ) as error:  # of transformers, tokenizers and what they import, which have no class in common
        reason = " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"a file lacks {reason}"
        raise ValueError(f"{resolved.path} has no usable tokenizer: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{resolved.path} has no fast tokenizer (tokenizer.json)")
    # "Cleaning" drops spaces before punctuation, so that decoding would not give the text back.
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def end_token_ids(
    model: ModelConfig, tokenizer: PreTrainedTokenizerFast, source: ResolvedModel
) -> tuple[int, ...]:
    """Ids that end a text, whoever names them.

    Args:
        model: the model that writes the text; its ids come first.
        tokenizer: its end-of-text token ends a text as well.
        source: where the tokenizer is from; a generation_config.json beside it may name more.

    Raises:
        ValueError: generation_config.json names something that is no token of the model.
    """
    ids = list(model.eos_token_ids)
    if source.kind == "safetensors":
        ids += generation_end_ids(source.path, model.vocab_size)
    if source.kind == "gguf":
        ids += gguf_end_ids(read_gguf_header(source.path), model.vocab_size)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id < model.vocab_size:
        ids.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(ids))


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


def vocabulary_bytes(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> tuple[bytes, ...]:
    """What each token says in the middle of a text, by id; nothing for ids that are no tokens."""
    backend = tokenizer.backend_tokenizer
    is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
    fallback_bytes = _fallback_bytes(backend)
    table = []
    for token in range(vocab_size):
        text = backend.id_to_token(token)
        if text is None:
            table.append(b"")
        elif token in fallback_bytes:
            table.append(fallback_bytes[token])
        else:
            table.append(token_bytes(text) if is_byte_level else text.replace(_METASPACE, " ").encode())
    return tuple(table)


class IncrementalDecoder:
    """Text of a growing token sequence, never half a character.

    What `add` returns, followed by `finish`, is `tokenizer.decode(ids, skip_special_tokens=...)`; but `ANSWER_TAGS`
    are never skipped, and bytes that are no UTF-8 become one U+FFFD for each broken character, also with tokenizers
    that write one for each byte and lose the good characters beside them (the byte fallback of Llama 2's).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, skip_special_tokens: bool = True) -> None:
        backend = tokenizer.backend_tokenizer
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        special = {
            token_id
            for token_id, token in added.items()
            if token.special and token.content not in ANSWER_TAGS
        }
        self._skipped = frozenset(special if skip_special_tokens else ())
        self._is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._fallback_bytes = _fallback_bytes(backend)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Not byte level: tokens whose text is not complete, after those that give them context.
        self._window: list[int] = []
        self._num_shown = 0

    def add(self, token: int) -> str:
        """Text that this token completes; empty in the middle of a character."""
        if token in self._skipped:
            return ""
        if self._is_byte_level:
            text = self._backend.id_to_token(token)
            return self._utf8.decode(token_bytes(text)) if text is not None else ""
        if token in self._fallback_bytes:
            before = self._take_window()
            self._window, self._num_shown = [token], 1
            return before + self._utf8.decode(self._fallback_bytes[token])
        broken = self._utf8.decode(b"", final=True)
        self._window.append(token)
        shown, whole = self._texts()
        if whole.endswith("\ufffd"):
            return broken
        # The tokens shown last stay as context: some decoders treat the first token of a text differently.
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        return broken + whole[len(shown) :]

    def finish(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character."""
        broken = self._utf8.decode(b"", final=True)
        return broken if self._is_byte_level else broken + self._take_window()

    def _take_window(self) -> str:
        """Text of the tokens that wait for more; none wait afterwards."""
        if len(self._window) == self._num_shown:
            return ""
        shown, whole = self._texts()
        self._window, self._num_shown = [], 0
        return whole[len(shown) :]

    def _texts(self) -> tuple[str, str]:
        shown = self._backend.decode(self._window[: self._num_shown], skip_special_tokens=False)
        return shown, self._backend.decode(self._window, skip_special_tokens=False)


def _fallback_bytes(backend: Tokenizer) -> dict[int, bytes]:
    """The bytes of the tokens <0x00> to <0xFF>, by id, where the tokenizer has them decoded to bytes."""
    if backend.decoder is None or b"ByteFallback" not in backend.decoder.__getstate__():
        return {}
    ids = {backend.token_to_id(f"<0x{byte:02X}>"): bytes([byte]) for byte in range(256)}
    return {token: value for token, value in ids.items() if token is not None}
