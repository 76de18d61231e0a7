"""What should hold beyond one prompt: on the cache, at every stage of a method, in padded batches, in later turns."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate import methods
from foveate.core import Method
from foveate.evaluate.statements import STEPS, Outcome, Run, apart, apart_along, stated, tolerance
from foveate.families import family_of
from foveate.methods.h2o import H2O
from foveate.prune import prune
from foveate.runtime.seams import CACHE
from foveate.runtime.wrapped import unwrapped
from foveate.spec import parse

_STAGED = ("pyramiddrop", "vscan", "sparsevlm")
"""Methods that act at several depths of a decoder; the first that runs is tried."""

_MOVED = 8
"""How often pixels are moved by as much as the model rounds, to see which entries tie."""

_WORDS = 3
"""Tokens of text that a longer prompt has more, or a second turn."""


def further(model: Any, inputs: Mapping[str, Any], works: Collection[str], plain: Run) -> Iterator[Outcome]:
    """Statements about calls of other kinds.

    Args:
        inputs: of `model.generate`: prompts with pictures.
        works: methods that run on this model.
        plain: what the unpruned model says of the prompts.
    """
    layers = len(unwrapped(model).get_decoder().layers)
    evicting = H2O(heavy=0.1, recent=0.1)
    if "h2o" in works:
        yield stated(f"{evicting} holds its budget in every layer", partial(_budget, model, inputs, evicting, plain))
    staged = next((name for name in _STAGED if name in works), None)
    if staged is not None and layers > 3:
        method = methods.get(staged).example(unwrapped(model).config)
        yield stated(f"{method} keeps its count at every stage", partial(_stages, model, inputs, method))
    if not _ends_in_text(model, inputs):
        return
    some, every = ["random:keep=0.5"], ["random:keep=1.0"]
    if "fastv" in works and layers > 1:
        some.append(f"fastv:layer={layers // 2},keep=0.5")
        every.append(f"fastv:layer={layers // 2},keep=1.0")
    if inputs["input_ids"].shape[0] == 1:
        for method in (*map(parse, some), *([evicting] if "h2o" in works else [])):
            name = f"{method} answers each row of a padded batch as alone"
            yield stated(name, partial(_batch, model, inputs, method))
    for keeping in map(parse, every):
        yield stated(f"{keeping} changes nothing in a second turn", partial(_same_turns, model, inputs, keeping))
    if not family_of(unwrapped(model)).two_way:
        for method in map(parse, some):
            name = f"{method} takes a second turn at once as token by token"
            yield stated(name, partial(_turn_by_token, model, inputs, method))


# ---------------------------------------------------------------------------------------------------------------------
# counts


def _budget(model: Any, inputs: Mapping[str, Any], method: H2O, plain: Run) -> tuple[bool, str]:
    """Each layer holds what the method asks for, and the first token is answered before anything leaves."""
    with prune(model, method):
        run = Run.of(model, inputs)
    lengths = _mask(inputs).sum(dim=1).tolist()
    entries = _entries(run.cache)
    wanted = [max(sum(method.budget(min(length, window))) for length in lengths) for window in entries.values()]
    counted = [run.cache.layers[number].keys.shape[2] for number in entries]
    difference, most = apart(run, plain), tolerance(model, plain)
    detail = f"{_span(counted)} of {max(lengths)} entries, {_span(wanted)} asked for"
    return counted == wanted and difference <= most, f"{detail}; first logits differ by {difference:.2g} of {most:.2g}"


def _stages(model: Any, inputs: Mapping[str, Any], method: Method) -> tuple[bool, str]:
    """Tokens of each picture after each stage, and entries of each layer, which follow from them."""
    with prune(model, method) as trace:
        run = Run.of(model, inputs)
    layers = len(unwrapped(model).get_decoder().layers)
    found = [[stage.after for stage in image.stages] for image in trace.images]
    asked = [list(method.count(image.original, image.grid) or ()) for image in trace.images]
    lengths = _mask(inputs).sum(dim=1)
    wanted = []
    depths = [depth for part in method.parts() for depth in (part.depths(layers) if part.site == "layer" else (0,))]
    for number, window in _entries(run.cache).items():
        left = lengths.clone()
        for image, counts in zip(trace.images, asked, strict=True):
            past = [count for count, depth in zip(counts, depths, strict=True) if depth <= number]
            left[image.row] -= image.original - (past[-1] if past else image.original)
        wanted.append(min(int(left.max()) + STEPS - 1, window))
    counted = [run.cache.layers[number].keys.shape[2] for number in _entries(run.cache)]
    seen = ", ".join(
        " -> ".join(map(str, [image.original, *one])) for image, one in zip(trace.images, found, strict=True)
    )
    detail = f"{seen} tokens; layers hold {_span(counted)} entries, {_span(wanted)} are right"
    return found == asked and counted == wanted, detail


def _entries(cache: Any) -> dict[int, int]:
    """Layers that keep entries of their own, and the most that each may hold: less than its window where it slides."""
    layers = [(number, layer) for number, layer in enumerate(cache.layers) if layer.keys is not None]
    windows = {number: getattr(layer, "sliding_window", None) for number, layer in layers}
    return {number: 1 << 62 if window is None else window - 1 for number, window in windows.items()}


def _span(counts: list[int]) -> str:
    return " ".join(map(str, counts)) if len(set(counts)) > 1 else str(counts[0])


# ---------------------------------------------------------------------------------------------------------------------
# other prompts


def _batch(model: Any, inputs: Mapping[str, Any], method: Method) -> tuple[bool, str]:
    """The prompt and a longer one, each alone and both in one batch, where the shorter is padded."""
    longer = _longer(model, inputs)
    pad = _pad_id(model)
    batch = {}
    for name, value in longer.items():
        short = inputs.get(name)
        if not _per_token(value, longer):
            batch[name] = torch.cat([value, value]) if isinstance(value, Tensor) else value
            continue
        short = torch.ones_like(inputs["input_ids"]) if short is None else short
        filler = pad if name == "input_ids" else 0
        batch[name] = torch.cat([torch.nn.functional.pad(short, (_WORDS, 0), value=filler), value])
    with prune(model, method):
        alone = [Run.of(model, inputs), Run.of(model, longer)]
        together = Run.of(model, batch)
    rows = [Run(together.answer[row, None], together.steps[row, None], None, None) for row in range(2)]
    most = tolerance(model, alone[0])
    differences = [
        distance if (distance := apart_along(row, one)) <= most else min(distance, _nearest(model, own, method, row))
        for row, one, own in zip(rows, alone, (inputs, longer), strict=True)
    ]
    return max(differences) <= most, f"logits differ by {max(differences):.2g} of {most:.2g} allowed"


def _nearest(model: Any, inputs: Mapping[str, Any], method: Method, row: Run) -> float:
    """How near a row comes to the prompt alone, its pixels moved by rounding: of entries that tie either may stay."""
    drawn, least = torch.Generator().manual_seed(0), torch.finfo(model.dtype).eps
    found = []
    for _ in range(_MOVED):
        moved = {
            name: value * (1 + least * torch.randn(value.shape, generator=drawn).to(value))
            if name.startswith("pixel_values") and value.is_floating_point()
            else value
            for name, value in inputs.items()
        }
        with prune(model, method):
            found.append(apart_along(row, Run.of(model, moved)))
    return min(found)


def _same_turns(model: Any, inputs: Mapping[str, Any], method: Method) -> tuple[bool, str]:
    """Two turns with everything kept, and two turns without pruning."""
    first = Run.of(model, inputs)
    plain = Run.of(model, _next_turn(model, inputs, first))
    with prune(model, method):
        first = Run.of(model, inputs)
        run = Run.of(model, _next_turn(model, inputs, first))
    difference, most = apart_along(run, plain), tolerance(model, plain)
    return difference <= most, f"logits differ by {difference:.2g} of {most:.2g} allowed"


def _turn_by_token(model: Any, inputs: Mapping[str, Any], method: Method) -> tuple[bool, str]:
    """A second turn on a pruned cache, against the same words one by one."""
    with prune(model, method):
        first = Run.of(model, inputs)
        turn = _next_turn(model, inputs, first)
        single = {**turn, CACHE: copy.deepcopy(first.cache)}
        run = Run.of(model, turn)
        whole, mask = single["input_ids"], single["attention_mask"]
        for end in range(whole.shape[1] - _WORDS, whole.shape[1] + 1):  # the answer's last token is in no cache yet
            types = {name: value[:, end - 1 : end] for name, value in single.items() if name.endswith("token_type_ids")}
            step = {"input_ids": whole[:, end - 1 : end], "attention_mask": mask[:, :end], **types}
            out = model(**step, **{CACHE: single[CACHE]}, use_cache=True)
    difference, most = float((out.logits[:, -1].float() - run.logits).abs().max()), tolerance(model, run)
    return difference <= most, f"logits differ by {difference:.2g} of {most:.2g} allowed"


def _next_turn(model: Any, inputs: Mapping[str, Any], first: Run) -> dict[str, Any]:
    """Arguments of the turn after an answer: the whole conversation, whose pictures are in the cache."""
    turn: dict[str, Any] = {"attention_mask": _mask(inputs), CACHE: first.cache}
    turn |= {name: value for name, value in inputs.items() if _per_token(value, inputs)}
    for name, value in list(turn.items()):
        if name != CACHE:
            grown = value[:, -1:].expand(-1, STEPS + _WORDS)
            turn[name] = torch.cat([value, grown], dim=1)
    said = inputs["input_ids"].shape[1]
    turn["input_ids"][:, said : said + STEPS] = first.answer
    return turn


def _longer(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same prompt with its last word some times more."""
    made: dict[str, Any] = {"attention_mask": _mask(inputs), **inputs}
    for name, value in made.items():
        if _per_token(value, inputs):
            made[name] = torch.cat([value, value[:, -1:].expand(-1, _WORDS)], dim=1)
    return made


def _mask(inputs: Mapping[str, Any]) -> Tensor:
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask


def _per_token(value: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether an argument has a column for each token of the prompt."""
    return isinstance(value, Tensor) and value.shape == inputs["input_ids"].shape


def _ends_in_text(model: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether the last token of each prompt is text, which can be said again."""
    last = inputs["input_ids"][:, -1].tolist()
    return bool(_mask(inputs)[:, -1].all()) and not _holders(model).intersection(last)


def _holders(model: Any) -> set[int | None]:
    """The placeholders of pictures and videos."""
    config = unwrapped(model).config
    return {family_of(unwrapped(model)).image_token_id(config), getattr(config, "video_token_id", None)}


def _pad_id(model: Any) -> int:
    """An id for padding, which nobody reads: any but a placeholder's."""
    pad = getattr(unwrapped(model).config.get_text_config(decoder=True), "pad_token_id", None)
    wanted = [0 if pad is None or pad < 0 else int(pad), 0, 1, 2]
    return next(one for one in wanted if one not in _holders(model))
