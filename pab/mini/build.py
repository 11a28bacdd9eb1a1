"""Write the mini data: pictures rendered by a pool of processes, and their annotations.

Each split is built in a hidden folder of the output folder and moved to its place when complete,
so that an interrupted run leaves no partial split. ``manifest.json`` records the seed and the
hash of the sources of each split, and the hashes of its pictures and annotations.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pab.core.errors import InputError
from pab.core.files import sha256_of_file, sha256_of_lines, write_json
from pab.mini import settings
from pab.mini.actions import ACTIONS
from pab.mini.camera import encode
from pab.mini.captions import write_caption, write_source_caption, write_surveillance_caption
from pab.mini.render import render_video
from pab.mini.videos import (
    ABNORMAL_KIND,
    DISTRACTOR,
    SECOND_ABNORMAL_KIND,
    TEST,
    TRAIN,
    UCC,
    Video,
    draw_video,
    pick,
    repaint,
    video_kinds,
)

SPLITS = ("test", "train", "distractors")
PLACES = {  # folders of each split inside the output folder
    "test": ("annotation/test", "test", "ucc", "name-masked_test-set"),
    "train": ("annotation/train", "annotation/train_attr", "train"),
    "distractors": ("track4",),
}
MANIFEST = "manifest.json"
MASK_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
MASK_LENGTH = 15
# Random streams of this module, kept apart from those that draw the videos.
ORDER_STREAM, MASK_STREAM = 17_000_003, 17_000_005
NEAR_MISS_STREAM, REPAINT_STREAM, GROUP_STREAM = 17_000_009, 17_000_010, 17_000_011
JPEG_STREAM = 17_000_013


@dataclass(frozen=True)
class Plan:
    """Output folder, seed and size of the data set, and the number of processes."""

    out: Path
    seed: int = settings.SEED
    train: int = settings.TRAIN_PAIRS
    test: int = settings.TEST_PAIRS
    distractors: int = settings.DISTRACTORS
    ucc: int = settings.UCC_PAIRS
    workers: int = 1


@dataclass(frozen=True)
class Task:
    """A video to draw, with the path of each of its first ``len(paths)`` shots."""

    seed: int
    split: int
    index: int
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """Facts about one written picture."""

    path: str
    sha256: str
    source: int
    y: int
    action: str
    scene: str
    caption: str
    source_caption: str


def build(plan: Plan, splits: Iterable[str], say: Callable[[str], None]) -> None:
    """Build the named splits; an existing split of the same seed, size and sources is kept.

    Raises:
        InputError: the folder holds other files, cannot be written, or lacks the test split.
    """
    manifest = _read_manifest(plan.out)
    makers = {"test": _build_test, "train": _build_train, "distractors": _build_distractors}
    for split in SPLITS:
        if split not in splits:
            continue
        key = _key(plan, split)
        entry = manifest["splits"].get(split)
        if entry and entry["key"] == key and all((plan.out / p).is_dir() for p in PLACES[split]):
            say(f"{split}: already there ({entry['pictures']} pictures)")
            continue
        if split == "distractors":
            made = manifest["splits"].get("test")
            if made is None or made["key"] != _key(plan, "test"):
                raise InputError(
                    plan.out,
                    "the Track 4 gallery needs the test split of the same seed and size",
                    item="--splits distractors",
                    todo="add test to --splits",
                )
        staging = plan.out / f".building_{split}"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            pictures = makers[split](plan, staging)
            manifest["splits"].pop(split, None)
            manifest["splits"][split] = {
                "key": key,
                "pictures": len(pictures),
                "images_sha256": sha256_of_lines([f"{p.path} {p.sha256}" for p in pictures]),
                "annotations_sha256": _annotations_hash(staging),
            }
            for place in PLACES[split]:
                shutil.rmtree(plan.out / place, ignore_errors=True)
                (plan.out / place).parent.mkdir(parents=True, exist_ok=True)
                (staging / place).replace(plan.out / place)
        except OSError as error:
            raise InputError(plan.out, f"cannot be written: {error}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        write_json(plan.out / MANIFEST, manifest)
        say(f"{split}: {len(pictures)} pictures made")


def _read_manifest(out: Path) -> dict[str, Any]:
    if out.is_file():
        raise InputError(out, "expected a folder to build in, found a file")
    path = out / MANIFEST
    if path.is_file():
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(path, f"not valid JSON: {error}", todo="delete the folder") from error
        if not isinstance(manifest, dict) or not isinstance(manifest.get("splits"), dict):
            raise InputError(path, 'expected an object with "splits"', todo="delete the folder")
        return manifest
    if out.is_dir() and any(not entry.name.startswith(".building_") for entry in out.iterdir()):
        raise InputError(
            out,
            f"expected an empty folder or one with {MANIFEST}, found other files",
            todo="choose another --out",
        )
    return {"format": 1, "splits": {}}


def source_sha256() -> str:
    """Return the hash of the code that draws and words the data; a new hash rebuilds them."""
    folder = Path(__file__).parent
    skipped = ("__main__.py", "contact_sheet.py")
    files = sorted(path for path in folder.glob("*.py") if path.name not in skipped)
    return sha256_of_lines([f"{path.name} {sha256_of_file(path)}" for path in files])


def _key(plan: Plan, split: str) -> dict[str, Any]:
    key: dict[str, Any] = {"seed": plan.seed, "source_sha256": source_sha256()}
    key |= {"train": {"train": plan.train}, "test": {"test": plan.test, "ucc": plan.ucc}}.get(
        split, {"test": plan.test, "distractors": plan.distractors}
    )
    return key


def _annotations_hash(folder: Path) -> str:
    texts = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".txt"))
    return sha256_of_lines([f"{p.relative_to(folder)} {sha256_of_file(p)}" for p in texts])


# --- pictures --------------------------------------------------------------------------------
def near_miss_of(seed: int, index: int) -> int | None:
    """Return the test video that a distractor repeats with other garment colours, or None.

    Everything else in such a picture fits the test video's query.
    """
    rng = np.random.default_rng([seed, DISTRACTOR, index, NEAR_MISS_STREAM])
    if rng.random() >= settings.NEAR_MISS_DISTRACTORS:
        return None
    return int(rng.integers(settings.TEST_PAIRS // 2))


def video_of(task: Task) -> Video:
    """Return the video that a task draws, with one shot per path."""
    if task.split == DISTRACTOR:
        source = near_miss_of(task.seed, task.index)
        if source is not None:
            near = draw_video(task.seed, TEST, source)
            rng = np.random.default_rng([task.seed, DISTRACTOR, task.index, REPAINT_STREAM])
            return replace(
                near,
                split=DISTRACTOR,
                index=task.index,
                person=repaint(near.person, rng),
                shots=(pick(rng, near.shots),),
            )
    if task.split == UCC:
        group, member = divmod(task.index, settings.UCC_GROUP)
        video = draw_video(task.seed, UCC, group)
        rng = np.random.default_rng([task.seed, UCC, task.index, GROUP_STREAM])
        # The shared caption of a group names no colours, so its pictures may differ in colours.
        # Seen from above, the whole figure is small and stands in the lower half.
        return replace(
            video,
            person=repaint(video.person, rng),
            distance="far",
            weather="clear",
            time="noon" if video.time == "night" else video.time,  # grey at night shows nothing
            companion=None,
            height=0.36 + 0.06 * float(rng.random()),
            ground=0.74 + 0.10 * float(rng.random()),
            layout=video.layout if member == 0 else pick(rng, settings.TEST_LAYOUTS),
        )
    video = draw_video(task.seed, task.split, task.index)
    return replace(video, shots=video.shots[: len(task.paths)])


def _paint(job: tuple[Task, str]) -> list[Picture]:
    """Draw, write and describe one video (runs in a worker process)."""
    task, root = job
    video = video_of(task)
    pictures = []
    images = render_video(task.seed, video)
    for image, shot, path in zip(images, video.shots, task.paths, strict=True):
        rng = np.random.default_rng([task.seed, task.split, task.index, JPEG_STREAM, shot.y])
        data = encode(image, task.split, rng)
        (Path(root) / path).write_bytes(data)
        write = write_surveillance_caption if task.split == UCC else write_caption
        pictures.append(
            Picture(
                path=path,
                sha256=hashlib.sha256(data).hexdigest(),
                source=task.index,
                y=shot.y,
                action=shot.action,
                scene=video.scene,
                caption=write(task.seed, video, shot),
                source_caption=write_source_caption(video, video.shots[0]),
            )
        )
    return pictures


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterable[list[Picture]]]]:
    if workers == 1:
        yield map
        return
    with ProcessPoolExecutor(workers) as pool:
        yield lambda function, jobs: pool.map(function, jobs, chunksize=16)


def _paint_all(plan: Plan, root: Path, tasks: list[Task]) -> list[list[Picture]]:
    """Draw all pictures; the result is in the order of the tasks for any number of workers."""
    for folder in {str(Path(path).parent) for task in tasks for path in task.paths}:
        (root / folder).mkdir(parents=True, exist_ok=True)
    with _mapper(plan.workers) as run:
        return list(run(_paint, [(task, str(root)) for task in tasks]))


def _kinds_for(seed: int, split: int, pictures: int) -> list[tuple[int, ...]]:
    """Return the kinds of the shots of videos 0, 1, ..., ``pictures`` shots in total."""
    kinds: list[tuple[int, ...]] = []
    left = pictures
    while left:
        of_video = video_kinds(seed, split, len(kinds))[:left]
        kinds.append(of_video)
        left -= len(of_video)
    return kinds


# --- annotations -----------------------------------------------------------------------------
def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8", newline="\n")


def _action_field(picture: Picture) -> dict[str, str]:
    kind = "normal" if picture.y == 0 else "anomaly"
    return {kind: ACTIONS[picture.action].label}


def _train_folder(kinds: tuple[int, ...], y: int, rng: np.random.Generator) -> str:
    if y == SECOND_ABNORMAL_KIND:
        return "full"
    if y == ABNORMAL_KIND:
        return "wentwrong"
    in_full = rng.random() < settings.NORMAL_IN_FULL and SECOND_ABNORMAL_KIND not in kinds
    return "full" if in_full else "goal"


def _build_train(plan: Plan, root: Path) -> list[Picture]:
    all_kinds = _kinds_for(plan.seed, TRAIN, plan.train)
    rng = np.random.default_rng([plan.seed, TRAIN, 0, ORDER_STREAM])
    per_shard = -(-len(all_kinds) // settings.TRAIN_SHARDS)
    tasks = []
    for index, kinds in enumerate(all_kinds):
        shard, number = divmod(index, per_shard)
        folders = [_train_folder(kinds, y, rng) for y in kinds]
        paths = tuple(f"train/imgs_{shard}/{folder}/{number}.jpg" for folder in folders)
        tasks.append(Task(plan.seed, TRAIN, index, paths))
    painted = _paint_all(plan, root, tasks)
    for shard in range(settings.TRAIN_SHARDS):
        videos = painted[shard * per_shard : (shard + 1) * per_shard]
        count = sum(len(video) for video in videos)
        numbers = iter(rng.permutation(count).tolist())
        pairs, attributes = {}, {}
        for video in videos:
            ids = [next(numbers) for _ in video]
            for own, (number, picture) in enumerate(zip(ids, video, strict=True)):
                line: dict[str, Any] = {
                    "image": picture.path,
                    "caption": picture.caption,
                    "image_id": f"{shard}_{number}",
                }
                if len(video) == 2:
                    twin = video[1 - own]
                    line["hard_i"] = twin.path.removeprefix("train/")
                    line["hard_c"] = twin.caption
                    line["hard_i_id"] = f"{shard}_{ids[1 - own]}"
                line["source_id"] = f"{picture.source}_{picture.y}"
                line["source_caption"] = picture.source_caption
                pairs[number] = line
                attributes[number] = {**line, **_action_field(picture), "scene": picture.scene}
        _write_lines(root / f"annotation/train/pair_{shard}.json", [pairs[n] for n in range(count)])
        _write_lines(
            root / f"annotation/train_attr/attr_{shard}.json",
            [attributes[n] for n in range(count)],
        )
    return [picture for video in painted for picture in video]


def _build_test(plan: Plan, root: Path) -> list[Picture]:
    all_kinds = _kinds_for(plan.seed, TEST, plan.test)
    rng = np.random.default_rng([plan.seed, TEST, 0, ORDER_STREAM])
    numbers = iter(rng.permutation(plan.test).tolist())  # shuffled, so twins are not neighbours
    tasks = [
        Task(plan.seed, TEST, index, tuple(f"test/{next(numbers)}.jpg" for _ in kinds))
        for index, kinds in enumerate(all_kinds)
    ]
    painted = _paint_all(plan, root, tasks)
    pairs, attributes = {}, {}
    for video in painted:
        for own, picture in enumerate(video):
            number = int(Path(picture.path).stem)
            line = {"image": picture.path, "image_id": str(number), "caption": [picture.caption]}
            pairs[number] = line
            extra = _action_field(picture) | {
                "scene": picture.scene,
                "source_id": f"{picture.source}_{picture.y}",
            }
            if len(video) == 2:
                extra["hard_i_id"] = Path(video[1 - own].path).stem
            attributes[number] = {**line, **extra}
    _write_lines(root / "annotation/test/pair.json", [pairs[n] for n in range(plan.test)])
    _write_lines(root / "annotation/test/attr.json", [attributes[n] for n in range(plan.test)])
    pictures = [picture for video in painted for picture in video]
    queries = [(picture, root / picture.path) for picture in pictures]
    _write_masked(root / "name-masked_test-set", queries, [], [plan.seed, TEST, 0, MASK_STREAM])
    return pictures + _build_ucc(plan, root)


def _build_ucc(plan: Plan, root: Path) -> list[Picture]:
    """Build the surveillance set: groups of one to ``UCC_GROUP`` pictures that share a caption."""
    rng = np.random.default_rng([plan.seed, UCC, 0, ORDER_STREAM])
    tasks: list[Task] = []
    group = 0
    while len(tasks) < plan.ucc:
        members = min(1 + int(rng.integers(settings.UCC_GROUP)), plan.ucc - len(tasks))
        for member in range(members):
            path = (f"ucc/{len(tasks)}.jpg",)
            tasks.append(Task(plan.seed, UCC, group * settings.UCC_GROUP + member, path))
        group += 1
    pictures = [video[0] for video in _paint_all(plan, root, tasks)]
    lines = [
        {"image": p.path, "image_id": f"ucc_{n}", "caption": [p.caption]}
        for n, p in enumerate(pictures)
    ]
    _write_lines(root / "annotation/test/ucc.json", lines)
    return pictures


def _build_distractors(plan: Plan, root: Path) -> list[Picture]:
    """Build Track 4's set: the test pictures under new names among the distractors."""
    tasks = [
        Task(plan.seed, DISTRACTOR, index, (f"track4/distractors/{index}.jpg",))
        for index in range(plan.distractors)
    ]
    pictures = [video[0] for video in _paint_all(plan, root, tasks)]
    queries = []
    for line in _read_lines(plan.out / "annotation/test/attr.json"):
        is_normal = "normal" in line
        label = line["normal" if is_normal else "anomaly"]
        action = next(n for n, a in ACTIONS.items() if a.label == label)
        y = int(line["source_id"].split("_")[1])
        known = Picture(line["image"], "", 0, y, action, "", line["caption"][0], "")
        queries.append((known, plan.out / line["image"]))
    folder = root / "track4/name-masked_test-set"
    others = [root / picture.path for picture in pictures]
    order = _write_masked(folder, queries, others, [plan.seed, DISTRACTOR, 0, MASK_STREAM])
    (folder / "query_index.txt").write_text("".join(f"{name}\n" for name in order))
    shutil.rmtree(root / "track4/distractors")
    return pictures


def _read_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _write_masked(
    folder: Path, queries: list[tuple[Picture, Path]], others: list[Path], stream: list[int]
) -> list[str]:
    """Write gallery, queries and answers under random names; return the query ids in order."""
    rng = np.random.default_rng(stream)
    names = _masked_names(rng, len(queries) + len(others), MASK_ALPHABET)
    ids = _masked_names(rng, len(queries), MASK_ALPHABET[-10:])
    (folder / "gallery").mkdir(parents=True)
    for name, source in zip(names, [path for _, path in queries] + others, strict=True):
        _link(source, folder / "gallery" / f"{name}.jpg")
    lines, answers = [], {}
    for position in rng.permutation(len(queries)).tolist():
        picture = queries[position][0]
        lines.append({"query_index": ids[position], "caption": picture.caption})
        answers[ids[position]] = {"gallery": names[position], **_action_field(picture)}
    _write_lines(folder / "query.json", lines)
    write_json(folder / "answers.json", answers)
    return [line["query_index"] for line in lines]


def _masked_names(rng: np.random.Generator, count: int, alphabet: str) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        draws = rng.integers(len(alphabet), size=MASK_LENGTH).tolist()
        names["".join(alphabet[d] for d in draws)] = None
    return list(names)


def _link(source: Path, target: Path) -> None:
    """Create a hard link, or a copy if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
