"""Check every HTTP request before the application handles it.

The checks concern the lengths of the address and the headers, the path, the host, the origin, the
token, and the size and duration of the body. The checks of host and origin protect against pages of
other sites that a browser has open. Headers of the responses prevent a browser from loading or
using what the page does not need.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import secrets
import sys
import traceback
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pab.search.results import one_line

LOOPBACK = frozenset(("127.0.0.1", "localhost", "::1"))
SHORTEST_TOKEN = 12  # characters
COOKIE = "pab_search"  # prefix of the name
OPEN_PATHS = ("/login", "/static/")  # prefixes of paths that need no token
SMALL_BODY = 64 << 10  # bytes; queries and logins
MARKS_BODY = 16 << 20  # bytes; 5,000 marks with long texts
UPLOAD_BODY = 20 << 20  # bytes of an uploaded image
LARGE_BODIES = 8  # maximum number of bodies above SMALL_BODY that are received at a time
LONGEST_TARGET = 16 << 10  # bytes of path and query; a shared link contains the texts of a query
LONGEST_HEADERS = 32 << 10  # bytes
BODY_S = 30.0  # seconds to receive a body
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with no-referrer, a form would send the origin null
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Refused(Exception):
    """Refusal of a request: HTTP status and one sentence."""

    def __init__(self, status: int, problem: str) -> None:
        super().__init__(problem)
        self.status, self.problem = status, problem


@dataclass(frozen=True)
class Access:
    """Rules that decide who may use the server.

    Attributes:
        host: address that the server listens on.
        token: shared secret; None only for a loopback address.
        session: key of the session cookies.
    """

    host: str
    token: str | None = None
    session: bytes = b""

    @classmethod
    def create(cls, host: str, token: str | None) -> Access:
        """Create the access rules with a new key for session cookies."""
        return cls(host, token, secrets.token_bytes(32))

    def cookie(self) -> str:
        """Return the value of the session cookie, which is valid until the process ends."""
        assert self.token is not None
        return hmac.new(self.session, self.token.encode(), hashlib.sha256).hexdigest()

    def is_token(self, value: str) -> bool:
        """Return true if a value is the token; the comparison takes constant time."""
        assert self.token is not None
        return hmac.compare_digest(value.encode("utf-8", "replace"), self.token.encode())

    def allows(self, request: HTTPConnection) -> bool:
        """Return true if no token is needed, or the request has the token or a session cookie.

        The token is in the header Authorization.
        """
        if self.token is None:
            return True
        kind, _, value = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self.is_token(value.strip()):
            return True
        # Unlike http.cookies, Starlette reads cookies that follow a malformed one.
        found = request.cookies.get(cookie_name(request.scope), "")
        return hmac.compare_digest(found.encode("utf-8", "replace"), self.cookie().encode())


def cookie_name(scope: Scope) -> str:
    """Name the session cookie after the server's port, because browsers send it to all ports."""
    return f"{COOKIE}_{scope['server'][1]}"


class Guard:
    """ASGI middleware that makes the checks listed in the module's docstring."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access
        self._large = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request; pass it on with its whole body, or refuse it.

        An unauthorized GET request for a page is redirected to the login page.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        try:
            check_target(scope)
            check_host(headers, self.access)
            check_origin(headers, scope["method"])
            path = scope["path"]
            if not path.startswith(OPEN_PATHS) and not self.access.allows(HTTPConnection(scope)):
                if scope["method"] == "GET" and not path.startswith("/api/"):
                    await _redirect_to_login(sending, scope["query_string"])
                    return
                raise Refused(401, "expected the server's token in the header Authorization")
            await self._with_body(scope, headers, receive, sending)
        except Refused as refused:
            await _answer(sending, refused)

    async def _with_body(
        self, scope: Scope, headers: Headers, receive: Receive, send: Send
    ) -> None:
        limit = _largest_body(scope["path"], headers)
        declared = _declared_length(headers)
        if declared is not None and declared > limit:
            raise Refused(413, f"expected a body of at most {limit:,} bytes")
        chunked = declared is None and "transfer-encoding" in headers
        large = limit > SMALL_BODY and (chunked or (declared or 0) > SMALL_BODY)
        if large and self._large >= LARGE_BODIES:
            raise Refused(429, "the server is receiving other uploads; try again")
        self._large += large
        try:
            body = await _received(receive, limit)
        finally:
            self._large -= large
        if body is None:
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        try:
            await self.app(scope, replay, send)
        except Exception as error:  # noqa: BLE001 - a fault; the application has answered with 500
            log(error)


def check_target(scope: Scope) -> None:
    """Refuse addresses and headers that are longer than the page needs, and unprintable paths.

    Raises:
        Refused: path and query together, or the headers, are too long, or the path has
            unprintable characters, such as control characters.
    """
    path = scope["path"]
    if len(path) + len(scope["query_string"]) > LONGEST_TARGET:
        raise Refused(414, f"expected an address of at most {LONGEST_TARGET:,} bytes")
    if sum(len(name) + len(value) for name, value in scope["headers"]) > LONGEST_HEADERS:
        raise Refused(431, f"expected headers of at most {LONGEST_HEADERS:,} bytes")
    if not path.isprintable():
        raise Refused(400, "expected an address of printable characters")


def check_host(headers: Headers, access: Access) -> None:
    """Refuse names of other sites that resolve to this server (DNS rebinding).

    A token protects against this attack too, so with a token any name is accepted.

    Raises:
        Refused: the header Host is missing, or names another site and the server has no token.
    """
    host = headers.get("host", "")
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    name = name.strip("[]").lower()
    if not name:
        raise Refused(400, "expected a header Host")
    if access.token is None and name != access.host.lower() and not is_loopback(name):
        raise Refused(421, "expected the address of this server in the header Host")


def check_origin(headers: Headers, method: str) -> None:
    """Refuse requests, except GET and HEAD, that a page of another site sends.

    Raises:
        Refused: a page of another site has sent such a request.
    """
    if method in ("GET", "HEAD"):
        return
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != headers["host"].lower():
        words = "expected a request from the server's own page; a proxy must keep the header Host"
        raise Refused(403, words)


def log(error: BaseException) -> None:
    """Write a fault to stderr; control characters that a client may have sent are escaped."""
    text = "".join(traceback.format_exception(error)).rstrip("\n")
    for line in text.split("\n"):
        print(one_line(line), file=sys.stderr)


def is_loopback(host: str) -> bool:
    """Return true if an address is reachable only from this machine."""
    if host in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _largest_body(path: str, headers: Headers) -> int:
    if path == "/api/search" and headers.get("content-type", "").startswith("multipart/"):
        return UPLOAD_BODY + SMALL_BODY
    return MARKS_BODY if path == "/api/annotation" else SMALL_BODY


def _declared_length(headers: Headers) -> int | None:
    value = headers.get("content-length")
    if value is None:
        return None
    if not value.isascii() or not value.isdecimal():
        raise Refused(400, "expected a number in the header Content-Length")
    return int(value[:20])


async def _received(receive: Receive, limit: int) -> bytes | None:
    """Receive a body; return None if the client has disconnected.

    Raises:
        Refused: the body is too large or too slow.
    """
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise Refused(413, f"expected a body of at most {limit:,} bytes")
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        raise Refused(408, f"expected the body within {BODY_S:g} seconds") from error


async def _answer(send: Send, refused: Refused) -> None:
    body = json.dumps({"error": refused.problem}).encode()
    # The rest of a refused body is discarded until `connections` closes the connection. If the
    # server closed it at once, the client might not receive the answer.
    headers = [
        (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
    ]  # fmt: skip
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _redirect_to_login(send: Send, query: bytes) -> None:
    place = b"/login?" + query if query else b"/login"
    headers: list[Any] = [(b"location", place), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 303, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
