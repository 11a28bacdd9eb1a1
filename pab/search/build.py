"""Build and update a search index: find what has changed, encode it, write shards.

An image is unchanged if the index has it with the same name, file size, modification time, caption
and offset in an archive. Other images are hashed. If the index has an image with the same content,
such as a renamed one, its vectors are reused. Only the remaining images are encoded. Rows of
removed and changed images are dropped at the end of the run.

Each block of rows is written as a shard as soon as it is encoded. A stopped run therefore loses
about one block or, with an engine, the parts that are not yet in the index. At the end, small
shards are merged.

An engine may encode images on other processes or machines; see :mod:`pab.search.worker`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.progress import Progress
from pab.data.photos import photo_reader
from pab.data.records import GalleryImage
from pab.search.index import (
    MANIFEST,
    Entry,
    FileState,
    Index,
    Manifest,
    Shard,
    Unreadable,
    read_manifest,
)
from pab.search.jobs import BuildSettings, Engine, Job, Report, Task, Work
from pab.search.members import (
    MemberChoice,
    Opened,
    check_choices,
    check_fingerprint,
    check_same_model,
    choice_of,
    with_arguments,
)
from pab.search.previous import Previous, locked
from pab.search.sources import (
    Container,
    Item,
    Source,
    check_containers,
    check_source,
    old_root,
    with_content,
)
from pab.search.writing import (
    PARTS,
    compacted,
    move_shards,
    remove_unnamed,
    with_shards,
    write_shard,
)

if TYPE_CHECKING:
    from torch import Tensor

PICTURES = 32  # images of archives and videos in memory at a time
THREADS = 8  # readers of files; reading and hashing release the interpreter lock

Opener = Callable[[], Sequence[Opened]]


def build_index(
    folder: Path,
    source: Source,
    choices: Sequence[MemberChoice],
    open_members: Opener,
    settings: BuildSettings | None = None,
    engine: Engine | None = None,
) -> Report:
    """Build an index, or update it.

    Args:
        folder: folder of the index; a new or empty one, or an index of the same source and members.
        source: the images.
        choices: the members by name, with their flags.
        open_members: loads the members; called if this process must encode an image, or if flags
            differ from those of the index.
        settings: None uses the defaults.
        engine: encodes the images in other processes; None encodes them in this process.

    Raises:
        InputError: the folder cannot be used, another run is writing it, the source or the members
            are not those of the index, no image can be read, or encoding fails.
        KeyboardInterrupt: the run was interrupted; the text reports the number of saved images.
    """
    with locked(folder):
        run = Run(folder, source, choices, open_members, settings or BuildSettings())
        try:
            return run.result(engine)
        except KeyboardInterrupt:
            done = counted(run.manifest.rows if run.manifest else 0, "image")
            stop = f"interrupted: {folder} holds {done}; resume with the same command"
            raise KeyboardInterrupt(stop) from None


class Run:
    """One run of :func:`build_index`, or a part of one."""

    def __init__(
        self, folder: Path, source: Source, choices: Sequence[MemberChoice], opener: Opener,
        settings: BuildSettings,
    ) -> None:  # fmt: skip
        self.folder, self.source, self.settings = folder, source, settings
        self.choices = list(choices)
        self._opener, self.report = opener, Report()
        _check_text(source, choices)
        self.manifest: Manifest | None = None
        if (folder / MANIFEST).is_file():
            self.manifest = read_manifest(folder)
            check_source(folder, self.manifest, source)
            check_choices(folder, self.manifest, choices)
            self._old_root = old_root(self.manifest, source)
            # The images' folder may have moved. Paths of new entries are relative to the new one.
            self.manifest = replace(self.manifest, root=str(source.root))
            remove_unnamed(folder, self.manifest)
        self.old = None if self.manifest is None else Previous(Index(folder, self.manifest))
        self.unreadable: dict[str, Unreadable] = {}
        self.complete: dict[str, FileState] = {}
        self._widths: dict[str, int] = {}
        self._entries: list[Entry] = []
        self._vectors: list[dict[str, np.ndarray]] = []

    def result(self, engine: Engine | None) -> Report:
        """Update the index from its source; return the counts of the run."""
        listing = self.source.list()
        if self.manifest is not None:
            check_containers(self.folder, self._old_root, self.manifest, self.source, listing)
            if list(map(choice_of, self.manifest.members)) != self.choices:
                # `opened` checks the models that other flags select; weights may have moved.
                members = with_arguments(self.manifest.members, self.choices, self.opened)
                self.manifest = replace(self.manifest, members=members)
        self.unreadable = {name: Unreadable(why) for name, why in listing.unreadable.items()}
        files = [entry for entry in listing.images if not self._is_unchanged(entry)]
        containers = [one for one in listing.containers if not self._is_complete(one)]
        total = None if containers else len(files)
        starts = range(0, len(files), self.settings.block)
        tasks: list[Task] = [files[start : start + self.settings.block] for start in starts]
        tasks += containers
        with Progress(total, "indexing", "images") as shown:
            work = Work(tasks, shown)
            if engine is not None and tasks:
                self._add_parts(engine, tasks, work)
            elif engine is None:
                for task in tasks:
                    self.add(task, work)
        return self._finish()

    def add(self, task: Task, work: Work) -> None:
        """Encode a block or a container, write its shards, and count its images in ``work``."""
        if isinstance(task, Container):
            self._add_container(task, work)
        else:
            self._add_files(task)
            self._flush()
            work.add(len(task))

    def _add_parts(self, engine: Engine, tasks: Sequence[Task], work: Work) -> None:
        """Let an engine encode the tasks; list their shards in the order of the tasks."""
        settings, before = self.settings, list[Shard]()
        if self.manifest is not None:
            settings = replace(settings, dtype=self.manifest.members[0].dtype)
            before = self.manifest.shards
        parts = self.folder / PARTS
        job = Job(parts, self.source, self.choices, settings, self.folder, self.manifest)
        placed, checked = dict[int, list[Shard]](), list[dict[str, str]]()
        for part in engine(job, tasks):
            self.unreadable |= part.unreadable
            self.complete |= part.complete
            if self.old is not None:
                self.old.keep[part.kept] = True
            self.report.add(part.report)
            if part.manifest is not None:
                self.manifest = self.manifest or replace(part.manifest, shards=[], next_number=0)
                for member, found in zip(self.manifest.members, part.manifest.members, strict=True):
                    self._check_width(member.name, found.width)
                    if found.fingerprint not in checked:
                        check_fingerprint(self.folder, member, found.fingerprint)
                        checked.append(found.fingerprint)
                placed[part.number] = move_shards(
                    part.folder, self.folder, self.manifest, part.manifest
                )
                new = [shard for _, shards in sorted(placed.items()) for shard in shards]
                self._save([*before, *new])
            task = tasks[part.number]
            if isinstance(task, Container):
                work.add(part.report.encoded, task.state.bytes)
            else:
                work.add(len(task))

    def _is_unchanged(self, entry: Entry) -> bool:
        if self.manifest is None or self.old is None or self.settings.check_content:
            return False
        if self.old.keeps(entry):
            self.report.kept += 1
            return True
        before = self.manifest.unreadable.get(entry.name)
        if before is not None and before.state == FileState(entry.bytes, entry.mtime_ns):
            self.unreadable[entry.name] = before
            return True
        return False

    def _is_complete(self, container: Container) -> bool:
        """Keep the rows of an unchanged container; return false if the container must be read."""
        if self.manifest is None or self.old is None or self.settings.check_content:
            return False
        if self.manifest.complete.get(container.name) != container.state:
            return False
        self.report.kept += self.old.keep_container(container.name, container.state)
        self.complete[container.name] = container.state
        for name, problem in self.manifest.unreadable.items():
            if name == container.name or name.startswith(f"{container.name}/"):
                self.unreadable[name] = problem
        return True

    # -------------------------------------------------------------------------------------- adding

    def _add_files(self, entries: Sequence[Entry]) -> None:
        """Hash a block of files, and encode those with new contents."""
        hashed: list[Entry] = []
        with ThreadPoolExecutor(THREADS) as pool:
            for entry, found in zip(entries, pool.map(_hashed, entries), strict=True):
                if isinstance(found, InputError):  # the next run tries to read the file again
                    self.unreadable[entry.name] = Unreadable(found.problem)
                elif not self._has_same(found):
                    hashed.append(found)
        fresh = self._reuse(hashed)
        if not fresh:
            return
        vectors: dict[str, np.ndarray] = {}
        for member in self.opened:
            reader = photo_reader()
            images = [GalleryImage(entry.name, entry.path) for entry in fresh]
            encoded = member.encoder.encode_images(images, reader=reader)
            bad = reader.unreadable or {}
            good = np.array([entry.name not in bad for entry in fresh])
            for entry in fresh:
                if entry.name in bad:
                    self._set_unreadable(entry, bad[entry.name])
            fresh = [entry for entry, keep in zip(fresh, good, strict=True) if keep]
            if not fresh:
                return
            rows = self._rows(member.name, encoded)[good]
            vectors = {name: one[good] for name, one in vectors.items()} | {member.name: rows}
        self._add(fresh, vectors)
        self.report.encoded += len(fresh)

    def _add_container(self, container: Container, work: Work) -> None:
        bad: dict[str, str] = {}
        waiting: list[Item] = []
        items, left = container.items(bad), container.state.bytes
        while True:
            try:
                item = next(items, None)
            except InputError as error:  # images before the damage are used
                self.unreadable[container.name] = Unreadable(error.problem, container.state)
                break
            if item is None:
                break
            left -= item.size
            if self._is_unchanged(item.entry):  # a stopped run has indexed it
                work.skip(item.size)
                continue
            waiting.append(item)
            if len(waiting) == PICTURES:
                self._add_items(waiting, work)
                waiting = []
        work.skip(left)
        self._add_items(waiting, work)
        self.unreadable |= {name: Unreadable(problem) for name, problem in bad.items()}
        self.complete[container.name] = container.state
        self._flush()

    def _add_items(self, items: Sequence[Item], work: Work) -> None:
        """Read images of a container, and encode those with new contents."""
        pictures = {}
        with ThreadPoolExecutor(THREADS) as pool:
            for item, found in zip(items, pool.map(_loaded, items), strict=True):
                if isinstance(found, InputError):
                    self.unreadable[item.entry.name] = Unreadable(found.problem)
                elif not self._has_same(found[0]):
                    pictures[found[0].name] = found
        fresh = self._reuse([entry for entry, _ in pictures.values()])
        if fresh:
            images = [pictures[entry.name][1] for entry in fresh]
            vectors = {
                one.name: self._rows(one.name, one.encoder.encode_images(images))
                for one in self.opened
            }
            self._add(fresh, vectors)
            self.report.encoded += len(fresh)
        if len(self._entries) >= self.settings.block:
            self._flush()
        work.add(len(items), sum(item.size for item in items))

    def _rows(self, member: str, vectors: Tensor) -> np.ndarray:
        """Convert vectors to float32 [n, D]."""
        self._check_width(member, vectors.shape[1])
        return vectors.float().numpy()

    def _check_width(self, member: str, found: int) -> None:
        """Reject a member whose vectors have different widths D."""
        known = {} if self.manifest is None else {m.name: m.width for m in self.manifest.members}
        width = self._widths.setdefault(member, known.get(member, found))
        if found != width:
            raise InputError(
                self.folder, f"expected {width} numbers for every image, found {found}",
                item=f"member {member!r}",
                todo="a model with one vector per token cannot be indexed: search without an index",
            )  # fmt: skip

    def _has_same(self, entry: Entry) -> bool:
        """With ``check_content``, keep the row of an image with the same state and content."""
        if self.old is None or not self.settings.check_content or not self.old.has_same(entry):
            return False
        self.report.kept += 1
        return True

    def _reuse(self, entries: Sequence[Entry]) -> list[Entry]:
        """Add the entries whose content is in the index, with stored vectors; return the rest."""
        if self.old is None:
            return list(entries)
        contents = self.old.contents
        known = [entry for entry in entries if entry.sha256 in contents]
        if known:
            rows = [contents[str(entry.sha256)] for entry in known]
            index = self.old.index
            self._add(known, {one.name: index.vectors(one.name, rows) for one in index.members})
            self.report.reused += len(known)
        return [entry for entry in entries if entry.sha256 not in contents]

    def _add(self, entries: Sequence[Entry], vectors: Mapping[str, np.ndarray]) -> None:
        self._entries += entries
        self._vectors.append(dict(vectors))

    @cached_property
    def opened(self) -> Sequence[Opened]:
        """Load the members, and check that the index was made with the same models."""
        found = self._opener()
        if self.manifest is not None:
            for member, one in zip(self.manifest.members, found, strict=True):
                check_same_model(self.folder, member, one.encoder)
        return found

    # ------------------------------------------------------------------------------------- writing

    def _flush(self) -> None:
        """Write the collected rows as a shard, sorted by name."""
        if not self._entries:
            return
        names = [choice.name for choice in self.choices]
        rows = {name: np.concatenate([one[name] for one in self._vectors]) for name in names}
        if self.manifest is None:
            members = [
                one.member(rows[one.name].shape[1], self.settings.dtype) for one in self.opened
            ]
            self.manifest = Manifest(self.source.facts(), str(self.source.root), members)
        order = sorted(range(len(self._entries)), key=lambda place: self._entries[place].name)
        entries = [self._entries[place] for place in order]
        shard = write_shard(
            self.folder, self.manifest, entries, {name: one[order] for name, one in rows.items()}
        )
        self._entries, self._vectors = [], []
        self._save([*self.manifest.shards, shard])

    def _save(self, shards: Sequence[Shard]) -> None:
        """Write the manifest with these shards and the state of the run so far."""
        assert self.manifest is not None
        self.manifest = replace(
            with_shards(self.manifest, shards),
            complete={**self.manifest.complete, **self.complete},
            unreadable={**self.manifest.unreadable, **self.unreadable},
        )
        self.manifest.save(self.folder)

    def _finish(self) -> Report:
        """Drop the rows of removed and changed images, merge small shards, write the manifest."""
        report = self.report
        report.unreadable = {name: one.problem for name, one in sorted(self.unreadable.items())}
        before = 0 if self.old is None else self.old.index.rows
        added = 0 if self.manifest is None else self.manifest.rows - before
        keep = np.ones(before + added, dtype=bool)
        if self.old is not None:
            keep[:before] = self.old.keep
            report.removed = before - int(self.old.keep.sum())
        report.rows = int(keep.sum())
        if self.manifest is None or not report.rows:
            first = next(iter(report.unreadable.items()), None)
            found = f"; {first[0]!r}: {first[1]}" if first else ""
            raise InputError(
                self.source.root, f"expected images that can be read, found none{found}",
                todo="the index is unchanged" if before else None,
            )  # fmt: skip
        state = replace(
            compacted(self.folder, self.manifest, keep), root=str(self.source.root),
            unreadable=dict(sorted(self.unreadable.items())), complete=self.complete,
        )  # fmt: skip
        if state != read_manifest(self.folder):
            state.save(self.folder)
        self.manifest = state
        remove_unnamed(self.folder, state)
        return report

    def _set_unreadable(self, entry: Entry, error: InputError) -> None:
        state = FileState(entry.bytes, entry.mtime_ns)
        self.unreadable[entry.name] = Unreadable(error.problem, state)


def _check_text(source: Source, choices: Sequence[MemberChoice]) -> None:
    """Reject text that a manifest in UTF-8 cannot store; image names are escaped instead."""
    words = [str(source.root), *map(str, source.facts().values())]
    words += [word for choice in choices for word in choice.arguments]
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            problem = f"expected UTF-8, found {word!a}"
            raise InputError("index", problem, todo="rename the file or folder") from error


def _hashed(entry: Entry) -> Entry | InputError:
    try:
        return with_content(entry)
    except InputError as error:
        return error


def _loaded(item: Item) -> tuple[Entry, Image.Image] | InputError:
    try:
        return item.load()
    except InputError as error:
        return error
