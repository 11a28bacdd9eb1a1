"""Embedders of sentence-transformers as encoders: one vector per caption and image.

Embedders with several vectors are in `late`. The library's processor resizes the images, so batches
contain decoded images of any size.

Shape letters: `G` images, `Q` captions, `D` width of a vector, `B` batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pab.core.errors import InputError, first_line
from pab.data.image_loader import ImageBatch, Loadable
from pab.data.images import ImageReader
from pab.data.records import GalleryImage
from pab.encoders.st.control_tokens import refuse_control_tokens
from pab.encoders.st.loading import PLAIN_CAPTION, check_reads_images, plain_image, processing
from pab.encoders.st.pictures import REJECTIONS, PictureLoader
from pab.scoring.encoder import AnyImage, Origin, as_captions, as_images, cosine
from pab.scoring.encoding import Compute, ImageWork


@dataclass(frozen=True)
class Embedder(ABC):
    """Base class of encoders that run a model of sentence-transformers.

    Subclasses implement the interface :class:`pab.scoring.encoder.Encoder`.

    Attributes:
        compute: device, dtype, batch size and feature cache of the model.
        model: the model, on the device of ``compute``.
        origin, fingerprint: see the interface.
        prompt: instruction for captions; None uses the model's own.
        image_prompt: instruction for images; None uses the model's own.
    """

    compute: Compute
    model: Any
    origin: Origin
    fingerprint: Mapping[str, str]
    prompt: str | None = None
    image_prompt: str | None = None

    def __post_init__(self) -> None:
        """Reject a model that cannot encode images, and instructions with control tokens.

        Raises:
            InputError: the model encodes text only, its image processor is missing, its processor
                rejects a plain caption or image, or an instruction contains a control token.
        """
        check_reads_images(self.model, self.origin.checkpoint)
        for flag, prompt in (("--prompt", self.prompt), ("--image_prompt", self.image_prompt)):
            refuse_control_tokens(self.model.tokenizer, [prompt or ""], flag)
        with processing(self.origin.checkpoint):
            self.model.preprocess([{"text": PLAIN_CAPTION}], prompt=self.prompt)
            self.model.preprocess([{"image": plain_image()}], prompt=self.image_prompt)

    def query_inputs(self, captions: Sequence[str]) -> list[dict[str, str]]:
        """Convert captions to the library's inputs.

        Captions are passed in dictionaries, because the library would open a plain string that
        looks like the address or path of an image.

        Raises:
            InputError: a caption contains a control token, such as an image placeholder.
        """
        refuse_control_tokens(self.model.tokenizer, captions, "captions")
        return [{"text": caption} for caption in captions]

    def loader_of(
        self, encode: Callable[[list[dict[str, Image.Image]]], Tensor | list[Tensor]]
    ) -> Callable[..., ImageWork[list[Image.Image]]]:
        """Return the ``open_loader`` argument of :meth:`Compute.work_through`, for decoded images.

        Args:
            encode: B images, as the library's inputs -> B rows of any width.
        """

        def open_loader(mine: list[Any], **options: Any) -> ImageWork[list[Image.Image]]:
            def encode_batch(batch: ImageBatch[list[Image.Image]]) -> Tensor | list[Tensor]:
                inputs = [{"image": image} for image in batch.pixels]
                with self.compute.running("encoding images"):
                    try:
                        return encode(inputs)
                    except REJECTIONS as error:
                        raise self._refusal(inputs, batch.positions, mine, error) from error

            # One image at a time: each worker loads two batches ahead, and photographs are large.
            # `Compute.work_through` merges the images into full batches.
            return PictureLoader(mine, 1, self.compute.num_workers, **options), encode_batch

        return open_loader

    def _refusal(
        self,
        inputs: list[dict[str, Image.Image]],
        positions: list[int],
        images: list[Loadable],
        error: Exception,
    ) -> InputError:
        """Build the error for rejected images; it names the first rejected image."""
        for item, position in zip(inputs, positions, strict=True):
            try:
                self.model.preprocess([item])
            except REJECTIONS as own:
                image = images[position]
                where = image.path if isinstance(image, GalleryImage) else f"image {position}"
                size = "{} x {} pixels".format(*item["image"].size)
                return InputError(
                    where, f"the model cannot process it ({size}): {first_line(own)}",
                    todo="replace or remove it",
                )  # fmt: skip
        return InputError(self.origin.checkpoint, f"cannot process images: {first_line(error)}")

    @abstractmethod
    def encode_images(
        self, images: Sequence[AnyImage], *, reader: ImageReader | None = None
    ) -> Tensor:
        """Encode images to one row each."""

    @abstractmethod
    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Encode captions to one row each, float32."""

    @abstractmethod
    def similarity(self, texts: Tensor, images: Tensor) -> Tensor:
        """Compute the model's scores, float32 [Q, G]."""

    def similarity_here(self, texts: Tensor, images: Tensor) -> Tensor:
        """Compute scores in this process alone, float32 [Q, G]."""
        return self.similarity(texts, images)


@dataclass(frozen=True)
class DenseEncoder(Embedder):
    """Encoder that runs a model with one vector per caption and image.

    Attributes:
        dims: leading dimensions to keep; None keeps all that the model returns.
    """

    dims: int | None = None

    @property
    def _how(self) -> dict[str, Any]:
        """Keyword arguments for both encode functions of the library."""
        return {
            "convert_to_tensor": True,
            "show_progress_bar": False,
            "batch_size": self.compute.batch_size,
            **({} if self.dims is None else {"truncate_dim": self.dims}),
        }

    def _finished(self, vectors: Tensor) -> Tensor:
        """Convert vectors [B, D] to float32, of unit length if the model uses cosine similarity.

        Truncated vectors and vectors in half precision do not have exactly unit length.
        """
        vectors = vectors.float()
        cosine_model = self.model.similarity_fn_name == "cosine"
        return torch.nn.functional.normalize(vectors, dim=1) if cosine_model else vectors

    def encode_images(
        self, images: Sequence[AnyImage], *, reader: ImageReader | None = None
    ) -> Tensor:
        """Encode images, float32 [G, D] on the CPU."""
        loadable, reader = as_images(images, None), reader or ImageReader()

        def encode(inputs: list[dict[str, Image.Image]]) -> Tensor:
            found = self.model.encode_document(inputs, prompt=self.image_prompt, **self._how)
            return self._finished(found)

        work = self.compute.work_through(loadable, reader, self.loader_of(encode))
        rows = ((places, torch.stack(found)) for places, found in work)
        return self.compute.assembled(rows, loadable, reader)

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Encode captions, float32 [Q, D] on the CPU."""
        texts = as_captions(captions)
        inputs = self.query_inputs(texts)

        def encode(positions: list[int]) -> Tensor:
            batch = [inputs[position] for position in positions]
            found = self.model.encode_query(batch, prompt=self.prompt, **self._how)
            return self._finished(found)

        # A caption's characters serve as its ids; the cache depends on the model and the prompt.
        return self.compute.captions(encode, [[*text] for text in texts], max(map(len, texts)))

    @property
    def compares_by_dot_product(self) -> bool:
        """True if the similarity is the dot product of the vectors; search indexes need this."""
        return self.model.similarity_fn_name in ("cosine", "dot")

    def similarity(self, texts: Tensor, images: Tensor) -> Tensor:
        """Compute the model's similarities, float32 [Q, G]."""
        if self.compares_by_dot_product:
            return cosine(texts, images)
        found: Tensor = self.model.similarity(texts, images)
        return found
