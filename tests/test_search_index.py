"""Building and updating a search index of folders, tables and archives, with a stub encoder."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pab.core.errors import InputError
from pab.core.progress import Progress
from pab.data.tables import TableColumns
from pab.scoring.encoder import Encoder, Origin
from pab.search import build
from pab.search.archives import packed_images, read_packed
from pab.search.build import build_index
from pab.search.index import Entry, Index
from pab.search.jobs import BuildSettings, Report
from pab.search.members import MemberChoice, Opened
from pab.search.previous import locked
from pab.search.sources import (
    ArchiveSource,
    FolderSource,
    Source,
    TableSource,
    load_picture,
)

ROOT = Path(__file__).resolve().parents[1]
CLIP = ["--model", "clip", "--arch", f"local-dir:{ROOT / 'checkpoints/mini/clip'}"]
CHOICES = [MemberChoice("mean", "mean", ()), MemberChoice("corner", "corner", ())]


class Pixels(Encoder):
    """Encoder whose vectors are pixel values; it records the images that it has encoded."""

    origin = Origin("pixels", "pixels.pth")

    def __init__(self, corner: bool) -> None:
        self.corner, self.encoded = corner, list[str]()
        self.weights = "1"

    @property
    def fingerprint(self) -> dict[str, str]:
        return {"weights": self.weights, "device": "cpu"}

    def encode_images(self, images: Sequence[Any], *, reader: Any = None) -> torch.Tensor:
        rows = []
        for image in images:
            if not isinstance(image, Image.Image):
                self.encoded.append(image.gallery_id)
                try:
                    image = reader.load(image.path)
                except InputError as error:
                    reader.unreadable[image.gallery_id] = error
                    rows.append(np.zeros(3))
                    continue
            else:
                self.encoded.append("picture")
            pixels = np.asarray(image, dtype=np.float64) / 255
            rows.append(pixels[0, 0] if self.corner else pixels.mean((0, 1)))
        return torch.from_numpy(np.stack(rows)).float()

    def encode_texts(self, captions: Sequence[str]) -> torch.Tensor:
        return torch.ones(len(captions), 3)


class Lab:
    """Folder of photographs and its index, with stub members."""

    def __init__(self, root: Path) -> None:
        self.photos, self.out = root / "photos", root / "index"
        self.encoders = [Pixels(False), Pixels(True)]
        self.opened = 0
        for number in range(7):
            self.draw(f"{number}.png", number)

    def draw(self, name: str, number: int) -> Path:
        path = self.photos / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(
            np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        ).save(path)
        return path

    def change_all(self) -> None:
        """Add, change, remove, rename and touch one photograph each."""
        self.draw("new.png", 20)
        self.draw("3.png", 21)
        (self.photos / "5.png").unlink()
        (self.photos / "6.png").rename(self.photos / "renamed.png")
        os.utime(self.photos / "0.png", ns=(1, 1))

    def open(self) -> list[Opened]:
        self.opened += 1
        return [
            Opened(choice, one) for choice, one in zip(CHOICES, self.encoders, strict=True)
        ]  # fmt: skip

    def run(self, source: Source | None = None, **settings: Any) -> Report:
        for one in self.encoders:
            one.encoded.clear()
        source = source or FolderSource(self.photos, recursive=True)
        return build_index(
            self.out, source, CHOICES, self.open, BuildSettings("float32", **settings)
        )

    def contents(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Map each name to its vectors; every name must occur once."""
        index = Index.open(self.out)
        names = [entry.name for entry in index.entries()]
        assert len({*names}) == len(names)
        blocks = [
            np.concatenate([block for _, block in index.blocks(choice.name)]) for choice in CHOICES
        ]
        return dict(zip(names, zip(*blocks, strict=True), strict=True))

    def check(self) -> None:
        """Compare with an index that is built from scratch."""
        fresh = Lab.__new__(Lab)
        fresh.photos, fresh.out = self.photos, self.out.with_name("fresh")
        fresh.encoders, fresh.opened = [Pixels(False), Pixels(True)], 0
        shutil.rmtree(fresh.out, ignore_errors=True)
        fresh.run()
        expected, found = fresh.contents(), self.contents()
        assert found.keys() == expected.keys()
        for name, rows in expected.items():
            assert all(map(np.array_equal, found[name], rows)), name
        left = {path.name for path in self.out.rglob("*") if path.is_file()}
        shards = [shard["number"] for shard in json.loads(self.manifest.read_text())["shards"]]
        files = {f"img_emb_{n}.npy" for n in shards} | {f"metadata_{n}.parquet" for n in shards}
        assert left == files | {"manifest.json", ".lock"}

    @property
    def manifest(self) -> Path:
        return self.out / "manifest.json"


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


# ------------------------------------------------------------------------------------- incremental


def test_the_index_holds_every_image_with_its_facts(lab: Lab) -> None:
    lab.draw("a/deep.png", 9)
    report = lab.run()
    assert (report.rows, report.encoded, report.kept) == (8, 8, 0)
    index = Index.open(lab.out)
    assert [entry.name for entry in index.entries()] == [
        *(f"{number}.png" for number in range(7)), "a/deep.png",
    ]  # fmt: skip
    entry = index.entry(7)
    assert (entry.width, entry.height, entry.path) == (8, 6, lab.photos / "a/deep.png")
    assert entry.bytes == entry.path.stat().st_size
    assert entry.sha256 is not None
    assert len(entry.sha256) == 64
    assert load_picture(entry).size == (8, 6)
    lab.check()


def test_a_second_run_encodes_nothing_and_loads_no_model(lab: Lab) -> None:
    lab.run()
    before = lab.manifest.read_bytes()
    (lab.photos / "broken.png").write_bytes(b"no image")
    assert lab.run().unreadable.keys() == {"broken.png"}
    lab.opened = 0
    report = lab.run()
    assert (report.kept, report.encoded, report.removed, lab.opened) == (7, 0, 0, 0)
    assert report.unreadable.keys() == {"broken.png"}
    (lab.photos / "broken.png").unlink()
    assert lab.run().unreadable == {}
    assert lab.manifest.read_bytes() == before


def test_new_changed_removed_renamed_and_touched_images(lab: Lab) -> None:
    lab.run()
    lab.change_all()
    report = lab.run()
    assert lab.encoders[0].encoded == lab.encoders[1].encoded == ["3.png", "new.png"]
    assert (report.rows, report.encoded, report.reused, report.kept) == (7, 2, 2, 3)
    assert report.removed == 4
    lab.check()
    assert lab.run().kept == 7


def test_a_change_that_keeps_size_and_time_is_found_by_content(lab: Lab) -> None:
    path = lab.photos / "2.png"
    Image.new("RGB", (8, 6), (10, 20, 30)).save(path, compress_level=0)
    lab.run()
    status = path.stat()
    Image.new("RGB", (8, 6), (90, 20, 30)).save(path, compress_level=0)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert lab.run().kept == 7
    report = lab.run(check_content=True)
    assert (report.kept, report.encoded) == (6, 1)
    lab.check()


def test_small_shards_are_merged(lab: Lab) -> None:
    for number in range(7):
        lab.draw(f"later{number}.png", 30 + number)
        lab.run(block=2)
    assert len(Index.open(lab.out).manifest.shards) == 1
    lab.check()


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_a_stopped_run_loses_at_most_one_block(
    lab: Lab, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop before a manifest is saved, in a run that adds, changes and removes images."""
    lab.run()
    for number in range(4):
        lab.draw(f"new{number}.png", 40 + number)
    lab.draw("0.png", 50)
    (lab.photos / "6.png").unlink()
    saved = 0

    def stopping(*_: Any) -> None:
        nonlocal saved
        if saved == blocks:
            raise KeyboardInterrupt
        saved += 1
        true_save(*_)

    from pab.search.index import Manifest

    true_save = Manifest.save
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", stopping)
        with pytest.raises(KeyboardInterrupt, match=r"index holds .* images; resume with the"):
            lab.run(block=2)
    assert saved == blocks
    report = lab.run(block=2)
    assert report.encoded == 5 - min(5, 2 * blocks)
    lab.check()


def test_a_run_killed_in_its_first_manifest_continues(lab: Lab) -> None:
    lab.out.mkdir()
    (lab.out / ".manifest.json.abc.tmp").write_text("{")
    assert lab.run().encoded == 7
    (lab.out / ".unreadable.txt.abc.tmp").write_text("x")
    lab.run()
    lab.check()


def test_new_images_of_a_folder_that_has_moved(lab: Lab) -> None:
    lab.run()
    further = lab.photos.with_name("further")
    further.mkdir()
    lab.photos = lab.photos.rename(further / "down")
    lab.draw("new.png", 20)
    assert lab.run().encoded == 1
    assert Index.open(lab.out).manifest.root == str(lab.photos)
    for entry in Index.open(lab.out).entries():
        assert entry.path == lab.photos / entry.name


def test_a_folder_without_locks_is_named(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refusing)
    with pytest.raises(InputError, match=r"--out: .* cannot be locked: No locks available"):
        lab.run()


def test_other_flags_of_a_member_are_checked(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags are checked even if no image is new."""
    lab.run()
    other = [replace(CHOICES[0], arguments=("--arch", "other")), CHOICES[1]]
    source = FolderSource(lab.photos, recursive=True)
    lab.opened = 0
    assert build_index(lab.out, source, other, lab.open).kept == 7
    assert lab.opened == 1
    assert Index.open(lab.out).members[0].arguments == CHOICES[0].arguments, "flags of one run"
    monkeypatch.setattr(lab.encoders[0], "origin", Origin("pixels", "moved.pth"))
    build_index(lab.out, source, other, lab.open)
    assert Index.open(lab.out).members[0].arguments == other[0].arguments
    lab.encoders[0].weights = "2"
    with pytest.raises(InputError, match="member 'mean': expected weights 1, found 2"):
        build_index(lab.out, source, CHOICES, lab.open)


def test_a_path_that_is_not_utf8_is_named(lab: Lab) -> None:
    photos = lab.photos.rename(lab.photos.with_name(os.fsdecode(b"photos\xff")))
    with pytest.raises(InputError, match=r"expected UTF-8, found '.*photos\\udcff'"):
        lab.run(FolderSource(photos, recursive=True))
    assert not lab.manifest.exists()


def test_two_runs_at_once_are_refused(lab: Lab) -> None:
    with locked(lab.out), pytest.raises(InputError, match="--out: another run is writing"):
        lab.run()
    lab.run()


def test_a_folder_of_something_else_is_not_used(lab: Lab) -> None:
    lab.out.mkdir()
    (lab.out / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match=r"expected an index or an empty folder, found 'letter"):
        lab.run()
    assert [path.name for path in lab.out.iterdir()] == ["letter.txt"]


def test_another_model_source_or_folder_is_refused(lab: Lab, tmp_path: Path) -> None:
    lab.run()
    lab.encoders[1].weights = "2"
    lab.draw("new.png", 20)
    with pytest.raises(InputError, match="member 'corner': expected weights 1, found 2"):
        lab.run()
    lab.encoders[1].weights = "1"
    with pytest.raises(InputError, match="expected recursive True, as in the index, found False"):
        lab.run(FolderSource(lab.photos, recursive=False))
    other = shutil.copytree(lab.photos, tmp_path / "other")
    with pytest.raises(InputError, match=r"expected images of .*photos, found .*other"):
        lab.run(FolderSource(other, recursive=True))
    with pytest.raises(InputError, match="expected the members mean, corner, found mean"):
        build_index(
            lab.out, FolderSource(lab.photos, recursive=True), CHOICES[:1], lab.open
        )  # fmt: skip
    lab.photos.rename(tmp_path / "gone")
    lab.photos = tmp_path / "gone"
    assert lab.run().kept == 7, "a folder that has moved is accepted"
    assert Index.open(lab.out).entry(0).path.parent == lab.photos


def test_rows_of_different_widths_are_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A late-interaction model pads the rows of a call to the longest of them."""
    true_encode = lab.encoders[0].encode_images

    def padded(images: Sequence[Any], *, reader: Any = None) -> torch.Tensor:
        rows = true_encode(images, reader=reader)
        return torch.nn.functional.pad(rows, (0, len(lab.encoders[0].encoded)))

    monkeypatch.setattr(lab.encoders[0], "encode_images", padded)
    with pytest.raises(
        InputError, match="member 'mean': expected 5 numbers for every image, found 7"
    ):
        lab.run(block=2)


def test_an_index_is_never_emptied(lab: Lab) -> None:
    lab.run()
    before = lab.manifest.read_bytes()
    for path in list(lab.photos.iterdir()):
        path.write_bytes(b"no image")
    with pytest.raises(InputError, match="expected images that can be read, found none"):
        lab.run()
    assert lab.manifest.read_bytes() == before
    for path in list(lab.photos.iterdir()):
        path.unlink()
    with pytest.raises(InputError, match=r"expected images \(.*found none"):
        lab.run()
    assert lab.manifest.read_bytes() == before


# ------------------------------------------------------------------------------ tables and archives


def test_a_table_with_captions(lab: Lab, tmp_path: Path) -> None:
    table = lab.photos / "t.tsv"
    rows = ["filepath\ttitle", "1.png\ta man", "0.png\ta dog", "1.png\ta person", "9.png\tnone"]
    table.write_text("".join(f"{row}\n" for row in rows))
    report = lab.run(TableSource(table, TableColumns(), None))
    assert report.unreadable == {"9.png": "no such file"}
    entries = list(Index.open(lab.out).entries())
    assert [(e.name, e.caption) for e in entries] == [
        ("0.png", "a dog"), ("1.png", "a man\na person"),
    ]  # fmt: skip


def test_a_table_needs_neither_captions_nor_distinct_stems(lab: Lab) -> None:
    lab.draw("1.jpg", 30)
    table = lab.photos / "t.tsv"
    table.write_text("filepath\ttitle\n1.png\ta man\n1.jpg\t \n0.png\t\n1.png\t\n")
    lab.run(TableSource(table, TableColumns(), None))
    entries = list(Index.open(lab.out).entries())
    found = [(entry.name, entry.caption) for entry in entries]
    assert found == [("0.png", None), ("1.jpg", None), ("1.png", "a man")]


@pytest.mark.parametrize("text", ["filepath\n0.png\n", "label,filepath\nx,0.png\n"])
def test_a_table_without_captions(lab: Lab, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = lab.photos / "t.csv"
    table.write_text(text)
    lab.run(TableSource(table, TableColumns(), None))
    assert [(e.name, e.caption) for e in Index.open(lab.out).entries()] == [("0.png", None)]
    assert "no column 'title': its images have no captions" in capsys.readouterr().err
    with pytest.raises(InputError, match="expected columns 'filepath' and 'words', found"):
        TableSource(table, TableColumns(caption="words"), None).list()


def test_a_caption_that_has_changed_is_stored(lab: Lab) -> None:
    table = lab.photos / "t.tsv"
    for caption in ("a man", "a woman"):
        table.write_text(f"filepath\ttitle\n0.png\t{caption}\n1.png\ta dog\n")
        report = lab.run(TableSource(table, TableColumns(), None))
        captions = {entry.name: entry.caption for entry in Index.open(lab.out).entries()}
        assert captions == {"0.png": caption, "1.png": "a dog"}
    assert (report.kept, report.reused, report.encoded) == (1, 1, 0)


def test_a_file_that_could_not_be_read_is_tried_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's size and time may stay the same, for example if only its permissions change."""
    true_read = build.with_content

    def refusing(entry: Entry) -> Entry:
        if entry.name == "2.png":
            raise InputError(entry.path, "cannot be read: Permission denied")
        return true_read(entry)

    with monkeypatch.context() as patch:
        patch.setattr(build, "with_content", refusing)
        assert lab.run().unreadable == {"2.png": "cannot be read: Permission denied"}
    assert lab.run().encoded == 1
    lab.check()


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../secret.png", "x\0.png"])
def test_a_table_never_leaves_its_folder(lab: Lab, path: str) -> None:
    lab.draw("../secret.png", 1)
    table = lab.photos / "t.tsv"
    table.write_text(f"filepath\ttitle\n0.png\ta\n{path}\tb\n")
    with pytest.raises(InputError, match="line 3: field 'image'"):
        lab.run(TableSource(table, TableColumns(), None))
    assert not lab.manifest.exists()


def add(archive: tarfile.TarFile, name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, "/etc/passwd"
    archive.addfile(info, io.BytesIO(content))


def make_archives(lab: Lab, padding: int = 0) -> Path:
    """Pack the photographs, with ``padding`` bytes and captions, in two archives."""
    shards = lab.photos.with_name("shards")
    shards.mkdir()
    for number, names in enumerate((range(4), range(4, 7))):
        with tarfile.open(shards / f"{number}.tar", "w") as archive:
            for name in names:
                add(
                    archive,
                    f"{name}.png",
                    (lab.photos / f"{name}.png").read_bytes() + bytes(padding),
                )
                add(archive, f"{name}.txt", f"caption {name}\n".encode())
    return shards


def test_archives(lab: Lab) -> None:
    lab.run()
    expected = lab.contents()
    shards = make_archives(lab)
    lab.out = lab.out.with_name("archives")
    report = lab.run(ArchiveSource([shards]))
    assert (report.rows, report.encoded) == (7, 7)
    found = lab.contents()
    for name, rows in found.items():
        assert all(map(np.array_equal, rows, expected[name.partition("/")[2]]))
    index = Index.open(lab.out)
    assert [(e.name, e.caption) for e in index.entries()] == [
        (f"{number > 3:d}.tar/{number}.png", f"caption {number}") for number in range(7)
    ]
    for entry in index.entries():
        direct = Image.open(lab.photos / entry.name.partition("/")[2])
        assert np.array_equal(load_picture(entry), direct)
    report = lab.run(ArchiveSource([shards]))
    assert (report.kept, report.encoded, report.reused) == (7, 0, 0)
    with tarfile.open(shards / "1.tar", "a") as archive:
        add(archive, "8.png", lab.draw("8.png", 8).read_bytes())
    report = lab.run(ArchiveSource([shards]))
    assert (report.kept, report.encoded, report.reused) == (4, 1, 3)
    with pytest.raises(InputError, match=r"file '0.tar': expected every archive or video"):
        lab.run(ArchiveSource([shards / "1.tar"]))
    report = lab.run(ArchiveSource([shards]), check_content=True)
    assert (report.kept, report.encoded, report.reused) == (8, 0, 0)
    (shards / "0.tar").unlink()
    report = lab.run(ArchiveSource([shards]))
    assert (report.rows, report.removed, report.encoded) == (4, 4, 0)


def test_the_number_of_images_in_archives_is_estimated(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, estimates = make_archives(lab, padding=100_000), watch_estimates(monkeypatch)
    monkeypatch.setattr("pab.search.build.PICTURES", 1)
    lab.run(ArchiveSource([shards]))
    assert estimates[-1] == (7, 7)
    assert {done for done, _ in estimates} == set(range(1, 8))
    assert all(7 <= total <= 8 for _, total in estimates)
    estimates.clear()
    with tarfile.open(shards / "1.tar", "a") as archive:
        add(archive, "8.png", lab.draw("8.png", 8).read_bytes())
    lab.run(ArchiveSource([shards]))  # skips an unchanged archive
    assert estimates[-1] == (4, 4)


def watch_estimates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that receives (images done, estimated total) at each update of a run."""
    found: list[tuple[int, int]] = []
    update = Progress.update

    def watched(self: Progress, count: int = 1) -> None:
        update(self, count)
        assert self.total is not None
        found.append((self.done, self.total))

    monkeypatch.setattr(Progress, "update", watched)
    return found


def test_a_model_that_fails_is_not_taken_for_a_damaged_archive(lab: Lab) -> None:
    shards = make_archives(lab)
    lab.run(ArchiveSource([shards]))
    with tarfile.open(shards / "1.tar", "a") as archive:
        add(archive, "8.png", lab.draw("8.png", 8).read_bytes())
    lab.encoders[0].weights = "2"
    with pytest.raises(InputError, match="member 'mean': expected weights 1, found 2"):
        lab.run(ArchiveSource([shards]))


def test_a_stopped_run_leaves_no_rows_of_a_smaller_archive(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_archives(lab)
    lab.run(ArchiveSource([shards]))
    with tarfile.open(shards / "1.tar", "w") as archive:
        add(archive, "9.png", lab.draw("9.png", 9).read_bytes())
        add(archive, "bad.png", b"no image")
    with monkeypatch.context() as patch:
        patch.setattr("pab.search.build.compacted", lambda *_: 1 / 0)  # after the last archive
        with pytest.raises(ZeroDivisionError):
            lab.run(ArchiveSource([shards]))
    assert Index.open(lab.out).rows == 8
    report = lab.run(ArchiveSource([shards]))
    assert (report.rows, report.kept, report.encoded, report.removed) == (5, 5, 0, 3)
    assert report.unreadable.keys() == {"1.tar/bad.png"}


def test_names_in_an_archive_never_leave_it(lab: Lab, tmp_path: Path) -> None:
    good = (lab.photos / "0.png").read_bytes()
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("../out.png", "/etc/abs.png", "a/../../b.png", "back\\slash.png"):
            add(archive, name, good)
        add(archive, "link.png", b"", tarfile.SYMTYPE)
        add(archive, "hard.png", b"", tarfile.LNKTYPE)
        add(archive, "empty.png", b"")
        add(archive, "good.png", good)
        add(archive, "good.png", good)
        add(archive, "text.png", b"not an image")
        add(archive, "bad\udcff.png", good)
    before = sorted(tmp_path.rglob("*"))
    report = lab.run(ArchiveSource([path]))
    assert [e.name for e in Index.open(lab.out).entries()] == [
        "hostile.tar/bad\\xff.png", "hostile.tar/good.png",
    ]  # fmt: skip
    leaves = ("../out.png", "/etc/abs.png", "a/../../b.png", "back\\slash.png")
    for name in leaves:
        assert report.unreadable[f"hostile.tar/{name}"] == "a path that may leave the archive"
    assert report.unreadable["hostile.tar/link.png"] == "not a regular file"
    assert report.unreadable["hostile.tar/hard.png"] == "not a regular file"
    assert report.unreadable["hostile.tar/empty.png"] == "an empty file"
    assert "twice" in report.unreadable["hostile.tar/good.png"]
    assert "not a JPEG" in report.unreadable["hostile.tar/text.png"]
    made = {path for path in tmp_path.rglob("*") if lab.out not in (path, *path.parents)}
    assert made == {*before}


@pytest.mark.parametrize("damage", ["cut", "header", "gzip"])
def test_a_damaged_archive_keeps_what_precedes_the_damage(lab: Lab, damage: str) -> None:
    shards = make_archives(lab)
    (shards / "1.tar").unlink()
    path = shards / "0.tar"
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        member = archive.getmember("2.png")
    if damage == "cut":
        path.write_bytes(content[: member.offset_data + 10])
    elif damage == "header":
        path.write_bytes(content[: member.offset] + b"x" * 512 + content[member.offset_data :])
    else:
        import gzip

        path.write_bytes(gzip.compress(content))
        with pytest.raises(InputError, match="expected images that can be read, found none"):
            lab.run(ArchiveSource([shards]))
        return
    report = lab.run(ArchiveSource([shards]))
    assert "expected an uncompressed tar file" in report.unreadable["0.tar"]
    names = {e.name for e in Index.open(lab.out).entries()}
    assert {"0.tar/0.png", "0.tar/1.png"} <= names
    assert report.encoded == 2
    report = lab.run(ArchiveSource([shards]))
    assert (report.kept, report.encoded) == (2, 0)
    assert "0.tar" in report.unreadable


@pytest.mark.parametrize(
    ("size", "problem"), [(-600, "a negative size"), (1 << 45, "unexpected|Invalid")]
)
def test_a_wrong_size_neither_hangs_nor_reserves_memory(
    tmp_path: Path, size: int, problem: str
) -> None:
    path, good = tmp_path / "a.tar", tarfile.TarInfo("good.png")
    good.size = 3
    last = tarfile.TarInfo("last.png")
    last.size = size
    content = good.tobuf() + b"png".ljust(512, b"\0") + last.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(content + b"x" * 1000)
    bad: dict[str, str] = {}
    images = packed_images(path, bad)
    assert next(images).name == "good.png"
    with pytest.raises(InputError, match=problem):
        next(images)
    assert read_packed(path, 512, 3) == b"png"
    with pytest.raises(InputError, match="expected 99999 bytes at 512, found"):
        read_packed(path, 512, 99999)
    assert bad == ({} if size < 0 else {"last.png": "a file of more than 1024 MiB"})


def test_an_archive_that_ends_in_a_caption_keeps_its_images(lab: Lab) -> None:
    path = make_archives(lab) / "0.tar"
    with tarfile.open(path) as archive:
        member = archive.getmember("2.txt")
    path.write_bytes(path.read_bytes()[: member.offset_data + 3])
    report = lab.run(ArchiveSource([path]))
    assert (report.encoded, [*report.unreadable]) == (3, ["0.tar"])


def test_an_archive_that_is_restored_after_a_stopped_update(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_archives(lab) / "0.tar"
    before, status = path.read_bytes(), path.stat()
    lab.run(ArchiveSource([path]))
    with tarfile.open(path, "a") as archive:
        add(archive, "9.png", lab.draw("9.png", 9).read_bytes())

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "compacted", stop)
        with pytest.raises(KeyboardInterrupt):
            lab.run(ArchiveSource([path]))
    # As if the update had stopped before it recorded the archive as complete.
    facts = json.loads(lab.manifest.read_text())
    facts["complete"] = {"0.tar": {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}}
    lab.manifest.write_text(json.dumps(facts))
    path.write_bytes(before)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    report = lab.run(ArchiveSource([path]))
    assert (report.rows, report.kept) == (4, 4)
    assert len(lab.contents()) == 4
