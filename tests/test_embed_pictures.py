"""Decoded gallery images for vision-language models: order, keys, errors, no EXIF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pab.core.errors import InputError
from pab.data.image_loader import ImageBatch
from pab.data.images import ImageReader, list_gallery, load_image
from pab.data.records import GalleryImage
from pab.encoders.st.pictures import PictureLoader
from pab.scoring.batches import refilled

ORIENTATION = 0x0112  # EXIF tag; 6: the camera was turned by 90 degrees


def write_image(path: Path, width: int, height: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(pixels).save(path, exif=exif)


@pytest.fixture
def gallery(tmp_path: Path) -> list[GalleryImage]:
    for number in range(7):
        write_image(tmp_path / f"{number}.png", 20 + number, 10, number)
    return list_gallery(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_arrive_decoded_in_order_without_exif(
    gallery: list[GalleryImage], workers: int
) -> None:
    loader = PictureLoader(gallery, 3, workers)
    assert len(loader) == 3
    batches = list(loader)
    assert [batch.positions for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [batch.keys for batch in batches] == [[]] * 3
    for batch in batches:
        for position, image in zip(batch.positions, batch.pixels, strict=True):
            source = load_image(gallery[position].path)
            assert source.getexif()[ORIENTATION] == 6
            assert not image.getexif()
            assert image.mode == "RGB"
            assert np.array_equal(np.asarray(image), np.asarray(source))


def test_known_images_are_hashed_but_not_decoded(gallery: list[GalleryImage]) -> None:
    keys = [key for batch in PictureLoader(gallery, 2, known=frozenset()) for key in batch.keys]
    assert len(set(keys)) == 7
    found = list(PictureLoader(gallery, 2, 2, known=frozenset(keys[1:6])))
    known = {place: key for batch in found for place, key in batch.known.items()}
    assert known == dict(enumerate(keys[1:6], start=1))
    assert [place for batch in found for place in batch.positions] == [0, 6]
    merged: list[ImageBatch[list[Image.Image]]] = list(refilled(found, 2))
    assert [(batch.positions, batch.keys) for batch in merged] == [([0, 6], [keys[0], keys[6]])]
    assert [image.size for image in merged[0].pixels] == [(20, 10), (26, 10)]


def test_unreadable_images_are_collected_or_refused(gallery: list[GalleryImage]) -> None:
    gallery[4].path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"4\.png: expected an image"):
        list(PictureLoader(gallery, 3, 2))
    reader = ImageReader(unreadable={})
    batches = list(PictureLoader(gallery, 3, reader=reader))
    assert [batch.positions for batch in batches] == [[0, 1, 2], [3, 5], [6]]
    assert list(batches[1].errors) == [4]
    assert reader.unreadable is not None
    assert list(reader.unreadable) == ["4"]
