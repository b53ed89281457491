"""Clients take turns in one thread."""

import asyncio
import threading
from contextlib import closing

import pytest

from dvora.serve.texts import Turns


def test_one_client_waits_for_one_call_of_another() -> None:
    order = list[str]()

    async def several() -> None:
        with closing(Turns("test")) as turns:
            flood = [turns.run("flood", order.append, f"flood {number}") for number in range(20)]
            tasks = [asyncio.ensure_future(call) for call in flood]
            await asyncio.sleep(0)
            await turns.run("other", order.append, "other")
            await asyncio.gather(*tasks)

    asyncio.run(several())
    assert order.index("other") <= 2
    assert [name for name in order if name != "other"] == [f"flood {number}" for number in range(20)]


def test_who_hangs_up_or_fails_stops_nobody() -> None:
    async def several() -> None:
        go_on = threading.Event()
        with closing(Turns("test")) as turns:
            running = asyncio.ensure_future(turns.run("a", go_on.wait))
            waiting = [asyncio.ensure_future(turns.run(queue, int, "no number")) for queue in "abc"]
            last = asyncio.ensure_future(turns.run("d", int, "7"))
            await asyncio.sleep(0.01)
            running.cancel()
            waiting[1].cancel()
            go_on.set()
            assert await last == 7
            for task in (waiting[0], waiting[2]):
                with pytest.raises(ValueError, match="no number"):
                    await task
            assert await turns.run("a", int, "8") == 8

    asyncio.run(several())
