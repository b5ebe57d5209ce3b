"""Rows of trees in a cache: by hand, and beside a model of the cache that remembers of each row which text it is."""

import random

import numpy as np
import pytest

from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.frontier import Frontier
from outrider.workers.drafting.method import DraftMethod, MethodContext
from outrider.workers.drafting.row_cache import Expansion, RowCache, chain_masks
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.sequences.pages import PagePool
from outrider.workers.sequences.sequence import Sequence
from outrider.workers.sequences.tree import Ints, Survivors
from support.drafted import answer, children_of, cut_of, node_at, path_of, sequence_of


class TextRows(DraftMethod):
    """Keeps rows for the nodes it is told to; of each cache slot, the text whose last token's row it holds."""

    name = "rows"

    def __init__(self, engine: DraftEngine, num_pages: int, page_size: int) -> None:
        super().__init__(engine.slots, engine.estimator)
        self.rows = RowCache(engine.slots, PagePool(num_pages, page_size, prefix_sharing=True))
        self.cache: dict[int, tuple[int, ...]] = {}
        self.moves: tuple[Ints, Ints] = (np.zeros(0), np.zeros(0))
        engine.add(self)

    @classmethod
    def build(cls, context: MethodContext) -> "TextRows":
        return cls(DraftEngine(context.slots), 99, 4)

    def start(self, sequence: Sequence) -> None:
        self.rows.start(sequence)

    def finish(self, sequence: Sequence) -> None:
        self.rows.finish(sequence.slot)

    def expand(self, slots: Ints) -> bool:
        return False

    def compute(self, nodes: dict[int, list[int]]) -> Expansion:
        """Rows for these nodes by slot, ascending, as one forward. Each must see just the rows of its own text."""
        for slot, own in nodes.items():
            assert self.rows.take_rows(slot, len(own))
        flat = [(slot, node) for slot, own in nodes.items() for node in own]
        counts = np.array([len(own) for own in nodes.values()])
        slots, (node_slots, of_slots) = np.array(list(nodes)), np.array(flat).T
        places = node_slots * self.trees.capacity + of_slots
        unread, gains = self.rows.num_unread(slots), np.ones(len(flat))
        expansion = self.rows.plan(Frontier(slots, counts, unread, node_slots, of_slots, places, gains))
        rows, texts = expansion.rows, []
        owners = np.repeat(rows.slots, rows.query_lens)
        contexts = np.repeat(rows.context_lens, rows.query_lens)
        written = self.rows.tables.kv_rows(owners, contexts + rows.tree_rows).tolist()
        for at, slot in enumerate(owners.tolist()):
            bits = [bool(int(word) >> bit & 1) for word in rows.ancestors[at] for bit in range(64)]
            seen = [*range(contexts[at]), *(int(contexts[at]) + np.flatnonzero(bits))]
            assert seen[-1] == contexts[at] + rows.tree_rows[at]  # itself, and nothing behind it
            assert len(seen) == contexts[at] + rows.depths[at] + 1
            places = self.rows.tables.kv_rows(np.full(len(seen), slot), np.array(seen)).tolist()
            self.cache[written[at]] = text = tuple(
                self.cache[place][-1] if place != written[at] else int(rows.tokens[at]) for place in places
            )
            assert [self.cache[place] for place in places] == [text[: n + 1] for n in range(len(text))]
            texts.append(text)
        for row, (slot, node) in zip(expansion.node_rows.tolist(), flat, strict=True):
            assert list(texts[row]) == [*self.slots.sequence(slot).tokens, *path_of(self.trees, slot, node)]
        self.rows.computed(expansion)
        return expansion

    def rerooted(self, survivors: Survivors) -> None:
        self.moves = self.rows.reroot(survivors)
        sources, targets = self.moves
        moved = [self.cache[source] for source in sources.tolist()]  # all are read before any is written
        assert len(set(targets.tolist())) == len(targets)
        self.cache |= dict(zip(targets.tolist(), moved, strict=True))


def drafting(num_slots: int = 3, num_pages: int = 99, page_size: int = 4) -> tuple[DraftEngine, TextRows]:
    engine = DraftEngine(DraftedSlots(num_slots, 30, 8))  # trees of up to 120 nodes
    return engine, TextRows(engine, num_pages, page_size)


def start(
    engine: DraftEngine, slot: int, prompt: list[int], methods: tuple[str, ...] = ("rows",)
) -> Sequence:
    sequence = sequence_of(prompt, slot, methods, max_nodes=30, max_depth=20)
    engine.start(sequence)
    return sequence


def grow(engine: DraftEngine, slot: int, below: int, *tokens: int) -> None:
    """Children of a node."""
    fill = np.full(len(tokens), slot)
    engine.trees.add_children(
        fill, np.full(len(tokens), below), np.array(tokens), np.full(len(tokens), 0.5), fill * 0
    )


@pytest.mark.parametrize(("length", "num_words"), [(1, 1), (3, 1), (64, 1), (65, 2), (130, 3)])
def test_a_row_of_a_chain_sees_what_came_before(length: int, num_words: int) -> None:
    rows = [sum(int(word) << 64 * i for i, word in enumerate(row)) for row in chain_masks(length, num_words)]
    assert rows == [(1 << row + 1) - 1 for row in range(length)]


def test_rows_masks_and_moves_of_a_tree_written_by_hand() -> None:
    """Text 7 8 9 10, and below 10:   node 1 = 11 ─┬─ 3 = 13 ── 5 = 15
                                      node 2 = 12  └─ 4 = 14

    The root's row comes behind those of 7, 8, 9. Rows are given in the order of expansion: 0, 1, then 2, 4, then 3.
    """
    engine, rows = drafting()
    start(engine, 1, [7, 8, 9, 10])
    grow(engine, 1, 0, 11, 12)
    first = rows.compute({1: [0, 1]}).rows
    assert first.tokens.tolist() == [7, 8, 9, 10, 11]
    assert first.tree_rows.tolist() == first.depths.tolist() == [0, 1, 2, 3, 4]
    assert first.ancestors[:, 0].tolist() == [0b1, 0b11, 0b111, 0b1111, 0b11111]
    assert (first.context_lens.tolist(), first.tree_lens.tolist(), first.query_lens.tolist()) == (
        [0],
        [5],
        [5],
    )
    grow(engine, 1, 1, 13, 14)
    second = rows.compute({1: [2, 4]}).rows
    assert second.tokens.tolist() == [12, 14]
    assert second.tree_rows.tolist() == [2, 3]
    assert second.depths.tolist() == [1, 2]
    assert second.ancestors[:, 0].tolist() == [0b101, 0b1011]
    assert (second.context_lens.tolist(), second.tree_lens.tolist()) == ([3], [4])
    third = rows.compute({1: [3]}).rows
    assert third.ancestors[:, 0].tolist() == [0b10011]
    grow(engine, 1, 3, 15)
    # 11 comes out. Kept are, in the order of nodes, 10, 11, 13 and 14: 13 moves from row 4 to 2, where 12 was.
    answer(engine, [1], cut_of(engine.trees, {1: [1]}), [{0: 11, 1: 13}])
    assert [part.tolist() for part in rows.moves] == [[3 + 4], [3 + 2]]
    assert rows.rows.context_lens[1] == 5  # 7 8 9 10 11; the root is 13 now
    assert rows.rows.lags(np.array([1])).tolist() == [0]
    fourth = rows.compute({1: [1]}).rows
    assert (fourth.tokens.tolist(), fourth.tree_rows.tolist()) == ([15], [1])
    assert fourth.ancestors[:, 0].tolist() == [0b11]
    # 16 was never proposed: the rows of 13 and 15 are text now, and it is the one that lacks.
    answer(engine, [1], cut_of(engine.trees, {1: [1]}), [{0: 15, 1: 16}])
    assert [len(part) for part in rows.moves] == [0, 0]
    assert (rows.rows.context_lens[1], rows.rows.lags(np.array([1])).tolist()) == (7, [1])


@pytest.mark.parametrize("num_known", [1, 2, 31, 32])
@pytest.mark.parametrize("length", [32, 33, 62, 63, 64, 100])
def test_long_looked_up_chains_are_read_with_the_text_before_them(num_known: int, length: int) -> None:
    # Trees of which no node has a row yet; their rows pass from one word of the masks to the next.
    engine, rows = drafting()
    for slot, prompt in ((0, list(range(num_known))), (1, [7, 8, 9])):
        start(engine, slot, prompt)
        tokens, fill = np.arange(100, 100 + length)[None], np.full((1, length), 0.9)
        engine.trees.add_chains(
            np.array([slot]), np.array([0]), tokens, np.array([length]), fill, fill.astype(np.int64)
        )
        grow(engine, slot, length // 2, 5)
        grow(engine, slot, 0, 6)
    nodes = list(range(length + 3))
    found = rows.compute({0: nodes, 1: nodes}).rows
    assert found.tree_lens.tolist() == [num_known + length + 2, 3 + length + 2]


def test_a_verdict_about_others_leaves_rows_alone() -> None:
    engine, rows = drafting()
    for slot in (0, 2):
        start(engine, slot, [1, 2, 3 + slot])
        grow(engine, slot, 0, 5, 6)
        rows.compute({slot: [0]})
        rows.compute({slot: [2]})
        rows.compute({slot: [1]})
    answer(engine, [2], cut_of(engine.trees, {2: [2]}), [{0: 6, 2: 9}])
    assert rows.rows.lags(np.array([0, 2])).tolist() == [0, 1]
    grow(engine, 0, 1, 7)
    rows.compute({2: [0], 0: [3]})


def test_a_slot_whose_request_does_not_name_the_method_is_left_alone() -> None:
    engine, rows = drafting(num_pages=4)
    sequence = start(engine, 0, [1, 2, 3])
    grow(engine, 0, 0, 5, 6)
    for node in (0, 2, 1):
        rows.compute({0: [node]})
    engine.finish(sequence)
    start(engine, 1, list(range(20, 30)))  # takes the pages
    rows.compute({1: [0]})
    kept = dict(rows.cache)
    start(engine, 0, [1, 2, 3], methods=("another",))
    start(engine, 2, [1, 2], methods=())
    grow(engine, 0, 0, 5, 6)
    # Of the sequence that had slot 0 before, the row of node 1 would move.
    answer(engine, [0, 1, 2], cut_of(engine.trees, {0: [1], 1: [], 2: []}), [{0: 5, 1: 9}, {}, {}])
    assert rows.cache == kept
    assert rows.rows.context_lens[1] == 10


def test_pages_run_out_and_come_back() -> None:
    engine, rows = drafting(num_pages=3)
    sequence = start(engine, 0, [1, 2, 3, 4, 5])
    rows.compute({0: [0]})  # five rows, two pages
    start(engine, 1, [8, 9])
    assert not rows.rows.take_rows(1, 4)  # four and the 8 need two
    assert rows.rows.lacks_pages(np.array([0, 1]), np.array([3, 3])).tolist() == [False, True]
    assert rows.rows.take_rows(1, 3)
    assert rows.rows.take_rows(1, 3)  # they are held already
    assert rows.rows.lacks_pages(np.array([0, 1]), np.array([3, 3])).tolist() == [False, False]
    assert rows.rows.lacks_pages(np.array([0, 1]), np.array([4, 3])).tolist() == [True, False]
    engine.finish(sequence)
    assert rows.rows.pool.num_available == 2
    again = start(engine, 0, [1, 2, 3, 4, 6])
    assert rows.rows.lags(np.array([0])).tolist() == [1]  # the full page was found again
    rows.compute({0: [0]})
    engine.finish(again)


@pytest.mark.parametrize("seed", range(6))
def test_every_row_sees_its_own_text_after_any_history(seed: int) -> None:
    rng = random.Random(seed)
    engine, rows = drafting(num_pages=1000, page_size=rng.choice([1, 4, 16]))
    trees, every = engine.trees, [0, 1, 2]
    most_rows = 0
    for slot in every:
        start(engine, slot, [*range(rng.choice([3, 30])), slot])
    for _ in range(14):
        for _ in range(rng.randint(0, 9)):
            chosen = {}
            for slot in rng.sample(every, rng.randint(1, 3)):
                # Some nodes without a row, and all that is above them.
                new = set()
                for node in rng.choices(range(trees.num_nodes[slot]), k=rng.choice([1, 8, 60])):
                    while not rows.rows.has_row[slot, node] and node not in new:
                        new.add(node)
                        node = int(trees.parents[slot, node])
                if new:
                    chosen[slot] = sorted(new)
            if chosen:
                most_rows = max(most_rows, int(rows.compute(chosen).rows.tree_lens.max()))
            for slot, nodes in chosen.items():
                for node in nodes:
                    if trees.room(np.array([slot]))[0] >= 4:
                        grow(engine, slot, node, *rng.sample(range(9), 4))
        answered = rng.sample(every, rng.randint(1, 3))
        sent, said = {}, []
        for slot in answered:
            tokens: dict[int, int] = {}
            sent[slot], node = [], 0
            while rng.random() < 0.6 and (children := children_of(trees, slot, node)):
                tokens[node] = rng.choice(children)
                node = node_at(trees, slot, [*path_of(trees, slot, node), tokens[node]])
                sent[slot].append(node)
            tokens[node] = rng.choice([*children_of(trees, slot, node), 50])
            said.append(tokens)
        answer(engine, answered, cut_of(trees, sent), said)
        if rng.random() < 0.2:
            slot = rng.choice(every)
            engine.finish(engine.slots.sequence(slot))
            start(engine, slot, [*range(rng.choice([3, 30])), slot])
    assert most_rows > 64
