"""Score pairs of a caption and an image with a plain forward pass of a vision-language model.

The model is asked whether the image matches the caption. The score is logit("yes") - logit("no") of
the next token, which is the convention of Qwen3-VL-Reranker and similar rerankers.

The chat template gets the messages that sentence-transformers builds for a pair: the instruction
(role ``system``), the caption (``query``) and the image (``document``). Many templates ignore the
last two roles. Such a template gets a single ``user`` message with all three.

Shape letters: `B` pairs, `L` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pab.core.devices import full_precision
from pab.core.errors import InputError
from pab.core.notices import notice
from pab.encoders.st.control_tokens import refuse_control_tokens
from pab.encoders.st.folders import LIBRARY_CONFIG, MODULES, read_json, setting
from pab.encoders.st.loading import (
    PLAIN_CAPTION,
    check_image_text_model,
    load_image_text_model,
    load_processor,
    plain_image,
    processing,
)
from pab.encoders.st.pictures import pixels_only

# Default instruction, in the wording of public rerankers for this task.
PROMPT = (
    "Rank images for exact text-based person anomaly search; visible people, clothing, action, "
    "object interaction, relations and scene must match."
)
# Added if the chat template lacks the roles of a pair: such templates contain no question.
QUESTION = 'Does the image match the caption? Answer only "yes" or "no".'
YES, NO = "yes", "no"
TUNED_PROMPT = "tuned"  # name of the instruction that a model of this project was tuned with
TRANSFORMER_CONFIG = "sentence_bert_config.json"  # settings of the module `Transformer`
GENERATION = {"chat_template": {"add_generation_prompt": True}}


@dataclass(frozen=True)
class RerankerSettings:
    """Settings of a model folder for use as a reranker.

    Attributes:
        folder: folder of the transformer: the model folder, or one of its subfolders.
        processing: keyword arguments of the processor, by kind: ``chat_template``, ``text``,
            ``image``, ``common``.
        yes: token id of the positive answer; None if the folder does not name it.
        no: token id of the negative answer; None if the folder does not name it.
        prompt: instruction that the model was tuned with by `scripts/finetune_reranker.py`; None
            for other models.
    """

    folder: Path
    processing: Mapping[str, Any] = field(default_factory=lambda: dict(GENERATION))
    yes: int | None = None
    no: int | None = None
    prompt: str | None = None


def read_settings(folder: Path) -> RerankerSettings:
    """Read sentence-transformers' settings of a reranker; without settings, use the defaults.

    Raises:
        InputError: a file is damaged, or the folder holds a model other than a reranker that
            answers with a token.
    """
    listed, whole = folder / MODULES, folder / LIBRARY_CONFIG
    prompts = setting(whole, read_json(whole), "prompts", dict) or {}
    prompt = setting(whole, prompts, TUNED_PROMPT, str)
    if not listed.is_file():
        return RerankerSettings(folder, prompt=prompt)
    modules = [one if isinstance(one, dict) else {} for one in read_json(listed, list)]
    kinds = [str(module.get("type", "?")).rpartition(".")[2] for module in modules]
    if kinds != ["Transformer", "LogitScore"]:
        raise InputError(
            listed, "expected a reranker that answers with a token (Transformer, LogitScore), "
            f"found {', '.join(kinds) or 'no module'}",
            todo="use a reranker, or a plain vision-language model without this file",
        )  # fmt: skip
    first, last = (folder / str(module.get("path", "")) for module in modules)
    answers, transformer = last / "config.json", first / TRANSFORMER_CONFIG
    ids = read_json(answers)
    yes, no = (setting(answers, ids, name, int) for name in ("true_token_id", "false_token_id"))
    processing = setting(transformer, read_json(transformer), "processing_kwargs", dict) or {}
    for name in processing:
        setting(transformer, processing, name, dict)
    return RerankerSettings(first, processing, yes, no, prompt)


@dataclass(frozen=True)
class AnswerTokens:
    """Token ids of the two answers."""

    yes: int
    no: int

    def described(self, tokenizer: Any) -> str:
        """Describe the answers in one line."""
        yes, no = tokenizer.convert_ids_to_tokens([self.yes, self.no])
        return f"{yes!r} is token {self.yes}, {no!r} is token {self.no}"


def answer_tokens(
    tokenizer: Any, settings: RerankerSettings, yes: str | None = None, no: str | None = None
) -> AnswerTokens:
    """Choose the token ids of the answers: from the flags, else the folder, else "yes" and "no".

    Args:
        tokenizer: tokenizer of the model.
        settings: settings of the model's folder.
        yes: text of the positive answer (``--yes_token``); None uses the folder's id, else "yes".
        no: text of the negative answer (``--no_token``); None uses the folder's id, else "no".

    Raises:
        InputError: an answer is not a single token, the folder's id is not in the tokenizer, or
            both answers are the same token.
    """
    found = []
    for flag, word, known, usual in (
        ("--yes_token", yes, settings.yes, YES), ("--no_token", no, settings.no, NO),
    ):  # fmt: skip
        if word is None and known is not None:
            if not 0 <= known < len(tokenizer):
                raise InputError(
                    flag, f"the model's configuration names token {known}, but its tokenizer has "
                    f"{len(tokenizer)} tokens", todo="pass the answer's text with this flag",
                )  # fmt: skip
            found.append(known)
            continue
        if word is None:
            notice(flag, f"the model's configuration names no answer, so {usual!r} is used")
        found.append(single_token(tokenizer, usual if word is None else word, flag))
    if found[0] == found[1]:
        raise InputError("--yes_token", f"is the same token as --no_token (id {found[0]})")
    return AnswerTokens(*found)


def single_token(tokenizer: Any, word: str, flag: str) -> int:
    """Return the id of a text that is exactly one token.

    Raises:
        InputError: the text is several tokens, none, or unknown; the message names the flag.
    """
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids))) or "none"
        raise InputError(
            flag, f"expected the text of one token, found {word!r} (tokens: {pieces})",
            todo="pass a text that the model's tokenizer keeps whole",
        )  # fmt: skip
    return int(ids[0])


def renders(processor: Any, settings: Mapping[str, Any], roles: tuple[str, str]) -> bool:
    """Return true if a chat template renders a text of one role, and text and images of another.

    The template is rendered with different contents, and each difference must change the result. A
    template that raises an error for a role does not render it.

    Args:
        processor: processor with the chat template.
        settings: keyword arguments of the chat template.
        roles: role of the caption, role of the image; the same role makes a single message.
    """
    from jinja2 import TemplateError

    def rendered(caption: str, *document: dict[str, str]) -> str:
        text = {"type": "text", "text": caption}
        contents = [[text, *document]] if roles[0] == roles[1] else [[text], list(document)]
        messages = [
            {"role": role, "content": content}
            for role, content in zip(dict.fromkeys(roles), contents, strict=True)
        ]
        return str(processor.apply_chat_template(messages, tokenize=False, **settings))

    image, text = {"type": "image"}, {"type": "text", "text": "bravo"}
    try:
        base = rendered("alpha", text)
        return base not in (
            rendered("charlie", text), rendered("alpha", {**text, "text": "foxtrot"}),
            rendered("alpha", text, image),
        )  # fmt: skip
    except TemplateError:
        return False


def keeps_pair_roles(processor: Any, settings: Mapping[str, Any]) -> bool:
    """Return true if a chat template renders the roles of a pair, false for ``user`` alone.

    Raises:
        InputError: the template renders no image beside a caption in either form.
    """
    if renders(processor, settings, ("query", "document")):
        return True
    if renders(processor, settings, ("user", "user")):
        return False
    raise InputError(
        "--model", "its chat template renders no image beside a caption",
        todo="use a model whose chat_template.jinja renders text and images of the role user",
    )  # fmt: skip


def head_in_fp32(model: Any) -> None:
    """Compute a model's logits in float32 from its hidden states, whatever the weights' dtype.

    Logits in bf16 have steps of 0.06 to 0.25, so candidates of a query could tie. Autocast does not
    change this product.

    Args:
        model: model of transformers with a linear output layer; it is changed in place.

    Raises:
        InputError: its output layer is not linear.
    """

    def product(head: nn.Linear, inputs: tuple[Tensor], _: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias.float()
        with full_precision(head.weight.device):
            return F.linear(inputs[0].float(), head.weight.float(), bias)

    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise InputError(
            "--dtype", f"expected a model with a linear output layer, found {type(head).__name__}",
            todo="use --dtype fp32",
        )  # fmt: skip
    head.register_forward_hook(product)


class PairModel:
    """Vision-language model that scores pairs of a caption and an image.

    Attributes:
        model: model with logits; peft may wrap it.
        processor: tokenizer, image processor and chat template.
        tokens: token ids of the answers.
        prompt: instruction; empty for none.
        settings: keyword arguments of the processor, see :class:`RerankerSettings`.
        pair_roles: whether the chat template renders the roles of a pair.
    """

    def __init__(
        self, model: nn.Module, processor: Any, tokens: AnswerTokens, prompt: str = PROMPT,
        settings: Mapping[str, Any] = GENERATION,
    ) -> None:  # fmt: skip
        self.model, self.processor, self.tokens = model, processor, tokens
        self.prompt, self.settings = prompt, settings
        self.pair_roles = keeps_pair_roles(processor, settings.get("chat_template", {}))

    @classmethod
    def open(
        cls, folder: Path, *, prompt: str = PROMPT, yes_token: str | None = None,
        no_token: str | None = None, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> PairModel:  # fmt: skip
        """Load a model in evaluation mode.

        Args:
            folder: folder of the model, with or without sentence-transformers' settings.
            prompt: instruction; empty for none.
            yes_token: text of the positive answer; see :func:`answer_tokens`.
            no_token: text of the negative answer.
            dtype: dtype of the weights.
            device: device of the model.

        Raises:
            InputError: the model, its processor or its chat template is not supported or cannot be
                loaded, or an answer or the instruction is invalid.
        """
        settings = read_settings(folder)
        check_image_text_model(settings.folder)
        processor = load_processor(settings.folder)
        tokens = answer_tokens(processor.tokenizer, settings, yes_token, no_token)
        model = load_image_text_model(settings.folder, dtype, device)
        if dtype != torch.float32 or isinstance(model.get_output_embeddings(), nn.Linear):
            head_in_fp32(model)  # training may compute float32 weights in bf16 (autocast)
        made = cls(model, processor, tokens, prompt, settings.processing)
        made.check(settings.folder)
        return made

    def check(self, folder: Path) -> None:
        """Build the inputs of a plain pair, so that an invalid model or instruction fails early.

        Args:
            folder: folder of the model, for errors.

        Raises:
            InputError: the instruction contains a control token, or the processor fails.
        """
        refuse_control_tokens(self.processor.tokenizer, [self.prompt], "--prompt")
        with processing(folder):
            self.inputs([PLAIN_CAPTION], [plain_image()])

    def messages(self, caption: str, image: Image.Image) -> list[dict[str, Any]]:
        """Build the messages of a pair for the chat template."""
        question, picture = {"type": "text", "text": caption}, {"type": "image", "image": image}
        if not self.pair_roles:
            words = "\n".join(filter(None, (self.prompt, QUESTION, f"Caption: {caption}")))
            text = {"type": "text", "text": words}
            return [{"role": "user", "content": [picture, text]}]
        pair = [
            {"role": "query", "content": [question]}, {"role": "document", "content": [picture]},
        ]  # fmt: skip
        if not self.prompt:
            return pair
        return [{"role": "system", "content": [{"type": "text", "text": self.prompt}]}, *pair]

    def inputs(self, captions: Sequence[str], images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Build the model's inputs for B pairs, on the CPU, such as token ids, mask and pixels.

        Args:
            captions: B captions.
            images: B RGB images, of any size that the image processor accepts. Their EXIF
                orientation is not applied.

        Returns:
            The processor's tensors; ``input_ids`` and ``attention_mask`` are int64 [B, L] with
            padding on the left.

        Raises:
            ValueError: the processor rejects an image or a caption, or does not pad on the left.
                Some processors raise ZeroDivisionError or RuntimeError instead.
        """
        settings = self.settings
        pairs = zip(captions, map(pixels_only, images), strict=True)
        found = self.processor.apply_chat_template(
            [self.messages(caption, image) for caption, image in pairs],
            tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={
                "text_kwargs": {"padding": True, **settings.get("text", {})},
                "images_kwargs": dict(settings.get("image", {})),
                "common_kwargs": dict(settings.get("common", {})),
            },
            **settings.get("chat_template", {}),
        )  # fmt: skip
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        if not bool(tensors["attention_mask"][:, -1].all()):
            raise ValueError("the processor does not pad on the left")
        return tensors

    def scores(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Score B pairs: logit(yes) - logit(no) at the last position, float32 [B].

        Args:
            inputs: tensors of :meth:`inputs`, on any device.
        """
        found = self.model(**self.on_device(inputs), logits_to_keep=1, use_cache=False)
        logits = found.logits[:, -1].float()  # [B, V]
        return logits[:, self.tokens.yes] - logits[:, self.tokens.no]

    def on_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return inputs with their tensors on the model's device."""
        device = next(self.model.parameters()).device
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
