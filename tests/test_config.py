"""Configs from YAML and flags: accepted and rejected values, help texts, saving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pab import __version__
from pab.core.commands import GROUPS, CommandParser
from pab.core.config import (
    add_config_flags,
    as_plain,
    config_from_args,
    flag,
    load_config,
    save_resolved,
)
from pab.core.errors import InputError


@dataclass(frozen=True)
class Recipe:
    lr: float = flag(1e-5, "peak learning rate, 100% of it", group="optimization", gt=0)
    epochs: int = flag(4, "passes over the data", ge=0)
    task: Literal["pab", "356"] = "pab"
    save_ckpt: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    sizes: tuple[int, ...] = ()
    clip: float | None = flag(None, "maximum norm; none: off", ge=0)
    share: float = flag(0.5, "share", ge=0, lt=1)
    names: tuple[str, ...] | None = None
    data_path: str = flag("data/PAB", "root of the data", group="data")
    log_dir: str | None = None
    note: str = ""
    keep: bool = True
    workers: int | Literal["auto"] = flag("auto", "loader processes", ge=0)

    def check(self) -> None:
        if self.epochs == 0 and self.save_ckpt:
            raise InputError("--save_ckpt", "contradicts --epochs 0")


@dataclass(frozen=True)
class Tuned(Recipe):
    flag_group: ClassVar = "model"  # of the fields that this class adds

    size: int = 3
    lr: float = flag(2e-5, "peak learning rate")
    epochs: int = flag(9, "passes over the data", ge=2)


def parse(*argv: str) -> Recipe:
    return config_from_args(Recipe, list(argv), prog="train")[0]


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "lr: 2e-4\nepochs: 7\n")
    config = parse("--config", str(path), "--epochs", "9")
    assert (config.lr, config.epochs, config.task) == (2e-4, 9, "pab")


def test_every_kind_of_flag() -> None:
    config = parse(
        "--lr", "3", "--task", "356", "--save_ckpt", "--betas", "0.9", "0.98", "--sizes", "3", "4",
        "--clip", "1.5", "--data_path", "here", "--log_dir", "log", "--note", "none",
        "--names", "a", "3", "--names", "b",
    )  # fmt: skip
    assert config == Recipe(
        3.0, 4, "356", True, (0.9, 0.98), (3, 4), 1.5, 0.5, ("a", "3", "b"), "here", "log", "none"
    )


def test_flags_can_undo_what_yaml_sets(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "save_ckpt: true\nclip: 2\nlog_dir: log\nnames: [a, 3]\n")
    assert load_config(Recipe, path, {}).names == ("a", "3")
    words = ("--no_save_ckpt", "--clip", "none", "--log_dir", "None", "--names", "none")
    config = parse("--config", str(path), *words)
    assert (config.save_ckpt, config.clip, config.log_dir) == (False, None, None)
    assert config.names is None


@pytest.mark.parametrize("word", ["none", "None", "null", "~", ""])
def test_yaml_can_unset_what_a_flag_can(tmp_path: Path, word: str) -> None:
    path = yaml_file(tmp_path, f"clip: {word}\nnames: {word}\nlog_dir: {word}\n")
    config = load_config(Recipe, path, {})
    assert (config.clip, config.names, config.log_dir) == (None, None, None)


def test_yaml_merges_mappings(tmp_path: Path) -> None:
    text = "<<: [&base {lr: 1, epochs: 2}, {<<: *base, share: 0.25}]\nepochs: 3\n"
    config = load_config(Recipe, yaml_file(tmp_path, text), {})
    assert (config.lr, config.epochs, config.share) == (1.0, 3, 0.25)


def test_a_single_value_stands_for_a_list_of_one(tmp_path: Path) -> None:
    config = load_config(Recipe, yaml_file(tmp_path, "sizes: 3\nnames: 0..7\n"), {})
    assert (config.sizes, config.names) == ((3,), ("0..7",))


def test_yaml_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "lr: 1e-5\nbetas: [1, 9e-1]\n")
    config = load_config(Recipe, path, {})
    assert (config.lr, config.betas) == (1e-5, (1.0, 0.9))
    assert isinstance(config.betas[0], float)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("epochs: 4.0", "epochs: expected a valid integer, found 4.0 (float)"),
        ("epochs: true", "epochs: expected a valid integer, found True (bool)"),
        ("epochs: '4'", "epochs: expected a valid integer, found '4' (str)"),
        ("epochs:", "epochs: expected a valid integer, found nothing"),
        ("epochs: -1", "epochs: expected a number greater than or equal to 0, found -1 (int)"),
        ("lr: fast", "lr: expected a valid number, found 'fast'"),
        ("lr: true", "lr: expected a valid number, found True"),
        ("lr: .nan", "lr: expected a finite number, found nan"),
        ("lr: [1]", "lr: expected a valid number, found [1]"),
        ("lr: 0", "lr: expected a number greater than 0, found 0 (int)"),
        ("share: 1", "share: expected a number less than 1, found 1"),
        ("clip: -1", "clip: expected a number greater than or equal to 0, found -1"),
        ("save_ckpt: 1", "save_ckpt: expected a valid boolean, found 1"),
        ("task: vqa", "task: expected 'pab' or '356', found 'vqa'"),
        ("task: 356", "task: expected 'pab' or '356', found 356 (int)"),
        ("betas: [0.9]", "betas: expected at least 2 items, found [0.9]"),
        ("betas: [1, 2, 3]", "betas: expected at most 2 items, found [1, 2, 3]"),
        ("betas: 0.9", "betas: expected a valid tuple, found 0.9"),
        ("betas: [a, 1]", "betas: expected a valid number, found 'a'"),
        ("sizes: [1.5]", "sizes: expected a valid integer, found 1.5"),
        ("note: 3", "note: expected a valid string, found 3"),
        ("names: [1.5]", "names: expected a valid string, found 1.5"),
        ("epoch: 3", "unknown setting 'epoch'; the closest setting is 'epochs'"),
        ("3: 3", "expected setting names, found the key 3"),
        ("lr: 1\nlr: 2", "key 'lr' is set twice"),
        ("lr: 1\n'lr': 2", "key 'lr' is set twice"),
        ("<<: {lr: 1}\n<<: {lr: 2}", "key '<<' is set twice"),
        ("<<: {lr: 1, lr: 2}", "key 'lr' is set twice"),
        ("<<: {epoch: 3}", "unknown setting 'epoch'"),
        ("lr: 1\nnote: 2024-02-30", "day is out of range for month"),
        ("lr: 1\nnote: 2024-02-30", "line 2"),
        ("epochs: " + "1" * 5000, "expected YAML, found: Exceeds the limit"),
        ("lr: " + "[" * 3000, "expected YAML, found: maximum recursion depth exceeded"),
        ("epochs: none", "epochs: expected a valid integer, found 'none' (str)"),
        ("- lr", "expected a mapping of settings, found list"),
        ("lr: [", "expected YAML"),
        ("note: !!python/object/apply:os.getcwd []", "expected YAML"),
    ],
)
def test_wrong_yaml_is_refused_in_one_line_naming_file_and_key(
    tmp_path: Path, line: str, words: str
) -> None:
    path = yaml_file(tmp_path, line + "\n")
    with pytest.raises(InputError) as caught:
        load_config(Recipe, path, {})
    text = str(caught.value)
    assert words in text
    assert str(path) in text
    assert "\n" not in text


def test_missing_and_foreign_config_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no such file"):
        load_config(Recipe, tmp_path / "no.yaml", {})
    with pytest.raises(InputError, match="found a directory"):
        load_config(Recipe, tmp_path, {})
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="expected YAML"):
        load_config(Recipe, binary, {})


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert load_config(Recipe, yaml_file(tmp_path, "# nothing\n"), {}) == Recipe()


def test_unknown_override_is_refused() -> None:
    with pytest.raises(InputError, match=r"--epohcs: unknown setting .* closest .*'epochs'"):
        load_config(Recipe, None, {"epohcs": 3})


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epohcs", "3"], "--epohcs"),
        (["--epoch", "3"], "--epoch"),  # no abbreviations
        (["--betas", "0.9"], "argument --betas: expected 2 arguments"),
        (["--save_ckpt", "--no_save_ckpt"], "not allowed with argument --save_ckpt"),
        (["--save_ckpt", "yes"], "unrecognized arguments: yes"),
    ],
)
def test_wrong_flags_exit_with_2_naming_the_flag(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epochs", "3.5"], "--epochs: expected a valid integer, found '3.5' (str)"),
        (["--epochs", "1" * 5000], "--epochs: expected a valid integer"),
        (["--lr", "fast"], "--lr: expected a valid number, found 'fast' (str)"),
        (["--lr", "-1"], "--lr: expected a number greater than 0, found -1.0 (float)"),
        (["--task", "vqa"], "--task: expected 'pab' or '356', found 'vqa' (str)"),
        (["--epochs", "none"], "--epochs: expected a valid integer, found 'none' (str)"),
        (["--sizes", "1", "x"], "--sizes: expected a valid integer, found 'x' (str)"),
    ],
)
def test_wrong_values_are_refused_naming_the_flag(argv: list[str], words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(*argv)
    assert str(caught.value).startswith(words)


def test_an_override_keeps_the_group_and_the_bounds() -> None:
    with pytest.raises(InputError, match="--lr: expected a number greater than 0"):
        load_config(Tuned, None, {"lr": 0.0})
    with pytest.raises(InputError, match="--epochs: expected a number greater than or equal to 2"):
        load_config(Tuned, None, {"epochs": 1})
    assert load_config(Recipe, None, {"epochs": 1}).epochs == 1
    parser = CommandParser()
    add_config_flags(parser, Tuned)
    text = parser.format_help().partition("options:")[2]
    order = ["data:", "--data_path", "model:", "--size", "optimization:", "--lr X", "advanced:"]
    places = [text.index(word) for word in [*order, "--epochs"]]
    assert places == sorted(places)


def test_contradictions_are_found_by_the_check_of_the_config() -> None:
    with pytest.raises(InputError, match="contradicts --epochs 0"):
        parse("--epochs", "0", "--save_ckpt")


def test_extra_flags_stay_in_the_namespace() -> None:
    def extra(parser: CommandParser) -> None:
        parser.add_argument("--dry", action="store_true")

    config, namespace = config_from_args(Recipe, ["--dry", "--epochs", "2"], prog="p", extra=extra)
    assert config.epochs == 2
    assert vars(namespace) == {"config": None, "dry": True}


def test_help_shows_text_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate, 100% of it (default: 1e-05)" in out
    assert "{pab,356}" in out
    assert "--keep (default: on)" in out
    assert "--no_keep turn --keep off" in out
    assert "--no_save_ckpt" not in out
    assert "--betas X X (default: 0.9 0.999)" in out
    assert "maximum norm; none: off --share" in out
    assert "(default: None)" not in out
    assert "(default: )" not in out
    titles = [title for title in GROUPS if f" {title}: --" in out]
    assert titles == ["data", "optimization", "advanced"]
    assert [out.index(f" {title}: --") for title in titles] == sorted(
        out.index(f" {title}: --") for title in titles
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--version")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"person-anomaly-retrieval {__version__}\n"


def test_saved_config_is_read_back_equal(tmp_path: Path) -> None:
    config = Recipe(
        1e-6, 3, "356", True, (0.9, 0.98), (1, 2), 0.5, 0.1, ("1e5",), "a", None, "Füße: #1\nno"
    )
    path = tmp_path / "out" / "config.yaml"
    save_resolved(path, config)
    assert load_config(Recipe, path, {}) == config
    assert [item.name for item in path.parent.iterdir()] == ["config.yaml"]


@settings(deadline=None, max_examples=40)  # every example writes a file
@given(
    lr=st.floats(0, exclude_min=True, allow_infinity=False),
    note=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
    sizes=st.lists(st.integers()).map(tuple),
)
def test_any_value_survives_saving(
    tmp_path_factory: pytest.TempPathFactory, lr: float, note: str, sizes: tuple[int, ...]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    config = Recipe(lr=lr, note=note, sizes=sizes)
    save_resolved(path, config)
    assert load_config(Recipe, path, {}) == config


def test_plain_form_is_made_of_plain_values() -> None:
    plain: dict[str, Any] = as_plain(Recipe())
    assert plain["betas"] == [0.9, 0.999]
    assert plain["data_path"] == "data/PAB"


def test_unset_flags_are_absent_from_the_namespace() -> None:
    parser = CommandParser()
    add_config_flags(parser, Recipe)
    assert vars(parser.parse_args([])) == {}


# ------------------------------------------------------------------------------- a number or a word


@pytest.mark.parametrize("value", [0, 3, "auto"])
def test_a_number_or_a_word(value: int | str, tmp_path: Path) -> None:
    assert parse("--workers", str(value)).workers == value
    path = yaml_file(tmp_path, f"workers: {value}\n")
    assert load_config(Recipe, path, {}).workers == value
    save_resolved(tmp_path / "saved.yaml", load_config(Recipe, path, {}))
    assert load_config(Recipe, tmp_path / "saved.yaml", {}).workers == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("many", "--workers: expected a valid integer or 'auto', found 'many' (str)"),
        ("-1", "--workers: expected a number greater than or equal to 0 or 'auto', found -1 (int)"),
        ("1.5", "--workers: expected a valid integer or 'auto', found '1.5' (str)"),
        ("none", "--workers: expected a valid integer or 'auto', found 'none' (str)"),
    ],
)
def test_other_values_in_place_of_a_number_or_a_word(value: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        parse("--workers", value)
    assert str(caught.value) == expected


def test_the_help_of_a_number_or_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--workers N|auto loader processes (default: auto)" in shown
