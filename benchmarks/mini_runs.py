"""Train, score, fuse and evaluate mini models; shared by the benchmarks on the mini data.

Finished runs stay in a subfolder of the work folder, so that an interrupted benchmark can continue.
The subfolder's name is a hash of the data and of the recipe or the shipped weights.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ensemble.run import main as fuse
from ensemble.search import SCORE_FLAGS
from ensemble.search import main as search
from lhp.infer import main as lhp_infer
from pab.core.files import sha256_of_file, sha256_of_lines, write_text
from pab.data.annotations import read_retrieval
from pab.data.records import Retrieval
from pab.data.splits import write_split
from pab.evaluate import Evaluation, evaluate
from pab.metrics import Metrics, paired_bootstrap
from pab.scores import load_scores
from pab.training.config import TrainingConfig
from pab.training.data import open_training_data
from pab.training.loop import BEST, FINAL
from uit.infer import main as uit_infer
from uit.run import main as uit_train

DATA = Path("data/mini")
SHIPPED = Path("checkpoints/mini")
UIT_RECIPE = Path("configs/uit/mini.yaml")
PARTS = ("images", "annotations")
METRICS = ("R@1", "R@5", "R@10", "mAP", "over twin")


@dataclass(frozen=True)
class LabelledSet:
    """Labelled queries: a name for files, the annotation, and the root of the image paths.

    For a name-masked set, the root is the gallery folder, and ``answers`` is the answer key.
    """

    name: str
    annotation: Path
    root: Path = DATA
    answers: Path | None = None

    def retrieval(self) -> Retrieval:
        """Read queries, labels and gallery."""
        return read_retrieval(self.annotation, image_folder=self.root, answers=self.answers)

    def flags(self) -> list[str]:
        """Return the flags that select the set, without its answer key."""
        return ["--annotation", str(self.annotation), "--image_folder", str(self.root)]


PAGE = (Path, "Markdown file to write")  # --out of the benchmarks that write a page
TEST = LabelledSet("test", DATA / "annotation/test/attr.json")  # has twin labels


def validation_set(folder: Path, pairs: int = 500) -> LabelledSet:
    """Create the set of the mini recipes' validation pairs (same `val_pairs` and `val_seed`)."""
    data = open_training_data(TrainingConfig(data_path=str(DATA), val_pairs=pairs))
    folder.mkdir(parents=True, exist_ok=True)
    write_split(folder, *data)
    return LabelledSet("val", folder / "val_pairs.json")


def keyed_folder(work: Path, *texts: str) -> Path:
    """Return the folder for runs with the mini data and these texts, such as a recipe."""
    splits = json.loads((DATA / "manifest.json").read_text())["splits"]
    made = [splits[name][f"{part}_sha256"] for name in ("train", "test") for part in PARTS]
    return work / sha256_of_lines([*texts, *made])[:12]


def shipped_folder(work: Path) -> Path:
    """Return the folder for scores of the shipped models."""
    return keyed_folder(work, *map(sha256_of_file, sorted(SHIPPED.rglob("*.safetensors"))))


def train_uit(out: Path, *flags: str) -> Path:
    """Train UIT with the mini recipe, unless the run is finished; return the file of its weights.

    The file has the best weights or, without validation, the last ones.
    """
    if not (out / FINAL).is_file():
        uit_train(["--config", str(UIT_RECIPE), "--output_dir", str(out), *flags])
    return out / (BEST if (out / BEST).is_file() else FINAL)


def run_script(name: str, flags: Sequence[str]) -> None:
    """Run a script of this project as users do."""
    subprocess.run([sys.executable, f"scripts/{name}.py", *flags], check=True)


def scored(
    infer: Callable[[list[str]], None], kind: str, labelled: LabelledSet, path: Path, *flags: str
) -> Path:
    """Return ``path``; if it is missing, write it with a mini model, by default the shipped one."""
    if not path.is_file():
        infer(
            ["--config", f"configs/{kind}/mini_infer.yaml", *labelled.flags(), "--answers", "none"]
            + ["--save_score", str(path), "--output_file", str(path.with_suffix(".txt")), *flags]
        )
    return path


def score_lhp(labelled: LabelledSet, out: Path, *flags: str) -> Path:
    """Score a set with LHP; return the score file."""
    return scored(lhp_infer, "lhp", labelled, out / f"{labelled.name}_lhp.pt", *flags)


def score_encoder(kind: str, labelled: LabelledSet, out: Path, *flags: str) -> Path:
    """Score a set with CLIP (``clip``) or BLIP-2 (``blip2``); return the score file."""
    infer = partial(run_script, f"{kind}_infer")
    return scored(infer, kind, labelled, out / f"{labelled.name}_{kind}.pt", *flags)


def score_uit(checkpoint: Path, labelled: LabelledSet, out: Path, candidates: Path) -> Path:
    """Score the candidates of another score file with UIT; return the score file."""
    chosen = ("--checkpoint", str(checkpoint), "--candidates", str(candidates))
    return scored(uit_infer, "uit", labelled, out / f"{labelled.name}_uit_over_itm.pt", *chosen)


def score_itc(checkpoint: Path, labelled: LabelledSet, out: Path) -> Path:
    """Score a set with UIT and its own candidates; return the file of its ITC scores."""
    itc = out / f"{labelled.name}_uit_itc.pt"
    own = ("--checkpoint", str(checkpoint), "--candidates", "none", "--save_itc", str(itc))
    scored(uit_infer, "uit", labelled, out / f"{labelled.name}_uit_over_itc.pt", *own)
    return itc


def score_shipped(labelled: LabelledSet, out: Path) -> dict[str, Path]:
    """Score a set with the four shipped models; return the score files in the published order."""
    lhp = score_lhp(labelled, out)
    uit = score_uit(SHIPPED / "uit.safetensors", labelled, out, lhp)
    others = {kind: score_encoder(kind, labelled, out) for kind in ("blip2", "clip")}
    return {"lhp": lhp, "uit": uit, **others}


def given(members: Mapping[str, Path | str]) -> list[str]:
    """Return the flags of the ensemble's commands for these members."""
    return [
        word for name, path in members.items() for word in (f"--{SCORE_FLAGS[name]}", str(path))
    ]


def choose_weights(
    labelled: LabelledSet, members: dict[str, Path], out: Path, weights: Path | None = None
) -> Path:
    """Choose the fusion's weights on a set (`ensemble.search`); return the weights file."""
    weights = weights or out / "weights.yaml"
    files = ("--trials", str(out / "trials.csv"), "--out", str(weights))
    search([*labelled.flags(), *given(members), *files])
    return weights


def fused(weights: Path, members: dict[str, Path], out: Path) -> Path:
    """Fuse exactly these members with chosen weights; return the score file."""
    words = given({**dict.fromkeys(SCORE_FLAGS, "none"), **members})
    outputs = ("--save_score", str(out), "--output_file", str(out.with_suffix(".txt")))
    fuse(["--config", str(weights), *words, *outputs])
    return out


def judged(score: Path) -> Evaluation:
    """Evaluate a score file of the mini test set."""
    return evaluate(load_scores(score), TEST.retrieval(), where=score)


def printed_row(*cells: str) -> str:
    """Format and print a table row."""
    line = f"| {' | '.join(cells)} |"
    print(line, flush=True)
    return line


def table_row(name: str, found: Evaluation, before: Evaluation | None) -> str:
    """Format and print a table row: metrics with intervals, and the paired gain in R@1."""
    figures, bounds = found.summary(), found.intervals()
    cells = [f"{figures[m]:.2f} ({bounds[m][0]:.1f} to {bounds[m][1]:.1f})" for m in METRICS]
    over = "-" if before is None else gain(before.metrics, found.metrics)
    return printed_row(name, *cells, over)


def gain(before: Metrics, found: Metrics) -> str:
    """Format the paired gain in R@1 with its interval."""
    over = paired_bootstrap(before.values["R@1"], found.values["R@1"])
    return f"{over.mean:+.2f} ({over.low:+.2f} to {over.high:+.2f})"


def seeds_row(
    name: str, runs: list[dict[str, float]], spread: Callable[[Sequence[float]], str]
) -> str:
    """Format and print a table row: mean and spread of each metric over the runs."""
    columns = zip(*(run.values() for run in runs), strict=True)
    return printed_row(name, *(f"{statistics.mean(v):.2f} ({spread(v)})" for v in columns))


def write_table(
    path: Path, title: str, text: list[str], columns: list[str], rows: list[str]
) -> None:
    """Write a page with one table."""
    head = f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"
    write_text(path, "\n".join([f"# {title}", "", *text, "", *head, *rows]) + "\n")
