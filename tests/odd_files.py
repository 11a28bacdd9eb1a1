"""Odd files of labs and tools: shards, tables, scores, checkpoints, photographs; and the outcome.

Each case is read correctly (``refused`` is empty) or refused in one line that holds these words.
`test_hostile.py` runs them beside the cases of `hostile_cases.py`.
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
    """A file with a name that counts: right, or refused with these words."""

    what: str
    name: str
    data: bytes
    refused: str = ""


def pair(**changes: Any) -> dict[str, Any]:
    """A training line of PAB."""
    return {
        "image": "train/imgs_0/goal/0.jpg", "caption": "a man falls", "image_id": "0_0", **changes
    }  # fmt: skip


def json_lines(*rows: dict[str, Any]) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def shard_cases() -> list[FileCase]:
    """Training shards of one pair with ``image_id`` 0_0 or 7."""
    good = json_lines(pair())

    def right(what: str, data: bytes) -> FileCase:
        return FileCase(what, "pair_0.json", data)

    def bad(what: str, refused: str, data: bytes) -> FileCase:
        return FileCase(what, "pair_0.json", data, refused)

    return [
        right("image_id a whole number", json_lines(pair(image_id=7))),
        right("image_id 7.0", json_lines(pair(image_id=7.0))),
        right("hard_i_id a number", json_lines(pair(hard_i_id=12))),
        right("source_id a number", json_lines(pair(source_id=17))),
        right("optional fields null", json_lines(pair(hard_i=None, hard_c=None, scene=None))),
        right("optional fields empty", json_lines(pair(hard_c="", normal="", anomaly="Falling"))),
        right("an optional field that is a list", json_lines(pair(scene=["street", "rain"]))),
        right("unknown fields", json_lines(pair(bbox=[1, 2], split="a"))),
        right("byte-order mark", b"\xef\xbb\xbf" + good),
        right("line ends of Windows", good.replace(b"\n", b"\r\n")),
        right("UTF-16 with its mark", good.decode().encode("utf-16")),
        right("JSON array", b"[" + good.strip() + b"]"),
        right("JSON array over several lines", json.dumps([pair()], indent=2).encode()),
        right("a caption as a list of one", json_lines(pair(caption=["a man falls"]))),
        right("backslashes in a path", json_lines(pair(image="train\\imgs_0\\goal\\0.jpg"))),
        right("a path with .. that stays inside", json_lines(pair(image="train/x/../0.jpg"))),
        bad("image_id true", "image_id", json_lines(pair(image_id=True))),
        bad("image_id 1.5", "image_id", json_lines(pair(image_id=1.5))),
        bad("the same image_id twice", "line 2", good + good),
        bad("two captions", "caption", json_lines(pair(caption=["a man", "a woman"]))),
        bad("caption of blanks without width", "caption", json_lines(pair(caption="\u200b\u2060"))),
        bad("caption of U+FFFD alone", "caption", json_lines(pair(caption="\ufffd" * 3))),
        bad("caption of a lone accent", "caption", json_lines(pair(caption="\u0301"))),
        bad("caption of entities for blanks", "caption", json_lines(pair(caption="&nbsp;&nbsp;"))),
        bad("normal and anomaly", "both", json_lines(pair(normal="Walking", anomaly="Falling"))),
        bad("a path that leaves the root", "leaves it", json_lines(pair(image="../../secret.jpg"))),
        bad("an absolute path outside", "absolute path", json_lines(pair(image="/etc/passwd"))),
        bad("a path with a NUL character", "NUL", json_lines(pair(image="train/\0.jpg"))),
        bad("an array broken in its second entry", "line", b"[" + good.strip() + b',\n{"a": ]'),
        bad("half of UTF-16", "UTF-16", b"\xff\xfe{"),
    ]  # fmt: skip


def table_cases() -> list[FileCase]:
    """Tables of two captioned images, ``a.jpg`` and ``b.jpg``."""
    rows = "filepath\ttitle\na.jpg\ta man falls\nb.jpg\ta woman runs\n"
    commas = rows.replace("\t", ",")
    return [
        FileCase("tabs", "pairs.tsv", rows.encode()),
        FileCase("commas", "pairs.csv", commas.encode()),
        FileCase("semicolons", "pairs.csv", rows.replace("\t", ";").encode()),
        FileCase("byte-order mark", "pairs.csv", b"\xef\xbb\xbf" + commas.encode()),
        FileCase("line ends of Windows", "pairs.csv", commas.replace("\n", "\r\n").encode()),
        FileCase("further columns", "pairs.csv", b"n,filepath,title\n1,a.jpg,man\n2,b.jpg,boy\n"),
        FileCase("a comma inside quotes", "pairs.csv",
                 commas.replace("a man falls", '"a man, falling"').encode()),
        FileCase("blank lines", "pairs.csv", commas.replace("\nb", "\n\nb").encode()),
        FileCase("no such column", "pairs.csv", commas.replace("title", "text").encode(), "title"),
        FileCase("a row too short", "pairs.csv", commas.encode() + b"c.jpg\n", "line 4"),
        FileCase("a row too long", "pairs.csv", commas.encode() + b"c.jpg,a,b\n", "line 4"),
        FileCase("an open quote", "pairs.csv", commas.encode() + b'c.jpg,"a man\n', "line 4"),
        FileCase("an empty caption", "pairs.csv", commas.encode() + b"c.jpg,\n", "line 4"),
        FileCase("a path that leaves the folder", "pairs.csv", commas.encode() + b"../c.jpg,a\n",
                 "line 4"),
        FileCase("other bytes than UTF-8", "pairs.csv", commas.encode() + b"c.jpg,\xe9\n", "UTF-8"),
    ]  # fmt: skip


def foreign_score_cases() -> list[FileCase]:
    """Scores of other tools: two queries, three images, ranked ``c b a`` in both rows."""
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
        FileCase("CSV with mark and line ends of Windows", "s.csv",
                 b"\xef\xbb\xbf" + (header + body).replace("\n", "\r\n").encode()),
        FileCase("TSV", "s.tsv", (header + body).replace(",", "\t").encode()),
        FileCase("names with endings", "s.csv", ("query,a.jpg,b.jpg,c.jpg\n" + body).encode()),
        FileCase("Parquet", "s.parquet", sink.getvalue()),
        FileCase("TREC run", "run.trec", "\n".join(trec).encode()),
        FileCase("TREC run, lines in no order", "run.txt", "\n".join(trec[::-1]).encode()),
        FileCase("ranx run", "run.json", json.dumps(run).encode()),
        FileCase("rankings without scores", "rankings.jsonl", json_lines(*rankings)),
        FileCase("reranked images with scores", "reranked.json", json.dumps(reranked).encode()),
        FileCase("float16 with ids", "s.pt", tensors({"sims": scores.half(), **ids})),
        FileCase("scores that require a gradient", "s.pt",
                 tensors({"scores": scores.clone().requires_grad_(), **ids, "meta": {}})),
        FileCase("NumPy matrix without ids", "s.npy", saved(np.save, matrix), "--queries"),
        FileCase("NumPy array inside torch.save", "s.pt", tensors({"sims": matrix}), "--queries"),
        FileCase("two matrices", "s.pt", tensors({"a": scores, "b": scores}), "exactly one matrix"),
        FileCase("whole numbers", "s.pt", tensors({"sims": scores.int(), **ids}), "s.pt"),
        FileCase("a code object beside the matrix", "s.pt",
                 tensors({"sims": scores, **ids, "x": Code()}), "s.pt"),
        FileCase("CSV with a short row", "s.csv", (header + body + "q3,1\n").encode(), "line 4"),
        FileCase("CSV with a word", "s.csv", (header + body.replace("0.5", "x")).encode(), "'x'"),
        FileCase("CSV with NaN", "s.csv", (header + body.replace("0.5", "nan")).encode(), "nan"),
        FileCase("CSV with an image twice", "s.csv", ("query,a,b,b\n" + body).encode(), "'b'"),
        FileCase("half of a Parquet file", "s.parquet", sink.getvalue()[:200], "s.parquet"),
        FileCase("half of a NumPy archive", "s.npz",
                 saved(np.savez, scores=matrix, **ids)[:300], "s.npz"),
        FileCase("TREC run with an image twice", "run.trec",
                 "\n".join([*trec, trec[0]]).encode(), "'a'"),
        FileCase("JSON of 100,000 brackets", "run.json", b"[" * 100_000, "run.json"),
        FileCase("a web page", "s.pt", b"<!DOCTYPE html><title>Sign in</title>", "s.pt"),
    ]  # fmt: skip


def checkpoint_cases() -> list[FileCase]:
    """Checkpoints that hold one weight, ``w`` = [1, 2]."""
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
        FileCase("containers inside containers", "c.pth",
                 tensors({"state_dict": {"model": {"w": weight}}, "epoch": 3})),
        FileCase("model_state_dict", "c.pth", tensors({"model_state_dict": {"w": weight}})),
        FileCase("an OrderedDict", "c.pth", tensors(OrderedDict(w=weight))),
        FileCase("NumPy values and a defaultdict beside", "c.pth",
                 tensors({"model": {"w": weight}, **extras})),
        FileCase("a NumPy array as the weight", "c.pth", tensors({"model": {"w": weight.numpy()}})),
        FileCase("safetensors called .pth", "c.pth", save({"w": weight})),
        FileCase("torch.save called .safetensors", "c.safetensors", tensors({"w": weight})),
        FileCase("code in it", "c.pth", tensors({"model": {"w": weight}, "x": Code()}), "c.pth"),
        FileCase("array of Python objects", "c.pth",
                 tensors({"w": weight, "x": np.array([Code()], dtype=object)}), "c.pth"),
        FileCase("a web page", "c.pth", b"<!DOCTYPE html><html><title>Sign in</title>", "web page"),
        FileCase("a Git LFS pointer", "c.pth", lfs, "Git LFS"),
        FileCase("empty", "c.pth", b"", "empty"),
        FileCase("cut off", "c.pth", tensors({"model": {"w": weight}})[:500], "c.pth"),
        FileCase("safetensors cut off", "c.safetensors", save({"w": weight})[:-4], "c.safetensors"),
        FileCase("zip of other files", "c.pth", other.getvalue(), "c.pth"),
        FileCase("text", "c.pth", b"no weights\n", "c.pth"),
    ]  # fmt: skip


def photo_cases() -> list[FileCase]:
    """Photographs, all showing the same upright picture where they are right."""
    base = picture((48, 32))

    def turned(kind: str, **options: Any) -> bytes:
        exif = Image.Exif()
        exif[274] = 6  # the picture is stored turned to the left
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
        FileCase("half of a JPEG", "a.jpg", coded(base, "JPEG")[:400], "a.jpg"),
        FileCase("no bytes", "a.png", b"", "a.png"),
        FileCase("text called .jpg", "a.jpg", b"no picture\n", "a.jpg"),
    ]  # fmt: skip


def put(folder: Path, case: FileCase) -> Path:
    """Write a case's file."""
    path = folder / case.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(case.data)
    return path
