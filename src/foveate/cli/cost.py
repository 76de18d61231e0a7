"""`foveate cost`: what answers cost on a device, stage by stage, by arithmetic alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.core import UsageError, usage

if TYPE_CHECKING:
    from foveate.core import Keep, Method
    from foveate.cost import Cost
    from foveate.report.tables import Column

SWEEPS = ("keep",)


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A preset such as llava-1.5-7b, or a folder.")
    ] = None,
    visual: Annotated[int, typer.Option(metavar="N", help="Visual tokens of the image.")] = 576,
    text: Annotated[int, typer.Option(metavar="N", help="All other tokens of the prompt.")] = 60,
    prune: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="A rival; repeat it for more. Unpruned comes first.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="B", help="Prompts at once.")] = 1,
    answer: Annotated[int, typer.Option(metavar="N", help="Tokens of each answer.")] = 32,
    hardware: Annotated[str, typer.Option(metavar="H", help="a100-40gb, h100, h200, 4090, cpu, ...")] = "a100-40gb",
    dtype: Annotated[str, typer.Option(metavar="T", help="fp16, int8, int4, fp32, or bits: w4a16kv16.")] = "fp16",
    convention: Annotated[
        str, typer.Option(metavar="C", help="What FLOPs count: roofline (all), weights (matrices alone).")
    ] = "roofline",
    tiles: Annotated[
        int | None, typer.Option(metavar="N", help="Pictures that the encoder runs on; as few as hold the tokens.")
    ] = None,
    kept: Annotated[
        str | None,
        typer.Option(
            metavar="K", help="What methods that decide their own count leave: tokens, or a share such as 40%."
        ),
    ] = None,
    stages: Annotated[bool, typer.Option("--stages", help="Every stage by itself.")] = False,
    sweep: Annotated[
        str | None, typer.Option(metavar="keep", help="Each rival at budgets of 5, 10, ... 100 %.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="F", help="Draw it: the sweep, or the stages (.png).")] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Figures that papers print, beside ours; needs no MODEL.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, named as in foveate.cost.")] = False,
) -> None:
    """Print FLOPs, roofline time, bytes moved and held of MODEL, unpruned and with each rival."""
    if published:
        _published(as_json)
        return
    options: dict[str, Any] = {"visual": visual, "text": text, "batch": batch, "answer": answer, "tiles": tiles}
    options |= {"hardware": hardware, "dtype": dtype, "convention": convention}
    with usage():
        if model is None:
            raise UsageError("which MODEL? Give a preset such as llava-1.5-7b, or a folder with a config.json")
        _check(sweep, plot, prune or [])
        left = _kept(kept, prune or [], sweep)
        rows = _sweep(model, prune or [], options) if sweep else _rivals(model, prune or [], left, options)
    if plot is not None:
        _draw(rows, sweep, plot)
    if as_json:
        from foveate.cli.output import show_json

        stored = [{**{k: v for k, v in row.items() if k != "cost"}, **row["cost"].to_dict()} for row in rows]
        show_json({"model": model, "rows": stored})
        return
    _print(rows, stages, plot)


def _draw(rows: list[dict[str, Any]], sweep: str | None, plot: Path) -> None:
    from foveate.report.bench_figures import stages_figure, sweep_figure
    from foveate.report.figures import save_figure

    save_figure(sweep_figure(rows) if sweep else stages_figure(rows), plot)


def _check(sweep: str | None, plot: Path | None, prune: list[str]) -> None:
    """Refuse what could not be swept or written, before any work."""
    from foveate.core import did_you_mean

    if sweep is not None and sweep not in SWEEPS:
        raise UsageError(f"--sweep {sweep} cannot be swept; {did_you_mean(sweep, SWEEPS)}")
    if sweep is not None and not [spec for spec in prune if spec != "none"]:
        raise UsageError("--sweep keep changes a method's budget; say with --prune which, such as --prune lvpruning")
    if plot is not None:
        from foveate.paths import file_target
        from foveate.report.figures import check_drawing

        file_target(plot, (".png",))
        check_drawing()


def _kept(text: str | None, specs: list[str], sweep: str | None) -> Keep | None:
    """What --kept says, tokens or a share of them, as a spec writes it."""
    from foveate.core import check_keep
    from foveate.spec import parse_stages

    if text is None:
        return None
    if sweep is not None or not any(_own_count(parse_stages(spec)) for spec in specs if spec != "none"):
        raise UsageError(
            f"--kept {text} is for a --prune that decides its own count, such as pixelprune, without --sweep"
        )
    number = text.removesuffix("%")
    try:
        kept: Keep = int(text) if text.isdigit() else float(number) / (1 if number == text else 100)
    except ValueError:
        raise UsageError(f"--kept {text} is no number; write tokens such as 400, or a share such as 40%") from None
    check_keep(kept, "kept")
    return kept


def _own_count(stages: tuple[Method, ...]) -> bool:
    return any(part.adaptive for stage in stages for part in stage.parts())


def _rivals(model: str, specs: list[str], kept: Keep | None, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The unpruned model and each rival."""
    from foveate import spec as specs_of
    from foveate.cost import estimate

    rows: list[dict[str, Any]] = [{"prune": None, "cost": estimate(model, **options)}]
    for stages in (specs_of.parse_stages(spec) for spec in specs if spec != "none"):
        left = kept if _own_count(stages) else None
        rows.append({"prune": specs_of.format(stages), "cost": estimate(model, methods=stages, kept=left, **options)})
    return rows


def _sweep(model: str, specs: list[str], options: dict[str, Any]) -> list[dict[str, Any]]:
    """The unpruned model, and each rival at every budget."""
    from foveate import spec as specs_of
    from foveate.cost import estimate, sweep

    rows: list[dict[str, Any]] = [{"prune": None, "keep": None, "method": None, "cost": estimate(model, **options)}]
    for spec in specs:
        if spec == "none":
            continue
        method = specs_of.parse(spec)
        for share, made, cost in sweep(model, method, **options):
            rows.append({"prune": specs_of.format(made), "keep": share, "method": spec, "cost": cost})
    return rows


def _print(rows: list[dict[str, Any]], stages: bool, plot: Path | None) -> None:
    from foveate.cli.output import show

    first: Cost = rows[0]["cost"]
    show(_columns(first), [_figures(row["prune"] or "none", row["cost"]) for row in rows])
    if stages:
        typer.echo()
        show(_stage_columns(first), [line for row in rows for line in _stage_rows(row["prune"] or "none", row["cost"])])
    device = first.hardware
    setting = f"{first.model} on {device.name}, {first.dtype}, batch {first.batch}, {first.visual[0]} visual and "
    lines = [f"{setting}{first.text} other tokens, answers of {first.answer}; FLOPs by {first.convention}"]
    if device.efficiency is None or device.launch is None:
        lines.append(f"no run on {device.name} was fitted, so launches are left out: times are the roofline's bound")
    else:
        lines.append(
            f"launched: {device.efficiency:.3g} of the roofline's speed and {device.launch * 1e6:.3g} us a launch, "
            "fitted to eager prefills"
        )
    if not first.fits:
        lines.append(f"{first.footprint_bytes / 1e9:.1f} GB do not fit in {device.memory / 1e9:.0f} GB unpruned")
    if plot is not None:
        lines.append(f"drawn: {plot}")
    typer.echo("\n".join(["", *lines]))


def _columns(first: Cost) -> list[Column]:
    from foveate.report.tables import Column

    launched = [Column("launched", "launched ms", _digits)] if first.hardware.launch is not None else []
    return [
        Column("method", "method", left=True),
        Column("tokens", "tokens", lambda value: f"{value:.4g}"),
        Column("flops", "TFLOPs", _digits),
        Column("prefill", "prefill ms", _digits),
        Column("moved", "moved GB", _digits),
        Column("stored", "stored GB", _digits),
        Column("first", "first token ms", _digits),
        *launched,
        Column("step", "per token ms", _digits),
        Column("kv", "KV MB", _digits),
        Column("held", "held GB", _digits),
    ]


def _figures(name: str, cost: Cost) -> dict[str, Any]:
    launched = cost.first_token.launched_seconds
    return {
        "method": name,
        "tokens": cost.equivalent_tokens,
        # What the papers state: in the roofline's convention the decoder alone, in weights everything.
        "flops": (cost.prefill if cost.convention == "roofline" else cost.first_token).flops / 1e12,
        "prefill": cost.prefill.seconds * 1e3,
        "moved": cost.prefill.bytes_moved / 1e9,
        "stored": cost.prefill.stored_activation_bytes / 1e9,
        "first": cost.first_token.seconds * 1e3,
        "launched": None if launched is None else launched * 1e3,
        "step": None if cost.per_token_seconds is None else cost.per_token_seconds * 1e3,
        "kv": cost.kv_bytes / 1e6,
        "held": cost.footprint_bytes / 1e9,
    }


def _stage_columns(first: Cost) -> list[Column]:
    from foveate.report.tables import Column

    launched = [Column("launched", "launched ms", _digits)] if first.hardware.launch is not None else []
    return [
        Column("method", "method", left=True),
        Column("stage", "stage", left=True),
        Column("flops", "TFLOPs", _digits),
        Column("ms", "ms", _digits),
        Column("moved", "moved GB", _digits),
        Column("stored", "stored GB", _digits),
        Column("launches", "launches"),
        *launched,
    ]


def _stage_rows(name: str, cost: Cost) -> list[dict[str, Any]]:
    from foveate.cost.estimates import STAGES

    rows = []
    for stage in STAGES:
        figures = getattr(cost, stage)
        rows.append(
            {
                "method": name,
                "stage": stage,
                "flops": figures.flops / 1e12,
                "ms": figures.seconds * 1e3,
                "moved": figures.bytes_moved / 1e9,
                "stored": figures.stored_activation_bytes / 1e9,
                "launches": figures.launches,
                "launched": None if figures.launched_seconds is None else figures.launched_seconds * 1e3,
            }
        )
    return rows


def _published(as_json: bool) -> None:
    """Every cell that papers print, beside what is computed here."""
    import dataclasses

    from foveate.cli.output import show, show_json
    from foveate.cost.published import published
    from foveate.report.tables import Column

    cells = [{**dataclasses.asdict(cell), "agrees": cell.agrees} for cell in published()]
    if as_json:
        show_json(cells)
        return
    columns = [
        Column("paper", "paper", left=True),
        Column("row", "row", left=True),
        Column("figure", "figure", left=True),
        Column("published", "published", _digits),
        Column("computed", "computed", _digits),
        Column("agrees", "to the digit", lambda same: "yes" if same else "no", left=True),
    ]
    show(columns, cells)


def _digits(value: float) -> str:
    """Four digits, without an exponent where one can do without."""
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"
