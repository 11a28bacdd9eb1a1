"""Training questions of a reranker: a caption, its right image, and wrong ones.

Questions come from `mined.jsonl` (`python -m ensemble.mine`), or directly from training pairs,
whose twins are then the wrong images. Further wrong images are drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from pab.core import processes
from pab.core.errors import InputError
from pab.core.files import existing_file
from pab.core.progress import progress
from pab.data import fields as checks
from pab.data.fields import FieldNotes
from pab.data.image_paths import ImageFinder, checked_path
from pab.data.images import load_image
from pab.data.json_lines import kind
from pab.data.record_lines import read_records
from pab.data.records import TrainPair
from pab.data.training_set import TrainingSet
from pab.training.sampling import SampleKey, sample_seed

MOST_DRAWS = 1000  # random images drawn per question to find enough wrong ones
MINED_FIELDS = frozenset(("caption", "query_id", "image", "wrong", "kind", "source"))


@dataclass(frozen=True, slots=True)
class Question:
    """Caption with its right image and wrong ones, hardest first; paths as in training shards."""

    caption: str
    image: str
    wrong: tuple[str, ...]


def question_of_pair(pair: TrainPair) -> Question:
    """Convert a training pair; its twin, if any, is the wrong image.

    A twin with the same caption is not wrong.
    """
    has_twin = pair.hard_i is not None and pair.hard_c != pair.caption
    return Question(pair.caption, pair.image, (f"train/{pair.hard_i}",) if has_twin else ())


class PairQuestions(Sequence[Question]):
    """Questions of training pairs, read from disk on access.

    Args:
        pairs: the training set.
        rows: positions of the pairs to use.
        held_out: files of the validation images; a twin among them is not used.
    """

    def __init__(
        self, pairs: TrainingSet, rows: np.ndarray, held_out: frozenset[Path] = frozenset()
    ) -> None:
        self.pairs, self.rows, self.held_out = pairs, rows, held_out
        self.finder = ImageFinder(pairs.root)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Question:  # type: ignore[override]
        question = question_of_pair(self.pairs[int(self.rows[position])])
        if self.held_out.isdisjoint(map(self.finder.find, question.wrong)):
            return question
        return replace(question, wrong=())


def read_mined(path: str | Path, root: str | Path) -> list[Question]:
    """Read mined training questions, one JSON object per line.

    Args:
        path: file of `python -m ensemble.mine`.
        root: data root that the image paths are relative to.

    Raises:
        InputError: the file is missing, contains no question, or has invalid lines (all are
            counted).
    """
    path = existing_file(path, "a file of mined training questions")
    found = list(read_records(path, partial(_mined, finder=ImageFinder(root))))
    if not found:
        raise InputError(path, "expected mined training questions, found none")
    return found


def _mined(
    fields: dict[str, Any], path: Path, item: str, notes: FieldNotes, *, finder: ImageFinder
) -> Question:
    fault, root = partial(InputError, path, item=item), finder.root
    notes.ignore_unknown(fields, MINED_FIELDS)
    caption = checks.one_caption(fields, fault)
    image = checked_path(
        checks.required_text(fields, "image", fault), "image", path, item, root=root
    )
    wrong = fields.get("wrong")
    if not isinstance(wrong, list) or not wrong or not all(map(checks.is_text, wrong)):
        found = "no such field" if "wrong" not in fields else kind(wrong)
        raise fault(f"field 'wrong': expected a list of image paths, found {found}")
    paths = tuple(checked_path(one, "wrong", path, item, root=root) for one in wrong)
    files = [finder.find(one) for one in paths]
    if finder.find(image) in files:
        raise fault(f"field 'wrong': expected wrong images, found the right one ({image!r})")
    if len(set(files)) != len(files):
        twice = next(one for one, file in zip(paths, files, strict=True) if files.count(file) > 1)
        raise fault(f"field 'wrong': expected distinct images, found {twice!r} twice")
    return Question(caption, image, paths)


def without_held_out(
    questions: Sequence[Question], held_out: frozenset[Path], finder: ImageFinder, where: str | Path
) -> list[Question]:
    """Leave out the questions with a held-out image, right or wrong.

    Args:
        questions: mined questions.
        held_out: files of the validation images.
        finder: finds the files of the questions' images.
        where: file of the questions, for the error.

    Raises:
        InputError: no question remains, or an image has several variants.
    """
    kept = [q for q in questions if held_out.isdisjoint(map(finder.find, (q.image, *q.wrong)))]
    if not kept:
        raise InputError(
            where, "expected questions without validation images of this run, found "
            f"none (of {len(questions)})",
            todo="mine the training pairs, or hold out other videos with --val_seed",
        )  # fmt: skip
    return kept


def check_images(names: Iterable[str], root: Path, where: str | Path, todo: str) -> None:
    """Check that the images of questions exist.

    Args:
        names: paths of the images.
        root: data root that the paths are relative to.
        where: file or folder of the questions, for the error.
        todo: remedy, for the error.

    Raises:
        InputError: images are missing; the message counts them and names the first.
    """
    names = dict.fromkeys(names)
    missing = ImageFinder(root).absent(names)
    if missing:
        raise InputError(
            where, f"images missing under {root}: {len(missing):,} of {len(names):,}",
            item=f"image {missing[0]!r}", todo=todo,
        )  # fmt: skip


def check_twins(questions: PairQuestions) -> None:
    """Check, once per machine, that the twins of training pairs exist.

    Raises:
        InputError: see :func:`check_images`.
    """
    if processes.first_on_machine():
        found = progress(questions, "looking for twins", "pairs")
        names = (name for question in found for name in question.wrong)
        todo = "download the twins (field hard_i), or set --hard_negatives 0"
        check_images(names, questions.pairs.root, questions.pairs.root, todo)


@dataclass(frozen=True)
class Draws:
    """Numbers of wrong images per question.

    Attributes:
        hard: images drawn from the question's own wrong images.
        easy: images drawn from all training pairs.
        hard_from: first epoch with hard images. Before this epoch, and for a question with too few
            hard images, easy ones take their places.
    """

    hard: int
    easy: int
    hard_from: int = 0

    @property
    def total(self) -> int:
        """Number of wrong images per question."""
        return self.hard + self.easy


class Sample(NamedTuple):
    """Caption with its images, the right one first, and their files, for errors."""

    caption: str
    images: list[Image.Image]
    paths: list[Path]


class QuestionSamples(Dataset[Any]):
    """Dataset of questions with drawn wrong images; yields :class:`Sample`, or an error.

    Args:
        questions: the questions.
        pairs: training set that easy wrong images are drawn from.
        rows: positions of its training pairs.
        draws: numbers of wrong images.
        seed: seed of the draws, combined with the epoch and the position of the question.
        crop: function that may crop a training image; draws from torch's generator.
    """

    def __init__(
        self, questions: Sequence[Question], pairs: TrainingSet, rows: np.ndarray, draws: Draws,
        seed: int, crop: Callable[[Image.Image], Image.Image],
    ) -> None:  # fmt: skip
        self.questions, self.pairs, self.rows = questions, pairs, rows
        self.draws, self.seed, self.crop = draws, seed, crop
        self.finder = ImageFinder(pairs.root)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, key: SampleKey) -> Sample | InputError:
        """Load a sample by (position of the question, epoch)."""
        position, epoch = key
        with sample_seed(self.seed, epoch, position):
            try:
                question = self.questions[position]
                names = [question.image, *self.wrong(question, epoch)]
                paths = [self.finder.find(name) for name in names]
                return Sample(question.caption, [self.crop(load_image(p)) for p in paths], paths)
            except InputError as error:
                return error

    def wrong(self, question: Question, epoch: int) -> list[str]:
        """Draw the wrong images of a question, hard ones first.

        Random images with the question's caption are not used.

        Raises:
            InputError: the random images include too few wrong ones, or an image has several
                variants.
        """
        draws, found = self.draws, list[str]()
        if epoch >= draws.hard_from:
            order = torch.randperm(len(question.wrong))[: draws.hard].tolist()
            found = [question.wrong[i] for i in order]
        taken = {self.finder.find(name) for name in (question.image, *question.wrong)}
        for row in torch.randint(len(self.rows), (MOST_DRAWS,)).tolist():
            if len(found) == draws.total:
                break
            other = self.pairs[int(self.rows[row])]
            path = self.finder.find(other.image)
            if path not in taken and other.caption != question.caption:
                taken.add(path)
                found.append(other.image)
        if len(found) < draws.total:
            raise InputError(
                "--easy_negatives", f"{MOST_DRAWS} random images include too few wrong ones"
            )
        return found
