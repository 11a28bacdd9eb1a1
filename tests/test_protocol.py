"""Protocols: the settings that they fix, and the answers that they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ensemble import protocol
from ensemble.members import known_gallery
from ensemble.run import main as run
from pab.data.annotations import read_retrieval
from pab.ranking import read_ranked_list
from pab.scores import ScoreFile, load_scores, save_scores


def scores_for(root: Path, out: Path, name: str) -> str:
    """Write a random score file for a protocol's queries and gallery; return its path."""
    files = protocol.load_protocol(name).files(str(root))
    retrieval = read_retrieval(files["annotation"], image_folder=files.get("image_folder"))
    queries = [query.query_id for query in retrieval.queries]
    gallery = sorted(known_gallery(retrieval, files.get("image_folder")) or [])
    scores = torch.rand(len(queries), len(gallery), generator=torch.Generator().manual_seed(0))
    save_scores(out, ScoreFile(scores, queries, gallery, {}))
    return str(out)


def test_there_are_four_protocols() -> None:
    assert protocol.names() == ["pab", "track4", "ucc", "www25"]
    for name in protocol.names():
        assert protocol.load_protocol(name).metrics


@pytest.mark.parametrize("name", ["pab", "www25", "track4"])
def test_a_protocol_fixes_files_order_and_metrics(
    tiny_data: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--beit3_score", scores_for(tiny_data, tmp_path / "s.pt", name), "--protocol", name]
    key = (
        [] if name == "pab" else ["--answers", str(tiny_data / "name-masked_test-set/answers.json")]
    )
    out = tmp_path / "answer.txt"
    run([*words, *key, "--data_root", str(tiny_data), "--output_file", str(out)])
    header = capsys.readouterr().out.splitlines()[0].split()
    metrics = list(protocol.load_protocol(name).metrics)
    assert [column for column in header if column not in ("queries", "n")] == sorted(
        metrics, key=header.index
    )
    protocol.main([name, str(out), "--data_root", str(tiny_data)])
    assert "as " + name in capsys.readouterr().out
    if name == "track4":  # lines follow query_index.txt, whose order is not the annotation's
        plain = tmp_path / "plain.txt"
        run([*words[:2], "--output_file", str(plain)])
        assert read_ranked_list(plain) != read_ranked_list(out)
        assert sorted(read_ranked_list(plain)) == sorted(read_ranked_list(out))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--protocol", "pba"], "expected one of pab, track4, ucc, www25, found 'pba'"),
        (["--protocol", "pab", "--annotation", "x.json"], "--annotation: is fixed by --protocol"),
        (["--protocol", "pab", "--top_k", "5"], "--top_k: is fixed"),
        (["--data_root", "x"], "--data_root: needs --protocol"),
        (["--protocol", "pab", "--data_root", "nowhere"], "nowhere"),
        (["--protocol", "www25", "--data_root", "{root}"], "expected exactly the ids"),
    ],
)
def test_contradictory_flags_are_refused(
    tiny_data: Path, tmp_path: Path, flags: list[str], expected: str, refused: Callable[..., str]
) -> None:
    words = ["--beit3_score", scores_for(tiny_data, tmp_path / "s.pt", "pab")]
    out = ["--output_file", str(tmp_path / "answer.txt")]
    assert expected in refused(run, words + out + [f.format(root=tiny_data) for f in flags])
    assert not (tmp_path / "answer.txt").exists()


def test_names_with_extensions_are_matched(tiny_data: Path, tmp_path: Path) -> None:
    plain = load_scores(scores_for(tiny_data, tmp_path / "s.pt", "www25"))
    names = [f"{name}.jpg" for name in plain.gallery_ids]
    save_scores(tmp_path / "n.pt", ScoreFile(plain.scores, plain.query_ids, names))
    words = ["--protocol", "www25", "--data_root", str(tiny_data), "--output_file"]
    for name in "sn":
        run(["--beit3_score", str(tmp_path / f"{name}.pt"), *words, str(tmp_path / f"{name}.txt")])
    assert (tmp_path / "n.txt").read_text() == (tmp_path / "s.txt").read_text()


def test_scores_of_a_part_of_the_gallery_are_refused(
    tiny_data: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    whole = load_scores(scores_for(tiny_data, tmp_path / "s.pt", "track4"))
    part = ScoreFile(whole.scores[:, 1:].contiguous(), whole.query_ids, whole.gallery_ids[1:])
    save_scores(tmp_path / "part.pt", part)
    out = tmp_path / "answer.txt"
    words = ["--beit3_score", str(tmp_path / "part.pt"), "--protocol", "track4"]
    words += ["--data_root", str(tiny_data), "--output_file", str(out)]
    assert "the protocol's gallery" in refused(run, words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda lines: lines[1:], "expected one line per query (10), found 9"),
        (lambda lines: [line[:9] for line in lines], "expected 10 names per line, found 9"),
        (lambda lines: [["nobody", *line[1:]] for line in lines], "'nobody' is not in the gallery"),
        (lambda lines: [[line[1], *line[1:]] for line in lines], "twice"),
    ],
)
def test_invalid_answers_are_refused(
    tiny_data: Path,
    tmp_path: Path,
    change: Callable[[list[list[str]]], list[list[str]]],
    expected: str,
    refused: Callable[..., str],
) -> None:
    out = tmp_path / "answer.txt"
    words = ["--beit3_score", scores_for(tiny_data, tmp_path / "s.pt", "track4")]
    run([*words, "--output_file", str(out)])
    lines = change(read_ranked_list(out))
    out.write_text("".join(" ".join(line) + "\n" for line in lines))
    argv = ["track4", str(out), "--data_root", str(tiny_data)]
    assert expected in refused(protocol.main, argv)
