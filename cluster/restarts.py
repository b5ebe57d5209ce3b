"""How often a deployment is started again, and how soon."""

import time
from collections.abc import Callable

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0


class Restarts:
    """Counts those in a row that were in vain: no token came, and the deployment did not stand for long.

    most: so many; after that there is no further one.
    window_s: how long a deployment has to stand, in seconds, for the next loss to be as good as the first.
    """

    def __init__(self, most: int, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.num = 0  # of all times
        self._most = most
        self._window_s = window_s
        self._clock = clock
        self._num_in_vain = 0
        self._stands_since = clock()

    def lost(self) -> None:
        """Workers were lost that stood."""
        if self._clock() - self._stands_since > self._window_s:
            self._num_in_vain = 0

    @property
    def is_allowed(self) -> bool:
        """Whether there may be another one."""
        return self._num_in_vain < self._most

    def last_words(self, reason: str) -> str:
        """Why there is no other one, after a loss for this reason."""
        return (
            f"{reason}; given up after cluster.max_restarts = {self._most} in vain" if self._most else reason
        )

    def begin(self) -> float:
        """There will be another one: after so many seconds, none the first time, then longer and longer."""
        num_before = self._num_in_vain
        self._num_in_vain += 1
        self.num += 1
        return min(_FIRST_PAUSE_S * 2 ** (num_before - 1), _LONGEST_PAUSE_S) if num_before else 0.0

    def stands(self) -> None:
        """All workers are there again."""
        self._stands_since = self._clock()

    def note_tokens(self) -> None:
        """The deployment does what it is for."""
        self._num_in_vain = 0
