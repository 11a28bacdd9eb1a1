"""Run BLIP-2 in LAVIS, in the environment of `scripts/setup_lavis.sh`.

This backend serves to verify that the port (:mod:`pab.encoders.blip2.model`) outputs the same
vectors for the released weights. The module is imported only for `--backend lavis`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pab.core.checkpoints import model_state, read_checkpoint
from pab.core.counts import counted
from pab.core.errors import InputError
from pab.data.images import ImageTransform
from pab.encoders.pooling import Pooling, similarity_of_rows
from pab.scoring.encoder import as_captions
from pab.scoring.encoding import BatchEncoder

EXTRACTOR = "blip2_feature_extractor"
# Tensors that a LAVIS checkpoint may lack: the frozen tower, and the position ids 0, 1, 2, ...
OF_OTHER_FILES = re.compile(r"visual_encoder\.|.*\.position_ids$")
CAPTION_WORDS = 50  # word limit of LAVIS's processor; sets the batch size for captions


def load_lavis(
    model_type: str, pretrained: str | None
) -> tuple[Any, ImageTransform, Callable[[str], str]]:
    """Load LAVIS's model in float32 on the CPU, with its image and caption processors.

    Args:
        model_type: LAVIS's name, such as ``pretrain_vitL``.
        pretrained: weight file; None uses the URL in LAVIS's settings.

    Raises:
        InputError: LAVIS is not installed or cannot build the model (for instance because files
            cannot be downloaded), or the weight file is not LAVIS's or lacks tensors.
    """
    try:
        from lavis.common.registry import registry
        from lavis.models import load_preprocess
        from omegaconf import OmegaConf
    except ImportError as error:
        raise InputError(
            "--backend", f"LAVIS is not installed in this environment ({error})",
            todo="run bash scripts/setup_lavis.sh, then .venv-lavis/bin/python "
            "scripts/blip2_infer.py --backend lavis; or omit --backend: the port outputs the same "
            "vectors",
        ) from error  # fmt: skip
    given = None if pretrained is None else lavis_names(pretrained)
    kind = registry.get_model_class(EXTRACTOR)
    settings = OmegaConf.load(kind.default_config_path(model_type))
    if pretrained is not None:
        settings.model.pretrained = pretrained
    try:
        model = kind.from_config(settings.model)
    except (OSError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            "--backend", f"LAVIS cannot build {model_type}: {line[:160]}",
            todo="without internet, put bert-base-uncased/ into the working directory, and "
            "clip_vit_L.pth and the weights into $TORCH_HOME/hub/checkpoints",
        ) from error  # fmt: skip
    if given is not None:  # LAVIS accepts a file that lacks tensors
        missing = [n for n in model.state_dict() if n not in given and not OF_OTHER_FILES.match(n)]
        if missing:
            raise InputError(
                str(pretrained),
                f"lacks {counted(len(missing), 'tensor')} of the model, such as {missing[0]}",
            )
    image, text = load_preprocess(settings.preprocess)
    return model.float().eval(), image["eval"], text["eval"]


def lavis_names(path: str) -> set[str]:
    """Read the names of the tensors in a LAVIS checkpoint.

    Raises:
        InputError: the file is missing, damaged or not a checkpoint of LAVIS.
    """
    checkpoint = read_checkpoint(path)
    names = set(model_state(checkpoint, path))
    if "model" not in checkpoint or not any(name.startswith("Qformer.") for name in names):
        raise InputError(
            path, "expected a checkpoint of LAVIS, found other tensor names",
            todo="score weights of this project without --backend lavis",
        )  # fmt: skip
    return names


@dataclass(frozen=True)
class LavisEncoder(BatchEncoder):
    """LAVIS's feature extractor as an encoder.

    Attributes:
        model: the extractor, on the device of ``compute``.
        transform, process: the extractor's image and caption processors.
        pooling: see :func:`pab.encoders.pooling.pooled_similarity`.
    """

    model: Any
    transform: ImageTransform
    process: Callable[[str], str]
    pooling: Pooling

    def image_encoder(self) -> tuple[Callable[[Tensor], Tensor], ImageTransform]:
        """See :class:`BatchEncoder`; each image has K unit vectors of width E in a row [K * E]."""

        def encode(pixels: Tensor) -> Tensor:
            found = self.model.extract_features({"image": pixels}, mode="image")
            return found.image_embeds_proj.flatten(1)

        return encode, self.transform

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Encode Q captions to unit vectors, float32 [Q, E] on the CPU."""
        words = [self.process(caption) for caption in as_captions(captions)]

        def encode(positions: list[int]) -> Tensor:
            batch = {"text_input": [words[i] for i in positions]}
            return self.model.extract_features(batch, mode="text").text_embeds_proj[:, 0]

        return self.compute.captions(encode, [one.split() for one in words], longest=CAPTION_WORDS)

    def similarity(self, texts: Tensor, images: Tensor) -> Tensor:
        """Compute pooled cosine similarities of Q captions and G images, float32 [Q, G]."""
        return similarity_of_rows(texts, images, pooling=self.pooling)
