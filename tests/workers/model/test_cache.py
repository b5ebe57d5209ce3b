import torch

from outrider.kernels.launch_plans import MAX_COMMIT_ROWS
from outrider.workers.model.cache import PagedCache
from outrider.workers.model.shard import ShardPlan, bytes_per_page
from support.tensor_source import tiny_config


def test_a_page_costs_what_it_is_said_to_cost() -> None:
    config = tiny_config(num_heads=9, num_kv_heads=3)
    for rank in (0, 1):
        plan = ShardPlan(config, rank, 2)
        cache = PagedCache(config, plan, 10, 16, torch.bfloat16, torch.device("cpu"))
        assert cache.kv.nbytes == 10 * bytes_per_page(plan, 2, 16)
        assert cache.num_pages == 10


def test_layers_and_commit_share_one_memory() -> None:
    config = tiny_config()
    cache = PagedCache(config, ShardPlan(config, 0, 1), 2, 4, torch.float32, torch.device("cpu"))
    cache.keys(1)[1, 2] = 3.0
    cache.values(0)[1, 2] = 4.0
    cache.commit(torch.tensor([6]), torch.tensor([1]))
    assert (cache.keys(1)[0, 1] == 3.0).all()
    assert (cache.values(0)[0, 1] == 4.0).all()
    assert (cache.keys(0)[0, 1] == 0.0).all()


def test_more_rows_than_the_kernel_takes_are_moved_without_it() -> None:
    config, count = tiny_config(), MAX_COMMIT_ROWS + 1
    cache = PagedCache(
        config, ShardPlan(config, 0, 1), count + 1, 1, torch.float32, torch.device("cpu"), use_kernel=True
    )
    cache.keys(0)[:, 0, 0, 0] = torch.arange(count + 1.0)
    cache.commit(torch.arange(1, count + 1), torch.arange(count))
    assert cache.keys(0)[:count, 0, 0, 0].tolist() == list(range(1, count + 1))
