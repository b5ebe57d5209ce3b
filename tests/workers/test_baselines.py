import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from outrider.workers.baselines import (
    BASELINE_MODES,
    BaselineMode,
    BaselineProcess,
    BaselineRequest,
    BaselineSpec,
    TransformersBaseline,
)
from outrider.workers.memory import peak_memory_bytes

PROMPT = (5, 9, 5, 9, 5, 9, 5, 9)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tiny_llama(seed: int, hidden_size: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        # drafts are kept however unsure the assistant is, so that some are refused
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return tiny_llama(0)


def greedy_reference(model: LlamaForCausalLM, num_tokens: int) -> tuple[int, ...]:
    """The argmax of one full forward per token: no cache, no generate()."""
    tokens = list(PROMPT)
    with torch.inference_mode():
        for _ in range(num_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(PROMPT) :])


@pytest.mark.parametrize("mode", BASELINE_MODES)
def test_all_modes_give_the_greedy_text_with_a_time_per_token(
    target: LlamaForCausalLM, mode: BaselineMode
) -> None:
    baseline = TransformersBaseline(target, tiny_llama(1), stop_token_ids=())
    answer = baseline.generate(BaselineRequest(mode, PROMPT, max_tokens=20))
    assert answer.tokens == greedy_reference(target, 20)
    assert len(answer.token_times_s) == 20
    assert list(answer.token_times_s) == sorted(answer.token_times_s)
    assert answer.token_times_s[0] > 0
    assert answer.token_times_s[-1] <= answer.total_s


def test_plain_takes_one_target_step_per_token_and_drafts_nothing(target: LlamaForCausalLM) -> None:
    answer = TransformersBaseline(target, None, ()).generate(BaselineRequest("transformers", PROMPT, 12))
    assert (answer.stats.num_rounds, answer.stats.num_drafted, answer.stats.num_accepted) == (12, 0, 0)


def test_an_assistant_that_is_the_target_is_always_right(target: LlamaForCausalLM) -> None:
    baseline = TransformersBaseline(target, tiny_llama(0), ())
    answer = baseline.generate(BaselineRequest("transformers-assisted", PROMPT, 20))
    assert answer.stats.num_accepted == answer.stats.num_drafted > 0
    assert answer.stats.num_rounds == 20 - answer.stats.num_accepted


@pytest.mark.parametrize("mode", ["transformers-assisted", "transformers-lookup"])
def test_speculative_counts_add_up(target: LlamaForCausalLM, mode: BaselineMode) -> None:
    baseline = TransformersBaseline(target, tiny_llama(1), ())
    answer = baseline.generate(BaselineRequest(mode, PROMPT, 24))
    assert answer.stats.num_accepted + answer.stats.num_rounds == 24
    assert 0 <= answer.stats.num_accepted <= answer.stats.num_drafted


def test_generation_ends_with_a_stop_token(target: LlamaForCausalLM) -> None:
    text = greedy_reference(target, 12)
    stop = text[5]
    baseline = TransformersBaseline(target, None, (stop,))
    answer = baseline.generate(BaselineRequest("transformers", PROMPT, 12))
    assert answer.tokens == text[: text.index(stop) + 1]


def test_sampling_repeats_with_its_seed(target: LlamaForCausalLM) -> None:
    baseline = TransformersBaseline(target, None, ())
    texts = [
        baseline.generate(BaselineRequest("transformers", PROMPT, 16, temperature=1.0, seed=seed)).tokens
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_assisted_without_a_draft_model_is_refused(target: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"draft\.model"):
        TransformersBaseline(target, None, ()).generate(BaselineRequest("transformers-assisted", PROMPT, 4))


def test_peak_memory_is_at_least_what_is_held() -> None:
    if sys.platform != "linux":
        pytest.skip("/proc only exists on Linux")
    held = torch.ones(8 * 2**20)
    assert peak_memory_bytes() >= held.numel() * held.element_size()


RANDOM_LLAMA = "random:llama?hidden_size=32&num_layers=2&num_heads=4&num_kv_heads=2&vocab_size=300&seed=0"


def test_the_process_answers_like_the_class(tmp_path: Path) -> None:
    reference = pytest.importorskip("outrider.workers.weights.reference")
    resolver = pytest.importorskip("outrider.workers.weights.resolver")
    resolved = resolver.resolve(RANDOM_LLAMA, tmp_path, lambda what, done, total: None, "target.model")
    model = reference.load_transformers(resolved, torch.float32)
    request = BaselineRequest("transformers", PROMPT, 8)
    expected = TransformersBaseline(model, None, ()).generate(request)
    spec = BaselineSpec(RANDOM_LLAMA, "", "float32", 1, str(tmp_path), ())
    with BaselineProcess(spec) as process:
        answer = process.generate(request)
        assert (answer.tokens, answer.stats) == (expected.tokens, expected.stats)
        assert answer.stats.num_rounds == 8
        assert process.peak_memory_bytes() > 0
        with pytest.raises(ValueError, match=r"draft\.model"):
            process.generate(BaselineRequest("transformers-assisted", PROMPT, 8))
