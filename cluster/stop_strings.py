"""Finds the first of many strings in a text that grows, at a cost that does not depend on how many there are."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """An automaton over all strings (Aho and Corasick, 1975): a state is the longest end of the text so far
    that one of them begins with.

    strings: none of them empty. Shared by nobody: one per answer.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        assert all(strings), strings
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._shorter = [0]  # the state of the next shorter end that a string begins with
        self._longest = [0]  # length of the longest string that ends here; 0 for none
        self._state = 0
        for string in strings:
            self._insert(string)
        self._link()

    @property
    def num_doubtful(self) -> int:
        """Length of the longest end of the text so far that a string begins with."""
        return self._depth[self._state]

    def find(self, text: str) -> int | None:
        """Appends `text`. Where the first string that it completes begins, counted from the start of `text`
        (negative: in what came before); None where it completes none."""
        begins = []
        for end, char in enumerate(text, 1):
            while self._state and char not in self._next[self._state]:
                self._state = self._shorter[self._state]
            self._state = self._next[self._state].get(char, 0)
            if self._longest[self._state]:
                begins.append(end - self._longest[self._state])
        return min(begins, default=None)

    def _insert(self, string: str) -> None:
        state = 0
        for char in string:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._shorter.append(0)
                self._longest.append(0)
            state = self._next[state][char]
        self._longest[state] = len(string)

    def _link(self) -> None:
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for char, child in self._next[state].items():
                shorter = self._shorter[state]
                while shorter and char not in self._next[shorter]:
                    shorter = self._shorter[shorter]
                self._shorter[child] = self._next[shorter].get(char, 0)
                self._longest[child] = self._longest[child] or self._longest[self._shorter[child]]
                waiting.append(child)
