"""What requests may ask for, what is refused with which words, and what caches tell pictures by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from foveate.core import FoveateError
from foveate.families.rows import FAMILIES
from foveate.serve.vllm.asked import Asked, Rules
from foveate.serve.vllm.server import untrusted, with_question, with_spec
from foveate.serve.vllm.settings import check_vllm, written

LLAVA = next(family for family in FAMILIES if family.name == "llava-1.5")
QWEN = next(family for family in FAMILIES if family.name == "qwen2.5-vl")


def rules(spec: str = "fopru:keep=0.25", **more: Any) -> Rules:
    return Rules(spec, LLAVA, LLAVA.described("clip_vision_model"), **more)


def test_a_request_that_names_nothing_gets_the_engines_spec() -> None:
    assert rules().asked({}) == Asked("fopru:keep=0.25")
    assert rules().asked({"foveate": "divprune: keep=64"}) == Asked("divprune:keep=64")
    assert rules().asked({"foveate": "none"}).parts == ()


def test_caches_tell_what_differs_and_nothing_else() -> None:
    keys = {
        rules(joint=True, allowed=("all",)).asked(given).key
        for given in (
            {},
            {"foveate": "fopru:keep=64"},
            {"foveate": "none"},
            {"foveate": "cdpruner:keep=64", "question": "what is it ?"},
            {"foveate": "cdpruner:keep=64", "question": "where is it ?"},
        )
    }
    assert len(keys) == 5
    assert rules().asked({"foveate": "fopru:keep=0.25"}).key == rules().asked({}).key
    assert rules().asked({"question": "what is it ?"}).key == rules().asked({}).key  # nothing reads it


def test_what_is_asked_travels_as_bytes() -> None:
    asked = Asked("mmtok:keep=4", "wö ist's - dort oder hier?", (3, 70000))
    assert Asked.unpacked(asked.packed()) == asked


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"foveate": "fopruu:keep=64"}, "unknown method 'fopruu'; did you mean 'fopru'?"),
        ({"foveate": "fopru:kep=64"}, "fopru has no field 'kep'"),
        ({"foveate": "fopru:keep=0"}, "keep=0 is below 1 token"),
        ({"foveate": 64}, "is no text"),
        ({"foveate": "@secrets.json"}, "names a file of the server"),
        ({"foveate": "lvpruning:from = weights"}, "names a file of the server"),
        ({"foveate": "dynamicvit:keep=0.7,path=weights"}, "names a file of the server"),
        ({"foveate": "fastv:keep=0.5"}, r"acts inside the decoder, .*; the nearest that runs is \w+"),
        ({"foveate": "tome:keep=64"}, "acts inside the encoder"),
        ({"foveate": "h2o"}, "acts on the cache"),
        ({"foveate": "prumerge"}, "decides its own count"),
        ({"foveate": "cdpruner:keep=64"}, "cdpruner:keep=64 reads the question: send it with the request as"),
        ({"foveate": "cdpruner:keep=64", "question": " "}, "reads the question"),
        ({"foveate": "cdpruner:keep=64", "question": 7}, "send the question as text"),
    ],
)
def test_what_cannot_be_right_is_refused(given: Mapping[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        rules(joint=True, allowed=("all",)).asked(given)


def test_a_method_needs_what_the_model_has() -> None:
    with pytest.raises(FoveateError, match="this model brings no CLIP; start the engine with --hf-overrides"):
        rules().asked({"foveate": "cdpruner:keep=64", "question": "what is it ?"})
    qwen = Rules("fopru:keep=0.25", QWEN, QWEN.described("qwen2_5_vl_vision"))
    with pytest.raises(FoveateError, match=r"needs tower.read.cls_attention, which qwen2.5-vl .* does not have"):
        qwen.asked({"foveate": "fastervlm:keep=64"})
    with pytest.raises(FoveateError, match="acts inside the decoder"):
        rules("fastv:keep=0.5")


def test_before_the_encoder_a_method_may_decide_its_own_count() -> None:
    assert rules(before=True).asked({"foveate": "pixelprune"}).spec == "pixelprune"
    both = rules("pixelprune+fopru:keep=9", before=True)
    assert [part.site for part in both.asked({}).parts] == ["pixels", "input"]
    with pytest.raises(FoveateError, match=r"pixelprune acts before the encoder, which transformers' model .* alone"):
        rules().asked({"foveate": "pixelprune"})


def test_an_engine_may_allow_some_methods_beside_its_own() -> None:
    some = rules(allowed=("divprune",))
    assert some.asked({"foveate": "divprune:keep=9"}).spec == "divprune:keep=9"
    assert some.asked({"foveate": "fopru:keep=9"}).spec == "fopru:keep=9"
    message = "uniform is not among the methods that requests to this engine may name: divprune, fopru; it is started"
    with pytest.raises(FoveateError, match=message):
        some.asked({"foveate": "uniform:keep=9"})
    with pytest.raises(FoveateError, match="uniform is not among the methods"):
        some.asked({"foveate": "divprune:keep=30+uniform:keep=9"})


def test_an_engine_lets_through_what_reads_one_block_and_no_text() -> None:
    usual = rules(joint=True)
    for name in ("fopru", "divprune", "visionzip", "fastervlm", "uniform"):
        assert name in usual.allowed
    for name in ("cdpruner", "mmtok", "hired", "evocut"):  # text, text, two blocks, many blocks
        assert name in usual.running() and name not in usual.allowed
    assert not usual.may_read_joint_space
    assert "cdpruner" in rules("cdpruner:keep=9", joint=True).allowed
    assert rules("cdpruner:keep=9", joint=True).may_read_joint_space
    assert rules(joint=True, allowed=("all",)).allowed == tuple(sorted(usual.running()))


@pytest.mark.parametrize("name", rules(joint=True).running())
def test_every_method_that_is_said_to_run_is_let_through(name: str) -> None:
    from foveate.methods import get
    from foveate.spec import format as format_spec

    spec = format_spec(get(name).example())
    every = rules(joint=True, allowed=("all",))
    assert every.asked({"foveate": spec, "question": "what is it ?"}).spec == spec


def test_another_vllm_is_refused_with_both_versions() -> None:
    check_vllm("0.32.0+cpu")
    check_vllm("0.32.4")
    with pytest.raises(FoveateError, match=r"vLLM 0.33.1 is not among .*; install vllm==0.32"):
        check_vllm("0.33.1")


def test_a_spec_is_written_in_one_way() -> None:
    import foveate

    assert written(foveate.FoPru(keep=0.25)) == written("fopru: keep=25%") == "fopru:keep=0.25"
    assert written([foveate.Uniform(keep=9), foveate.FoPru(keep=3)]) == "uniform:keep=9+fopru:keep=3"
    assert written("none") == "none"


def test_a_spec_may_stand_in_a_field_of_its_own() -> None:
    assert with_spec({"foveate": "none", "n": 1}) == {"n": 1, "mm_processor_kwargs": {"foveate": "none"}}
    both = {"foveate": "none", "mm_processor_kwargs": {"question": "what ?"}}
    assert with_spec(both) == {"mm_processor_kwargs": {"question": "what ?", "foveate": "none"}}
    assert with_spec({"n": 1}) == {"n": 1}
    with pytest.raises(FoveateError, match="'none' in 'foveate' and 'fopru' in mm_processor_kwargs; give one of them"):
        with_spec({"foveate": "none", "mm_processor_kwargs": {"foveate": "fopru"}})


def test_a_chat_asks_about_its_pictures_by_its_last_user_message() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:"}}
    chat = {
        "messages": [
            {"role": "user", "content": [picture, {"type": "text", "text": "what is it ?"}]},
            {"role": "assistant", "content": "a dog"},
            {"role": "user", "content": "where is it ?"},
            {"role": "assistant", "content": "there"},
        ]
    }
    assert with_question(chat)["mm_processor_kwargs"] == {"question": "where is it ?"}
    first = {"messages": chat["messages"][:1], "mm_processor_kwargs": {"foveate": "none"}}
    assert with_question(first)["mm_processor_kwargs"] == {"foveate": "none", "question": "what is it ?"}
    own = {**chat, "mm_processor_kwargs": {"question": "mine"}}
    assert with_question(own) == own
    for odd in ({}, {"messages": None}, {"messages": [1]}, {"messages": [{"role": "user", "content": [picture]}]}):
        assert with_question(odd) == odd


def test_a_client_says_how_pictures_are_pruned_and_nothing_else_of_how_they_are_prepared() -> None:
    assert untrusted({"mm_processor_kwargs": {"foveate": "none", "question": "?"}, "messages": []}) is None
    assert untrusted("text") is None
    refused = untrusted([{"mm_processor_kwargs": {"foveate": "none", "max_pixels": 9}}])
    assert refused is not None and "not max_pixels; start the server with --trust-request-mm-kwargs" in refused
    assert "media_io_kwargs are not taken" in str(untrusted({"requests": [{"media_io_kwargs": {"video": {}}}]}))
