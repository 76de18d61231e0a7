"""The hooks of a handle: where a model may be called, prompts are shortened or refused; and on its decoder's layers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.choosing.widen import kept, spread, widen
from foveate.core import FoveateError
from foveate.families.family import Family
from foveate.runtime.arguments import named
from foveate.runtime.calls import Calls
from foveate.runtime.decoder import cache as caches
from foveate.runtime.decoder.layers import decode_mask
from foveate.runtime.prefill import Prefill
from foveate.runtime.seams import CACHE, unfit
from foveate.runtime.shortened import Shortened
from foveate.runtime.uncopied import Uncopied


class _Hook:
    """One that can be registered again, under the number that it had."""

    def __init__(self, handle: Any, hook: Callable[..., Any]) -> None:
        self.handle, self._hook = handle, hook
        self._marked = [of for of in (one() for one in handle.extra_dict_ref) if handle.id in of]

    def put_back(self) -> None:
        self.handle.hooks_dict_ref()[self.handle.id] = self._hook
        for of in self._marked:
            of[self.handle.id] = True


class Forwards(Uncopied):
    """The hooks on one model and its decoder's layers, from install() to remove().

    The model and its base model take pictures, so that a call of either is shortened. What is between them and the
    decoder's layers takes words alone.
    """

    def __init__(self, model: Any, family: Family, layers: Sequence[nn.Module], calls: Calls, prefill: Prefill) -> None:
        self.model, self.family, self._layers, self.calls, self._prefill = model, family, layers, calls, prefill
        self._whole = [model] if model.base_model is model else [model, model.base_model]
        self._inner = _between(model.base_model, model.get_decoder())
        self._hooks: list[_Hook] = []

    @property
    def entered(self) -> list[nn.Module]:
        """The modules around the decoder's layers, from the model on."""
        return [*self._whole, *self._inner]

    def install(self) -> None:
        """Put the hooks in place; under the same numbers each time, which graphs of the model are guarded by."""
        for one in self._hooks:
            one.put_back()
        if not self._hooks:
            self._register()
        if self.calls.stages and self.family.deepstack is not None:
            decoder = self.model.get_decoder()
            stock = getattr(decoder, self.family.deepstack)
            setattr(decoder, self.family.deepstack, partial(self._add_deep_features, stock))

    def _register(self) -> None:
        # Before a call of the decoder by itself is over, so that it is never taken for the outer one's.
        self._behind(self.model.get_decoder(), self._after_decoder)
        for module in self._whole:
            self._before(module, self._before_forward)
            self._behind(module, self._after_forward, always_call=True)
        for module in self._inner:
            self._before(module, self._before_inner)
            self._behind(module, self._after_forward, always_call=True)
        for number, layer in enumerate(self._layers):
            self._before(layer, partial(self._before_layer, number))
            if self.calls.evictor is not None:
                self._behind(layer, partial(self._after_layer, number), with_kwargs=True)

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._hooks.append(_Hook(module.register_forward_pre_hook(hook, with_kwargs=True), hook))

    def _behind(self, module: nn.Module, hook: Callable[..., Any], **options: bool) -> None:
        self._hooks.append(_Hook(module.register_forward_hook(hook, **options), hook))

    def remove(self) -> None:
        """Take the hooks away."""
        for one in self._hooks:
            one.handle.remove()
        if self.family.deepstack is not None:
            vars(self.model.get_decoder()).pop(self.family.deepstack, None)

    # -- the model ------------------------------------------------------------------------------------------------

    def await_step(self) -> None:
        """The next call of the model is generate()'s own."""
        self.calls.await_calls(*self._whole, *self._inner)

    def _before_forward(self, module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            if self.calls.run is None:
                _refuse_graph(type(module).__name__)
            return self._generate_step(arguments, options) if module is self.model else None
        if self.calls.is_awaited(module):
            return self._generate_step(arguments, options) if module is self.model else None
        self.calls.enter(sys._getframe(1))
        given = named(type(module).forward, (module, *arguments), options)
        given.pop("self")
        self.calls.direct = self._prefill.for_forward(given)
        self.calls.begin(self.calls.direct)
        below = self._whole[self._whole.index(module) + 1 :]
        self.calls.await_calls(*below, *self._inner)
        return (), self.calls.direct.options

    def _before_inner(self, module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Refuse what is called past the model, unless it is text alone."""
        if torch.compiler.is_compiling() or self.calls.is_awaited(module):
            return
        self.calls.enter(sys._getframe(1))
        ids = named(type(module).forward, (module, *arguments), options).get("input_ids")
        if ids is None or self._prefill.placeholders.are(ids).any():
            name = type(module).__name__
            whole = " or ".join(type(one).__name__ for one in self._whole)
            raise FoveateError(
                f"{name} of this pruned model was called by itself, where nothing says what is visual, so it would run "
                f"unpruned; call the {whole} around it with input_ids and pixel_values, or stop() the handle first"
            )
        self.calls.await_calls(*self._inner[self._inner.index(module) + 1 :])

    def _generate_step(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """generate() counts on from the last token that stayed; where the prompt ended in dropped ones it lags."""
        shortened = None if self.calls.run is None else self.calls.run.shortened
        positions, cache = options.get("position_ids"), options.get(CACHE)
        if shortened is None or shortened.timeline.lag is None or positions is None:
            return None
        held = 0 if cache is None else cache.get_seq_length()
        columns = torch.arange(positions.shape[-1], device=positions.device) + held
        lag = shortened.timeline.lag.to(positions.device)[..., None] * (columns >= shortened.timeline.entries)
        return arguments, {**options, "position_ids": positions + lag}

    def _after_forward(self, module: Any, arguments: Any, output: Any) -> None:
        """Runs after an exception as well, that of a refused call from another thread included."""
        if torch.compiler.is_compiling() or not self.calls.mine:
            return
        ended = self.calls.returned(sys._getframe(1), failed=output is None)
        if not ended and module is self.model and self.calls.run is not None:
            self.calls.end_step(done=output is not None)

    # -- the decoder ----------------------------------------------------------------------------------------------

    def _before_layer(self, number: int, layer: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        shortened = self.calls.shortened
        if shortened is None:
            return None
        # Rotary embeddings are computed by now; gappy positions would only be mistaken for packed sequences.
        options = {**options, "position_ids": None} if options.get("position_ids") is not None else options
        hidden = arguments[0] if arguments else options["hidden_states"]
        self._check_cache(number, hidden, options, shortened)
        timeline = caches.timeline_of(options.get(CACHE))
        evicts = timeline is not None and timeline.evicting and shortened.cache is not None
        evictor = self.calls.evictor if evicts else None
        if evictor is not None and timeline is not None and number == 0:
            timeline.before, timeline.seen = timeline.seen, timeline.seen + hidden.shape[1]
        if self.calls.descent is not None:
            options.pop("hidden_states", None)
            hidden, options = self.calls.descent.before_layer(number, hidden, options)
            arguments = (hidden, *arguments[1:])
        elif evictor is not None and timeline is not None and number in timeline.held:
            options = evictor.mask(number, timeline, options)
        elif timeline is not None and timeline.groups:
            options = decode_mask(timeline, number, layer, options)
        if evictor is not None and timeline is not None:
            evictor.before_layer(number, timeline, self.calls.descent)
        return arguments, options

    def _check_cache(self, number: int, hidden: Tensor, options: dict[str, Any], shortened: Shortened) -> None:
        """A layer that is about to run must have been handed the cache that knows what was pruned."""
        if number == 0 and shortened.record is not None and not shortened.settled:
            shortened.fed = hidden.shape[1]
        if shortened.cache is None or options.get(CACHE) is shortened.cache:
            return
        raise unfit(
            f"layer {number} of {type(self.model).__name__} was handed no {CACHE} of this prompt, but "
            f"({', '.join(sorted(options))})"
        )

    def _after_layer(
        self, number: int, layer: Any, arguments: tuple[Any, ...], options: dict[str, Any], output: Any
    ) -> None:
        cache: Any = options.get(CACHE)
        timeline, shortened = caches.timeline_of(cache), self.calls.shortened
        evicts = timeline is not None and timeline.evicting and shortened is not None and shortened.cache is not None
        if self.calls.evictor is not None and timeline is not None and evicts:
            self.calls.evictor.after_layer(number, timeline, cache.layers[number])

    def _after_decoder(self, decoder: Any, arguments: Any, output: Any) -> Any:
        """What leaves a direct call has a column for each token of the caller's, whoever left on the way."""
        direct, descent = self.calls.direct, self.calls.descent
        if direct is None or self.calls.run is not None:
            return None
        inside = [None] * len(self._layers) if descent is None else descent.speaking
        if self._prefill.short_outputs:  # labels are as long as what entered the decoder
            output.last_hidden_state = spread(output.last_hidden_state, inside[-1])
        else:
            widen(output, inside, direct.plan.speaking)
            output.last_hidden_state = kept(output.last_hidden_state, direct.keep)
        return output

    def _add_deep_features(self, stock: Callable[..., Tensor], hidden: Tensor, visual: Tensor, features: Tensor) -> Any:
        """Visual features that join the stream behind a block, where tokens have left before it."""
        if self.calls.descent is None or self.calls.descent.left is None:
            return stock(hidden, visual, features)
        return self.calls.descent.add(hidden, visual, features)


@torch.compiler.disable
def _refuse_graph(name: str) -> None:
    """A graph that prune() was not shown has been entered by somebody else than generate()."""
    raise FoveateError(
        f"this pruned {name} was called through torch.compile, and prune() was given the model without it, so that it "
        "would run unpruned; give prune() what torch.compile has returned, or stop() the handle first"
    )


def _between(base: Any, decoder: nn.Module) -> list[nn.Module]:
    """The modules from below the base model to the decoder, each around the next."""
    ways: list[tuple[nn.Module, ...]] = [()]
    for way in ways:  # which grows meanwhile
        around = way[-1] if way else base
        if around is decoder:
            return list(way)
        ways += [(*way, child) for child in around.children()]
    raise unfit(f"{type(base).__name__} has no {type(decoder).__name__} inside it")
