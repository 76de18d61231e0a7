"""Any vision-language model of vLLM, with fewer tokens for each picture: encodes, chooses, and keeps positions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from foveate.serve.vllm.asked import SPEC, Asked, parts_of, reads_joint_space
from foveate.serve.vllm.before import before_encoder, behind_encoder
from foveate.serve.vllm.outline import Outline
from foveate.serve.vllm.positions import AXES, Span, columns_of, settled, waiting, with_places
from foveate.serve.vllm.processor import ASKED, BATCHED, FIELDS, ROWS, SHARED, SOURCES, TOKENS
from foveate.serve.vllm.rooms import Block, Brought, FoveateError, JointSpace, Lanes, Method, context_of
from foveate.serve.vllm.selecting import Decoder, Item, choose_rows
from foveate.serve.vllm.settings import clip_of, rules_of
from foveate.serve.vllm.slots import count_of, fitted

logger = init_logger("vllm.foveate")

_SIZES = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")

Taken = Callable[[], tuple[Mapping[int | str, Block], Lanes | None]]
"""What the encoder showed, and what went into it; None for all."""


class Pruning:
    """Goes before a multi-modal model of vLLM, which runs its own encoder and decoder.

    A subclass says how its encoder is read (`_reading`), where an encoded token is projected (`_project`), and how its
    decoder takes positions on one axis (`_forward_flat`).
    """

    supports_multimodal_pruning: ClassVar[bool] = True
    supported_video_pruning_methods: ClassVar[tuple[str, ...]] = ("evs",)
    supports_mrope: ClassVar[bool] = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._foveate = _State(self, vllm_config)

    # -- what a subclass says --------------------------------------------------------------------------------------

    def _reading(self, needs: frozenset[str], before: Sequence[Method], told: Brought) -> AbstractContextManager[Taken]:
        """While this is open the encoder shows what methods need, and runs on what those before it leave.

        Args:
            told: the pictures that it will be given.
        """
        raise NotImplementedError

    def _project(self, encoded: Tensor) -> Tensor:
        """Encoded tokens (K, E) to (K, D)."""
        raise NotImplementedError

    def _forward_flat(self, *arguments: Any, **options: Any) -> Any:
        """The model, given positions (L,)."""
        return super().forward(*arguments, **options)  # type: ignore[misc]

    # -- the engine's calls ----------------------------------------------------------------------------------------

    def embed_multimodal(self, **given: Any) -> Any:
        """What stands in the slots of some items, each row with its place behind it."""
        fields = {name: given.pop(name, None) for name in FIELDS}
        if fields[ASKED] is None:
            return super().embed_multimodal(**given)  # type: ignore[misc]
        items = [
            Item(Asked.unpacked(asked), tokens.cpu(), sources.cpu())
            for asked, tokens, sources in zip(fields[ASKED], fields[TOKENS], fields[SOURCES], strict=True)
        ]
        rows = torch.stack([torch.as_tensor(one) for one in fields[ROWS]]).cpu()
        found: list[Tensor] = []
        for first, last in self._foveate.batches(items):
            found += self._embed_some(items[first:last], _cut(given, rows, first, last))
        return found

    def _embed_some(self, items: Sequence[Item], given: dict[str, Any]) -> list[Tensor]:
        state = self._foveate
        kind = "video" if any("video" in name for name in given) else "image"
        needs = frozenset(need for item in items for part in item.asked.parts for need in part.needs)
        if any(reads_joint_space(item.asked.parts) for item in items):
            needs |= {"tower.read.hidden"}
        told = Brought(given, lambda: [int((item.tokens < 0).sum()) for item in items], kind)
        with self._reading(needs, before_encoder(items[0].asked.parts), told) as taken:
            features = [one.flatten(0, -2) for one in super().embed_multimodal(**dict(given))]  # type: ignore[misc]
            seen, lanes = taken()
        counts = [one.shape[0] for one in features]
        layouts = state.outline.per_item(kind, given, counts)
        with torch.no_grad():
            chosen = choose_rows(items, layouts, features, seen, state.outline.tower.packed, state.decoder, lanes)
        made = []
        for number, (item, (rows, places)) in enumerate(zip(items, chosen, strict=True)):
            positions, extent = self._within(kind, item, given, number)
            made.append(with_places(rows, positions.to(places.device)[:, places], extent))
        return made

    def _within(self, kind: str, item: Item, given: Mapping[str, Any], number: int) -> tuple[Tensor, int]:
        """(A, R) positions of an item's tokens from its first on, and how many it takes."""
        length = item.tokens.numel()
        if self._foveate.flat:
            return torch.arange(length).expand(AXES, length), length
        data = MultiModalKwargsItem(
            {
                name: MultiModalFieldElem(
                    data=torch.as_tensor(given[name][number]).cpu(), field=MultiModalBatchedField()
                )
                for name in _SIZES
                if given.get(name) is not None
            }
        )
        place = PlaceholderRange(offset=0, length=length, is_embed=item.tokens < 0)
        feature = MultiModalFeatureSpec(data=data, modality=kind, identifier="", mm_position=place)
        ids = item.tokens.where(item.tokens >= 0, self._foveate.placeholders[kind])
        positions, delta = super().get_mrope_input_positions(ids.tolist(), [feature])  # type: ignore[misc]
        return positions[-AXES:], int(delta) + length

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions of a prompt as in its unpruned form; slots wait for the encoder."""
        spans = [
            Span(one.mm_position.offset, one.data[SOURCES].data, one.data[TOKENS].data.numel()) for one in mm_features
        ]
        columns, slots = columns_of(len(input_tokens), spans)
        whole = len(input_tokens) + sum(span.length - span.sources.numel() for span in spans)
        if self._foveate.flat:
            unpruned, after = torch.arange(whole).expand(AXES, whole), whole
        else:
            unpruned, after = self._unpruned(input_tokens, mm_features, columns, slots, whole)
        return waiting(unpruned, after, columns, slots), after - len(input_tokens)

    def _unpruned(
        self, ids: list[int], features: list[Any], columns: Tensor, slots: Tensor, whole: int
    ) -> tuple[Tensor, int]:
        """Positions (A, S) of the unpruned prompt on several axes, by the stock rule."""
        tokens = torch.zeros(whole, dtype=torch.int64)
        tokens[columns[~slots]] = torch.tensor(ids, dtype=torch.int64)[~slots]
        moved, ahead = [], 0
        for one in features:
            own = one.data[TOKENS].data
            start = one.mm_position.offset + ahead
            tokens[start : start + own.numel()] = own.where(own >= 0, self._foveate.placeholders[one.modality])
            place = PlaceholderRange(offset=start, length=own.numel(), is_embed=own < 0)
            moved.append(replace(one, mm_position=place))
            ahead += own.numel() - one.mm_position.length
        positions, delta = super().get_mrope_input_positions(tokens.tolist(), moved)  # type: ignore[misc]
        return positions[-AXES:], int(delta) + whole

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Sequence[Tensor], mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Put the kept tokens of a chunk at their original positions."""
        slots = torch.empty(0, dtype=torch.int64)
        if multimodal_embeddings:
            ids = torch.as_tensor(input_ids, device=mrope_positions.device)
            columns = torch.isin(ids, ids.new_tensor(list(self._foveate.placeholders.values()))).nonzero().flatten()
            slots = columns[columns >= num_computed_tokens][: sum(one.shape[0] for one in multimodal_embeddings)]
        return settled(mrope_positions, multimodal_embeddings, slots, len(input_ids))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The decoder, at the positions that it counts on."""
        # An answer may run past the context, since its prompt is short where its positions are not. In place: graphs
        # replay what lies at this address.
        positions.clamp_(max=self._foveate.last)
        if self._foveate.flat:
            row = positions[0].contiguous()
            return self._forward_flat(input_ids, row, intermediate_tensors, inputs_embeds, **options)
        return super().forward(  # type: ignore[misc]
            input_ids, positions, intermediate_tensors, inputs_embeds, **options
        )


class _State:
    """What a pruning model knows beside its weights.

    Attributes:
        outline: the model by its configuration.
        flat: its decoder counts on one axis, and the engine keeps three.
        placeholders: id of a visual token, by kind.
        decoder: what choosing needs of it.
        last: the largest position that it knows.
    """

    def __init__(self, model: Any, vllm_config: Any) -> None:
        config = vllm_config.model_config.hf_config
        self.outline = Outline(config)
        self.flat = self.outline.family.positions is None
        self.placeholders = {"image": self.outline.family.image_token_id(config)}
        if getattr(config, "video_token_id", None) is not None:
            self.placeholders["video"] = config.video_token_id
        longest = vllm_config.model_config.max_model_len
        self.last = max(context_of(config) or longest, longest) - 1
        scheduler = vllm_config.scheduler_config
        self._most = int(scheduler.max_num_encoder_input_tokens)
        family, space = self.outline.family, None
        if rules_of(config, self.outline).may_read_joint_space:
            # The encoder itself is not asked: its width is all that must fit.
            width = SimpleNamespace(config=config.vision_config)
            view = SimpleNamespace(name_or_path=config._name_or_path, device=vllm_config.device_config.device)
            shape = SimpleNamespace(tower_of=lambda _: (width, self.outline.tower))
            space = JointSpace(view, shape, clip_of(config), None, "", getattr(config, SPEC))  # type: ignore[arg-type]
        self.decoder = Decoder(
            width=config.get_text_config().hidden_size,
            embed=model.embed_input_ids,
            project=model._project if family.pointwise else None,
            joint_space=space,
        )
        enable(vllm_config)
        logger.info("Foveate: %s", said_at_start(config, self.outline))

    def batches(self, items: Sequence[Item]) -> Iterable[tuple[int, int]]:
        """Which items are encoded together: never more unpruned tokens than memory was profiled for, or one item.

        The scheduler counts what is left of pictures, and so may hand over more of them. Those of which different
        methods drop tokens before the encoder do not go into it together.
        """
        first = tokens = 0
        for number, item in enumerate(items):
            own = int((item.tokens < 0).sum())
            other = before_encoder(item.asked.parts) != before_encoder(items[first].asked.parts)
            if number > first and (other or tokens + own > self._most):
                yield first, number
                first, tokens = number, 0
            tokens += own
        if items:
            yield first, len(items)


def _cut(given: Mapping[str, Any], rows: Tensor, first: int, last: int) -> dict[str, Any]:
    """The fields of the items from `first` to before `last`.

    Args:
        rows: (items, fields, 2) dimension and rows of each field, in the order of their names.
    """
    found = {}
    for number, name in enumerate(sorted(given)):
        value, dim = given[name], int(rows[0, number, 0])
        if dim == SHARED:
            found[name] = value
        elif dim == BATCHED:
            found[name] = value[first:last]
        else:
            start, end = int(rows[:first, number, 1].sum()), int(rows[:last, number, 1].sum())
            found[name] = value.narrow(dim, start, end - start) if isinstance(value, Tensor) else value[start:end]
    return found


def said_at_start(config: Any, outline: Outline) -> str:
    """Model, method, and the tokens of a square picture before and after."""
    from foveate.serve.vllm.rooms import Layout

    spec = getattr(config, SPEC)
    height, width = outline.family.grid(config)
    tokens = height * width
    square = Layout(tokens, torch.arange(tokens), torch.arange(tokens)[:, None], (tokens,), grid=(height, width))
    parts = parts_of(spec)
    left = count_of(fitted(behind_encoder(parts), tokens), square)
    at_most = "at most " if before_encoder(parts) else ""
    return f"{config.model_type} with {spec}: {tokens} -> {at_most}{left} tokens of a square picture, or of one tile"


def check_engine(vllm_config: Any) -> None:
    """Refuse ways of running in which pruned pictures would be wrong.

    Raises:
        FoveateError: naming the option.
    """
    parallel, compiled = vllm_config.parallel_config, vllm_config.compilation_config
    pictures = vllm_config.model_config.multimodal_config
    wrong = {
        "pipeline parallelism keeps the positions of pruned pictures from later stages; use --tensor-parallel-size": (
            parallel.pipeline_parallel_size > 1
        ),
        "speculative decoding reads pictures a second time, unpruned; leave --speculative-config out": (
            vllm_config.speculative_config is not None
        ),
        "a compiled encoder cannot be read; leave compile_mm_encoder and cudagraph_mm_encoder out (the decoder is "
        "compiled all the same)": compiled.compile_mm_encoder or compiled.cudagraph_mm_encoder,
        "--mm-encoder-tp-mode data shows each device the pictures of a part of the requests; leave it out": (
            pictures.mm_encoder_tp_mode == "data" and parallel.tensor_parallel_size > 1
        ),
        "--video-pruning-rate prunes videos beside Foveate; give one of them": bool(pictures.video_pruning_rate),
        "--enable-mm-embeds takes pictures that no encoder here has seen; leave it out": bool(
            pictures.enable_mm_embeds
        ),
        "an encoder in another engine (--ec-transfer-config) cannot be read; leave it out": (
            vllm_config.ec_transfer_config is not None
        ),
    }
    for message, holds in wrong.items():
        if holds:
            raise FoveateError(message)


def enable(vllm_config: Any) -> None:
    """Let the engine ask this model for positions of pruned pictures.

    vLLM asks whether the pruning of videos is on, and its runner for CPUs does not ask at all.
    """
    settings = vllm_config.model_config.multimodal_config
    object.__setattr__(settings, "is_multimodal_pruning_enabled", lambda: True)
    module = sys.modules.get("vllm.v1.worker.cpu_model_runner")
    if module is not None:
        runner = module.CPUModelRunner
        runner.is_multimodal_pruning_enabled = property(_model_prunes, lambda runner, value: None)


def _model_prunes(runner: Any) -> bool:
    """Whether the model of a runner is one of ours."""
    return isinstance(getattr(runner, "model", None), Pruning)
