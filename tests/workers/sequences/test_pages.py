"""Who holds which page. Pages of four rows, so that examples can be read: tokens 1-4 are page one, and so on."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outrider.workers.sequences.pages import PagePool, Prefix, num_unseen_pages

PAGE = 4
TEXT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]  # two full pages and a half


def pool_with(num_pages: int = 8, prefix_sharing: bool = True) -> PagePool:
    return PagePool(num_pages, PAGE, prefix_sharing)


def remembered(pool: PagePool, tokens: list[int]) -> list[int]:
    """Pages of a sequence that computed `tokens`, and still holds them."""
    pages = pool.allocate(pool.pages_for(len(tokens)))
    pool.remember_prefix(pages, tokens, len(tokens), Prefix())
    return pages


@pytest.mark.parametrize(("num_rows", "num_pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_started_page_counts_whole(num_rows: int, num_pages: int) -> None:
    assert pool_with().pages_for(num_rows) == num_pages


def test_pages_are_given_once_and_come_back() -> None:
    pool = pool_with(4)
    mine, yours = pool.allocate(3), pool.allocate(1)
    assert sorted(mine + yours) == [0, 1, 2, 3]
    assert pool.num_available == 0
    pool.release(mine)
    assert pool.num_available == 3
    assert sorted(pool.allocate(3)) == sorted(mine)


def test_taking_more_than_there_is_and_giving_back_twice_are_our_own_mistakes() -> None:
    pool = pool_with(2)
    with pytest.raises(AssertionError, match="3 pages asked for, 2 available"):
        pool.allocate(3)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(pages)


def test_full_pages_of_a_common_prefix_are_shared() -> None:
    pool = pool_with()
    first = remembered(pool, TEXT)
    shared, _ = pool.share_prefix([1, 2, 3, 4, 5, 6, 7, 8, 20, 21, 22, 23], 12)
    assert shared == first[:2]  # the third page differs, and was never full


@pytest.mark.parametrize(
    ("prompt", "num_shared"),
    [
        ([1, 2, 3, 4], 1),
        ([1, 2, 3, 5], 0),
        ([2, 3, 4, 5, 6, 7, 8], 0),  # the same tokens elsewhere in the text
        ([1, 2, 3, 4, 5, 6, 7, 9], 1),
        ([0, 2, 3, 4, 5, 6, 7, 8], 0),  # the second page alone is not a prefix
        ([1, 2, 3], 0),
    ],
)
def test_a_prefix_is_matched_from_the_start_in_whole_pages(prompt: list[int], num_shared: int) -> None:
    pool = pool_with()
    first = remembered(pool, TEXT)
    assert pool.share_prefix(prompt, len(prompt))[0] == first[:num_shared]


def test_the_last_token_is_never_shared() -> None:
    # A sequence asks for len - 1 tokens at most: the last one has to be computed, its hidden state is needed.
    pool = pool_with()
    pages = remembered(pool, TEXT[:8])
    assert pool.share_prefix(TEXT[:8], len(TEXT[:8]) - 1)[0] == pages[:1]
    assert pool.share_prefix(TEXT[:9], len(TEXT[:9]) - 1)[0] == pages[:2]


def test_a_shared_page_is_free_when_its_last_holder_leaves() -> None:
    pool = pool_with(2)
    first = remembered(pool, TEXT[:8])
    second, _ = pool.share_prefix(TEXT[:9], 8)
    pool.release(first)
    assert pool.num_available == 0
    pool.release(second)
    assert pool.num_available == 2


def test_pages_are_found_again_after_everybody_left() -> None:
    pool = pool_with()
    pages = remembered(pool, TEXT[:8])
    pool.release(pages)
    assert pool.num_available == 8
    assert pool.share_prefix(TEXT, 9)[0] == pages
    assert pool.num_available == 6


def test_free_pages_go_first_then_the_longest_unused_prefix_from_its_end() -> None:
    pool = pool_with(6)
    old = remembered(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    recent = remembered(pool, [11, 12, 13, 14, 15, 16, 17, 18])
    pool.release(old)
    pool.release(recent)
    assert pool.allocate(2) == [4, 5]
    assert pool.allocate(1) == [old[1]]  # the page that hangs on the other goes first
    assert pool.share_prefix([1, 2, 3, 4, 5], 4)[0] == old[:1]
    pool.release(old[:1])  # used just now: it is the youngest
    assert pool.allocate(2) == [recent[1], recent[0]]
    assert pool.share_prefix([1, 2, 3, 4, 5], 4)[0] == old[:1]


def test_a_page_that_was_given_away_is_not_found_any_more() -> None:
    pool = pool_with(2)
    pool.release(remembered(pool, TEXT[:8]))
    pool.allocate(2)
    assert pool.share_prefix(TEXT, 9)[0] == []


def test_a_prefix_that_another_sequence_registered_first_keeps_its_page() -> None:
    # Two sequences computed the same prompt side by side. The second one's pages stay private.
    pool = pool_with()
    first = pool.allocate(2)
    second = pool.allocate(3)
    assert pool.remember_prefix(first, TEXT, 8, Prefix()).num_pages == 2
    assert pool.remember_prefix(second, [*TEXT[:8], 20, 21, 22, 23], 12, Prefix()).num_pages == 3
    # The second one's third page is found below the first one's pages: the tokens are the same.
    assert pool.share_prefix([*TEXT[:8], 20, 21, 22, 23, 24], 12)[0] == [*first, second[2]]
    pool.release(first)
    pool.release(second)
    assert pool.num_available == 8 - 3  # `share_prefix` took three


def test_a_private_page_takes_over_when_the_registered_one_is_gone() -> None:
    pool = pool_with(4)
    first = remembered(pool, TEXT[:8])
    second = pool.allocate(2)
    one = pool.remember_prefix(second, TEXT, 4, Prefix())  # its twin is known
    pool.release(first)
    assert sorted(pool.allocate(2)) == sorted(first)  # the twin is forgotten
    assert pool.remember_prefix(second, TEXT, 8, one).num_pages == 2
    assert pool.share_prefix(TEXT, 9)[0] == second


def test_remembering_goes_on_where_it_stopped() -> None:
    pool = pool_with()
    pages = pool.allocate(3)
    remembered = Prefix()
    for num_rows, num_pages in ((3, 0), (5, 1), (7, 1), (8, 2)):
        remembered = pool.remember_prefix(pages, TEXT, num_rows, remembered)
        assert remembered.num_pages == num_pages
    assert pool.share_prefix(TEXT, 9)[0] == pages[:2]


class CountedText(list[int]):
    """Counts the tokens that are read from it."""

    num_read = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.num_read += len(found) if isinstance(found, list) else 1
        return found


def test_every_token_is_read_once_however_many_rounds_remember_it() -> None:
    pool = pool_with(100)
    text = CountedText(range(400))
    pages, remembered = pool.allocate(100), Prefix()
    for num_rows in range(0, 401, 2):
        remembered = pool.remember_prefix(pages, text, num_rows, remembered)
    assert remembered.num_pages == 100
    assert text.num_read == 400
    assert pool.share_prefix(text, 399)[0] == pages[:99]
    assert text.num_read == 400 + 396


def test_a_shared_prefix_is_not_read_again_by_its_new_holder() -> None:
    pool = pool_with()
    remembered(pool, TEXT)
    text = CountedText([*TEXT[:8], 20, 21, 22, 23, 24])
    pages, prefix = pool.share_prefix(text, 12)
    text.num_read = 0
    pages += pool.allocate(1)
    assert pool.remember_prefix(pages, text, 12, prefix).num_pages == 3
    assert text.num_read == 4
    assert pool.share_prefix(text, 12)[0] == pages


def test_a_page_is_found_again_once_the_page_before_it_has_been_computed_anew() -> None:
    pool = pool_with(3)
    first, second = remembered(pool, TEXT[:8])
    pool.release([first])
    others = pool.allocate(2)  # the first page has gone to somebody else, the second is still held
    assert pool.find_prefix(TEXT, 9)[0] == []
    pool.release([second])
    pool.release(others)
    third = pool.allocate(1)
    pool.remember_prefix(third, TEXT, 4, Prefix())
    assert pool.find_prefix(TEXT, 9)[0] == [*third, second]


def test_without_prefix_sharing_nothing_is_remembered() -> None:
    pool = pool_with(prefix_sharing=False)
    pages = remembered(pool, TEXT)
    assert pool.share_prefix(TEXT, 9)[0] == []
    pool.release(pages)
    assert pool.allocate(8) == [3, 4, 5, 6, 7, *pages[::-1]]


@settings(max_examples=60, stateful_step_count=40)
class PagesUnderRandomUse(RuleBasedStateMachine):
    """Sequences over three tokens come, grow and go. What each page's rows hold is kept beside the pool."""

    NUM_PAGES, SIZE = 7, 2

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(self.NUM_PAGES, self.SIZE, prefix_sharing=True)
        self.sequences: list[tuple[list[int], list[int], Prefix]] = []  # tokens, pages, remembered
        self.content: dict[int, tuple[int, ...]] = {}  # page -> all tokens up to its end

    @rule(prompt=st.lists(st.integers(0, 2), min_size=1, max_size=7))
    def come(self, prompt: list[int]) -> None:
        pages, remembered = self.pool.share_prefix(prompt, len(prompt) - 1)
        assert len(pages) * self.SIZE < len(prompt)
        for index, page in enumerate(pages):
            assert self.content[page] == tuple(prompt[: (index + 1) * self.SIZE])
        self.sequences.append(([], pages, remembered))
        self.grow(len(self.sequences) - 1, prompt)

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 99), tokens=st.lists(st.integers(0, 2), min_size=1, max_size=3))
    def append(self, which: int, tokens: list[int]) -> None:
        index = which % len(self.sequences)
        self.grow(index, self.sequences[index][0] + tokens)

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 99))
    def go(self, which: int) -> None:
        _, pages, _ = self.sequences.pop(which % len(self.sequences))
        self.pool.release(pages)

    def grow(self, index: int, tokens: list[int]) -> None:
        _, pages, remembered = self.sequences[index]
        missing = self.pool.pages_for(len(tokens)) - len(pages)
        if missing > self.pool.num_available:
            self.pool.release(self.sequences.pop(index)[1])
            return
        pages = pages + self.pool.allocate(max(0, missing))
        for at, page in enumerate(pages):
            full = tokens[: (at + 1) * self.SIZE]
            if len(full) == (at + 1) * self.SIZE:
                self.content[page] = tuple(full)
        remembered = self.pool.remember_prefix(pages, tokens, len(tokens), remembered)
        self.sequences[index] = (tokens, pages, remembered)

    @invariant()
    def every_page_is_in_one_place_and_counted(self) -> None:
        pool = self.pool
        held = Counter(page for _, pages, _ in self.sequences for page in pages)
        assert pool._holders == [held[page] for page in range(self.NUM_PAGES)]
        places = [*pool._free, *pool._idle, *held]
        assert sorted(places) == list(range(self.NUM_PAGES))
        assert pool.num_available == self.NUM_PAGES - len(held)

    @invariant()
    def the_index_and_its_reverse_agree(self) -> None:
        pool = self.pool
        reverse = {page: key for key, pages in pool._pages_by_key.items() for page in pages}
        assert reverse == pool._key_by_page
        assert all(pool._pages_by_key.values())
        assert set(pool._idle) <= reverse.keys()
        assert not set(pool._free) & reverse.keys()

    @invariant()
    def every_full_page_is_found_whose_prefix_somebody_holds(self) -> None:
        for tokens, _, _ in self.sequences:
            found, _ = self.pool.find_prefix(tokens, len(tokens))
            assert len(found) == len(tokens) // self.SIZE


TestPagesUnderRandomUse = PagesUnderRandomUse.TestCase


def test_pages_behind_a_window_are_unseen_once_no_query_reaches_back_to_them() -> None:
    # A query behind 20 rows is at position 20: with a window of 5 it sees 16 to 20, and rows 0 to 15 are unseen.
    assert num_unseen_pages(20, window=5, page_size=4) == 4
    assert num_unseen_pages(19, window=5, page_size=4) == 3
    assert num_unseen_pages(20, window=21, page_size=4) == 0
    assert num_unseen_pages(20, window=1, page_size=7) == 2
    assert num_unseen_pages(20, window=0, page_size=4) == 0
