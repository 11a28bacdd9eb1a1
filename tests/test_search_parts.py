"""Indexing in parts: workers build the index of a single process, even if one is killed."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from conftest import draw
from test_search_index import CHOICES, CLIP, Lab, add

from pab.core.errors import InputError
from pab.search import index_command
from pab.search.build import build_index
from pab.search.index import Index
from pab.search.jobs import BuildSettings, Job, Part, Report, Task
from pab.search.previous import Previous
from pab.search.ray_engine import Share, share_of
from pab.search.sources import ArchiveSource, FolderSource, Source
from pab.search.worker import encode_part


def run(lab: Lab, source: Source | None = None, **settings: Any) -> Report:
    """Index in parts that finish in the reverse order."""

    def engine(job: Job, tasks: Sequence[Task]) -> Iterator[Part]:
        old = None if job.manifest is None else Previous(Index(job.index, job.manifest))
        for number in reversed(range(len(tasks))):
            sent = copied((job, tasks[number]))
            yield copied(encode_part(sent[0], number, sent[1], lab.open(), old))

    for one in lab.encoders:
        one.encoded.clear()
    return build_index(
        lab.out, source or FolderSource(lab.photos, recursive=True), CHOICES, unused,
        BuildSettings("float32", **{"block": 2, **settings}), engine,
    )  # fmt: skip


def copied(value: Any) -> Any:
    """Pickle and unpickle a value, as when it is sent to another process."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - made here


def unused() -> Any:
    """Fail: only workers may load the models."""
    raise AssertionError


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def same_rows(one: Path, other: Path) -> float:
    """Compare two indexes row by row; return the largest difference between vector entries."""
    found, expected = Index.open(one), Index.open(other)
    assert list(found.entries()) == list(expected.entries())
    assert [shard.rows for shard in found.manifest.shards] == [
        shard.rows for shard in expected.manifest.shards
    ]
    assert found.manifest.unreadable == expected.manifest.unreadable
    assert found.manifest.complete == expected.manifest.complete
    assert found.members == expected.members
    rows = range(found.rows)
    return max(
        float(np.abs(found.vectors(name, rows) - expected.vectors(name, rows)).max())
        for name in (member.name for member in found.members)
    )


def test_parts_in_any_order_make_the_same_index(lab: Lab, tmp_path: Path) -> None:
    (lab.photos / "4.png").write_bytes(b"no image")
    (lab.photos / "5.png").write_bytes(b"a block without any image")
    report = run(lab)
    assert (report.rows, report.encoded, report.kept) == (5, 5, 0)
    assert report.unreadable.keys() == {"4.png", "5.png"}
    lab.out, parts = tmp_path / "one", lab.out
    assert lab.run(block=2).unreadable == report.unreadable
    assert same_rows(parts, lab.out) == 0
    lab.out = parts
    lab.check()


def test_parts_update_an_index(lab: Lab) -> None:
    """Update new, changed, removed, renamed and touched images as one process does."""
    lab.run()
    lab.change_all()
    report = run(lab)
    assert sorted(lab.encoders[0].encoded) == sorted(lab.encoders[1].encoded) == [
        "3.png", "new.png",
    ]  # fmt: skip
    assert (report.rows, report.encoded, report.reused, report.kept) == (7, 2, 2, 3)
    assert report.removed == 4
    lab.check()
    lab.opened = 0
    assert run(lab).kept == 7
    assert lab.opened == 0


def test_parts_compare_contents_on_request(lab: Lab) -> None:
    lab.run()
    lab.draw("3.png", 21)
    report = run(lab, check_content=True)
    assert (report.kept, report.encoded, report.removed) == (6, 1, 1)
    lab.check()


def test_archives_are_parts(lab: Lab, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    for number in range(3):
        with tarfile.open(tars / f"{number}.tar", "w") as archive:
            for name in ("0.png", "1.png", "2.png"):
                add(archive, name, lab.draw(f"{number}{name}", 10 * number).read_bytes())
            add(archive, "bad.png", b"no image")
    source = ArchiveSource([tars])
    report = run(lab, source)
    assert (report.rows, report.encoded, len(report.unreadable)) == (9, 9, 3)
    lab.out, parts = tmp_path / "one", lab.out
    lab.run(source, block=2)
    assert same_rows(parts, lab.out) == 0
    lab.out = parts
    assert run(lab, source).kept == 9


def test_a_stopped_run_in_parts_resumes(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop while the second part is encoded; the next run removes the unfinished files."""
    true_encode, calls = lab.encoders[1].encode_images, 0

    def stopping(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            half = lab.out / "parts/2_x/img_emb/img_emb_0.npy"
            half.parent.mkdir(parents=True)
            half.write_text("half")
            raise KeyboardInterrupt
        return true_encode(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(lab.encoders[1], "encode_images", stopping)
        with pytest.raises(KeyboardInterrupt, match=r"1 image; resume with the same command"):
            run(lab)
    assert Index.open(lab.out).rows == 1
    report = run(lab)
    assert (report.kept, report.encoded) == (1, 6)
    lab.check()


def test_workers_with_other_models_are_refused(lab: Lab) -> None:
    lab.run()
    lab.draw("new.png", 20)
    lab.encoders[1].weights = "2"
    with pytest.raises(InputError, match="member 'corner': expected weights 1, found 2"):
        run(lab)


@pytest.mark.parametrize(
    ("resources", "workers", "tasks", "expected"),
    [
        ({"CPU": 16, "GPU": 2}, None, 9, Share(2, 8, 1)),
        ({"CPU": 16, "GPU": 2}, 1, 9, Share(1, 16, 1)),
        ({"CPU": 4}, None, 9, Share(4, 1, 0)),
        ({"CPU": 4}, 2, 9, Share(2, 2, 0)),
        ({"CPU": 4}, None, 1, Share(1, 1, 0)),
        ({"CPU": 1, "GPU": 4}, None, 9, Share(4, 1, 1)),
    ],
)  # fmt: skip
def test_workers_share_cores_and_gpus(
    resources: dict[str, float], workers: int | None, tasks: int, expected: Share
) -> None:
    assert share_of(resources, workers, tasks) == expected


@pytest.mark.parametrize("workers", [0, 5])
def test_more_workers_than_gpus_are_refused(workers: int) -> None:
    with pytest.raises(InputError, match=f"--ray_workers: expected 1 to 4 .*4 GPUs.*{workers}"):
        share_of({"CPU": 64, "GPU": 4}, workers, 100)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ray_workers", "2"], "--ray_workers: is only for --engine ray; remove it"),
        (["--ray_address", "auto"], "--ray_address: is only for --engine ray; remove it"),
        (["--engine", "ray", "--ray_workers", "0"], "--ray_workers: must be at least 1, found 0"),
    ],
)
def test_flags_of_ray(tmp_path: Path, flags: list[str], words: str) -> None:
    source = ["--image_folder", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match=words):
        index_command.main([*source, *flags, *CLIP])


def test_a_missing_cluster_is_reported_at_once(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    draw(tmp_path / "photos/a.png", 1, normal=True)
    with socket.socket() as taken:  # bound, but nothing listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = ["--image_folder", str(tmp_path / "photos"), "--out", str(tmp_path / "out")]
        with pytest.raises(InputError, match=f"--ray_address: no Ray cluster at {address}: .*refu"):
            index_command.main([*flags, "--engine", "ray", "--ray_address", address, *CLIP])


# ----------------------------------------------------------------------------------- a real cluster


def ray_workers() -> list[int]:
    """Return the process ids of this run's Ray workers that are encoding a part."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            title = (folder / "cmdline").read_bytes()
            if title.startswith(b"ray::MapWorker") and b"submit" in title and is_ours(folder):
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
    return found


def is_ours(folder: Path) -> bool:
    """Return whether a process is a descendant of this one."""
    while folder.name not in ("0", "1", str(os.getpid())):
        parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        folder = folder.with_name(parent)
    return folder.name == str(os.getpid())


@pytest.fixture
def watch() -> Iterator[Callable[[Callable[[], bool]], None]]:
    """Return a function that calls an action every 20 ms in a thread, until it returns true."""
    stop, threads = Event(), []

    def start(action: Callable[[], bool]) -> None:
        def loop() -> None:
            while not stop.is_set() and not action():
                time.sleep(0.02)

        threads.append(Thread(target=loop))
        threads[-1].start()

    yield start
    stop.set()
    for thread in threads:
        thread.join()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ray_workers_one_of_them_killed(
    tmp_path: Path,
    watch: Callable[[Callable[[], bool]], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Kill a worker in the middle of the run; the other worker and a new one finish the run."""
    pytest.importorskip("ray.data")
    photos, stopped, killed = tmp_path / "photos", list[int](), list[int]()
    photos.mkdir()
    for number in range(30):
        draw(photos / f"{number:02}.jpg", number, normal=number % 2 == 0)
    (photos / "broken.jpg").write_bytes(b"no image")
    parts, one = tmp_path / "parts", tmp_path / "one"
    source = ["--image_folder", str(photos), "--block", "4", "--vectors", "float32"]
    ray = ["--engine", "ray", "--ray_workers", "2"]

    def kill_one() -> bool:
        """Suspend a worker that has begun a part; kill it once the other has finished a part."""
        if not stopped:
            stopped.extend(ray_workers()[:1])
            for worker in stopped:
                os.kill(worker, signal.SIGSTOP)
        elif (parts / "manifest.json").is_file():
            killed.append(Index.open(parts).rows)
            os.kill(stopped[0], signal.SIGKILL)
        return bool(killed)

    watch(kill_one)
    index_command.main([*source, "--out", str(parts), *ray, *CLIP])
    assert 0 < killed[0] < 30, "images in the index when the worker was killed"
    index_command.main([*source, "--out", str(one), *CLIP])
    assert same_rows(parts, one) <= 1e-6
    assert {path.name for path in parts.iterdir()} == {
        ".lock", "img_emb", "manifest.json", "metadata", "unreadable.txt",
    }  # fmt: skip
    assert "30 images encoded" in capfd.readouterr().err
