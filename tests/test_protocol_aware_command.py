"""Reranking and decodings of `ensemble.run`: flags, configs and the ladder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ensemble.chain import ladder_table
from ensemble.run import RunConfig
from ensemble.run import main as run
from pab.core.config import load_config
from pab.core.errors import InputError
from pab.metrics import evaluate_scores
from pab.ranking import ranked_names, read_ranked_list
from pab.scores import ScoreFile, load_scores, save_scores
from tests.conftest import write_lines


@pytest.fixture
def given_files(tmp_path: Path) -> list[str]:
    """Return the flags for two members, a reranker and the labels of twelve queries."""
    generator = torch.Generator().manual_seed(3)
    queries, images = [f"i{n:02d}#0" for n in range(12)], [f"i{n:02d}" for n in range(12)]
    words = []
    for flag, name, strength in (("--beit3_score", "a", 0.4), ("--clip_score", "b", 0.3),
                                 ("--rerank", "r", 2.0)):  # fmt: skip
        scores = torch.eye(12) * strength + torch.rand(12, 12, generator=generator)
        path = tmp_path / f"{name}.pt"
        save_scores(path, ScoreFile(scores, queries, images))
        words += [flag, f"vlm={path}" if flag == "--rerank" else str(path)]
    annotation = tmp_path / "annotation/val.json"
    write_lines(
        annotation,
        [{"image": f"train/{n}.jpg", "image_id": i, "caption": [i]} for n, i in enumerate(images)],
    )
    return [*words, "--annotation", str(annotation)]


CHAIN = ["--decode", "margin", "--decode_tau", "0.1", "--decode", "assignment", "--decode_top", "2",
         "--decode_scope", "collisions", "--decode_slack", "0.5"]  # fmt: skip


def test_the_whole_chain_and_its_ladder(
    given_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, saved = tmp_path / "out.txt", tmp_path / "out.pt"
    files = ["--output_file", str(out), "--save_score", str(saved)]
    run([*given_files, *CHAIN, "--rerank_depth", "6", "--rerank_prior", "0.05", "--ladder", *files])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    head = next(n for n, line in enumerate(lines) if line.startswith("stage"))
    assert "R@1 over the previous stage" in lines[head]
    rungs = lines[head + 1 :]
    assert [line.split("  ")[0] for line in rungs] == [
        "fused", "reranked by vlm", "margin", "assignment",
    ]  # fmt: skip
    assert "first 6 reranked by vlm, decoded by margin, then assignment (joint" in said.err
    found = load_scores(saved)
    assert ranked_names(found.scores, found.gallery_ids) == read_ranked_list(out)
    relevant = {query: frozenset({query[:3]}) for query in found.query_ids}
    assert f"{evaluate_scores(found, relevant).mean()['R@1']:.2f}" in rungs[-1]
    assert found.meta["per_query"] is False
    assert [facts["method"] for facts in found.meta["decode"]] == ["margin", "assignment"]
    assert found.meta["decode"][1] == {
        "method": "assignment", "slack": 0.5, "top": 2, "scope": "collisions",
    }  # fmt: skip
    assert found.meta["rerank"]["depth"] == 6
    assert len(found.meta["rerank"]["sha256"]) == 64


def test_a_config_accepts_one_decoding_or_a_list(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    for text, expected in (
        ("sinkhorn", ("sinkhorn",)),
        ("[margin, sinkhorn]", ("margin", "sinkhorn")),
        ("none", ("none",)),
        ("[]", ()),
    ):
        recipe.write_text(f"decode: {text}\n")
        assert load_config(RunConfig, recipe, {}).decode == expected
    recipe.write_text("decode: sinkhron\n")
    with pytest.raises(InputError, match="sinkhron"):
        load_config(RunConfig, recipe, {})


def test_flags_switch_off_settings_of_a_config(
    given_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    rerank = given_files[given_files.index("--rerank") + 1]
    recipe.write_text(f"decode: assignment\ndecode_slack: 0.5\ndecode_top: 2\nrerank: {rerank}\n")
    words = [word for word in given_files if word not in ("--rerank", rerank)]
    run(["--config", str(recipe), *words, "--decode", "none", "--rerank"]
        + ["--output_file", str(tmp_path / "o.txt")])  # fmt: skip
    assert "lhp -> clip (weight 0.9) (per query)" in capsys.readouterr().err


def test_a_setting_of_a_config_without_its_decoding(
    given_files: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("decode: [margin, assignment]\ndecode_slack: 1\ndecode_top: 2\n")
    words = ["--config", str(recipe), *given_files, "--decode", "margin"]
    words += ["--output_file", str(tmp_path / "o.txt")]
    assert "if a config sets it, pass --decode_slack none" in refused(run, words)
    run([*words, "--decode_slack", "none", "--decode_top", "none"])


def test_the_rows_of_a_reranker_may_come_in_any_order(
    given_files: list[str], tmp_path: Path
) -> None:
    path = Path(given_files[given_files.index("--rerank") + 1].partition("=")[2])
    words = [*given_files, "--rerank_depth", "6", "--output_file"]
    run([*words, str(tmp_path / "one.txt")])
    file = load_scores(path, mmap=False)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    mixed = ScoreFile(file.scores[order], [file.query_ids[n] for n in order], file.gallery_ids)
    save_scores(path, mixed)
    run([*words, str(tmp_path / "two.txt")])
    assert (tmp_path / "one.txt").read_text() == (tmp_path / "two.txt").read_text()
    run([*[w for w in given_files if "vlm=" not in w and w != "--rerank"], "--output_file",
         str(tmp_path / "three.txt")])  # fmt: skip
    assert (tmp_path / "one.txt").read_text() != (tmp_path / "three.txt").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rerank", "x={r}"], "--rerank: expected one reranker, found 2"),
        (["--rerank_depth", "0"], "--rerank_depth: expected a number greater than or equal to 1"),
        (["--rerank_prior", "-0.1"], "--rerank_prior: expected a number greater"),
        (["--rerank_prior", "1e30"], "--rerank_prior: expected a number less"),
        (["--decode", "assignment"], "--decode_top: an assignment after --rerank"),
        (["--decode", "assignment", "--decode_slack", "1", "--decode_top", "21"], "at most 20"),
        (["--decode", "assignment", "--decode_top", "2"], "--decode_top: needs --decode_slack"),
        (["--decode", "margin", "--decode_top", "2"], "--decode_top: cannot be used with"),
        (["--decode", "margin", "--decode_scope", "collisions"], "--decode_scope: cannot be used"),
        (["--decode", "assignment", "--decode_slack", "1", "--decode_scope", "collisions"],
         "--decode_scope: collisions needs --decode_top"),
        (["--decode", "margin", "none"], "--decode: none cannot be combined with margin"),
        (["--decode", "margin", "--decode_tau", "-1"], "--decode_tau: expected a number"),
        (["--decode", "sinkhorn", "--decode_factor", "1e30"], "--decode_factor: expected a number"),
        (["--decode", "assignment", "--decode_slack", "1e30"], "--decode_slack: expected a number"),
        (["--decode", "sinkhorn", "dual_softmax"], "dual_softmax cannot follow sinkhorn"),
        (["--fusion", "reciprocal_rank", "--rank_k", "9" * 30], "--rank_k: expected a number"),
        (["--clip_weight", "nan"], "--clip_weight"),
        (["--member", "x={r}:nan"], "weight of x: must lie in [0, 1], found nan"),
        (["--member", "x={r}:inf"], "weight of x: must lie in [0, 1], found inf"),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused(
    given_files: list[str],
    tmp_path: Path,
    words: list[str],
    expected: str,
    refused: Callable[..., str],
) -> None:
    reranker = given_files[given_files.index("--rerank") + 1].partition("=")[2]
    out = tmp_path / "out.txt"
    flags = [word.format(r=reranker) for word in words]
    assert expected in refused(run, [*given_files, *flags, "--output_file", str(out)])
    assert not out.exists()


def test_invalid_rerankers_are_refused(
    given_files: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    place = given_files.index("--rerank") + 1
    out = ["--output_file", str(tmp_path / "out.txt")]
    run([*given_files, "--output_file", str(tmp_path / "list.txt")])
    given_files[place] = f"vlm={tmp_path / 'list.txt'}"
    with pytest.raises(InputError, match="expected a reranker's scores, found a ranked list"):
        run(given_files + out)
    given_files[place] = "vlm.pt"
    assert "--rerank: expected NAME=FILE, found 'vlm.pt'" in refused(run, given_files + out)
    other = ScoreFile(torch.rand(12, 11), [f"i{n:02d}#0" for n in range(12)],
                      [f"i{n:02d}" for n in range(11)])  # fmt: skip
    save_scores(tmp_path / "other.pt", other)
    given_files[place] = f"vlm={tmp_path / 'other.pt'}"
    assert "'i11'" in refused(run, given_files + out)
    assert not (tmp_path / "out.txt").exists()


def test_a_ladder_needs_labels(
    given_files: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = ["--ladder", "--output_file", str(tmp_path / "out.txt")]
    assert "--ladder: expected labels" in refused(run, given_files[:4] + out)
    queries = [{"query_index": f"i{n:02d}#0", "caption": "x"} for n in range(12)]
    write_lines(tmp_path / "query.json", queries)
    words = [*given_files[:4], "--annotation", str(tmp_path / "query.json"), *out]
    assert "--ladder: expected labels, found none" in refused(run, words)
    key = {f"i{n:02d}#0": {"gallery": f"i{n:02d}", "normal": "walking"} for n in range(12)}
    (tmp_path / "answers.json").write_text(json.dumps(key))
    run([*words, "--answers", str(tmp_path / "answers.json")])


def test_the_ladder_shows_what_every_stage_adds() -> None:
    relevant = {f"q{n}": frozenset({f"g{n}"}) for n in range(4)}
    ids = [f"q{n}" for n in range(4)], [f"g{n}" for n in range(4)]
    wrong = torch.eye(4)
    wrong[0, 1] = 2.0
    rungs = [
        (name, evaluate_scores(ScoreFile(scores, *ids), relevant))
        for name, scores in (("fused", wrong), ("margin", torch.eye(4)))
    ]
    head, first, second = ladder_table(rungs).splitlines()
    assert head.split() == ["stage", "R@1", "mAP@10", "R@1", "over", "the", "previous", "stage"]
    assert first.split() == ["fused", "75.00", "87.50", "-"]
    assert second.split()[:4] == ["margin", "100.00", "100.00", "+25.00"]
    assert second.split()[4:] == ["[+0.00,", "+75.00]"]
