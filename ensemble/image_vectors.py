"""Compute image vectors with a member, or read them from a file; `mine` compares them.

Shape letters: `G` gallery images, `D` width of the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pab.core.errors import InputError
from pab.data.id_lists import read_gallery_ids
from pab.data.records import GalleryImage
from pab.formats.contents import Matrix
from pab.formats.forms import read_form
from pab.ranking import rows_in_order
from pab.scoring.members import load_encoder


def encoded(
    name: str, gallery: Sequence[GalleryImage], config: str | None, checkpoint: str | None
) -> Tensor:
    """Encode the gallery with a member; return unit vectors in the member's dtype, [G, D].

    Vectors in the member's feature cache are reused, and new ones are added to it.

    Args:
        name: name of the member.
        gallery: G images.
        config: YAML file of the member's settings, such as that of its scoring command; None uses
            the defaults.
        checkpoint: the member's checkpoint; None uses the checkpoint in its settings.

    Raises:
        InputError: the member cannot be loaded (:func:`pab.scoring.members.load_encoder`), or an
            image cannot be read.
    """
    settings = {} if checkpoint is None else {"checkpoint": checkpoint}
    encoder = load_encoder(name, config=config, feature_cache=True, **settings)
    return torch.nn.functional.normalize(encoder.encode_images(list(gallery)), dim=1)


def stored(path: str, gallery_ids: Sequence[str], ids: str | None) -> Tensor:
    """Read image vectors from a file; return unit vectors, float32 [G, D].

    Args:
        path: a matrix [G, D] in any form of :mod:`pab.formats.forms`, such as ``.npy``.
        gallery_ids: ids of the images, sorted; the order of the result.
        ids: file of the ids of the rows, one per line, or the gallery's folder. None uses the ids
            in the file of vectors or, if it has none, the order of ``gallery_ids``.

    Raises:
        InputError: a file cannot be read or contains no matrix, or the matrix has another number
            of rows, other ids, or values that are not finite.
    """
    found = read_form(path)
    if not isinstance(found, Matrix):
        raise InputError(path, f"expected a matrix of image vectors [G, D], found {found.form}")
    names = read_gallery_ids(ids) if ids is not None else found.query_ids or found.gallery_ids
    rows = list(gallery_ids) if names is None else names
    if len(found.scores) != len(rows):
        raise InputError(
            path, f"expected one vector per image ({len(rows)}), found {len(found.scores)}",
            todo="pass the ids of its rows with --feature_ids FILE",
        )  # fmt: skip
    vectors = found.scores.float()
    if not bool(torch.isfinite(vectors).all()):
        raise InputError(path, "expected finite vectors, found infinite values or NaN")
    if names is not None:
        order = rows_in_order(names, gallery_ids, where=ids or path, order_name="the annotation")
        vectors = vectors[order]
    return torch.nn.functional.normalize(vectors, dim=1)
