"""Score only each query's candidates with an embedder.

Shape letters: `Q` queries, `G` gallery, `K` candidates per query, `U` distinct candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pab.core import processes
from pab.core.progress import progress
from pab.data.records import GalleryImage
from pab.encoders.st.encoder import Embedder
from pab.scoring.encoder import Origin
from pab.scoring.rerank import Reranker


class CandidateScorer(Reranker):
    """Embedder as a reranker; encodes only images that are candidates of at least one query."""

    def __init__(self, encoder: Embedder) -> None:
        self.encoder = encoder

    @property
    def origin(self) -> Origin:
        """Return the origin of the embedder."""
        return self.encoder.origin

    def rerank(
        self, captions: Sequence[str], images: Sequence[GalleryImage], candidates: Tensor
    ) -> Tensor:
        """Compute the similarities of each query's candidates, float32 [Q, K]."""
        used, places = candidates.unique(return_inverse=True)  # [U], [Q, K]
        texts = self.encoder.encode_texts(captions)
        vectors = self.encoder.encode_images([images[place] for place in used.tolist()])
        mine = list(processes.share_of(len(captions)))
        rows = [
            self.encoder.similarity_here(texts[query, None], vectors[places[query]])
            for query in progress(mine, "comparing captions and candidates", "queries")
        ]
        found = torch.cat(rows) if rows else None
        return processes.assemble(mine, found, len(captions), self.encoder.compute.device)
