"""The report: which queries it shows, what it marks, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from ensemble.report.charts import Series, line_chart, round_steps
from ensemble.report.page import choose_queries, main
from ensemble.run import main as fuse
from pab.core.errors import InputError
from pab.scores import ScoreFile, save_scores

N = 14


@pytest.fixture
def annotation(tmp_path: Path) -> Path:
    """Fourteen images, even ones normal and the twin of the odd one that follows."""
    path = tmp_path / "data" / "annotation" / "test" / "attr.json"
    path.parent.mkdir(parents=True)
    (tmp_path / "data" / "test").mkdir()
    lines = []
    for i in range(N):
        Image.new("RGB", (200, 300), (i * 15, 90, 160)).save(tmp_path / f"data/test/{i}.jpg")
        line = {
            "image": f"test/{i}.jpg",
            "image_id": f"i{i:02}",
            "caption": [f"<script>alert({i})</script> & person {i}"],
            "hard_i_id": f"i{i ^ 1:02}",
            ("anomaly" if i % 2 else "normal"): "Falling" if i % 2 else "Walking",
        }
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    return path


def save(path: Path, matrix: torch.Tensor) -> str:
    ids = [f"i{i:02}" for i in range(N)]
    save_scores(path, ScoreFile(matrix, [f"{i}#0" for i in ids], ids, {"model": "m<1>"}))
    return str(path)


@pytest.fixture
def score(tmp_path: Path) -> str:
    """Right first, but query 0 (right image last) and query 1 (right image second to its twin)."""
    matrix = torch.eye(N) + torch.arange(N) * 1e-3
    matrix[0, 0] = -1.0
    matrix[1, 0] = 2.0
    return save(tmp_path / "s.pt", matrix)


class _Page(HTMLParser):
    """Collects tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == name]


def report(tmp_path: Path, *args: str) -> str:
    main([*args, "--out", str(tmp_path / "out" / "report.html")])
    return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_page(annotation: Path, score: str, tmp_path: Path) -> None:
    text = report(tmp_path, "--score", f"LHP={score}", "--annotation", str(annotation))
    page = _Page(text)

    articles = page.all("article")
    assert [a["data-outcome"] for a in articles] == ["failure"] * 2 + ["success"] * (N - 2)
    assert [a["data-kind"] for a in articles[:2]] == ["normal", "abnormal"]  # worst first
    assert "rank 14" in text

    items = [attrs["class"] or "" for attrs in page.all("li")]
    assert items[0] == "right"  # query 0's right image, put before its ten
    assert len(items) == N * 10 + 1
    assert items.count("right") == N
    assert items[11] == "twin"  # query 1's best is its twin
    assert items[12] == "right"

    images = page.all("img")
    assert all(image["alt"] for image in images)
    assert images[0]["alt"] == "Right image i00 at rank 14"
    code = (images[0]["src"] or "").removeprefix("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(code))) as thumbnail:
        assert thumbnail.size == (85, 128)

    pressed = [b["aria-pressed"] for b in page.all("button")]
    assert pressed == ["true", "false", "false"] * 2
    assert "abnormal: Falling" in text
    assert "over twin" in text


def test_page_needs_no_network_and_escapes_text(
    annotation: Path, score: str, tmp_path: Path
) -> None:
    text = report(
        tmp_path, "--score", f"A&B={score}", "--annotation", str(annotation), "--title", "<i>T</i>"
    )
    page = _Page(text)
    assert len(page.all("script")) == 1
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(3)&lt;/script&gt; &amp; person 3" in text
    assert "<title>&lt;i&gt;T&lt;/i&gt;</title>" in text
    assert "A&amp;B (m&lt;1&gt;)" in text
    links = [
        value
        for _, attrs in page.tags
        for name, value in attrs.items()
        if name in ("src", "href", "srcset", "action", "data")
    ]
    assert all(link and link.startswith("data:") for link in links)
    assert not re.search(r"https?://|url\(|@import", text)


def test_same_inputs_give_the_same_bytes(annotation: Path, score: str, tmp_path: Path) -> None:
    args = ("--score", f"LHP={score}", "--annotation", str(annotation), "--queries", "6")
    first = report(tmp_path, *args)
    assert first == report(tmp_path, *args)
    assert len(_Page(first).all("article")) == 6


def test_several_score_files(
    annotation: Path, score: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save(tmp_path / "o.pt", torch.eye(N).flip(0))
    text = report(
        tmp_path, "--score", f"LHP={score}", "--score", f"UIT={other}", "--annotation",
        str(annotation),
    )  # fmt: skip
    assert "UIT: rank 2" in text  # query 0: image 13 has a 1, and image 0 leads those with a 0
    for row in ("LHP", "LHP, normal", "LHP, abnormal", "UIT", "UIT, normal", "UIT, abnormal"):
        assert f'<th scope="row">{row}</th>' in text
    header, first, second, _ = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["R@1", "R@5"]
    assert header.endswith("R@1 of LHP over it")
    at_one = 100 * (N - 2) / N
    assert first.split()[:2] == ["LHP", f"{at_one:.2f}"]
    assert first.endswith(" -")
    assert second.split()[:2] == ["UIT", "0.00"]
    assert f"{at_one:+.2f} [" in second  # all of it is gain


def test_name_masked_set_without_labels(tmp_path: Path) -> None:
    (tmp_path / "gallery").mkdir()
    for name in "ABC":
        Image.new("RGB", (40, 30)).save(tmp_path / "gallery" / f"{name}.png")
    query = tmp_path / "query.json"
    query.write_text('{"query_index": "q", "caption": "a person"}\n')
    path = tmp_path / "s.pt"
    save_scores(path, ScoreFile(torch.tensor([[0.1, 0.3, 0.2]]), ["q"], ["A", "B", "C"]))
    args = ("--score", f"CLIP={path}", "--annotation", str(query))
    text = report(tmp_path, *args, "--image_folder", str(tmp_path / "gallery"))
    page = _Page(text)
    assert [image["title"] for image in page.all("img")] == ["B", "C", "A"]
    assert len(page.all("table")) == 1, "double claims need no labels"
    assert not page.all("svg")
    assert not page.all("button")
    with pytest.raises(InputError, match="give their folder with --image_folder"):
        report(tmp_path, *args)
    (tmp_path / "gallery" / "C.png").unlink()
    with pytest.raises(InputError, match=r"s\.pt: .*not in the image folder: 'C'"):
        report(tmp_path, *args, "--image_folder", str(tmp_path / "gallery"))


@pytest.mark.parametrize("text", ["nofile", "=x.pt", "LHP=", " =x.pt"])
def test_bad_score_flags(annotation: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="--score: expected NAME=FILE"):
        report(tmp_path, "--score", text, "--annotation", str(annotation))


def test_bad_inputs_leave_no_file(annotation: Path, score: str, tmp_path: Path) -> None:
    args = ("--annotation", str(annotation), "--score", f"LHP={score}")
    with pytest.raises(InputError, match="found 'LHP' twice"):
        report(tmp_path, *args, "--score", f"LHP={score}")
    with pytest.raises(InputError, match="--queries: expected at least 1"):
        report(tmp_path, *args, "--queries", "0")
    (tmp_path / "data/test/0.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"0\.jpg"):
        report(tmp_path, *args)
    assert not (tmp_path / "out").exists()


def test_choice_of_queries() -> None:
    ranks = [1] * 90 + [30, 20, 10, 9, 8, 7, 6, 5, 4, 3]
    kinds = ["normal"] * 96 + ["abnormal"] * 4
    chosen = choose_queries(ranks, kinds, 10)
    # six failures: the three worst normal and the three worst abnormal ones, worst first
    assert chosen[:6] == [90, 91, 92, 96, 97, 98]
    assert len(set(chosen)) == 10
    assert all(ranks[row] == 1 for row in chosen[6:])
    assert chosen == choose_queries(ranks, kinds, 10)
    assert chosen[6:] != choose_queries(ranks, kinds, 10, seed=1)[6:]


def test_choice_fills_up_from_what_there_is() -> None:
    assert choose_queries([2, 3, 4, 1], [""] * 4, 4) == [2, 1, 0, 3]
    one_failure = choose_queries([1, 1, 1, 5], ["normal"] * 4, 3)
    assert one_failure[0] == 3
    assert len(set(one_failure)) == 3
    assert choose_queries([1], [""], 40) == [0]
    assert len(choose_queries(None, ["normal"] * 50, 8)) == 8


# ------------------------------------------------------ curves, steps, double claims, actions


def test_steps_curves_and_tables(annotation: Path, score: str, tmp_path: Path) -> None:
    better = torch.eye(N) + torch.arange(N) * 1e-3
    better[5, 4] = 2.0  # loses query 5 to its twin, wins queries 0 and 1
    other = save(tmp_path / "b.pt", better)
    trials = tmp_path / "trials.csv"
    rows = [f"uit,{w},{r},{r}" for w, r in ((1.0, 50.0), (0.5, 80.0), (0.0, 70.0))]
    trials.write_text("member,weight,R@1,mAP\nlhp,1,50,50\n" + "\n".join(rows) + "\n")
    text = report(
        tmp_path, "--score", f"after={other}", "--score", f"before={score}", "--annotation",
        str(annotation), "--steps", "before", "after", "--trials", str(trials),
    )  # fmt: skip
    page = _Page(text)
    assert "before to after: 2 first places won, 1 lost" in text
    assert len(page.all("svg")) == 2
    assert len(page.all("polyline")) == 3, "two recall curves and one weight sweep"
    (ring,) = page.all("circle")
    x_of_half = float(page.all("polyline")[2]["points"].split()[1].split(",")[0])  # type: ignore[union-attr]
    assert float(ring["cx"] or 0) == x_of_half
    assert [c for c in (attrs.get("class") for attrs in page.all("li")) if c == "named"] != []
    # After: query 5 takes query 4's image. Before: query 0 takes query 13's, query 1 query 0's.
    table = text.split("<h2>Double claims</h2>")[1].split("</table>")[0]
    cells = re.findall(r">(\d+)<", table)
    assert cells == ["13", "2", "13", "2"]
    actions = text.split("<h2>R@1 by action</h2>")[1].split("</table>")[0]
    assert re.findall(r'scope="row">(\w+)<', actions) == ["Falling", "Walking"]


def test_stages_of_a_fusion_are_steps(annotation: Path, score: str, tmp_path: Path) -> None:
    words = ["--beit3_score", score, "--output_file", str(tmp_path / "list.txt"), "--save_score"]
    fuse([*words, str(tmp_path / "fused.pt")])
    fuse([*words, str(tmp_path / "margin.pt"), "--decode", "margin", "--decode_tau", "0"])
    trials = tmp_path / "trials.csv"  # as a spreadsheet saves it
    trials.write_text("\ufeffmember,weight,R@1,mAP\nuit,1,50,50\nuit,0,60,60\n", encoding="utf-8")
    text = report(
        tmp_path, "--score", f"margin={tmp_path / 'margin.pt'}", "--score",
        f"fused={tmp_path / 'fused.pt'}", "--annotation", str(annotation),
        "--steps", "fused", "margin", "--trials", str(trials),
    )  # fmt: skip
    # Query 0 wants image 13, which query 13 wants more, and then image 12, 11 and so on.
    assert "fused to margin: 0 first places won, 0 lost" in text
    table = text.split("<h2>Double claims</h2>")[1].split("</table>")[0]
    assert re.findall(r'scope="row">(\w+)<', table) == ["margin", "fused"]
    assert table.count("jointly over all queries") == 1
    assert "Actions of fewer than 5 queries are left out." in text


def test_names_of_lines_do_not_cover_each_other() -> None:
    series = [Series(f"s{i}", (1, 2), (0, 50 + 0.01 * i)) for i in range(6)]
    chart = line_chart("t", series, "x", "y")
    places = sorted(line.name_y for line in chart.lines)
    assert all(b - a >= 14.9 for a, b in pairwise(places))
    assert places[-1] <= chart.bottom
    assert chart.y_ticks[0].text == "0"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 25, 50, 75, 100]),
        (61.2, 84.9, [60, 70, 80, 90]),
        (3, 3, [3]),
    ],
)
def test_round_steps(low: float, high: float, expected: list[float]) -> None:
    found = round_steps(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert found[: len(expected)] == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--steps", "A", "nobody"], "found 'nobody'"),
        (["--steps", "A"], "'A' alone"),
        (["--trials", "{none}"], "none.csv"),
        (["--trials", "{odd}"], "expected the columns"),
        (["--trials", "{flat}"], "no member with several weights"),
        (["--trials", "{bytes}"], "expected the columns"),
        (["--trials", "{nan}"], "expected the columns"),
    ],
)
def test_steps_and_trials_that_are_none(
    annotation: Path, score: str, tmp_path: Path, flags: list[str], expected: str
) -> None:
    paths = {
        name: str(tmp_path / f"{name}.csv") for name in ("none", "odd", "flat", "bytes", "nan")
    }
    Path(paths["bytes"]).write_bytes(bytes(range(256)))
    Path(paths["nan"]).write_text("member,weight,R@1,mAP\nuit,0.5,nan,1\n")
    Path(paths["odd"]).write_text("member,weight,R@1,mAP\nuit,much,1,1\n")
    Path(paths["flat"]).write_text("member,weight,R@1,mAP\nlhp,1,50,50\n")
    given = [flag.format(**paths) for flag in flags]
    with pytest.raises(InputError, match=expected):
        report(tmp_path, "--score", f"A={score}", "--annotation", str(annotation), *given)
