"""Any processor of vLLM, with fewer places for each picture: counts, cache keys, and what travels to the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalFlatField
from vllm.multimodal.processing import PromptUpdateDetails
from vllm.multimodal.utils import group_and_batch_mm_items

from foveate.serve.specs import UNPRUNED
from foveate.serve.vllm.asked import QUESTION, SPEC, Asked, parts_of, reads_question, reads_words
from foveate.serve.vllm.before import before_encoder, behind_encoder, left_of
from foveate.serve.vllm.outline import ENGINE, Outline
from foveate.serve.vllm.positions import MOST
from foveate.serve.vllm.rooms import FoveateError, check_reach, context_of, format_spec
from foveate.serve.vllm.settings import rules_of
from foveate.serve.vllm.slots import sources_of, units_of

KINDS = ("image", "video")
ASKED, TOKENS, SOURCES, ROWS = "foveate_asked", "foveate_tokens", "foveate_sources", "foveate_rows"
"""Fields of an item beside its own: what is asked, its R tokens, the sources of its P, and how its fields are cut."""
FIELDS = (ASKED, TOKENS, SOURCES, ROWS)
UNPRUNED_LENGTH = "foveate_unpruned_length"
"""On the mask of a picture's slots: R."""
BATCHED, SHARED = -1, -2
"""In ROWS, fields that are not cut along a dimension: one entry for each item, or one for all."""


class Shortening:
    """Goes before a `BaseMultiModalProcessor` of vLLM."""

    _profiling = False

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)  # type: ignore[call-arg]
        config = info.get_hf_config()
        self.outline = Outline(config)
        self.rules = rules_of(config, self.outline)
        for name in (SPEC, QUESTION):
            if name in (info.ctx.get_mm_config().mm_processor_kwargs or {}):
                raise FoveateError(
                    f"mm_processor_kwargs of the engine hold {name!r}: an engine's own spec belongs into hf_overrides, "
                    "and a question to its request; leave it out"
                )

    def get_dummy_inputs(self, *arguments: Any, **options: Any) -> Any:
        """The largest input; it asks something where a method reads the question, and prunes what can be pruned."""
        inputs = super().get_dummy_inputs(*arguments, **options)  # type: ignore[misc]
        more = {}
        parts = parts_of(self.rules.spec)
        if before_encoder(parts):  # no picture has less to drop than one that repeats nothing
            more[SPEC] = format_spec(behind_encoder(parts)) if behind_encoder(parts) else UNPRUNED
        if inputs.mm_data_items.get("video") and self.outline.family.videos is None:
            more[SPEC] = UNPRUNED
        elif reads_question(parts):
            more[QUESTION] = "what is it ?"
        inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, **more}
        return inputs

    def get_dummy_mm_inputs(self, *arguments: Any, **options: Any) -> Any:
        """The largest pictures as a model gets them: no prompt that anybody sends, so it may leave the context."""
        self._profiling = True
        try:
            return super().get_dummy_mm_inputs(*arguments, **options)  # type: ignore[misc]
        finally:
            self._profiling = False

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process a request; caches know its pictures by what is asked of them, too."""
        if any(inputs.mm_data_items.get(kind) for kind in KINDS):
            asked = self.rules.asked(inputs.hf_processor_mm_kwargs)
            if asked.parts and inputs.mm_data_items.get("video") and self.outline.family.videos is None:
                raise FoveateError(
                    f"videos of {self.outline.family.name} cannot be pruned in {ENGINE}; pictures can. A request with "
                    f'a video says mm_processor_kwargs={{"{SPEC}": "{UNPRUNED}"}}'
                )
            inputs = dataclasses.replace(
                inputs, hf_processor_mm_kwargs={**self._others(inputs.hf_processor_mm_kwargs), SPEC: asked.key}
            )
        made = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        self._check_reach(made)
        return made

    def _check_reach(self, made: Mapping[str, Any]) -> None:
        """Refuse a prompt that fits into the context as it is, but whose kept tokens stand beyond it.

        On several axes a picture takes few positions; there nothing fits that would not fit unpruned.
        """
        context = context_of(self.outline.config)
        if context is None or self._profiling or self.outline.family.positions is not None:
            return
        reach = len(made["prompt_token_ids"])
        for ranges in made.get("mm_placeholders", {}).values():
            for one in ranges:
                reach += getattr(one.is_embed, UNPRUNED_LENGTH, one.length) - one.length
        check_reach(reach, context)

    @staticmethod
    def _others(given: Mapping[str, object]) -> dict[str, object]:
        """What is the stock processor's."""
        return {name: value for name, value in given.items() if name not in (SPEC, QUESTION)}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        return super()._apply_hf_processor_main(mm_items, self._others(hf_kwargs))  # type: ignore[misc]

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        return super()._get_mm_fields_config(hf_inputs, self._others(hf_processor_mm_kwargs))  # type: ignore[misc]

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        stock = super()._get_prompt_updates(  # type: ignore[misc]
            mm_items, self._others(hf_processor_mm_kwargs), out_mm_kwargs
        )
        if SPEC not in hf_processor_mm_kwargs:
            return stock
        asked = self._written(str(hf_processor_mm_kwargs[SPEC]))
        return [
            self._shortened(update, asked, out_mm_kwargs.get(update.modality, []))
            if update.modality in KINDS
            else update
            for update in stock
        ]

    def _written(self, key: str) -> Asked:
        """What a key says, and the question's ids where a method reads them."""
        _, spec, question = json.loads(key)
        words: Sequence[int] = ()
        if question is not None and reads_words(parts_of(spec)):
            tokenizer = self.info.get_tokenizer()  # type: ignore[attr-defined]
            words = tokenizer.encode(question, add_special_tokens=False)
        return Asked(spec, question, tuple(words))

    def _shortened(self, update: Any, asked: Asked, items: Sequence[Any]) -> Any:
        """A prompt update whose pictures take the places that will be left of them."""
        contents = [
            self._content(update.modality, update.resolve(number).content, asked, item)
            for number, item in enumerate(items)
        ]
        field = "replacement" if hasattr(update, "replacement") else "insertion"
        return dataclasses.replace(update, **{field: contents.__getitem__})

    def _content(self, kind: str, stock: PromptUpdateDetails, asked: Asked, item: Any) -> PromptUpdateDetails:
        ids = torch.tensor(stock.full)
        embeds = torch.ones_like(ids, dtype=torch.bool) if stock.is_embed is None else stock.is_embed(stock.full)
        if ids.numel() > MOST:
            raise FoveateError(f"a {kind} of {ids.numel()} tokens is too long to prune; the most is {MOST}")
        tokens = ids.masked_fill(embeds, -1)
        _, given = next(iter(group_and_batch_mm_items([item])))
        layouts = self.outline.layouts(kind, given, [int(embeds.sum())])
        before = before_encoder(asked.parts)
        left = left_of(self.outline, before, kind, given, layouts) if before else None
        sources = sources_of(tokens, units_of(tokens, layouts, behind_encoder(asked.parts), left))
        slots = sources < 0
        short = torch.where(slots, ids[embeds].mode().values, ids[sources.clamp(min=0)])
        rows = torch.tensor([_cut(item[name]) for name in sorted(item)])
        for name, value in ((ASKED, asked.packed()), (TOKENS, tokens), (SOURCES, sources), (ROWS, rows)):
            item[name] = MultiModalFieldElem(data=value, field=MultiModalBatchedField(keep_on_cpu=True))
        # The mask is what vLLM keeps of a picture that comes again, when its fields are elsewhere.
        setattr(slots, UNPRUNED_LENGTH, ids.numel())
        return PromptUpdateDetails(full=short.tolist(), is_embed=lambda _: slots)


def _cut(elem: Any) -> tuple[int, int]:
    """Along which dimension items of a field stand behind each other, and how many rows this one has."""
    if isinstance(elem.field, MultiModalBatchedField):
        return BATCHED, 1
    if not isinstance(elem.field, MultiModalFlatField):
        return SHARED, 1
    if not isinstance(elem.data, Tensor):
        return 0, len(elem.data)
    dim = elem.field.dim % elem.data.ndim
    return dim, int(elem.data.shape[dim])
