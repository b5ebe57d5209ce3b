from itertools import pairwise

import pytest

from outrider.workers.model.shard import ShardPlan
from support.tensor_source import tiny_config


def plans(size: int, **config: int) -> list[ShardPlan]:
    return [ShardPlan(tiny_config(**config), rank, size) for rank in range(size)]


def test_nine_query_heads_on_two_ranks() -> None:
    first, second = plans(2, num_heads=9, num_kv_heads=3)
    assert list(first.query_heads) == [0, 1, 2, 3, 4]
    assert list(first.kv_heads) == [0, 1]
    assert first.queries_per_kv_head == 3
    assert first.query_places == (0, 1, 2, 3, 4)  # [0 1 2 | 3 4 .]
    assert list(second.query_heads) == [5, 6, 7, 8]
    assert list(second.kv_heads) == [1, 2]
    assert second.query_places == (0, 3, 4, 5)  # [5 . . | 6 7 8]


def test_fourteen_query_heads_and_two_kv_heads_on_three_ranks() -> None:
    ranks = plans(3, num_heads=14, num_kv_heads=2)
    assert [list(plan.kv_heads) for plan in ranks] == [[0], [0, 1], [1]]
    assert [plan.queries_per_kv_head for plan in ranks] == [5, 3, 4]
    assert ranks[1].query_places == (0, 1, 3, 4, 5)  # heads 5 6 . | 7 8 9


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (4, 2), (14, 2), (8, 8), (4, 1)])
def test_every_head_column_and_token_has_one_owner(size: int, num_heads: int, num_kv_heads: int) -> None:
    ranks = plans(
        size, num_heads=num_heads, num_kv_heads=num_kv_heads, intermediate_size=1100, vocab_size=301
    )
    for ranges, total in (
        ([plan.query_heads for plan in ranks], num_heads),
        ([plan.mlp_columns(1100) for plan in ranks], 1100),
        ([plan.vocab for plan in ranks], 301),
    ):
        assert ranges[0].start == 0
        assert ranges[-1].stop == total
        assert all(a.stop == b.start for a, b in pairwise(ranges))
        assert all(len(r) > 0 for r in ranges)
    for plan in ranks:
        group = num_heads // num_kv_heads
        for head, place in zip(plan.query_heads, plan.query_places, strict=True):
            assert plan.kv_heads[place // plan.queries_per_kv_head] == head // group
        assert len(set(plan.query_places)) == len(plan.query_heads)


def test_mlp_blocks_of_128_where_the_model_has_enough() -> None:
    assert [len(plan.mlp_columns(1536)) for plan in plans(3)] == [512, 512, 512]
    assert [len(plan.mlp_columns(8960)) for plan in plans(2)] == [4480, 4480]
    assert [len(plan.mlp_columns(8960)) % 128 for plan in plans(3)] == [0, 0, 0]


def test_more_ranks_than_query_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target\.tp_size must be at most 4 .* got 5"):
        ShardPlan(tiny_config(num_heads=4), 0, 5)
