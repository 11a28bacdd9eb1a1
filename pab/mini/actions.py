"""Actions of people: 16 normal ones and 17 anomalies, each drawn as a pose with objects.

An action draws itself on a :class:`Stage`. The tables at the end state where an action may happen
and which anomalies may follow a normal action; ``captions.py`` contains the wording.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pab.mini import props
from pab.mini.canvas import Canvas, Colour
from pab.mini.people import COLOURS, Body, Figure, Person, Pose, solve
from pab.mini.scenes import stair_height


@dataclass(slots=True)
class Stage:
    """Setting of an action: people, objects, the ground under the feet, and random draws."""

    c: Canvas
    rng: np.random.Generator
    person: Person
    other: Person  # the second adult of collisions and fights
    item: tuple[str, Colour] | None  # what the person carries
    prop_colour: Colour  # of bicycles and cars
    x: float
    ground: float
    h: float
    facing: int
    drops_item: bool  # the carried item lies on the ground

    def body(self, pose: Pose, x: float | None = None, ground: float | None = None) -> Body:
        """Return the person's body in this pose, slightly jittered, inside the picture."""
        at, floor = self.x if x is None else x, self.ground if ground is None else ground
        return inside(pose.jittered(self.rng), at, floor, self.h, self.facing)

    def make_room(self, ahead: float, behind: float) -> None:
        """Move sideways until this many body heights ahead and behind fit into the picture."""
        low, high = (behind, ahead) if self.facing > 0 else (ahead, behind)
        least, most = 0.01 + low * self.h, 0.99 - high * self.h
        self.x = (least + most) / 2 if least > most else min(most, max(least, self.x))

    def shadow(self, x: float, width: float, ground: float | None = None) -> None:
        floor = self.ground if ground is None else ground
        self.c.soft_ellipse(x, floor, width * self.h, 0.035 * self.h, (10, 10, 20), 130)

    def figure(self, pose: Pose, x: float | None = None, ground: float | None = None) -> Figure:
        body = self.body(pose, x, ground)
        self.shadow((body.points()[1][0] + body.neck[0]) / 2, 0.26, ground)
        return Figure(self.c, self.person, body)

    def perform(self, pose: Pose) -> Body:
        """Draw the person with the carried item, in the hand or fallen to the ground."""
        figure = self.figure(pose)
        self.wear(figure)
        figure.back()
        if self.item and self.item[0] != "backpack" and self.drops_item:
            self.dropped(figure.body)
        elif self.item and self.item[0] != "backpack":
            name, colour = self.item
            props.CARRIED[name](self.c, figure.body.hands[0], self.h, colour, self.facing)
        figure.front()
        return figure.body

    def wear(self, figure: Figure) -> None:
        if self.item and self.item[0] == "backpack":
            b = figure.body
            back = (-b.torso_ahead[0], -b.torso_ahead[1])
            props.backpack(self.c, b.neck, b.pelvis, back, self.h, self.item[1])

    def dropped(self, body: Body) -> None:
        assert self.item is not None
        name, colour = self.item
        low = min(x for x, _ in body.points())
        high = max(x for x, _ in body.points())
        reach = 0.16 * self.h
        x = low - reach if self.facing > 0 else high + reach
        if not 0.06 < x < 0.94:  # no room behind the person: in front
            x = high + reach if self.facing > 0 else low - reach
        lift = {"umbrella": -0.14, "balloon": 0.0, "suitcase": 0.40, "flowers": 0.06}.get(
            name, 0.18
        )
        if name == "umbrella":  # the canopy rests on the ground
            props.umbrella(self.c, (x, self.ground + 0.34 * self.h), self.h, colour, self.facing)
            return
        props.CARRIED[name](self.c, (x, self.ground - lift * self.h), self.h, colour, self.facing)

    def second(self, pose: Pose, x: float, facing: int, ground: float | None = None) -> None:
        """Draw the other adult."""
        floor = self.ground if ground is None else ground
        body = inside(pose.jittered(self.rng), x, floor, self.h, facing, margin=-0.08)
        self.c.soft_ellipse(body.pelvis[0], floor, 0.2 * self.h, 0.03 * self.h, (10, 10, 20), 120)
        Figure(self.c, self.other, body).draw()


def inside(
    pose: Pose, x: float, ground: float, h: float, facing: int, margin: float = 0.045
) -> Body:
    """Return the posed body, moved sideways only as far as needed to fit into the picture."""
    body = solve(pose, x, ground, h, facing)
    across = [px for px, _ in body.points()]
    shift = max(0.0, margin - min(across)) - max(0.0, max(across) - (1 - margin))
    return solve(pose, x + shift, ground, h, facing) if shift else body


# --- normal actions --------------------------------------------------------------------------
def walk(s: Stage) -> None:
    s.perform(Pose(4, 0, (-26, 14), (28, 22), (26, 6), (-24, 14)))


def run(s: Stage) -> None:
    s.perform(Pose(16, 0, (-55, 88), (48, 92), (62, 72), (-34, 62), lift=0.035))


def ride(s: Stage) -> None:
    s.make_room(0.56, 0.40)
    body = inside(
        Pose(26, -14, (60, 10), (64, 10), (62, 68), (24, 26)), s.x, s.ground, s.h, s.facing
    )
    hub = body.pelvis[0] + 0.09 * s.h * s.facing
    floor = s.ground + 0.01
    s.shadow(hub, 0.5)
    rise = body.pelvis[1] - (floor - 0.54 * s.h)
    figure = Figure(
        s.c,
        s.person,
        inside(
            Pose(26, -14, (60, 10), (64, 10), (62, 68), (24, 26), lift=0.02 + rise / s.h),
            s.x,
            s.ground,
            s.h,
            s.facing,
        ),
    )
    s.wear(figure)
    figure.back()
    props.bicycle(s.c, hub, floor, s.h * 0.98, s.facing, s.prop_colour)
    figure.leg(0)
    figure.front()


def sit(s: Stage) -> None:
    s.make_room(0.42, 0.42)
    props.bench(s.c, s.x, s.ground, s.h)
    pose = Pose(-4, 0, (32, 30), (36, 30), (84, 84), (78, 82))
    figure = s.figure(pose, s.x + 0.07 * s.h * s.facing)
    s.wear(figure)
    figure.draw()


def climb(s: Stage) -> None:
    f = s.facing
    s.make_room(0.36, 0.30)
    s.h = min(s.h, (s.ground - 0.02) / 1.24)  # the head stays in the picture
    foot, top = (s.x + 0.02 * f, s.ground), (s.x + 0.30 * s.h * f, max(0.02, s.ground - 1.35 * s.h))
    props.ladder(s.c, foot, top, 0.22 * s.h)
    pose = Pose(12, -14, (138, 22), (112, 34), (58, 84), (14, 16))
    body = s.body(pose, s.x + 0.07 * s.h * f, s.ground - 0.22 * s.h)
    figure = Figure(s.c, s.person, body)
    s.wear(figure)
    figure.draw()


def jump(s: Stage) -> None:
    s.h = min(s.h, (s.ground - 0.02) / 1.20)
    s.shadow(s.x, 0.2)
    figure = Figure(
        s.c,
        s.person,
        s.body(
            Pose(-4, 0, (158, 10), (-158, 0), (-38, 62), (34, 76)), ground=s.ground - 0.15 * s.h
        ),
    )
    s.wear(figure)
    figure.draw()


def carry(s: Stage) -> None:
    s.make_room(0.40, 0.22)
    figure = s.figure(Pose(-5, 0, (34, 58), (38, 52), (20, 6), (-18, 10)))
    s.wear(figure)
    figure.back()
    b = figure.body
    at = (b.pelvis[0] + 0.22 * s.h * s.facing, b.pelvis[1] - 0.10 * s.h)
    props.box(s.c, at, 0.30 * s.h)
    figure.front()


def skateboard(s: Stage) -> None:
    s.make_room(0.38, 0.38)
    figure = s.figure(
        Pose(14, -8, (-72, 14), (78, 10), (-14, 30), (46, 44)), ground=s.ground - 0.07 * s.h
    )
    s.wear(figure)
    props.skateboard(s.c, (figure.body.ankles[0][0] + figure.body.ankles[1][0]) / 2, s.ground, s.h)
    figure.draw()


def football(s: Stage) -> None:
    s.make_room(0.60, 0.30)
    body = s.perform(Pose(-14, 6, (-58, 10), (62, 20), (56, 4), (-14, 8)))
    props.ball(
        s.c, (body.toes[0][0] + 0.10 * s.h * s.facing, body.toes[0][1] - 0.02 * s.h), 0.075 * s.h
    )


def push_cart(s: Stage) -> None:
    s.make_room(0.62, 0.38)
    figure = s.figure(
        Pose(16, -10, (52, 12), (56, 12), (30, 8), (-26, 14)), s.x - 0.16 * s.h * s.facing
    )
    s.wear(figure)
    figure.back()
    at = figure.body.hands[0][0] + 0.28 * s.h * s.facing
    props.cart(s.c, at, s.ground, s.h, s.facing)
    figure.front()


def sweep(s: Stage) -> None:
    s.make_room(0.48, 0.20)
    figure = s.figure(Pose(18, 6, (44, 30), (30, 26), (14, 8), (-14, 6)))
    s.wear(figure)
    figure.back()
    hand = figure.body.hands[0]
    props.broom(
        s.c,
        (hand[0] - 0.10 * s.h * s.facing, hand[1] - 0.26 * s.h),
        (hand[0] + 0.22 * s.h * s.facing, s.ground - 0.03 * s.h),
        s.h,
    )
    figure.front()


def lift_weights(s: Stage) -> None:
    s.make_room(0.44, 0.44)
    s.h = min(s.h, (s.ground - 0.04) / 1.32)
    figure = s.figure(Pose(0, 0, (168, 4), (-172, 0), (-14, 2), (14, 2)))
    figure.back()
    hands = figure.body.hands
    figure.front()
    props.barbell(s.c, ((hands[0][0] + hands[1][0]) / 2, (hands[0][1] + hands[1][1]) / 2), s.h)


def skate(s: Stage) -> None:
    body = s.perform(Pose(24, -14, (-68, 10), (64, 24), (26, 30), (-48, 8)))
    for ankle, toe in zip(body.ankles, body.toes, strict=True):
        s.c.line(
            [
                (ankle[0] - 0.02 * s.h * s.facing, ankle[1] + 0.045 * s.h),
                (toe[0] + 0.02 * s.h * s.facing, toe[1] + 0.045 * s.h),
            ],
            0.018 * s.h,
            (70, 84, 104),
        )


def ski(s: Stage) -> None:
    figure = s.figure(Pose(28, -18, (30, 62), (36, 58), (44, 58), (34, 50)), ground=s.ground - 0.01)
    s.wear(figure)
    b = figure.body
    for ankle in b.ankles:
        s.c.line(
            [
                (ankle[0] - 0.26 * s.h * s.facing, ankle[1] + 0.035 * s.h),
                (ankle[0] + 0.32 * s.h * s.facing, ankle[1] + 0.035 * s.h),
                (ankle[0] + 0.38 * s.h * s.facing, ankle[1] - 0.01 * s.h),
            ],
            0.026 * s.h,
            (210, 48, 46),
        )
    for hand in b.hands:
        s.c.line(
            [
                (hand[0] + 0.03 * s.h * s.facing, hand[1] - 0.06 * s.h),
                (hand[0] - 0.24 * s.h * s.facing, hand[1] + 0.34 * s.h),
            ],
            0.014 * s.h,
            (50, 52, 58),
        )
    figure.draw()


def _water_over(s: Stage, level: float) -> None:
    """Cover the person below ``level`` with water in the colour of the water beside them."""
    water = s.c.image.getpixel((2, int(0.97 * s.c.side)))
    fill: Colour = (int(water[0]), int(water[1]), int(water[2]))  # type: ignore[index]
    s.c.ellipse(s.x, level + 0.055 * s.h, 0.52 * s.h, 0.075 * s.h, props.shade(fill, 1.35))
    s.c.ellipse(s.x, level + 0.075 * s.h, 0.50 * s.h, 0.075 * s.h, fill)
    s.c.rect(s.x - 0.50 * s.h, level + 0.075 * s.h, s.x + 0.50 * s.h, level + 0.13 * s.h, fill)


def swim(s: Stage) -> None:
    level = s.ground - 0.16 * s.h
    body = inside(
        Pose(76, -46, (158, 18), (40, 10), (-82, 4), (-76, 4)),
        s.x,
        level + 0.12 * s.h,
        s.h,
        s.facing,
    )
    figure = Figure(s.c, s.person, body)
    figure.back()
    s.x = (body.pelvis[0] + body.neck[0]) / 2
    _water_over(s, level + 0.02 * s.h)
    figure.front()
    foam = body.toes[0][0]
    for dx in (-0.06, 0.0, 0.06):
        s.c.circle((foam + dx * s.h, level + 0.05 * s.h), 0.035 * s.h, (240, 250, 252))


def go_down_stairs(s: Stage) -> None:
    _on_stairs(s)
    s.perform(Pose(-2, 8, (-20, 16), (22, 20), (34, 24), (-10, 34)))


def _on_stairs(s: Stage) -> None:
    """Put the feet on the step under the person."""
    s.x = min(0.72, max(0.28, s.x))
    s.ground = stair_height(s.x) + 0.03
    s.h = min(s.h, (s.ground - 0.04) / 1.05)


# --- anomalies -------------------------------------------------------------------------------
def fall_forward(s: Stage) -> None:
    s.perform(Pose(62, -22, (66, 14), (92, 10), (-52, 30), (-12, 44)))


def lie(s: Stage) -> None:
    s.perform(Pose(-89, 4, (-100, 14), (84, 10), (88, 3), (122, 84)))


def hit_by_car(s: Stage) -> None:
    f = s.facing
    centre = min(0.70, max(0.30, s.x))
    length = 0.95 * s.h + 0.12
    props.car(
        s.c,
        centre - f * (0.30 * s.h + 0.06 + length * 0.28),
        s.ground + 0.03,
        length,
        f,
        s.prop_colour,
    )
    pose = Pose(-58, -10, (-128, 0), (112, 20), (58, 30), (96, 40), lift=0.20)
    s.x = centre + 0.16 * f
    s.perform(pose)
    nose = centre - f * (0.30 * s.h + 0.06 - length * 0.22)
    for dx, dy in ((0.02, -0.10), (0.05, -0.16), (0.06, -0.05)):
        s.c.line(
            [
                (nose + f * dx, s.ground + dy * 2 * s.h),
                (nose + f * (dx + 0.05), s.ground + (dy * 2 - 0.08) * s.h),
            ],
            0.012,
            (255, 236, 120),
        )


def collide(s: Stage) -> None:
    f = s.facing
    s.make_room(0.50, 0.40)
    s.second(Pose(-30, -12, (70, 40), (-80, 10), (52, 20), (-4, 10)), s.x + 0.25 * s.h * f, -f)
    s.x -= 0.08 * s.h * f
    s.perform(Pose(-26, -10, (-84, 12), (86, 30), (46, 16), (-8, 8)))
    _stars(s, s.x + 0.16 * s.h * f, s.ground - 0.98 * s.h)


def _stars(s: Stage, x: float, y: float) -> None:
    """Draw the stars that mark a blow in comic strips."""
    size = 0.085 * s.h
    points = []
    for i in range(16):
        r = size * (1.0 if i % 2 == 0 else 0.45)
        points.append((x + r * float(np.cos(i * np.pi / 8)), y + r * float(np.sin(i * np.pi / 8))))
    s.c.poly(points, (255, 214, 40))


def slip_off_bicycle(s: Stage) -> None:
    f = s.facing
    s.make_room(0.66, 0.56)
    props.bicycle(s.c, s.x - 0.20 * s.h * f, s.ground, s.h * 0.98, f, s.prop_colour, tilt=-34.0)
    figure = s.figure(
        Pose(58, -20, (104, 10), (128, 6), (-30, 40), (-62, 12), lift=0.10), s.x + 0.22 * s.h * f
    )
    s.wear(figure)
    figure.draw()


def fall_off_ladder(s: Stage) -> None:
    f = s.facing
    s.make_room(0.50, 0.56)
    props.ladder(
        s.c,
        (s.x + 0.10 * s.h * f, s.ground),
        (s.x + 0.62 * s.h * f, max(0.02, s.ground - 1.25 * s.h)),
        0.22 * s.h,
    )
    figure = s.figure(
        Pose(-62, -8, (150, 10), (98, 10), (62, 20), (104, 30), lift=0.26), s.x - 0.16 * s.h * f
    )
    s.wear(figure)
    figure.draw()


def tumble_down_stairs(s: Stage) -> None:
    _on_stairs(s)
    s.perform(Pose(112, 20, (60, 30), (96, 20), (-118, 40), (-84, 66), lift=0.04))


def hit_by_ball(s: Stage) -> None:
    f = s.facing
    s.make_room(0.42, 0.30)
    body = s.perform(Pose(-24, -24, (-62, 6), (52, 90), (38, 10), (-6, 8)))
    at = (body.head[0] + 0.145 * s.h * f, body.head[1] - 0.03 * s.h)
    for dy in (-0.06, 0.0, 0.06):
        s.c.line(
            [
                (at[0] + 0.10 * s.h * f, at[1] + (dy - 0.02) * s.h),
                (at[0] + 0.27 * s.h * f, at[1] + (dy - 0.07) * s.h),
            ],
            0.014 * s.h,
            (250, 250, 250),
        )
    props.ball(s.c, at, 0.078 * s.h)


def drop_box(s: Stage) -> None:
    s.make_room(0.62, 0.30)
    figure = s.figure(
        Pose(-10, -4, (58, 70), (74, 66), (-8, 4), (16, 8)), s.x - 0.14 * s.h * s.facing
    )
    s.wear(figure)
    figure.draw()
    at = (figure.body.pelvis[0] + 0.30 * s.h * s.facing, s.ground - 0.10 * s.h)
    props.open_box(s.c, at, 0.28 * s.h, s.facing)


def fall_off_skateboard(s: Stage) -> None:
    f = s.facing
    s.make_room(0.66, 0.56)
    props.skateboard(s.c, s.x + 0.40 * s.h * f, s.ground - 0.14 * s.h, s.h, tilt=-38.0 * f)
    figure = s.figure(
        Pose(-60, 20, (-92, 0), (118, 10), (96, 34), (58, 12), lift=0.05), s.x - 0.10 * s.h * f
    )
    s.wear(figure)
    figure.draw()


def attacked_by_dog(s: Stage) -> None:
    f = s.facing
    s.make_room(0.70, 0.30)
    body = s.perform(Pose(-18, -6, (78, 34), (104, 30), (24, 10), (-24, 14)))
    tone: Colour = ((70, 46, 30), (34, 32, 34), (196, 170, 130))[int(s.rng.integers(3))]
    s.shadow(body.pelvis[0] + 0.42 * s.h * f, 0.2)
    props.dog(s.c, body.pelvis[0] + 0.40 * s.h * f, s.ground, 0.46 * s.h, -f, tone, leaping=True)


def drown(s: Stage) -> None:
    level = s.ground - 0.16 * s.h
    body = inside(
        Pose(-6, -22, (158, 24), (-150, 0), (-8, 10), (14, 10)),
        s.x,
        level + 0.56 * s.h,
        s.h,
        s.facing,
    )
    figure = Figure(s.c, s.person, body)
    s.x = body.pelvis[0]
    figure.hair_behind()
    figure.arm(1)
    figure.garments()
    figure.head()
    figure.arm(0)
    base = body.neck[1] + 0.08 * s.h
    _cover_with_water(s, base)
    for dx, dy in ((-0.2, -0.02), (-0.12, -0.06), (0.14, -0.05), (0.22, -0.01), (0.0, 0.02)):
        s.c.circle((s.x + dx * s.h, base + dy * s.h + 0.05 * s.h), 0.040 * s.h, (240, 250, 252))


def _cover_with_water(s: Stage, top: float) -> None:
    water = s.c.image.getpixel((2, int(0.97 * s.c.side)))
    fill: Colour = (int(water[0]), int(water[1]), int(water[2]))  # type: ignore[index]
    s.c.ellipse(s.x, top + 0.10 * s.h, 0.30 * s.h, 0.085 * s.h, props.shade(fill, 1.4))
    s.c.ellipse(s.x, top + 0.12 * s.h, 0.28 * s.h, 0.085 * s.h, fill)
    s.c.rect(s.x - 0.20 * s.h, top + 0.12 * s.h, s.x + 0.20 * s.h, min(1.0, top + 0.62 * s.h), fill)


def crushed_by_barbell(s: Stage) -> None:
    body = s.perform(Pose(-88, 0, (-150, 60), (150, 0), (66, 62), (84, 10)))
    props.barbell(
        s.c, (body.pelvis[0] * 0.45 + body.neck[0] * 0.55, body.neck[1] - 0.10 * s.h), s.h * 0.9
    )


def fall_off_bench(s: Stage) -> None:
    s.make_room(0.66, 0.50)
    props.bench(s.c, s.x - 0.10 * s.h * s.facing, s.ground - 0.02, s.h)
    figure = s.figure(
        Pose(98, -30, (62, 20), (128, 10), (-58, 60), (-92, 70), lift=0.0),
        s.x + 0.26 * s.h * s.facing,
        s.ground + 0.02,
    )
    s.wear(figure)
    figure.draw()


def overturn_cart(s: Stage) -> None:
    s.make_room(0.66, 0.56)
    f = s.facing
    props.cart(s.c, s.x + 0.30 * s.h * f, s.ground, s.h, f, tipped=True)
    figure = s.figure(
        Pose(74, -24, (112, 10), (84, 12), (-40, 36), (-76, 16), lift=0.06), s.x - 0.14 * s.h * f
    )
    s.wear(figure)
    figure.draw()


def fall_on_ice(s: Stage) -> None:
    body = s.perform(Pose(-48, 20, (-76, 0), (104, 10), (104, 6), (70, 20)))
    for ankle, toe in zip(body.ankles, body.toes, strict=True):
        s.c.line([ankle, toe], 0.022 * s.h, (70, 84, 104))


def crash_on_skis(s: Stage) -> None:
    f = s.facing
    figure = s.figure(Pose(84, 0, (130, 10), (60, 20), (-126, 30), (-70, 56)))
    b = figure.body
    for ankle, tilt in zip(b.ankles, (0.9, -0.5), strict=True):
        s.c.line(
            [
                (ankle[0] - 0.24 * s.h * f, ankle[1] - tilt * 0.22 * s.h),
                (ankle[0] + 0.24 * s.h * f, ankle[1] + tilt * 0.10 * s.h),
            ],
            0.026 * s.h,
            (210, 48, 46),
        )
    s.wear(figure)
    figure.draw()
    for dx in (-0.2, -0.05, 0.1, 0.24):
        s.c.circle((b.neck[0] + dx * s.h, s.ground - 0.02 * s.h), 0.05 * s.h, (250, 252, 255))


@dataclass(frozen=True, slots=True)
class Action:
    """An action: its label in PAB's style, its drawing function and its conditions."""

    label: str
    draw: Callable[[Stage], None]
    hands_free: bool = True  # an item may be carried besides the action's own objects
    adult_only: bool = False
    leads_to: tuple[str, ...] = ()  # for a normal action: its own anomalies
    scenes: tuple[str, ...] = ()  # where it may happen; empty: anywhere but the pool and the stairs
    drops_item: bool = False  # the carried item falls to the ground


OUTDOORS_FLAT = (
    "road",
    "park",
    "beach",
    "snowfield",
    "forest",
    "car park",
    "playground",
    "field",
    "bridge",
)
NORMAL: dict[str, Action] = {
    "walk": Action("Walking", walk),
    "run": Action("Running", run, scenes=(*OUTDOORS_FLAT, "gym", "corridor", "railway station")),
    "ride": Action(
        "Cycling",
        ride,
        False,
        leads_to=("slip off bicycle",),
        scenes=("road", "park", "forest", "car park", "field", "bridge", "playground"),
    ),
    "sit": Action(
        "Sitting",
        sit,
        False,
        leads_to=("fall off bench",),
        scenes=(
            "road",
            "park",
            "beach",
            "railway station",
            "playground",
            "gym",
            "corridor",
            "snowfield",
            "bridge",
            "ice rink",
        ),
    ),
    "climb": Action(
        "Climbing",
        climb,
        False,
        adult_only=True,
        leads_to=("fall off ladder",),
        scenes=(
            "construction site",
            "warehouse",
            "supermarket",
            "kitchen",
            "office",
            "living room",
            "field",
            "corridor",
        ),
    ),
    "jump": Action(
        "Jumping",
        jump,
        False,
        scenes=(
            "park",
            "beach",
            "snowfield",
            "playground",
            "field",
            "gym",
            "living room",
            "forest",
        ),
    ),
    "carry": Action(
        "Carrying",
        carry,
        False,
        leads_to=("drop box",),
        scenes=(
            "warehouse",
            "office",
            "road",
            "construction site",
            "railway station",
            "corridor",
            "kitchen",
            "car park",
            "supermarket",
        ),
    ),
    "skateboard": Action(
        "Skateboarding",
        skateboard,
        False,
        leads_to=("fall off skateboard",),
        scenes=("road", "park", "car park", "playground", "bridge"),
    ),
    "football": Action(
        "Playing football",
        football,
        False,
        scenes=("park", "beach", "playground", "field", "snowfield", "gym"),
    ),
    "push cart": Action(
        "Pushing a cart",
        push_cart,
        False,
        adult_only=True,
        leads_to=("overturn cart",),
        scenes=("supermarket", "warehouse", "car park", "corridor", "railway station"),
    ),
    "sweep": Action(
        "Sweeping",
        sweep,
        False,
        scenes=(
            "kitchen",
            "supermarket",
            "road",
            "railway station",
            "corridor",
            "living room",
            "office",
            "warehouse",
        ),
    ),
    "lift weights": Action(
        "Lifting weights",
        lift_weights,
        False,
        adult_only=True,
        leads_to=("crushed by barbell",),
        scenes=("gym",),
    ),
    "skate": Action("Skating", skate, scenes=("ice rink",), leads_to=("fall on ice",)),
    "ski": Action("Skiing", ski, False, scenes=("snowfield",), leads_to=("crash on skis",)),
    "swim": Action("Swimming", swim, False, scenes=("swimming pool",), leads_to=("drown",)),
    "go down stairs": Action(
        "Going downstairs", go_down_stairs, scenes=("stairs",), leads_to=("tumble down stairs",)
    ),
}
ANOMALY: dict[str, Action] = {
    "fall forward": Action("Falling", fall_forward, drops_item=True),
    "lie": Action("Lying", lie, drops_item=True),
    "hit by car": Action("Being hit by a car", hit_by_car, scenes=("road", "car park", "bridge")),
    "collide": Action("Colliding", collide, adult_only=True, drops_item=True),
    "slip off bicycle": Action(
        "Slipping off a bicycle",
        slip_off_bicycle,
        False,
        scenes=NORMAL["ride"].scenes,
    ),
    "fall off ladder": Action(
        "Falling off a ladder", fall_off_ladder, False, scenes=NORMAL["climb"].scenes
    ),
    "tumble down stairs": Action(
        "Tumbling downstairs", tumble_down_stairs, scenes=("stairs",), drops_item=True
    ),
    "hit by ball": Action(
        "Being hit by a ball",
        hit_by_ball,
        scenes=("park", "beach", "playground", "field", "gym", "snowfield"),
    ),
    "drop box": Action("Dropping a box", drop_box, False, scenes=NORMAL["carry"].scenes),
    "fall off skateboard": Action(
        "Falling off a skateboard", fall_off_skateboard, False, scenes=NORMAL["skateboard"].scenes
    ),
    "attacked by dog": Action(
        "Being attacked by a dog",
        attacked_by_dog,
        scenes=("park", "road", "field", "beach", "forest", "playground", "bridge"),
    ),
    "drown": Action("Drowning", drown, False, scenes=("swimming pool",)),
    "crushed by barbell": Action(
        "Being crushed by weights", crushed_by_barbell, False, scenes=("gym",)
    ),
    "fall off bench": Action(
        "Falling off a bench", fall_off_bench, False, scenes=NORMAL["sit"].scenes
    ),
    "overturn cart": Action(
        "Overturning a cart", overturn_cart, False, scenes=NORMAL["push cart"].scenes
    ),
    "fall on ice": Action("Falling on ice", fall_on_ice, scenes=("ice rink",), drops_item=True),
    "crash on skis": Action("Crashing on skis", crash_on_skis, False, scenes=("snowfield",)),
}
ACTIONS = NORMAL | ANOMALY
SPECIAL_PLACES = ("swimming pool", "stairs")


def happens_in(action: str, scene: str) -> bool:
    """Return whether the action may happen in the scene."""
    scenes = ACTIONS[action].scenes
    return scene in scenes if scenes else scene not in SPECIAL_PLACES


PROP_COLOURS: dict[str, Colour] = {
    name: COLOURS[name] for name in ("red", "blue", "yellow", "green", "black", "white", "orange")
}
