"""Connections, which close when the server has waited too long for a request, or for its answer to be read."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

LARGEST_HEAD = 2**14
"""Bytes of a request's line and headers, and of what comes after a request before it is answered."""
HEAD_SECONDS = 10
"""For a whole head, from connecting or from the last answer."""
UNREAD_SECONDS = 30
"""In which a client has to read so much that more can be written."""

SMALL, MOST_SMALL = 64, 1000
"""Bytes of a part of a body that costs more to find than to read, and how many of those one may have."""


class Parser(h11.Connection):
    """One of h11's that takes no body in crumbs, by which one client would hold up all others."""

    _small = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._small = 0
        self._small += isinstance(event, h11.Data) and len(event.data) < SMALL
        if self._small > MOST_SMALL:
            raise h11.RemoteProtocolError("a body in too many small parts")
        return event


class Connection(H11Protocol):
    """One of uvicorn's with a timer, which runs while its client is to send a head or to read.

    Where there are as many as may be, a new one takes the place of that which has been waited for longest.
    """

    _timer: asyncio.TimerHandle | None = None
    _since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.conn = Parser(h11.SERVER, LARGEST_HEAD)
        self._wait(HEAD_SECONDS)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            others = [other for other in self.connections - {self} if isinstance(other, Connection) and other._waits]
            if others:
                oldest = min(others, key=lambda other: other._since)
                self.connections.discard(oldest)
                oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        last = self.cycle
        super().handle_events()
        if self.cycle is not last and not self.flow.write_paused:
            self._rest()
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) > LARGEST_HEAD:
            self.transport.abort()

    def on_response_complete(self) -> None:
        """Wait for the next request, which may have come already."""
        self._wait(UNREAD_SECONDS if self.transport.get_write_buffer_size() else HEAD_SECONDS)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Wait until the client reads."""
        super().pause_writing()
        self._wait(UNREAD_SECONDS)

    def resume_writing(self) -> None:
        """Go on; after an answer, wait for the next request."""
        super().resume_writing()
        self._rest()
        if self.cycle.response_complete:
            self._wait(HEAD_SECONDS)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP. It may stand in a body, whose request has then no answer any more."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
            self._wait(HEAD_SECONDS)
        else:
            self.transport.abort()

    def _should_upgrade(self) -> bool:
        return False

    @property
    def _waits(self) -> bool:
        return self._timer is not None or self.cycle.more_body

    def _wait(self, seconds: float) -> None:
        self._rest()
        self._since, self._timer = self.loop.time(), self.loop.call_later(seconds, self.transport.abort)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
