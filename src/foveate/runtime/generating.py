"""What stands in for parts of generate() while a handle is at work: prompts are shortened, and given back."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor
from transformers import GenerationMixin, StaticCache

from foveate.core import FoveateError
from foveate.families.family import Family
from foveate.runtime.arguments import named
from foveate.runtime.callbacks import Streamer, View, shown_criteria, shown_processors
from foveate.runtime.calls import Calls, Run
from foveate.runtime.decoder import cache as caches
from foveate.runtime.incoming import Told
from foveate.runtime.prefill import Prefill
from foveate.runtime.seams import CACHE, unfit
from foveate.runtime.uncopied import Uncopied
from foveate.spec import format as format_spec

OVERRIDDEN = {
    "generate": "_generate",
    "_expand_inputs_for_generation": "_expand",
    "_prepare_generated_length": "_correct_length",
    "_prepare_cache_for_generation": "_prepare_cache",
    "_prepare_position_ids_for_generation": "_prepare_positions",
    "_get_logits_processor": "_make_processors",
    "_get_stopping_criteria": "_make_criteria",
    "prepare_inputs_for_generation": "_prepare_step",
}
"""Methods of a model that are replaced while a handle is at work, and what stands in for each."""

REFUSED = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Those that are refused meanwhile, where transformers has them."""

_LONGEST = "_previous_max_cache_length"
"""What transformers notes on a model: its next static cache is at least as long, so that a graph serves again."""

_UNSUPPORTED_CACHES = ("offloaded", "offloaded_static", "quantized", "paged")


class Generating(Uncopied):
    """The overridden parts of one model's generate(), from install() to remove()."""

    def __init__(
        self, model: Any, family: Family, calls: Calls, prefill: Prefill, await_step: Callable[[], None]
    ) -> None:
        self.model, self.family, self.calls, self._prefill = model, family, calls, prefill
        self._await_step = await_step
        self._stock: dict[str, Callable[..., Any]] = {}
        # Of static caches, by whether the handle is at work: pruned prompts need none of an unpruned one's length.
        self._lengths: dict[bool, int | None] = {True: None, False: None}

    def check(self) -> None:
        """Refuse a model of which somebody else has replaced a method.

        Raises:
            FoveateError: naming the method.
        """
        for name in (*OVERRIDDEN, *REFUSED):
            if name in vars(self.model):
                raise FoveateError(f"{name} of this model is already replaced by something else; undo that first")

    def install(self) -> None:
        """Replace the methods on the model."""
        self._stock = {name: getattr(self.model, name) for name in OVERRIDDEN}
        self._swap_lengths(starting=True)
        for name, stock in self._stock.items():
            setattr(self.model, name, self._as_method(getattr(self, OVERRIDDEN[name]), stock))
        for name in REFUSED:
            if hasattr(self.model, name):
                setattr(self.model, name, self._as_method(self._refuse_batching, getattr(self.model, name)))

    def remove(self) -> None:
        """The model's own methods are back."""
        if self._stock:
            self._swap_lengths(starting=False)
            self._stock = {}
        for name in (*OVERRIDDEN, *REFUSED):
            vars(self.model).pop(name, None)

    def _swap_lengths(self, starting: bool) -> None:
        """Static caches are as long as they have been in the other state of the handle; see `_LONGEST`."""
        own = vars(self.model)
        self._lengths[not starting] = own.pop(_LONGEST, None)
        if self._lengths[starting] is not None:
            own[_LONGEST] = self._lengths[starting]

    def _as_method(self, function: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
        """One that somebody holds on to after the handle's stop is the stock one again."""

        def method(*arguments: Any, **options: Any) -> Any:
            return (function if self.calls.active else stock)(*arguments, **options)

        # The signature and name that transformers inspects stay those of the stock method.
        method.__name__ = stock.__name__
        method.__signature__ = _signature(stock)  # type: ignore[attr-defined]
        return method

    def _generate(self, *arguments: Any, **options: Any) -> Any:
        given = named(self._stock["generate"], arguments, options)
        run = Run(contains_past=_contains_past(given), given=given)
        work = self.calls.enter(sys._getframe(), run)
        try:
            run.told = self._check_generate(given)
            known = {**given, **run.told.sizes}
            self._prefill.expect(given.get("input_ids", given.get("inputs")), known, run.contains_past)
            if given.get("streamer") is not None:
                given["streamer"] = Streamer(given["streamer"], View(run, self.calls))
            answer = self._stock["generate"](**given)
            self.calls.check()
            return self._restore_prompt(answer, run)
        finally:
            self.calls.leave(work)

    def _refuse_batching(self, *_: Any, **__: Any) -> Any:
        raise FoveateError(
            "continuous batching takes ids alone, so that no picture reaches this pruned model by it; use generate(), "
            "which takes batches, or stop() the handle first"
        )

    def _check_generate(self, given: dict[str, Any]) -> Told:
        """Refuse what cannot be answered; what of the arguments has been read meanwhile."""
        config = self._config(given)
        kind = given.get("cache_implementation", config.cache_implementation)
        if kind in _UNSUPPORTED_CACHES:
            raise FoveateError(f"cache_implementation={kind!r} cannot hold a pruned prompt; use 'dynamic' or 'static'")
        caches.check_usable(given.get(CACHE), self.calls)
        ids = given.get("input_ids", given.get("inputs"))
        pictures = not self._prefill.placeholders.none_in(ids, given)
        if pictures:
            self._check_inside(config, given)
        chunk = given.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if pictures and chunk is not None and Version(transformers.__version__) < Version("5.23"):
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
        if not isinstance(ids, Tensor):
            return Told()
        told = self._prefill.refusals.check_images(ids, given, given.get(CACHE))
        longest = _longest(config, given, ids.shape[1])
        self._prefill.refusals.check_length(ids, given, _contains_past(given), longest, told)
        return told

    def _config(self, given: dict[str, Any]) -> Any:
        return given.get("generation_config") or self.model.generation_config

    def _check_inside(self, config: Any, given: dict[str, Any]) -> None:
        """What stages inside the decoder cannot work with."""
        if not self.calls.stages and self.calls.evictor is None:
            return
        part = self.calls.stages[0].part if self.calls.evictor is None else self.calls.evictor.part
        name, where = format_spec(part), "on the cache" if part.site == "cache" else "inside the decoder"
        for option in _pieces(config, given):
            raise FoveateError(
                f"{name} acts {where} and chooses once per prompt or token; {option} feeds the prompt or the "
                "answer in pieces. Leave it out, or use a method that acts before the decoder"
            )
        if given.get("use_cache", config.use_cache) is False:
            self._check_uncached()
        kind = given.get("cache_implementation", config.cache_implementation)
        if self.calls.evictor is not None and (kind == "static" or isinstance(given.get(CACHE), StaticCache)):
            raise FoveateError(f"{name} evicts entries, and a static cache cannot shrink; use a dynamic cache")

    def _check_uncached(self) -> None:
        if self.calls.stages:
            raise FoveateError(
                f"{format_spec(self.calls.stages[0].part)} acts inside the decoder and keeps its choice on the cache, "
                "so use_cache=False leaves it no place"
            )
        self._prefill.without_cache()

    def _expand(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **options: Any
    ) -> Any:
        stock = self._stock["_expand_inputs_for_generation"]
        run = self.calls.run
        if run is None:
            return stock(expand_size, is_encoder_decoder, input_ids, **options)
        run.prompt, run.mask, run.repeats = input_ids, options.get("attention_mask"), expand_size
        shortened = self._prefill.for_generate(input_ids, options, run.contains_past, expand_size, run.given, run.told)
        run.shortened = shortened
        if not any(shortened.timeline.pictured) and _pieces(self._config(run.given), run.given):
            shortened.timeline.evicting = False  # words alone are left as they are, however they come
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
                caches.check_usable(held, self.calls)
                caches.attach(held, shortened.timeline)
                shortened.cache = held
            elif generation_config.use_cache:
                raise unfit(f"generate() has made no {CACHE} for {type(self.model).__name__}")
            elif model_kwargs.get("attention_mask") is None:
                # Without cache and mask, gaps in the positions would be read as packed sequences.
                model_kwargs["attention_mask"] = shortened.plan.repeat(shortened.repeats).valid.long()
            if held is None and any(shortened.timeline.pictured):
                shortened.notes += self._prefill.without_cache()
        return result

    def _prepare_positions(self, inputs: Tensor, options: dict[str, Any]) -> Any:
        """Where positions have several axes, a model knows those of the pruned part from its handle alone."""
        if self.family.positions is not None and caches.timeline_of(options.get(CACHE)) is not None:
            return GenerationMixin._prepare_position_ids_for_generation(self.model, inputs, options)
        return self._stock["_prepare_position_ids_for_generation"](inputs, options)

    def _prepare_step(self, *arguments: Any, **options: Any) -> Any:
        """generate() prepares each of its calls of the model right before it."""
        made = self._stock["prepare_inputs_for_generation"](*arguments, **options)
        if self.calls.run is not None:
            self._await_step()
        return made

    def _make_processors(self, *arguments: Any, **options: Any) -> Any:
        stock, run = self._stock["_get_logits_processor"], self.calls.run
        if run is None or run.shortened is None:
            return stock(*arguments, **options)
        view = View(run, self.calls)
        return shown_processors(stock(**view.settings(named(stock, arguments, options))), view)

    def _make_criteria(self, *arguments: Any, **options: Any) -> Any:
        criteria, run = self._stock["_get_stopping_criteria"](*arguments, **options), self.calls.run
        if run is None or run.shortened is None:
            return criteria
        return shown_criteria(criteria, run.given.get("stopping_criteria") or (), View(run, self.calls))

    def _restore_prompt(self, result: Any, run: Run) -> Any:
        if run.shortened is None or run.prompt is None:
            return result
        sequences = run.as_callers(result if isinstance(result, Tensor) else result.sequences)
        if isinstance(result, Tensor):
            return sequences
        result.sequences = sequences
        return result


def _signature(method: Callable[..., Any]) -> inspect.Signature:
    """The signature of a model's method."""
    function = getattr(method, "__func__", None)
    return inspect.signature(method) if function is None else _bound_signature(function)


@functools.cache
def _bound_signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a class's function without its first argument; read once, since classes do not change."""
    whole = inspect.signature(function)
    return whole.replace(parameters=list(whole.parameters.values())[1:])


def _longest(config: Any, given: dict[str, Any], prompt: int) -> int:
    """Tokens of the longest answer that a call of generate() allows; 1 where neither it nor the model says."""
    tokens = given.get("max_new_tokens", config.max_new_tokens)
    length = given.get("max_length", config.max_length)
    return int(tokens) if tokens is not None else max(1, length - prompt) if length is not None else 1


def _pieces(config: Any, given: dict[str, Any]) -> list[str]:
    """Which options feed a prompt or an answer in pieces."""
    options = ("prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model")
    return [name for name in options if given.get(name, getattr(config, name, None)) is not None]


def _contains_past(given: dict[str, Any]) -> bool:
    """generate() takes ids that repeat the cached prompt or only new ones: the length of the mask tells."""
    mask = given.get("attention_mask")
    ids = given.get("input_ids", given.get("inputs"))
    return mask is None or ids is None or mask.shape[1] == ids.shape[1]
