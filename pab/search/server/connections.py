"""Limit the number of connections, and the time to send a header or to read a response."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 512
HEADERS_S = 10.0  # seconds until the header of a request is complete
READING_S = 60.0  # seconds that a connection may wait for its client to read responses
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class Connection(H11Protocol):
    """uvicorn's HTTP connection, with limits against deliberately slow clients."""

    most = MOST_CONNECTIONS
    headers_s = HEADERS_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._unread_s = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse the connection if too many are open; otherwise start the timer."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(_FULL)
            transport.close()
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Stop the timer at the end of a header, and start it at the first byte of the next one."""
        super().data_received(data)
        self._watch()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; a client that still reads a response gets more time."""
        if self.transport.is_closing():
            return
        if self.transport.get_write_buffer_size() and self._unread_s < READING_S:
            self._unread_s += self.timeout_keep_alive
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        elif self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        if not self._is_idle():
            self._stop()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.headers_s, self._expire)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        if self._is_idle():
            self.transport.abort()
