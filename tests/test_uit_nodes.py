"""UIT's gallery features on several nodes equal those that a single process computes.

Processes with different temporary folders stand for machines without a shared folder. torchrun's
node rank (``GROUP_RANK``) distinguishes machines that share a folder.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import pab.scoring.mapped_rows
from pab.core import processes
from pab.core.errors import InputError
from pab.data.records import GalleryImage
from pab.scoring.encoding import Compute
from pab.scoring.mapped_rows import map_rows, mapped_rows
from tests.conftest import draw
from tests.test_processes import run_in
from uit.encode import GalleryFeatures, encode_gallery
from uit.model import MODELS, Uit

CPU = torch.device("cpu")
IMAGES = 11


@pytest.fixture
def gallery(tmp_path: Path) -> list[GalleryImage]:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(IMAGES):
        draw(folder / f"{number}.jpg", number, normal=True)
    return [GalleryImage(str(n), folder / f"{n}.jpg") for n in range(IMAGES)]


def encoded(images: Sequence[GalleryImage], dtype: torch.dtype) -> GalleryFeatures:
    torch.manual_seed(0)
    model = Uit(MODELS["uit_debug"]).eval()
    compute = Compute(CPU, torch.float32, torch.float32, 3, 0)
    return encode_gallery(model, images, compute, cache_dtype=dtype)


def node_of(nodes: str, folder: Path) -> Path:
    """Give this process the temporary folder of its node; ``nodes`` has a letter per process."""
    own = folder / nodes[processes.rank()]
    own.mkdir(exist_ok=True)
    os.environ["TMPDIR"], tempfile.tempdir = str(own), None
    return own


def features_of_a_node(
    images: Sequence[GalleryImage], dtype: torch.dtype, nodes: str, folder: Path
) -> dict[str, Any]:
    own = node_of(nodes, folder)
    pab.scoring.mapped_rows.ROWS_A_BLOCK = 2  # several blocks per process
    found = encoded(images, dtype)
    processes.barrier()
    result = {
        "tokens": found.tokens.clone(),
        "vectors": found.vectors,
        "left": len(list(own.iterdir())),
    }
    processes.barrier()
    if processes.rank() == 0:
        found.tokens[0] = 99.0  # visible to the processes that share the file
    processes.barrier()
    return result | {"shared": bool((found.tokens[0] == 99.0).all())}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("nodes", "dtype", "count"),
    [
        ("aa", torch.float32, IMAGES),
        ("ab", torch.float32, IMAGES),
        ("aba", torch.bfloat16, IMAGES),
        ("abc", torch.float32, 2),  # a process without an image
    ],
)
def test_every_node_has_the_features_of_one_process(
    gallery: list[GalleryImage], tmp_path: Path, nodes: str, dtype: torch.dtype, count: int
) -> None:
    gallery = gallery[:count]
    alone = encoded(gallery, dtype)
    work = partial(features_of_a_node, gallery, dtype, nodes)
    results = run_in(len(nodes), work, tmp_path)
    for rank, found in enumerate(results):
        assert torch.equal(found["tokens"], results[0]["tokens"])
        torch.testing.assert_close(
            found["tokens"], alone.tokens, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2
        )
        torch.testing.assert_close(found["vectors"], alone.vectors, rtol=0, atol=1e-6)
        assert found["left"] == 0, "the file is not unlinked"
        assert found["shared"] == (nodes[rank] == nodes[0])


def rows_in_a_shared_folder(folder: Path) -> dict[str, Any]:
    os.environ["GROUP_RANK"] = str(processes.rank() // 2)
    rows = mapped_rows((4, 2), torch.float32, folder / "shared")
    return {"files": rows.files}


@pytest.mark.distributed
def test_nodes_that_share_a_folder_do_not_share_a_file(tmp_path: Path) -> None:
    """Mapped pages of a network folder are not coherent between machines."""
    for found in run_in(4, rows_in_a_shared_folder, tmp_path):
        assert found["files"] == [0, 0, 2, 2]
    assert list((tmp_path / "shared").iterdir()) == []


def error_of_all(folder: Path) -> dict[str, str]:
    own = node_of("ab", folder)
    if processes.rank() == 1:
        own.rmdir()
        own.write_text("a file, not a folder")
    try:
        mapped_rows((4, 2), torch.float32, own)
    except InputError as error:
        return {"error": str(error)}
    return {"error": ""}


@pytest.mark.distributed
def test_an_error_of_one_node_ends_all(tmp_path: Path) -> None:
    for found in run_in(2, error_of_all, tmp_path):
        assert f"{tmp_path / 'b'}: cannot hold the gallery's features" in found["error"]
        assert "choose another folder with --cache_dir" in found["error"]
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize("size", [None, 0, 31, 33])
def test_a_lost_or_cut_file_is_not_mapped(tmp_path: Path, size: int | None) -> None:
    path = tmp_path / "features"
    if size is not None:
        path.write_bytes(bytes(size))
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: cannot hold the gallery's")):
        map_rows(path, (4, 2), torch.float32)
    assert path.exists() == (size is not None)
    assert size is None or path.stat().st_size == size
