"""What every method must hold to on the families beside LLaVA-1.5.

Each method runs on each family on which the documentation says that it runs, with eager attention too if it acts inside
blocks or is of a kind of its own; each situation with methods of every kind. What else is refused says why.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from models import tiny
from models.untouched import untouched
from references import agreement, documented
from references.contract import (
    ATTENTION,
    LARGER,
    OTHERS,
    RUNNABLE,
    SAMPLES,
    SITUATIONS,
    VARIANTS,
    at,
    check_agreement,
    check_counts,
    each_attention,
    each_family,
    each_served,
    equals_the_reference,
    fields_of,
    generate,
    model_of,
    served,
)

from foveate import methods
from foveate.core import FoveateError
from foveate.cost.flops import decoder_flops, projector_flops, tower_flops
from foveate.families import family_of
from foveate.families.shapes import ModelShape
from foveate.runtime import support
from foveate.runtime.encoder.share import share_encoding

FORMS = [name for name in RUNNABLE if fields_of(name) & {"attention", "space"}]
# Where a method runs with other settings alone, those; where it runs as it is, without CLS.
OTHER_FORMS = [
    (name, family)
    for name in FORMS
    for family in OTHERS
    if documented.settings(name, family) or ("attention" in fields_of(name) and documented.served(name, family))
]


# What a method does before the decoder is the same whatever attention runs; all of them run with both on LLaVA-1.5.
EAGER = {*RUNNABLE} - {*at("input")} | {*SAMPLES}
# It acts before the first block of this encoder that sees whole pictures, and attention is read in no other.
TOO_EARLY = {("image_text_interaction", "qwen2.5-vl")}

EACH = [
    (name, family, attn)
    for name, family in documented.pairs(RUNNABLE, [*OTHERS, *LARGER])
    for attn in ATTENTION
    if attn == "sdpa" or name in EAGER
]


@pytest.mark.parametrize(("name", "family", "attn"), EACH)
def test_each_method_equals_the_reference(
    name: str, family: str, attn: str, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    equals_the_reference(model_of(family, attn), name, family, attn, asked, monkeypatch)


@pytest.mark.parametrize(("name", "family"), OTHER_FORMS)
def test_each_other_form_of_a_method_equals_the_reference(
    name: str, family: str, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that is refused runs with the settings that the refusal names, another one without CLS."""
    model = model_of(family)
    form = documented.settings(name, family)
    settings: dict[str, Any] = {"attention": "received"}
    if form is not None:
        settings = dict(pair.split("=") for pair in form.split(","))
        with pytest.raises(FoveateError, match=re.escape(f"(with {form} it runs)")):
            tiny.prune(model, methods.get(name).example(model.config))
    if (name, family) in TOO_EARLY:
        with pytest.raises(FoveateError, match="which sees windows; the nearest that sees whole pictures is block"):
            tiny.prune(model, dataclasses.replace(methods.get(name).example(model.config), **settings))
        return
    equals_the_reference(model, name, family, "sdpa", asked, monkeypatch, **settings)


@pytest.mark.parametrize("situation", SITUATIONS)
@each_served([name for name in SAMPLES if name in at("input", "layer")])
def test_each_situation_equals_the_reference(name: str, situation: str, family: str, asked: Any) -> None:
    model = model_of(family)
    method = served(model, name)
    given = tiny.inputs(model, *SITUATIONS[situation])
    seen = asked(method)
    with tiny.prune(model, method) as trace:
        out = generate(model, given)
        again = generate(model, given)
    assert torch.equal(torch.stack(out.logits), torch.stack(again.logits)), "the second run equals the first"
    calls = trace.history[:1]
    check_agreement(model, given, out, calls, seen[: len(seen) // 2])


@each_attention
@each_served(["fopru", "random", "fastv", "pyramiddrop", "h2o"])
def test_keeping_everything_changes_nothing(name: str, family: str, attn: str) -> None:
    model = model_of(family, attn)
    method = agreement.keeping_all(served(model, name)) or dataclasses.replace(
        methods.get(name)(), heavy=1.0, recent=1.0
    )
    given = tiny.inputs(model, "3i4", "2i1i5", "6")
    unpruned = generate(model, given)
    with untouched(model), tiny.prune(model, method) as trace:
        pruned = generate(model, given)
        direct = model(**given).logits
    assert all(image.after == image.original for image in trace.images)
    assert torch.equal(pruned.sequences, unpruned.sequences)
    torch.testing.assert_close(torch.stack(pruned.logits), torch.stack(unpruned.logits), atol=1e-5, rtol=0)
    valid = given["attention_mask"].bool()
    torch.testing.assert_close(direct[valid], model(**given).logits[valid], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", ["fopru", "divprune", "fastervlm", "random"])
@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_a_share_is_one_of_each_image(keep: float, name: str, family: str) -> None:
    """Whatever its tiles: InternVL's here have 9 tokens each, of which a half cannot stay."""
    model = model_of(family)
    given = tiny.inputs(model, "2i1i1i2")
    settings = {"attention": "received"} if "attention" in fields_of(name) else {}
    with tiny.prune(model, dataclasses.replace(methods.get(name)(), keep=keep, **settings)) as trace:
        generate(model, given, max_new_tokens=1)
    assert [image.after for image in trace.images] == [round(image.original * keep) for image in trace.images]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", ["fopru", "divprune", "fastv"])
def test_other_members_of_a_family_equal_the_reference(name: str, situation: str, variant: str, asked: Any) -> None:
    """Another decoder, or another encoder in the place of the usual one."""
    model = model_of(variant)
    method = served(model, name)
    given = tiny.inputs(model, *SITUATIONS[situation])
    seen = asked(method)
    with untouched(model), tiny.prune(model, method) as trace:
        out = generate(model, given)
    check_counts(model, given, method, trace.latest)
    check_agreement(model, given, out, trace.history, seen)


@each_family
def test_an_encoding_that_is_shared_gives_the_same(family: str) -> None:
    model = model_of(family)
    method = served(model, "fopru")
    given = tiny.inputs(model, "3i4", "2i1i5")
    with tiny.prune(model, method):
        own = generate(model, given)
    with share_encoding(model, method.needs):
        for _ in range(2):
            with tiny.prune(model, method):
                shared = generate(model, given)
            assert torch.equal(torch.stack(shared.logits), torch.stack(own.logits))


@each_family
def test_the_work_before_the_decoder_is_counted_for_what_was_encoded(family: str) -> None:
    """Pruning after the encoder takes operations off the decoder alone; each tile counts with its own patches."""
    model = model_of(family)
    given = tiny.inputs(model, "3i4", "2i1i5")
    with tiny.prune(model, methods.get("random")(keep=0.5)) as trace:
        generate(model, given, max_new_tokens=1)
    shape, call = ModelShape.from_config(model.config), trace.latest
    encoder = 0
    for row in given.pictures:
        for one in row:
            tiles = one.pixels.shape[0] if one.pixels.ndim == 4 else 1
            patches = one.pixels.shape[-1] * one.pixels.shape[-2] // 16 if one.pixels.ndim > 2 else one.pixels.shape[0]
            encoder += tiles * tower_flops(shape.tower, convention="roofline", patches=patches)
            encoder += projector_flops(shape.projector, tokens=tiles * patches // shape.projector.merge)
    for budget, left in ((call.unpruned, False), (call.budget, True)):
        decoder = 0
        for row in range(2):
            originals = sum(image.original for image in call.images if image.row == row)
            text = int(given["attention_mask"][row].sum()) - originals  # newlines among it
            visual = sum(image.after if left else image.original for image in call.images if image.row == row)
            lengths = (text + visual,) * shape.decoder.layers
            decoder += decoder_flops(shape.decoder, lengths=lengths, convention="roofline")
        assert budget.prefill_flops == encoder + decoder


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *LARGER])
def test_the_methods_that_a_family_is_said_to_serve(family: str) -> None:
    """The documentation tells the truth, and so does the message that names what works; what is refused says why."""
    model = model_of(family)
    row = family_of(model)
    works = support.working_methods(row, row.tower_of(model)[1])
    assert works == [name for name in RUNNABLE if documented.served(name, family)]
    for name in works:
        tiny.prune(model, methods.get(name).example(model.config)).discard()
    for name in set(methods.names()) - set(works):
        with pytest.raises(FoveateError) as error:
            tiny.prune(model, methods.get(name).example(model.config))
        form = documented.settings(name, family)
        assert (f"(with {form} it runs)" if form else f"{name}") in str(error.value)
        assert ("it runs)" in str(error.value)) == (form is not None), name


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        (
            "gemma3",
            "image_text_interaction",
            "needs tower.2/24.cls, which gemma3 with siglip_vision_model does not have (with attention=received",
        ),
        (
            "gemma4",
            "pyramiddrop",
            "the last ones the keys and values of others (E2B, E4B; not so the 31B, where they can); methods that work",
        ),
        ("gemma4", "h2o", "acts on the cache, which gemma4 does not allow: its layers take inputs of their own"),
        ("gemma4/31b", "tome", "acts inside the encoder, which gemma4 does not allow: its blocks turn each patch by"),
        ("qwen2.5-vl", "crossget", "needs tower.latest.cross, tower.latest.cross_attention, which qwen2.5-vl with"),
        (
            "internvl",
            "visionzip",
            "the projector of internvl takes no single ones (with attention=received,space=projected it runs); methods",
        ),
        (
            "gemma3",
            "visionzip",
            "needs tower.read.cls, tower.read.cls_attention, which gemma3 with siglip_vision_model",
        ),
    ],
)
def test_a_refusal_gives_its_reason_and_what_works(family: str, name: str, reason: str) -> None:
    model = model_of(family)
    with pytest.raises(FoveateError) as error:
        tiny.prune(model, methods.get(name).example(model.config))
    assert reason in str(error.value)
    assert "; methods that work: " in str(error.value)
    assert ("fastv" in str(error.value)) == (family_of(model).closed_decoder is None)
