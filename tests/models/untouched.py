"""Everything about a model that pruning must leave as it was: weights, configuration, attributes, hooks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What stock generate() itself leaves on a model: the length of its last static cache, the compiled call, and hooks that
# collect hidden states once they have been asked for.
_OF_TRANSFORMERS = {
    "_previous_max_cache_length",
    "_compiled_call",
    "_last_compile_config",
    "_output_capturing_hooks_installed",
}


def fingerprint(model: Any) -> dict[str, Any]:
    """One comparable value for each thing that must not change."""
    found: dict[str, Any] = {
        "configuration": json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        "generation": json.dumps(model.generation_config.to_dict(), sort_keys=True, default=str),
    }
    for name, tensor in model.state_dict(keep_vars=True).items():
        found[f"weights of {name}"] = (id(tensor), tensor.dtype, tensor.detach().numpy().tobytes())
    for name, module in model.named_modules():
        attributes = {key for key in vars(module) if key not in _OF_TRANSFORMERS and not key.endswith("_hooks")}
        found[f"attributes of {name}"] = sorted(attributes)
        found[f"class of {name}"] = (type(module), module.training, getattr(module.forward, "__func__", None))
        config = getattr(module, "config", None)
        if config is not None:
            found[f"attention of {name}"] = (id(config), getattr(config, "_attn_implementation", None))
        found[f"hooks of {name}"] = {
            key: [hook for hook in vars(module)[key].values() if not _of_transformers(hook)]
            for key in vars(module)
            if "hooks" in key and isinstance(vars(module)[key], dict)
        }
    return found


def _of_transformers(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("transformers.utils.output_capturing")


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of the things that changed."""
    return [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Assert that the model leaves the block as it entered it, also through an exception."""
    before = fingerprint(model)
    try:
        yield
    finally:
        changed = differences(before, fingerprint(model))
        assert changed == [], f"changed: {', '.join(sorted(changed))}"
