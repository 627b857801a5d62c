"""The line in which requests wait: one work at a time, in the order in which they came.

All models share the machine, so two works at once would not end earlier. Answers of one model do, if it reads their
tokens together; so a work may take the next request along if that goes the same way.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from frankenmoe.errors import FrankenMoEError
from frankenmoe.serve.errors import BUSY, UNAVAILABLE, RequestError, of_error

LONGEST = 64  # requests that wait
EVERY = 1.0  # seconds between two reports to one that waits
_log = logging.getLogger("frankenmoe.serve")


class HaltedError(Exception):
    """The work must end now: all requests that it is for were cancelled, or their time is over."""


@dataclass(frozen=True)
class Waiting:
    """`before` requests run or wait before this one."""

    before: int


@dataclass(frozen=True)
class Job:
    """What a request wants: `work` is done with its ticket, which has what is `asked`. Jobs of one `way` go together,
    those without a way alone."""

    work: Callable[["Ticket"], None]
    asked: Any = None
    way: Hashable = None


class Ticket:
    """A request in the line: what it gets is told in `heard`, and `cancel` takes it out, also while it runs."""

    def __init__(self, line: "Line", job: Job, *, seconds: float) -> None:
        self.job = job
        self._line = line
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._stop = threading.Event()
        self._seconds = seconds
        self._until = float("inf")

    @property
    def asked(self) -> Any:
        """What the request asks for."""
        return self.job.asked

    def say(self, event: object) -> None:
        """Tells the request something, from any thread."""
        with suppress(RuntimeError):  # the loop has ended, and so has the request
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    @property
    def halted(self) -> bool:
        """Whether the work must end now: it was cancelled or has ended, or its time is over."""
        return self._stop.is_set() or time.monotonic() > self._until

    def check(self, *_: object) -> None:
        """Raises HaltedError if the work must end now."""
        if self.halted:
            raise HaltedError

    def along(self, fits: Callable[[Any], bool]) -> "Ticket | None":
        """The next request, if it goes the same way and what it asks for `fits`. It runs from now on, and must be ended
        by the work that called this."""
        return self._line.take(lambda job: job.way is not None and job.way == self.job.way and fits(job.asked))

    def begin(self) -> None:
        """Its time runs from now on."""
        self._until = time.monotonic() + self._seconds

    def end(self, error: Exception | None = None) -> None:
        """Says how the work ended: well, or with an error. From any thread; what is said later is not heard."""
        self._stop.set()
        if self._line.remove(self):
            self.say(None if error is None else _told(error))

    def cancel(self) -> None:
        """Ends the work, or lets it never begin."""
        self._stop.set()
        if self._line.is_waiting(self):
            self.end()

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


def _told(error: Exception) -> RequestError:
    """An error as the request is told it."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, FrankenMoEError):
        return of_error(error)
    _log.error("a request failed", exc_info=error)
    return RequestError("the server failed to answer; its log says why", status=500)


class Line:
    """The requests that run and wait."""

    def __init__(self, *, seconds: float, longest: int = LONGEST) -> None:
        """`seconds` is the most that one request may run."""
        self._waiting: list[Ticket] = []
        self._running: list[Ticket] = []
        self._lock = threading.Lock()  # of both lists, which the worker changes, too
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="generation")
        self._seconds, self._longest = seconds, longest
        self._open = True

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn. The first one of an idle line does not."""
        return max(0, len(self._waiting) - (not self._running))

    def before(self, ticket: Ticket) -> int:
        """Requests that run or wait before this one; 0 when it runs or has ended."""
        with self._lock:
            return len(self._running) + self._waiting.index(ticket) if ticket in self._waiting else 0

    def is_waiting(self, ticket: Ticket) -> bool:
        """Whether its turn has not come."""
        return ticket in self._waiting

    def join(self, job: Job) -> Ticket:
        """Puts a job at the end of the line, from the event loop's thread.

        Raises RequestError if the line is too long, or the server ends.
        """
        if not self._open:
            raise RequestError("the server is stopping", status=UNAVAILABLE)
        ticket = Ticket(self, job, seconds=self._seconds)
        with self._lock:
            if self.waiting >= self._longest:
                raise RequestError(f"{self._longest} requests are waiting already; try again later", status=BUSY)
            self._waiting.append(ticket)
        self._worker.submit(self._turn)
        return ticket

    def take(self, fits: Callable[[Job], bool]) -> Ticket | None:
        """The first one that waits, which runs from now on; None if there is none, or its job does not fit."""
        with self._lock:
            if not self._waiting or not fits(self._waiting[0].job):
                return None
            ticket = self._waiting.pop(0)
            self._running.append(ticket)
        ticket.begin()
        return ticket

    def _turn(self) -> None:
        """Does the work of the first one; of none if that was taken along, or has left."""
        ticket = self.take(lambda _: True)
        if ticket is None:
            return
        try:
            ticket.job.work(ticket)
        except Exception as error:
            ticket.end(error)
        else:
            ticket.end()

    def remove(self, ticket: Ticket) -> bool:
        """Takes a request out, and says whether it was there."""
        with self._lock:
            found = next((each for each in (self._waiting, self._running) if ticket in each), None)
            if found is not None:
                found.remove(ticket)
            return found is not None

    def close(self) -> None:
        """Ends all work; the requests are told so."""
        self._open = False
        with self._lock:
            tickets = [*self._waiting, *self._running]
        for ticket in tickets:
            ticket.end(RequestError("the server is stopping", status=UNAVAILABLE))
        self._worker.shutdown(wait=False)
