"""Pages of a KV cache: who holds which, and which prompts share them.

A page holds `page_size` consecutive KV rows. Full pages whose rows are committed are remembered under the
tokens they hold (and the pages before them), so that a later sequence with the same prefix takes the page
instead of computing it; the idea is vLLM's automatic prefix caching, keyed here by the tokens themselves.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceABC

_ROOT = 0  # the key of "nothing before": the parent of every first page


class PagePool:
    """Allocates pages, counts their holders, and finds pages that hold a given prefix."""

    def __init__(self, num_pages: int, page_size: int, prefix_sharing: bool) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_sharing = prefix_sharing
        self._free: deque[int] = deque(range(num_pages))
        self._holders = [0] * num_pages
        self._page_by_prefix: dict[tuple[int, tuple[int, ...]], int] = {}
        self._prefix_by_page: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._key_by_page: dict[int, int] = {}
        self._next_key = _ROOT + 1
        self._idle: OrderedDict[int, None] = OrderedDict()  # remembered, held by nobody, oldest first

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give out now."""
        return len(self._free) + len(self._idle)

    def pages_for(self, num_rows: int) -> int:
        """Pages needed for `num_rows` KV rows."""
        return -(-num_rows // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages; the caller has checked `num_available`. Remembered prefixes go oldest first."""
        assert count <= self.num_available, f"{count} pages asked for, {self.num_available} available"
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.popleft()
            else:
                page, _ = self._idle.popitem(last=False)
                self._forget(page)
            self._holders[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back. A page with a remembered prefix stays findable until its room is needed."""
        # Later pages first: they become the oldest idle ones and are evicted before the prefix they hang on.
        for page in reversed(list(pages)):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} released twice"
            if self._holders[page] == 0:
                if page in self._prefix_by_page:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def share_prefix(self, tokens: SequenceABC[int], max_tokens: int) -> list[int]:
        """Take the longest run of remembered full pages that hold `tokens[:k]`, k <= max_tokens."""
        if not self.prefix_sharing:
            return []
        pages: list[int] = []
        parent = _ROOT
        for start in range(0, max_tokens - self.page_size + 1, self.page_size):
            page = self._page_by_prefix.get((parent, tuple(tokens[start : start + self.page_size])))
            if page is None:
                break
            pages.append(page)
            parent = self._key_by_page[page]
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)
        return pages

    def remember_prefix(self, pages: SequenceABC[int], tokens: SequenceABC[int], num_known: int) -> int:
        """Make the full pages of `tokens` findable.

        `pages` hold `tokens` from the start and the first `num_known` of them were remembered before;
        returns the new count. A page whose prefix another page already holds stays private.
        """
        num_full = len(tokens) // self.page_size
        if not self.prefix_sharing or num_full <= num_known:
            return num_known
        parent = _ROOT
        for index in range(num_full):
            prefix = (parent, tuple(tokens[index * self.page_size : (index + 1) * self.page_size]))
            known = self._page_by_prefix.get(prefix)
            if known is None:
                known = pages[index]
                if known in self._prefix_by_page:  # it held another prefix whose parent is forgotten
                    self._forget(known)
                self._page_by_prefix[prefix] = known
                self._prefix_by_page[known] = prefix
                self._key_by_page[known] = self._next_key
                self._next_key += 1
            parent = self._key_by_page[known]
        return num_full

    def _forget(self, page: int) -> None:
        prefix = self._prefix_by_page.pop(page)
        del self._page_by_prefix[prefix]
        del self._key_by_page[page]
