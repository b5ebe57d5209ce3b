"""How often a deployment is started again, and how soon."""

import time
from collections import deque
from collections.abc import Callable

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0


class Restarts:
    """Counts those that brought nothing: after tokens have come, the next loss is as good as the first.

    most: so many in vain within `window_s` seconds; after that there is no further one.
    """

    def __init__(self, most: int, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.num = 0  # of all times
        self._most = most
        self._window_s = window_s
        self._clock = clock
        self._in_vain: deque[float] = deque()  # when they began

    @property
    def is_allowed(self) -> bool:
        """Whether there may be another one."""
        self._forget()
        return len(self._in_vain) < self._most

    def begin(self) -> float:
        """There will be another one: after so many seconds, none the first time, then longer and longer."""
        self._forget()
        num_before = len(self._in_vain)
        self._in_vain.append(self._clock())
        self.num += 1
        return min(_FIRST_PAUSE_S * 2 ** (num_before - 1), _LONGEST_PAUSE_S) if num_before else 0.0

    def note_tokens(self) -> None:
        """The deployment does what it is for."""
        self._in_vain.clear()

    def _forget(self) -> None:
        while self._in_vain and self._clock() - self._in_vain[0] > self._window_s:
            self._in_vain.popleft()
