import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.kernels.tree_batch import TreeBatch
from outrider.workers.model.batch import ancestor_masks, depths_of
from support.rows import SequenceRows, batch_of, chain

CPU = torch.device("cpu")


def mask_of(tree: TreeBatch, width: int) -> list[list[int]]:
    """Ancestor bits as rows of 0 and 1."""
    return [
        [(int(words[column // 64]) >> (column % 64)) & 1 for column in range(width)]
        for words in tree.ancestors.tolist()
    ]


def test_a_tree_as_zeros_and_ones() -> None:
    #        0
    #       / \
    #      1   2
    #     / \   \
    #    3   4   5
    #    |
    #    6
    batch = batch_of([SequenceRows([7, 3], 5, [0, 0, 0, 1, 1, 2, 3], 0, list(range(10, 17)))], 8, CPU)
    assert mask_of(batch.tree, 7) == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 0, 1, 0, 0, 1, 0],
        [1, 1, 0, 1, 0, 0, 1],
    ]
    assert batch.tree.depths.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert batch.positions.tolist() == [5, 6, 6, 7, 7, 7, 8]
    # Rows 0, 1, 2 fill page 7 from offset 5; the rest goes to page 3.
    assert batch.kv_rows.tolist() == [61, 62, 63, 24, 25, 26, 27]
    assert batch.tokens.tolist() == list(range(10, 17))


def test_a_grown_tree_sends_only_its_new_rows() -> None:
    rows = SequenceRows([0], 2, [0, 0, 0, 1, 2], 3, [40, 50])
    batch = batch_of([rows], 8, CPU)
    assert mask_of(batch.tree, 5) == [[1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
    assert batch.positions.tolist() == [4, 4]
    assert batch.kv_rows.tolist() == [5, 6]
    assert batch.tree.tree_lens.tolist() == [5]
    assert batch.tree.host_query_lens == (2,)


def test_sequences_lie_back_to_back() -> None:
    chunk = SequenceRows([4, 5], 0, chain(3), 0, [1, 2, 3])
    plain = SequenceRows([9], 3, [0], 0, [8])
    batch = batch_of([chunk, plain], 4, CPU)
    tree = batch.tree
    assert tree.query_indptr.tolist() == [0, 3, 4]
    assert tree.context_lens.tolist() == [0, 3]
    assert tree.page_table.tolist() == [[4, 5], [9, 0]]
    assert mask_of(tree, 3) == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch.positions.tolist() == [0, 1, 2, 3]
    assert batch.kv_rows.tolist() == [16, 17, 18, 39]


def test_trees_above_64_rows_take_more_words() -> None:
    parents = [0, *([0] * 63), 63, 64]  # row 64 hangs from row 63, row 65 from row 64
    batch = batch_of([SequenceRows([0], 0, parents, 0, [0] * 66)], 128, CPU)
    assert batch.tree.ancestors.shape == (66, 2)
    assert batch.tree.ancestors.dtype == torch.int64
    assert mask_of(batch.tree, 66)[65] == [1] + 62 * [0] + [1, 1, 1]


def test_dtypes_are_those_of_the_kernels() -> None:
    batch = batch_of([SequenceRows([0], 0, [0], 0, [0])], 4, CPU)
    tree = batch.tree
    int32 = (tree.page_table, tree.context_lens, tree.tree_lens, tree.query_indptr, tree.depths)
    assert {t.dtype for t in int32} == {torch.int32}
    assert {t.dtype for t in (batch.tokens, batch.positions, batch.kv_rows)} == {torch.int64}


def test_a_long_chunk_is_a_chain_of_many_words() -> None:
    rows = SequenceRows(list(range(128)), 0, chain(2048), 0, [0] * 2048)
    batch = batch_of([rows], 16, CPU)
    assert batch.positions.tolist() == list(range(2048))
    assert batch.tree.ancestors[2047].tolist() == [-1] * 32  # all 64 bits of every word
    assert batch.tree.ancestors[64].tolist() == [-1, 1] + [0] * 30


@given(st.lists(st.lists(st.integers(0, 10**6), max_size=150), min_size=1, max_size=4))
def test_masks_of_any_forest_are_its_paths(choices: list[list[int]]) -> None:
    # Trees of any shape, back to back: every row's bits are those met on the way to its root.
    parents, bits, paths = [], [], []
    for choice in choices:
        first, own = len(parents), {0: {0}}
        parents.append(first)
        for row, number in enumerate(choice, 1):
            parent = number % row
            own[row] = own[parent] | {row}
            parents.append(first + parent)
        bits += range(len(own))
        paths += own.values()
    masks = ancestor_masks(np.array(parents), np.array(bits), num_words=3)
    found = [{bit for bit in range(192) if int(words[bit // 64]) >> bit % 64 & 1} for words in masks]
    assert found == paths
    assert depths_of(masks).tolist() == [len(path) - 1 for path in paths]


def test_rows_without_pages_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="too few pages"):
        batch_of([SequenceRows([0], 2, chain(3), 0, [1, 2, 3])], 4, CPU)
