"""Answers on their way to the client: as many as there are, in one call at a time."""

import asyncio

from outrider.cluster.api import Answer


class Mailbox:
    """Takes answers at any time and hands over what is there. Belongs to one event loop."""

    def __init__(self) -> None:
        self._answers: list[tuple[str, Answer]] = []
        self._something = asyncio.Event()

    def put(self, request_id: str, answer: Answer) -> None:
        self._answers.append((request_id, answer))
        self._something.set()

    def wake(self) -> None:
        """Lets `take` return, even with nothing."""
        self._something.set()

    async def take(self, timeout_s: float) -> tuple[tuple[str, Answer], ...]:
        """All answers since the last call; waits up to `timeout_s` for the first."""
        try:
            await asyncio.wait_for(self._something.wait(), timeout_s)
        except TimeoutError:
            return ()
        self._something.clear()
        answers, self._answers = tuple(self._answers), []
        return answers
