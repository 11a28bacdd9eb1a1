"""Backgrounds: one drawing function per scene class, with details set by a numbered layout.

A layout (:func:`draw_background`'s ``layout``) moves and recolours the parts of a scene while the
class stays recognisable; the test split uses layouts that training never shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pab.mini.canvas import Canvas, Colour, mix, shade

SKIES: dict[str, tuple[Colour, Colour]] = {
    "morning": ((128, 190, 235), (255, 226, 178)),
    "noon": ((64, 148, 232), (186, 222, 248)),
    "dusk": ((92, 62, 132), (255, 148, 78)),
    "night": ((34, 40, 92), (84, 92, 150)),
}
GREY_SKY: tuple[Colour, Colour] = ((132, 142, 154), (190, 196, 202))
LAYOUT_STREAM = 7_000_003  # keeps the layouts' random streams apart from those of the scenes


@dataclass(frozen=True, slots=True)
class View:
    """Input of a background function: canvas, random stream of the layout, horizon, time of day."""

    c: Canvas
    rng: np.random.Generator
    horizon: float
    time: str
    weather: str

    def vary(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def pick(self, *options: Colour) -> Colour:
        """Draw one of the colours and vary its shade slightly."""
        colour = options[int(self.rng.integers(len(options)))]
        return shade(colour, self.vary(0.88, 1.12))


def _sky(v: View) -> None:
    top, low = SKIES[v.time]
    if v.weather != "clear":
        top, low = mix(top, GREY_SKY[0], 0.75), mix(low, GREY_SKY[1], 0.75)
    v.c.gradient(0, v.horizon + 0.02, top, low)
    if v.weather != "clear":
        return
    x, y = v.vary(0.12, 0.88), v.vary(0.07, 0.16)
    if v.time == "night":
        v.c.circle((x, y), 0.042, (250, 246, 220))
        for _ in range(14):
            v.c.circle((v.vary(0, 1), v.vary(0, v.horizon * 0.8)), 0.004, (255, 255, 240))
    elif v.time == "dusk":
        v.c.circle((x, v.horizon - 0.07), 0.075, (255, 206, 110))
    else:
        v.c.circle((x, y if v.time == "noon" else v.horizon * 0.62), 0.055, (255, 248, 196))
        for _ in range(3):
            cx, cy = v.vary(0.05, 0.95), v.vary(0.06, max(0.08, v.horizon * 0.5))
            for dx, r in ((-0.06, 0.026), (0.0, 0.040), (0.06, 0.028)):
                v.c.ellipse(cx + dx, cy, r * 1.5, r, (250, 252, 255))


def _ground(v: View, top: Colour, bottom: Colour) -> None:
    v.c.gradient(v.horizon, 1.0, top, bottom)


def _speckle(v: View, fill: Colour, count: int, size: float) -> None:
    """Draw small strokes on the ground, larger towards the viewer."""
    for _ in range(count):
        depth = float(v.rng.random()) ** 0.7
        x, y = float(v.rng.random()), v.horizon + 0.02 + (0.98 - v.horizon) * depth
        r = size * (0.35 + depth)
        v.c.ellipse(x, y, r * 1.8, r * 0.5, fill)


def _trees(v: View, count: int, scale: float = 0.2) -> None:
    for i in range(count):
        x, s = (i + v.vary(0.1, 0.9)) / count, scale * v.vary(0.8, 1.3)
        green = v.pick((46, 108, 54), (66, 128, 58), (36, 92, 62))
        base = v.horizon + 0.02
        v.c.limb((x, base), (x, base - s * 0.7), s * 0.16, s * 0.10, (92, 64, 42))
        v.c.circle((x - s * 0.24, base - s * 0.85), s * 0.34, shade(green, 0.8))
        v.c.circle((x + s * 0.24, base - s * 0.82), s * 0.32, shade(green, 0.9))
        v.c.circle((x, base - s * 1.12), s * 0.38, green)


def _buildings(v: View, count: int, low: float, high: float) -> None:
    lit: Colour = (255, 226, 140) if v.time in ("dusk", "night") else (196, 220, 234)
    left = -0.02
    while left < 1.0:
        width = v.vary(0.8, 1.3) / count
        top = v.horizon - v.vary(low, high)
        wall = v.pick(
            (178, 104, 82), (204, 186, 150), (150, 158, 170), (196, 150, 120), (120, 128, 140)
        )
        v.c.rect(left, top, left + width, v.horizon + 0.01, wall)
        v.c.rect(left, top, left + width, top + 0.018, shade(wall, 0.7))
        step, y = width / 4.2, top + 0.045
        while y < v.horizon - 0.05:
            for i in range(3):
                x = left + step * (i + 0.75)
                v.c.rect(x, y, x + step * 0.6, y + 0.04, lit)
            y += 0.075
        left += width


def _windows(v: View, count: int, top: float, bottom: float) -> None:
    """Draw windows in a wall, with the sky of the time of day behind them."""
    high, low = SKIES[v.time]
    for i in range(count):
        width = 0.62 / count
        x = (i + 0.5) / count - width / 2 + v.vary(-0.04, 0.04)
        v.c.rect(x - 0.012, top - 0.012, x + width + 0.012, bottom + 0.012, (240, 240, 238))
        v.c.rect(x, top, x + width, bottom, mix(high, low, 0.5))
        v.c.rect(x, (top + bottom) / 2, x + width, bottom, low)
        v.c.rect(x + width / 2 - 0.006, top, x + width / 2 + 0.006, bottom, (240, 240, 238))


def _planks(v: View, colour: Colour, rows: int = 7) -> None:
    _ground(v, shade(colour, 0.86), colour)
    for i in range(-rows, rows + 1):
        bottom = 0.5 + i * 0.16
        top = 0.5 + i * 0.07
        v.c.line([(top, v.horizon), (bottom, 1.0)], 0.005, shade(colour, 0.72))


def _tiles(v: View, colour: Colour, grout: Colour) -> None:
    _planks(v, colour)
    y, step = v.horizon, 0.022
    while y < 1.0:
        v.c.line([(0, y), (1, y)], 0.005, grout)
        y += step
        step *= 1.42


def _wall(v: View, colour: Colour, skirting: Colour) -> None:
    v.c.gradient(0, v.horizon, shade(colour, 0.94), colour)
    v.c.rect(0, v.horizon - 0.022, 1, v.horizon, skirting)


def road(v: View) -> None:
    _sky(v)
    _buildings(v, 4 + int(v.rng.integers(3)), 0.10, 0.36)
    kerb = v.horizon + 0.09
    v.c.gradient(v.horizon, kerb, (170, 168, 164), (188, 186, 182))
    tar = v.pick((74, 76, 82), (88, 90, 94))
    v.c.gradient(kerb, 1.0, tar, shade(tar, 0.85))
    v.c.rect(0, kerb, 1, kerb + 0.016, (214, 212, 206))
    y = kerb + (1 - kerb) * v.vary(0.40, 0.55)
    offset = v.vary(0, 0.2)
    for i in range(-1, 6):
        x = i * 0.25 + offset
        v.c.poly(
            [(x, y), (x + 0.14, y), (x + 0.125, y + 0.03), (x - 0.02, y + 0.03)], (238, 234, 214)
        )


def park(v: View) -> None:
    _sky(v)
    _trees(v, 6 + int(v.rng.integers(4)), 0.24)
    grass = v.pick((104, 168, 76), (88, 152, 70), (122, 176, 84))
    _ground(v, grass, shade(grass, 0.82))
    bend = v.vary(-0.3, 0.3)
    path = v.pick((214, 194, 152), (198, 186, 166))
    v.c.poly(
        [
            (0.47 + bend, v.horizon + 0.02),
            (0.56 + bend, v.horizon + 0.02),
            (1.02 - bend, 1.0),
            (0.22 - bend, 1.0),
        ],
        path,
    )
    _speckle(v, shade(grass, 0.75), 50, 0.010)


def beach(v: View) -> None:
    _sky(v)
    sea = v.pick((42, 140, 184), (30, 118, 168), (60, 160, 190))
    shore = v.horizon + 0.16
    v.c.gradient(v.horizon, shore, shade(sea, 0.85), sea)
    for _ in range(8):
        y, x = v.vary(v.horizon + 0.01, shore - 0.02), v.vary(0, 0.9)
        v.c.line([(x, y), (x + 0.10, y)], 0.006, shade(sea, 1.45))
    sand = v.pick((238, 214, 160), (228, 200, 148))
    v.c.gradient(shore, 1.0, sand, shade(sand, 0.9))
    phase = v.vary(0, 6)
    edge = [(i / 12, shore + 0.012 * math.sin(i * 1.3 + phase)) for i in range(13)]
    v.c.line(edge, 0.026, (250, 252, 250))
    _speckle(v, shade(sand, 0.82), 40, 0.007)


def construction(v: View) -> None:
    _sky(v)
    beam = v.pick((196, 110, 54), (176, 92, 60), (150, 154, 160))
    top = v.horizon - v.vary(0.30, 0.42)
    for i in range(6):
        x = i * 0.2 + v.vary(-0.02, 0.02)
        v.c.rect(x - 0.010, top, x + 0.010, v.horizon, beam)
    for i in range(4):
        y = top + i * (v.horizon - top) / 3.6
        v.c.rect(0, y - 0.009, 1, y + 0.009, shade(beam, 0.8))
    crane = v.vary(0.1, 0.9)
    v.c.line([(crane, v.horizon), (crane, 0.03)], 0.014, (240, 190, 40))
    v.c.line([(crane - 0.32, 0.05), (crane + 0.32, 0.05)], 0.014, (240, 190, 40))
    dirt = v.pick((172, 132, 92), (158, 122, 90))
    _ground(v, dirt, shade(dirt, 0.82))
    for i in range(12):
        x = i / 11
        v.c.rect(x - 0.045, v.horizon - 0.055, x + 0.0, v.horizon + 0.015, (240, 150, 40))
        v.c.rect(x - 0.0, v.horizon - 0.055, x + 0.046, v.horizon + 0.015, (246, 246, 240))
    _speckle(v, shade(dirt, 0.7), 45, 0.011)


def station(v: View) -> None:
    _sky(v)
    train = v.pick((196, 52, 50), (42, 96, 168), (60, 140, 96), (226, 186, 60))
    top = v.horizon - 0.27
    v.c.rect(0, v.horizon - 0.02, 1, v.horizon + 0.06, (96, 92, 88))
    v.c.rounded(v.vary(-0.3, 0.0), top, v.vary(1.0, 1.3), v.horizon + 0.01, 0.03, (232, 234, 236))
    v.c.rect(0, v.horizon - 0.10, 1, v.horizon - 0.02, train)
    v.c.rect(0, top + 0.05, 1, top + 0.14, (70, 84, 100))
    gap = v.vary(0, 0.2)
    for i in range(6):
        x = i * 0.2 + gap
        v.c.rect(x - 0.016, top + 0.03, x + 0.016, v.horizon - 0.02, (232, 234, 236))
    v.c.rect(0, 0, 1, 0.07, (94, 102, 112))
    v.c.rect(0, 0.07, 1, 0.085, (66, 72, 80))
    floor = v.pick((186, 184, 180), (168, 170, 174))
    v.c.gradient(v.horizon + 0.06, 1, floor, shade(floor, 0.88))
    v.c.rect(0, v.horizon + 0.075, 1, v.horizon + 0.105, (244, 206, 56))


def stairs(v: View) -> None:
    """Draw wide outdoor stairs that rise to the right, with steps at :func:`stair_height`."""
    _sky(v)
    _buildings(v, 4, 0.05, 0.25)
    stone = v.pick((186, 178, 166), (170, 170, 172), (198, 182, 156))
    _ground(v, shade(stone, 0.8), shade(stone, 0.7))
    for i in range(STEPS):
        x = i / STEPS
        y = stair_height(x + 0.5 / STEPS)
        v.c.rect(x, y, 1.0, 1.0, shade(stone, 0.93 if i % 2 else 1.0))
        v.c.rect(x, y, x + 0.012, 1.0, shade(stone, 0.62))
        v.c.rect(x, y, x + 1.0 / STEPS, y + 0.014, shade(stone, 1.5))
    rail = v.pick((70, 74, 82), (120, 62, 46))
    v.c.line([(0.0, stair_height(0) - 0.20), (1.0, stair_height(1) - 0.20)], 0.014, rail)
    for i in range(6):
        x = i / 5
        v.c.line([(x, stair_height(x) - 0.20), (x, stair_height(x))], 0.010, rail)


STEPS = 8


def stair_height(x: float) -> float:
    """Return the y of the stairs' surface at ``x``."""
    step = min(STEPS - 1, max(0, int(x * STEPS)))
    return 0.94 - 0.42 * step / (STEPS - 1)


def snowfield(v: View) -> None:
    _sky(v)
    for _ in range(3):
        x, w, h = v.vary(-0.1, 1.1), v.vary(0.25, 0.45), v.vary(0.12, 0.26)
        rock = v.pick((140, 152, 176), (120, 134, 160))
        v.c.poly([(x - w, v.horizon), (x, v.horizon - h), (x + w, v.horizon)], rock)
        v.c.poly(
            [
                (x - w * 0.4, v.horizon - h * 0.6),
                (x, v.horizon - h),
                (x + w * 0.4, v.horizon - h * 0.6),
                (x, v.horizon - h * 0.5),
            ],
            (248, 250, 255),
        )
    _ground(v, (226, 234, 246), (246, 248, 252))
    for i in range(5):
        x, s = v.vary(0, 1), v.vary(0.07, 0.12)
        base = v.horizon + 0.02 + 0.01 * i
        for level in range(3):
            y = base - s * (0.2 + level * 0.55)
            v.c.poly(
                [
                    (x - s * (0.6 - level * 0.13), y),
                    (x, y - s * 0.9),
                    (x + s * (0.6 - level * 0.13), y),
                ],
                (38, 84, 66),
            )
    _speckle(v, (204, 216, 234), 40, 0.014)


def forest(v: View) -> None:
    v.c.gradient(0, v.horizon + 0.02, (40, 78, 52), (96, 138, 84))
    for layer in range(3):
        for _ in range(9 - layer):
            x, w = v.vary(-0.02, 1.02), 0.014 + 0.013 * layer
            bark = mix((70, 74, 56), (94, 66, 44), layer / 2)
            v.c.limb(
                (x, -0.02),
                (x + v.vary(-0.02, 0.02), v.horizon + 0.03 + 0.025 * layer),
                w,
                w * 1.5,
                bark,
            )
    for _ in range(12):
        v.c.circle(
            (v.vary(0, 1), v.vary(-0.04, 0.10)),
            v.vary(0.06, 0.11),
            v.pick((44, 100, 50), (60, 120, 56)),
        )
    floor = v.pick((116, 98, 60), (98, 104, 58), (128, 92, 56))
    _ground(v, shade(floor, 0.9), floor)
    _speckle(v, (176, 112, 48), 40, 0.011)
    _speckle(v, (70, 110, 48), 40, 0.011)


def rink(v: View) -> None:
    _sky(v)
    _trees(v, 5, 0.16)
    board = v.pick((206, 58, 58), (48, 96, 178), (240, 196, 60))
    ice = v.pick((206, 230, 242), (192, 222, 238))
    _ground(v, ice, shade(ice, 1.4))
    v.c.rect(0, v.horizon - 0.05, 1, v.horizon + 0.045, (246, 248, 250))
    v.c.rect(0, v.horizon + 0.02, 1, v.horizon + 0.050, board)
    for i in range(9):
        v.c.rect(i / 8 - 0.004, v.horizon - 0.05, i / 8 + 0.004, v.horizon + 0.03, (190, 196, 204))
    for _ in range(9):
        x, y = v.vary(-0.1, 0.9), v.vary(v.horizon + 0.1, 1)
        v.c.line([(x, y), (x + v.vary(0.1, 0.35), y + v.vary(-0.03, 0.03))], 0.005, (166, 196, 216))


def parking(v: View) -> None:
    _sky(v)
    _trees(v, 5, 0.13)
    tar = v.pick((104, 106, 112), (120, 120, 122))
    _ground(v, tar, shade(tar, 0.84))
    colours: tuple[Colour, ...] = (
        (150, 154, 160),
        (96, 104, 116),
        (186, 180, 170),
        (120, 110, 104),
    )
    shift = v.vary(0, 0.15)
    for i in range(4):
        x = i * 0.27 + shift
        body = colours[int(v.rng.integers(4))]
        v.c.rounded(x - 0.085, v.horizon - 0.075, x + 0.085, v.horizon + 0.022, 0.02, body)
        v.c.rounded(x - 0.06, v.horizon - 0.07, x + 0.06, v.horizon - 0.03, 0.012, (60, 74, 88))
        v.c.rect(x - 0.07, v.horizon + 0.018, x - 0.045, v.horizon + 0.035, (26, 26, 28))
        v.c.rect(x + 0.045, v.horizon + 0.018, x + 0.07, v.horizon + 0.035, (26, 26, 28))
    for i in range(-2, 8):
        top, low = i * 0.27 - 0.135 + shift, (i * 0.27 - 0.635 + shift) * 1.9 + 0.5
        v.c.line([(top, v.horizon + 0.05), (low, 1.0)], 0.013, (244, 244, 238))


def playground(v: View) -> None:
    _sky(v)
    _trees(v, 6, 0.18)
    floor = v.pick((214, 150, 96), (196, 128, 92), (204, 166, 110))
    grass: Colour = (112, 170, 84)
    v.c.gradient(v.horizon, v.horizon + 0.07, grass, shade(grass, 0.9))
    v.c.gradient(v.horizon + 0.07, 1.0, floor, shade(floor, 0.88))
    bar, x = v.pick((214, 60, 56), (52, 110, 196), (80, 160, 90)), v.vary(0.15, 0.85)
    top, base = v.horizon - 0.20, v.horizon + 0.07
    v.c.line([(x - 0.20, base), (x - 0.14, top), (x + 0.14, top), (x + 0.20, base)], 0.018, bar)
    v.c.line([(x - 0.08, base), (x - 0.14, top)], 0.018, bar)
    v.c.line([(x + 0.08, base), (x + 0.14, top)], 0.018, bar)
    for seat in (-0.055, 0.055):
        v.c.line([(x + seat - 0.022, top), (x + seat - 0.022, base - 0.045)], 0.005, (70, 70, 74))
        v.c.line([(x + seat + 0.022, top), (x + seat + 0.022, base - 0.045)], 0.005, (70, 70, 74))
        v.c.rect(x + seat - 0.034, base - 0.055, x + seat + 0.034, base - 0.038, (245, 206, 70))
    _speckle(v, shade(floor, 0.84), 30, 0.012)


def field(v: View) -> None:
    _sky(v)
    crop = v.pick((222, 186, 84), (206, 172, 78), (188, 180, 84))
    for _ in range(3):
        v.c.ellipse(
            v.vary(0, 1),
            v.horizon + 0.03,
            v.vary(0.25, 0.5),
            v.vary(0.06, 0.13),
            v.pick((110, 152, 86), (90, 132, 84)),
        )
    barn = v.vary(0.1, 0.9)
    v.c.rect(barn - 0.07, v.horizon - 0.08, barn + 0.07, v.horizon + 0.02, (164, 56, 48))
    v.c.poly(
        [
            (barn - 0.085, v.horizon - 0.075),
            (barn, v.horizon - 0.135),
            (barn + 0.085, v.horizon - 0.075),
        ],
        (96, 60, 52),
    )
    _ground(v, crop, shade(crop, 0.85))
    for i in range(-9, 10):
        v.c.line(
            [(0.5 + i * 0.08, v.horizon + 0.02), (0.5 + i * 0.30, 1.0)], 0.012, shade(crop, 0.78)
        )


def bridge(v: View) -> None:
    _sky(v)
    water = v.pick((74, 136, 168), (90, 142, 156))
    v.c.gradient(v.horizon - 0.06, v.horizon + 0.10, shade(water, 0.9), water)
    v.c.ellipse(v.vary(0.1, 0.9), v.horizon - 0.055, 0.5, 0.05, (92, 134, 96))
    deck = v.pick((176, 128, 84), (156, 116, 84), (168, 164, 158))
    v.c.gradient(v.horizon + 0.09, 1.0, deck, shade(deck, 0.85))
    step, y = 0.03, v.horizon + 0.11
    while y < 1:
        v.c.line([(0, y), (1, y)], 0.007, shade(deck, 0.72))
        y += step
        step *= 1.3
    rail = v.pick((196, 62, 48), (62, 66, 74), (236, 236, 232))
    for i in range(11):
        x = i / 10
        v.c.rect(x - 0.008, v.horizon - 0.09, x + 0.008, v.horizon + 0.11, rail)
    v.c.rect(0, v.horizon - 0.10, 1, v.horizon - 0.075, rail)
    v.c.rect(0, v.horizon + 0.01, 1, v.horizon + 0.028, rail)
    for i in range(10):
        v.c.line([(i / 10, v.horizon + 0.02), ((i + 1) / 10, v.horizon - 0.085)], 0.007, rail)


def office(v: View) -> None:
    _wall(v, v.pick((214, 222, 230), (226, 222, 212), (200, 212, 214)), (120, 126, 134))
    _windows(v, 3, 0.08, 0.30)
    carpet = v.pick((106, 124, 148), (124, 126, 132), (98, 128, 126))
    _ground(v, shade(carpet, 0.9), carpet)
    desk = v.vary(0.0, 0.6)
    base = v.horizon + 0.12
    for x in (desk, desk + 0.42):
        v.c.rect(x, v.horizon - 0.05, x + 0.36, v.horizon - 0.025, (206, 170, 122))
        v.c.rect(x + 0.01, v.horizon - 0.03, x + 0.03, base, (110, 112, 118))
        v.c.rect(x + 0.33, v.horizon - 0.03, x + 0.35, base, (110, 112, 118))
        v.c.rect(x + 0.11, v.horizon - 0.19, x + 0.27, v.horizon - 0.08, (34, 36, 42))
        v.c.rect(x + 0.12, v.horizon - 0.18, x + 0.26, v.horizon - 0.09, (110, 176, 222))
        v.c.rect(x + 0.18, v.horizon - 0.08, x + 0.20, v.horizon - 0.05, (34, 36, 42))


def kitchen(v: View) -> None:
    tile = v.pick((236, 232, 220), (222, 234, 232), (240, 226, 206))
    _wall(v, tile, shade(tile, 0.7))
    for i in range(14):
        v.c.line([(i / 13, 0), (i / 13, v.horizon)], 0.004, shade(tile, 0.88))
        v.c.line([(0, i * 0.06), (1, i * 0.06)], 0.004, shade(tile, 0.88))
    wood = v.pick((178, 122, 74), (226, 224, 218), (110, 150, 150), (150, 90, 60))
    v.c.rect(0, 0, 1, 0.15, wood)
    v.c.rect(0, v.horizon - 0.20, 1, v.horizon + 0.015, wood)
    v.c.rect(0, v.horizon - 0.225, 1, v.horizon - 0.19, (92, 94, 100))
    for i in range(7):
        x = i / 6
        v.c.line([(x, 0), (x, 0.15)], 0.006, shade(wood, 0.65))
        v.c.line([(x, v.horizon - 0.19), (x, v.horizon)], 0.006, shade(wood, 0.65))
        v.c.rect(x + 0.06, v.horizon - 0.17, x + 0.11, v.horizon - 0.155, (220, 220, 222))
    stove = v.vary(0.1, 0.75)
    v.c.rect(stove, v.horizon - 0.20, stove + 0.17, v.horizon + 0.01, (206, 208, 212))
    v.c.rect(stove + 0.02, v.horizon - 0.12, stove + 0.15, v.horizon - 0.02, (40, 42, 46))
    v.c.rounded(
        stove + 0.05, v.horizon - 0.275, stove + 0.13, v.horizon - 0.225, 0.01, (190, 60, 50)
    )
    _tiles(v, v.pick((222, 214, 198), (206, 190, 170), (196, 204, 208)), (160, 152, 140))


def gym(v: View) -> None:
    _wall(v, v.pick((226, 206, 168), (204, 214, 222), (214, 196, 176)), (120, 84, 50))
    for i in range(4):
        x = i * 0.27 + v.vary(0.02, 0.08)
        for rung in range(7):
            v.c.rect(x, 0.12 + rung * 0.05, x + 0.12, 0.135 + rung * 0.05, (172, 112, 60))
        v.c.rect(x - 0.008, 0.10, x + 0.006, v.horizon - 0.02, (132, 84, 44))
        v.c.rect(x + 0.114, 0.10, x + 0.128, v.horizon - 0.02, (132, 84, 44))
    floor = v.pick((214, 156, 90), (200, 142, 84))
    _planks(v, floor)
    line = v.pick((206, 52, 46), (44, 92, 176), (246, 246, 240))
    y = v.horizon + v.vary(0.10, 0.22)
    v.c.line([(0, y), (1, y)], 0.013, line)
    v.c.line([(v.vary(0.2, 0.8), y), (v.vary(0.0, 1.0), 1.0)], 0.016, line)
    v.c.rounded(
        v.vary(-0.1, 0.1),
        v.horizon - 0.03,
        v.vary(0.2, 0.3),
        v.horizon + 0.05,
        0.015,
        (52, 106, 186),
    )


def shop(v: View) -> None:
    _wall(v, (234, 236, 232), (150, 154, 150))
    goods: tuple[Colour, ...] = (
        (208, 58, 50),
        (242, 200, 66),
        (62, 122, 200),
        (84, 160, 84),
        (236, 140, 52),
        (150, 86, 168),
        (240, 236, 224),
    )
    shift = int(v.rng.integers(7))
    frame = v.pick((116, 120, 128), (84, 110, 150), (136, 100, 74))
    for row in range(4):
        top = 0.06 + row * (v.horizon - 0.08) / 4
        bottom = top + (v.horizon - 0.08) / 4
        v.c.rect(0, top, 1, bottom, shade(frame, 0.72))
        v.c.rect(0, bottom - 0.018, 1, bottom, frame)
        x = 0.005
        kind = 0
        while x < 1:
            width = v.vary(0.03, 0.06)
            tone = goods[(kind // 3 + row * 2 + shift) % 7]
            v.c.rect(x, top + v.vary(0.02, 0.04), x + width - 0.006, bottom - 0.018, tone)
            x += width
            kind += 1
    v.c.rect(0, 0, 1, 0.05, v.pick((206, 48, 44), (44, 130, 80), (48, 96, 176)))
    _tiles(v, v.pick((232, 230, 224), (216, 220, 224)), (190, 188, 184))


def pool(v: View) -> None:
    _wall(v, v.pick((206, 230, 234), (228, 232, 226)), (70, 130, 168))
    _windows(v, 4, 0.06, 0.24)
    water = v.pick((44, 164, 204), (58, 176, 196), (40, 146, 206))
    deck = v.pick((222, 212, 194), (208, 214, 216))
    v.c.rect(0, v.horizon, 1, v.horizon + 0.06, deck)
    v.c.gradient(v.horizon + 0.06, 1.0, water, shade(water, 0.82))
    for lane in (0.16, 0.34):
        y = v.horizon + lane
        for i in range(20):
            v.c.ellipse(i / 19, y, 0.019, 0.009, (220, 52, 48) if i % 2 else (248, 248, 244))
    for _ in range(24):
        x, y = v.vary(-0.05, 1), v.vary(v.horizon + 0.09, 1)
        v.c.line([(x, y), (x + v.vary(0.03, 0.09), y)], 0.006, shade(water, 1.4))


def corridor(v: View) -> None:
    wall = v.pick((222, 230, 222), (228, 222, 206), (208, 220, 232))
    _wall(v, wall, (128, 132, 136))
    low = v.pick((118, 166, 160), (146, 160, 188), (188, 160, 120))
    v.c.rect(0, v.horizon - 0.15, 1, v.horizon - 0.02, low)
    shift = v.vary(0, 0.2)
    for i in range(4):
        x = i * 0.32 - 0.1 + shift
        door = v.pick((150, 98, 58), (168, 116, 70))
        v.c.rect(x - 0.012, v.horizon - 0.40, x + 0.152, v.horizon, (242, 242, 240))
        v.c.rect(x, v.horizon - 0.385, x + 0.14, v.horizon, door)
        v.c.rect(x + 0.03, v.horizon - 0.35, x + 0.11, v.horizon - 0.25, (190, 214, 226))
        v.c.circle((x + 0.12, v.horizon - 0.18), 0.010, (232, 200, 90))
    for i in range(3):
        v.c.rect(0.08 + i * 0.32, 0.03, 0.28 + i * 0.32, 0.055, (255, 254, 236))
    _tiles(v, v.pick((206, 212, 208), (216, 208, 192), (190, 200, 212)), (168, 172, 170))


def warehouse(v: View) -> None:
    _wall(v, (150, 156, 164), (90, 94, 100))
    for i in range(18):
        v.c.line([(i / 17, 0), (i / 17, 0.12)], 0.004, (128, 134, 142))
    post = v.pick((230, 110, 40), (46, 92, 176), (210, 170, 50))
    shift = v.vary(-0.1, 0.1)
    for row in range(3):
        y = 0.24 + row * (v.horizon - 0.24) / 2.02
        for i in range(9):
            x = i * 0.125 + shift + v.vary(0, 0.02)
            tone = v.pick((196, 152, 98), (176, 132, 84), (210, 170, 118))
            v.c.rect(x, y - v.vary(0.07, 0.12), x + 0.095, y, tone)
            v.c.rect(x + 0.04, y - 0.07, x + 0.055, y, shade(tone, 0.8))
        v.c.rect(0, y, 1, y + 0.022, post)
    for i in range(4):
        v.c.rect(
            i * 0.33 + shift, 0.10, i * 0.33 + shift + 0.024, v.horizon + 0.01, shade(post, 0.75)
        )
    floor = v.pick((172, 172, 168), (160, 164, 168))
    _ground(v, shade(floor, 0.9), floor)
    v.c.poly(
        [
            (0, v.horizon + 0.10),
            (1, v.horizon + 0.06),
            (1, v.horizon + 0.085),
            (0, v.horizon + 0.13),
        ],
        (242, 206, 60),
    )


def living_room(v: View) -> None:
    paper = v.pick((232, 206, 170), (196, 214, 196), (214, 190, 190), (200, 206, 224))
    _wall(v, paper, (246, 244, 238))
    for i in range(16):
        v.c.line([(i / 15, 0), (i / 15, v.horizon - 0.02)], 0.008, shade(paper, 0.93))
    x, high, low = v.vary(0.08, 0.62), *SKIES[v.time]
    v.c.rect(x, 0.08, x + 0.26, 0.33, mix(high, low, 0.5))
    v.c.rect(x + 0.12, 0.08, x + 0.135, 0.33, (248, 246, 240))
    drape = v.pick((170, 60, 60), (70, 110, 150), (196, 150, 70), (96, 136, 96))
    v.c.rect(x - 0.06, 0.05, x + 0.03, 0.40, drape)
    v.c.rect(x + 0.23, 0.05, x + 0.32, 0.40, drape)
    v.c.rect(x - 0.07, 0.045, x + 0.33, 0.065, (120, 84, 52))
    frame = x + 0.42 if x < 0.35 else x - 0.30
    v.c.rect(frame, 0.13, frame + 0.15, 0.26, (132, 94, 52))
    v.c.rect(frame + 0.016, 0.146, frame + 0.134, 0.244, v.pick((120, 170, 200), (190, 170, 110)))
    _planks(v, v.pick((168, 116, 72), (146, 98, 62), (190, 144, 96)))


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene class: its drawing function, its horizon and its possible landmarks."""

    draw: Callable[[View], None]
    horizon: float
    indoor: bool
    landmarks: tuple[str, ...]


SCENES: dict[str, Scene] = {
    "road": Scene(road, 0.46, False, ("car", "bin", "sign", "street lamp", "cones", "tree")),
    "park": Scene(park, 0.44, False, ("fountain", "bin", "street lamp", "tree", "tent", "sign")),
    "beach": Scene(beach, 0.34, False, ("parasol", "boat", "flag", "tent")),
    "construction site": Scene(construction, 0.47, False, ("barrels", "cones", "sign", "crates")),
    "railway station": Scene(
        station, 0.46, False, ("vending machine", "bin", "poster", "street lamp", "sign")
    ),
    "stairs": Scene(stairs, 0.45, False, ()),
    "snowfield": Scene(snowfield, 0.42, False, ("snowman", "flag", "tent", "sign")),
    "forest": Scene(forest, 0.46, False, ("tent", "sign", "crates", "flag")),
    "ice rink": Scene(rink, 0.42, False, ("flag", "sign", "street lamp", "snowman")),
    "car park": Scene(parking, 0.42, False, ("car", "cones", "street lamp", "sign", "bin")),
    "playground": Scene(playground, 0.42, False, ("slide", "bin", "fountain", "street lamp")),
    "field": Scene(field, 0.40, False, ("tractor", "hay bale", "tree", "barrels")),
    "bridge": Scene(bridge, 0.46, False, ("street lamp", "sign", "flag", "bin")),
    "office": Scene(office, 0.50, True, ("plant pot", "whiteboard", "poster", "bin", "bookshelf")),
    "kitchen": Scene(kitchen, 0.52, True, ("fridge", "bin", "plant pot", "rug")),
    "gym": Scene(gym, 0.50, True, ("lockers", "poster", "vending machine", "crates")),
    "supermarket": Scene(shop, 0.50, True, ("crates", "sign", "poster", "fridge", "bin")),
    "swimming pool": Scene(pool, 0.36, True, ("plant pot", "lockers", "flag", "sign")),
    "corridor": Scene(
        corridor, 0.54, True, ("plant pot", "vending machine", "lockers", "poster", "bin")
    ),
    "warehouse": Scene(warehouse, 0.50, True, ("barrels", "crates", "cones", "sign")),
    "living room": Scene(living_room, 0.50, True, ("sofa", "bookshelf", "plant pot", "rug")),
}


def horizon_of(scene: str, layout: int, high_view: bool = False) -> float:
    """Return the y where floor and background meet; a high camera shows more of the floor."""
    if high_view:
        return 0.20
    rng = np.random.default_rng([LAYOUT_STREAM, list(SCENES).index(scene), layout])
    return SCENES[scene].horizon + 0.05 * (float(rng.random()) - 0.5)


def draw_background(
    c: Canvas, scene: str, layout: int, time: str, weather: str, high_view: bool = False
) -> None:
    """Paint a scene class in one of its layouts."""
    rng = np.random.default_rng([LAYOUT_STREAM, list(SCENES).index(scene), layout, 1])
    view = View(c, rng, horizon_of(scene, layout, high_view), time, weather)
    SCENES[scene].draw(view)
