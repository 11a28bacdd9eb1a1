"""A small score matrix with ids, and helpers that write and read score files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pab.scores import ScoreFile, load_scores

SCORES = torch.tensor([[0.5, 0.25, 1.0], [2.0, -1.0, 0.0]])
IDS: dict[str, Any] = {"query_ids": ["q1", "q2"], "gallery_ids": ["a", "b", "c"]}
NAN, INF = float("nan"), float("inf")


def saved(folder: Path, content: Any, name: str = "s.pt") -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        torch.save(content, path)
    return path


def read(path: Path) -> ScoreFile:
    return load_scores(path, **IDS)
