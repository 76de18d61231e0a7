"""The handle: installed and undone, alone on its model, one thread at a time, and what prompts it refuses."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny
from models.doubles import Answer, Fixed, Ragged, Scored
from models.untouched import differences, fingerprint, untouched
from references import agreement
from torch import Tensor

import foveate
from foveate import FoPru, FoveateError, Random
from foveate.core import Method, Selection
from foveate.runtime.decoder.probe import DecoderProbe
from foveate.runtime.encoder.probe import Probe
from foveate.runtime.encoder.tower import TowerStages
from foveate.runtime.seams import CACHE

STEPS = 4


def generate(model: Any, given: dict[str, Tensor], **options: Any) -> Any:
    settings = dict(max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True)
    return model.generate(**given, **{**settings, **options})


# -- life -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FoPru(keep=0.25), Random(keep=0.25), Ragged()])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_nothing_of_the_model_changes(attn: str, method: Method) -> None:
    model = tiny.model(attn=attn)
    given = tiny.inputs(model, "3i4", "2i1i5")
    with untouched(model):
        handle = foveate.prune(model, method)
        with handle:
            assert differences(fingerprint(model), fingerprint(model)) == []
            generate(model, given, cache_implementation="static")
            generate(model, given, num_beams=2)
            model(**given, labels=given["input_ids"]).loss.backward()
            model.zero_grad()
    before = fingerprint(model)
    handle.start()
    changed = differences(before, fingerprint(model))
    handle.stop()
    assert "attributes of " in changed, "an installed handle would be noticed"
    assert not any(name.startswith(("weights", "configuration", "generation")) for name in changed)
    assert differences(before, fingerprint(model)) == []


def test_the_context_manager_gives_the_trace_and_start_the_handle() -> None:
    model = tiny.model()
    handle = foveate.prune(model, Random())
    assert handle.start() is handle
    assert handle.active
    handle.stop()
    with handle as trace:
        assert trace is handle.trace
    assert not handle.active


def test_a_handle_may_be_used_again() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    handle = foveate.prune(model, FoPru(keep=0.25))
    answers = []
    for _ in range(3):
        with handle as trace:
            answers.append(generate(model, given).sequences)
    assert len(trace.history) == 3
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_nested_handles_are_refused() -> None:
    model = tiny.model()
    handle = foveate.prune(model, Random())
    with untouched(model), handle as trace:
        with pytest.raises(FoveateError) as error:
            foveate.prune(model, Random()).start()
        assert str(error.value) == (
            f"another handle already prunes this model: {handle!r}. stop() it first, by foveate.restore(model) where "
            "it is out of reach, or give several methods as a list"
        )
        with pytest.raises(FoveateError, match="another handle already prunes"), foveate.prune(model, FoPru()):
            pass
        generate(model, tiny.inputs(model, "3i4"))
        assert len(trace.history) == 1
    handle = foveate.prune(model, Random()).start()
    with pytest.raises(FoveateError, match=r"this handle already prunes this model; stop\(\) it first"):
        handle.start()
    assert handle.active
    handle.stop()


def test_two_models_have_two_handles() -> None:
    mine, other = tiny.model(seed=0), tiny.model(seed=1)
    given = tiny.inputs(mine, "3i4")
    with foveate.prune(mine, FoPru(keep=0.25)) as first, foveate.prune(other, FoPru(keep=0.5)) as second:
        generate(mine, given)
        generate(other, given)
        generate(mine, given)
    assert [image.after for image in first.images + second.images] == [9, 18]
    assert (len(first.history), len(second.history)) == (2, 1)


def test_a_method_that_somebody_replaced_is_left_alone() -> None:
    model = tiny.model()
    stock = model.generate
    model.generate = lambda *arguments, **options: stock(*arguments, **options)
    message = "generate of this model is already replaced by something else; undo that first"
    with untouched(model), pytest.raises(FoveateError, match=message):
        foveate.prune(model, Random()).start()
    assert "generate" in vars(model)


def test_a_handle_made_while_another_is_at_work_sees_the_model_itself() -> None:
    """What a block's attention ran with is read when the handle starts, not when it is made."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    with untouched(model):
        with foveate.prune(model, FoPru(keep=0.25)):
            second = foveate.prune(model, FoPru(keep=0.5))
        with second as trace:
            generate(model, given)
    assert trace.images[0].after == 18


def test_an_attention_implementation_set_before_the_start_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.clip import modeling_clip

    model = tiny.model()
    handle = foveate.prune(model, FoPru(keep=0.25))
    model.set_attn_implementation("eager")
    ran: list[Any] = []
    stock = modeling_clip.eager_attention_forward
    monkeypatch.setattr(
        modeling_clip, "eager_attention_forward", lambda module, *a, **o: ran.append(module) or stock(module, *a, **o)
    )
    with handle:
        generate(model, tiny.inputs(model, "3i4"))
    assert len({id(module) for module in ran}) == model.config.vision_config.num_hidden_layers


def test_a_copy_of_the_model_is_free_of_the_handle() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    unpruned = generate(model, given).sequences
    with foveate.prune(model, FoPru(keep=0.25)):
        pass
    assert torch.equal(generate(copy.deepcopy(model), given).sequences, unpruned)


def test_weights_saved_inside_the_handle_are_the_models_own(tmp_path: Any) -> None:
    from transformers import LlavaForConditionalGeneration

    model = tiny.model()
    names = list(model.state_dict())
    with foveate.prune(model, FoPru(keep=0.25)):
        assert list(model.state_dict()) == names
        model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    given = tiny.inputs(model, "3i4")
    assert torch.equal(generate(loaded, given).sequences, generate(model, given).sequences)
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()


@pytest.mark.parametrize("what", [Probe, DecoderProbe, TowerStages])
def test_a_start_that_fails_is_undone(what: type, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = what.install  # type: ignore[attr-defined]

    def install(self: Any) -> None:
        stock(self)
        raise RuntimeError("no more")

    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    unpruned = generate(model, given).sequences
    monkeypatch.setattr(what, "install", install)
    handle = foveate.prune(model, FoPru(keep=0.25))
    with untouched(model), pytest.raises(RuntimeError, match="no more"):
        handle.start()
    assert not handle.active
    assert torch.equal(generate(model, given).sequences, unpruned)
    monkeypatch.setattr(what, "install", stock)
    with untouched(model), handle as trace:
        generate(model, given)
    assert trace.images[0].after == 9


# -- exceptions -------------------------------------------------------------------------------------------------------


def fails(error: BaseException) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        raise error

    return hook


@pytest.mark.parametrize("where", ["encoder", "decoder", "head"])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("error", [RuntimeError("gone wrong"), KeyboardInterrupt()])
def test_the_handle_works_on_after_an_exception(where: str, direct: bool, error: BaseException) -> None:
    """Nothing of the broken call is left: what the encoder showed of its picture is forgotten."""
    model = tiny.model()
    given, other = tiny.inputs(model, "3i4", "2i2"), tiny.inputs(model, "2i1i5", seed=3)
    module = {
        "encoder": model.model.vision_tower.encoder.layers[-1],
        "decoder": model.get_decoder().layers[2],
        "head": model.lm_head,
    }[where]
    with untouched(model), foveate.prune(model, FoPru(keep=0.25)) as trace:
        expected = generate(model, other)
        hook = module.register_forward_pre_hook(fails(error))
        with pytest.raises(type(error)):
            model(**given) if direct else generate(model, given)
        hook.remove()
        again = generate(model, other)
        with torch.no_grad():
            logits = model(**other).logits
    assert torch.equal(again.sequences, expected.sequences)
    torch.testing.assert_close(logits[:, -1], expected.logits[0], atol=agreement.TOLERANCE, rtol=0)
    assert trace.images[0].after == 9


def test_pictures_encoded_by_hand_do_not_disturb_a_call() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    others = torch.randn(3, 3, tiny.IMAGE_SIDE, tiny.IMAGE_SIDE)
    with torch.no_grad(), foveate.prune(model, FoPru(keep=0.25)):
        expected = generate(model, given)
        model.get_image_features(others)
        again = generate(model, given)
        model.get_image_features(others)
        logits = model(**given).logits
    assert torch.equal(again.sequences, expected.sequences)
    torch.testing.assert_close(logits[:, -1], expected.logits[0], atol=agreement.TOLERANCE, rtol=0)


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["generate", "forward"])
@pytest.mark.parametrize("first", ["generate", "forward"])
def test_a_second_thread_is_refused_while_a_call_runs(first: str, second: str) -> None:
    model = tiny.model()
    one, other = tiny.inputs(model, "3i4"), tiny.inputs(model, "2i2", seed=3)
    inside, go_on = threading.Event(), threading.Event()

    def call(kind: str, given: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return generate(model, given).sequences if kind == "generate" else model(**given).logits

    def wait(*_: Any) -> None:
        inside.set()
        assert go_on.wait(30)

    found: list[Tensor] = []
    with foveate.prune(model, FoPru(keep=0.25)) as trace:
        expected, expected_other = call(first, one), call(second, other)
        hook = model.lm_head.register_forward_pre_hook(wait)
        thread = threading.Thread(target=lambda: found.append(call(first, one)))
        thread.start()
        assert inside.wait(30)
        try:
            with pytest.raises(FoveateError, match="another thread is using this pruned model; one call at a time, or"):
                call(second, other)
        finally:
            go_on.set()
            thread.join()
            hook.remove()
        assert torch.equal(found[0], expected), "the refused call leaves the running one as it is"
        assert torch.equal(call(second, other), expected_other), "and the model is free afterwards"
        assert len(trace.history) == 4


def test_threads_may_take_turns() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    found: list[Tensor] = []
    with foveate.prune(model, FoPru(keep=0.25)):
        for _ in range(3):
            thread = threading.Thread(target=lambda: found.append(generate(model, given).sequences))
            thread.start()
            thread.join()
        assert all(torch.equal(one, generate(model, given).sequences) for one in found)
    assert len(found) == 3


# -- prompts and pictures ---------------------------------------------------------------------------------------------


def wrong_prompts(model: Any) -> dict[str, tuple[dict[str, Tensor], str]]:
    """Prompts and pictures that do not belong together, and what is said of them."""
    one, two, none = tiny.inputs(model, "3i4"), tiny.inputs(model, "2i1i5"), tiny.inputs(model, "6")
    across = tiny.inputs(model, "3i", "3i")
    across["input_ids"][0, 3:21], across["input_ids"][1, 3:21] = 5, 5
    more = torch.cat([two["pixel_values"], one["pixel_values"]])
    once = "pass each image once and let the processor write the placeholders"
    return {
        "pictures, no placeholders": (
            {**none, "pixel_values": one["pixel_values"]},
            "pixel_values were given but the prompt has no image: no token 96 among 6",
        ),
        "placeholders, no pictures": (
            {key: value for key, value in one.items() if key != "pixel_values"},
            "the prompt has 36 visual placeholders but no pixel_values were given",
        ),
        "too few pictures": (
            {**two, "pixel_values": one["pixel_values"]},
            f"the prompt has 72 visual placeholders but its 1 images give 36 tokens; {once}",
        ),
        "too many pictures": (
            {**two, "pixel_values": more},
            f"the prompt has 72 visual placeholders but its 3 images give 108 tokens; {once}",
        ),
        "one placeholder per image": (
            tiny.inputs(model, "3i4", tokens=1),
            f"the prompt has 1 visual placeholders but its 1 images give 36 tokens; {once}",
        ),
        "an image across two rows": (
            {**across, "pixel_values": one["pixel_values"]},
            "image 0 begins in row 0 and ends in row 1 of the prompts",
        ),
        "hidden placeholders": (
            {**one, "attention_mask": one["attention_mask"].index_fill(1, torch.arange(5, 12), 0)},
            "attention_mask hides 7 visual placeholders; only padding may be masked",
        ),
    }


@pytest.mark.parametrize("kind", list(wrong_prompts(tiny.model())))
def test_prompts_and_pictures_that_do_not_belong_together(kind: str) -> None:
    model = tiny.model()
    given, message = wrong_prompts(model)[kind]
    right = tiny.inputs(model, "3i4")
    with untouched(model), torch.no_grad(), foveate.prune(model, FoPru(keep=0.25)) as trace:
        with pytest.raises(FoveateError, match=re.escape(message)):
            generate(model, given)
        with pytest.raises(FoveateError, match=re.escape(message)):
            model(**given)
        assert not trace.history
        generate(model, right)
        assert trace.images[0].after == 9


def test_a_later_turn_with_pictures_that_do_not_belong() -> None:
    model = tiny.model()
    first, second = tiny.inputs(model, "3i4"), tiny.inputs(model, "2i3", seed=1)
    with foveate.prune(model, Random(keep=0.25)):
        out = generate(model, first)
        ids = torch.cat([out.sequences, second["input_ids"]], dim=1)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with pytest.raises(FoveateError, match="has 36 visual placeholders but its 0 images give 0 tokens"):
            generate(model, whole, **{CACHE: getattr(out, CACHE)})
        both = torch.cat([first["pixel_values"], second["pixel_values"]])
        with pytest.raises(FoveateError, match="has 36 visual placeholders but its 2 images give 72 tokens"):
            generate(model, {**whole, "pixel_values": both}, **{CACHE: getattr(out, CACHE)})
        generate(model, {**whole, "pixel_values": second["pixel_values"]}, **{CACHE: getattr(out, CACHE)})


def test_an_encoder_that_saw_other_pictures_than_the_prompt() -> None:
    """Somebody's hook encodes one more while the call is under way: whose scores these are cannot be told."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4")

    def encode_more(*_: Any) -> None:
        model.model.vision_tower(given["pixel_values"])

    hook = model.model.multi_modal_projector.register_forward_pre_hook(encode_more)
    with torch.no_grad(), foveate.prune(model, FoPru(keep=0.25)):
        for call in (lambda: generate(model, given), lambda: model(**given)):
            with pytest.raises(FoveateError, match="encoder block 2 saw 2 pictures, the prompt 1"):
                call()
        hook.remove()
        generate(model, given)


# -- methods that answer wrongly --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers(value: float) -> None:
    def scores(signals: Any) -> Tensor:
        return torch.zeros(signals.shape).index_fill(1, torch.tensor([3]), value)

    model = tiny.model()
    message = "1 of 36 scores are NaN or infinite; finite scores are needed to choose"
    method = Scored(keep=0.5, scores=scores)
    with untouched(model), foveate.prune(model, method), pytest.raises(FoveateError, match=message):
        generate(model, tiny.inputs(model, "3i4"))


def test_an_encoder_that_gives_no_numbers() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    block = model.base_model.vision_tower.encoder.layers[0]
    with foveate.prune(model, FoPru(keep=0.25)) as trace:
        broken = block.register_forward_hook(lambda module, arguments, output: output * float("nan"))
        with pytest.raises(FoveateError, match="36 of 36 scores are NaN or infinite"):
            generate(model, given)
        broken.remove()
        assert not trace.history
        assert torch.isfinite(torch.stack(generate(model, given).logits)).all()


def test_later_stages_cannot_keep_what_is_gone() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    message = "fixed:kept=2/9 keeps token 9, which an earlier stage has dropped"
    with foveate.prune(model, [Fixed((1, 2, 3)), Fixed((2, 9))]), pytest.raises(FoveateError, match=message):
        generate(model, given)


def wrong_answers() -> dict[str, tuple[Method, str]]:
    def answer(indices: list[list[int]], **more: Any) -> Method:
        return Answer(answer=lambda signals: Selection([torch.tensor(one) for one in indices], **more))

    rows = torch.ones(2, 32)
    return {
        "images": (answer([[0], [1]]), "answered for 2 images but was asked for 1"),
        "nothing": (Answer(answer=lambda signals: None), "answered with NoneType where a Selection is needed"),  # type: ignore[arg-type, return-value]
        "empty": (
            Answer(answer=lambda signals: Selection([torch.empty(0, dtype=torch.int64)])),
            "image 0: no token was kept; at least 1 must stay",
        ),
        "above": (answer([[0, 36]]), "image 0: kept index 36 is outside 0..35"),
        "below": (answer([[-1, 3]]), "image 0: kept index -1 is outside 0..35"),
        "twice": (answer([[3, 3, 4]]), "image 0: 3 tokens were kept but only 2 of them are distinct"),
        "order": (answer([[4, 3]]), "image 0: kept indices do not ascend; a method that wants another order says"),
        "rows": (answer([[3, 4, 5]], features=[rows]), "image 0: 2 feature rows for 3 kept tokens"),
        "numbers": (answer([[3, 4]], features=[rows * float("nan")]), "image 0: features hold NaN or infinity"),
        "extra": (
            answer([[3, 4]], extra=[torch.ones(3).bool()]),
            "mask of extra tokens has 3 entries for 2 kept tokens",
        ),
    }


@pytest.mark.parametrize("kind", list(wrong_answers()))
def test_answers_that_break_the_contract(kind: str) -> None:
    method, message = wrong_answers()[kind]
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    with untouched(model), torch.no_grad(), foveate.prune(model, method):
        with pytest.raises(FoveateError, match=re.escape(message)):
            generate(model, given)
        with pytest.raises(FoveateError, match=re.escape(message)):
            model(**given)


def test_a_configuration_is_copied_once_and_again_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting and stopping costs next to nothing where nothing has changed; what is counted follows what has."""
    model = tiny.model()
    copies: list[str] = []
    stock = type(model.config).to_dict
    monkeypatch.setattr(type(model.config), "to_dict", lambda config: copies.append("copy") or stock(config))

    def flops() -> float:
        with foveate.prune(model, "fopru:keep=3") as trace:
            model(**tiny.inputs(model, "3i4"))
        return trace.unpruned.prefill_flops

    before, first = flops(), len(copies)
    assert first > 0 and flops() == before
    assert len(copies) == first
    model.config.text_config.intermediate_size *= 2
    assert flops() > before
    assert first < len(copies) <= 2 * first
