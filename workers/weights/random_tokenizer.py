"""A byte-level tokenizer of any vocabulary size, for models with random weights."""

from itertools import product

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from outrider.workers.weights.byte_alphabet import BYTE_TO_CHARACTER

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LETTERS = "etaoinshrdlucmfwypvbgkqjxz"
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_of_size(vocab_size: int) -> PreTrainedTokenizerFast:
    """`vocab_size` tokens: three special ones, the 256 bytes, then pairs of letters and pairs of those.

    Ids 0, 1, 2 are <|endoftext|>, <|im_start|>, <|im_end|>. Raises ValueError when the bytes do not fit.
    """
    smallest = len(SPECIAL_TOKENS) + len(BYTE_TO_CHARACTER)
    if vocab_size < smallest:
        raise ValueError(
            f"a random model with text needs vocab_size of at least {smallest}, got {vocab_size}"
        )
    tokens = [*SPECIAL_TOKENS, *BYTE_TO_CHARACTER]
    merges: list[tuple[str, str]] = []
    parts = [" " + letter for letter in _LETTERS] + ["".join(pair) for pair in product(_LETTERS, repeat=2)]
    level = [(text[0].replace(" ", BYTE_TO_CHARACTER[0x20]), text[1]) for text in parts]
    while len(tokens) < vocab_size:
        level = level[: vocab_size - len(tokens)]
        merges += level
        joined = [left + right for left, right in level]
        tokens += joined
        level = [(left, right) for left in joined for right in joined]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
