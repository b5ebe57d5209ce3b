"""The bound at the door: it never refuses what fits, and it refuses what is far too long without reading it."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from outrider.cluster import text_bound
from outrider.cluster.text_bound import TextBound
from outrider.workers.weights.random_tokenizer import tokenizer_of_size


def composing() -> PreTrainedTokenizerFast:
    """Byte-level, as Qwen2's: texts are composed (NFC) before they are split; long runs are one token."""
    fast = tokenizer_of_size(400)
    model = fast.backend_tokenizer
    model.normalizer = normalizers.NFC()
    model.add_tokens([AddedToken("-" * 40, normalized=False), AddedToken("<mask>", lstrip=True)])
    return fast


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: characters, a sign for spaces, bytes for everything else."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab", "\u2581ab"]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = BPE(vocab, [("a", "b"), ("\u2581", "ab")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"byte level": composing(), "byte fallback": byte_fallback()}
# Letters with marks that compose, signs that are decomposed, runs that are one token, blanks that are dropped.
TEXTS = st.text(
    st.sampled_from("ab e\u0301\u0323\u0308\u212a\u1f82-\t\n<mask>\u65e5\U0001f600\u2581"), max_size=200
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
@example(text="-" * 40 * 50)
@example(text=" " * 500 + "<mask>")
@example(text="e\u0323\u0302" * 100)
@example(text=" ab" * 100)
def test_no_text_that_fits_is_refused(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    num_tokens = len(tokenizer.encode(text, add_special_tokens=False))
    assert not TextBound(tokenizer).exceeds(text, num_tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_cutting_the_text_for_counting_does_not_make_it_longer(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_bound, "_CHUNK", 5)
    tokenizer = TOKENIZERS[name]
    for text in ("e\u0323\u0302" * 50, "-" * 400, " ab" * 100):
        assert not TextBound(tokenizer).exceeds(text, len(tokenizer.encode(text, add_special_tokens=False)))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_eight_megabytes_are_refused(name: str) -> None:
    assert TextBound(TOKENIZERS[name]).exceeds("the lighthouse at the end of the world " * 200_000, 4096)


def test_a_tokenizer_that_drops_text_has_a_generous_bound() -> None:
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bound = TextBound(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert not bound.exceeds("x" * 60 * 100, 100)
    assert bound.exceeds("x" * 65 * 100, 100)
