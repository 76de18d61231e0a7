"""`foveate check`: what is found of a model, which methods work on it, and whether pruning holds its contract."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.cli.errors import FAILURE
from foveate.inference.loading import Device, Dtype, Trust

if TYPE_CHECKING:
    from foveate.evaluate.check import Found


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="mini, a folder, or a hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Say what MODEL is, which methods work on it, and prune it on random pixels; exit code 1 if that goes wrong."""
    from foveate.cli.output import note_precision, show_json, working
    from foveate.evaluate.check import check, find
    from foveate.inference.loading import load

    with working(f"loading {model}"):
        loaded = load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    note_precision(loaded.model)
    find(loaded.model)  # a model that lacks a part is refused before pictures are prepared for it
    with working("pruning random pixels"):
        found = check(loaded.model, _inputs(loaded))
    show_json({"name": model, **found.as_json()}) if as_json else _print(found)
    if not found.passed:
        raise typer.Exit(FAILURE)


def _inputs(loaded: Any) -> Any:
    """A question about one picture of noise, the same each time."""
    import random

    from PIL import Image

    from foveate.inference.answers import encode

    picture = Image.frombytes("L", (448, 336), random.Random(0).randbytes(448 * 336)).convert("RGB")
    return encode(loaded.model, loaded.processor, [[picture]], ["what color is behind the dog ?"])


def _print(found: Found) -> None:
    from foveate.cli.output import show
    from foveate.report.tables import Column

    for name, value in _facts(found):
        typer.echo(f"{name:<10}{value}")
    typer.echo()
    rows = [{"method": name, "runs": _runs(name, why)} for name, why in found.methods.items()]
    show([Column("method", "method", left=True), Column("runs", "runs on it", left=True)], rows)
    typer.echo()
    outcomes = [
        {"name": one.name, "passed": "yes" if one.passed else "NO", "detail": one.detail} for one in found.outcomes
    ]
    columns = [Column("name", "contract", left=True), Column("passed", "holds", left=True)]
    show([*columns, Column("detail", "seen", left=True)], outcomes)
    failed = sum(not one.passed for one in found.outcomes)
    typer.echo(f"\n{'all hold' if not failed else f'{failed} of {len(found.outcomes)} do not hold'}")


def _runs(name: str, why: str | None) -> str:
    """Whether a method runs, and on what condition."""
    from foveate import methods
    from foveate.choosing.signals import JOINT

    if why is not None:
        return f"no: it {why}"
    parts = methods.get(name).example().parts()
    if any(part.site == "picture" for part in parts):
        return "yes, by foveate eval, run and bench"
    needs = {need for part in parts for need in part.needs}
    return "yes, with a CLIP (--clip) and a question" if needs.intersection(JOINT) else "yes"


def _facts(found: Found) -> list[tuple[str, str]]:
    """What the model is, line by line."""
    encoder = found.encoder
    if found.read is not None:
        encoder += f", {found.encoder_blocks} blocks, the projector reads block {found.read} (counted from 0)"
    known = found.family if found.has_row else f"{found.family}: no row, made of the standard parts that were found"
    return [
        ("model", f"{found.model} ({found.type})"),
        ("family", known),
        *(("assumed", line) for line in found.assumed),
        ("encoder", encoder),
        ("decoder", f"{found.decoder_layers} layers, {found.attention} attention"),
        ("tokens", f"{', '.join(map(str, found.tokens)) or 'not known'} of a picture of 448 x 336 pixels"),
    ]
