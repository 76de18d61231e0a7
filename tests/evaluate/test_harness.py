"""The model of lmms-eval: its answers are the library's own, in process and from the command line, split or not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny, tiny_processors
from PIL import Image

from foveate import prune
from foveate.core import FoveateError
from foveate.evaluate.scenes_task import draw_samples
from foveate.inference.answers import answer, decode, encode, greedy
from foveate.inference.loading import Loaded, load
from foveate.inference.resizing import Scaler
from foveate.methods.resize import Resize
from foveate.reproduce.tables import FOLDER
from foveate.runtime.limits import room_behind

pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own: make test-eval")

SPEC = "fopru:keep=64"
SAMPLES = 7  # of two processes one has fewer than the other
TASK = """
task: scenes_local
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 8, image_aspect_ratio: pad}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}]
"""
NO_NETWORK = """
import os, socket

NEAR = {None, "", "localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn()}
find, connect = socket.getaddrinfo, socket.socket.connect

calls = open(os.environ["CALLED"], "a")

def refuse(host):
    print(host, file=calls, flush=True)
    raise OSError(f"{host}: the network is closed")

def getaddrinfo(host, *rest, **more):
    return find(host, *rest, **more) if host in NEAR else refuse(host)

def connected(self, address):
    return connect(self, address) if isinstance(address, str) or address[0] in NEAR else refuse(address)

socket.getaddrinfo, socket.socket.connect = getaddrinfo, connected
"""
"""What every process of a command line runs first."""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of lmms-eval: questions about scenes, pictures inside a Parquet file."""
    import datasets

    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"image": one.image, "question": one.question, "answer": one.answer} for one in drawn()]
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "scenes.parquet"))
    (folder / "pictures.py").write_text("def visual(doc):\n    return [doc['image'].convert('RGB')]\n")
    (folder / "scenes_local.yaml").write_text(TASK.format(data=folder / "scenes.parquet"))
    return folder


def drawn() -> list[Any]:
    """Questions of one word each."""
    return [one for one in draw_samples(20, seed=3) if one.kind != "describe"][:SAMPLES]


@pytest.fixture(scope="module")
def mini() -> Loaded:
    return load("mini", device="cpu", dtype="float32")  # in bfloat16 a batch may answer otherwise where two are near


@pytest.fixture(scope="module")
def expected(mini: Loaded) -> dict[str, list[str]]:
    """What the library answers, each question by itself."""
    handle = prune(mini.model, SPEC)

    def asked(one: Any) -> str:
        return answer(mini.model, mini.processor, [one.image], [one.question], max_new_tokens=8)[0]

    plain = [asked(one) for one in drawn()]
    with handle:
        pruned = [asked(one) for one in drawn()]
    assert pruned != plain  # else these questions tell nothing
    return {"none": plain, SPEC: pruned}


def share(answers: list[str]) -> float:
    """How many are right."""
    return sum(said.lower() == one.answer.lower() for said, one in zip(answers, drawn(), strict=True)) / SAMPLES


def evaluated(task: Path, arguments: str, **more: Any) -> Any:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task), include_defaults=False)
    settings = {"batch_size": 3, "device": "cpu", "bootstrap_iters": 0, **more}
    return simple_evaluate("foveate", arguments, tasks=["scenes_local"], task_manager=manager, **settings)


@pytest.mark.parametrize(
    ("arguments", "spec"),
    [
        ("pretrained=mini,dtype=float32", "none"),
        (f"pretrained=mini,dtype=float32,prune={SPEC}", SPEC),
        ("dtype=float32,prune='fopru:strategy=rank,keep=64'", SPEC),
    ],
)
def test_answers_are_the_library_s_own(task: Path, expected: Any, arguments: str, spec: str) -> None:
    found = evaluated(task, arguments, log_samples=True)
    samples = sorted(found["samples"]["scenes_local"], key=lambda one: one["doc_id"])
    assert [one["filtered_resps"][0] for one in samples] == expected[spec]
    assert found["results"]["scenes_local"]["exact_match,none"] == pytest.approx(share(expected[spec]))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_line(task: Path, expected: Any, tmp_path: Path, processes: int) -> None:
    """lmms-eval's own, as one process and as two that share the questions, without a network."""
    launch = ["-m", "lmms_eval"]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *launch]
    options = ["--model", "foveate", "--model_args", f"pretrained=mini,dtype=float32,prune={SPEC}", "--device", "cpu"]
    options += ["--tasks", "scenes_local", "--include_path", str(task), "--batch_size", "2", "--log_samples"]
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "sitecustomize.py").write_text(NO_NETWORK)
    path = os.pathsep.join([str(tmp_path / "first"), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": path}
    command = [sys.executable, *launch, *options, "--output_path", str(tmp_path / "out")]
    called = tmp_path / "called"
    environment = {**os.environ, **quiet, "CALLED": str(called)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    assert called.read_text() == ""
    assert run.stdout.count("576 -> 64 visual tokens a picture") == processes, run.stdout + run.stderr
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["scenes_local"]["exact_match,none"] == pytest.approx(
        share(expected[SPEC])
    )
    (samples,) = (tmp_path / "out").rglob("*_samples_scenes_local.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert sorted(line["doc_id"] for line in lines) == [*range(SAMPLES)]
    lines.sort(key=lambda line: line["doc_id"])
    assert [line["filtered_resps"] for line in lines] == expected[SPEC]


# ---------------------------------------------------------------------------------------------------------------------
# by itself


def model(**settings: Any) -> Any:
    from foveate.evaluate.harness import Foveate

    return Foveate(device="cpu", **{"dtype": "float32", **settings})


def asking(one: Any, docs: list[Any], settings: dict[str, Any] | None = None) -> list[Any]:
    """One request for each doc, which is the parts of its message or a function that makes them."""
    from lmms_eval.api.instance import Instance

    def messages(doc: Any) -> Any:
        return [{"role": "user", "content": doc() if isinstance(doc, Callable) else doc}]

    one.task_dict = {"t": {"test": docs}}
    about = {"task": "t", "repeats": 1}
    return [
        Instance("generate_until", ("", messages, settings or {}, number, "t", "test"), 0, {**about, "doc_id": number})
        for number in range(len(docs))
    ]


def seen(picture: Any) -> dict[str, Any]:
    return {"type": "image", "url": picture}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def test_prompts_of_any_number_of_pictures_are_answered_in_their_order(mini: Loaded, tmp_path: Path) -> None:
    """None and one, also as a path, mixed in one run; stock `generate()` is asked one by one."""
    first, second = drawn()[:2]
    second.image.save(tmp_path / "second.png")
    words = "what color is the circle?"
    docs = [
        [seen(first.image), said(first.question)],
        words,
        [seen(str(tmp_path / "second.png")), said(second.question)],
        [said(words)],
    ]
    one = model(prune=SPEC, batch_size=2)
    found = one.generate_until(asking(one, docs, {"max_new_tokens": 6}))
    pictures = [[first.image], [], [second.image], []]
    questions = [first.question, words, second.question, words]
    text = mini.processor.apply_chat_template([{"role": "user", "content": [said(words)]}], add_generation_prompt=True)
    handle = prune(mini.model, SPEC)
    for each, images, question in zip(found, pictures, questions, strict=True):
        if images:
            inputs = encode(mini.model, mini.processor, [images], [question])
            with handle:
                output = greedy(mini.model, inputs, max_new_tokens=6)
        else:
            start = mini.processor.tokenizer.bos_token
            inputs = mini.processor.tokenizer(text, add_special_tokens=not text.startswith(start), return_tensors="pt")
            with torch.inference_mode():
                output = mini.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        length = inputs["input_ids"].shape[1]
        assert each.text == decode(mini.processor, mini.model, output, length)[0]
    assert (one.spent.pictures, one.spent.before, one.spent.after) == (2, 2 * 576, 2 * 64)


def test_a_prompt_holds_its_pictures_in_their_order() -> None:
    first, second = (Image.new("RGB", (32, 32), name) for name in ("red", "blue"))
    one = model()
    (request,) = asking(one, [[said("between"), seen(first), said("and"), seen(second), said("?")]])
    prompt = one._prompt(0, request)
    assert (prompt.images, prompt.text.count("<image>")) == ([first, second], 2)
    assert (
        prompt.text.split() == "<bos> <image> <image> USER between and ? ASSISTANT".split()
    )  # as mini's template has it


def test_pictures_are_scaled_down_where_that_is_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.evaluate import harness

    tiny_one = Loaded("tiny", tiny.model("qwen2.5-vl"), tiny_processors.PROCESSORS["qwen2.5-vl"]())
    monkeypatch.setattr(harness, "load", lambda *given, **more: tiny_one)
    pictures = [Image.effect_noise((44, 30), 60).convert("RGB"), Image.effect_noise((60, 24), 90).convert("RGB")]
    one = model(prune="resize:keep=0.6", batch_size=2)
    found = one.generate_until(asking(one, [[seen(each), said("w7 w8")] for each in pictures], {"max_new_tokens": 5}))
    scaler = Scaler(tiny_one.model, tiny_one.processor, Resize(keep=0.6))
    for each, picture in zip(found, pictures, strict=True):
        inputs = scaler.encode([[picture]], ["w7 w8"])
        output = greedy(tiny_one.model, inputs, max_new_tokens=5)
        assert each.text == decode(tiny_one.processor, tiny_one.model, output, inputs["input_ids"].shape[1])[0]
        assert scaler.scaled(picture).size != picture.size


def test_pictures_are_opened_when_their_turn_comes() -> None:
    """A benchmark has more of them than memory holds."""
    opened: list[int] = []

    def doc(number: int) -> Callable[[], list[Any]]:
        def parts() -> list[Any]:
            opened.append(number)
            return [seen(Image.new("RGB", (32, 32))), said("what is there?")]

        return parts

    one = model(batch_size=2)
    counted: list[int] = []
    answers = one._answers

    def counting(batch: Any) -> Any:
        counted.append(len(opened))
        return answers(batch)

    one._answers = counting
    one.generate_until(asking(one, [doc(number) for number in range(5)], {"max_new_tokens": 1}))
    assert (counted, opened) == ([2, 4, 5], [0, 1, 2, 3, 4])


def test_what_a_task_says_of_its_answers_is_done() -> None:
    one = model(prune="none", max_new_tokens=5)
    plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
    assert one._settings({}) == {**plain, "max_new_tokens": 5, "until": ()}
    assert one._settings({"temperature": 0, "top_p": None, "num_beams": 3, "until": "."}) == {
        **plain, "num_beams": 3, "max_new_tokens": 5, "until": (".",),
    }  # fmt: skip
    warm = one._settings({"temperature": 0.7, "top_p": 0.9, "do_sample": True, "max_new_tokens": 9})
    assert (warm["do_sample"], warm["temperature"], warm["top_p"], warm["max_new_tokens"]) == (True, 0.7, 0.9, 9)
    assert one._settings({"temperature": 0.7, "do_sample": False})["do_sample"] is False


def test_an_answer_ends_with_the_context(mini: Loaded) -> None:
    """One task of the papers lets answers be as long as the context of their models."""
    one, sample = model(), drawn()[0]
    inputs = encode(mini.model, mini.processor, [[sample.image]], [sample.question])
    room = room_behind(mini.model, inputs)
    assert (one._room(inputs, room), one._room(inputs, room + 1), one._room(inputs, 10**6)) == (room, room, room)
    (found,) = one.generate_until(asking(one, [[seen(sample.image), said(sample.question)]], {"max_new_tokens": 10**6}))
    assert found.text == answer(mini.model, mini.processor, [sample.image], [sample.question])[0]


def test_an_answer_ends_at_the_first_of_the_texts_that_end_it() -> None:
    from foveate.evaluate.harness import _cut

    assert _cut("one. two\n\nthree", ("\n\n", ".")) == "one"
    assert _cut("one", ("\n\n", "")) == "one"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prune=fopruu:keep=64", "unknown method 'fopruu'; did you mean 'fopru'"),
        ("prune=fopru:kep=64", "kep"),
        ("prune=resize:keep=9+fopru", "give resize:keep=9 alone"),
        ("prun=fopru:keep=64", "unknown argument 'prun'; did you mean 'prune'"),
        ("prune=fastv:layer=2,keep=64", "unknown argument 'keep'.* stands in quotes: prune='fastv:layer=2,keep=64'"),
        ("max_new_tokens=0", "max_new_tokens=0 is no number of at least 1"),
        ("dtype=float", "unknown dtype 'float'; did you mean 'float32'"),
        ("pretrained=no/where/at all", "no hub id"),
    ],
)
def test_wrong_arguments_are_refused_before_a_model_is_loaded(
    task: Path, arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.inference import loading

    def loaded(*given: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "_weights", loaded)
    monkeypatch.setattr(loading, "_config", loaded)
    with pytest.raises(FoveateError, match=message):
        evaluated(task, arguments)


def test_sizes_that_do_not_fit_are_refused(task: Path) -> None:
    with pytest.raises(FoveateError, match="batch_size='auto' is no number of at least 1"):
        evaluated(task, "pretrained=mini", batch_size="auto")
    with pytest.raises(FoveateError, match="keep=640"):
        evaluated(task, "pretrained=mini,prune=fopru:keep=640")
    with pytest.raises(FoveateError, match="makes as many tokens of a small one"):
        evaluated(task, "pretrained=mini,prune=resize:keep=64")


def test_processes_on_another_device_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.evaluate import harness

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(harness, "find_device", lambda name: torch.device("mps"))
    monkeypatch.setattr("accelerate.Accelerator", lambda: type("Cpu", (), {"device": torch.device("cpu")}))
    with pytest.raises(FoveateError, match="device='cpu', but the processes of this run work on cpu; name that"):
        model()


def test_requests_that_are_not_answered_are_refused() -> None:
    one = model()
    video, mark = asking(one, [[{"type": "video", "url": "a.mp4"}], [said("a <image> b")]])
    with pytest.raises(FoveateError, match="question 0 of t holds a video; pictures are answered"):
        one.generate_until([video])
    with pytest.raises(FoveateError, match="question 1 of t holds '<image>'"):
        one.generate_until([mark])
    with pytest.raises(FoveateError, match="a task gave 3 as a picture"):
        one.generate_until(asking(one, [[seen(3), said("?")]]))
    with pytest.raises(FoveateError, match="tasks that compare likelihoods"):
        one.loglikelihood([])
    with pytest.raises(FoveateError, match="tasks of several rounds"):
        one.generate_until_multi_round([])


def test_every_task_that_the_documentation_names_is_there() -> None:
    from lmms_eval.tasks import TaskManager

    page = (Path(__file__).parents[2] / "docs" / "evaluating.md").read_text(encoding="utf-8")
    names = set(re.findall(r"^\| [^|]+ \| `(\w+)` \|", page, flags=re.MULTILINE))
    assert len(names) == len(tomllib.loads((FOLDER / "benchmarks.toml").read_text(encoding="utf-8"))["data"])
    assert names - {*TaskManager("ERROR").all_tasks} == set()
