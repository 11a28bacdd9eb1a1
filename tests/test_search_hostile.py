"""Hostile requests to the search server are refused with the right status and leak nothing."""

from __future__ import annotations

import io
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from colour_index import SCRIPT, TOKEN, make_index, png, served, service_of, serving
from PIL import Image

import pab.search.server.security as security
from pab.search.index import Index
from pab.search.server.app import create_app
from pab.search.server.connections import Connection
from pab.search.server.models import SearchRequest
from pab.search.server.pictures import Decoders
from pab.search.server.security import Access
from pab.search.server.service import QueryError, Service


class Fast(Connection):
    """Connection with short limits."""

    most = 40
    headers_s = 1.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("server")
    make_index(root)
    return root


@pytest.fixture(scope="module")
def service(root: Path) -> Service:
    return service_of(Index.open(root / "index"))


@pytest.fixture(scope="module")
def at(service: Service) -> Iterator[str]:
    """Address of a server with short limits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(security, "BODY_S", 2.0)
        app = create_app(service, Access.create("127.0.0.1", None), parallel=2)
        with serving(app, Fast) as address:
            yield address


@pytest.fixture(scope="module")
def client(at: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=at, timeout=60) as client:
        yield client


# ---------------------------------------------------------------------------------- hostile input


def chunk(kind: bytes, content: bytes) -> bytes:
    size, check = struct.pack(">I", len(content)), struct.pack(">I", zlib.crc32(kind + content))
    return size + kind + content + check


def bomb(width: int, height: int, *, rows: int = 0, more: bytes = b"") -> bytes:
    """Make a PNG whose header declares a size, with the pixels of only some rows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    packer = zlib.compressobj(9)
    row = bytes(width + 1)
    pixels = b"".join(packer.compress(row) for _ in range(rows)) + packer.flush()
    start = b"\x89PNG\r\n\x1a\n" + header + more
    return start + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    return chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200 << 20), 9))


def long_gif() -> bytes:
    stream = io.BytesIO()
    Image.new("P", (1, 5_000)).save(stream, "gif")
    return stream.getvalue()


JSON = {"content-type": "application/json"}
REQUESTS: dict[str, tuple[int, dict[str, Any]]] = {
    "traversal in an id": (404, {"path": "/api/images/..%2f..%2fetc%2fpasswd"}),
    "traversal unencoded": (404, {"path": "/api/images/../../../etc/passwd"}),
    "absolute path as id": (404, {"path": "/api/thumbnails/%2Fetc%2Fpasswd"}),
    "row without hash": (404, {"path": "/api/images/0"}),
    "row with a wrong hash": (404, {"path": "/api/images/0-0000000000000000"}),
    "row beyond the index": (404, {"path": "/api/images/9999999999-0000000000000000"}),
    "negative row": (404, {"path": "/api/thumbnails/-1-0000000000000000"}),
    "digits of another script": (404, {"path": "/api/images/%D9%A3-0000000000000000"}),
    "facts of a path": (404, {"path": "/api/images/index.json/facts"}),
    "traversal in a static file": (404, {"path": "/static/..%2fapp.py"}),
    "encoded dots": (404, {"path": "/static/%2e%2e/%2e%2e/index.py"}),
    "NUL in the path": (400, {"path": "/api/images/0%00.jpg"}),
    "escape sequence in the path": (400, {"path": "/%1b[31mred"}),
    "long address": (414, {"path": "/?q=" + "a" * 20_000}),
    "path as query image": (422, {"json": {"image": "../../etc/passwd"}}),
    "unknown upload": (404, {"json": {"image": "upload-" + "0" * 32}}),
    "path as folder": (200, {"json": {"text": "red", "folder": "../../etc"}}),
    "broken image": (422, {"image": png((1, 2, 3), (300, 300))[:200]}),
    "text as image": (422, {"image": b"<script>alert(1)</script>"}),
    "empty image": (422, {"image": b""}),
    "script in SVG": (422, {"image": b"<svg xmlns='http://www.w3.org/2000/svg' onload='x()'/>"}),
    "PostScript": (422, {"image": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n"}),
    "10 gigapixels": (422, {"image": bomb(100_000, 100_000)}),
    "zip bomb": (422, {"image": bomb(15_000, 15_000, rows=15_000)}),
    "zip bomb in a text": (422, {"image": bomb(8, 8, more=text_bomb())}),
    "very long image": (422, {"image": long_gif()}),
    "25 MB": (413, {"image": bytes(25 << 20)}),
    "two images": (400, {"files": [("image", b"a"), ("image", b"b")]}),
    "other file": (422, {"files": [("image", b"a"), ("index", b"b")], "expect": (400, 422)}),
    "10 MB of text": (413, {"json": {"text": "a" * (10 << 20)}}),
    "long text": (422, {"json": {"text": "a " * 1_500}}),
    "empty text": (422, {"json": {"text": ""}}),
    "invisible text": (422, {"json": {"text": "\u200b \u2060"}}),
    "lone surrogate": (422, {"content": b'{"text": "\\ud800 red"}', "headers": JSON}),
    "number as text": (422, {"json": {"text": 5}}),
    "unknown field": (422, {"json": {"text": "red", "path": "/etc/passwd"}}),
    "no query": (422, {"json": {}}),
    "not JSON": (422, {"content": b"text=red", "headers": JSON}),
    "not UTF-8": (422, {"content": b'{"text": "\xff"}', "headers": JSON}),
    "deep JSON": (422, {"content": b"[" * 60_000, "headers": JSON}),
    "infinite weight": (
        422, {"content": b'{"text":"a","weights":{"text":1e999}}', "headers": JSON}),
    "NaN as score": (422, {"content": b'{"text":"a","least":NaN}', "headers": JSON}),
    "end before start": (422, {"json": {"text": "red", "start_s": 5, "end_s": 1}}),
    "a million results": (422, {"json": {"text": "red", "limit": 1_000_000}}),
    "negative offset": (422, {"json": {"text": "red", "offset": -1}}),
    "many unwanted texts": (422, {"json": {"text": "red", "minus": ["a"] * 1_000}}),
    "other type of body": (415, {"content": b"red", "headers": {"content-type": "text/plain"}}),
    "broken form": (400, {"content": b"--x", "headers": {"content-type": "multipart/form-data"}}),
    "other method": (405, {"method": "DELETE", "path": "/api/search"}),
    "host of another site": (421, {"json": {"text": "a"}, "headers": {"host": "evil.example"}}),
    "page of another site": (
        403, {"json": {"text": "a"}, "headers": {"origin": "http://evil.example"}}),
    "marks of a path": (
        422, {"path": "/api/annotation",
              "json": {"marks": [{"text": "a", "image": "/etc/passwd", "right": True}]}}),
    "marks of no image": (
        404, {"path": "/api/annotation",
              "json": {"marks": [{"text": "a", "image": "0-0000000000000000", "right": True}]}}),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_hostile_requests(client: httpx.Client, root: Path, name: str) -> None:
    status, given = REQUESTS[name]
    request = dict(given)
    expected = request.pop("expect", (status,))
    path = request.pop("path", "/api/search")
    if "image" in request:
        request["files"] = [("image", request.pop("image"))]
    body = any(key in request for key in ("json", "files", "content"))
    method = request.pop("method", "POST" if body else "GET")
    url = httpx.URL(str(client.base_url)).copy_with(raw_path=path.encode())
    answer = client.request(method, url, **request)
    assert answer.status_code in expected, answer.text
    for secret in (str(root), "root:", "Traceback", "site-packages", "/home", "passwd"):
        assert secret not in answer.text
    if status >= 400:
        assert answer.json().keys() == {"error"}
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get("/api/health").status_code == 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "image: cannot be read: an empty file"),
        (b"no picture", "image: cannot be read: not a JPEG"),
        (png((1, 2, 3), (300, 300))[:200], "image: cannot be read: "),
    ],
)
def test_an_unreadable_upload_is_named_by_its_content(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, words: str
) -> None:
    (tmp_path / "image").mkdir()
    monkeypatch.chdir(tmp_path)  # decoding processes start here
    decoders = Decoders()
    monkeypatch.setattr(service, "decoders", decoders)
    try:
        with pytest.raises(QueryError) as caught:
            service.search(SearchRequest(), content)
    finally:
        decoders.close()
    assert str(caught.value).startswith(words)
    assert "no such file" not in str(caught.value)
    assert "directory" not in str(caught.value)


def test_there_are_at_least_forty_hostile_requests() -> None:
    assert len(REQUESTS) >= 40


def test_script_in_names_and_captions_stays_text(client: httpx.Client) -> None:
    answer = client.post("/api/search", json={"text": "red", "limit": 100})
    assert SCRIPT in [one["name"] for one in answer.json()["results"]]
    assert answer.headers["content-type"] == "application/json"
    page = client.get("/", params={"q": "<script>alert(1)</script>"})
    assert "<script>alert" not in page.text
    assert "onerror" not in page.text


def connect(at: str) -> socket.socket:
    host, _, port = at.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def ended(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    parts = []
    try:
        while part := connection.recv(65_536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02garbage\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 50_000 + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
         b"400"),
    ],
    ids=["no HTTP", "long header", "no host", "two lengths"],
)  # fmt: skip
def test_malformed_requests(at: str, client: httpx.Client, sent: bytes, status: bytes) -> None:
    with connect(at) as connection:
        connection.sendall(sent)
        assert connection.recv(4_096).split(b" ")[1] == status
    assert client.get("/api/health").status_code == 200


def test_slow_requests_are_ended(at: str, client: httpx.Client) -> None:
    start = b"POST /api/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    began = time.monotonic()
    with connect(at) as body, connect(at) as header, connect(at) as silent:
        body.sendall(start + b"Content-Length: 5000\r\n\r\n{")
        header.sendall(start)
        assert client.get("/api/health").status_code == 200  # other requests do not wait
        assert ended(silent) == b""
        assert ended(header) == b""
        assert body.recv(4_096).split(b" ")[1] == b"408"
    assert time.monotonic() - began < 15


def test_connections_are_bounded(at: str, client: httpx.Client) -> None:
    waiting = [connect(at) for _ in range(Fast.most + 15)]
    answers = [ended(connection) for connection in waiting]
    for connection in waiting:
        connection.close()
    assert sum(answer.startswith(b"HTTP/1.1 503") for answer in answers) >= 15
    assert client.get("/api/health").status_code == 200


def test_chunked_body_is_bounded(at: str) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(30):
            yield bytes(1 << 20)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = httpx.post(f"{at}/api/search", content=parts(), headers=headers, timeout=60)
    assert answer.status_code == 413


def test_the_log_has_no_control_characters(
    service: Service, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("sent by a client:\n\x1b[31m\r\x07forged line")

    monkeypatch.setattr(service, "search", fails)
    with serving(create_app(service, Access.create("127.0.0.1", None))) as at:
        answer = httpx.post(f"{at}/api/search", json={"text": "red"}, timeout=60)
    assert answer.status_code == 500
    assert "forged" not in answer.text
    logged = capfd.readouterr().err
    assert "\\x1b[31m\\r\\x07forged line" in logged
    assert not {"\x1b", "\r", "\x07"} & {*logged}


# ------------------------------------------------------------------------------------------ token


def test_a_token_is_required(root: Path) -> None:
    with served(Index.open(root / "index"), TOKEN) as at:
        cookie = f"pab_search_{at.rpartition(':')[2]}"
        for headers in (
            {}, {"Authorization": "Bearer wrong-token"}, {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": "Bearer"}, {"Cookie": f"{cookie}={TOKEN}"},
            {"Cookie": f"{cookie}=" + "0" * 64},
        ):  # fmt: skip
            for path in ("/api/health", "/api/images/0-0000000000000000", "/api/openapi.json"):
                answer = httpx.get(at + path, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": f"Bearer {TOKEN}", "Host": "photos.example"}
        assert httpx.get(f"{at}/api/health", headers=right).status_code == 200

        with httpx.Client(base_url=at) as client:
            answer = client.get("/", params={"q": "red & blue"})
            assert answer.status_code == 303
            place = answer.headers["location"]
            page = client.get(place)
            assert 'name="token"' in page.text
            assert client.post(place, data={"token": "wrong"}).status_code == 401
            answer = client.post(place, data={"token": TOKEN})
            cookie = answer.headers["set-cookie"]
            assert "HttpOnly" in cookie
            assert "SameSite=strict" in cookie
            assert TOKEN not in cookie
            assert answer.headers["location"].startswith("/?q=red")
            assert client.get(answer.headers["location"]).status_code == 200
        # The redirect after the login stays on this server.
        answer = httpx.post(f"{at}/login?next=//evil.example", data={"token": TOKEN})
        assert answer.headers["location"].startswith("/?")


def test_servers_of_one_host_have_their_own_cookies(root: Path) -> None:
    index = Index.open(root / "index")
    with served(index, TOKEN) as one, served(index, TOKEN) as other, httpx.Client() as client:
        for at in (one, other):
            assert client.post(f"{at}/login", data={"token": TOKEN}).status_code == 303
        # Another program on this host may have set a malformed cookie.
        jar = 'other={"a": 1}; ' + "; ".join(f"{name}={v}" for name, v in client.cookies.items())
        for at in (one, other):
            assert client.get(f"{at}/api/health").status_code == 200
            answer = httpx.get(f"{at}/api/health", headers={"Cookie": jar})
            assert answer.status_code == 200


def test_a_proxy_must_keep_the_host(root: Path) -> None:
    with served(Index.open(root / "index"), TOKEN) as at:
        headers = {"Authorization": f"Bearer {TOKEN}", "Origin": "https://photos.lab:8443"}
        ask = {"url": f"{at}/api/search", "json": {"text": "red"}, "timeout": 60}
        answer = httpx.post(**ask, headers={**headers, "Host": "photos.lab:8443"})
        assert answer.status_code == 200
        answer = httpx.post(**ask, headers=headers)
        assert answer.status_code == 403
        assert "a proxy must keep the header Host" in answer.json()["error"]
        login = {"Origin": "https://photos.lab", "Host": "photos.lab"}
        answer = httpx.post(f"{at}/login", data={"token": TOKEN}, headers=login)
        assert "Secure" in answer.headers["set-cookie"]
        answer = httpx.post(f"{at}/login", data={"token": TOKEN}, headers={"Origin": at})
        assert "Secure" not in answer.headers["set-cookie"]
