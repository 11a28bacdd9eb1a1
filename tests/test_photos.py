"""Photographs: file formats, orientation, sizes, damaged files and the listing of folders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from pab.core.errors import InputError
from pab.data.images import list_gallery, load_image
from pab.data.photos import (
    MAX_PIXELS,
    MAX_RATIO,
    MIN_SIDE,
    PHOTO_ENDINGS,
    list_photos,
    load_photo,
    photo_reader,
    photo_size,
)

ROOT = Path(__file__).resolve().parents[1]
QUARTERS = {"red": (0, 0), "green": (1, 0), "blue": (0, 1), "white": (1, 1)}  # (column, row)
COLOURS = {
    "red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (250, 250, 250),
}  # fmt: skip
ORIENTATION = 0x0112
LIMIT_OF_PILLOW = Image.MAX_IMAGE_PIXELS
SAVE: dict[str, dict[str, object]] = {
    "a.jpg": {"format": "JPEG", "quality": 95},
    "a.JPEG": {"format": "JPEG", "quality": 95},
    "a.jfif": {"format": "JPEG", "quality": 95},
    "a.png": {"format": "PNG"},
    "a.webp": {"format": "WEBP", "quality": 95},
    "a.bmp": {"format": "BMP"},
    "a.gif": {"format": "GIF"},
    "a.tiff": {"format": "TIFF"},
    "lzw.tif": {"format": "TIFF", "compression": "tiff_lzw"},
    "a.avif": {"format": "AVIF", "quality": 95},
    "a.HEIC": {"format": "HEIF", "quality": 95},
    "a.mpo": {"format": "MPO", "save_all": True},
}
CARRY_EXIF = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "MPO")


def quarters(width: int = 96, height: int = 64) -> Image.Image:
    """Return a picture that every rotation and reflection changes."""
    image = Image.new("RGB", (width, height))
    for name, (column, row) in QUARTERS.items():
        box = (column * width // 2, row * height // 2)
        image.paste(COLOURS[name], (*box, box[0] + width // 2, box[1] + height // 2))
    return image


def save(path: Path, image: Image.Image, **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = dict(SAVE[path.name]) | more
    if options["format"] == "MPO":
        options["append_images"] = [Image.new("RGB", image.size)]
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def assert_upright(image: Image.Image, size: tuple[int, int] = (96, 64)) -> None:
    assert image.mode == "RGB"
    assert image.size == size
    for name, (column, row) in QUARTERS.items():
        place = (int((0.25 + column / 2) * size[0]), int((0.25 + row / 2) * size[1]))
        assert np.abs(np.subtract(image.getpixel(place), COLOURS[name])).max() < 25, name  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("name", SAVE)
def test_every_format(tmp_path: Path, name: str) -> None:
    save(tmp_path / name, quarters())
    assert [photo.gallery_id for photo in list_photos(tmp_path).photos] == [name]
    assert_upright(load_photo(tmp_path / name))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", [name for name in SAVE if SAVE[name]["format"] in CARRY_EXIF])
def test_every_orientation(tmp_path: Path, name: str, orientation: int) -> None:
    """The file holds the pixels as the sensor recorded them; an EXIF tag stores the orientation."""
    inverse = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    turned = quarters() if inverse is None else quarters().transpose(inverse)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for form in (exif, exif.tobytes()):  # in HEIC: EXIF alone, and with the container's rotation
        save(tmp_path / name, turned, exif=form)
        with (tmp_path / name).open("rb") as file:
            assert photo_size(file) == quarters().size
        assert_upright(load_photo(tmp_path / name))


def test_load_image_neither_rotates_nor_reads_other_formats(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    save(tmp_path / "a.jpg", quarters(), exif=exif)
    save(tmp_path / "a.HEIC", quarters())
    assert load_photo(tmp_path / "a.jpg").size == (64, 96)
    assert load_image(tmp_path / "a.jpg").size == (96, 64)
    with pytest.raises(InputError, match="not a JPEG, PNG, WebP or BMP image"):
        load_image(tmp_path / "a.HEIC")
    assert [image.path.name for image in list_gallery(tmp_path)] == ["a.jpg"]


def test_the_contents_decide_the_format_not_the_extension(tmp_path: Path) -> None:
    save(tmp_path / "a.HEIC", quarters()).rename(tmp_path / "phone.jpg")
    assert_upright(load_photo(tmp_path / "phone.jpg"))


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    layer = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    layer.putpixel((0, 0), (10, 20, 30, 255))
    layer.save(tmp_path / "a.png")
    layer.convert("LA").save(tmp_path / "b.png")
    palette = Image.new("P", (8, 8), 3)
    palette.save(tmp_path / "c.gif", transparency=3)
    for name in ("a.png", "b.png", "c.gif"):
        assert load_photo(tmp_path / name).getpixel((5, 5)) == (255, 255, 255), name
    assert load_photo(tmp_path / "a.png").getpixel((0, 0)) == (10, 20, 30)


def test_high_bit_depths_and_rare_modes(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (48, 1))
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(ramp).save(tmp_path / "float.tiff")
    Image.fromarray((ramp * 1_000_000).astype(np.int32)).save(tmp_path / "int.tiff")
    quarters().convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    for name in ("deep.png", "float.tiff", "int.tiff"):
        found = np.asarray(load_photo(tmp_path / name))[0, :, 0] / 255
        np.testing.assert_allclose(found, ramp[0], atol=0.01, err_msg=name)
    Image.new("F", (8, 8), 0.5).save(tmp_path / "flat.tiff")  # no range to scale by
    assert load_photo(tmp_path / "flat.tiff").getpixel((0, 0)) == (0, 0, 0)
    assert load_photo(tmp_path / "cmyk.jpg").mode == "RGB"


def test_small_photographs_have_the_pixels_of_load_image(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (MIN_SIDE, 1400, 3), dtype=np.uint8)
    for name in ("a.jpg", "a.png", "a.webp", "a.bmp"):
        save(tmp_path / name, Image.fromarray(noise))
        found, expected = load_photo(tmp_path / name), load_image(tmp_path / name)
        assert found.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("a.jpg", mode) for mode in ("RGB", "L", "CMYK")),
        *(("a.png", mode) for mode in ("RGB", "L", "P", "RGBA", "1")),
        *(("a.tiff", mode) for mode in ("RGB", "P")),
        *((name, "RGB") for name in ("a.mpo", "a.HEIC", "a.webp")),
    ],
)
def test_large_photographs_are_reduced(tmp_path: Path, name: str, mode: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    picture = quarters(2 * MIN_SIDE + 206, 2 * MIN_SIDE + 2).transpose(Image.Transpose.ROTATE_180)
    save(tmp_path / name, picture.convert(mode), exif=exif)
    found = load_photo(tmp_path / name)
    assert MIN_SIDE <= min(found.size) < 2 * MIN_SIDE
    if mode in ("RGB", "RGBA"):
        assert_upright(found, found.size)
    # The colours of the corner show that the last, partial tiles are decoded.
    expected = picture.convert(mode).convert("RGB")
    corner = np.asarray(expected.transpose(Image.Transpose.ROTATE_180))[:40, :40].mean((0, 1))
    assert np.abs(np.asarray(found)[:20, :20].mean((0, 1)) - corner).max() < 10


# ------------------------------------------------------------------------------------------ sizes


MEMORY = """
import re, sys
from pathlib import Path
import torch
from pab.core.devices import keep_freed_memory
from pab.data.photos import load_photo

def memory(line):
    return int(re.search(rf"{line}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

keep_freed_memory(torch.device("cpu"))  # as a scoring process does
load_photo(sys.argv[1])
held = memory("VmRSS")
image = load_photo(sys.argv[2])
assert min(image.size) >= 1024, image.size
print(memory("VmHWM") - held, memory("VmRSS") - held)
"""


def memory_of(path: Path) -> tuple[float, float]:
    """Return the peak memory of decoding a file, and the memory in use afterwards (MiB)."""
    small = save(path.parent / "a.png", quarters())
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(small), str(path)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""  # not even Pillow's warning about a large image
    peak, after = map(int, done.stdout.split())
    return peak / 1024, after / 1024


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("name", "least", "most"), [("big.png", 180, 280), ("big.tiff", 180, 280), ("big.jpg", 0, 40)]
)
def test_200_megapixels(tmp_path: Path, name: str, least: float, most: float) -> None:
    """A file is decoded once (here 1 byte per pixel); a JPEG is reduced during decoding."""
    Image.new("L", (16_320, 12_240)).save(tmp_path / name)
    peak, after = memory_of(tmp_path / name)
    assert least < peak < most
    assert after < 40


def test_the_limits_of_size(tmp_path: Path) -> None:
    header = bytearray(54)
    header[:2], header[10], header[14], header[26], header[28] = b"BM", 54, 40, 1, 24
    header[18:26] = np.array([20_000, 20_000], dtype="<i4").tobytes()
    (tmp_path / "bomb.bmp").write_bytes(header)
    assert MAX_PIXELS < 20_000**2
    with pytest.raises(InputError, match="at most 268 megapixels, found 20000 x 20000"):
        load_photo(tmp_path / "bomb.bmp")
    Image.new("L", (4 * MAX_RATIO + 1, 4)).save(tmp_path / "strip.png")
    with pytest.raises(InputError, match=f"ratio of at most {MAX_RATIO}, found 401 x 4"):
        load_photo(tmp_path / "strip.png")
    assert Image.MAX_IMAGE_PIXELS == LIMIT_OF_PILLOW  # unchanged for load_image


# ---------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", [name for name in SAVE if name != "lzw.tif"])
def test_errors_name_damaged_files(tmp_path: Path, name: str) -> None:
    """A file truncated or overwritten at random yields an image or an InputError, nothing else."""
    noise = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    whole = save(tmp_path / name, Image.fromarray(noise)).read_bytes()
    random = np.random.default_rng(2)
    refusals = []
    path = tmp_path / f"damaged{Path(name).suffix}"
    for trial in range(60):
        data = bytearray(whole)
        if trial % 2:
            del data[int(random.integers(len(data))) :]
        else:
            for place in random.integers(len(data), size=int(random.integers(1, 9))):
                data[place] = random.integers(256)
        path.write_bytes(data)
        try:
            load_photo(path)
        except InputError as error:
            refusals.append(str(error))
    assert refusals
    assert all(refusal.startswith(f"{path}: ") for refusal in refusals)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.HEIC", "a.tiff", "a.gif", "a.avif", "a.bmp"])
def test_a_file_cut_in_half_is_not_an_image(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    whole = save(tmp_path / name, Image.fromarray(noise)).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"{name}: cannot be read: "):
        load_photo(tmp_path / name)


def test_damaged_metadata_does_not_matter(tmp_path: Path) -> None:
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(range(200))
    save(tmp_path / "a.jpg", quarters(), exif=exif)
    assert_upright(load_photo(tmp_path / "a.jpg"))


# ---------------------------------------------------------------------------------------- folders


def test_names_are_relative_paths_with_extensions(tmp_path: Path) -> None:
    names = [
        "IMG 0001 (1).jpg", "Screenshot 2026-01-02 at 9.41.00\u202fAM.png", "[x]{y}.gif",
        "same.jpg", "same.png", "sub/deep er/same.jpg", "sub/é.webp", "sub/e\u0301.webp",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        quarters(8, 8).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "clip.MOV").touch()
    (tmp_path / "._same.jpg").touch()
    (tmp_path / ".cache").mkdir()
    quarters(8, 8).save(tmp_path / ".cache/hidden.jpg")
    found = list_photos(tmp_path, recursive=True)
    assert [photo.gallery_id for photo in found.photos] == sorted(names)
    assert all(photo.path == tmp_path / photo.gallery_id for photo in found.photos)
    assert not found.nested
    assert found.left_out() == "1 hidden image and 2 files with other extensions (.mov 1, .txt 1)"
    flat = list_photos(tmp_path)
    assert [photo.gallery_id for photo in flat.photos] == sorted(n for n in names if "/" not in n)
    assert flat.nested == {"sub": 2, "sub/deep er": 1}
    assert flat.nested.total() == 3


def test_links_are_followed_once(tmp_path: Path) -> None:
    inside, outside = tmp_path / "photos", tmp_path / "blobs"
    for path in (inside / "a.jpg", inside / "sub/b.jpg", outside / "c.jpg", outside / "d/e.jpg"):
        path.parent.mkdir(parents=True, exist_ok=True)
        quarters(8, 8).save(path)
    (outside / "0a1b2c").write_bytes((outside / "c.jpg").read_bytes())
    (inside / "from the hub.jpg").symlink_to("../blobs/0a1b2c")
    (inside / "sub/up").symlink_to("..")  # a cycle
    (inside / "album").symlink_to(outside)
    (inside / "album again").symlink_to(outside)
    (outside / "back").symlink_to(inside)  # a cycle through both folders
    (inside / "gone.jpg").symlink_to("nowhere.jpg")
    (inside / "self.jpg").symlink_to("self.jpg")
    found = list_photos(inside, recursive=True)
    assert [photo.gallery_id for photo in found.photos] == [
        "a.jpg", "album/c.jpg", "album/d/e.jpg", "from the hub.jpg", "sub/b.jpg",
    ]  # fmt: skip
    assert sorted(found.linked) == ["album again", "album/back", "sub/up"]
    assert found.unreadable.keys() == {"gone.jpg", "self.jpg"}
    assert all("a broken link" in problem for problem in found.unreadable.values())
    assert "to already searched folders" in found.left_out()


def test_entries_that_are_not_readable_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would block forever
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.jpg").mkdir()
    quarters(8, 8).save(tmp_path / "folder.jpg/in.gif")
    found = list_photos(tmp_path, recursive=True)
    assert found.unreadable == {"pipe.jpg": "not a regular file", "empty.png": "an empty file"}
    assert [photo.gallery_id for photo in found.photos] == ["folder.jpg/in.gif"]


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    quarters(8, 8).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", path)  # noqa: PTH104 - bytes
    (photo,) = list_photos(tmp_path).photos
    assert photo.gallery_id == r"caf\xe9.png"
    assert load_photo(photo.path).size == (8, 8)


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        list_photos(tmp_path / "missing")
    (tmp_path / "a.jpg").touch()
    with pytest.raises(InputError, match="found a file"):
        list_photos(tmp_path / "a.jpg")


def test_each_reader_collects_its_own_unreadable_files(tmp_path: Path) -> None:
    assert photo_reader().unreadable == {}
    assert photo_reader().unreadable is not photo_reader().unreadable
    assert photo_reader().cache_key


def test_the_extensions_of_all_formats_are_known() -> None:
    assert {Path(name).suffix.lower() for name in SAVE} <= PHOTO_ENDINGS
    assert all(ending == ending.lower() for ending in PHOTO_ENDINGS)
    assert pillow_heif.libheif_version()
