"""The recipe of `mini`: it learns, stops in time, survives a kill, and goes on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from foveate.core import FoveateError
from foveate.runs import SETTINGS
from foveate.scenes import mini, recipe
from foveate.scenes.recipe import FURTHER, PHASES, Phase, train_mini
from foveate.scenes.runs import LOG, STATE, Progress, Run, read_header

TINY = {"batch": 2, "config": mini.llava_config(width=16, layers=2), "check_steps": 0, "max_seconds": 600.0}
SHORT = (
    Phase("ideal", 2, encoder_rate=1e-3, decoder_rate=1e-3, warmup=1),
    Phase("joint", 2, encoder_rate=1e-3, decoder_rate=1e-3, warmup=1, share=0.5, patches=288),
)


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "cpu_multiplies_bfloat16", lambda: False)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def figures(folder: Path) -> list[list[tuple[str, Any]]]:
    """The log without what a clock says, in its order."""
    return [[(name, value) for name, value in line.items() if name != "seconds"] for line in lines(folder)]


class Killed(Exception):
    """Stands for the power that fails."""


def dies(*_: Any, **__: Any) -> None:
    raise Killed


def dies_at(last: int) -> Any:
    """A step that the run does not survive once so many are done."""
    step = recipe._Session._step

    def mortal(self: Any, phase: Phase, number: int) -> Any:
        return dies() if self.done.step == last else step(self, phase, number)

    return mortal


def test_losses_fall_on_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = recipe.generate
    monkeypatch.setattr(recipe, "generate", lambda batch, seed, device: draw(batch, seed=1, device=device))
    monkeypatch.setattr(recipe, "LOG_STEPS", 5)
    for kind in ("ideal", "joint"):
        phase = Phase(kind, 25, encoder_rate=3e-3, decoder_rate=3e-3, warmup=2)
        train_mini(tmp_path / kind, phases=[phase], **{**TINY, "config": mini.llava_config(width=32, layers=2)})
        first, *_, last = lines(tmp_path / kind)
        for name in ("answer", "name", "color", "digit", "tag", *(["contrast"] if kind == "ideal" else [])):
            assert last[name] < 0.97 * first[name], (kind, name)


def test_a_run_ends_as_a_folder_that_loads(tmp_path: Path) -> None:
    seen: list[dict] = []
    folder = train_mini(tmp_path / "run", phases=SHORT, progress=seen.append, **TINY)
    assert folder == tmp_path / "run" / "mini"
    assert AutoModelForImageTextToText.from_pretrained(folder).dtype == torch.bfloat16
    assert seen == lines(tmp_path / "run")
    assert (seen[-1]["step"], seen[-1]["pictures"], seen[-1]["phase"]) == (4, 8, "joint")
    assert {"seconds", "rate", "norm", "answer", "tag"} <= set(seen[-1])


def test_an_exam_keeps_the_best_weights(tmp_path: Path) -> None:
    train_mini(tmp_path / "run", phases=SHORT, **{**TINY, "check_steps": 2, "check_pictures": 2})
    exams = [line["exam"] for line in lines(tmp_path / "run") if "exam" in line]
    assert len(exams) == 2
    assert set(exams[0]) == {"existence", "color", "digit", "count", "describe", "ends"}
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()


def test_resuming_equals_never_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_mini(tmp_path / "whole", phases=SHORT, **TINY)
    with monkeypatch.context() as patch:
        patch.setattr(recipe._Session, "_step", dies_at(3))
        with pytest.raises(Killed):
            train_mini(tmp_path / "halves", phases=SHORT, save_seconds=0.0, **TINY)
    assert json.loads(read_header(tmp_path / "halves")["progress"])["step"] == 3
    train_mini(tmp_path / "halves", phases=SHORT, resume=True, **TINY)
    whole, halves = (load_file(tmp_path / name / STATE) for name in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    for name, value in whole.items():
        assert torch.equal(value, halves[name]), name
    assert any(name.startswith("optimizer/") for name in whole)
    assert figures(tmp_path / "halves") == figures(tmp_path / "whole")


@pytest.mark.parametrize("stopped", [3, 4, 5])
def test_a_resumed_run_logs_what_an_uninterrupted_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    """Lines after two steps; the run stops in the middle of a line, between lines, and where the phase has changed."""
    monkeypatch.setattr(recipe, "LOG_STEPS", 2)
    phases = (Phase("ideal", 3, 1e-3, 1e-3, warmup=1), Phase("joint", 4, 1e-3, 1e-3, warmup=1))
    train_mini(tmp_path / "whole", phases=phases, **TINY)
    with monkeypatch.context() as patch:
        patch.setattr(recipe._Session, "_step", dies_at(stopped))
        with pytest.raises(Killed):
            train_mini(tmp_path / "halves", phases=phases, save_seconds=0.0, **TINY)
    train_mini(tmp_path / "halves", phases=phases, resume=True, **TINY)
    whole = figures(tmp_path / "whole")
    assert figures(tmp_path / "halves") == whole
    assert [dict(line)["step"] for line in whole] == [2, 4, 6, 7]
    assert "contrast" in dict(whole[1]) and "contrast" not in dict(whole[2])


def test_a_figure_that_some_steps_say_is_a_mean_over_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([{"answer": 4.0, "contrast": 6.0}, {"answer": 2.0, "contrast": 2.0}, {"answer": 3.0}])

    def said(self: Any, phase: Phase, step: int) -> dict[str, torch.Tensor]:
        self.done.step += 1
        return {name: torch.tensor(value) for name, value in next(losses).items()}

    monkeypatch.setattr(recipe._Session, "_step", said)
    train_mini(tmp_path / "run", phases=[Phase("joint", 3, 1e-3, 1e-3)], **TINY)
    (line,) = lines(tmp_path / "run")
    assert (line["answer"], line["contrast"]) == (3.0, 4.0)


def test_the_time_limit_holds_and_everything_is_saved(tmp_path: Path) -> None:
    long = [Phase("joint", 10**6, encoder_rate=1e-3, decoder_rate=1e-3)]
    folder = train_mini(tmp_path / "run", phases=long, **{**TINY, "max_seconds": 0.5})
    progress = json.loads(read_header(tmp_path / "run")["progress"])
    assert 1 <= progress["step"] < 1000
    assert progress["seconds"] >= 0.5
    assert (folder / "model.safetensors").is_file()


def test_a_kill_while_writing_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.save(Progress(step=1), {"weights/a": torch.ones(2)})

    def half(tensors, path, header):
        Path(path).write_bytes(b"half a file")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("foveate.scenes.runs.save_file", half)
        with pytest.raises(Killed):
            run.save(Progress(step=2), {"weights/a": torch.zeros(2)})
    progress, tensors = run.load() or pytest.fail("no state")
    assert progress.step == 1
    assert torch.equal(tensors["weights/a"], torch.ones(2))


def test_the_log_of_steps_to_be_done_again_is_dropped(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (20, 40, 60):
        run.log({"step": step})
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 8')
    run.rewind_log(40)
    assert [line["step"] for line in lines(tmp_path)] == [20, 40]


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train_mini(tmp_path, phases=SHORT, **{**TINY, "max_seconds": 1e-9})
    with pytest.raises(FoveateError, match="already holds a run; go on with it by resume=True"):
        train_mini(tmp_path, phases=SHORT, **TINY)


@pytest.mark.parametrize("written", [(), (SETTINGS,), (SETTINGS, LOG)])
def test_a_run_killed_before_its_first_state_goes_on_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: tuple[str, ...]
) -> None:
    """Killed before anything is written it has not begun; after that it can be resumed, and not be begun again."""
    monkeypatch.setattr(recipe, "LOG_STEPS", 1)
    train_mini(tmp_path / "whole", phases=SHORT, **TINY)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        if written:
            patch.setattr(recipe._Session, "_step", dies_at(1 if LOG in written else 0))
        else:
            patch.setattr("foveate.runs.write_json", dies)
        with pytest.raises(Killed):
            train_mini(out, phases=SHORT, **TINY)
    assert {path.name for path in out.iterdir()} - {".lock"} == set(written)
    if written:
        with pytest.raises(FoveateError, match="already holds a run; go on with it by resume=True"):
            train_mini(out, phases=SHORT, **TINY)
    else:
        with pytest.raises(FoveateError, match="holds no run to go on with; start one there with resume=False"):
            train_mini(out, phases=SHORT, resume=True, **TINY)
    train_mini(out, phases=SHORT, resume=bool(written), **TINY)
    whole, late = (load_file(folder / STATE) for folder in (tmp_path / "whole", out))
    assert all(torch.equal(value, late[name]) for name, value in whole.items())
    assert figures(out) == figures(tmp_path / "whole")


def test_two_runs_in_one_folder_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []
    step = recipe._Session._step

    def meanwhile(self: Any, phase: Phase, number: int) -> Any:
        if not refused:
            with pytest.raises(FoveateError) as error:
                train_mini(tmp_path, phases=SHORT, resume=True, **TINY)
            refused.append(str(error.value))
        return step(self, phase, number)

    monkeypatch.setattr(recipe._Session, "_step", meanwhile)
    train_mini(tmp_path, phases=SHORT, **TINY)
    assert refused == [f"another run is at work in {tmp_path}; wait for its end, or give another folder"]


def test_resuming_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"holds no run to go on with; start one there with resume=False"):
        train_mini(tmp_path / "nothing", phases=SHORT, resume=True, **TINY)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"batch": 3}, "batch=2, not batch=3"), ({"seed": 9}, "seed=0, not seed=9"), ({"phases": SHORT[:1]}, "phases=")],
)
def test_resuming_with_other_settings_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    train_mini(tmp_path, phases=SHORT, **{**TINY, "max_seconds": 1e-9})
    with pytest.raises(FoveateError, match=message):
        train_mini(tmp_path, **{"phases": SHORT, **TINY, "resume": True, **change})


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_damaged_state_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(FoveateError, match=r"is damaged|is no state of a training run"):
        Run(tmp_path).load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_seconds": 0}, "max_seconds=0 leaves no time"),
        ({"batch": -1}, "batch=-1 is below 1 picture"),
        ({"phases": [Phase("dreamy", 1, 1.0, 1.0)]}, "unknown kind of phase 'dreamy'; choices: ideal, joint"),
        ({"phases": [Phase("joint", 1, 0.0, 1.0, thin=1.5)]}, "thin=1.5 is no share of the steps; it is from 0 to 1"),
        ({"phases": [Phase("joint", 1, 0.0, 1.0, thin=0.5, patches=9)]}, "give it to a joint phase without patches="),
        (
            {"phases": [Phase("joint", 1, 0.0, 1.0, thin=0.5, between=0.4, bind=0.3)]},
            "thin=0.5, between=0.4 and bind=0.3 are more than all steps",
        ),
        ({"phases": [Phase("ideal", 1, 0.0, 1.0, between=0.6)]}, "between= leaves out tokens of whole pictures"),
        (
            {"phases": [Phase("ideal", 1, 0.0, 1.0, named=0.6)]},
            "named= and asked= are learned from what the encoder sees",
        ),
        ({"phases": [Phase("joint", 1, 1.0, 1.0, like=1.0)]}, "give encoder_rate=0.0 with it"),
        ({"start": "nowhere"}, "start='nowhere' holds no config.json"),
    ],
)
def test_errors_come_before_any_work(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        train_mini(tmp_path / "run", **{"phases": SHORT, **TINY, **change})
    assert not (tmp_path / "run").exists()


def test_a_thinned_phase_shows_the_decoder_few_tokens_at_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[int] | None]] = []
    decode = recipe.Learner.decode

    def noted(self: Any, visual: Any, packed: Any, places: Any = None) -> Any:
        seen.append((visual.shape[1], None if places is None else places[0].tolist()))
        return decode(self, visual, packed, places)

    monkeypatch.setattr(recipe.Learner, "decode", noted)
    phase = Phase("joint", 12, encoder_rate=0.0, decoder_rate=1e-3, warmup=1, thin=0.5)
    train_mini(tmp_path, phases=[phase], **TINY)
    thin = [(count, places) for count, places in seen if places is not None]
    assert 0 < len(thin) < len(seen) == 12
    for count, places in thin:
        assert recipe.FEWEST <= count <= recipe.MOST
        assert len(set(places)) == count and places == sorted(places) and places[-1] < 576
    assert all(count == 576 for count, places in seen if places is None)


STAGED = Phase(
    "joint",
    6,
    encoder_rate=0.0,
    decoder_rate=1e-3,
    warmup=1,
    thin=0.2,
    between=0.4,
    about=0.5,
    bind=0.2,
    like=1.0,
    named=0.3,
    asked=1.0,
)


def test_a_staged_phase_lets_tokens_leave_between_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, tuple[int, ...]]] = []
    decode = recipe.Learner.decode_staged

    def noted(self: Any, visual: Any, packed: Any, places: Any, leaving: Any) -> Any:
        seen.append((visual.shape[1], packed.ids.shape[1], tuple(stay.shape[1] for stay in leaving.values())))
        return decode(self, visual, packed, places, leaving)

    monkeypatch.setattr(recipe.Learner, "decode_staged", noted)
    monkeypatch.setattr(recipe, "LOG_STEPS", 1)
    train_mini(tmp_path, phases=[dataclasses.replace(STAGED, steps=16)], **TINY)
    stages = {tuple(round(share * 576) for share in shares) for shares in recipe.STAGES}
    kinds = [
        "bound" if text < 127 else "between" if stay else "thin" if given < 576 else "whole"
        for given, text, stay in seen
    ]
    assert set(kinds) == {"bound", "between", "thin", "whole"} and len(kinds) == 16
    assert {stay for _, _, stay in seen if stay} <= stages
    assert all(given == 576 for given, _, stay in seen if stay)
    assert all(112 <= given <= 208 for (given, _, _), kind in zip(seen, kinds, strict=True) if kind == "bound")
    for line, kind in zip(lines(tmp_path), kinds, strict=True):
        assert ("like" in line) == (kind in ("thin", "whole"))
        assert line["asked"] > 0
    assert next(line["like"] for line in lines(tmp_path) if "like" in line) < 0.1  # hardly a step from the start


def test_a_resumed_staged_run_still_knows_where_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_mini(tmp_path / "whole", phases=[STAGED], **TINY)
    with monkeypatch.context() as patch:
        patch.setattr(recipe._Session, "_step", dies_at(4))
        with pytest.raises(Killed):
            train_mini(tmp_path / "halves", phases=[STAGED], save_seconds=0.0, **TINY)
    train_mini(tmp_path / "halves", phases=[STAGED], resume=True, **TINY)
    whole, halves = (load_file(tmp_path / name / STATE) for name in ("whole", "halves"))
    assert all(torch.equal(value, halves[name]) for name, value in whole.items())
    assert figures(tmp_path / "halves") == figures(tmp_path / "whole")


def test_a_phase_at_rate_zero_leaves_the_encoder_as_it_is(tmp_path: Path) -> None:
    train_mini(tmp_path, phases=[Phase("joint", 3, encoder_rate=0.0, decoder_rate=1e-3, warmup=1, thin=1.0)], **TINY)
    after, before = load_file(tmp_path / STATE), mini.build(0, TINY["config"])
    for name, parameter in before.named_parameters():
        same = torch.equal(after[f"weights/model.{name}"], parameter)
        assert same == ("language_model" not in name), name


def test_rates_by_hand() -> None:
    phase = Phase("joint", 110, encoder_rate=1.0, decoder_rate=1.0, warmup=10, final=0.0)
    assert [phase.rate(step) for step in (0, 4, 9, 10, 60)] == [0.1, 0.5, 1.0, 1.0, 0.5]
    assert {phase.kind for phase in PHASES} == {"ideal", "joint"}
    assert [phase.kind for phase in FURTHER] == ["joint"] * len(FURTHER)


def test_blocks_behind_the_projector_are_trained_with_ideal_tokens_only(tmp_path: Path) -> None:
    train_mini(tmp_path, phases=SHORT[1:], **TINY)
    after, before = load_file(tmp_path / STATE), mini.build(0, TINY["config"])
    names = {name for name, _ in before.named_parameters()}
    still = {name for name in names if torch.equal(after[f"weights/model.{name}"], before.get_parameter(name))}
    assert {name for name in still if "layers.1." in name and "vision" in name}
    assert not {name for name in still if "vision" in name and "layers.0." in name}
    assert not {name for name in still if "language_model" in name}
