"""Fetching checkpoints from a local test server: resuming, manifest, errors."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

import pab.fetch
from pab.core.errors import InputError
from pab.fetch import MANIFEST, SOURCES, Source, check, fetch, main

CONTENT = bytes(range(256)) * 4096


class Server(BaseHTTPRequestHandler):
    """Serves :data:`CONTENT`; ``/cut`` sends only half of it, ``/scan`` sends a web page."""

    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        span = self.headers.get("Range")
        self.asked.append(span)
        start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        if self.path == "/none":
            self.send_error(404)
            return
        if start >= len(CONTENT):
            self.send_error(416)
            return
        if self.path == "/scan":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html><title>Sign in</title>")
            return
        rest = CONTENT[start:]
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: len(rest) // 2] if self.path == "/cut" else rest)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("http_proxy", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> Path:
    made = {
        "whole": Source("a/whole.pth", f"{address}/whole"),
        "cut": Source("a/cut.pth", f"{address}/cut"),
        "none": Source("a/none.pth", f"{address}/none"),
        "scan": Source("a/scan.pth", f"{address}/scan"),
        "page": Source("a/page.pth", f"{address}/page", "page"),
    }
    monkeypatch.setattr(pab.fetch, "SOURCES", made)
    return tmp_path


def test_a_file_is_fetched_once_and_recorded(folder: Path) -> None:
    assert fetch("whole", folder).read_bytes() == CONTENT
    facts = {"bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}
    assert json.loads((folder / MANIFEST).read_text()) == {"a/whole.pth": facts}
    fetch("whole", folder)
    assert Server.asked == [None]
    line = f"a/whole.pth: {len(CONTENT):,} bytes, SHA-256 {facts['sha256']}; "
    assert line in check(folder)
    assert "a/cut.pth: missing" in check(folder)


def test_a_later_file_is_added_to_the_manifest(folder: Path) -> None:
    earlier = {"z/other.pth": {"bytes": 3, "sha256": "0" * 64}}
    (folder / MANIFEST).write_text(json.dumps(earlier))
    fetch("whole", folder)
    assert sorted(json.loads((folder / MANIFEST).read_text())) == ["a/whole.pth", "z/other.pth"]
    (folder / "a/whole.pth").write_bytes(CONTENT[:-1])
    assert f"{len(CONTENT) - 1:,} bytes, but {len(CONTENT):,} were fetched; " in check(folder)
    for text, expected in (
        ("{", "broken JSON"),
        ('{"a": {"bytes": "3"}}', "a: .*delete this file"),
    ):
        (folder / MANIFEST).write_text(text)
        with pytest.raises(InputError, match=f"manifest.json.*{expected}"):
            check(folder)


def test_no_tracked_file_is_written(folder: Path) -> None:
    """The README of the checkpoint folder is not changed, and git ignores the manifest."""
    page = folder / "README.md"
    page.write_text("| `a/whole.pth` | role | here | MIT | not known |\n")
    before = page.read_text()
    fetch("whole", folder)
    assert page.read_text() == before
    rules = (Path(__file__).parents[1] / ".gitignore").read_text().splitlines()
    assert "/checkpoints/*" in rules
    assert f"!/checkpoints/{MANIFEST}" not in rules


def test_a_download_resumes_where_it_stopped(folder: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be fetched.*save it as"):
        fetch("cut", folder)
    part = folder / "a/cut.pth.part"
    assert part.stat().st_size == len(CONTENT) // 2
    assert not (folder / "a/cut.pth").exists()
    part.rename(folder / "a/whole.pth.part")
    assert fetch("whole", folder).read_bytes() == CONTENT
    assert Server.asked == [None, f"bytes={len(CONTENT) // 2}-"]


def test_a_complete_part_is_not_fetched_again(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a/whole.pth.part").write_bytes(CONTENT)
    assert fetch("whole", folder).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", "404|Not Found"),
        ("page", "behind a page .*/page; download it .* save it as"),
        ("other", "expected one of whole, cut"),
        ("scan", r"/scan returned a web page \(Sign in\); download it with a browser"),
    ],
)
def test_what_cannot_be_fetched(folder: Path, name: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        fetch(name, folder)
    assert not list((folder).glob("a/*"))


def test_a_file_without_weights_is_reported(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a/whole.pth").write_bytes(b"<html><title>Drive</title>")
    (folder / "a/cut.pth").write_bytes(b"")
    lines = check(folder)
    assert "a/whole.pth: 26 bytes, but a web page (Drive); " in lines
    assert "a/cut.pth: 0 bytes, but an empty file; " in lines


def test_every_source_has_a_row_in_the_readme() -> None:
    table = (Path(__file__).parents[1] / "checkpoints/README.md").read_text()
    for name, source in SOURCES.items():
        assert f"| `{source.path}` |" in table, name


def test_without_names_the_state_of_every_file_is_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--folder", str(folder)])
    out = capsys.readouterr().out
    assert out.count("missing") == 5
    with pytest.raises(InputError, match="expected no names"):
        main(["whole", "--check"])
