"""Search for the server: queries, uploads and pictures of one index.

The methods block, and several threads may call them. When the index on disk changes, the next
request opens it again.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pab.core.errors import InputError
from pab.scoring.encoder import Encoder
from pab.scoring.rerank import Reranker
from pab.search.ann import usable_ann
from pab.search.flags import RERANK_DEPTH
from pab.search.index import MANIFEST, Entry, Index, Member, read_manifest
from pab.search.query import Filters, Hit, Query, Searcher
from pab.search.server.cache import BoundedCache
from pab.search.server.ids import Ids, image_id
from pab.search.server.marks import NamedMark, annotation
from pab.search.server.models import (
    DEEPEST,
    Folders,
    MarksRequest,
    Picture,
    Result,
    SearchRequest,
    SearchResponse,
)
from pab.search.server.pictures import Decoders, DecodeUpload, LoadPicture, MakeJpeg
from pab.search.server.refusals import refusal
from pab.search.server.second_look import SecondLook
from pab.search.server.security import log
from pab.search.texts import check_query

THUMBNAIL_PX = 480  # longer side; on a desktop, rows are about 230 CSS pixels high
WHOLE_PX = 2_400  # longer side; decoded photographs have a shorter side below 2,048 px
CACHED_THUMBNAILS = 32 << 20  # bytes, about 800 thumbnails
CACHED_PICTURES = 16 << 20
CACHED_UPLOADS = 32 << 20  # about 2 to 10 photographs with a short side of 1,024 px or more
MOST_FOLDERS = 500
ANN_STEP = 256  # results of the first approximate search; enough for six pages of 40
ANN_GROWTH = 4  # each further search requests this many times as many results


class UnknownImageError(Exception):
    """An id belongs to no image of the index, and to no upload that is still kept."""


class QueryError(Exception):
    """A query cannot be answered; the message is for the client."""


@dataclass(frozen=True)
class Opened:
    """Opened index: its searcher, the ids of its images, and the state of its manifest."""

    searcher: Searcher
    ids: Ids
    stamp: tuple[int, int, int]

    @property
    def index(self) -> Index:
        """The index."""
        return self.searcher.index

    def row(self, identity: str) -> int:
        """Return the row of an image by its id.

        Raises:
            UnknownImageError: the index has no such image.
        """
        found = self.ids.row(identity)
        if found is None:
            raise UnknownImageError(identity)
        return found


class Service:
    """Answer requests.

    Args:
        index: the index.
        encoders: name of each member to search with -> its encoder.
        decoders: processes that decode pictures.
        reranker: model that re-ranks the first images of text queries, if any.
        rerank_depth: images per query to re-rank, at least 1.
        ann: use the approximate index if it serves these members.

    Attributes:
        second_look: re-ranks results; None without a reranker.

    Raises:
        InputError: the index or its approximate index cannot be used.
    """

    def __init__(
        self, index: Index, encoders: Mapping[str, Encoder], decoders: Decoders | None = None,
        *, reranker: Reranker | None = None, rerank_depth: int = RERANK_DEPTH, ann: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.encoders = index.folder, dict(encoders)
        self.decoders = decoders or Decoders()
        self._models = threading.Lock()  # models share the numeric settings of the process
        self.second_look = None
        if reranker is not None:
            self.second_look = SecondLook(reranker, rerank_depth, self._models, self._read)
        self._ann = ann
        stamp = _stamp(index.folder)
        if read_manifest(index.folder) != index.manifest:  # an update ran while the models loaded
            stamp = (0, 0, 0)  # the first request opens the index again
        self._opened = self._open(index, stamp)
        self._lock = threading.Lock()
        self._thumbnails: BoundedCache[bytes] = BoundedCache(CACHED_THUMBNAILS)
        self._pictures: BoundedCache[bytes] = BoundedCache(CACHED_PICTURES)
        self._uploads: BoundedCache[Image.Image] = BoundedCache(CACHED_UPLOADS)
        self._folders: tuple[Index, Folders] | None = None

    def _read(self, entry: Entry) -> Image.Image:
        image: Image.Image = self.decoders.run(LoadPicture(entry))
        return image

    def close(self) -> None:
        """End the decoding processes."""
        self.decoders.close()

    @property
    def index(self) -> Index:
        """The index, opened again if it has changed.

        Raises:
            InputError: the index cannot be read, or its members have changed.
        """
        return self._current().index

    @property
    def member_names(self) -> list[str]:
        """Names of the members that searches use, in the order of the index."""
        return [one.name for one in self.index.members if one.name in self.encoders]

    # --------------------------------------------------------------------------------- searching

    def search(self, request: SearchRequest, upload: bytes | None = None) -> SearchResponse:
        """Answer a query; ``upload`` is the content of an image file that belongs to it.

        Raises:
            QueryError: the query is invalid, a member refuses its text or image, its upload cannot
                be decoded, or re-ranking fails.
            UnknownImageError: the id of the query's image is unknown.
            InputError: the index, an image of the index, or a model cannot be used.
        """
        filters = Filters(request.folder, request.start_s, request.end_s, request.least)
        _check(request, upload, filters)
        look = self._look(request)
        opened, began = self._current(), time.perf_counter()
        kept = request.image
        image: Image.Image | None = None
        query: Query | None = None
        if upload is not None:
            image, kept = self._decoded(upload)
        elif kept is not None and kept.startswith("upload-"):
            image = self._uploads.get(kept)
            if image is None:
                raise UnknownImageError(kept)
        wanted = request.offset + request.limit
        more = min(wanted + 1, DEEPEST)  # one more shows whether there are further results
        if look is not None:
            more = max(more, look.depth)
        try:
            if image is None and kept is not None and request.text is None and not request.minus:
                row = opened.row(kept)
                hits = _found(opened, more, lambda k: opened.searcher.similar(row, k, filters))
            else:
                if image is None and kept is not None:
                    entry = opened.index.entry(opened.row(kept))
                    image = self._read(entry)
                weights: dict[str, float] = dict(request.weights.items())
                query = one = Query(request.text, image, tuple(request.minus), weights)
                hits = _found(opened, more, lambda k: opened.searcher.search([one], k, filters)[0])
        except InputError as error:
            if error.where in ("query", "weights", "image query"):
                raise QueryError(str(error)) from error
            refused = query and refusal(query, self.encoders, self._models)
            if refused:
                raise QueryError(refused) from error
            raise
        if look is not None and request.text is not None:
            hits = self._looked(look, opened, request.text, hits)
        shown = hits[request.offset : wanted]
        following = wanted if len(hits) > wanted and wanted < DEEPEST else None
        results = [
            _result(opened.index, hit, rank)
            for rank, hit in enumerate(shown, start=request.offset + 1)
        ]
        return SearchResponse(
            indexed=opened.index.rows, image=kept, next=following,
            milliseconds=round((time.perf_counter() - began) * 1_000, 1), results=results,
        )  # fmt: skip

    def _look(self, request: SearchRequest) -> SecondLook | None:
        """Return the second look, or None if the request does not use it.

        A page that begins after the re-ranked images does not use it.

        Raises:
            QueryError: the request asks for re-ranking, and the server has no reranker.
        """
        look = self.second_look
        if look is None and request.rerank:
            raise QueryError("rerank: expected a server that was started with --rerank")
        if look is None or request.rerank is False or request.text is None:
            return None
        return look if request.offset < look.depth else None

    def _looked(self, look: SecondLook, opened: Opened, text: str, hits: list[Hit]) -> list[Hit]:
        """Re-rank; see :meth:`SecondLook.apply`.

        Raises:
            QueryError: an image cannot be read, the reranker refuses the text or an image, or a
                score is not finite.
        """
        try:
            return look.apply(opened.index, opened.stamp, text, hits)
        except InputError as error:
            log(error)  # its text may name files, which the client must not learn
            raise QueryError(
                "rerank: the first images cannot be re-ranked for this text; see the server's log, "
                'or search without a second look ("rerank": false)'
            ) from error

    # ---------------------------------------------------------------------------------- pictures

    def picture(self, identity: str) -> Picture:
        """Describe an image.

        Raises:
            UnknownImageError: the index has no such image.
            InputError: see :attr:`index`.
        """
        opened = self._current()
        row = opened.row(identity)
        return Picture.model_validate(_facts(row, opened.index.entry(row)))

    def thumbnail(self, identity: str) -> bytes:
        """Return a small JPEG of an image.

        Raises:
            UnknownImageError: the index has no such image.
            InputError: its file has become unreadable; see also :attr:`index`.
        """
        return self._jpeg(identity, THUMBNAIL_PX, self._thumbnails)

    def whole(self, identity: str) -> bytes:
        """Return an upright JPEG of the whole image, without metadata; see :meth:`thumbnail`."""
        return self._jpeg(identity, WHOLE_PX, self._pictures)

    def _jpeg(self, identity: str, side: int, cache: BoundedCache[bytes]) -> bytes:
        opened = self._current()
        entry = opened.index.entry(opened.row(identity))
        key = (entry.name, entry.mtime_ns, entry.bytes)
        found = cache.get(key)
        if found is None:
            found = self.decoders.run(MakeJpeg(entry, side))
            cache.put(key, found, len(found))
        return found

    def _decoded(self, upload: bytes) -> tuple[Image.Image, str]:
        """Decode an upload, and keep it for requests for more results; return it and its id.

        Raises:
            QueryError: the upload cannot be decoded.
        """
        try:
            image = self.decoders.run(DecodeUpload(upload))
        except InputError as error:
            raise QueryError(f"image: {error.problem}") from error
        kept = f"upload-{secrets.token_hex(16)}"
        self._uploads.put(kept, image, image.width * image.height * 3)
        return image, kept

    # -------------------------------------------------------------------------- other requests

    def folders(self) -> Folders:
        """List the folders of the images; all names are read once per state of the index.

        Raises:
            InputError: see :attr:`index`.
        """
        index = self.index
        known = self._folders
        if known is None or known[0] is not index:
            known = index, folders_of(index)
            self._folders = known
        return known[1]

    def annotation(self, request: MarksRequest) -> tuple[str, int]:
        """Convert marks to an annotation; skip marks of images that the index no longer has.

        Returns:
            The annotation, and the number of skipped marks.

        Raises:
            UnknownImageError: the index has none of the marked images.
            QueryError: no image of the index is marked right.
            InputError: see :attr:`index`.
        """
        opened = self._current()
        rows = [opened.ids.row(mark.image) for mark in request.marks]
        marks = [
            NamedMark(mark.text, opened.index.entry(row).name, mark.right)
            for mark, row in zip(request.marks, rows, strict=True)
            if row is not None
        ]
        if not marks:
            raise UnknownImageError
        skipped = len(rows) - len(marks)
        try:
            return annotation(marks, request.form), skipped
        except InputError as error:
            skips = f"; skipped {skipped} of images that the index no longer has" if skipped else ""
            raise QueryError(f"{error}{skips}") from error

    def _current(self) -> Opened:
        stamp = _stamp(self.folder)
        if stamp == self._opened.stamp:
            return self._opened
        with self._lock:
            if stamp != self._opened.stamp:
                before, index = self._opened.index, Index.open(self.folder)
                if list(map(_identity, index.members)) != list(map(_identity, before.members)):
                    problem = "the members have changed since the server started"
                    raise InputError(self.folder, problem, todo="restart the server")
                self._opened = self._open(index, stamp)
            return self._opened

    def _open(self, index: Index, stamp: tuple[int, int, int]) -> Opened:
        """Prepare the searches; print one line with the reason if ``ann`` cannot be used."""
        ann = usable_ann(index, list(self.encoders)) if self._ann else None
        return Opened(
            Searcher(index, self.encoders, ann=ann, models=self._models), Ids(index), stamp
        )


def folders_of(index: Index) -> Folders:
    """List the folders that contain images, also in subfolders.

    At most :data:`MOST_FOLDERS` are listed: those nearest to the root of the source.
    """
    found: set[str] = set()
    for name in index.names:
        folder = name.rpartition("/")[0]
        while folder and folder not in found:
            found.add(folder)
            folder = folder.rpartition("/")[0]
    shown = sorted(found, key=lambda folder: (folder.count("/"), folder))[:MOST_FOLDERS]
    return Folders(folders=sorted(shown), complete=len(shown) == len(found))


def _check(request: SearchRequest, upload: bytes | None, filters: Filters) -> None:
    """Reject a query without text and image, with two images, or with an invalid text or filter.

    Raises:
        QueryError: see above.
    """
    if upload is not None and request.image is not None:
        raise QueryError("image: expected an id or a file, found both")
    if request.text is None and request.image is None and upload is None:
        raise QueryError("query: expected a text or an image, found neither")
    try:
        filters.check()
        for name, texts in (("text", [request.text]), ("minus", request.minus)):
            for text in texts:
                if text is not None:
                    check_query(text, name)
    except InputError as error:
        raise QueryError(str(error)) from error


def _found(opened: Opened, wanted: int, search: Callable[[int], list[Hit]]) -> list[Hit]:
    """Find the first images, and perhaps more, so that all pages of a query have one order.

    An approximate search for more images may also find better ones. The searches therefore have
    fixed sizes, and images that only a larger search finds come after those of the smaller ones.

    Args:
        opened: the searched index.
        wanted: minimum number of images to find, if there are as many.
        search: function that finds a number of images, best first.
    """
    if opened.searcher.ann is None:
        return search(wanted)
    found: dict[int, Hit] = {}
    step = ANN_STEP
    while True:
        hits = search(step)
        for hit in hits:
            found.setdefault(hit.row, hit)
        if step >= wanted or len(hits) < step:
            return list(found.values())
        step *= ANN_GROWTH


def _facts(row: int, entry: Entry) -> dict[str, object]:
    return {
        "id": image_id(row, entry.name), "name": entry.name, "time_s": entry.time_s,
        "width": entry.width, "height": entry.height, "caption": entry.caption,
    }  # fmt: skip


def _result(index: Index, hit: Hit, rank: int) -> Result:
    facts = _facts(hit.row, index.entry(hit.row))
    return Result.model_validate(
        {
            **facts, "rank": rank, "score": hit.score, "scores": dict(hit.scores),
            "rerank_score": hit.rerank_score,
        }
    )  # fmt: skip


def _identity(member: Member) -> tuple[object, ...]:
    """Return what vectors depend on; the flags of a member may differ between runs."""
    return member.name, member.model, member.fingerprint, member.width, member.dtype


def _stamp(folder: Path) -> tuple[int, int, int]:
    """Return inode, modification time and size of the manifest, to notice that it was replaced.

    Raises:
        InputError: the manifest cannot be read.
    """
    try:
        status = os.stat(folder / MANIFEST)  # noqa: PTH116 - on every request
    except OSError as error:
        raise InputError(folder / MANIFEST, f"cannot be read: {error.strerror}") from error
    return status.st_ino, status.st_mtime_ns, status.st_size
