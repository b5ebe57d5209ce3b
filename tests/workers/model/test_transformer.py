"""The transformer against transformers' own, and every way of running it against one pass."""

from dataclasses import replace

import pytest
import torch

from outrider.workers.link.communicator import SoloCommunicator
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.loader import load_weights
from outrider.workers.model.shard import ShardPlan
from outrider.workers.model.transformer import Transformer
from outrider.workers.weights.config import ModelConfig, Rope, RoutedMlp
from support.rows import SequenceRows, batch_of, chain
from support.tensor_source import ROPES, TensorSource, reference_model, tiny_config, tiny_mellum

CPU = torch.device("cpu")
PAGE = 8
# float32 on both sides, logits of order 1 to 10; the sums run in another order. Seen: up to 1e-5.
TOLERANCE = 1e-4

CONFIGS = {
    "llama": tiny_config("llama"),
    "llama, 9 heads on 3": tiny_config("llama", num_heads=9, num_kv_heads=3),
    "llama, one KV head, tied": tiny_config("llama", num_kv_heads=1, tied_embeddings=True),
    "llama, llama3 scaling": tiny_config("llama", rope=ROPES[2]),
    "llama, linear scaling": tiny_config("llama", rope=ROPES[1]),
    "qwen2": tiny_config("qwen2"),
    "qwen2, tied": tiny_config("qwen2", tied_embeddings=True),
    "qwen2, yarn scaling": tiny_config("qwen2", rope=ROPES[4]),
    "qwen2, a window in one layer": tiny_config("qwen2", windows=(0, 48)),
    "qwen3": tiny_config("qwen3"),
    "qwen3, tied": tiny_config("qwen3", tied_embeddings=True),
    "qwen3, windows": tiny_config("qwen3", windows=(48, 48)),
    "mellum": tiny_mellum(),
    "mellum, windows everywhere": tiny_mellum((5, 5)),
    "mellum, 1 KV head, 2 of 3 experts": tiny_mellum((5, 0), 5, 1, RoutedMlp(3, 2, 24, renormalised=True)),
    "mellum, probabilities as they are": tiny_mellum(mlp=RoutedMlp(4, 3, 24, renormalised=False)),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(config: ModelConfig, source: TensorSource, packed: bool = True) -> tuple[Transformer, PagedCache]:
    plan = ShardPlan(config, 0, 1)
    model = Transformer(load_weights(plan, source, torch.float32, CPU, packed), SoloCommunicator())
    return model, PagedCache(config, plan, 64, PAGE, torch.float32, CPU)


def run(model: Transformer, cache: PagedCache, *sequences: SequenceRows) -> torch.Tensor:
    return model.logits(model.forward(batch_of(sequences, PAGE, CPU), cache).last)


def prompt(num_tokens: int, seed: int = 1) -> list[int]:
    return torch.randint(0, 300, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def scattered_pages(num_rows: int, seed: int = 0) -> list[int]:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[: -(-num_rows // PAGE)]


@pytest.fixture(scope="module")
def tiny() -> tuple[ModelConfig, TensorSource]:
    config = tiny_config("qwen2", num_heads=6, num_kv_heads=2)
    return config, reference_model(config)[1]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_equal_those_of_transformers(config: ModelConfig, packed: bool) -> None:
    reference, source = reference_model(config)
    model, cache = load(config, source, packed)
    tokens = prompt(200)
    with torch.no_grad():
        want = reference(torch.tensor([tokens])).logits[0]
    assert want.std() > 0.5
    got = run(model, cache, SequenceRows(scattered_pages(200), 0, chain(200), 0, tokens))
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3, 90])
def test_taps_are_the_hidden_states_of_transformers(packed: bool, num_rows: int) -> None:
    reference, source = reference_model(tiny_config("qwen3", windows=(0, 48, 0)))
    model, cache = load(source.config, source, packed)
    tokens = prompt(num_rows)
    with torch.no_grad():
        *entering, after_norm = reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    rows = SequenceRows(scattered_pages(num_rows), 0, chain(num_rows), 0, tokens)
    hidden = model.forward(batch_of([rows], PAGE, CPU), cache, taps=(2, 0, 3))
    assert sorted(hidden.taps) == [0, 2, 3]
    assert hidden.taps[3] is hidden.last or torch.equal(hidden.taps[3], hidden.last)
    for layer in (0, 2):
        torch.testing.assert_close(hidden.taps[layer], entering[layer][0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(model.normed(hidden.last), after_norm[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 64, 65])
def test_a_prompt_in_chunks_gives_what_one_pass_gives(
    tiny: tuple[ModelConfig, TensorSource], chunk: int
) -> None:
    tokens = prompt(100)
    model, cache = load(*tiny)
    want = run(model, cache, SequenceRows(scattered_pages(100), 0, chain(100), 0, tokens))
    model, cache = load(*tiny)
    pages = scattered_pages(100, seed=5)
    got = []
    for start in range(0, 100, chunk):
        part = tokens[start : start + chunk]
        got.append(run(model, cache, SequenceRows(pages, start, chain(len(part)), 0, part)))
    torch.testing.assert_close(torch.cat(got), want, atol=TOLERANCE, rtol=0)


TREE = [0, 0, 0, 1, 1, 2, 3, 6]


def paths(parents: list[int]) -> list[list[int]]:
    """For each row the rows from the root to it."""
    found = [[0]]
    for row in range(1, len(parents)):
        found.append([*found[parents[row]], row])
    return found


def test_a_node_of_a_tree_sees_what_its_path_alone_would(tiny: tuple[ModelConfig, TensorSource]) -> None:
    context, nodes = prompt(21), prompt(len(TREE), seed=2)
    pages = scattered_pages(40)
    model, cache = load(*tiny)
    run(model, cache, SequenceRows(pages, 0, chain(21), 0, context))
    tree = run(model, cache, SequenceRows(pages, 21, TREE, 0, nodes))
    for row, path in enumerate(paths(TREE)):
        alone = [*context, *(nodes[i] for i in path)]
        want = run(model, cache, SequenceRows(list(range(60, 64)), 0, chain(len(alone)), 0, alone))
        torch.testing.assert_close(tree[row], want[-1], atol=TOLERANCE, rtol=0)


def test_a_tree_grown_level_by_level_is_the_tree_at_once(tiny: tuple[ModelConfig, TensorSource]) -> None:
    context, nodes = prompt(21), prompt(len(TREE), seed=2)
    pages = scattered_pages(40)
    model, cache = load(*tiny)
    run(model, cache, SequenceRows(pages, 0, chain(21), 0, context))
    at_once = run(model, cache, SequenceRows(pages, 21, TREE, 0, nodes))
    grown = [
        run(model, cache, SequenceRows(pages, 21, TREE[:end], start, nodes[start:end]))
        for start, end in ((0, 1), (1, 3), (3, 6), (6, 7), (7, 8))
    ]
    torch.testing.assert_close(torch.cat(grown), at_once, atol=TOLERANCE, rtol=0)


def test_after_a_commit_the_path_is_context(tiny: tuple[ModelConfig, TensorSource]) -> None:
    # Path 0 -> 1 -> 3 -> 6 of the tree behind 21 tokens: rows in slots 21, 22, 24, 27 move to 21 .. 24.
    context, nodes = prompt(21), prompt(len(TREE), seed=2)
    pages = scattered_pages(40)
    model, cache = load(*tiny)
    run(model, cache, SequenceRows(pages, 0, chain(21), 0, context))
    run(model, cache, SequenceRows(pages, 21, TREE, 0, nodes))

    def slots(rows: list[int]) -> torch.Tensor:
        return torch.tensor([pages[row // PAGE] * PAGE + row % PAGE for row in rows])

    cache.commit(slots([24, 27]), slots([23, 24]))
    got = run(model, cache, SequenceRows(pages, 25, [0], 0, [7]))
    whole = [*context, *(nodes[i] for i in (0, 1, 3, 6)), 7]
    want = run(model, cache, SequenceRows(list(range(60, 64)), 0, chain(26), 0, whole))
    torch.testing.assert_close(got[0], want[-1], atol=TOLERANCE, rtol=0)


def test_sequences_in_one_batch_do_not_see_each_other(tiny: tuple[ModelConfig, TensorSource]) -> None:
    # A long chunk, a tree, plain decoding and a grown tree; pages from one shuffled pool.
    contexts = [prompt(n, seed=n) for n in (3, 21, 40, 12)]
    trees = [chain(80), TREE, [0], TREE]
    cached = [0, 0, 0, 3]
    pool = scattered_pages(512)
    model, cache = load(*tiny)
    alone, together = [], []
    for context, parents, num_cached in zip(contexts, trees, cached, strict=True):
        num_pages = -(-(len(context) + len(parents)) // PAGE)
        pages, pool = pool[:num_pages], pool[num_pages:]
        nodes = prompt(len(parents), seed=9)
        run(model, cache, SequenceRows(pages, 0, chain(len(context)), 0, context))
        if num_cached:
            first = SequenceRows(pages, len(context), parents[:num_cached], 0, nodes[:num_cached])
            run(model, cache, first)
        together.append(SequenceRows(pages, len(context), parents, num_cached, nodes[num_cached:]))
        alone.append(run(model, cache, together[-1]))
    got = run(model, cache, *together)
    torch.testing.assert_close(got, torch.cat(alone), atol=TOLERANCE, rtol=0)


def test_logits_of_some_rows_are_those_rows_of_all(tiny: tuple[ModelConfig, TensorSource]) -> None:
    model, cache = load(*tiny)
    batch = batch_of([SequenceRows([0, 1], 0, chain(10), 0, prompt(10))], PAGE, CPU)
    hidden = model.forward(batch, cache).last
    assert hidden.shape == (10, tiny[0].hidden_size)
    torch.testing.assert_close(model.logits(hidden[[9, 2]]), model.logits(hidden)[[9, 2]], atol=1e-5, rtol=0)


def test_layers_may_differ_in_their_rotary_positions(tiny: tuple[ModelConfig, TensorSource]) -> None:
    """As in models that stretch full layers only. No transformers model of these families does: checked by parts."""
    config, source = tiny
    tokens = prompt(90)
    rows = SequenceRows(scattered_pages(90), 0, chain(90), 0, tokens)

    def taps(*ropes: Rope) -> torch.Tensor:
        layers = tuple(replace(layer, rope=rope) for layer, rope in zip(config.layers, ropes, strict=True))
        model, cache = load(replace(config, layers=layers), source)
        hidden = model.forward(batch_of([rows], PAGE, CPU), cache, taps=(1,))
        return torch.stack([hidden.taps[1], hidden.last])

    plain, yarn, mixed = taps(ROPES[0], ROPES[0]), taps(ROPES[3], ROPES[3]), taps(ROPES[0], ROPES[3])
    assert torch.equal(mixed[0], plain[0])
    assert not torch.allclose(mixed[1], plain[1], atol=TOLERANCE)
    assert not torch.allclose(mixed[1], yarn[1], atol=TOLERANCE)


def test_bfloat16_follows_float32(tiny: tuple[ModelConfig, TensorSource]) -> None:
    config, source = tiny
    model, cache = load(config, source)
    plan = ShardPlan(config, 0, 1)
    low = Transformer(load_weights(plan, source, torch.bfloat16, CPU, True), SoloCommunicator())
    low_cache = PagedCache(config, plan, 64, PAGE, torch.bfloat16, CPU)
    rows = SequenceRows(scattered_pages(90), 0, chain(90), 0, prompt(90))
    want, got = run(model, cache, rows), run(low, low_cache, rows)
    assert got.dtype == torch.float32
    # 8 bits of mantissa through two layers: a few hundredths of the spread of the logits.
    assert (got - want).std() < 0.05 * want.std()


def test_every_weight_is_read_once_and_reported(tiny: tuple[ModelConfig, TensorSource]) -> None:
    config, tensors = tiny
    source = TensorSource(
        config,
        {name: tensors.read(name, slice(None), slice(None), torch.float32) for name in tensors.names()},
    )
    reported: list[int] = []
    load_weights(ShardPlan(config, 0, 1), source, torch.float32, CPU, True, reported.append)
    assert {name for name, _ in source.reads} == source.names()
    assert sum(numel for _, numel in source.reads) * 4 == source.total_bytes(torch.float32)
    assert sum(reported) == source.total_bytes(torch.float32)
