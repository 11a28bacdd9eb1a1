"""Scoring shared by all members: encoder and reranker interfaces, scoring job, feature cache."""

from pab.scoring.encoder import Encoder, Origin
from pab.scoring.job import MemberConfig
from pab.scoring.members import load_encoder
from pab.scoring.rerank import Reranker

__all__ = ["Encoder", "MemberConfig", "Origin", "Reranker", "load_encoder"]
