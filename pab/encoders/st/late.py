"""Late-interaction embedders as encoders: one vector per token, compared by MaxSim.

Shape letters: `G` images, `Q` captions, `M` vectors of the longest caption, `N` vectors of the
longest image, `D` width of a vector.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from torch import Tensor

from pab.core import processes
from pab.core.errors import InputError
from pab.data.images import ImageReader
from pab.encoders.st.encoder import Embedder
from pab.encoders.st.maxsim import blocks_of, maxsim, pad_caption, pad_image
from pab.scoring.encoder import AnyImage, as_captions, as_images
from pab.scoring.mapped_rows import errors_of, mapped_rows


class _Spool:
    """Temporary file for rows of any width, used until the largest width is known.

    Args:
        folder: folder of the file; None uses the system's.

    Raises:
        InputError: the file cannot be created.
    """

    def __init__(self, folder: str | None) -> None:
        self._where = Path(tempfile.gettempdir() if folder is None else folder)
        self._rows: list[tuple[int, int]] = []  # position of the image, and width of its row
        with errors_of(self._where):
            self._where.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=self._where)  # noqa: SIM115

    @property
    def longest(self) -> int:
        """Largest width of a row; 0 if there is none."""
        return max((width for _, width in self._rows), default=0)

    def write(self, places: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Append rows on the CPU, all of one dtype.

        Raises:
            InputError: the file cannot be written, for instance because the disk is full.
        """
        self._rows += zip(places, map(len, rows), strict=True)
        with errors_of(self._where):
            self._file.write(torch.cat(list(rows)).view(torch.uint8).numpy().tobytes())

    def read(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Yield positions and rows in the order in which they were written.

        Args:
            dtype: dtype of the rows.
        """
        self._file.seek(0)
        for place, width in self._rows:
            data = bytearray(self._file.read(width * dtype.itemsize))
            yield place, torch.frombuffer(data, dtype=dtype)

    def close(self) -> None:
        """Close the file, which frees its disk space."""
        self._file.close()


@dataclass(frozen=True)
class LateEncoder(Embedder):
    """Encoder that runs a model with one vector per token.

    Attributes:
        width: width D of a vector.
        stored: dtype in which the vectors of images are stored.
        folder: folder of temporary files; None uses the system's.
    """

    _: KW_ONLY
    width: int
    stored: torch.dtype = torch.float16
    folder: str | None = None

    @property
    def _how(self) -> dict[str, Any]:
        """Keyword arguments for both encode functions of the library."""
        return {"show_progress_bar": False, "batch_size": self.compute.batch_size}

    def encode_images(
        self, images: Sequence[AnyImage], *, reader: ImageReader | None = None
    ) -> Tensor:
        """Encode images to one row each, padded by repeating the image's first vector.

        Returns:
            [G, N * D] in :attr:`stored`, memory-mapped from a file that is already unlinked; the
            processes of a machine share it. The rows of images that the reader collects as
            unreadable are zero.
        """
        loadable, reader = as_images(images, None), reader or ImageReader()

        def encode(inputs: list[dict[str, Image.Image]]) -> list[Tensor]:
            found = self.model.encode_document(inputs, prompt=self.image_prompt, **self._how)
            if any(len(vectors) == 0 for vectors in found):
                raise InputError(self.origin.checkpoint, "the model returns no vector for an image")
            return [vectors.to(self.stored).flatten() for vectors in found]

        with closing(_Spool(self.folder)) as spool:
            for places, rows in self.compute.work_through(loadable, reader, self.loader_of(encode)):
                spool.write(places, rows)
            longest = max(*processes.gather_objects(spool.longest), self.width)
            mapped = mapped_rows((len(loadable), longest), self.stored, self.folder)
            for place, row in spool.read(self.stored):
                vectors = row.view(-1, self.width)
                mapped.rows[place] = pad_image(vectors, longest // self.width)
        mapped.complete(self.compute.device)
        return mapped.rows

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Encode captions to one row each, float32 [Q, M * D] on the CPU, padded with zeros."""
        texts = as_captions(captions)
        inputs = self.query_inputs(texts)

        def encode(positions: list[int]) -> list[Tensor]:
            batch = [inputs[position] for position in positions]
            found = self.model.encode_query(batch, prompt=self.prompt, **self._how)
            return [vectors.flatten() for vectors in found]

        order, rows = self.compute.caption_rows(
            encode, [[*text] for text in texts], max(map(len, texts))
        )
        longest = max(processes.gather_objects(max(map(len, rows), default=0)))
        padded = [pad_caption(row.view(-1, self.width), longest // self.width) for row in rows]
        found = torch.stack(padded) if padded else None
        return processes.assemble(order, found, len(texts), self.compute.device)

    def similarity(self, texts: Tensor, images: Tensor) -> Tensor:
        """Compute MaxSim, or MeanMaxSim if the model specifies it, float32 [Q, G].

        With several processes, each computes a part. All processes must call this method, with
        equal arguments.
        """
        device = self.compute.device
        blocks = blocks_of(images, self.width, device)
        mine = [blocks[number] for number in processes.share_of(len(blocks))]
        columns = [column for block in mine for column in block]
        found = self._scores(texts, images, mine).T
        return processes.assemble(columns, found, len(images), device).T.contiguous()

    def similarity_here(self, texts: Tensor, images: Tensor) -> Tensor:
        """Compute :meth:`similarity` in this process alone, float32 [Q, G]."""
        return self._scores(texts, images, blocks_of(images, self.width, self.compute.device))

    def _scores(self, texts: Tensor, images: Tensor, blocks: list[range]) -> Tensor:
        """Compute the columns of some blocks of images, float32 [Q, columns]."""
        mean = self.model.similarity_fn_name == "meanmaxsim"
        with self.compute.running("comparing captions and images", batched=False):
            return maxsim(
                texts, images, self.width, mean=mean, device=self.compute.device, blocks=blocks
            )
