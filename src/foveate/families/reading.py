"""The shape of a model by its configuration, through its family's row; what no row knows is refused or assumed."""

from __future__ import annotations

import dataclasses
from typing import Any

from foveate.core import did_you_mean
from foveate.families.decoders import assume_decoder, decoder_of
from foveate.families.entries import Entries, entries
from foveate.families.family import Family
from foveate.families.rows import FAMILIES
from foveate.families.shapes import DecoderShape, ModelShape, ProjectorShape, TowerShape, UnknownShape
from foveate.families.towers import TOWERS, Tower


def read_model(config: Any) -> ModelShape:
    """The shape of a vision-language model from its config.

    Raises:
        UnknownShape: a model, encoder or decoder of unknown type.
        FoveateError: a size that the config does not state.
    """
    top = entries(config)
    kind = str(top.get("model_type"))
    family = _family(kind)
    if family is None:
        known = [kind for family in FAMILIES if family.shape is not None for kind in family.types]
        raise UnknownShape(f"the shape of a {kind!r} model is not known; {did_you_mean(kind, known)}")
    decoder = decoder_of(top, family.decoder)
    tower, projector = _encoder(top, family, decoder)
    return ModelShape(decoder, tower, projector, _name(top))


def read_decoder(config: Any) -> DecoderShape:
    """The decoder of a config, or of its `text_config`.

    Raises:
        UnknownShape: a decoder of unknown type.
        FoveateError: a size that the config does not state.
    """
    top = entries(config)
    family = _family(str(top.get("model_type")))
    return decoder_of(top, None if family is None else family.decoder)


def read_or_assume(config: Any, family: Family, blocks: int) -> tuple[ModelShape, tuple[str, ...]]:
    """The shape of a model of a family, and what of it is assumed, in words; nothing where all is known.

    A decoder of unknown type counts as if its blocks were dense and gated. Encoder and projector count nothing where
    the row names no reader, or the encoder is unknown.

    Args:
        blocks: of the encoder.

    Raises:
        FoveateError: a size that the config does not state.
    """
    top, assumed = entries(config), []
    try:
        decoder = decoder_of(top, family.decoder)
    except UnknownShape as error:
        decoder = assume_decoder(top)
        assumed.append(
            f"the decoder's blocks are dense and gated ({error.args[0].partition(';')[0]}: DECODERS in "
            "families/decoders.py is where to add it)"
        )
    try:
        tower, projector = _encoder(top, family, decoder)
    except UnknownShape as error:
        tower, projector = nothing(blocks)
        assumed.append(
            f"what encoder and projector compute is not counted ({error.args[0].partition(';')[0]}: `shape` of the "
            "family's row, in families/rows.py, is where to name its reader)"
        )
    return ModelShape(decoder, tower, projector, _name(top)), tuple(assumed)


def assume_model(config: Any) -> ModelShape:
    """The shape of a model without a row: its decoder by the usual names of sizes; encoder and projector count nothing.

    Raises:
        FoveateError: a size that the config does not state.
    """
    top = entries(config)
    return ModelShape(assume_decoder(top), *nothing(1), str(top.get("model_type")))


def nothing(blocks: int) -> tuple[TowerShape, ProjectorShape]:
    """An encoder of so many blocks, and its projector, that count as good as nothing."""
    sizes: dict[str, Any] = dict(width=1, ffn=1, heads=1, tokens=1, patch=1, channels=1)
    return TowerShape(layers=max(1, blocks), cls=False, own_size=True, **sizes), ProjectorShape(((1, 1),), 1)


def _family(kind: str) -> Family | None:
    return next((family for family in FAMILIES if kind in family.types), None)


def _encoder(top: Entries, family: Family, decoder: DecoderShape) -> tuple[TowerShape, ProjectorShape]:
    """Encoder and projector by the row's reader, with what the rows of family and encoder say besides."""
    if family.shape is None:
        raise UnknownShape(f"the shape of a {top.get('model_type')!r} model is not known")
    row = _described(top, family)
    tower, projector = family.shape(top, decoder, row)
    put_back = family.puts_back(row)
    return dataclasses.replace(tower, gated=row.gated, own_size=row.packed, put_back=put_back), projector


def _described(top: Entries, family: Family) -> Tower:
    """The row of the encoder; published configs may leave its name out, or call it as the whole model."""
    kind = entries(top.get("vision_config") or {}).get("model_type")
    if kind is None or kind == top.get("model_type"):
        return family.described(family.towers[0])
    row = next((row for row in TOWERS if row.type == kind), None)
    if row is None:
        known = [row.type for row in TOWERS]
        raise UnknownShape(f"the shape of a {kind!r} tower is not known; {did_you_mean(str(kind), known)}")
    return row


def _name(top: Entries) -> str:
    return str(top.get("_name_or_path") or top.get("model_type")).rstrip("/").rsplit("/", 1)[-1]
