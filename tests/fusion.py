"""Small score files, their annotation, and a fusion command for the tests of the ensemble."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ensemble.run import main as run
from pab.scores import ScoreFile, load_scores, save_scores
from tests.conftest import write_lines

QUERIES, IMAGES = [f"i{n}#0" for n in range(12)], [f"i{n:02d}" for n in range(12)]


def write(path: Path, scores: Tensor, queries: list[str], gallery: list[str]) -> str:
    """Write a score file with its columns sorted by gallery id; return the path."""
    columns = sorted(range(len(gallery)), key=gallery.__getitem__)
    ordered = scores[:, columns].float().contiguous()
    save_scores(path, ScoreFile(ordered, queries, [gallery[c] for c in columns], {}))
    return str(path)


def score_files(tmp_path: Path) -> dict[str, str]:
    generator = torch.Generator().manual_seed(0)
    right = torch.eye(12)
    return {
        name: write(
            tmp_path / f"{name}.pt", right * strength + torch.rand(12, 12, generator=generator),
            QUERIES, IMAGES,
        )
        for name, strength in (("a", 0.3), ("b", 0.5), ("c", 0.2))
    }  # fmt: skip


def annotation_file(tmp_path: Path) -> Path:
    rows = [
        {"image": f"train/{n}.jpg", "image_id": IMAGES[n], "caption": [f"number {n}"]}
        for n in range(12)
    ]
    path = tmp_path / "annotation/val.json"
    write_lines(path, rows)
    return path


def labelled(tmp_path: Path) -> dict[str, str]:
    """Write score files whose query ids match ``annotation_file``; return name -> path."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: write(
            tmp_path / f"{name}.pt", torch.eye(12) * 0.6 + torch.rand(12, 12, generator=generator),
            [f"{image}#0" for image in IMAGES], IMAGES,
        )
        for name in ("a", "b", "c")
    }  # fmt: skip


def fused(tmp_path: Path, *flags: str, name: str = "fused") -> ScoreFile:
    """Run `ensemble.run` with these flags, and read the scores that it writes."""
    out = tmp_path / f"{name}.pt"
    run([*flags, "--save_score", str(out), "--output_file", str(tmp_path / f"{name}.txt")])
    return load_scores(out)
