"""The command `foveate`: its commands are one file each and import what is heavy when they are called."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from foveate.cli import (
    analyze,
    batch,
    bench,
    check,
    cost,
    demo,
    evaluate,
    methods,
    models,
    report,
    reproduce,
    run,
    serve,
    train,
    tune,
)
from foveate.cli.errors import FAILURE, INTERRUPTED, USAGE, one_line
from foveate.core import FoveateError, UsageError

app = typer.Typer(
    name="foveate",
    help="Prune the visual tokens of multimodal LLMs: the same answers from far fewer tokens.",
    epilog="Exit codes: 0 done, 2 wrong usage, 1 failure while working.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_COMMANDS = {
    "run": run,
    "eval": evaluate,
    "reproduce": reproduce,
    "cost": cost,
    "bench": bench,
    "report": report,
    "tune": tune,
    "analyze": analyze,
    "check": check,
    "demo": demo,
    "methods": methods,
    "models": models,
}
for _name, _file in _COMMANDS.items():
    app.command(_name)(_file.command)
for _name, _file in {"batch": batch, "serve": serve}.items():  # what they do not know may be vLLM's
    app.command(_name, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(_file.command)
app.add_typer(train.app, name="train")


def _version(asked: bool) -> None:
    if asked:
        from foveate import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; so does FOVEATE_DEBUG=1.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    context.obj["debug"] |= debug


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; an error is one line on stderr.

    Args:
        arguments: of the command, without its name; None is those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = {"debug": os.environ.get("FOVEATE_DEBUG", "") not in ("", "0")}
    try:
        code = app(given or ["--help"], prog_name="foveate", standalone_mode=False, obj=options)
        return _complain(None, "interrupted", INTERRUPTED, debug=False) if code == INTERRUPTED else code or 0
    except typer.TyperException as error:
        return _complain(error, error.format_message(), USAGE, options["debug"])
    except UsageError as error:
        return _complain(error, str(error), USAGE, options["debug"])
    except FoveateError as error:
        return _complain(error, str(error), FAILURE, options["debug"])
    except typer.Abort:
        return _complain(None, "interrupted", INTERRUPTED, debug=False)
    except BrokenPipeError:
        # Whoever read the output has seen enough; without this the interpreter complains when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            # Whatever writes files names them itself; this is what was printed.
            message = f"{error.filename or 'the output'} cannot be written: {error.strerror}"
            return _complain(error, message, FAILURE, options["debug"])
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return _complain(error, f"{reason} (--debug shows where)", FAILURE, options["debug"])


def _complain(error: BaseException | None, message: str, code: int, debug: bool) -> int:
    if debug and error is not None:
        import traceback

        traceback.print_exception(error)
    typer.echo(f"foveate: {one_line(message)}", err=True)
    return code
