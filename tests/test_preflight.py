"""LHP and UIT check folders, disk space and images before they train or score."""

from __future__ import annotations

import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lhp.train
import pab.training.data
import pab.training.preflight
import uit.train
from lhp.infer import main as lhp_infer
from pab.core.errors import InputError
from pab.core.outputs import check_free_space, check_output_folder
from pab.data.training_set import TrainingSet
from tests.conftest import MODEL
from tests.test_uit_train import SIZES, TEXT, vocabulary  # noqa: F401 - a fixture
from uit.infer import main as uit_infer

Usage = namedtuple("Usage", "total used free")


class Recipe:
    """Command line of a recipe that trains on a copy of the tiny data."""

    def __init__(self, main: Callable[..., None], words: list[str], data: Path, out: Path) -> None:
        self.main, self.words, self.data, self.out = main, words, data, out

    def argv(self, *flags: str, **settings: Any) -> list[str]:
        given = {
            "data_path": self.data, "output_dir": self.out, "batch_size": 4, "epochs": 1,
            "max_steps": 1, "num_workers": 0, "dtype": "fp32", "device": "cpu",
            "cache_dir": self.data / "cache",
        } | settings  # fmt: skip
        return [
            *self.words,
            *flags,
            *(word for k, v in given.items() for word in (f"--{k}", str(v))),
        ]

    def __call__(self, *flags: str, **settings: Any) -> None:
        self.main(self.argv(*flags, **settings))


@pytest.fixture(params=["lhp", "uit"])
def recipe(
    request: pytest.FixtureRequest, data_copy: Path, tokenizer_file: Path, vocabulary: Path,  # noqa: F811
    tmp_path: Path,
) -> Recipe:  # fmt: skip
    words = {
        "lhp": ["--model", MODEL, "--input_size", "64", "--sentencepiece_model"]
        + [str(tokenizer_file), "--warmup_steps", "2"],
        "uit": [*SIZES, *TEXT, "--no_synonyms", "--text_encoder", str(vocabulary)]
        + ["--mim_block", "8"],
    }[request.param]
    main = {"lhp": lhp.train.main, "uit": uit.train.main}[request.param]
    return Recipe(main, words, data_copy, tmp_path / "out")


@pytest.fixture
def fails_early(
    recipe: Recipe, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Return a function that runs a recipe, which must fail before it reads images or writes."""

    def no_step(*_: object) -> object:
        raise AssertionError("the first step was reached")

    monkeypatch.setattr(pab.training.data, "load_image", no_step)

    def run(**settings: Any) -> str:
        line = refused(recipe.main, recipe.argv(**settings))
        assert not recipe.out.is_dir() or list(recipe.out.iterdir()) == []
        return line

    return run


def test_valid_settings_train(recipe: Recipe) -> None:
    recipe(val_pairs=4, log_dir=recipe.out / "log")
    assert (recipe.out / "run.json").is_file()


@pytest.mark.parametrize("flag", ["output_dir", "log_dir"])
def test_a_folder_that_is_not_writable_is_refused(
    recipe: Recipe, fails_early: Callable[..., str], flag: str
) -> None:
    (recipe.data / "file").touch()
    line = fails_early(**{flag: recipe.data / "file/below"})
    assert f"--{flag}: " in line
    assert "is not a writable folder" in line


def test_a_log_folder_needs_tensorboard(
    recipe: Recipe, fails_early: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    line = fails_early(log_dir=recipe.out / "log")
    assert "--log_dir: needs TensorBoard" in line
    assert "--log_dir none" in line


def test_a_disk_without_space_for_the_checkpoints_is_refused(
    recipe: Recipe, fails_early: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 100, 1000))
    line = fails_early()
    assert "--output_dir: expected " in line
    assert "GB for the checkpoints" in line
    assert "--no_save_ckpt" in line


def test_existing_checkpoints_count_as_free_space(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new checkpoint replaces the existing one."""
    asked: list[int] = []

    def note(flag: str, path: object, needed: int, *_: object, **__: object) -> None:
        asked.append(needed)

    monkeypatch.setattr(pab.training.preflight, "check_free_space", note)
    recipe()
    state = (recipe.out / "checkpoint-last.pth").stat().st_size
    recipe(max_steps=2)
    recipe(max_steps=2, save_every_steps=1)
    assert asked[0] > 0
    assert asked[1] == asked[0] - state
    recipe("--no_save_ckpt", output_dir=recipe.out / "none")
    assert len(asked) == 3


def test_checkpoints_left_half_written_are_removed(recipe: Recipe) -> None:
    recipe()
    left = [recipe.out / f".checkpoint-{name}" for name in ("last.pth.x1.tmp", "last.pth.copy")]
    other = recipe.out / ".notes.tmp"
    for path in (*left, other):
        path.write_text("x")
    recipe(max_steps=2)
    assert not [path for path in left if path.exists()]
    assert other.exists()


def test_twin_batches_need_videos_of_several_images(
    recipe: Recipe, fails_early: Callable[..., str]
) -> None:
    table = recipe.data / "pairs.csv"
    images = [pair.image for pair in TrainingSet.open(recipe.data)]
    rows = [f"{image},a man {number}" for image in images for number in range(2)]
    table.write_text("\n".join(["filepath,title", *rows]))
    line = fails_early(data_path=table, csv_separator=",", twin_batches_from=0)
    assert "--twin_batches_from: expected source videos with several images" in line
    with pytest.raises(AssertionError, match="the first step was reached"):
        recipe(data_path=table, csv_separator=",", twin_batches_from=99)


def test_every_kept_epoch_needs_space_for_its_weights(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def note(flag: str, path: object, needed: int, *_: object, **__: object) -> None:
        asked.append(needed)

    monkeypatch.setattr(pab.training.preflight, "check_free_space", note)
    for number, settings in enumerate((
        {"epochs": 1}, {"epochs": 9}, {"epochs": 9, "save_ckpt_freq": 2},
        {"epochs": 9, "keep_checkpoints": 3},
    )):  # fmt: skip
        recipe(output_dir=recipe.out / str(number), **settings)
    extra = [needed - asked[0] for needed in asked]
    assert extra[1] > 0
    assert [8 * more // extra[1] for more in extra] == [0, 8, 4, 3]


def test_missing_training_images_are_counted(
    recipe: Recipe, fails_early: Callable[..., str]
) -> None:
    shutil.rmtree(recipe.data / "train/imgs_1")
    (recipe.data / "train/imgs_0/goal/2.jpg").unlink()
    line = fails_early()
    assert "missing training images (13 of 24): train/imgs_0/goal/2.jpg; train/imgs_1/" in line
    assert "--train_shards" in line
    line = fails_early(train_shards="1")
    assert "training images (12 of 12)" in line


def test_a_long_list_of_missing_images_is_shortened(
    recipe: Recipe, fails_early: Callable[..., str]
) -> None:
    shutil.rmtree(recipe.data / "train")
    line = fails_early()
    assert "training images (24 of 24)" in line
    assert line.count(".jpg; ") == 20
    assert "and 4 more; download them" in line


def test_validation_images_are_decoded(recipe: Recipe, fails_early: Callable[..., str]) -> None:
    for image in (recipe.data / "train").rglob("*.jpg"):
        image.write_bytes(b"no image")
    assert "4 of 4 images: cannot be read" in fails_early(val_pairs=4)


def test_validation_features_need_space(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """UIT's validation stores the image tokens in a temporary file."""
    free = {True: 10**9, False: 100}
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: Usage(0, 0, free[Path(path) != Path("/tmp")])
    )
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/tmp")
    if recipe.main is lhp.train.main:
        recipe(val_pairs=4)
        return
    with pytest.raises(InputError, match=r"TMPDIR: expected .* the features of the validation"):
        recipe(val_pairs=4)


@pytest.mark.parametrize(
    "broken", ["save_score", "output_file", "feature_cache_dir", "save_itc", "cache_dir"]
)
@pytest.mark.parametrize("main", [lhp_infer, uit_infer])
def test_scoring_checks_its_outputs_before_the_images(
    main: Callable[..., None], broken: str, data_copy: Path, refused: Callable[..., str]
) -> None:
    """The images are damaged as well, but the command must report the output first."""
    if main is lhp_infer and broken in ("save_itc", "cache_dir"):
        pytest.skip("not a flag of LHP")
    masked = data_copy / "name-masked_test-set"
    for image in (masked / "gallery").iterdir():
        image.write_bytes(b"")
    (data_copy / "file").touch()
    words = ["--annotation", str(masked / "query.json"), "--image_folder", str(masked / "gallery")]
    words += [f"--{broken}", str(data_copy / "file/below/x.pt"), "--device", "cpu"]
    if broken == "feature_cache_dir":
        words.append("--feature_cache")
    assert f"--{broken}: " in refused(main, words)


def test_images_are_listed_once_and_cached(
    data_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = TrainingSet.open(data_copy)
    images = [pair.image for pair in pairs]
    assert pairs.images() == images
    assert pairs.missing_images() == []
    monkeypatch.setattr(TrainingSet, "__getitem__", lambda *_: pytest.fail("a line was read"))
    again = TrainingSet.open(data_copy)
    assert again.images() == images


def test_output_folders_may_be_missing_and_are_not_created(tmp_path: Path) -> None:
    check_output_folder("--x", tmp_path / "a/b/c")
    assert list(tmp_path.iterdir()) == []
    check_free_space("--x", tmp_path / "a/b", 1, "it", todo="")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"--x: .*is not a writable folder"):
        check_output_folder("--x", tmp_path / "link/a")
