"""REST interface, marks, command and limits of the search server."""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from colour_index import (
    SCRIPT,
    TOKEN,
    Colours,
    draw_pictures,
    index_pictures,
    make_index,
    paint,
    png,
    served,
    service_of,
    serving,
)
from decoder_jobs import Crash, Endless, Greedy, Works
from PIL import Image

from pab import evaluate
from pab.core.errors import InputError
from pab.data.annotations import read_retrieval
from pab.data.bad_lines import BadLines
from pab.data.pairs import read_shards
from pab.search.__main__ import main
from pab.search.index import Index
from pab.search.query import Query, Searcher
from pab.search.server.app import create_app
from pab.search.server.cache import BoundedCache
from pab.search.server.ids import image_id
from pab.search.server.line import BusyError, Line
from pab.search.server.pictures import Decoders
from pab.search.server.security import Access
from pab.search.server.service import Service

ROOT = Path(__file__).resolve().parents[1]


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
    with serving(create_app(service, Access.create("127.0.0.1", None), parallel=2)) as address:
        yield address


@pytest.fixture(scope="module")
def client(at: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=at, timeout=60) as client:
        yield client


def found(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


# ------------------------------------------------------------------------------------- searching


def test_a_text_finds_the_same_as_the_library(client: httpx.Client, service: Service) -> None:
    answer = found(client.post("/api/search", json={"text": "a red thing", "limit": 10}))
    searcher = Searcher(service.index, service.encoders)
    (hits,) = searcher.search([Query(text="a red thing")], 10)
    assert [one["name"] for one in answer["results"]] == [hit.name for hit in hits]
    assert [one["score"] for one in answer["results"]] == pytest.approx([h.score for h in hits])
    first = answer["results"][0]
    assert first["scores"].keys() == {"mean", "centre"}
    assert first["rank"] == 1
    assert first["height"] == 90
    assert (answer["indexed"], answer["next"]) == (61, 10)


def test_pages_continue_without_gaps(client: httpx.Client) -> None:
    whole = found(client.post("/api/search", json={"text": "green", "limit": 61}))
    assert whole["next"] is None
    names: list[str] = []
    offset: int | None = 0
    while offset is not None:
        query = {"text": "green", "limit": 25, "offset": offset}
        answer = found(client.post("/api/search", json=query))
        names += [one["name"] for one in answer["results"]]
        offset = answer["next"]
    assert names == [one["name"] for one in whole["results"]]
    assert len(names) == 61


def test_filters_and_unwanted_texts(client: httpx.Client) -> None:
    query: dict[str, Any] = {"text": "red", "folder": "park", "limit": 5}
    answer = found(client.post("/api/search", json=query))
    assert {one["name"].split("/")[0] for one in answer["results"]} == {"park"}
    least = answer["results"][2]["score"]
    answer = found(client.post("/api/search", json={**query, "least": least}))
    assert len(answer["results"]) == 3
    assert answer["next"] is None
    answer = found(client.post("/api/search", json={"text": "yellow", "minus": ["green"]}))
    assert "red" in answer["results"][0]["name"] or answer["results"][0]["name"] == SCRIPT


def test_an_upload_is_kept_for_more_results(client: httpx.Client) -> None:
    files = {"image": ("../../x\n.png", png((0, 0, 255)), "text/html")}
    first = found(client.post("/api/search", data={"query": '{"limit": 4}'}, files=files))
    assert all("blue" in one["name"] for one in first["results"])
    query = {"image": first["image"], "limit": 4, "offset": first["next"]}
    second = found(client.post("/api/search", json=query))
    assert [one["rank"] for one in second["results"]] == [5, 6, 7, 8]
    assert second["image"] == first["image"]


class Choosy(Colours):
    """Refuse texts with unknown characters and small images, as some members do."""

    def encode_texts(self, captions: Sequence[str]) -> torch.Tensor:
        if not all(map(str.isascii, captions)):
            raise InputError("/home/of/the/vocab.txt", "[UNK] in this vocabulary: 1 of 1 pieces")
        return super().encode_texts(captions)

    def encode_images(self, images: Sequence[Any], *, reader: Any = None) -> torch.Tensor:
        if images[0].width < 20:
            raise InputError("image 0", "the model cannot process it (9 x 9 pixels)")
        return super().encode_images(images, reader=reader)


@pytest.mark.parametrize(
    ("query", "image", "words"),
    [
        ({"text": "\U0001f600"}, None, "text: member centre cannot use it: [UNK] in this"),
        ({"text": "red", "minus": ["a", "\U0001f600"]}, None, "minus: member centre cannot"),
        ({"text": "red"}, png((255, 0, 0), (9, 9)), "image: member centre cannot use it: the"),
    ],
)
def test_a_query_that_a_member_refuses_is_explained(
    root: Path, query: dict[str, Any], image: bytes | None, words: str
) -> None:
    encoders = {"mean": Colours(False), "centre": Choosy(True)}
    service = Service(Index.open(root / "index"), encoders)
    with serving(create_app(service, Access.create("127.0.0.1", None))) as at:
        if image is None:
            answer = httpx.post(f"{at}/api/search", json=query, timeout=60)
        else:
            form, files = {"query": json.dumps(query)}, {"image": image}
            answer = httpx.post(f"{at}/api/search", data=form, files=files, timeout=60)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"].startswith(words)
    assert "/home" not in answer.text


def test_more_like_an_image_of_the_index(client: httpx.Client) -> None:
    (first,) = found(client.post("/api/search", json={"text": "blue", "limit": 1}))["results"]
    answer = found(client.post("/api/search", json={"image": first["id"], "limit": 5}))
    assert first["id"] not in [one["id"] for one in answer["results"]]
    assert all("blue" in one["name"] for one in answer["results"])
    both = {"image": first["id"], "text": "red", "weights": {"image": 0.01}, "limit": 1}
    (best,) = found(client.post("/api/search", json=both))["results"]
    assert "red" in best["name"] or best["name"] == SCRIPT


def test_pictures_are_upright_and_have_no_metadata(tmp_path: Path) -> None:
    path = tmp_path / "photos/phone.jpg"
    path.parent.mkdir()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera with a secret"  # orientation; camera make
    Image.new("RGB", (80, 40), (250, 0, 0)).save(path, exif=exif)
    index = index_pictures(tmp_path)
    service = service_of(index)
    with serving(create_app(service, Access.create("127.0.0.1", None))) as at:
        identity = image_id(0, "phone.jpg")
        for kind in ("images", "thumbnails"):
            answer = httpx.get(f"{at}/api/{kind}/{identity}", timeout=60)
            assert answer.headers["content-type"] == "image/jpeg"
            picture = Image.open(io.BytesIO(answer.content))
            assert picture.size == (40, 80)
            assert b"secret" not in answer.content
            same = {"If-None-Match": answer.headers["etag"]}
            again = httpx.get(f"{at}/api/{kind}/{identity}", headers=same, timeout=60)
            assert (again.status_code, again.content) == (304, b"")
        facts = httpx.get(f"{at}/api/images/{identity}/facts", timeout=60).json()
        assert (facts["name"], facts["width"], facts["height"]) == ("phone.jpg", 40, 80)


def test_a_changed_index_is_opened_again(tmp_path: Path) -> None:
    index = make_index(tmp_path, 4)
    with served(index) as at, httpx.Client(base_url=at, timeout=60) as client:
        before = found(client.get("/api/health"))["images"]
        old = found(client.post("/api/search", json={"text": "red"}))["results"]
        paint(tmp_path / "photos/an_earlier_name.png", "green", 99)
        index_pictures(tmp_path)
        assert found(client.get("/api/health"))["images"] == before + 1
        new = found(client.post("/api/search", json={"text": "red"}))["results"]
        assert len(new) == len(old) + 1
        for one in old:  # the images may have other rows
            facts = found(client.get(f"/api/images/{one['id']}/facts"))
            assert facts["name"] == one["name"]
        assert {one["id"] for one in old} != {one["id"] for one in new}
        (tmp_path / "photos" / old[0]["name"]).unlink()
        index_pictures(tmp_path)
        assert client.get(f"/api/images/{old[0]['id']}").status_code == 404


def test_an_update_while_the_models_load_is_served(tmp_path: Path) -> None:
    index = make_index(tmp_path, 4)
    paint(tmp_path / "photos/an_earlier_name.png", "green", 99)
    index_pictures(tmp_path)
    with served(index) as at:
        assert found(httpx.get(f"{at}/api/health", timeout=60))["images"] == index.rows + 1


def test_interface_is_described(client: httpx.Client) -> None:
    described = found(client.get("/api/openapi.json"))
    paths = described["paths"]
    assert {"/api/search", "/api/images/{image}", "/api/thumbnails/{image}", "/api/health"} <= {
        *paths
    }
    body = paths["/api/search"]["post"]["requestBody"]["content"]
    assert body.keys() == {"application/json", "multipart/form-data"}
    assert "text" in body["application/json"]["schema"]["properties"]
    schemes = described["components"]["securitySchemes"]
    assert [{name: []} for name in schemes] == paths["/api/search"]["post"]["security"]
    assert found(client.get("/api/health")) == {
        "status": "ok", "version": described["info"]["version"], "images": 61,
        "members": ["mean", "centre"], "rerank": False,
    }  # fmt: skip
    assert found(client.get("/api/folders"))["folders"] == ["park", "park/day", "street"]


# ----------------------------------------------------------------------------------------- marks


def test_marks_become_annotations(
    client: httpx.Client, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hits = found(client.post("/api/search", json={"text": "red", "limit": 4}))["results"]
    marks = [
        {"text": text, "image": hits[place]["id"], "right": right}
        for text, place, right in (
            ("a red disc", 0, False), ("a red disc", 0, True), ("something red", 0, True),
            ("a red disc", 1, False), ("another", 2, True), ("nothing", 3, False),
        )
    ]  # fmt: skip
    files = {}
    for form in ("labelled", "pairs"):
        answer = client.post("/api/annotation", json={"marks": marks, "form": form})
        assert answer.headers["content-disposition"] == f'attachment; filename="marks_{form}.jsonl"'
        files[form] = tmp_path / f"{form}.jsonl"
        files[form].write_bytes(answer.content)
    retrieval = read_retrieval(files["labelled"], image_folder=root / "photos")
    captions = {(one.caption, one.image_id) for one in retrieval.queries}
    name, other = hits[0]["name"], hits[2]["name"]
    assert captions == {("a red disc", name), ("something red", name), ("another", other)}
    bad = BadLines()
    pairs = list(read_shards([files["pairs"]], root / "photos", bad))
    assert [(pair.image, pair.caption) for pair in pairs] == [
        (name, "a red disc"), (name, "something red"), (other, "another"),
    ]  # fmt: skip
    assert pairs[0].captioned_image == pairs[1].captioned_image == (name, name)
    assert json.loads(files["labelled"].read_text().splitlines()[0])["wrong"] == [hits[1]["name"]]

    gallery = sorted({name, other})
    scores = np.array([[float(one.image_id == image) for image in gallery]
                       for one in retrieval.queries], dtype=np.float32)  # fmt: skip
    table = tmp_path / "scores.npz"
    ids = [one.query_id for one in retrieval.queries]
    np.savez(table, scores=scores, query_ids=np.array(ids), gallery_ids=np.array(gallery))
    capsys.readouterr()
    evaluate.main(
        ["--score", str(table), "--annotation", str(files["labelled"]),
         "--image_folder", str(root / "photos")]
    )  # fmt: skip
    assert "100.00" in capsys.readouterr().out


def test_marks_without_a_right_image_are_refused(client: httpx.Client) -> None:
    (hit,) = found(client.post("/api/search", json={"text": "red", "limit": 1}))["results"]
    mark = {"text": "red", "image": hit["id"], "right": False}
    answer = client.post("/api/annotation", json={"marks": [mark]})
    assert answer.status_code == 422
    assert "marked right" in answer.json()["error"]


def test_marks_of_removed_images_are_skipped_and_counted(tmp_path: Path) -> None:
    index = make_index(tmp_path, 8)
    with served(index) as at, httpx.Client(base_url=at, timeout=60) as client:
        hits = found(client.post("/api/search", json={"text": "red", "limit": 5}))["results"]
        marks = [{"text": "red", "image": one["id"], "right": True} for one in hits]
        (tmp_path / "photos" / hits[0]["name"]).unlink()
        index_pictures(tmp_path)
        for form in ("labelled", "pairs"):
            answer = client.post("/api/annotation", json={"marks": marks, "form": form})
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-skipped-marks"] == "1"
            lines = [json.loads(line)["image"] for line in answer.text.splitlines()]
            assert lines == [one["name"] for one in hits[1:]]
        whole = client.post("/api/annotation", json={"marks": marks[1:]})
        assert whole.headers["x-skipped-marks"] == "0"
        wrong = {**marks[1], "right": False}
        answer = client.post("/api/annotation", json={"marks": [marks[0], wrong]})
        assert answer.status_code == 422
        assert answer.json()["error"].endswith("skipped 1 of images that the index no longer has")
        assert client.post("/api/annotation", json={"marks": marks[:1]}).status_code == 404
        similar = client.post("/api/search", json={"image": hits[1]["id"]})  # an earlier row
        assert hits[1]["name"] not in [one["name"] for one in found(similar)["results"]]


def test_the_documented_program_evaluates_marks_against_the_whole_index(
    service: Service,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (ROOT / "docs/search_server.md").read_text(encoding="utf-8")
    program = page.partition("```python\nimport json\n")[2].partition("```")[0]
    best = [hit.name for hit in Searcher(service.index, service.encoders).search([Query("red")])[0]]
    lines = [{"image": best[0], "caption": ["red"]}, {"image": best[3], "caption": ["red", "blue"]}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "marks_labelled.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "output").mkdir()
    (tmp_path / "output/index").symlink_to(root / "index")
    monkeypatch.chdir(tmp_path)
    encoders = "pab.search.members.open_encoders"
    monkeypatch.setattr(encoders, lambda *_, **__: service.encoders)
    exec("import json\n" + program, {})
    blue = Searcher(service.index, service.encoders).search([Query("blue")], 61)[0]
    rank = [hit.name for hit in blue].index(best[3]) + 1
    assert rank > 10  # a wrong mark, far from the first images
    last = capsys.readouterr().out.split()
    assert last[-7:-3] == ["2", "50.00", "50.00", "50.00"]
    assert last[-1] == f"{50 * (2 / 4 + 1 / rank):.2f}"  # mINP, with the ranks 1 and 4 for "red"


# --------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "--host: expected --token"),
        (["--host", "0.0.0.0", "--token", "short"], "--token: expected at least 12 characters"),
        (["--token", "twelve characters \u00e9"], "--token: expected printable ASCII"),
        (["--parallel", "0"], "--parallel: must be at least 1"),
        (["--port", "99999999"], "--port: expected 0 to 65535"),
        (["--host", "no.such.host.invalid", "--token", TOKEN], "cannot be used"),
        (["--example", " "], "--example: expected words"),
    ],
)
def test_bad_flags(refused: Any, root: Path, flags: list[str], words: str) -> None:
    assert words in refused(main, ["serve", "--index", str(root / "index"), *flags])


def test_a_port_in_use_is_named(refused: Any, root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused(main, ["serve", "--index", str(root / "index"), "--port", port])
    assert f"--port {port}: cannot be used: Address already in use" in line


def test_the_command_serves_until_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Index with the mini CLIP, serve with a token, search, and stop with Ctrl-C."""
    monkeypatch.chdir(ROOT)
    draw_pictures(tmp_path / "photos", 4)
    folders = ["--image_folder", str(tmp_path / "photos"), "--recursive"]
    clip = ["--model", "clip", "--arch", "local-dir:checkpoints/mini/clip"]
    main(["index", *clip, *folders, "--out", str(tmp_path / "index")])
    words = [sys.executable, "-m", "pab.search", "serve", "--index", str(tmp_path / "index")]
    flags = ["--port", "0", "--token", TOKEN, "--parallel", "1", "--example", "a red coat"]
    # SIGINT is ignored if these tests run in a background job of a shell.
    allow = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        [*words, *flags], stderr=subprocess.PIPE, text=True, preexec_fn=allow
    ) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            match = re.fullmatch(r"serving 5 images of .* at (http://127\.0\.0\.1:\d+)/\n", line)
            assert match is not None, line
            headers = {"Authorization": f"Bearer {TOKEN}"}
            with httpx.Client(base_url=match[1], headers=headers, timeout=120) as client:
                files = {"image": png((255, 0, 0))}
                both = client.post("/api/search", data={"query": '{"text": "red"}'}, files=files)
                assert len(found(both)["results"]) == 5
                assert "a red coat" in client.get("/").text
        finally:
            process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "interrupted\n"
        assert process.wait(60) == 130


# ---------------------------------------------------------------------------------------- limits


def test_decoders_have_limits() -> None:
    decoders = Decoders(limit_s=3)
    try:
        for job, words in ((Endless(), "3 s"), (Greedy(), "memory"), (Crash(), "memory")):
            with pytest.raises(InputError, match=words):
                decoders.run(job)
            assert decoders.run(Works()) == 42
    finally:
        decoders.close()


def test_the_queue_is_bounded_and_drops_requests_that_are_given_up() -> None:
    async def scenario() -> None:
        line, gate, ran = Line(1, 2), threading.Event(), list[int]()

        def work(number: int) -> int:
            gate.wait(20)
            ran.append(number)
            return number

        tasks = [asyncio.create_task(line.run(work, number)) for number in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(BusyError):
            await line.run(work, 3)
        tasks[2].cancel()
        await asyncio.sleep(0.05)
        tasks[2] = asyncio.create_task(line.run(work, 4))  # takes the free place
        await asyncio.sleep(0.05)
        gate.set()
        assert await asyncio.gather(*tasks) == [0, 1, 4]
        assert ran == [0, 1, 4]
        line.close()

    asyncio.run(scenario())


def test_a_full_queue_answers_429(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    original, gate = service.search, threading.Event()

    def slow(*args: Any) -> Any:
        gate.wait(20)
        return original(*args)

    monkeypatch.setattr(service, "search", slow)
    monkeypatch.setattr("pab.search.server.app.WAITING", 3)
    app = create_app(service, Access.create("127.0.0.1", None), parallel=1)
    with serving(app) as at, ThreadPoolExecutor(10) as threads:
        ask = lambda _: httpx.post(f"{at}/api/search", json={"text": "red"}, timeout=60)  # noqa: E731
        answers = [threads.submit(ask, number) for number in range(10)]
        while sum(answer.done() for answer in answers) < 6:
            time.sleep(0.01)
        gate.set()
        codes = sorted(answer.result().status_code for answer in answers)
        busy = [one.result() for one in answers if one.result().status_code == 429]
    assert codes == [200] * 4 + [429] * 6
    assert {one.headers["retry-after"] for one in busy} == {"1"}


def test_the_cache_is_bounded() -> None:
    cache: BoundedCache[str] = BoundedCache(10)
    cache.put("a", "A", 4)
    cache.put("b", "B", 4)
    assert cache.get("a") == "A"
    cache.put("c", "C", 4)  # drops b, the least recently used
    assert [cache.get(key) for key in "abc"] == ["A", None, "C"]
    cache.put("a", "D", 2)
    cache.put("large", "L", 11)
    assert (cache.get("a"), cache.get("large"), cache.bytes) == ("D", None, 6)
