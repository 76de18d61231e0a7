"""Checks that a model can be pruned: what is found of it, which methods work, and the contract on random pixels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from foveate import methods
from foveate.core import Method
from foveate.evaluate.check_calls import further
from foveate.evaluate.statements import Outcome, Run, apart, stated, tolerance
from foveate.families import family_of
from foveate.families.rows import FAMILIES
from foveate.prune import prune
from foveate.runtime.support import assumptions, first_refused, why_not, working_methods
from foveate.runtime.wrapped import unwrapped
from foveate.spec import parse
from foveate.trace import Call

_HALVES = ("tome", "random", "fopru", "fastv")
"""One inside the encoder, one that sees nothing, one that reads the encoder, one inside the decoder."""

_ANY_ATTENTION = "proportional=false,"
"""Setting with which tokens merge whatever the encoder's attention is."""


@dataclass(frozen=True)
class Found:
    """What a model turned out to be.

    Attributes:
        model: its class.
        type: its `model_type`.
        family: the row by which it is pruned.
        assumed: what is taken for granted of a model without a row, or of sizes that its row does not say.
        encoder: kind of its vision encoder.
        encoder_blocks: how many can be observed.
        read: 0-based number of the one that the projector reads; None where none can be observed.
        decoder_layers: of the decoder.
        attention: implementation that the decoder runs.
        tokens: of each random picture in the prompt.
        methods: why each method cannot run here; None where it can.
        outcomes: the contract, statement by statement.
    """

    model: str
    type: str
    family: str
    assumed: tuple[str, ...]
    encoder: str
    encoder_blocks: int
    read: int | None
    decoder_layers: int
    attention: str
    methods: dict[str, str | None]
    tokens: tuple[int, ...] = ()
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def has_row(self) -> bool:
        """A row of the families names its type."""
        return any(self.type in family.types for family in FAMILIES)

    @property
    def passed(self) -> bool:
        """The whole contract holds."""
        return all(outcome.passed for outcome in self.outcomes)

    def as_json(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        return {**asdict(self), "passed": self.passed}


def find(model: Any) -> Found:
    """What a model is, without running it.

    Raises:
        FoveateError: it is no vision-language model, or lacks a standard part; the message names it.
    """
    model = unwrapped(model)
    family = family_of(model)
    encoder, tower = family.tower_of(model)
    decoder = model.get_decoder()
    blocks = len(tower.blocks_of(encoder))
    return Found(
        model=type(model).__name__,
        type=str(model.config.model_type),
        family=family.name,
        assumed=assumptions(model, family),
        encoder=tower.type,
        encoder_blocks=blocks,
        read=family.read_block(model) if blocks else None,
        decoder_layers=len(decoder.layers),
        attention=str(decoder.config._attn_implementation),
        methods={name: _reason(model, name) for name in methods.names()},
    )


def _reason(model: Any, name: str) -> str | None:
    """Why a method cannot run on this model; None where it can."""
    family = family_of(model)
    tower = family.tower_of(model)[1]
    refused = first_refused(methods.get(name).example(model.config).parts(), family, tower)
    return None if refused is None else why_not(refused, family, tower)


def check(model: Any, inputs: Mapping[str, Any]) -> Found:
    """What a model is, and whether pruning holds its contract on a prompt.

    Args:
        model: a vision-language model.
        inputs: of `model.generate`: one prompt with a picture, of random pixels best.

    Raises:
        FoveateError: as `find`.
    """
    found = find(model)
    calls: list[Call] = []
    outcomes: list[Outcome] = []
    with warnings.catch_warnings(), torch.inference_mode():
        for assumed in (".* is no family that Foveate knows", ".*: not all sizes are known"):  # both are reported
            warnings.filterwarnings("ignore", message=assumed, category=UserWarning)
        plain = Run.of(model, inputs)
        before = _state(unwrapped(model))  # a first stock run may leave something of its own
        for method in _identities(found):
            statement = partial(_identity, model, inputs, method, plain, calls)
            outcomes.append(stated(f"{method} changes nothing", statement))
        tokens = tuple(image.original for image in calls[0].images) if calls else ()
        for method in _halves(found, max(1, min(tokens) // 2)) if tokens else ():
            outcomes += _half(model, inputs, method, plain)
        family = family_of(unwrapped(model))
        names = working_methods(family, family.tower_of(unwrapped(model))[1])
        outcomes += further(model, inputs, names, plain)
    changed = [name for name, value in _state(unwrapped(model)).items() if before.get(name) != value]
    detail = f"changed: {', '.join(changed[:3])}" if changed else f"{len(before)} tensors, settings and hooks"
    outcomes.append(Outcome("the model is untouched", not changed, detail))
    return Found(**{**vars(found), "tokens": tokens, "outcomes": outcomes})


def _identities(found: Found) -> Iterator[Method]:
    """Methods that keep all tokens, before the decoder and inside it."""
    yield parse("random:keep=1.0")
    if found.methods["fastv"] is None and found.decoder_layers > 1:
        yield parse(f"fastv:layer={max(1, found.decoder_layers // 2)},keep=1.0")


def _halves(found: Found, keep: int) -> Iterator[Method]:
    for name in _HALVES:
        if found.methods[name] is None and (name != "fastv" or found.decoder_layers > 1):
            more = {"fastv": f"layer={max(1, found.decoder_layers // 2)},", "tome": _ANY_ATTENTION}.get(name, "")
            yield parse(f"{name}:{more}keep={keep}")


def _identity(model: Any, inputs: Mapping[str, Any], method: Method, plain: Run, calls: list[Call]) -> tuple[bool, str]:
    with prune(model, method) as trace:
        run = Run.of(model, inputs)
        calls.append(trace.latest)
    distance, allowed = apart(run, plain), tolerance(model, plain)
    same = int((run.answer == plain.answer).sum())
    total = plain.answer.numel()
    detail = f"first logits differ by {distance:.2g} of {allowed:.2g} allowed, {same} of {total} tokens are equal"
    return distance <= allowed and same == total, detail


def _half(model: Any, inputs: Mapping[str, Any], method: Method, plain: Run) -> Iterator[Outcome]:
    """Statements about a method that keeps a part of the tokens."""
    runs: list[Run] = []
    calls: list[Call] = []

    def counted() -> tuple[bool, str]:
        with prune(model, method) as trace:
            runs.append(Run.of(model, inputs))
            calls.append(trace.latest)
            runs.append(Run.of(model, inputs))
        images = trace.latest.images
        (asked,) = method.count(images[0].original) or (0,)
        left = ", ".join(f"{image.original} -> {image.after}" for image in images)
        return all(image.after == asked for image in images), f"{left} tokens, {asked} asked for"

    # What can be done inside the encoder depends on these very pictures.
    refused = f"{method} says why it cannot run" if method.site in ("pixels", "tower") else None
    yield stated(f"{method} keeps exactly its count", counted, refused)
    if len(runs) < 2:
        return
    yield stated(f"{method} keeps the tokens' positions", lambda: _positions(runs[0], plain, calls[0]))
    equal = torch.equal(runs[0].answer, runs[1].answer) and torch.equal(runs[0].logits, runs[1].logits)
    yield Outcome(f"{method} repeats itself", equal, "the second run equals the first" if equal else "two runs differ")
    yield stated(f"{method} answers a direct call as generate() does", lambda: _direct(model, inputs, method, runs[0]))


def _positions(run: Run, plain: Run, call: Call) -> tuple[bool, str]:
    """What the decoder is told of where each token stands: as unpruned, on each axis."""
    if run.positions is None or plain.positions is None:
        return False, "the decoder is handed no position_ids"
    index = call.index.to(run.positions.device)
    axes = run.positions.shape[:-2]
    # Unpruned, models with several axes may have a row of text positions in front of them.
    whole = plain.positions if not axes else plain.positions[-axes[0] :]
    whole = whole.expand(*axes, *index.shape[:1], whole.shape[-1])
    wanted = whole.gather(-1, index.clamp(min=0).expand(*axes, *index.shape))
    wrong = int(((run.positions != wanted) & (index >= 0)).sum())
    return wrong == 0, f"{wrong} of {wanted.numel()} positions differ" if wrong else f"{wanted.numel()} positions"


def _direct(model: Any, inputs: Mapping[str, Any], method: Method, run: Run) -> tuple[bool, str]:
    with prune(model, method):
        logits = model(**inputs).logits[:, -1].float()
    distance, allowed = float((logits - run.logits).abs().max()), tolerance(model, run)
    return distance <= allowed, f"logits differ by {distance:.2g} of {allowed:.2g} allowed"


def _state(model: Any) -> dict[str, Any]:
    """What must be the same afterwards: tensors, settings, hooks and attributes; no weight is read for it."""
    found: dict[str, Any] = {"configuration": repr(model.config), "generation": repr(model.generation_config)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        version = None if tensor.is_inference() else tensor._version
        found[name] = (id(tensor), tensor.dtype, tuple(tensor.shape), version)
    for name, module in model.named_modules():
        found[f"hooks of {name}"] = (len(module._forward_pre_hooks), len(module._forward_hooks))
        found[f"forward of {name}"] = (type(module), id(vars(module).get("forward")), hasattr(module, "_foveate_watch"))
        found[f"attention of {name}"] = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return found
