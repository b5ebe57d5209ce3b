"""What ranks agree on before they serve."""

import warnings

import pytest

from outrider.configs.loader import load_config
from outrider.kernels.selection import ENTRIES, REFERENCES, KernelSelection
from outrider.workers import target as target_module
from outrider.workers.link.communicator import Communicator, SoloCommunicator, agreed
from outrider.workers.setup import agreed_kernels
from outrider.workers.target import TargetWorker
from outrider.workers.weights.progress import silent
from support.thread_group import run_ranks, thread_group

ALL = KernelSelection.of(ENTRIES)


def test_a_yes_is_one_of_every_rank() -> None:
    answers = ([True, True, False], [True, False, False], [True, True, True])
    assert run_ranks(3, lambda rank: agreed(rank, answers[rank.rank])) == [[True, False, False]] * 3
    assert agreed(SoloCommunicator(), [True, False]) == [True, False]


@pytest.mark.filterwarnings("ignore:.*will not be used")
def test_a_kernel_that_failed_on_one_rank_is_used_by_none() -> None:
    without_two = KernelSelection.of([e for e in ENTRIES if e not in ("tree_attention", "sample_shard")])
    selections = (ALL, without_two, KernelSelection.of([e for e in ENTRIES if e != "kv_commit"]))
    expected = KernelSelection.of(("rope_append", "gather_rows"))
    assert run_ranks(3, lambda rank: agreed_kernels(selections[rank.rank], rank)) == [expected] * 3


def test_only_a_rank_that_loses_a_kernel_says_so() -> None:
    selections = (ALL, REFERENCES)
    with pytest.warns(
        UserWarning, match="tree_attention, .*gather_rows will not be used: not every rank"
    ) as said:
        run_ranks(2, lambda rank: agreed_kernels(selections[rank.rank], rank))
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert agreed_kernels(ALL, SoloCommunicator()) == ALL


@pytest.mark.filterwarnings("ignore:.*will not be used")
def test_target_workers_use_what_all_of_them_may(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("tiny-random", ["target.tp_size=2"])
    workers = [TargetWorker(config, rank) for rank in range(2)]
    for worker, selection in zip(workers, (ALL, KernelSelection.of(["gather_rows"])), strict=True):
        monkeypatch.setattr(target_module, "kernels_for", lambda *_, chosen=selection: chosen)
        worker.load(silent)
    monkeypatch.setattr(target_module, "Link", lambda *_: None)
    monkeypatch.setattr(target_module, "connect_store", lambda *_: None)

    def join(store: object, epoch: int, rank: int, *_: object) -> Communicator:
        return communicators[rank]

    monkeypatch.setattr(target_module, "join_group", join)
    communicators = thread_group(2)
    host, port = workers[0].open_store("127.0.0.1")
    run_ranks(2, lambda rank: workers[rank.rank].connect(host, port, 1))
    for worker in workers:
        assert worker._rank.model.kernels == KernelSelection.of(["gather_rows"])
        assert not worker._rank._cache.use_kernel
