"""Make a small, untrained Qwen3-VL and its processor: `python -m pab.encoders.st.make_small`.

The model has the architecture and the files of published models, so all commands for
vision-language models run on a laptop. `--kind` selects what sentence-transformers adds to it:
`reranker` scores a pair by the logits of "yes" and "no". `dense` returns the last token's vector,
normalized to length 1. `late` returns one such vector per token of a caption, or per image token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch

from pab.core.config import config_from_args, data_flag, flag, model_flag, output_flag
from pab.core.errors import InputError, run_cli
from pab.core.files import write_folder
from pab.core.progress import progress
from pab.data.training_set import TrainingSet
from pab.encoders.st.extra import sentence_transformers
from pab.encoders.st.loading import loading
from pab.encoders.st.pair_inputs import GENERATION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

YES, NO = "yes", "no"
PAD, END = "<|endoftext|>", "<|im_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
SPECIAL = (PAD, "<|im_start|>", END, VISION_START, VISION_END, IMAGE, VIDEO)
# Standard deviation of the token embeddings. With 0.02, as for the other weights, the output of the
# first block outweighs a token's own embedding, and an untrained model hardly distinguishes tokens.
EMBEDDING_STD = 0.1
MERGE = 2  # patches per side that become one token, as in Qwen3-VL
# Roles as in Qwen3-VL-Reranker: an instruction (system), a caption (query), an image (document).
CHAT_TEMPLATE = """\
{%- macro parts(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ parts(message.content) }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


@dataclass(frozen=True)
class SmallConfig:
    """Settings of a small model; each field is a flag."""

    data_path: str = data_flag("data/mini", "data root whose captions train the tokenizer")
    out: str = output_flag("output/small_vlm", "folder of the model; must not exist")
    kind: Literal["reranker", "dense", "late"] = model_flag(
        "reranker", "kind of model that sentence-transformers reads from the folder"
    )
    width: int = model_flag(192, "width of the language and the vision layers", ge=16)
    layers: int = model_flag(4, "number of language layers, and of vision layers", ge=2)
    heads: int = model_flag(4, "attention heads", ge=1)
    patch: int = model_flag(16, "side of a patch, pixels", ge=2)
    side: int = model_flag(192, "images are resized to about side x side pixels", ge=32)
    vocab_size: int = model_flag(1500, "maximum number of tokens, special ones included", ge=300)
    dims: int = model_flag(64, "late: width of the token vectors", ge=8)
    start: str | None = model_flag(
        None, "folder of a small model of any kind; its weights and processor are kept"
    )
    seed: int = flag(16, "seed of the random weights")

    def check(self) -> None:
        """Reject a width that is not a multiple of four times the number of heads.

        Raises:
            InputError: the message names the flag.
        """
        if self.width % (4 * self.heads):
            raise InputError("--width", f"must be a multiple of {4 * self.heads} (4 x --heads)")


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-pair encoding with Qwen's special tokens.

    "yes" and "no" become single tokens, unless the vocabulary is too small for their merges.

    Args:
        captions: training text.
        vocab_size: maximum number of tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()

    def lines() -> Iterator[str]:
        for caption in captions:
            yield caption
            yield f"{YES}\n{NO}\n"  # frequent enough to be merged

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(lines(), trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="left"
    )


def write_model(config: SmallConfig, captions: Iterable[str], folder: Path) -> None:
    """Write a Qwen3-VL with its processor to a folder, in the format of transformers."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = train_tokenizer(captions, config.vocab_size)
    vocabulary = tokenizer.get_vocab()
    ids = {name: vocabulary[name] for name in SPECIAL}
    pixels = {"shortest_edge": config.side**2 // 2, "longest_edge": config.side**2}
    sizes: dict[str, Any] = {"patch_size": config.patch, "merge_size": MERGE}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(size=pixels, **sizes), tokenizer,
        Qwen3VLVideoProcessor(size=pixels, **sizes), chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    head = config.width // config.heads
    rotary = head // 2  # pairs of rotated channels, shared by time, height and width
    sections = [rotary - 2 * (rotary // 3), rotary // 3, rotary // 3]
    text = {
        "vocab_size": len(tokenizer), "hidden_size": config.width,
        "intermediate_size": 3 * config.width, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.heads,
        "head_dim": head, "max_position_embeddings": 4096, "pad_token_id": ids[PAD],
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections,
            "mrope_interleaved": True,
        },
    }  # fmt: skip
    grid = 2 * config.side // config.patch  # positions are interpolated; this covers tall images
    vision = {
        "depth": config.layers, "hidden_size": config.width, "num_heads": config.heads,
        "intermediate_size": 3 * config.width, "patch_size": config.patch,
        "spatial_merge_size": MERGE, "out_hidden_size": config.width,
        "num_position_embeddings": grid**2,
        "deepstack_visual_indexes": [config.layers // 2],
    }  # fmt: skip
    torch.manual_seed(config.seed)
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text, vision_config=vision, image_token_id=ids[IMAGE],
            video_token_id=ids[VIDEO], vision_start_token_id=ids[VISION_START],
            vision_end_token_id=ids[VISION_END], tie_word_embeddings=True,
        )
    )  # fmt: skip
    embeddings: Any = model.get_input_embeddings()
    torch.nn.init.normal_(embeddings.weight, std=EMBEDDING_STD)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def with_modules(kind: str, dims: int, written: Path) -> Any:
    """Load a written model with the modules of its kind, as a model of sentence-transformers.

    Args:
        kind: ``reranker``, ``dense`` or ``late``.
        dims: width of the token vectors of a ``late`` model.
        written: folder from :func:`write_model`, or of a small model of any kind.

    Raises:
        InputError: sentence-transformers is not installed, or the folder cannot be loaded.
    """
    library = sentence_transformers()
    modules = sentence_transformers("base.modules")
    with loading(written):
        options = {"transformer_task": "any-to-any", "processing_kwargs": GENERATION}
        transformer = modules.Transformer(str(written), **(options if kind == "reranker" else {}))
    if kind == "reranker":
        scores = sentence_transformers("cross_encoder.modules")
        yes, no = (transformer.tokenizer.convert_tokens_to_ids(word) for word in (YES, NO))
        return library.CrossEncoder(modules=[transformer, scores.LogitScore(yes, no)])
    width = transformer.get_embedding_dimension()
    if kind == "late":
        return late_interaction(transformer, width, dims)
    parts = sentence_transformers("sentence_transformer.modules")
    pooling = parts.Pooling(width, "lasttoken")
    return library.SentenceTransformer(modules=[transformer, pooling, modules.Normalize()])


def late_interaction(transformer: Any, width: int, dims: int) -> Any:
    """Build a late-interaction model.

    The model returns unit vectors [N, dims] of the N tokens of a caption, or of the N image tokens.
    """
    library, modules = sentence_transformers(), sentence_transformers("base.modules")
    projection = modules.Dense(
        width, dims, bias=False, activation_function=torch.nn.Identity(),
        module_input_name="token_embeddings",
    )  # fmt: skip
    # Of an image's tokens, keep only the image tokens. The chat template's tokens are equal for all
    # images: training from random weights would match every caption to them, and learn nothing
    # about the image.
    mask = sentence_transformers("multi_vector_encoder.modules").MultiVectorMask(
        keep_only_token_ids=[transformer.tokenizer.convert_tokens_to_ids(IMAGE)]
    )
    normalize = modules.Normalize(module_input_name="token_embeddings")
    return library.MultiVectorEncoder(modules=[transformer, projection, mask, normalize])


def make_small(config: SmallConfig, captions: Iterable[str]) -> int:
    """Write a small model; return the number of parameters of its Qwen3-VL.

    The folder appears once all its files are written.

    Args:
        config: settings of the model.
        captions: text that trains the tokenizer; not read with ``start``.

    Raises:
        InputError: sentence-transformers is not installed, ``start`` is not a model or cannot be
            loaded, or ``out`` exists or cannot be written.
    """
    sentence_transformers()
    if config.start is not None and not (Path(config.start) / "config.json").is_file():
        raise InputError("--start", f"expected the folder of a model, found {config.start}")
    if Path(config.out).exists():
        raise InputError("--out", f"{config.out} exists", todo="choose another folder")
    with TemporaryDirectory() as temporary:
        written = Path(config.start or temporary)
        if config.start is None:
            write_model(config, captions, written)
        model = with_modules(config.kind, config.dims, written)
        write_folder(Path(config.out), model.save)
    return sum(parameter.numel() for parameter in model[0].model.parameters())


def read_captions(data_path: str) -> Iterator[str]:
    """Yield all captions of a data root, which is opened when the first caption is needed."""
    for pair in progress(TrainingSet.open(data_path), "reading captions", "captions"):
        yield pair.caption


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write a model."""
    config, _ = config_from_args(SmallConfig, argv, prog="python -m pab.encoders.st.make_small")
    count = make_small(config, read_captions(config.data_path))
    print(f"Qwen3-VL with {count:,} parameters -> {config.out}")


if __name__ == "__main__":
    run_cli(main)
