"""Flag that may be passed only once."""

from __future__ import annotations

import argparse
from typing import Any

from pab.core.errors import InputError


class Once(argparse.Action):
    """Store a value; reject a flag that is passed twice."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the value unless an earlier flag has set it."""
        before = getattr(namespace, self.dest)
        if before is not None:
            todo = "--arch names the architecture" if self.dest == "model" else "pass it once"
            raise InputError(f"--{self.dest}", f"passed twice: {before} and {values}", todo=todo)
        setattr(namespace, self.dest, values)
