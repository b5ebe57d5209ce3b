"""The reference attention against one softmax per query, written out, in float64."""

import pytest
import torch

from outrider.kernels.attention_plan import MAX_FOLDED_QUERIES
from outrider.kernels.tree_attention import tree_attention
from support.rows import SequenceRows, batch_of, chain

CPU = torch.device("cpu")
HK, G, D = 2, 3, 8
SCALE = D**-0.5


def path(parents: list[int], row: int) -> list[int]:
    """Rows from the root to `row`."""
    rows = [row]
    while rows[0] != 0:
        rows.insert(0, parents[rows[0]])
    return rows


def expected(q, k_pages, v_pages, sequences, page_size, window=0, soft_cap=0.0):
    """Straight from the definition: each query sees the context and its own path."""
    keys = k_pages.reshape(-1, *k_pages.shape[2:]).double()
    values = v_pages.reshape(-1, *v_pages.shape[2:]).double()
    out, row_of_q = [], 0
    for rows in sequences:

        def slot(i, pages=rows.pages):
            return pages[i // page_size] * page_size + i % page_size

        for row in range(rows.num_cached, len(rows.parents)):
            on_path = path(rows.parents, row)
            position = rows.context_len + len(on_path) - 1
            seen = [(i, i) for i in range(rows.context_len)]
            seen += [(rows.context_len + r, rows.context_len + depth) for depth, r in enumerate(on_path)]
            if window:
                seen = [(i, at) for i, at in seen if position - at < window]
            slots = [slot(i) for i, _ in seen]
            for head in range(q.shape[1]):
                kv_head = head // (q.shape[1] // keys.shape[1])
                scores = keys[slots, kv_head] @ q[row_of_q, head].double() * SCALE
                if soft_cap:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                out.append(scores.softmax(0) @ values[slots, kv_head])
            row_of_q += 1
    return torch.stack(out).view(q.shape)


def run(sequences, page_size=4, num_pages=64, window=0, soft_cap=0.0, seed=0):
    """Attention over a cache whose other rows hold NaN, and what it should be."""
    generator = torch.Generator().manual_seed(seed)
    k_pages = torch.full((num_pages, page_size, HK, D), float("nan"))
    v_pages = k_pages.clone()
    for rows in sequences:
        for i in range(rows.context_len + len(rows.parents)):
            page, offset = rows.pages[i // page_size], i % page_size
            # Large keys: a mask that lets one key too many through shows.
            k_pages[page, offset] = 3 * torch.randn(HK, D, generator=generator)
            v_pages[page, offset] = torch.randn(HK, D, generator=generator)
    num_queries = sum(len(rows.tokens) for rows in sequences)
    q = torch.randn(num_queries, HK * G, D, generator=generator)
    batch = batch_of(sequences, page_size, CPU)
    got = tree_attention(q, k_pages, v_pages, batch.tree, SCALE, window, soft_cap)
    want = expected(q, k_pages, v_pages, sequences, page_size, window, soft_cap)
    return got, want


def rows_of(pages, context_len, parents, num_cached=0):
    return SequenceRows(pages, context_len, parents, num_cached, [0] * (len(parents) - num_cached))


def assert_close(got, want):
    # float32 against float64 with scores up to about 30: seen up to 3e-6.
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)


BRANCHY = [0, 0, 0, 1, 1, 2, 3, 6]


@pytest.mark.parametrize(
    "sequences",
    [
        pytest.param([rows_of([5], 0, [0])], id="first token, no context"),
        pytest.param([rows_of([5, 2, 9], 7, [0])], id="plain decoding"),
        pytest.param([rows_of([5, 2, 9, 1], 7, BRANCHY)], id="one tree, scattered pages"),
        pytest.param([rows_of([3, 4, 5, 6], 7, BRANCHY)], id="one tree, consecutive pages"),
        pytest.param([rows_of([5, 2, 9, 1], 7, BRANCHY, num_cached=3)], id="a tree that grew"),
        pytest.param([rows_of([7, 3], 3, chain(5))], id="short chain"),
        pytest.param([rows_of(list(range(30)), 9, chain(MAX_FOLDED_QUERIES + 20))], id="long chain"),
        pytest.param([rows_of(list(range(30)), 0, [max(0, i - 3) for i in range(90)])], id="two mask words"),
        pytest.param(
            [rows_of([5, 2, 9], 7, [0]), rows_of([1, 3], 2, [0]), rows_of([8], 0, [0])],
            id="plain decoding of three",
        ),
        pytest.param(
            [rows_of([5, 2, 9, 1], 7, BRANCHY), rows_of([11, 3], 4, [0]), rows_of([8], 1, [0, 0, 0])],
            id="trees of different sizes",
        ),
        pytest.param(
            [
                rows_of([60, 61], 3, [0, 0]),
                rows_of(list(range(30)), 9, chain(MAX_FOLDED_QUERIES + 20)),
                rows_of([35, 34, 33, 32, 31, 30], 20, [0, 0, 1]),
                rows_of([40, 41], 2, [0, 0, 0, 2], num_cached=2),
            ],
            id="a prompt chunk between trees",
        ),
    ],
)
def test_each_query_attends_to_its_prefix_and_its_path(sequences) -> None:
    assert_close(*run(sequences))


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_any_page_size(page_size: int) -> None:
    pages = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    sequences = [rows_of(pages[:20], 9, BRANCHY), rows_of(pages[20:], 3, [0, 0])]
    assert_close(*run(sequences, page_size=page_size))


def test_window_counts_depth_not_rows() -> None:
    # Context x0 x1 x2, tree a(root) with children b and c, d below b: rows a b c d at positions 3 4 4 5.
    # With a window of 3, d at position 5 sees positions 3 4 5: a, b, d. Counting rows (d is row 3, so
    # "position" 6) would lose a; c is no ancestor.
    parents = [0, 0, 0, 1]
    batch = batch_of([rows_of([0, 1], 3, parents)], 4, CPU)
    group = batch.tree.plan.groups[0]
    mask = group.mask(window=3, repeat=1, dtype=torch.float32)[0, 0]
    by_hand = torch.tensor(
        [
            # x0 x1 x2 a  b  c  d
            [0, 1, 1, 1, 0, 0, 0],  # a
            [0, 0, 1, 1, 1, 0, 0],  # b
            [0, 0, 1, 1, 0, 1, 0],  # c
            [0, 0, 0, 1, 1, 0, 1],  # d
        ]
    )
    assert torch.equal((mask == 0).int(), by_hand.int())
    assert_close(*run([rows_of([0, 1], 3, parents)], window=3))


def test_window_smaller_than_the_tree_and_larger_than_the_context() -> None:
    sequences = [rows_of(list(range(8)), 9, chain(12)), rows_of([20, 21], 2, BRANCHY[:5])]
    for window in (1, 2, 5, 100):
        assert_close(*run(sequences, window=window))


def test_soft_cap_bends_the_scores() -> None:
    assert_close(*run([rows_of([5, 2, 9, 1], 7, BRANCHY)], soft_cap=2.0))


def test_sequences_of_very_different_length_are_not_padded_to_the_longest() -> None:
    short = [rows_of([2 * i, 2 * i + 1], 3, [0]) for i in range(8)]
    batch = batch_of([*short, rows_of(list(range(20, 60)), 150, [0])], 4, CPU)
    assert sorted(group.num_sequences for group in batch.tree.plan.groups) == [1, 8]
    gathered = sum(group.num_sequences * group.num_keys for group in batch.tree.plan.groups)
    assert gathered == 8 * 4 + 151
