"""What the benchmarks of mini models share: training, scoring and judging on the mini data.

Runs that are done stay in the work folder, in a folder named by the recipe and the data, so that
many of them may be spread over several sittings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lhp.infer import main as lhp_infer
from pab.annotations import Retrieval, read_retrieval
from pab.evaluate import Evaluation, evaluate
from pab.files import sha256_of_lines
from pab.scores import load_scores
from uit.infer import main as uit_infer
from uit.run import main as uit_train

DATA = Path("data/mini")
UIT_RECIPE = Path("configs/uit/mini.yaml")
PARTS = ("images", "annotations")
BEST, FINAL = "checkpoint-best.pth", "checkpoint-final.pth"


@dataclass(frozen=True)
class LabelledSet:
    """Queries with labels: a name for files, the annotation and the root of its image paths."""

    name: str
    annotation: Path
    root: Path = DATA

    def retrieval(self) -> Retrieval:
        """Queries, labels, gallery."""
        return read_retrieval(self.annotation, image_folder=self.root)

    def flags(self) -> list[str]:
        """For scoring commands whose config names another set."""
        return [
            *("--annotation", str(self.annotation), "--image_folder", str(self.root)),
            *("--answers", "none"),
        ]


TEST = LabelledSet("test", DATA / "annotation/test/attr.json")  # says which are twins


def keyed_folder(work: Path, *texts: str) -> Path:
    """Where the runs of these recipes on these data are kept."""
    splits = json.loads((DATA / "manifest.json").read_text())["splits"]
    made = [splits[name][f"{part}_sha256"] for name in ("train", "test") for part in PARTS]
    return work / sha256_of_lines([*texts, *made])[:12]


def train_uit(out: Path, *flags: str) -> Path:
    """The mini recipe with further flags; the best validated weights, or the last ones."""
    if not (out / FINAL).is_file():
        uit_train(["--config", str(UIT_RECIPE), "--output_dir", str(out), *flags])
    return out / (BEST if (out / BEST).is_file() else FINAL)


def score_lhp(labelled: LabelledSet, out: Path) -> Path:
    """Score file of the shipped LHP."""
    path = out / f"{labelled.name}_lhp.pt"
    if not path.is_file():
        lhp_infer(
            ["--config", "configs/lhp/mini_infer.yaml", *labelled.flags()]
            + ["--save_score", str(path), "--output_file", str(path.with_suffix(".txt"))]
        )
    return path


def score_uit(
    checkpoint: Path, labelled: LabelledSet, out: Path, candidates: Path | None
) -> tuple[Path, Path | None]:
    """Score files of a UIT: of the re-ranked candidates, and ITC's where it chose them itself."""
    kind = "itc" if candidates is None else "itm"
    path, itc = out / f"{labelled.name}_uit_over_{kind}.pt", out / f"{labelled.name}_uit_itc.pt"
    if not path.is_file():
        uit_infer(
            ["--config", "configs/uit/mini_infer.yaml", *labelled.flags()]
            + ["--checkpoint", str(checkpoint), "--candidates", str(candidates or "none")]
            + ["--save_score", str(path), "--output_file", str(path.with_suffix(".txt"))]
            + ([] if candidates else ["--save_itc", str(itc)])
        )
    return path, None if candidates else itc


def judged(score: Path, labelled: LabelledSet) -> Evaluation:
    """Metrics of a score file, a query at a time."""
    return evaluate(load_scores(score), labelled.retrieval(), where=score)
