"""Models that something wraps: adapters of PEFT, quantized linears, weights that are elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from models import tiny
from models.untouched import untouched
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

import foveate
from foveate.core import FoveateError
from foveate.evaluate.check import check
from foveate.families.rows import FAMILIES
from foveate.runtime.wrapped import check_version, unwrapped

STEPS = 4
ROWS = ("3i4", "2i1i5", "6")
# One that reads the encoder, one that merges, one that looks a block ahead, one inside the encoder, one on the cache.
METHODS = (
    "fopru:keep=0.5",
    "prumerge:keep=9",
    "fastv:layer=2,keep=0.5",
    "pyramiddrop",
    "tome:keep=9",
    "h2o:heavy=0.2,recent=0.2",
)
# PEFT asks a model in words that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
each_method = pytest.mark.parametrize("method", METHODS)


def generate(model: Any, given: dict[str, Tensor]) -> Tensor:
    out = model.generate(**given, max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits)


def pruned(model: Any, method: str, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits of generate() and of a direct call, and what was kept."""
    with torch.no_grad(), foveate.prune(model, method) as trace:
        made, direct = generate(model, given), model(**given).logits
    return made, direct, [image.kept for image in trace.images]


def assert_same(got: tuple[Tensor, Tensor, list[Tensor]], wanted: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(got[0], wanted[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[1], wanted[1], atol=1e-5, rtol=0)
    assert all(torch.equal(one, other) for one, other in zip(got[2], wanted[2], strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# PEFT


def lora(model: Any, **more: Any) -> PeftModel:
    config = LoraConfig(r=2, target_modules=r".*(q_proj|v_proj|fc1|linear_1)", **more)
    return get_peft_model(model, config)


@each_method
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_an_adapter_that_has_learned_nothing_changes_nothing(method: str, task: str | None) -> None:
    given = tiny.inputs(tiny.model(), *ROWS)
    wanted = pruned(tiny.model(), method, given)
    model = lora(tiny.model(), task_type=task).eval()
    assert isinstance(model, PeftModel)
    base = model.get_base_model()
    with untouched(base):
        assert_same(pruned(model, method, given), wanted)


@each_method
@torch.no_grad()
def test_every_level_of_an_adapted_model(method: str) -> None:
    """Whoever is called, the model inside prunes, once."""
    given = tiny.inputs(tiny.model(), *ROWS)
    plain = tiny.model()
    with foveate.prune(plain, method):
        expected, answer = plain(**given).logits, plain.generate(**given, max_new_tokens=STEPS)
    model = lora(tiny.model(), task_type="CAUSAL_LM").eval()
    with foveate.prune(model, method) as trace:
        for level in (model, model.base_model, model.base_model.model, model.get_base_model()):
            torch.testing.assert_close(level(**given).logits, expected, atol=1e-5, rtol=0)
            assert torch.equal(level.generate(**given, max_new_tokens=STEPS), answer)
        hidden = model.base_model.model.model(**given).last_hidden_state
        torch.testing.assert_close(model.get_base_model().lm_head(hidden), expected, atol=1e-5, rtol=0)
        assert len(trace.history) == 9


def test_an_adapter_that_has_learned_is_heard() -> None:
    """What is pruned is the adapted model: as if the adapter had been merged into its weights."""
    model = lora(tiny.model(), init_lora_weights=False).eval()
    given = tiny.inputs(tiny.model(), *ROWS)
    got = pruned(model, "fopru:keep=0.5", given)
    plain = pruned(tiny.model(), "fopru:keep=0.5", given)
    assert not torch.allclose(got[0], plain[0], atol=0.1)
    merged = model.merge_and_unload()
    wanted = pruned(merged, "fopru:keep=0.5", given)
    torch.testing.assert_close(got[0], wanted[0], atol=1e-4, rtol=0)


def test_a_handle_on_an_adapted_model_is_a_handle_on_the_model_inside() -> None:
    model = lora(tiny.model())
    base = model.get_base_model()
    assert unwrapped(model) is base
    assert unwrapped(base) is base
    with foveate.prune(model, "random:keep=0.5"), pytest.raises(FoveateError, match="another handle already prunes"):
        foveate.prune(base, "random:keep=0.5").start()


def test_an_adapted_model_holds_the_contract() -> None:
    model = lora(tiny.model(), init_lora_weights=False).eval()
    found = check(model, tiny.inputs(tiny.model(), "3i4"))
    assert [outcome for outcome in found.outcomes if not outcome.passed] == []
    assert found.model == "LlavaForConditionalGeneration"


def test_an_old_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(tiny.model())
    monkeypatch.setattr("peft.__version__", "0.20.0")
    with pytest.raises(FoveateError) as error:
        foveate.prune(model, "random:keep=0.5")
    assert str(error.value) == (
        "peft 0.20.0 calls the model that it wraps past its hooks, so a direct call would not be pruned; 0.21 or newer "
        "does not"
    )


def test_learned_prompts_hide_the_ids() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=4, token_dim=32)
    config.num_transformer_submodules, config.num_attention_heads = 1, 4
    wrapped = SimpleNamespace(peft_config={}, get_base_model=tiny.model, active_peft_config=config)
    with pytest.raises(FoveateError) as error:
        unwrapped(wrapped)
    assert str(error.value) == (
        "PROMPT_TUNING puts learned embeddings in front of the prompt, which hides the ids that say what is visual; "
        "adapters that change weights, such as LoRA, work"
    )


# ---------------------------------------------------------------------------------------------------------------------
# quantized


class Int8Linear(nn.Module):
    """A linear map as quantized libraries have it: whole numbers and scales, and nothing of the stock layer's names."""

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__()
        scale = stock.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("packed", (stock.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = stock.bias

    def forward(self, values: Tensor) -> Tensor:
        whole = self.get_buffer("packed").to(values.dtype) * self.get_buffer("scale")
        return nn.functional.linear(values, whole, self.bias)


def replace_linears(module: nn.Module, make: Callable[[nn.Linear], nn.Module], but: str = "lm_head") -> int:
    replaced = 0
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and name != but:
            setattr(module, name, make(child))
            replaced += 1
        else:
            replaced += replace_linears(child, make)
    return replaced


def rounded(stock: nn.Linear) -> nn.Linear:
    """The stock layer with the weights that its quantized form stands for."""
    form = Int8Linear(stock)
    stock.weight.data = form.get_buffer("packed").to(stock.weight.dtype) * form.get_buffer("scale")
    return stock


@each_method
def test_a_quantized_model_is_pruned_as_its_weights_in_full_are(method: str) -> None:
    """No weight is read: what pruning sees passes through the modules' own calls."""
    quantized, full = tiny.model(), tiny.model()
    assert replace_linears(quantized, Int8Linear) == replace_linears(full, rounded) > 40
    quantized.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    given = tiny.inputs(full, *ROWS)
    with untouched(quantized):
        got = pruned(quantized, method, given)
    assert_same(got, pruned(full, method, given))
    assert not torch.allclose(got[0], pruned(tiny.model(), method, given)[0], atol=1e-3), "rounding has an effect"


# ---------------------------------------------------------------------------------------------------------------------
# weights that are elsewhere


@each_method
def test_offloaded_weights(method: str) -> None:
    """Weights come for each call of a module and leave again; outside a call they are on the meta device."""
    given = tiny.inputs(tiny.model(), *ROWS)
    wanted = pruned(tiny.model(), method, given)
    model = cpu_offload(tiny.model(), execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    assert_same(pruned(model, method, given), wanted)
    assert model.device.type == "meta"
    remove_hook_from_module(model, recurse=True)
    assert_same(pruned(model, method, given), wanted)


@pytest.mark.parametrize("method", ["tome:keep=0.5", "crossget:keep=0.5", "image_text_interaction:where=2,keep=0.5"])
@pytest.mark.parametrize("family", ["internvl", "qwen2.5-vl", "gemma3"])
def test_offloaded_encoders_of_families(family: str, method: str) -> None:
    """Blocks that run from their own children need what is the block's own, too."""
    if family != "internvl":
        method = method.replace("crossget", "tome").replace("where=2", "attention=received,where=3")
    given = tiny.inputs(tiny.model(family, blocks=6), *ROWS)
    wanted = pruned(tiny.model(family, blocks=6), method, given)
    model = cpu_offload(tiny.model(family, blocks=6), execution_device=torch.device("cpu"))
    assert_same(pruned(model, method, given), wanted)


@each_method
def test_a_map_of_devices(method: str, tmp_path: Any) -> None:
    given = tiny.inputs(tiny.model(), *ROWS)
    wanted = pruned(tiny.model(), method, given)
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    places |= {f"model.language_model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    places |= {f"model.language_model.layers.{layer}": "disk" if layer > 1 else "cpu" for layer in range(4)}
    model = dispatch_model(tiny.model(), places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert model.model.language_model.layers[3].mlp.up_proj.weight.device.type == "meta"
    assert_same(pruned(model, method, given), wanted)


@pytest.mark.parametrize("method", ["fastv:keep=0.5,layer=1", "tome:keep=9", "h2o:heavy=0.2,recent=0.2"])
def test_blocks_on_several_accelerators(method: str) -> None:
    model = tiny.model()
    model.hf_device_map = {"model.vision_tower": 0, "model.language_model": 1, "lm_head": "cpu"}
    with pytest.raises(FoveateError) as error:
        foveate.prune(model, method)
    assert str(error.value) == (
        f"{method} acts inside the model, whose blocks are on 2 devices (0, 1); load it on one, or use a method that "
        "acts between encoder and decoder"
    )
    foveate.prune(model, "fopru:keep=0.5").discard()
    model.hf_device_map = {"model.vision_tower": 0, "model.language_model": "cpu", "lm_head": "disk"}
    foveate.prune(model, method).discard()


# ---------------------------------------------------------------------------------------------------------------------
# versions


def test_a_family_that_needs_a_newer_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    check_version(FAMILIES[0])
    monkeypatch.setattr("transformers.__version__", "5.17.1")
    with pytest.raises(FoveateError) as error:
        foveate.prune(tiny.model(), "fopru:keep=0.5")
    assert str(error.value) == "llava-1.5 needs transformers 5.18 or newer; 5.17.1 is installed"
