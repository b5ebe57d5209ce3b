"""The drafter's further ranks as processes, which hear through a store where rank 0 is."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from outrider.configs.schema import Config
from outrider.workers.draft_rank import DraftRank
from outrider.workers.first_gpu.processes import WorkerProcess
from outrider.workers.link.distributed import connect_store, open_store
from outrider.workers.weights.progress import silent

HOST = "127.0.0.1"
_LIMIT_S = 60.0


@dataclass(frozen=True)
class AnnouncedRanks:
    """`OtherRanks` that have loaded, and wait at a store."""

    port: int
    host: str = HOST

    def wait_until_loaded(self) -> None:
        pass

    def follow(self, host: str, port: int) -> None:
        connect_store(HOST, self.port, _LIMIT_S).set("rank 0", f"{host} {port}")


class AnnouncedRank(DraftRank):
    """Goes where rank 0 is."""

    def follow_announced(self, port: int) -> None:
        host, its_port = connect_store(HOST, port, _LIMIT_S).get("rank 0").decode().split()
        self.follow(host, int(its_port))


@dataclass
class RankProcesses:
    """ranks: from rank 1 on; runs: of their loops."""

    others: AnnouncedRanks
    ranks: list[WorkerProcess]
    runs: list[Future[None]]


@contextmanager
def draft_ranks(config: Config) -> Iterator[RankProcesses]:
    """Loaded, and gone when the block ends."""
    store = open_store(HOST, _LIMIT_S)
    ranks = [WorkerProcess(AnnouncedRank, config, rank) for rank in range(1, config.draft.tp_size)]
    try:
        for loading in [rank.begin("load", silent) for rank in ranks]:
            loading.result(_LIMIT_S)
        runs = [rank.begin("follow_announced", store.port) for rank in ranks]
        yield RankProcesses(AnnouncedRanks(store.port), ranks, runs)
    finally:
        for rank in ranks:
            rank.kill()
