"""A drawing surface whose coordinates are fractions of the picture's side, y pointing down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from pab.mini.settings import IMAGE_SIZE, SUPERSAMPLE

Point = tuple[float, float]
Colour = tuple[int, int, int]


def shade(colour: Colour, factor: float) -> Colour:
    """Darken the colour (factor < 1) or lighten it towards white (factor > 1)."""
    if factor <= 1:
        return (int(colour[0] * factor), int(colour[1] * factor), int(colour[2] * factor))
    return mix(colour, (255, 255, 255), factor - 1)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Mix ``share`` of ``second`` into ``first``."""
    keep = 1 - share
    return (
        int(first[0] * keep + second[0] * share),
        int(first[1] * keep + second[1] * share),
        int(first[2] * keep + second[2] * share),
    )


@lru_cache(maxsize=64)
def _ellipse_mask(width: int, height: int, strength: int) -> Image.Image:
    """Return the mask of an ellipse that fades towards its rim."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return Image.fromarray((np.clip(1.2 - np.hypot(x, y) * 1.2, 0, 1) * strength).astype(np.uint8))


class Canvas:
    """An RGB picture of ``IMAGE_SIZE * SUPERSAMPLE`` pixels per side."""

    def __init__(self, image: Image.Image | None = None) -> None:
        self.side = IMAGE_SIZE * SUPERSAMPLE
        self.image = image or Image.new("RGB", (self.side, self.side))
        self._draw = ImageDraw.Draw(self.image)

    def copy(self) -> Canvas:
        return Canvas(self.image.copy())

    def finished(self) -> Image.Image:
        """Return the picture at its final size."""
        return self.image.reduce(SUPERSAMPLE)

    def rect(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        s = self.side
        if x0 > x1:
            x0, x1 = x1, x0
        if y1 > y0:
            self._draw.rectangle((x0 * s, y0 * s, x1 * s, y1 * s), fill=fill)

    def rounded(
        self, x0: float, y0: float, x1: float, y1: float, radius: float, fill: Colour
    ) -> None:
        s = self.side
        if x0 > x1:
            x0, x1 = x1, x0
        box = (x0 * s, y0 * s, x1 * s, y1 * s)
        self._draw.rounded_rectangle(box, radius=radius * s, fill=fill)

    def poly(self, points: Sequence[Point], fill: Colour) -> None:
        s = self.side
        self._draw.polygon([(x * s, y * s) for x, y in points], fill=fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        s = self.side
        self._draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=fill)

    def circle(self, centre: Point, radius: float, fill: Colour) -> None:
        self.ellipse(centre[0], centre[1], radius, radius, fill)

    def ring(self, centre: Point, radius: float, width: float, fill: Colour) -> None:
        s, (x, y) = self.side, centre
        box = ((x - radius) * s, (y - radius) * s, (x + radius) * s, (y + radius) * s)
        self._draw.ellipse(box, outline=fill, width=max(1, round(width * s)))

    def line(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        s = self.side
        pixels = [(x * s, y * s) for x, y in points]
        self._draw.line(pixels, fill=fill, width=max(1, round(width * s)), joint="curve")

    def limb(self, p: Point, q: Point, width_p: float, width_q: float, fill: Colour) -> None:
        """Draw a tapering stroke with round ends."""
        dx, dy = q[0] - p[0], q[1] - p[1]
        length = math.hypot(dx, dy) or 1e-6
        nx, ny = -dy / length / 2, dx / length / 2
        self.poly(
            (
                (p[0] + nx * width_p, p[1] + ny * width_p),
                (q[0] + nx * width_q, q[1] + ny * width_q),
                (q[0] - nx * width_q, q[1] - ny * width_q),
                (p[0] - nx * width_p, p[1] - ny * width_p),
            ),
            fill,
        )
        self.circle(p, width_p / 2, fill)
        self.circle(q, width_q / 2, fill)

    def gradient(self, y0: float, y1: float, top: Colour, bottom: Colour) -> None:
        """Fill a band of full width with a gradient from ``top`` to ``bottom``."""
        first, last = round(y0 * self.side), round(y1 * self.side)
        if last <= first:
            return
        ramp = np.linspace(top, bottom, last - first).round().astype(np.uint8)[:, None, :]
        band = Image.fromarray(np.ascontiguousarray(ramp)).resize((self.side, last - first), 0)
        self.image.paste(band, (0, first))

    def soft_ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: Colour, strength: int
    ) -> None:
        """Draw a blurred ellipse, ``strength`` of 255 at its centre, as a shadow or glow."""
        s = self.side
        width, height = max(2, round(rx * s / 4) * 8), max(2, round(ry * s / 4) * 8)
        mask = _ellipse_mask(width, height, strength)
        self.image.paste(fill, (round(x * s - width / 2), round(y * s - height / 2)), mask)
