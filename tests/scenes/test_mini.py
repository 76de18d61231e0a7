"""`mini`: the shipped checkpoint loads with plain transformers, its answers end, and saving keeps every weight."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    LlavaForConditionalGeneration,
)

from foveate.scenes import mini, vocabulary
from foveate.scenes.exam import answers
from foveate.scenes.generator import demo, generate
from foveate.scenes.questions import KINDS, sample

MEGABYTE = 1024**2


@pytest.fixture(scope="module")
def shipped() -> LlavaForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(mini.FOLDER)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(mini.FOLDER)


def test_the_checkpoint_is_a_stock_llava_in_bfloat16(shipped):
    assert type(shipped) is LlavaForConditionalGeneration
    assert {parameter.dtype for parameter in shipped.parameters()} == {torch.bfloat16}
    vision = shipped.config.vision_config
    assert (vision.image_size // vision.patch_size) ** 2 == shipped.config.image_seq_length == mini.TOKENS == 576
    assert shipped.config.vision_feature_layer == -2


def test_what_build_makes_has_the_shape_of_the_checkpoint(shipped):
    built = mini.build()
    assert {name: value.shape for name, value in built.state_dict().items()} == {
        name: value.shape for name, value in shipped.state_dict().items()
    }


def test_the_checkpoint_stays_small():
    files = {file.relative_to(mini.FOLDER).as_posix(): file.stat().st_size for file in mini.FOLDER.rglob("*")}
    assert files["model.safetensors"] <= 25 * MEGABYTE
    assert sum(size for name, size in files.items() if name.startswith("clip/")) <= 15 * MEGABYTE
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_one_picture_becomes_576_tokens(shipped, processor):
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=demo().image(0), text=text, return_tensors="pt")
    assert (inputs["input_ids"] == shipped.config.image_token_id).sum() == 576
    assert inputs["input_ids"][0, 0] == mini.BOS
    assert inputs["input_ids"][0, -1] == vocabulary.WORDS.index("ASSISTANT")


def test_the_processor_normalises_as_the_recipe_does(processor):
    scenes = generate(1, seed=3)
    pixels = processor.image_processor(scenes.image(0), return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels, mini.normalise(scenes.pixels), atol=1e-6)


def test_every_word_survives_the_tokenizer(processor):
    text = " ".join(vocabulary.WORDS)
    ids = processor.tokenizer(text)["input_ids"]
    assert ids == list(range(len(vocabulary.WORDS)))
    assert processor.tokenizer.decode(ids) == text
    assert processor.tokenizer("zebra")["input_ids"] == [mini.PAD]


def test_the_shipped_tokenizer_is_the_one_that_the_code_builds(processor, tmp_path):
    mini.processor().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((mini.FOLDER / name).read_text())
    assert processor.chat_template == mini.CHAT_TEMPLATE


def test_the_chat_template_holds_several_turns(processor):
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many objects ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
        {"role": "user", "content": [{"type": "text", "text": "describe"}]},
    ]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == (
        "<bos> <image> USER how many objects ? ASSISTANT 3 <eos> USER describe ASSISTANT"
    )


def test_answers_of_every_kind_end(shipped, processor):
    scenes = generate(10, seed=11, split="test")
    asked = sample(scenes, seed=0)
    assert {question.kind for question in asked} == set(KINDS)
    said = answers(shipped, processor, scenes, asked)
    assert sum("<eos>" in answer for answer in said) >= 9
    for question, answer in zip(asked, said, strict=True):
        words = answer.split("<eos>")[0].split()
        assert len(words) == 1 or question.kind == "describe"


def test_saving_and_loading_keeps_every_weight(tmp_path):
    model = mini.build(seed=5, config=mini.llava_config(width=16, layers=2)).to(torch.bfloat16)
    mini.save(model, tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert not list((tmp_path / "model").glob(".writing-*"))
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lm_head" in name]  # noqa: SIM118 (tied, written once)


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model = mini.build(seed=5, config=mini.llava_config(width=16, layers=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mini.save(model, tmp_path)
    assert model.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_seed_alone_decides_the_weights():
    config = mini.llava_config(width=16, layers=2)
    one, same, other = (mini.build(seed, config) for seed in (1, 1, 2))
    name = "model.vision_tower.embeddings.patch_embedding.weight"
    name = name if name in one.state_dict() else name.replace("vision_tower.", "vision_tower.vision_model.")
    assert torch.equal(one.state_dict()[name], same.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])


def test_clip_shares_the_tower_of_mini(shipped):
    clip = CLIPModel.from_pretrained(mini.FOLDER / "clip")
    assert clip.dtype == torch.bfloat16
    tower = clip.vision_model.state_dict()
    for name, value in mini.tower(shipped).state_dict().items():
        assert torch.equal(value, tower[name]), name


def test_clip_pools_at_the_end_of_its_texts():
    tokenizer = AutoTokenizer.from_pretrained(mini.FOLDER / "clip")
    clip = CLIPModel.from_pretrained(mini.FOLDER / "clip", dtype=torch.float32).eval()
    short = tokenizer(["umbrella"], return_tensors="pt")
    padded = tokenizer(["umbrella", "what color is behind the dog ?"], padding=True, return_tensors="pt")
    assert short["input_ids"].tolist() == [[mini.BOS, vocabulary.WORDS.index("umbrella"), mini.END]]
    with torch.no_grad():
        alone = clip.get_text_features(**short).pooler_output
        beside = clip.get_text_features(**padded).pooler_output
        states = clip.text_model(**padded).last_hidden_state
    assert torch.allclose(alone[0], beside[0], atol=1e-5)
    assert torch.allclose(clip.text_projection(states[0, 2]), beside[0], atol=1e-5)
    assert not torch.allclose(beside[0], beside[1], atol=1e-2)
