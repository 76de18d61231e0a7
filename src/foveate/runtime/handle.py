"""The handle: what `prune` installs on a model, how generate() and forward() are shortened, and how all is undone."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from foveate.core import FoveateError, Method, Trace
from foveate.families import family_of
from foveate.runtime import cache as caches
from foveate.runtime.probe import Probe
from foveate.runtime.prefill import Prefill, Shortened

_OVERRIDDEN = (
    "generate",
    "_expand_inputs_for_generation",
    "_prepare_generated_length",
    "_prepare_cache_for_generation",
)
_UNSUPPORTED_CACHES = ("offloaded", "offloaded_static", "quantized", "paged")


@dataclass(eq=False)
class _Run:
    """One generate() in progress."""

    contains_past: bool  # the caller's ids repeat what the cache already holds
    prompt: Tensor | None = None  # (B, S) as the caller gave it
    shortened: Shortened | None = None


class Handle:
    """Pruning installed on one model, from start() to stop(); also a context manager that gives the trace.

    Works for stock generate(), for the image-text-to-text pipeline, and for direct calls of the model. Parameters,
    configuration and methods of the model are the same after stop() as before start().
    """

    def __init__(self, model: Any, parts: Sequence[Method]) -> None:
        self.model = model
        self.parts = tuple(parts)
        self.trace = Trace()
        self.active = False
        self.family = family_of(model)
        probe = Probe(model, self.family, {need for part in parts for need in part.needs})
        self._prefill = Prefill(model, self.family, self.parts, probe, self)
        self._probe = probe
        self._run: _Run | None = None
        self._direct: Shortened | None = None
        self._lock = threading.RLock()
        self._hooks: list[Any] = []
        self._stock: dict[str, Callable[..., Any]] = {}

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> Handle:
        """Install pruning on the model.

        Raises:
            FoveateError: this or another handle is already at work on the model.
        """
        other = getattr(self.model, "_foveate_handle", None)
        if other is not None:
            whose = "this handle" if other is self else "another handle"
            raise FoveateError(f"{whose} already prunes this model; stop() it first, or give several methods as a list")
        for name in _OVERRIDDEN:
            if name in vars(self.model):
                raise FoveateError(f"{name} of this model is already replaced by something else; undo that first")
        try:
            self._install()
        except BaseException:
            self.stop()
            raise
        return self

    def _install(self) -> None:
        self.model._foveate_handle = self
        self._stock = {name: getattr(self.model, name) for name in _OVERRIDDEN}
        replacements = (self._generate, self._expand, self._correct_length, self._prepare_cache)
        for name, replacement in zip(_OVERRIDDEN, replacements, strict=True):
            # The signature and name that transformers inspects stay those of the stock method.
            setattr(self.model, name, _as_method(replacement, self._stock[name]))
        self._hooks.append(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._after_forward, always_call=True))
        for layer in self.model.get_decoder().layers:
            self._hooks.append(layer.register_forward_pre_hook(self._before_layer, with_kwargs=True))
        self._probe.install()
        self.active = True

    def stop(self) -> None:
        """Take pruning off the model. Caches it pruned refuse to work until start() is called again."""
        if getattr(self.model, "_foveate_handle", None) is not self:
            return
        if self.active:
            self._probe.remove()
        self.active = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for name in _OVERRIDDEN:
            vars(self.model).pop(name, None)
        del self.model._foveate_handle
        self._run = self._direct = None

    def __enter__(self) -> Trace:
        self.start()
        return self.trace

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    # -- generate() -----------------------------------------------------------------------------------------------

    def _generate(self, *arguments: Any, **options: Any) -> Any:
        if not self._lock.acquire(blocking=False):
            raise FoveateError("another thread is using this pruned model; one call at a time, or one model per thread")
        try:
            if self._run is not None:
                return self._stock["generate"](*arguments, **options)
            bound = inspect.signature(self._stock["generate"]).bind_partial(*arguments, **options).arguments
            given = {**bound, **bound.pop("kwargs", {})}
            self._check_generate(given)
            self._run = _Run(contains_past=_contains_past(given))
            if given.get("streamer") is not None:
                given["streamer"] = _PromptStreamer(given["streamer"], self._run)
            return self._restore_prompt(self._stock["generate"](**given), self._run)
        finally:
            self._run = None
            self._probe.take()
            self._lock.release()

    def _check_generate(self, given: dict[str, Any]) -> None:
        config = given.get("generation_config") or self.model.generation_config
        kind = given.get("cache_implementation", config.cache_implementation)
        if kind in _UNSUPPORTED_CACHES:
            raise FoveateError(f"cache_implementation={kind!r} cannot hold a pruned prompt; use 'dynamic' or 'static'")
        caches.check_usable(given.get("past_key_values"), self)
        if given.get("inputs_embeds") is not None:
            raise FoveateError("inputs_embeds hide which tokens are visual; pass input_ids and pixel_values")
        ids = given.get("input_ids", given.get("inputs"))
        if isinstance(ids, Tensor):
            self._prefill.check_images(ids, given, given.get("past_key_values"))

    def _expand(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **options: Any
    ) -> Any:
        stock = self._stock["_expand_inputs_for_generation"]
        run = self._run
        if run is None:
            return stock(expand_size, is_encoder_decoder, input_ids, **options)
        run.prompt = input_ids
        shortened = self._prefill.for_generate(input_ids, options, run.contains_past, expand_size)
        run.shortened = shortened
        input_ids, options = stock(expand_size, is_encoder_decoder, shortened.ids, **shortened.options)
        if shortened.encoded is not None:
            options["mm_encoder_outputs"] = shortened.repeat_encoded(expand_size)
        self.trace.add(shortened.call)
        return input_ids, options

    def _correct_length(self, *arguments: Any, **options: Any) -> Any:
        """A caller's `max_length` counts the prompt that they know."""
        stock = self._stock["_prepare_generated_length"]
        config = inspect.signature(stock).bind(*arguments, **options).arguments
        by_caller = {"max": not config["has_default_max_length"], "min": not config["has_default_min_length"]}
        prepared = stock(*arguments, **options)
        if self._run is not None and self._run.shortened is not None:
            removed = self._run.shortened.removed
            if by_caller["max"] and prepared.max_new_tokens is None:
                prepared.max_length -= removed
            if by_caller["min"] and prepared.min_new_tokens is None and prepared.min_length is not None:
                prepared.min_length = max(0, prepared.min_length - removed)
        return prepared

    def _prepare_cache(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        result = self._stock["_prepare_cache_for_generation"](generation_config, model_kwargs, *rest, **options)
        shortened = None if self._run is None else self._run.shortened
        if shortened is not None:
            held = model_kwargs.get("past_key_values")
            if held is not None:
                caches.check_usable(held, self)
                caches.attach(held, shortened.timeline)
            elif model_kwargs.get("attention_mask") is None:
                # Without cache and mask, gaps in the positions would be read as packed sequences.
                ids = shortened.plan.valid
                model_kwargs["attention_mask"] = ids.long().repeat_interleave(shortened.repeats, dim=0)
        return result

    def _restore_prompt(self, result: Any, run: _Run) -> Any:
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

    # -- forward() ------------------------------------------------------------------------------------------------

    def _before_forward(self, model: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self._run is not None:
            return self._generate_step(arguments, options)
        if not self._lock.acquire(blocking=False):
            raise FoveateError("another thread is using this pruned model; one call at a time, or one model per thread")
        try:
            bound = inspect.signature(type(model).forward).bind_partial(model, *arguments, **options).arguments
            given = {**bound, **bound.pop("kwargs", {})}
            given.pop("self")
            self._direct = self._prefill.for_forward(given)
        finally:
            self._probe.take()
            self._lock.release()
        if self._direct.call is not None:
            self.trace.add(self._direct.call)
        return (), self._direct.options

    def _generate_step(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """generate() counts positions on from the last shortened token; where the prompt ended in dropped ones it lags."""
        timeline = caches.timeline_of(options.get("past_key_values"))
        if timeline is None or timeline.lag is None or options.get("position_ids") is None:
            return None
        if options["past_key_values"].get_seq_length() < timeline.entries:
            return None
        lag = timeline.lag.to(options["position_ids"].device)[:, None]
        return arguments, {**options, "position_ids": options["position_ids"] + lag}

    def _after_forward(self, *_: Any) -> None:
        self._direct = None

    def _before_layer(self, layer: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Rotary embeddings are computed by now; gappy positions would only be mistaken for packed sequences."""
        pruned = self._direct is not None or (self._run is not None and self._run.shortened is not None)
        if pruned and options.get("position_ids") is not None:
            return arguments, {**options, "position_ids": None}
        return None


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

    def __init__(self, streamer: Any, run: _Run) -> None:
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
