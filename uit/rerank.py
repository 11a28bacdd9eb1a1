"""Re-rank each query's candidates with the cross encoder.

Up to rounding, the scores equal those of a plain loop (per query: gather its candidates, repeat the
text, run all layers on all tokens), but shared computations run once. An image's keys and values
are shared by all queries of a group, and a text's self-attention in the first fusion layer by all
its candidates. The last layer computes only [CLS]. Queries of similar length share a pass, so
padding is minimal. `benchmarks/uit_rerank.py --ideas` measures the gain of each optimization.

Shape letters: `Q` queries, `G` gallery images, `K` candidates per query, `M` image tokens, `C`
width of the image tokens, `T` texts of a pass, `N` text tokens, `D` text width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pab.core import processes
from pab.core.devices import autocast, dtype_of, free_memory, read_late
from pab.core.progress import Progress
from pab.data.records import GalleryImage
from pab.data.wordpiece import Tokenizer
from pab.scoring.encoder import Origin
from pab.scoring.encoding import Compute
from pab.scoring.rerank import Reranker
from uit.bert import Bert
from uit.encode import GalleryFeatures, UitEncoder, encode_gallery, load_encoder
from uit.model import Uit

if TYPE_CHECKING:
    from uit.infer import InferConfig

# Images whose keys and values are in memory at once (2 MB per image at full size in fp32). On a
# GPU, a group has more images if they fit.
IMAGES_A_GROUP = 512
PAIRS_A_PASS = 128  # maximum pairs per pass of the cross encoder
# On a GPU, passes of 512 pairs need a quarter of the kernels and 60 % of the memory traffic of
# passes of 128 pairs (docs/log.md).
PAIRS_ON_GPU = 512
RESERVED = 2 << 30  # bytes of GPU memory for a pass, whose largest tensors have 350 MB each


class UitReranker(Reranker):
    """Reranker with UIT's cross encoder, and ITC as its first stage.

    The gallery is encoded once for both stages.

    Args:
        encoder: encoder of the ITC stage.
        compute: settings of ``encoder``; its cache, if any, holds vectors and tokens.
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
        with self.compute.running("re-ranking", batched=False):
            return match_scores(
                self.encoder.model, self.encoder.tokenizer, rows, tokens, candidates,
                device=self.compute.device, dtype=self.compute.dtype,
            )  # fmt: skip


def open_reranker(config: InferConfig) -> UitReranker:
    """Load the model specified by the settings; its cache also holds image tokens.

    Raises:
        InputError: see :func:`uit.encode.load_encoder`; or the cache folder cannot be created.
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

    On a GPU, the host queues the next pass before it waits for the scores of the current one.

    Args:
        rows: ids of Q captions.
        tokens: tokens of the gallery, [G, M, C]; may be memory-mapped.
        candidates: int64 [Q, K], positions in the gallery.

    Returns:
        float32 [Q, K].
    """
    bert, weights = model.text_encoder, model.temp.dtype
    plan = _plan(rows, candidates.numpy(), _budget(bert, tokens, weights, dtype, device))
    if not plan.order:  # more processes than groups or queries
        return processes.assemble([], None, len(rows), device)
    lengths = [len(rows[query]) for query in plan.order]
    padded = tokenizer.pad_rows([rows[query] for query in plan.order])
    ids, mask, places = (part.to(device) for part in (*padded, torch.from_numpy(plan.places)))
    pairs_a_pass = PAIRS_ON_GPU if device.type == "cuda" else PAIRS_A_PASS
    queries_a_pass = max(1, pairs_a_pass // candidates.shape[1])
    group_tokens = _group_tokens(tokens, plan, device, weights)

    def passes() -> Iterator[tuple[int, Tensor]]:
        for group in plan.groups:
            memory = bert.image_memory(next(group_tokens))
            for start in range(group.start, group.stop, queries_a_pass):
                part = slice(start, min(start + queries_a_pass, group.stop))
                seen = slice(lengths[part.stop - 1])  # the last caption of a pass is the longest
                images = places[part]
                text = bert.encode_text(ids[part, seen], mask[part, seen])
                logits = [
                    _logits(model, text, mask[part, seen], memory, columns)
                    for columns in images.split(max(1, pairs_a_pass // len(images)), dim=1)
                ]
                yield len(images), torch.cat(logits, dim=1).float()
            del memory  # free it before the next group's keys and values are computed

    found: list[Tensor] = []
    shown = Progress(len(plan.order), "re-ranking", "queries")
    with autocast(device, dtype, weights):
        for queries, scores in read_late(passes()):
            found.append(scores)
            shown.update(queries)
    shown.close()
    return processes.assemble(plan.order, torch.cat(found), len(rows), device)


class _Budget(NamedTuple):
    """Free memory of a GPU, and the memory that one image needs.

    Attributes:
        free: free bytes.
        of_tokens: bytes of an image's tokens.
        of_memory: bytes of an image's keys and values in all fusion layers.
    """

    free: int
    of_tokens: int
    of_memory: int

    def plan(self, images: int) -> tuple[int, bool]:
        """Return the maximum images per group, and whether all images' tokens stay on the device.

        Args:
            images: number of images that this process re-ranks.
        """
        usable = self.free - RESERVED
        of_all = images * self.of_tokens
        keeps = of_all <= usable // 2
        if keeps:
            usable -= of_all
        # A group also needs its tokens twice: gathered, and in the dtype of autocast.
        return max(usable // (self.of_memory + 2 * self.of_tokens), IMAGES_A_GROUP), keeps


def _budget(
    bert: Bert, tokens: Tensor, weights: torch.dtype, dtype: torch.dtype, device: torch.device
) -> _Budget | None:
    """Measure the free memory of a GPU; None for other devices.

    Args:
        bert: cross encoder.
        tokens: [G, M, C].
        weights: dtype of tokens on the device.
        dtype: dtype of keys and values.
        device: device of the model.
    """
    free = free_memory(device)
    if free is None:
        return None
    per_token = 2 * len(bert.fusion) * bert.config.width * dtype.itemsize  # keys and values
    return _Budget(free, tokens[0].numel() * weights.itemsize, tokens.shape[1] * per_token)


class _Plan(NamedTuple):
    """Work of this process: groups of queries that share their images' keys and values.

    Attributes:
        order: the queries, group by group.
        groups: ranges in ``order``.
        images: per group, the positions of its images in the gallery, ascending.
        places: int64 [len(order), K], candidates as indices into the group's ``images``.
        keeps_tokens: whether the tokens of all images stay on the device.
    """

    order: list[int]
    groups: list[range]
    images: list[np.ndarray]
    places: np.ndarray
    keeps_tokens: bool


def _plan(rows: Sequence[list[int]], candidates: np.ndarray, budget: _Budget | None) -> _Plan:
    """Form this process's groups of queries with captions of similar length.

    Args:
        rows: ids of Q captions.
        candidates: int64 [Q, K].
        budget: memory of a GPU. None: groups have at most :data:`IMAGES_A_GROUP` images, and
            processes share the groups, so that scores do not depend on the number of processes.
    """
    by_length = sorted(range(len(rows)), key=lambda query: (len(rows[query]), query))
    if budget is None:
        every = list(_groups(by_length, candidates, IMAGES_A_GROUP))
        groups, keeps = [every[number] for number in processes.share_of(len(every))], False
    else:  # one large group would leave other processes without work, so share the queries
        mine = [by_length[number] for number in processes.share_of(len(rows))]
        most, keeps = budget.plan(len(np.unique(candidates[mine])))
        groups = list(_groups(mine, candidates, most))
    images: list[np.ndarray] = []
    places = [np.empty((0, candidates.shape[1]), dtype=np.int64)]
    for group in groups:
        used, place = np.unique(candidates[group], return_inverse=True)
        images.append(used)
        places.append(place.reshape(len(group), -1))
    ends = [0, *accumulate(map(len, groups))]
    order = [query for group in groups for query in group]
    return _Plan(order, list(map(range, ends, ends[1:])), images, np.concatenate(places), keeps)


def _group_tokens(
    tokens: Tensor, plan: _Plan, device: torch.device, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield the image tokens of each group on the device, [images of the group, M, C]."""
    if plan.keeps_tokens:
        every = np.unique(np.concatenate(plan.images))
        kept = torch.empty(len(every), *tokens.shape[1:], device=device, dtype=dtype)
        blocks = np.split(every, range(IMAGES_A_GROUP, len(every), IMAGES_A_GROUP))
        ahead = _ahead(tokens, blocks, device)
        for part, block in zip(kept.split(IMAGES_A_GROUP), ahead, strict=True):
            part.copy_(block)
        for images in plan.images:
            at = torch.from_numpy(np.searchsorted(every, images))
            yield kept[at.to(device, non_blocking=True)]
    elif device.type == "cuda":
        for block in _ahead(tokens, plan.images, device):
            yield block.to(dtype)
    else:
        for images in plan.images:
            yield tokens[torch.from_numpy(images)].to(device, dtype)


def _ahead(tokens: Tensor, parts: Sequence[np.ndarray], device: torch.device) -> Iterator[Tensor]:
    """Yield parts of ``tokens`` on the device; a thread gathers the next one in pinned memory."""
    pinned = torch.cuda.is_available()

    def gather(rows: np.ndarray) -> Tensor:
        out = torch.empty(len(rows), *tokens.shape[1:], dtype=tokens.dtype, pin_memory=pinned)
        return torch.index_select(tokens, 0, torch.from_numpy(rows), out=out)

    with ThreadPoolExecutor(1) as pool:
        ready = pool.submit(gather, parts[0])
        for following in parts[1:]:
            block, ready = ready.result(), pool.submit(gather, following)
            yield block.to(device, non_blocking=True)
        yield ready.result().to(device, non_blocking=True)


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


def _groups(order: Sequence[int], candidates: np.ndarray, most: int) -> Iterator[list[int]]:
    """Split queries, in order, into groups of one query or of at most ``most`` distinct images."""
    group: list[int] = []
    used: set[int] = set()
    for query in order:
        wanted = set(candidates[query].tolist())
        if group and len(used) + len(wanted - used) > most:
            yield group
            group, used = [], set()
        group.append(query)
        used |= wanted
    if group:
        yield group
