import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from outrider.workers.weights.byte_alphabet import BYTE_TO_CHARACTER
from outrider.workers.weights.gguf_header import GgufHeader
from outrider.workers.weights.gguf_tokenizer import tokenizer_from_gguf
from outrider.workers.weights.random_tokenizer import tokenizer_of_size
from outrider.workers.weights.resolver import ResolvedModel
from outrider.workers.weights.tokenizer import (
    IncrementalDecoder,
    end_token_ids,
    load_tokenizer,
    same_tokenizer,
    vocabulary_bytes,
)
from support.models import coder_pair, random_model, random_tensors, smollm2

SPEC_BENCH = Path(__file__).parents[4] / "shared" / "data" / "spec_bench.jsonl"
TEXTS = [
    "Hello world, it's 2024!",
    "  leading and trailing  ",
    "def f(x):\n\n    return x  # it's\r\n\tend",
    "Don't I'LL we'VE 12345 6.78e-9",
    "naïve café Ünïcödé",
    "日本語テスト 한국어 🙂👨‍👩‍👧",
    "<|im_start|>user\nhi<|im_end|>\n",
    "١٢٣ ½ Ⅷ \u00a0x\u3000y",
    "~$^|<=> [x](y) {z}",
    "",
    "   ",
]


def add_all(decoder: IncrementalDecoder, ids: Sequence[int]) -> str:
    return "".join(decoder.add(token) for token in ids)


def header(pre: str, tokens: list[str], merges: list[str], **extra: Any) -> GgufHeader:
    """Metadata of a byte-level tokenizer: the bytes, `tokens`, and one special token."""
    vocabulary = [*BYTE_TO_CHARACTER, *tokens, "<|im_end|>", "[PAD300]"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [1] * (len(vocabulary) - 2) + [3, 5],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": len(vocabulary) - 2,
    } | {f"tokenizer.ggml.{key}": value for key, value in extra.items()}
    return GgufHeader(Path("test.gguf"), metadata, {})


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        # Digits stand alone, and so does the space before them.
        ("smollm", ["ab", "Ġ", "1", "2", "'", "L", "L", "Ġ", "Ġ", "x"]),
        # Digits stand alone, contractions in any case are one piece.
        ("qwen2", ["ab", "Ġ", "1", "2", "'", "L", "L", "Ġ", "Ġ", "x"]),
        # Up to three digits are one piece.
        ("llama-bpe", ["ab", "Ġ", "12", "'", "L", "L", "Ġ", "Ġ", "x"]),
        # Digits with the space before them are one piece.
        ("gpt-2", ["ab", "Ġ12", "'", "L", "L", "Ġ", "Ġ", "x"]),
    ],
)
def test_splitting_rules(pre: str, expected: list[str]) -> None:
    merges = ["a b", "1 2", "Ġ 12", "b Ġ"]
    tokenizer = tokenizer_from_gguf(header(pre, ["ab", "12", "Ġ12", "bĠ"], merges))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("ab 12'LL  x")) == expected


def test_special_tokens_are_found_in_text_and_padding_is_left_out() -> None:
    tokenizer = tokenizer_from_gguf(header("smollm", [], []))
    assert tokenizer.encode("a<|im_end|>") == [BYTE_TO_CHARACTER.index("a"), 256]
    assert tokenizer.eos_token_id == 256
    assert len(tokenizer) == 257
    assert tokenizer.decode([256, 257], skip_special_tokens=False) == "<|im_end|>"


def test_special_tokens_that_a_file_calls_normal_are_found_in_text() -> None:
    """But a normal token that merges lead to stays what it is."""
    tokens = ["<|im_start|>", "</s>", "a|", "<|", "a|>", "<|a|>"]
    merges = ["< |", "a |", "a| >", "<| a|>"]
    described = header("smollm", tokens, merges, bos_token_id=257)
    tokenizer = tokenizer_from_gguf(described)
    assert tokenizer.encode("<|im_start|>") == [256]
    assert tokenizer.encode("</s>") == [257]
    assert tokenizer.decode([256, 257], skip_special_tokens=True) == ""
    assert tokenizer.decode([261], skip_special_tokens=True) == "<|a|>"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokens", "abc", "tokenizer.ggml.tokens must be a list of texts"),
        ("merges", ["ab"], "merges must hold two tokens with a space between them, got 'ab'"),
        ("merges", ["a zz"], "merges has a zz, which gives no token"),
        ("eom_token_id", "x", "eom_token_id must be token ids"),
        ("token_type", [1], "token_type must have a type for each of 258 tokens, got 1"),
        ("bos_token_id", 258, "bos_token_id must be token ids .integers from 0 to 257., got 258"),
        ("add_eos_token", True, "add_eos_token must be false or null"),
        ("normalizer.lowercase", True, "normalizer.lowercase is not known here"),
    ],
)
def test_what_a_tokenizer_says_is_read_or_refused(key: str, value: Any, message: str) -> None:
    described = header("smollm", [], [])
    described.metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_from_gguf(described)
    assert "\n" not in str(error.value)


def test_a_beginning_of_text_token_is_added_where_the_metadata_ask_for_it() -> None:
    tokenizer = tokenizer_from_gguf(header("smollm", [], [], bos_token_id=256, add_bos_token=True))
    assert tokenizer.encode("a") == [256, BYTE_TO_CHARACTER.index("a")]
    assert tokenizer.encode("a", add_special_tokens=False) == [BYTE_TO_CHARACTER.index("a")]


def test_llama3_takes_a_word_that_is_a_token_whole() -> None:
    """Its vocabulary has tokens that no merge leads to."""
    tokenizer = tokenizer_from_gguf(header("llama-bpe", ["abc"], []))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("abc")) == ["abc"]


def test_qwen_composes_characters_first() -> None:
    tokenizer = tokenizer_from_gguf(header("qwen2", [], []))
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"


def test_other_tokenizers_are_refused_with_a_way_out() -> None:
    with pytest.raises(
        ValueError, match=r"has tokenizer gpt2/tekken; supported in GGUF: .* else name a Hugging"
    ):
        tokenizer_from_gguf(header("tekken", [], []))


@pytest.mark.parametrize("vocab_size", [259, 300, 320, 1500])
def test_random_models_have_a_tokenizer_of_their_size(vocab_size: int) -> None:
    tokenizer = load_tokenizer(random_model(f"vocab_size={vocab_size}"))
    assert len(tokenizer) == vocab_size
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False).endswith(
        "assistant\n"
    )


def test_too_small_a_vocabulary_has_no_tokenizer() -> None:
    with pytest.raises(ValueError, match="vocab_size of at least 259, got 100"):
        tokenizer_of_size(100)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(ValueError, match="has no usable tokenizer: ") as error:
            load_tokenizer(ResolvedModel("x", "safetensors", tmp_path))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert message().endswith("there is no tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert message().endswith("a file lacks 'added_tokens'")
    (tmp_path / "tokenizer.json").write_text("{")
    assert "Expecting property name" in message()
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text("{}")
    assert not message().endswith(":")


def test_a_saved_tokenizer_is_read_back(tmp_path: Path) -> None:
    tokenizer_of_size(400).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ResolvedModel("x", "safetensors", tmp_path))
    assert same_tokenizer(tokenizer, tokenizer_of_size(400)) == ""
    assert tokenizer.chat_template


def test_a_text_ends_where_the_model_the_tokenizer_or_the_generation_config_says(tmp_path: Path) -> None:
    model = random_tensors("llama")[0]
    folder = ResolvedModel("x", "safetensors", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9]}))
    assert model.eos_token_ids == (2,)
    tokenizer = tokenizer_of_size(320)
    tokenizer.eos_token = "<|endoftext|>"
    assert end_token_ids(model, tokenizer, random_model()) == (2, 0)
    assert end_token_ids(model, tokenizer, folder) == (2, 9, 0)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "9"}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be token ids"):
        end_token_ids(model, tokenizer, folder)


def test_tokenizers_that_differ() -> None:
    small, large = tokenizer_of_size(320), tokenizer_of_size(400)
    assert same_tokenizer(small, large) == ""
    assert "(320) of the target is unknown to the drafter (80 such)" in same_tokenizer(large, small)
    other = tokenizer_from_gguf(header("smollm", [], []))
    assert same_tokenizer(small, other).startswith(
        "token '<|im_end|>' is 2 in the target, 256 in the drafter"
    )
    assert "the target has 320 tokens, the drafter 5000" in same_tokenizer(small, tokenizer_of_size(5000))


@pytest.mark.parametrize("seed", range(20))
def test_decoding_token_by_token_gives_the_same_text(seed: int) -> None:
    """Random bytes, valid UTF-8 or not, special tokens between them."""
    tokenizer = tokenizer_of_size(320)
    chooser = random.Random(seed)
    text = "".join(chooser.choice(TEXTS) for _ in range(5))
    ids = tokenizer.encode(text)
    for _ in range(seed):
        ids.insert(chooser.randrange(len(ids) + 1), chooser.randrange(320))
    for skip in (True, False):
        decoder = IncrementalDecoder(tokenizer, skip)
        assert add_all(decoder, ids) + decoder.finish() == tokenizer.decode(ids, skip_special_tokens=skip)


def test_the_vocabulary_says_what_each_token_adds_to_a_text() -> None:
    tokenizer = tokenizer_of_size(400)
    table = vocabulary_bytes(tokenizer, 402)
    assert table[0] == b"<|endoftext|>"
    assert table[400:] == (b"", b"")
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(table[token] for token in ids) == text.encode()
    spelled = Tokenizer(models.BPE(vocab={"\u2581a": 0, "<0xE3>": 1, "b": 2}, merges=[], byte_fallback=True))
    spelled.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=spelled)
    assert vocabulary_bytes(fast, 3) == (b" a", b"\xe3", b"b")


def test_no_half_characters() -> None:
    tokenizer = tokenizer_of_size(259)
    decoder = IncrementalDecoder(tokenizer)
    parts = [decoder.add(token) for token in tokenizer.encode("a🙂é")]
    assert parts == ["a", "", "", "", "🙂", "", "é"]
    assert decoder.finish() == ""
    add_all(decoder, tokenizer.encode("🙂")[:2])
    assert decoder.finish() == "\ufffd"


def test_tokenizers_that_are_not_byte_level_decode_token_by_token_too() -> None:
    """As in Llama 2: spaces are written as U+2581 and the first one of a text is dropped."""
    words = ["<unk>", "▁hello", "▁world", "▁", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    smile = [words.index(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    ids = [1, 2, *smile, 4, 3, *smile[:2]]
    decoder = IncrementalDecoder(fast)
    parts = [decoder.add(token) for token in ids]
    assert parts == ["hello", " world", "", "", "", "🙂", "!", " ", "", ""]
    assert decoder.finish() == "\ufffd"
    assert "".join(parts) == fast.decode(ids[:-2])
    # Good characters before a broken one stay, and a broken one is one U+FFFD, at the end and before other text.
    japanese = [words.index(f"<0x{byte:02X}>") for byte in "日本".encode()]
    decoder = IncrementalDecoder(fast)
    assert add_all(decoder, japanese[:-2]) + decoder.finish() == "日\ufffd"
    assert add_all(IncrementalDecoder(fast), [*japanese[:-1], 2, 1, *japanese]) == "日\ufffd world hello日本"
    assert add_all(IncrementalDecoder(fast), [*japanese, 1]) == fast.decode([*japanese, 1]) == "日本 hello"


def benchmark_texts() -> list[str]:
    if not SPEC_BENCH.exists():
        pytest.skip(f"{SPEC_BENCH.name} is not beside the repository")
    with SPEC_BENCH.open(encoding="utf-8") as file:
        return [turn for line in file for turn in json.loads(line)["turns"]]


def assert_round_trips(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    for text in texts:
        ids = tokenizer.encode(text)
        decoder = IncrementalDecoder(tokenizer, skip_special_tokens=False)
        assert add_all(decoder, ids) + decoder.finish() == tokenizer.decode(ids) == text


def test_smollm2_round_trips() -> None:
    tokenizer = load_tokenizer(smollm2())
    assert_round_trips(tokenizer, TEXTS)
    # Ids as the model's own tokenizer.json gives them: digits one by one, the chat tokens 1 and 2.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("in 2024")) == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.encode("<|im_start|>x<|im_end|>")[::2] == [1, 2]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_smollm2_round_trips_on_benchmark_prompts() -> None:
    assert_round_trips(load_tokenizer(smollm2()), benchmark_texts())


def test_the_coder_pair_shares_a_tokenizer() -> None:
    target, drafter = (load_tokenizer(resolved) for resolved in coder_pair())
    assert same_tokenizer(target, drafter) == ""
    assert_round_trips(target, TEXTS)
    assert_round_trips(target, benchmark_texts())
    assert same_tokenizer(target, tokenizer_of_size(320)) != ""
