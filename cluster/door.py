"""The door: tickets become requests, in the order in which they came.

Short requests are read one after the other by one thread, long ones by another: nobody overtakes an equal, and
a long prompt, which may take seconds to tokenize, holds up no short one.
"""

import asyncio
import pickle
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from outrider.cluster.admission import Admission
from outrider.cluster.api import GenerationRequest, Notice, Refusal, Ticket
from outrider.cluster.request_table import RequestTable
from outrider.cluster.text import TextAssembler
from outrider.workers.sequences.sequence import Request

_LONG_BYTES = 2**14  # of a ticket: above it, reading takes longer than passing the request on
_AT_ONCE = 16  # short tickets are read and sent in batches
_MAX_ERROR = 500  # characters: a message may quote what was asked, which may be long
# Contents that wait to be read; they come in at hundreds of MB/s and are tokenized at one or two.
_MAX_WAITING_BYTES = 256 * 2**20


@dataclass(frozen=True)
class _Admitted:
    request: Request
    text: TextAssembler
    warning: str


class Door:
    """Reads tickets in threads of its own and sends what they ask for. Belongs to one event loop.

    send: gives requests to the DraftWorker, in order.
    notify: what is said about a request that runs.
    """

    def __init__(
        self,
        admission: Admission,
        table: RequestTable,
        send: Callable[[list[Request]], Awaitable[None]],
        notify: Callable[[str, Notice], None],
        max_open: int,
    ) -> None:
        self._admission = admission
        self._table = table
        self._send = send
        self._notify = notify
        self._max_open = max_open
        self._num_waiting_bytes = 0
        self._short: asyncio.Queue[Ticket] = asyncio.Queue()
        self._long: asyncio.Queue[Ticket] = asyncio.Queue()

    def arrive(self, ticket: Ticket) -> None:
        """Takes a request in, or refuses it where too many are open."""
        num_bytes = len(ticket.contents)
        if ticket.again:
            self._take_in(ticket)
        elif self._table.num_open >= self._max_open:
            self._refuse_for_now(
                ticket,
                f"cluster.max_open_requests = {self._max_open} requests are open already: wait until some have "
                "ended, or raise it",
            )
        elif self._num_waiting_bytes + num_bytes > _MAX_WAITING_BYTES:
            self._refuse_for_now(
                ticket,
                f"more than {_MAX_WAITING_BYTES // 2**20} MiB of prompts wait to be read: wait until some are",
            )
        else:
            self._take_in(ticket)

    def _take_in(self, ticket: Ticket) -> None:
        num_bytes = len(ticket.contents)
        self._num_waiting_bytes += num_bytes
        self._table.arrive(ticket)
        (self._long if num_bytes > _LONG_BYTES else self._short).put_nowait(ticket)

    def _refuse_for_now(self, ticket: Ticket, error: str) -> None:
        self._table.refuse(ticket, Refusal(error, overloaded=True))

    async def serve(self) -> None:
        """Reads what arrives, for ever."""
        with ThreadPoolExecutor(1, "short") as short, ThreadPoolExecutor(1, "long") as long:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._serve(self._short, _AT_ONCE, short))
                group.create_task(self._serve(self._long, 1, long))

    async def _serve(self, queue: asyncio.Queue[Ticket], at_once: int, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            tickets = [await queue.get()]
            while len(tickets) < at_once and not queue.empty():
                tickets.append(queue.get_nowait())
            self._num_waiting_bytes -= sum(len(ticket.contents) for ticket in tickets)
            wanted = [ticket for ticket in tickets if self._table.is_waiting(ticket.request_id)]
            read = await loop.run_in_executor(thread, self._read_all, wanted)
            await self._enter([pair for pair in read if self._table.is_waiting(pair[0].request_id)])

    async def _enter(self, read: Sequence[tuple[Ticket, _Admitted | str]]) -> None:
        requests = []
        for ticket, outcome in read:
            if isinstance(outcome, str):
                self._table.refuse(ticket, Refusal(outcome))
                continue
            if self._table.admit(outcome.request, outcome.text):
                requests.append(outcome.request)
            if outcome.warning and not ticket.again:
                self._notify(ticket.request_id, Notice(outcome.warning))
        if not requests:
            return
        try:
            await self._send(requests)
        except Exception as error:
            # Whatever became of the DraftWorker, those who asked get to know.
            for request in requests:
                self._table.fail(request.id, str(error))
        for request in requests:
            self._table.note_sent(request.id)

    def _read_all(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, _Admitted | str]]:
        return [(ticket, self._read(ticket)) for ticket in tickets]

    def _read(self, ticket: Ticket) -> _Admitted | str:
        """What a ticket asks for, or why it cannot be had."""
        try:
            asked = _unpacked(ticket.contents)
            request = self._admission.admit(ticket.request_id, asked)
            sampling, delivered = request.sampling, ticket.delivered
            request = replace(request, output_tokens=delivered.tokens, stats=delivered.stats)
            text = TextAssembler(self._admission.decoder(), sampling.stop, sampling.min_tokens)
            for token, origin in zip(delivered.tokens, delivered.origins, strict=True):
                text.add(token, origin)  # what can be shown of it was shown
            return _Admitted(request, text, self._admission.warning(request))
        except ValueError as error:
            return _cut(str(error))
        except Exception as error:
            # A fault of ours at this request; the next one is another.
            reason = (str(error).splitlines() or ["no message"])[0]
            return _cut(f"the request could not be read: {type(error).__name__}: {reason}")


def _unpacked(contents: bytes) -> GenerationRequest:
    asked = pickle.loads(contents)
    assert isinstance(asked, GenerationRequest), type(asked)
    return asked


def _cut(message: str) -> str:
    return message if len(message) <= _MAX_ERROR else message[: _MAX_ERROR - 3] + "..."
