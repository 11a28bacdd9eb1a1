"""Search for fusion weights: grids, folds, written configs and refused inputs."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path

import pytest
import torch

from ensemble.run import RunConfig
from ensemble.run import main as run
from ensemble.search import main as search
from ensemble.trials import grid
from pab.core.config import load_config
from pab.core.errors import InputError
from pab.data.annotations import read_retrieval
from pab.evaluate import evaluate
from pab.metrics import evaluate_scores
from pab.scores import ScoreFile, load_scores, save_scores
from tests.conftest import write_lines
from tests.fusion import IMAGES, annotation_file, fused, labelled, write


@pytest.fixture
def annotation(tmp_path: Path) -> Path:
    return annotation_file(tmp_path)


# ---------------------------------------------------------------------------------------- search


def test_search_finds_the_best_of_the_grid(annotation: Path, tmp_path: Path) -> None:
    paths = labelled(tmp_path)
    trials, out = tmp_path / "trials.csv", tmp_path / "weights.yaml"
    words = [
        "--beit3_score",
        paths["a"],
        "--uit_score",
        paths["b"],
        "--member",
        f"x={paths['c']}:1",
    ]
    search([*words, "--annotation", str(annotation), "--grid_step", "0.05"]
           + ["--trials", str(trials), "--out", str(out)])  # fmt: skip
    rows = list(csv.DictReader(trials.open()))
    assert [row["member"] for row in rows] == ["lhp"] + ["uit"] * 21 + ["x"] * 21
    chosen = load_config(RunConfig, out, {})
    assert chosen.chosen_on == str(annotation)
    assert not chosen.chosen_on_test
    best = {}
    for name in ("uit", "x"):
        of_member = [row for row in rows if row["member"] == name]
        best[name] = max(of_member, key=lambda r: (float(r["R@1"]), float(r["mAP"])))
    assert chosen.beit3_weight == float(best["uit"]["weight"])
    assert chosen.member_weights == (f"x:{best['x']['weight']}",)
    # The run with those weights gives the metrics that the search found.
    fused = tmp_path / "fused.pt"
    run(["--config", str(out), *words[:4], "--member", f"x={paths['c']}"]
        + ["--output_file", str(tmp_path / "o.txt"), "--save_score", str(fused)])  # fmt: skip
    relevant = {f"{image}#0": frozenset({image}) for image in IMAGES}
    mean = evaluate_scores(load_scores(fused), relevant).mean()
    assert mean["R@1"] == pytest.approx(float(best["x"]["R@1"]), abs=1e-3)
    assert float(best["x"]["R@1"]) >= float(best["uit"]["R@1"]) >= float(rows[0]["R@1"])


def test_a_test_set_is_refused(annotation: Path, tmp_path: Path) -> None:
    paths = labelled(tmp_path)
    path = tmp_path / "annotation/test/pair.json"
    path.parent.mkdir()
    annotation.rename(path)
    words = ["--beit3_score", paths["a"], "--uit_score", paths["b"], "--annotation", str(path)]
    words += ["--trials", str(tmp_path / "t.csv"), "--out", str(tmp_path / "w.yaml")]
    with pytest.raises(InputError, match="--allow_test"):
        search(words)
    assert not (tmp_path / "w.yaml").exists()
    search([*words, "--allow_test"])
    assert load_config(RunConfig, tmp_path / "w.yaml", {}).chosen_on_test


def test_a_test_set_is_recognized_by_any_path(
    annotation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = labelled(tmp_path)
    folder = tmp_path / "annotation/test"
    folder.mkdir()
    annotation.rename(folder / "pair.json")
    words = ["--beit3_score", str(Path(paths["a"]).absolute())]
    words += ["--uit_score", str(Path(paths["b"]).absolute()), "--image_folder", str(tmp_path)]
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match="--allow_test"):
        search([*words, "--annotation", "pair.json"])
    (folder / "pair.json").rename(tmp_path / "a1b2.json")
    (folder / "pair.json").symlink_to(tmp_path / "a1b2.json")
    with pytest.raises(InputError, match="--allow_test"):
        search([*words, "--annotation", str(folder / "pair.json")])


def test_a_validation_split_in_a_folder_called_test(annotation: Path, tmp_path: Path) -> None:
    paths = labelled(tmp_path)
    path = tmp_path / "output/test/lhp/val_pairs.json"
    path.parent.mkdir(parents=True)
    annotation.rename(path)
    words = ["--beit3_score", paths["a"], "--uit_score", paths["b"], "--annotation", str(path)]
    words += ["--image_folder", str(tmp_path), "--out", str(tmp_path / "w.yaml")]
    search([*words, "--trials", str(tmp_path / "t.csv")])
    assert not load_config(RunConfig, tmp_path / "w.yaml", {}).chosen_on_test


def test_members_with_other_captions_cause_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in (("bare", None), ("a", "1"), ("b", "2"), ("c", "1")):
        scores = torch.rand(2, 3, generator=torch.Generator().manual_seed(len(name)))
        save_scores(
            tmp_path / f"{name}.pt",
            ScoreFile(scores, ["q1", "q2"], ["x", "y", "z"], {"data_sha256": data}),
        )
    names = {"beit3": "bare", "uit": "a", "clip": "b"}  # the first has no hash
    words = [f"--{member}_score={tmp_path / name}.pt" for member, name in names.items()]
    run([*words, "--output_file", str(tmp_path / "o.txt"), "--top_k", "2"])
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warned) == 1
    assert "b.pt was computed from other data than" in warned[0]
    words[2] = f"--clip_score={tmp_path / 'c'}.pt"
    run([*words, "--output_file", str(tmp_path / "o.txt"), "--top_k", "2"])
    assert "warning" not in capsys.readouterr().err


def test_test_images_are_a_test_set_under_any_name(annotation: Path, tmp_path: Path) -> None:
    paths = labelled(tmp_path)
    annotation.write_text(annotation.read_text().replace("train/", "test/"))
    words = ["--beit3_score", paths["a"], "--uit_score", paths["b"]]
    with pytest.raises(InputError, match="--allow_test"):
        search([*words, "--annotation", str(annotation)])


@pytest.mark.parametrize(("step", "count"), [(0.5, 3), (0.0125, 81), (0.3, 5), (1.0, 2)])
def test_grids_reach_both_ends(step: float, count: int) -> None:
    weights = grid(step)
    assert len(weights) == count
    assert weights == sorted(weights, reverse=True)
    assert (weights[0], weights[-1]) == (1.0, 0.0)


@pytest.mark.parametrize("flag", ["--out", "--trials"])
@pytest.mark.parametrize("what", ["beit3_score", "annotation", "decode_bank"])
def test_a_search_does_not_overwrite_its_inputs(
    annotation: Path, tmp_path: Path, flag: str, what: str
) -> None:
    paths = labelled(tmp_path)
    files = {"beit3_score": paths["a"], "annotation": str(annotation), "decode_bank": paths["c"]}
    words = [
        "--beit3_score",
        paths["a"],
        "--uit_score",
        paths["b"],
        "--annotation",
        files["annotation"],
    ]
    words += ["--decode", "querybank", "--decode_bank", paths["c"], "--folds", "0"]
    words += ["--out", str(tmp_path / "w.yaml"), "--trials", str(tmp_path / "t.csv")]
    before = Path(files[what]).read_bytes()
    with pytest.raises(
        InputError, match=f"{flag}: .* is the file of --{what}: it would be overwritten"
    ):
        search([*words, flag, files[what]])
    assert Path(files[what]).read_bytes() == before


def test_a_search_names_the_file_that_lacks_images(annotation: Path, tmp_path: Path) -> None:
    few = {
        name: write(
            tmp_path / f"few_{name}.pt", torch.rand(12, 11),
            [f"{image}#0" for image in IMAGES], IMAGES[:11],
        )
        for name in ("a", "b")
    }  # fmt: skip
    words = ["--beit3_score", few["a"], "--uit_score", few["b"], "--annotation", str(annotation)]
    words += ["--out", str(tmp_path / "w.yaml"), "--trials", str(tmp_path / "t.csv")]
    with pytest.raises(InputError, match="i11") as caught:
        search(words)
    assert str(caught.value).startswith(few["a"])


# ------------------------------------------------------------------------- other ways to search


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "steps"],
        ["--order", "greedy", "--scaling", "rank"],
        ["--method", "simplex", "--scaling", "zscore"],
        ["--decode", "margin"],
        ["--decode", "assignment", "--decode_top", "2", "--decode_scope", "collisions"],
        ["--decode", "sinkhorn", "--scaling", "minmax_query", "--decode_grid", "5", "20"],
    ],
)
def test_the_written_config_runs_unchanged(
    annotation: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = labelled(tmp_path)
    # No weights are passed, and one --member has the name of a published member.
    words = ["--uit_score", paths["a"], "--member", f"clip={paths['b']}", f"other={paths['c']}"]
    out, made = tmp_path / "w.yaml", ["--annotation", str(annotation), "--grid_step", "0.1"]
    search([*words, *made, *flags, "--folds", "0", "--out", str(out)]
           + ["--trials", str(tmp_path / "t.csv")])  # fmt: skip
    said = capsys.readouterr().out
    shares = re.search(r"shares of the sum: uit (\S+), clip (\S+), other (\S+)\n", said)
    assert shares is not None
    assert sum(map(float, shares.groups())) == pytest.approx(1.0, abs=1e-3)
    found = fused(tmp_path, "--config", str(out))
    assert [member["name"] for member in found.meta["members"]] == ["uit", "clip", "other"]
    relevant = {f"{image}#0": frozenset({image}) for image in IMAGES}
    mean = evaluate_scores(found, relevant).mean()
    printed = re.findall(r"R@1 (\d+\.\d\d), mAP (\d+\.\d\d)", said)[-1]
    assert printed == (f"{mean['R@1']:.2f}", f"{mean['mAP']:.2f}")


def test_a_grid_that_does_not_divide_one_is_reported(
    annotation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    searched(annotation, tmp_path, "--method", "simplex", "--grid_step", "0.3", "--folds", "0")
    assert "0.3 does not divide 1; the shares use steps of 1/3" in capsys.readouterr().err


def test_a_list_in_a_search_on_ranks(annotation: Path, tmp_path: Path) -> None:
    paths = labelled(tmp_path)
    lines = [" ".join(IMAGES[(n + shift) % 12] for shift in range(3)) for n in range(12)]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    out = tmp_path / "w.yaml"
    words = ["--beit3_score", paths["a"], "--clip_score", str(tmp_path / "list.txt")]
    search([*words, "--scaling", "rank", "--annotation", str(annotation), "--folds", "0"]
           + ["--out", str(out), "--trials", str(tmp_path / "t.csv")])  # fmt: skip
    found = fused(tmp_path, "--config", str(out))  # the config names the order of lines
    assert evaluate_scores(found, {f"{image}#0": frozenset({image}) for image in IMAGES}).mean()[
        "R@1"
    ] == pytest.approx(100.0)


def searched(
    annotation: Path, tmp_path: Path, *flags: str
) -> tuple[RunConfig, list[dict[str, str]]]:
    """Search the weights of three members; return the written config and the trials."""
    paths = labelled(tmp_path)
    trials, out = tmp_path / "trials.csv", tmp_path / "weights.yaml"
    words = ["--beit3_score", paths["a"], "--uit_score", paths["b"], "--clip_score", paths["c"]]
    search([*words, "--annotation", str(annotation), "--trials", str(trials), "--out", str(out)]
           + list(flags))  # fmt: skip
    return load_config(RunConfig, out, {}), list(csv.DictReader(trials.open()))


def figures(tmp_path: Path, config: RunConfig) -> dict[str, float]:
    """Return the metrics of `ensemble.run` with the written weights."""
    words = [f"--{name}" for name in ("beit3_score", "uit_score", "clip_score")]
    given = [w for n, f in zip(words, "abc", strict=True) for w in (n, str(tmp_path / f"{f}.pt"))]
    found = fused(tmp_path, *given, "--config", str(tmp_path / "weights.yaml"))
    assert config.chosen_on is not None
    relevant = {f"{image}#0": frozenset({image}) for image in IMAGES}
    return evaluate_scores(found, relevant).mean()


def test_greedy_order_starts_with_the_best(annotation: Path, tmp_path: Path) -> None:
    config, rows = searched(annotation, tmp_path, "--order", "greedy", "--grid_step", "0.1")
    assert [row["member"] for row in rows[:3]] == ["lhp", "uit", "clip"]
    assert len(rows) == 3 + 2 * 11 + 11
    best = max(rows, key=lambda row: (float(row["R@1"]), float(row["mAP"])))
    mean = figures(tmp_path, config)
    assert mean["R@1"] == pytest.approx(float(best["R@1"]), abs=1e-3)
    assert mean["mAP"] == pytest.approx(float(best["mAP"]), abs=1e-3)


def test_the_simplex_holds_every_share(annotation: Path, tmp_path: Path) -> None:
    config, rows = searched(annotation, tmp_path, "--method", "simplex", "--grid_step", "0.1")
    assert len(rows) == 66  # shares of three members in tenths
    assert rows[0]["member"] == "lhp:1 uit:0 clip:0"
    best = max(rows, key=lambda row: (float(row["R@1"]), float(row["mAP"])))
    mean = figures(tmp_path, config)
    assert mean["R@1"] == pytest.approx(float(best["R@1"]), abs=1e-3)
    with pytest.raises(InputError, match="need 501501 trials"):
        searched(annotation, tmp_path, "--method", "simplex", "--grid_step", "0.001")


def test_folds_measure_overfitting(
    annotation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    searched(annotation, tmp_path, "--folds", "4", "--grid_step", "0.1")
    said = capsys.readouterr().out
    assert "weights chosen on the other folds (4): R@1 " in said
    inside = float(said.split("+ clip")[1].split("R@1 ")[1].split(",")[0])
    outside = float(said.split("folds (4): R@1 ")[1].split(",")[0])
    assert f"overfits by {inside - outside:+.2f}" in said
    assert outside <= inside + 1e-6


def test_a_later_weight_of_zero_keeps_earlier_weights(annotation: Path, tmp_path: Path) -> None:
    paths = labelled(tmp_path)
    perfect = torch.eye(12)
    write(tmp_path / "c.pt", perfect, [f"{image}#0" for image in IMAGES], IMAGES)
    words = ["--beit3_score", paths["a"], "--uit_score", paths["b"], "--clip_score", paths["c"]]
    flags = ["--grid_step", "0.5", "--trials", str(tmp_path / "t.csv"), "--folds", "0"]
    search([*words, "--annotation", str(annotation), *flags, "--out", str(tmp_path / "w.yaml")])
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    uit = [row for row in rows if row["member"] == "uit"]
    best = max(uit, key=lambda row: (float(row["R@1"]), float(row["mAP"])))
    assert load_config(RunConfig, tmp_path / "w.yaml", {}).beit3_weight == float(best["weight"])


def test_a_search_over_ranked_lists_only(annotation: Path, tmp_path: Path) -> None:
    for name, shift in (("a", 0), ("b", 1)):
        lines = [f"{IMAGES[(n + shift * (n % 2)) % 12]} {IMAGES[(n + 5) % 12]}" for n in range(12)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines[:11] + ["i00 i01"]) + "\n")
    words = ["--beit3_score", str(tmp_path / "a.txt"), "--uit_score", str(tmp_path / "b.txt")]
    (tmp_path / "train").mkdir()
    out = ["--trials", str(tmp_path / "t.csv"), "--out", str(tmp_path / "w.yaml"), "--folds", "0"]
    search([*words, "--annotation", str(annotation), *out])  # no list names i11
    assert (tmp_path / "w.yaml").exists()


def test_a_copied_test_set_is_recognized_by_its_answer_key(
    annotation: Path, tmp_path: Path
) -> None:
    paths = labelled(tmp_path)
    query, key = tmp_path / "val.json", tmp_path / "name-masked_test-set/answers.json"
    ids = [f"{image}#0" for image in IMAGES]
    write_lines(query, [{"query_index": one, "caption": "x"} for one in ids])
    key.parent.mkdir()
    found = {one: {"gallery": one[:3], "normal": "walking"} for one in ids}
    key.write_text(json.dumps(found))
    words = ["--beit3_score", paths["a"], "--uit_score", paths["b"], "--annotation", str(query)]
    with pytest.raises(InputError, match="--allow_test"):
        search([*words, "--answers", str(key)])


@pytest.mark.parametrize(
    ("decode", "name"), [("assignment", "decode_slack"), ("sinkhorn", "decode_factor")]
)
def test_the_parameter_of_a_decoding_is_searched(
    annotation: Path, tmp_path: Path, decode: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--decode", decode, "--decode_grid", "0.01", "0.3", "--grid_step", "0.1"]
    config, _ = searched(annotation, tmp_path, *flags, "--folds", "0", "--sinkhorn_steps", "7")
    assert config.decode == (decode,)
    assert getattr(config, name) in (0.01, 0.3)
    said = capsys.readouterr().out.split(f"decoded by {decode}, {name} {getattr(config, name):g}: ")
    assert config.sinkhorn_steps == (7 if decode == "sinkhorn" else 50)
    mean = figures(tmp_path, config)
    assert said[1].startswith(f"R@1 {mean['R@1']:.2f}, mAP {mean['mAP']:.2f}")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--folds", "1"], "--folds"),
        (["--seed", "-1"], "--seed: expected a number greater than or equal to 0"),
        (["--decode_grid", "0.1"], "--decode_grid"),
        (["--decode", "assignment", "--decode_grid", "-0.5"], "cannot be -0.5 for assignment"),
        (["--decode", "sinkhorn", "--decode_grid", "0"], "cannot be 0 for sinkhorn"),
        (["--decode", "assignment", "--decode_slack", "0.1"], "set --decode_grid"),
        (["--decode", "margin", "margin"], "margin and margin share --decode_tau"),
        (["--decode", "margin", "sinkhorn", "--decode_grid", "1"], "one decoding, found 2"),
        (["--decode", "margin", "--decode_grid", "1", "--tau_grid", "1"], "contradicts"),
        (["--decode", "margin", "--slack_grid", "1"], "no --decode uses a slack"),
        (["--decode", "sinkhorn", "--factor_grid", "0"], "--factor_grid: cannot be 0"),
        (["--prior_grid", "1"], "--prior_grid: needs --rerank"),
        (["--depth_grid", "5"], "--depth_grid: needs --rerank"),
        (["--rerank", "a", "b"], "expected one reranker, found 2"),
        (["--rerank", "vlm.pt"], "expected NAME=FILE, found 'vlm.pt'"),
        (["--rerank", "v=vlm.pt", "--depth_grid", "0"], "must be at least 1, found 0"),
        (["--rerank", "v=vlm.pt", "--prior_grid", "-1"], "--prior_grid: cannot be -1"),
        (["--rerank", "v=vlm.pt", "--decode", "assignment"], "at most 5"),
        (["--decode", "sinkhorn", "--decode_grid", "1e30"], "cannot be 1e\\+30 for sinkhorn"),
        (["--method", "simplex", "--order", "greedy"], "--order"),
        (["--fusion", "reciprocal_rank"], "--fusion"),
        (["--chosen_on", "x"], "--chosen_on"),
    ],
)
def test_invalid_searches_are_refused(
    annotation: Path, tmp_path: Path, flags: list[str], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        searched(annotation, tmp_path, *flags)
    assert not (tmp_path / "weights.yaml").exists()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.filterwarnings("error")
def test_there_are_at_most_as_many_folds_as_queries(
    tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    annotation, ids = annotation_file(tmp_path), [f"{image}#0" for image in IMAGES[:count]]
    annotation.write_text("".join(annotation.read_text().splitlines(keepends=True)[:count]))
    one, two = (
        write(tmp_path / f"{seed}.pt", torch.rand(count, count), ids, IMAGES[:count])
        for seed in (1, 2)
    )
    search(["--beit3_score", one, "--uit_score", two, "--annotation", str(annotation)]
           + ["--out", str(tmp_path / "w.yaml"), "--trials", str(tmp_path / "t.csv")])  # fmt: skip
    said = capsys.readouterr()
    assert ("on the other folds (3)" in said.out) == (count == 3)
    assert ("--folds: 1 query: no cross-validation" in said.err) == (count == 1)


@pytest.mark.parametrize("method", [["--order", "greedy"], ["--method", "simplex"]])
def test_a_run_reproduces_the_figures_of_a_search_over_ranked_lists(
    annotation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: list[str]
) -> None:
    words = ["--annotation", str(annotation), "--query_order", str(tmp_path / "order.txt")]
    (tmp_path / "order.txt").write_text("".join(f"{image}#0\n" for image in IMAGES))
    for seed in range(12):  # many exact ties, which another order of summation breaks
        drawn, members = random.Random(seed), []
        for name in "abc":
            lists = [drawn.sample(IMAGES, 6) for _ in IMAGES]
            path = tmp_path / f"{name}.txt"
            path.write_text("".join(" ".join(line) + "\n" for line in lists))
            members += ["--member", f"{name}={path}"]
        search([*members, *words[:2], *method, "--grid_step", "0.1", "--folds", "0"]
               + ["--out", str(tmp_path / "w.yaml")]
               + ["--trials", str(tmp_path / "t.csv")])  # fmt: skip
        lines = capsys.readouterr().out.splitlines()
        figures = re.findall(r"R@1 (\d+\.\d+), mAP (\d+\.\d+)", "\n".join(lines))[-1]
        found = fused(tmp_path, "--config", str(tmp_path / "w.yaml"), *words)
        mean = evaluate(found, read_retrieval(annotation)).summary()
        assert figures == (f"{mean['R@1']:.2f}", f"{mean['mAP']:.2f}")
