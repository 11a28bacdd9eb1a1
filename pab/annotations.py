"""Annotation files of PAB: typed records, and readers that name every bad line.

Every annotation file holds JSON lines, whatever its ending. Three kinds of line exist:

======================  ==========================================================================
training pair           ``image``, ``caption`` (a text), ``image_id``; optional fields below
labelled test image     the same with ``caption`` a list of texts
name-masked query       ``query_index``, ``caption``
======================  ==========================================================================

The optional fields are ``hard_i``, ``hard_c``, ``hard_i_id`` (the twin: the same source video's
pair of the other kind), ``source_id`` (``x_y``: x the source video), ``source_caption``,
``normal`` or ``anomaly`` (the action) and ``scene``; ``null`` means absent. Any other field is an
error.

Field meanings: Yang et al., "Beyond Walking: A Large-Scale Image-Text Benchmark for Text-based
Person Anomaly Search", arXiv 2411.17776.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pab.errors import InputError
from pab.files import existing_file
from pab.image_paths import Locator, checked_path
from pab.json_lines import (
    bad_text,
    check_known,
    decoded,
    identifier,
    is_text,
    json_document,
    kind,
    lines,
    objects,
    optional_text,
    required_text,
    shortened,
)

_REQUIRED = ("image", "caption", "image_id")
_OPTIONAL = (
    "hard_i",
    "hard_c",
    "hard_i_id",
    "source_id",
    "source_caption",
    "normal",
    "anomaly",
    "scene",
)
_PAIR_FIELDS = frozenset((*_REQUIRED, *_OPTIONAL))
_QUERY_FIELDS = frozenset(("query_index", "caption"))
_ANSWER_FIELDS = frozenset(("gallery", "normal", "anomaly"))


@dataclass(frozen=True, slots=True)
class TrainPair:
    """One training pair. ``image`` is relative to the data root, ``hard_i`` to its ``train/``."""

    image: str
    caption: str
    image_id: str
    hard_i: str | None = None
    hard_c: str | None = None
    hard_i_id: str | None = None
    source_id: str | None = None
    source_caption: str | None = None
    normal: str | None = None
    anomaly: str | None = None
    scene: str | None = None

    @property
    def action(self) -> str | None:
        """What the person does, normal or not; None where the line does not say."""
        return self.normal if self.normal is not None else self.anomaly

    @property
    def is_normal(self) -> bool | None:
        """Whether the action is normal; None where the line does not say."""
        return _is_normal(self.normal, self.anomaly)

    @property
    def source_video(self) -> str | None:
        """The x of ``source_id`` ``x_y``; None for a pair that names no source."""
        return None if self.source_id is None else self.source_id.rpartition("_")[0]


@dataclass(frozen=True, slots=True)
class Query:
    """One caption to search with. ``image_id`` is None where the right image is not known."""

    query_id: str
    caption: str
    image_id: str | None = None
    action: str | None = None
    is_normal: bool | None = None


@dataclass(frozen=True, slots=True)
class GalleryImage:
    """One image to be found: its id and its file."""

    gallery_id: str
    path: Path


@dataclass(frozen=True)
class Retrieval:
    """Queries, gallery and labels of one annotation file.

    Attributes:
        queries: in file order; ids are unique.
        gallery: sorted by id; None for name-masked queries, whose gallery is an image folder.
        relevant: query id -> ids of the right images; None where there are no labels.
        twins: query id -> id of the twin of its image, where that twin is in the gallery.
    """

    queries: list[Query]
    gallery: list[GalleryImage] | None
    relevant: dict[str, frozenset[str]] | None
    twins: dict[str, str]


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One line of a labelled file; ``image`` is relative to the data root."""

    image: str
    image_id: str
    captions: tuple[str, ...]
    twin_id: str | None
    action: str | None
    is_normal: bool | None


# --------------------------------------------------------------------------------------- reading


def read_retrieval(
    annotation: str | Path,
    *,
    image_folder: str | Path | None = None,
    answers: str | Path | None = None,
) -> Retrieval:
    """Read an annotation file of any kind as a retrieval task.

    The first line's fields tell the kind: ``query_index`` makes it a name-masked query file,
    anything else a labelled one (``pair.json``, ``attr.json``, ``ucc.json`` or a training shard).
    In a labelled file gallery ids are ``image_id``, query ids ``IMAGE_ID#n`` for the n-th caption
    from 0, and a caption is relevant to its own image and to every image whose line lists exactly
    that caption.

    Args:
        annotation: the file.
        image_folder: where the images of a labelled file are. Without it they are looked for under
            the data root, the parent of the ``annotation`` folder that holds the file. With it,
            leading folders of the image paths are dropped one at a time until the file is found;
            the first image that is found decides how many, for all. Not used for name-masked
            queries.
        answers: the key of a name-masked file, ``{QUERY_ID: {"gallery": NAME, "normal": ACTION}}``,
            with ``anomaly`` in the place of ``normal`` where it is one.

    Whether image files exist is not checked, so that a score file can be evaluated without them.

    Raises:
        InputError: a missing or unreadable file, a bad line (named), no queries, duplicate ids, an
            image path that leaves its folder, answers for unknown queries or queries without an
            answer.
    """
    path = existing_file(annotation, "an annotation file")
    first = next(objects(path), None)
    if first is None:
        raise InputError(path, "expected one JSON object a line, found no queries")
    if "query_index" in first[1]:
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
    root = None if image_folder is None else Path(image_folder)
    return _labelled(list(read_labelled_images(path, root)), path, image_folder)


def retrieval_of_pairs(pairs: Iterable[TrainPair], root: str | Path) -> Retrieval:
    """Training pairs (a validation split, say) as a retrieval task; ids as in a labelled file.

    Args:
        pairs: the pairs; their ``image_id`` must be unique.
        root: the data root that ``image`` is relative to.

    Raises:
        InputError: no pairs, a duplicate ``image_id``, an image path that leaves the root.
    """
    images = [
        LabelledImage(p.image, p.image_id, (p.caption,), p.hard_i_id, p.action, p.is_normal)
        for p in pairs
    ]
    if not images:
        raise InputError(root, "expected training pairs to search in, found none")
    return _labelled(images, Path(root), root)


def read_train_pairs(path: str | Path) -> Iterator[TrainPair]:
    """Stream the pairs of one training shard (``pair_N.json`` or ``attr_N.json``).

    Raises:
        InputError: the file is missing or unreadable, or a line is bad (named).
    """
    path = existing_file(path, "a training annotation file")
    for number, fields in objects(path):
        yield train_pair(fields, path, f"line {number}")


def read_id_list(path: str | Path, what: str = "a list of ids, one a line") -> list[str]:
    """Read unique ids, one a line, in file order. Blank lines are skipped.

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
    """Read a query order file (Track 4's ``query_index.txt``): one query id a line.

    Raises:
        InputError: as :func:`read_id_list`.
    """
    return read_id_list(path, "a query order file, one query id a line")


# ------------------------------------------------------------------------------ training pairs


def train_pair(
    fields: dict[str, Any], path: Path, item: str, root: Path | None = None
) -> TrainPair:
    """Check the fields of one training line and make a record of them.

    Args:
        fields: the line's JSON object.
        path: the file, for the error.
        item: what to call the line in the error (``"line 17"``).
        root: the data root; None takes the parent of the ``annotation`` folder around the file.

    Raises:
        InputError: a field is missing, unknown, of the wrong type or empty, an image path leaves
            the root, ``source_id`` is not ``x_y``, or the line is both normal and an anomaly.
    """
    check_known(fields, _PAIR_FIELDS, (*_REQUIRED, *_OPTIONAL), path, item)
    caption = required_text(fields, "caption", path, item)
    return TrainPair(caption=caption, **_pair_fields(fields, path, item, root))


def _pair_fields(
    fields: dict[str, Any], path: Path, item: str, root: Path | None
) -> dict[str, Any]:
    """The checked fields of a pair, all but the caption."""
    image = required_text(fields, "image", path, item)
    image_id = required_text(fields, "image_id", path, item)
    checked: dict[str, Any] = {
        "image": checked_path(image, "image", path, item, root=root),
        "image_id": identifier(image_id, "image_id", path, item),
    }
    for name in _OPTIONAL:
        if name in fields:
            checked[name] = optional_text(fields, name, path, item)
    if checked.get("hard_i") is not None:
        checked["hard_i"] = checked_path(
            checked["hard_i"], "hard_i", path, item, below="train", root=root
        )
    source = checked.get("source_id")
    if source is not None:
        video, _, number = source.rpartition("_")
        if not video or not number.isdecimal():
            raise InputError(
                path,
                f"field 'source_id': expected VIDEO_NUMBER ('1_0'), found {shortened(source)}",
                item=item,
            )
    if checked.get("normal") is not None and checked.get("anomaly") is not None:
        raise InputError(path, "expected field 'normal' or field 'anomaly', found both", item=item)
    return checked


def _is_normal(normal: str | None, anomaly: str | None) -> bool | None:
    if normal is not None:
        return True
    return None if anomaly is None else False


# ------------------------------------------------------------------------ labelled annotations


def read_labelled_images(path: str | Path, root: Path | None = None) -> Iterator[LabelledImage]:
    """Stream the lines of a labelled file or a training shard.

    Args:
        path: the file.
        root: the data root; None takes the parent of the ``annotation`` folder around the file.

    Raises:
        InputError: the file is missing or unreadable, or a line is bad (named). Repeated ids are
            not looked for: that takes the whole file.
    """
    path = existing_file(path, "a labelled annotation file")
    for number, fields in objects(path):
        item = f"line {number}"
        check_known(fields, _PAIR_FIELDS, (*_REQUIRED, *_OPTIONAL), path, item)
        checked = _pair_fields(fields, path, item, root)
        normal, anomaly = checked.get("normal"), checked.get("anomaly")
        yield LabelledImage(
            image=checked["image"],
            image_id=checked["image_id"],
            captions=_captions(fields, path, item),
            twin_id=checked.get("hard_i_id"),
            action=normal if normal is not None else anomaly,
            is_normal=_is_normal(normal, anomaly),
        )


def _captions(fields: dict[str, Any], path: Path, item: str) -> tuple[str, ...]:
    """The captions of a labelled line: a list of texts, or the one text of a training line."""
    value = fields.get("caption")
    if type(value) is not list:
        return (required_text(fields, "caption", path, item),)
    if not value:
        raise InputError(
            path, "field 'caption': expected at least one caption, found an empty list", item=item
        )
    for number, caption in enumerate(value, start=1):
        if not is_text(caption):
            name = f"caption, entry {number}"
            raise bad_text(caption, name, "a text that is not empty", path, item)
    return tuple(value)


def _labelled(
    images: list[LabelledImage], source: Path, image_folder: str | Path | None
) -> Retrieval:
    seen: set[str] = set()
    with_caption: dict[str, list[str]] = defaultdict(list)
    for image in images:
        if image.image_id in seen:
            raise InputError(
                source,
                "expected every image_id once, found it on two lines",
                item=f"image_id {image.image_id!r}",
            )
        seen.add(image.image_id)
        for caption in image.captions:
            with_caption[caption].append(image.image_id)

    queries: list[Query] = []
    relevant: dict[str, frozenset[str]] = {}
    twins: dict[str, str] = {}
    for image in images:
        for number, caption in enumerate(image.captions):
            query_id = f"{image.image_id}#{number}"
            queries.append(Query(query_id, caption, image.image_id, image.action, image.is_normal))
            relevant[query_id] = frozenset(with_caption[caption])
            # A twin that shares the caption is a right answer, so there is nothing to tell apart.
            if image.twin_id in seen and image.twin_id not in relevant[query_id]:
                twins[query_id] = image.twin_id  # type: ignore[assignment]

    locate = Locator(source, image_folder, [image.image for image in images])
    gallery = [GalleryImage(image.image_id, locate(image.image)) for image in images]
    gallery.sort(key=lambda image: image.gallery_id)
    return Retrieval(queries, gallery, relevant, twins)


# ------------------------------------------------------------------------------------ name-masked


def _queries(path: Path) -> Iterator[Query]:
    first_seen: dict[str, int] = {}
    for number, fields in objects(path):
        item = f"line {number}"
        check_known(fields, _QUERY_FIELDS, ("query_index", "caption"), path, item)
        query_id = required_text(fields, "query_index", path, item)
        identifier(query_id, "query_index", path, item)
        if query_id in first_seen:
            raise InputError(
                path,
                f"expected every query id once, found {query_id!r} already "
                f"on line {first_seen[query_id]}",
                item=item,
            )
        first_seen[query_id] = number
        yield Query(query_id, required_text(fields, "caption", path, item))


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
        normality = _is_normal(normal, anomaly)
        answered.append(Query(query.query_id, query.caption, gallery_id, action, normality))
    relevant = {query.query_id: frozenset((str(query.image_id),)) for query in answered}
    return Retrieval(answered, None, relevant, {})


def read_answers(path: str | Path) -> dict[str, tuple[str, str | None, str | None]]:
    """Read an answer key: query id -> (gallery id, normal action, abnormal action).

    Raises:
        InputError: the file is missing or no JSON object, or an answer is bad (named).
    """
    path = Path(path)
    key = json_document(path, "an answer key, one JSON object by query id")
    answers = {}
    for query_id, fields in key.items():
        item = f"query {shortened(query_id)}"
        if type(fields) is not dict:
            raise InputError(path, f"expected an object, found {kind(fields)}", item=item)
        check_known(fields, _ANSWER_FIELDS, ("gallery", "normal", "anomaly"), path, item)
        gallery = required_text(fields, "gallery", path, item)
        normal = optional_text(fields, "normal", path, item)
        anomaly = optional_text(fields, "anomaly", path, item)
        if normal is not None and anomaly is not None:
            raise InputError(path, "expected 'normal' or 'anomaly', found both", item=item)
        answers[query_id] = (gallery, normal, anomaly)
    return answers
