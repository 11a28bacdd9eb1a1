"""Search server with a reranker (`--rerank`) and with an approximate index (`--ann`)."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from colour_index import Darkness, draw_pictures, index_pictures, make_index, paint, png, served
from conftest import draw
from test_search_ann import WIDTH, clustered, write
from test_search_query import Words

from pab.search import ann as ann_module
from pab.search.__main__ import main
from pab.search.ann import build_ann
from pab.search.index import Index
from pab.search.query import Query, Searcher
from pab.search.query_command import build_parser as query_parser
from pab.search.server.command import build_parser as serve_parser
from pab.search.server.models import SearchRequest
from pab.search.server.service import Service

ROOT = Path(__file__).resolve().parents[1]
DEPTH = 12
UIT = "configs/uit/mini_infer.yaml"
WITHOUT = '"rerank": false'  # the remedy that errors of the reranker name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("look")
    make_index(root, 40)
    return root


@pytest.fixture
def judge() -> Darkness:
    return Darkness()


@pytest.fixture
def client(root: Path, judge: Darkness) -> Iterator[httpx.Client]:
    index = Index.open(root / "index")
    with (
        served(index, reranker=judge, rerank_depth=DEPTH) as at,
        httpx.Client(base_url=at, timeout=60) as client,
    ):
        yield client


def found(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def results(client: httpx.Client, **query: Any) -> list[dict[str, Any]]:
    return list(found(client.post("/api/search", json=query))["results"])


def names(found: list[dict[str, Any]]) -> list[str]:
    return [one["name"] for one in found]


# ------------------------------------------------------------------------------------- re-ranking


def test_the_first_images_are_ordered_by_the_reranker(
    client: httpx.Client, judge: Darkness
) -> None:
    plain = results(client, text="red", limit=41, rerank=False)
    assert judge.asked == []
    assert all(one["rerank_score"] is None for one in plain)
    again = results(client, text="red", limit=41)
    assert judge.asked == [("red", DEPTH)]
    first, rest = again[:DEPTH], again[DEPTH:]
    scores = [one["rerank_score"] for one in first]
    assert scores == sorted(scores, reverse=True)
    assert {*names(first)} == {*names(plain[:DEPTH])}
    assert names(first) != names(plain[:DEPTH])
    of_plain = {one["name"]: (one["score"], one["scores"]) for one in plain}
    assert all((one["score"], one["scores"]) == of_plain[one["name"]] for one in first)
    assert rest == plain[DEPTH:]
    assert [one["rank"] for one in again] == list(range(1, 42))
    assert results(client, text="red", limit=41, rerank=True) == again
    assert results(client, text="red", limit=41, rerank=None) == again
    assert judge.asked == [("red", DEPTH)]


@pytest.mark.parametrize("limit", [1, 5, DEPTH, 25])
def test_all_pages_have_one_order_and_score_each_pair_once(
    client: httpx.Client, judge: Darkness, limit: int
) -> None:
    whole = results(client, text="green", limit=41)
    pages: list[dict[str, Any]] = []
    offset: int | None = 0
    while offset is not None:
        query = {"text": "green", "limit": limit, "offset": offset}
        answer = found(client.post("/api/search", json=query))
        pages += answer["results"]
        offset = answer["next"]
    assert pages == whole
    assert judge.asked == [("green", DEPTH)]


def test_a_later_page_alone_needs_no_reranker(client: httpx.Client, judge: Darkness) -> None:
    (later,) = results(client, text="red", limit=1, offset=DEPTH)
    assert judge.asked == []
    assert results(client, text="red", limit=41)[DEPTH] == later
    assert results(client, text="red", limit=1, offset=400) == []


def test_scores_are_not_mixed_up_between_queries(client: httpx.Client, judge: Darkness) -> None:
    """Queries have equal texts but different first images, or equal images but different texts."""
    queries: list[dict[str, Any]] = [
        {"text": "red"}, {"text": "red", "folder": "park"}, {"text": "red", "minus": ["green"]},
        {"text": "red", "minus": ["green"], "weights": {"minus": 0.01}}, {"text": "RED"},
        {"text": "red", "least": 1.9},
    ]  # fmt: skip
    for query in queries:
        plain = results(client, **query, limit=41, rerank=False)
        again = results(client, **query, limit=41)
        of_plain = {one["name"]: (one["score"], one["scores"]) for one in plain}
        assert {one["name"]: (one["score"], one["scores"]) for one in again} == of_plain
        assert {*names(again[:DEPTH])} == {*names(plain[:DEPTH])}
        assert sum(one["rerank_score"] is not None for one in again) == min(DEPTH, len(plain))
    assert {caption for caption, _ in judge.asked} == {"red", "RED"}


def test_only_a_text_is_judged(client: httpx.Client, judge: Darkness) -> None:
    (first,) = results(client, text="blue", limit=1, rerank=False)
    for query in ({"image": first["id"]}, {"image": first["id"], "rerank": True}):
        assert all(one["rerank_score"] is None for one in results(client, **query))
    files = {"image": png((0, 0, 255))}
    assert found(client.post("/api/search", data={"query": "{}"}, files=files))["results"]
    assert judge.asked == []
    query = json.dumps({"text": "blue", "limit": 4})
    answer = found(client.post("/api/search", data={"query": query}, files=files))
    more = {"text": "blue", "image": answer["image"], "limit": 41}
    assert names(results(client, **more))[:4] == names(answer["results"])
    assert judge.asked == [("blue", DEPTH)]


def test_a_server_without_a_reranker(root: Path) -> None:
    with served(Index.open(root / "index")) as at, httpx.Client(base_url=at) as client:
        assert found(client.get("/api/health"))["rerank"] is False
        answer = client.post("/api/search", json={"text": "red", "rerank": True})
        assert answer.status_code == 422
        assert answer.json() == {
            "error": "rerank: expected a server that was started with --rerank"
        }
        plain = results(client, text="red")
        assert results(client, text="red", rerank=False) == plain
        assert all(one["rerank_score"] is None for one in plain)
        assert "rerank" not in client.get("/").text


def test_health_and_description(client: httpx.Client) -> None:
    assert found(client.get("/api/health"))["rerank"] is True
    described = found(client.get("/api/openapi.json"))
    body = described["paths"]["/api/search"]["post"]["requestBody"]["content"]
    assert "rerank" in body["application/json"]["schema"]["properties"]
    assert "rerank_score" in described["components"]["schemas"]["Result"]["properties"]


@pytest.mark.parametrize("value", ["true", "yes", 1, 0, [True], {}, 1.5, "\u0000"])
def test_other_values_are_refused(client: httpx.Client, judge: Darkness, value: Any) -> None:
    answer = client.post("/api/search", json={"text": "red", "rerank": value})
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("rerank: Input should be a valid boolean")
    assert judge.asked == []


def test_what_the_reranker_refuses_is_no_fault(
    client: httpx.Client, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "red \x1b[31m forbidden"
    answer = client.post("/api/search", json={"text": text})
    assert answer.status_code == 422
    assert WITHOUT in answer.json()["error"]
    assert "forbidden" not in answer.text
    assert "/home" not in answer.text
    logged = capfd.readouterr().err
    assert "contains 'red \\x1b[31m forbidden'" in logged
    assert "\x1b" not in logged
    assert results(client, text=text, rerank=False)
    assert results(client, text="red")


def test_a_missing_image_is_no_fault(
    tmp_path: Path, judge: Darkness, capfd: pytest.CaptureFixture[str]
) -> None:
    index = make_index(tmp_path, 8)
    with served(index, reranker=judge) as at, httpx.Client(base_url=at, timeout=60) as client:
        last = results(client, text="red", rerank=False)[-1]["name"]
        (tmp_path / "photos" / last).unlink()
        answer = client.post("/api/search", json={"text": "red"})
        assert answer.status_code == 422
        assert WITHOUT in answer.json()["error"]
        assert str(tmp_path) not in answer.text
        assert last in capfd.readouterr().err
        assert len(results(client, text="red", rerank=False)) == 9
        index_pictures(tmp_path)
        assert len(results(client, text="red")) == 8


def test_a_changed_index_is_judged_again(tmp_path: Path, judge: Darkness) -> None:
    index = make_index(tmp_path, 8, 1)
    with served(index, reranker=judge) as at, httpx.Client(base_url=at, timeout=60) as client:
        before = results(client, text="red")
        paint(tmp_path / "photos" / before[0]["name"], "yellow", 77)  # the picture may keep its row
        index_pictures(tmp_path, 1)
        after = results(client, text="red")
        assert len(judge.asked) == 2
        score = {one["name"]: one["rerank_score"] for one in after}
        assert score[before[0]["name"]] != before[0]["rerank_score"]


def test_the_reranker_has_one_thread_and_no_pair_is_scored_twice(root: Path) -> None:
    """Many clients search at once; `Darkness` fails if a second thread uses it."""
    gate = threading.Event()
    judge = Darkness(lambda: gate.wait(0.1))
    texts = ["red", "green", "blue"]
    with (
        served(Index.open(root / "index"), parallel=4, reranker=judge, rerank_depth=DEPTH) as at,
        ThreadPoolExecutor(12) as threads,
    ):
        ask = lambda text: httpx.post(f"{at}/api/search", json={"text": text}, timeout=60)  # noqa: E731
        answers = [found(one)["results"] for one in threads.map(ask, texts * 4)]
    assert answers[:3] == answers[3:6] == answers[6:9] == answers[9:]
    assert sorted(judge.asked) == sorted((text, DEPTH) for text in texts)


def test_the_server_answers_while_the_reranker_works(root: Path) -> None:
    gate, started = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        gate.wait(60)

    with (
        served(Index.open(root / "index"), reranker=Darkness(wait), rerank_depth=DEPTH) as at,
        ThreadPoolExecutor(1) as threads,
    ):
        ask = lambda: httpx.post(f"{at}/api/search", json={"text": "red"}, timeout=60)  # noqa: E731
        other = httpx.post(f"{at}/api/search", json={"text": "red", "rerank": False}, timeout=60)
        first = found(other)["results"][0]["id"]
        slow = threads.submit(ask)
        assert started.wait(60)
        with httpx.Client(base_url=at, timeout=60) as client:
            assert found(client.get("/api/health"))["status"] == "ok"
            assert results(client, image=first)  # no model runs
            assert client.get(f"/api/thumbnails/{first}").status_code == 200
        assert not slow.done()
        gate.set()
        assert len(found(slow.result())["results"]) == 40


# ------------------------------------------------------------------------------- approximate index


def shallow(folder: Path, count: int = 2000) -> Service:
    """Serve an approximate index that finds other images if more of them are requested."""
    write(folder, clustered(count))
    build_ann(folder, "ivf")
    manifest = folder / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["ann"]["depth"] = 1
    manifest.write_text(json.dumps(facts))
    return Service(Index.open(folder), {"clip": Words({"a": clustered(1, seed=5)[0]})}, ann=True)


def pages(service: Service, limit: int, count: int, **query: Any) -> list[str]:
    found: list[str] = []
    for offset in range(0, count, limit):
        answer = service.search(SearchRequest(limit=limit, offset=offset, **query))
        found += [one.name for one in answer.results]
    return found


def test_approximate_pages_have_one_order(tmp_path: Path) -> None:
    service = shallow(tmp_path)
    opened = service._current()
    alone = [opened.searcher.search([Query("a")], k)[0] for k in (10, 700)]
    assert [one.name for one in alone[1][:10]] != [one.name for one in alone[0]], "must differ"
    for query in ({"text": "a"}, {"image": service.search(SearchRequest(text="a")).results[0].id}):
        wide = pages(service, 100, 700, **query)
        assert len(wide) == len({*wide}) == 700
        assert pages(service, 10, 300, **query) == wide[:300]
        assert pages(service, 50, 700, **query) == wide
    assert service.search(SearchRequest(text="a", limit=100, offset=1950)).next is None
    assert len(pages(service, 100, 2000, text="a")) == 2000


def test_filtered_searches_are_exact(tmp_path: Path) -> None:
    service = shallow(tmp_path, 600)
    exact = Service(service.index, service.encoders)
    for query in ({"text": "a", "least": 0.5}, {"text": "a", "folder": "none"}):
        wide = pages(service, 100, 600, **query)
        assert len(wide) == len({*wide})
        assert {*wide} <= {*pages(exact, 100, 600, **query)}
    by_time = {"text": "a", "start_s": 0.0}
    assert pages(service, 100, 600, **by_time) == pages(exact, 100, 600, **by_time) == []


def test_the_approximate_index_is_opened_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, clustered(300))
    texts = {"a": clustered(1, seed=5)[0]}
    service = Service(Index.open(tmp_path), {"clip": Words(texts)}, ann=True)
    assert "--ann: the search is exact, because the index has no" in capsys.readouterr().err
    build_ann(tmp_path, "ivf")
    assert len(service.search(SearchRequest(text="a")).results) == 40
    first = service._current().searcher.ann
    assert first is not None
    assert service._current().searcher.ann is first
    assert capsys.readouterr().err == ""
    write(tmp_path, clustered(50, seed=3))
    for _ in range(3):
        service.search(SearchRequest(text="a"))
    logged = capsys.readouterr().err
    assert logged.count("\n") == 1
    assert "does not have the images of the last run" in logged
    assert service._current().searcher.ann is None
    build_ann(tmp_path, "hnsw")
    answer = service.search(SearchRequest(text="a", limit=100))
    second = service._current().searcher.ann
    assert second is not None
    assert second.record.kind == "hnsw"
    assert answer.indexed == 350
    exact = Searcher(Index.open(tmp_path), {"clip": Words(texts)}).search([Query("a")], 10)[0]
    assert [one.name for one in answer.results[:10]] == [hit.name for hit in exact]


def test_without_the_flag_no_approximate_index_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, clustered(300))
    build_ann(tmp_path, "ivf")
    capsys.readouterr()
    service = Service(Index.open(tmp_path), {"clip": Words({"a": np.ones(WIDTH, np.float32)})})
    assert service._current().searcher.ann is None
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------- command


def test_the_flags_are_those_of_query() -> None:
    flags = ("--rerank", "--rerank_depth", "--ann", "--device", "--index", "--members")
    of_query, of_serve = query_parser(), serve_parser()
    for flag in flags:
        one, other = (parser._option_string_actions[flag] for parser in (of_query, of_serve))
        assert (one.help, one.default, one.metavar, one.type) == (
            other.help, other.default, other.metavar, other.type,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rerank", "clip"], "--rerank: expected a member with a cross encoder, found 'clip'"),
        (["--rerank", "nothing"], "--rerank: expected a member or a YAML file, found 'nothing'"),
        (["--rerank", "none.yaml"], "none.yaml"),
        (["--rerank", UIT, "--rerank_depth", "0"], "--rerank_depth: must be at least 1, found 0"),
    ],
)
def test_bad_flags(
    refused: Any, mini: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], words: str
) -> None:
    monkeypatch.chdir(ROOT)
    line = refused(main, ["serve", "--index", str(mini / "index"), "--port", "0", *flags])
    assert words in line
    assert "serving" not in line


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Index pictures with the mini CLIP, and build an approximate index."""
    pytest.importorskip("faiss")
    root = tmp_path_factory.mktemp("mini")
    draw_pictures(root / "photos", 10)
    for number in range(15):
        draw(root / f"photos/people/{number:02}.jpg", number, normal=number % 2 == 0)
    clip = ["--model", "clip", "--arch", f"local-dir:{ROOT / 'checkpoints/mini/clip'}"]
    folders = ["--image_folder", str(root / "photos"), "--recursive", "--num_workers", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ann_module, "LEAST_ROWS", 20)
        main(["index", *clip, *folders, "--out", str(root / "index"), "--ann", "hnsw"])
    return root


def test_the_server_gives_the_order_of_the_query_command(
    mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start both commands with the mini CLIP, the mini UIT and the approximate index."""
    monkeypatch.chdir(ROOT)
    image = mini / "photos/people/03.jpg"
    flags = ["--index", str(mini / "index"), "--rerank", UIT, "--rerank_depth", "6", "--ann"]
    cases: list[tuple[list[str], dict[str, Any]]] = [
        ([], {}),
        (["--minus", "a park"], {"minus": ["a park"]}),
        (["--folder", "people", "--weights", "minus=0.5", "--minus", "a street"],
         {"folder": "people", "weights": {"minus": 0.5}, "minus": ["a street"]}),
        (["--image", str(image)], {"upload": True}),
    ]  # fmt: skip
    expected = []
    for more, _ in cases:
        words = ["--text", "a man falls", "--top_k", "26", "--json", str(mini / "found.json")]
        main(["query", *flags, *words, *more])
        expected.append(json.loads((mini / "found.json").read_text())["queries"][0]["images"])
    words = [sys.executable, "-m", "pab.search", "serve", "--port", "0", *flags]
    allow = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=allow) as process:
        assert process.stderr is not None
        try:
            match, line = None, "notices of the models come first"
            while match is None and line:
                line = process.stderr.readline()
                assert "--ann" not in line
                match = re.match(r"serving 26 images of .* at (http://127\.0\.0\.1:\d+)/\n", line)
            assert match is not None
            with httpx.Client(base_url=match[1], timeout=120) as client:
                assert found(client.get("/api/health"))["rerank"] is True
                for (_, query), right in zip(cases, expected, strict=True):
                    wanted = {"text": "a man falls", "limit": 26, **query}
                    files = {"image": image.read_bytes()} if wanted.pop("upload", None) else None
                    body = {"data": {"query": json.dumps(wanted)}} if files else {"json": wanted}
                    images = found(client.post("/api/search", files=files, **body))["results"]
                    check_same(images, right)
        finally:
            process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "interrupted\n"  # no log of requests


def check_same(images: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    """Compare a server's results with the command's."""
    assert names(images) == [one["path"] for one in right]
    for one, other in zip(images, right, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
        score = other.get("rerank_score")
        assert one["rerank_score"] == (None if score is None else pytest.approx(score, abs=1e-4))
    assert sum(one["rerank_score"] is not None for one in images) == 6
