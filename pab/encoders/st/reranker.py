"""Score each query's candidates with a vision-language model, pair by pair.

By default, the scores of each batch are cached by the content of their pairs, so an interruption
loses at most one batch per process. Batches are formed from all pairs before cached ones are left
out. A run that is resumed with the same settings therefore has the same batches and bit-identical
scores.

Shape letters: `Q` queries, `G` gallery images, `K` candidates per query, `B` pairs of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pab.core import processes
from pab.core.notices import notice
from pab.core.progress import progress
from pab.data.records import GalleryImage
from pab.encoders.st.control_tokens import refuse_control_tokens
from pab.encoders.st.extra import sentence_transformers
from pab.encoders.st.folders import MODULES
from pab.encoders.st.loading import check_image_text_model, load_processor, loading
from pab.encoders.st.pair_inputs import (
    PROMPT,
    AnswerTokens,
    PairModel,
    answer_tokens,
    head_in_fp32,
    read_settings,
)
from pab.encoders.st.pair_loader import ImageFacts, PairBatches, Pairs, check_images, prepared
from pab.encoders.st.pictures import pixels_only
from pab.scoring.encoder import Origin
from pab.scoring.encoding import Compute
from pab.scoring.rerank import Reranker

READ_AT_ONCE = 1 << 16  # cached scores read at a time


class LibraryPairModel(PairModel):
    """Compute the same scores with sentence-transformers' ``CrossEncoder``.

    Attributes:
        encoder: the cross encoder; its modules are ``Transformer`` and ``LogitScore``.
    """

    def __init__(
        self, encoder: Any, tokens: AnswerTokens, prompt: str, settings: Mapping[str, Any]
    ) -> None:
        super().__init__(encoder[0].model, encoder[0].processor, tokens, prompt, settings)
        self.encoder = encoder

    @classmethod
    def open(
        cls, folder: Path, *, prompt: str = PROMPT, yes_token: str | None = None,
        no_token: str | None = None, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> LibraryPairModel:  # fmt: skip
        """Load a model; see :meth:`PairModel.open`.

        The modules are built here, because the library would treat a folder without settings as a
        classifier, and cannot read settings without token ids.

        Raises:
            InputError: see :meth:`PairModel.open`; or sentence-transformers is not installed.
        """
        library, modules = sentence_transformers(), sentence_transformers("cross_encoder.modules")
        settings = read_settings(folder)
        check_image_text_model(settings.folder)
        processor = load_processor(settings.folder)
        tokens = answer_tokens(processor.tokenizer, settings, yes_token, no_token)
        options = {"dtype": dtype, "device_map": {"": str(device)}}
        with loading(settings.folder):
            if (folder / MODULES).is_file():
                transformer = modules.Transformer.load(
                    str(settings.folder), model_kwargs=options, local_files_only=True
                )
            else:
                transformer = modules.Transformer(
                    str(folder), transformer_task="any-to-any", model_kwargs=options,
                    processing_kwargs=dict(settings.processing),
                )  # fmt: skip
            answer = modules.LogitScore(tokens.yes, tokens.no)
            encoder = library.CrossEncoder(modules=[transformer, answer])
        if dtype != torch.float32:
            head_in_fp32(encoder[0].model)
        made = cls(encoder.eval(), tokens, prompt, settings.processing)
        made.check(settings.folder)
        return made

    def inputs(self, captions: Sequence[str], images: Sequence[Image.Image]) -> dict[str, Any]:
        """Build the library's inputs for B pairs; see :meth:`PairModel.inputs`.

        Captions are passed as ``{"text": CAPTION}``, because the library opens a plain text that
        looks like a link or a path.
        """
        pairs = list(zip(captions, map(pixels_only, images), strict=True))
        if not self.pair_roles:
            return dict(self.encoder.preprocess([self.messages(*pair) for pair in pairs]))
        batch = [({"text": caption}, {"image": image}) for caption, image in pairs]
        return dict(self.encoder.preprocess(batch, prompt=self.prompt))

    def scores(self, inputs: Mapping[str, Any]) -> Tensor:
        """Score B pairs, float32 [B]; see :meth:`PairModel.scores`."""
        found: Tensor = self.encoder(self.on_device(inputs))["scores"][:, 0].float()
        return found


class VlmReranker(Reranker):
    """Reranker with a vision-language model.

    Args:
        model: model that scores pairs.
        compute: device, dtype, batch size and cache of the scores.
        origin: source of the scores.
    """

    def __init__(self, model: PairModel, compute: Compute, origin: Origin) -> None:
        self.model, self.compute, self._origin = model, compute, origin

    @property
    def origin(self) -> Origin:
        """Return the source of the scores."""
        return self._origin

    def rerank(
        self, captions: Sequence[str], images: Sequence[GalleryImage], candidates: Tensor
    ) -> Tensor:
        """Score each query's candidates, float32 [Q, K]; processes share the batches.

        Raises:
            InputError: an image cannot be decoded or processed, a caption contains a control token,
                or the shared memory is too small.
        """
        refuse_control_tokens(self.model.processor.tokenizer, captions, "captions")
        columns = candidates.numpy()
        used = np.unique(columns).tolist()
        facts = check_images(self.model, images, used, self.compute.num_workers)
        notice("answers", self.model.tokens.described(self.model.processor.tokenizer))
        tokens = np.zeros(len(images), dtype=np.int64)
        tokens[used] = [facts[column].tokens for column in used]
        order = in_order_of_size(columns, tokens)
        size = self.compute.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        mine = [batches[number] for number in processes.share_of(len(batches))]
        done, scores = self._scored(mine, columns, captions, images, facts)
        found = processes.assemble(done, scores, columns.size, self.compute.device)
        return found.reshape(columns.shape)

    def _scored(
        self,
        batches: Sequence[np.ndarray],
        columns: np.ndarray,
        captions: Sequence[str],
        images: Sequence[GalleryImage],
        facts: Mapping[int, ImageFacts],
    ) -> tuple[list[int], Tensor | None]:
        """Score batches of pairs, or read their scores from the cache.

        Args:
            batches: positions of pairs in the flattened ``columns``.
            columns: int64 [Q, K], the candidates.
            captions: Q captions.
            images: G images.
            facts: position of an image -> its facts.

        Returns:
            Positions of the pairs, cached ones first, and their scores, float32 [pairs, 1]; None
            instead of the scores if there are no pairs.
        """
        cache, k, flat = self.compute.cache, columns.shape[1], columns.ravel()
        digests: dict[int, bytes] = {}
        known: list[int] = []
        new = [batch.tolist() for batch in batches]
        if cache is not None:
            digests = {
                pair: pair_digest(facts[int(flat[pair])].key, captions[pair // k])
                for batch in new for pair in batch
            }  # fmt: skip
            known, unknown = cache.split(digests)
            left = set(unknown)
            new = [[pair for pair in batch if pair in left] for batch in new]
        new = [batch for batch in new if batch]
        total, before = (
            sum(processes.gather_objects(count))
            for count in (sum(map(len, batches)), len(known))
        )  # fmt: skip
        if before:
            notice("re-ranking", f"pairs scored by an earlier run: {before} of {total}")
        dataset = PairBatches(
            self.model, captions, images,
            [Pairs(np.array(batch) // k, flat[batch]) for batch in new],
        )  # fmt: skip
        order, parts = list(known), []
        for start in range(0, len(known), READ_AT_ONCE):
            assert cache is not None
            part = known[start : start + READ_AT_ONCE]
            parts.append(cache.vectors([digests[pair] for pair in part]))
        ready = zip(new, prepared(dataset, self.compute.num_workers), strict=True)
        left_over = sum(map(len, new))
        shown = progress(ready, "re-ranking", "pairs", left_over, lambda item: len(item[0]))
        for batch, (_, inputs) in shown:
            with self.compute.running("re-ranking"):
                found = self.model.scores(inputs).cpu()[:, None]
            # Stored before the next batch is scored, so a killed run loses at most one batch.
            if cache is not None:
                cache.keep([digests[pair] for pair in batch], found)
            order += batch
            parts.append(found)
        return order, torch.cat(parts) if parts else None


def in_order_of_size(columns: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Sort pairs by length, the longest first; pairs of one image are adjacent.

    Pairs of similar length share a batch, and a batch that is too large for the memory fails at
    once.

    Args:
        columns: int64 [Q, K], candidates.
        tokens: int64 [G], length of each image's pair.

    Returns:
        int64 [Q * K], positions in the flattened ``columns``.
    """
    flat = columns.ravel()
    return np.lexsort((np.arange(flat.size), flat, -tokens[flat]))


def pair_digest(image: bytes, caption: str) -> bytes:
    """Return the cache key of a pair: SHA-256 of a prefix, the image's key and the caption."""
    return hashlib.sha256(b"pair " + image + caption.encode()).digest()
