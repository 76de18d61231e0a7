"""`foveate serve`: a server that answers questions about pictures over OpenAI's interface, with pruned pictures."""

from __future__ import annotations

from typing import Annotated

import typer

from foveate.core import UsageError, usage

ENGINES = ("vllm",)


def command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="mini, a folder, or a hub id.")],
    prune: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="What every picture is pruned by, unless its request says otherwise."),
    ] = None,
    engine: Annotated[str | None, typer.Option(metavar="E", help="vllm, the one engine so far.")] = None,
    foveate_methods: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Methods that requests may ask for, or all; without it those that read little."
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(metavar="C", help="Folder or hub id of the CLIP whose vision tower the encoder is."),
    ] = None,
    route: Annotated[
        str | None, typer.Option(metavar="R", help="in-tree or transformers: the classes of vLLM that run the model.")
    ] = None,
) -> None:
    """Serve MODEL with pruned pictures; further options are vLLM's own (--port, --max-model-len, ...)."""
    with usage():
        if engine is None:
            raise UsageError("serve needs an engine; write --engine vllm (pip install 'foveate[vllm]')")
        if engine not in ENGINES:
            raise UsageError(f"unknown engine {engine!r}; choices: {', '.join(ENGINES)}")
        if prune is not None and len(prune) > 1:
            raise UsageError(f"serve takes one --prune, not {len(prune)}; a request may name its own")
        spec = "none" if prune is None else prune[0]
        from foveate.inference.loading import find

        source = find(model)
        from foveate.serve.vllm.server import arguments, serve

        methods = None if foveate_methods is None else foveate_methods.split(",")
        given = arguments(source, spec, context.args, name=model, methods=methods, clip=clip, route=route)
    serve(given)
