"""File kinds are detected from the content, whatever the file's name."""

from __future__ import annotations

import gzip
import io
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from pab.core.checkpoints import model_state, read_checkpoint
from pab.core.errors import InputError
from pab.core.file_kinds import Kind, file_kind
from pab.core.tensor_files import read_tensors

STATE = {"w": torch.arange(4000.0), "half": torch.ones(3, dtype=torch.float16)}
NAMES = ("weights.pth", "weights.pt", "weights.bin", "weights.safetensors", "weights")


def torch_bytes(*, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": STATE}, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("folder/lhp.pth", "a")
    return buffer.getvalue()


def script_bytes() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def numpy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    return buffer.getvalue()


def arrays_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, scores=np.ones(3), ids=np.ones(2))
    return buffer.getvalue()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "content", [torch_bytes(), torch_bytes(old=True), save(STATE)], ids=["zip", "old", "safe"]
)
def test_the_content_decides_how_weights_are_read(
    tmp_path: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    state = model_state(read_checkpoint(path), path)
    assert torch.equal(state["w"], STATE["w"])
    assert state["half"].dtype == torch.float16
    safe = content == save(STATE)
    odd = path.suffix and safe != (path.suffix == ".safetensors")
    assert capsys.readouterr().err.count("note: ") == bool(odd)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2700000000\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head>"


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "found an empty file; copy or download it again"),
        (LFS, "found a pointer of Git LFS instead of the file; run git lfs pull"),
        (b"/annex/objects/SHA256E-s27--ab.pth\n", "git-annex.*; run git annex get"),
        (PAGE, r"found a web page \(Google Drive - Virus scan warning\); .*the file by hand"),
        (b"\xef\xbb\xbf<html><body>404</body></html>", r"found a web page; "),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "XML document, perhaps a"),
        (b'{"error": "not found"}', r"found a JSON document \('\{\"error\": \"not found\"\}'\)$"),
        (b"hello, world, this is text", r"found plain text \('hello, world, this is text'\)$"),
        (zip_bytes(), r"found a zip archive of other files \(folder/lhp\.pth\); unpack it"),
        (torch_bytes()[:9000], "zip archive without its end, .*; copy or download it again"),
        (save(STATE)[:5000], r"found 5000 of the \d+ bytes of a safetensors file, .*; copy or do"),
        (save(STATE)[:40], r"found 40 of the \d+ bytes of a safetensors file"),
        (bytes(9000), "found only zero bytes, as an interrupted copy leaves them; copy or"),
        (gzip.compress(torch_bytes()), "found a gzip archive; unpack it"),
        (arrays_bytes(), r"found NumPy arrays \(\.npz\)$"),
        (numpy_bytes(), r"found a NumPy array \(\.npy\)$"),
        (script_bytes(), "found a TorchScript archive; save its tensors and pass that file"),
        (b"GGUF" + bytes(100), "found a GGUF file"),
    ],
)  # fmt: skip
def test_other_files_are_described_in_the_error(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:300] + bytes(80) + raw[380:],
        lambda raw: b"\x80\x02" + raw[50:],
        lambda raw: struct.pack("<Q", 10) + b'{"a": [1]}' + raw[18:],
    ],
)
def test_only_damaged_checkpoints_get_advice(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "damaged.pth"
    path.write_bytes(damage(torch_bytes()))
    with pytest.raises(InputError, match=r"copy or download it again from its source"):
        read_checkpoint(path)
    with pytest.raises(InputError) as caught:
        read_tensors(path, "a score file", mmap=False)
    assert "again" not in str(caught.value)


def test_detected_kinds(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content, kind in (
        (torch_bytes(), Kind.TORCH), (torch_bytes(old=True), Kind.TORCH),
        (save(STATE), Kind.SAFETENSORS), (script_bytes(), Kind.TORCHSCRIPT), (b"", Kind.EMPTY),
        (LFS, Kind.OTHER), (torch_bytes()[:-100], Kind.CUT), (b"\x80\x02K\x01.", Kind.UNKNOWN),
    ):  # fmt: skip
        path.write_bytes(content)
        assert file_kind(path).kind is kind
