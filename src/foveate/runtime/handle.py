"""The handle: what `prune` installs on a model, how generate() and forward() are shortened, and how all is undone."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import GenerationMixin, StaticCache
from transformers.generation.streamers import BaseStreamer

from foveate.core import FoveateError, Method, Trace
from foveate.families import family_of
from foveate.runtime import cache as caches
from foveate.runtime.evict import Evictor
from foveate.runtime.joint_space import JointSpace
from foveate.runtime.layers import Descent, decode_mask, stages_of
from foveate.runtime.prefill import Prefill, Shortened, renamed
from foveate.runtime.probe import DecoderProbe, Probe
from foveate.runtime.seams import CACHE
from foveate.runtime.tower import TowerStages
from foveate.spec import format as format_spec

_OVERRIDDEN = (
    "generate",
    "_expand_inputs_for_generation",
    "_prepare_generated_length",
    "_prepare_cache_for_generation",
    "_prepare_position_ids_for_generation",
)
_UNSUPPORTED_CACHES = ("offloaded", "offloaded_static", "quantized", "paged")


@dataclass(eq=False)
class _Run:
    """One generate() in progress."""

    contains_past: bool  # the caller's ids repeat what the cache already holds
    given: dict[str, Any]
    prompt: Tensor | None = None  # (B, S) as the caller gave it
    shortened: Shortened | None = None


class Handle:
    """Pruning installed on one model, from start() to stop(); also a context manager that gives the trace.

    Works for stock generate(), for the image-text-to-text pipeline, and for direct calls of the model. Parameters,
    configuration and methods of the model are the same after stop() as before start().
    """

    def __init__(self, model: Any, parts: Sequence[Method], joint_space: JointSpace | None = None) -> None:
        self.model = model
        self.parts = tuple(parts)
        self.trace = Trace()
        self.active = False
        self.family = family_of(model)
        decoder = model.get_decoder()
        self._layers: Sequence[nn.Module] = decoder.layers
        self._stages = stages_of(self.parts, len(decoder.layers))
        self._probe = Probe(model, self.family, {need for part in parts for need in part.needs})
        evicting = [part for part in self.parts if part.site == "cache"]
        self._evictor = Evictor(evicting[0], decoder.layers) if evicting else None
        self._decoder_probe = DecoderProbe(decoder.layers, self._stages, everywhere=bool(evicting))
        if self._evictor is not None:
            self._evictor.listen(self._decoder_probe)
        inside = [part for part in self.parts if part.site == "tower"]
        mine = lambda: self._thread == threading.get_ident()  # noqa: E731 - a question, asked while the encoder runs
        self._tower = TowerStages(model, self.family, inside, self._probe, mine)
        self._prefill = Prefill(model, self.family, self.parts, self._probe, self._tower, self, joint_space)
        self._run: _Run | None = None
        self._direct: Shortened | None = None
        self._descent: Descent | None = None
        self._lock = threading.Lock()
        self._thread: int | None = None  # at work on the model
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
        replacements: tuple[Callable[..., Any], ...]
        replacements = (
            self._generate,
            self._expand,
            self._correct_length,
            self._prepare_cache,
            self._prepare_positions,
        )
        for name, replacement in zip(_OVERRIDDEN, replacements, strict=True):
            # The signature and name that transformers inspects stay those of the stock method.
            setattr(self.model, name, _as_method(replacement, self._stock[name]))
        self._hooks.append(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._after_forward, always_call=True))
        for number, layer in enumerate(self._layers):
            hook = partial(self._before_layer, number)
            self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            if self._evictor is not None:
                self._hooks.append(layer.register_forward_hook(partial(self._after_layer, number), with_kwargs=True))
        if self._stages:
            self._hooks.append(self.model.get_decoder().register_forward_hook(self._after_decoder))
        self._tower.check_alone()
        # The probe's hook on a block runs before the stage's hook on the next one, so both see the same tokens.
        self._probe.install()
        self._tower.install()
        self._decoder_probe.install()
        if self._stages and self.family.deepstack is not None:
            decoder = self.model.get_decoder()
            stock = getattr(decoder, self.family.deepstack)
            setattr(decoder, self.family.deepstack, partial(self._add_deep_features, stock))
        self.active = True

    def stop(self) -> None:
        """Take pruning off the model. Caches it pruned refuse to work until start() is called again."""
        if getattr(self.model, "_foveate_handle", None) is not self:
            return
        self._probe.remove()
        self._tower.remove()
        self._decoder_probe.remove()
        self.active = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for name in _OVERRIDDEN:
            vars(self.model).pop(name, None)
        if self.family.deepstack is not None:
            vars(self.model.get_decoder()).pop(self.family.deepstack, None)
        del self.model._foveate_handle
        self._run = self._direct = self._descent = self._thread = None

    def __enter__(self) -> Trace:
        self.start()
        return self.trace

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    def _claim(self) -> None:
        """Take the model for this thread until its call is over."""
        with self._lock:
            if self._thread not in (None, threading.get_ident()):
                raise FoveateError(
                    "another thread is using this pruned model; one call at a time, or one model per thread"
                )
            self._thread = threading.get_ident()

    # -- generate() -----------------------------------------------------------------------------------------------

    def _generate(self, *arguments: Any, **options: Any) -> Any:
        self._claim()
        outer, self._run = self._run, None  # a logits processor may generate on its own
        try:
            self._finish()  # pictures may have been encoded by hand
            bound = inspect.signature(self._stock["generate"]).bind_partial(*arguments, **options).arguments
            given = renamed({**bound, **bound.pop("kwargs", {})})
            self._check_generate(given)
            self._run = _Run(contains_past=_contains_past(given), given=given)
            self._prefill.expect(given.get("input_ids", given.get("inputs")), given, self._run.contains_past)
            if given.get("streamer") is not None:
                given["streamer"] = _PromptStreamer(given["streamer"], self._run)
            return self._restore_prompt(self._stock["generate"](**given), self._run)
        finally:
            self._run = outer
            self._finish()
            if outer is None:
                self._thread = None

    def _begin(self, shortened: Shortened) -> None:
        """A shortened prompt is about to enter the decoder: note it, and get ready for the stages inside."""
        if shortened.record is None:
            return
        if self._stages and shortened.timeline.held:
            raise FoveateError(
                f"{format_spec(self._stages[0].part)} cannot follow a new image into a cache that "
                f"{format_spec(self._evictor.part) if self._evictor else 'another method'} has evicted from; start "
                "with a new cache"
            )
        self.trace.add(shortened.record())
        if self._stages:
            self._descent = Descent(
                stages=list(self._stages),
                images=shortened.images,
                prompt=shortened.prompt,
                plan=shortened.plan,
                timeline=shortened.timeline,
                probe=self._decoder_probe,
                layers=self._layers,
                norm=self.model.get_decoder().norm,
                entries=shortened.entries,
                repeats=shortened.repeats,
                earlier=shortened.earlier,
                stopwatches=shortened.stopwatches,
            )

    def _finish(self) -> None:
        """A prefill is over, well or not: nothing of it stays."""
        self._probe.take()
        self._tower.forget()
        if self._descent is not None:
            self._decoder_probe.close()
        self._descent = None
        if self._evictor is not None:
            self._evictor.forget()

    def _check_generate(self, given: dict[str, Any]) -> None:
        config = given.get("generation_config") or self.model.generation_config
        kind = given.get("cache_implementation", config.cache_implementation)
        if kind in _UNSUPPORTED_CACHES:
            raise FoveateError(f"cache_implementation={kind!r} cannot hold a pruned prompt; use 'dynamic' or 'static'")
        caches.check_usable(given.get(CACHE), self)
        if self._stages or self._evictor is not None:
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

    def _check_inside(self, config: Any, given: dict[str, Any]) -> None:
        """What stages inside the decoder cannot work with."""
        part = self._stages[0].part if self._evictor is None else self._evictor.part
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
        if self._evictor is not None and (kind == "static" or isinstance(given.get(CACHE), StaticCache)):
            raise FoveateError(f"{name} evicts entries, and a static cache cannot shrink; use a dynamic cache")

    def _expand(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **options: Any
    ) -> Any:
        stock = self._stock["_expand_inputs_for_generation"]
        run = self._run
        if run is None:
            return stock(expand_size, is_encoder_decoder, input_ids, **options)
        run.prompt = input_ids
        shortened = self._prefill.for_generate(input_ids, options, run.contains_past, expand_size, run.given)
        run.shortened = shortened
        input_ids, options = stock(expand_size, is_encoder_decoder, shortened.ids, **shortened.options)
        if shortened.encoded is not None:
            options["mm_encoder_outputs"] = shortened.repeat_encoded(expand_size)
        self._begin(shortened)
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
        shortened = None if self._run is None else self._run.shortened
        if shortened is not None:
            held = model_kwargs.get(CACHE)
            if held is not None:
                caches.check_usable(held, self)
                caches.attach(held, shortened.timeline)
            elif model_kwargs.get("attention_mask") is None:
                # Without cache and mask, gaps in the positions would be read as packed sequences.
                model_kwargs["attention_mask"] = shortened.plan.repeat(shortened.repeats).valid.long()
        return result

    def _prepare_positions(self, inputs: Tensor, options: dict[str, Any]) -> Any:
        """Where positions have several axes, a model knows those of the pruned part from its handle alone."""
        if self.family.positions is not None and caches.timeline_of(options.get(CACHE)) is not None:
            return GenerationMixin._prepare_position_ids_for_generation(self.model, inputs, options)
        return self._stock["_prepare_position_ids_for_generation"](inputs, options)

    def _add_deep_features(self, stock: Callable[..., Tensor], hidden: Tensor, visual: Tensor, features: Tensor) -> Any:
        """Visual features that join the stream behind a block, where tokens have left before it."""
        if self._descent is None or self._descent.rows is None:
            return stock(hidden, visual, features)
        return self._descent.add(hidden, visual, features)

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
        if not torch.compiler.is_compiling():  # a compiled step is generate()'s own
            self._claim()
        if self._run is not None:
            return self._generate_step(arguments, options)
        self._finish()  # pictures may have been encoded by hand
        bound = inspect.signature(type(model).forward).bind_partial(model, *arguments, **options).arguments
        given = renamed({**bound, **bound.pop("kwargs", {})})
        given.pop("self")
        self._direct = self._prefill.for_forward(given)
        self._begin(self._direct)
        return (), self._direct.options

    def _generate_step(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """generate() counts on from the last token that stayed; where the prompt ended in dropped ones it lags."""
        shortened = None if self._run is None else self._run.shortened
        positions, cache = options.get("position_ids"), options.get(CACHE)
        if shortened is None or shortened.timeline.lag is None or positions is None:
            return None
        held = 0 if cache is None else cache.get_seq_length()
        columns = torch.arange(positions.shape[-1], device=positions.device) + held
        lag = shortened.timeline.lag.to(positions.device)[..., None] * (columns >= shortened.timeline.entries)
        return arguments, {**options, "position_ids": positions + lag}

    def _after_forward(self, *_: Any) -> None:
        """Runs after an exception as well, that of a refused call from another thread included."""
        if not torch.compiler.is_compiling() and self._thread != threading.get_ident():
            return
        shortened = self._direct if self._run is None else self._run.shortened
        if shortened is not None and shortened.record is not None and not shortened.settled:
            shortened.settled = True
            if self._stages or self._evictor is not None:
                self.trace.history[-1] = shortened.record()
        self._direct = None
        self._finish()
        if self._run is None:
            self._thread = None

    def _before_layer(self, number: int, layer: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        shortened = self._direct if self._run is None else self._run.shortened
        if shortened is None:
            return None
        # Rotary embeddings are computed by now; gappy positions would only be mistaken for packed sequences.
        options = {**options, "position_ids": None} if options.get("position_ids") is not None else options
        timeline = caches.timeline_of(options.get(CACHE))
        if self._evictor is not None and timeline is not None and number == 0:
            hidden = arguments[0] if arguments else options["hidden_states"]
            timeline.before, timeline.seen = timeline.seen, timeline.seen + hidden.shape[1]
        if self._descent is not None:
            hidden = arguments[0] if arguments else options.pop("hidden_states")
            hidden, options = self._descent.before_layer(number, hidden, options)
            arguments = (hidden, *arguments[1:])
        elif timeline is not None and number in timeline.held and self._evictor is not None:
            options = self._evictor.mask(number, timeline, options)
        elif timeline is not None and timeline.groups:
            options = decode_mask(timeline, number, layer, options)
        if self._evictor is not None and timeline is not None:
            self._evictor.before_layer(number, timeline, self._descent)
        return arguments, options

    def _after_layer(
        self, number: int, layer: Any, arguments: tuple[Any, ...], options: dict[str, Any], output: Any
    ) -> None:
        cache: Any = options.get(CACHE)
        timeline = caches.timeline_of(cache)
        if self._evictor is not None and timeline is not None:
            self._evictor.after_layer(number, timeline, cache.layers[number])

    def _after_decoder(self, decoder: Any, arguments: Any, output: Any) -> Any:
        """A direct call's logits keep one place per token of the prompt, so that labels and logits stay aligned."""
        if self._descent is None or self._direct is None:
            return None
        output.last_hidden_state = self._descent.scatter(output.last_hidden_state)
        return output


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
