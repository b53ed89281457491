"""Work for one thread, in which clients take turns: what one of them has sent waits for what another has sent first."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Turns:
    """A thread; used from one event loop.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}
        """Of clients that wait; the first one's turn is next."""
        self._is_busy = False

    def close(self) -> None:
        """End the thread, once it has ended what it does."""
        self._thread.shutdown(cancel_futures=True)

    async def run(self, queue: str, function: Callable[..., T], *arguments: Any) -> T:
        """What a function gives that is called in the thread, when the turn of its queue has come.

        Args:
            queue: of the client.
            function: to call.
            arguments: of the function.
        """
        if self._is_busy:
            turn = asyncio.get_running_loop().create_future()
            self._queues.setdefault(queue, deque()).append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._next()
                raise
        self._is_busy = True
        running = asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        # Also where nobody waits for it any more.
        running.add_done_callback(self._next)
        return await asyncio.shield(running)

    def _next(self, ended: asyncio.Future[Any] | None = None) -> None:
        self._is_busy = False
        if ended is not None and not ended.cancelled():
            # An error that nobody waits for is none of the log's.
            ended.exception()
        while self._queues:
            queue = next(iter(self._queues))
            waiting = self._queues.pop(queue)
            turn = waiting.popleft()
            if waiting:
                # Behind all others.
                self._queues[queue] = waiting
            if not turn.done():
                self._is_busy = True
                turn.set_result(None)
                return
