"""What stands in for parts of generate() while a handle is at work: prompts are shortened, and given back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import GenerationMixin, StaticCache
from transformers.generation.streamers import BaseStreamer

from foveate.core import FoveateError
from foveate.families import Family
from foveate.runtime import cache as caches
from foveate.runtime.calls import Calls, Run
from foveate.runtime.prefill import Prefill, renamed
from foveate.runtime.seams import CACHE, unfit
from foveate.spec import format as format_spec

OVERRIDDEN = {
    "generate": "_generate",
    "_expand_inputs_for_generation": "_expand",
    "_prepare_generated_length": "_correct_length",
    "_prepare_cache_for_generation": "_prepare_cache",
    "_prepare_position_ids_for_generation": "_prepare_positions",
}
"""Methods of a model that are replaced while a handle is at work, and what stands in for each."""

_UNSUPPORTED_CACHES = ("offloaded", "offloaded_static", "quantized", "paged")


class Generating:
    """The overridden parts of one model's generate(), from install() to remove()."""

    def __init__(self, model: Any, family: Family, owner: caches.Owner, calls: Calls, prefill: Prefill) -> None:
        self.model, self.family, self.owner, self.calls, self._prefill = model, family, owner, calls, prefill
        self._stock: dict[str, Callable[..., Any]] = {}

    def check(self) -> None:
        """Refuse a model of which somebody else has replaced a method.

        Raises:
            FoveateError: naming the method.
        """
        for name in OVERRIDDEN:
            if name in vars(self.model):
                raise FoveateError(f"{name} of this model is already replaced by something else; undo that first")

    def install(self) -> None:
        """Replace the methods on the model."""
        self._stock = {name: getattr(self.model, name) for name in OVERRIDDEN}
        for name, replacement in OVERRIDDEN.items():
            # The signature and name that transformers inspects stay those of the stock method.
            setattr(self.model, name, _as_method(getattr(self, replacement), self._stock[name]))

    def remove(self) -> None:
        """The model's own methods are back."""
        for name in OVERRIDDEN:
            vars(self.model).pop(name, None)

    def _generate(self, *arguments: Any, **options: Any) -> Any:
        self.calls.claim()
        outer, self.calls.run = self.calls.run, None  # a logits processor may generate on its own
        try:
            self.calls.finish()  # pictures may have been encoded by hand
            bound = inspect.signature(self._stock["generate"]).bind_partial(*arguments, **options).arguments
            given = renamed({**bound, **bound.pop("kwargs", {})})
            self._check_generate(given)
            self.calls.run = Run(contains_past=_contains_past(given), given=given)
            self._prefill.expect(given.get("input_ids", given.get("inputs")), given, self.calls.run.contains_past)
            if given.get("streamer") is not None:
                given["streamer"] = _PromptStreamer(given["streamer"], self.calls.run)
            return self._restore_prompt(self._stock["generate"](**given), self.calls.run)
        finally:
            self.calls.run = outer
            self.calls.finish()
            if outer is None:
                self.calls.free()

    def _check_generate(self, given: dict[str, Any]) -> None:
        config = given.get("generation_config") or self.model.generation_config
        kind = given.get("cache_implementation", config.cache_implementation)
        if kind in _UNSUPPORTED_CACHES:
            raise FoveateError(f"cache_implementation={kind!r} cannot hold a pruned prompt; use 'dynamic' or 'static'")
        caches.check_usable(given.get(CACHE), self.owner)
        if self.calls.stages or self.calls.evictor is not None:
            self._check_inside(config, given)
        chunk = given.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if chunk is not None and Version(transformers.__version__) < Version("5.23"):
            raise FoveateError(
                f"prefill_chunk_size={chunk}: transformers {transformers.__version__} hands every chunk the features "
                "of all images, pruned or not; use 5.23 or newer, or leave it out"
            )
        if chunk is not None and self.family.two_way:
            raise FoveateError(
                f"prefill_chunk_size={chunk}: the prompt's tokens of {self.family.name} attend to later ones too, "
                "which a chunk cuts off, pruned or not; leave it out"
            )
        if given.get("inputs_embeds") is not None:
            raise FoveateError("inputs_embeds hide which tokens are visual; pass input_ids and pixel_values")
        ids = given.get("input_ids", given.get("inputs"))
        if isinstance(ids, Tensor):
            self._prefill.check_images(ids, given, given.get(CACHE))
            self._prefill.check_length(ids, given, _contains_past(given), _longest(config, given, ids.shape[1]))

    def _check_inside(self, config: Any, given: dict[str, Any]) -> None:
        """What stages inside the decoder cannot work with."""
        part = self.calls.stages[0].part if self.calls.evictor is None else self.calls.evictor.part
        name, where = format_spec(part), "on the cache" if part.site == "cache" else "inside the decoder"
        for option in ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model"):
            if given.get(option, getattr(config, option, None)) is not None:
                raise FoveateError(
                    f"{name} acts {where} and chooses once per prompt or token; {option} feeds the prompt or the "
                    "answer in pieces. Leave it out, or use a method that acts before the decoder"
                )
        if given.get("use_cache", config.use_cache) is False:
            raise FoveateError(f"{name} acts {where} and keeps its choice there, so use_cache=False leaves it no place")
        kind = given.get("cache_implementation", config.cache_implementation)
        if self.calls.evictor is not None and (kind == "static" or isinstance(given.get(CACHE), StaticCache)):
            raise FoveateError(f"{name} evicts entries, and a static cache cannot shrink; use a dynamic cache")

    def _expand(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **options: Any
    ) -> Any:
        stock = self._stock["_expand_inputs_for_generation"]
        run = self.calls.run
        if run is None:
            return stock(expand_size, is_encoder_decoder, input_ids, **options)
        run.prompt = input_ids
        shortened = self._prefill.for_generate(input_ids, options, run.contains_past, expand_size, run.given)
        run.shortened = shortened
        input_ids, options = stock(expand_size, is_encoder_decoder, shortened.ids, **shortened.options)
        if shortened.encoded is not None:
            options["mm_encoder_outputs"] = shortened.repeat_encoded(expand_size)
        self.calls.begin(shortened)
        return input_ids, options

    def _correct_length(self, *arguments: Any, **options: Any) -> Any:
        """A caller's `max_length` counts the prompt that they know."""
        stock = self._stock["_prepare_generated_length"]
        config = inspect.signature(stock).bind(*arguments, **options).arguments
        by_caller = {"max": not config["has_default_max_length"], "min": not config["has_default_min_length"]}
        prepared = stock(*arguments, **options)
        if self.calls.run is not None and self.calls.run.shortened is not None:
            removed = self.calls.run.shortened.removed
            if by_caller["max"] and prepared.max_new_tokens is None:
                self._check_room(prepared.max_length, config["input_ids_length"] + removed)
                prepared.max_length -= removed
            if by_caller["min"] and prepared.min_new_tokens is None and prepared.min_length is not None:
                prepared.min_length = max(0, prepared.min_length - removed)
        return prepared

    @staticmethod
    def _check_room(longest: int, prompt: int) -> None:
        if longest <= prompt:
            raise FoveateError(
                f"max_length={longest} leaves no room for an answer to a prompt of {prompt} tokens; the smallest is "
                f"max_length={prompt + 1}, or set max_new_tokens"
            )

    def _prepare_cache(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        result = self._stock["_prepare_cache_for_generation"](generation_config, model_kwargs, *rest, **options)
        shortened = None if self.calls.run is None else self.calls.run.shortened
        if shortened is not None:
            held = model_kwargs.get(CACHE)
            if held is not None:
                caches.check_usable(held, self.owner)
                caches.attach(held, shortened.timeline)
                shortened.cache = held
            elif generation_config.use_cache:
                raise unfit(f"generate() has made no {CACHE} for {type(self.model).__name__}")
            elif model_kwargs.get("attention_mask") is None:
                # Without cache and mask, gaps in the positions would be read as packed sequences.
                model_kwargs["attention_mask"] = shortened.plan.repeat(shortened.repeats).valid.long()
        return result

    def _prepare_positions(self, inputs: Tensor, options: dict[str, Any]) -> Any:
        """Where positions have several axes, a model knows those of the pruned part from its handle alone."""
        if self.family.positions is not None and caches.timeline_of(options.get(CACHE)) is not None:
            return GenerationMixin._prepare_position_ids_for_generation(self.model, inputs, options)
        return self._stock["_prepare_position_ids_for_generation"](inputs, options)

    def _restore_prompt(self, result: Any, run: Run) -> Any:
        if run.shortened is None or run.prompt is None:
            return result
        sequences = result if isinstance(result, Tensor) else result.sequences
        prompt = run.prompt.to(sequences.device)
        prompt = prompt.repeat_interleave(sequences.shape[0] // prompt.shape[0], dim=0)
        sequences = torch.cat([prompt, sequences[:, run.shortened.ids.shape[1] :]], dim=1)
        if isinstance(result, Tensor):
            return sequences
        result.sequences = sequences
        return result


def _longest(config: Any, given: dict[str, Any], prompt: int) -> int:
    """Tokens of the longest answer that a call of generate() allows; 1 where neither it nor the model says."""
    tokens = given.get("max_new_tokens", config.max_new_tokens)
    length = given.get("max_length", config.max_length)
    return int(tokens) if tokens is not None else max(1, length - prompt) if length is not None else 1


def _contains_past(given: dict[str, Any]) -> bool:
    """generate() takes ids that repeat the cached prompt or only new ones: the length of the mask tells."""
    mask = given.get("attention_mask")
    ids = given.get("input_ids", given.get("inputs"))
    return mask is None or ids is None or mask.shape[1] == ids.shape[1]


def _as_method(function: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    def method(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    method.__name__ = stock.__name__
    method.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
    return method


class _PromptStreamer(BaseStreamer):
    """Hands a streamer the caller's own prompt in place of the shortened one."""

    def __init__(self, streamer: Any, run: Run) -> None:
        self.streamer, self.run, self.first = streamer, run, True

    def put(self, value: Tensor) -> None:
        """The first value is the prompt, later ones are new tokens."""
        if self.first and self.run.prompt is not None:
            value = self.run.prompt.cpu()
        self.first = False
        self.streamer.put(value)

    def end(self) -> None:
        """The answer is complete."""
        self.streamer.end()
