"""Requests are answered one after the other; those that leave, and those that come too late, hold up nobody."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from frankenmoe.errors import PlanError
from frankenmoe.serve.errors import RequestError
from frankenmoe.serve.line import Job, Line, Ticket, Waiting


async def all_of(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


def test_requests_take_turns_and_those_who_leave_are_not_counted() -> None:
    async def run() -> None:
        line, gate, order = Line(seconds=60), threading.Event(), []

        def work(name: str) -> Any:
            def write(ticket: Ticket) -> None:
                gate.wait(30)
                order.append(name)
                ticket.say(name)

            return write

        one, two, three = (line.join(Job(work(name))) for name in ("one", "two", "three"))
        assert [line.before(each) for each in (one, two, three)] == [0, 1, 2]
        assert await anext(three.heard()) == Waiting(2)
        two.cancel()
        assert line.before(three) == 1
        assert line.waiting == 1
        gate.set()
        assert (await all_of(three.heard()))[-1] == "three"
        assert await all_of(one.heard()) == ["one"]
        assert order == ["one", "three"]
        assert line.waiting == 0
        line.close()

    asyncio.run(run())


def test_work_takes_along_what_goes_the_same_way_and_nobody_is_overtaken() -> None:
    async def run() -> None:
        line, gate, done = Line(seconds=60), threading.Event(), []

        def write(ticket: Ticket) -> None:
            gate.wait(30)
            others = iter(lambda: ticket.along(lambda asked: asked < 9), None)
            for each in (ticket, *others):
                done.append((each.asked, line.waiting))
                each.say(each.asked)
                each.end()

        asked = [(1, "a"), (2, "a"), (3, "b"), (4, "a"), (5, None), (6, None), (7, "a"), (9, "a"), (8, "a")]
        tickets = [line.join(Job(write, number, way)) for number, way in asked]
        assert [line.before(each) for each in tickets] == list(range(9))
        gate.set()
        for (number, _), ticket in zip(asked, tickets, strict=True):
            heard = [event for event in await all_of(ticket.heard()) if not isinstance(event, Waiting)]
            assert heard == [number]
        # the works: 1 takes 2 along; 3 is of another way, and two without a way do not go together; 9 does not fit
        assert done == [(1, 7), (2, 7), (3, 6), (4, 5), (5, 4), (6, 3), (7, 2), (9, 0), (8, 0)]
        line.close()

    asyncio.run(run())


def test_a_full_line_and_a_closed_one_refuse() -> None:
    async def run() -> None:
        line, gate = Line(seconds=60, longest=1), threading.Event()
        running, waiting = (line.join(Job(lambda _: bool(gate.wait(30)))) for _ in range(2))  # type: ignore[arg-type, return-value]
        with pytest.raises(RequestError, match="1 requests are waiting"):
            line.join(Job(lambda _: None))
        line.close()
        gate.set()
        for ticket in (running, waiting):
            with pytest.raises(RequestError, match="stopping") as refused:
                await all_of(ticket.heard())
            assert refused.value.status == 503
        with pytest.raises(RequestError, match="stopping"):
            line.join(Job(lambda _: None))

    asyncio.run(run())


def test_work_that_checks_ends_when_the_server_does() -> None:
    async def run() -> None:
        line, begun = Line(seconds=60), threading.Event()

        def fits(ticket: Ticket) -> None:
            begun.set()
            while True:
                ticket.check()
                time.sleep(0.01)

        ticket = line.join(Job(fits))
        assert await asyncio.to_thread(begun.wait, 30)
        line.close()
        with pytest.raises(RequestError, match="stopping"):
            await all_of(ticket.heard())
        await asyncio.to_thread(line._worker.shutdown)  # which waits for the thread

    asyncio.run(run())


def test_work_ends_when_its_time_is_over_and_failures_are_told() -> None:
    async def run() -> None:
        line = Line(seconds=0.05)

        def long(ticket: Ticket) -> None:
            while not ticket.halted:
                time.sleep(0.01)
            ticket.say("over")

        def fails(_: Ticket) -> None:
            raise PlanError("the plan is wrong", hint="mend it")

        def breaks(_: Ticket) -> None:
            raise ValueError("a secret path")

        assert await all_of(line.join(Job(long)).heard()) == ["over"]
        with pytest.raises(RequestError, match="the plan is wrong; mend it") as refused:
            await all_of(line.join(Job(fails)).heard())
        assert refused.value.status == 400
        with pytest.raises(RequestError, match="its log says why") as failed:
            await all_of(line.join(Job(breaks)).heard())
        assert failed.value.status == 500
        line.close()

    asyncio.run(run())
