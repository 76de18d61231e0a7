"""`foveate report`: what `foveate eval` measured, as one HTML file to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.core import usage


def command(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="A file of foveate eval --json, or the folder of its --out.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="F", help="The HTML file to write.")],
) -> None:
    """Show accuracy against tokens and milliseconds, tokens by layer, and what is kept of pictures, in one file."""
    with usage():
        from foveate.paths import file_target
        from foveate.report.measured import read
        from foveate.report.page import page
        from foveate.runs import write_text

        target = file_target(out, (".html", ".htm"))
        text = page(read(source))
    write_text(target, text)
    typer.echo(str(target))
