"""Last steps of a picture: the light of the time of day, then the faults of the camera.

Training, test and surveillance pictures pass through cameras of different strength
(``TRAIN_CAMERA``, ``TEST_CAMERA``, ``UCC_CAMERA`` of the settings), which shifts the style.
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from pab.mini import settings
from pab.mini.videos import TRAIN, UCC, Video

# Gains of the red, green and blue channels. Indoors, lamps light dusk and night dimly.
OUTDOOR_LIGHT = {
    "morning": (1.06, 1.00, 0.88),
    "noon": (1.00, 1.00, 1.00),
    "dusk": (0.98, 0.90, 0.84),
    "night": (0.66, 0.70, 0.86),
}
INDOOR_LIGHT = {
    "morning": (1.00, 1.00, 1.00),
    "noon": (1.00, 1.00, 1.00),
    "dusk": (0.82, 0.78, 0.70),
    "night": (0.82, 0.78, 0.70),
}
LAMP_LIGHT = (0.98, 0.92, 0.78)  # under a lamp at night
LEAST_BLUR = 0.05  # pixels; smaller blurs are skipped
NOISE_BANK_SEED, NOISE_BANK_SIDE = 5, 512
LAMP_RADIUS = 0.55  # of the pool of lamplight at night, fraction of the picture's side


@lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    """Draw noise of unit standard deviation once; each picture uses a window of it."""
    rng = np.random.default_rng(NOISE_BANK_SEED)
    side = NOISE_BANK_SIDE
    grey = rng.standard_normal((side, side, 1), dtype=np.float32)
    return (0.8 * grey + 0.6 * rng.standard_normal((side, side, 3), dtype=np.float32)).astype(
        np.float32
    )


@lru_cache(maxsize=32)
def _lamplight(x: int) -> Image.Image:
    """Return the mask of a pool of light centred at ``x`` percent of the width."""
    side = settings.IMAGE_SIZE
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32) / side
    distance = np.hypot(columns - x / 100, (rows - 0.66) * 0.85)
    return Image.fromarray(
        (np.clip(1 - distance / LAMP_RADIUS, 0, 1) ** 0.8 * 170).astype(np.uint8)
    )


def _table(gain: tuple[float, float, float], contrast: float, brightness: float) -> list[int]:
    levels = np.arange(256, dtype=np.float64)
    curve = (levels - 128) * contrast + 128
    channels = [np.clip(curve * g * brightness, 0, 255).round().astype(int) for g in gain]
    return np.concatenate(channels).tolist()  # type: ignore[no-any-return]


def camera_of(split: int) -> settings.Camera:
    """Return the camera of a split; the test set and its distractors share one."""
    return {TRAIN: settings.TRAIN_CAMERA, UCC: settings.UCC_CAMERA}.get(split, settings.TEST_CAMERA)


def _between(limits: tuple[float, float], draw: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * draw


def photograph(image: Image.Image, video: Video, rng: np.random.Generator) -> Image.Image:
    """Light the picture by its time of day and apply the faults of its split's camera."""
    camera = camera_of(video.split)
    draws = rng.random(5).tolist()
    balance = (1 + rng.standard_normal(3) * camera.white_balance).tolist()
    contrast, brightness = (
        _between(camera.contrast, draws[0]),
        _between(camera.brightness, draws[1]),
    )

    def lit(gain: tuple[float, float, float]) -> Image.Image:
        balanced = (gain[0] * balance[0], gain[1] * balance[1], gain[2] * balance[2])
        return image.point(_table(balanced, contrast, brightness))

    result = lit((INDOOR_LIGHT if video.indoor else OUTDOOR_LIGHT)[video.time])
    if video.time == "night" and not video.indoor:
        result = Image.composite(lit(LAMP_LIGHT), result, _lamplight(round(video.x * 100)))
    result = ImageEnhance.Color(result).enhance(_between(camera.saturation, draws[2]))
    blur = _between(camera.blur, draws[3])
    if blur > LEAST_BLUR:
        result = result.filter(ImageFilter.GaussianBlur(blur))
    side = settings.IMAGE_SIZE
    top, left = rng.integers(NOISE_BANK_SIDE - side, size=2).tolist()
    grain = _noise_bank()[top : top + side, left : left + side] * _between(camera.noise, draws[4])
    noisy = np.asarray(result, dtype=np.float32) + grain
    return Image.fromarray(np.clip(noisy + 0.5, 0, 255).astype(np.uint8))


def encode(image: Image.Image, split: int, rng: np.random.Generator) -> bytes:
    """Encode the picture as JPEG in the quality of its split's camera."""
    low, high = camera_of(split).quality
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(low, high + 1)))
    return buffer.getvalue()
