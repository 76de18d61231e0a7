"""Questions about videos: answers are those of the stock processor and model, and rivals prune what it is shown."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny, tiny_processors
from PIL import Image

from foveate.core import FoveateError
from foveate.evaluate import folder_rows
from foveate.evaluate.folder_run import answer_folder
from foveate.evaluate.local_task import Folder, read
from foveate.evaluate.scenes_task import parse_rivals
from foveate.evaluate.times import answer_times
from foveate.inference.answers import decode, encode
from foveate.inference.videos import Sampler, read_header

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")

RIVALS = ("fopru:keep=0.5", "fastv:layer=2,keep=0.3")


@pytest.fixture(autouse=True)
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_processors, "backend", "torchvision")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Three questions about two videos of 16 and 8 frames."""
    folder = tmp_path_factory.mktemp("task")
    for name, frames in (("long", 16), ("short", 8)):
        (folder / name).mkdir()
        for number in range(frames):
            Image.effect_noise((32, 24), 40 + number).convert("RGB").save(folder / name / f"{number}.png")
    lines = [
        {"video": "long", "fps": 4, "question": "w7 w8", "answers": ["w3", "w4"], "type": "anls"},
        {"video": "short", "fps": 4, "question": "w9", "answers": ["yes"], "type": "pope"},
        {"video": "long", "fps": 4, "question": "w10", "answers": ["no"], "type": "pope"},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read(folder)


@pytest.mark.parametrize("name", ["qwen3-vl", "qwen2.5-vl", "llava-onevision", "internvl"])
def test_answers_are_those_of_the_stock_processor(name: str, task: Folder, tmp_path: Path) -> None:
    """The whole video goes through the processor, which samples for itself; here it is sampled before."""
    model, processor = tiny.model(name, blocks=6), tiny_processors.WITH_TORCHVISION[name]()
    rivals = {"none": (), **parse_rivals(RIVALS)}
    options: dict[str, Any] = {"name": name, "batch": 2, "max_new_tokens": 4, "out": tmp_path / "run"}
    lines = answer_folder(model, processor, task, rivals, frames=4, **options)
    said = [text for line in lines if line.rival == "none" for text in line.answers]
    expected = []
    for question in task.questions:
        content = [{"type": "video"}, {"type": "text", "text": question.prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        header = read_header(task.path / question.video, 4)
        whole = Sampler(processor, fps=4).clip(header)
        inputs = processor(
            text=[text],
            videos=[[whole.frames]],
            video_metadata=[whole.metadata],
            do_sample_frames=True,
            num_frames=4,
            fps=None,
            return_tensors="pt",
        )
        sampled = encode(model, processor, [[Sampler(processor, frames=4).clip(header)]], [question.prompt])
        assert sampled.keys() == inputs.keys()
        assert all(torch.equal(torch.as_tensor(sampled[key]), torch.as_tensor(inputs[key])) for key in inputs)
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=4)
        expected.append(decode(processor, model, output, inputs["input_ids"].shape[1])[0])
    assert said == expected
    rows = {row["method"]: row for row in folder_rows.rows(lines, task, batch=2)}
    shown = rows["none"]["tokens"]
    assert shown > 0 and shown * 0.4 < rows["fopru:keep=0.5"]["tokens"] < shown * 0.6
    assert rows[[*rivals][-1]]["equivalent_tokens"] < shown
    with pytest.raises(FoveateError, match="frames"):
        answer_folder(model, processor, task, rivals, frames=2, resume=True, **options)


def test_what_videos_do_not_allow_is_refused(task: Folder, tmp_path: Path) -> None:
    rivals = parse_rivals(["fopru:keep=4"])
    options: dict[str, Any] = {"name": "tiny", "out": tmp_path / "run"}
    model = tiny.model("qwen2-vl", blocks=2)
    processor = tiny_processors.WITH_TORCHVISION["qwen2-vl"]()
    with pytest.raises(FoveateError, match="resize:keep=4 scales pictures, and these questions are about videos"):
        answer_folder(model, processor, task, parse_rivals(["resize:keep=4"]), **options)
    _, _, missing = folder_rows.with_baselines(model, processor, rivals, task)
    assert missing == {"resize:keep=4": "resize:keep=4 scales pictures, and these questions are about videos"}
    with pytest.raises(FoveateError, match=r"cannot sample .*short .8 frames at 4 a second.*num_frames=10"):
        answer_folder(model, processor, task, rivals, frames=10, **options)
    pictures = tiny.model()
    with pytest.raises(FoveateError, match=r"videos of llava-1\.5 cannot be pruned; pictures can"):
        answer_folder(pictures, tiny.processor(pictures), task, rivals, **options)
    with pytest.raises(FoveateError, match="reads no videos; ask about pictures"):
        answer_folder(pictures, tiny.processor(pictures), task, {"none": ()}, **options)
    assert not (tmp_path / "run").exists()


def test_videos_are_timed_and_not_mixed_with_pictures(task: Folder) -> None:
    model = tiny.model("qwen2-vl", blocks=2)
    processor = tiny_processors.WITH_TORCHVISION["qwen2-vl"]()
    clip = Sampler(processor, frames=4).clip(read_header(task.path / "short", 4))
    times = answer_times(model, processor, [(clip, "w7")], {"none": (), **parse_rivals(RIVALS)}, max_new_tokens=2)
    assert times.keys() == {"none", *parse_rivals(RIVALS)}
    with pytest.raises(FoveateError, match="pictures and videos cannot be asked about in one batch"):
        encode(model, processor, [[clip], [Image.new("RGB", (32, 24))]], ["w7", "w8"])
