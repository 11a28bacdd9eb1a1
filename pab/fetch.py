"""Download public checkpoints to `checkpoints/`: `python -m pab.fetch NAME`.

Without a name, or with `--check`, the command lists the source and the state of each file. An
interrupted download is resumed. After a download, the size and SHA-256 of the file are written to
`manifest.json` in the checkpoint folder. Some files can only be downloaded with a browser: for
these, the command prints the URL and the target path.

A model on the Hugging Face hub becomes a folder. All its files come from one commit: that of the
branch `main`, or the one named by `NAME@REVISION` (a commit, tag or branch). Each file must have
the hash that the hub lists for the commit. This check detects damage, but trusts the hub. The
manifest records the commit. `HF_ENDPOINT` names a mirror of the hub.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from pab.core.config import CommandParser
from pab.core.errors import InputError, run_cli
from pab.core.file_kinds import Kind, file_kind
from pab.core.files import BLOCK, sha256_of_file, write_json
from pab.core.hub import HUB, TIMEOUT_S, hub_address, list_model, unreachable
from pab.core.progress import Progress
from pab.data.json_lines import json_document

WEIGHTS = (".pth", ".safetensors")  # extensions of files that must contain weights
COMMIT = re.compile("[0-9a-f]{0,40}")  # a commit, its first digits, or no revision
NO_FILE = (Kind.CUT, Kind.EMPTY, Kind.PAGE)  # results of failed downloads
MANIFEST = "manifest.json"  # in the checkpoint folder: path -> size and hash after the download
Manifest = dict[str, dict[str, Any]]
BEIT3 = "https://github.com/addf400/files/releases/download/beit3"
SWIN = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0"
BERT = "https://huggingface.co/bert-base-uncased"
DRIVE_FOLDER = "https://drive.google.com/drive/u/5/folders/1M-qqoDk8oQ_AERnRgdx5NC5cFCXskLd9"
LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"


@dataclass(frozen=True)
class Source:
    """Source of a checkpoint.

    Attributes:
        path: path in the checkpoint folder, as in the configs and the commands' defaults.
        address: URL of the file, of the page that links to it, or of the repository.
        kind: ``file`` for a direct download, ``page`` for a manual download with a browser, ``hub``
            for a repository on the Hugging Face hub, which becomes a folder.
    """

    path: str
    address: str
    kind: Literal["file", "page", "hub"] = "file"


def hub_model(repository: str) -> Source:
    """Return the source of a vision-language model on the hub."""
    name = repository.rpartition("/")[2].lower()
    return Source(f"vlm/{name}", f"{HUB}/{repository}", "hub")


SOURCES = {
    "beit3-large-coco": Source(
        "lhp/beit3_large_patch16_384_coco_retrieval.pth",
        f"{BEIT3}/beit3_large_patch16_384_coco_retrieval.pth",
    ),
    "beit3-spm": Source("lhp/beit3.spm", f"{BEIT3}/beit3.spm"),
    "lhp": Source("lhp/lhp_beit3.pth", DRIVE_FOLDER, "page"),
    "uit": Source("uit/uit.pth", DRIVE_FOLDER, "page"),
    "person-search": Source(
        "uit/pretrained.pth",
        "https://drive.google.com/file/d/1KffesfZD45kOQH2E4G31Sd3rbj9djD3d/view",
        "page",
    ),
    "swin-base": Source(
        "uit/swin_base_patch4_window7_224_22k.pth", f"{SWIN}/swin_base_patch4_window7_224_22k.pth"
    ),
    "bert-vocabulary": Source("uit/bert-base-uncased/vocab.txt", f"{BERT}/resolve/main/vocab.txt"),
    "bert-base": Source(
        "uit/bert-base-uncased/model.safetensors", f"{BERT}/resolve/main/model.safetensors"
    ),
    "blip2-vitl": Source(
        "blip2/blip2_pretrained_vitL.pth", f"{LAVIS}/blip2_pretrained_vitL.pth"
    ),
    "blip2-clip-vitl": Source("blip2/clip_vit_L.pth", f"{LAVIS}/clip_vit_L.pth"),
    "qwen3-vl-reranker-2b": hub_model("Qwen/Qwen3-VL-Reranker-2B"),
    "qwen3-vl-reranker-8b": hub_model("Qwen/Qwen3-VL-Reranker-8B"),
    "qwen3-vl-embedding-2b": hub_model("Qwen/Qwen3-VL-Embedding-2B"),
    "qwen3-vl-embedding-8b": hub_model("Qwen/Qwen3-VL-Embedding-8B"),
    "colqwen2-v1.0-hf": hub_model("vidore/colqwen2-v1.0-hf"),
}  # fmt: skip


def fetch(name: str, folder: Path) -> Path:
    """Download one file or model if it is missing.

    Args:
        name: key of :data:`SOURCES`; for a model on the hub also ``KEY@REVISION``.
        folder: checkpoint folder.

    Raises:
        InputError: the name or the manifest is invalid, the present folder has another revision, a
            missing file must be downloaded with a browser, or the download fails. The next call
            resumes an interrupted download. A file with wrong content is deleted.
    """
    key, _, revision = name.partition("@")
    if key not in SOURCES:
        raise InputError("NAME", f"expected one of {', '.join(SOURCES)}, found {key!r}")
    source = SOURCES[key]
    target = folder / source.path
    if source.kind == "hub":
        return fetch_model(source, folder, revision)
    if revision:
        raise InputError(name, "expected no revision, because this is not a model on the hub")
    if target.is_file():
        print(f"{target} is already present", file=sys.stderr)
        return target
    by_hand = f"download it with a browser and save it as {target}"
    if source.kind == "page":
        problem = f"cannot be downloaded automatically from {source.address}"
        raise InputError(name, problem, todo=by_hand)
    known = manifest(folder)  # a damaged manifest raises before the download
    fetch_file(source.address, target, by_hand)
    write_json(folder / MANIFEST, {**known, source.path: facts_of(target)})
    return target


def fetch_model(source: Source, folder: Path, revision: str) -> Path:
    """Download a model from the hub if it is missing.

    The files are written to a ``.part`` folder, which is renamed once all files are intact.

    Args:
        source: repository and target.
        folder: checkpoint folder.
        revision: commit, tag or branch; empty for ``main``, or for any commit that is present.

    Raises:
        InputError: see :func:`fetch`.
    """
    target, known = folder / source.path, manifest(folder)
    repository = source.address.removeprefix(f"{HUB}/")
    if target.is_dir():
        commit = commit_of(source, known)
        wanted = revision if COMMIT.fullmatch(revision) else list_model(repository, revision)[0]
        if not commit.startswith(wanted):
            problem = f"expected revision {revision}, found commit {commit}"
            raise InputError(target, problem, todo=f"delete the folder to fetch {revision}")
        print(f"{target} is already present", file=sys.stderr)
        return target
    commit, files = list_model(repository, revision or "main")
    part = target.with_name(f"{target.name}.{commit[:12]}.part")
    for file in files:
        path = part / file.name
        if path.is_file() and file.is_intact(path):
            continue  # from an interrupted download
        address = f"{hub_address()}/{repository}/resolve/{commit}/{quote(file.name)}"
        fetch_file(address, path, f"download all files with a browser and save them in {target}")
        if not file.is_intact(path):
            path.unlink()
            raise InputError(address, "has a different hash than the hub lists", todo="try again")
    part.replace(target)
    facts = {
        f"{source.path}/{file.name}": {**facts_of(target / file.name), "commit": commit}
        for file in files
    }
    write_json(folder / MANIFEST, {**known, **facts})
    return target


def fetch_file(address: str, target: Path, by_hand: str) -> None:
    """Download to a ``.part`` file beside the target, then rename it.

    Raises:
        InputError: see :func:`fetch`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    try:
        download(address, part)
    except (URLError, HTTPException, OSError) as error:
        raise unreachable(address, error, f"try again, or {by_hand}") from error
    other = wrong_content(part, target.suffix)
    if other:
        part.unlink()
        raise InputError(address, f"returned {other}", todo=by_hand)
    part.replace(target)


def facts_of(file: Path) -> dict[str, Any]:
    """Return the size and hash of a file for the manifest."""
    return {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}


def download(address: str, part: Path) -> None:
    """Append the missing bytes of a file to ``part``, or replace it if the server cannot resume.

    Raises:
        OSError: no response, an error response, or a size other than the announced one.
        HTTPException: a malformed or incomplete response.
    """
    done = part.stat().st_size if part.is_file() else 0
    request = Request(address, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer: HTTPResponse = urlopen(request, timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code == 416 and done:  # the file is already complete
            return
        raise
    with answer:
        resumed = answer.status == 206  # partial content
        done = done if resumed else 0
        left = answer.headers.get("Content-Length")
        total = done + int(left) if left else None
        mode = "ab" if resumed else "wb"
        with part.open(mode) as file, Progress(total, f"fetching {part.stem}", "B", done) as shown:
            while block := answer.read(BLOCK):
                file.write(block)
                shown.update(len(block))
    if total is not None and part.stat().st_size != total:
        raise OSError(f"received {part.stat().st_size} of {total} bytes")


def manifest(folder: Path) -> Manifest:
    """Read the size and hash of each downloaded file; return an empty dict without a manifest.

    Raises:
        InputError: the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    fetched = json_document(path, "sizes and hashes of fetched files")
    for name, facts in fetched.items():
        found = facts if isinstance(facts, dict) else {}
        if [type(found.get(key)) for key in ("bytes", "sha256")] != [int, str]:
            problem = "expected the fields bytes and sha256, found others"
            raise InputError(path, problem, item=name, todo="delete this file")
    return fetched


def wrong_content(file: Path, ending: str) -> str:
    """Describe the content of a failed download; return "" if the file is acceptable.

    Args:
        file: the file.
        ending: extension of its target; a file of weights must not contain text or another format.
    """
    found = file_kind(file)
    wrong = (*NO_FILE, Kind.OTHER) if ending in WEIGHTS else NO_FILE
    return found.text if found.kind in wrong else ""


def check(folder: Path) -> str:
    """Format one line per file or model (name, path, state and source), and one about CLIP."""
    lines, fetched = [], manifest(folder)
    for name, source in SOURCES.items():
        target = folder / source.path
        found = "missing"
        if source.kind == "hub" and target.is_dir():
            found = state_of_model(source, folder, fetched)
        elif target.is_file():
            size, facts = target.stat().st_size, fetched.get(source.path)
            found, other = f"{size:,} bytes", wrong_content(target, target.suffix)
            if other:
                found += f", but {other}"
            elif facts and facts["bytes"] != size:
                found += f", but {facts['bytes']:,} were fetched"
            elif facts:
                found += f", SHA-256 {facts['sha256']}"
        how = f"by hand from {source.address}" if source.kind == "page" else source.address
        lines.append(f"{name:21} {source.path}: {found}; {how}")
    clip = "scripts/clip_infer.py downloads CLIP's weights into OpenCLIP's cache."
    return "\n".join([*lines, clip])


def files_of(source: Source, fetched: Manifest) -> Manifest:
    """Return the manifest entries of a model from the hub, by path in the model's folder."""
    start = f"{source.path}/"
    return {
        path.removeprefix(start): facts for path, facts in fetched.items() if path.startswith(start)
    }


def commit_of(source: Source, fetched: Manifest) -> str:
    """Return the commit of a model from the hub; "unknown" if this command has not fetched it."""
    return next(
        (str(facts.get("commit")) for facts in files_of(source, fetched).values()), "unknown"
    )


def state_of_model(source: Source, folder: Path, fetched: Manifest) -> str:
    """Compare a model from the hub with the manifest: size and commit, or the first fault."""
    files = files_of(source, fetched)
    if not files:
        return f"present, but not in {MANIFEST}: not fetched by this command"
    for name, facts in files.items():
        path, expected = folder / source.path / name, facts["bytes"]
        if not path.is_file():
            return f"{len(files)} files, but {name} is missing"
        if path.stat().st_size != expected:
            size = path.stat().st_size
            return f"{len(files)} files, but {name} has {size:,} bytes instead of {expected:,}"
    total = sum(facts["bytes"] for facts in files.values())
    return f"{len(files)} files, {total:,} bytes, commit {commit_of(source, fetched)}"


def main(argv: list[str] | None = None) -> None:
    """Download or list the checkpoints."""
    parser = CommandParser(prog="python -m pab.fetch")
    output, advanced = parser.groups["output"], parser.groups["advanced"]
    parser.add_argument(
        "names", nargs="*", metavar="NAME",
        help=f"{', '.join(SOURCES)}; a model on the hub also as NAME@REVISION",
    )  # fmt: skip
    output.add_argument("--folder", type=Path, default=Path("checkpoints"), help="target folder")
    advanced.add_argument("--check", action="store_true", help="list which files are present")
    args = parser.parse_args(argv)
    if args.check and args.names:
        raise InputError("--check", "expected no names, because it lists all files")
    if not args.names:
        print(check(args.folder))
    for name in args.names:
        print(fetch(name, args.folder))


if __name__ == "__main__":
    run_cli(main)
