"""Candidates of each query, scored by the cross encoder.

The scores are those of the plain way (for each query: gather its candidates, repeat the text, run
every layer on every token), with what pairs have in common computed once: an image's keys and
values for all queries of a group, a text's own attention in the first fusion layer for all its
candidates, in the last layer only [CLS]. Queries of like length share a pass, so that nearly
nothing is padding. `benchmarks/uit_rerank.py` says what each of these gains.

Shape letters: `Q` queries, `G` gallery, `K` candidates a query, `M` image tokens, `C` their width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pab.core import processes
from pab.core.devices import autocast
from pab.core.notices import notice
from pab.data.wordpiece import Tokenizer
from pab.ranking import top_k
from uit.model import Uit

IMAGES_A_GROUP = 512  # whose keys and values are held at a time (2 MB each at full size, fp32)
PAIRS_A_PASS = 128


def choose_candidates(scores: Tensor, k: int, flag: str = "--k_test") -> Tensor:
    """The k best images of each query, int64 [Q, K], ties to the smaller id.

    A k larger than the gallery means all of it; a notice says so. Several processes all get the
    main one's choice: GPUs of different kinds round differently.

    Args:
        scores: [Q, G].
        k: candidates per query.
        flag: the setting that k comes from, for the notice.
    """
    gallery = scores.shape[1]
    if k > gallery:
        notice(flag, f"{k} is more than the gallery's {gallery} images: all are candidates")
    return processes.broadcast_object(top_k(scores, min(k, gallery)))


def fill(match: Tensor, candidates: Tensor, gallery: int) -> Tensor:
    """The whole score matrix: candidates' logits, all else just below the row's smallest.

    Args:
        match: float32 [Q, K].
        candidates: int64 [Q, K].
        gallery: G.

    Returns:
        float32 [Q, G]; images that were no candidates have the next smaller float32, so that they
        tie with no candidate.
    """
    below = torch.nextafter(match.amin(dim=1, keepdim=True), torch.tensor(-torch.inf))
    return below.expand(-1, gallery).contiguous().scatter_(1, candidates, match)


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
    """The match logit (index 1) of every candidate; several processes share the queries.

    Args:
        rows: ids of Q captions.
        tokens: of the gallery, [G, M, C], may be memory-mapped.
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
    for group in (groups[number] for number in processes.share_of(len(groups))):
        used, place = np.unique(candidates[group].numpy(), return_inverse=True)
        images = torch.from_numpy(place.reshape(len(group), k))
        with autocast(device, dtype):
            memory = bert.image_memory(tokens[torch.from_numpy(used)].to(device, weights))
        queries_a_pass = max(1, PAIRS_A_PASS // k)
        for start in range(0, len(group), queries_a_pass):
            part = group[start : start + queries_a_pass]
            ids, mask = (t.to(device) for t in tokenizer.pad_rows([rows[q] for q in part]))
            of_part = images[start : start + queries_a_pass].to(device)
            with autocast(device, dtype):
                text = bert.encode_text(ids, mask)
                logits = [
                    _logits(model, text, mask, memory, columns)
                    for columns in of_part.split(max(1, PAIRS_A_PASS // len(part)), dim=1)
                ]
            found.append(torch.cat(logits, dim=1).float().cpu())
            order += part
    return processes.assemble(order, torch.cat(found) if found else None, len(rows), device)


def _logits(
    model: Uit, text: Tensor, mask: Tensor, memory: list[tuple[Tensor, Tensor]], images: Tensor
) -> Tensor:
    """Match logits of texts [T, N, D] with images [T, K] of the memory -> [T, K]."""
    count, k = images.shape
    rows = torch.arange(count, device=images.device).repeat_interleave(k)
    pairs = model.text_encoder.fuse_pairs(text, mask, memory, rows, images.flatten())
    first = torch.zeros(len(rows), 1, dtype=torch.int64, device=images.device)
    fused = model.text_encoder.fused_at(pairs, first)[:, 0]
    return model.match_logits(fused)[:, 1].view(count, k)


def _groups(lengths: Sequence[int], candidates: np.ndarray) -> Iterator[list[int]]:
    """Queries by length, cut where their candidates together pass :data:`IMAGES_A_GROUP`."""
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
