"""Values of other libraries in torch.save files: read as data, never as code."""

from __future__ import annotations

import argparse
import datetime
import os
import pickle
import types
from collections import OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pab.core.checkpoints import read_checkpoint
from pab.core.errors import InputError
from pab.core.foreign_values import STAND_INS
from pab.core.state_dicts import model_state
from pab.core.tensor_files import read_tensors

PLAIN = st.sampled_from(["?", "i1", "i2", "i4", "i8", "u1", "u2", "f2", "f4", "f8", "c8", "<U5"])


class Call:
    """Object whose pickle is a call of any function with any arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def read(folder: Path, value: Any, **options: Any) -> dict[str, Any]:
    path = folder / "value.pth"
    torch.save(value, path, **options)
    return read_checkpoint(path)


@pytest.mark.parametrize("old", [False, True])
def test_values_beside_the_weights_are_read(tmp_path: Path, old: bool) -> None:
    held = defaultdict(dict, best=np.float64(87.25))  # type: ignore[var-annotated]
    held["counts"] = defaultdict(int, a=3)
    value = {
        "model": OrderedDict(w=torch.ones(2, dtype=torch.bfloat16), b=np.ones(3, np.float16)),
        "metrics": held,
        "args": argparse.Namespace(lr=np.float32(1e-5), out=Path("a/b"), size=torch.Size([2])),
        "more": types.SimpleNamespace(dtype=torch.float16, kind=np.dtype("f4"), other=np.int64),
        "when": [datetime.datetime(2025, 1, 21, 12), datetime.timedelta(3), datetime.UTC],
        "seen": {1, 2},
        "text": np.array(["ab", "c"]),
        "big": np.array([[1, 2], [3, 4]], ">i4").T,
        "none": np.zeros((0, 3)),
    }
    found = read(tmp_path, value, _use_new_zipfile_serialization=not old)
    assert found["metrics"] == {"best": 87.25, "counts": {"a": 3}}
    assert type(found["metrics"]) is dict
    assert isinstance(found["metrics"]["best"], np.float64)
    assert found["args"].lr == np.float32(1e-5)
    assert found["args"].out == PurePosixPath("a/b")
    assert found["args"].size == torch.Size([2])
    assert found["more"].dtype == torch.float16
    assert found["when"] == value["when"]
    assert found["seen"] == {1, 2}
    assert found["text"].tolist() == ["ab", "c"]
    assert found["big"].tolist() == [[1, 3], [2, 4]]
    assert found["none"].shape == (0, 3)
    state = model_state(found, "f")
    assert state["w"].dtype == torch.bfloat16
    assert state["b"].dtype == torch.float16


@given(
    array=PLAIN.flatmap(
        lambda kind: hnp.arrays(np.dtype(kind), hnp.array_shapes(min_dims=0, min_side=0))
    ),
    fortran=st.booleans(),
)
def test_arrays_come_back_equal(
    tmp_path_factory: pytest.TempPathFactory, array: Any, fortran: bool
) -> None:
    given_array = np.asfortranarray(array) if fortran and array.ndim else array
    found = read(tmp_path_factory.getbasetemp(), {"w": given_array, "s": array.reshape(-1)[:1]})
    assert found["w"].dtype == array.dtype
    np.testing.assert_array_equal(found["w"], array)


NUMPY = np._core.multiarray  # type: ignore[attr-defined]
OBJECTS = np.array([{"a": 1}], dtype=object)
RECORDS = np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (OBJECTS, "found a NumPy array of Python objects"),
        (RECORDS, "found a NumPy array of dtype 'V12'"),
        (np.datetime64("2025-01-21"), "found a NumPy array of dtype 'M8'"),
        (Call(np.dtype, "O", False, True), "found a NumPy array of Python objects"),
        (Call(np.dtype, [("a", "O")]), "found a NumPy array of dtype"),
        (Call(NUMPY.scalar, np.dtype("f8"), b"abc"), "whose bytes do not fit its shape"),
        (Call(NUMPY.scalar, "f8", b"12345678"), "whose bytes do not fit its shape"),
        (Call(dict, [("a", 1)]), "found a call of dict"),
        (Call(np.float64, 1.0), "found a call of float64"),
        (Call(np.load, "x.npy", None, True), "Python object numpy.load"),
        (Call(np.memmap, "x.bin"), "Python object numpy.memmap"),
        (Call(getattr, "a", "upper"), "Python object getattr"),
        (Call(bytes, 10**12), "none or a damaged one|damaged"),
        (defaultdict(os.getcwd), r"Python object (posix|os)\.getcwd"),
        (Call(eval, "1"), "Python object eval"),
    ],
)
def test_hostile_values_are_refused(tmp_path: Path, value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(tmp_path, {"w": torch.ones(1), "extra": value})


class Forged:
    """Object whose pickle is an array with an arbitrary state."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return NUMPY._reconstruct, (np.ndarray, (0,), b"b"), self.state


class ForgedDtype:
    """Object whose pickle is a float64 dtype with the state of a record dtype."""

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {"a": (np.dtype("f4"), 0)}
        return np.dtype, ("f8", False, True), (3, "|", None, ("a",), fields, 8, 1, 0)


@pytest.mark.parametrize(
    "value",
    [
        Forged(1, (1,), ForgedDtype(), False, b"12345678"),
        Forged(1, (10**9,), np.dtype("f8"), False, b"12345678"),
        Forged(1, (-1,), np.dtype("f8"), False, b"12345678"),
        Forged(1, (1,), np.dtype("f8"), False, [object]),
        Forged(1, (1,), "O", False, b"12345678"),
        Forged(1, (1,), np.dtype("f8")),
        Forged(1, 1, np.dtype("f8"), False, b"12345678"),
        Forged(1, (2**70, 0), np.dtype("f8"), False, b"1"),
    ],
)
def test_forged_arrays_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InputError, match=r"value\.pth: expected a checkpoint of tensors and plain"):
        read(tmp_path, {"w": torch.ones(1), "extra": value})


def test_an_array_made_by_a_call_in_the_file_is_empty(tmp_path: Path) -> None:
    """A file must not choose the size of a new array."""
    found = read(tmp_path, {"w": Call(np.ndarray, (10**12,), np.dtype("f8"))})
    assert found["w"].shape == (0,)


def test_no_stand_in_can_run_code() -> None:
    dangerous = (
        "getattr",
        "setattr",
        "eval",
        "exec",
        "import",
        "open",
        "load",
        "memmap",
        "partial",
    )
    assert not [name for name in STAND_INS if any(word in name for word in dangerous)]


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    path = tmp_path / "value.pth"
    value = {"w": np.arange(6.0), "s": np.float32(1), "d": defaultdict(list, a=[1])}
    torch.save(value, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for place in draw.integers(0, len(data), 3):
            data[place] = draw.integers(256)
        path.write_bytes(bytes(data))
        try:
            read_checkpoint(path)
        except InputError:
            refused += 1
    assert refused > 50


def test_another_pickle_protocol_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"default pickle protocol.*save it again without pic"):
        read(tmp_path, {"w": torch.ones(1)}, pickle_protocol=pickle.HIGHEST_PROTOCOL)


def test_threads_that_read_at_the_same_time(tmp_path: Path) -> None:
    """A thread that finishes must not remove the classes that another thread still needs."""
    paths = [tmp_path / f"{number}.pt" for number in range(2)]
    for path in paths:
        torch.save({"names": np.array([f"image {n}" for n in range(2000)])}, path)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda path: read_tensors(path, "names", mmap=True), paths * 40))
    assert all(len(content["names"]) == 2000 for content in found)
