"""A small reranker and its inputs, for tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pab.data.annotations import read_retrieval
from pab.data.images import list_gallery
from pab.scores import ScoreFile, save_scores
from tests.vlm import small_vlm

CAPTIONS = ["A man falls off a bicycle.", "A woman", "http://a.org/b.jpg", "a red coat, in rain"]
WEIGHTS = "model.safetensors"


def make_reranker(out: Path) -> Path:
    """Make a reranker of 0.3 million parameters whose scores differ between pairs."""
    shutil.copytree(small_vlm("reranker"), out)
    weights = load_file(out / WEIGHTS)  # with the small initial weights, scores are nearly equal
    large = {
        name: 4 * tensor if tensor.ndim == 2 and "embed_tokens" not in name else tensor
        for name, tensor in weights.items()
    }
    save_file(large, out / WEIGHTS, metadata={"format": "pt"})
    return out


def make_candidates(data: Path, out: Path) -> Path:
    """Write random scores of the tiny test set."""
    masked = data / "name-masked_test-set"
    queries = [query.query_id for query in read_retrieval(masked / "query.json").queries]
    images = [image.gallery_id for image in list_gallery(masked / "gallery")]
    draw = torch.Generator().manual_seed(7)
    save_scores(
        out, ScoreFile(torch.rand(len(queries), len(images), generator=draw), queries, images)
    )
    return out


def rerank_words(model: Path, data: Path, candidates: Path, /, **settings: Any) -> list[str]:
    """Return the arguments of a command that re-ranks the tiny test set."""
    masked = data / "name-masked_test-set"
    given = {
        "model": model, "candidates": candidates, "image_folder": masked / "gallery",
        "annotation": masked / "query.json", "k_test": 4, "batch_size": 3, "num_workers": 0,
        "device": "cpu", "backend": "transformers", "output_file": "none", **settings,
    }  # fmt: skip
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]
