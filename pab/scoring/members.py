"""Find members by name through the entry points of installed packages.

A package adds a member with one line in its ``pyproject.toml``: under
``[project.entry-points."pab.encoders"]``, ``NAME = "MODULE:CLASS"`` names a subclass of
:class:`~pab.scoring.job.MemberConfig`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pab.core.config import load_config
from pab.core.errors import InputError
from pab.scoring.encoder import Encoder
from pab.scoring.job import MemberConfig

GROUP = "pab.encoders"


def members() -> dict[str, EntryPoint]:
    """Return the entry points of the installed members, sorted by name.

    Raises:
        InputError: no installed package defines a member, or two packages define different
            members with one name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise InputError(
                GROUP, f"two packages define this member: {other.value} and {entry.value}",
                item=f"member {entry.name!r}", todo="uninstall one",
            )  # fmt: skip
    if not found:
        raise InputError(
            GROUP, "expected members in the installed packages, found none; the installation is "
            "outdated",
            todo="run bash scripts/setup.sh",
        )  # fmt: skip
    return found


def member_config(name: str) -> type[MemberConfig]:
    """Return the settings class of a member.

    Raises:
        InputError: there is no such member, its class cannot be imported or is not a subclass of
            :class:`~pab.scoring.job.MemberConfig`, or :func:`members` fails.
    """
    known = members()
    if name not in known:
        raise InputError(
            "member", f"expected one of {', '.join(known)}, found {name!r}",
            todo=f"other packages add members under the entry point {GROUP}",
        )  # fmt: skip
    try:
        found = known[name].load()
    except (ImportError, AttributeError) as error:
        raise InputError(
            known[name].value, f"cannot be imported: {error}", item=f"member {name!r}",
            todo="reinstall its package",
        ) from error  # fmt: skip
    if not (isinstance(found, type) and issubclass(found, MemberConfig)):
        raise InputError(
            known[name].value, "expected a subclass of pab.scoring.MemberConfig, found "
            f"{found!r}", item=f"member {name!r}",
        )  # fmt: skip
    return found


def load_encoder(name: str, *, config: str | Path | None = None, **settings: Any) -> Encoder:
    """Load a member's encoder by name.

    Args:
        name: ``lhp``, ``uit``, ``clip``, ``blip2``, ``embed``, or a member of another package.
        config: YAML file of settings; ``settings`` override it.
        settings: settings of the member's scoring command, such as ``model`` or ``device``.
            ``checkpoint`` is accepted for every member. Vectors are cached on disk only with
            ``feature_cache=True``.

    Raises:
        InputError: the name is unknown, a setting is unknown, invalid or not used by an encoder, or
            the model cannot be loaded.
    """
    cls = member_config(name)
    if ignored := sorted(settings.keys() & set(cls.ignored())):
        raise InputError(
            "load_encoder", f"an encoder does not use {', '.join(ignored)}", todo="omit them"
        )
    given: dict[str, Any] = {"feature_cache": False}
    for key, value in settings.items():
        value = str(value) if isinstance(value, Path) else value
        if key == "checkpoint" and value is None:
            continue
        if key == "checkpoint" and isinstance(value, str):
            own = cls.of_checkpoint(value)
            if twice := own.keys() & settings.keys() - {key}:
                raise InputError(
                    "load_encoder", f"checkpoint={value!r} also sets {min(twice)}",
                    todo="omit one of the two settings",
                )  # fmt: skip
            given |= own
        else:
            given[key] = value
    loaded = load_config(cls, config, given)
    loaded.check()
    return loaded.open()
