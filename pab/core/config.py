"""Flat frozen dataclasses as configs, filled from a YAML file and then from flags.

The type of a field defines its values: ``str``, ``int``, ``float``, ``bool``, ``Literal[...]`` of
strings, ``int | Literal[...]`` (bounds apply to the number), ``tuple[X, X]`` or ``tuple[X, ...]``,
and any of these ``| None``. A single value for a ``tuple[X, ...]`` becomes a tuple of one; integers
for a ``tuple[str, ...]`` become strings. The word ``none`` unsets an optional field, in YAML and in
flags. :func:`flag` adds the help text, the group and the bounds. Pydantic validates the given
values strictly: 3 is a valid float, but "3" and True are not valid integers. A config may define
``check()``, which raises if settings contradict one another.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union

import yaml
from pydantic import AllowInfNan, BeforeValidator, ConfigDict, Field, Strict, TypeAdapter
from pydantic import ValidationError as PydanticError
from typing_extensions import TypedDict

from pab.core.commands import CommandParser, Group
from pab.core.errors import InputError
from pab.core.files import existing_file, write_text
from pab.core.outputs import check_inputs_are_kept
from pab.core.resources import config_path

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic_core import ErrorDetails

T = TypeVar("T", bound="DataclassInstance")


def flag(default: Any, help_text: str, *, group: Group | None = None, **bounds: float) -> Any:
    """Define a config field that becomes a command-line flag.

    A field that overrides a base class's field inherits the group and the bounds it does not set.

    Args:
        default: value of the field if neither the file nor the command line sets it.
        help_text: text of ``--help``.
        group: section of ``--help``; None uses the class's ``flag_group``, else ``advanced``.
        bounds: ``ge``, ``gt``, ``le`` and ``lt``; None is always valid for an optional field.
    """
    grouped = {} if group is None else {"group": group}
    return dataclasses.field(default=default, metadata={"help": help_text, **grouped, **bounds})


data_flag = partial(flag, group="data")
model_flag = partial(flag, group="model")
output_flag = partial(flag, group="output")
speed_flag = partial(flag, group="speed")
advanced_flag = partial(flag, group="advanced")


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML loader that rejects duplicate keys, and names the line of an invalid value."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in keys:
                twice = f"key {key.value!r} is set twice"
                raise yaml.constructor.ConstructorError(None, None, twice, key.start_mark)
            keys.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # an impossible date, or an integer beyond Python's limits
            raise yaml.constructor.ConstructorError(
                None, None, str(error), node.start_mark
            ) from error


def load_config(cls: type[T], yaml_path: str | Path | None, overrides: Mapping[str, Any]) -> T:
    """Build a config from the defaults of ``cls``, a YAML file, and ``overrides``, in this order.

    Args:
        cls: a flat dataclass; every field has a default.
        yaml_path: YAML mapping of field names to values; None reads no file.
        overrides: field name -> value, for instance from the command line; these take precedence.

    Raises:
        InputError: a setting is unknown or has an invalid value, or the file cannot be read as a
            YAML mapping.
    """
    from_file = {} if yaml_path is None else _read_yaml(config_path(yaml_path))
    found: dict[str, Any] = {}
    for values, path in ((from_file, yaml_path), (overrides, None)):
        try:
            found |= _validator(cls).validate_python(values)
        except PydanticError as error:
            faults = error.errors()
            fault, name = faults[0], str(faults[0]["loc"][0])
            where, item = (f"--{name}", None) if path is None else (str(path), name)
            if fault["type"] != "extra_forbidden":
                # Each type of a union has a fault, located by the field and the type's name.
                of_types = [
                    one for one in faults
                    if one["loc"][0] == name and len(one["loc"]) == 2 and type(one["loc"][1]) is str
                ]  # fmt: skip
                raise InputError(where, _described(of_types or [fault]), item=item) from error
            known = [field.name for field in dataclasses.fields(cls)]
            (near,) = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            todo = f"the closest setting is '{near}'"
            raise InputError(where, f"unknown setting '{name}'", todo=todo) from error
    return cls(**found)


def add_config_flags(
    parser: CommandParser, cls: type[DataclassInstance], *, omit: Container[str] = ()
) -> None:
    """Add one flag per field that is not in ``omit``; a flag that is not passed sets no attribute.

    A ``bool`` field becomes the switches ``--name`` and ``--no_name``. A tuple accepts several
    values; a flag for a tuple of any length may be repeated. ``none`` unsets an optional field.
    """
    kinds = typing.get_type_hints(cls)
    for field in (field for field in dataclasses.fields(cls) if field.name not in omit):
        kind, optional = _without_none(kinds[field.name])
        facts, name = _facts(cls, field.name), f"--{field.name}"
        group = parser.groups[facts["group"]]
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": field.name}
        text = _help_of(field.default, str(facts.get("help", "")))
        if kind is bool:
            switches = group.add_mutually_exclusive_group()
            options["action"] = "store_const"
            switches.add_argument(name, const=True, help=text, **options)
            off = f"turn {name} off" if field.default is True else argparse.SUPPRESS
            switches.add_argument(f"--no_{field.name}", const=False, help=off, **options)
            continue
        if typing.get_origin(kind) is tuple:
            parts = typing.get_args(kind)
            kind, options["nargs"] = parts[0], len(parts)
            if parts[-1] is Ellipsis:
                options |= {"nargs": "*", "action": "extend"}  # repeated flags accumulate
        words = {int: "N", float: "X"}.get(kind, "TEXT")
        if typing.get_origin(kind) is Literal:
            words = "{" + ",".join(typing.get_args(kind)) + "}"
        if _is_union(kind):
            kind, others = typing.get_args(kind)
            words = "|".join(("N", *typing.get_args(others)))
        options |= {"type": _from_text(kind, optional), "metavar": words}
        group.add_argument(name, help=text, **options)


def config_from_args(
    cls: type[T],
    argv: list[str] | None,
    *,
    prog: str,
    extra: Callable[[CommandParser], None] | None = None,
) -> tuple[T, argparse.Namespace]:
    """Parse a command line into a checked config; flags override ``--config FILE``.

    Args:
        cls: the config's dataclass; its ``check()``, if defined, is called on the result.
        argv: arguments without the program's name; None reads ``sys.argv[1:]``.
        prog: name of the command, for usage and messages.
        extra: function that adds flags beside the config fields; the namespace holds their values.

    Returns:
        The config, and a namespace of the other arguments, such as ``config``.

    Raises:
        InputError: see :func:`load_config`; an output file is also an input; ``check()`` may also
            raise it.
        SystemExit: raised by argparse: code 2 for a wrong command line, 0 for ``--help`` and
            ``--version``.
    """
    usage = f"{prog} [--config FILE] [--SETTING VALUE ...]"
    parser = CommandParser(prog=prog, usage=usage)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file; flags override it")
    add_config_flags(parser, cls)
    if extra is not None:
        extra(parser)
    namespace = parser.parse_args(argv)
    given = vars(namespace)
    names = [field.name for field in dataclasses.fields(cls) if field.name in given]
    overrides = {name: given.pop(name) for name in names}
    # A tuple field that is set to none has the value [None].
    overrides = {name: None if v == [None] else v for name, v in overrides.items()}
    config = load_config(cls, namespace.config, overrides)
    groups: tuple[dict[str, object], dict[str, object]] = {}, {"--config": namespace.config}
    for name, value in as_plain(config).items():
        is_output = _facts(cls, name)["group"] == "output"
        groups[not is_output][name if is_output else f"--{name}"] = value
    check_inputs_are_kept(*groups)
    if hasattr(config, "check"):
        config.check()
    return config, namespace


def as_plain(config: DataclassInstance) -> dict[str, Any]:
    """Convert a config to a dict of plain values (tuples as lists)."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def save_resolved(path: str | Path, config: DataclassInstance) -> None:
    """Write all settings as YAML, atomically; :func:`load_config` restores the same config."""
    text = yaml.safe_dump(as_plain(config), sort_keys=False, allow_unicode=True, width=100)
    write_text(path, text)


def _read_yaml(path: Path) -> dict[str, Any]:
    existing_file(path, "a YAML config file")
    try:
        # The loader is a SafeLoader: it builds only plain values.
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(path, f"expected YAML, found: {error}") from error
    loaded = {} if loaded is None else loaded  # an empty file, or only comments
    if not isinstance(loaded, dict):
        raise InputError(path, f"expected a mapping of settings, found {type(loaded).__name__}")
    for key in loaded:
        if not isinstance(key, str):
            raise InputError(path, f"expected setting names, found the key {key!r}")
    return loaded


@cache
def _validator(cls: type[DataclassInstance]) -> TypeAdapter[dict[str, Any]]:
    """Build the validator of a class: its fields by name, with bounds; other names are errors."""
    kinds, rows = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        facts = _facts(cls, field.name)
        bounds = {name: value for name, value in facts.items() if name not in ("help", "group")}
        kind, optional = _without_none(kinds[field.name])
        if _is_union(kind):
            number, words = typing.get_args(kind)
            row: Any = Annotated[_strict(number), Field(**bounds)] | words
        else:
            row = Annotated[_strict(kind), Field(**bounds)]
        rows[field.name] = Annotated[row | None, BeforeValidator(_unset)] if optional else row
    make: Any = TypedDict
    table = make(cls.__name__, rows, total=False)
    table.__pydantic_config__ = ConfigDict(extra="forbid")
    return TypeAdapter(table)


def _facts(cls: type, name: str) -> dict[str, Any]:
    """Collect help, group and bounds of a field; a subclass overrides its bases."""
    facts: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        fields = vars(base).get("__dataclass_fields__", {})
        if name in fields:
            facts.setdefault("group", getattr(base, "flag_group", "advanced"))
            facts |= fields[name].metadata
    return facts


def _unset(value: Any) -> Any:
    """Convert the word ``none``, which also unsets a flag, to None."""
    return None if isinstance(value, str) and value.lower() == "none" else value


def _number(value: Any) -> Any:
    """Convert text to a number if it is one: YAML 1.1 reads 1e-5 (without a point) as text."""
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def _strict(kind: Any) -> Any:
    """Return pydantic's type for a field type without None, with strict scalars."""
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        element, size = _strict(parts[0]), Field(min_length=len(parts), max_length=len(parts))
        if parts[-1] is Ellipsis:  # YAML: a single value in place of a list
            size = BeforeValidator(lambda v: [v] if isinstance(v, (str, int, float)) else v)
        if parts == (str, ...):  # YAML: 3 for "3"
            element = Annotated[element, BeforeValidator(lambda v: str(v) if type(v) is int else v)]
        kind = Annotated[tuple[element, ...], size]  # type: ignore[valid-type,misc]
    return SCALARS.get(kind, kind)


SCALARS: dict[Any, Any] = {kind: Annotated[kind, Strict()] for kind in (int, bool, str)}
SCALARS[float] = Annotated[float, Strict(), AllowInfNan(False), BeforeValidator(_number)]


def _without_none(kind: Any) -> tuple[Any, bool]:
    """Return (X, True) for ``X | None``; return (kind, False) for any other type."""
    parts = typing.get_args(kind)
    if not _is_union(kind) or types.NoneType not in parts:
        return kind, False
    return Union[tuple(part for part in parts if part is not types.NoneType)], True  # noqa: UP007


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (Union, types.UnionType)


def _described(faults: list[ErrorDetails]) -> str:
    """Describe the faults of one field (one per type of a union): expected and found."""
    expected = []
    for fault in faults:
        words = re.sub(r"^\w+ should (be|have) | after validation, not \d+$", "", fault["msg"])
        number = "a number " if fault["type"].startswith(("greater", "less")) else ""
        expected.append(number + words)
    value = faults[0]["input"]
    found = "nothing" if value is None else f"{value!r} ({type(value).__name__})"
    return f"expected {' or '.join(expected)}, found {found}"


def _from_text(kind: Any, optional: bool) -> Callable[[str], Any]:
    """Build argparse's converter for a field; text that it cannot convert reaches the validator."""

    def convert(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        with suppress(ValueError):
            return kind(text) if kind in (int, float) else text
        return text

    return convert


def _help_of(default: Any, text: str) -> str:
    """Append the default, unless empty, None or False, to a help text; escape percent signs."""
    values = default if isinstance(default, tuple) else (default,)
    shown = " ".join(f"{v:.10g}" if isinstance(v, float) else str(v) for v in values)
    if shown not in ("", "None", "False"):
        text += f" (default: {'on' if default is True else shown})"
    return text.replace("%", "%%")
