"""Whether long use leaves traces: a model pruned over and over, and training runs that are killed, resumed and shared.

python benchmarks/soak.py [--cycles N] [--minutes M] [--kills K] [--only PART] [--seed S] [--quick] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import foveate
from foveate import methods
from foveate.core import FoveateError, Method
from foveate.runs import PART, SETTINGS, write_json
from foveate.runtime.seams import CACHE
from foveate.scenes import generator, mini, recipe
from foveate.train.checkpoints import fingerprint, last_checkpoint

Row = dict[str, Any]

TRAINERS = ("mini", "lvpruning")
BUDGETS = (0.05, 0.1, 0.25, 0.5, 16, 64)
QUESTIONS = ("what color is behind the dog ?", "is there a cat ?", "describe the picture .", "how many objects ?")
CLOCKS = ("seconds", "runtime", "per_second")  # parts of the names of figures that no two runs share
REFUSED = 3
NOISE = 150  # megabytes by which what an allocator keeps for later goes up and down


# ---------------------------------------------------------------------------------------------------------------------
# pruning


def loaded() -> tuple[Any, Any]:
    """`mini` and its processor."""
    return (
        AutoModelForImageTextToText.from_pretrained(foveate.MINI).eval(),
        AutoProcessor.from_pretrained(foveate.MINI),
    )


def prompts(processor: Any, rows: int, draw: random.Random) -> Any:
    """Inputs of some rows, each a question about a picture of its own."""
    pictures = generator.generate(rows, seed=draw.randrange(2**30)).pixels
    asked = [[{"type": "image"}, {"type": "text", "text": draw.choice(QUESTIONS)}] for _ in range(rows)]
    talks = [[{"role": "user", "content": content}] for content in asked]
    text = [processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    return processor(images=images, text=text, padding=True, padding_side="left", return_tensors="pt")


def state(model: Any) -> dict[str, Any]:
    """What pruning must leave as it was: every bit of the weights, settings, hooks, attributes and methods."""
    found: dict[str, Any] = {
        "weights": fingerprint(model),
        "configuration": json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        "generation": json.dumps(model.generation_config.to_dict(), sort_keys=True, default=str),
    }
    for name, module in model.named_modules():
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks") and value is not None}
        found[name] = (type(module), module.training, sorted(vars(module)), hooks)
    return found


def memory() -> dict[str, float]:
    """Megabytes that the process has in memory, and the objects and tensors that Python knows of."""
    gc.collect()
    objects = gc.get_objects()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "megabytes": pages * 4096 / 1e6,
        "objects": len(objects),
        "tensors": sum(issubclass(type(one), torch.Tensor) for one in objects),
    }


def varied(method: Method, draw: random.Random) -> Method:
    """The same method with budgets drawn anew; itself where these do not go together."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.name in ("keep", "heavy", "recent", "capacity") and isinstance(value, int | float):
            changes[field.name] = draw.choice(BUDGETS)
        elif field.name == "keep" and isinstance(value, tuple):
            changes["keep"] = tuple(sorted((draw.choice(BUDGETS[:4]) for _ in value), reverse=True))
    try:
        return dataclasses.replace(method, **changes)
    except FoveateError:
        return method


def cycles(count: int, draw: random.Random) -> Row:
    """Pruned, used and released so many times: nothing of the model changes, and nothing stays in memory.

    Memory is compared from the second tenth of the cycles on, when everything has been loaded once.
    """
    model, processor = loaded()
    given = prompts(processor, 1, draw)
    names = methods.names()
    model.generate(**given, max_new_tokens=1)  # a first stock run leaves something of its own
    before, settled = state(model), {}
    for number in range(count):
        if number == max(len(names), count // 10):
            settled = memory()
        method = methods.get(names[number % len(names)]).example(model.config)
        with foveate.prune(model, method, processor=processor) as trace:
            model.generate(**given, max_new_tokens=1)
        assert trace.length <= given["input_ids"].shape[1]
    changed = [name for name, value in state(model).items() if before[name] != value]
    grown = {name: value - settled[name] for name, value in memory().items()} if settled else {}
    held = grown.get("tensors", 0) <= 0 and grown.get("objects", 0) < count / 10
    met = not changed and held and grown.get("megabytes", 0) < NOISE
    return {"figure": f"{count} cycles of prune, generate and stop", "met": met, "changed": changed, "grown": grown}


def trial(model: Any, processor: Any, draw: random.Random) -> str:
    """One random method at random budgets, on a random batch, for one turn or two; what it was."""
    method = varied(methods.get(draw.choice(methods.names())).example(model.config), draw)
    rows, turns, length = draw.randint(1, 3), draw.randint(1, 2), draw.randint(1, 4)
    given = prompts(processor, rows, draw)
    words = processor.tokenizer(draw.choice(QUESTIONS), return_tensors="pt", add_special_tokens=False)["input_ids"]
    settings = {"max_new_tokens": length, "min_new_tokens": length, "return_dict_in_generate": True}
    with foveate.prune(model, method, processor=processor):
        answer = model.generate(**given, **settings)
        if turns == 2:
            ids = torch.cat([answer.sequences, words.expand(rows, -1)], dim=1)
            new = ids.shape[1] - given["attention_mask"].shape[1]
            mask = torch.nn.functional.pad(given["attention_mask"], (0, new), value=1)
            model.generate(input_ids=ids, attention_mask=mask, **{CACHE: answer[CACHE]}, **settings)
    return f"{method} on {rows} rows in {turns} turns"


def at_random(minutes: float, draw: random.Random) -> Row:
    """Random use for so long: in between, the unpruned model answers the same bit by bit."""
    model, processor = loaded()
    given = prompts(processor, 2, draw)
    with torch.no_grad():
        wanted = model(**given).logits
    end = time.monotonic() + 60 * minutes
    refused: Counter[str] = Counter()
    trials, differing = 0, []
    while time.monotonic() < end:
        try:
            what = trial(model, processor, draw)
            trials += 1
        except FoveateError as error:
            what = str(error)
            refused[what] += 1
        with torch.no_grad():
            if not torch.equal(model(**given).logits, wanted):
                differing.append(what)
    return {
        "figure": f"{trials} random uses in {minutes:g} minutes, {refused.total()} refused",
        "met": trials > 0 and not differing,
        "differing": differing,
        "refused": dict(refused.most_common()),
    }


# ---------------------------------------------------------------------------------------------------------------------
# training


def train(kind: str, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    """One sitting of a small training run; the last line that it logs, if there was anything left to do."""
    lines: list[dict[str, Any]] = []
    torch.set_num_threads(1)
    if kind == "mini":
        first = recipe.Phase("ideal", steps // 2, 1e-3, 1e-3, warmup=1)
        phases = [first, recipe.Phase("joint", steps - first.steps, 1e-3, 1e-3)]
        config = mini.llava_config(width=16, layers=2)
        quick = {"batch": 2, "check_steps": 5, "check_pictures": 2, "save_seconds": 0.0, "max_seconds": 3600.0}
        recipe.LOG_STEPS = 3
        recipe.train_mini(folder, phases=phases, config=config, resume=resume, progress=lines.append, **quick)
        return lines[-1] if lines else {}
    from foveate.train.lvpruning import Settings, train_lvpruning
    from foveate.train.scene_questions import SceneQuestions

    model, processor = loaded()
    settings = Settings(
        ratios=(0.3, 0.2, 0.1), rate=1e-4, batch=2, steps=steps, save_steps=2, log_steps=3, visual_share=0.1
    )
    rows = SceneQuestions(model, processor, steps * settings.batch, pool=8)
    train_lvpruning(model, rows, folder, settings, resume=resume, report=lines.append)
    return lines[-1]


def sitting(kind: str, folder: Path, steps: int, anew: bool) -> int:
    """What a process of its own does: say that it begins, train, say the last figures; the exit code."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print("ready", flush=True)
    try:
        last = train(kind, folder, steps, resume=not anew and (folder / SETTINGS).exists())
    except FoveateError as error:
        print(error, flush=True)
        return REFUSED
    print(json.dumps(timeless(last)), flush=True)
    return 0


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    """Figures without those of a clock."""
    return {name: value for name, value in line.items() if not any(clock in name for clock in CLOCKS)}


def begun(kind: str, folder: Path, steps: int, anew: bool = False) -> subprocess.Popen[str]:
    """A process that trains and has loaded everything."""
    command = [sys.executable, __file__, "--sitting", kind, "--folder", str(folder), "--steps", str(steps)]
    process = subprocess.Popen(
        [*command, *(["--anew"] if anew else [])], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    if said != "ready\n":
        raise RuntimeError(f"exit code {process.wait()}: {said}{process.stdout.read()}")
    return process


def ended(process: subprocess.Popen[str]) -> str:
    """The last thing that a process said before it ended well."""
    said = process.communicate()[0].strip().splitlines()
    if process.returncode != 0:
        raise RuntimeError(f"exit code {process.returncode}: " + "\n".join(said))
    return said[-1]


def result(kind: str, folder: Path) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """What a finished run has made, and its log."""
    if kind == "mini":
        log = [timeless(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]
        tensors = load_file(folder / "state.safetensors") | load_file(folder / "mini" / "model.safetensors")
        return tensors, log
    checkpoint = last_checkpoint(folder)
    assert checkpoint is not None
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return load_file(folder / "lvpruning" / "model.safetensors"), [timeless(line) for line in history]


def differences(kind: str, folder: Path, whole: Path) -> list[str]:
    """In what a run that was killed differs from one that was not."""
    (mine, log), (wanted, logged) = result(kind, folder), result(kind, whole)
    found = [*(mine.keys() ^ wanted.keys())]
    found += [name for name in mine.keys() & wanted.keys() if not torch.equal(mine[name], wanted[name])]
    return [*found, *(["the log"] if log != logged else []), *(path.name for path in folder.rglob(f"{PART}*"))]


def killed(kind: str, kills: int, steps: int, draw: random.Random, folder: Path) -> Row:
    """A trainer killed at random moments, and resumed each time, ends as one that was left alone."""
    whole = begun(kind, folder / "whole", steps)
    start = time.monotonic()
    last = ended(whole)
    work = time.monotonic() - start
    left, runs, found = kills, 0, list[str]()
    while left:
        runs += 1
        out = folder / str(runs)
        while True:
            process = begun(kind, out, steps)
            time.sleep(draw.uniform(0, work) if left else 0)
            if not left or process.poll() is not None:
                said = ended(process)
                break
            process.send_signal(signal.SIGKILL)
            process.communicate()
            left -= 1
        found += differences(kind, out, folder / "whole")
        found += [] if said in (last, "{}") else [f"said {said}, not {last}"]
    what = f"train {kind} killed {kills} times in {runs} runs of {work:.0f} s"
    return {"figure": what, "met": not found, "differing": found}


def shared(kind: str, folder: Path) -> Row:
    """While a run is at work in a folder, others are refused there, whether they begin or resume."""
    first = begun(kind, folder, 10**4)
    while not (folder / SETTINGS).exists():
        time.sleep(0.05)
    said = []
    for anew in (False, True):
        other = begun(kind, folder, 10**4, anew)
        said.append((other.wait(), other.communicate()[0].strip()))
    alive = first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    met = alive and all(code == REFUSED for code, _ in said) and "another run is at work" in said[0][1]
    return {"figure": f"two runs of train {kind} in one folder: the second is refused", "met": met, "said": said}


# ---------------------------------------------------------------------------------------------------------------------


def parts(options: argparse.Namespace, folder: Path) -> dict[str, list[Callable[[], Row]]]:
    """Everything that can be run, by its name."""
    draw = random.Random(options.seed)
    steps = {"mini": 12, "lvpruning": 6}
    return {
        "cycles": [lambda: cycles(options.cycles, draw)],
        "random": [lambda: at_random(options.minutes, draw)],
        "kills": [
            lambda kind=kind: killed(kind, options.kills, steps[kind], draw, folder / f"kills-{kind}")  # type: ignore[misc]
            for kind in TRAINERS
        ],
        "folders": [lambda kind=kind: shared(kind, folder / f"shared-{kind}") for kind in TRAINERS],  # type: ignore[misc]
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for, print a line for each part, keep the figures; 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000, help="of prune, generate and stop")
    parser.add_argument("--minutes", type=float, default=15, help="of random use")
    parser.add_argument("--kills", type=int, default=20, help="of each trainer")
    parser.add_argument("--only", choices=["cycles", "random", "kills", "folders"], help="one part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a little of each, to see that it runs")
    parser.add_argument("--out", type=Path, default=None, help="write the figures to this JSON file")
    parser.add_argument("--sitting", choices=TRAINERS, help=argparse.SUPPRESS)  # what the parts start themselves
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--anew", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.sitting:
        return sitting(options.sitting, options.folder, options.steps, options.anew)
    if options.quick:
        options.cycles, options.minutes, options.kills = 80, 0.5, 2
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("error")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, runs in parts(options, Path(folder)).items():
            for run in runs if options.only in (None, name) else ():
                rows.append(run())
                print("holds" if rows[-1]["met"] else "FAILS", rows[-1]["figure"], flush=True)
                for key in rows[-1].keys() - {"figure", "met"}:
                    print(f"      {key}: {rows[-1][key]}", flush=True)
    if options.out is not None:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        write_json(options.out, {**versions, "seed": options.seed, "rows": rows})
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
