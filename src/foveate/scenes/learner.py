"""`mini` as its recipe sees it: the encoder up to the block the projector reads, the decoder on packed questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from foveate.scenes import vocabulary
from foveate.scenes.generator import Scenes
from foveate.scenes.mini import BOS, normalise, tower
from foveate.scenes.packing import IGNORED, Packed, attention_mask, position_ids
from foveate.scenes.targets import SCALE, Targets, contrastive_loss, dense_loss

NAMED, ASKED = 1, 3  # blocks behind which a digit's tag knows its object's name, and a name in a question the digit


@dataclass(frozen=True)
class Staged:
    """What a decoder says from which tokens leave between blocks.

    Attributes:
        logits: (B, T, V) after every text token.
        seen: (B, K, D) hidden states of the visual tokens that are left behind block `NAMED`.
        left: (B, K) columns of these tokens among those the decoder was given.
        read: (B, T, D) hidden states of the text behind block `ASKED`.
    """

    logits: Tensor
    seen: Tensor
    left: Tensor
    read: Tensor


class Learner(nn.Module):
    """A model in training, with the head of the contrastive loss, which is dropped afterwards.

    Args:
        model: a `mini` in float32; its weights are trained in place.
        compiled: whether encoder and decoder run through `torch.compile` (worth it from minutes of training on).
    """

    def __init__(self, model: LlavaForConditionalGeneration, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(model.config.vision_config.hidden_size, model.config.text_config.hidden_size)
        self.bias = nn.Parameter(torch.tensor(-4.0))
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        wrap: Callable[[Any], Any] = torch.compile if compiled else lambda function: function
        self._run_encoder = wrap(self._encoder)
        self._run_decoder = wrap(self._decoder)

    @property
    def words(self) -> Tensor:
        """(V, D) word embeddings, tied to the decoder's output."""
        return self.model.get_input_embeddings().weight

    def encode(self, pixels: Tensor, whole: bool = False, places: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Visual tokens (B, N, D) of uint8 pictures and, if `whole`, CLS vectors (B, D) in the words' space.

        Without `whole` the blocks after the one that the projector reads are left out. With `places` (B, K), raster
        indices, the encoder sees K patches of each picture alone.
        """
        # Exams come in other shapes and without gradients: compiling them anew would cost more than they do.
        run = self._run_encoder if torch.is_grad_enabled() else self._encoder
        read: tuple[Tensor, Tensor | None] = run(normalise(pixels), whole, places)
        return read

    def decode(self, visual: Tensor, packed: Packed, places: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) after every text token of `packed`, which follows the visual tokens (B, N, D).

        `places` (B, N) are the tokens' raster indices where a picture is given by some of its tokens only.
        """
        places = _every(visual) if places is None else places
        mask = attention_mask(packed, 1 + visual.shape[1], visual.dtype)
        run = self._run_decoder if torch.is_grad_enabled() else self._decoder
        logits: Tensor = run(visual, packed.ids, mask, position_ids(packed, places))
        return logits

    def decode_staged(
        self, visual: Tensor, packed: Packed, places: Tensor | None, leaving: Mapping[int, Tensor]
    ) -> Staged:
        """As `decode`, block by block: nothing that inference runs.

        `leaving` names the blocks before which tokens leave: (B, K) columns, ascending, of those that stay among the
        tokens left there.
        """
        decoder = self.model.model.language_model
        hidden = self._embedded(visual, packed.ids)
        rotary = decoder.rotary_emb(hidden, position_ids(packed, _every(visual) if places is None else places))
        left, text = _every(visual), packed.ids.shape[1]
        behind: dict[int, tuple[Tensor, Tensor]] = {}
        mask = attention_mask(packed, 1 + left.shape[1], hidden.dtype)
        for number, block in enumerate(decoder.layers):
            if number in leaving:
                columns = _with_text(leaving[number], left.shape[1], text)
                hidden, *rotary = (picked(part, columns) for part in (hidden, *rotary))
                left = left.gather(1, leaving[number])
                mask = attention_mask(packed, 1 + left.shape[1], hidden.dtype)
            hidden = block(hidden, attention_mask=mask, position_embeddings=tuple(rotary), use_cache=False)
            behind[number] = hidden, left
        logits = functional.linear(decoder.norm(hidden[:, -text:]), self.words)
        last = len(decoder.layers) - 1
        (seen, left), (read, _) = behind[min(NAMED, last)], behind[min(ASKED, last)]
        return Staged(logits, seen[:, 1:-text], left, read[:, -text:])

    def _encoder(self, values: Tensor, whole: bool, places: Tensor | None) -> tuple[Tensor, Tensor | None]:
        vision = tower(self.model)
        blocks = vision.encoder.layers
        read = self.model.config.vision_feature_layer % (len(blocks) + 1)
        hidden = vision.embeddings(values)
        if places is not None:
            hidden = picked(hidden, functional.pad(places + 1, (1, 0)))  # CLS first
        hidden = vision.pre_layrnorm(hidden)
        for block in blocks[:read]:
            hidden = block(hidden, None)
        visual = self.model.model.multi_modal_projector(hidden[:, 1:])
        if not whole:
            return visual, None
        for block in blocks[read:]:
            hidden = block(hidden, None)
        return visual, self.head(vision.post_layernorm(hidden[:, 0]))

    def _decoder(self, visual: Tensor, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        embedded = self._embedded(visual, ids)
        decoder = self.model.model.language_model
        hidden = decoder(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False)
        return functional.linear(hidden.last_hidden_state[:, -ids.shape[1] :], self.words)

    def _embedded(self, visual: Tensor, ids: Tensor) -> Tensor:
        bos = self.words[BOS].expand(len(ids), 1, -1).to(visual.dtype)
        return torch.cat((bos, visual, self.words[ids].to(visual.dtype)), dim=1)


def _every(visual: Tensor) -> Tensor:
    """Columns (B, N) of all visual tokens."""
    return torch.arange(visual.shape[1], device=visual.device).expand(len(visual), -1)


def _with_text(kept: Tensor, count: int, text: int) -> Tensor:
    """Columns (B, 1 + K + T) of `<bos>`, of the visual tokens `kept` (B, K) out of `count`, and of the text."""
    behind = torch.arange(1 + count, 1 + count + text, device=kept.device).expand(len(kept), -1)
    return torch.cat((torch.zeros_like(kept[:, :1]), kept + 1, behind), dim=1)


def picked(values: Tensor, columns: Tensor) -> Tensor:
    """(B, K, D) of (B, L, D), or of (1, L, D) where all rows are alike."""
    values = values.expand(len(columns), -1, -1)
    return values.gather(1, columns[..., None].expand(-1, -1, values.shape[-1]))


def answer_loss(logits: Tensor, packed: Packed) -> Tensor:
    """Mean cross-entropy of the answers' words and their `<eos>`: logits (B, T, V)."""
    return functional.cross_entropy(logits.float().flatten(0, 1), packed.labels.flatten(), ignore_index=IGNORED)


def naming_loss(said: Staged, words: Tensor, wanted: Targets) -> Tensor:
    """Mean cross-entropy of the name of their object, over patches on digit tags: `wanted` of all given tokens.

    A tag is bound to its object before questions look for it, in the words (V, D) by which they look for objects.
    """
    names = wanted.name.masked_fill(~wanted.tag, IGNORED).gather(1, said.left)
    return _read_as(SCALE * said.seen, words[vocabulary.NAME_IDS], names)


def asking_loss(said: Staged, words: Tensor, packed: Packed, digits: Tensor) -> Tensor:
    """Mean cross-entropy of the digit of the object asked about, over the names in questions: `digits` (B, 7)."""
    name = _within(packed.ids, vocabulary.NAME_IDS) & (packed.target >= 0)
    there = digits.gather(1, packed.target.clamp(min=0)).masked_fill(~name, IGNORED)
    read = 4 * functional.rms_norm(said.read.float(), said.read.shape[-1:], eps=1e-6)
    return _read_as(read, words[vocabulary.DIGIT_IDS], there)


def _within(ids: Tensor, some: slice) -> Tensor:
    """Which tokens are words of one kind."""
    return (ids >= some.start) & (ids < some.stop)


def _read_as(hidden: Tensor, words: Tensor, wanted: Tensor) -> Tensor:
    """Mean cross-entropy of hidden states (B, K, D) read as one of some words (W, D); 0 where none is wanted."""
    where = wanted != IGNORED
    if not where.any():
        return hidden.sum() * 0.0
    return functional.cross_entropy(hidden[where].float() @ words.float().T, wanted[where])


def likeness_loss(logits: Tensor, before: Tensor, packed: Packed) -> Tensor:
    """Mean divergence of the answers' words from what other weights say: logits (B, T, V) and theirs, `before`.

    Digits are left out, of which `asking_loss` and the answers have more to say.
    """
    where = (packed.labels != IGNORED) & ~_within(packed.labels, vocabulary.DIGIT_IDS)
    said, wanted = (values[where].float().log_softmax(dim=-1) for values in (logits, before))
    return functional.kl_div(said, wanted, log_target=True, reduction="batchmean")


def encoder_losses(
    learner: Learner, visual: Tensor, pooled: Tensor | None, scenes: Scenes, wanted: Targets
) -> dict[str, Tensor]:
    """The dense losses of every patch and, where there are CLS vectors, the contrastive loss."""
    losses = dense_loss(visual, learner.words, wanted)
    if pooled is not None:
        losses["contrast"] = contrastive_loss(pooled, learner.words, scenes, learner.bias)
    return losses
