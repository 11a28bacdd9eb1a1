"""Articulated people: their appearance, their poses and how they are drawn.

A body is a flat skeleton seen from the side, turned slightly to the viewer. All lengths are
fractions of the body's height ``h``; angles are degrees, positive towards the person's front.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from pab.mini.canvas import Canvas, Colour, Point, shade
from pab.mini.settings import POSE_JITTER

HEAD, NECK, TORSO = 0.083, 0.035, 0.300  # HEAD is a radius
UPPER_ARM, FOREARM = 0.165, 0.155
THIGH, SHIN, FOOT, SOLE = 0.235, 0.225, 0.085, 0.022
CHILD_SCALE = 0.68  # height of a child relative to an adult
FAR_SIDE = 0.80  # brightness of the limbs on the side turned away

SKIN: tuple[Colour, ...] = (
    (250, 215, 185),
    (236, 188, 150),
    (205, 150, 110),
    (160, 105, 70),
    (105, 68, 45),
)
HAIR: dict[str, Colour] = {
    "black": (28, 24, 24),
    "brown": (100, 62, 32),
    "blond": (226, 190, 95),
    "red": (176, 70, 28),
    "grey": (176, 176, 180),
}
COLOURS: dict[str, Colour] = {
    "red": (205, 34, 38),
    "orange": (240, 130, 25),
    "yellow": (245, 212, 55),
    "green": (48, 150, 68),
    "turquoise": (40, 185, 180),
    "blue": (48, 105, 215),
    "navy": (26, 36, 98),
    "purple": (130, 58, 170),
    "pink": (245, 135, 180),
    "brown": (118, 74, 42),
    "black": (32, 32, 36),
    "white": (244, 244, 242),
    "grey": (136, 139, 143),
    "beige": (214, 190, 148),
}
LONG_SLEEVES = {"jacket", "hoodie", "coat", "sweater"}


@dataclass(frozen=True, slots=True)
class Person:
    """Appearance of a person. Fields ``*_colour`` are keys of :data:`COLOURS` or :data:`HAIR`."""

    kind: str  # man, woman, boy, girl, old man, old woman
    build: str  # slim, average, heavy
    skin: Colour
    hair_colour: str
    hair_style: str  # short, long, ponytail, bun, bald
    hat: str | None  # cap, beanie, helmet, sun hat
    hat_colour: str
    upper: str  # t-shirt, striped shirt, tank top, sweater, jacket, hoodie, coat, dress
    upper_colour: str
    upper_rgb: Colour
    lower: str  # trousers, shorts, skirt; "dress" with a dress
    lower_colour: str
    lower_rgb: Colour
    shoes: Colour

    @property
    def is_child(self) -> bool:
        return self.kind in ("boy", "girl")

    @property
    def is_female(self) -> bool:
        return self.kind in ("woman", "girl", "old woman")


@dataclass(frozen=True, slots=True)
class Pose:
    """Joint angles.

    ``torso``: lean from upright. Arms: (upper arm from hanging, elbow bend). Legs: (thigh from
    hanging, knee bend backwards). ``lift``: height of the lowest point above the ground.
    """

    torso: float = 0
    head: float = 0
    near_arm: Point = (-8, 12)
    far_arm: Point = (8, 12)
    near_leg: Point = (-3, 2)
    far_leg: Point = (5, 2)
    lift: float = 0

    def jittered(self, rng: np.random.Generator, amount: float = POSE_JITTER) -> Pose:
        """Return the pose with jittered joints; knees and elbows never bend the wrong way."""
        off = (rng.standard_normal(8) * amount).tolist()
        return replace(
            self,
            torso=self.torso + off[0] * 0.6,
            near_arm=(self.near_arm[0] + off[1], max(0.0, self.near_arm[1] + off[2])),
            far_arm=(self.far_arm[0] + off[3], max(0.0, self.far_arm[1] + off[4])),
            near_leg=(self.near_leg[0] + off[5] * 0.7, max(0.0, self.near_leg[1] + off[6] * 0.7)),
            far_leg=(self.far_leg[0] + off[7] * 0.7, self.far_leg[1]),
        )


@dataclass(frozen=True, slots=True)
class Body:
    """A posed skeleton in the picture; ``h`` is its height, ``facing`` -1 for left, 1 for right."""

    h: float
    facing: int
    pelvis: Point
    neck: Point
    head: Point
    up: Point  # unit vectors of the head
    ahead: Point
    shoulders: tuple[Point, Point]  # (near, far), as all pairs below
    elbows: tuple[Point, Point]
    hands: tuple[Point, Point]
    hips: tuple[Point, Point]
    knees: tuple[Point, Point]
    ankles: tuple[Point, Point]
    toes: tuple[Point, Point]
    torso_up: Point
    torso_ahead: Point

    def points(self) -> list[Point]:
        return [self.head, self.pelvis, *self.hands, *self.elbows, *self.knees, *self.toes]


def _step(start: Point, angle: float, length: float, facing: int) -> Point:
    """Return a point ``length`` away; angle 0 is down, 90 is the direction the person faces."""
    radians = math.radians(angle)
    return (
        start[0] + facing * math.sin(radians) * length,
        start[1] + math.cos(radians) * length,
    )


def _add(point: Point, *terms: tuple[float, Point]) -> Point:
    x, y = point
    for factor, vector in terms:
        x += factor * vector[0]
        y += factor * vector[1]
    return (x, y)


def solve(pose: Pose, x: float, ground: float, h: float, facing: int) -> Body:
    """Place a posed body with its lowest point on the line ``ground``, centred at ``x``."""

    def build(px: float, py: float) -> Body:
        pelvis = (px, py)
        neck = _step(pelvis, 180 - pose.torso, TORSO * h, facing)
        torso_up = ((neck[0] - px) / (TORSO * h), (neck[1] - py) / (TORSO * h))
        ahead = (-torso_up[1] * facing, torso_up[0] * facing)
        head_angle = 180 - pose.torso - pose.head
        head = _step(neck, head_angle, (NECK + HEAD) * h, facing)
        up = ((head[0] - neck[0]) / ((NECK + HEAD) * h), (head[1] - neck[1]) / ((NECK + HEAD) * h))
        head_ahead = (-up[1] * facing, up[0] * facing)
        top = _add(neck, (-0.025 * h, torso_up))
        shoulders = (_add(top, (-0.055 * h, ahead)), _add(top, (0.055 * h, ahead)))
        hips = (_add(pelvis, (-0.030 * h, ahead)), _add(pelvis, (0.032 * h, ahead)))
        elbows, hands, knees, ankles, toes = [], [], [], [], []
        for side, (arm, leg) in enumerate(
            ((pose.near_arm, pose.near_leg), (pose.far_arm, pose.far_leg))
        ):
            elbow = _step(shoulders[side], arm[0], UPPER_ARM * h, facing)
            elbows.append(elbow)
            hands.append(_step(elbow, arm[0] + arm[1], FOREARM * h, facing))
            knee = _step(hips[side], leg[0], THIGH * h, facing)
            ankle = _step(knee, leg[0] - leg[1], SHIN * h, facing)
            knees.append(knee)
            ankles.append(ankle)
            toes.append(_step(ankle, leg[0] - leg[1] + 78, FOOT * h, facing))
        return Body(
            h,
            facing,
            pelvis,
            neck,
            head,
            up,
            head_ahead,
            shoulders,
            (elbows[0], elbows[1]),
            (hands[0], hands[1]),
            hips,
            (knees[0], knees[1]),
            (ankles[0], ankles[1]),
            (toes[0], toes[1]),
            torso_up,
            ahead,
        )

    trial = build(0.0, 0.0)
    heights = [y + SOLE * h for _, y in (*trial.ankles, *trial.toes)]
    heights += [y + 0.035 * h for _, y in (*trial.hands, *trial.elbows, *trial.knees)]
    heights += [trial.head[1] + HEAD * h, trial.pelvis[1] + 0.07 * h, trial.neck[1] + 0.06 * h]
    across = [px for px, _ in trial.points()]
    return build(x - (min(across) + max(across)) / 2, ground - pose.lift * h - max(heights))


class Figure:
    """One person on one canvas: parts are drawn back to front, so objects can be drawn between."""

    def __init__(self, canvas: Canvas, person: Person, body: Body) -> None:
        self.canvas, self.person, self.body = canvas, person, body
        self.h = body.h
        self.girth = {"slim": 0.86, "average": 1.0, "heavy": 1.28}[person.build]
        if person.is_child:
            self.girth *= 1.12

    def draw(self) -> None:
        self.back()
        self.front()

    def back(self) -> None:
        """Draw everything behind the near arm."""
        self.hair_behind()
        self.arm(1)
        self.leg(1)
        self.leg(0)
        self.garments()
        self.head()

    def front(self) -> None:
        self.arm(0)

    def _stroke(
        self, points: list[Point], widths: list[float], fills: list[Colour], outline: Colour
    ) -> None:
        """Draw a chain of limbs with one dark contour around all of them."""
        edge = 0.016 * self.h
        pairs = list(pairwise(points))
        for i, (p, q) in enumerate(pairs):
            self.canvas.limb(p, q, widths[i] + edge, widths[i + 1] + edge, outline)
        for i, (p, q) in enumerate(pairs):
            self.canvas.limb(p, q, widths[i], widths[i + 1], fills[i])

    def arm(self, side: int) -> None:
        b, p, h = self.body, self.person, self.h
        light = 1.0 if side == 0 else FAR_SIDE
        skin = shade(p.skin, light)
        sleeve = shade(p.upper_rgb, light * 0.92)
        long_sleeve = p.upper in LONG_SLEEVES
        upper = skin if p.upper == "tank top" else sleeve
        thick = (0.075 if p.upper in ("jacket", "hoodie", "coat") else 0.064) * self.girth * h
        self._stroke(
            [b.shoulders[side], b.elbows[side], b.hands[side]],
            [thick, thick * 0.86, 0.044 * h],
            [upper, sleeve if long_sleeve else skin],
            shade(sleeve, 0.55) if long_sleeve else shade(skin, 0.6),
        )
        self.canvas.circle(b.hands[side], 0.031 * h, skin)

    def leg(self, side: int) -> None:
        b, p, h = self.body, self.person, self.h
        light = 1.0 if side == 0 else FAR_SIDE
        skin, cloth = shade(p.skin, light), shade(p.lower_rgb, light)
        long_leg = p.lower == "trousers"
        bare = p.lower in ("skirt", "dress")
        thigh, shin = (skin if bare else cloth), (cloth if long_leg else skin)
        width = self.girth * h * (1.0 if long_leg else 0.9)
        ankle, toe = b.ankles[side], b.toes[side]
        self._stroke([ankle, toe], [0.052 * h, 0.040 * h], [shade(p.shoes, light)], (25, 22, 22))
        self._stroke(
            [b.hips[side], b.knees[side], ankle],
            [0.108 * width, 0.080 * width, 0.056 * width],
            [thigh, shin],
            shade(shin, 0.55),
        )
        if p.lower == "shorts":
            self.canvas.limb(b.hips[side], b.knees[side], 0.118 * width, 0.104 * width, cloth)

    def _torso_outline(self, grow: float) -> list[Point]:
        b, h, g = self.body, self.h, self.girth
        u, f = b.torso_up, b.torso_ahead
        belly = 0.012 if self.person.build != "heavy" else 0.045
        half_s, half_w, half_h = 0.092 * g + grow, 0.074 * g + grow, 0.080 * g + grow
        return [
            _add(b.neck, ((0.004 + grow) * h, u), (-0.042 * h, f)),
            _add(b.neck, ((0.004 + grow) * h, u), (0.042 * h, f)),
            _add(b.neck, (-0.035 * h, u), (half_s * h, f)),
            _add(b.pelvis, (0.12 * h, u), ((half_w + belly) * h, f)),
            _add(b.pelvis, ((-0.035 - grow) * h, u), ((half_h + belly * 0.4) * h, f)),
            _add(b.pelvis, ((-0.035 - grow) * h, u), (-half_h * h, f)),
            _add(b.pelvis, (0.12 * h, u), (-half_w * h, f)),
            _add(b.neck, (-0.035 * h, u), (-half_s * h, f)),
        ]

    def _skirt(self, length: float, flare: float, fill: Colour) -> None:
        """Draw cloth around the thighs, from the waist in the direction of the knees."""
        b, h, g = self.body, self.h, self.girth
        knees = (
            (b.knees[0][0] + b.knees[1][0]) / 2,
            (b.knees[0][1] + b.knees[1][1]) / 2,
        )
        hem = _add(b.pelvis, (length, (knees[0] - b.pelvis[0], knees[1] - b.pelvis[1])))
        dx, dy = hem[0] - b.pelvis[0], hem[1] - b.pelvis[1]
        size = math.hypot(dx, dy) or 1e-6
        nx, ny = -dy / size, dx / size
        spread = abs((b.knees[0][0] - b.knees[1][0]) * nx + (b.knees[0][1] - b.knees[1][1]) * ny)
        half = (flare * g * h) + spread * 0.42 * length
        waist = _add(b.pelvis, (0.05 * h, b.torso_up))
        top = 0.078 * g * h
        for grow, colour in ((0.008 * h, shade(fill, 0.55)), (0.0, fill)):
            self.canvas.poly(
                [
                    (waist[0] + nx * (top + grow), waist[1] + ny * (top + grow)),
                    (hem[0] + nx * (half + grow), hem[1] + ny * (half + grow)),
                    (hem[0] - nx * (half + grow), hem[1] - ny * (half + grow)),
                    (waist[0] - nx * (top + grow), waist[1] - ny * (top + grow)),
                ],
                colour,
            )

    def garments(self) -> None:
        b, p, h, c = self.body, self.person, self.h, self.canvas
        u, f = b.torso_up, b.torso_ahead
        if p.lower == "skirt":
            self._skirt(0.80, 0.115, p.lower_rgb)
        elif p.lower == "dress":
            self._skirt(0.95, 0.135, p.upper_rgb)
        elif p.upper == "coat":
            self._skirt(0.72, 0.105, p.upper_rgb)
        c.limb(_add(b.neck, (-0.02 * h, u)), b.head, 0.062 * h, 0.06 * h, shade(p.skin, 0.86))
        if p.upper == "hoodie":
            c.circle(
                _add(b.neck, (0.012 * h, u), (-0.055 * h, f)), 0.062 * h, shade(p.upper_rgb, 0.72)
            )
        c.poly(self._torso_outline(0.008), shade(p.upper_rgb, 0.55))
        c.poly(self._torso_outline(0.0), p.upper_rgb)
        if p.upper == "striped shirt":
            band = (248, 248, 246) if sum(p.upper_rgb) < 560 else (50, 50, 60)
            for at in (0.05, 0.125, 0.20):
                mid = _add(b.pelvis, (at * h, u))
                half = 0.076 * self.girth * h
                c.line([_add(mid, (-half, f)), _add(mid, (half, f))], 0.034 * h, band)
        elif p.upper in ("jacket", "coat"):
            inner = (245, 245, 242) if sum(p.upper_rgb) < 600 else (60, 62, 70)
            c.poly(
                [
                    _add(b.neck, (0.0, u), (0.000 * h, f)),
                    _add(b.neck, (0.0, u), (0.050 * h, f)),
                    _add(b.pelvis, (0.03 * h, u), (0.042 * h, f)),
                    _add(b.pelvis, (0.03 * h, u), (0.020 * h, f)),
                ],
                inner,
            )
        elif p.upper == "hoodie":
            pocket = shade(p.upper_rgb, 0.78)
            c.poly(
                [
                    _add(b.pelvis, (0.09 * h, u), (-0.01 * h, f)),
                    _add(b.pelvis, (0.09 * h, u), (0.06 * h, f)),
                    _add(b.pelvis, (0.01 * h, u), (0.075 * h, f)),
                    _add(b.pelvis, (0.01 * h, u), (-0.025 * h, f)),
                ],
                pocket,
            )
        elif p.upper == "dress":
            waist = _add(b.pelvis, (0.07 * h, u))
            half = 0.080 * self.girth * h
            belt = shade(p.upper_rgb, 0.6)
            c.line([_add(waist, (-half, f)), _add(waist, (half, f))], 0.024 * h, belt)

    def _at_head(self, up: float, ahead: float) -> Point:
        return _add(self.body.head, (up * self.h, self.body.up), (ahead * self.h, self.body.ahead))

    def hair_behind(self) -> None:
        p, h = self.person, self.h
        hair = HAIR[p.hair_colour]
        if p.hair_style == "long":
            start, end = self._at_head(0.01, -0.035), self._at_head(-0.19, -0.070)
            self.canvas.limb(start, end, 0.155 * h, 0.115 * h, shade(hair, 0.85))
        elif p.hair_style == "ponytail":
            mid, end = self._at_head(0.035, -0.125), self._at_head(-0.10, -0.155)
            self._stroke(
                [self._at_head(0.03, -0.05), mid, end],
                [0.05 * h, 0.055 * h, 0.03 * h],
                [hair, hair],
                shade(hair, 0.6),
            )
        elif p.hair_style == "bun":
            self.canvas.circle(self._at_head(0.075, -0.075), 0.046 * h, shade(hair, 0.85))

    def _dome(self, up: float, radius: float, fill: Colour, flatten: float = 1.0) -> None:
        """Draw the upper half of a disk on the head."""
        points = [
            self._at_head(up + math.sin(a) * radius * flatten, math.cos(a) * radius - 0.004)
            for a in np.linspace(0, math.pi, 12).tolist()
        ]
        self.canvas.poly(points, fill)

    def head(self) -> None:
        p, h, c = self.person, self.h, self.canvas
        hair = HAIR[p.hair_colour]
        bald = p.hair_style == "bald"
        c.circle(self.body.head, (HEAD + 0.009) * h, shade(p.skin if bald else hair, 0.55))
        c.circle(self.body.head, HEAD * h, p.skin if bald else hair)
        c.circle(self._at_head(-0.014, 0.016), 0.068 * h, p.skin)  # the face
        c.circle(self._at_head(-0.012, -0.022), 0.017 * h, shade(p.skin, 0.85))  # the ear
        if not bald:
            self._dome(0.024, 0.078, hair, 0.80)
            if p.hair_style == "long":
                c.limb(
                    self._at_head(0.03, -0.045),
                    self._at_head(-0.13, -0.068),
                    0.085 * h,
                    0.07 * h,
                    hair,
                )
        elif p.hair_colour == "grey":
            c.limb(
                self._at_head(-0.005, -0.055),
                self._at_head(-0.04, -0.05),
                0.045 * h,
                0.035 * h,
                hair,
            )
        c.circle(self._at_head(0.000, 0.050), 0.0115 * h, (25, 22, 22))  # the eye
        c.circle(self._at_head(-0.016, 0.084), 0.014 * h, p.skin)  # the nose
        c.line(
            [self._at_head(-0.046, 0.035), self._at_head(-0.043, 0.062)],
            0.010 * h,
            shade(p.skin, 0.5),
        )
        self._hat()

    def _hat(self) -> None:
        p, h, c = self.person, self.h, self.canvas
        if p.hat is None:
            return
        fill = COLOURS[p.hat_colour]
        dark = shade(fill, 0.6)
        if p.hat == "cap":
            self._dome(0.022, 0.096, dark)
            self._dome(0.030, 0.088, fill)
            c.limb(
                self._at_head(0.034, 0.05), self._at_head(0.026, 0.155), 0.030 * h, 0.020 * h, dark
            )
        elif p.hat == "beanie":
            self._dome(0.010, 0.100, dark, 1.08)
            self._dome(0.018, 0.093, fill, 1.12)
            c.limb(
                self._at_head(0.02, -0.085),
                self._at_head(0.02, 0.08),
                0.036 * h,
                0.036 * h,
                shade(fill, 1.3),
            )
            c.circle(self._at_head(0.125, 0.0), 0.034 * h, (248, 248, 248))
        elif p.hat == "helmet":
            self._dome(0.002, 0.108, dark, 1.05)
            self._dome(0.010, 0.100, fill, 1.02)
            c.line(
                [self._at_head(0.06, -0.08), self._at_head(0.075, 0.07)],
                0.016 * h,
                shade(fill, 1.55),
            )
        else:  # a sun hat
            c.limb(
                self._at_head(0.036, -0.145),
                self._at_head(0.036, 0.145),
                0.034 * h,
                0.034 * h,
                dark,
            )
            self._dome(0.040, 0.080, fill)
            c.limb(
                self._at_head(0.042, -0.135),
                self._at_head(0.042, 0.135),
                0.022 * h,
                0.022 * h,
                fill,
            )
