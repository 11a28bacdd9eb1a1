"""Re-rank each query's candidates with the cross encoder.

The scores equal those of the plain loop (per query: gather its candidates, repeat the text, run all
layers on all tokens), but shared computations run once. An image's keys and values serve all
queries of a group. A text's self-attention in the first fusion layer serves all its candidates. The
last layer computes only [CLS]. Queries of similar length share a pass, so padding is minimal.
`benchmarks/uit_rerank.py` measures the gain of each.

Shape letters: `Q` queries, `G` gallery, `K` candidates per query, `M` image tokens, `C` their
    width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pab.core import processes
from pab.core.devices import autocast
from pab.core.notices import notice
from pab.core.progress import Progress
from pab.data.wordpiece import Tokenizer
from pab.ranking import top_k
from uit.model import Uit

IMAGES_A_GROUP = 512  # images with keys and values in memory (2 MB each at full size, fp32)
PAIRS_A_PASS = 128


def choose_candidates(scores: Tensor, k: int, flag: str = "--k_test") -> Tensor:
    """Select the k best images per query, int64 [Q, K]; ties go to the smaller id.

    A k above the gallery size selects all images, with a notice. All processes get rank 0's choice,
    because GPUs of different types round differently.

    Args:
        scores: [Q, G].
        k: candidates per query.
        flag: setting of k, for the notice.
    """
    gallery = scores.shape[1]
    if k > gallery:
        notice(flag, f"{k} is more than the gallery's {gallery} images: all are candidates")
    return processes.broadcast_object(top_k(scores, min(k, gallery)))


def fill(match: Tensor, candidates: Tensor, gallery: int) -> Tensor:
    """Build the whole score matrix: candidates' logits, others just below the row's minimum.

    Args:
        match: float32 [Q, K].
        candidates: int64 [Q, K].
        gallery: G.

    Returns:
        float32 [Q, G]. Other images get the next smaller float32, so that they never tie with a
        candidate.
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
    """Compute every candidate's match logit (index 1); several processes share the queries.

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
            shown.update(len(part))
    shown.close()
    return processes.assemble(order, torch.cat(found) if found else None, len(rows), device)


def _logits(
    model: Uit, text: Tensor, mask: Tensor, memory: list[tuple[Tensor, Tensor]], images: Tensor
) -> Tensor:
    """Match logits of texts [T, N, D] and images [T, K] in the memory -> [T, K]."""
    count, k = images.shape
    rows = torch.arange(count, device=images.device).repeat_interleave(k)
    pairs = model.text_encoder.fuse_pairs(text, mask, memory, rows, images.flatten())
    first = torch.zeros(len(rows), 1, dtype=torch.int64, device=images.device)
    fused = model.text_encoder.fused_at(pairs, first)[:, 0]
    return model.match_logits(fused)[:, 1].view(count, k)


def _groups(lengths: Sequence[int], candidates: np.ndarray) -> Iterator[list[int]]:
    """Group queries by length, with at most :data:`IMAGES_A_GROUP` candidates per group."""
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
