"""Odd and hostile inputs with their expected outcomes.

An image case is decoded to the RGB picture ``right``, refused in one line that contains
``refused``, or not treated as a gallery image (``ignored``). Other cases are read or refused.
`test_hostile.py` runs all cases and checks that `docs/reliability.md` lists them.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIZE = (40, 30)


def picture(size: tuple[int, int] = SIZE) -> Image.Image:
    """Draw a colour gradient that differs between channels and between directions."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    blue = np.full_like(across, 90.0)
    return Image.fromarray(np.stack([across, down, blue], axis=2).astype(np.uint8))


def coded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Encode an image in a file format, and return the bytes."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def as_rgb(data: bytes) -> Image.Image:
    """Decode an image file to RGB."""
    return Image.open(io.BytesIO(data)).convert("RGB")


@dataclass(frozen=True)
class ImageCase:
    """Gallery file: name, content (None makes a folder), and expected picture or error words."""

    what: str
    name: str
    data: bytes | None
    right: Image.Image | None = None
    refused: str = ""
    ignored: bool = False


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """Encode one chunk of a PNG file."""
    whole = kind + body
    return len(body).to_bytes(4, "big") + whole + zlib.crc32(whole).to_bytes(4, "big")


def bomb(side: int) -> bytes:
    """Return a PNG of less than a kilobyte whose header declares side x side pixels."""
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes((side // 8 + 1) * 64), 9)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def image_cases() -> list[ImageCase]:
    """Images with rare formats, damage, misleading extensions or odd names."""
    base = picture()
    jpeg, png = coded(base, "JPEG", quality=95), coded(base, "PNG")
    deep = np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE[1], SIZE[0]).astype(np.uint16)
    shades = Image.fromarray((deep // 257).astype(np.uint8))
    half = Image.new("RGBA", SIZE, (200, 40, 40, 128))
    exif = Image.Exif()
    exif[274] = 6  # rotate clockwise to view; not applied, as in the published pipelines
    frames = [base, base.transpose(Image.Transpose.ROTATE_180)]
    made: list[tuple[str, str, bytes, Image.Image]] = [
        ("CMYK JPEG", "odd.jpg", b := coded(base.convert("CMYK"), "JPEG"), as_rgb(b)),
        ("grey JPEG", "odd.jpg", b := coded(base.convert("L"), "JPEG"), as_rgb(b)),
        ("progressive JPEG", "odd.jpg", b := coded(base, "JPEG", progressive=True), as_rgb(b)),
        ("16-bit grey PNG", "odd.png", coded(Image.fromarray(deep), "PNG"), shades.convert("RGB")),
        ("palette PNG", "odd.png", b := coded(base.quantize(16), "PNG"), as_rgb(b)),
        ("palette PNG, transparent", "odd.png",
         b := coded(base.quantize(16), "PNG", transparency=3), as_rgb(b)),
        ("PNG with alpha", "odd.png", coded(half, "PNG"), Image.new("RGB", SIZE, (200, 40, 40))),
        ("grey PNG with alpha", "odd.png", b := coded(base.convert("LA"), "PNG"), as_rgb(b)),
        ("one-bit PNG", "odd.png", b := coded(base.convert("1"), "PNG"), as_rgb(b)),
        ("EXIF rotation, not applied (as published)", "odd.jpg",
         coded(base, "JPEG", quality=95, exif=exif), as_rgb(jpeg)),
        ("animated PNG", "odd.png",
         coded(base, "PNG", save_all=True, append_images=frames[1:]), base),
        ("animated WebP", "odd.webp",
         coded(base, "WEBP", save_all=True, append_images=frames[1:], lossless=True), base),
        ("lossless WebP", "odd.webp", coded(base, "WEBP", lossless=True), base),
        ("BMP", "odd.bmp", coded(base, "BMP"), base),
        ("one pixel", "odd.png", coded(picture((1, 1)), "PNG"), picture((1, 1))),
        ("20,000 x 20 pixels", "odd.png", coded(picture((20000, 20)), "PNG"), picture((20000, 20))),
        ("20 x 20,000 pixels", "odd.png", coded(picture((20, 20000)), "PNG"), picture((20, 20000))),
        ("JPEG named .png", "odd.png", jpeg, as_rgb(jpeg)),
        ("PNG named .JPG", "odd.JPG", png, base),
        ("JPEG with trailing bytes", "odd.jpg", jpeg + b"\0" * 999, as_rgb(jpeg)),
    ]  # fmt: skip
    cases = [ImageCase(what, name, data, right=right) for what, name, data, right in made]
    cases += [
        ImageCase("truncated JPEG", "odd.jpg", jpeg[: len(jpeg) // 2], refused="odd.jpg"),
        ImageCase("truncated PNG", "odd.png", png[: len(png) // 2], refused="odd.png"),
        ImageCase("decompression bomb, 40,000 x 40,000", "odd.png", bomb(40000), refused="odd.png"),
        ImageCase("TIFF named .jpg", "odd.jpg", coded(base, "TIFF"), refused="odd.jpg"),
        ImageCase("SVG named .png", "odd.png", b"<svg xmlns='x'/>", refused="odd.png"),
        ImageCase("empty file", "odd.png", b"", refused="an empty file"),
        ImageCase("text file", "odd.jpg", b"no image\n", refused="odd.jpg"),
        ImageCase("folder named odd.jpg", "odd.jpg", None, refused="a directory"),
        ImageCase("GIF", "odd.gif", coded(base, "GIF"), ignored=True),
        ImageCase("hidden file", ".odd.jpg", jpeg, ignored=True),
        ImageCase("name with a blank", "odd one.png", png, refused="'odd one'"),
        ImageCase("name with a line break", "odd\none.png", png, refused="odd"),
        ImageCase("name in Greek", "γάτα.png", png, right=base),
        ImageCase("emoji as the name", "🚲.png", png, right=base),
        ImageCase("name with two dots", "a.b.png", png, right=base),
        ImageCase("name that starts with a dash", "-odd.png", png, right=base),
        ImageCase("name of 200 characters", "x" * 200 + ".png", png, right=base),
        ImageCase("name that differs only in its extension", "G00.png", png, refused="'G00"),
    ]
    return cases


@dataclass(frozen=True)
class TextCase:
    """Content of a text file, and words of the expected error (empty if none)."""

    what: str
    data: bytes
    refused: str = ""


def query(caption: Any, **more: Any) -> bytes:
    """Encode one line of a query file."""
    return (json.dumps({"query_index": "q1", "caption": caption, **more}) + "\n").encode()


def caption_cases() -> list[TextCase]:
    """Query files with odd captions or damage."""
    good = query("a man falls")
    return [
        TextCase("emoji", query("a man 🚲 falls 🤕")),
        TextCase("control characters", query("a\x00man\x07falls\x1b[31m")),
        TextCase("10,000 words", query("word " * 10_000)),
        TextCase("one word of 100,000 characters", query("x" * 100_000)),
        TextCase("right-to-left text", query("رجل يسقط من دراجته")),
        TextCase("only full stops", query("...")),
        TextCase("the tokenizer's special tokens", query("<s> [SEP] </s> <pad> <unk>")),
        TextCase("combining accents (NFD)", query("un cafe\u0301")),
        TextCase("zero-width spaces between words", query("a\u200bman\u200b falls")),
        TextCase("markup", query("<script>alert(1)</script>")),
        TextCase("Windows line ends", good.replace(b"\n", b"\r\n")),
        TextCase("no newline at the end", good.rstrip(b"\n")),
        TextCase("empty caption", query(""), "caption"),
        TextCase("blank caption", query("  \t "), "caption"),
        TextCase("null caption", query(None), "caption"),
        TextCase("numeric caption", query(7), "caption"),
        TextCase(
            "lone surrogate", b'{"query_index": "q1", "caption": "a \\ud800"}\n', "caption"
        ),
        TextCase("duplicate id", good + good, "q1"),
        TextCase("unknown field", query("a", colour="red")),
        TextCase("field \"change\" of Track 4", query("a", change="b")),
        TextCase("numeric id", good.replace(b'"q1"', b"7")),
        TextCase("byte-order mark", b"\xef\xbb\xbf" + good),
        TextCase("JSON array", b"[" + good.strip() + b"]"),
        TextCase("one object of ids and captions", b'{"q1": "a man falls"}\n'),
        TextCase("several captions", query(["a man", "a woman"]), "caption"),
        TextCase("only zero-width spaces", query("\u200b\u200b"), "caption"),
        TextCase("missing id", b'{"caption": "a man"}\n', "line 1"),
        TextCase("a list instead of an object", b'["a man"]\n', "line 1"),
        TextCase(
            "duplicate field", b'{"query_index": "q1", "caption": "a", "caption": "b"}\n', "caption"
        ),
        TextCase("NaN", b'{"query_index": NaN, "caption": "a"}\n', "line 1"),
        TextCase("trailing comma", b'{"query_index": "q1", "caption": "a",}\n', "line 1"),
        TextCase("100,000 brackets", b"[" * 100_000 + b"\n", "line 1"),
        TextCase("bytes that are not UTF-8", b"\xff\xfe\x00a\n", "UTF-8"),
        TextCase("zip archive", b"PK\x03\x04" + bytes(40), "line 1"),
        TextCase("empty file", b"", "empty"),
    ]  # fmt: skip


@dataclass(frozen=True)
class ScoreCase:
    """Content of a score file (object or bytes), and words of the expected error, if any."""

    what: str
    content: Any
    refused: str = ""


class Code:
    """Object whose unpickling would call a function."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (print, ("code of a score file ran",))


def score_cases(good: dict[str, Any]) -> list[ScoreCase]:
    """Score files of two queries and three images.

    Args:
        good: content of a valid file.
    """
    scores: torch.Tensor = good["scores"]

    def spoilt(row: int, column: int, value: float) -> torch.Tensor:
        other = scores.clone()
        other[row, column] = value
        return other

    def with_(**changes: Any) -> dict[str, Any]:
        return {**good, **changes}

    stream = io.BytesIO()
    torch.save(good, stream)
    return [
        ScoreCase("valid file", good),
        ScoreCase("values of 1e30", with_(scores=scores * 1e30)),
        ScoreCase("pickled code", with_(meta={"x": Code()}), "x.pt"),
        ScoreCase("bare tensor", scores, "pab.scores import"),
        ScoreCase("float64", with_(scores=scores.double())),
        ScoreCase("NaN", with_(scores=spoilt(1, 2, float("nan"))), "finite"),
        ScoreCase("infinity", with_(scores=spoilt(1, 2, float("inf"))), "finite"),
        ScoreCase("equal scores only", with_(scores=torch.zeros_like(scores)), "no ranking"),
        ScoreCase("missing id", with_(query_ids=good["query_ids"][1:]), "query_ids"),
        ScoreCase("duplicate id", with_(gallery_ids=["a", "a", "c"]), "'a' twice"),
        ScoreCase("unsorted ids", with_(scores=scores.flip(1), gallery_ids=["c", "b", "a"])),
        ScoreCase("line break in an id", with_(gallery_ids=["a", "b\n", "c"]), "gallery_ids"),
        ScoreCase("additional key", {**good, "x": 1}),
        ScoreCase("sparse tensor", with_(scores=scores.to_sparse()), "x.pt"),
        ScoreCase("truncated file", stream.getvalue()[:600], "x.pt"),
        ScoreCase("text file", b"no scores\n", "x.pt"),
        ScoreCase("empty file", b"", "x.pt"),
    ]


def list_cases() -> list[TextCase]:
    """Ranked lists for three queries and three images."""
    return [
        TextCase("Windows line ends", b"a b c\r\nb a c\r\nc a b\r\n"),
        TextCase("tabs", b"a\tb c\nb a\tc\nc b a\n"),
        TextCase("no newline at the end", b"a b c\nb a c\nc a b"),
        TextCase("empty file", b"", "empty"),
        TextCase("empty line", b"a b c\n\n", "line 2"),
        TextCase("duplicate name", b"a b a\nb a c\n", "'a' twice"),
        TextCase("lines of unequal length", b"a b c\nb a\n", "line 2"),
        TextCase("one line too many", b"a b c\n" * 4, "expected one line per query (3)"),
        TextCase("bytes that are not UTF-8", b"\xff\xfe a\n", "UTF-8"),
    ]


def write(folder: Path, name: str, data: bytes | None) -> Path:
    """Write the file, or make a folder if ``data`` is None; return the path."""
    path = folder / name
    if data is None:
        path.mkdir()
    else:
        path.write_bytes(data)
    return path
