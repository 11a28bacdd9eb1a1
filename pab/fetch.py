"""Download public checkpoints to `checkpoints/`: `python -m pab.fetch NAME`.

Without a name, or with `--check`, the command lists each file with its source, and whether the file
is present, missing or not a weight file. An interrupted download is resumed. After a download, the
size and SHA-256 of the file are written to `manifest.json` in the checkpoint folder. Some files can
only be downloaded with a browser: for these, the command prints the URL and the target path.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from pab.core.config import CommandParser
from pab.core.errors import InputError, run_cli
from pab.core.file_kinds import Kind, file_kind
from pab.core.files import BLOCK, sha256_of_file, write_json
from pab.core.progress import Progress
from pab.data.json_lines import json_document

TIMEOUT_S = 30.0
WEIGHTS = (".pth", ".safetensors")  # extensions of files that must contain weights
NO_WEIGHTS = (Kind.CUT, Kind.EMPTY, Kind.OTHER)
MANIFEST = "manifest.json"  # in the checkpoint folder: path -> size and hash after the download
BEIT3 = "https://github.com/addf400/files/releases/download/beit3"
SWIN = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0"
BERT = "https://huggingface.co/bert-base-uncased"
DRIVE_FOLDER = "https://drive.google.com/drive/u/5/folders/1M-qqoDk8oQ_AERnRgdx5NC5cFCXskLd9"
LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"


@dataclass(frozen=True)
class Source:
    """Source of a checkpoint.

    Attributes:
        path: path in the checkpoint folder, as in the scripts' defaults.
        address: URL of the file, or of the page that links to it.
        kind: ``file`` for a direct download, ``page`` for a manual download with a browser.
    """

    path: str
    address: str
    kind: Literal["file", "page"] = "file"


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
}  # fmt: skip


def fetch(name: str, folder: Path) -> Path:
    """Download one file if it is missing.

    Raises:
        InputError: the name is unknown, the source is a page, the manifest is damaged, the download
            failed (the next call resumes it), or the server sent a web page (which is deleted).
    """
    if name not in SOURCES:
        raise InputError("NAME", f"expected one of {', '.join(SOURCES)}, found {name!r}")
    source = SOURCES[name]
    target = folder / source.path
    if target.is_file():
        print(f"{target} is already present", file=sys.stderr)
        return target
    by_hand = f"download it with a browser and save it as {target}"
    if source.kind == "page":
        problem = f"is behind a page that a program cannot download from: {source.address}"
        raise InputError(name, problem, todo=by_hand)
    known = manifest(folder)  # a damaged manifest raises before the download
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    try:
        download(source.address, part)
    except (URLError, HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        problem = f"{source.address} cannot be fetched: {reason}"
        raise InputError(name, problem, todo=f"try again, or {by_hand}") from error
    other = not_weights(part, target.suffix)
    if other:
        part.unlink()
        raise InputError(name, f"{source.address} returned {other}", todo=by_hand)
    part.replace(target)
    facts = {"bytes": target.stat().st_size, "sha256": sha256_of_file(target)}
    write_json(folder / MANIFEST, {**known, source.path: facts})
    return target


def download(address: str, part: Path) -> None:
    """Append the missing bytes of a file to ``part``.

    Raises:
        OSError: no response, an error response, or a size other than announced.
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


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
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


def not_weights(file: Path, ending: str) -> str:
    """Describe what a file contains instead of weights; return "" if the file is acceptable."""
    found = file_kind(file)
    return found.text if ending in WEIGHTS and found.kind in NO_WEIGHTS else ""


def check(folder: Path) -> str:
    """Format one line per file: name, path, state and source."""
    lines, fetched = [], manifest(folder)
    for name, source in SOURCES.items():
        target = folder / source.path
        found = "missing"
        if target.is_file():
            size, facts = target.stat().st_size, fetched.get(source.path)
            found, other = f"{size:,} bytes", not_weights(target, target.suffix)
            if other:
                found += f", but {other}"
            elif facts and facts["bytes"] != size:
                found += f", but {facts['bytes']:,} were fetched"
            elif facts:
                found += f", SHA-256 {facts['sha256']}"
        how = source.address if source.kind == "file" else f"by hand from {source.address}"
        lines.append(f"{name:17} {source.path}: {found}; {how}")
    clip = "scripts/clip_infer.py downloads CLIP's weights into OpenCLIP's cache."
    return "\n".join([*lines, clip])


def main(argv: list[str] | None = None) -> None:
    """Download or list the checkpoints."""
    parser = CommandParser(prog="python -m pab.fetch")
    output, advanced = parser.groups["output"], parser.groups["advanced"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SOURCES))
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
