"""Re-rank each query's candidates with the cross encoder.

The scores equal those of a plain loop (per query: gather its candidates, repeat the text, run all
layers on all tokens), but shared computations run once. An image's keys and values are shared by
all queries of a group, and a text's self-attention in the first fusion layer by all its candidates.
The last layer computes only [CLS]. Queries of similar length share a pass, so padding is minimal.
`benchmarks/uit_rerank.py` measures the gain of each step.

Shape letters: `Q` queries, `G` gallery images, `K` candidates per query, `M` image tokens, `C`
width of the image tokens, `T` texts of a pass, `N` text tokens, `D` text width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pab.core import processes
from pab.core.devices import autocast, dtype_of
from pab.core.progress import Progress
from pab.data.records import GalleryImage
from pab.data.wordpiece import Tokenizer
from pab.scoring.encoder import Origin
from pab.scoring.encoding import Compute
from pab.scoring.rerank import Reranker
from uit.encode import GalleryFeatures, UitEncoder, encode_gallery, load_encoder
from uit.model import Uit

if TYPE_CHECKING:
    from uit.infer import InferConfig

IMAGES_A_GROUP = 512  # images with keys and values in memory (2 MB each at full size, fp32)
PAIRS_A_PASS = 128  # maximum pairs per pass of the cross encoder


class UitReranker(Reranker):
    """Reranker with UIT's cross encoder, and ITC as its first stage.

    The gallery is encoded once for both stages.

    Args:
        encoder: encoder of the ITC stage.
        compute: settings of ``encoder``, with a cache of vectors and tokens.
        stored: further keyword arguments of :func:`uit.encode.encode_gallery`.
    """

    def __init__(self, encoder: UitEncoder, compute: Compute, **stored: Any) -> None:
        self.encoder, self.compute, self._stored = encoder, compute, stored
        self._last: tuple[Sequence[GalleryImage], GalleryFeatures] | None = None

    @property
    def origin(self) -> Origin:
        """Return the origin of the model."""
        return self.encoder.origin

    def features(self, images: Sequence[GalleryImage]) -> GalleryFeatures:
        """Encode a gallery to tokens and vectors, or reuse its features from the last call."""
        if self._last is None or self._last[0] is not images:
            self._last = None  # free memory before the next gallery is encoded
            found = encode_gallery(self.encoder.model, images, self.compute, **self._stored)
            self._last = images, found
        return self._last[1]

    def first_scores(self, captions: Sequence[str], images: Sequence[GalleryImage]) -> Tensor:
        """Compute ITC similarities, float32 [Q, G]; encode captions first, to fail early."""
        texts = self.encoder.encode_texts(captions)
        return self.encoder.similarity(texts, self.features(images).vectors)

    def rerank(
        self, captions: Sequence[str], images: Sequence[GalleryImage], candidates: Tensor
    ) -> Tensor:
        """Compute match logits of each query's candidates, float32 [Q, K]."""
        rows, tokens = self.encoder.ids(captions), self.features(images).tokens
        with self.compute.running("re-ranking"):
            return match_scores(
                self.encoder.model, self.encoder.tokenizer, rows, tokens, candidates,
                device=self.compute.device, dtype=self.compute.dtype,
            )  # fmt: skip


def open_reranker(config: InferConfig) -> UitReranker:
    """Load the model specified by the settings; its cache also holds image tokens.

    Raises:
        InputError: see :func:`uit.encode.load_encoder`.
    """
    encoder = load_encoder(config)
    compute = encoder.compute.with_cache({**encoder.fingerprint, "features": "with tokens"})
    dtype = dtype_of(config.cache_dtype)
    return UitReranker(encoder, compute, cache_dtype=dtype, cache_dir=config.cache_dir)


@torch.inference_mode()
def match_scores(
    model: Uit,
    tokenizer: Tokenizer,
    rows: Sequence[list[int]],
    tokens: Tensor,
    candidates: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the match logit (index 1) of every candidate; processes share the queries.

    Args:
        rows: ids of Q captions.
        tokens: tokens of the gallery, [G, M, C]; may be memory-mapped.
        candidates: int64 [Q, K], positions in the gallery.

    Returns:
        float32 [Q, K].
    """
    bert = model.text_encoder
    weights = model.temp.dtype
    found: list[Tensor] = []
    order: list[int] = []
    k = candidates.shape[1]
    groups = list(_groups([len(row) for row in rows], candidates.numpy()))
    mine = [groups[number] for number in processes.share_of(len(groups))]
    shown = Progress(sum(map(len, mine)), "re-ranking", "queries")
    for group in mine:
        used, place = np.unique(candidates[group].numpy(), return_inverse=True)
        images = torch.from_numpy(place.reshape(len(group), k))
        with autocast(device, dtype, weights):
            memory = bert.image_memory(tokens[torch.from_numpy(used)].to(device, weights))
        queries_a_pass = max(1, PAIRS_A_PASS // k)
        for start in range(0, len(group), queries_a_pass):
            part = group[start : start + queries_a_pass]
            ids, mask = (t.to(device) for t in tokenizer.pad_rows([rows[q] for q in part]))
            of_part = images[start : start + queries_a_pass].to(device)
            with autocast(device, dtype, weights):
                text = bert.encode_text(ids, mask)
                logits = [
                    _logits(model, text, mask, memory, columns)
                    for columns in of_part.split(max(1, PAIRS_A_PASS // len(part)), dim=1)
                ]
            found.append(torch.cat(logits, dim=1).float().cpu())
            order += part
            shown.update(len(part))
    shown.close()
    return processes.assemble(order, torch.cat(found) if found else None, len(rows), device)


def _logits(
    model: Uit, text: Tensor, mask: Tensor, memory: list[tuple[Tensor, Tensor]], images: Tensor
) -> Tensor:
    """Compute match logits [T, K] of texts [T, N, D] and indices of images in memory [T, K]."""
    count, k = images.shape
    rows = torch.arange(count, device=images.device).repeat_interleave(k)
    pairs = model.text_encoder.fuse_pairs(text, mask, memory, rows, images.flatten())
    first = torch.zeros(len(rows), 1, dtype=torch.int64, device=images.device)
    fused = model.text_encoder.fused_at(pairs, first)[:, 0]
    return model.match_logits(fused)[:, 1].view(count, k)


def _groups(lengths: Sequence[int], candidates: np.ndarray) -> Iterator[list[int]]:
    """Group queries by length, with at most :data:`IMAGES_A_GROUP` distinct images per group."""
    group: list[int] = []
    used: set[int] = set()
    for query in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        wanted = set(candidates[query].tolist())
        if group and len(used | wanted) > IMAGES_A_GROUP:
            yield group
            group, used = [], set()
        group.append(query)
        used |= wanted
    if group:
        yield group
