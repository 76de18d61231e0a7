"""`foveate run`: asks a model a question about pictures, prunes if told to, and says what that saved."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.core import UsageError, usage
from foveate.inference.loading import Adapter, AnySpec, Clip, Compiled, Device, Dtype, Trust
from foveate.texts import check_characters

if TYPE_CHECKING:
    from PIL import Image

    from foveate.inference.loading import Loaded
    from foveate.inference.resizing import Scaler
    from foveate.trace import Trace

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="mini, a folder, or a hub id.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="One or more pictures.", show_default=False)],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question about them.")],
    prune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC", help="name:field=value,...; stages joined by +; @file; none. See: foveate methods."
        ),
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(metavar="F", help="Write the picture with dropped patches grey; several get F-1, F-2, ..."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer, in tokens.")] = 64,
    compiled: Compiled = False,
    clip: Clip = None,
    adapter: Adapter = None,
    any_spec: AnySpec = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Ask MODEL a QUESTION about one or more IMAGEs and print the answer, what was kept, and what it took."""
    from foveate.inference.adapters import check_asked, load_tuned
    from foveate.inference.compiling import check_static

    with usage():
        methods = _one_method(prune)
        if compiled:
            check_static(methods)
        check_asked(adapter, [methods], any_spec=any_spec)
        targets = _targets(draw, len(images), methods)
        if max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {max_new_tokens} leaves no answer; the smallest is 1")
        if not question.strip():
            raise UsageError("QUESTION is empty; ask at least one word")
        check_characters(question, "QUESTION")
        pictures = _load_pictures(images)

    from foveate.cli.output import note_precision, show_json, working

    with working(f"loading {model}"):
        place: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        loaded = load_tuned(model, adapter, any_spec=any_spec, **place)
    note_precision(loaded.model)
    with working("answering"):
        report, trace = _answer(loaded, pictures, question, methods, max_new_tokens, clip, compiled)
    for record, path in zip(report["images"], images, strict=True):
        record["path"] = str(path)
    try:
        for number, target in enumerate(targets):
            assert trace is not None
            _draw(pictures[number], loaded, trace, number, target)
            report["images"][number]["drawn"] = str(target)
    finally:  # a picture that cannot be written does not take the answer with it
        show_json(report) if as_json else _print(report)


def _one_method(specs: list[str] | None) -> tuple[Any, ...]:
    if specs is not None and len(specs) > 1:
        raise UsageError(
            f"run takes one --prune, not {len(specs)}; join stages with +, compare rivals with foveate eval"
        )
    if specs is None or specs[0] == "none":
        return ()
    from foveate.spec import parse_stages

    return parse_stages(specs[0])


def _targets(draw: Path | None, count: int, methods: tuple[Any, ...]) -> list[Path]:
    """Where each picture's drawing goes: F itself for one picture, else F with -1, -2, ... before its suffix."""
    if draw is None:
        return []
    from foveate.paths import file_target

    if not methods:
        raise UsageError("--draw shows which patches are kept; say with --prune which method keeps them")
    if any(part.site == "picture" for method in methods for part in method.parts()):
        raise UsageError("--draw shows which patches are kept, and a picture that is scaled down has others")
    draw = file_target(draw, PICTURES)
    if count == 1:
        return [draw]
    return [draw.with_stem(f"{draw.stem}-{number + 1}") for number in range(count)]


def _load_pictures(paths: list[Path]) -> list[Image.Image]:
    from foveate.inference.pictures import load_image

    return [load_image(path) for path in paths]


def _answer(
    loaded: Loaded,
    pictures: list[Image.Image],
    question: str,
    methods: tuple[Any, ...],
    max_new_tokens: int,
    clip: str | None,
    compiled: bool = False,
) -> tuple[dict[str, Any], Trace | None]:
    """Everything that is printed, and the trace when something was pruned."""
    from foveate import spec
    from foveate.inference.answers import decode, encode
    from foveate.inference.compiling import compiled_decoding
    from foveate.inference.latency import settled
    from foveate.inference.resizing import Scaler, scaling
    from foveate.prune import prune

    model, processor = loaded.model, loaded.processor
    decoding = compiled_decoding(model) if compiled else None
    whole = inputs = encode(model, processor, [pictures], [question])
    scales = scaling(methods)
    scaler = None if scales is None else Scaler(model, processor, scales)
    if scaler is not None:
        inputs = scaler.encode([pictures], [question])
    pruned = bool(methods) and scaler is None
    handle = prune(model, methods, processor=processor, question=question, clip=clip) if pruned else nullcontext()
    with handle as trace:
        output, latency = settled(model, inputs, max_new_tokens=max_new_tokens, compiled=decoding)
    if scaler is not None:
        spent = _scaled(model, scaler, pictures, whole, inputs)
    else:
        spent = _saved(trace) if trace is not None else _spent(model, inputs, len(pictures))
    report = {
        "answer": decode(processor, model, output, inputs["input_ids"].shape[1])[0],
        "model": loaded.name,
        "prune": spec.format(methods) if methods else None,
        "question": question,
        **spent,
        "choosing_ms": trace.milliseconds if trace is not None else None,
        "first_token_ms": latency.first_token_ms,
        "per_token_ms": latency.per_token_ms,
        "timed_runs": latency.runs,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return report, trace


def _saved(trace: Trace) -> dict[str, Any]:
    """Before, after each stage, and after all, as the trace has them."""
    images: list[dict[str, Any]] = [
        {
            "tokens": _tokens(image.original, [stage.after for stage in image.stages]),
            "kept": image.kept.tolist() if image.stages else list(range(image.original)),
        }
        for image in trace.images
    ]
    return {
        "images": images,
        "tokens": _tokens(
            sum(image.original for image in trace.images),
            [sum(left) for left in zip(*(image["tokens"]["stages"] for image in images), strict=True)],
        ),
        "prefill_flops": {"before": trace.unpruned.prefill_flops, "after": trace.budget.prefill_flops},
        "kv_bytes": {"before": trace.unpruned.kv_bytes, "after": trace.kv_bytes},
    }


def _scaled(model: Any, scaler: Scaler, pictures: list[Image.Image], whole: Any, inputs: Any) -> dict[str, Any]:
    """The same of pictures that were scaled down, each with its new width and height."""
    from foveate.evaluate.unpruned import unpruned_budget

    sizes = [scaler.size(picture.size) for picture in pictures]
    tokens = [(scaler.tokens(picture.size), scaler.tokens(size)) for picture, size in zip(pictures, sizes, strict=True)]
    before, after = (unpruned_budget(model, one, len(pictures)) for one in (whole, inputs))
    return {
        "images": [
            {"tokens": _tokens(first, [last]), "size": [*size]}
            for (first, last), size in zip(tokens, sizes, strict=True)
        ],
        "tokens": _tokens(sum(first for first, _ in tokens), [sum(last for _, last in tokens)]),
        "prefill_flops": {"before": before.prefill_flops, "after": after.prefill_flops},
        "kv_bytes": {"before": before.kv_bytes, "after": after.kv_bytes},
    }


def _tokens(before: int, stages: list[int]) -> dict[str, Any]:
    return {"before": before, "stages": stages, "after": stages[-1] if stages else before}


def _spent(model: Any, inputs: Any, images: int) -> dict[str, Any]:
    """The same without pruning; None where the sizes of this family are not known."""
    from foveate.core import FoveateError
    from foveate.evaluate.unpruned import unpruned_budget

    def both(value: float) -> dict[str, float]:
        return {"before": value, "after": value}

    try:
        budget = unpruned_budget(model, inputs, images)
    except FoveateError:
        return {"images": [{} for _ in range(images)], "tokens": None, "prefill_flops": None, "kv_bytes": None}
    each = round(budget.tokens[0])
    return {
        "images": [{"tokens": _tokens(each, []), "kept": list(range(each))} for _ in range(images)],
        "tokens": _tokens(each * images, []),
        "prefill_flops": both(budget.prefill_flops),
        "kv_bytes": both(budget.kv_bytes),
    }


def _draw(picture: Image.Image, loaded: Loaded, trace: Trace, number: int, target: Path) -> None:
    from foveate.inference.pictures import save_image, visible
    from foveate.report.draw import draw

    save_image(draw(visible(picture, loaded.processor.image_processor), trace, number), target)


def _print(report: dict[str, Any]) -> None:
    from foveate.trace import readable

    def change(name: str, unit: str) -> str:
        value = report[name]
        if value is None:
            return "-"
        before, after = readable(value["before"], unit), readable(value["after"], unit)
        return before if after == before else f"{before} -> {after} ({value['after'] / value['before']:.0%})"

    def milliseconds(name: str) -> str:
        return "-" if report[name] is None else f"{report[name]:.2f}"

    tokens = report["tokens"]
    lines = {
        "prune": report["prune"] or "none",
        "tokens": "-" if tokens is None else " -> ".join(map(str, [tokens["before"], *tokens["stages"]])),
        "prefill flops": change("prefill_flops", "FLOPs"),
        "kv bytes": change("kv_bytes", "B"),
        "choosing ms": milliseconds("choosing_ms"),
        "first token ms": milliseconds("first_token_ms"),
        "per token ms": milliseconds("per_token_ms"),
        "drawn": ", ".join(image["drawn"] for image in report["images"] if "drawn" in image),
    }
    typer.echo(report["answer"])
    typer.echo()
    for name, value in lines.items():
        if value:
            typer.echo(f"{name:<14}  {value}")
