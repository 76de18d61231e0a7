"""The recipe that trains `mini` from nothing, or further from given weights, on a GPU or a CPU."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from foveate.checkpoints import check_names
from foveate.core import FoveateError
from foveate.ops.precision import cpu_multiplies_bfloat16
from foveate.paths import checked
from foveate.runs import check_run, run_folder
from foveate.scenes import mini
from foveate.scenes.curriculum import ideal_tokens
from foveate.scenes.exam import quick_exam
from foveate.scenes.generator import Scenes, generate
from foveate.scenes.learner import Learner, answer_loss, asking_loss, encoder_losses, likeness_loss, naming_loss, picked
from foveate.scenes.means import Means
from foveate.scenes.packing import Packed, ask, ask_about
from foveate.scenes.runs import Progress, Run, load_optimizer, optimizer_tensors
from foveate.scenes.targets import Targets, objects_first, preferred, preferred_about, staged, targets, thinned

Report = Callable[[dict[str, Any]], None]

LENGTH = 127  # text tokens per picture: with <bos> and 576 visual tokens that makes 704, a multiple of 64
FEWEST, MOST = 16, 288  # tokens of a thinned picture, drawn evenly on a logarithmic scale
BOUND = (112, 208)  # tokens, objects first, of pictures of which digits alone are asked for
LOG_STEPS = 20
STAGES: tuple[tuple[float, ...], ...] = (
    (0.5, 0.3, 0.1),
    (0.25, 0.15, 0.08),
    (1 / 9, 1 / 9, 1 / 9),
    (1 / 18, 1 / 18, 1 / 18),
)
"""Shares of a picture's tokens that are left behind the decoder's first three blocks."""
WEIGHTS = {"name": 0.5, "color": 0.25, "contrast": 0.25}  # of the other losses 1, or what the phase says


@dataclass(frozen=True)
class Phase:
    """One part of the recipe.

    Attributes:
        kind: "ideal" (the decoder reads ideal tokens, the encoder learns words on its own) or "joint" (the decoder
            reads what the encoder sees).
        steps: optimizer steps.
        encoder_rate: peak learning rate of vision tower, projector and contrastive head; 0 freezes them.
        decoder_rate: peak learning rate of the decoder and the word embeddings.
        warmup: steps of linear warm-up.
        final: the rate at the phase's last step, as a share of the peak; linear in between.
        share: share of the pictures that the decoder is asked about; the encoder's losses see all of them.
        patches: how many patches of each picture the encoder sees, those of objects first; None is all 576.
        thin: share of the steps at which the decoder is given few of each picture's tokens, as if pruned.
        between: share of the steps at which tokens leave between the decoder's first blocks.
        about: share of these at which only one object is asked about, whose tokens stay to the end.
        bind: share of the steps at which digits alone are asked for, of objects and little of the background.
        like: weight of the divergence from the answers of the weights that the run starts from, digits left out, where
            tokens leave before the decoder or not at all.
        named: weight of the loss that has a digit's tag know its object's name early in the decoder.
        asked: weight of the loss that has an object's name in a question know its digit in the middle of it.
    """

    kind: Literal["ideal", "joint"]
    steps: int
    encoder_rate: float
    decoder_rate: float
    warmup: int = 100
    final: float = 1.0
    share: float = 1.0
    patches: int | None = None
    thin: float = 0.0
    between: float = 0.0
    about: float = 0.0
    bind: float = 0.0
    like: float = 0.0
    named: float = 0.0
    asked: float = 0.0

    def rate(self, step: int) -> float:
        """The share of the peak rate at `step` of this phase, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 1 - (1 - self.final) * (step - self.warmup) / max(1, self.steps - self.warmup)


PHASES: tuple[Phase, ...] = (
    Phase("ideal", 3000, encoder_rate=1e-3, decoder_rate=1e-3, warmup=200),
    Phase("joint", 6000, encoder_rate=5e-4, decoder_rate=5e-4, warmup=200, final=0.02),
    Phase("joint", 1500, encoder_rate=0.0, decoder_rate=3e-4, warmup=30, final=0.05, thin=0.6),
)
"""From nothing, at batch 128 on one large GPU."""

THINNED: tuple[Phase, ...] = (
    Phase("joint", 2000, encoder_rate=0.0, decoder_rate=3e-4, warmup=30, final=0.05, thin=0.6),
)
"""From weights that have only seen whole pictures, at batch 8 on a CPU: the decoder learns to do with few tokens."""

STAGED: tuple[Phase, ...] = (
    Phase("joint", 400, 0.0, 5e-4, warmup=40, bind=1.0, named=0.3, asked=1.0),
    Phase(
        "joint", 2800, 0.0, 5e-4, warmup=40, final=0.02, thin=0.25, between=0.3, about=0.33, bind=0.25, like=1.0,
        named=0.3, asked=1.0,
    ),
)  # fmt: skip
"""From weights that have seen thinned pictures, at batch 6 on a CPU: digits are bound to their objects, and tokens may
leave between the decoder's blocks."""

FURTHER: tuple[Phase, ...] = (Phase("joint", 3000, encoder_rate=4e-4, decoder_rate=1e-4, final=0.02, share=0.5),)
"""From weights that can already look things up, at batch 16 on a CPU."""


def train_mini(
    out: str | Path,
    *,
    max_seconds: float,
    start: str | Path | None = None,
    device: str | torch.device = "cpu",
    batch: int | None = None,
    resume: bool = False,
    seed: int = 0,
    phases: Sequence[Phase] | None = None,
    progress: Report | None = None,
    compiled: bool = False,
    config: LlavaConfig | None = None,
    save_seconds: float = 60.0,
    check_steps: int = 200,
    check_pictures: int = 96,
) -> Path:
    """Train `mini` and return the folder of the finished model, `out`/mini.

    `out` holds `run.json` (what a resumed run must find equal), `state.safetensors` (weights, their running average
    and the optimizer, every `save_seconds`), `log.jsonl`, `best` (the averaged weights that did best on held-out
    pictures so far) and, once the phases or the time are over, `mini` (the averaged weights of the last step).
    Pictures, questions and rates depend on `seed` and the step alone, so a resumed run does what the uninterrupted one
    would have done, however early it was killed.

    Args:
        out: the run's folder.
        max_seconds: stop, with everything saved, after this many seconds of this call.
        start: a folder to start from; None is random weights.
        device: "cpu" or a CUDA device. Both compute in bfloat16 where the hardware multiplies it, on float32 weights.
        batch: pictures per step; 128 on a GPU, 16 on a CPU.
        resume: go on with the run in `out`.
        seed: of the weights, pictures and questions.
        phases: `PHASES`, or `FURTHER` with `start`.
        progress: called with each line of the log.
        compiled: use torch.compile; needs a C++ compiler on the CPU.
        config: another shape, for tests.
        save_seconds: seconds between two states.
        check_steps: steps between two exams; 0 is never.
        check_pictures: pictures of an exam.

    Raises:
        FoveateError: a run in `out` and no `resume`, none and `resume`, one that is still at work, or other settings
            than it was begun with.
    """
    place = _device(device)
    phases = tuple(phases or (FURTHER if start else PHASES))
    batch = batch or (128 if place.type == "cuda" else 16)
    _check(max_seconds, batch, phases)
    check_run(out, resume)
    settings: dict[str, Any] = {"batch": batch, "seed": seed, "start": str(start) if start else None}
    settings["phases"] = [dataclasses.asdict(phase) for phase in phases]
    model = _model(start, seed, config)
    with run_folder(out, settings, resume) as folder:
        session = _Session(Run(folder), model, place, compiled, batch, seed, phases)
        if resume:
            session.restore()
        session.train(max_seconds, save_seconds, check_steps, check_pictures, progress or (lambda line: None))
        return session.export(folder / "mini")


def _device(device: str | torch.device) -> torch.device:
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise FoveateError(f"device={str(device)!r}, but torch sees no CUDA device; use device='cpu'")
    return place


def _check(max_seconds: float, batch: int, phases: Sequence[Phase]) -> None:
    if max_seconds <= 0:
        raise FoveateError(f"max_seconds={max_seconds} leaves no time; it must be above 0")
    if batch < 1:
        raise FoveateError(f"batch={batch} is below 1 picture; the smallest is batch=1")
    for phase in phases:
        if phase.kind not in ("ideal", "joint"):
            raise FoveateError(f"unknown kind of phase {phase.kind!r}; choices: ideal, joint")
        for name in ("thin", "between", "about", "bind"):
            share = getattr(phase, name)
            if not 0 <= share <= 1:
                raise FoveateError(f"{name}={share} is no share of the steps; it is from 0 to 1")
            if share and (phase.kind == "ideal" or phase.patches):
                raise FoveateError(
                    f"{name}= leaves out tokens of whole pictures: give it to a joint phase without patches="
                )
        if phase.kind == "ideal" and (phase.named or phase.asked):
            raise FoveateError("named= and asked= are learned from what the encoder sees: give them to a joint phase")
        if phase.thin + phase.between + phase.bind > 1 + 1e-9:
            raise FoveateError(
                f"thin={phase.thin}, between={phase.between} and bind={phase.bind} are more than all steps; lower one"
            )
        if phase.like and phase.encoder_rate:
            raise FoveateError("like= compares decoders that read the same tokens: give encoder_rate=0.0 with it")


def _model(start: str | Path | None, seed: int, config: LlavaConfig | None) -> LlavaForConditionalGeneration:
    if start is None:
        return mini.build(seed, config)
    folder = checked(start)
    if not (folder / "config.json").is_file():
        raise FoveateError(f"start={str(start)!r} holds no config.json; give the folder of a saved mini")
    check_names(folder, f"start={str(start)!r}")
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)


@dataclass(frozen=True)
class _Shown:
    """What the decoder is given of some pictures: tokens (B, N, D), their raster indices unless they are all."""

    visual: Tensor
    places: Tensor | None
    scenes: Scenes
    wanted: Targets

    def thinned(self, count: int, draw: torch.Generator) -> _Shown:
        """`count` tokens of each picture alone, as some method or other might keep them."""
        return self.at(thinned(self.wanted, min(count, self.visual.shape[1]), draw))

    def at(self, kept: Tensor) -> _Shown:
        """The tokens in columns `kept` (B, K) alone."""
        places = kept if self.places is None else self.places.gather(1, kept)
        return _Shown(picked(self.visual, kept), places, self.scenes, self.wanted.at(kept))


class _Session:
    """One sitting of a run: the learner, its optimizer and running average, and how far they are."""

    def __init__(
        self,
        run: Run,
        model: LlavaForConditionalGeneration,
        device: torch.device,
        compiled: bool,
        batch: int,
        seed: int,
        phases: tuple[Phase, ...],
    ) -> None:
        self.run, self.device, self.batch, self.seed, self.phases = run, device, batch, seed, phases
        # On a CPU the flash kernel's backward pass is slower than plain matrix products with a compiled softmax.
        model.set_attn_implementation("eager" if device.type == "cpu" and compiled else "sdpa")
        self.learner = Learner(model.train(), compiled).to(device)
        self.names = {parameter: name for name, parameter in self.learner.named_parameters()}
        self.optimizer = self._optimizer()
        self.average = [parameter.detach().clone() for parameter in self.names]
        self.half = device.type == "cuda" or cpu_multiplies_bfloat16()
        like = any(phase.like for phase in phases)
        self.before = Learner(copy.deepcopy(model).requires_grad_(False)).to(device) if like else None
        self.done = Progress()
        self.means = Means()  # since the last line of the log
        self.best = -1.0

    def _optimizer(self) -> torch.optim.AdamW:
        decoder = {id(parameter) for parameter in self.learner.model.model.language_model.parameters()}
        sides: dict[str, list[nn.Parameter]] = {"encoder": [], "decoder": []}
        for parameter in self.names:
            sides["decoder" if id(parameter) in decoder else "encoder"].append(parameter)
        groups = [{"params": parameters, "side": side} for side, parameters in sides.items()]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)

    # state -----------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        tensors: dict[str, Tensor] = {f"weights/{name}": parameter for parameter, name in self.names.items()}
        tensors |= {f"average/{name}": mean for name, mean in zip(self.names.values(), self.average, strict=True)}
        tensors |= optimizer_tensors(self.optimizer, self.names)
        tensors |= {f"means/{name}": _exact(*pair) for name, pair in self.means.state().items()}
        tensors["best"] = _exact(self.best)
        self.run.save(self.done, tensors)

    @torch.no_grad()
    def restore(self) -> None:
        saved = self.run.load()
        if saved is not None:
            self._take_up(*saved)
        self.run.rewind_log(self.done.step)

    def _take_up(self, done: Progress, tensors: dict[str, Tensor]) -> None:
        self.done = done
        for (parameter, name), mean in zip(self.names.items(), self.average, strict=True):
            parameter.copy_(tensors[f"weights/{name}"])
            mean.copy_(tensors[f"average/{name}"])
        load_optimizer(self.optimizer, self.names, tensors)
        means = {name.removeprefix("means/"): pair for name, pair in tensors.items() if name.startswith("means/")}
        self.means.restore({name: pair.tolist() for name, pair in means.items()}, self.device)
        self.best = tensors["best"].item()

    def export(self, folder: Path) -> Path:
        """Write the averaged weights as a model folder."""
        self._swap()
        mini.save(self.learner.model, folder)
        self._swap()
        return folder

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, mean in zip(self.names, self.average, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(mean)
            mean.copy_(kept)

    # training --------------------------------------------------------------------------------------------------------

    def train(
        self, max_seconds: float, save_seconds: float, check_steps: int, check_pictures: int, report: Report
    ) -> None:
        begin = saved = time.monotonic()
        before = self.done.seconds
        last = sum(phase.steps for phase in self.phases)
        while self.done.step < last and time.monotonic() - begin < max_seconds:
            phase, step = self._phase()
            self.means.add(self._step(phase, step))
            self.done.seconds = before + time.monotonic() - begin
            if self.done.step % LOG_STEPS == 0 or self.done.step == last:
                self._log(phase, step, report)
            if check_steps and self.done.step % check_steps == 0:
                self._exam(check_pictures, report)
            if time.monotonic() - saved > save_seconds:
                self.save()
                saved = time.monotonic()
        self.save()

    def _phase(self) -> tuple[Phase, int]:
        step = self.done.step
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise AssertionError("a step after the last phase")

    def _step(self, phase: Phase, step: int) -> dict[str, Tensor]:
        number = self.done.step
        scenes = generate(self.batch, seed=(self.seed * 1_000_003 + number) % 2**31, device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = getattr(phase, f"{group['side']}_rate") * phase.rate(step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            losses = self._losses(phase, scenes, number)
        total = torch.stack([WEIGHTS.get(name, 1.0) * loss for name, loss in losses.items()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        self.optimizer.step()
        self._follow(number)
        self.done.step, self.done.pictures = number + 1, self.done.pictures + self.batch
        return {**losses, "norm": norm}

    def _losses(self, phase: Phase, scenes: Scenes, number: int) -> dict[str, Tensor]:
        wanted, places = targets(scenes), None
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        if phase.patches:
            places = objects_first(wanted, phase.patches, draw)
            wanted = wanted.at(places)
        frozen = phase.encoder_rate == 0
        with torch.set_grad_enabled(not frozen):
            visual, pooled = self.learner.encode(scenes.pixels, phase.kind == "ideal", places)
        losses = {} if frozen else encoder_losses(self.learner, visual, pooled, scenes, wanted)
        if phase.kind == "ideal":
            visual, places = ideal_tokens(self.learner.words, targets(scenes), scenes, draw)
        rows = max(1, round(self.batch * phase.share))
        shown = _Shown(visual[:rows], None if places is None else places[:rows], first(scenes, rows), wanted.rows(rows))
        return {**losses, **self._answers(phase, shown, number, draw)}

    def _answers(self, phase: Phase, shown: _Shown, number: int, draw: torch.Generator) -> dict[str, Tensor]:
        """The decoder's losses at step `number`, at which tokens may leave before its blocks or between them."""
        chance = random.Random(f"thin {self.seed} {number}")
        ask_draw, lot = random.Random(f"{self.seed} {number}"), chance.random()
        if lot < phase.thin:
            few = shown.thinned(round(math.exp(chance.uniform(math.log(FEWEST), math.log(MOST)))), draw)
            return self._judged(phase, few, ask(few.scenes, LENGTH, ask_draw), {})
        lot -= phase.thin
        if lot < phase.between and chance.random() < phase.about:
            packed, asked = ask_about(shown.scenes, LENGTH, ask_draw)
            score = preferred_about(shown.wanted, asked.to(self.device), draw)
            return self._judged(phase, shown, packed, staged(score, chance.choice(STAGES)))
        if lot < phase.between:
            stay = staged(preferred(shown.wanted, draw), chance.choice(STAGES))
            return self._judged(phase, shown, ask(shown.scenes, LENGTH, ask_draw), stay)
        if lot - phase.between < phase.bind:
            few = shown.at(objects_first(shown.wanted, chance.randint(*BOUND), draw))
            return self._judged(phase, few, ask(few.scenes, LENGTH // 2, ask_draw, {"digit": 1}), {}, alike=False)
        return self._judged(phase, shown, ask(shown.scenes, LENGTH, ask_draw), {})

    def _judged(
        self, phase: Phase, shown: _Shown, packed: Packed, leaving: Mapping[int, Tensor], alike: bool = True
    ) -> dict[str, Tensor]:
        """The losses of the answers, of what leads to them, and of likeness unless tokens leave between blocks."""
        packed, losses = packed.to(self.device), dict[str, Tensor]()
        if leaving or phase.named or phase.asked:
            said = self.learner.decode_staged(shown.visual, packed, shown.places, leaving)
            logits = said.logits
            if phase.named:
                losses["named"] = phase.named * naming_loss(said, self.learner.words, shown.wanted)
            if phase.asked:
                losses["asked"] = phase.asked * asking_loss(said, self.learner.words, packed, shown.scenes.digits)
        else:
            logits = self.learner.decode(shown.visual, packed, shown.places)
        losses["answer"] = answer_loss(logits, packed)
        if self.before is not None and phase.like and alike and not leaving:
            with torch.no_grad():
                before = self.before.decode(shown.visual, packed, shown.places)
            losses["like"] = phase.like * likeness_loss(logits, before, packed)
        return losses

    @torch.no_grad()
    def _follow(self, number: int) -> None:
        """Let the average follow the weights over the last few hundred steps."""
        share = 1 - min(0.997, (number + 1) / (number + 10))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.names], share)

    def _log(self, phase: Phase, step: int, report: Report) -> None:
        line: dict[str, Any] = {**vars(self.done), "phase": phase.kind, "rate": phase.encoder_rate * phase.rate(step)}
        line["seconds"] = round(line["seconds"], 2)
        line |= {name: round(value.item(), 5) for name, value in sorted(self.means.current().items())}
        self.means.clear()
        self.run.log(line)
        report(line)

    def _exam(self, pictures: int, report: Report) -> None:
        """Examine the averaged weights, and keep them if they are the best so far."""
        self._swap()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            marks = quick_exam(self.learner, pictures, seed=2**30)
        mean = sum(marks.values()) / len(marks)
        if mean > self.best:
            self.best = mean
            mini.save(self.learner.model, self.run.folder / "best")
        self._swap()
        line = {**vars(self.done), "exam": {kind: round(value, 4) for kind, value in marks.items()}}
        self.run.log(line)
        report(line)


def first(scenes: Scenes, rows: int) -> Scenes:
    """The first pictures of a batch."""
    return Scenes(*(getattr(scenes, field.name)[:rows] for field in dataclasses.fields(scenes)))


def _exact(*values: float) -> Tensor:
    """Numbers of Python as a tensor that holds every bit of them."""
    return torch.tensor(values, dtype=torch.float64)
