"""Locate the project's own files: the code, and the configs that ship with it.

The code runs from a checkout, from an editable install of one, or from an installed wheel. In a
wheel, the top-level folder ``configs`` is the package ``pab.configs``.
"""

from __future__ import annotations

from pathlib import Path

from pab.core.notices import notice

# Folder of the packages pab, lhp, uit and ensemble: the checkout's root, or site-packages.
CODE_ROOT = Path(__file__).resolve().parents[2]
_IN_WHEEL = CODE_ROOT / "pab/configs"
CONFIGS = _IN_WHEEL if _IN_WHEEL.is_dir() else CODE_ROOT / "configs"


def config_path(path: str | Path) -> Path:
    """Return the path of the config file that a user names.

    A relative path such as ``configs/uit/infer.yaml`` that is not in the working directory names
    the config that ships with this project; a notice says so. Any other path is returned unchanged.
    """
    path = Path(path)
    if path.exists() or path.is_absolute() or path.parts[:1] != ("configs",):
        return path
    shipped = CONFIGS.joinpath(*path.parts[1:])
    if not shipped.is_file():
        return path
    notice(path, f"not in the working directory, so {shipped} is read")
    return shipped
