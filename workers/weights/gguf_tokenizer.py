"""The tokenizer that GGUF metadata describe, as a Hugging Face fast tokenizer.

GGUF holds vocabulary, merges and token types, but names the splitting rule only: `tokenizer.ggml.pre`. The
rules are those of the models' own tokenizer.json files (HuggingFaceTB/SmolLM2-135M-Instruct,
Qwen/Qwen2.5-0.5B, meta-llama/Meta-Llama-3-8B), which llama.cpp repeats in `src/llama-vocab.cpp`. transformers'
own conversion (`gguf_file=`) differs: it splits no digits for SmolLM2 and leaves out Qwen's NFC.
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from outrider.workers.weights.gguf_header import GgufHeader

# tokenizer.ggml.token_type
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
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
}
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_COMPOSED = ("qwen2", "deepseek-r1-qwen")


def tokenizer_from_gguf(header: GgufHeader) -> PreTrainedTokenizerFast:
    """Byte-level BPE with special tokens and chat template.

    Padding entries that merely fill the embedding ([PAD151700], type "unused") are left out.
    Raises ValueError for other kinds of tokenizers and unknown splitting rules.
    """
    metadata = header.metadata
    model = metadata.get("tokenizer.ggml.model")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if model != "gpt2" or pre not in _SPLITS:
        raise ValueError(
            f"{header.path} has tokenizer {model}/{pre}; supported in GGUF: gpt2 (byte-level BPE) with "
            f"{', '.join(_SPLITS)}; else name a Hugging Face tokenizer"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    is_llama3 = pre in _LLAMA3_NAMES
    tokenizer = Tokenizer(
        BPE(
            vocab={
                token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED
            },
            merges=[_pair(merge) for merge in metadata.get("tokenizer.ggml.merges", [])],
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
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if metadata.get("tokenizer.ggml.add_bos_token", is_llama3) and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]}:0 $A:0",
            pair=f"{tokens[bos]}:0 $A:0 {tokens[bos]}:1 $B:1",
            special_tokens=[(tokens[bos], bos)],
        )
    named: dict[str, Any] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and token_id < len(tokens):
            named[f"{role}_token"] = tokens[token_id]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)
    fast.chat_template = metadata.get("tokenizer.chat_template")
    return fast


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right
