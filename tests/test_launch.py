"""Starting with torchrun on one or more machines: settings, errors, two emulated machines."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException

from pab.core.errors import InputError
from pab.core.launch import main, rendezvous
from pab.training.run_log import read_log
from tests.conftest import MODEL
from tests.test_processes import WAIT, free_port

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


def given(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Set these launch variables, and remove the others."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ({}, "--standalone"),
        ({"MASTER_ADDR": "node-0"}, "--standalone"),  # some clusters always set it
        ({"NNODES": "1", "NODE_RANK": "0"}, "--standalone"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-0"},
            "--nnodes 2 --node_rank 1 --master_addr node-0 --master_port 29500",
        ),
        (
            {"NNODES": "4", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"},
            "--nnodes 4 --node_rank 0 --master_addr 10.0.0.1 --master_port 1234",
        ),
    ],
)
def test_machines_become_flags_of_torchrun(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], flags: str
) -> None:
    given(monkeypatch, **values)
    assert " ".join(rendezvous()) == flags
    seen: list[str] = []
    monkeypatch.setattr(torch.distributed.run, "main", seen.extend)
    main(["4", "lhp.train", "--lr", "1"])
    assert " ".join(seen) == f"{flags} --nproc_per_node 4 -m lhp.train --lr 1"


def test_warnings_are_suppressed_only_while_processes_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given(monkeypatch)
    seen = []
    logger = logging.getLogger("torch.distributed.run")

    def run(words: list[str]) -> None:
        seen.append(logger.isEnabledFor(logging.WARNING))
        raise SignalException("stopped", signal.SIGTERM)

    monkeypatch.setattr(torch.distributed.run, "main", run)
    assert logger.isEnabledFor(logging.WARNING)
    with pytest.raises(SystemExit) as error:
        main(["2", "lhp.train"])
    assert error.value.code == 128 + signal.SIGTERM
    assert seen == [False]
    assert logger.isEnabledFor(logging.WARNING)


TWO = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node-0"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"NNODES": "two"}, "NNODES: expected a number from 1, found 'two'"),
        ({"NNODES": "0"}, "NNODES: expected a number from 1, found '0'"),
        ({"NODE_RANK": "1"}, "NODE_RANK: expected a number from 0 to 0, found '1'"),
        ({"NNODES": "2"}, "NODE_RANK: expected a number from 0 to 1, found None"),
        (TWO | {"NODE_RANK": "2"}, "NODE_RANK: expected a number from 0 to 1, found '2'"),
        (TWO | {"MASTER_ADDR": ""}, "MASTER_ADDR: expected the address of machine 0, found ''"),
        (TWO | {"MASTER_ADDR": "a b"}, "MASTER_ADDR: expected the address of machine 0"),
        (TWO | {"MASTER_PORT": "0"}, "MASTER_PORT: expected a number from 1 to 65535, found '0'"),
    ],
)
def test_wrong_machines_are_refused(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], expected: str
) -> None:
    given(monkeypatch, **values)
    with pytest.raises(InputError) as error:
        rendezvous()
    assert str(error.value).startswith(expected)
    assert "set NNODES, NODE_RANK and MASTER_ADDR on every machine" in str(error.value)


@pytest.mark.parametrize("script", ["finetune_lhp", "finetune_uit"])
def test_the_scripts_report_a_wrong_machine_in_one_line(
    script: str, tiny_data: Path, tmp_path: Path
) -> None:
    flags = ["--device", "cpu", "--data_path", tiny_data, "--output_dir", tmp_path / "out"]
    if script == "finetune_uit":
        flags += ["--dist", "f1", "--debug"]
    done = subprocess.run(
        ["bash", ROOT / f"scripts/{script}.sh", *flags], capture_output=True, text=True,
        env={**os.environ, "NNODES": "2", "NODE_RANK": "0"}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: MASTER_ADDR: expected the address of machine 0, found ''; set NNODES, NODE_RANK "
        "and MASTER_ADDR on every machine, or none of them"
    ]


@pytest.mark.parametrize("gpus", ["none", "0", "1.5"])
def test_the_number_of_gpus_is_checked(gpus: str) -> None:
    with pytest.raises(InputError, match="GPUS: expected a number of GPUs per machine, found"):
        main([gpus, "lhp.train"])


@pytest.mark.distributed
@pytest.mark.slow
def test_two_machines_train_as_one(tiny_data: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": MODEL, "input_size": 64, "sentencepiece_model": tokenizer_file, "batch_size": 4,
        "data_path": tiny_data, "output_dir": tmp_path / "out", "device": "cpu", "dtype": "fp32",
        "epochs": 1, "num_workers": 0, "max_steps": 2, "cache_dir": tmp_path / "cache",
        "log_dir": "none", "finetune": "",
    }  # fmt: skip
    flags = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    port = str(free_port())
    started = [
        subprocess.Popen(
            ["bash", ROOT / "scripts/finetune_lhp.sh", *flags], stderr=subprocess.PIPE, text=True,
            env={
                **os.environ, "GPUS": "1", "NNODES": "2", "NODE_RANK": str(number),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo",
            },
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        for machine in started:
            _, said = machine.communicate(timeout=WAIT)
            assert machine.returncode == 0, said
    finally:
        for machine in started:
            machine.kill()
    assert len(read_log(tmp_path / "out/log.jsonl", "train")) == 2
