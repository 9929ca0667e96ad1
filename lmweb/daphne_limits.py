"""Bounds on what Daphne takes in before it calls the application: the size of a body, and the time it may take."""

from __future__ import annotations

from typing import Any

import daphne.http_protocol
from twisted.internet import reactor as installed_reactor
from twisted.internet.tcp import Connection

from lmweb.body_limits import BODY_SECONDS, DEFAULT_MAX_BYTES, Render, plain_text, too_large, too_slow
from lmweb.errors import LmwebError

#: How long a refused client may go on sending into the void, so that it gets to read why.
LINGER_SECONDS = 5.0

reactor: Any = installed_reactor  # Twisted's type describes the module before a reactor is installed


class LimitedRequest(daphne.http_protocol.WebRequest):
    """Daphne's request with a bounded body."""

    max_bytes = DEFAULT_MAX_BYTES
    render: Render = staticmethod(plain_text)
    received = 0
    refused = False
    timer: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Twisted would parse forms, which Django does, and answer those that it does not understand itself, without a body.
        super().__init__(*args, **kwargs, parsePOSTFormSubmission=False)

    def gotLength(self, length: int | None) -> None:  # noqa: N802  (Twisted's name)
        """Check the declared length, and start the clock."""
        super().gotLength(length)
        self.timer = reactor.callLater(BODY_SECONDS, self.refuse, too_slow())
        if length is not None and length > self.max_bytes:
            self.refuse(too_large(self.max_bytes))

    def handleContentChunk(self, data: bytes) -> None:  # noqa: N802  (Twisted's name)
        """Count what arrives; after a refusal it is dropped."""
        self.received += len(data)
        if self.received > self.max_bytes and not self.refused:
            self.refuse(too_large(self.max_bytes))
        if not self.refused:
            super().handleContentChunk(data)

    def process(self) -> Any:
        """Hand the complete request to the application."""
        self.stop_timer()
        return None if self.refused else super().process()

    def handle_reply(self, message: dict[str, Any]) -> None:
        """Send now what Twisted would send in the next turn of its loop: between two turns other requests are handled.

        Whatever does not go out at once, also because of an error, is left to that turn.
        """
        super().handle_reply(message)
        if self.finished or self.channel is None:
            return  # the connection may be about to close, which that turn sees to
        transport = self.channel.transport
        if isinstance(transport, Connection) and transport.connected:
            transport.doWrite()  # type: ignore[no-untyped-call]

    def connectionLost(self, reason: Any) -> None:  # noqa: N802  (Twisted's name)
        """Forget the clock."""
        self.stop_timer()
        super().connectionLost(reason)

    def stop_timer(self) -> None:
        """Stop the clock."""
        if self.timer is not None and self.timer.active():
            self.timer.cancel()

    def refuse(self, error: LmwebError) -> None:
        """Answer at once, and close the connection when the client has had time to read the answer."""
        self.refused = True
        self.stop_timer()
        # Twisted tells a request its own path only when the body is complete; here it merely chooses the format of the answer.
        path = getattr(self.channel, "_path", b"").decode("ascii", "replace")
        content_type, body = self.render(path, error)
        head = (
            f"HTTP/1.1 {error.status} Refused\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        transport = self.channel.transport
        transport.write(head.encode() + body)
        reactor.callLater(LINGER_SECONDS, transport.abortConnection)


def install(render: Render = plain_text) -> None:
    """Make this process's Daphne use it. ``render`` chooses the format of refusals by path."""
    LimitedRequest.render = staticmethod(render)
    daphne.http_protocol.WebRequest = LimitedRequest
