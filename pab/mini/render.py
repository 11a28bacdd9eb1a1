"""Render a source video as pictures: background, objects, people, weather, light."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pab.mini import props, settings
from pab.mini.actions import ACTIONS, PROP_COLOURS, Stage, inside
from pab.mini.camera import photograph
from pab.mini.canvas import Canvas
from pab.mini.people import CHILD_SCALE, COLOURS, Figure, Pose
from pab.mini.scenes import draw_background, horizon_of
from pab.mini.videos import FUR, UCC, Shot, Video

SHOT_STREAM = 11_000_003  # keeps the streams of a shot's drawing apart from those of its video


def render_video(seed: int, video: Video) -> list[Image.Image]:
    """Render the shots of a video as RGB pictures, ``IMAGE_SIZE`` pixels per side."""
    background = Canvas()
    high_view = video.split == UCC
    draw_background(background, video.scene, video.layout, video.time, video.weather, high_view)
    _haze(background)
    _landmark(background, video, high_view)
    pictures = []
    for shot in video.shots:
        rng = np.random.default_rng([seed, video.split, video.index, SHOT_STREAM, shot.y])
        canvas = background.copy()
        _bystanders(canvas, video, shot, rng)
        _act(canvas, video, shot, rng)
        _weather(canvas, video, rng)
        pictures.append(photograph(canvas.finished(), video, rng))
    return pictures


def _haze(c: Canvas) -> None:
    """Make the scene pale, so that the person and the landmark stand out from it."""
    veil = Image.new("RGB", c.image.size, settings.HAZE_COLOUR)
    c.image.paste(Image.blend(c.image, veil, settings.HAZE))


def _landmark(c: Canvas, video: Video, high_view: bool) -> None:
    if video.landmark is None:
        return
    name, colour = video.landmark
    # The landmark is on the side without the person. If the person is in the centre, it is ahead
    # of them, because a companion stands behind.
    ahead = 0.5 + 0.34 * video.facing
    x = {"left": 0.80, "centre": ahead, "right": 0.20}[video.position]
    ground = horizon_of(video.scene, video.layout, high_view) + 0.075
    fill = COLOURS[colour] if colour else (128, 128, 128)
    props.LANDMARKS[name](c, x, ground, 0.26, fill)


def _bystanders(c: Canvas, video: Video, shot: Shot, rng: np.random.Generator) -> None:
    """Draw a small passer-by far behind, then the companion close by."""
    if video.passer_by is not None:
        horizon = horizon_of(video.scene, video.layout, video.split == UCC)
        body = inside(
            Pose(near_leg=(14, 6), far_leg=(-14, 10)).jittered(rng),
            0.12 + 0.76 * float(rng.random()),
            horizon + 0.06,
            0.17,
            1 if rng.random() < 0.5 else -1,
        )
        Figure(c, video.passer_by, body).draw()
    companion = video.companion
    if companion is None:
        return
    h, f = video.height, video.facing
    side = {"left": 1, "centre": -f, "right": -1}[video.position]
    x = min(0.88, max(0.12, video.x + side * (0.20 + 0.24 * h)))
    facing = -side
    ground = video.ground - 0.015
    if companion.person is None:
        c.soft_ellipse(x, ground, 0.22 * h, 0.03 * h, (10, 10, 20), 120)
        props.dog(c, x, ground, 0.40 * h + 0.05, facing, FUR[companion.colour])
        return
    alarmed = not shot.is_normal
    pose = Pose(near_arm=(118, 40), far_arm=(132, 30)) if alarmed else Pose()
    size = h * (CHILD_SCALE if companion.kind == "child" else 0.96)
    if video.person.is_child and companion.kind == "adult":
        size = h / CHILD_SCALE * 0.9
    body = inside(pose.jittered(rng), x, ground, min(size, ground - 0.05), facing)
    c.soft_ellipse(body.pelvis[0], ground, 0.24 * size, 0.03 * size, (10, 10, 20), 120)
    Figure(c, companion.person, body).draw()


def _act(c: Canvas, video: Video, shot: Shot, rng: np.random.Generator) -> None:
    item = None
    if video.item is not None:
        item = (video.item[0], COLOURS[video.item[1]])
    height = video.height
    if video.person.is_child:
        height *= 0.5 + 0.5 * CHILD_SCALE  # smaller than adults, yet large enough to see
    stage = Stage(
        c,
        rng,
        video.person,
        video.other,
        item,
        PROP_COLOURS[video.prop_colour],
        video.x,
        video.ground,
        height,
        video.facing,
        ACTIONS[shot.action].drops_item,
    )
    ACTIONS[shot.action].draw(stage)


def _weather(c: Canvas, video: Video, rng: np.random.Generator) -> None:
    if video.weather == "rain":
        for x, y, length in rng.random((50, 3)).tolist():
            drop = 0.04 + 0.05 * length
            c.line([(x, y), (x - 0.25 * drop, y + drop)], 0.0055, (206, 222, 240))
    elif video.weather == "snow":
        for x, y, size in rng.random((60, 3)).tolist():
            c.circle((x, y), 0.005 + 0.006 * size, (252, 253, 255))
    elif video.weather == "fog":
        veil = Image.new("RGB", c.image.size, (214, 218, 222))
        c.image.paste(Image.blend(c.image, veil, settings.FOG_STRENGTH))
