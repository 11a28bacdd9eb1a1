"""Parse the flags of the members that photo search uses, and open the members.

See :mod:`pab.scoring.members` for the list of members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pab.core.commands import CommandParser, names_flag
from pab.core.errors import InputError
from pab.core.notices import notice
from pab.search.flags import Once
from pab.search.index import Dtype, Index, Manifest, Member

if TYPE_CHECKING:
    from pab.scoring.encoder import Encoder
    from pab.scoring.job import MemberConfig

INSTEAD = {
    "model": "--model names the member; --arch names its architecture",
    "annotation": "set queries with --query, or with --text of the query command",
    "answers": "photographs have no labels, so no metrics are printed",
    "query_order": "results come in the order of --query",
    "save_score": "no score file is written; --json FILE writes names and scores",
    "output_file": "no ranked list is written; --json FILE writes names and scores",
}
# Facts of a fingerprint that only affect rounding; see Compute.number_format.
ROUNDING = frozenset(("device", "dtype", "tf32", "deterministic"))


def read_member(name: str, architecture: str | None, argv: list[str], *, prog: str) -> MemberConfig:
    """Parse a member's settings from a command line.

    Settings that only benchmark scoring uses, such as data and outputs, are rejected as flags, and
    ignored with a notice in a config file.

    Args:
        name: name of the member.
        architecture: architecture of the member; None keeps the default.
        argv: other flags of the member, including ``--config``.
        prog: name of the command, for usage and messages.

    Raises:
        InputError: the member is unknown, a setting is unknown or invalid, or a flag is only for
            scoring a benchmark.
    """
    # Imported here, because an update of an index that encodes nothing needs no torch.
    from pab.core.config import config_from_args
    from pab.scoring.members import member_config

    cls = member_config(name)
    unused = cls.ignored()
    for setting in unused:
        if names_flag(argv, f"--{setting}") or names_flag(argv, f"--no_{setting}"):
            words = INSTEAD.get(setting, "it is for scoring a benchmark")
            problem = f"photo search has no such flag: {words}"
            raise InputError(f"--{setting}", problem, todo="remove it")
    if architecture is not None:
        argv = ["--model", architecture, *argv]
    config, rest = config_from_args(cls, argv, prog=prog)
    if rest.config is not None:
        default = cls()
        ignored = [one for one in unused if getattr(config, one) != getattr(default, one)]
        if ignored:
            notice(rest.config, f"photo search ignores its {', '.join(ignored)}")
    return config


@dataclass(frozen=True)
class MemberChoice:
    """Member named on a command line.

    Attributes:
        name: name in the index.
        model: name of its entry point.
        arguments: its flags, with ``--arch`` for the architecture.
    """

    name: str
    model: str
    arguments: tuple[str, ...]

    def config(self, prog: str, more: Sequence[str] = ()) -> MemberConfig:
        """Parse the member's flags, and the flags ``more``, which override them.

        The index itself keeps the vectors, so the feature cache is off unless a flag sets it.

        Raises:
            InputError: see :func:`read_member`.
        """
        parser = CommandParser(prog=prog, add_help=False)
        parser.add_argument("--arch", action=Once)
        own, words = parser.parse_known_args([*self.arguments, *more])
        if not names_flag(words, "--feature_cache"):
            words.append("--no_feature_cache")
        return read_member(self.model, own.arch, words, prog=prog)


@dataclass(frozen=True)
class Opened:
    """Member with its loaded model.

    Raises:
        InputError: the model has one vector per token.
    """

    choice: MemberChoice
    encoder: Encoder

    def __post_init__(self) -> None:
        # Imported here, because an update of an index that encodes nothing needs no torch.
        from pab.encoders.st.late import LateEncoder

        if isinstance(self.encoder, LateEncoder):
            problem = "a model with one vector per token cannot be indexed"
            todo = "search without an index"
            raise InputError("index", problem, item=f"member {self.name!r}", todo=todo)

    @property
    def name(self) -> str:
        """Name in the index."""
        return self.choice.name

    def member(self, width: int, dtype: Dtype) -> Member:
        """Describe the member for a manifest."""
        origin = self.encoder.origin
        names = ("architecture", "checkpoint", "checkpoint_sha256", "dtype")
        facts = {name: str(getattr(origin, name)) for name in names}
        choice, fingerprint = self.choice, dict(self.encoder.fingerprint)
        return Member(
            choice.name, choice.model, choice.arguments, fingerprint, facts, width, dtype
        )  # fmt: skip


def split_members(argv: Sequence[str]) -> tuple[list[MemberChoice], list[str]]:
    """Split a command line at each ``--model NAME``.

    Flags before the first ``--model`` apply to all members; a later flag applies to the member that
    it follows. A member is named after its model: ``MODEL``, then ``MODEL_2`` and so on.

    Returns:
        The members, and the flags before the first ``--model``.

    Raises:
        InputError: a ``--model`` has no name.
    """
    words: list[list[str]] = [[]]
    for word in argv:
        if word == "--model":
            words.append([])
        elif word.startswith("--model="):
            words.append([word.partition("=")[2]])
        else:
            words[-1].append(word)
    shared, *parts = words
    choices: list[MemberChoice] = []
    for part in parts:
        if not part or part[0].startswith("-"):
            raise InputError("--model", "expected the name of a member, found none")
        model, *own = part
        count = 1 + sum(choice.model == model for choice in choices)
        name = model if count == 1 else f"{model}_{count}"
        choices.append(MemberChoice(name, model, (*shared, *own)))
    return choices, shared


def choice_of(member: Member) -> MemberChoice:
    """Return the choice that opens a member of an index again."""
    return MemberChoice(member.name, member.model, member.arguments)


def open_encoders(
    index: Index, *, prog: str, names: Sequence[str] = (), more: Sequence[str] = ()
) -> Mapping[str, Encoder]:
    """Open the members of an index.

    Args:
        index: the index.
        prog: name of the command, for messages.
        names: members to open; empty for all.
        more: further flags for each member, such as ``--device cpu``.

    Raises:
        InputError: the index has no such member, flags or weights are invalid, or a model is not
            the one that made the index.
    """
    chosen = [index.member(name) for name in names] or index.members
    configs = {one.name: choice_of(one).config(prog, more) for one in chosen}
    encoders = {}
    for member in chosen:
        encoder = configs[member.name].open()
        check_same_model(index.folder, member, encoder)
        encoders[member.name] = encoder
    return encoders


def check_choices(folder: Path, manifest: Manifest, choices: Sequence[MemberChoice]) -> None:
    """Reject members other than those of an index.

    Raises:
        InputError: names, models or their order differ.
    """
    expected = [(member.name, member.model) for member in manifest.members]
    found = [(choice.name, choice.model) for choice in choices]
    if found != expected:
        names = [", ".join(name for name, _ in one) for one in (expected, found)]
        problem = f"expected the members {names[0]}, found {names[1]}"
        raise InputError(folder, problem, todo="use another --out")


def with_arguments(
    members: Sequence[Member], choices: Sequence[MemberChoice], opened: Sequence[Opened]
) -> list[Member]:
    """Return members of an index with the flags that open them now, if their weights have moved.

    Otherwise the old flags remain: others, such as the device, may suit only one run.
    """
    found = []
    for member, choice, one in zip(members, choices, opened, strict=True):
        new = one.member(member.width, member.dtype)
        origin = {**new.origin, "dtype": member.origin.get("dtype", "")}
        moved = origin != member.origin
        found.append(
            replace(member, arguments=choice.arguments, origin=origin) if moved else member
        )
    return found


def check_same_model(folder: Path, member: Member, encoder: Encoder) -> None:
    """Reject a model whose vectors cannot be compared with those of an index.

    A setting that only affects rounding may differ; a notice reports the difference.

    Raises:
        InputError: another fact of the fingerprint differs, such as the weights.
    """
    check_fingerprint(folder, member, encoder.fingerprint)


def check_fingerprint(folder: Path, member: Member, now: Mapping[str, str]) -> None:
    """Reject the fingerprint of another model, as :func:`check_same_model` does.

    Raises:
        InputError: see :func:`check_same_model`.
    """
    before = member.fingerprint
    for fact in sorted({*before, *now}):
        if before.get(fact) == now.get(fact) or _is_renamed(fact, before, now):
            continue
        if fact in ROUNDING:
            words = f"{fact} {before.get(fact)}; this run uses {now.get(fact)}"
            notice(folder, f"the vectors of member {member.name} were computed with {words}")
        else:
            problem = f"expected {fact} {before.get(fact)}, found {now.get(fact)}"
            raise InputError(
                folder, problem, item=f"member {member.name!r}",
                todo="pass the model that the index was made with, or make another index",
            )  # fmt: skip


def _is_renamed(fact: str, before: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Return true for a model folder whose path an earlier version stored instead of its content.

    The weights and the architecture are facts of their own.
    """
    starts = before.get(fact, ""), now.get(fact, "")
    return fact == "model" and starts[0].startswith("local-dir:") and starts[1][:10] == "local-dir,"
