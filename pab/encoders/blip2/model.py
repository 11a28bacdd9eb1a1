"""First stage of BLIP-2 (ViT-L and Q-Former), as in LAVIS's `blip2_feature_extractor`.

Source: Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and
Large Language Models" (arXiv 2301.12597); weights from LAVIS (BSD-3-Clause). The image tower is
OpenCLIP's transformer without its last norm and projection. The Q-Former is that of transformers.
:data:`RENAMED` maps LAVIS's names of the Q-Former's parameters to those of transformers.

Shape letters: `B` batch, `M` image tokens, `K` query tokens, `N` text ids, `S` side of the image in
pixels, `W` width of the image tokens, `E` width of the vectors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

from pab.core.checkpoints import LoadReport, load_strict, model_state, read_checkpoint
from pab.core.errors import InputError
from pab.core.weight_folders import Family, only_weights, weight_folder
from pab.data.wordpiece import Tokenizer
from pab.encoders.clip.blocks import use_fused_blocks
from pab.encoders.layer_numbers import layer_in_tower

# Patterns of LAVIS's names -> names here; the first pattern that matches is applied.
RENAMED = (
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"^Qformer\.bert\.embeddings\.", "embeddings."),
    (
        r"^Qformer\.bert\.encoder\.layer\.(\d+)\.(attention|crossattention)\.self\.",
        r"qformer.encoder.layer.\1.\2.attention.",
    ),
    (r"^Qformer\.bert\.encoder\.", "qformer.encoder."),
)
TOWER = "visual_encoder."
# Parts of CLIP's image tower that BLIP-2 does not use.
BEYOND_THE_TOWER = ("transformer.resblocks.2[1-3].*", "ln_post.*", "proj")
TEMPERATURES = (0.001, 0.5)  # bounds of the learned temperature, as in BLIP
SCRATCH_EMBEDDING_STD = 0.1  # see :func:`start_from_scratch`
# Ignored tensors of LAVIS checkpoints: language head, match head, position ids 0, 1, 2, ...
UNUSED = re.compile(r"Qformer\.cls\.|itm_head\.|.*\.position_ids$")


@dataclass(frozen=True)
class Blip2Config:
    """Sizes of the model; the defaults are those of `pretrain_vitL`.

    Attributes:
        image_size: side of the square input, pixels.
        patch_size: side of a patch, pixels.
        image_width, image_layers, image_heads: sizes of the image tower; CLIP's ViT-L has 24
            layers, and BLIP-2 uses the output of the 21st.
        queries: K, number of query tokens.
        width, layers, heads, ffn_dim: sizes of the Q-Former.
        vocab_size: BERT's 30,522 tokens and one of LAVIS, which never occurs in captions.
        positions: rows of the text position embedding.
        embed_dim: E, width of the vectors.
        temperature: initial temperature of the loss; learned in fine-tuning.
    """

    image_size: int = 224
    patch_size: int = 14
    image_width: int = 1024
    image_layers: int = 21
    image_heads: int = 16
    queries: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn_dim: int = 3072
    vocab_size: int = 30523
    positions: int = 512
    embed_dim: int = 256
    temperature: float = 0.07


MODELS = {
    "pretrain_vitL": Blip2Config(),
    "mini": Blip2Config(
        image_size=64, patch_size=8, image_width=160, image_layers=4, image_heads=5, queries=8,
        width=128, layers=3, heads=4, ffn_dim=512, vocab_size=692, positions=80, embed_dim=128,
    ),
}  # fmt: skip


class ImageTextModel(Protocol):
    """Interface that :class:`Blip2` and the wrapper of ViT-g share; scoring uses nothing else."""

    def encode_queries(self, pixels: Tensor) -> Tensor:
        """Encode images [B, 3, S, S] to a unit vector per query token, [B, K, E]."""

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode ids with their mask [B, N] (1 = a token) to unit vectors [B, E]."""


class Blip2(nn.Module):
    """Image tower, Q-Former and projections of BLIP-2."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        self.config = config
        tower = VisionTransformer(
            config.image_size, config.patch_size, config.image_width, config.image_layers,
            config.image_heads, mlp_ratio=4.0, act_layer=QuickGELU,
        )  # fmt: skip
        tower.ln_post, tower.proj = nn.Identity(), None
        use_fused_blocks(tower)
        self.visual_encoder = tower
        self.ln_vision = nn.LayerNorm(config.image_width)
        qformer = Blip2QFormerConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.ffn_dim,
            max_position_embeddings=config.positions,
            encoder_hidden_size=config.image_width,
            cross_attention_frequency=2,
            use_qformer_text_input=True,
        )
        self.query_tokens = nn.Parameter(torch.zeros(1, config.queries, config.width))
        nn.init.normal_(self.query_tokens, std=qformer.initializer_range)
        self.embeddings = Blip2TextEmbeddings(qformer)
        self.qformer = Blip2QFormerModel(qformer)
        self.vision_proj = nn.Linear(config.width, config.embed_dim)
        self.text_proj = nn.Linear(config.width, config.embed_dim)
        self.temp = nn.Parameter(torch.tensor(config.temperature))

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Encode images [B, 3, S, S] to tokens [B, M, W]; the class token comes first."""
        tower = self.visual_encoder
        return self.ln_vision(tower.transformer(tower._embeds(pixels)))

    def encode_queries(self, pixels: Tensor) -> Tensor:
        """Encode images [B, 3, S, S] to a unit vector per query token, [B, K, E]."""
        found = self.qformer(
            query_embeds=self.query_tokens.expand(len(pixels), -1, -1),
            encoder_hidden_states=self.image_tokens(pixels),
        ).last_hidden_state
        return F.normalize(self.vision_proj(found).float(), dim=-1)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode ids with their mask [B, N] (1 = a token) to unit vectors [B, E]."""
        found = self.qformer(
            query_embeds=self.embeddings(input_ids=ids), query_length=0, attention_mask=mask
        ).last_hidden_state
        return F.normalize(self.text_proj(found[:, 0]).float(), dim=-1)

    def logit_scale(self) -> Tensor:
        """Clamp the temperature; return the logarithm of the scale of similarities in the loss.

        The clamp is in place; inside the graph, it would stop the gradient of values out of bounds.
        """
        with torch.no_grad():
            self.temp.clamp_(*TEMPERATURES)
        return -self.temp.log()

    def layer_of(self, name: str) -> int:
        """Return a parameter's layer, 0 to :attr:`layers` + 1; the tower is below the Q-Former."""
        below, above = self.config.image_layers, self.config.layers
        if name.startswith("visual_encoder."):
            return layer_in_tower(name, below)
        if name.startswith("qformer.encoder."):
            return below + layer_in_tower(name, above)
        return self.layers + 1 if name.startswith(("vision_proj", "text_proj", "temp")) else below

    @property
    def layers(self) -> int:
        """Number of blocks in the image tower and the Q-Former together."""
        return self.config.image_layers + self.config.layers


def start_from_scratch(model: Blip2) -> None:
    """Initialize a model in place for training without a checkpoint.

    transformers initializes linear layers with a standard deviation of 0.02, which suits widths of
    768 and more. In a small network, the outputs of attention and MLP would be too small beside the
    residual. Here, the standard deviation of a linear layer depends on its width (Glorot and
    Bengio, AISTATS 2010). Text embeddings and query tokens have a fixed one. All other parameters
    keep their default initialization.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=SCRATCH_EMBEDDING_STD)
    nn.init.normal_(model.query_tokens, std=SCRATCH_EMBEDDING_STD)


def load_blip2(config: Blip2Config, path: str | Path, image_weights: str | Path = "") -> Blip2:
    """Load a model with the weights of a LAVIS checkpoint, or of a checkpoint of this project.

    Args:
        config: sizes of the model.
        path: the checkpoint, or its folder if that contains no configuration of a model.
        image_weights: weights of the image tower; used if the checkpoint lacks them.

    Raises:
        InputError: see :func:`load_weights`.
    """
    model = Blip2(config)
    load_weights(model, path, image_weights)
    return model.eval()


def load_weights(model: Blip2, path: str | Path, image_weights: str | Path = "") -> LoadReport:
    """Load a checkpoint into a model; a LAVIS checkpoint may lack ``temp``.

    LAVIS saves only trained weights. If the checkpoint lacks the image tower, the tower is read
    from ``image_weights`` (`clip_vit_L.pth`, with all 24 blocks of CLIP).

    Raises:
        InputError: a file cannot be found or read as a checkpoint, or the tensors do not fit.
    """
    names = model.state_dict().keys()
    path = _file(path)
    state = renamed(model_state(read_checkpoint(path), path, names))
    if image_weights and not any(name.startswith(TOWER) for name in state):
        inner = model.visual_encoder.state_dict().keys()
        tower = model_state(read_checkpoint(image_weights), image_weights, inner)
        load_strict(model.visual_encoder, tower, image_weights, allow_unexpected=BEYOND_THE_TOWER)
        return load_strict(model, state, path, allow_missing=("temp",), ignore=(f"{TOWER}*",))
    return load_strict(model, state, path, allow_missing=("temp",))


def _file(path: str | Path) -> str | Path:
    """Return the checkpoint file; for a folder without a configuration, its weight file.

    Raises:
        InputError: the folder contains another model, no weights, or several weight files without a
            usual name.
    """
    if not Path(path).is_dir():
        return path
    folder = weight_folder(path)
    if folder.family is not Family.WEIGHTS:
        raise InputError(
            path, f"expected a checkpoint of LAVIS or of this project, found {folder.family.value}",
            todo="score with --model pretrain" if folder.family is Family.BLIP2 else None,
        )  # fmt: skip
    return only_weights(folder)


def check_vocabulary(tokenizer: Tokenizer, sizes: Blip2Config) -> None:
    """Reject a vocabulary that does not match the word embedding.

    LAVIS's embedding has one row more than BERT's vocabulary; captions never use that row.

    Raises:
        InputError: the vocabulary has another size.
    """
    if tokenizer.vocab_size not in (sizes.vocab_size, sizes.vocab_size - 1):
        raise InputError(
            tokenizer.path,
            f"has {tokenizer.vocab_size} pieces, but the model embeds {sizes.vocab_size}",
            todo="use the vocabulary that the model was trained with",
        )


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a LAVIS state dict to this model's names; drop unused ones."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if UNUSED.match(name):
            continue
        for pattern, replacement in RENAMED:
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        found[name] = tensor
    return found
