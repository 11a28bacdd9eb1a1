"""Encode thumbnails as data URLs, so that an HTML page is a single file."""

from __future__ import annotations

import base64
import io

from PIL import Image


def data_url(image: Image.Image, side: int, quality: int, form: str = "jpeg") -> str:
    """Encode an RGB image as a thumbnail in a data URL. The image is resized in place.

    Args:
        image: the image.
        side: maximum length of the longer side, pixels.
        quality: quality of the encoder, 1 to 95.
        form: jpeg or webp.
    """
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, form, quality=quality, optimize=True)
    return f"data:image/{form};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
