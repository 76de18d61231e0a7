"""vLLM's own options as they are typed, and the arguments of an engine that they make."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

from foveate.core import UsageError


def engine_arguments(given: Sequence[str]) -> dict[str, Any]:
    """Arguments of `vllm.EngineArgs`, of the options of vLLM's engine alone.

    Args:
        given: "--max-model-len", "8192", ...

    Raises:
        UsageError: no option of an engine, or no value that it takes.
    """
    if not given:
        return {}
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> Any:
            raise UsageError(f"vLLM: {message}")

    parser = EngineArgs.add_cli_args(Parser(add_help=False))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        made = vars(parser.parse_args(list(given)))
    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    return {name: value for name, value in made.items() if name in fields and value != parser.get_default(name)}
