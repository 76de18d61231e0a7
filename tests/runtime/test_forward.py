"""Direct calls of the model: logits, loss and gradients on the shortened prompt, and decoding by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import tiny
from models.doubles import Fixed, Ragged
from references import agreement, reference
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import foveate
from foveate import FoveateError, Pool, Random
from foveate.runtime.seams import CACHE
from foveate.trace import Call

ROWS = ("3i4", "2i1i5", "6", "1i")


def prompt_logits(model: Any, given: dict[str, Tensor], call: Call) -> list[tuple[Tensor, Tensor]]:
    """Reference logits (L, V) at each token of each shortened row, and its columns in the row without padding."""
    nothing = torch.empty(0, model.config.text_config.hidden_size)
    return [reference.decode(model, prompt, nothing) for prompt in agreement.prompts(model, given, call)]


@pytest.mark.parametrize("decoder", ["llama", "qwen3", "mistral-sliding"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_short_logits_equal_the_reference(padding: str, attn: str, decoder: str) -> None:
    model = tiny.model(decoder=decoder, attn=attn)
    given = tiny.inputs(model, *ROWS, padding=padding)
    with foveate.prune(model, Ragged(), short_outputs=True) as trace:
        logits = model(**given).logits
    assert logits.shape[:2] == trace.index.shape
    for row, (expected, columns) in enumerate(prompt_logits(model, given, trace.latest)):
        own = trace.index[row] >= 0
        torch.testing.assert_close(logits[row, own], expected, atol=agreement.TOLERANCE, rtol=0)
        first = int(given["attention_mask"][row].argmax())
        assert torch.equal(trace.index[row, own] - first, columns)
    padded = trace.index[2] < 0
    assert padded.any() and bool(padded[-1]) == (padding == "right"), "the caller's side of padding stays"


@torch.no_grad()
def test_a_call_without_mask_and_cache_is_no_packed_sequence() -> None:
    """Without either, gaps in the positions would cut attention into blocks."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4", batch_mask=False)
    with foveate.prune(model, Random(keep=0.25)) as trace:
        logits = model(**given, use_cache=False).logits
    expected = prompt_logits(model, tiny.inputs(model, "3i4"), trace.latest)[0]
    torch.testing.assert_close(logits[0], agreement.in_columns(*expected, 43), atol=agreement.TOLERANCE, rtol=0)


def loss_by_hand(model: Any, given: dict[str, Tensor], labels: Tensor, call: Call) -> Tensor:
    """Mean cross-entropy of the labelled tokens that stayed, each predicted by the token before it."""
    losses = []
    for row, (logits, columns) in enumerate(prompt_logits(model, given, call)):
        targets = labels[row][given["attention_mask"][row].bool()][columns][1:]
        losses.append(
            nn.functional.cross_entropy(logits[:-1], targets, ignore_index=-100, reduction="none")[targets >= 0]
        )
    return torch.cat(losses).mean()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_loss_equals_the_reference_and_reaches_the_projector(padding: str, training: bool) -> None:
    model = tiny.model().train(training)
    given = tiny.inputs(model, *ROWS, padding=padding)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == tiny.IMAGE, -100)
    with foveate.prune(model, Ragged()) as trace:
        out = model(**given, labels=labels)
        out.loss.backward()
    weights = model.model.multi_modal_projector.linear_1.weight
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found["model.multi_modal_projector.linear_1.weight"] is not None
    model.zero_grad()
    expected = loss_by_hand(model, given, labels, trace.latest)
    expected.backward()
    torch.testing.assert_close(out.loss, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["model.multi_modal_projector.linear_1.weight"], weights.grad, atol=1e-5, rtol=1e-3)
    vision = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    assert found[vision].abs().max() > 0
    torch.testing.assert_close(found[vision], model.get_parameter(vision).grad, atol=1e-5, rtol=1e-3)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny.model().train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.23 on
            (enable or model.gradient_checkpointing_enable)()
        given = tiny.inputs(model, "3i4", "2i1i5")
        with foveate.prune(model, "fopru:keep=0.25"):
            model(
                **given, labels=given["input_ids"].masked_fill(given["input_ids"] == tiny.IMAGE, -100)
            ).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_arguments_may_be_given_by_position() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    with foveate.prune(model, Random(keep=0.25)):
        by_name = model(**given).logits
        by_position = model(given["input_ids"], given["pixel_values"], given["attention_mask"]).logits
        as_tuple = model(**given, return_dict=False)
        last = model(**given, logits_to_keep=2).logits
    assert torch.equal(by_position, by_name)
    assert torch.equal(as_tuple[0], by_name)
    torch.testing.assert_close(last, by_name[:, -2:], atol=1e-5, rtol=0)  # fewer rows may be multiplied otherwise


@torch.no_grad()
def test_short_hidden_states_and_attentions() -> None:
    model = tiny.model(attn="eager")
    with foveate.prune(model, Random(keep=0.25), short_outputs=True) as trace:
        out = model(**tiny.inputs(model, "3i4"), output_hidden_states=True, output_attentions=True)
    assert {hidden.shape[1] for hidden in out.hidden_states} == {trace.length}
    assert {one.shape[-2:] for one in out.attentions} == {(trace.length, trace.length)}
    features = out.image_outputs.pooler_output if hasattr(out, "image_outputs") else [out.image_hidden_states]
    assert [one.shape[0] for one in features] == [9]


@torch.no_grad()
def test_a_merging_method_in_a_direct_call() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    with foveate.prune(model, Pool(keep=0.25)) as trace:
        logits = model(**given).logits
    grid = reference.project(model, reference.encode(model, given["pixel_values"])[0]).unflatten(0, (3, 2, 3, 2))
    merged = [[grid.mean(dim=(1, 3)).flatten(0, 1)]]
    prompt = agreement.prompts(model, given, trace.latest, merged=merged)[0]
    expected = agreement.in_columns(*reference.decode(model, prompt, prompt.embeddings[:0]), 43)
    torch.testing.assert_close(logits[0], expected, atol=agreement.TOLERANCE, rtol=0)


# -- decoding by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("decoder", ["llama", "mistral-sliding"])
@pytest.mark.parametrize("rows", [("3i4",), ROWS, ("2i", "3i1")])
@torch.no_grad()
def test_decoding_by_hand_equals_generate(rows: tuple[str, ...], decoder: str, with_mask: bool) -> None:
    """The mask of a later step, where one is given, has a column for each token of the unpruned sequence."""
    model = tiny.model(decoder=decoder)
    given = tiny.inputs(model, *rows)
    with foveate.prune(model, Fixed((0, 3, 17))):
        expected = model.generate(**given, max_new_tokens=5, return_dict_in_generate=True, output_logits=True)
        out = model(**given)
        mask, answer, logits = given["attention_mask"], [], []
        for _ in range(5):
            logits.append(out.logits[:, -1])
            answer.append(out.logits[:, -1].argmax(dim=-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(answer[-1])], dim=1)
            more = {"attention_mask": mask} if with_mask else {}
            out = model(input_ids=answer[-1], **{CACHE: getattr(out, CACHE)}, **more)
    assert torch.equal(torch.cat(answer, dim=1), expected.sequences[:, -5:])
    torch.testing.assert_close(torch.stack(logits), torch.stack(expected.logits), atol=agreement.TOLERANCE, rtol=0)


@torch.no_grad()
def test_decoding_by_hand_after_right_padding() -> None:
    """Each row goes on from its own end, as it would alone, though padding stands between."""
    model = tiny.model()
    given = tiny.inputs(model, *ROWS, padding="right")
    with foveate.prune(model, Ragged()) as trace:
        out = model(**given)
        rows = agreement.prompts(model, given, trace.latest)
        ends = given["attention_mask"] * torch.arange(given["input_ids"].shape[1])
        token = out.logits[torch.arange(4), ends.argmax(dim=1)].argmax(dim=-1, keepdim=True)
        answer, logits = [token], []
        for _ in range(4):
            out = model(input_ids=answer[-1], **{CACHE: getattr(out, CACHE)})
            logits.append(out.logits[:, -1])
            answer.append(logits[-1].argmax(dim=-1, keepdim=True))
    answers = torch.cat(answer, dim=1)
    for row, prompt in enumerate(rows):
        assert torch.equal(answers[row], reference.greedy(model, prompt, 5))
        expected = reference.answer_logits(model, prompt, answers[row])[1:]
        torch.testing.assert_close(torch.stack(logits)[:, row], expected, atol=agreement.TOLERANCE, rtol=0)


@torch.no_grad()
def test_several_tokens_at_once_after_the_prompt() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i")
    more = torch.tensor([[7, 8, 9]])
    with foveate.prune(model, Fixed((0, 3, 17))):
        cache = getattr(model(**given), CACHE)
        together = model(input_ids=more, **{CACHE: cache}).logits
        cache = getattr(model(**given), CACHE)
        single = [model(input_ids=more[:, place, None], **{CACHE: cache}).logits for place in range(3)]
    torch.testing.assert_close(together, torch.cat(single, dim=1), atol=agreement.TOLERANCE, rtol=0)


@torch.no_grad()
def test_a_second_picture_by_hand() -> None:
    model = tiny.model()
    first, second = tiny.inputs(model, "3i4"), tiny.inputs(model, "2i3", seed=1)
    with foveate.prune(model, Random(keep=0.25)) as trace:
        out = model(**first)
        after = model(
            input_ids=second["input_ids"], pixel_values=second["pixel_values"], **{CACHE: getattr(out, CACHE)}
        )
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    pictures = torch.cat([first["pixel_values"], second["pixel_values"]])
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures}
    prompt = agreement.prompts(model, whole, *trace.history)[0]
    expected = agreement.in_columns(*reference.decode(model, prompt, prompt.embeddings[:0]), ids.shape[1])[43:]
    torch.testing.assert_close(after.logits[0], expected, atol=agreement.TOLERANCE, rtol=0)
    assert trace.index.min() == first["input_ids"].shape[1], "positions are those of the whole sequence"
    assert torch.equal(ids.gather(1, trace.index), second["input_ids"].gather(1, trace.index - 43))


@pytest.mark.parametrize("kind", ["dynamic", "bare", "static"])
@torch.no_grad()
def test_the_callers_empty_cache_is_used_in_place(kind: str) -> None:
    model = tiny.model()
    text = model.config.get_text_config()
    cache: Any
    cache = {
        "dynamic": lambda: DynamicCache(config=text),
        "bare": DynamicCache,
        "static": lambda: StaticCache(config=text, max_cache_len=60),
    }[kind]()
    given = tiny.inputs(model, "3i4")
    with foveate.prune(model, Random(keep=0.25)) as trace:
        plain = model(**given)
        out = model(**given, **{CACHE: cache})
        step = model(input_ids=torch.tensor([[7]]), **{CACHE: cache}).logits
        expected = model(input_ids=torch.tensor([[7]]), **{CACHE: getattr(plain, CACHE)}).logits
    assert getattr(out, CACHE) is cache
    assert isinstance(cache, DynamicCache if kind != "static" else StaticCache)
    assert int(cache.layers[0].get_seq_length()) == trace.length + 1
    torch.testing.assert_close(out.logits, plain.logits, atol=agreement.TOLERANCE, rtol=0)
    torch.testing.assert_close(step, expected, atol=agreement.TOLERANCE, rtol=0)


@torch.no_grad()
def test_no_cache_comes_back_where_none_is_wanted() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    with foveate.prune(model, Random(keep=0.25)):
        assert getattr(model(**given, use_cache=False), CACHE) is None
        assert getattr(model(**given, use_cache=True), CACHE) is not None
        model.config.get_text_config().use_cache = False
        assert getattr(model(**given), CACHE) is None
        model.config.get_text_config().use_cache = True


# -- refusals ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_a_direct_call_cannot_take() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    encoded = model.model.get_image_features(given["pixel_values"], return_dict=True)
    embeddings = model.get_input_embeddings()(given["input_ids"])
    ids = {"input_ids": given["input_ids"]}
    with foveate.prune(model, Random(keep=0.25)) as trace:
        with pytest.raises(
            FoveateError, match="pruning needs input_ids and pixel_values; embeddings hide what is visual"
        ):
            model(inputs_embeds=embeddings)
        with pytest.raises(FoveateError, match="pruning needs input_ids and pixel_values"):
            model(**ids, mm_encoder_outputs={"image": encoded})
        with pytest.raises(
            FoveateError, match=r"output_attentions in a direct call: .* short_outputs=True\) hands out"
        ):
            model(**given, output_attentions=True)
        for name in ("labels", "shift_labels"):
            with pytest.raises(FoveateError, match=rf"{name} have shape \(1, 7\); \(1, 43\) is needed: one for each"):
                model(**given, **{name: given["input_ids"][:, -7:]})
        with pytest.raises(
            FoveateError, match="labels beside logits_to_keep: the loss takes the logits of all columns"
        ):
            model(**given, labels=given["input_ids"], logits_to_keep=7)
        with pytest.raises(FoveateError, match=r"attention_mask has shape \(1, 42\); a mask of \(rows, 43\) is needed"):
            model(**{**given, "attention_mask": given["attention_mask"][:, 1:]})
        with pytest.raises(FoveateError, match=r"attention_mask has shape \(1, 1, 43, 43\)"):
            model(**{**given, "attention_mask": torch.ones(1, 1, 43, 43)})
        assert not trace.history
        assert model(**given).logits.shape[1] == 43, "the handle works on after a refusal"
    with foveate.prune(model, Random(keep=0.25), short_outputs=True):
        for name in ("logits_to_keep", "shift_labels"):
            with pytest.raises(FoveateError, match=f"{name} as a tensor counts the unpruned prompt, and short_outputs"):
                model(**given, **{name: given["input_ids"]})
        assert model(**given, logits_to_keep=3).logits.shape[1] == 3


@torch.no_grad()
def test_a_short_mask_in_a_later_step_is_refused() -> None:
    """A mask that counts the shortened prompt would put its columns in the wrong places."""
    model = tiny.model()
    with foveate.prune(model, Random(keep=0.25)) as trace:
        out = model(**tiny.inputs(model, "3i4"))
        short = torch.ones(1, trace.length + 1, dtype=torch.int64)
        with pytest.raises(
            FoveateError, match=r"shape \(1, 17\); a mask of \(rows, 44\) is needed: one column for each"
        ):
            model(input_ids=torch.tensor([[7]]), **{CACHE: getattr(out, CACHE)}, attention_mask=short)


@torch.no_grad()
def test_a_callers_autocast_does_not_reach_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    seen: list[tuple[bool, torch.dtype]] = []
    select = Random.select

    def noted(self: Any, signals: Any) -> Any:
        product = torch.eye(2) @ torch.eye(2)
        seen.append((torch.is_autocast_enabled("cpu"), product.dtype))
        return select(self, signals)

    monkeypatch.setattr(Random, "select", noted)
    with torch.autocast("cpu", torch.bfloat16), foveate.prune(model, Random(keep=9)):
        assert model(**given).logits.dtype == torch.bfloat16
    assert seen == [(False, torch.float32)]
