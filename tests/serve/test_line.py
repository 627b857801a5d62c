"""Requests are answered one after the other; those that leave, and those that come too late, hold up nobody."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from frankenmoe.errors import PlanError
from frankenmoe.serve.errors import RequestError
from frankenmoe.serve.line import Line, Ticket, Waiting


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

        one, two, three = (line.join(work(name)) for name in ("one", "two", "three"))
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


def test_a_full_line_and_a_closed_one_refuse() -> None:
    async def run() -> None:
        line, gate = Line(seconds=60, longest=1), threading.Event()
        running, waiting = (line.join(lambda _: bool(gate.wait(30))) for _ in range(2))  # type: ignore[arg-type, return-value]
        with pytest.raises(RequestError, match="1 requests are waiting"):
            line.join(lambda _: None)
        line.close()
        gate.set()
        for ticket in (running, waiting):
            with pytest.raises(RequestError, match="stopping") as refused:
                await all_of(ticket.heard())
            assert refused.value.status == 503
        with pytest.raises(RequestError, match="stopping"):
            line.join(lambda _: None)

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

        assert await all_of(line.join(long).heard()) == ["over"]
        with pytest.raises(RequestError, match="the plan is wrong; mend it") as refused:
            await all_of(line.join(fails).heard())
        assert refused.value.status == 400
        with pytest.raises(RequestError, match="its log says why") as failed:
            await all_of(line.join(breaks).heard())
        assert failed.value.status == 500
        line.close()

    asyncio.run(run())
