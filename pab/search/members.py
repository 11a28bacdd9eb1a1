"""Models available to photo search, by name.

They belong to packages above this one, so their modules are loaded at run time.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol, cast

from pab.core.commands import names_flag
from pab.core.config import config_from_args
from pab.core.errors import InputError
from pab.core.notices import notice
from pab.scoring.encoder import OpenEncoder
from pab.scoring.job import ScoringConfig

ROOT = Path(__file__).resolve().parents[2]
# Name -> module, or a file in the scripts folder, which is not an installed package.
MEMBERS = {
    "lhp": "lhp.infer",
    "clip": "scripts/clip_infer.py",
    "blip2": "scripts/blip2_infer.py",
}
# Scoring settings that concern the model and its speed. All others concern a benchmark.
SHARED = ("batch_size", "num_workers", "device", "dtype", "feature_cache", "feature_cache_dir")
INSTEAD = {
    "model": "--model names the member; --arch names its architecture",
    "annotation": "queries are given with --query",
    "answers": "photographs have no labels, so that no metrics are printed",
    "query_order": "results come in the order of --query",
    "save_score": "no score file is written; --json FILE keeps names and scores",
    "output_file": "no ranked list is written; --json FILE keeps names and scores",
}


class Module(Protocol):
    """Interface of a member's module: its settings, and a loader that takes them."""

    InferConfig: type[ScoringConfig]

    def open_encoder(self, config: ScoringConfig) -> AbstractContextManager[OpenEncoder]:
        """Load the model."""


@dataclass(frozen=True)
class Member:
    """A model with its settings.

    Attributes:
        name: a key of :data:`MEMBERS`.
        module: see :class:`Module`.
        config: settings of the model; those for data and outputs are ignored.
    """

    name: str
    module: Module
    config: ScoringConfig

    def open(self) -> AbstractContextManager[OpenEncoder]:
        """Load the model.

        Raises:
            InputError: settings or weights are invalid.
        """
        return self.module.open_encoder(self.config)


def load_module(name: str) -> Module:
    """Load a member's module by name."""
    target = MEMBERS[name]
    if not target.endswith(".py"):
        return cast(Module, importlib.import_module(target))
    spec = importlib.util.spec_from_file_location(f"pab_member_{name}", ROOT / target)
    assert spec is not None
    assert spec.loader is not None
    if spec.name not in sys.modules:
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # its dataclasses resolve their types there
        spec.loader.exec_module(module)
    return cast(Module, sys.modules[spec.name])


def read_member(name: str, architecture: str | None, argv: list[str], *, prog: str) -> Member:
    """Create a member with the settings of a command line.

    Args:
        name: a key of :data:`MEMBERS`.
        architecture: the member's ``--model``; None keeps its default.
        argv: other flags of the member, including ``--config``.
        prog: name of the command, as typed.

    Raises:
        InputError: an unknown or invalid setting, or a flag that only benchmark scoring has.
    """
    module = load_module(name)
    unused = [field.name for field in fields(ScoringConfig) if field.name not in SHARED]
    for setting in unused:
        if names_flag(argv, f"--{setting}") or names_flag(argv, f"--no_{setting}"):
            words = INSTEAD.get(setting, "it belongs to scoring a benchmark")
            raise InputError(
                f"--{setting}",
                f"photo search does not take this flag: {words}",
                todo="leave it out",
            )
    if architecture is not None:
        argv = ["--model", architecture, *argv]
    config, rest = config_from_args(module.InferConfig, argv, prog=prog)
    if rest.config is not None:
        defaults = {field.name: field.default for field in fields(module.InferConfig)}
        ignored = [one for one in unused if getattr(config, one) != defaults[one]]
        if ignored:
            notice(rest.config, f"photo search does not use its {', '.join(ignored)}")
    return Member(name, module, config)
