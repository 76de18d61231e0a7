"""The one verb: `prune(model, methods)`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from foveate.core import FoveateError, Method

if TYPE_CHECKING:
    from foveate.runtime.handle import Handle


def prune(
    model: Any,
    methods: Method | str | Sequence[Method | str],
    *,
    processor: Any = None,
    question: str | Sequence[str] | None = None,
    clip: Any = None,
    short_outputs: bool = False,
) -> Handle:
    """A handle that prunes the visual tokens of `model` while it is active.

    In a direct call with labels, methods read the text up to the first token behind a picture that has one: what is to
    be written is not there at inference. A row with a label in front of its picture is read whole.

    Args:
        model: a loaded vision-language model of transformers, a PEFT model around one, or a pipeline with one.
        methods: a method, its spec ("fopru:keep=0.25"), or several of them, which act one after the other.
        processor: the model's processor, for methods that read the question as text; a pipeline brings its own.
        question: what those methods are to read in place of the prompt's text after the image; one, or one per row.
        clip: for methods that compare image and question in CLIP's joint space: folder or hub id of the CLIPModel whose
            vision tower the encoder is, or the pair (CLIPModel, tokenizer); `mini` brings its own.
        short_outputs: a direct call `model(**inputs)` hands out logits, hidden states and attentions as they are, with
            a column for each token that entered the decoder, in the order of `trace.index`: for training that needs
            the memory. By default they have the columns of the caller's `input_ids`: in that of a token that left
            stands what the last one before it in the call gave (zero where there is none), `logits_to_keep` and labels
            count as ever, and attentions are refused. The loss is the same. `image_hidden_states` and `router_logits`
            are those of the tokens that are left, either way.

    Returns:
        The handle: `with handle as trace: ...`, or `handle.start()` and `handle.stop()`. `restore` stops one that is
        out of reach.

    Raises:
        FoveateError: the model is no VLM of a known family, a method cannot run on it, an argument is missing, or the
            model has an adapter that was tuned under another spec.
    """
    from foveate.runtime.compiled import Compiled
    from foveate.runtime.encoder.joint_space import joint_space
    from foveate.runtime.handle import Handle
    from foveate.runtime.support import check_parts
    from foveate.runtime.tuned import check_tuned
    from foveate.runtime.wrapped import is_pipeline, outermost, unwrapped

    stages = _listed(methods)
    parts = tuple(part for method in stages for part in method.parts())
    if not parts:
        raise FoveateError("no method was given; to run without pruning, call the model outside prune()")
    if processor is None and is_pipeline(model):
        processor = model.processor
    top, model = outermost(model), unwrapped(model)
    check_tuned(model, stages)
    compiled = Compiled(top, model, parts)
    with compiled.as_written():
        shape = check_parts(model, parts)
        space = joint_space(model, parts, processor=processor, question=question, clip=clip)
        return Handle(model, parts, shape, compiled, space, short_outputs)


def check_prunable(model: Any, methods: Method | str | Sequence[Method | str], **options: Any) -> None:
    """Refuse what `prune` refuses, without a handle that waits to be started.

    Args:
        options: further arguments of `prune`.
    """
    prune(model, methods, **options).discard()


def restore(model: Any) -> None:
    """Stop whatever handle prunes `model`, also one that no name points at any more; else nothing is changed.

    Args:
        model: as `prune` takes it.

    Raises:
        FoveateError: a call of the model is running, and this comes from inside it.
    """
    from foveate.runtime.handle import handle_of
    from foveate.runtime.wrapped import unwrapped

    handle = handle_of(unwrapped(model))
    if handle is not None:
        handle.stop()


def share_encoding(model: Any, needs: Iterable[str]) -> AbstractContextManager[None]:
    """While this is open, handles on `model` that act behind the encoder share one encoding of the same pictures.

    For comparing methods: `needs` are the signals of all that will run. What each answers does not change.
    """
    from foveate.runtime.encoder.share import share_encoding as share
    from foveate.runtime.wrapped import unwrapped

    return share(unwrapped(model), needs)


def _listed(methods: Method | str | Sequence[Method | str]) -> list[Method]:
    from foveate.spec import parse_stages

    given = list(methods) if isinstance(methods, Iterable) and not isinstance(methods, str) else [methods]
    stages: list[Method] = []
    for one in given:
        if isinstance(one, Method):
            stages.append(one)
        elif isinstance(one, str):
            stages.extend(parse_stages(one))
        else:
            raise FoveateError(f"{one!r} is no method; give a Method such as foveate.FoPru(keep=0.25), or its spec")
    return stages
