"""Train, score and evaluate mini models; shared by the benchmarks on the mini data.

Finished runs stay in the work folder, in a folder named by recipe and data, so many runs can be
split over several sessions.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lhp.infer import main as lhp_infer
from pab.core.files import sha256_of_lines, write_text
from pab.data.annotations import read_retrieval
from pab.data.records import Retrieval
from pab.data.splits import write_split
from pab.evaluate import Evaluation, evaluate
from pab.metrics import paired_bootstrap
from pab.scores import load_scores
from pab.training.config import TrainingConfig
from pab.training.data import open_training_data
from pab.training.loop import BEST, FINAL
from uit.infer import main as uit_infer
from uit.run import main as uit_train

DATA = Path("data/mini")
UIT_RECIPE = Path("configs/uit/mini.yaml")
PARTS = ("images", "annotations")
METRICS = ("R@1", "R@5", "R@10", "mAP", "over twin")


@dataclass(frozen=True)
class LabelledSet:
    """Labelled queries: a name for files, the annotation and the root of its image paths.

    For a name-masked set, the root is the gallery, and ``answers`` is the key.
    """

    name: str
    annotation: Path
    root: Path = DATA
    answers: Path | None = None

    def retrieval(self) -> Retrieval:
        """Read queries, labels and gallery."""
        return read_retrieval(self.annotation, image_folder=self.root, answers=self.answers)

    def flags(self) -> list[str]:
        """Flags of scoring commands whose config names another set."""
        return [
            *("--annotation", str(self.annotation), "--image_folder", str(self.root)),
            *("--answers", "none"),
        ]


TEST = LabelledSet("test", DATA / "annotation/test/attr.json")  # has twin labels


def validation_set(folder: Path, pairs: int = 500) -> LabelledSet:
    """Validation pairs of every mini recipe (its `val_pairs` and seed)."""
    data = open_training_data(TrainingConfig(data_path=str(DATA), val_pairs=pairs))
    folder.mkdir(parents=True, exist_ok=True)
    write_split(folder, *data)
    return LabelledSet("val", folder / "val_pairs.json")


def keyed_folder(work: Path, *texts: str) -> Path:
    """Folder for the runs of these recipes on these data."""
    splits = json.loads((DATA / "manifest.json").read_text())["splits"]
    made = [splits[name][f"{part}_sha256"] for name in ("train", "test") for part in PARTS]
    return work / sha256_of_lines([*texts, *made])[:12]


def train_uit(out: Path, *flags: str) -> Path:
    """Run the mini recipe with more flags; return the best validated weights, or the last ones."""
    if not (out / FINAL).is_file():
        uit_train(["--config", str(UIT_RECIPE), "--output_dir", str(out), *flags])
    return out / (BEST if (out / BEST).is_file() else FINAL)


def score_lhp(labelled: LabelledSet, out: Path) -> Path:
    """Score with the shipped LHP; return the score file."""
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
    """Score with a UIT: re-ranked candidates, and ITC if it chose the candidates itself."""
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
    """Per-query metrics of a score file."""
    return evaluate(load_scores(score), labelled.retrieval(), where=score)


def run_script(name: str, *flags: str) -> None:
    """Run a script of this project as users do."""
    subprocess.run([sys.executable, f"scripts/{name}.py", *flags], check=True)


def score_encoder(kind: str, labelled: LabelledSet, out: Path, *flags: str) -> Path:
    """Score with the mini CLIP (``clip``) or BLIP-2 (``blip2``), by default the shipped one."""
    path = out / f"{labelled.name}_{kind}.pt"
    if not path.is_file():
        outputs = ("--save_score", str(path), "--output_file", str(path.with_suffix(".txt")))
        config = ("--config", f"configs/{kind}/mini_infer.yaml")
        run_script(f"{kind}_infer", *config, *labelled.flags(), *outputs, *flags)
    return path


def table_row(name: str, found: Evaluation, before: Evaluation | None) -> str:
    """Table row: metrics with their intervals, and the paired gain in R@1."""
    figures, bounds = found.summary(), found.intervals()
    cells = [f"{figures[m]:.2f} ({bounds[m][0]:.1f} to {bounds[m][1]:.1f})" for m in METRICS]
    gain = "-"
    if before is not None:
        ours = paired_bootstrap(before.metrics.values["R@1"], found.metrics.values["R@1"])
        gain = f"{ours.mean:+.2f} ({ours.low:+.2f} to {ours.high:+.2f})"
    line = f"| {name} | {' | '.join(cells)} | {gain} |"
    print(line, flush=True)
    return line


def write_table(
    path: Path, title: str, text: list[str], columns: list[str], rows: list[str]
) -> None:
    """Write a page with one table."""
    head = f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"
    write_text(path, "\n".join([f"# {title}", "", *text, "", *head, *rows]) + "\n")
