"""Draw source videos: who does what, where and when. Each video has its own random stream.

A *source video* shows one person in one scene and gives one or two pictures (*shots*): normal,
abnormal, or both; these are then twins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from pab.mini import settings
from pab.mini.actions import ACTIONS, ANOMALY, NORMAL, PROP_COLOURS, SPECIAL_PLACES, happens_in
from pab.mini.canvas import Colour
from pab.mini.people import COLOURS, SKIN, Person
from pab.mini.props import CARRIED, COLOURED_LANDMARKS
from pab.mini.scenes import SCENES

# Numbers of the splits in the random streams: default_rng([seed, split, index]).
TRAIN, TEST, DISTRACTOR, UCC = 0, 1, 2, 3
NORMAL_KIND, ABNORMAL_KIND, SECOND_ABNORMAL_KIND = 0, 1, 2  # y of source_id
PERSON_KINDS = ("man", "woman", "man", "woman", "boy", "girl", "old man", "old woman")
UPPER_KINDS = (
    "t-shirt",
    "striped shirt",
    "tank top",
    "sweater",
    "jacket",
    "hoodie",
    "coat",
)
FUR: dict[str, Colour] = {
    "brown": (122, 78, 44),
    "black": (38, 36, 38),
    "white": (236, 232, 224),
    "grey": (140, 140, 142),
}

T = TypeVar("T")


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


@dataclass(frozen=True, slots=True)
class Companion:
    kind: str  # dog, child, adult
    colour: str  # of the fur (FUR) or the upper garment (COLOURS)
    person: Person | None


@dataclass(frozen=True, slots=True)
class Shot:
    """One picture of a video: ``y`` as in ``source_id``, and the action seen."""

    y: int
    action: str

    @property
    def is_normal(self) -> bool:
        return self.y == NORMAL_KIND


@dataclass(frozen=True, slots=True)
class Video:
    """Everything that the pictures and captions of a source video depend on."""

    split: int
    index: int
    person: Person
    other: Person
    scene: str
    layout: int
    time: str
    weather: str  # clear, rain, snow, fog
    distance: str
    height: float  # the person's, fraction of the picture's side
    position: str  # left, centre, right
    x: float
    ground: float
    facing: int
    item: tuple[str, str] | None  # name, colour name
    prop_colour: str
    landmark: tuple[str, str | None] | None
    companion: Companion | None
    passer_by: Person | None
    shots: tuple[Shot, ...]

    @property
    def indoor(self) -> bool:
        return SCENES[self.scene].indoor


def draw_person(rng: np.random.Generator, adult: bool = False) -> Person:
    """Draw a person with random features; ``adult`` excludes children."""
    kind = pick(rng, PERSON_KINDS)
    while adult and kind in ("boy", "girl"):
        kind = pick(rng, PERSON_KINDS)
    female = kind in ("woman", "girl", "old woman")
    old = kind.startswith("old")
    hair_colour = "grey" if old else pick(rng, ("black", "brown", "blond", "red"))
    if female:
        hair_style = pick(rng, ("bun", "short") if old else ("long", "ponytail", "long", "bun"))
    else:
        hair_style = pick(rng, ("short", "bald") if old else ("short", "short", "short", "bald"))
    if kind == "boy":
        hair_style = "short"
    hat = pick(rng, ("cap", "beanie", "helmet", "sun hat")) if rng.random() < settings.HAT else None
    if female and rng.random() < settings.DRESS:
        upper, lower = "dress", "dress"
    else:
        upper = pick(rng, UPPER_KINDS)
        lower = pick(rng, ("trousers", "trousers", "shorts", "skirt" if female else "trousers"))
    return repaint(
        Person(
            kind=kind,
            build=pick(rng, ("average", "average", "slim", "heavy")),
            skin=pick(rng, SKIN),
            hair_colour=hair_colour,
            hair_style=hair_style,
            hat=hat,
            hat_colour=pick(rng, settings.ITEM_COLOURS),
            upper=upper,
            upper_colour="",
            upper_rgb=(0, 0, 0),
            lower=lower,
            lower_colour="",
            lower_rgb=(0, 0, 0),
            shoes=pick(rng, ((40, 38, 40), (236, 236, 236), (110, 70, 42), (170, 44, 44))),
        ),
        rng,
    )


def repaint(person: Person, rng: np.random.Generator) -> Person:
    """Return the person with newly drawn garment colours that differ from the old ones."""
    upper = pick(rng, [c for c in settings.UPPER_COLOURS if c != person.upper_colour])
    lower = pick(rng, [c for c in settings.LOWER_COLOURS if c not in (person.lower_colour, upper)])
    return replace(
        person,
        upper_colour=upper,
        upper_rgb=_jittered(COLOURS[upper], rng),
        lower_colour=lower,
        lower_rgb=_jittered(COLOURS[lower], rng),
    )


def _jittered(colour: Colour, rng: np.random.Generator) -> Colour:
    off = (rng.standard_normal(3) * settings.COLOUR_JITTER).tolist()
    levels = [min(255, max(0, round(level + o))) for level, o in zip(colour, off, strict=True)]
    return (levels[0], levels[1], levels[2])


def video_kinds(seed: int, split: int, index: int) -> tuple[int, ...]:
    """Return the y of each shot of a video from only the first draws of its stream."""
    return _kinds(np.random.default_rng([seed, split, index]), split)


def _kinds(rng: np.random.Generator, split: int) -> tuple[int, ...]:
    share = settings.TRAIN_TWIN_VIDEOS if split == TRAIN else settings.TEST_TWIN_VIDEOS
    twin, single, second = rng.random() < share, rng.random(), rng.random()
    abnormal = SECOND_ABNORMAL_KIND if second < settings.SECOND_KIND_OF_ANOMALY else ABNORMAL_KIND
    if twin and split in (TRAIN, TEST):
        return (NORMAL_KIND, abnormal)
    return (NORMAL_KIND,) if single < 0.5 else (abnormal,)


def draw_video(seed: int, split: int, index: int) -> Video:
    """Draw source video ``index`` of a split; the result depends only on the arguments."""
    rng = np.random.default_rng([seed, split, index])
    kinds = _kinds(rng, split)
    scene = pick(rng, tuple(SCENES))
    shots = _draw_shots(rng, scene, kinds)
    actions = [ACTIONS[shot.action] for shot in shots]
    distance = pick(rng, tuple(settings.PERSON_SCALE))
    position = pick(rng, ("left", "centre", "right"))
    person = draw_person(rng, adult=any(a.adult_only for a in actions))
    if scene == "swimming pool":  # nobody swims in a coat
        person = replace(person, upper="tank top", lower="shorts")
    low, high = settings.PERSON_SCALE[distance]
    height = low + (high - low) * float(rng.random())
    item = None
    if all(a.hands_free for a in actions) and rng.random() < settings.CARRIED_ITEM:
        item = (pick(rng, (*CARRIED, "backpack")), pick(rng, settings.ITEM_COLOURS))
    elif scene != "swimming pool" and rng.random() < settings.BACKPACK_WITH_BUSY_HANDS:
        item = ("backpack", pick(rng, settings.ITEM_COLOURS))
    if any(a.draw.__name__ in ("lift_weights", "crushed_by_barbell") for a in actions):
        item = None
    layouts = settings.TRAIN_LAYOUTS if split == TRAIN else settings.TEST_LAYOUTS
    facing = 1 if rng.random() < 0.5 else -1
    if scene == "stairs":
        facing = -1  # the stairs rise to the right, and everyone goes down
    indoor = SCENES[scene].indoor
    weather = "clear" if indoor else pick(rng, ("clear", "clear", "clear", "rain", "snow", "fog"))
    if scene == "beach" and weather == "snow":
        weather = "rain"
    ground = {"near": 0.945, "medium": 0.92, "far": 0.895}[distance]
    return Video(
        split=split,
        index=index,
        person=person,
        other=draw_person(rng, adult=True),
        scene=scene,
        layout=pick(rng, layouts),
        time=pick(rng, ("morning", "noon", "dusk", "night")),
        weather=weather,
        distance=distance,
        height=height,
        position=position,
        x={"left": 0.40, "centre": 0.50, "right": 0.60}[position]
        + 0.03 * float(rng.random() - 0.5),
        ground=ground + 0.02 * float(rng.random() - 0.5),
        facing=facing,
        item=item,
        prop_colour=pick(rng, tuple(PROP_COLOURS)),
        landmark=_draw_landmark(rng, scene),
        companion=_draw_companion(rng, scene),
        passer_by=draw_person(rng, adult=True) if _passes(rng, scene) else None,
        shots=shots,
    )


def _passes(rng: np.random.Generator, scene: str) -> bool:
    return rng.random() < settings.PASSERS_BY and scene != "stairs" and not SCENES[scene].indoor


def _pick_action(rng: np.random.Generator, names: list[str]) -> str:
    """Draw an action; those tied to a single scene have more weight, or they would be rare."""
    return pick(
        rng,
        [
            name
            for name in names
            for _ in range(settings.RARE_ACTION_WEIGHT if len(ACTIONS[name].scenes) == 1 else 1)
        ],
    )


def _draw_shots(rng: np.random.Generator, scene: str, kinds: tuple[int, ...]) -> tuple[Shot, ...]:
    normal = _pick_action(rng, [name for name in NORMAL if happens_in(name, scene)])
    owned = {own for action in NORMAL.values() for own in action.leads_to}
    possible = [name for name in ANOMALY if happens_in(name, scene)]
    if len(kinds) == 2:
        own = [name for name in NORMAL[normal].leads_to if name in possible]
        common = [name for name in possible if name not in owned]
        abnormal = pick(
            rng, own if own and (not common or rng.random() < settings.OWN_ANOMALY) else common
        )
    else:
        abnormal = _pick_action(rng, possible)
    return tuple(Shot(y, normal if y == NORMAL_KIND else abnormal) for y in kinds)


def _draw_landmark(rng: np.random.Generator, scene: str) -> tuple[str, str | None] | None:
    names = SCENES[scene].landmarks
    if not names or rng.random() >= settings.LANDMARK:
        return None
    name = pick(rng, names)
    colour = pick(rng, settings.LANDMARK_COLOURS)
    return (name, colour if name in COLOURED_LANDMARKS else None)


def _draw_companion(rng: np.random.Generator, scene: str) -> Companion | None:
    if scene in SPECIAL_PLACES or rng.random() >= settings.COMPANION:
        return None
    kind = pick(rng, ("dog", "child", "adult"))
    if kind == "dog":
        return Companion(kind, pick(rng, tuple(FUR)), None)
    person = draw_person(rng, adult=True)
    if kind == "child":
        child = "girl" if person.is_female else "boy"
        hair = "brown" if person.hair_colour == "grey" else person.hair_colour
        style = "long" if person.is_female else "short"
        person = replace(person, kind=child, build="average", hair_colour=hair, hair_style=style)
    return Companion(kind, person.upper_colour, person)
