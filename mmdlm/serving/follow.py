"""Between the engine's thread and the event loop: wait for rows, follow their drafts, let go of who is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from mmdlm.sampling.denoise import State
from mmdlm.serving.engine import Ticket

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; cancelled, and ClientGone, where the client hangs up first. The body must have been read."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def finished(tickets: list[Ticket]) -> list[State]:
    """The last State of every row. Where one fails, or the waiting is cancelled, all are taken out of the engine."""
    try:
        return list(await asyncio.gather(*(asyncio.wrap_future(ticket.future) for ticket in tickets)))
    finally:
        for ticket in tickets:
            ticket.future.cancel()


class Mail:
    """The newest State of each of a request's rows. Who reads slowly misses drafts and fills up no memory."""

    def __init__(self, rows: int) -> None:
        self._loop, self._new = asyncio.get_running_loop(), asyncio.Event()
        self._newest: dict[int, State] = {}
        self.listeners: list[Callable[[State], None]] = [partial(self._post, row) for row in range(rows)]

    def _post(self, row: int, state: State) -> None:
        """Called in the engine's thread."""
        self._loop.call_soon_threadsafe(self._put, row, state)

    def _put(self, row: int, state: State | None) -> None:
        if state is not None:
            self._newest[row] = state
        self._new.set()

    async def states(self, tickets: list[Ticket]) -> AsyncIterator[tuple[int, State]]:
        """(row, State) as they come, each row's last one included; raises what a row failed with."""
        for row, ticket in enumerate(tickets):
            ticket.future.add_done_callback(
                lambda future, row=row: self._loop.call_soon_threadsafe(self._put, row, None)  # type: ignore[misc]
            )
        left = set(range(len(tickets)))
        try:
            while left:
                await self._new.wait()
                self._new.clear()
                arrived, self._newest = self._newest, {}
                for row, state in arrived.items():
                    if bool(state.done.all()):
                        left.discard(row)
                    yield row, state
                for row in left:
                    if tickets[row].future.done():
                        tickets[row].future.result()  # raises
        finally:
            for ticket in tickets:
                ticket.future.cancel()
