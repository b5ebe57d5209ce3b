"""The tokenizer that GGUF metadata describe, as a Hugging Face fast tokenizer.

GGUF holds vocabulary, merges and token types, but names the splitting rule only: `tokenizer.ggml.pre`. The
rules are those of the models' own tokenizer.json files (HuggingFaceTB/SmolLM2-135M-Instruct,
Qwen/Qwen2.5-0.5B, meta-llama/Meta-Llama-3-8B), which llama.cpp repeats in `src/llama-vocab.cpp`. transformers'
own conversion (`gguf_file=`) differs: it splits no digits for SmolLM2 and leaves out Qwen's NFC.
"""

import re
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from outrider.workers.weights.fields import Fields
from outrider.workers.weights.gguf_config import END_OF_TURN
from outrider.workers.weights.gguf_header import GgufHeader

# Of other kinds of tokenizers, or for completion around a gap.
_HARMLESS = (
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type_count",
    "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.mask_token_id",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.remove_extra_whitespaces",
    "tokenizer.ggml.fim_",
    "tokenizer.ggml.prefix_token_id",
    "tokenizer.ggml.suffix_token_id",
    "tokenizer.ggml.middle_token_id",
    "tokenizer.huggingface.json",
    "tokenizer.chat_template",
)

# tokenizer.ggml.token_type
_NORMAL = 1
_CONTROL = 3
_USER_DEFINED = 4
_UNUSED = 5

_CASELESS_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _CASELESS_WORDS.replace("{DIGITS}", "")
_LLAMA3 = _CASELESS_WORDS.replace("{DIGITS}", "{1,3}")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What llama.cpp does when a file names no rule.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
_DIGIT = r"\p{N}"

_SPLITS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    "gpt-2": (_GPT2,),
    "smollm": (_DIGIT, _GPT2),
    "starcoder": (_DIGIT, _GPT2),
    "mellum2": (_DIGIT, _GPT2),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
}
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_COMPOSED = ("qwen2", "deepseek-r1-qwen")

_LOOKS_SPECIAL = re.compile(r"<\|[^\s<>]+\|>")


def tokenizer_from_gguf(header: GgufHeader) -> PreTrainedTokenizerFast:
    """Byte-level BPE with special tokens and chat template.

    Padding entries that merely fill the embedding ([PAD151700], type "unused") are left out.
    Raises ValueError for other kinds of tokenizers, unknown splitting rules, and keys that nobody reads.
    """
    fields = Fields(header.metadata, f"{header.path}: ")
    model = fields.value("tokenizer.ggml.model")
    pre = fields.value("tokenizer.ggml.pre") if fields.has("tokenizer.ggml.pre") else "default"
    if model != "gpt2" or pre not in _SPLITS:
        raise ValueError(
            f"{header.path} has tokenizer {model}/{pre}; supported in GGUF: gpt2 (byte-level BPE) with "
            f"{', '.join(_SPLITS)}; else name a Hugging Face tokenizer as target.tokenizer"
        )
    tokens = fields.texts("tokenizer.ggml.tokens")
    merges = fields.texts("tokenizer.ggml.merges") if fields.given("tokenizer.ggml.merges") else []
    pairs = [_pair(merge) for merge in merges]
    named = {
        key: fields.token_ids(f"tokenizer.ggml.{key}_token_id", len(tokens))
        for key in ("bos", "eos", "eot", "eom")
    } | {key: _id_if_there(fields, key, len(tokens)) for key in ("padding", "unknown")}
    types = _token_types(fields, tokens, pairs, {i for ids in named.values() for i in ids})
    is_llama3 = pre in _LLAMA3_NAMES
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
    for left, right in pairs:
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ValueError(f"{header.path}: tokenizer.ggml.merges has {left} {right}, which gives no token")
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=pairs,
            # Llama 3 has tokens that its merges do not reach; a whole word that is a token is taken as it is.
            ignore_merges=is_llama3,
        )
    )
    if pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    fields.require_off({"tokenizer.ggml.add_eos_token": (False,), "tokenizer.ggml.add_sep_token": (False,)})
    adds_bos = is_llama3
    if fields.has("tokenizer.ggml.add_bos_token"):
        adds_bos = fields.flag("tokenizer.ggml.add_bos_token")
    if adds_bos and named["bos"]:
        (bos,) = named["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]}:0 $A:0",
            pair=f"{tokens[bos]}:0 $A:0 {tokens[bos]}:1 $B:1",
            special_tokens=[(tokens[bos], bos)],
        )
    roles = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    texts: dict[str, Any] = {role: tokens[named[key][0]] for key, role in roles.items() if named[key]}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **texts)
    if fields.given("tokenizer.chat_template"):
        fast.chat_template = fields.string("tokenizer.chat_template")
    fields.ignore(
        key for key in header.metadata if key.startswith(_HARMLESS) or not key.startswith("tokenizer.")
    )
    fields.refuse_unread()
    return fast


def _id_if_there(fields: Fields, key: str, num_tokens: int) -> tuple[int, ...]:
    """Padding and unknown tokens are never asked for: files that name none write a number out of range."""
    value = fields.value(f"tokenizer.ggml.{key}_token_id")
    return (value,) if isinstance(value, int) and 0 <= value < num_tokens else ()


def _token_types(
    fields: Fields, tokens: list[str], pairs: list[tuple[str, str]], named: set[int]
) -> list[int]:
    """The type of each token. Special tokens that a file calls normal are made special.

    Text is cut into pieces by merges, so a normal token that no merge gives would never be found in it: a chat's
    <|im_start|> would reach the model as seven tokens.
    """
    types = [_NORMAL] * len(tokens)
    if fields.given("tokenizer.ggml.token_type"):
        types = fields.integers("tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.token_type must have a type for each of {len(tokens)} tokens, got {len(types)}"
        )
    merged = {left + right for left, right in pairs}
    return [
        _CONTROL
        if kind == _NORMAL
        and (_LOOKS_SPECIAL.fullmatch(token) or token in END_OF_TURN or i in named)
        and len(token) > 1
        and token not in merged
        else kind
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]


def _pair(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not left or not space or not right or " " in right:
        raise ValueError(
            f"tokenizer.ggml.merges must hold two tokens with a space between them, got {merge!r}"
        )
    return left, right
