"""Scoring shared by all members: encoder and reranker interfaces, scoring job, feature cache.

`encoder` is the interface of a model that embeds images and captions, `rerank` that of a model that
scores pairs. `members` finds and loads them by name. `job` is the frame of all scoring commands: it
checks inputs, and writes score file, ranked list and metrics. `encoding` runs an encoder over
images and captions in batches. `feature_cache` keeps their vectors on disk. Imports the public
modules, `pab.data` and `pab.core`.
"""

from pab.scoring.encoder import Encoder, Origin
from pab.scoring.job import MemberConfig
from pab.scoring.members import load_encoder
from pab.scoring.rerank import Reranker

__all__ = ["Encoder", "MemberConfig", "Origin", "Reranker", "load_encoder"]
