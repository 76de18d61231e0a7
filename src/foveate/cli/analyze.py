"""`foveate analyze`: how redundant a model's visual tokens are, as figures, as JSON and as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.core import UsageError, usage
from foveate.inference.loading import Device, Dtype, Trust

if TYPE_CHECKING:
    from PIL import Image

    from foveate.evaluate.analysis import Analysis
    from foveate.methods.image_text_interaction import ImageTextInteraction
    from foveate.report.tables import Column

SCENES = 8
QUESTION = "describe"
JSON_NAME = "analysis.json"


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="mini, a folder, or a hub id.")],
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGE", help=f"Pictures; {SCENES} scenes if there is none.", show_default=False),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(metavar="Q", help=f"Asked about every picture; else {QUESTION!r}, and of scenes their own."),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where figures and analysis.json go; made if it is not there.")
    ] = Path("runs/analyze"),
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="F", help="Write the JSON to this file too.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(metavar="A", help="Of image_text_interaction: the count is A times the split.")
    ] = None,
    where: Annotated[
        int | None, typer.Option(metavar="K", help="Encoder blocks that run before the similarity is taken.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Measure attention by encoder block, what prompts are made of, and where the similarity to CLS falls off."""
    from foveate.cli.output import counting, working

    with usage():
        _check_targets(out, json_file)
        if question is not None and not question.strip():
            raise UsageError("--question is empty; ask at least one word")
        method = _method(alpha, where)
        pictures, questions, names = _inputs(images or [], question)

    from foveate.evaluate.analysis import analyze
    from foveate.inference.loading import load

    with working(f"loading {model}"):
        loaded = load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    with counting("pictures", len(pictures)) as progress:
        options: dict[str, Any] = {"names": names, "method": method, "progress": progress}
        analysis = analyze(loaded.model, loaded.processor, pictures, questions, **options)
    written = _write(analysis, model, out, json_file)
    _print(analysis, model, written)


def _check_targets(out: Path, json_file: Path | None) -> None:
    from foveate.paths import file_target, folder_target
    from foveate.report.figures import check_drawing

    folder_target(out)
    if json_file is not None:
        file_target(json_file, (".json",))
    check_drawing()


def _method(alpha: float | None, where: int | None) -> ImageTextInteraction:
    from foveate.methods.image_text_interaction import ImageTextInteraction

    given: dict[str, Any] = {"alpha": alpha, "where": where}
    return ImageTextInteraction(**{name: value for name, value in given.items() if value is not None})


def _inputs(paths: list[Path], question: str | None) -> tuple[list[Image.Image], list[str], list[str]]:
    """Pictures, the question about each, and their names."""
    if paths:
        from foveate.inference.pictures import load_image

        pictures = [load_image(path) for path in paths]
        return pictures, [question or QUESTION] * len(paths), [path.name for path in paths]

    from foveate.evaluate.scenes_task import draw_samples

    scenes = list(draw_samples(SCENES, seed=0))
    names = [f"scene {number}" for number in range(1, SCENES + 1)]
    return [scene.image for scene in scenes], [question or scene.question for scene in scenes], names


def _write(analysis: Analysis, model: str, out: Path, json_file: Path | None) -> list[Path]:
    """Write figures and JSON; returns where they are."""
    from foveate.report import figures
    from foveate.runs import make_folder, write_json

    out = make_folder(out)
    drawn = {"attention.png": figures.attention_figure(analysis), "tokens.png": figures.tokens_figure(analysis)}
    if analysis.similarities():
        drawn["similarity.png"] = figures.similarity_figure(analysis)
    for name, figure in drawn.items():
        figures.save_figure(figure, out / name)
    targets = [out / JSON_NAME, *([json_file] if json_file is not None else [])]
    for target in targets:
        write_json(target, {"model": model, **analysis.to_dict()})
    return [*(out / name for name in drawn), *targets]


def _print(analysis: Analysis, model: str, written: list[Path]) -> None:
    from foveate.cli.output import show

    report = analysis.to_dict()
    count = len(analysis.inputs)
    over = "1 picture" if count == 1 else f"mean over {count} pictures"
    show(_columns(analysis), report["attention"], title=f"{model}: attention of the encoder, {over}")
    tokens, found = report["tokens"], report["similarity"]
    total = sum(tokens.values())
    parts = f"text before {tokens['before']:.4g}, after {tokens['after']:.4g}, special {tokens['special']:.4g}"
    lines = {
        "visual tokens": f"{tokens['visual']:.4g} of {total:.4g} ({report['visual_share']:.1%}); {parts}",
        "split i*": f"the encoder {analysis.encoder} has no CLS token, so there is no similarity.png"
        if found is None
        else f"{found['split']:.4g}, kept {found['count']:.4g}; {report['method']}",
        "written": ", ".join(map(str, written)),
    }
    typer.echo()
    for name, value in lines.items():
        typer.echo(f"{name:<14}  {value}")


def _columns(analysis: Analysis) -> list[Column]:
    from foveate.report.tables import Column

    def share(value: float) -> str:
        return f"{value:.1%}"

    return [
        Column("block", "block", lambda block: f"{block} (read)" if block == analysis.read else str(block), left=True),
        Column("top_quarter", "top 25 % of tokens receive", share),
        Column("tokens_holding_80", "80 % is held by", share),
        Column("least", "least", share),
        Column("most", "most", share),
    ]
