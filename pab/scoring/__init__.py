"""Scoring shared by all members: encoder and reranker interfaces, scoring job, feature cache.

`encoder` is the interface of a model that embeds images and captions, `rerank` that of a model that
scores pairs. `members` finds members and loads their encoders by name, and
`python -m pab.scoring NAME` scores with any of them. `job` is the procedure shared by all scoring
commands: check the inputs, load the model, score, write the score file and the ranked list, print
metrics. `encoding` runs an encoder in batches, and `feature_cache` stores its vectors on disk.
"""

from pab.scoring.encoder import Encoder, Origin
from pab.scoring.job import MemberConfig
from pab.scoring.members import load_encoder
from pab.scoring.rerank import Reranker

__all__ = ["Encoder", "MemberConfig", "Origin", "Reranker", "load_encoder"]
