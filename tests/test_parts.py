"""Parts of a score file: division of the queries, and `python -m pab.scores merge`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pab.core.errors import InputError
from pab.formats.parts import Part
from pab.scores import ScoreFile, load_scores, main, save_scores

IMAGES = ["a", "b", "c"]
QUERIES = [f"q{number}" for number in range(7)]
META = {"model": "m", "checkpoint_sha256": "12ab", "prompt": "rank", "k_test": 2}
SCORES = torch.rand(7, 3, generator=torch.Generator().manual_seed(0))


def part_file(number: int, count: int = 3, **meta: Any) -> ScoreFile:
    """Return a part of the scores of seven queries."""
    rows = Part(number, count).rows(7)
    facts = {**META, "part": f"{number}/{count}", "part_of": 7, **meta}
    ids = QUERIES[rows.start : rows.stop]
    return ScoreFile(SCORES[rows.start : rows.stop].clone(), ids, IMAGES, facts)


def written(folder: Path, *files: ScoreFile) -> list[str]:
    """Write files; return the arguments that merge them."""
    paths = [folder / f"{number}.pt" for number in range(len(files))]
    for path, file in zip(paths, files, strict=True):
        save_scores(path, file)
    return ["merge", *map(str, paths), "--out", str(folder / "out.pt")]


@pytest.mark.parametrize(("queries", "count"), [(7, 3), (3, 3), (1978, 8), (5, 1)])
def test_every_query_is_in_one_part(queries: int, count: int) -> None:
    parts = [Part(number, count).rows(queries) for number in range(1, count + 1)]
    assert [row for part in parts for row in part] == list(range(queries))
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", " 1/2"])
def test_invalid_part_numbers_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^--part: expected I/N"):
        Part.parse(text)


def test_parts_in_any_order_give_the_whole(tmp_path: Path) -> None:
    """Paths in the meta may differ between machines; those of part 1 are kept."""
    files = [part_file(n, candidates=f"/machine{n}/first.pt") for n in (2, 3, 1)]
    main(written(tmp_path, *files))
    found = load_scores(tmp_path / "out.pt")
    assert torch.equal(found.scores, SCORES)
    assert (found.query_ids, found.gallery_ids) == (QUERIES, IMAGES)
    assert found.meta == {**META, "candidates": "/machine1/first.pt"}


WRONG: dict[str, tuple[list[ScoreFile], str]] = {
    "missing": ([part_file(1), part_file(3)], "merge: expected 3 parts, found 2; missing: 2/3"),
    "double": (
        [part_file(1), part_file(2), part_file(2), part_file(3)], "is part 2/3, as is ",
    ),
    "other division": ([part_file(1, 2), part_file(2, 3)], "is part 2/3, but "),
    "no part": ([ScoreFile(SCORES, QUERIES, IMAGES, META)], "found no part in its meta"),
    "other model": (
        [part_file(1), part_file(2, checkpoint_sha256="34cd"), part_file(3)],
        "meta, 'checkpoint_sha256': expected '12ab' as in ",
    ),
    "other prompt": (
        [part_file(1), part_file(2), part_file(3, prompt="find")],
        "meta, 'prompt': expected 'rank'",
    ),
    "other gallery": (
        [part_file(1), replace(part_file(2), gallery_ids=["a", "b", "d"]), part_file(3)],
        "image 'c': expected the gallery of ",
    ),
    "query twice": (
        [part_file(1), replace(part_file(2), query_ids=["q0", "q3"]), part_file(3)],
        "expected 7 different queries in all parts, found query 'q0' twice",
    ),
    "query missing": (
        [part_file(1), replace(part_file(2), query_ids=["q2"], scores=SCORES[:1]), part_file(3)],
        "expected 7 different queries in all parts, found 6",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path, refused: Callable[..., str], name: str
) -> None:
    files, message = WRONG[name]
    assert message in refused(main, written(tmp_path, *files))
    assert not (tmp_path / "out.pt").exists()


def test_a_file_is_not_merged_twice(tmp_path: Path, refused: Callable[..., str]) -> None:
    merge, first, *rest = written(tmp_path, part_file(1, 2), part_file(2, 2))
    said = refused(main, [merge, first, first, *rest])
    assert f"{first}: expected every part once, found this file twice" in said
    assert not (tmp_path / "out.pt").exists()


def test_a_part_is_not_overwritten(tmp_path: Path, refused: Callable[..., str]) -> None:
    words = written(tmp_path, part_file(1, 1))
    assert "would be overwritten" in refused(main, [*words[:-1], words[1]])
