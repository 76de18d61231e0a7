"""Questions of a local folder: what a line may hold, and that each bad one is named by its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.core import FoveateError
from foveate.evaluate import local_task
from foveate.evaluate.local_task import ASK_FOR_LETTER, read, turns

LINE = {"image": "a.png", "question": "what is it ?", "answers": ["dog"], "type": "exact"}
VIDEO = {"video": "clip", "fps": 2, "question": "what moves ?", "answers": ["dog"], "type": "exact"}
CHOICE = {**LINE, "answers": ["b"], "type": "choice", "options": ["cat", "dog", "moon"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "task"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (8, 6), "red").save(folder / "a.png")
    Image.new("RGB", (8, 6), "blue").save(folder / "images" / "b.jpg")
    Image.new("RGB", (8, 6), "green").save(tmp_path / "outside.png")
    return folder


@pytest.fixture
def clips(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder with frames of a video, where videos can be read."""
    monkeypatch.setattr(local_task, "check_torchvision", lambda: None)
    (folder / "clip").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(folder / "clip" / f"{number}.png")
    return folder


def write(folder: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "questions.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return folder


def test_lines_become_questions(folder: Path) -> None:
    other = {**LINE, "image": "images/b.jpg", "answers": ["Yes "], "type": "pope", "group": "random", "id": "second"}
    found = read(write(folder, LINE, "", other, CHOICE)).questions
    assert [question.id for question in found] == ["1", "second", "4"], "its own, else the number of the line"
    assert [question.answers for question in found] == [("dog",), ("yes",), ("B",)]
    assert [question.group for question in found] == ["", "random", ""]
    assert found[0].prompt == "what is it ?"
    assert found[2].prompt == f"what is it ?\nA. cat\nB. dog\nC. moon\n{ASK_FOR_LETTER}"


def test_the_first_questions_alone(folder: Path) -> None:
    write(folder, LINE, CHOICE, LINE)
    assert [question.id for question in read(folder, 2).questions] == ["1", "2"]


def test_a_circular_question_is_asked_once_for_each_turn(folder: Path) -> None:
    (question,) = read(write(folder, {**CHOICE, "type": "circular"})).questions
    asked = turns(question)
    assert [one.options for one in asked] == [("cat", "dog", "moon"), ("dog", "moon", "cat"), ("moon", "cat", "dog")]
    assert [one.answers for one in asked] == [("B",), ("A",), ("C",)]
    assert [one.options["ABC".index(one.answers[0])] for one in asked] == ["dog"] * 3
    assert {one.id for one in asked} == {"1"}
    assert turns(read(write(folder, CHOICE)).questions[0]) == [*read(folder).questions]


def test_the_digest_is_of_questions_and_pictures(folder: Path) -> None:
    first = read(write(folder, LINE, CHOICE)).digest
    assert read(folder).digest == first
    assert read(folder, 1).digest != first
    assert read(write(folder, CHOICE, LINE)).digest != first
    write(folder, LINE, CHOICE)
    Image.new("RGB", (8, 6), "yellow").save(folder / "a.png")
    assert read(folder).digest != first


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": ', "it is no JSON"),
        ("[1]", "it holds [1], not an object with image, question, answers, type"),
        ({**LINE, "anwsers": []}, "unknown field 'anwsers'; did you mean 'answers'"),
        ({"image": "a.png", "question": "?", "type": "exact"}, "it lacks 'answers'"),
        ({**LINE, "question": " "}, "'question' is ' ', not a text"),
        ({**LINE, "image": 3}, "'image' is 3, not a text"),
        ({**LINE, "answers": "dog"}, "'answers' is 'dog', not a list of texts"),
        ({**LINE, "answers": [1]}, "'answers' is [1], not a list of texts"),
        ({**LINE, "answers": []}, "'answers' is [], not a list of texts"),
        ({**LINE, "type": "gqa"}, "no scorer fits type 'gqa'; did you mean 'vqa'? Choices: anls"),
        ({**LINE, "type": "pope"}, "the answer 'dog' of type 'pope' is none of yes, no"),
        ({**LINE, "type": "pope", "answers": ["yes", "no"]}, "type 'pope' needs one answer, and it has 2"),
        ({**LINE, "type": "vqa"}, "type 'vqa' needs answers of 4 people or more, and it has 1"),
        ({**LINE, "type": "choice"}, "type 'choice' needs 2 to 26 'options', and it has 0"),
        ({**CHOICE, "answers": ["D"]}, "the answer 'D' of type 'choice' is none of A, B, C"),
        ({**CHOICE, "type": "exact"}, "type 'exact' takes no 'options'"),
        ({**LINE, "image": "gone.png"}, "there is no picture 'gone.png'"),
        ({**LINE, "image": "images"}, "there is no picture 'images'"),
        ({**LINE, "image": "../outside.png"}, "image '../outside.png' lies outside the folder"),
        ({**LINE, "image": "/etc/hostname"}, "image '/etc/hostname' lies outside the folder"),
        ({**LINE, "image": "link.png"}, "image 'link.png' lies outside the folder"),
        ({**LINE, "image": "questions.jsonl"}, "is no picture that can be decoded"),
        ({**LINE, "image": "a\0.png"}, "holds a NUL character"),
        ({**LINE, "id": "1"}, "id '1' is that of line 1 too"),
    ],
)
def test_a_bad_line_is_named_by_its_number(folder: Path, line: Any, message: str) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    with pytest.raises(FoveateError) as error:
        read(write(folder, LINE, line, LINE), 1)  # also where it would not be asked
    file = folder / "questions.jsonl"
    assert str(error.value).startswith(f"{file} cannot be asked:\nline 2: ")
    assert message in str(error.value)
    assert "line 3" not in str(error.value)


def test_lines_may_be_about_videos(clips: Path) -> None:
    found = read(write(clips, VIDEO, {**VIDEO, "fps": 0.5}))
    assert found.videos and [(one.image, one.video, one.fps) for one in found.questions] == [
        ("", "clip", 2.0),
        ("", "clip", 0.5),
    ]
    Image.new("RGB", (8, 6), "red").save(clips / "clip" / "2.png")
    assert read(clips).digest != found.digest, "a frame is another"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**VIDEO, "image": "a.png"}, "it has an 'image' and a 'video'; a question is about one of them"),
        ({key: value for key, value in VIDEO.items() if key != "video"}, "it lacks 'image' or 'video'"),
        ({**VIDEO, "video": ""}, "'video' is '', not a text"),
        ({**VIDEO, "fps": True}, "'fps' is True; it is a number, of a video that is a folder of frames"),
        ({**LINE, "fps": 2}, "'fps' is 2; it is a number, of a video"),
        ({key: value for key, value in VIDEO.items() if key != "fps"}, "nothing says how many a second has; give fps"),
        ({**VIDEO, "fps": 0}, "fps=0 shows nothing"),
        ({**VIDEO, "video": "gone.mp4"}, "there is no video 'gone.mp4'"),
        ({**VIDEO, "video": "../clip"}, "video '../clip' lies outside the folder"),
        ({**VIDEO, "video": "linked"}, "video 'linked' lies outside the folder"),
        ({**VIDEO, "video": "a.png"}, "fps=2 is of a folder of frames; "),
        (LINE, "it is about a picture, and line 1 about a video; split them"),
    ],
)
def test_a_bad_line_about_a_video_is_named(clips: Path, line: Any, message: str) -> None:
    (clips / "linked").mkdir()
    (clips / "linked" / "1.png").symlink_to(clips.parent / "outside.png")
    with pytest.raises(FoveateError) as error:
        read(write(clips, VIDEO, line))
    assert str(error.value).startswith(f"{clips / 'questions.jsonl'} cannot be asked:\nline 2: ")
    assert message in str(error.value)


def test_videos_that_nothing_here_reads_are_named(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FoveateError, match="line 1: processors read videos through torchvision, which is missing"):
        read(write(clips, VIDEO))


def test_many_bad_lines_are_named_together(folder: Path) -> None:
    with pytest.raises(FoveateError) as error:
        read(write(folder, *["{"] * 23))
    named = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in named[1:-1]] == [f"line {number}" for number in range(1, 21)]
    assert named[-1] == "... and 3 lines more"


def test_files_that_hold_no_questions_are_refused(folder: Path) -> None:
    with pytest.raises(FoveateError, match=r"holds no questions\.jsonl; a task is a folder"):
        read(folder)
    with pytest.raises(FoveateError, match="holds no question; write one JSON object a line"):
        read(write(folder, "", " "))
    (folder / "questions.jsonl").write_bytes(b'{"image": "\xff"}\n')
    with pytest.raises(FoveateError, match="line 1: it is no UTF-8"):
        read(folder)
    (folder / "questions.jsonl").write_bytes(b" " * 2_000_000)
    with pytest.raises(FoveateError, match="line 1: it has more than 1000000 bytes"):
        read(folder)
