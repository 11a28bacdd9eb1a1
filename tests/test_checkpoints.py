"""Checkpoints: safe reading, strict loading, equal bytes for equal weights, failed saves."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import random
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pab.core.checkpoints import (
    TrainingState,
    checkpoint_hash,
    load_strict,
    model_state,
    read_checkpoint,
    save_training_state,
    save_weights,
)
from pab.core.errors import InputError
from tests.small_model import same, small_model, values

CPU = torch.device("cpu")


class Touch:
    """Object whose unpickling would make a folder, as a malicious checkpoint could."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Custom:
    pass


# Reading


def released(folder: Path, *, old: bool = False) -> Path:
    """Save a checkpoint like the released ones; ``old`` selects the format before PyTorch 1.6."""
    path = folder / "released.pth"
    content = {
        "model": small_model().state_dict(),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-5, model="large"),
    }
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    return path


@pytest.mark.parametrize("old", [False, True])
def test_released_format_is_read(tmp_path: Path, old: bool) -> None:
    path = released(tmp_path, old=old)
    checkpoint = read_checkpoint(path)
    assert checkpoint["epoch"] == 3
    assert checkpoint["args"].lr == 1e-5
    assert same(model_state(checkpoint, path), dict(small_model().state_dict()))


def test_new_format_stays_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "big.pth"
    torch.save({"model": {"w": torch.zeros(4_000_000)}}, path)
    code = (
        "import sys, resource; from pab.core.checkpoints import read_checkpoint\n"
        "def rss(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "before = rss(); c = read_checkpoint(sys.argv[1]); print(rss() - before)"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to measure the memory")
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 8_000_000  # the tensor alone is 16 MB


@pytest.mark.parametrize("kind", ["zip", "old", "bare pickle", "nested"])
def test_malicious_pickle_runs_nothing(tmp_path: Path, kind: str) -> None:
    mark, path = tmp_path / "ran", tmp_path / "evil.pth"
    content: Any = {"model": {"w": torch.ones(2)}, "extra": Touch(mark)}
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps({"extra": Touch(mark)}, protocol=2))
    elif kind == "nested":
        torch.save({"args": argparse.Namespace(inner=[Touch(mark)])}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(InputError, match=r"found the Python object \w+\.mkdir; it was not loaded"):
        read_checkpoint(path)
    assert not mark.exists()


def test_other_python_objects_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "custom.pt"
    torch.save({"model": Custom()}, path)
    with pytest.raises(InputError, match=r"Python object \S*Custom"):
        read_checkpoint(path)


def test_damaged_and_foreign_files_are_refused_in_one_line_without_warnings(tmp_path: Path) -> None:
    whole = released(tmp_path).read_bytes()
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a.txt", "a")
    bad = {
        "empty.pth": b"",
        "text.pth": b"hello\nworld\n",
        "page.bin": b"<html>404</html>",
        "half.pth": whole[: len(whole) // 2],
        "head.pth": whole[:10],
        "zip.pth": (tmp_path / "zip").read_bytes(),
        "pickle4.pth": pickle.dumps({"a": 1}, protocol=4)[:-5],
        "empty.safetensors": b"",
        "text.safetensors": b"hello, world, this is text",
        "list.pth": None,
    }
    for name, content in bad.items():
        path = tmp_path / name
        if content is None:
            torch.save([torch.ones(2)], path)
        else:
            path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(InputError) as caught:
                read_checkpoint(path)
        assert str(path) in str(caught.value), name
        assert "\n" not in str(caught.value), name
        assert "weights_only" not in str(caught.value), name  # never suggest disabling it


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    draw = random.Random(0)
    contents = [released(tmp_path).read_bytes(), released(tmp_path, old=True).read_bytes()]
    refused = 0
    for _ in range(300):
        data = bytearray(draw.choice(contents))
        if draw.random() < 0.3:
            data = data[: draw.randrange(len(data))]
        for _ in range(draw.randrange(1, 5)):
            if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
        path = tmp_path / "damaged.pth"
        path.write_bytes(bytes(data))
        try:
            read_checkpoint(path)
        except InputError:
            refused += 1
    assert refused > 50


def test_torchscript_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(nn.Linear(2, 2)).save(str(path))
    with pytest.raises(InputError, match="found a TorchScript archive"):
        read_checkpoint(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(InputError, match="found a directory"):
        read_checkpoint(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        checkpoint_hash(tmp_path / "none.pth")


# Finding the weights


@pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
def test_weights_are_found_where_releases_keep_them(key: str | None) -> None:
    state = {"a.weight": torch.ones(2)}
    assert same(model_state(state if key is None else {key: state, "epoch": 1}, "f"), state)


def test_a_wrapper_prefix_is_removed_only_if_all_names_have_it() -> None:
    one, two = torch.ones(1), torch.zeros(1)
    assert set(model_state({"model": {"module.a": one, "module.b": two}}, "f")) == {"a", "b"}
    assert set(model_state({"model": {"module.a": one, "b": two}}, "f")) == {"module.a", "b"}


def test_a_file_without_weights_is_refused() -> None:
    with pytest.raises(InputError, match="f, entry 'epoch': expected a tensor, found int"):
        model_state({"epoch": 3}, "f")
    with pytest.raises(InputError, match="found an empty dict"):
        model_state({"model": {}}, "f")
    with pytest.raises(InputError, match=r"entry 'a': expected a tensor, found list"):
        model_state({"model": {"a": [1.0]}}, "f")


# Loading


def test_loading_copies_everything_and_reports_it() -> None:
    source, target = small_model(), small_model()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    report = load_strict(target, source.state_dict(), "f")
    assert same(values(target), values(source))
    assert set(report.loaded) == set(source.state_dict())
    assert (report.missing, report.unexpected, report.ignored) == ((), (), ())


def broken(**changes: Tensor | None) -> dict[str, Tensor]:
    state = values(small_model())
    for name, tensor in changes.items():
        key = name.replace("__", ".").removeprefix("n")
        if tensor is None:
            del state[key]
        else:
            state[key] = tensor
    return state


NAN_WEIGHT = torch.zeros(2, 4)
NAN_WEIGHT[1, 2] = float("nan")
CANCELLING = torch.zeros(2, 4)
CANCELLING[0, 0], CANCELLING[0, 1] = float("inf"), float("-inf")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (broken(n0__weight=None), "1 missing: 0.weight"),
        (broken(extra=torch.ones(1)), "1 unexpected: extra"),
        (broken(n0__weight=torch.ones(3, 3)), "0.weight (expected [4, 3], found [3, 3])"),
        (broken(n2__bias=torch.ones(2, dtype=torch.long)), "2.bias (expected torch.float32"),
        (
            broken(n2__weight=NAN_WEIGHT),
            "tensor '2.weight': expected finite weights, found NaN or infinity in 1 of 8",
        ),
        (broken(n2__weight=CANCELLING), "found NaN or infinity in 2 of 8"),
        (broken(n1__running_var=torch.full((4,), torch.inf)), "tensor '1.running_var'"),
        ({f"x{i}": torch.ones(1) for i in range(9)}, "and 4 more"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_unchanged(
    state: dict[str, Tensor], words: str
) -> None:
    model = small_model()
    before = values(model)
    shifted = {name: t + 1 if name.startswith("0") else t for name, t in state.items()}
    with pytest.raises(InputError) as caught:
        load_strict(model, shifted, "file.pth")
    assert words in str(caught.value)
    assert str(caught.value).startswith("file.pth")
    assert same(values(model), before)


@pytest.mark.parametrize("count", [7.0, float("inf")])
def test_a_cast_batch_counter_is_ignored(count: float) -> None:
    """A cast of all tensors to float16 also casts the integer counters of BatchNorm."""
    state = broken(n1__num_batches_tracked=torch.tensor(count, dtype=torch.float16))
    model = small_model()
    report = load_strict(model, state, "f")
    assert report.ignored == ("1.num_batches_tracked",)
    assert values(model)["1.num_batches_tracked"] == 0


def test_allowed_differences_are_reported() -> None:
    state = broken(n0__weight=None, extra=torch.ones(1), n2__bias=torch.ones(7))
    model = small_model()
    report = load_strict(
        model, state, "f", allow_missing=["0.*"], allow_unexpected=["extra"], ignore=["2.b*"]
    )
    assert report.missing == ("0.weight",)
    assert report.unexpected == ("extra",)
    assert report.ignored == ("2.bias",)
    assert "2.bias" not in report.loaded


def test_allowing_one_name_does_not_allow_another() -> None:
    state = broken(n0__weight=None, n2__weight=None)
    with pytest.raises(InputError, match=r"1 missing: 2\.weight"):
        load_strict(small_model(), state, "f", allow_missing=["0.weight"])


def test_large_finite_weights_are_not_called_infinite() -> None:
    model = nn.Linear(4, 1, bias=False)
    big = torch.full((1, 4), 3e38)  # the sum overflows, the numbers do not
    load_strict(model, {"weight": big}, "f")
    assert torch.equal(model.weight, big)


def test_weights_are_converted_to_the_dtype_of_the_model() -> None:
    model = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    load_strict(model, {"weight": torch.tensor([[1.0, 0.1]])}, "f")
    assert model.weight.dtype == torch.bfloat16
    assert model.weight[0, 1] == torch.tensor(0.1, dtype=torch.bfloat16)
    half = nn.Linear(2, 1, bias=False).to(torch.float16)
    with pytest.raises(InputError, match=r"range of torch.float16, found larger ones: 1 of 2"):
        load_strict(half, {"weight": torch.tensor([[1.0, 1e6]])}, "f")
    half_state = {"weight": torch.tensor([[0.1, 1.0]], dtype=torch.float16)}
    single = nn.Linear(2, 1, bias=False)
    load_strict(single, half_state, "f")
    assert single.weight.dtype == torch.float32


# Saving weights


@pytest.mark.parametrize("extension", [".safetensors", ".pth", ".pt"])
def test_saved_weights_are_read_back(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"weights{extension}"
    base = torch.arange(12.0)
    state = {
        "tied": base[:6].view(2, 3),
        "tied_again": base[:6].view(2, 3),
        "turned": base.view(3, 4).t(),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "count": torch.tensor(3),
        "parameter": nn.Parameter(torch.ones(1)),
    }
    save_weights(path, state, {"model": "tiny", "läuft": 'ja "\n'})
    checkpoint = read_checkpoint(path)
    assert same(model_state(checkpoint, path), {k: v.detach() for k, v in state.items()})
    assert checkpoint["metadata"] == {"model": "tiny", "läuft": 'ja "\n'}
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    path = tmp_path / "view.pth"
    save_weights(path, {"row": torch.zeros(1000, 1000)[0]})
    assert path.stat().st_size < 20_000


@pytest.mark.parametrize("extension", [".safetensors", ".pth"])
def test_same_weights_give_same_bytes_in_another_process(tmp_path: Path, extension: str) -> None:
    code = (
        "import sys, torch; from pab.core.checkpoints import save_weights\n"
        "save_weights(sys.argv[1], {'b': torch.ones(3), 'a': torch.zeros(2)},"
        " {k: k for k in sys.argv[2]})"
    )
    hashes = set()
    for number, keys in enumerate(("qwertyuiop", "poiuytrewq")):
        path = tmp_path / f"file{number}{extension}"
        subprocess.run([sys.executable, "-c", code, str(path), keys], check=True)
        hashes.add(checkpoint_hash(path))
    assert len(hashes) == 1
    assert hashes == {hashlib.sha256(path.read_bytes()).hexdigest()}


def test_another_extension_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected the extension \.safetensors, \.pth or \.pt"):
        save_weights(tmp_path / "weights.bin", {"a": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pth"
    path.write_bytes(b"old")
    state = TrainingState({}, {"lr_lambda": lambda step: step}, 0, 0, 0, [], {})
    with pytest.raises(TypeError, match=r"optimizer\['lr_lambda'\]: function cannot be stored"):
        save_training_state(path, state)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["state.pth"]
