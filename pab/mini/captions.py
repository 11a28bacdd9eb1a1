"""Grammar of the captions: many wordings of the same content.

Each concept has a list of synonyms, the commonest first. Training prefers the first ones. The test
split draws them more evenly and uses sentence plans that training uses rarely or never, so that a
test caption is a paraphrase made of words that occur in training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from pab.mini import settings
from pab.mini.actions import ACTIONS
from pab.mini.videos import TRAIN, Shot, Video

Words = tuple[str, ...]
CAPTION_STREAM = 13_000_003  # keeps the streams of captions apart from those of drawing

COLOUR: dict[str, Words] = {
    "red": ("red", "bright red", "scarlet", "crimson"),
    "orange": ("orange", "bright orange", "tangerine", "amber"),
    "yellow": ("yellow", "bright yellow", "lemon-yellow", "canary"),
    "green": ("green", "grass-green", "emerald", "leaf-green"),
    "turquoise": ("turquoise", "teal", "aqua", "blue-green"),
    "blue": ("blue", "bright blue", "azure", "cobalt"),
    "navy": ("dark blue", "navy", "navy blue", "midnight-blue"),
    "purple": ("purple", "violet", "plum-coloured", "lilac"),
    "pink": ("pink", "rose-coloured", "light pink", "salmon"),
    "brown": ("brown", "chocolate-brown", "coffee-coloured", "chestnut-brown"),
    "black": ("black", "jet-black", "coal-black", "pitch-black"),
    "white": ("white", "snow-white", "off-white", "ivory"),
    "grey": ("grey", "ash-grey", "slate-coloured", "silver-grey"),
    "beige": ("beige", "cream", "sand-coloured", "light tan"),
}
KIND: dict[str, Words] = {
    "man": ("man", "guy", "gentleman", "male pedestrian"),
    "woman": ("woman", "lady", "female pedestrian", "young woman"),
    "boy": ("boy", "little boy", "young boy", "male child"),
    "girl": ("girl", "little girl", "young girl", "female child"),
    "old man": ("old man", "elderly man", "old gentleman", "male pensioner"),
    "old woman": ("old woman", "elderly woman", "old lady", "female pensioner"),
}
BUILD: dict[str, Words] = {
    "slim": ("slim", "thin", "slender", "lean"),
    "heavy": ("heavy", "stout", "plump", "stocky"),
}
HAIR: dict[str, Words] = {
    "black": ("black", "dark", "jet-black", "raven"),
    "brown": ("brown", "chestnut", "hazel", "brunette"),
    "blond": ("blond", "fair", "golden", "straw-coloured"),
    "red": ("red", "ginger", "copper", "auburn"),
    "grey": ("grey", "silver", "greying", "white-grey"),
}
HAIR_STYLE: dict[str, Words] = {
    "short": ("short {} hair", "{} hair cut short", "close-cropped {} hair"),
    "long": ("long {} hair", "{} shoulder-length hair", "long flowing {} hair"),
    "ponytail": ("a {} ponytail", "{} hair tied in a ponytail", "{} hair tied back"),
    "bun": ("{} hair in a bun", "a {} bun", "{} hair pinned up in a knot"),
    "bald": ("a bald head", "a shaved head", "no hair"),
}
HAT: dict[str, Words] = {
    "cap": ("cap", "baseball cap", "peaked cap"),
    "beanie": ("woolly hat", "bobble hat", "knitted hat"),
    "helmet": ("helmet", "safety helmet", "hard hat"),
    "sun hat": ("sun hat", "wide-brimmed hat", "broad hat"),
}
UPPER: dict[str, Words] = {
    "t-shirt": ("T-shirt", "tee", "short-sleeved top"),
    "striped shirt": ("striped shirt", "striped T-shirt", "stripy top"),
    "tank top": ("tank top", "sleeveless top", "vest"),
    "sweater": ("sweater", "pullover", "jumper", "long-sleeved top"),
    "jacket": ("jacket", "open jacket", "windbreaker", "blazer"),
    "hoodie": ("hoodie", "hooded sweatshirt", "hooded top"),
    "coat": ("coat", "long coat", "overcoat"),
    "dress": ("dress", "frock", "gown"),
}
LOWER: dict[str, Words] = {
    "trousers": ("trousers", "pants", "slacks", "long trousers"),
    "shorts": ("shorts", "short trousers", "bermuda shorts"),
    "skirt": ("skirt", "knee-length skirt", "flared skirt"),
}
ITEM: dict[str, Words] = {
    "handbag": ("handbag", "purse", "shoulder bag"),
    "shopping bag": ("shopping bag", "carrier bag", "paper bag"),
    "suitcase": ("suitcase", "trolley case", "travel case"),
    "briefcase": ("briefcase", "document case", "leather case"),
    "umbrella": ("umbrella", "open umbrella", "parasol-like umbrella"),
    "balloon": ("balloon", "party balloon", "toy balloon"),
    "flowers": ("bunch of {} flowers", "bouquet of {} flowers", "posy of {} blossoms"),
    "backpack": ("backpack", "rucksack", "knapsack"),
}
HOLDING: Words = ("carrying {}", "holding {}", "with {} in {his} hand", "clutching {}")
ON_BACK: Words = ("with {} on {his} back", "carrying {} on {his} back", "wearing {}")
DROPPED: Words = (
    "{} lies on the ground beside {him}",
    "{} has dropped to the ground next to {him}",
    "{} has landed on the ground close to {him}",
)
# Every action as a participle phrase; {c} is the colour of a bicycle or a car.
ACTION: dict[str, Words] = {
    "walk": ("walking along", "strolling along", "taking a walk", "ambling along"),
    "run": ("running", "jogging", "sprinting", "rushing along"),
    "ride": (
        "riding a {c} bicycle",
        "cycling on a {c} bike",
        "pedalling a {c} bicycle",
        "travelling on a {c} bike",
    ),
    "sit": (
        "sitting on a wooden bench",
        "resting on a bench",
        "seated on a bench",
        "taking a break on a bench",
    ),
    "climb": (
        "climbing a ladder",
        "going up a ladder",
        "mounting a wooden ladder",
        "scaling a ladder",
    ),
    "jump": (
        "jumping into the air",
        "leaping high with both arms up",
        "making a jump",
        "hopping off the ground",
    ),
    "carry": (
        "carrying a cardboard box",
        "holding a large box in both arms",
        "hauling a carton",
        "transporting a cardboard parcel",
    ),
    "skateboard": (
        "riding a skateboard",
        "skateboarding",
        "rolling along on a skateboard",
        "balancing on a board with wheels",
    ),
    "football": (
        "playing football",
        "kicking a ball",
        "shooting a football",
        "practising with a football at {his} feet",
    ),
    "push cart": (
        "pushing a shopping cart",
        "pushing a full trolley",
        "wheeling a loaded cart",
        "steering a shopping trolley",
    ),
    "sweep": (
        "sweeping the floor with a broom",
        "sweeping up",
        "cleaning the ground with a broom",
        "brushing the floor",
    ),
    "lift weights": (
        "lifting a barbell above {his} head",
        "lifting weights",
        "pressing a heavy barbell",
        "training with a barbell overhead",
    ),
    "skate": (
        "skating on the ice",
        "ice-skating",
        "gliding over the ice on skates",
        "sliding along on ice skates",
    ),
    "ski": (
        "skiing",
        "skiing downhill with poles",
        "gliding over the snow on skis",
        "travelling on red skis",
    ),
    "swim": (
        "swimming",
        "swimming through the water",
        "doing the front crawl",
        "crossing the water with long strokes",
    ),
    "go down stairs": (
        "walking down the stairs",
        "going down the steps",
        "descending the stairs",
        "stepping down the staircase",
    ),
    "fall forward": (
        "tripping and falling forward",
        "stumbling and falling on {his} face",
        "losing {his} footing and pitching forward",
        "falling headlong with outstretched arms",
    ),
    "lie": (
        "lying on the ground",
        "lying flat on {his} back",
        "stretched out motionless on the ground",
        "lying helpless on the floor",
    ),
    "hit by car": (
        "being hit by a {c} car",
        "being knocked down by a {c} car",
        "getting thrown into the air by a {c} vehicle",
        "being run over by a {c} car",
    ),
    "collide": (
        "colliding with another person",
        "bumping hard into another person",
        "crashing into somebody",
        "running into another person with a bang",
    ),
    "slip off bicycle": (
        "slipping off {his} {c} bicycle",
        "falling off a {c} bike",
        "being thrown over the handlebars of a {c} bicycle",
        "tumbling from a toppling {c} bike",
    ),
    "fall off ladder": (
        "falling off a ladder",
        "falling backwards from a ladder",
        "plunging down from a wooden ladder",
        "losing {his} hold and dropping off a ladder",
    ),
    "tumble down stairs": (
        "tumbling down the stairs",
        "falling down the steps",
        "rolling head first down the stairs",
        "plunging down the staircase",
    ),
    "hit by ball": (
        "being hit in the face by a ball",
        "being struck on the head by a football",
        "getting a ball in the face",
        "reeling from a football against {his} head",
    ),
    "drop box": (
        "dropping a cardboard box",
        "letting a box fall so that its contents spill out",
        "losing hold of a carton",
        "spilling the contents of a cardboard parcel",
    ),
    "fall off skateboard": (
        "falling off a skateboard",
        "falling backwards while the skateboard flies away",
        "being thrown off a skateboard",
        "losing the board with wheels and tumbling",
    ),
    "attacked by dog": (
        "being attacked by a dog",
        "being jumped at by a fierce dog",
        "warding off a leaping dog",
        "backing away from a dog that leaps up",
    ),
    "drown": (
        "drowning",
        "struggling in the water with both arms up",
        "going under and calling for help",
        "fighting to stay above the water",
    ),
    "crushed by barbell": (
        "lying on the floor under a barbell",
        "being crushed by a heavy barbell",
        "being pinned to the ground by weights",
        "lying trapped below a barbell",
    ),
    "fall off bench": (
        "falling off a wooden bench",
        "tumbling from a bench to the ground",
        "toppling head first off a bench",
        "rolling down from a bench",
    ),
    "overturn cart": (
        "falling over a tipped shopping cart",
        "crashing to the ground with an overturned trolley",
        "stumbling over a loaded cart on its side",
        "tripping while a shopping trolley tips over",
    ),
    "fall on ice": (
        "falling on the ice",
        "slipping backwards on ice skates",
        "crashing onto the ice",
        "losing {his} balance on skates and tumbling",
    ),
    "crash on skis": (
        "crashing on skis",
        "falling head first into the snow with skis in the air",
        "tumbling on red skis",
        "lying in the snow with crossed skis",
    ),
}
SCENE: dict[str, Words] = {
    "road": ("on a city street", "on a road in town", "in an urban street", "on an asphalt road"),
    "park": ("in a green park", "in a park", "on a path through a park", "on parkland with trees"),
    "beach": ("on a sandy beach", "on the beach by the sea", "at the seaside", "on the shore"),
    "construction site": (
        "on a construction site",
        "on a building site",
        "below the crane of a construction site",
        "on the dirt of a building site",
    ),
    "railway station": (
        "at a railway station",
        "on a station platform",
        "in front of a train on the platform",
        "at a train station",
    ),
    "stairs": (
        "on outdoor stairs",
        "on a stone staircase",
        "on a flight of steps",
        "on wide stone stairs",
    ),
    "snowfield": (
        "in a snowfield",
        "on snow below mountains",
        "in a snowy landscape",
        "on a white snowfield",
    ),
    "forest": (
        "in a forest",
        "among the trees of a wood",
        "in dense woods",
        "on the floor of a forest",
    ),
    "ice rink": (
        "on an ice rink",
        "on a skating rink",
        "inside the boards of an ice rink",
        "on frozen ground",
    ),
    "car park": (
        "in a car park",
        "on a parking lot",
        "between parking bays",
        "on a marked parking area",
    ),
    "playground": (
        "on a playground",
        "near the swings of a playground",
        "at a children's playground",
        "beside swings",
    ),
    "field": (
        "in a field of grain",
        "on farmland",
        "in a yellow crop field",
        "in the countryside with a barn",
    ),
    "bridge": (
        "on a bridge",
        "on a wooden bridge over a river",
        "on a footbridge",
        "by the railing of a bridge",
    ),
    "office": (
        "in an office",
        "in an office with desks",
        "in a workplace with computers",
        "near desks and screens",
    ),
    "kitchen": (
        "in a kitchen",
        "in a tiled kitchen",
        "between kitchen cupboards",
        "near a stove in a kitchen",
    ),
    "gym": (
        "in a gym",
        "in a sports hall",
        "in a gymnasium with wall bars",
        "before the wall bars of a gym",
    ),
    "supermarket": (
        "in a supermarket",
        "in a shop",
        "in front of store shelves",
        "in a grocery store",
    ),
    "swimming pool": (
        "in a swimming pool",
        "in an indoor pool",
        "between the lanes of a pool",
        "in the blue pool water",
    ),
    "corridor": (
        "in a corridor",
        "in a hallway with doors",
        "along a hallway",
        "in a passage with wooden doors",
    ),
    "warehouse": (
        "in a warehouse",
        "in a storage hall",
        "before storage racks",
        "in a depot full of boxes",
    ),
    "living room": (
        "in a living room",
        "in a lounge with curtains",
        "at home",
        "in a room with wallpaper",
    ),
}
TIME: dict[str, Words] = {
    "morning": ("in the morning", "early in the morning", "in morning light", "just after sunrise"),
    "noon": ("at noon", "at midday", "in broad daylight", "in the middle of the day"),
    "dusk": ("at dusk", "at sunset", "in the evening", "in the twilight"),
    "night": ("at night", "after dark", "late at night", "in the dark"),
}
LAMPS: dict[bool, Words] = {  # indoors; key: whether the light is dim
    False: ("under bright lights", "in bright light", "with the lights on", "in full light"),
    True: ("in dim light", "under dim lamps", "in weak light", "in the half-dark"),
}
WEATHER: dict[str, Words] = {
    "clear": ("in clear weather", "under a clear sky", "in fine weather", "on a dry day"),
    "rain": ("in the rain", "in pouring rain", "while it is raining", "in wet weather"),
    "snow": ("while it is snowing", "in falling snow", "during a snowfall", "among snowflakes"),
    "fog": ("in fog", "in thick mist", "on a misty day", "in hazy air"),
}
FACING: dict[int, Words] = {
    -1: ("facing left", "turned to the left", "looking left", "directed towards the left"),
    1: ("facing right", "turned to the right", "looking right", "directed towards the right"),
}
POSITION: dict[str, Words] = {
    "left": (
        "on the left of the picture",
        "on the left side",
        "at the left",
        "in the left part of the frame",
    ),
    "centre": (
        "in the middle of the picture",
        "in the centre",
        "in the middle",
        "in the central part of the frame",
    ),
    "right": (
        "on the right of the picture",
        "on the right side",
        "at the right",
        "in the right part of the frame",
    ),
}
DISTANCE: dict[str, Words] = {
    "near": (
        "seen from close up",
        "seen from nearby",
        "filling most of the frame",
        "very near the camera",
    ),
    "medium": (
        "seen from a medium distance",
        "at middle distance",
        "some steps away from the camera",
        "at a moderate distance",
    ),
    "far": (
        "seen from far away",
        "seen from a distance",
        "small in the frame",
        "far from the camera",
    ),
}
LANDMARK: dict[str, Words] = {
    "car": ("parked {} car", "{} car", "{} vehicle"),
    "bin": ("{} rubbish bin", "{} bin", "{} waste container"),
    "parasol": ("{} parasol", "{} beach umbrella", "{} sunshade"),
    "sign": ("{} sign", "{} signboard", "{} notice board"),
    "tent": ("{} tent", "pitched {} tent", "{} camping tent"),
    "sofa": ("{} sofa", "{} couch", "{} settee"),
    "vending machine": ("{} vending machine", "{} drinks machine", "{} snack machine"),
    "poster": ("{} poster", "{} placard", "{} framed poster"),
    "lockers": ("row of {} lockers", "set of {} lockers", "row of {} metal cabinets"),
    "boat": ("{} boat", "{} sailing boat", "small {} sailboat"),
    "slide": ("{} slide", "children's {} slide", "{} playground slide"),
    "barrels": ("group of {} barrels", "few {} barrels", "stack of {} drums"),
    "tractor": ("{} tractor", "{} farm tractor", "{} farm machine"),
    "fridge": ("{} fridge", "{} refrigerator", "tall {} fridge"),
    "flag": ("{} flag", "{} banner", "{} flag on a pole"),
    "rug": ("{} rug", "{} carpet", "round {} rug"),
    "crates": ("stack of {} crates", "pile of {} crates", "stack of {} wooden boxes"),
    "plant pot": ("plant in a {} pot", "green plant in a {} pot", "houseplant in a {} pot"),
    "street lamp": ("street lamp", "lamp post", "street light"),
    "fountain": ("fountain", "stone fountain", "water fountain"),
    "cones": ("pair of traffic cones", "couple of road cones", "pair of orange cones"),
    "tree": ("tree", "large tree", "leafy tree"),
    "bookshelf": ("bookshelf", "bookcase", "shelf full of books"),
    "snowman": ("snowman", "snowman with a black hat", "man made of snow"),
    "hay bale": ("hay bale", "bale of hay", "round bale of straw"),
    "whiteboard": ("whiteboard", "whiteboard on the wall", "white writing board"),
}
BEHIND: Words = (
    "{} is in the background",
    "{} can be seen behind {him}",
    "{} stands further back",
    "{} is visible some way off",
)
COMPANY: Words = (
    "{} is nearby",
    "{} stands next to {him}",
    "{} is close by",
    "{} keeps {him} company",
)
DOG: Words = ("{} dog", "{} hound", "{} dog with a red collar")
CHILD: dict[bool, Words] = {  # key: whether the child is a girl
    False: ("small boy in {}", "little boy wearing {}", "child in {}"),
    True: ("small girl in {}", "little girl wearing {}", "child in {}"),
}
ADULT: dict[bool, Words] = {
    False: ("second man in {}", "another man wearing {}", "male passer-by in {}"),
    True: ("second woman in {}", "another woman wearing {}", "female passer-by in {}"),
}
WEARING: Words = ("wearing {}", "dressed in {}", "in {}", "clothed in {}")
WEARS: Words = ("wears {}", "is wearing {}", "is dressed in {}", "is clothed in {}")
AND: Words = (" and ", " with ", " together with ")

OPTIONAL = (
    "build",
    "hair",
    "lower",
    "item",
    "companion",
    "landmark",
    "time",
    "weather",
    "facing",
    "position",
    "distance",
)
CUT_FIRST = ("distance", "position", "weather", "facing", "landmark", "time", "build", "companion")


def article(noun: str) -> str:
    """Put "a" or "an" before ``noun``, unless it begins with "another"."""
    if noun.startswith("another "):
        return noun
    return ("an " if noun[0] in "aeioAEIO" or noun.startswith("urban") else "a ") + noun


def _sentence(text: str) -> str:
    text = re.sub(r"\s+", " ", text).replace(" ,", ",").strip(" ,")
    text = re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)  # fillings that begin with a vowel
    return text[0].upper() + text[1:] + "."


def _weighted(rng: np.random.Generator, weights: Sequence[float]) -> int:
    draw, total = float(rng.random()) * sum(weights), 0.0
    for index, weight in enumerate(weights):
        total += weight
        if draw < total:
            return index
    return len(weights) - 1


class Writer:
    """Draws the words for one shot from one random stream, by the rules of its split."""

    def __init__(self, video: Video, shot: Shot, rng: np.random.Generator) -> None:
        self.video, self.shot, self.rng = video, shot, rng
        self.in_training = video.split == TRAIN
        female = video.person.is_female
        self.his, self.him, self.he = ("her", "her", "she") if female else ("his", "him", "he")

    def say(self, words: Words, filling: str = "") -> str:
        weights = settings.TRAIN_SYNONYMS if self.in_training else settings.TEST_SYNONYMS
        text = words[_weighted(self.rng, weights[: len(words)])]
        return text.replace("{}", filling).replace("{his}", self.his).replace("{him}", self.him)

    def colour(self, name: str) -> str:
        return self.say(COLOUR[name])

    def subject(self, with_build: bool) -> str:
        build = self.video.person.build
        noun = self.say(KIND[self.video.person.kind])
        if with_build and build != "average":
            noun = f"{self.say(BUILD[build])} {noun}"
        return article(noun)

    def hair(self) -> str:
        p = self.video.person
        colour = "" if p.hair_style == "bald" else self.say(HAIR[p.hair_colour])
        return self.say(HAIR_STYLE[p.hair_style], colour)

    def hat(self) -> str:
        p = self.video.person
        if p.hat is None:
            return ""
        return article(f"{self.colour(p.hat_colour)} {self.say(HAT[p.hat])}")

    def clothes(self, with_lower: bool) -> str:
        p = self.video.person
        upper = article(f"{self.colour(p.upper_colour)} {self.say(UPPER[p.upper])}")
        if p.lower == "dress" or not with_lower:
            return upper
        lower = f"{self.colour(p.lower_colour)} {self.say(LOWER[p.lower])}"
        return upper + self.say(AND) + (article(lower) if p.lower == "skirt" else lower)

    def item(self) -> tuple[str, bool]:
        """Return the words for the carried item, and whether they are a sentence."""
        assert self.video.item is not None
        name, colour = self.video.item
        if name == "flowers":
            thing = article(self.say(ITEM[name], self.colour(colour)))
        else:
            thing = article(f"{self.colour(colour)} {self.say(ITEM[name])}")
        if name == "backpack":
            return self.say(ON_BACK, thing), False
        if ACTIONS[self.shot.action].drops_item:
            return self.say(DROPPED, thing), True
        return self.say(HOLDING, thing), False

    def action(self) -> str:
        phrase = self.say(ACTION[self.shot.action])
        return phrase.replace("{c}", self.colour(self.video.prop_colour))

    def time(self) -> str:
        if self.video.indoor:
            return self.say(LAMPS[self.video.time in ("dusk", "night")])
        return self.say(TIME[self.video.time])

    def landmark(self) -> str:
        assert self.video.landmark is not None
        name, colour = self.video.landmark
        noun = self.say(LANDMARK[name], self.colour(colour) if colour else "")
        return self.say(BEHIND, article(noun))

    def companion(self) -> str:
        companion = self.video.companion
        assert companion is not None
        if companion.person is None:
            return self.say(COMPANY, article(self.say(DOG, companion.colour)))
        p = companion.person
        garment = article(f"{self.colour(companion.colour)} {self.say(UPPER[p.upper])}")
        nouns = (CHILD if companion.kind == "child" else ADULT)[p.is_female]
        return self.say(COMPANY, article(self.say(nouns, garment)))


def _present(video: Video) -> set[str]:
    """Return the optional attributes that this video has."""
    present = set(OPTIONAL)
    p = video.person
    absent = {
        "build": p.build == "average",
        "lower": p.lower == "dress" or video.scene == "swimming pool",
        "item": video.item is None,
        "companion": video.companion is None,
        "landmark": video.landmark is None,
        "weather": video.indoor,
        "distance": video.scene == "stairs",
        "position": video.scene == "stairs" or video.distance == "near",  # fills the frame
    }
    return present - {name for name, is_absent in absent.items() if is_absent}


def write_caption(seed: int, video: Video, shot: Shot) -> str:
    """Write the caption of a shot; the result depends only on the arguments."""
    rng = np.random.default_rng([seed, video.split, video.index, CAPTION_STREAM, shot.y])
    writer = Writer(video, shot, rng)
    present = _present(video)
    omit = settings.TRAIN_OMIT if writer.in_training else settings.TEST_OMIT
    told = {name for name in OPTIONAL if rng.random() >= omit[name]} & present
    plan = _weighted(rng, settings.TRAIN_PLANS if writer.in_training else settings.TEST_PLANS)
    state = rng.bit_generator.state
    missing = [name for name in OPTIONAL if name in present - told]
    removable = [name for name in CUT_FIRST if name in told]
    while True:  # each pass adds or removes one attribute, in a fixed order
        rng.bit_generator.state = state
        caption = _compose(writer, told, plan)
        count = len(caption.split())
        if count < settings.MIN_WORDS and missing:
            told = told | {missing.pop(0)}
        elif count > settings.MAX_WORDS and removable:
            told = told - {removable.pop(0)}
        elif count < settings.MIN_WORDS:
            return f"{caption} Nothing else of note can be seen in the picture."
        else:
            return caption


def _compose(w: Writer, told: set[str], plan: int) -> str:
    """Compose a caption by sentence plan ``plan``, with the attributes in ``told``."""
    video = w.video
    subject, action, place = w.subject("build" in told), w.action(), w.say(SCENE[video.scene])
    hair, hat = (w.hair() if "hair" in told else ""), w.hat()
    head = " and ".join(part for part in (hair, hat) if part)
    clothes = w.clothes("lower" in told)
    item, dropped = w.item() if "item" in told else ("", False)
    dropped_item, held = (item, "") if dropped else ("", item)
    time = w.time() if "time" in told else ""
    weather = w.say(WEATHER[video.weather]) if "weather" in told else ""
    facing = w.say(FACING[video.facing]) if "facing" in told else ""
    position = w.say(POSITION[video.position]) if "position" in told else ""
    distance = w.say(DISTANCE[video.distance]) if "distance" in told else ""
    company = w.companion() if "companion" in told else ""
    landmark = w.landmark() if "landmark" in told else ""
    he = w.he

    with_head = f" with {head}" if head else ""
    wearing, wears = w.say(WEARING, clothes), w.say(WEARS, clothes)
    when = " ".join(part for part in (time, weather) if part)
    view = ", ".join(part for part in (position, distance) if part)
    around = [part for part in (dropped_item, company, landmark) if part]
    sentences: list[str]
    if plan == 0:
        main = f"{subject}{with_head}, {wearing}, is {action} {place} {when}"
        sentences = [
            ", ".join(part for part in (main, held, facing) if part),
            *around,
            _seen(he, view),
        ]
    elif plan == 1:
        main = f"{place} {when}, {subject}{with_head} is {action}"
        first = ", ".join(part for part in (main, facing) if part)
        second = f"{he} {wears}" + (f", {held}" if held else "")
        sentences = [first, second, *around, _seen(he, view)]
    elif plan == 2:
        main = f"{subject} {wearing} is {action} {place}"
        first = ", ".join(part for part in (main, held, view) if part)
        second = f"{he} has {head}" if head else ""
        third = f"{he} is {facing}" if facing else ""
        sentences = [first, second, third, *around, f"it is {when}" if time else _seen(he, when)]
    elif plan == 3:
        main = f"in this picture, {subject} is {action}"
        first = ", ".join(part for part in (main, view) if part)
        second = f"{he} {wears}" + (f" and has {head}" if head else "")
        third = ", ".join(part for part in (f"{he} is {place} {when}", facing, held) if part)
        sentences = [first, second, third, *around]
    elif plan == 4:
        main = f"{wearing}, {subject}{with_head} is {action} {place}"
        first = ", ".join(part for part in (main, facing, held) if part)
        sentences = [
            *around[:1],
            first,
            *around[1:],
            _seen(he, ", ".join(p for p in (view, when) if p)),
        ]
    elif plan == 5:
        main = f"{place}, {subject}" + (f", {held}," if held else "") + f" is {action} {when}"
        first = main
        second = f"{he} {wears}"
        third = ", ".join(part for part in (f"{he} has {head}" if head else "", facing) if part)
        third = third if head or not facing else f"{he} is {facing}"
        sentences = [*around[::-1], first, second, third, _seen(he, view)]
    else:
        main = f"{action} {place} {when}, {subject} {wears}"
        first = ", ".join(part for part in (main, held) if part)
        second = ", ".join(part for part in (f"{he} has {head}" if head else "", view) if part)
        second = second if head or not view else f"{he} is {view}"
        sentences = [first, second, f"{he} is {facing}" if facing else "", *around[::-1]]
    return " ".join(_sentence(text) for text in sentences if text.strip(" ,"))


def _seen(he: str, view: str) -> str:
    return f"{he} is {view}" if view else ""


def write_source_caption(video: Video, shot: Shot) -> str:
    """Write a short caption of the source video in the commonest words."""
    female = video.person.is_female
    action = ACTION[shot.action][0].replace("{c}", COLOUR[video.prop_colour][0])
    action = action.replace("{his}", "her" if female else "his")
    return _sentence(f"{article(KIND[video.person.kind][0])} {action} {SCENE[video.scene][0]}")


def write_surveillance_caption(seed: int, video: Video, shot: Shot) -> str:
    """Write a caption without colours, which may fit several grey pictures from a high camera."""
    rng = np.random.default_rng([seed, video.split, video.index, CAPTION_STREAM])
    w = Writer(video, shot, rng)
    p = video.person
    garments = article(w.say(UPPER[p.upper]))
    if p.lower != "dress":
        garments += " and " + ("a " if p.lower == "skirt" else "") + w.say(LOWER[p.lower])
    action = ACTION[shot.action][_weighted(rng, settings.TEST_SYNONYMS)]
    action = action.replace("{c} ", "").replace("{his}", w.his)
    wearing = w.say(WEARING, garments)
    who = article(w.say(KIND[p.kind]))
    where = w.say(SCENE[video.scene])
    first = f"a camera high above the ground shows {who} {wearing}, {action} {where}"
    view = f"{w.say(FACING[video.facing])}, {w.say(POSITION[video.position])}"
    second = f"{w.he} is {view}, in a grey picture without bright colours"
    return " ".join(_sentence(text) for text in (first, second))
