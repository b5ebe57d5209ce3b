"""Pages of a KV cache: who holds which, and which prompts share them.

A page holds `page_size` consecutive KV rows. Full pages whose rows are committed are remembered under a key,
so that a later sequence with the same prefix takes the page instead of computing it; the idea is vLLM's
automatic prefix caching. The key of a page is a digest of its tokens and of the key of the page before it: it
says all that the text holds up to there, whichever pages hold it, so each page of a text is digested once.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from hashlib import blake2b

_KEY_BYTES = 16  # two texts with one key are as unlikely as a cryptographic hash makes them


@dataclass(frozen=True)
class Prefix:
    """The first `num_pages` full pages of a text, and the key of the last one: of all tokens up to its end."""

    num_pages: int = 0
    key: bytes = b""

    def followed_by(self, tokens: SequenceABC[int]) -> Prefix:
        """This prefix and one page more, which holds `tokens`."""
        digest = blake2b(self.key, digest_size=_KEY_BYTES)
        digest.update(array("q", tokens))
        return Prefix(self.num_pages + 1, digest.digest())


def num_unseen_pages(num_rows: int, window: int, page_size: int) -> int:
    """First pages of a text whose rows nobody sees any more: a query behind its first `num_rows` rows, as whoever
    reads on is, sees `window` positions, its own included; 0: all of them, so that no page is unseen."""
    return max(0, num_rows + 1 - window) // page_size if window else 0


class PagePool:
    """Allocates pages, counts their holders, and finds pages that hold a given prefix."""

    def __init__(self, num_pages: int, page_size: int, prefix_sharing: bool) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_sharing = prefix_sharing
        self._free: deque[int] = deque(range(num_pages))
        self._holders = [0] * num_pages
        self._pages_by_key: dict[bytes, list[int]] = {}  # the first one is given out, its twins hold the same
        self._key_by_page: dict[int, bytes] = {}
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
                if page not in self._key_by_page:
                    self._free.append(page)
                elif len(self._pages_by_key[self._key_by_page[page]]) > 1:  # a twin is found in its place
                    self._forget(page)
                    self._free.append(page)
                else:
                    self._idle[page] = None

    def find_prefix(self, tokens: SequenceABC[int], max_tokens: int) -> tuple[list[int], Prefix]:
        """The longest run of remembered full pages that hold `tokens[:k]`, k <= max_tokens; nobody takes them."""
        pages: list[int] = []
        prefix = Prefix()
        if self.prefix_sharing:
            for start in range(0, max_tokens - self.page_size + 1, self.page_size):
                longer = prefix.followed_by(tokens[start : start + self.page_size])
                found = self._pages_by_key.get(longer.key)
                if found is None:
                    break
                pages.append(found[0])
                prefix = longer
        return pages, prefix

    def share_prefix(self, tokens: SequenceABC[int], max_tokens: int) -> tuple[list[int], Prefix]:
        """Take the pages of `find_prefix`; what they hold is remembered already."""
        pages, prefix = self.find_prefix(tokens, max_tokens)
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)
        return pages, prefix

    def remember_prefix(
        self, pages: SequenceABC[int], tokens: SequenceABC[int], num_rows: int, remembered: Prefix
    ) -> Prefix:
        """Make the full pages of `tokens[:num_rows]` findable.

        `pages` hold `tokens` from the start, and of those `remembered` is what the last call for this text (or
        `share_prefix`) returned; returns what is remembered now. Only pages behind it cost time. A page whose
        text another page holds already is found when that one has gone.
        """
        if not self.prefix_sharing:
            return remembered
        for index in range(remembered.num_pages, num_rows // self.page_size):
            start = index * self.page_size
            remembered = remembered.followed_by(tokens[start : start + self.page_size])
            self._pages_by_key.setdefault(remembered.key, []).append(pages[index])
            self._key_by_page[pages[index]] = remembered.key
        return remembered

    def _forget(self, page: int) -> None:
        key = self._key_by_page.pop(page)
        twins = self._pages_by_key[key]
        twins.remove(page)
        if not twins:
            del self._pages_by_key[key]
