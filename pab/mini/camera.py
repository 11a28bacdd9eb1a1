"""The last steps of a picture: the light of the hour, then the camera's own faults.

Training, test and surveillance pictures pass through cameras of different strength
(``TRAIN_CAMERA``, ``TEST_CAMERA``, ``UCC_CAMERA`` of the settings): that is the style shift.
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from pab.mini import settings
from pab.mini.videos import TRAIN, UCC, Video

# Gain of the red, green and blue channel. Indoors the lamps decide: dusk and night are dim.
OUTDOOR_LIGHT = {
    "morning": (1.06, 1.00, 0.88),
    "noon": (1.00, 1.00, 1.00),
    "dusk": (1.00, 0.76, 0.66),
    "night": (0.46, 0.50, 0.74),
}
INDOOR_LIGHT = {
    "morning": (1.00, 1.00, 1.00),
    "noon": (1.00, 1.00, 1.00),
    "dusk": (0.66, 0.60, 0.50),
    "night": (0.66, 0.60, 0.50),
}
NOISE_BANK_SEED, NOISE_BANK_SIDE = 5, 512
LAMP_RADIUS = 0.55  # of the pool of lamplight at night, fraction of the picture's side


@lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    """Grey and colour noise of unit deviation, drawn once: windows of it serve every picture."""
    rng = np.random.default_rng(NOISE_BANK_SEED)
    side = NOISE_BANK_SIDE
    grey = rng.standard_normal((side, side, 1), dtype=np.float32)
    return (0.8 * grey + 0.6 * rng.standard_normal((side, side, 3), dtype=np.float32)).astype(
        np.float32
    )


@lru_cache(maxsize=32)
def _lamplight(x: int) -> Image.Image:
    """Mask of a pool of light whose middle lies at ``x`` percent of the width."""
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


def photograph(image: Image.Image, video: Video, rng: np.random.Generator) -> Image.Image:
    """Light the picture by its hour and pass it through its split's camera."""
    strength = settings.TEST_CAMERA
    if video.split in (TRAIN, UCC):
        strength = settings.TRAIN_CAMERA if video.split == TRAIN else settings.UCC_CAMERA
    draws = rng.random(6).tolist()

    def between(name: str, draw: float) -> float:
        low, high = strength[name]  # type: ignore[misc]
        return float(low + (high - low) * draw)

    balance = 1 + rng.standard_normal(3) * float(strength["white_balance"])  # type: ignore[arg-type]
    light = (INDOOR_LIGHT if video.indoor else OUTDOOR_LIGHT)[video.time]
    contrast, brightness = between("contrast", draws[0]), between("brightness", draws[1])

    def lit(gain: tuple[float, float, float]) -> Image.Image:
        r, g, b = (float(a * c) for a, c in zip(gain, balance.tolist(), strict=True))
        return image.point(_table((r, g, b), contrast, brightness))

    result = lit(light)
    if video.time == "night" and not video.indoor:
        result = Image.composite(lit((0.98, 0.92, 0.78)), result, _lamplight(round(video.x * 100)))
    result = ImageEnhance.Color(result).enhance(between("saturation", draws[2]))
    blur = between("blur", draws[3])
    if blur > 0.05:
        result = result.filter(ImageFilter.GaussianBlur(blur))
    noise = between("noise", draws[4])
    side = settings.IMAGE_SIZE
    top, left = (int(v) for v in rng.integers(NOISE_BANK_SIDE - side, size=2))
    grain = _noise_bank()[top : top + side, left : left + side] * noise
    noisy = np.asarray(result, dtype=np.float32) + grain
    return Image.fromarray(np.clip(noisy + 0.5, 0, 255).astype(np.uint8))


def encode(image: Image.Image, split: int, rng: np.random.Generator) -> bytes:
    """The picture as JPEG in the quality of its split's camera."""
    strength = settings.TEST_CAMERA
    if split in (TRAIN, UCC):
        strength = settings.TRAIN_CAMERA if split == TRAIN else settings.UCC_CAMERA
    low, high = strength["quality"]  # type: ignore[misc]
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(low, high + 1)))
    return buffer.getvalue()
