"""A draft model of several ranks computes what one of a single rank does, whatever became of trees and pages."""

import random

import numpy as np
import pytest
import torch

from outrider.workers.drafting.model_ranks import LeadingRank, ModelRank, follow
from outrider.workers.drafting.rank_messages import PageNews, RankCommit, RankForward, RankStop, decode
from outrider.workers.drafting.row_cache import chains
from outrider.workers.link.communicator import Communicator
from outrider.workers.link.lost import PeerLostError, RankLostError
from outrider.workers.sequences.page_tables import PageTables
from outrider.workers.timing import Stretches
from outrider.workers.trace import Tracer
from support.drafting_model import VOCAB, Drafting, cache_of, model_on
from support.thread_group import run_ranks, thread_group

NUM_PAGES, PAGE_SIZE, NUM_SLOTS = 40, 4, 4


def follower(communicator: Communicator) -> int:
    """Its steps."""
    model, tracer = model_on(communicator), Tracer("draft 1", True)
    rank = ModelRank(model, cache_of(NUM_PAGES, PAGE_SIZE, model))
    follow(rank, NUM_SLOTS, PAGE_SIZE, Stretches(model.device, tracer))
    return sum(event["name"] == "forward" for event in tracer.events())


def play(communicator: Communicator, seed: int) -> int:
    """Rank 0: sequences come, draft, are told what the target says, and go; every row of every step is compared with
    a forward of one rank over its whole text. Pages go from one sequence to another. Returns its steps."""
    drafting = Drafting(NUM_PAGES, PAGE_SIZE, model=model_on(communicator))
    assert isinstance(drafting.model._rank, LeadingRank)
    drafting.model.time_step(5)
    dice = random.Random(seed)
    system = [dice.randrange(VOCAB) for _ in range(13)]
    for _ in range(30):
        if len(drafting.running) < NUM_SLOTS and dice.random() < 0.4:
            drafting.start([*system[: dice.choice([0, 13])], *(dice.randrange(VOCAB) for _ in range(9))])
        if drafting.running and dice.random() < 0.15:
            drafting.finish(dice.choice(drafting.running))
        both = np.array(drafting.running, dtype=np.int64)
        while len(both) and len(drafting.engine.unread(drafting.model, both)):
            if not drafting.engine.read(drafting.model, both):
                break
        for _ in range(2 if drafting.running else 0):
            drafting.step()
        for slot in drafting.running:
            nodes = range(1, int(drafting.trees.num_nodes[slot]))
            sent = [node for node in nodes if drafting.trees.parents[slot, node] == 0]
            said = {0: drafting.children(slot)[0]} if drafting.children(slot) and dice.random() < 0.7 else {}
            drafting.verdict(slot, sent, said)
    assert drafting.num_rows_checked > 100
    drafting.model.close()
    return drafting.forward.num_calls


@pytest.mark.parametrize("size", [2, 3, 4])
def test_rows_and_logits_of_several_ranks_are_those_of_one(size: int) -> None:
    num_calls = run_ranks(size, lambda c: follower(c) if c.rank else play(c, seed=size))
    assert len(set(num_calls)) == 1  # and all have made every step


def test_a_step_without_its_ranks_says_that_one_is_lost() -> None:
    leading, other = thread_group(2)
    model = model_on(leading)
    rank = LeadingRank(model, cache_of(NUM_PAGES, PAGE_SIZE, model), NUM_SLOTS)
    other.abort()
    with pytest.raises(RankLostError, match="the drafter lost one of its ranks: another rank gave up"):
        rank.commit(np.array([1]), np.array([0]))
    assert not issubclass(RankLostError, PeerLostError)  # of which nobody would be to blame
    rank.close()  # without a complaint


def test_messages_come_out_as_they_went_in() -> None:
    rng = np.random.default_rng(0)
    rows = chains(np.array([3, 0]), np.array([70, 4]), np.array([66, 2]), rng.integers(0, 2**31 - 1, 68))
    pages = ((3, 17, np.array([5, 2**31 - 1])), (0, 1, np.array([], dtype=np.int64)))
    for wanted in (np.array([67, 3]), np.array([], dtype=np.int64)):
        said = decode(RankForward(rows, wanted, pages).encoded().numpy())
        assert isinstance(said, RankForward)
        for name, value in rows._asdict().items():
            assert getattr(said.rows, name).dtype == value.dtype
            np.testing.assert_array_equal(getattr(said.rows, name), value)
        np.testing.assert_array_equal(said.wanted, wanted)
        assert [(slot, first, after.tolist()) for slot, first, after in said.pages] == [
            (3, 17, [5, 2**31 - 1]),
            (0, 1, []),
        ]
    moved = decode(RankCommit(np.array([9, 8]), np.array([7, 6])).encoded().numpy())
    assert isinstance(moved, RankCommit)
    assert (moved.sources.tolist(), moved.targets.tolist()) == ([9, 8], [7, 6])
    assert decode(RankStop().encoded().numpy()) == RankStop()
    with pytest.raises(AssertionError, match="too short"):
        decode(RankForward(rows, np.array([1]), pages).encoded().numpy()[:-1])


def test_of_page_tables_only_what_changed_is_said() -> None:
    tables, news, slots = PageTables(3, 4), PageNews(3, 4), np.array([2, 0])

    def said() -> list[tuple[int, int, list[int]]]:
        return [(slot, first, after.tolist()) for slot, first, after in news.since(tables, slots)]

    tables.append(2, [5, 6])
    tables.append(1, [9])  # is not asked for
    assert said() == [(2, 0, [5, 6])]
    assert said() == []
    tables.append(2, list(range(10, 40)))  # wider than before
    tables.append(0, [7])
    assert said() == [(2, 2, list(range(10, 40))), (0, 0, [7])]
    tables.clear(2)  # another sequence, whose text begins alike
    tables.append(2, [5, 6, 8])
    tables.clear(0)
    assert said() == [(2, 2, [8]), (0, 0, [])]
    tables.clear(2)
    tables.append(2, [5])
    assert said() == [(2, 1, [])]


def test_a_drafter_of_one_rank_sends_nothing() -> None:
    drafting = Drafting()
    assert type(drafting.model._rank) is ModelRank
    assert torch.equal(torch.tensor(drafting.model._rank._shard_sizes), torch.tensor([VOCAB]))
