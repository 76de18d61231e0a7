"""LLaVA's instruction data through each family's own processor, batches of it through training, and the whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny, tiny_processors
from models.untouched import untouched
from PIL import Image
from references.halving import LAYERS, TOLERANCE, Halving, stays
from torch import Tensor

import foveate
from foveate.cli import main
from foveate.core import FoveateError
from foveate.modules.lvpruning import for_model, load
from foveate.runtime.decoder.soften import look
from foveate.train.conversations import Conversations, Row, collate
from foveate.train.losses import IGNORED
from foveate.train.lvpruning import Settings, train_lvpruning
from foveate.train.scene_questions import SceneQuestions
from foveate.train.softened import Pass, Softened, whole_rows

# numpy's word on how stock GLM-4V reads a tensor
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIZES = ((60, 40), (30, 62), (33, 33), (16, 48))  # in pixels: several tiles, another number, or one
TURNS = ((("w10 w11", "w30"), ("w12", "w31 w32")), (("w13", "w33"),), (("w14 w15 w16", "w34"),), (("w17", "w35"),))
ONE_TILE = ("llava-1.5", "gemma3", "vipllava", "video-llava")
"""Families whose pictures all have as many tokens."""

each_processor = pytest.mark.parametrize("name", tiny_processors.PROCESSORS)


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """LLaVA's JSON of four entries, and the folder of their pictures."""
    (tmp_path / "images").mkdir()
    entries = []
    for number, (size, turns) in enumerate(zip(SIZES, TURNS, strict=True)):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / "images" / f"{number}.png")
        said = []
        for turn, (question, answer) in enumerate(turns):
            said.append({"from": "human", "value": ("<image>\n" if turn == 0 else "") + question})
            said.append({"from": "gpt", "value": answer})
        entries.append({"image": f"{number}.png", "conversations": said})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path / "data.json", tmp_path / "images"


def rows_of(name: str, data: tuple[Path, Path], **options: Any) -> Conversations:
    return Conversations(*data, tiny_processors.PROCESSORS[name](), tiny.IMAGE, **options)


def split(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    given = dict(batch)
    return given.pop("input_ids"), given.pop("attention_mask"), given.pop("labels"), given


def logits_of(model: Any, batch: dict[str, Tensor], choose: Any) -> Tensor:
    ids, mask, labels, given = split(batch)
    seen = look(model, ids, mask, given, answered=labels != IGNORED)
    passing = Pass(mask.bool() & ~seen.holders, seen.visual)
    with torch.no_grad():
        return passing.run(model, LAYERS, choose, whole_rows(ids, mask, torch.full_like(ids, IGNORED), seen))


def everything(stage: int, visual: Tensor, *_: Tensor) -> Tensor:
    return torch.ones(visual.shape[:2])


@each_processor
def test_every_answer_is_labelled_and_nothing_else(name: str, data: Any) -> None:
    rows = rows_of(name, data)
    tokens = rows.processor.tokenizer
    for number, turns in enumerate(TURNS):
        row = rows[number]
        said = tokens.convert_ids_to_tokens(row.labels[row.labels != IGNORED])
        assert said == [*" ".join(answer for _, answer in turns).split(), "</s>"]
        assert torch.equal(row.ids[row.labels != IGNORED], row.labels[row.labels != IGNORED])
        words = [token for token in tokens.convert_ids_to_tokens(row.ids) if token.startswith("w")]
        asked = [word for question, answer in turns for word in ("w3", *question.split(), "w4", *answer.split())]
        assert words == asked
        flat = {"batch_num_images", "image_merge_sizes"}  # a number per row, per picture
        assert all(value.ndim > 1 or key in flat for key, value in row.given.items())
    counts = [int((rows[number].ids == tiny.IMAGE).sum()) for number in range(4)]
    assert len(set(counts)) == 1 if name in ONE_TILE else len(set(counts)) > 1


@each_processor
def test_a_batch_gives_each_row_what_it_gets_alone(name: str, data: Any) -> None:
    model, rows = tiny.model(name), rows_of(name, data)
    together = logits_of(model, collate([rows[number] for number in range(4)], pad=0), everything)
    assert torch.isfinite(together).all()
    for number in range(4):
        alone = logits_of(model, collate([rows[number]], pad=0), everything)[0]
        torch.testing.assert_close(together[number, -len(alone) :], alone, atol=TOLERANCE, rtol=0)


@each_processor
def test_dropping_by_mask_equals_removing(name: str, data: Any) -> None:
    """On what the processor makes of whole pictures, as the numbers within a picture are those of its visual tokens."""
    model, rows = tiny.model(name), rows_of(name, data)
    batch = collate([rows[number] for number in range(3)], pad=0)
    ids, mask, _, given = split(batch)
    seen = look(model, ids, mask, given)
    with torch.no_grad(), foveate.prune(model, Halving()) as trace:
        really = model(input_ids=ids, attention_mask=mask, position_ids=seen.positions, **given).logits
    index = torch.zeros(3, int(seen.visual.sum(dim=1).max()), dtype=torch.int64)
    for row in range(3):
        mine = torch.cat([torch.arange(image.original) for image in trace.images if image.row == row])
        index[row, : mine.numel()] = mine
        assert mine.numel() == int(seen.visual[row].sum())
    soft = logits_of(model, batch, lambda stage, *_: stays(index, stage).float())
    unpruned = logits_of(model, batch, everything)
    words = mask.bool() & ~seen.holders
    assert (soft - really)[words].abs().max() < TOLERANCE
    assert (unpruned - really)[words].abs().max() > 0.1


@each_processor
def test_a_step_of_training_reaches_every_module(name: str, data: Any) -> None:
    model, rows = tiny.model(name), rows_of(name, data)
    made = Softened(model, for_model(model.config, layers=LAYERS).train(), (0.5, 0.3, 0.1))
    made.generator = torch.Generator().manual_seed(5)
    with untouched(model):
        out = made(**collate([rows[0], rows[1]], pad=0))
        out["loss"].backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in made.parameters())
    kept = out["kept"].tolist()
    assert 1 > kept[0] > kept[1] >= kept[2] >= 0 < kept[1]


@each_processor
def test_a_row_is_cut_in_its_text_and_never_in_its_picture(name: str, data: Any) -> None:
    whole = rows_of(name, data)[0]
    held = int((whole.ids == tiny.IMAGE).sum())
    others = whole.ids.numel() - held
    cut = rows_of(name, data, longest=others - 2)[0]
    assert cut.ids.numel() == whole.ids.numel() - 2 and torch.equal(cut.ids, whole.ids[:-2])
    assert torch.equal(cut.labels, whole.labels[:-2])
    for key, value in cut.given.items():
        assert value.shape[1] == cut.ids.numel() if key.endswith("token_type_ids") else value.shape
    with pytest.raises(FoveateError, match="none of 4 entries can be trained on"):
        rows_of(name, data, longest=1)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "internvl"])
def test_a_run_ends_in_modules_that_prune(name: str, data: Any, tmp_path: Path) -> None:
    model, rows = tiny.model(name), rows_of(name, data)
    settings = Settings(rate=1e-3, batch=2, steps=2, bf16=False, log_steps=1)
    lines: list[dict[str, Any]] = []
    with untouched(model):
        folder = train_lvpruning(model, rows, tmp_path / "run", settings, name=name, report=lines.append)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert load(folder).config.base_type == model.config.model_type
    method = foveate.LVPruning.from_pretrained(str(folder), keep=(0.5, 0.3, 0.1))
    with foveate.prune(model, method) as trace:
        model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=1)
    assert trace.images[0].after == int(0.1 * trace.images[0].original)


@pytest.mark.parametrize("name", ["llava-next", "idefics3"])
def test_the_command_trains_a_model_of_another_family(name: str, data: Any, tmp_path: Path) -> None:
    model = tiny.model(name)
    model.save_pretrained(tmp_path / "model")
    tiny_processors.PROCESSORS[name]().save_pretrained(tmp_path / "model")
    where = ["--model", tmp_path / "model", "--data", data[0], "--images", data[1], "--out", tmp_path / "run"]
    options = "--batch 2 --epochs 1 --rate 1e-3 --no-bf16 --device cpu".split()
    assert main(["train", "lvpruning", *map(str, where), *options]) == 0
    assert load(tmp_path / "run" / "lvpruning").config.base_type == model.config.model_type


@pytest.mark.parametrize("name", ["llava-next", "qwen2-vl", "gemma3"])
def test_scenes_are_refused_by_models_that_take_other_pictures(name: str) -> None:
    with pytest.raises(FoveateError, match=f"which {name} does not take as it is; give --data and --images"):
        SceneQuestions(tiny.model(name), None, 10)


def test_what_a_processor_cannot_do_is_said_before_training(data: Any) -> None:
    processor = tiny_processors.PROCESSORS["gemma3"]()
    processor.chat_template = None
    with pytest.raises(FoveateError, match="Gemma3Processor has no chat template"):
        Conversations(*data, processor, tiny.IMAGE)
    processor = tiny_processors.PROCESSORS["qwen2-vl"]()
    stock = type(processor).__call__

    class Ending(type(processor)):  # type: ignore[misc]
        def __call__(self, *arguments: Any, text: Any, **options: Any) -> Any:
            return stock(self, *arguments, text=[one + " w9" for one in text], **options)

    processor.__class__ = Ending
    with pytest.raises(FoveateError, match="the processor wrote other tokens than its tokenizer"):
        Conversations(*data, processor, tiny.IMAGE)


def test_smaller_pictures_are_filled_up() -> None:
    ids = torch.tensor([2, 3])
    rows = [
        Row(ids, ids, {"pixel_values": torch.ones(1, 3, *size), "image_sizes": torch.tensor([size])})
        for size in ((4, 8), (6, 2))
    ]
    batch = collate(rows, pad=0)
    assert batch["pixel_values"].shape == (2, 3, 6, 8)
    assert batch["pixel_values"].sum(dim=(1, 2, 3)).tolist() == [3 * 32, 3 * 12]
    assert bool((batch["pixel_values"][0, :, :4] == 1).all() and (batch["pixel_values"][1, :, :, :2] == 1).all())
    assert batch["image_sizes"].tolist() == [[4, 8], [6, 2]]
