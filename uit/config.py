"""Settings of UIT's fine-tuning.

The defaults are those of the release, but with another seed and without initial weights.
`configs/uit/paper.yaml` has the paper's values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pab.core.config import (
    advanced_flag,
    data_flag,
    flag,
    model_flag,
    output_flag,
    speed_flag,
)
from pab.core.errors import InputError
from pab.training.config import TrainingConfig
from uit.augment import LEVELS
from uit.masking import WordMasking
from uit.schedules import WARMUP_STEPS


@dataclass(frozen=True)
class TrainConfig(TrainingConfig):
    """Settings of UIT's fine-tuning; each field is a flag of `python -m uit.run`."""

    # Model
    model: Literal["uit_base", "uit_mini", "uit_debug"] = model_flag("uit_base", "architecture")
    task: Literal["cmp"] = advanced_flag("cmp", "task name, as in the release")
    input_size: int = model_flag(224, "side of the square input, pixels", ge=1)
    window: int = model_flag(7, "side of Swin's attention windows, tokens", ge=1)
    drop_path: float = flag(0.1, "stochastic depth rate of Swin's last block", ge=0, lt=1)
    dropout: float = flag(
        0.1, "dropout of BERT's embeddings, attention weights and branches", ge=0, lt=1
    )
    proj_dropout: float = flag(
        0.5, "dropout before the projections to the retrieval vectors", ge=0, lt=1
    )
    sync_batch_norm: bool = flag(False, "compute batch-norm statistics over all processes")
    temperature: float = flag(0.07, "initial value of the learned temperature", gt=0)
    text_encoder: str = model_flag(
        "checkpoints/uit/bert-base-uncased", "folder with BERT's vocab.txt"
    )
    max_words: int = model_flag(56, "maximum words read per caption", ge=1)
    max_text_length: int = model_flag(
        56, "token ids per caption, with special tokens and padding", ge=3
    )

    # Initial weights
    checkpoint: str = model_flag("", "UIT or person-search checkpoint to start from")
    swin: str = model_flag("", "initial weights of Swin, with Microsoft's or timm's names")
    bert: str = model_flag("", "initial weights of BERT (a file, or the folder that contains it)")

    # Losses
    eda_weight: float = flag(
        0.8, "weight of ITC and ITM on the augmented caption; 0 omits this caption", ge=0
    )
    mlm_weight: float = flag(1.0, "weight of masked language modelling; 0 disables it", ge=0)
    # The release uses 0.1356 x the sum over a batch of 84 images; this loss is a mean over images.
    mim_weight: float = flag(0.1356 * 84, "weight of masked image modelling; 0 disables it", ge=0)
    label_smoothing: float = flag(0.2, "label smoothing of ITC's targets", ge=0, le=1)
    hard_negatives_from: int = flag(
        0, "first epoch that draws ITM negatives by similarity, not uniformly (published: 0)", ge=0
    )

    # Masking
    mlm_share: float = flag(
        WordMasking.share, "maximum fraction of a caption's word pieces to mask", ge=0, le=1
    )
    mlm_most: int = flag(WordMasking.most, "maximum number of masked word pieces per caption", ge=1)
    ngram_share: float = flag(
        WordMasking.ngram_share, "probability of masking a run of words", ge=0, le=1
    )
    ngram_words: int = flag(WordMasking.ngram_words, "maximum words per run", ge=2)
    mim_block: int = flag(32, "side of a masked image block, pixels", ge=1)
    mim_ratio: float = flag(0.5, "fraction of image blocks to mask", ge=0, le=1)

    # Augmentation
    flip_prob: float = flag(0.5, "probability of flipping the image horizontally", ge=0, le=1)
    augment_level: int | None = flag(
        7, f"strength of image operations, 0 to {LEVELS}; none disables them", ge=0, le=LEVELS
    )
    erasing_prob: float = flag(0.6, "probability of erasing a rectangle", ge=0, le=1)
    eda_share: float = flag(0.1, "approximate fraction of words changed by EDA", ge=0, le=1)
    synonyms: bool = flag(True, "use WordNet synonyms in EDA; off: only swaps and deletions")
    wordnet: str | None = data_flag(
        None, "folder with corpora/wordnet (default: NLTK's search path)"
    )

    # Optimization
    batch_size: int = flag(84, "pairs per process and batch", ge=2)  # a single pair has no negative
    epochs: int = flag(30, "passes over the data (release 30, paper 22)")
    lr: float = flag(1e-4, "peak learning rate (release 1e-4, paper 1e-5)")
    schedule: Literal["step", "linear", "cosine"] = flag(
        "step", "learning-rate schedule (release step, paper cosine)"
    )
    warmup_steps: int = flag(
        WARMUP_STEPS,
        "steps of linear warm-up (schedules step and linear); if 0, step always multiplies by 0.2",
        ge=0,
    )
    weight_decay: float = flag(0.01, "AdamW weight decay")
    opt_betas: tuple[float, float] = flag((0.9, 0.98), "AdamW betas")

    checkpoint_activations: bool = speed_flag(
        False, "recompute the blocks of Swin and BERT in the backward pass, to save memory"
    )

    # Run
    k_val: int = output_flag(16, "candidates per query that validation re-ranks", ge=1)
    output_dir: str = flag("output/uit", "folder of the checkpoints and the log")

    def check(self) -> None:
        """See :class:`TrainingConfig`.

        Raises:
            InputError: a value is invalid; the message names the flag.
        """
        super().check()
        if self.mim_weight and self.input_size % self.mim_block:
            raise InputError(
                "--mim_block",
                f"{self.mim_block} px does not divide --input_size {self.input_size} px",
            )
        if self.checkpoint and (self.swin or self.bert):
            raise InputError(
                "--checkpoint", "contradicts --swin and --bert, whose weights it contains",
                todo="pass either --checkpoint, or --swin and --bert",
            )  # fmt: skip
        if self.wordnet and not self.synonyms:
            raise InputError("--wordnet", "contradicts --no_synonyms")
