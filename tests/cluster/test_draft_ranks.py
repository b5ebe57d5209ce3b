"""How a DraftWorker hears of what became of the drafter's further ranks; calls of Ray are played by hand."""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError

from outrider.cluster import draft_ranks
from outrider.cluster.draft_ranks import DraftRanks
from outrider.configs.loader import load_config
from outrider.workers.link.lost import RankLostError
from support.waiting import wait_until


@dataclass
class Call:
    """What a call will give; nothing yet where it has not `come`."""

    result: Any = None
    come: bool = True


@dataclass
class Rank:
    """`rank.method.remote(...)` is the Call of that name."""

    calls: dict[str, Call] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return type("Method", (), {"remote": lambda *arguments: self.calls.setdefault(name, Call([]))})


def wait(calls: list[Call], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[Call], list[Call]]:
    come = [call for call in calls if call.come]
    if len(come) < num_returns:
        time.sleep(min(timeout, 0.01))
    return come, [call for call in calls if not call.come]


def get(call: Call) -> Any:
    if isinstance(call.result, Exception):
        raise call.result
    return call.result


class Played:
    """Two further ranks; losses that were told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray, "wait", wait)
        monkeypatch.setattr(ray, "get", get)
        monkeypatch.setattr(ray.util, "get_current_placement_group", lambda: None)
        monkeypatch.setattr(draft_ranks, "_PERIOD_S", 0.01)
        config = load_config("tiny-random", ["draft.tp_size=3", "cluster.heartbeat_timeout_s=0.1"])
        self.ranks = DraftRanks(config, ())
        self.one, self.two = Rank(), Rank()
        self.ranks._ranks = {"draft 1": self.one, "draft 2": self.two}
        self.losses: list[str] = []

    def load(self) -> None:
        self.ranks.load(self.losses.append)

    def follow(self) -> None:
        for rank in (self.one, self.two):
            rank.calls["follow"] = Call(come=False)
        self.ranks.follow("host", 1)

    def loss(self) -> str:
        wait_until(lambda: bool(self.losses) and not watchers(), 20.0)
        (loss,) = self.losses
        return loss


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "draft ranks"]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(monkeypatch)


def test_what_a_rank_cannot_load_is_the_users_to_know(played: Played) -> None:
    refusal = ValueError("draft.model must be something else")
    played.two.calls["load"] = Call(RayTaskError("load", "", refusal))
    played.load()
    with pytest.raises(ValueError, match=r"^draft\.model must be something else$"):
        played.ranks.wait_until_loaded()
    played.two.calls["load"].result = RayTaskError("load", "", MemoryError("none left\nat all"))
    with pytest.raises(RankLostError, match=r"^draft 2 failed during load: MemoryError: none left$"):
        played.ranks.wait_until_loaded()
    played.follow()
    played.one.calls["follow"].come = played.two.calls["follow"].come = True
    wait_until(lambda: not watchers(), 20.0)
    assert not played.losses  # all have ended in order


def test_a_rank_that_dies_or_fails_is_told_of_at_once(played: Played) -> None:
    played.load()
    played.ranks.wait_until_loaded()
    played.follow()
    played.one.calls["follow"] = played.ranks._following["draft 1"]
    played.one.calls["follow"].result = ActorDiedError()
    played.one.calls["follow"].come = True
    assert played.loss() == "draft 1 died during run: its process is gone"


def test_a_rank_that_is_silent_is_told_of_once_it_ought_to_answer(played: Played) -> None:
    played.one.calls["progress"] = Call(["loading"])
    played.load()
    wait_until(lambda: played.ranks.progress() == ["loading"], 20.0)
    played.two.calls["progress"].come = False
    time.sleep(0.3)
    assert not played.losses  # it may compute
    played.ranks.are_up()
    assert played.loss().startswith("draft 2 did not answer for 0.1 s")
