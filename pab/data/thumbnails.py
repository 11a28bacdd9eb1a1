"""Thumbnails inside a page, so that the page is one file."""

from __future__ import annotations

import base64
import io

from PIL import Image


def data_url(image: Image.Image, side: int, quality: int) -> str:
    """JPEG thumbnail of an RGB image as a data URL; the image is reduced in place.

    Args:
        image: the image.
        side: longer side at most, pixels.
        quality: of the JPEG, 1 to 95.
    """
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
