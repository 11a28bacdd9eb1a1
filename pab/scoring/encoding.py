"""Encode images and captions with any encoder, in batches.

Under torchrun, each process encodes a share and receives all vectors.

Shape letters: `G` images, `Q` captions, `D` width of the vectors, `B` batch, `S` image side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pab.core import processes
from pab.core.device_errors import explaining_memory
from pab.core.devices import DTYPES, autocast, read_late
from pab.core.precision import numerics
from pab.core.progress import progress
from pab.data.image_loader import BatchLoader, ImageBatch, ImageLoader, Loadable, P
from pab.data.images import (
    ImageReader,
    ImageRecipe,
    ImageTransform,
    problem_of,
    refuse_unreadable,
)
from pab.data.pixels import normalizer
from pab.data.records import GalleryImage
from pab.scoring.batches import refilled
from pab.scoring.encoder import UNKNOWN, AnyImage, Origin, as_images, cosine
from pab.scoring.feature_cache import FeatureCache, caption_digest, code_versions

# Loader of a process's images, and the function that encodes a batch to B rows.
ImageWork = tuple[BatchLoader[P], Callable[[ImageBatch[P]], Tensor | list[Tensor]]]


@dataclass(frozen=True)
class Compute:
    """Run a model on a device, with a given dtype, batch size and feature cache.

    Attributes:
        device: device of the model.
        dtype: dtype of matrix products.
        weights: dtype of the model's weights and of its input pixels.
        batch_size: images (or captions) per batch.
        num_workers: number of loader processes.
        cache_dir: folder of all feature caches; None disables caching.
        cache: feature cache of the model; see :meth:`with_cache`.
        tf32: compute float32 products in TF32, on a CUDA GPU.
        deterministic: use only deterministic algorithms.
    """

    device: torch.device
    dtype: torch.dtype
    weights: torch.dtype
    batch_size: int
    num_workers: int
    cache_dir: str | None = None
    cache: FeatureCache | None = None
    tf32: bool = False
    deterministic: bool = False

    @property
    def dtype_name(self) -> str:
        """Name of the dtype: ``fp32``, ``bf16`` or ``fp16``."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def fingerprint(self, **facts: object) -> dict[str, str]:
        """Return the facts that vectors depend on: ``facts``, the device and the number format.

        GPU and CPU vectors differ in rounding.
        """
        return {name: str(fact) for name, fact in {**facts, **self.number_format()}.items()}

    def number_format(self) -> dict[str, Any]:
        """Return the device and the settings that affect rounding, by name."""
        return {"device": self.device.type, "dtype": self.dtype_name, **self.settings()}

    def settings(self) -> dict[str, bool]:
        """Return the keyword arguments of :func:`pab.core.precision.numerics`."""
        return {"tf32": self.tf32, "deterministic": self.deterministic}

    def origin(self, architecture: str, checkpoint: str, sha256: str, **more: Any) -> Origin:
        """Create the origin of vectors; ``more`` is added to the ``meta`` of score files."""
        facts = {**self.settings(), **more}
        return Origin(architecture, checkpoint, sha256, self.dtype_name, facts)

    @contextmanager
    def running(self, work: str, *, batched: bool = True) -> Iterator[None]:
        """Run the model in the block: without gradients, in the dtype and numerics of this object.

        Args:
            work: activity of the block, for the message of an out-of-memory error.
            batched: whether a smaller :attr:`batch_size` needs less memory.
        """
        ways = [f"lower --batch_size (now {self.batch_size})"] if batched else []
        if self.dtype == torch.float32:
            ways.append("use --dtype bf16 (now fp32)")
        remedy = ", or ".join(ways or ["free memory on the device"])
        with (
            explaining_memory(self.device, work, remedy),
            numerics(self.device, **self.settings()),
            torch.inference_mode(),
            autocast(self.device, self.dtype, self.weights),
        ):
            yield

    def with_cache(self, fingerprint: Mapping[str, str]) -> Compute:
        """Open the feature cache of a model, unless :attr:`cache_dir` is None.

        Raises:
            InputError: the folder cannot be created, or its vectors cannot be read.
        """
        if self.cache_dir is None:
            return self
        return replace(self, cache=FeatureCache(self.cache_dir, {**fingerprint, **code_versions()}))

    def images(
        self,
        encode: Callable[[Tensor], Tensor],
        images: Sequence[AnyImage],
        transform: ImageRecipe | ImageTransform,
        reader: ImageReader | None = None,
        *,
        full_batches: bool = False,
    ) -> Tensor:
        """Encode images; see :meth:`image_rows` for the arguments.

        Returns:
            float32 [G, D] on the CPU, in the order of ``images``. The rows of images that the
            reader collects as unreadable are zero.
        """
        if isinstance(transform, ImageRecipe):
            transform = transform.transform()
        loadable, reader = as_images(images, transform), reader or ImageReader()
        rows = self.image_rows(encode, loadable, transform, reader, full_batches=full_batches)
        return self.assembled(rows, loadable, reader)

    def assembled(
        self,
        rows: Iterable[tuple[list[int], Tensor]],
        images: Sequence[Loadable],
        reader: ImageReader,
    ) -> Tensor:
        """Collect the vectors of all processes, float32 [G, D]; unreadable images are zero rows.

        Args:
            rows: positions in ``images`` and vectors [B, D] of this process's share.
            images: G images.
            reader: the reader that may have collected unreadable images.
        """
        order: list[int] = []
        parts: list[Tensor] = []
        for places, found in rows:
            order += places
            parts.append(found)
        unreadable = reader.unreadable or {}
        failed = [
            i for i in processes.share_of(len(images))
            if getattr(images[i], "gallery_id", None) in unreadable
        ]  # fmt: skip
        if failed:
            parts.append(torch.zeros(len(failed), parts[0].shape[1] if parts else 0))
            order += failed
        every = torch.cat(parts) if parts else None
        return processes.assemble(order, every, len(images), self.device)

    def image_rows(
        self,
        encode: Callable[[Tensor], Tensor],
        images: Sequence[Loadable],
        transform: ImageRecipe | ImageTransform,
        reader: ImageReader,
        *,
        full_batches: bool = False,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Encode this process's share of the images, batch by batch.

        Args:
            encode: pixels [B, 3, S, S] on the device -> [B, D].
            images: images to encode. If any of them is not a file, the cache is not used.
            transform: a recipe, or RGB image -> pixels; it is not applied to tensors.
            reader: decodes the files.
            full_batches: fill the last batch by repeating the last image, for an encoder compiled
                for one shape.

        Yields:
            Positions of B images, and their vectors, float32 [B, D] on the CPU. Cached vectors come
            last. Images that the reader collects as unreadable are skipped.

        Raises:
            InputError: images cannot be read and the reader does not collect them. The error covers
                all processes, and is raised in every process once all images are checked.
        """
        # Worker processes cannot read preprocessed tensors that are on the device.
        loads = not any(isinstance(image, Tensor) for image in images)

        def open_loader(mine: list[Loadable], **options: Any) -> ImageWork[Tensor]:
            loader = ImageLoader(
                mine, transform, self.batch_size, self.num_workers if loads else 0,
                pin_memory=loads and self.device.type == "cuda", **options,
            )  # fmt: skip
            normalize = normalizer(loader.normalization, self.device)

            def encode_batch(batch: ImageBatch[Tensor]) -> Tensor:
                pixels, rows = self._on_device(batch.pixels), len(batch.pixels)
                pixels = normalize(pixels).to(self.weights)
                if full_batches and rows < self.batch_size:
                    last = pixels[-1:].expand(self.batch_size - rows, -1, -1, -1)
                    pixels = torch.cat([pixels, last])
                with self.running("encoding images"):
                    return encode(pixels)[:rows].float()

            return loader, encode_batch

        for places, rows in self.work_through(images, reader, open_loader):
            yield places, torch.stack(rows)

    def work_through(
        self,
        images: Sequence[Loadable],
        reader: ImageReader,
        open_loader: Callable[..., ImageWork[P]],
    ) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Encode this process's share of the images with any loader, batch by batch.

        Args:
            images: see :meth:`image_rows`.
            reader: see :meth:`image_rows`.
            open_loader: takes this process's images and a loader's keyword arguments ``reader``
                and ``known``. Returns the loader, and the function that encodes a batch to B rows
                of any width.

        Yields:
            Positions of B images, and their rows on the CPU. Cached rows come last.

        Raises:
            InputError: see :meth:`image_rows`.
        """
        files = [image for image in images if isinstance(image, GalleryImage)]
        cache = self.cache if len(files) == len(images) else None
        mine = list(processes.share_of(len(images)))
        refuses = reader.unreadable is None
        if refuses:  # collect all unreadable images, to name them in one error
            reader = replace(reader, unreadable={})
        bad = reader.unreadable
        assert bad is not None
        loader, encode = open_loader(
            [images[position] for position in mine],
            reader=reader, known=None if cache is None else cache.keys(),
        )  # fmt: skip
        known: dict[int, bytes] = {}

        def loaded() -> Iterator[ImageBatch[P]]:
            for batch in progress(loader, "encoding images", "images", len(mine), ImageBatch.size):
                known.update(batch.known)
                # After an unreadable image, a single process only checks the other images. Several
                # processes continue to encode, so that none waits for the others too long.
                if not (refuses and bad) or processes.world_size() > 1:
                    yield batch

        def encoded() -> Iterator[tuple[tuple[ImageBatch[P], list[int]], Tensor]]:
            for batch in refilled(loaded(), self.batch_size):
                widths, flat = flattened(encode(batch))
                yield (batch, widths), flat

        for (batch, widths), flat in read_late(encoded()):
            rows = list(flat.split(widths))
            if cache is not None:
                cache.keep_rows(batch.keys, rows)
            yield [mine[position] for position in batch.positions], rows
        if refuses:
            problems = {Path(error.where): problem_of(error) for error in bad.values()}
            refuse_unreadable(problems, [file.path for file in files])
        if cache is not None:
            positions = list(known)
            for start in range(0, len(positions), self.batch_size):
                part = positions[start : start + self.batch_size]
                yield [mine[i] for i in part], cache.rows([known[i] for i in part])

    def _on_device(self, pixels: Tensor) -> Tensor:
        """Copy a batch to the device; a page-locked one is copied while the device computes."""
        return pixels.to(self.device, non_blocking=self.device.type == "cuda")

    def captions(
        self,
        encode: Callable[[list[int]], Tensor],
        rows: Sequence[Sequence[int | str]],
        longest: int,
    ) -> Tensor:
        """Encode captions; see :meth:`caption_rows` for the arguments.

        Returns:
            float32 [Q, D] on the CPU, in the order of ``rows``.
        """
        order, parts = self.caption_rows(encode, rows, longest)
        found = torch.stack(parts) if parts else None
        return processes.assemble(order, found, len(rows), self.device)

    def caption_rows(
        self,
        encode: Callable[[list[int]], Tensor | list[Tensor]],
        rows: Sequence[Sequence[int | str]],
        longest: int,
    ) -> tuple[list[int], list[Tensor]]:
        """Encode this process's share of the captions, batch by batch.

        Captions of similar length share a batch, to minimize padding.

        Args:
            encode: positions of captions -> B rows of any width.
            rows: ids, words or characters of each caption; equal rows have equal vectors.
            longest: expected maximum ids per caption. A batch has at most :attr:`batch_size` times
                as many ids, padding included, unless it is a single longer caption.

        Returns:
            Positions in ``rows``, and the float32 vectors on the CPU; cached ones come first.
        """
        new = list(processes.share_of(len(rows)))
        digests: dict[int, bytes] = {}
        order: list[int] = []
        parts: list[Tensor] = []
        if self.cache is not None:
            digests = {position: caption_digest(rows[position]) for position in new}
            order, new = self.cache.split(digests)
            parts = self.cache.rows([digests[i] for i in order])
        lengths = [len(rows[position]) for position in new]
        batches = batches_by_length(lengths, self.batch_size * longest)

        def encoded() -> Iterator[tuple[tuple[list[int], list[int]], Tensor]]:
            for batch in progress(batches, "encoding captions", "captions", len(new), len):
                places = [new[position] for position in batch]
                with self.running("encoding captions"):
                    widths, flat = flattened(encode(places))
                yield (places, widths), flat.float()

        for (places, widths), flat in read_late(encoded()):
            vectors = list(flat.split(widths))
            if self.cache is not None:
                self.cache.keep_rows([digests[place] for place in places], vectors)
            parts += vectors
            order += places
        return order, parts


@dataclass(frozen=True)
class BatchEncoder(ABC):
    """Encoder that runs a model in batches (see :class:`pab.scoring.encoder.Encoder`).

    Subclasses add the model and implement the abstract methods.

    Attributes:
        compute: device, dtype, batch size and feature cache of the model.
        origin, fingerprint: see :class:`pab.scoring.encoder.Encoder`.
    """

    compute: Compute
    _: KW_ONLY
    origin: Origin = UNKNOWN
    fingerprint: Mapping[str, str] = field(default_factory=dict)

    @abstractmethod
    def image_encoder(self) -> tuple[Callable[[Tensor], Tensor], ImageRecipe | ImageTransform]:
        """Return the function from pixels [B, 3, S, S] to vectors [B, D], and the preprocessing."""

    @abstractmethod
    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Encode captions to unit vectors, float32 [Q, D] on the CPU."""

    @property
    def full_batches(self) -> bool:
        """True if every batch of images must have the same size."""
        return False

    def encode_images(
        self, images: Sequence[AnyImage], *, reader: ImageReader | None = None
    ) -> Tensor:
        """Encode images to vectors, float32 [G, D] on the CPU."""
        encode, transform = self.image_encoder()
        return self.compute.images(
            encode, images, transform, reader, full_batches=self.full_batches
        )

    def similarity(self, texts: Tensor, images: Tensor) -> Tensor:
        """Compute cosine similarities of unit vectors, float32 [Q, G]."""
        return cosine(texts, images)


def flattened(rows: Tensor | list[Tensor]) -> tuple[list[int], Tensor]:
    """Return the widths of rows, and all rows in one vector, for a single copy to the CPU."""
    flat = rows.flatten() if isinstance(rows, Tensor) else torch.cat(rows)
    return [len(row) for row in rows], flat


def batches_by_length(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Yield batches of positions, the shortest captions first.

    Args:
        lengths: ids per caption.
        token_budget: maximum ids per batch, padding included; a longer caption is a batch alone.
    """
    batch: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[position] > token_budget:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch
