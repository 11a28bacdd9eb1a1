"""Measure each member on the mini data: `python benchmarks/members.py --out docs/members.md`.

Scores the validation pairs and the mini test set with the four shipped models in the published
order. Chooses the fusion's weights on the validation pairs (`ensemble.search`), and fuses the test
set with them, one member at a time. Writes the table whatever the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from mini_runs import (
    METRICS,
    TEST,
    LabelledSet,
    judged,
    keyed_folder,
    score_encoder,
    score_lhp,
    score_uit,
    table_row,
    validation_set,
    write_table,
)

from ensemble.run import main as fuse
from ensemble.search import WEIGHT_FLAGS
from ensemble.search import main as search
from pab.core.files import sha256_of_file

SHIPPED = Path("checkpoints/mini")
FLAGS = {"lhp": "beit3", "uit": "uit", "blip2": "blip2", "clip": "clip"}  # member -> flag prefix
NAMES = {"lhp": "LHP", "uit": "UIT", "blip2": "BLIP-2", "clip": "CLIP"}


def members_of(labelled: LabelledSet, folder: Path) -> dict[str, Path]:
    """Score files of the four members, in the published order."""
    lhp = score_lhp(labelled, folder)
    uit, _ = score_uit(SHIPPED / "uit.safetensors", labelled, folder, lhp)
    others = {kind: score_encoder(kind, labelled, folder) for kind in ("blip2", "clip")}
    return {"lhp": lhp, "uit": uit, **others}


def given(members: dict[str, Path]) -> list[str]:
    """Members as flags of the ensemble's commands."""
    return [
        word for name, path in members.items() for word in (f"--{FLAGS[name]}_score", str(path))
    ]


def main() -> None:
    """Read the command line, score, search, fuse, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--work", type=Path, default=Path("output/members"))
    parser.add_argument("--weights", type=Path, help="also write the chosen weights here (.yaml)")
    args = parser.parse_args()
    files = sorted(SHIPPED.rglob("*.safetensors"))
    folder = keyed_folder(args.work, *(sha256_of_file(file) for file in files))
    validation = validation_set(folder)
    weights = args.weights or folder / "weights.yaml"
    search(
        ["--annotation", str(validation.annotation), "--image_folder", str(validation.root)]
        + given(members_of(validation, folder))
        + ["--trials", str(folder / "trials.csv"), "--out", str(weights)]
    )
    chosen = yaml.safe_load(weights.read_text())

    members = members_of(TEST, folder)
    alone = {name: judged(path, TEST) for name, path in members.items()}
    rows = [table_row(f"{NAMES[name]} alone", found, None) for name, found in alone.items()]
    order, before = list(members), alone["lhp"]
    for count in range(2, len(order) + 1):
        name, out = order[count - 1], folder / f"fused_{count}.pt"
        keep = chosen[WEIGHT_FLAGS[name]]
        left_out = [word for n in order[count:] for word in (f"--{FLAGS[n]}_score", "none")]
        fuse(
            ["--config", str(weights), *given({n: members[n] for n in order[:count]}), *left_out]
            + ["--save_score", str(out), "--output_file", str(out.with_suffix(".txt"))]
        )
        found = judged(out, TEST)
        rows.append(table_row(f"+ {NAMES[name]}, weight {keep:g}", found, before))
        before = found
    text = [
        f"Written by `python benchmarks/members.py --out {args.out}`: the four shipped mini models",
        "alone, then fused one after the other in the published order. UIT re-ranks LHP's 32",
        "candidates. A weight is the one kept by the running sum; weights are chosen on the 501",
        "validation pairs. Figures are percent on the 2,000 queries of the mini test set, with",
        "95 % bootstrap intervals. Gains over the previous step are paired.",
    ]
    columns = ["what", *METRICS, "R@1 over the previous step"]
    write_table(args.out, "Members and fusion steps on the mini data", text, columns, rows)


if __name__ == "__main__":
    main()
