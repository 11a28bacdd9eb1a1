"""Every stage of Protocol-Aware Assignment, against the output of its original code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ensemble.chain import stages
from ensemble.config import FusionConfig
from ensemble.fuse import aligned
from ensemble.members import check_members, load_members
from ensemble.rerank_prior import Reranking
from ensemble.run import RunConfig
from ensemble.run import main as run
from pab.core.config import load_config
from pab.ranking import ranked_names, read_ranked_list
from pab.scores import ScoreFile, load_scores, save_scores
from tests.conftest import GOLDEN, needs_golden

LADDER = GOLDEN / "ladder"
RECIPE = Path(__file__).parents[2] / "configs/ensemble/protocol_aware.yaml"
DEPTH = 20
MEMBERS = {"beit3": "lhp", "blip2": "blip2", "clip": "clip"}

pytestmark = needs_golden


def lists(name: str) -> dict[str, list[str]]:
    """Read a list: query id -> image names without extension, best first."""
    with (LADDER / f"{name}.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return {
        record["query_index"]: [image.removesuffix(".jpg") for image in record["topk_gallery"]]
        for record in records
    }


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write the members as ranked lists and the reranker as a score file; return the flags."""
    folder = tmp_path_factory.mktemp("ladder")
    flags = ["--query_order", str(LADDER / "query_index.txt")]
    gallery: set[str] = set()
    for member, name in MEMBERS.items():
        ranked = lists(name)
        gallery.update(image for line in ranked.values() for image in line)
        path = folder / f"{name}.txt"
        path.write_text("".join(" ".join(line) + "\n" for line in ranked.values()))
        flags += [f"--{member}_score", str(path)]
    images = sorted(gallery)
    column = {image: number for number, image in enumerate(images)}
    with (LADDER / "reranker_scores.json").open(encoding="utf-8") as handle:
        records = json.load(handle)
    rows = []
    for record in records:
        found = {column[one["image"].removesuffix(".jpg")]: one["score"]
                 for one in record["reranked"]}  # fmt: skip
        values = torch.tensor(list(found.values()))
        row = torch.nextafter(values.min(), torch.tensor(-torch.inf)).repeat(len(images))
        row[list(found)] = values
        rows.append(row)
    ids = [record["query_index"] for record in records]
    counts = {record["query_index"]: len(record["reranked"]) for record in records}
    save_scores(folder / "rerank.pt", ScoreFile(torch.stack(rows), ids, images, {"listed": counts}))
    return [*flags, "--rerank", f"vlm={folder / 'rerank.pt'}"]


def test_the_recipe_has_the_published_constants() -> None:
    config = load_config(RunConfig, RECIPE, {})
    config.check()
    assert (config.fusion, config.rank_k) == ("reciprocal_rank", 60)
    assert (config.rerank_depth, config.rerank_prior) == (DEPTH, 0.5)
    assert config.decode == ("margin", "assignment")
    assert (config.decode_tau, config.decode_top, config.decode_slack) == (0.5, 2, 1.0)
    assert config.decode_scope == "collisions"


def test_every_stage_in_the_library(words: list[str]) -> None:
    by_flag = dict(zip(words[::2], words[1::2], strict=True))
    config = load_config(
        RunConfig, RECIPE, {f"{m}_score": by_flag[f"--{m}_score"] for m in MEMBERS}
    )
    members = FusionConfig.members(config)
    check_members(members, config.fusion)
    reranker = load_scores(by_flag["--rerank"].partition("=")[2])
    files = load_members(members, list(lists("lhp")), reranker.gallery_ids)
    fusion = aligned(members, files, rule="reciprocal_rank", rank_k=60)
    counts = torch.tensor([reranker.meta["listed"][query] for query in fusion.query_ids])
    reranking = Reranking("vlm", "", reranker.scores, counts, DEPTH, 0.5)
    made = stages(
        fusion.matrix(), fusion.query_ids, fusion.gallery_ids, reranking, config.decodings()
    )
    for stage, name in zip(made, ("pool", "blend", "sca", "final"), strict=True):
        found = ranked_names(stage.scores, fusion.gallery_ids, DEPTH)
        expected = lists(name)
        wrong = [q for q, line in zip(fusion.query_ids, found, strict=True) if line != expected[q]]
        assert not wrong, f"{name}: {len(wrong)} of {len(found)} queries differ"


MARGIN_ALONE = ["--decode", "margin", "--decode_scope", "all", "--decode_top", "none"]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("pool", ["--decode", "none"]),
        ("blend", ["--decode", "none"]),
        ("sca", [*MARGIN_ALONE, "--decode_slack", "none"]),
        ("final", []),
    ],
)
def test_every_stage_of_the_command(
    words: list[str], tmp_path: Path, stage: str, flags: list[str], turned: bool
) -> None:
    given = [*words[:-2], "--rerank"] if stage == "pool" else words  # no value: no reranker
    if turned:  # the members in another order
        swapped = {"--beit3_score": "--clip_score", "--clip_score": "--beit3_score"}
        given = [swapped.get(word, word) for word in given]
    out, saved = tmp_path / "answer.txt", tmp_path / "answer.pt"
    run(["--config", str(RECIPE), *given, *flags, "--top_k", str(DEPTH)]
        + ["--output_file", str(out), "--save_score", str(saved)])  # fmt: skip
    expected = lists(stage)
    assert read_ranked_list(out) == list(expected.values())
    matrix = load_scores(saved)
    assert ranked_names(matrix.scores, matrix.gallery_ids, DEPTH) == [
        expected[query] for query in matrix.query_ids
    ]
