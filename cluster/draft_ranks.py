"""The drafter's further ranks (`draft.tp_size`): actors that belong to the DraftWorker's, and end with it.

Ray ends an actor with the process that created it. So whoever starts, ends or replaces the DraftWorker need not know
of them; a rank that is lost is the DraftWorker's loss.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from outrider.cluster.actor_process import (
    CONCURRENCY_GROUPS,
    ProgressBoard,
    in_place,
    own_gpus,
    use_threads,
    whereabouts,
)
from outrider.cluster.api import Progress
from outrider.cluster.placement import Place
from outrider.configs.schema import Config
from outrider.workers.link.lost import RankLostError

_PERIOD_S = 0.2
_ANSWER_S = 2.0


class DraftRankActor:
    """One of them."""

    def __init__(self, config: Config, rank: int) -> None:
        use_threads(config.draft.num_threads)

        from outrider.workers.draft_rank import DraftRank

        self._rank = DraftRank(config, rank, own_gpus())
        self._board = ProgressBoard(f"draft {rank}")

    def load(self) -> None:
        self._rank.load(self._board.report)

    @ray.method(concurrency_group="loop")
    def follow(self, host: str, port: int) -> None:
        self._rank.follow(host, port)

    @ray.method(concurrency_group="control")
    def progress(self) -> list[Progress]:
        return self._board.read()

    @ray.method(concurrency_group="control")
    def stats(self) -> dict[str, Any]:
        return {**self._rank.stats(), **whereabouts()}

    @ray.method(concurrency_group="control")
    def trace_events(self) -> list[dict[str, Any]]:
        return self._rank.trace_events()


class DraftRanks:
    """`OtherRanks` of a DraftWorker, in its process. They are watched from `load` on, by a thread."""

    def __init__(self, config: Config, places: Sequence[Place]) -> None:
        """Creates them. places: of the ranks from 1 on, in the group that this process is in."""
        self._config = config
        group: Any = ray.util.get_current_placement_group()
        remote: Any = ray.remote  # its types do not know concurrency_groups
        rank_actor = remote(concurrency_groups=CONCURRENCY_GROUPS)(DraftRankActor)
        self._ranks: dict[str, Any] = {}  # by name
        for rank, place in enumerate(places, start=1):
            options = in_place(group, place)
            self._ranks[f"draft {rank}"] = rank_actor.options(**options).remote(config, rank)
        self._loads: list[Any] = []
        self._following: dict[str, Any] = {}
        self._stages: dict[str, list[Progress]] = {}
        # As long as a start takes, what computes may keep a process from answering.
        self._patience_s = config.cluster.start_timeout_s

    @property
    def host(self) -> str:
        """An address of this node."""
        return ray.util.get_node_ip_address()

    def load(self, lose: Callable[[str], None]) -> None:
        """Lets them load; does not wait. lose: told why one of them is lost."""
        self._loads = [rank.load.remote() for rank in self._ranks.values()]
        if self._ranks:
            watch = threading.Thread(target=self._watch, args=(lose,), name="draft ranks", daemon=True)
            watch.start()

    def wait_until_loaded(self) -> None:
        """Raises ValueError of a rank, or RankLostError."""
        for name, load in zip(self._ranks, self._loads, strict=True):
            _result(name, "load", load)

    def follow(self, host: str, port: int) -> None:
        """Lets all meet rank 0 there; does not wait."""
        self._following = {name: rank.follow.remote(host, port) for name, rank in self._ranks.items()}

    def are_up(self) -> None:
        """They have met: from now on they answer at once."""
        self._patience_s = self._config.cluster.heartbeat_timeout_s

    def progress(self) -> list[Progress]:
        """What each last said."""
        return [stage for stages in list(self._stages.values()) for stage in stages]

    def answers(self, method: str) -> dict[str, Any]:
        """Of those that answer in seconds, by name."""
        calls = {name: getattr(rank, method).remote() for name, rank in self._ranks.items()}
        if calls:
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=_ANSWER_S)
        answers = {}
        for name, call in calls.items():
            with suppress(RayError):  # the watch says what became of it
                if _has_come(call):
                    answers[name] = ray.get(call)
        return answers

    def _watch(self, lose: Callable[[str], None]) -> None:
        """Until one is lost, or all have ended in order."""
        silent_s = dict.fromkeys(self._ranks, 0.0)
        asked = {name: rank.progress.remote() for name, rank in self._ranks.items()}
        try:
            while not self._have_ended():
                for name, call in list(asked.items()):
                    silent_s[name] += _PERIOD_S  # however long this process was kept from running
                    if _has_come(call):
                        self._stages[name], silent_s[name] = _result(name, "run", call), 0.0
                        asked[name] = self._ranks[name].progress.remote()
                    elif silent_s[name] > self._patience_s:
                        raise RankLostError(
                            f"{name} did not answer for {self._patience_s:g} s: stopped, or on a node that is gone"
                        )
        except (RankLostError, ValueError) as error:
            lose(str(error))

    def _have_ended(self) -> bool:
        """Waits a little for that. Raises RankLostError."""
        following, begun_s = dict(self._following), time.monotonic()
        ended = False
        if following:
            ended = bool(ray.wait(list(following.values()), timeout=_PERIOD_S)[0])
        if not ended:
            time.sleep(max(0.0, begun_s + _PERIOD_S - time.monotonic()))
        for name, call in following.items():
            if _has_come(call):
                _result(name, "run", call)
        return ended


def _has_come(call: Any) -> bool:
    return bool(ray.wait([call], timeout=0)[0])


def _result(name: str, doing: str, call: Any) -> Any:
    """Of a rank's call. ValueErrors pass; all else becomes a RankLostError of one line."""
    try:
        return ray.get(call)
    except RayActorError as error:
        raise RankLostError(f"{name} died during {doing}: its process is gone") from error
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ValueError):
            raise cause from None
        lines = str(cause).strip().splitlines() or ["no message"]
        raise RankLostError(f"{name} failed during {doing}: {type(cause).__name__}: {lines[0]}") from error
