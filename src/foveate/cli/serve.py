"""`foveate serve`: a server that answers questions about pictures over OpenAI's interface, with pruned pictures."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from foveate.cli.errors import in_options
from foveate.core import UsageError, usage
from foveate.inference.loading import Adapter, AnySpec, Clip, Device, Dtype, Trust

ENGINES = ("vllm",)
HOST, PORT = "127.0.0.1", 8000
_SHARED = {"host": "--host", "port": "--port", "api_key": "--api-key"}
"""Options that mean the same in every engine, by what engines call them."""

Methods = Annotated[
    str | None,
    typer.Option(
        metavar="A,B", help="vllm: methods that requests may ask for, or all; without it those that read little."
    ),
]
Route = Annotated[
    str | None, typer.Option(metavar="R", help="vllm: in-tree or transformers, the classes that run the model.")
]


def command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="mini, a folder, or a hub id.")],
    adapter: Adapter = None,
    any_spec: AnySpec = False,
    prune: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="What every picture is pruned by, unless its request says otherwise."),
    ] = None,
    engine: Annotated[str | None, typer.Option(metavar="E", help="vllm; transformers without it.")] = None,
    host: Annotated[str | None, typer.Option(metavar="A", help=f"Address to listen at; {HOST} without it.")] = None,
    port: Annotated[int | None, typer.Option(metavar="N", help=f"Port; {PORT} without it.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="K", envvar="FOVEATE_API_KEY", help="Key that clients must send.", show_envvar=True),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(metavar="N", help="Longest answer, in tokens; 512.")] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(metavar="N", help="Longest prompt, unpruned.")] = None,
    max_images: Annotated[int | None, typer.Option(metavar="N", help="Pictures of a request; 16.")] = None,
    max_body: Annotated[int | None, typer.Option(metavar="N", help="Bytes of a request; 32,000,000.")] = None,
    queue: Annotated[int | None, typer.Option(metavar="N", help="Requests that may wait; 64.")] = None,
    timeout: Annotated[float | None, typer.Option(metavar="S", help="Seconds for a request; 300.")] = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch pictures from public https hosts.")] = False,
    no_page: Annotated[bool, typer.Option("--no-page", help="The interface alone, without the page at /.")] = False,
    foveate_methods: Methods = None,
    clip: Clip = None,
    route: Route = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Serve MODEL with pruned pictures; with --engine vllm, further options are vLLM's own (--max-model-len, ...)."""
    shared = {"host": host, "port": port, "api_key": api_key}
    limits = {
        "max_new_tokens": max_new_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "max_images": max_images,
        "max_body": max_body,
        "queue": queue,
        "timeout": timeout,
        "allow_urls": allow_urls or None,
    }
    with in_options(command), usage():
        check_engine(engine)
        if prune is not None and len(prune) > 1:
            raise UsageError(f"serve takes one --prune, not {len(prune)}; a request may name its own")
        spec = "none" if prune is None else prune[0]
        if engine is None:
            check_unused(context.args, "serve", {"--foveate-methods": foveate_methods, "--route": route})
            place = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
            tuned = {"adapter": adapter, "any_spec": any_spec}
            start = _with_transformers(model, spec, shared, limits, clip, {**place, **tuned}, page=not no_page)
        else:
            _check_unused_by_vllm(no_page, adapter is not None or any_spec)
            more = _vllm_options(context.args, shared, limits, device, dtype, trust_remote_code)
            start = _with_vllm(model, spec, more, foveate_methods, clip, route)
    start()


def _check_unused_by_vllm(no_page: bool, adapter: bool) -> None:
    if no_page:
        raise UsageError("--no-page belongs to serving without an engine; vLLM has no page")
    if adapter:
        raise UsageError("--adapter and --any-spec belong to serving without an engine")


def check_engine(engine: str | None) -> None:
    """Refuse an engine that is not known."""
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}; choices: {', '.join(ENGINES)}")


def check_unused(more: list[str], name: str, of_vllm: dict[str, str | None]) -> None:
    """Refuse what means nothing without an engine.

    Args:
        more: options that the command does not know.
        name: of the command.
        of_vllm: what was given of its options for vLLM.
    """
    if more:
        raise UsageError(f"{more[0]} is no option of {name}; with --engine vllm it would be handed to vLLM")
    for option, value in of_vllm.items():
        if value is not None:
            raise UsageError(f"{option} belongs to --engine vllm; leave it out, or add that")


def _with_transformers(
    model: str,
    spec: str,
    shared: dict[str, Any],
    limits: dict[str, Any],
    clip: str | None,
    place: dict[str, Any],
    *,
    page: bool,
) -> Any:
    from foveate.cli.output import note_precision, working
    from foveate.inference.adapters import check_asked, load_tuned
    from foveate.page import mounting
    from foveate.serve.local.limits import Limits
    from foveate.serve.local.server import application, check_installed, serve
    from foveate.serve.specs import stages_of

    check_installed()
    bounds = Limits(**{name: value for name, value in limits.items() if value is not None})
    port = PORT if shared["port"] is None else shared["port"]
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port} is no port; choose one from 0 to 65535")
    # A spec with a fault, or another than that of an adapter, is told before weights are read.
    check_asked(place["adapter"], [stages_of(spec, of_request=False)], any_spec=place["any_spec"])
    with working(f"loading {model}"):
        loaded = load_tuned(model, **place)
        app = application(loaded, spec, limits=bounds, key=shared["api_key"], clip=clip)
        if page and mounting.is_installed():
            mounting.mount(app, loaded, spec, shared["api_key"], clip)
    note_precision(loaded.model)
    if page and not mounting.is_installed():
        typer.echo("no page at /, since gradio is not installed: install foveate[serve], or say --no-page", err=True)
    return lambda: serve(app, shared["host"] or HOST, port, bounds.timeout)


def _vllm_options(
    more: list[str], shared: dict[str, Any], limits: dict[str, Any], device: str, dtype: str, trust: bool
) -> list[str]:
    """What vLLM is told besides the model and the spec."""
    unknown = next((name for name, value in limits.items() if value is not None), None)
    if unknown is not None or device != "auto":
        raise UsageError("--max-..., --queue, --timeout, --allow-urls and --device belong to serving without an engine")
    given = [text for name, value in shared.items() if value is not None for text in (_SHARED[name], str(value))]
    given += [] if dtype == "auto" else ["--dtype", dtype]
    return [*more, *given, *(["--trust-remote-code"] if trust else [])]


def _with_vllm(model: str, spec: str, more: list[str], methods: str | None, clip: str | None, route: str | None) -> Any:
    from foveate.inference.loading import find
    from foveate.serve.vllm.server import arguments, serve

    names = None if methods is None else methods.split(",")
    given = arguments(find(model), spec, more, name=model, methods=names, clip=clip, route=route)
    return lambda: serve(given)
