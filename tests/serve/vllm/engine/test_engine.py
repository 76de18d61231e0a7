"""What follows from a spec, what is refused when an engine starts, and how much is encoded at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY

import foveate
from foveate.core import FoveateError
from foveate.serve.vllm import register
from foveate.serve.vllm.asked import Asked
from foveate.serve.vllm.model import _State, check_engine
from foveate.serve.vllm.selecting import Item


def configured(**overrides: Any) -> ModelConfig:
    register()
    return ModelConfig(model=foveate.MINI, hf_overrides=overrides)


def test_without_a_spec_a_model_is_stock() -> None:
    config = configured()
    assert config.architectures == ["LlavaForConditionalGeneration"]
    assert config.architecture == "LlavaForConditionalGeneration"
    assert not config.uses_mrope and not hasattr(config.hf_config, "foveate")


def test_all_follows_from_the_spec() -> None:
    config = configured(foveate="fopru: keep=25%")
    assert config.architecture == "FoveateLlavaForConditionalGeneration"
    assert config.uses_mrope and config.mrope_num_dims == 3
    assert config.hf_config.foveate == "fopru:keep=0.25"
    other = configured(foveate="none", foveate_route="transformers")
    assert other.architecture == "FoveateForConditionalGeneration"
    before = configured(foveate="pixelprune")
    assert before.architecture == "FoveateForConditionalGeneration"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"foveate": "fopruu"}, "unknown method 'fopruu'"),
        ({"foveate": "fastv:keep=0.5"}, "acts inside the decoder"),
        ({"foveate": "prumerge"}, "decides its own count"),
        ({"foveate": "pixelprune", "foveate_route": "in-tree"}, "acts before the encoder, which transformers' model"),
        ({"foveate": "none", "foveate_route": "in tree"}, "is no route; did you mean 'in-tree'"),
        ({"foveate": "none", "foveate_methods": "fopru,divprun"}, "unknown method 'divprun'; did you mean 'divprune'"),
        ({"foveate": "none", "foveate_methods": "fopru,all"}, "unknown method 'all'"),
    ],
)
def test_what_cannot_be_right_is_refused_at_start(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(**overrides)


def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(FoveateError, match=r"vLLM 0.33.0 .* install vllm==0.32"):
        foveate.vllm.options("mini", "fopru:keep=64")
    with pytest.raises(ValueError, match=r"vLLM 0.33.0 .* install vllm==0.32"):
        configured(foveate="fopru:keep=64")


def test_a_spec_in_two_places_is_refused() -> None:
    with pytest.raises(FoveateError, match="beside the spec 'fopru:keep=64'; give one of them"):
        foveate.vllm.options("mini", "fopru:keep=64", hf_overrides={"foveate": "divprune:keep=64"})


@pytest.mark.parametrize("name", ["foveate", "question"])
def test_an_engines_own_spec_is_not_taken_among_the_settings_of_a_processor(name: str) -> None:
    register()
    overrides, more = {"foveate": "none"}, {name: "fopru:keep=64"}
    config = ModelConfig(model=foveate.MINI, hf_overrides=overrides, mm_processor_kwargs=more)
    with pytest.raises(FoveateError, match=f"of the engine hold '{name}': an engine's own spec belongs into hf_over"):
        MULTIMODAL_REGISTRY.create_processor(config)


def test_options_are_vllms_own() -> None:
    made = foveate.vllm.options("a/b", foveate.FoPru(keep=64), methods=["fopru"], hf_overrides={"x": 1}, seed=3)
    overrides = {"x": 1, "foveate": "fopru:keep=64", "foveate_methods": "fopru"}
    assert made == {"model": "a/b", "hf_overrides": overrides, "seed": 3}


@pytest.mark.parametrize(
    ("where", "name", "value", "message"),
    [
        ("parallel_config", "pipeline_parallel_size", 2, "pipeline parallelism"),
        ("", "speculative_config", SimpleNamespace(), "speculative decoding"),
        ("", "ec_transfer_config", SimpleNamespace(), "an encoder in another engine"),
        ("pictures", "mm_encoder_tp_mode", "data", "--mm-encoder-tp-mode data"),
        ("pictures", "video_pruning_rate", 0.5, "--video-pruning-rate prunes videos beside Foveate"),
        ("pictures", "enable_mm_embeds", True, "--enable-mm-embeds takes pictures that no encoder"),
        ("compilation_config", "compile_mm_encoder", True, "a compiled encoder cannot be read"),
    ],
)
def test_ways_of_running_that_would_be_wrong_are_refused(where: str, name: str, value: Any, message: str) -> None:
    pictures = SimpleNamespace(mm_encoder_tp_mode="weights", video_pruning_rate=None, enable_mm_embeds=False)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=2),
        speculative_config=None,
        ec_transfer_config=None,
        compilation_config=SimpleNamespace(compile_mm_encoder=False, cudagraph_mm_encoder=False),
        model_config=SimpleNamespace(multimodal_config=pictures),
        pictures=pictures,
    )
    check_engine(config)
    setattr(getattr(config, where) if where else config, name, value)
    with pytest.raises(FoveateError, match=message):
        check_engine(config)


def test_never_more_unpruned_tokens_are_encoded_at_once_than_were_profiled() -> None:
    def item(tokens: int) -> Item:
        return Item(Asked("uniform:keep=1"), torch.full((tokens,), -1), torch.tensor([-1]))

    state = object.__new__(_State)
    state._most = 100
    assert list(state.batches([item(40), item(60), item(1)])) == [(0, 2), (2, 3)]
    assert list(state.batches([item(300), item(40), item(40), item(40)])) == [(0, 1), (1, 3), (3, 4)]
    assert list(state.batches([])) == []
