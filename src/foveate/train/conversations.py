"""LLaVA's instruction data as it is: one JSON list of conversations, one folder of pictures; labels on answers only."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from foveate.core import FoveateError, short
from foveate.inference.pictures import load_image
from foveate.ops.padding import joined
from foveate.paths import checked, read_json
from foveate.runtime.arguments import TOKEN_TYPES
from foveate.texts import check_text
from foveate.train.losses import IGNORED

LONGEST = 1472
"""Tokens of a row beside the placeholders of its picture; LLaVA-1.5 was tuned with 2048, 576 of them visual."""

_TOKENS = ("input_ids", "attention_mask")

Turns = tuple[tuple[str, str], ...]
"""Questions and answers, in order."""


@dataclass(frozen=True)
class Row:
    """One sequence that begins with or holds pictures. L tokens."""

    ids: Tensor  # (L,) int64
    labels: Tensor  # (L,) int64, -100 wherever no answer stands
    given: Mapping[str, Tensor] = field(default_factory=dict)  # pixels, their sizes, token types (1, L), by their names
    features: Tensor | None = None  # (pictures, N, D), in place of pixels
    wanted: Tensor | None = None  # (pictures, N) int8: 1 what the question is about, -1 what distracts from it, else 0
    even: Tensor | None = None  # (pictures, 2) share of an ample and a tight budget best spread evenly, or NaN
    kind: str = ""  # of the question, for whoever counts answers by kind


@dataclass(frozen=True)
class Extent:
    """The longest row to be expected of a data set, as far as a look at some of them tells."""

    visual: int  # placeholders
    text: int  # all other tokens


def extent_of(rows: Iterable[Row], image_token: int) -> Extent:
    """The most placeholders and the most other tokens among some rows, at least one of each."""
    held = [(row.ids == image_token) for row in rows]
    return Extent(max([1, *(int(one.sum()) for one in held)]), max([1, *(int((~one).sum()) for one in held)]))


@dataclass
class Skipped:
    """What of a file is not trained on, and why."""

    without_image: int = 0
    without_answer: int = 0
    several_images: int = 0
    missing: list[str] = field(default_factory=list)  # names of pictures that are not in the folder
    broken: list[str] = field(default_factory=list)  # ... that turned out to be undecodable
    marked: list[Turns] = field(default_factory=list)  # conversations that hold special tokens

    def __str__(self) -> str:
        counts = {
            "without image": self.without_image,
            "without answer": self.without_answer,
            "with several images": self.several_images,
            "with a missing picture": len(self.missing),
            "with a broken picture": len(self.broken),
            "with special tokens": len(self.marked),
        }
        said = [f"{count} {what}" for what, count in counts.items() if count]
        return ", ".join(said) or "none"


@dataclass(frozen=True)
class Entry:
    """One picture and what is said about it."""

    image: Path
    turns: Turns


def read_entries(file: str | Path, folder: str | Path) -> tuple[list[Entry], Skipped]:
    """Every entry of LLaVA's JSON that has one picture, and what was left out.

    Raises:
        FoveateError: the file is no JSON list of conversations, the folder is not there, a picture's path leaves the
            folder, or no entry is left.
    """
    root, skipped = checked(folder).resolve(), Skipped()
    if not root.is_dir():
        raise FoveateError(f"{folder} is no folder; give the one that the pictures' paths start from")
    entries = []
    for number, stored in enumerate(_stored(checked(file))):
        if not isinstance(stored, dict):
            raise FoveateError(f"entry {number} of {file} is {type(stored).__name__}, no object with conversations")
        name, turns = stored.get("image"), _turns(stored.get("conversations"))
        if not name:
            skipped.without_image += 1
        elif not isinstance(name, str):
            skipped.several_images += 1
        elif not turns:
            skipped.without_answer += 1
        else:
            path = _inside(root, name, number)
            if path.is_file():
                entries.append(Entry(path, turns))
            else:
                skipped.missing.append(name)
    if not entries:
        raise FoveateError(f"no entry of {file} can be trained on; left out: {skipped}")
    return entries, skipped


def _stored(file: Path) -> list[Any]:
    stored = read_json(file, str(file))
    if not isinstance(stored, list):
        raise FoveateError(f"{file} holds {type(stored).__name__}, no list of conversations")
    return stored


def _inside(root: Path, name: str, number: int) -> Path:
    path = checked(root / name).resolve()
    if not path.is_relative_to(root):
        raise FoveateError(
            f"entry {number}: picture {short(repr(name))} leaves the folder {root}; only files inside it are read"
        )
    return path


def _turns(said: Any) -> Turns:
    """(question, answer) pairs; what is not answered, or answers nothing, is left out."""
    turns, question = [], None
    for one in said if isinstance(said, list) else []:
        who, text = (one.get("from"), one.get("value")) if isinstance(one, dict) else (None, None)
        if who in ("human", "user") and isinstance(text, str):
            question = text.replace("<image>", "").strip()
        elif who in ("gpt", "assistant") and isinstance(text, str) and question is not None and text.strip():
            turns.append((question, text.strip()))
            question = None
    return tuple(turns)


# ---------------------------------------------------------------------------------------------------------------------
# text to tokens


def render(processor: Any, turns: Turns) -> tuple[str, list[tuple[int, int]]]:
    """The conversation in the model's chat template, a picture before the first question, and where answers stand.

    Raises:
        FoveateError: the processor has no chat template, or one that rewrites earlier turns.
    """
    if not getattr(processor, "chat_template", None):
        raise FoveateError(f"{type(processor).__name__} has no chat template, so the prompt's wording is not known")
    messages: list[dict[str, Any]] = []
    spans, text = [], ""
    for question, answer in turns:
        picture = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
        before = processor.apply_chat_template(messages, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text = processor.apply_chat_template(messages)
        if not text.startswith(before):
            raise FoveateError("this chat template rewrites what stands before an answer, so answers cannot be found")
        spans.append((len(before), len(text)))
    end = processor.tokenizer.eos_token
    if end and not text.rstrip().endswith(end):
        text = text.rstrip() + end
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


def tokens(processor: Any, turns: Turns) -> tuple[Tensor, Tensor]:
    """Ids and labels (L,) of a conversation, one placeholder for its picture."""
    text, spans = render(processor, turns)
    found = processor.tokenizer(text, return_offsets_mapping=True, add_special_tokens=_special(processor, text))
    ids = torch.tensor(found["input_ids"])
    answered = [any(start < end <= stop for start, stop in spans) for _, end in found["offset_mapping"]]
    return ids, ids.where(torch.tensor(answered), IGNORED)


def _special(processor: Any, text: str) -> bool:
    """Some chat templates write the token that starts a text, others leave it to the tokenizer."""
    start = processor.tokenizer.bos_token
    return not (start and text.startswith(start))


def expand(ids: Tensor, labels: Tensor, image_token: int, visual: int) -> tuple[Tensor, Tensor]:
    """Each placeholder becomes `visual` of them, none of them labelled."""
    is_image = ids == image_token
    repeats = is_image.long() * (visual - 1) + 1
    labels = labels.masked_fill(is_image, IGNORED)
    return ids.repeat_interleave(repeats), labels.repeat_interleave(repeats)


def carried(ids: Tensor, labels: Tensor, whole: Tensor) -> Tensor:
    """Labels (L,) of what a processor made of a conversation, from those of the conversation as it was tokenized.

    Processors write other tokens where a picture stands; from the first answer on, all is the same.

    Args:
        ids, labels: of the conversation, (T,), with a placeholder for the picture.
        whole: (L,) the processor's ids.

    Raises:
        FoveateError: the processor wrote other tokens behind the picture, so answers cannot be found.
    """
    answers = ids.numel() - int((labels != IGNORED).long().argmax())
    if not torch.equal(whole[-answers:], ids[-answers:]):
        raise FoveateError("the processor wrote other tokens than its tokenizer, so answers cannot be found")
    before = labels.new_full((whole.numel() - answers,), IGNORED)
    return torch.cat([before, labels[-answers:]])


# ---------------------------------------------------------------------------------------------------------------------
# data sets


class Conversations(Dataset[Row]):
    """Rows of LLaVA's instruction data for one model.

    A picture that cannot be decoded, or a conversation that holds special tokens, is named once, counted, and replaced
    by the next entry's, so that every run over the same files sees the same rows.

    Args:
        file, folder: as `read_entries`.
        processor: the model's.
        image_token: id of its placeholder.
        longest: tokens, placeholders not counted, at which a row is cut.
        report: told of each broken picture.
        read: what `read_entries` gave for the same file and folder; None reads them here.

    Raises:
        FoveateError: as `read_entries`; no entry can be used, or the processor writes no conversations that answers
            can be found in.
    """

    def __init__(
        self,
        file: str | Path,
        folder: str | Path,
        processor: Any,
        image_token: int,
        *,
        longest: int = LONGEST,
        report: Callable[[str], None] | None = None,
        read: tuple[list[Entry], Skipped] | None = None,
    ) -> None:
        self.entries, self.skipped = read_entries(file, folder) if read is None else read
        self.processor, self.image_token, self.longest = processor, image_token, longest
        self.report = report or (lambda message: None)
        self._digest = hashlib.sha256(checked(file).read_bytes()).hexdigest()
        self[0]  # what a processor cannot do is found here, not in the middle of a run

    def __len__(self) -> int:
        return len(self.entries)

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must find again."""
        return {"kind": "conversations", "sha256": self._digest, "entries": len(self), "longest": self.longest}

    def extent(self, looked_at: int = 16) -> Extent:
        """The longest row to be expected: as many with the longest texts are looked at as from all over the data."""
        length = lambda number: sum(len(said) for turn in self.entries[number].turns for said in turn)  # noqa: E731
        numbers = heapq.nlargest(looked_at, range(len(self)), key=length)
        numbers += range(0, len(self), max(1, len(self) // looked_at))
        return extent_of((self[number] for number in numbers), self.image_token)

    def __getitem__(self, number: int) -> Row:
        for step in range(len(self)):
            entry = self.entries[(number + step) % len(self)]
            try:
                for text in itertools.chain(*entry.turns):
                    check_text(self.processor, text, f"what is said about {entry.image.name}")
            except FoveateError as error:
                if entry.turns not in self.skipped.marked:
                    self.skipped.marked.append(entry.turns)
                    self.report(str(error))
                continue
            try:
                image = load_image(entry.image)
            except FoveateError as error:
                if entry.image.name not in self.skipped.broken:
                    self.skipped.broken.append(entry.image.name)
                    self.report(str(error))
                continue
            row = self._row(entry, image)
            if bool((row.labels != IGNORED).any()):
                return row
        raise FoveateError(f"none of {len(self)} entries can be trained on; left out: {self.skipped}")

    def _row(self, entry: Entry, image: Image.Image) -> Row:
        text, _ = render(self.processor, entry.turns)
        made = self.processor(
            images=[image], text=[text], add_special_tokens=_special(self.processor, text), return_tensors="pt"
        )
        ids = made["input_ids"][0]
        labels = carried(*tokens(self.processor, entry.turns), ids)
        end = self._end(ids)
        given = {
            name: value[:, :end] if name in TOKEN_TYPES else value
            for name, value in made.items()
            if isinstance(value, Tensor) and name not in _TOKENS
        }
        return Row(ids[:end], labels[:end], given)

    def _end(self, ids: Tensor) -> int:
        """Where a row is cut; placeholders are no part of its length, and none is cut off."""
        text = (ids != self.image_token).nonzero()[:, 0]
        held = (ids == self.image_token).nonzero()[:, 0]
        end = ids.numel() if text.numel() <= self.longest else int(text[self.longest])
        return max(end, int(held[-1]) + 1) if held.numel() else end


def collate(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """One batch, padded on the left: answers then end together, and only the last places need predictions."""
    longest = max(row.ids.numel() for row in rows)

    def padded(values: Tensor, filler: int) -> Tensor:
        return torch.nn.functional.pad(values, (longest - values.numel(), 0), value=filler)

    batch: dict[str, Tensor] = {
        "input_ids": torch.stack([padded(row.ids, pad) for row in rows]),
        "attention_mask": torch.stack([padded(torch.ones_like(row.ids), 0) for row in rows]),
        "labels": torch.stack([padded(row.labels, IGNORED) for row in rows]),
    }
    for name in rows[0].given:
        values = [row.given[name] for row in rows]
        typed = name in TOKEN_TYPES
        batch[name] = torch.stack([padded(value[0], 0) for value in values]) if typed else joined(values)
    for name in ("features", "wanted", "even"):
        if getattr(rows[0], name) is not None:
            batch[name] = torch.cat([getattr(row, name) for row in rows])
    return batch
