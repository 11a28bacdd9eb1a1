"""Compare the CPU speed of two commits: `python benchmarks/against_commit.py --base COMMIT`.

Checks out both commits into temporary worktrees, and runs the benchmarks of each commit in the
installed environment. Two processes take turns: after each timed run of one, the other runs, so
that other work on the machine slows both alike. Prints the ratio of the shortest times, new commit
over base, and the median of the ratios of consecutive runs. A row is named after the function that
measures, with a number per measurement. The rows ``product_rate`` time the same matrix product in
both commits, so they show the noise. Rows whose ratio of the shortest times exceeds 1.03 are marked
with OVER.

Benchmarks that time whole commands (``WHOLE``) run alternately from start to end. Their ratios
compare the seconds that they print.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import IO, Any

import machine
from machine import describe, flag_parser

LIMIT = 1.03
BASE = "--model beit3_base_patch16_384"
# Benchmark -> flags that give short runs, and at least five of them.
TURNS = {
    "uit_training": "--batch_size 4 --steps 5",
    "uit_rerank": "--k 10 --queries 32 --gallery 128 --repeats 5",
    "lhp_scoring": f"{BASE} --texts 64 --repeats 5 --no_compile --loop 2 --loop_texts 8",
    "lhp_training": f"{BASE} --steps 5 --memory_batch 8 --chunk 4",
    "clip_blip2_scoring": "--images 4 --texts 64 --loop 1 --repeats 9 --batch_size 4",
}
WHOLE = {
    "fusion": "--repeats 3",
    "feature_cache": "--items 24",
    "training_set_memory": "--pairs 200000",
    "image_check": "--out {folder}/tree",
}
SECONDS = re.compile(r"^(.*?)(\d+(?:\.\d+)?) s\b", re.MULTILINE)  # the first duration in a line
Times = dict[str, list[float]]


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Context with a temporary worktree of a commit of this repository."""
    root = Path(__file__).resolve().parents[1]
    with TemporaryDirectory(prefix="against_") as made:
        tree = Path(made) / "tree"
        git = ["git", "-C", str(root), "worktree"]
        if subprocess.run([*git, "add", "-q", "--detach", str(tree), commit]).returncode:
            sys.exit(f"expected a commit of this repository, found {commit!r}")
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def start(tree: Path, command: list[str], **pipes: Any) -> subprocess.Popen[str]:
    """Start a Python process that imports packages and benchmarks from a worktree."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tree), str(tree / "benchmarks")))}
    return subprocess.Popen([sys.executable, "-P", *command], cwd=tree, env=env, text=True, **pipes)


def run_in_turns(script: Path, turn: IO[str], done: IO[str]) -> None:
    """Run a benchmark that waits for its turn after each timed run (in a child process).

    After each timed run, a JSON object with its name and its seconds is written to `done`. The
    benchmark then waits for a line from `turn`. The name consists of the function that measures,
    and the number of its measurements so far.
    """
    calls: dict[str, int] = defaultdict(int)

    def best_seconds(run: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
        caller = sys._getframe(1).f_code.co_name
        calls[caller] += 1
        name, times = f"{caller} {calls[caller]}", []
        for _ in range(warm_up):
            run()
        for _ in range(repeats):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
            print(json.dumps({"name": name, "seconds": times[-1]}), file=done, flush=True)
            turn.readline()
        return min(times)

    # `machine` is the module of the benchmark's commit, which is first on the path.
    machine.best_seconds = best_seconds
    turn.readline()
    runpy.run_path(str(script), run_name="__main__")


def take_turns(trees: list[Path], name: str, flags: str) -> list[Times]:
    """Run a benchmark of two worktrees in turns; return the seconds of each one's timed runs."""
    running, times = [], [Times(), Times()]
    for tree in trees:
        script = tree / "benchmarks" / f"{name}.py"
        here = [str(Path(__file__).resolve()), "--turns", str(script), *shlex.split(flags)]
        running.append(start(tree, here, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    active = [0, 1]
    try:
        while active:
            for number in list(active):
                process = running[number]
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                line = process.stdout.readline()
                if line:
                    found = json.loads(line)
                    times[number].setdefault(found["name"], []).append(found["seconds"])
                elif process.wait():
                    sys.exit(f"{name} of {trees[number]} ended with code {process.returncode}")
                else:
                    active.remove(number)
    finally:
        for process in running:
            process.kill()  # if the other one failed, it waits for a turn that never comes
    return times


def alternate(trees: list[Path], name: str, flags: str, repeats: int) -> list[Times]:
    """Run a whole benchmark of two worktrees alternately; return the seconds that it prints."""
    times, names = [Times(), Times()], list[str]()
    for repeat in range(repeats):
        for number in (0, 1) if repeat % 2 == 0 else (1, 0):
            command = [f"benchmarks/{name}.py", *shlex.split(flags)]
            process = start(trees[number], command, stdout=subprocess.PIPE)
            printed, _ = process.communicate()
            if process.returncode:
                sys.exit(f"{name} of {trees[number]} ended with code {process.returncode}")
            found = SECONDS.findall(printed)
            names = names or [f"{n + 1}: {text.strip()}" for n, (text, _) in enumerate(found)]
            for timed, (_, seconds) in zip(names, found, strict=True):
                times[number].setdefault(timed, []).append(float(seconds))
    return times


def report(name: str, flags: str, base: Times, new: Times) -> None:
    """Print the ratios of one benchmark, new over base."""
    print(f"{name} {flags}")
    for timed in base:
        if timed not in new:
            print(f"  {timed}: only in the base")
            continue
        best = min(base[timed]), min(new[timed])
        if not best[0]:
            continue  # printed as 0.0 s
        pairs = [b / a for a, b in zip(base[timed], new[timed], strict=False) if a]
        ratio = best[1] / best[0]
        print(
            f"  {timed[:32]:32s} {best[0]:8.3f} s -> {best[1]:8.3f} s  shortest {ratio:.3f}  "
            f"median of {len(pairs)} {median(pairs):.3f}{'  OVER' if ratio > LIMIT else ''}",
            flush=True,
        )


def main() -> None:
    args = flag_parser(
        __doc__,
        base=str,
        new="HEAD",
        only=([*TURNS, *WHOLE], "benchmarks to run"),
        repeats=(3, "runs of the benchmarks that run as a whole"),
    ).parse_args()
    unknown = [name for name in args.only if name not in TURNS | WHOLE]
    if unknown:
        sys.exit(f"--only: expected {', '.join(TURNS | WHOLE)}, found {', '.join(unknown)}")
    print(f"{describe()}; base {args.base}, new {args.new}, limit {LIMIT}", flush=True)
    with worktree(args.base) as base, worktree(args.new) as new, TemporaryDirectory() as folder:
        for name in args.only:
            flags = (TURNS | WHOLE)[name].format(folder=folder)
            if name in TURNS:
                found = take_turns([base, new], name, flags)
            else:
                found = alternate([base, new], name, flags, args.repeats)
            report(name, flags, *found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--turns"]:
        script = Path(sys.argv[2])
        sys.argv = sys.argv[2:]
        # The parent reads the timed runs from stdout; the benchmark's own output is discarded.
        done, sys.stdout = sys.stdout, Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        run_in_turns(script, sys.stdin, done)
    else:
        main()
