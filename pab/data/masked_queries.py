"""Read name-masked queries, and the answer key that names the right image of each query."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.notices import notice
from pab.data.fields import FieldNotes, one_caption, optional_text, required_id
from pab.data.json_lines import entries, json_document, json_object, kind, shortened
from pab.data.pairs import PAIR_FIELDS
from pab.data.record_lines import Once, read_records, valid_records
from pab.data.records import Query, Retrieval, is_normal

_QUERY_FIELDS = frozenset(("query_index", "caption"))
_RECORD_FIELDS = PAIR_FIELDS | _QUERY_FIELDS
_ANSWER_FIELDS = frozenset(("gallery", "normal", "anomaly"))


class Answer(NamedTuple):
    """Right image of a query, with the action if the answer key contains it."""

    gallery_id: str
    action: str | None
    is_normal: bool | None


def holds_queries(path: Path, *, otherwise: bool) -> bool:
    """Return true if a file contains name-masked queries; the first conclusive object decides.

    Args:
        path: the file.
        otherwise: result if no object is conclusive, for instance because all are malformed.

    Raises:
        InputError: the file is empty, cannot be read, or cannot be separated into entries.
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


def masked_queries(path: Path) -> Iterator[Query]:
    """Yield the valid queries of a file, then raise one error for its bad lines."""
    once = Once("query id")

    def query_of(fields: dict[str, Any], path: Path, item: str, notes: FieldNotes) -> Query:
        fault = partial(InputError, path, item=item)
        query_id = required_id(fields, "query_index", fault)
        caption = one_caption(fields, fault)
        once(query_id, path, item)
        notes.ignore_unknown(fields, _QUERY_FIELDS)
        return Query(query_id, caption)

    if not _is_caption_map(path):
        yield from read_records(path, query_of)
        return
    captions = json_document(path, "one JSON object that maps query ids to captions")
    queries = counted(len(captions), "query", "queries")
    notice(path, f"is read as one object {{query id: caption}} with {queries}")
    found = (
        (f"query {shortened(query_id)}", {"query_index": query_id, "caption": caption})
        for query_id, caption in captions.items()
    )
    yield from valid_records(path, found, lambda fields, *rest: query_of(fields, path, *rest))


def with_answers(queries: list[Query], answers: Path, annotation: Path) -> Retrieval:
    """Label queries with an answer key; reject unknown queries and missing answers."""
    key = read_answers(answers)
    known = {query.query_id for query in queries}
    unknown = [query_id for query_id in key if query_id not in known]
    if unknown:
        problem = f"answers for queries that are not in {annotation}: {len(unknown)}"
        raise InputError(answers, problem, item=f"query {shortened(unknown[0])}")
    missing = [query.query_id for query in queries if query.query_id not in key]
    if missing:
        problem = f"queries of {annotation} without an answer: {len(missing)}"
        raise InputError(answers, problem, item=f"query {missing[0]!r}")
    return answered(queries, key)


def answered(queries: Iterable[Query], key: Mapping[str, Answer]) -> Retrieval:
    """Label queries with an answer key that contains all of them."""
    labelled = [Query(one.query_id, one.caption, *key[one.query_id]) for one in queries]
    relevant = {one.query_id: frozenset((key[one.query_id].gallery_id,)) for one in labelled}
    return Retrieval(labelled, None, relevant, {})


def read_answers(path: str | Path) -> dict[str, Answer]:
    """Read an answer key: query id -> answer.

    Raises:
        InputError: the file is missing, unreadable or not a JSON object without repeated keys, or
            answers are bad (all counted, the first twenty named).
    """
    path = Path(path)
    key = json_document(path, "an answer key, one JSON object keyed by query id")
    found = ((f"query {shortened(query_id)}", fields) for query_id, fields in key.items())

    def answer_of(fields: object, item: str, notes: FieldNotes) -> Answer:
        fault = partial(InputError, path, item=item)
        if type(fields) is not dict:
            raise fault(f"expected an object, found {kind(fields)}")
        gallery = required_id(fields, "gallery", fault)
        normal, anomaly = (optional_text(fields, name, notes) for name in ("normal", "anomaly"))
        if normal is not None and anomaly is not None:
            raise fault("expected 'normal' or 'anomaly', found both")
        notes.ignore_unknown(fields, _ANSWER_FIELDS)
        return Answer(gallery, anomaly if normal is None else normal, is_normal(normal, anomaly))

    return dict(zip(key, valid_records(path, found, answer_of), strict=True))
