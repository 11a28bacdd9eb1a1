"""Embedded thumbnails, so that a page is a single file."""

from __future__ import annotations

import base64
import io

from PIL import Image


def data_url(image: Image.Image, side: int, quality: int) -> str:
    """Encode an RGB image as a JPEG thumbnail in a data URL; reduces the image in place.

    Args:
        image: the image.
        side: maximum length of the longer side, pixels.
        quality: JPEG quality, 1 to 95.
    """
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
