"""Readers of PAB's annotation files.

Three kinds of JSON object exist:

======================  ==========================================================================
training pair           ``image``, ``caption`` (a text), ``image_id``; optional fields below
labelled test image     the same with ``caption`` a list of texts, or one text
name-masked query       ``query_index``, ``caption``
======================  ==========================================================================

The optional fields are ``hard_i``, ``hard_c``, ``hard_i_id`` (the twin: the same source video's
pair of the other kind), ``source_id`` (``x_y``: x the source video), ``source_caption``,
``normal`` or ``anomaly`` (the action) and ``scene``. One that is empty, null or of another type
counts as absent. Unknown fields are ignored. Both are counted and said in one line. Ids may be
whole numbers. A file holds JSON lines, a JSON array, or queries as one object ``{id: caption}``;
see :mod:`pab.data.json_lines`. Tables and folders of captioned images are read by
:mod:`pab.data.tables`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pab.core.errors import InputError
from pab.core.files import existing_file
from pab.core.notices import notice
from pab.core.progress import progress
from pab.data.bad_lines import BadLines
from pab.data.fields import (
    FieldNotes,
    caption_text,
    is_text,
    one_caption,
    optional_id,
    optional_text,
    required_id,
    required_text,
)
from pab.data.image_paths import Locator, checked_path
from pab.data.json_lines import (
    decoded,
    entries,
    json_document,
    json_object,
    kind,
    lines,
    shortened,
)
from pab.data.records import (
    GalleryImage,
    LabelledImage,
    Query,
    Relevance,
    Retrieval,
    TrainPair,
    image_keys,
    is_normal,
    video_of,
)
from pab.data.tables import TableColumns, captioned_images, is_own_data

__all__ = [
    "GalleryImage",
    "LabelledImage",
    "Query",
    "Retrieval",
    "TrainPair",
    "read_answers",
    "read_id_list",
    "read_labelled_images",
    "read_query_order",
    "read_retrieval",
    "read_shards",
    "read_train_pairs",
    "retrieval_of_pairs",
    "train_pair",
]

Record = TypeVar("Record")

# Optional fields, and readers for those that are not text.
_OPTIONAL = {
    "hard_i": optional_text,
    "hard_c": optional_text,
    "hard_i_id": optional_id,
    "source_id": optional_id,
    "source_caption": optional_text,
    "normal": optional_text,
    "anomaly": optional_text,
    "scene": optional_text,
}
_PAIR_FIELDS = frozenset(("image", "caption", "image_id", *_OPTIONAL))
_QUERY_FIELDS = frozenset(("query_index", "caption"))
_RECORD_FIELDS = _PAIR_FIELDS | _QUERY_FIELDS
_ANSWER_FIELDS = frozenset(("gallery", "normal", "anomaly"))


# --------------------------------------------------------------------------------------- reading


def read_retrieval(
    annotation: str | Path,
    *,
    image_folder: str | Path | None = None,
    answers: str | Path | None = None,
    same_caption_counts: bool = False,
    columns: TableColumns | None = None,
) -> Retrieval:
    """Read any annotation as a retrieval task.

    The fields determine the kind: ``query_index`` makes it a name-masked query file, ``image`` and
    ``image_id`` a labelled one (``pair.json``, ``attr.json``, ``ucc.json`` or a training shard). A
    table or a folder of captioned images is a labelled set too. In a labelled set, gallery ids are
    ``image_id``, and query ids are ``IMAGE_ID#n`` for the n-th caption from 0. A caption is
    relevant to its own image.

    Args:
        annotation: the file, or a folder of images with a ``.txt`` beside each.
        image_folder: location of a labelled file's images. By default, it is the data root, the
            parent of the ``annotation`` folder with the file. If given, leading folders of the
            image paths are dropped one at a time until a file exists; the first existing image
            determines the number for all. Unused for name-masked queries. A table's image paths are
            relative to its own folder or to this one.
        answers: answer key of a name-masked file, ``{QUERY_ID: {"gallery": NAME, "normal":
            ACTION}}``, with ``anomaly`` instead of ``normal`` for anomalies.
        same_caption_counts: if true, a caption is relevant to every image whose line lists exactly
            that caption.
        columns: column names of a table; the defaults are OpenCLIP's.

    Image files may be missing, so that a score file can be evaluated without them.

    Raises:
        InputError: a missing or unreadable file, bad lines (all counted, the first twenty named),
            no queries, an image path outside its folder, answers for unknown queries, or queries
            without an answer.
    """
    path = Path(annotation)
    own = is_own_data(path)
    if not own:
        path = existing_file(annotation, "an annotation file")
        if _holds_queries(path, otherwise=answers is not None):
            queries = list(_queries(path))
            if answers is None:
                return Retrieval(queries, None, None, {})
            return _with_answers(queries, Path(answers), path)
    if answers is not None:
        raise InputError(
            answers,
            f"an answer key is for name-masked queries, but {path} carries its own labels",
            todo="leave the answer key out",
        )
    if own:
        root = Path(image_folder) if image_folder else path if path.is_dir() else path.parent
        images = _images_of_own_data(path, root, columns or TableColumns())
        return _labelled(images, path, root, same_caption_counts)
    folder = None if image_folder is None else Path(image_folder)
    images = list(read_labelled_images(path, folder))
    return _labelled(images, path, image_folder, same_caption_counts)


def retrieval_of_pairs(
    pairs: Iterable[TrainPair], root: str | Path, *, same_caption_counts: bool = False
) -> Retrieval:
    """Convert training pairs (such as a validation split) to a retrieval task with labelled ids.

    Args:
        pairs: the pairs; their ``image_id`` must be unique.
        root: the data root that ``image`` is relative to.
        same_caption_counts: see :func:`read_retrieval`.

    Raises:
        InputError: no pairs, a duplicate ``image_id``, or an image path outside the root.
    """
    images = labelled_images_of(pairs)
    if not images:
        raise InputError(root, "expected training pairs to search in, found none")
    seen: set[str] = set()
    for image in images:
        if image.image_id in seen:
            raise InputError(
                root,
                f"expected every image_id once, found {image.image_id!r} in two pairs",
                item=f"image_id {image.image_id!r}",
            )
        seen.add(image.image_id)
    return _labelled(images, Path(root), root, same_caption_counts)


def labelled_images_of(pairs: Iterable[TrainPair]) -> list[LabelledImage]:
    """Convert training pairs to labelled images, in order; captions of one image are combined.

    See :func:`pab.data.records.image_keys`.
    """
    images: dict[object, LabelledImage] = {}
    pairs = list(pairs)
    for number, (pair, key) in enumerate(zip(pairs, image_keys(pairs), strict=True)):
        if key is not None and key in images:
            found = images[key]
            images[key] = replace(found, captions=(*found.captions, pair.caption))
            continue
        images[number if key is None else key] = LabelledImage(
            pair.image,
            pair.image_id if key is None else key[0],
            (pair.caption,),
            pair.hard_i_id,
            pair.action,
            pair.is_normal,
        )
    return list(images.values())


def read_train_pairs(path: str | Path) -> Iterator[TrainPair]:
    """Yield the valid pairs of a training shard, then raise for the bad lines.

    Raises:
        InputError: the file is missing or unreadable, or lines are bad (all counted, the first
            twenty named).
    """
    path = existing_file(path, "a training annotation file")
    yield from _records(path, train_pair)


def read_shards(paths: Iterable[Path], root: Path, bad: BadLines) -> Iterator[TrainPair]:
    """Stream the usable pairs of several shards; ``bad`` takes the others, as training would.

    Raises:
        InputError: a file is missing or unreadable.
    """
    once = _Once("image_id")

    def pair_of(fields: dict[str, Any], path: Path, item: str, notes: FieldNotes) -> TrainPair:
        pair = train_pair(fields, path, item, notes, root)
        once(pair.image_id, path, f"{item} of {path.name}")
        return pair

    for path in progress(paths, "reading shards", "files"):
        yield from _records(existing_file(path, "a training annotation file"), pair_of, bad)


def read_id_list(path: str | Path, what: str = "a list of ids, one per line") -> list[str]:
    """Read unique ids, one per line, in file order.

    Blank lines, a byte-order mark and Windows line ends are skipped.

    Raises:
        InputError: the file is missing, unreadable, not UTF-8, empty, or repeats an id.
    """
    path = existing_file(path, what)
    first_seen: dict[str, int] = {}
    for number, _, raw in lines(path):
        name = decoded(raw, path, f"line {number}").strip()
        if name in first_seen:
            raise InputError(
                path,
                f"expected every id once, found {name!r} already on line {first_seen[name]}",
                item=f"line {number}",
            )
        first_seen[name] = number
    if not first_seen:
        raise InputError(path, f"expected {what}, found an empty file")
    return list(first_seen)


def read_query_order(path: str | Path) -> list[str]:
    """Read a query order file (Track 4's ``query_index.txt``): one query id per line.

    Raises:
        InputError: see :func:`read_id_list`.
    """
    return read_id_list(path, "a query order file, one query id per line")


def _records(
    path: Path,
    record_of: Callable[[dict[str, Any], Path, str, FieldNotes], Record],
    collected: BadLines | None = None,
) -> Iterator[Record]:
    """Yield the records of valid lines, print notices, then raise one error for the bad lines.

    Args:
        path: the file.
        record_of: fields, file, ``"line 17"`` and notes -> record; raises for a bad line.
        collected: takes the bad lines; without it they are raised.
    """
    bad, notes = BadLines() if collected is None else collected, FieldNotes()
    size = path.stat().st_size
    for number, _, raw in progress(
        entries(path), f"reading {path.name}", "B", size, lambda entry: len(entry[2])
    ):
        item = f"line {number}"
        try:
            record = record_of(json_object(raw, path, item), path, item, notes)
        except InputError as error:
            bad.add(error)
            continue
        yield record
    for text in notes.texts():
        notice(path, text)
    if collected is None:
        bad.check(path)


class _Once:
    """Reject an id that an earlier line has."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.first_seen: dict[str, str] = {}

    def __call__(self, value: str, path: Path, item: str) -> None:
        before = self.first_seen.setdefault(value, item)
        if before is not item:
            raise InputError(
                path, f"expected every {self.what} once, found {value!r} already on {before}",
                item=item,
            )  # fmt: skip


# ------------------------------------------------------------------------------ training pairs


def train_pair(
    fields: dict[str, Any],
    path: Path,
    item: str,
    notes: FieldNotes | None = None,
    root: Path | None = None,
) -> TrainPair:
    """Check the fields of a training line and return its record.

    Args:
        fields: the line's JSON object.
        path: the file, for the error.
        item: name of the line in the error (``"line 17"``).
        notes: counts ignored and assumed parts; None counts nothing.
        root: the data root; None uses the parent of the ``annotation`` folder around the file.

    Raises:
        InputError: a required field is missing, of the wrong type or empty, the caption has no
            visible text, an image path leaves the root, or the line is both normal and an anomaly.
    """
    caption = one_caption(fields, path, item)
    return TrainPair(caption=caption, **_pair_fields(fields, path, item, notes, root))


def _pair_fields(
    fields: dict[str, Any], path: Path, item: str, notes: FieldNotes | None, root: Path | None
) -> dict[str, Any]:
    """Check all fields of a pair except the caption."""
    image = required_text(fields, "image", path, item)
    checked: dict[str, Any] = {
        "image": checked_path(image, "image", path, item, root=root),
        "image_id": required_id(fields, "image_id", path, item),
    }
    for name, read in _OPTIONAL.items():
        if name in fields:
            value = fields[name]
            checked[name] = value if is_text(value) else read(fields, name, notes)
    if checked.get("hard_i") is not None:
        checked["hard_i"] = checked_path(
            checked["hard_i"], "hard_i", path, item, below="train", root=root
        )
    if checked.get("normal") is not None and checked.get("anomaly") is not None:
        raise InputError(path, "expected field 'normal' or field 'anomaly', found both", item=item)
    if notes is not None:
        if not fields.keys() <= _PAIR_FIELDS:
            notes.ignore_unknown(fields, _PAIR_FIELDS)
        source = checked.get("source_id")
        if source is not None and video_of(source) == source:
            notes.whole_sources += 1
    return checked


# ------------------------------------------------------------------------ labelled annotations


def read_labelled_images(
    path: str | Path, root: Path | None = None, bad: BadLines | None = None
) -> Iterator[LabelledImage]:
    """Stream the usable lines of a labelled file or a training shard, then raise for the bad ones.

    Args:
        path: the file.
        root: the data root; None takes the parent of the ``annotation`` folder around the file.
        bad: takes the bad lines; without it they are raised.

    Raises:
        InputError: the file is missing or unreadable, or lines are bad (all counted, the first
            twenty named); a repeated ``image_id`` is bad.
    """
    path = existing_file(path, "a labelled annotation file")
    once = _Once("image_id")

    def image_of(fields: dict[str, Any], path: Path, item: str, notes: FieldNotes) -> LabelledImage:
        checked = _pair_fields(fields, path, item, notes, root)
        normal, anomaly = checked.get("normal"), checked.get("anomaly")
        image = LabelledImage(
            image=checked["image"],
            image_id=checked["image_id"],
            captions=_captions(fields, path, item),
            twin_id=checked.get("hard_i_id"),
            action=normal if normal is not None else anomaly,
            is_normal=is_normal(normal, anomaly),
        )
        once(image.image_id, path, item)
        return image

    yield from _records(path, image_of, bad)


def _captions(fields: dict[str, Any], path: Path, item: str) -> tuple[str, ...]:
    """Captions of a labelled line: a list of texts, or one text."""
    value = fields.get("caption")
    if type(value) is not list:
        return (one_caption(fields, path, item),)
    if not value:
        raise InputError(
            path, "field 'caption': expected at least one caption, found an empty list", item=item
        )
    return tuple(
        caption_text(caption, f"caption, entry {number}", path, item)
        for number, caption in enumerate(value, start=1)
    )


def _images_of_own_data(path: Path, root: Path, columns: TableColumns) -> list[LabelledImage]:
    """Images of a table or folder; captions of one image are combined."""
    bad = BadLines()
    images: dict[str, LabelledImage] = {}
    for found in captioned_images(path, root, columns, bad):
        before = images.get(found.image_id)
        if before is None:
            images[found.image_id] = LabelledImage(found.image, found.image_id, (found.caption,))
        else:
            captions = (*before.captions, found.caption)
            images[found.image_id] = replace(before, captions=captions)
    bad.check(path)
    if not images:
        raise InputError(path, "expected captioned images, found no queries")
    return list(images.values())


def _labelled(
    images: list[LabelledImage],
    source: Path,
    image_folder: str | Path | None,
    same_caption_counts: bool,
) -> Retrieval:
    if not images:
        raise InputError(source, "expected labelled images, found no queries")
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
            # A twin with the same caption cannot be distinguished by it.
            if image.twin_id in known and image.twin_id not in listed:
                twins[query_id] = image.twin_id  # type: ignore[assignment]

    locate = Locator(source, image_folder, [image.image for image in images])
    gallery = [GalleryImage(image.image_id, locate(image.image)) for image in images]
    gallery.sort(key=lambda image: image.gallery_id)
    relevance: Relevance = "same_caption" if same_caption_counts else "image_id"
    return Retrieval(queries, gallery, relevant, twins, relevance)


# ------------------------------------------------------------------------------------ name-masked


def _holds_queries(path: Path, *, otherwise: bool) -> bool:
    """Return true if a file holds name-masked queries; the first conclusive object decides.

    Args:
        path: the file.
        otherwise: result if no object is conclusive, for instance because none is readable.

    Raises:
        InputError: the file is empty.
    """
    empty = True
    for number, _, raw in entries(path):
        empty = False
        try:
            fields = json_object(raw, path, f"line {number}")
        except InputError:  # reported when the lines are read
            continue
        if "query_index" in fields or "image" in fields or "image_id" in fields:
            return "query_index" in fields
        if fields and not fields.keys() & _RECORD_FIELDS:
            return _is_caption_map(path)
    if empty:
        raise InputError(path, "expected JSON objects, found no queries: the file is empty")
    return otherwise


def _is_caption_map(path: Path) -> bool:
    """Return true if a file is one object ``{id: caption}``."""
    found = entries(path)
    _, _, raw = next(found)
    if next(found, None) is not None:
        return False
    fields = json_object(raw, path, "line 1")
    return bool(fields) and not fields.keys() & _RECORD_FIELDS


def _queries(path: Path) -> Iterator[Query]:
    once = _Once("query id")

    def query_of(fields: dict[str, Any], path: Path, item: str, notes: FieldNotes) -> Query:
        query_id = required_id(fields, "query_index", path, item)
        caption = one_caption(fields, path, item)
        once(query_id, path, item)
        notes.ignore_unknown(fields, _QUERY_FIELDS)
        return Query(query_id, caption)

    if not _is_caption_map(path):
        yield from _records(path, query_of)
        return
    captions = json_document(path, "one JSON object of captions by query id")
    notice(path, f"is read as one object {{query id: caption}} of {len(captions)} queries")
    bad, notes = BadLines(), FieldNotes()
    for query_id, caption in captions.items():
        item = f"query {shortened(query_id)}"
        try:
            yield query_of({"query_index": query_id, "caption": caption}, path, item, notes)
        except InputError as error:
            bad.add(error)
    bad.check(path)


def _with_answers(queries: list[Query], answers: Path, annotation: Path) -> Retrieval:
    key = read_answers(answers)
    known = {query.query_id for query in queries}
    unknown = [query_id for query_id in key if query_id not in known]
    if unknown:
        raise InputError(
            answers,
            f"{len(unknown)} answers are for queries that {annotation} does not hold",
            item=f"query {shortened(unknown[0])}",
        )
    missing = [query.query_id for query in queries if query.query_id not in key]
    if missing:
        raise InputError(
            answers,
            f"{len(missing)} queries of {annotation} have no answer",
            item=f"query {missing[0]!r}",
        )
    answered = []
    for query in queries:
        gallery_id, normal, anomaly = key[query.query_id]
        action = normal if normal is not None else anomaly
        normality = is_normal(normal, anomaly)
        answered.append(Query(query.query_id, query.caption, gallery_id, action, normality))
    relevant = {query.query_id: frozenset((str(query.image_id),)) for query in answered}
    return Retrieval(answered, None, relevant, {})


def read_answers(path: str | Path) -> dict[str, tuple[str, str | None, str | None]]:
    """Read an answer key as query id -> (gallery id, normal action, abnormal action).

    Raises:
        InputError: the file is missing or not a JSON object, or answers are bad (all counted, the
            first twenty named).
    """
    path = Path(path)
    key = json_document(path, "an answer key, one JSON object by query id")
    answers = {}
    bad, notes = BadLines(), FieldNotes()
    for query_id, fields in key.items():
        item = f"query {shortened(query_id)}"
        try:
            answers[query_id] = _answer(fields, path, item, notes)
        except InputError as error:
            bad.add(error)
    for text in notes.texts():
        notice(path, text)
    bad.check(path)
    return answers


def _answer(
    fields: object, path: Path, item: str, notes: FieldNotes
) -> tuple[str, str | None, str | None]:
    if type(fields) is not dict:
        raise InputError(path, f"expected an object, found {kind(fields)}", item=item)
    gallery = required_id(fields, "gallery", path, item)
    normal, anomaly = (optional_text(fields, name, notes) for name in ("normal", "anomaly"))
    if normal is not None and anomaly is not None:
        raise InputError(path, "expected 'normal' or 'anomaly', found both", item=item)
    notes.ignore_unknown(fields, _ANSWER_FIELDS)
    return gallery, normal, anomaly
