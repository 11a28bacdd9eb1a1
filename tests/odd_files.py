"""Odd shards, tables, scores, checkpoints and photographs, with their expected outcomes.

A case with an empty ``refused`` is read correctly. Otherwise, the error contains ``refused``.
`test_hostile.py` runs these cases together with those of `hostile_cases.py`.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import save

from tests.hostile_cases import Code, coded, picture

pillow_heif.register_heif_opener()


@dataclass(frozen=True)
class FileCase:
    """File with a fixed name, and words of the expected error (empty if none)."""

    what: str
    name: str
    data: bytes
    refused: str = ""


def pair(**changes: Any) -> dict[str, Any]:
    """Return the fields of a training line of PAB."""
    return {
        "image": "train/imgs_0/goal/0.jpg", "caption": "a man falls", "image_id": "0_0", **changes
    }  # fmt: skip


def json_lines(*rows: dict[str, Any]) -> bytes:
    """Encode rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def shard_cases() -> list[FileCase]:
    """Training shards; a valid one holds one pair with ``image_id`` 0_0 or 7."""
    good = json_lines(pair())

    def right(what: str, data: bytes) -> FileCase:
        return FileCase(what, "pair_0.json", data)

    def bad(what: str, refused: str, data: bytes) -> FileCase:
        return FileCase(what, "pair_0.json", data, refused)

    return [
        right("integer image_id", json_lines(pair(image_id=7))),
        right("image_id 7.0", json_lines(pair(image_id=7.0))),
        right("integer hard_i_id", json_lines(pair(hard_i_id=12))),
        right("integer source_id", json_lines(pair(source_id=17))),
        right("null optional fields", json_lines(pair(hard_i=None, hard_c=None, scene=None))),
        right("empty optional fields", json_lines(pair(hard_c="", normal="", anomaly="Falling"))),
        right("list in an optional field", json_lines(pair(scene=["street", "rain"]))),
        right("unknown fields", json_lines(pair(bbox=[1, 2], split="a"))),
        right("byte-order mark", b"\xef\xbb\xbf" + good),
        right("Windows line ends", good.replace(b"\n", b"\r\n")),
        right("UTF-16 with a byte-order mark", good.decode().encode("utf-16")),
        right("JSON array", b"[" + good.strip() + b"]"),
        right("indented JSON array", json.dumps([pair()], indent=2).encode()),
        right("list of one caption", json_lines(pair(caption=["a man falls"]))),
        right("backslashes in a path", json_lines(pair(image="train\\imgs_0\\goal\\0.jpg"))),
        right("path with .. inside the root", json_lines(pair(image="train/x/../0.jpg"))),
        bad("image_id true", "image_id", json_lines(pair(image_id=True))),
        bad("image_id 1.5", "image_id", json_lines(pair(image_id=1.5))),
        bad("duplicate image_id", "line 2", good + good),
        bad("two captions", "caption", json_lines(pair(caption=["a man", "a woman"]))),
        bad("caption of zero-width spaces", "caption", json_lines(pair(caption="\u200b\u2060"))),
        bad("caption of U+FFFD only", "caption", json_lines(pair(caption="\ufffd" * 3))),
        bad("caption of a lone accent", "caption", json_lines(pair(caption="\u0301"))),
        bad("caption of HTML entities for blanks", "caption",
            json_lines(pair(caption="&nbsp;&nbsp;"))),
        bad("both normal and anomaly", "both",
            json_lines(pair(normal="Walking", anomaly="Falling"))),
        bad("path outside the root", "leaves it", json_lines(pair(image="../../secret.jpg"))),
        bad("absolute path outside the root", "absolute path",
            json_lines(pair(image="/etc/passwd"))),
        bad("path with a NUL character", "NUL", json_lines(pair(image="train/\0.jpg"))),
        bad("JSON array with a broken second entry", "line", b"[" + good.strip() + b',\n{"a": ]'),
        bad("truncated UTF-16", "UTF-16", b"\xff\xfe{"),
    ]  # fmt: skip


def table_cases() -> list[FileCase]:
    """Tables of captions; a valid one has the two images ``a.jpg`` and ``b.jpg``."""
    rows = "filepath\ttitle\na.jpg\ta man falls\nb.jpg\ta woman runs\n"
    commas = rows.replace("\t", ",")
    return [
        FileCase("tabs", "pairs.tsv", rows.encode()),
        FileCase("commas", "pairs.csv", commas.encode()),
        FileCase("semicolons", "pairs.csv", rows.replace("\t", ";").encode()),
        FileCase("byte-order mark", "pairs.csv", b"\xef\xbb\xbf" + commas.encode()),
        FileCase("Windows line ends", "pairs.csv", commas.replace("\n", "\r\n").encode()),
        FileCase("additional columns", "pairs.csv",
                 b"n,filepath,title\n1,a.jpg,man\n2,b.jpg,boy\n"),
        FileCase("comma inside quotes", "pairs.csv",
                 commas.replace("a man falls", '"a man, falling"').encode()),
        FileCase("blank lines", "pairs.csv", commas.replace("\nb", "\n\nb").encode()),
        FileCase("missing column", "pairs.csv", commas.replace("title", "text").encode(), "title"),
        FileCase("row with too few fields", "pairs.csv", commas.encode() + b"c.jpg\n", "line 4"),
        FileCase("row with too many fields", "pairs.csv",
                 commas.encode() + b"c.jpg,a,b\n", "line 4"),
        FileCase("unclosed quote", "pairs.csv", commas.encode() + b'c.jpg,"a man\n', "line 4"),
        FileCase("empty caption", "pairs.csv", commas.encode() + b"c.jpg,\n", "line 4"),
        FileCase("path outside the folder", "pairs.csv", commas.encode() + b"../c.jpg,a\n",
                 "line 4"),
        FileCase("bytes that are not UTF-8", "pairs.csv",
                 commas.encode() + b"c.jpg,\xe9\n", "UTF-8"),
    ]  # fmt: skip


def foreign_score_cases() -> list[FileCase]:
    """Scores of other tools; a valid file ranks ``c b a`` for both of its queries."""
    matrix = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=np.float32)
    header, body = "query,a,b,c\n", "q1,0.1,0.2,0.3\nq2,0.4,0.5,0.6\n"
    run = {f"q{n + 1}": dict(zip("abc", row.tolist(), strict=True)) for n, row in enumerate(matrix)}
    trec = [
        f"{query} Q0 {image} {3 - place} {score} mine"
        for query, found in run.items()
        for place, (image, score) in enumerate(found.items())
    ]
    ids = {"query_ids": ["q1", "q2"], "gallery_ids": ["a", "b", "c"]}
    rankings = [{"query_index": q, "topk_gallery": ["c.jpg", "b.jpg", "a.jpg"]} for q in run]
    reranked = [
        {"query_index": q, "reranked": [{"image": f"{i}.jpg", "score": s} for i, s in r.items()]}
        for q, r in run.items()
    ]

    def saved(write: Callable[..., object], *args: Any, **named: Any) -> bytes:
        stream = io.BytesIO()
        write(stream, *args, **named)
        return stream.getvalue()

    def tensors(content: Any) -> bytes:
        stream = io.BytesIO()
        torch.save(content, stream)
        return stream.getvalue()

    table = pyarrow.table({"query": ["q1", "q2"], **{i: matrix[:, n] for n, i in enumerate("abc")}})
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    scores = torch.from_numpy(matrix)
    return [
        FileCase("NumPy archive with ids", "s.npz", saved(np.savez, scores=matrix, **ids)),
        FileCase("columns in another order", "s.npz",
                 saved(np.savez, scores=matrix[:, ::-1], query_ids=ids["query_ids"],
                       gallery_ids=["c", "b", "a"])),
        FileCase("CSV", "s.csv", (header + body).encode()),
        FileCase("CSV with a byte-order mark and Windows line ends", "s.csv",
                 b"\xef\xbb\xbf" + (header + body).replace("\n", "\r\n").encode()),
        FileCase("TSV", "s.tsv", (header + body).replace(",", "\t").encode()),
        FileCase("names with extensions", "s.csv", ("query,a.jpg,b.jpg,c.jpg\n" + body).encode()),
        FileCase("Parquet", "s.parquet", sink.getvalue()),
        FileCase("TREC run, unsorted lines", "run.trec", "\n".join(trec).encode()),
        FileCase("TREC run, sorted lines", "run.txt", "\n".join(trec[::-1]).encode()),
        FileCase("ranx run", "run.json", json.dumps(run).encode()),
        FileCase("rankings without scores", "rankings.jsonl", json_lines(*rankings)),
        FileCase("reranked images with scores", "reranked.json", json.dumps(reranked).encode()),
        FileCase("float16 with ids", "s.pt", tensors({"sims": scores.half(), **ids})),
        FileCase("scores that require a gradient", "s.pt",
                 tensors({"scores": scores.clone().requires_grad_(), **ids, "meta": {}})),
        FileCase("NumPy matrix without ids", "s.npy", saved(np.save, matrix), "--queries"),
        FileCase("NumPy array inside torch.save, without ids", "s.pt", tensors({"sims": matrix}),
                 "--queries"),
        FileCase("two matrices", "s.pt", tensors({"a": scores, "b": scores}), "exactly one matrix"),
        FileCase("integers", "s.pt", tensors({"sims": scores.int(), **ids}), "s.pt"),
        FileCase("pickled code beside the matrix", "s.pt",
                 tensors({"sims": scores, **ids, "x": Code()}), "s.pt"),
        FileCase("CSV with a short row", "s.csv", (header + body + "q3,1\n").encode(), "line 4"),
        FileCase("CSV with a word among the scores", "s.csv",
                 (header + body.replace("0.5", "x")).encode(), "'x'"),
        FileCase("CSV with NaN", "s.csv", (header + body.replace("0.5", "nan")).encode(), "nan"),
        FileCase("CSV with a duplicate image", "s.csv", ("query,a,b,b\n" + body).encode(), "'b'"),
        FileCase("truncated Parquet file", "s.parquet", sink.getvalue()[:200], "s.parquet"),
        FileCase("truncated NumPy archive", "s.npz",
                 saved(np.savez, scores=matrix, **ids)[:300], "s.npz"),
        FileCase("TREC run with a duplicate image", "run.trec",
                 "\n".join([*trec, trec[0]]).encode(), "'a'"),
        FileCase("JSON of 100,000 brackets", "run.json", b"[" * 100_000, "run.json"),
        FileCase("web page", "s.pt", b"<!DOCTYPE html><title>Sign in</title>", "s.pt"),
    ]  # fmt: skip


def checkpoint_cases() -> list[FileCase]:
    """Checkpoints; a valid one holds one weight, ``w`` = [1, 2]."""
    weight = torch.tensor([1.0, 2.0])

    def tensors(content: Any) -> bytes:
        stream = io.BytesIO()
        torch.save(content, stream)
        return stream.getvalue()

    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    extras = {"args": defaultdict(int, lr=1), "step": np.int64(7), "history": np.arange(3.0)}
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    return [
        FileCase("wrapper prefixes in another order", "c.pth",
                 tensors({"model": {"module._orig_mod.w": weight}})),
        FileCase("nested containers", "c.pth",
                 tensors({"state_dict": {"model": {"w": weight}}, "epoch": 3})),
        FileCase("model_state_dict", "c.pth", tensors({"model_state_dict": {"w": weight}})),
        FileCase("OrderedDict", "c.pth", tensors(OrderedDict(w=weight))),
        FileCase("NumPy values and a defaultdict beside the weights", "c.pth",
                 tensors({"model": {"w": weight}, **extras})),
        FileCase("NumPy array as the weight", "c.pth", tensors({"model": {"w": weight.numpy()}})),
        FileCase("safetensors named .pth", "c.pth", save({"w": weight})),
        FileCase("torch.save file named .safetensors", "c.safetensors", tensors({"w": weight})),
        FileCase("pickled code", "c.pth", tensors({"model": {"w": weight}, "x": Code()}), "c.pth"),
        FileCase("array of Python objects", "c.pth",
                 tensors({"w": weight, "x": np.array([Code()], dtype=object)}), "c.pth"),
        FileCase("web page", "c.pth", b"<!DOCTYPE html><html><title>Sign in</title>", "web page"),
        FileCase("Git LFS pointer", "c.pth", lfs, "Git LFS"),
        FileCase("empty file", "c.pth", b"", "empty"),
        FileCase("truncated file", "c.pth", tensors({"model": {"w": weight}})[:500], "c.pth"),
        FileCase("truncated safetensors", "c.safetensors",
                 save({"w": weight})[:-4], "c.safetensors"),
        FileCase("zip of other files", "c.pth", other.getvalue(), "c.pth"),
        FileCase("text file", "c.pth", b"no weights\n", "c.pth"),
    ]  # fmt: skip


def photo_cases() -> list[FileCase]:
    """Photographs; all valid ones show the same upright picture."""
    base = picture((48, 32))

    def turned(kind: str, **options: Any) -> bytes:
        exif = Image.Exif()
        exif[274] = 6  # rotate clockwise to view
        return coded(base.transpose(Image.Transpose.ROTATE_90), kind, exif=exif, **options)

    png = coded(base, "PNG")
    return [
        FileCase("HEIC", "a.HEIC", coded(base, "HEIF", quality=100)),
        FileCase("AVIF", "a.avif", coded(base, "AVIF", quality=100)),
        FileCase("TIFF", "a.tiff", coded(base, "TIFF")),
        FileCase("GIF", "a.gif", coded(base, "GIF")),
        FileCase("JFIF", "a.jfif", coded(base, "JPEG", quality=100)),
        FileCase("MPO", "a.mpo", coded(base, "MPO", quality=100, save_all=True,
                                       append_images=[base])),
        FileCase("EXIF rotation in a JPEG, applied", "a.jpg", turned("JPEG", quality=100)),
        FileCase("EXIF rotation in a PNG, applied", "a.png", turned("PNG")),
        FileCase("name with blanks and brackets", "IMG 0001 (1).png", png),
        FileCase("name with a narrow no-break space", "9.41.00\u202fAM.png", png),
        FileCase("truncated JPEG", "a.jpg", coded(base, "JPEG")[:400], "a.jpg"),
        FileCase("empty file", "a.png", b"", "a.png"),
        FileCase("text file named .jpg", "a.jpg", b"no picture\n", "a.jpg"),
    ]  # fmt: skip


def put(folder: Path, case: FileCase) -> Path:
    """Write the file of a case; return its path."""
    path = folder / case.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(case.data)
    return path
