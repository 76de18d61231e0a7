"""`mini` as its recipe sees it: the encoder up to the block the projector reads, the decoder on packed questions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from foveate.scenes.generator import Scenes
from foveate.scenes.mini import BOS, normalise, tower
from foveate.scenes.packing import IGNORED, Packed, attention_mask, position_ids
from foveate.scenes.targets import Targets, contrastive_loss, dense_loss


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
        if places is None:
            places = torch.arange(visual.shape[1], device=visual.device).expand(len(visual), -1)
        mask = attention_mask(packed, 1 + visual.shape[1], visual.dtype)
        run = self._run_decoder if torch.is_grad_enabled() else self._decoder
        logits: Tensor = run(visual, packed.ids, mask, position_ids(packed, places))
        return logits

    def _encoder(self, values: Tensor, whole: bool, places: Tensor | None) -> tuple[Tensor, Tensor | None]:
        vision = tower(self.model)
        blocks = vision.encoder.layers
        read = self.model.config.vision_feature_layer % (len(blocks) + 1)
        hidden = vision.embeddings(values)
        if places is not None:
            chosen = functional.pad(places + 1, (1, 0))[..., None]  # CLS first
            hidden = hidden.gather(1, chosen.expand(-1, -1, hidden.shape[-1]))
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
        bos = self.words[BOS].expand(len(ids), 1, -1).to(visual.dtype)
        embedded = torch.cat((bos, visual, self.words[ids].to(visual.dtype)), dim=1)
        decoder = self.model.model.language_model
        hidden = decoder(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False)
        return functional.linear(hidden.last_hidden_state[:, -ids.shape[1] :], self.words)


def answer_loss(logits: Tensor, packed: Packed) -> Tensor:
    """Mean cross-entropy of the answers' words and their `<eos>`: logits (B, T, V)."""
    return functional.cross_entropy(logits.float().flatten(0, 1), packed.labels.flatten(), ignore_index=IGNORED)


def encoder_losses(
    learner: Learner, visual: Tensor, pooled: Tensor | None, scenes: Scenes, wanted: Targets
) -> dict[str, Tensor]:
    """The dense losses of every patch and, where there are CLS vectors, the contrastive loss."""
    losses = dense_loss(visual, learner.words, wanted)
    if pooled is not None:
        losses["contrast"] = contrastive_loss(pooled, learner.words, scenes, learner.bias)
    return losses
