"""Training from end to end on a tiny model: what it leaves, how it goes on after a kill, and when it refuses to."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from models.training_rows import Dying, Few, Killed
from models.untouched import untouched
from safetensors.torch import load_file

import foveate
from foveate.core import FoveateError
from foveate.modules.lvpruning import for_model, load
from foveate.runs import hold
from foveate.train.checkpoints import last_checkpoint
from foveate.train.conversations import Row
from foveate.train.held_out import Examiner, HeldOut
from foveate.train.lvpruning import Settings, train_lvpruning
from foveate.train.softened import Softened

TESTS = Path(__file__).parents[1]
SETTINGS = Settings(
    ratios=(0.5, 0.3, 0.1), rate=1e-3, batch=4, micro=2, steps=6, bf16=False, save_steps=2, log_steps=1, seed=3
)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "lvpruning" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """One uninterrupted run and the lines of its log."""
    out, lines = tmp_path_factory.mktemp("run") / "whole", list[dict[str, Any]]()
    model = tiny.model()
    with untouched(model):
        folder = train_lvpruning(model, Few(), out, SETTINGS, name="tiny", report=lines.append, card="# Card\n")
    assert folder == out / "lvpruning"
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    return out, lines


def test_a_run_leaves_modules_that_prune(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    out, _ = finished
    modules = load(out / "lvpruning")
    assert (modules.config.base_name, list(modules.config.layers)) == ("tiny", [1, 2, 3])
    before = for_model(tiny.model().config, layers=(1, 2, 3), seed=3).state_dict()
    for name in [name for name in before if name.endswith("query.weight")]:
        assert not torch.equal(modules.state_dict()[name], before[name].bfloat16()), name
    assert (out / "lvpruning" / "README.md").read_text() == "# Card\n"
    model = tiny.model()
    method = foveate.LVPruning.from_pretrained(str(out / "lvpruning"), keep=(9, 5, 2))
    with foveate.prune(model, method) as trace:
        model.generate(**tiny.inputs(model, "3i4"), max_new_tokens=1)
    assert trace.images[0].after == 2
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_the_log_has_both_losses_and_every_share(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    out, lines = finished
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line in steps:
        assert line["loss"] == pytest.approx(line["causal"] + 2.0 * line["ratio"], rel=1e-4)
        assert 1 >= line["kept_1"] >= line["kept_2"] >= line["kept_3"] >= 0
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    scalars = {f"train/{name}" for name in ("causal", "ratio", "kept_1", "kept_2", "kept_3", "learning_rate")}
    assert scalars <= set(board.Tags()["scalars"])
    assert [event.value for event in board.Scalars("train/kept_2")] == pytest.approx([s["kept_2"] for s in steps])


def test_the_rate_rises_and_then_falls_as_a_cosine(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    rates = [line["learning_rate"] for line in finished[1] if "loss" in line]
    assert rates[:2] == [0.0, pytest.approx(1e-3)], "one step of warm-up"
    assert rates[2:] == pytest.approx([5e-4 * (1 + math.cos(math.pi * step / 5)) for step in range(1, 5)])


def test_a_stopped_run_goes_on_as_if_it_had_not(finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_lvpruning(tiny.model(), Few(), out, SETTINGS, name="tiny", max_seconds=1e-9)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not same(out, finished[0])
    with hold(out), pytest.raises(FoveateError, match="another run is at work in"):
        train_lvpruning(tiny.model(), Few(), out, SETTINGS, name="tiny", resume=True)
    train_lvpruning(tiny.model(), Few(), out, SETTINGS, name="tiny", resume=True)
    assert same(out, finished[0])


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    """Lines after four steps, checkpoints after two: a run that dies in the fifth step goes on in the middle of a line,
    one that dies in the third as well, and the last line is about all six."""
    settings = dataclasses.replace(SETTINGS, log_steps=4)

    def run(name: str, rows: Few, resume: bool = False) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        train_lvpruning(tiny.model(), rows, tmp_path / name, settings, resume=resume, report=lines.append)
        return lines

    whole = run("whole", Few())
    assert [line["step"] for line in whole] == [4, 6]
    first = lines_of_steps(tmp_path / "whole", 4, settings)
    assert whole[0]["loss"] == pytest.approx(first, rel=1e-5)
    timed = {name for name in whole[1] if "second" in name or "runtime" in name}
    assert len(timed) == 4
    for rows in (11, 18):
        with pytest.raises(Killed):
            run(str(rows), Dying(rows))
        earlier = json.loads((last_checkpoint(tmp_path / str(rows)) / "figures.json").read_text())["seconds"]
        resumed = run(str(rows), Few(), resume=True)
        assert [line["step"] for line in resumed][-1] == 6 and resumed[-1]["seconds"] > earlier
        for line, expected in zip(reversed(resumed), reversed(whole), strict=False):
            assert {name: line[name] for name in line.keys() - timed} == {
                name: expected[name] for name in expected.keys() - timed
            }
        speed = resumed[-1]
        assert speed["train_samples_per_second"] == pytest.approx(6 * 4 / speed["train_runtime"], abs=1e-3)
        shutil.rmtree(tmp_path / str(rows))


def lines_of_steps(run: Path, steps: int, settings: Settings) -> float:
    """The mean loss of the first steps, each of which another run logs by itself."""
    lines: list[dict[str, Any]] = []
    each = dataclasses.replace(settings, log_steps=1)
    train_lvpruning(tiny.model(), Few(), run.with_name("each"), each, report=lines.append)
    return sum(line["loss"] for line in lines[:steps]) / steps


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not(finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import torch; from models import tiny; torch.set_num_threads(1)\n"
        "from test_train_lvpruning import *\n"
        "train_lvpruning(tiny.model(), Few(pause=0.1), sys.argv[3], SETTINGS, name='tiny')"
    )
    run = subprocess.Popen([sys.executable, "-c", code, str(TESTS), str(Path(__file__).parent), str(out)])
    waiting = time.monotonic() + 120
    while not (out / "checkpoint-2" / "trainer_state.json").exists() and time.monotonic() < waiting:
        assert run.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)  # into the third step
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not (out / "lvpruning").exists()
    train_lvpruning(tiny.model(), Few(), out, SETTINGS, name="tiny", resume=True)
    assert same(out, finished[0])


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_names_the_checkpoint_and_leaves_no_half_of_it(
    file: str, finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    whole = last_checkpoint(finished[0])
    assert whole is not None
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "run"
    resource.setrlimit(resource.RLIMIT_FSIZE, ((whole / file).stat().st_size // 10 * 9, before[1]))
    try:
        with pytest.raises(
            FoveateError, match=r"run/checkpoint-\d+ cannot be written: .*(File too large|no room left)"
        ):
            train_lvpruning(tiny.model(), Few(), out, SETTINGS, name="tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(out.glob("checkpoint-*")) and not (out / "lvpruning").exists()
    train_lvpruning(tiny.model(), Few(), out, SETTINGS, name="tiny", resume=True)
    assert same(out, finished[0])


def test_a_run_does_not_go_on_with_anything_else(finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    out = finished[0]
    cases: list[tuple[Any, Any, Settings, str]] = [
        (tiny.model(), Few(), dataclasses.replace(SETTINGS, ratios=(0.5, 0.4, 0.1)), r"begun with ratios=\[0.5, 0.3"),
        (tiny.model(), Few(), dataclasses.replace(SETTINGS, ratio_loss="huber"), "begun with ratio_loss='mse'"),
        (tiny.model(seed=1), Few(), SETTINGS, "begun with model="),
        (tiny.model(), Few(seed=1), SETTINGS, "begun with data="),
    ]
    for model, rows, settings, message in cases:
        with pytest.raises(FoveateError, match=message):
            train_lvpruning(model, rows, out, settings, resume=True)
    with pytest.raises(FoveateError, match="already holds a run"):
        train_lvpruning(tiny.model(), Few(), out, SETTINGS)
    with pytest.raises(FoveateError, match="holds no run to go on with"):
        train_lvpruning(tiny.model(), Few(), tmp_path / "none", SETTINGS, resume=True)


def test_rows_of_one_step_may_come_in_parts(finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Noise differs with the parts, so only the bookkeeping is the same."""
    lines: list[dict[str, Any]] = []
    settings = dataclasses.replace(SETTINGS, micro=None, steps=2, checkpointing=True, bf16=True, visual_share=0.5)
    train_lvpruning(tiny.model(), Few(), tmp_path / "run", settings, report=lines.append)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 0.0}, "rate=0.0 is not above 0"),
        ({"batch": 0}, "batch=0 is not above 0"),
        ({"micro": 0}, "micro=0 is below 1"),
        ({"ratio_weight": -1.0}, "ratio_weight=-1.0 is below 0"),
        ({"warmup": 1.0}, r"warmup=1.0 is no share in \[0, 1\)"),
        ({"ratios": (0.5, 0.3)}, r"2 ratios \(0.5, 0.3\) for 3 layers \(1, 8, 16\)"),
        ({"ratios": (0.1, 0.3, 0.5)}, "does not come back"),
        ({"ratios": (1.5, 0.3, 0.1)}, "are not all shares"),
        ({"ratio_loss": "mae"}, "ratio_loss='mae' is not among its choices"),
        ({"visual_share": 0.0}, "visual_share=0.0 is no share"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        dataclasses.replace(SETTINGS, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 5}, "batch=5 cannot be split over 1 processes of 2 rows at once; nearest: batch=4"),
        ({"batch": 64, "micro": None}, "batch=64, but there are 40 rows; the most is batch=40"),
        ({"layers": (1, 2, 4)}, r"layer=4 is outside 1\.\.3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=message):
        train_lvpruning(tiny.model(), Few(), tmp_path / "run", dataclasses.replace(SETTINGS, **change))


def test_the_defaults_are_the_papers() -> None:
    made = Settings()
    assert made.depths(32) == (1, 8, 16) and made.depths(6) == (1, 2, 3)
    stated = {"ratios": (0.5, 0.3, 0.1), "rate": 2e-6, "batch": 64, "epochs": 1, "warmup": 0.03, "decay": 0.0}
    stated |= {"clip": 1.0, "causal_weight": 1.0, "ratio_weight": 2.0, "temperature": 1.0, "decision_clip": None}
    assert {name: getattr(made, name) for name in stated} == stated
    assert not made.answers and (made.visual_share, made.anneal) == (1.0, 0.0)
    assert made.targets(0.0) == made.targets(1.0) == (0.5, 0.3, 0.1)


def test_annealed_targets_fall_from_everything_to_the_ratios(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, anneal=0.5, rate=1e-6)
    assert settings.targets(0.0) == (1.0, 1.0, 1.0)
    assert settings.targets(0.25) == pytest.approx((0.75, 0.65, 0.55))
    assert settings.targets(0.5) == settings.targets(0.9) == (0.5, 0.3, 0.1)
    lines: list[dict[str, Any]] = []
    folder = train_lvpruning(tiny.model(), Few(), tmp_path / "run", settings, report=lines.append)
    card = (folder / "README.md").read_text()
    assert "6 steps of 4 rows (few)" in card and "- anneal: 0.5 (by default 0.0)" in card
    assert lines[0]["kept_1"] == pytest.approx(0.9, abs=0.1), "the modules begin by keeping most"
    kept = [sum((1 - line[f"kept_{stage}"]) ** 2 for stage in (1, 2, 3)) / 3 for line in lines[:1]]
    assert lines[0]["ratio"] == pytest.approx(kept[0], abs=0.02), "and aim at everything"


# ---------------------------------------------------------------------------------------------------------------------
# several processes


@pytest.mark.slow
def test_two_processes_train_one_set_of_modules(tmp_path: Path) -> None:
    """The step of both is that of one process on all rows, where no noise is drawn."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "import torch; from models import tiny; torch.set_num_threads(1)\n"
        "from test_train_lvpruning import *\n"
        "from foveate.train import softened\n"
        "softened.decide = lambda scores, *_: scores.softmax(dim=-1)[..., 0]\n"
        "settings = dataclasses.replace(SETTINGS, micro=1, steps=2)\n"
        "train_lvpruning(tiny.model(), Few(), sys.argv[3], settings, name='tiny')\n"
    )
    folders = [str(TESTS), str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = command if processes > 1 else [sys.executable]
        run = subprocess.run(
            [*command, str(script), *folders, str(tmp_path / str(processes))],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        found.append(weights(tmp_path / str(processes)))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name].float(), value.float(), atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_may_be_of_either_dtype(dtype: torch.dtype, bf16: bool, tmp_path: Path) -> None:
    """What the modules read is cast to what they are, and what is learned is in their own 32 bits either way."""
    lines: list[dict[str, Any]] = []
    told: list[str] = []
    settings = dataclasses.replace(SETTINGS, micro=None, steps=1, bf16=bf16)
    model = tiny.model().to(dtype)
    train_lvpruning(model, Few(), tmp_path / "run", settings, report=lines.append, tell=told.append)
    assert model.dtype == dtype
    assert lines[0]["causal"] == pytest.approx(6.4, abs=1.0) and lines[0]["grad_norm"] > 0
    state = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    (line,) = told
    assert line.startswith("4 rows at once, 1 times a step, blocks kept: ")
    assert line.endswith(f"by arithmetic for rows of {tiny.TOKENS} visual tokens and 12 others")


def test_noise_depends_on_the_step_and_not_on_the_random_state() -> None:
    model = tiny.model()
    row = Few()[0]
    batch = dict(input_ids=row.ids[None], attention_mask=torch.ones_like(row.ids)[None], labels=row.labels[None])
    made = Softened(model, for_model(model.config, layers=(1, 2, 3)), (0.5, 0.3, 0.1))
    kept = []
    for seed in (1, 1, 2):
        made.generator = torch.Generator().manual_seed(seed)
        kept.append(made(**batch, **row.given)["kept"].tolist())
        torch.rand(7)
    assert kept[0] == kept[1] != kept[2]


class Hinted(Few):
    """Rows that know which tokens they want, and how much is best spread evenly."""

    def __getitem__(self, number: int) -> Row:
        row = super().__getitem__(number)
        wanted = torch.zeros(1, tiny.TOKENS, dtype=torch.int8)
        wanted[:, number % 8 :: 8], wanted[:, (number + 1) % 8 :: 8] = 1, -1
        even = torch.tensor([[0.75, 0.25]])
        return dataclasses.replace(row, wanted=wanted, even=even, kind=("odd" if number % 2 else "even"))


HINTED = dataclasses.replace(
    SETTINGS, budgets=((0.5, 0.3, 0.1), (2, 2, 2)), hint_weight=1.0, even_weight=0.5, causal_weight=0.0
)


def test_hints_alone_teach_without_answers_and_a_run_goes_on_from_its_modules(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    model = tiny.model()
    with untouched(model):
        folder = train_lvpruning(model, Hinted(), tmp_path / "first", HINTED, report=lines.append)
    first = load(folder)
    assert first.config.evenness
    steps = [line for line in lines if "hint" in line]
    assert len(steps) == 6 and all("even" in line and "causal" not in line for line in steps)
    kept = {tuple(round(36 * line[f"kept_{stage}"]) for stage in (1, 2, 3)) for line in steps}
    assert kept == {(18, 10, 3), (2, 2, 2)}, "each step has one of the budgets, to the token"
    again = dataclasses.replace(HINTED, start=str(folder), rate=1e-12, causal_weight=1.0)
    second = load(train_lvpruning(tiny.model(), Hinted(), tmp_path / "second", again))
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    with pytest.raises(FoveateError, match=r"holds modules after \[1, 2, 3\] blocks, not \[1, 2\]"):
        train_lvpruning(
            tiny.model(),
            Hinted(),
            tmp_path / "third",
            Settings(start=str(folder), layers=(1, 2), ratios=(0.5, 0.1), batch=4, steps=1),
        )


def test_a_resumed_run_goes_on_with_what_was_found_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below random in the second and in the third examination; a stop in between does not begin the count anew."""
    found = [{"modules": {"a": 0.1}, "random": {"a": 0.5}}]
    monkeypatch.setattr(HeldOut, "beside", lambda *_: found[0])
    settings = dataclasses.replace(HINTED, steps=8, save_steps=1, check_steps=2, above_random="a")
    options: dict[str, Any] = {"held_out": [Hinted(seed=9)[0]]}

    def steps(name: str, resume: bool = False, **more: Any) -> int:
        train_lvpruning(tiny.model(), Hinted(), tmp_path / name, settings, resume=resume, **options, **more)
        return max(int(path.name.partition("-")[2]) for path in (tmp_path / name).glob("checkpoint-*"))

    assert steps("whole") == 6
    examined = Examiner.on_step_end

    def dies(self: Examiner, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 5:
            raise Killed
        examined(self, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Examiner, "on_step_end", dies)
        with pytest.raises(Killed):
            steps("halves")
    assert steps("halves", resume=True) == 6


def test_held_out_rows_are_answered_beside_rivals(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    held_out = [Hinted(seed=9)[number] for number in range(6)]
    settings = dataclasses.replace(HINTED, check_steps=3)
    train_lvpruning(tiny.model(), Hinted(), tmp_path / "run", settings, report=lines.append, held_out=held_out)
    exams = [line for line in lines if "modules all" in line]
    assert [line["step"] for line in exams] == [3, 6]
    for line in exams:
        for who in ("modules", "random", "uniform"):
            parts = [line[f"{who} {kind}"] for kind in ("even", "odd")]
            assert line[f"{who} all"] == pytest.approx(sum(parts) / 2), "as many rows of each kind"
    assert exams[0]["random all"] == exams[1]["random all"]
