"""The hooks of a handle: on the model, where a direct call is shortened, and on the layers of its decoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.families import Family
from foveate.runtime import cache as caches
from foveate.runtime.calls import Calls
from foveate.runtime.layers import decode_mask
from foveate.runtime.prefill import Prefill, Shortened, renamed
from foveate.runtime.seams import CACHE, unfit
from foveate.runtime.widen import kept, spread, widen


class Forwards:
    """The hooks on one model and its decoder's layers, from install() to remove()."""

    def __init__(self, model: Any, family: Family, layers: Sequence[nn.Module], calls: Calls, prefill: Prefill) -> None:
        self.model, self.family, self._layers, self.calls, self._prefill = model, family, layers, calls, prefill
        self._hooks: list[Any] = []

    def install(self) -> None:
        """Put the hooks in place."""
        self._hooks.append(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._after_forward, always_call=True))
        for number, layer in enumerate(self._layers):
            hook = partial(self._before_layer, number)
            self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            if self.calls.evictor is not None:
                self._hooks.append(layer.register_forward_hook(partial(self._after_layer, number), with_kwargs=True))
        self._hooks.append(self.model.get_decoder().register_forward_hook(self._after_decoder))
        if self.calls.stages and self.family.deepstack is not None:
            decoder = self.model.get_decoder()
            stock = getattr(decoder, self.family.deepstack)
            setattr(decoder, self.family.deepstack, partial(self._add_deep_features, stock))

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self.family.deepstack is not None:
            vars(self.model.get_decoder()).pop(self.family.deepstack, None)

    # -- the model ------------------------------------------------------------------------------------------------

    def _before_forward(self, model: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if not torch.compiler.is_compiling():  # a compiled step is generate()'s own
            self.calls.claim()
        if self.calls.run is not None:
            return self._generate_step(arguments, options)
        self.calls.finish()  # pictures may have been encoded by hand
        bound = inspect.signature(type(model).forward).bind_partial(model, *arguments, **options).arguments
        given = renamed({**bound, **bound.pop("kwargs", {})})
        given.pop("self")
        self.calls.direct = self._prefill.for_forward(given)
        self.calls.begin(self.calls.direct)
        return (), self.calls.direct.options

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

    def _after_forward(self, model: Any, arguments: Any, output: Any) -> None:
        """Runs after an exception as well, that of a refused call from another thread included."""
        if not torch.compiler.is_compiling() and not self.calls.mine:
            return
        try:
            self.calls.settle(done=output is not None)
        finally:
            self.calls.direct = None
            self.calls.finish()
            if self.calls.run is None:
                self.calls.free()

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
        if self.calls.evictor is not None and timeline is not None and number == 0:
            timeline.before, timeline.seen = timeline.seen, timeline.seen + hidden.shape[1]
        if self.calls.descent is not None:
            options.pop("hidden_states", None)
            hidden, options = self.calls.descent.before_layer(number, hidden, options)
            arguments = (hidden, *arguments[1:])
        elif timeline is not None and number in timeline.held and self.calls.evictor is not None:
            options = self.calls.evictor.mask(number, timeline, options)
        elif timeline is not None and timeline.groups:
            options = decode_mask(timeline, number, layer, options)
        if self.calls.evictor is not None and timeline is not None:
            self.calls.evictor.before_layer(number, timeline, self.calls.descent)
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
        timeline = caches.timeline_of(cache)
        if self.calls.evictor is not None and timeline is not None:
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
        if self.calls.descent is None or self.calls.descent.rows is None:
            return stock(hidden, visual, features)
        return self.calls.descent.add(hidden, visual, features)
