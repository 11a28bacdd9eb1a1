"""Several processes compute the same as one; lost processes and bad torchrun variables."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pab.core import devices, gradients, processes
from pab.core.errors import InputError, LostProcessError
from pab.core.gradients import GradientAverage

CPU = torch.device("cpu")
# Seconds until processes count as hanging. On shared cores, four processes have needed more than
# 120 s to import torch.
WAIT = 600.0


# Imported once, by the server that forks the processes, because the imports take seconds. The list
# covers the imports of the test modules, so that no process imports them after joining a group.
PRELOADED = [
    "torch", "open_clip", "transformers.models.blip_2.modeling_blip_2", "tests.conftest",
    "lhp.train", "uit.run",
]  # fmt: skip


def _entry(
    rank: int,
    environment: dict[str, str],
    world: int,
    port: int,
    work: Callable[[Path], Any],
    folder: Path,
) -> None:
    os.environ.clear()  # the server keeps the environment of its own start
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    torch.set_num_threads(1)
    with processes.joined(CPU):
        group = reference_to_group()
        torch.save(work(folder), folder / f"{rank}.pt")
    assert group() is None, "a reference keeps the group, and gloo's threads, alive"


def reference_to_group() -> weakref.ReferenceType[dist.ProcessGroup]:
    """Return a weak reference to the group that the processes have joined."""
    assert dist.group.WORLD is not None
    return weakref.ref(dist.group.WORLD)


def free_port() -> int:
    """Return a free port outside the ephemeral range, so that no outgoing connection takes it."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:  # in use
                continue
            return port
    raise AssertionError("no free port among a hundred")


def run_in(
    world: int, work: Callable[[Path], Any], folder: Path, start: str = "forkserver"
) -> list[Any]:
    """Return the results of ``work`` in ``world`` new processes, by rank.

    Args:
        start: "spawn" for new interpreters, which have imported only what ``work`` needs.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    given = ({**os.environ}, world, free_port(), work, folder)
    context = mp.start_processes(_entry, given, world, join=False, start_method=start)
    assert context is not None
    end = time.monotonic() + WAIT
    while not context.join(timeout=1.0):  # True once all have ended; re-raises their error
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise AssertionError("the processes hang")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


class DualEncoder(nn.Module):
    """Two small towers, a logit scale, and one unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Linear(5, 6)
        self.text = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6))
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.unused = nn.Parameter(torch.ones(3))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(8, 5, generator=generator), torch.randn(8, 4, generator=generator)


def info_nce(model: DualEncoder, images: Tensor, texts: Tensor) -> Tensor:
    """Return symmetric InfoNCE of this process's rows against the rows of all processes."""
    image = nn.functional.normalize(model.image(images), dim=-1)
    text = nn.functional.normalize(model.text(texts), dim=-1)
    all_images = processes.all_gather_with_grad(image)
    all_texts = processes.all_gather_with_grad(text)
    first = processes.rank() * len(image)
    target = torch.arange(first, first + len(image))
    scale = model.scale.exp()
    cross_entropy = nn.functional.cross_entropy
    loss = cross_entropy(scale * image @ all_texts.t(), target)
    return (loss + cross_entropy(scale * text @ all_images.t(), target)) / 2


def averaged(model: nn.Module, average: GradientAverage) -> dict[str, Tensor | None]:
    """Return every parameter's gradient, averaged over processes; None if no process has one."""
    average.without_fractions(average.finish(torch.zeros(0)).tolist())
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def loss_and_gradients(folder: Path) -> dict[str, Tensor | None]:
    model = DualEncoder()
    count = 8 // processes.world_size()
    rows = slice(processes.rank() * count, (processes.rank() + 1) * count)
    images, texts = batch()
    loss = info_nce(model, images[rows], texts[rows])
    average = GradientAverage(model.parameters())
    with average.last_backward():
        loss.backward()
    return {"loss": processes.reduce_mean(loss), **averaged(model, average)}


def in_small_buckets(folder: Path) -> dict[str, Tensor | None]:
    gradients.BUCKET_ELEMENTS = 40  # so that this small model needs several buckets
    return loss_and_gradients(folder)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_contrastive_gradient_equals_one_process_on_the_whole_batch(
    tmp_path: Path, world: int
) -> None:
    alone = loss_and_gradients(tmp_path)
    for result in run_in(world, in_small_buckets, tmp_path):
        assert result["unused"] is None
        for name, wanted in alone.items():
            if wanted is not None:
                torch.testing.assert_close(result[name], wanted.detach(), rtol=1e-5, atol=1e-7)
    scale = alone["scale"]
    assert scale is not None
    assert abs(scale) > 1e-3  # the compared gradient is not zero


def ddp_gradients(folder: Path) -> dict[str, Tensor | None]:
    model = DualEncoder()
    wrapped = nn.parallel.DistributedDataParallel(Whole(model), find_unused_parameters=True)
    count = 8 // processes.world_size()
    rows = slice(processes.rank() * count, (processes.rank() + 1) * count)
    images, texts = batch()
    wrapped(images[rows], texts[rows]).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


class Whole(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return info_nce(self.model, images, texts)


@pytest.mark.distributed
def test_gradients_are_right_under_distributed_data_parallel(tmp_path: Path) -> None:
    alone = loss_and_gradients(tmp_path)
    wanted = alone["text.0.weight"]
    assert wanted is not None
    for result in run_in(2, ddp_gradients, tmp_path):
        torch.testing.assert_close(result["text.0.weight"], wanted, rtol=1e-5, atol=1e-7)


def everything_else(folder: Path) -> dict[str, Any]:
    rank = processes.rank()
    result: dict[str, Any] = {
        "rank": rank,
        "world": processes.world_size(),
        "main": processes.is_main(),
        "share": list(processes.share_of(7)),
        "broadcast": processes.broadcast_object({"from": rank}),
        "objects": processes.gather_objects(f"r{rank}"),
        "mean": processes.reduce_mean(torch.tensor([float(rank), 1.0])),
    }
    # Uneven shares; each row holds its id
    ids = list(processes.share_of(7))
    rows = torch.tensor([[float(i), -float(i)] for i in ids])
    result["uneven"] = processes.assemble(ids, rows, 7, CPU)
    # One process has all rows, and the ids are unordered
    some = [3, 1, 0, 2] if rank == 1 else []
    result["one"] = processes.assemble(
        some, torch.tensor(some).float()[:, None] if some else None, 4, CPU
    )
    # A gradient in one process only
    parameter = nn.Parameter(torch.ones(2))
    if rank == 0:
        parameter.grad = torch.tensor([3.0, 6.0])
    GradientAverage([parameter]).finish(torch.zeros(0))
    result["partial"] = parameter.grad
    processes.barrier()
    # A lost row is an error
    try:
        processes.assemble([rank + 1], torch.ones(1, 1), 3, CPU)
        result["lost"] = ""
    except ValueError as error:
        result["lost"] = str(error)
    return result


@pytest.mark.distributed
def test_three_processes_gather_every_row_once(tmp_path: Path) -> None:
    results = run_in(3, everything_else, tmp_path)
    wanted = torch.tensor([[float(i), -float(i)] for i in range(7)])
    for rank, result in enumerate(results):
        assert (result["rank"], result["world"], result["main"]) == (rank, 3, rank == 0)
        assert result["broadcast"] == {"from": 0}
        assert result["objects"] == ["r0", "r1", "r2"]
        assert torch.equal(result["mean"], torch.ones(2))
        assert torch.equal(result["partial"], torch.tensor([1.0, 2.0]))
        assert torch.equal(result["uneven"], wanted)
        assert torch.equal(result["one"][:, 0], torch.arange(4.0))
        assert "missing [0], repeated or out of range [3]" in result["lost"]
    assert sorted(i for result in results for i in result["share"]) == list(range(7))


DIES = """
import os, signal, sys, torch
from pab.core import processes
from pab.core.errors import run_cli

def main(argv):
    with processes.joined(torch.device("cpu")):
        for step in range(100_000):
            processes.reduce_mean(torch.ones(1000))
            if step == 50 and processes.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

run_cli(main)
"""


def shared_statistics(folder: Path) -> dict[str, Tensor]:
    """Return batch norm's buffers after sharing, and this process's own mean before sharing."""
    norm = nn.BatchNorm1d(3)
    torch.manual_seed(processes.rank())
    norm(torch.randn(8, 3))
    own = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    processes.share_buffers(norm)
    return {"own": own["running_mean"], **dict(norm.named_buffers())}


@pytest.mark.distributed
def test_all_processes_get_the_statistics_of_the_main_process(tmp_path: Path) -> None:
    first, second = run_in(2, shared_statistics, tmp_path)
    assert not torch.equal(first["own"], second["own"])
    for found in (first, second):
        assert torch.equal(found["running_mean"], first["own"])
    assert torch.equal(first["running_var"], second["running_var"])


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_missing_or_bad_torchrun_variables_are_refused(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(InputError, match=f"{missing}: expected"):
        processes.init_processes(CPU)
    for value in ("first", "\N{SUPERSCRIPT TWO}"):
        monkeypatch.setenv("LOCAL_RANK", value)
        with pytest.raises(InputError, match="LOCAL_RANK: expected a number"):
            devices.local_rank_of_torchrun()


@pytest.mark.distributed
def test_a_process_that_dies_ends_the_others() -> None:
    started = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", DIES],
            env={**os.environ, **started, "RANK": str(number), "GLOO_SOCKET_IFNAME": "lo"},
            cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True,
        )
        for number in range(3)
    ]  # fmt: skip
    try:
        ends = [(child.communicate(timeout=WAIT)[1], child.returncode) for child in children]
    finally:
        for child in children:
            child.kill()
    assert ends[1][1] == -signal.SIGKILL
    for number in (0, 2):
        message, code = ends[number]
        assert code == 1
        lost = "has lost the connection to another process ("
        assert f"error: process {number} of 3 {lost}" in message
        assert "Traceback" not in message


def import_late(folder: Path) -> dict[str, Any]:
    """Import a module that torch imports lazily, while the group exists."""
    assert "torch._dynamo" not in sys.modules
    importlib.import_module("torch._dynamo")
    return {"module": "torch.distributed.nn.functional" in sys.modules}


@pytest.mark.distributed
def test_modules_imported_late_do_not_keep_the_group(tmp_path: Path) -> None:
    assert run_in(2, import_late, tmp_path, start="spawn") == [{"module": True}] * 2


def lose_the_other(folder: Path) -> dict[str, Any]:
    """Fail in process 1 while process 0 waits; check the group while the exception still exists."""
    group = reference_to_group()
    try:
        with processes.joined(CPU):
            if processes.rank() == 1:
                raise InputError("query.json", "expected a caption")
            processes.gather_objects("waits")
        raise AssertionError("the loss was not noticed")
    except (InputError, LostProcessError) as error:
        return {"error": type(error).__name__, "left": group() is None}


@pytest.mark.distributed
def test_an_error_does_not_keep_the_group(tmp_path: Path) -> None:
    assert run_in(2, lose_the_other, tmp_path) == [
        {"error": "LostProcessError", "left": True},
        {"error": "InputError", "left": True},
    ]


# One process alone


def test_one_process_needs_no_group() -> None:
    assert not dist.is_initialized()
    assert (processes.rank(), processes.world_size(), processes.is_main()) == (0, 1, True)
    rows = torch.ones(2, 3, requires_grad=True)
    assert processes.all_gather_with_grad(rows) is rows
    assert processes.gather_objects("x") == ["x"]
    assert processes.broadcast_object("x") == "x"
    assert list(processes.share_of(3)) == [0, 1, 2]
    value = torch.tensor(2.0, requires_grad=True)
    assert processes.reduce_mean(value).requires_grad is False
    processes.barrier()
    processes.close()


@pytest.mark.parametrize(
    ("ids", "total", "words"),
    [
        ([0, 2], 2, r"missing \[1\], repeated or out of range \[2\]"),
        ([0, 1], 3, r"expected the ids 0 to 2, each once; missing \[2\]"),
        ([0, 0], 1, r"repeated or out of range \[0\]"),
        ([-1, 0], 1, r"repeated or out of range \[-1\]"),
        ([0], 1, "one id per row, found 1 for 2"),
    ],
)
def test_lost_and_foreign_ids_are_errors(ids: list[int], total: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        processes.assemble(ids, torch.ones(2, 1), total, CPU)


def test_an_incomplete_torchrun_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match="WORLD_SIZE: expected a number from 1, found None"):
        processes.init_processes(CPU)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputError, match="found 'two'"):
        processes.init_processes(CPU)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RANK", "2", "a number from 0 to 1"),
        ("RANK", "-1", "a number from 0 to 1"),
        ("WORLD_SIZE", "0", "a number from 1"),
        ("WORLD_SIZE", "²", "a number from 1"),
        ("MASTER_PORT", "0", "a number from 1 to 65535"),
        ("MASTER_PORT", "65536", "a number from 1 to 65535"),
    ],
)
def test_numbers_that_torchrun_never_sets_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for known, usual in (given | {name: value}).items():
        monkeypatch.setenv(known, usual)
    with pytest.raises(InputError, match=f"{name}: expected {expected}, found '{value}'"):
        processes.init_processes(CPU)


def test_a_port_in_use_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=rf"127.0.0.1:{port}: process 0 of 1 .*EADDRINUSE"):
            processes.init_processes(CPU)
    assert not dist.is_initialized()


@pytest.mark.parametrize("agent", [True, False])
def test_a_process_that_never_joins_ends_the_wait(
    monkeypatch: pytest.MonkeyPatch, agent: bool
) -> None:
    """With torchrun's agent, the agent hosts the store; otherwise process 0 does."""
    port = free_port()
    given = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "JOIN_TIMEOUT", timedelta(seconds=1))
    expected = f"127.0.0.1:{port}: process 0 of 3 cannot join the others: Timed out"
    if agent:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        store.set("joined/2", "")
        expected = (
            f"127.0.0.1:{port}: expected 3 processes to join within 1 s, missing: process 1; see"
        )
    else:
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(InputError) as error:
        processes.init_processes(CPU)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)
    assert not dist.is_initialized()


def test_one_process_sorts_rows_by_id() -> None:
    rows = torch.arange(6.0).reshape(3, 2)
    found = processes.assemble([2, 0, 1], rows, 3, CPU)
    assert found.tolist() == [[2.0, 3.0], [4.0, 5.0], [0.0, 1.0]]
