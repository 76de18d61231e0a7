"""Question and picture in CLIP's joint space: which text is the question, and what CLIP's two heads make of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from foveate.checkpoints import check_names
from foveate.choosing.images import Image
from foveate.choosing.signals import JOINT
from foveate.core import FoveateError, Method, short
from foveate.families import family_of
from foveate.families.family import Family
from foveate.paths import checked
from foveate.spec import format as format_spec
from foveate.texts import check_text

_MARK = "QUESTION"


def joint_space(
    model: Any, parts: Sequence[Method], *, processor: Any, question: str | Sequence[str] | None, clip: Any
) -> JointSpace | None:
    """The joint space that these parts need, or None where none of them does; FoveateError as `JointSpace` says."""
    for part in parts:
        if any(need in JOINT for need in part.needs):
            return JointSpace(model, family_of(model), clip, processor, question, format_spec(part))
    return None


@dataclass(frozen=True, eq=False)
class Written:
    """What CLIP's text tower makes of one question per image. B images, W positions."""

    text: Tensor  # (B, 1, C) pooled, mean over the pieces of a long question
    words: Tensor  # (B, W, C) every position of every piece
    mask: Tensor  # (B, W) bool, the question's own tokens


class JointSpace:
    """CLIP's two heads beside the encoder of one model.

    Args:
        model: its encoder is the vision tower of `clip`, so that CLIP's head fits on what the projector reads.
        clip: a folder or hub id of a `CLIPModel`, or the pair (CLIPModel, tokenizer); None for the folder `clip` beside
            the model's own weights.
        processor: the model's own, to read the question from the prompt.
        question: in place of the prompt's text after the image; one for all rows, or one for each.
        asked_by: the method, for messages.

    Raises:
        FoveateError: no CLIP, one that does not fit, or no way to know the question.
    """

    def __init__(
        self, model: Any, family: Family, clip: Any, processor: Any, question: str | Sequence[str] | None, asked_by: str
    ) -> None:
        if processor is None and question is None:
            raise FoveateError(
                f"{asked_by} reads the question: give processor= (it is then the prompt's text after the image) or "
                "question="
            )
        clip, self.tokenizer = _loaded(model, clip, asked_by)
        tower: Any = family.tower_of(model)[0]
        width = tower.config.hidden_size
        if clip.vision_embed_dim != width:
            raise FoveateError(
                f"clip= has a vision tower of width {clip.vision_embed_dim}, the model's encoder has {width}; give the "
                "CLIP whose vision tower the encoder is"
            )
        self.questions = Questions(processor, question)
        # The vision tower itself is not kept: the model has run its own.
        self.norm = clip.vision_model.post_layernorm.eval()
        self.projection, self.text_projection = clip.visual_projection.eval(), clip.text_projection.eval()
        self.text_model = clip.text_model.eval()
        self._known: dict[str, Written] = {}

    @torch.no_grad()
    def image(self, hidden: Tensor) -> Tensor:
        """(B, N, E) states that the projector reads -> (B, N, C), float32, not normalised."""
        weight = self.projection.weight
        projected: Tensor = self.projection(self.norm(hidden.to(weight.device, weight.dtype)))
        return projected.float().to(hidden.device)

    def text(self, ids: Tensor, is_text: Tensor, images: Sequence[Image]) -> Written:
        """The question about each image of a prompt (R, S), in its row's words or the caller's."""
        asked = self.questions.about(ids, is_text, images)
        for one in asked:
            if one not in self._known:
                self._known[one] = self._write(one)
        written = [self._known[one] for one in asked]
        self._known = {one: self._known[one] for one in asked}  # of the latest prompt only
        longest = max(one.mask.shape[1] for one in written)
        pad = [longest - one.mask.shape[1] for one in written]
        words = [torch.nn.functional.pad(one.words, (0, 0, 0, more)) for one, more in zip(written, pad, strict=True)]
        masks = [torch.nn.functional.pad(one.mask, (0, more)) for one, more in zip(written, pad, strict=True)]
        text = torch.cat([one.text for one in written])
        return Written(text, torch.cat(words), torch.cat(masks))

    @torch.no_grad()
    def _write(self, question: str) -> Written:
        """One question, cut into pieces that the text tower takes, each between start and end."""
        check_text(self.tokenizer, question, "the question for CLIP")
        start, end = self.tokenizer("").input_ids
        ids = self.tokenizer(question, add_special_tokens=False).input_ids
        most = self.text_model.config.max_position_embeddings
        pieces = [ids[first : first + most - 2] for first in range(0, max(1, len(ids)), most - 2)]
        pad = self.tokenizer.pad_token_id
        pad = end if pad is None else pad
        rows = [[start, *piece, end] + [pad] * (most - 2 - len(piece)) for piece in pieces]
        device = self.text_projection.weight.device
        given = torch.tensor(rows, device=device)
        place = torch.arange(most, device=device)
        length = torch.tensor([len(piece) for piece in pieces], device=device)[:, None]
        seen = self.text_model(input_ids=given, attention_mask=(place < length + 2).long())
        text = self.text_projection(seen.pooler_output).float().mean(dim=0)
        words = self.text_projection(seen.last_hidden_state).float().flatten(0, 1)
        own = ((place > 0) & (place <= length)).flatten()
        return Written(text[None, None], words[None], own[None])


@dataclass
class Questions:
    """The question about each image: what the caller said, or the prompt's text after the image."""

    processor: Any
    given: str | Sequence[str] | None
    _around: tuple[str, str] | None = field(default=None, init=False)

    def about(self, ids: Tensor, is_text: Tensor, images: Sequence[Image]) -> list[str]:
        """One question per image of a prompt of R rows, (R, S).

        Raises:
            FoveateError: another number of questions than rows, or an image without text behind it.
        """
        if isinstance(self.given, str):
            return [self.given] * len(images)
        if self.given is not None:
            if len(self.given) != ids.shape[0]:
                raise FoveateError(f"{len(self.given)} questions were given for a prompt of {ids.shape[0]} rows")
            return [self.given[image.row] for image in images]
        return [self._behind(ids[image.row], is_text[image.row], image) for image in images]

    def _behind(self, ids: Tensor, is_text: Tensor, image: Image) -> str:
        places = torch.arange(ids.numel(), device=ids.device)
        behind = ids[is_text & (places > image.columns[-1])]
        text: str = self._tokenizer.decode(behind, skip_special_tokens=True).strip()
        before, after = self.around
        text = text.removeprefix(before).removesuffix(after).strip()
        if not text:
            raise FoveateError(f"no text follows the image in row {image.row}, so there is no question; give question=")
        return text

    @property
    def around(self) -> tuple[str, str]:
        """What a chat template writes between picture and question, and behind the question; empty without one."""
        if self._around is None:
            self._around = self._read_template()
        return self._around

    def _read_template(self) -> tuple[str, str]:
        image = getattr(self.processor, "image_token", None)
        if not getattr(self.processor, "chat_template", None) or not image:
            return "", ""
        content = [{"type": "image"}, {"type": "text", "text": _MARK}]
        message = [{"role": "user", "content": content}]
        whole = self.processor.apply_chat_template(message, add_generation_prompt=True)
        before, mark, after = whole.partition(_MARK)
        if not mark:
            return "", ""
        return self._plain(before.rpartition(image)[2]), self._plain(after)

    def _plain(self, text: str) -> str:
        """As it looks once it has been through the tokenizer, without special tokens."""
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        plain: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return plain.strip()

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)


def _loaded(model: Any, clip: Any, asked_by: str) -> tuple[Any, Any]:
    """The CLIPModel and its tokenizer, on the model's device; what was given as a pair stays where it is."""
    if isinstance(clip, tuple) and len(clip) == 2 and isinstance(clip[0], CLIPModel):
        return clip
    if clip is None:
        beside = Path(str(getattr(model, "name_or_path", ""))) / "clip"
        if not (beside / "config.json").is_file():
            raise FoveateError(
                f"{asked_by} compares question and picture in CLIP's joint space, and this model brings no CLIP; give "
                "clip=, the CLIP whose vision tower its encoder is (for LLaVA-1.5 openai/clip-vit-large-patch14-336)"
            )
        clip = beside
    if not isinstance(clip, str | Path):
        raise FoveateError(
            f"clip={type(clip).__name__} is neither a folder or hub id of a CLIPModel nor the pair (CLIPModel, "
            "tokenizer)"
        )
    folder, named = checked(clip), f"clip={short(repr(str(clip)))}"
    source = folder if folder.is_dir() else clip
    check_names(source, named)
    try:
        loaded = CLIPModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
        return loaded.to(model.device), AutoTokenizer.from_pretrained(source)
    # The loaders raise OSError, ValueError, KeyError and whatever a damaged file leads to.
    except Exception as error:
        raise FoveateError(f"{named} cannot be loaded as a CLIPModel with its tokenizer: {error}") from error
