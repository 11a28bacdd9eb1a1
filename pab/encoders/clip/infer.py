"""Settings and loading of the member `clip`: OpenAI's ViT-L/14@336px, or any OpenCLIP model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pab.core.checkpoints import checkpoint_hash
from pab.core.config import flag
from pab.core.devices import keep_freed_memory
from pab.encoders.scoring import EncoderConfig

if TYPE_CHECKING:
    from pab.encoders.clip.encoder import ClipEncoder


@dataclass(frozen=True)
class InferConfig(EncoderConfig):
    """Settings of scoring with CLIP; each field is a flag of `python scripts/clip_infer.py`."""

    model: str = flag("ViT-L-14-336-quickgelu", "OpenCLIP's name, or local-dir:FOLDER")
    pretrained: str | None = flag(
        None, "OpenCLIP tag of the weights, or a file (default: openai, or the folder's weights)"
    )
    preprocess_as: str | None = flag(
        None,
        "OpenCLIP tag whose preprocessing a weight file needs; required if nothing else "
        "determines it",
    )
    save_score: str | None = flag("sims_score/score_clip_reproduce.pt", "score file to write")
    output_file: str | None = flag("predictions/score_clip_reproduce.txt", "ranked list to write")

    @classmethod
    def of_checkpoint(cls, path: str) -> dict[str, str]:
        """Map an OpenCLIP folder, a weight file or a tag to settings."""
        from pab.encoders.clip.names import FOLDER

        return {"model": f"{FOLDER}{path}"} if Path(path).is_dir() else {"pretrained": path}

    def open(self) -> ClipEncoder:
        """Load the model; see :meth:`pab.scoring.job.MemberConfig.open`."""
        from pab.encoders.clip.encoder import ClipEncoder
        from pab.encoders.clip.model import load_clip
        from pab.encoders.clip.names import architecture, identity

        compute = self.compute()
        keep_freed_memory(compute.device)
        clip = load_clip(self.model, self.pretrained, self.preprocess_as)
        clip.model.to(compute.device, compute.dtype)
        sha256 = checkpoint_hash(clip.weights_file)
        facts = compute.fingerprint(
            model=identity(self.model),
            checkpoint=sha256,
            preprocessing=clip.transform,
            architecture=json.dumps(architecture(self.model), sort_keys=True),
        )
        source = self.pretrained or str(clip.weights_file)
        origin = compute.origin(self.model, source, sha256)
        return ClipEncoder(compute.with_cache(facts), clip, origin=origin, fingerprint=facts)
