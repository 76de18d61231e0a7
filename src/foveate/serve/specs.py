"""Specs that clients write: text alone, which names no file of the server."""

from __future__ import annotations

import re

from foveate.core import FoveateError, Method, short
from foveate.spec import parse_stages

UNPRUNED = "none"
_FILE = re.compile(r"(^|[:,+])(from|path)=")


def stages_of(spec: object, of_request: bool = True) -> tuple[Method, ...]:
    """The stages that a spec names; none for "none".

    Args:
        of_request: a client wrote it; whoever starts the server may name files.

    Raises:
        FoveateError: it is no text, names a file, or is unknown.
    """
    if not isinstance(spec, str):
        raise FoveateError(f'foveate={short(repr(spec))} is no text; write "fopru:keep=0.25", or "none"')
    if spec.strip() == UNPRUNED:
        return ()
    if of_request and names_file(spec):
        raise FoveateError(f"{short(repr(spec))} names a file of the server; a request writes its spec out")
    return parse_stages(spec)


def names_file(spec: str) -> bool:
    """Whether a spec makes its reader open a file or a folder."""
    bare = "".join(spec.split())
    return bare.startswith("@") or _FILE.search(bare) is not None
