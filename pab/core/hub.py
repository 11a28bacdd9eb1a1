"""List the files of a repository on the Hugging Face hub, with their hashes.

The list comes from the hub's HTTP interface, so that no library is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

from pab.core.errors import InputError
from pab.core.files import sha256_of_file

HUB = "https://huggingface.co"
TIMEOUT_S = 30.0
WEIGHTS = ".safetensors"
# Extensions of the files that a model is loaded from: no pickles, no code, no documentation.
MODEL_FILES = (WEIGHTS, ".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True)
class HubFile:
    """File of a repository.

    Attributes:
        name: path in the repository.
        sha256: SHA-256 of a file in LFS (weights); None for a file in git.
        blob: git's object id: SHA-1 of type, size and content (of the pointer, for a file in LFS).
    """

    name: str
    sha256: str | None
    blob: str

    def is_intact(self, path: Path) -> bool:
        """Return true if a file has the listed hash."""
        if self.sha256 is not None:
            return sha256_of_file(path) == self.sha256
        content = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        return found.hexdigest() == self.blob


def hub_address() -> str:
    """Return the address of the hub, or of the mirror in ``HF_ENDPOINT``.

    Raises:
        InputError: ``HF_ENDPOINT`` is not an address of HTTP.
    """
    found = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    if not found.startswith(("https://", "http://")):
        raise InputError("HF_ENDPOINT", f"expected https://HOST, found {found!r}")
    return found


def list_model(repository: str, revision: str) -> tuple[str, list[HubFile]]:
    """List the files in a repository that are needed to load its model.

    Args:
        repository: ``OWNER/NAME``.
        revision: commit, tag or branch.

    Returns:
        The commit, and the files in order of their names.

    Raises:
        InputError: the list cannot be read, contains no weights, or contains an unsafe name.
    """
    address = f"{hub_address()}/api/models/{repository}/revision/{quote(revision, safe='')}"
    try:
        with urlopen(f"{address}?blobs=true", timeout=TIMEOUT_S) as answer:
            commit, files = _parsed(json.load(answer))
    except (URLError, HTTPException, OSError) as error:
        raise unreachable(address, error, "try again") from error
    except (ValueError, TypeError, LookupError) as error:
        raise InputError(address, "expected a JSON list of files, found other data") from error
    for file in files:
        path = PurePosixPath(file.name)
        if path.is_absolute() or ".." in path.parts:
            raise InputError(address, f"lists the unsafe file name {file.name!r}")
    if not any(file.name.endswith(WEIGHTS) for file in files):
        raise InputError(address, f"lists no weights ({WEIGHTS})")
    return commit, files


def _parsed(listed: Any) -> tuple[str, list[HubFile]]:
    found = []
    for entry in listed["siblings"]:
        if entry["rfilename"].endswith(MODEL_FILES):
            large = entry.get("lfs")
            sha256 = large["sha256"] if large else None
            found.append(HubFile(entry["rfilename"], sha256, entry["blobId"]))
    if not isinstance(listed["sha"], str):
        raise TypeError("no commit")
    return listed["sha"], sorted(found, key=lambda file: file.name)


def unreachable(address: str, error: Exception, todo: str) -> InputError:
    """Build the error for a failed request."""
    reason = getattr(error, "reason", None) or error
    return InputError(address, f"cannot be fetched: {reason}", todo=todo)
