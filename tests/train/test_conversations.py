"""LLaVA's instruction data: what is read and what is left out, labels on answers only, paths that stay inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from PIL import Image

import foveate
from foveate.core import FoveateError
from foveate.train.conversations import Conversations, collate, expand, read_entries, render, tokens
from foveate.train.losses import IGNORED

TURNS = (("w10 w11", "w30"), ("w12", "w31 w32"))


def said(*turns: tuple[str, str], placeholder: str = "<image>\n") -> list[dict[str, str]]:
    found = []
    for number, (question, answer) in enumerate(turns):
        found.append({"from": "human", "value": (placeholder if number == 0 else "") + question})
        found.append({"from": "gpt", "value": answer})
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "coco").mkdir(parents=True)
    for name in ("a.png", "coco/b.png"):
        Image.effect_noise((30, 30), 90).convert("RGB").save(tmp_path / "images" / name)
    (tmp_path / "images" / "broken.png").write_bytes(b"no picture")
    return tmp_path


def written(folder: Path, entries: Any) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return path


ENTRIES = [
    {"id": 1, "image": "a.png", "conversations": said(*TURNS)},
    {"id": 2, "conversations": said(TURNS[0], placeholder="")},
    {"id": 3, "image": "coco/b.png", "conversations": said(("w5 <image>", "w6"), placeholder="")},
    {"id": 4, "image": "not there.png", "conversations": said(TURNS[0])},
    {"id": 5, "image": "broken.png", "conversations": said(TURNS[0])},
    {"id": 6, "image": "a.png", "conversations": said(TURNS[0])[:1]},
    {"id": 7, "image": ["a.png", "coco/b.png"], "conversations": said(TURNS[0])},
]


def test_entries_that_cannot_be_used_are_counted(folder: Path) -> None:
    entries, skipped = read_entries(written(folder, ENTRIES), folder / "images")
    assert [entry.image.name for entry in entries] == ["a.png", "b.png", "broken.png"]
    assert entries[0].turns == TURNS
    assert entries[1].turns == (("w5", "w6"),), "a placeholder goes in front, wherever it stood"
    assert (skipped.without_image, skipped.without_answer, skipped.several_images) == (1, 1, 1)
    assert skipped.missing == ["not there.png"]
    assert str(skipped) == ("1 without image, 1 without answer, 1 with several images, 1 with a missing picture")


def test_a_broken_picture_is_named_once_and_replaced_by_the_next(folder: Path) -> None:
    reports: list[str] = []
    rows = rows_of(folder, ENTRIES[4:5] + ENTRIES[:1], report=reports.append)
    assert len(rows) == 2
    for _ in range(2):
        assert torch.equal(rows[0].ids, rows[1].ids)
    assert len(reports) == 1 and "broken.png is no picture that can be decoded" in reports[0]
    assert rows.skipped.broken == ["broken.png"]
    with pytest.raises(FoveateError, match=r"none of 1 entries can be trained on; left out: 1 with a broken picture"):
        rows_of(folder, ENTRIES[4:5])[0]


def test_the_longest_row_is_found_without_reading_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [{"image": "a.png", "conversations": said(("w5", "w6 " * (7 if n == 31 else 2)))} for n in range(60)]
    rows = rows_of(folder, entries)
    longest = max((rows[number] for number in range(60)), key=lambda row: row.ids.numel())
    read: list[int] = []
    row = Conversations.__getitem__
    monkeypatch.setattr(Conversations, "__getitem__", lambda self, number: read.append(number) or row(self, number))
    extent = rows.extent(looked_at=4)
    assert (extent.visual, extent.text) == (tiny.TOKENS, longest.ids.numel() - tiny.TOKENS)
    assert 31 in read and len(read) == 8
    assert rows_of(folder, entries, longest=5).extent().text == 5


@pytest.mark.parametrize("name", ["../data.json", "coco/../../data.json", "/etc/hosts"])
def test_paths_stay_in_the_folder(folder: Path, name: str) -> None:
    data = written(folder, [{"image": name, "conversations": said(TURNS[0])}])
    with pytest.raises(FoveateError, match=r"entry 0: picture '.*' leaves the folder .*; only files inside it"):
        read_entries(data, folder / "images")


def test_a_link_does_not_lead_out_of_the_folder(folder: Path) -> None:
    (folder / "secret.png").write_bytes((folder / "images" / "a.png").read_bytes())
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    with pytest.raises(FoveateError, match="leaves the folder"):
        read_entries(written(folder, [{"image": "link.png", "conversations": said(TURNS[0])}]), folder / "images")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"a": 1}, "holds dict, no list of conversations"),
        ([7], "entry 0 of .* is int, no object with conversations"),
        ([], "no entry of .* can be trained on; left out: none"),
        ([{"image": "a.png", "conversations": "w1"}], "left out: 1 without answer"),
    ],
)
def test_other_files_are_refused(folder: Path, stored: Any, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        read_entries(written(folder, stored), folder / "images")


def test_files_that_are_not_there_are_refused(folder: Path) -> None:
    with pytest.raises(FoveateError, match="cannot be read as JSON"):
        read_entries(folder / "none.json", folder / "images")
    with pytest.raises(FoveateError, match="is no folder"):
        read_entries(written(folder, ENTRIES), folder / "none")


# ---------------------------------------------------------------------------------------------------------------------
# tokens

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}w3 "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} "
    "{% endif %}{% endfor %}{% else %}w4 {{ message['content'][0]['text'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w4{% endif %}"
)


def processor() -> Any:
    made = tiny.processor(tiny.model())
    made.chat_template = TEMPLATE
    return made


def rows_of(folder: Path, entries: Any, **options: Any) -> Conversations:
    return Conversations(written(folder, entries), folder / "images", processor(), tiny.IMAGE, **options)


def test_every_answer_is_labelled_and_nothing_else() -> None:
    ids, labels = tokens(processor(), TURNS)
    assert ids.tolist() == [3, tiny.IMAGE, 10, 11, 4, 30, 3, 12, 4, 31, 32, tiny.EOS]
    no = IGNORED
    assert labels.tolist() == [no, no, no, no, no, 30, no, no, no, 31, 32, tiny.EOS]


def test_the_shipped_model_learns_to_end_each_answer() -> None:
    from transformers import AutoProcessor

    mine = AutoProcessor.from_pretrained(foveate.MINI)
    ids, labels = tokens(mine, (("how many objects ?", "3"), ("is there a dog ?", "no")))
    said = [mine.tokenizer.decode(one) for one in (ids, labels[labels != IGNORED])]
    assert said[0].startswith("<bos> <image> USER how many objects ? ASSISTANT 3 <eos>")
    assert said[1] == "3 <eos> no <eos>"


def test_a_placeholder_becomes_as_many_as_the_picture_has_tokens() -> None:
    ids, labels = expand(torch.tensor([5, 96, 7]), torch.tensor([IGNORED, 96, 7]), 96, 3)
    assert ids.tolist() == [5, 96, 96, 96, 7]
    assert labels.tolist() == [IGNORED, IGNORED, IGNORED, IGNORED, 7]


def test_rows_are_what_the_processor_writes(folder: Path) -> None:
    rows = rows_of(folder, ENTRIES)
    row = rows[0]
    assert (row.ids == tiny.IMAGE).sum() == tiny.TOKENS
    assert row.ids[row.ids != tiny.IMAGE].tolist() == [3, 10, 11, 4, 30, 3, 12, 4, 31, 32, tiny.EOS]
    assert row.given["pixel_values"].shape == (1, 3, 24, 24)
    short = rows_of(folder, ENTRIES, longest=5)[0]
    assert short.ids.numel() == tiny.TOKENS + 5 and (short.labels != IGNORED).sum() == 1


def test_a_conversation_that_holds_special_tokens_is_left_out(folder: Path) -> None:
    """An ending in the middle of a question would teach to end there."""
    reports: list[str] = []
    marked = [said(("w10 </s> w11", "w30"), ("w7", "w8 \ud800")), said(("w10", "w30 \ud800"))]
    left_out = [{**ENTRIES[0], "conversations": one} for one in marked]
    rows = rows_of(folder, [*left_out, ENTRIES[0]], report=reports.append)
    alone = rows_of(folder, ENTRIES[:1])[0].ids
    assert all(rows[number].ids.equal(alone) for number in (0, 1, 2, 0))
    assert str(rows.skipped) == "2 with special tokens"
    assert len(reports) == 2
    assert reports[0].startswith("what is said about a.png holds '</s>', which this model reads as a mark of its own")
    assert reports[1].startswith("what is said about a.png holds half a character, U+D800 at place 4")


def test_a_batch_is_padded_on_the_left(folder: Path) -> None:
    rows = rows_of(folder, ENTRIES)
    batch = collate([rows[0], rows[1]], pad=0)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, tiny.TOKENS + 11)
    assert batch["attention_mask"].sum(dim=1).tolist() == [tiny.TOKENS + 11, tiny.TOKENS + 5]
    assert batch["input_ids"][1, :6].tolist() == [0] * 6 and batch["labels"][1, -1] == tiny.EOS
    assert batch["pixel_values"].shape == (2, 3, 24, 24) and "features" not in batch


def test_what_is_read_is_known_again(folder: Path) -> None:
    first, same = (rows_of(folder, ENTRIES).fingerprint() for _ in range(2))
    assert first == same and first["entries"] == 3
    assert rows_of(folder, ENTRIES[:1]).fingerprint() != first


def test_templates_that_cannot_be_followed_are_refused() -> None:
    made = processor()
    made.chat_template = "{{ messages | length }} {% if add_generation_prompt %}w4{% endif %}"
    with pytest.raises(FoveateError, match="rewrites what stands before an answer"):
        render(made, TURNS)
    made.chat_template = None
    with pytest.raises(FoveateError, match="has no chat template"):
        render(made, TURNS)
