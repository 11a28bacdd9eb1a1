"""Read forms that list images per query: TREC runs, ranx runs, JSON rankings, ranked lists.

==================  ==============================================================================
TREC run            ``query Q0 image rank score tag`` per line; ranked by score, as in trec_eval;
                    ``0`` may replace ``Q0``, and the tag may be missing
ranx run            ``{query: {image: score}}``
rankings by query   ``{query: [image, ...]}``, best first
rankings            ``{"query_index", "topk_gallery": [image, ...]}`` per record, best first;
                    ``"topk_scores"`` may contain the scores
reranked lists      ``{"query_index", "reranked": [{"image", "score"}, ...]}`` per record
ranked list         image names per line, best first; line N belongs to query N
==================  ==============================================================================

Records are JSON lines or one JSON array. In JSON, ids may be whole numbers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from pab.core.counts import counted
from pab.core.errors import Fault, InputError
from pab.core.progress import progress
from pab.data.id_lists import id_text, id_texts
from pab.data.json_lines import OBJECT, Twice, found_twice, kind, shortened
from pab.formats.contents import QUERY_ID_KEYS, Listing
from pab.formats.tables import TREC_FIELDS, number_of, trec_fields
from pab.ranking import read_ranked_list

_LIST_KEYS = ("topk_gallery", "reranked", "ranking", "results")
_SCORE_KEYS = ("topk_scores", "scores")
_IMAGE_KEYS = ("image", "gallery", "gallery_id", "image_id", "name")


def ranked_list(path: Path) -> Listing:
    """Read a ranked list, or a zip file that contains one.

    Raises:
        InputError: see :func:`pab.ranking.read_ranked_list`.
    """
    return Listing("a ranked list", read_ranked_list(path))


def trec_run(text: str, path: Path) -> Listing:
    """Parse the text of a TREC run.

    Raises:
        InputError: a line is malformed, a score is not a number, or an image is repeated within a
            query; the message names the line.
    """
    found: dict[str, dict[str, float]] = {}
    ranks: dict[str, list[tuple[float, float]]] = {}
    lines = progress(text.split("\n"), f"reading {path.name}", "lines")
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line:
            continue
        fault = partial(InputError, path, item=f"line {number}")
        fields = trec_fields(line)
        if len(fields) < TREC_FIELDS - 1:  # the tag may be missing
            given = counted(len(fields), "field")
            raise fault(f"expected QUERY Q0 IMAGE RANK SCORE TAG, found {given}")
        query, _, image, rank = fields[:4]
        score = number_of(fields[4])
        if score is None:
            raise fault(f"expected a number as the score, found {shortened(fields[4])}")
        images = found.setdefault(query, {})
        if image in images:
            raise fault(f"expected every image once per query, found {image!r} twice")
        images[image] = score
        place = number_of(rank)
        if place is not None:
            ranks.setdefault(query, []).append((place, score))
    remarks = []
    other = sum(_other_order(listed) for listed in ranks.values())
    if other:
        remarks.append(
            f"the rank column contradicts the scores (queries: {other}); the scores decide, as in "
            "trec_eval"
        )
    return _scored("a TREC run", found, remarks)


def _other_order(listed: Sequence[tuple[float, float]]) -> bool:
    """Return true if a better rank has a lower score than the next rank."""
    scores = [score for _, score in sorted(listed, key=lambda pair: pair[0])]
    return any(a < b for a, b in pairwise(scores))


def json_run(text: str, path: Path) -> Listing:
    """Parse the text of a JSON file: a ranx run, rankings, or reranked lists.

    Raises:
        InputError: the JSON is broken or of unknown form, a query or image is repeated, a score is
            not a number, or only some queries have scores. The message names the line, record or
            query, if there is one.
    """
    records = _json_values(text, path)
    only = records[0] if len(records) == 1 else None
    if isinstance(only, dict) and _first_of(QUERY_ID_KEYS, only) is None:
        return _run_object(only, path)
    if isinstance(only, list):
        records = only
    if not records:
        raise InputError(path, "expected ranked images per query, found an empty list")
    return _records(records, path)


def _json_values(text: str, path: Path) -> list[Any]:
    """Parse all consecutive JSON values of a text: one document, or JSON lines."""
    values, place = [], 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        try:
            value, place = OBJECT.raw_decode(text, place)
        except Twice as error:
            raise found_twice(error, path, None) from error
        except (ValueError, RecursionError) as error:
            broken = error.pos if isinstance(error, json.JSONDecodeError) else place
            problem = f"expected JSON, found broken JSON: {getattr(error, 'msg', error)}"
            line = f"line {text.count(chr(10), 0, broken) + 1}"
            raise InputError(path, problem, item=line) from error
        values.append(value)
    return values


def _first_of(keys: Sequence[str], fields: dict[str, Any]) -> str | None:
    return next((key for key in keys if key in fields), None)


def _run_object(run: dict[str, Any], path: Path) -> Listing:
    """Parse an object that maps query -> {image: score} (ranx), or query -> images, best first."""
    faults = {query: partial(InputError, path, item=f"query {shortened(query)}") for query in run}
    if run and all(isinstance(listed, list) for listed in run.values()):
        names = {query: _names(listed, faults[query]) for query, listed in run.items()}
        return _ordered("rankings by query (JSON)", names, [])
    found: dict[str, dict[str, float]] = {}
    for query, listed in run.items():
        fault = faults[query]
        if not isinstance(listed, dict):
            raise fault(f"expected an object of images and scores, found {kind(listed)}")
        found[query] = {name: _score(value, name, fault) for name, value in listed.items()}
    return _scored("a ranx run (JSON)", found, [])


def _records(records: list[Any], path: Path) -> Listing:
    names: dict[str, list[str]] = {}
    scores: dict[str, dict[str, float]] = {}
    ignored: Counter[str] = Counter()
    for number, record in enumerate(records, start=1):
        fault = partial(InputError, path, item=f"record {number}")
        if not isinstance(record, dict):
            raise fault(f"expected a JSON object, found {kind(record)}")
        query_key, list_key = _first_of(QUERY_ID_KEYS, record), _first_of(_LIST_KEYS, record)
        if query_key is None or list_key is None:
            expected = "fields 'query_index' and 'topk_gallery' or 'reranked'"
            shown = ", ".join(map(shortened, record)) or "none"
            raise fault(f"expected {expected}, found {shown}")
        query = id_text(record[query_key], fault)
        fault = partial(InputError, path, item=f"query {shortened(query)}")
        if query in names or query in scores:
            raise fault("expected every query once, found it twice")
        listed = record[list_key]
        if not isinstance(listed, list):
            raise fault(f"field {list_key!r}: expected a list, found {kind(listed)}")
        score_key = _first_of(_SCORE_KEYS, record)
        if listed and all(isinstance(one, dict) for one in listed):
            scores[query] = _pairs(listed, fault)
        elif score_key is not None:
            scores[query] = _beside(_names(listed, fault), record[score_key], fault)
        else:
            names[query] = _names(listed, fault)
        ignored.update(key for key in record if key not in (query_key, list_key, score_key))
    remarks = [f"ignored field {shortened(key)} (records: {n})" for key, n in ignored.items()]
    if any(names.values()) and scores:
        found = f"found them for {len(scores)} of {len(records)}"
        problem = f"expected scores for all queries or for none, {found}"
        without = next(query for query, listed in names.items() if listed)
        raise InputError(path, problem, item=f"query {shortened(without)}")
    if scores:
        return _scored("reranked lists (JSON)", scores | {query: {} for query in names}, remarks)
    return _ordered("rankings (JSON)", names, remarks)


def _names(listed: list[Any], fault: Fault) -> list[str]:
    names = id_texts(listed, fault)
    if len(set(names)) < len(names):
        twice = next(name for name, n in Counter(names).items() if n > 1)
        raise fault(f"expected every image once per query, found {shortened(twice)} twice")
    return names


def _pairs(listed: list[dict[str, Any]], fault: Fault) -> dict[str, float]:
    """Convert ``[{"image", "score"}, ...]`` to image -> score."""
    for entry in listed:
        if _first_of(_IMAGE_KEYS, entry) is None or "score" not in entry:
            found = ", ".join(map(shortened, entry)) or "nothing"
            raise fault(f"expected entries with 'image' and 'score', found one with {found}")
    names = _names([entry[str(_first_of(_IMAGE_KEYS, entry))] for entry in listed], fault)
    return _beside(names, [entry["score"] for entry in listed], fault)


def _beside(names: list[str], values: Any, fault: Fault) -> dict[str, float]:
    """Combine image names and scores into a dict image -> score."""
    if not isinstance(values, list) or len(values) != len(names):
        found = len(values) if isinstance(values, list) else kind(values)
        raise fault(f"expected one score per image ({len(names)}), found {found}")
    return {name: _score(value, name, fault) for name, value in zip(names, values, strict=True)}


def _score(value: Any, name: str, fault: Fault) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise fault(f"expected a number for image {shortened(name)}, found {kind(value)}")
    try:
        return float(value)
    except OverflowError as error:
        problem = f"expected a finite score for image {name!r}, found an integer too large"
        raise fault(problem) from error


def _scored(form: str, found: dict[str, dict[str, float]], remarks: list[str]) -> Listing:
    names = _ordered(form, {query: list(listed) for query, listed in found.items()}, remarks)
    return replace(names, scores=[list(listed.values()) for listed in found.values() if listed])


def _ordered(form: str, found: dict[str, list[str]], remarks: list[str]) -> Listing:
    full = {query: listed for query, listed in found.items() if listed}
    empty = [query for query, listed in found.items() if not listed]
    if empty:
        first = shortened(empty[0])
        remarks = [*remarks, f"skipped queries without images: {len(empty)} (first: {first})"]
    return Listing(form, list(full.values()), list(full), None, tuple(remarks))
