"""Compiled decoding as `foveate run` and `foveate bench` ask for it: what it refuses, and that it is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from torch import Tensor
from torch.nn import functional as F
from transformers import CompileConfig
from transformers.integrations.sdpa_attention import repeat_kv

from foveate import methods
from foveate.core import FoveateError
from foveate.evaluate import bench
from foveate.inference import grouped as grouping
from foveate.inference import latency
from foveate.inference.compiling import check_static, compiled_decoding
from foveate.spec import parse_stages


def test_what_generate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    options = compiled_decoding(tiny.model())
    assert options["cache_implementation"] == "static"
    assert isinstance(options["compile_config"], CompileConfig)
    config = options["compile_config"]
    assert config._compile_all_devices, "transformers compiles nothing on a CPU by itself"
    assert config.mode is None, "torch refuses a mode beside options"
    assert config == compiled_decoding(tiny.model())["compile_config"], "transformers compiles again where they differ"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_a_tokens_graph_reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, in products of one row that the compiler writes, however wide, where BLAS keeps others; shared keys."""
    from torch._dynamo.utils import counters

    try:
        options = compiled_decoding(tiny.model())["compile_config"].options
    except FoveateError as error:
        pytest.skip(str(error))
    weight, grouped, group = torch.randn(4096, 64), list[Any](), grouping._group

    def token(one: Tensor, two: Tensor, query: Tensor, keys: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        attended = F.scaled_dot_product_attention(query, repeat_kv(keys, 3), repeat_kv(keys, 3), attn_mask=mask)
        return F.linear(one, weight), F.linear(two, weight), attended

    given = torch.randn(1, 64), torch.randn(2, 64), torch.randn(2, 6, 1, 16), torch.randn(2, 2, 9, 16)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool).triu(3)
    monkeypatch.setattr(grouping, "_group", lambda *asked: grouped.append(asked) or group(*asked))
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr("torch._inductor.config.fx_graph_cache", False)
    monkeypatch.setattr("torch._functorch.config.enable_autograd_cache", False)
    with torch.no_grad():
        found = torch.compile(token, options=options)(*given, mask)
    torch._dynamo.reset()
    assert counters["inductor"]["decompose_mm"] == 1
    assert len(grouped) == 1
    for one, other in zip(found, token(*given, mask), strict=True):
        torch.testing.assert_close(one, other)


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    with pytest.raises(FoveateError) as error:
        compiled_decoding(tiny.model())
    assert str(error.value) == (
        "compiling for the CPU needs a C++ compiler, and none is found; install g++ or clang++, or name one in the "
        "environment variable CXX"
    )


@pytest.mark.parametrize("name", methods.names())
def test_which_methods_a_static_cache_holds(name: str) -> None:
    method = methods.get(name).example()
    if "cache" not in {part.site for part in method.parts()}:
        check_static([method])
        return
    with pytest.raises(FoveateError, match=f"^{name}.* evicts entries, and compiled decoding needs a static cache"):
        check_static([method])


def quickly(model: Any) -> dict[str, Any]:
    config = CompileConfig(backend="eager", mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def test_a_benchmark_decodes_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for the unpruned model and one for the rival, however often they take turns."""
    from torch._dynamo.utils import counters

    model, asked = tiny.model(), []
    monkeypatch.setattr(bench, "compiled_decoding", lambda model: asked.append(model) or quickly(model))
    torch._dynamo.reset()
    counters.clear()
    setting = bench.Setting(answer=3, repeats=2, compiled=True)
    plain, pruned = bench.measure(model, tiny.inputs(model, "3i4"), [parse_stages("fopru:keep=0.5")], setting)
    torch._dynamo.reset()
    assert asked == [model]
    assert counters["stats"]["unique_graphs"] == 2
    assert plain.per_token_ms is not None
    assert pruned.per_token_ms is not None


def test_an_answer_before_those_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def timed(model: Any, inputs: Any, **options: Any) -> Any:
        seen.append(options)
        return None, latency.Latency(float(len(seen)), None)

    monkeypatch.setattr(latency, "timed", timed)
    _, found = latency.settled(None, None, max_new_tokens=2, compiled={"cache_implementation": "static"})
    assert found.first_token_ms == 4.0
    assert found.runs == 3
    assert seen == [{"max_new_tokens": 2, "cache_implementation": "static"}] * 5


def test_a_warm_up_is_needed() -> None:
    with pytest.raises(FoveateError, match="the smallest with it is warmup=1"):
        bench.Setting(warmup=0, compiled=True)
