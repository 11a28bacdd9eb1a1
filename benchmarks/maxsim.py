"""Measure speed and memory of MaxSim: `python benchmarks/maxsim.py`.

The image vectors are synthetic unit vectors in fp16, in a memory-mapped file as in
`scripts/embed_infer.py`. Prints the rates of MaxSim and of a plain fp32 matrix product of the same
shape. Also prints the peak of anonymous memory, without pages of the file, which the system can
evict. The two rates are measured alternately, slice by slice, so that other processes disturb both
equally.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from machine import AnonymousPeak, anonymous_mib, describe, flag_parser, in_fresh_process, peak_mib
from torch import Tensor

from pab.encoders.st.maxsim import maxsim
from pab.scoring.mapped_rows import map_rows

BLOCK = 256  # images written at a time
COLUMNS = 1 << 13  # of the plain product; its result takes 200 MB for 200 captions of 32 vectors
SLICES = 10


def unit(*shape: int) -> Tensor:
    """Draw random vectors of unit length."""
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def write_images(path: Path, images: int, vectors: int, width: int) -> None:
    """Write image vectors [images, vectors * width] in fp16: one random block, repeated."""
    torch.manual_seed(0)
    block = unit(BLOCK, vectors, width).half().numpy().tobytes()
    row = len(block) // BLOCK
    with path.open("wb") as file:
        for start in range(0, images, BLOCK):
            file.write(block[: row * min(BLOCK, images - start)])


def plain_product(texts: Tensor, images: Tensor, out: Tensor) -> None:
    """Multiply text vectors [T, D] by all image vectors in fp32; ``out`` holds one block."""
    vectors = images.view(-1, texts.shape[1])
    for start in range(0, len(vectors), COLUMNS):
        block = vectors[start : start + COLUMNS].float()
        torch.mm(texts, block.T, out=out[:, : len(block)])


def measure(path: Path, shape: tuple[int, int, int], queries: int, words: int) -> str:
    """Score all images; describe the time and the peak memory in one line."""
    images = map_rows(path, (shape[0], shape[1] * shape[2]), torch.float16)
    texts = unit(queries, words, shape[2]).flatten(1)
    before = anonymous_mib()
    with AnonymousPeak() as peak:
        start = time.perf_counter()
        maxsim(texts, images, shape[2])
        seconds = time.perf_counter() - start
    mapped = images.nbytes / 2**20
    return (
        f"{seconds:.1f} s; peak {peak.most:.0f} MiB anonymous, {peak.most - before:.0f} MiB more "
        f"than before; peak RSS {peak_mib():.0f} MiB, {peak_mib() - mapped:.0f} MiB beyond the "
        f"mapped file of {mapped:.0f} MiB"
    )


def main() -> None:
    args = flag_parser(
        __doc__,
        images=20000,
        queries=200,
        vectors=(256, "vectors per image"),
        words=(32, "vectors per caption"),
        width=(128, "width of a vector"),
        rated=(2000, "number of images for measuring the two rates"),
        threads=(0, "number of torch threads; 0 keeps the default"),
        folder=(Path(tempfile.gettempdir()), "folder of the mapped file (1.3 GB)"),
    ).parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(describe())
    shape = args.images, args.vectors, args.width
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "vectors"
        write_images(path, *shape)
        print(in_fresh_process(measure, path, shape, args.queries, args.words))
        images = map_rows(path, (shape[0], shape[1] * shape[2]), torch.float16)
        texts = unit(args.queries, args.words, args.width)
        flat = texts.flatten(0, 1)
        out = torch.empty(len(flat), COLUMNS)
        seconds = [0.0, 0.0]
        for part in images[: args.rated].chunk(SLICES):
            for number, run in enumerate((
                lambda part=part: maxsim(texts.flatten(1), part, args.width),
                lambda part=part: plain_product(flat, part, out),
            )):  # fmt: skip
                start = time.perf_counter()
                run()
                seconds[number] += time.perf_counter() - start
    rated = min(args.rated, args.images)
    operations = 2 * len(flat) * rated * args.vectors * args.width / 1e9
    ours, plain = (operations / one for one in seconds)
    print(
        f"MaxSim {ours:.1f} GFLOP/s, plain product {plain:.1f} GFLOP/s: {ours / plain:.0%}; "
        f"{args.queries * rated / seconds[0]:.0f} pairs/s"
    )


if __name__ == "__main__":
    main()
