"""Report page: chosen queries, marked images, and no resources outside the file."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from ensemble.report.charts import Series, line_chart, round_steps
from ensemble.report.inputs import NamedScores
from ensemble.report.page import choose_queries, main
from ensemble.run import main as fuse
from pab import __version__
from pab.core.errors import InputError
from pab.scores import ScoreFile, load_scores, save_scores
from pab.training.run_log import git_state

N = 14
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def annotation(tmp_path: Path) -> Path:
    """Annotate fourteen images: each even one is normal and the twin of the next odd one."""
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


def save(path: Path, matrix: torch.Tensor, **meta: object) -> str:
    ids = [f"i{i:02}" for i in range(N)]
    save_scores(path, ScoreFile(matrix, [f"{i}#0" for i in ids], ids, {"model": "m<1>", **meta}))
    return str(path)


@pytest.fixture
def score(tmp_path: Path) -> str:
    """Write scores that rank the right image first, except in queries 0 (last) and 1 (second)."""
    matrix = torch.eye(N) + torch.arange(N) * 1e-3
    matrix[0, 0] = -1.0
    matrix[1, 0] = 2.0
    return save(tmp_path / "s.pt", matrix)


class _Page(HTMLParser):
    """HTML parser that collects tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def all(self, name: str) -> list[dict[str, str]]:
        return [attrs for tag, attrs in self.tags if tag == name]

    def values(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.tags if name in attrs]

    def shots(self) -> list[str]:
        """Return the labels of the pictures."""
        return [a["aria-label"] for a in self.all("svg") if a.get("class") == "shot"]

    def tab_stops(self) -> int:
        return sum(
            attrs.get("tabindex") == "0" or tag in ("a", "button", "input", "select", "summary")
            for tag, attrs in self.tags
        )


def report(tmp_path: Path, *args: str) -> str:
    main([*args, "--out", str(tmp_path / "out" / "report.html")])
    return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def section(text: str, name: str) -> str:
    """Return the text of the section whose id is ``name``."""
    return re.split(r"</section>|</footer>", text.split(f'id="{name}"')[1])[0]


def test_page(annotation: Path, score: str, tmp_path: Path) -> None:
    text = report(tmp_path, "--score", f"LHP={score}", "--annotation", str(annotation))
    page = _Page(text)

    articles = page.all("article")
    assert [a["data-outcome"] for a in articles] == ["failure"] * 2 + ["success"] * (N - 2)
    assert [a["data-kind"] for a in articles[:2]] == ["normal", "abnormal"]  # worst first
    # Query 0 ranks query 13's right image first; query 1 ranks its twin first.
    assert [a["data-failure"] for a in articles[:3]] == ["far duplicate", "near twin", ""]
    assert [a["data-rank"] for a in articles[:3]] == ["14", "2", "1"]
    assert [a["data-action"] for a in articles[:2]] == ["Walking", "Falling"]
    assert articles[0]["data-id"] == "i00#0"
    assert "rank 14" in text

    queries = section(text, "queries")
    items = [attrs.get("class", "") for attrs in _Page(queries).all("li")]
    assert items[0] == "right"  # query 0's right image (rank 14), put before its first ten
    assert len(items) == N * 10 + 1
    assert items.count("right") == N
    assert items[11] == "twin"  # query 1 ranks its twin first
    assert items[12] == "right"

    shots = page.shots()
    assert len(shots) == len(items)
    assert shots[0] == "i00, rank 14, score -1.000, right image"
    assert shots[11] == "i00, rank 1, score 2.000, twin"
    # One thumbnail per image, though most images are shown several times.
    images = {image["id"]: image["href"] for image in page.all("image")}
    assert len(images) == N
    drawn = [use["href"].removeprefix("#") for use in page.all("use") if "href" in use]
    assert {*drawn} == {*images}
    code = images[drawn[0]].removeprefix("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(code))) as thumbnail:
        assert thumbnail.size == (128, 192)

    assert "abnormal: Falling" in text
    assert "over twin" in text


def test_sections_of_the_page_are_in_order(annotation: Path, score: str, tmp_path: Path) -> None:
    text = report(
        tmp_path, "--score", f"b={score}", "--score", f"a={score}", "--steps", "a", "b",
        "--annotation", str(annotation),
    )  # fmt: skip
    page = _Page(text)
    wanted = ["metrics", "queries", "steps", "curves", "tables", "made"]
    assert [value for value in page.values("id") if value in wanted] == wanted
    assert [link["href"] for link in page.all("a")] == [f"#{name}" for name in wanted]
    assert len(page.values("id")) == len({*page.values("id")})
    tables = section(text, "tables")
    assert len(_Page(tables).all("details")) == 3
    assert "open" not in {name for d in _Page(tables).all("details") for name in d}, (
        "tables are collapsed"
    )


def test_filters_match_the_queries(annotation: Path, score: str, tmp_path: Path) -> None:
    text = report(tmp_path, "--score", f"LHP={score}", "--annotation", str(annotation))
    page = _Page(text)
    assert [s["name"] for s in page.all("select")] == [
        "outcome", "kind", "failure", "action", "order",
    ]  # fmt: skip
    assert [i["name"] for i in page.all("input")] == ["words"]
    offered = {option["value"] for option in page.all("option")} - {"", "best", "action", "id"}
    articles = page.all("article")
    names = ("outcome", "kind", "failure", "action")
    assert offered == {
        word for a in articles for name in names for word in a[f"data-{name}"].split()
    }
    assert '<option value="Falling">Falling (7)</option>' in text
    assert '<option value="twin">twin at rank 1 (1)</option>' in text
    assert "hidden" in page.all("form")[0], "filters need the script, which shows them"


def test_a_query_is_one_tab_stop(annotation: Path, score: str, tmp_path: Path) -> None:
    one = ["--score", f"LHP={score}", "--annotation", str(annotation)]
    for args in (one, [*one, "--score", f"UIT={score}", "--steps", "LHP", "UIT"]):
        articles = report(tmp_path, *args).split("<article")[1:]
        assert len(articles) == N
        stops = [_Page("<article" + a.split("</article>")[0]).tab_stops() for a in articles]
        assert stops == [1] * N


def test_lists_of_the_other_rankings_are_collapsed_below_a_query(
    annotation: Path, score: str, tmp_path: Path
) -> None:
    other = save(tmp_path / "o.pt", torch.eye(N).flip(0))
    text = report(
        tmp_path, "--score", f"LHP={score}", "--score", f"UIT={other}", "--annotation",
        str(annotation),
    )  # fmt: skip
    lists = text.split('<details class="lists">')[1].split("</details>")[0]
    # Query 0: image 13 scores 1, and image 0 is the first of those that score 0.
    assert "<summary>Other rankings: UIT <b>2</b></summary>" in lists
    assert _Page(lists).shots()[:2] == [
        "i13, rank 1, score 1.000",
        "i00, rank 2, score 0.000, right image",
    ]
    assert len(_Page(lists).shots()) == 10


def test_members_and_fusion_steps_have_separate_tables(
    annotation: Path, score: str, tmp_path: Path
) -> None:
    fused = tmp_path / "fused.pt"
    fuse(["--beit3_score", score, "--uit_score", score, "--beit3_weight", "0.75",
          "--save_score", str(fused), "--output_file", str(tmp_path / "list.txt")])  # fmt: skip
    text = report(
        tmp_path, "--score", f"all={fused}", "--score", f"LHP={score}", "--score", f"UIT={score}",
        "--score", f"imported={score}", "--steps", "LHP", "imported", "all",
        "--annotation", str(annotation),
    )  # fmt: skip
    metrics = section(text, "metrics")
    assert re.findall(r"<h3>(.+?)</h3>", metrics) == ["Members", "Fusion steps"]
    tables = metrics.split("<table>")[1:]
    rows = [re.findall(r'<th scope="row">(\w+)</th>', table) for table in tables]
    assert rows == [["LHP", "UIT"], ["imported", "all"]], (
        "a file without a fusion record may be a step"
    )
    foot = section(text, "made")
    assert "<b>all</b>: iterative fusion, weights: lhp, uit 0.75" in foot
    assert "<b>LHP</b>: m&lt;1&gt;" in foot


def test_footer_names_command_commit_date_and_weights(
    annotation: Path, score: str, tmp_path: Path
) -> None:
    save_scores(
        tmp_path / "c.pt",
        replace(
            load_scores(score),
            meta={
                "model": "net",
                "checkpoint": "a<b>.pth",
                "checkpoint_sha256": "0123456789abcdef",
            },
        ),
    )
    args = ("--score", f"A <b>={tmp_path / 'c.pt'}", "--annotation", str(annotation))
    foot = section(report(tmp_path, *args), "made")
    command = html.unescape(foot.split("<pre>")[1].split("</pre>")[0])
    out = ("--out", str(tmp_path / "out/report.html"))
    assert shlex.split(command) == ["python", "-m", "ensemble.report", *args, *out]
    git = git_state(ROOT)
    assert (git["commit"] if git else __version__) in foot
    assert re.search(r"<time datetime=.+?>\d{4}-\d\d-\d\d \d\d:\d\d UTC</time>", foot)
    assert "net, a&lt;b&gt;.pth, SHA-256 0123456789ab</li>" in foot


@pytest.mark.parametrize("members", [3, [], ["uit"], [{}]])
def test_origin_of_a_file_with_an_odd_record(members: object) -> None:
    scores = ScoreFile(torch.zeros(1, 1), ["q"], ["g"], {"model": "ensemble", "members": members})
    assert NamedScores("A", scores, None).origin


def test_page_needs_no_network_and_escapes_text(
    annotation: Path, score: str, tmp_path: Path
) -> None:
    text = report(
        tmp_path, "--score", f"A&B={score}", "--score", f"<u>={score}", "--annotation",
        str(annotation), "--title", "<i>T</i>",
    )  # fmt: skip
    page = _Page(text)
    assert len(page.all("script")) == 1
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(3)&lt;/script&gt; &amp; person 3" in text
    assert "<title>&lt;i&gt;T&lt;/i&gt;</title>" in text
    assert "A&amp;B (m&lt;1&gt;)" in text
    assert not page.all("u")
    links = [
        value for name in ("src", "href", "srcset", "action", "data") for value in page.values(name)
    ]
    ids = page.values("id")
    assert all(link.startswith("data:") or link.removeprefix("#") in ids for link in links)
    assert not re.search(r"https?://|url\(|@import", text)


def test_same_inputs_give_the_same_bytes(annotation: Path, score: str, tmp_path: Path) -> None:
    args = ("--score", f"LHP={score}", "--annotation", str(annotation), "--queries", "6")
    first, second = (re.sub("<time .+?</time>", "", report(tmp_path, *args)) for _ in range(2))
    assert first == second
    assert len(_Page(first).all("article")) == 6


def test_several_score_files(
    annotation: Path, score: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save(tmp_path / "o.pt", torch.eye(N).flip(0))
    text = report(
        tmp_path, "--score", f"LHP={score}", "--score", f"UIT={other}", "--annotation",
        str(annotation),
    )  # fmt: skip
    for row in ("LHP", "LHP, normal", "LHP, abnormal", "UIT", "UIT, normal", "UIT, abnormal"):
        assert f'<th scope="row">{row}</th>' in text
    header, first, second, _ = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["R@1", "R@5"]
    assert header.endswith("R@1 gain of LHP over this row")
    at_one = 100 * (N - 2) / N
    assert first.split()[:2] == ["LHP", f"{at_one:.2f}"]
    assert first.endswith(" -")
    assert second.split()[:2] == ["UIT", "0.00"]
    assert f"{at_one:+.2f} [" in second  # UIT ranks no right image first


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
    assert [label.split(",")[0] for label in page.shots()] == ["B", "C", "A"]
    assert len(page.all("table")) == 1, "duplicate top-1 images need no labels"
    assert not page.all("polyline")
    assert [one["name"] for one in page.all("select")] == ["order"]
    assert [link["href"] for link in page.all("a")] == ["#queries", "#tables", "#made"]
    with pytest.raises(InputError, match="pass the folder of the images with --image_folder"):
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
    with pytest.raises(InputError, match="--seed: must be at least 0, found -1"):
        report(tmp_path, *args, "--seed", "-1")
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


def test_choice_fills_up_with_the_remaining_queries() -> None:
    assert choose_queries([2, 3, 4, 1], [""] * 4, 4) == [2, 1, 0, 3]
    one_failure = choose_queries([1, 1, 1, 5], ["normal"] * 4, 3)
    assert one_failure[0] == 3
    assert len(set(one_failure)) == 3
    assert choose_queries([1], [""], 40) == [0]
    assert len(choose_queries(None, ["normal"] * 50, 8)) == 8


# ------------------------------------------------------ curves, steps, duplicate top-1, actions


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
    assert "before to after: queries won: 2, lost: 1" in text
    curves = _Page(section(text, "curves"))
    assert [svg.get("class") for svg in curves.all("svg") if "viewbox" in svg] == ["plot"] * 2
    lines = [line["points"] for line in curves.all("polyline") if line["points"] != "0,5 34,5"]
    assert len(lines) == 3, "two recall curves and one weight sweep"
    (ring,) = curves.all("circle")
    x_of_half = float(lines[2].split()[1].split(",")[0])
    assert float(ring["cx"]) == x_of_half
    # Query 5 is lost. Before: right image at rank 1. After: twin at rank 1, right image at rank 2.
    assert _Page(text.split("Examples of lost queries")[1].split("</ol>")[0]).shots() == [
        "i05, rank 1, score 1.005, right image",
        "i04, rank 1, score 2.000, twin",
        "i05, rank 2, score 1.005, right image",
    ]
    # After: query 5 ranks query 4's image first.
    # Before: query 0 ranks query 13's image first, and query 1 ranks query 0's.
    cells = re.findall(
        r">(\d+)<", text.split("Duplicate top-1</summary>")[1].split("</details>")[0]
    )
    assert cells == ["13", "2", "13", "2"]
    actions = text.split("R@1 by action</summary>")[1].split("</table>")[0]
    assert re.findall(r'scope="row">(\w+)<', actions) == ["Falling", "Walking"]


def test_a_right_image_that_is_not_listed_is_a_failure(
    annotation: Path, score: str, tmp_path: Path
) -> None:
    matrix = load_scores(score).scores.clone()
    kept = matrix[0].topk(3)
    matrix[0] = torch.nextafter(kept.values[-1], torch.tensor(-torch.inf))
    matrix[0, kept.indices] = kept.values
    listed = {f"i{i:02}#0": 3 if i == 0 else N for i in range(N)}
    before = torch.eye(N) + torch.arange(N) * 1e-3
    files = {
        "after": save(tmp_path / "after.pt", matrix, listed=listed),
        "before": save(tmp_path / "before.pt", before),
    }
    named = [word for name, file in files.items() for word in ("--score", f"{name}={file}")]
    text = report(
        tmp_path, *named, "--annotation", str(annotation), "--steps", "before", "after"
    )  # fmt: skip
    assert "2 of the 2 failures" in " ".join(text.split())
    (card,) = [one for one in _Page(text).all("article") if one["data-id"] == "i00#0"]
    assert (card["data-failure"], card["data-rank"]) == ("far duplicate", str(N + 1))
    assert text.count("right image not listed") == 1
    shown = text.split('data-id="i00#0"')[1].split("</ol>")
    assert [one.count('class="shot"') for one in shown[:2]] == [3, 10], "before lists all images"
    assert "before to after: queries won: 0, lost: 2" in text
    lost = _Page(text.split("Examples of lost queries")[1]).shots()[:2]
    assert lost == ["i00, rank 1, score 1.000, right image", "i13, rank 1, score 0.013"]
    assert "85.7" in section(text, "curves"), "R@1: 12 of 14 queries"


def test_a_run_with_other_spellings_of_the_names(
    annotation: Path, score: str, tmp_path: Path
) -> None:
    run = {f"i{i:02}#0": {f"i{i:02}.jpg": 2.0, "i03.JPG": 1.0} for i in range(4, N)}
    run |= {f"i{i:02}#0": {"i05.jpg": 1.0} for i in range(4)}
    (tmp_path / "run.json").write_text(json.dumps(run))
    ids = [f"i{i:02}.jpg" for i in range(N)]
    own = ScoreFile(load_scores(score).scores, load_scores(score).query_ids, ids)
    save_scores(tmp_path / "own.pt", own)
    for first, second in (("run.json", "own.pt"), ("own.pt", "run.json")):
        named = [
            word for file in (first, second) for word in ("--score", f"{file}={tmp_path / file}")
        ]
        text = report(tmp_path, *named, "--annotation", str(annotation))
        assert "71.4" in section(text, "curves"), "R@1 of the run: 10 of 14"
        assert "85.7" in section(text, "curves"), "R@1 of the other file: 12 of 14"


def test_labels_of_a_chart_follow_its_lines(annotation: Path, score: str, tmp_path: Path) -> None:
    perfect, poor = save(tmp_path / "p.pt", torch.eye(N)), save(tmp_path / "q.pt", -torch.eye(N))
    text = report(
        tmp_path, "--score", f"middle={score}", "--score", f"poor={poor}", "--score",
        f"perfect={perfect}", "--annotation", str(annotation),
    )  # fmt: skip
    plot, legend = section(text, "curves").split('<div class="legend">')
    assert re.findall("<b>(.+?)</b><span>(.+?)</span>", legend) == [
        ("perfect", "100.00"), ("middle", "85.71"), ("poor", "0.00"),
    ]  # fmt: skip
    starts = [float(p["points"].split()[0].split(",")[1]) for p in _Page(plot).all("polyline")]
    assert starts == sorted(starts), "y grows downward in an SVG"
    colours = re.findall(r'class="(s\d)"', plot)
    assert colours == re.findall(r'class="(s\d)"', legend)


def test_stages_of_a_fusion_are_steps(annotation: Path, score: str, tmp_path: Path) -> None:
    words = ["--beit3_score", score, "--output_file", str(tmp_path / "list.txt"), "--save_score"]
    fuse([*words, str(tmp_path / "fused.pt")])
    fuse([*words, str(tmp_path / "margin.pt"), "--decode", "margin", "--decode_tau", "0"])
    trials = tmp_path / "trials.csv"  # with a byte-order mark, as spreadsheets write
    trials.write_text("\ufeffmember,weight,R@1,mAP\nuit,1,50,50\nuit,0,60,60\n", encoding="utf-8")
    text = report(
        tmp_path, "--score", f"margin={tmp_path / 'margin.pt'}", "--score",
        f"fused={tmp_path / 'fused.pt'}", "--annotation", str(annotation),
        "--steps", "fused", "margin", "--trials", str(trials),
    )  # fmt: skip
    # Query 0 prefers image 13, which query 13 keeps; then image 12, which query 12 keeps; etc.
    assert "fused to margin: queries won: 0, lost: 0" in text
    table = text.split("Duplicate top-1</summary>")[1].split("</details>")[0]
    assert re.findall(r'scope="row">(\w+)<', table) == ["fused", "margin"], (
        "in the order of the steps"
    )
    assert table.count("jointly over all queries") == 1
    assert "Actions with fewer than 5 queries are omitted." in text


def test_lines_stay_inside_the_chart() -> None:
    series = [Series(f"s{i}", (1, 2), (0, 50 + i), 50 + i, mark=1) for i in range(3)]
    chart = line_chart("t", series, "x", "y")
    assert [line.name for line in chart.lines] == ["s2", "s1", "s0"]
    for line in chart.lines:
        for point in line.points.split():
            x, y = map(float, point.split(","))
            assert chart.left <= x <= chart.right
            assert chart.top <= y <= chart.bottom
        assert line.mark == (x, y)
    assert chart.y_ticks[0][0] == "0"


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
def test_invalid_steps_and_trials_are_refused(
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
