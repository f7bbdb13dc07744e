"""HTTP/1.1 with deadlines where uvicorn has none: for the head of a request, and for a client that reads nothing.

A subclass of uvicorn's own protocol, passed by its `http=` option.
"""

import asyncio
from typing import cast

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0
"""Seconds within which the head of a request has to arrive."""

SEND_S = 60.0
"""Seconds for which a client may leave an answer unread."""

MAX_CONNECTIONS = 700
"""Of all clients together. A process may usually open 1,024 files, sockets included."""


class PatientProtocol(H11Protocol):
    """HTTP/1.1 whose patience ends. When connections run out, the one that has been idle longest is closed."""

    idle_since = 0.0
    head_timer: asyncio.TimerHandle | None = None
    send_timer: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()
        if len(self.connections) > MAX_CONNECTIONS:
            open_ones = [cast(PatientProtocol, one) for one in self.connections if not one.transport.is_closing()]
            idle = [one for one in open_ones if one.idle]
            if len(open_ones) > MAX_CONNECTIONS and idle:
                min(idle, key=lambda one: one.idle_since).transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.idle and self.head_timer is None:
            self._expect_head()
        elif not self.idle and self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.send_timer = self.loop.call_later(SEND_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.send_timer is not None:
            self.send_timer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self.head_timer, self.send_timer):
            if timer is not None:
                timer.cancel()

    def _expect_head(self) -> None:
        self.idle_since = self.loop.time()
        self.head_timer = self.loop.call_later(HEAD_S, self.transport.abort)
