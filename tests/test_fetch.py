"""Fetching checkpoints from a local test server: resuming, manifest, errors."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

import pab.fetch
from pab.core.errors import InputError
from pab.fetch import MANIFEST, SOURCES, Source, check, fetch, main

CONTENT = bytes(range(256)) * 4096


class Server(BaseHTTPRequestHandler):
    """Serve :data:`CONTENT`; ``/cut`` sends only half of it, and ``/scan`` sends a web page.

    Attributes:
        asked: the ``Range`` header of each request.
        paths: the path of each request.
        pages: path -> content other than :data:`CONTENT`.
    """

    asked: ClassVar[list[str | None]] = []
    paths: ClassVar[list[str]] = []
    pages: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        span = self.headers.get("Range")
        self.asked.append(span)
        self.paths.append(self.path)
        start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        content = self.pages.get(self.path, CONTENT)
        if self.path == "/none":
            self.send_error(404)
            return
        if start >= len(content):
            self.send_error(416)
            return
        if self.path == "/scan":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html><title>Sign in</title>")
            return
        rest = content[start:]
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
    for seen in (Server.asked, Server.paths, Server.pages):
        seen.clear()
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
        "vocabulary": Source("a/vocab.txt", f"{address}/scan"),
        "text": Source("a/text.txt", f"{address}/text"),
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
        ("page", "automatically from .*/page; download it .* save it as"),
        ("other", "expected one of whole, cut"),
        ("scan", r"/scan: returned a web page \(Sign in\); download it with a browser"),
        ("vocabulary", r"/scan: returned a web page \(Sign in\); download it with a browser"),
    ],
)
def test_what_cannot_be_fetched(folder: Path, name: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        fetch(name, folder)
    assert not list((folder).glob("a/*"))


def test_a_text_file_is_fetched(folder: Path) -> None:
    Server.pages["/text"] = b"[PAD]\n[UNK]\n"
    assert fetch("text", folder).read_bytes() == b"[PAD]\n[UNK]\n"
    assert "a/text.txt: 12 bytes, SHA-256" in check(folder)


def test_a_file_without_weights_is_reported(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a/whole.pth").write_bytes(b"<html><title>Drive</title>")
    (folder / "a/cut.pth").write_bytes(b"")
    lines = check(folder)
    assert "a/whole.pth: 26 bytes, but a web page (Drive); " in lines
    assert "a/cut.pth: 0 bytes, but an empty file; " in lines


COMMIT = "5" * 40
FILES = {
    "config.json": b"{}", "1_LogitScore/config.json": b'{"true_token_id": 1}',
    "model.safetensors": CONTENT,
}  # fmt: skip
OTHERS = ("README.md", ".gitattributes", "pytorch_model.bin", "modeling.py", "x/onnx/model.onnx")


def listed(files: dict[str, bytes], **changes: Any) -> bytes:
    """Return the hub's list of a repository's files: weights with LFS, small files in git."""
    siblings = []
    for name, content in files.items():
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        one: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
        if name.endswith(".safetensors"):
            one["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        siblings.append(one)
    return json.dumps({"id": "OWNER/MODEL", "sha": COMMIT, "siblings": siblings} | changes).encode()


@pytest.fixture
def hub(folder: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub with the repository of one source, ``vlm``, at the commit :data:`COMMIT`."""
    source = Source("vlm/model", "https://huggingface.co/OWNER/MODEL", "hub")
    monkeypatch.setattr(pab.fetch, "SOURCES", {"vlm": source})
    monkeypatch.setenv("HF_ENDPOINT", f"{address}/")
    files = FILES | dict.fromkeys(OTHERS, b"not needed")
    for revision in ("main", COMMIT):
        Server.pages[f"/api/models/OWNER/MODEL/revision/{revision}?blobs=true"] = listed(files)
    for name, content in files.items():
        Server.pages[f"/OWNER/MODEL/resolve/{COMMIT}/{name}"] = content
    return folder


def test_a_repository_is_fetched_whole_at_one_commit(hub: Path) -> None:
    assert "vlm/model: missing; https://huggingface.co/OWNER/MODEL" in check(hub)
    target = fetch("vlm", hub)
    assert target == hub / "vlm/model"
    found = {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*.*")}
    assert found == FILES, "no code, no pickle, no page"
    assert [path.name for path in (hub / "vlm").iterdir()] == ["model"]
    wanted = [f"/OWNER/MODEL/resolve/{COMMIT}/{name}" for name in sorted(FILES)]
    assert Server.paths == ["/api/models/OWNER/MODEL/revision/main?blobs=true", *wanted]
    recorded = json.loads((hub / MANIFEST).read_text())
    assert recorded == {
        f"vlm/model/{name}": {
            "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "commit": COMMIT,
        }
        for name, content in FILES.items()
    }  # fmt: skip
    total = sum(map(len, FILES.values()))
    assert f"vlm/model: 3 files, {total:,} bytes, commit {COMMIT}; " in check(hub)
    fetch("vlm", hub)
    fetch(f"vlm@{COMMIT[:7]}", hub)
    assert len(Server.paths) == 4, "not fetched again"
    with pytest.raises(InputError, match=f"vlm/model: expected revision 66, found commit {COMMIT}"):
        fetch("vlm@66", hub)
    (hub / MANIFEST).unlink()
    assert "vlm/model: present, but not in manifest.json: not fetched by" in check(hub)


def test_a_branch_of_a_fetched_repository_is_looked_up(hub: Path) -> None:
    fetch("vlm", hub)
    Server.paths.clear()
    fetch("vlm@main", hub)
    assert Server.paths == ["/api/models/OWNER/MODEL/revision/main?blobs=true"], (
        "only the list is fetched"
    )
    newer = "f" * 40
    address = "/api/models/OWNER/MODEL/revision/main?blobs=true"
    Server.pages[address] = Server.pages[address].replace(COMMIT.encode(), newer.encode())
    with pytest.raises(InputError, match=f"expected revision main, found commit {COMMIT}; delete"):
        fetch("vlm@main", hub)


def test_a_named_commit_is_fetched(hub: Path) -> None:
    fetch(f"vlm@{COMMIT}", hub)
    assert Server.paths[0] == f"/api/models/OWNER/MODEL/revision/{COMMIT}?blobs=true"
    (hub / "vlm/model/config.json").write_bytes(b"{} ")
    assert "3 files, but config.json has 3 bytes instead of 2; " in check(hub)
    (hub / "vlm/model/config.json").unlink()
    assert "3 files, but config.json is missing; " in check(hub)


def test_a_repository_resumes_where_it_stopped(hub: Path) -> None:
    whole = Server.pages.pop(f"/OWNER/MODEL/resolve/{COMMIT}/config.json")
    part = hub / f"vlm/model.{COMMIT[:12]}.part"
    with pytest.raises(InputError, match=r"/config.json: has a different hash than the hub lists"):
        fetch("vlm", hub)
    assert [path.name for path in part.rglob("*.*")] == ["config.json"], (
        "only 1_LogitScore/config.json is fetched"
    )
    assert not (hub / "vlm/model").exists()
    assert not (hub / MANIFEST).exists()
    Server.pages[f"/OWNER/MODEL/resolve/{COMMIT}/config.json"] = whole
    (part / "model.safetensors.part").write_bytes(CONTENT[:1000])
    Server.asked.clear()
    Server.paths.clear()
    fetch("vlm", hub)
    assert Server.asked == [None, None, "bytes=1000-"], "list, config.json, rest of the weights"
    assert (hub / "vlm/model/model.safetensors").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (b"<html>", "expected a JSON list of files, found other data"),
        (b"[]", "expected a JSON list of files, found other data"),
        (listed(FILES, sha=None), "expected a JSON list of files, found other data"),
        (listed({"a.json": b""}, siblings=[{"rfilename": "a.json"}]), "found other data"),
        (listed({}), "lists no weights"),
        (listed({"config.json": b"{}"}), "lists no weights"),
        (listed({"../../model.safetensors": b""}), "unsafe file name '../../model.safetensors'"),
        (listed({"/model.safetensors": b""}), "unsafe file name '/model.safetensors'"),
    ],
)
def test_unusable_lists_of_files(hub: Path, page: bytes, expected: str) -> None:
    Server.pages["/api/models/OWNER/MODEL/revision/main?blobs=true"] = page
    with pytest.raises(InputError, match=f"^http.*/revision/main: .*{expected}"):
        fetch("vlm", hub)
    assert list(hub.iterdir()) == []


def test_the_mirror_must_have_an_address(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "mirror.example")
    with pytest.raises(InputError, match="HF_ENDPOINT: expected https://HOST, found 'mirror"):
        fetch("vlm", hub)


def test_revisions_belong_to_repositories(folder: Path) -> None:
    with pytest.raises(InputError, match="whole@1: expected no revision"):
        fetch("whole@1", folder)


def test_every_source_has_a_row_in_the_readme() -> None:
    table = (Path(__file__).parents[1] / "checkpoints/README.md").read_text()
    for name, source in SOURCES.items():
        assert f"| `{source.path}` |" in table, name


def test_without_names_the_state_of_every_file_is_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--folder", str(folder)])
    out = capsys.readouterr().out
    assert out.count("missing") == 7
    with pytest.raises(InputError, match="expected no names"):
        main(["whole", "--check"])
