"""The task of a local folder: questions in lines of JSON beside their pictures, all of them checked before any work."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.core import FoveateError, did_you_mean, short
from foveate.evaluate.scoring import RULES, Rule
from foveate.inference.pictures import check_image
from foveate.inference.videos import check_torchvision, read_header
from foveate.paths import Given, checked

FILE = "questions.jsonl"
FIELDS = ("image", "question", "answers", "type", "options", "group", "id", "video", "fps")
NEEDED = FIELDS[:4]
"""With a `video` in place of the image."""

MOST_OPTIONS = len(string.ascii_uppercase)
ASK_FOR_LETTER = "Answer with the option's letter from the given choices directly."
"""What stands below the options, in the words of LLaVA's evaluation."""

_MOST_NAMED = 20  # lines that one message names
_LONGEST_LINE = 1_000_000


@dataclass(frozen=True)
class Question:
    """One line of the file.

    Attributes:
        id: what tells it from all others: its own, else the number of its line.
        image: the picture's path as the line has it, below the folder; "" where it is about a video.
        text: the question as it is asked, without the options.
        answers: those that are right; of a question with options the letter of the right one.
        kind: one of `scoring.RULES`.
        options: what A, B, ... stand for, or ().
        group: such as a split of POPE or a subtask of MME, or "".
        video: a video's path, or that of the folder of its frames; or "".
        fps: frames a second of a folder of frames.
    """

    id: str
    image: str
    text: str
    answers: tuple[str, ...]
    kind: str
    options: tuple[str, ...] = ()
    group: str = ""
    video: str = ""
    fps: float | None = None

    @property
    def shown(self) -> str:
        """The path of what it is about."""
        return self.image or self.video

    @property
    def prompt(self) -> str:
        """The text that a model is asked: the question, below it the options by letter and what is to be answered."""
        lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, self.options, strict=False)]
        return "\n".join([self.text, *lines, ASK_FOR_LETTER]) if lines else self.text


@dataclass(frozen=True)
class Folder:
    """The questions of a folder, at least one, and a digest of them and of what they are about.

    All are about pictures, or all about videos.
    """

    path: Path
    questions: tuple[Question, ...]
    digest: str

    @property
    def videos(self) -> bool:
        return bool(self.questions[0].video)


def read(folder: Given, first: int | None = None) -> Folder:
    """The questions of `questions.jsonl` in a folder, whose pictures or videos lie in it.

    A line is an object: `image` (a path below the folder), `question`, `answers` (texts, of a question with options the
    right letter) and `type` (one of `scoring.RULES`); `options` where the type has them, `group` and `id` if wanted.
    In place of `image` there may be a `video`, a file or a folder of its frames, which has an `fps` besides.

    Args:
        first: read so many questions only; all lines are checked.

    Raises:
        FoveateError: there is no such file, it holds no question, or lines that cannot be used; those are named by
            their numbers with what is wrong, up to twenty.
    """
    path = checked(folder)
    file = path / FILE
    if not file.is_file():
        raise FoveateError(f"{path} holds no {FILE}; a task is a folder with that file and its pictures")
    found, wrong, ids = list[Question](), list[str](), dict[str, int]()
    problems: dict[tuple[str, float | None], str | None] = {}
    first_kind: tuple[bool, int] | None = None
    for number, line in _lines(file):
        try:
            question = _question(line, number)
            first_kind = first_kind or (bool(question.video), number)
            if first_kind[0] != bool(question.video):
                kinds = ("a video", "a picture") if question.video else ("a picture", "a video")
                raise FoveateError(f"it is about {kinds[0]}, and line {first_kind[1]} about {kinds[1]}; split them")
            seen = (question.shown, question.fps)
            if seen not in problems:
                problems[seen] = _problem(path, question)
            if problems[seen]:
                raise FoveateError(str(problems[seen]))
            if question.id in ids:
                raise FoveateError(f"id {short(repr(question.id))} is that of line {ids[question.id]} too")
        except FoveateError as error:
            wrong.append(f"line {number}: {error}")
        else:
            ids[question.id] = number
            found.append(question)
    if wrong:
        more = f"\n... and {len(wrong) - _MOST_NAMED} lines more" if len(wrong) > _MOST_NAMED else ""
        raise FoveateError(f"{file} cannot be asked:\n" + "\n".join(wrong[:_MOST_NAMED]) + more)
    if not found:
        raise FoveateError(f"{file} holds no question; write one JSON object a line, with {', '.join(NEEDED)}")
    kept = tuple(found[:first])
    return Folder(path, kept, _digest(path, kept))


def turns(question: Question) -> list[Question]:
    """What is asked for a question: itself, and a circular one once for each turn of its options (MMBench).

    In turn t the option at place p stands at place p - t, the first ones at the end; the right letter goes along.
    """
    if question.kind != "circular":
        return [question]
    count = len(question.options)
    right = string.ascii_uppercase.index(question.answers[0])
    return [
        dataclasses.replace(
            question,
            options=question.options[turn:] + question.options[:turn],
            answers=(string.ascii_uppercase[(right - turn) % count],),
        )
        for turn in range(count)
    ]


def _lines(file: Path) -> Iterator[tuple[int, str | None]]:
    """Lines that hold something, by number; None for one that is too long or no UTF-8."""
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE + 1), b""), start=1):
                if len(line) > _LONGEST_LINE:
                    raise FoveateError(
                        f"{file} cannot be asked:\nline {number}: it has more than {_LONGEST_LINE} bytes"
                    )
                try:
                    text: str | None = line.decode()
                except UnicodeDecodeError:
                    text = None
                if text is None or text.strip():
                    yield number, text
    except OSError as error:
        raise FoveateError(f"{file} cannot be read: {error.strerror or error}") from error


def _question(line: str | None, number: int) -> Question:
    """The question of a line; FoveateError says what is wrong with it."""
    if line is None:
        raise FoveateError("it is no UTF-8")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FoveateError(f"it is no JSON: {short(str(error), 120)}") from error
    if not isinstance(value, dict):
        raise FoveateError(f"it holds {short(repr(value), 60)}, not an object with {', '.join(NEEDED)}")
    for name in value:
        if name not in FIELDS:
            raise FoveateError(f"unknown field {short(repr(name))}; {did_you_mean(name, FIELDS)}")
    for name in NEEDED:
        if name not in value and not (name == "image" and "video" in value):
            raise FoveateError(f"it lacks {name!r}" + (" or 'video'" if name == "image" else ""))
    if "image" in value and "video" in value:
        raise FoveateError("it has an 'image' and a 'video'; a question is about one of them")
    for name in ("image", "video", "question", "type", "group", "id"):
        if name in value and not (isinstance(value[name], str) and (value[name].strip() or name == "group")):
            raise FoveateError(f"{name!r} is {short(repr(value[name]), 60)}, not a text")
    if value["type"] not in RULES:
        raise FoveateError(f"no scorer fits type {short(repr(value['type']))}; {did_you_mean(value['type'], RULES)}")
    rule, kind = RULES[value["type"]], value["type"]
    options = _texts(value, "options") if "options" in value else ()
    return Question(
        value.get("id", str(number)),
        value.get("image", ""),
        value["question"],
        _answers(_texts(value, "answers"), kind, rule, _checked_options(options, kind, rule)),
        kind,
        options,
        value.get("group", ""),
        value.get("video", ""),
        _fps(value),
    )


def _fps(value: Mapping[str, Any]) -> float | None:
    if "fps" not in value:
        return None
    given = value["fps"]
    if "video" not in value or isinstance(given, bool) or not isinstance(given, int | float):
        raise FoveateError(f"'fps' is {short(repr(given), 60)}; it is a number, of a video that is a folder of frames")
    return float(given)


def _texts(value: Mapping[str, Any], name: str) -> tuple[str, ...]:
    texts = value[name]
    if not isinstance(texts, list) or not texts or not all(isinstance(one, str) for one in texts):
        raise FoveateError(f"{name!r} is {short(repr(texts), 60)}, not a list of texts")
    return tuple(texts)


def _checked_options(options: tuple[str, ...], kind: str, rule: Rule) -> tuple[str, ...]:
    if rule.options and not 2 <= len(options) <= MOST_OPTIONS:
        raise FoveateError(f"type {kind!r} needs 2 to {MOST_OPTIONS} 'options', and it has {len(options)}")
    if options and not rule.options:
        raise FoveateError(f"type {kind!r} takes no 'options'; those that do are choice and circular")
    return options


def _answers(answers: tuple[str, ...], kind: str, rule: Rule, options: Sequence[str]) -> tuple[str, ...]:
    if rule.answers is not None and len(answers) not in rule.answers:
        wanted = "one answer" if len(rule.answers) == 1 else f"answers of {rule.answers[0]} people or more"
        raise FoveateError(f"type {kind!r} needs {wanted}, and it has {len(answers)}")
    closed: Sequence[str] = rule.closed
    if rule.options:
        answers, closed = tuple(answer.strip().upper() for answer in answers), string.ascii_uppercase[: len(options)]
    elif closed:
        answers = tuple(answer.strip().casefold() for answer in answers)
    if closed and answers[0] not in [*closed]:
        raise FoveateError(f"the answer {short(repr(answers[0]))} of type {kind!r} is none of {', '.join(closed)}")
    return answers


def _problem(folder: Path, question: Question) -> str | None:
    """What is wrong with a picture or video, or None; one outside the folder is not looked at."""
    name, kind = question.shown, "video" if question.video else "image"
    try:
        path = checked(folder / name)
        if Path(name).is_absolute() or not all(_inside(folder, one) for one in [path, *_frames(path)]):
            return f"{kind} {short(repr(name))} lies outside the folder; pictures and videos lie in it"
        if question.video:
            if not path.exists():
                return f"there is no video {short(repr(name))}"
            check_torchvision()
            read_header(path, question.fps)
        elif not path.is_file():
            return f"there is no picture {short(repr(name))}"
        else:
            check_image(path)
    except FoveateError as error:
        return str(error)
    return None


def _inside(folder: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _frames(path: Path) -> list[Path]:
    """The frames of a video that is a folder."""
    return sorted(path.iterdir()) if path.is_dir() else []


def _digest(folder: Path, questions: Sequence[Question]) -> str:
    """Of the questions and of the bytes of their pictures or videos: 64 digits."""
    found = hashlib.sha256()
    for question in questions:
        found.update(repr(dataclasses.astuple(question)).encode())
    for name in sorted({question.shown for question in questions}):
        for path in _frames(folder / name) or [folder / name]:
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()
