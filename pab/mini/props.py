"""Objects that people carry or use, objects in the background, animals and vehicles.

Every function draws on a canvas; position and size are fractions of the picture's side.
``facing`` is 1 for right, -1 for left; ``y`` of a standing object is the ground under it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pab.mini.canvas import Canvas, Colour, Point, shade

TYRE: Colour = (28, 28, 30)
STEEL: Colour = (168, 174, 180)
WOOD: Colour = (156, 108, 62)


# --- carried objects: drawn at a hand ----------------------------------------------------------
def handbag(c: Canvas, at: Point, h: float, fill: Colour, facing: int) -> None:
    x, y = at
    c.ring((x, y + 0.035 * h), 0.055 * h, 0.014 * h, shade(fill, 0.5))
    c.rounded(
        x - 0.092 * h, y + 0.042 * h, x + 0.092 * h, y + 0.178 * h, 0.02 * h, shade(fill, 0.5)
    )
    c.rounded(x - 0.082 * h, y + 0.052 * h, x + 0.082 * h, y + 0.168 * h, 0.02 * h, fill)
    c.rect(x - 0.08 * h, y + 0.085 * h, x + 0.08 * h, y + 0.10 * h, shade(fill, 0.65))


def shopping_bag(c: Canvas, at: Point, h: float, fill: Colour, facing: int) -> None:
    x, y = at
    c.ring((x, y + 0.02 * h), 0.045 * h, 0.012 * h, (90, 70, 50))
    c.poly(
        [
            (x - 0.075 * h, y + 0.045 * h),
            (x + 0.075 * h, y + 0.045 * h),
            (x + 0.095 * h, y + 0.235 * h),
            (x - 0.095 * h, y + 0.235 * h),
        ],
        fill,
    )
    c.rect(x - 0.045 * h, y + 0.10 * h, x + 0.045 * h, y + 0.17 * h, (250, 250, 246))


def suitcase(c: Canvas, at: Point, h: float, fill: Colour, facing: int) -> None:
    x, y = at
    x -= 0.05 * h * facing
    c.line([(x, y), (x - 0.02 * h * facing, y + 0.10 * h)], 0.018 * h, (70, 70, 74))
    c.rounded(
        x - 0.125 * h, y + 0.10 * h, x + 0.085 * h, y + 0.39 * h, 0.025 * h, shade(fill, 0.55)
    )
    c.rounded(x - 0.115 * h, y + 0.11 * h, x + 0.075 * h, y + 0.38 * h, 0.025 * h, fill)
    for stripe in (0.17, 0.245, 0.32):
        c.rect(
            x - 0.105 * h, y + stripe * h, x + 0.065 * h, y + (stripe + 0.014) * h, shade(fill, 0.7)
        )
    c.circle((x - 0.09 * h, y + 0.40 * h), 0.022 * h, TYRE)
    c.circle((x + 0.05 * h, y + 0.40 * h), 0.022 * h, TYRE)


def briefcase(c: Canvas, at: Point, h: float, fill: Colour, facing: int) -> None:
    x, y = at
    c.ring((x, y + 0.02 * h), 0.03 * h, 0.014 * h, (40, 36, 34))
    c.rounded(
        x - 0.125 * h, y + 0.035 * h, x + 0.125 * h, y + 0.185 * h, 0.012 * h, shade(fill, 0.5)
    )
    c.rounded(x - 0.115 * h, y + 0.045 * h, x + 0.115 * h, y + 0.175 * h, 0.012 * h, fill)
    c.rect(x - 0.02 * h, y + 0.09 * h, x + 0.02 * h, y + 0.12 * h, (232, 200, 90))


def umbrella(c: Canvas, at: Point, h: float, fill: Colour, facing: int) -> None:
    x, y = at
    top = y - 0.52 * h
    c.line([(x, y + 0.05 * h), (x, top)], 0.016 * h, (60, 50, 44))
    arc = [
        (x + math.cos(a) * 0.30 * h, top + 0.17 * h - math.sin(a) * 0.19 * h)
        for a in (i * math.pi / 14 for i in range(15))
    ]
    c.poly([(px, py) for px, py in arc], shade(fill, 0.6))
    for i, (left, right) in enumerate(zip(arc[::-1][:-2:3], arc[::-1][2::3], strict=False)):
        tone = fill if i % 2 == 0 else shade(fill, 0.84)
        c.poly([(x, top - 0.015 * h), left, right], tone)
    c.poly([(x, top - 0.018 * h), *arc[4:11]], fill)


def balloon(c: Canvas, at: Point, h: float, fill: Colour, facing: int) -> None:
    x, y = at
    top = (x - 0.05 * h * facing, y - 0.50 * h)
    c.line([(x, y), (top[0], top[1] + 0.12 * h)], 0.010 * h, (240, 240, 240))
    c.ellipse(top[0], top[1], 0.115 * h, 0.135 * h, shade(fill, 0.6))
    c.ellipse(top[0], top[1], 0.105 * h, 0.125 * h, fill)
    c.ellipse(top[0] - 0.035 * h, top[1] - 0.045 * h, 0.024 * h, 0.034 * h, shade(fill, 1.6))


def flowers(c: Canvas, at: Point, h: float, fill: Colour, facing: int) -> None:
    x, y = at
    c.poly(
        [(x, y + 0.07 * h), (x - 0.075 * h, y - 0.09 * h), (x + 0.075 * h, y - 0.09 * h)],
        (60, 130, 62),
    )
    for dx, dy in ((-0.065, -0.09), (0.0, -0.14), (0.065, -0.09), (-0.03, -0.06), (0.035, -0.05)):
        c.circle((x + dx * h, y + dy * h), 0.046 * h, shade(fill, 0.7))
        c.circle((x + dx * h, y + dy * h), 0.038 * h, fill)
        c.circle((x + dx * h, y + dy * h), 0.013 * h, (250, 225, 110))


CARRIED: dict[str, Callable[[Canvas, Point, float, Colour, int], None]] = {
    "handbag": handbag,
    "shopping bag": shopping_bag,
    "suitcase": suitcase,
    "briefcase": briefcase,
    "umbrella": umbrella,
    "balloon": balloon,
    "flowers": flowers,
}


def backpack(c: Canvas, neck: Point, pelvis: Point, back: Point, h: float, fill: Colour) -> None:
    """Draw a backpack; ``back`` is the unit vector away from the chest."""
    top = (neck[0] + back[0] * 0.13 * h, neck[1] + back[1] * 0.13 * h)
    low = (pelvis[0] + back[0] * 0.13 * h, pelvis[1] + back[1] * 0.13 * h)
    start = (top[0] * 0.82 + low[0] * 0.18, top[1] * 0.82 + low[1] * 0.18)
    end = (top[0] * 0.30 + low[0] * 0.70, top[1] * 0.30 + low[1] * 0.70)
    c.limb(start, end, 0.165 * h, 0.185 * h, shade(fill, 0.5))
    c.limb(start, end, 0.145 * h, 0.165 * h, fill)
    c.circle(end, 0.055 * h, shade(fill, 0.75))


# --- objects that belong to an action ----------------------------------------------------------
def ball(c: Canvas, at: Point, radius: float, fill: Colour = (250, 250, 248)) -> None:
    c.circle(at, radius, (40, 40, 44))
    c.circle(at, radius * 0.90, fill)
    for i in range(5):
        a = i * 2 * math.pi / 5 - 0.4
        c.circle(
            (at[0] + math.cos(a) * radius * 0.62, at[1] + math.sin(a) * radius * 0.62),
            radius * 0.20,
            (45, 45, 50),
        )
    c.circle(at, radius * 0.24, (45, 45, 50))


def box(c: Canvas, at: Point, size: float, tilt: float = 0.0) -> None:
    """Draw a cardboard box centred at ``at``, turned by ``tilt`` degrees."""
    cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))

    def corner(x: float, y: float) -> Point:
        return (at[0] + (x * cos - y * sin) * size, at[1] + (x * sin + y * cos) * size)

    edges = [corner(x, y) for x, y in ((-0.5, -0.42), (0.5, -0.42), (0.5, 0.42), (-0.5, 0.42))]
    c.poly(edges, (196, 148, 92))
    c.line([*edges, edges[0]], size * 0.05, (110, 76, 40))
    c.poly(
        [corner(x, y) for x, y in ((-0.09, -0.42), (0.09, -0.42), (0.09, 0.42), (-0.09, 0.42))],
        (226, 190, 140),
    )
    c.line([corner(-0.5, -0.16), corner(0.5, -0.16)], size * 0.035, (140, 100, 58))


def open_box(c: Canvas, at: Point, size: float, facing: int) -> None:
    """Draw the same box tilted, with its contents rolling out."""
    box(c, at, size, 24.0 * facing)
    for dx, dy, fill in (
        (0.75, 0.30, (205, 50, 45)),
        (1.05, 0.34, (60, 110, 205)),
        (0.60, 0.02, (245, 210, 70)),
        (1.28, 0.30, (70, 160, 80)),
    ):
        c.circle((at[0] + dx * size * facing, at[1] + dy * size), size * 0.15, (60, 50, 40))
        c.circle((at[0] + dx * size * facing, at[1] + dy * size), size * 0.13, fill)


def bicycle(
    c: Canvas, x: float, y: float, h: float, facing: int, fill: Colour, tilt: float = 0.0
) -> None:
    """Draw a bicycle on the line ``y``, tilted in degrees about the rear wheel's contact."""
    cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))

    def at(px: float, py: float) -> Point:
        return (x + facing * (px * cos - py * sin) * h, y - (px * sin + py * cos) * h)

    rear, front = at(-0.24, 0.17), at(0.30, 0.17)
    for wheel in (rear, front):
        c.ring(wheel, 0.170 * h, 0.030 * h, TYRE)
        c.ring(wheel, 0.140 * h, 0.010 * h, STEEL)
        for i in range(4):
            a = i * math.pi / 4 + 0.3
            spoke = (math.cos(a) * 0.13 * h, math.sin(a) * 0.13 * h)
            c.line(
                [
                    (wheel[0] - spoke[0], wheel[1] - spoke[1]),
                    (wheel[0] + spoke[0], wheel[1] + spoke[1]),
                ],
                0.006 * h,
                STEEL,
            )
    seat, crank, head = at(-0.10, 0.44), at(0.00, 0.18), at(0.22, 0.46)
    for p, q in (
        (rear, seat),
        (rear, crank),
        (seat, crank),
        (crank, head),
        (seat, head),
        (front, head),
    ):
        c.line([p, q], 0.030 * h, fill)
    c.line([at(-0.17, 0.475), at(-0.03, 0.475)], 0.036 * h, (35, 30, 30))
    c.line([head, at(0.20, 0.545), at(0.27, 0.56)], 0.022 * h, (50, 50, 54))


def ladder(c: Canvas, foot: Point, top: Point, width: float) -> None:
    dx, dy = top[0] - foot[0], top[1] - foot[1]
    length = math.hypot(dx, dy)
    nx, ny = -dy / length * width / 2, dx / length * width / 2
    rungs = max(4, round(length / (width * 0.62)))
    for i in range(rungs):
        t = (i + 0.5) / rungs
        px, py = foot[0] + dx * t, foot[1] + dy * t
        c.line([(px - nx, py - ny), (px + nx, py + ny)], width * 0.13, (190, 140, 70))
    for sign in (-1, 1):
        rail = [
            (foot[0] + nx * sign, foot[1] + ny * sign),
            (top[0] + nx * sign, top[1] + ny * sign),
        ]
        c.line(rail, width * 0.20, (110, 76, 36))
        c.line(rail, width * 0.11, (214, 160, 84))


def bench(c: Canvas, x: float, y: float, h: float) -> None:
    for side in (-0.30, 0.30):
        c.rect(x + (side - 0.018) * h, y - 0.25 * h, x + (side + 0.018) * h, y, (60, 60, 64))
        c.rect(
            x + (side - 0.018) * h, y - 0.46 * h, x + (side + 0.018) * h, y - 0.2 * h, (60, 60, 64)
        )
    for level in (0.46, 0.385, 0.31):
        c.rect(x - 0.37 * h, y - level * h, x + 0.37 * h, y - (level - 0.05) * h, WOOD)
    c.rect(x - 0.38 * h, y - 0.26 * h, x + 0.38 * h, y - 0.215 * h, shade(WOOD, 1.2))


def cart(c: Canvas, x: float, y: float, h: float, facing: int, tipped: bool = False) -> None:
    """Draw a shopping trolley with its handle towards the person."""
    if tipped:
        c.poly(
            [
                (x - 0.20 * h, y - 0.06 * h),
                (x + 0.26 * h, y - 0.02 * h),
                (x + 0.22 * h, y - 0.34 * h),
                (x - 0.16 * h, y - 0.28 * h),
            ],
            (92, 98, 106),
        )
        c.poly(
            [
                (x - 0.17 * h, y - 0.09 * h),
                (x + 0.22 * h, y - 0.05 * h),
                (x + 0.19 * h, y - 0.31 * h),
                (x - 0.14 * h, y - 0.25 * h),
            ],
            (176, 184, 192),
        )
        for wheel in (-0.14, 0.20):
            c.circle((x + wheel * h, y - 0.37 * h), 0.035 * h, TYRE)
        for dx, fill in (
            (0.34, (205, 50, 45)),
            (0.42, (245, 205, 60)),
            (-0.28, (70, 150, 80)),
            (-0.36, (60, 110, 205)),
        ):
            c.circle((x + dx * h, y - 0.035 * h), 0.045 * h, fill)
        return
    f = facing
    c.line(
        [
            (x - 0.30 * f * h, y - 0.52 * h),
            (x - 0.20 * f * h, y - 0.47 * h),
            (x - 0.13 * f * h, y - 0.10 * h),
            (x + 0.24 * f * h, y - 0.10 * h),
        ],
        0.026 * h,
        (88, 92, 100),
    )
    basket = [
        (x - 0.20 * f * h, y - 0.46 * h),
        (x + 0.28 * f * h, y - 0.42 * h),
        (x + 0.22 * f * h, y - 0.20 * h),
        (x - 0.15 * f * h, y - 0.20 * h),
    ]
    for dx, top, fill in (
        (-0.08, 0.52, (205, 50, 45)),
        (0.04, 0.56, (245, 205, 60)),
        (0.16, 0.50, (70, 150, 80)),
    ):
        c.rect(x + (dx - 0.055) * f * h, y - top * h, x + (dx + 0.055) * f * h, y - 0.42 * h, fill)
    c.poly(basket, (188, 194, 202))
    c.line([*basket, basket[0]], 0.020 * h, (88, 92, 100))
    for i in range(1, 5):
        px = x + (-0.19 + i * 0.092) * f * h
        c.line([(px, y - 0.44 * h), (px, y - 0.20 * h)], 0.008 * h, (110, 116, 124))
    for wheel in (-0.10, 0.21):
        c.circle((x + wheel * f * h, y - 0.045 * h), 0.045 * h, TYRE)


def skateboard(c: Canvas, x: float, y: float, h: float, tilt: float = 0.0) -> None:
    cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))

    def at(px: float, py: float) -> Point:
        return (x + (px * cos - py * sin) * h, y - 0.055 * h + (px * sin + py * cos) * h)

    for wheel in (-0.15, 0.15):
        c.circle(at(wheel, 0.030), 0.032 * h, (245, 235, 220))
        c.circle(at(wheel, 0.030), 0.014 * h, TYRE)
    c.line(
        [at(-0.29, -0.035), at(-0.22, 0.0), at(0.22, 0.0), at(0.29, -0.035)],
        0.040 * h,
        (225, 95, 40),
    )


def barbell(c: Canvas, at: Point, h: float) -> None:
    x, y = at
    c.line([(x - 0.42 * h, y), (x + 0.42 * h, y)], 0.022 * h, (96, 100, 108))
    for side in (-1, 1):
        for dx, size, fill in ((0.33, 0.13, (30, 30, 34)), (0.385, 0.10, (190, 40, 42))):
            px = x + side * dx * h
            c.rounded(px - 0.026 * h, y - size * h, px + 0.026 * h, y + size * h, 0.012 * h, fill)


def broom(c: Canvas, hand: Point, foot: Point, h: float) -> None:
    c.line([hand, foot], 0.022 * h, (196, 148, 80))
    x, y = foot
    c.poly(
        [
            (x - 0.05 * h, y - 0.06 * h),
            (x + 0.05 * h, y - 0.06 * h),
            (x + 0.10 * h, y + 0.04 * h),
            (x - 0.10 * h, y + 0.04 * h),
        ],
        (226, 190, 92),
    )


def car(c: Canvas, x: float, y: float, size: float, facing: int, fill: Colour) -> None:
    """Draw a car of length ``size`` centred at ``x``, wheels on the line ``y``."""

    def at(px: float, py: float) -> Point:
        return (x + facing * px * size, y - py * size)

    c.soft_ellipse(x, y - 0.005, size * 0.52, size * 0.05, (10, 10, 14), 150)
    dark = shade(fill, 0.6)
    roof = [at(-0.36, 0.20), at(-0.26, 0.375), at(0.09, 0.385), at(0.26, 0.22)]
    c.poly([at(-0.39, 0.19), at(-0.28, 0.395), at(0.10, 0.405), at(0.30, 0.21)], dark)
    c.poly(roof, fill)
    c.poly(
        [
            at(-0.47, 0.07),
            at(-0.48, 0.21),
            at(-0.34, 0.25),
            at(0.22, 0.245),
            at(0.46, 0.19),
            at(0.495, 0.07),
        ],
        dark,
    )
    c.poly(
        [
            at(-0.46, 0.08),
            at(-0.465, 0.20),
            at(-0.33, 0.24),
            at(0.22, 0.235),
            at(0.45, 0.18),
            at(0.48, 0.08),
        ],
        fill,
    )
    glass = (176, 208, 224)
    c.poly([at(-0.30, 0.235), at(-0.235, 0.35), at(-0.09, 0.355), at(-0.09, 0.24)], glass)
    c.poly([at(-0.06, 0.24), at(-0.06, 0.355), at(0.07, 0.36), at(0.20, 0.235)], glass)
    c.ellipse(*at(0.465, 0.155), 0.020 * size, 0.022 * size, (255, 246, 190))
    c.ellipse(*at(-0.455, 0.165), 0.016 * size, 0.022 * size, (220, 40, 40))
    c.line([at(-0.075, 0.235), at(-0.075, 0.09)], 0.006 * size, dark)
    for wheel in (-0.29, 0.29):
        c.circle(at(wheel, 0.075), 0.086 * size, TYRE)
        c.circle(at(wheel, 0.075), 0.046 * size, STEEL)


def dog(
    c: Canvas, x: float, y: float, h: float, facing: int, fill: Colour, leaping: bool = False
) -> None:
    """Draw a dog ``h`` long with its feet on the line ``y``; when leaping, on its hind legs."""
    tilt = math.radians(52) if leaping else 0.0
    cos, sin = math.cos(tilt), math.sin(tilt)

    def at(px: float, py: float) -> Point:
        rx, ry = px + 0.30, py - 0.25
        return (x + facing * (rx * cos - ry * sin - 0.30) * h, y - (rx * sin + ry * cos + 0.25) * h)

    dark = shade(fill, 0.72)
    for leg, tone in ((-0.24, dark), (0.24, dark), (-0.32, fill), (0.17, fill)):
        reach = (leg + 0.16, 0.10) if leaping and leg > 0 else (leg, 0.02)
        foot = (x + facing * leg * h, y - 0.02 * h) if leaping and leg < 0 else at(*reach)
        c.limb(at(leg, 0.32), foot, 0.11 * h, 0.075 * h, tone)
    c.limb(at(-0.36, 0.46), at(-0.54, 0.68), 0.07 * h, 0.045 * h, dark)
    c.limb(at(-0.27, 0.40), at(0.24, 0.42), 0.25 * h, 0.29 * h, fill)
    c.limb(at(0.26, 0.48), at(0.36, 0.66), 0.18 * h, 0.17 * h, fill)
    c.circle(at(0.38, 0.68), 0.135 * h, fill)
    c.limb(at(0.42, 0.65), at(0.56, 0.61), 0.13 * h, 0.085 * h, shade(fill, 1.15))
    c.circle(at(0.585, 0.635), 0.035 * h, (15, 15, 15))
    c.limb(at(0.31, 0.78), at(0.25, 0.64), 0.09 * h, 0.05 * h, dark)
    c.circle(at(0.42, 0.725), 0.024 * h, (10, 10, 10))
    c.limb(at(0.27, 0.54), at(0.33, 0.50), 0.05 * h, 0.05 * h, (205, 40, 45))


# --- landmarks: (canvas, x, ground, size, colour) -----------------------------------------------
def _parked_car(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    car(c, x, y, s * 1.45, 1 if x < 0.5 else -1, fill)


def _bin(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    c.poly(
        [
            (x - 0.17 * s, y - 0.52 * s),
            (x + 0.17 * s, y - 0.52 * s),
            (x + 0.13 * s, y),
            (x - 0.13 * s, y),
        ],
        fill,
    )
    c.poly(
        [(x, y - 0.52 * s), (x + 0.17 * s, y - 0.52 * s), (x + 0.13 * s, y), (x, y)],
        shade(fill, 0.78),
    )
    c.rounded(x - 0.21 * s, y - 0.60 * s, x + 0.21 * s, y - 0.51 * s, 0.03 * s, shade(fill, 0.6))


def _parasol(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    c.rect(x - 0.018 * s, y - 0.95 * s, x + 0.018 * s, y, (240, 236, 226))
    for i in range(6):
        tone = fill if i % 2 == 0 else (250, 248, 240)
        left, right = -0.55 + i * 1.1 / 6, -0.55 + (i + 1) * 1.1 / 6
        c.poly(
            [(x, y - 1.05 * s), (x + left * s, y - 0.70 * s), (x + right * s, y - 0.70 * s)], tone
        )


def _sign(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    c.rect(x - 0.02 * s, y - 0.9 * s, x + 0.02 * s, y, STEEL)
    c.rounded(x - 0.30 * s, y - 1.08 * s, x + 0.30 * s, y - 0.66 * s, 0.04 * s, (245, 245, 245))
    c.rounded(x - 0.27 * s, y - 1.05 * s, x + 0.27 * s, y - 0.69 * s, 0.03 * s, fill)
    c.rect(x - 0.18 * s, y - 0.90 * s, x + 0.18 * s, y - 0.84 * s, (250, 250, 250))


def _lamp(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    c.rect(x - 0.022 * s, y - 1.35 * s, x + 0.022 * s, y, (56, 60, 64))
    c.rect(x - 0.022 * s, y - 1.38 * s, x + 0.26 * s, y - 1.34 * s, (56, 60, 64))
    c.rounded(x + 0.16 * s, y - 1.36 * s, x + 0.36 * s, y - 1.27 * s, 0.03 * s, (255, 240, 170))


def _fountain(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    c.soft_ellipse(x, y - 0.42 * s, 0.26 * s, 0.5 * s, (235, 245, 255), 200)
    c.rect(x - 0.05 * s, y - 0.5 * s, x + 0.05 * s, y, (178, 176, 170))
    c.ellipse(x, y - 0.46 * s, 0.22 * s, 0.06 * s, (150, 148, 142))
    c.ellipse(x, y - 0.05 * s, 0.50 * s, 0.15 * s, (168, 166, 160))
    c.ellipse(x, y - 0.09 * s, 0.44 * s, 0.11 * s, (110, 178, 215))


def _plant(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    for i in range(7):
        a = math.radians(30 + i * 20)
        tip = (x + math.cos(a) * 0.34 * s, y - 0.28 * s - math.sin(a) * 0.50 * s)
        c.limb((x, y - 0.26 * s), tip, 0.05 * s, 0.11 * s, (52, 128 + i * 6, 62))
    c.poly(
        [
            (x - 0.16 * s, y - 0.30 * s),
            (x + 0.16 * s, y - 0.30 * s),
            (x + 0.11 * s, y),
            (x - 0.11 * s, y),
        ],
        fill,
    )


def _cone(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    for at in (x - 0.22 * s, x + 0.22 * s):
        c.rect(at - 0.19 * s, y - 0.05 * s, at + 0.19 * s, y, (225, 85, 25))
        c.poly(
            [(at, y - 0.58 * s), (at + 0.14 * s, y - 0.04 * s), (at - 0.14 * s, y - 0.04 * s)],
            (245, 105, 35),
        )
        c.poly(
            [
                (at - 0.06 * s, y - 0.34 * s),
                (at + 0.06 * s, y - 0.34 * s),
                (at + 0.09 * s, y - 0.20 * s),
                (at - 0.09 * s, y - 0.20 * s),
            ],
            (250, 250, 250),
        )


def _tent(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    c.poly([(x - 0.6 * s, y), (x, y - 0.68 * s), (x + 0.6 * s, y)], fill)
    c.poly([(x, y - 0.68 * s), (x + 0.6 * s, y), (x + 0.25 * s, y)], shade(fill, 0.72))
    c.poly([(x - 0.03 * s, y - 0.5 * s), (x + 0.14 * s, y), (x - 0.18 * s, y)], shade(fill, 0.4))


def _tree(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    c.limb((x, y), (x, y - 0.6 * s), 0.16 * s, 0.10 * s, (96, 66, 40))
    for dx, dy, r in ((-0.22, 0.75, 0.30), (0.22, 0.78, 0.28), (0.0, 1.02, 0.34)):
        c.circle((x + dx * s, y - dy * s), r * s, (42, 104, 50))
        c.circle((x + (dx - 0.05) * s, y - (dy + 0.05) * s), r * 0.8 * s, (62, 134, 62))


def _sofa(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    c.rounded(x - 0.72 * s, y - 0.62 * s, x + 0.72 * s, y - 0.06 * s, 0.08 * s, shade(fill, 0.8))
    c.rounded(x - 0.80 * s, y - 0.42 * s, x - 0.56 * s, y - 0.02 * s, 0.06 * s, shade(fill, 0.65))
    c.rounded(x + 0.56 * s, y - 0.42 * s, x + 0.80 * s, y - 0.02 * s, 0.06 * s, shade(fill, 0.65))
    c.rounded(x - 0.57 * s, y - 0.34 * s, x - 0.01 * s, y - 0.08 * s, 0.04 * s, fill)
    c.rounded(x + 0.01 * s, y - 0.34 * s, x + 0.57 * s, y - 0.08 * s, 0.04 * s, fill)


def _vending(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    c.rounded(x - 0.30 * s, y - 1.15 * s, x + 0.30 * s, y, 0.03 * s, shade(fill, 0.6))
    c.rounded(x - 0.27 * s, y - 1.12 * s, x + 0.27 * s, y - 0.03 * s, 0.03 * s, fill)
    c.rect(x - 0.22 * s, y - 1.02 * s, x + 0.10 * s, y - 0.36 * s, (225, 240, 248))
    for row in range(3):
        for col, tone in enumerate(((205, 60, 50), (70, 130, 205), (240, 200, 70))):
            px, py = x + (-0.19 + col * 0.10) * s, y - (0.96 - row * 0.21) * s
            c.rect(px, py, px + 0.06 * s, py + 0.13 * s, tone)
    c.rect(x - 0.20 * s, y - 0.22 * s, x + 0.14 * s, y - 0.10 * s, (40, 40, 46))


def _poster(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    top = y - 1.55 * s
    c.rect(x - 0.30 * s, top, x + 0.30 * s, top + 0.72 * s, (250, 250, 250))
    c.rect(x - 0.26 * s, top + 0.04 * s, x + 0.26 * s, top + 0.68 * s, fill)
    c.circle((x, top + 0.28 * s), 0.14 * s, (252, 244, 220))
    c.rect(x - 0.17 * s, top + 0.50 * s, x + 0.17 * s, top + 0.56 * s, (252, 244, 220))


def _locker(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    for i in range(3):
        left = x + (-0.54 + i * 0.36) * s
        c.rect(left, y - 1.12 * s, left + 0.36 * s, y, shade(fill, 0.6))
        c.rect(left + 0.02 * s, y - 1.10 * s, left + 0.34 * s, y - 0.02 * s, fill)
        for slot in (0.98, 0.90, 0.82):
            c.rect(
                left + 0.09 * s,
                y - slot * s,
                left + 0.27 * s,
                y - (slot - 0.03) * s,
                shade(fill, 0.5),
            )


def _shelf(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    c.rect(x - 0.45 * s, y - 1.2 * s, x + 0.45 * s, y, (112, 76, 44))
    tones = ((190, 50, 48), (60, 100, 180), (235, 195, 80), (70, 140, 80), (235, 232, 220))
    for row in range(3):
        top = y - (1.14 - row * 0.38) * s
        c.rect(x - 0.40 * s, top, x + 0.40 * s, top + 0.31 * s, (66, 44, 26))
        for i in range(9):
            left = x + (-0.39 + i * 0.087) * s
            c.rect(
                left,
                top + (0.03 + 0.03 * (i % 3)) * s,
                left + 0.07 * s,
                top + 0.31 * s,
                tones[(i * 2 + row) % 5],
            )


def _boat(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    c.poly(
        [(x - 0.06 * s, y - 0.25 * s), (x - 0.06 * s, y - 1.05 * s), (x + 0.42 * s, y - 0.30 * s)],
        (250, 248, 240),
    )
    c.rect(x - 0.08 * s, y - 1.08 * s, x - 0.04 * s, y - 0.2 * s, (110, 80, 50))
    c.poly(
        [
            (x - 0.55 * s, y - 0.24 * s),
            (x + 0.55 * s, y - 0.24 * s),
            (x + 0.36 * s, y),
            (x - 0.38 * s, y),
        ],
        fill,
    )


def _slide(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    c.rect(x - 0.42 * s, y - 0.95 * s, x - 0.36 * s, y, STEEL)
    c.rect(x - 0.20 * s, y - 0.95 * s, x - 0.14 * s, y, STEEL)
    for rung in (0.2, 0.4, 0.6, 0.8):
        c.rect(x - 0.42 * s, y - rung * s, x - 0.14 * s, y - (rung - 0.05) * s, STEEL)
    c.limb(
        (x - 0.18 * s, y - 0.90 * s),
        (x + 0.50 * s, y - 0.06 * s),
        0.17 * s,
        0.17 * s,
        shade(fill, 0.65),
    )
    c.limb((x - 0.18 * s, y - 0.92 * s), (x + 0.50 * s, y - 0.08 * s), 0.12 * s, 0.12 * s, fill)


def _snowman(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    for dy, r in ((0.24, 0.27), (0.62, 0.20), (0.92, 0.145)):
        c.circle((x, y - dy * s), (r + 0.015) * s, (168, 182, 200))
        c.circle((x - 0.01 * s, y - (dy + 0.01) * s), r * s, (252, 252, 255))
    c.rect(x - 0.20 * s, y - 0.80 * s, x + 0.20 * s, y - 0.72 * s, fill)
    c.poly([(x, y - 0.93 * s), (x + 0.20 * s, y - 0.89 * s), (x, y - 0.88 * s)], (240, 120, 30))
    c.rect(x - 0.13 * s, y - 1.24 * s, x + 0.13 * s, y - 1.03 * s, (30, 30, 34))
    c.rect(x - 0.19 * s, y - 1.06 * s, x + 0.19 * s, y - 1.02 * s, (30, 30, 34))


def _barrel(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    for at, base in ((x - 0.24 * s, y), (x + 0.24 * s, y), (x, y + 0.04 * s)):
        c.rounded(at - 0.21 * s, base - 0.58 * s, at + 0.21 * s, base, 0.05 * s, shade(fill, 0.65))
        c.rounded(at - 0.19 * s, base - 0.56 * s, at + 0.15 * s, base - 0.02 * s, 0.05 * s, fill)
        for band in (0.42, 0.20):
            c.rect(
                at - 0.21 * s,
                base - band * s,
                at + 0.21 * s,
                base - (band - 0.04) * s,
                shade(fill, 0.55),
            )


def _hay(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    c.circle((x, y - 0.34 * s), 0.36 * s, (170, 128, 52))
    c.circle((x, y - 0.34 * s), 0.33 * s, (222, 182, 92))
    for r in (0.24, 0.15, 0.07):
        c.ring((x, y - 0.34 * s), r * s, 0.02 * s, (176, 134, 58))


def _tractor(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    c.rect(x - 0.10 * s, y - 0.60 * s, x + 0.58 * s, y - 0.28 * s, fill)
    c.rect(x - 0.42 * s, y - 0.95 * s, x + 0.02 * s, y - 0.30 * s, shade(fill, 0.8))
    c.rect(x - 0.34 * s, y - 0.88 * s, x - 0.06 * s, y - 0.58 * s, (180, 212, 226))
    c.rect(x + 0.36 * s, y - 0.82 * s, x + 0.41 * s, y - 0.58 * s, (50, 50, 54))
    for px, r in ((-0.24, 0.30), (0.42, 0.19)):
        c.circle((x + px * s, y - r * s), r * s, TYRE)
        c.circle((x + px * s, y - r * s), r * 0.5 * s, (240, 205, 80))


def _fridge(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    c.rounded(x - 0.33 * s, y - 1.3 * s, x + 0.33 * s, y, 0.05 * s, shade(fill, 0.6))
    c.rounded(x - 0.31 * s, y - 1.28 * s, x + 0.31 * s, y - 0.02 * s, 0.05 * s, fill)
    c.rect(x - 0.31 * s, y - 0.84 * s, x + 0.31 * s, y - 0.81 * s, shade(fill, 0.55))
    c.rect(x + 0.20 * s, y - 1.15 * s, x + 0.24 * s, y - 0.92 * s, (235, 235, 238))
    c.rect(x + 0.20 * s, y - 0.74 * s, x + 0.24 * s, y - 0.40 * s, (235, 235, 238))


def _whiteboard(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    top = y - 1.6 * s
    c.rect(x - 0.62 * s, top, x + 0.62 * s, top + 0.74 * s, (150, 154, 160))
    c.rect(x - 0.58 * s, top + 0.04 * s, x + 0.58 * s, top + 0.70 * s, (252, 252, 252))
    c.line(
        [
            (x - 0.45 * s, top + 0.5 * s),
            (x - 0.15 * s, top + 0.3 * s),
            (x + 0.1 * s, top + 0.4 * s),
            (x + 0.42 * s, top + 0.15 * s),
        ],
        0.035 * s,
        (205, 50, 45),
    )


def _flag(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    c.rect(x - 0.02 * s, y - 1.3 * s, x + 0.02 * s, y, (235, 235, 235))
    c.poly(
        [
            (x + 0.02 * s, y - 1.28 * s),
            (x + 0.58 * s, y - 1.18 * s),
            (x + 0.40 * s, y - 1.02 * s),
            (x + 0.56 * s, y - 0.84 * s),
            (x + 0.02 * s, y - 0.88 * s),
        ],
        fill,
    )


def _rug(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    base = y + 0.30 * s
    c.ellipse(x, base, 0.85 * s, 0.20 * s, shade(fill, 0.7))
    c.ellipse(x, base, 0.75 * s, 0.165 * s, fill)
    c.ellipse(x, base, 0.45 * s, 0.095 * s, shade(fill, 1.35))


def _crates(c: Canvas, x: float, y: float, s: float, fill: Colour) -> None:
    for dx, dy in ((-0.27, 0.0), (0.27, 0.0), (0.0, 0.5)):
        left, top = x + (dx - 0.25) * s, y - (dy + 0.5) * s
        c.rect(left, top, left + 0.5 * s, top + 0.5 * s, shade(fill, 0.55))
        c.rect(left + 0.03 * s, top + 0.03 * s, left + 0.47 * s, top + 0.47 * s, fill)
        c.line(
            [(left + 0.04 * s, top + 0.04 * s), (left + 0.46 * s, top + 0.46 * s)],
            0.05 * s,
            shade(fill, 0.7),
        )


Landmark = Callable[[Canvas, float, float, float, Colour], None]
# First the landmarks whose colour is drawn at random, then those with a fixed colour.
COLOURED_LANDMARKS: dict[str, Landmark] = {
    "car": _parked_car,
    "bin": _bin,
    "parasol": _parasol,
    "sign": _sign,
    "tent": _tent,
    "sofa": _sofa,
    "vending machine": _vending,
    "poster": _poster,
    "lockers": _locker,
    "boat": _boat,
    "slide": _slide,
    "barrels": _barrel,
    "tractor": _tractor,
    "fridge": _fridge,
    "flag": _flag,
    "rug": _rug,
    "crates": _crates,
    "plant pot": _plant,
}
PLAIN_LANDMARKS: dict[str, Landmark] = {
    "street lamp": _lamp,
    "fountain": _fountain,
    "cones": _cone,
    "tree": _tree,
    "bookshelf": _shelf,
    "snowman": _snowman,
    "hay bale": _hay,
    "whiteboard": _whiteboard,
}
LANDMARKS = COLOURED_LANDMARKS | PLAIN_LANDMARKS
