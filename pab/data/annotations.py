"""Read PAB's annotation files.

Three kinds of JSON object exist:

======================  ==========================================================================
training pair           ``image``, ``caption`` (one text), ``image_id``; optional fields below
labelled test image     the same fields; ``caption`` is a list of texts, or one text
name-masked query       ``query_index``, ``caption``
======================  ==========================================================================

The optional fields are ``hard_i``, ``hard_c`` and ``hard_i_id`` (image, caption and id of the twin:
the pair from the same source video with the other kind of action), ``source_id`` (``x_y``: x is the
source video), ``source_caption``, ``normal`` or ``anomaly`` (the action) and ``scene``. An optional
field without a usable text counts as absent, and unknown fields are ignored. A notice reports both,
with counts. Ids may be integers. Queries may also be one object ``{id: caption}``. For the forms of
JSON, see :mod:`pab.data.json_lines`; for tables and folders of captioned images, see
:mod:`pab.data.tables`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from pab.core.errors import InputError
from pab.core.files import existing_file
from pab.data.image_paths import Locator
from pab.data.labelled_images import images_of_own_data, labelled_images_of, read_labelled_images
from pab.data.masked_queries import holds_queries, masked_queries, with_answers
from pab.data.records import GalleryImage, LabelledImage, Query, Relevance, Retrieval, TrainPair
from pab.data.tables import TableColumns, is_own_data


def read_retrieval(
    annotation: str | Path,
    *,
    image_folder: str | Path | None = None,
    answers: str | Path | None = None,
    same_caption_counts: bool = False,
    columns: TableColumns | None = None,
) -> Retrieval:
    """Read any annotation as a retrieval task.

    The fields determine the kind. A file with ``query_index`` contains name-masked queries. A file
    with ``image`` or ``image_id`` is labelled (``pair.json``, ``attr.json``, ``ucc.json`` or a
    training shard), as is a table or a folder of captioned images. In a labelled set, gallery ids
    are ``image_id``, and query ids are ``IMAGE_ID#n`` for the n-th caption from 0. By default, only
    the captioned image is right. Image files may be missing, so that a score file can be evaluated
    without them.

    Args:
        annotation: the file, or a folder of images with a ``.txt`` beside each.
        image_folder: folder of a labelled file's images. If None, the data root: the parent of the
            ``annotation`` folder that contains the file. Otherwise, leading folders of the image
            paths are dropped one at a time until a file exists; the number dropped for the first
            image found is used for all images. A table's image paths are relative to the table's
            folder or to ``image_folder``. Ignored for name-masked queries.
        answers: answer key of a name-masked file, ``{QUERY_ID: {"gallery": NAME, "normal":
            ACTION}}``, with ``anomaly`` instead of ``normal`` for anomalies. Actions are optional.
        same_caption_counts: if true, every image with exactly the same caption counts as right.
        columns: column names of a table; the defaults are OpenCLIP's.

    Raises:
        InputError: a file or folder is missing, unreadable or empty, lines are bad (all counted,
            the first twenty named), image paths are ambiguous, or the answer key does not fit the
            annotation.
    """
    path = Path(annotation)
    own = is_own_data(path)
    if not own:
        path = existing_file(annotation, "an annotation file")
        if holds_queries(path, otherwise=answers is not None):
            queries = list(masked_queries(path))
            if answers is None:
                return Retrieval(queries, None, None, {})
            return with_answers(queries, Path(answers), path)
    if answers is not None:
        problem = f"an answer key is for name-masked queries, but {path} has its own labels"
        raise InputError(answers, problem, todo="omit the answer key")
    root = None if image_folder is None else Path(image_folder)
    if own:
        root = Path(image_folder or (path if path.is_dir() else path.parent))
        images = images_of_own_data(path, root, columns or TableColumns())
    else:
        images = list(read_labelled_images(path, root))
    return _labelled(images, path, root, same_caption_counts)


def retrieval_of_pairs(
    pairs: Iterable[TrainPair], root: str | Path, *, same_caption_counts: bool = False
) -> Retrieval:
    """Convert training pairs, such as a validation split, to a labelled retrieval task.

    Args:
        pairs: the pairs; their ``image_id`` must be unique.
        root: the data root that ``image`` is relative to.
        same_caption_counts: see :func:`read_retrieval`.

    Raises:
        InputError: there are no pairs, an ``image_id`` is repeated, the root does not exist, or
            image paths are ambiguous.
    """
    images = labelled_images_of(pairs)
    if not images:
        raise InputError(root, "expected training pairs to search in, found none")
    for image_id, count in Counter(image.image_id for image in images).items():
        if count > 1:
            problem = f"expected every image_id once, found {image_id!r} in {count} pairs"
            raise InputError(root, problem, item=f"image_id {image_id!r}")
    return _labelled(images, Path(root), root, same_caption_counts)


def _labelled(
    images: list[LabelledImage], source: Path, root: str | Path | None, same_caption_counts: bool
) -> Retrieval:
    if not images:
        raise InputError(source, "expected labelled images, found none")
    known = {image.image_id for image in images}
    with_caption: dict[str, list[str]] = defaultdict(list)
    for image in images:
        for caption in image.captions:
            with_caption[caption].append(image.image_id)

    queries: list[Query] = []
    relevant: dict[str, frozenset[str]] = {}
    twins: dict[str, str] = {}
    for image in images:
        for number, caption in enumerate(image.captions):
            query_id = f"{image.image_id}#{number}"
            queries.append(Query(query_id, caption, image.image_id, image.action, image.is_normal))
            listed = with_caption[caption]
            relevant[query_id] = frozenset(listed if same_caption_counts else (image.image_id,))
            # A twin with the same caption cannot be distinguished by that caption.
            if image.twin_id in known and image.twin_id not in listed:
                twins[query_id] = image.twin_id  # type: ignore[assignment]

    locate = Locator(source, root, [image.image for image in images])
    gallery = [GalleryImage(image.image_id, locate(image.image)) for image in images]
    gallery.sort(key=lambda image: image.gallery_id)
    relevance: Relevance = "same_caption" if same_caption_counts else "image_id"
    return Retrieval(queries, gallery, relevant, twins, relevance, images)
