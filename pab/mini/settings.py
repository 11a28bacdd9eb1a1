"""All constants that determine how hard the mini data are.

Lengths are fractions of the picture's side unless a unit is named; probabilities are in [0, 1].
A change here changes the data, and with it the ``source_sha256`` of the manifest.
"""

from __future__ import annotations

from dataclasses import dataclass

# --- size of the set -------------------------------------------------------------------------
TRAIN_PAIRS = 20_000
TEST_PAIRS = 2_000
DISTRACTORS = 8_000
UCC_PAIRS = 200
TRAIN_SHARDS = 4
SEED = 16

# --- picture ---------------------------------------------------------------------------------
IMAGE_SIZE = 192  # pixels per side
SUPERSAMPLE = 2  # drawn at this multiple, then averaged down

# --- source videos ---------------------------------------------------------------------------
# A video without twins gives only one picture, normal or abnormal.
TRAIN_TWIN_VIDEOS = 0.85  # share of videos that give a normal and an abnormal picture
TEST_TWIN_VIDEOS = 0.60  # 0.60 of the videos give 0.75 of the queries
SECOND_KIND_OF_ANOMALY = 0.35  # share of abnormal pictures with y = 2 (folder `full`), not 1
NORMAL_IN_FULL = 0.10  # share of normal pictures kept in `full` instead of `goal`
NEAR_MISS_DISTRACTORS = 0.25  # share of distractors that repeat a test video in other colours

# --- what may vary ---------------------------------------------------------------------------
# Fewer colours make more gallery images look alike.
UPPER_COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black",
    "white", "grey",
)  # fmt: skip
LOWER_COLOURS = ("black", "blue", "grey", "white", "brown", "red", "green", "yellow")
ITEM_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black")
LANDMARK_COLOURS = ("red", "yellow", "green", "blue", "white", "orange", "purple", "grey")
COLOUR_JITTER = 7  # standard deviation of a garment's shade, in levels of 255
CARRIED_ITEM = 0.72  # probability of a carried item if the action leaves a hand free
BACKPACK_WITH_BUSY_HANDS = 0.18  # probability of a backpack if it does not
DRESS = 0.28  # probability that a woman wears one
OWN_ANOMALY = 0.6  # probability that a twin shows the anomaly of its action, if it has one
COMPANION = 0.15  # probability of a dog, a child or another adult beside the person
HAT = 0.30
LANDMARK = 0.85  # probability of one landmark in the background
PASSERS_BY = 0.04  # probability of a small figure far behind that no caption mentions
PERSON_SCALE = {"near": (0.78, 0.82), "medium": (0.72, 0.76), "far": (0.66, 0.70)}  # body height
RARE_ACTION_WEIGHT = 4  # of actions tied to one scene (skiing, skating, ...); others have 1
POSE_JITTER = 3.5  # standard deviation of each joint angle, degrees

# --- backgrounds -----------------------------------------------------------------------------
HAZE = 0.62  # share of HAZE_COLOUR in the scene behind the person and the landmark
HAZE_COLOUR = (232, 232, 228)
# Layouts of each scene class.
TRAIN_LAYOUTS = range(40)
TEST_LAYOUTS = range(40, 60)  # never seen in training

# --- captions --------------------------------------------------------------------------------
MIN_WORDS, MAX_WORDS = 25, 54
# Chance of the first, second, ... synonym; cut to the list's length and scaled to sum 1.
TRAIN_SYNONYMS = (0.46, 0.27, 0.15, 0.12)
TEST_SYNONYMS = (0.40, 0.27, 0.18, 0.15)
# Chance of each sentence plan: the test split prefers those that training shows rarely or never.
TRAIN_PLANS = (0.25, 0.22, 0.18, 0.15, 0.10, 0.10, 0.0)
TEST_PLANS = (0.0, 0.10, 0.15, 0.15, 0.25, 0.25, 0.10)
# Probability that a caption omits the attribute; queries omit less than training captions.
TRAIN_OMIT = {
    "build": 0.60,
    "hair": 0.25,
    "lower": 0.03,
    "item": 0.06,
    "companion": 0.06,
    "landmark": 0.10,
    "time": 0.12,
    "weather": 0.12,
    "distance": 0.80,
    "facing": 0.75,
    "position": 0.80,
}
TEST_OMIT = TRAIN_OMIT | {
    "build": 0.50,
    "hair": 0.10,
    "lower": 0.0,
    "item": 0.0,
    "companion": 0.0,
    "landmark": 0.03,
    "time": 0.04,
    "weather": 0.04,
}


# --- camera ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Camera:
    """Faults of a camera: pairs are (low, high) bounds of a uniform draw for each picture."""

    blur: tuple[float, float]  # standard deviation, pixels
    noise: tuple[float, float]  # standard deviation, levels of 255
    white_balance: float  # standard deviation of each channel's gain
    brightness: tuple[float, float]  # gain
    contrast: tuple[float, float]  # gain around middle grey
    saturation: tuple[float, float]  # 1 = as drawn, 0 = grey
    quality: tuple[int, int]  # of the JPEG


TRAIN_CAMERA = Camera(
    blur=(0.0, 0.4), noise=(0.0, 4.0), white_balance=0.03, brightness=(0.92, 1.08),
    contrast=(0.94, 1.06), saturation=(0.90, 1.08), quality=(80, 94),
)  # fmt: skip
TEST_CAMERA = Camera(
    blur=(0.2, 0.8), noise=(2.0, 6.0), white_balance=0.03, brightness=(0.92, 1.08),
    contrast=(0.92, 1.08), saturation=(0.86, 1.08), quality=(50, 82),
)  # fmt: skip
UCC_CAMERA = Camera(
    blur=(0.5, 1.0), noise=(6.0, 12.0), white_balance=0.03, brightness=(0.80, 1.05),
    contrast=(0.75, 0.95), saturation=(0.05, 0.20), quality=(40, 65),
)  # fmt: skip
UCC_GROUP = 3  # at most this many surveillance pictures share one caption
FOG_STRENGTH = 0.24  # share of the fog's grey in a foggy picture
