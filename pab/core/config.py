"""Flat frozen dataclasses as configs, filled from a YAML file and then from flags.

The type of a field defines its values: ``str``, ``int``, ``float``, ``bool``, ``Path``,
``Literal[...]``, ``tuple[X, X]`` or ``tuple[X, ...]``, and any of these ``| None``. For a
``tuple[str, ...]``, a single value becomes a tuple of one, and integers become text. The help text
of a field is in ``field(metadata={"help": ...})``. A config may define ``check()``, which raises if
settings contradict one another.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, Union

import yaml

from pab.core.errors import EXIT_BAD_INPUT, InputError
from pab.core.files import existing_file, write_text
from pab.core.resources import config_path

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

NONE_WORD = "none"  # on the command line: unset an optional field that the YAML file sets


class CommandParser(argparse.ArgumentParser):
    """Argument parser that reports a wrong flag in one line, like every other input error.

    Subparsers have this class too.
    """

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with code 2."""
        words = " ".join(message.split())  # a value may contain line breaks
        self.exit(EXIT_BAD_INPUT, f"error: {words}; see {self.prog} --help\n")


def flag(default: Any, help_text: str) -> Any:
    """Define a config field that becomes a command-line flag with this help text."""
    return dataclasses.field(default=default, metadata={"help": help_text})


class Bounded:
    """Mixin with the range checks that configs run on their fields."""

    def check_least(self, least: int, *names: str) -> None:
        """Reject settings below a bound.

        Raises:
            InputError: naming the flag.
        """
        bound = "must not be negative" if least == 0 else f"must be at least {least}"
        for name in names:
            if getattr(self, name) < least:
                raise InputError(f"--{name}", f"{bound}, found {getattr(self, name)}")

    def check_share(self, *names: str, below_one: bool = False) -> None:
        """Reject settings outside [0, 1], or outside [0, 1).

        Raises:
            InputError: naming the flag.
        """
        for name in names:
            value = getattr(self, name)
            if not 0 <= value <= 1 or (below_one and value == 1):
                bound = "[0, 1)" if below_one else "[0, 1]"
                raise InputError(f"--{name}", f"must lie in {bound}, found {value}")


class _WrongType(Exception):
    """A value does not fit a field's type; the message names the expected and the found type."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML loader that rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' is given twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def load_config(cls: type[T], yaml_path: str | Path | None, overrides: dict[str, Any]) -> T:
    """Build a config from the defaults of ``cls``, a YAML file, and ``overrides``, in this order.

    Args:
        cls: a flat dataclass.
        yaml_path: YAML mapping of field names to values; None reads no file.
        overrides: field name -> value, for instance from the command line; these win.

    Raises:
        InputError: unknown key, value of the wrong type, missing required key, or a file that is
            missing or not a YAML mapping.
    """
    kinds = _field_types(cls)
    values: dict[str, Any] = {}
    if yaml_path is not None:
        for key, value in _read_yaml(config_path(yaml_path)).items():
            values[key] = _checked(key, value, kinds, str(yaml_path), str)
    for key, value in overrides.items():
        values[key] = _checked(key, value, kinds, f"--{key}", lambda _: "flag")
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.init
        and field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        flags = ", ".join(f"--{name}" for name in missing)
        raise InputError(
            yaml_path or "command line", f"required setting not given: {', '.join(missing)}",
            todo=f"give {flags}",
        )  # fmt: skip
    return cls(**values)


def add_config_flags(parser: argparse.ArgumentParser, cls: type[DataclassInstance]) -> None:
    """Add one flag per field; a flag that is not given sets no attribute.

    A ``bool`` field becomes the switches ``--name`` and ``--no_name``. A tuple takes several
    values; a tuple of any length may be repeated. An optional field accepts the word ``none``.
    """
    kinds = _field_types(cls)
    for field in dataclasses.fields(cls):
        kind, optional = _without_none(kinds[field.name])
        text = _help_of(field)
        if kind is bool:
            switches = parser.add_mutually_exclusive_group()
            off = f"turn --{field.name} off" if field.default is True else argparse.SUPPRESS
            for flag, value, words in (
                (f"--{field.name}", True, text),
                (f"--no_{field.name}", False, off),
            ):
                switches.add_argument(
                    flag, dest=field.name, action="store_const", const=value,
                    default=argparse.SUPPRESS, help=words,
                )  # fmt: skip
            continue
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text, "dest": field.name}
        if typing.get_origin(kind) is tuple:
            kind, options["nargs"] = _tuple_of(kind)
            if options["nargs"] == "*":
                options["action"] = "extend"  # repeated flags accumulate
        options["type"] = _flag_type(kind, optional)
        options["metavar"] = _metavar(kind)
        parser.add_argument(f"--{field.name}", **options)


def add_debug_flag(parser: argparse.ArgumentParser, path: str) -> None:
    """Add ``--debug`` for the help text; :func:`with_debug` has replaced it before parsing."""
    parser.add_argument("--debug", action="store_true", help=f"short for --config {path}")


def names_flag(argv: Sequence[str], name: str) -> bool:
    """Return true if a command line contains a flag, such as ``--config``."""
    return any(word.split("=")[0] == name for word in argv)


def with_debug(argv: Sequence[str], path: str) -> list[str]:
    """Replace ``--debug`` in a command line by ``--config PATH``.

    Raises:
        InputError: the command line also contains ``--config``.
    """
    if "--debug" not in argv:
        return list(argv)
    if names_flag(argv, "--config"):
        raise InputError("--debug", f"contradicts --config: it stands for {path}")
    return ["--config", path, *(word for word in argv if word != "--debug")]


def config_from_args(
    cls: type[T],
    argv: list[str] | None,
    *,
    prog: str,
    description: str,
    extra: Callable[[argparse.ArgumentParser], None] | None = None,
) -> tuple[T, argparse.Namespace]:
    """Parse a command line into a checked config; flags override ``--config FILE``.

    Args:
        cls: the config's dataclass; its ``check()``, if defined, is called on the result.
        argv: arguments without the program's name; None reads ``sys.argv[1:]``.
        prog: name of the command, as typed.
        description: one sentence for ``--help``.
        extra: adds flags that are not config fields; the namespace holds their values.

    Returns:
        The config, and a namespace with everything that is not a config field (``config``
        included).

    Raises:
        InputError: see :func:`load_config`; also anything that ``check()`` raises.
        SystemExit: exit of argparse (code 2) for an unknown or malformed flag.
    """
    parser = CommandParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", type=Path, default=None, metavar="FILE", help="YAML file; flags win over it"
    )
    add_config_flags(parser, cls)
    if extra is not None:
        extra(parser)
    namespace = parser.parse_args(argv)
    names = {field.name for field in dataclasses.fields(cls)}
    overrides = {key: value for key, value in vars(namespace).items() if key in names}
    for name in overrides:
        delattr(namespace, name)
    config = load_config(cls, namespace.config, overrides)
    check = getattr(config, "check", None)
    if check is not None:
        check()
    return config, namespace


def as_plain(config: DataclassInstance) -> dict[str, Any]:
    """Convert a config to a dict of plain values (paths as text, tuples as lists)."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def save_resolved(path: str | Path, config: DataclassInstance) -> None:
    """Write all settings as YAML, atomically; :func:`load_config` restores the same config."""
    text = yaml.safe_dump(as_plain(config), sort_keys=False, allow_unicode=True, width=100)
    write_text(path, text)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.as_posix()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    existing_file(path, "a YAML config file")
    try:
        # The loader is a SafeLoader: it builds only plain values.
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(path, f"expected YAML, found: {error}") from error
    if loaded is None:  # an empty file, or only comments
        return {}
    if not isinstance(loaded, dict):
        raise InputError(path, f"expected a mapping of settings, found {type(loaded).__name__}")
    wrong = [key for key in loaded if not isinstance(key, str)]
    if wrong:
        raise InputError(path, f"expected setting names, found the key {wrong[0]!r}")
    return loaded


def _checked(
    key: str, value: Any, kinds: dict[str, Any], where: str, item: Callable[[str], str]
) -> Any:
    if key not in kinds:
        near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)
        raise InputError(
            where, f"unknown setting '{key}'", todo=f"the nearest known one is '{near[0]}'"
        )
    try:
        return _convert(value, kinds[key])
    except _WrongType as error:
        raise InputError(where, str(error), item=item(key)) from error


def _field_types(cls: type[DataclassInstance]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _without_none(kind: Any) -> tuple[Any, bool]:
    """``X | None`` -> (X, True); anything else -> (unchanged, False)."""
    if typing.get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    rest = [part for part in typing.get_args(kind) if part is not types.NoneType]
    if len(rest) != 1:
        raise TypeError(f"config fields may be optional, but of one type only: {kind}")
    return rest[0], True


def _tuple_of(kind: Any) -> tuple[Any, int | str]:
    """``tuple[X, X]`` -> (X, 2); ``tuple[X, ...]`` -> (X, "*"): element type and argparse nargs."""
    parts = typing.get_args(kind)
    if len(parts) == 2 and parts[1] is Ellipsis:
        return parts[0], "*"
    if not parts or any(part != parts[0] for part in parts):
        raise TypeError(f"config tuples hold one type: {kind}")
    return parts[0], len(parts)


def _convert(value: Any, kind: Any) -> Any:
    """Convert ``value`` to ``kind`` strictly: 3 is a float; "3" and True are not ints."""
    kind, optional = _without_none(kind)
    if value is None or (value == [None] and optional):  # [None]: the word none as a tuple flag
        if optional:
            return None
        raise _WrongType(f"expected {_describe(kind)}, found nothing")
    origin = typing.get_origin(kind)
    if origin is Literal:
        return _convert_choice(value, kind)
    if origin is tuple:
        return _convert_tuple(value, kind)
    if kind is Path:
        if isinstance(value, (str, Path)) and str(value):
            return Path(value)
    elif kind is float:
        return _convert_float(value)
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif kind in (str, bool):
        if isinstance(value, kind):
            return value
    else:
        raise TypeError(f"config fields of type {kind} are not supported")
    raise _WrongType(f"expected {_describe(kind)}, found {_found(value)}")


def _convert_choice(value: Any, kind: Any) -> Any:
    for choice in typing.get_args(kind):
        if value == choice and type(value) is type(choice):
            return choice
    raise _WrongType(f"expected {_describe(kind)}, found {_found(value)}")


def _convert_tuple(value: Any, kind: Any) -> tuple[Any, ...]:
    element, count = _tuple_of(kind)
    if count == "*" and isinstance(value, (str, int, float)):
        value = [value]  # YAML: a single value in place of a list
    if not isinstance(value, (list, tuple)) or (count != "*" and len(value) != count):
        raise _WrongType(f"expected {_describe(kind)}, found {_found(value)}")
    if element is str:
        value = [str(part) if type(part) is int else part for part in value]  # YAML: 3 for "3"
    return tuple(_convert(part, element) for part in value)


def _convert_float(value: Any) -> float:
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    elif isinstance(value, str):  # YAML 1.1 reads 1e-5 (without a decimal point) as text
        try:
            number = float(value)
        except ValueError as error:
            raise _WrongType(f"expected a number, found {_found(value)}") from error
    if not math.isfinite(number):
        raise _WrongType(f"expected a finite number, found {_found(value)}")
    return number


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(kind))
    if origin is tuple:
        element, count = _tuple_of(kind)
        return f"a list of {'any number' if count == '*' else count} x {_describe(element)}"
    words = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
    return words.get(kind, "text")


def _found(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


def _flag_type(kind: Any, optional: bool) -> Callable[[str], Any]:
    """Build argparse's converter for a field; conversion errors name the flag."""

    def convert(text: str) -> Any:
        if optional and text.lower() == NONE_WORD:
            return None
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        value: Any = next((choice for choice in choices if str(choice) == text), text)
        if kind is int:
            try:
                value = int(text)
            except ValueError:
                value = text  # rejected below, with the message used for all wrong values
        try:
            return _convert(value, kind)
        except _WrongType as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(str(choice) for choice in typing.get_args(kind)) + "}"
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _help_of(field: dataclasses.Field[Any]) -> str:
    text = str(field.metadata.get("help", ""))
    if field.default is not dataclasses.MISSING:
        text = f"{text} (default: {_plain(field.default)})".strip()
    elif field.default_factory is dataclasses.MISSING:
        text = f"{text} (required)".strip()
    return text.replace("%", "%%")
