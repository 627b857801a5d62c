"""The line in which requests wait: one generation at a time, in the order in which they came.

All models share the machine, so two generations at once would not end earlier, and each would be slower.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from frankenmoe.errors import FrankenMoEError
from frankenmoe.serve.errors import BUSY, STOPPING, RequestError, of_error

LONGEST = 64  # requests that wait
EVERY = 1.0  # seconds between two reports to one that waits
_log = logging.getLogger("frankenmoe.serve")


@dataclass(frozen=True)
class Waiting:
    """`before` requests are answered before this one."""

    before: int


class Ticket:
    """A request in the line: what it gets is told in `heard`, and `cancel` takes it out, also while it runs."""

    def __init__(self, line: "Line", *, seconds: float) -> None:
        self._line = line
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._stop = threading.Event()
        self._seconds = seconds
        self._until = float("inf")

    def say(self, event: object) -> None:
        """Tells the request something, from any thread."""
        self._soon(self._events.put_nowait, event)

    def _soon(self, call: Callable[[Any], None], argument: object) -> None:
        with suppress(RuntimeError):  # the loop has ended, and so has the request
            self._loop.call_soon_threadsafe(call, argument)

    @property
    def halted(self) -> bool:
        """Whether the work must end now: it was cancelled, or its time is over."""
        return self._stop.is_set() or time.monotonic() > self._until

    def cancel(self) -> None:
        """Ends the work, or lets it never begin. For the event loop's thread."""
        self._stop.set()
        self._line.leave(self)

    async def heard(self) -> AsyncIterator[Any]:
        """What the work says, and `Waiting` at once and each second until it begins.

        Raises the RequestError that it ends with.
        """
        while True:
            before = self._line.before(self)
            if before and self._events.empty():
                yield Waiting(before)
            try:
                event = await asyncio.wait_for(self._events.get(), EVERY if before else None)
            except TimeoutError:
                continue
            if event is None:
                return
            if isinstance(event, RequestError):
                raise event
            yield event

    def run(self, work: Callable[["Ticket"], None], ended: Callable[["Ticket"], None]) -> None:
        """Does the work and says how it ended: None, or a RequestError. Calls `ended` in the event loop's thread."""
        self._until = time.monotonic() + self._seconds
        try:
            if not self._stop.is_set():
                work(self)
            self.say(None)
        except RequestError as problem:
            self.say(problem)
        except FrankenMoEError as error:
            self.say(of_error(error))
        except Exception:
            _log.exception("a request failed")
            self.say(RequestError("the server failed to answer; its log says why", status=500))
        finally:
            self._soon(ended, self)


class Line:
    """The requests that run and wait. Its methods are for the event loop's thread."""

    def __init__(self, *, seconds: float, longest: int = LONGEST) -> None:
        """`seconds` is the most that one request may run."""
        self._tickets: list[Ticket] = []
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="generation")
        self._seconds, self._longest = seconds, longest
        self._open = True

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return max(0, len(self._tickets) - 1)

    def before(self, ticket: Ticket) -> int:
        """Requests before this one; 0 when it runs or has ended."""
        return self._tickets.index(ticket) if ticket in self._tickets else 0

    def join(self, work: Callable[[Ticket], None]) -> Ticket:
        """Puts work at the end of the line. Raises RequestError if the line is too long, or the server ends."""
        if not self._open:
            raise RequestError("the server is stopping", status=STOPPING)
        if len(self._tickets) > self._longest:
            raise RequestError(f"{self._longest} requests are waiting already; try again later", status=BUSY)
        ticket = Ticket(self, seconds=self._seconds)
        self._tickets.append(ticket)
        self._worker.submit(ticket.run, work, self._ended)
        return ticket

    def _ended(self, ticket: Ticket) -> None:
        if ticket in self._tickets:
            self._tickets.remove(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Takes a request out that still waits. The first one runs, and leaves when it has ended."""
        if ticket in self._tickets[1:]:
            self._tickets.remove(ticket)

    def close(self) -> None:
        """Ends all work; the requests are told so."""
        self._open = False
        for ticket in list(self._tickets):
            ticket.cancel()
            ticket.say(RequestError("the server is stopping", status=STOPPING))
        self._worker.shutdown(wait=False)
