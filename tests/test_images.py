"""Images: preprocessing against Pillow, galleries, unreadable files, the loader."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pab.core.errors import InputError
from pab.data.image_loader import ImageLoader
from pab.data.images import list_gallery, load_image, recipe, verify_images
from pab.data.records import GalleryImage


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    for n, name in enumerate(("b.jpg", "a 1.PNG", "10.JPEG", "2.webp", "c.d.bmp")):
        noise(40 + n, 30, n).save(tmp_path / name)
    return tmp_path


# --------------------------------------------------------------------------------------- recipes

HALF = (0.5, 0.5, 0.5)
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
UIT = ((0.38901278, 0.3651612, 0.34836376), (0.24344306, 0.23738699, 0.23368555))


@pytest.mark.parametrize(
    ("name", "mean", "std"), [("beit3", HALF, HALF), ("blip2", *CLIP), ("uit", *UIT)]
)
def test_squashing_recipes_match_bicubic_resizing_in_pillow(
    name: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    image = noise(61, 47)
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    expected = ((pixels - mean) / std).transpose(2, 0, 1)
    found = recipe(name, 32).transform()(image)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("width", "height"), [(80, 50), (50, 80), (64, 64)])
def test_clip_recipe_crops_the_centre(width: int, height: int) -> None:
    image = noise(width, height)
    scale = 32 / min(width, height)
    resized = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 32) / 2), round((resized.height - 32) / 2)
    cut = resized.crop((left, top, left + 32, top + 32))
    expected = ((np.asarray(cut) / 255 - CLIP[0]) / CLIP[1]).transpose(2, 0, 1)
    np.testing.assert_allclose(recipe("clip", 32).transform()(image), expected, atol=1e-5)


def test_unknown_recipes_are_refused() -> None:
    with pytest.raises(InputError, match="expected beit3, clip, blip2 or uit, found 'beit'"):
        recipe("beit", 224)
    with pytest.raises(InputError, match="expected a positive number of pixels, found 0"):
        recipe("beit3", 0)


# --------------------------------------------------------------------------------------- gallery


def test_gallery_is_sorted_by_id(gallery: Path) -> None:
    (gallery / "notes.txt").touch()
    (gallery / ".hidden.jpg").touch()
    (gallery / "deeper").mkdir()
    found = list_gallery(gallery)
    assert [g.gallery_id for g in found] == ["10", "2", "a 1", "b", "c.d"]
    assert [g.path.name for g in found] == ["10.JPEG", "2.webp", "a 1.PNG", "b.jpg", "c.d.bmp"]


def test_bad_galleries_are_refused(gallery: Path, tmp_path: Path) -> None:
    noise(4, 4).save(gallery / "b.png")
    with pytest.raises(InputError, match=r"'b.jpg' and 'b.png'"):
        list_gallery(gallery)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(InputError, match=r"expected images .*found none"):
        list_gallery(tmp_path / "empty")
    with pytest.raises(InputError, match="no such folder"):
        list_gallery(tmp_path / "missing")
    with pytest.raises(InputError, match="found a file"):
        list_gallery(gallery / "b.jpg")


# ------------------------------------------------------------------------------------ bad images


def bad_images(folder: Path) -> dict[Path, str]:
    """Write unreadable files, and return path -> words of the expected error."""
    folder.mkdir(exist_ok=True)
    noise(64, 64).save(folder / "whole.jpg")
    noise(64, 64).save(folder / "whole.png")
    noise(8, 8).save(folder / "really.gif")
    jpeg, png = (folder / "whole.jpg").read_bytes(), (folder / "whole.png").read_bytes()
    (folder / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "cut.png").write_bytes(png[: len(png) // 2])
    (folder / "zero.png").touch()
    (folder / "text.jpg").write_text("not an image")
    (folder / "gif.jpg").write_bytes((folder / "really.gif").read_bytes())
    (folder / "folder.jpg").mkdir()
    huge = b"BM" + b"\0" * 8 + b"\x36\0\0\0\x28\0\0\0\0\0\1\0\0\0\1\0\1\0\x18\0" + b"\0" * 24
    (folder / "bomb.bmp").write_bytes(huge)  # a header that declares 65,536 x 65,536 pixels
    return {
        folder / "truncated.jpg": "truncated",
        folder / "cut.png": "truncated",
        folder / "zero.png": "an empty file",
        folder / "text.jpg": "not a JPEG, PNG, WebP or BMP image",
        folder / "gif.jpg": "not a JPEG, PNG, WebP or BMP image",
        folder / "folder.jpg": "a directory",
        folder / "missing.jpg": "no such file",
        folder / "bomb.bmp": "decompression bomb",
    }


def test_load_image_names_what_is_wrong(tmp_path: Path) -> None:
    for path, reason in bad_images(tmp_path / "bad").items():
        with pytest.raises(InputError, match=f"{path.name}: expected an image, found .*{reason}"):
            load_image(path)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_all_bad_images_are_listed_at_once(tmp_path: Path, num_workers: int) -> None:
    bad = bad_images(tmp_path / "bad")
    good = [tmp_path / "bad" / "whole.jpg", tmp_path / "bad" / "whole.png"]
    verify_images(good, num_workers)
    with pytest.raises(InputError) as caught:
        verify_images([*bad, *good], num_workers)
    message = str(caught.value)
    assert message.startswith("8 of 10 images: cannot be read: ")
    assert "\n" not in message
    for path, reason in bad.items():
        assert f"{path} (" in message
        assert reason in message.partition(f"{path} (")[2].partition(";")[0]
    assert "whole" not in message


def test_a_long_list_of_bad_images_is_shortened(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        verify_images([tmp_path / f"{n}.jpg" for n in range(50)])
    message = str(caught.value)
    assert message.startswith("50 of 50 images")
    assert message.count("no such file") == 20
    assert "and 30 more" in message


@pytest.mark.parametrize("form", ["JPEG", "progressive JPEG"])
def test_verifying_finds_what_loading_would_find(tmp_path: Path, form: str) -> None:
    """Verification decodes JPEGs at a smaller scale; it must reject what loading rejects."""
    whole, path = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    noise(90, 70).save(whole, progressive=form != "JPEG")
    data = whole.read_bytes()
    verdicts = set()
    for end in range(0, len(data) + 1, max(len(data) // 60, 1)):
        path.write_bytes(data[:end])
        readable = []
        for attempt in (lambda: load_image(path), lambda: verify_images([path])):
            try:
                attempt()
                readable.append(True)
            except InputError:
                readable.append(False)
        assert readable[0] == readable[1], f"cut at byte {end}"
        verdicts.add(readable[0])
    path.write_bytes(data)
    verify_images([path])
    assert False in verdicts


def test_orientation_tags_are_ignored_and_modes_become_rgb(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees to view
    noise(20, 10).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 10)
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        extension = "jpg" if mode == "CMYK" else "png"
        noise(20, 10).convert(mode).save(tmp_path / f"{mode}.{extension}")
        assert load_image(tmp_path / f"{mode}.{extension}").mode == "RGB"
        verify_images([tmp_path / f"{mode}.{extension}"])


# ---------------------------------------------------------------------------------------- loader


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_loader_keeps_the_order(gallery: Path, num_workers: int, batch_size: int) -> None:
    images = list_gallery(gallery)
    loader = ImageLoader(images, recipe("beit3", 16), batch_size, num_workers)
    batches = list(loader)
    assert len(batches) == len(loader) == -(-len(images) // batch_size)
    assert [p for batch in batches for p in batch.positions] == list(range(len(images)))
    transform = recipe("beit3", 16).transform()
    expected = torch.stack([transform(load_image(image.path)) for image in images])
    pixels = torch.cat([batch.pixels for batch in batches])
    assert pixels.dtype == torch.uint8
    assert loader.normalization is not None
    assert torch.equal(loader.normalization.on(torch.device("cpu"))(pixels), expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_disappears_later_is_an_input_error(gallery: Path, num_workers: int) -> None:
    images = [*list_gallery(gallery), GalleryImage("gone", gallery / "gone.jpg")]
    with pytest.raises(InputError, match=r"gone.jpg: expected an image, found no such file"):
        list(ImageLoader(images, recipe("beit3", 16).transform(), 4, num_workers))


def test_listing_and_verifying_need_no_torch() -> None:
    code = "import sys, pab.data.images, pab.data.annotations, pab.layout.check; "
    code += "import pab.data.training_set, pab.data.splits; "
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'torchvision')))"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_commands_print_no_warnings_of_pillow(tmp_path: Path) -> None:
    path = tmp_path / "palette.png"
    Image.new("P", (8, 6)).save(path, transparency=bytes(range(256)))
    code = (
        "from pab.core.errors import run_cli\n"
        "from pab.data.images import load_image\n"
        f"run_cli(lambda _: print(load_image({str(path)!r}).size))"
    )
    words = [sys.executable, "-W", "default", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("(8, 6)\n", "")


def test_an_image_that_cannot_be_resized_is_named(tmp_path: Path) -> None:
    noise(8, 6).save(tmp_path / "a.png")

    def resize(image: Image.Image) -> torch.Tensor:
        raise MemoryError

    (image,) = list_gallery(tmp_path)
    with pytest.raises(InputError, match=r"a\.png: expected an image .* in memory, found 8 x 6"):
        list(ImageLoader([image], resize, 1))
