"""Trains LVPruning's decision modules (section 3.2) on `transformers.Trainer`, while the model stays frozen."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from foveate.core import FoveateError, Keep, check_choices, check_depths, check_keep, scaled_layers
from foveate.modules import lvpruning as modules
from foveate.paths import checked
from foveate.runs import check_run, new_folder, run_folder
from foveate.train import checkpoints
from foveate.train.conversations import Extent, Row, collate
from foveate.train.figures import Figures
from foveate.train.held_out import Examiner, HeldOut
from foveate.train.losses import RatioLoss
from foveate.train.memory import divide
from foveate.train.softened import Softened, check_trains

Report = Callable[[dict[str, Any]], None]

_NO_DIFFERENCE = ("save_steps", "log_steps", "check_steps", "above_random")  # settings that no weight depends on

LAYERS = (1, 8, 16)
"""The paper's depths in a decoder of 32 blocks."""

_NOT_OF_THE_RECIPE = ("steps", "micro", "checkpointing", *_NO_DIFFERENCE)


class Rows(Protocol):
    """Training data: numbered rows that a resumed run finds again."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Row: ...
    def fingerprint(self) -> dict[str, Any]: ...
    def extent(self) -> Extent: ...


@dataclass(frozen=True)
class Settings:
    """How to train; the defaults are the paper's (section 4.1), and DynamicViT's where it states none.

    Attributes:
        layers: decoder blocks that run before each module; None is 1, 8 and 16 of 32, scaled.
        ratios: shares of the visual tokens to keep at each.
        rate: peak learning rate; cosine decay after the warm-up.
        batch: rows per optimizer step, over all processes.
        micro: rows per process at once; None is as many as fit a card of 80 GB by arithmetic.
        epochs: passes over the data.
        steps: stop after so many optimizer steps, whatever `epochs` says; None is by epochs.
        warmup: share of the steps in which the rate rises.
        decay: weight decay.
        clip: largest norm of the gradient.
        budgets: in place of `ratios`, several of them, counts or shares of the visual tokens for each module; each step
            draws one, and the modules are told it: their scores are shifted so that it is met on average. What
            inference reads, the order of the scores, stays free.
        causal_weight, ratio_weight: of the two losses; the paper states neither. With `budgets` and no causal one, each
            stage keeps what inference would keep, blocks behind the last module do not run, and hints alone teach.
        hint_weight: of a third loss that the paper does not have: the scores are to put the tokens that the question is
            about first and those that distract from it last. Scenes know them; other data say nothing. 0 is none.
        even_weight: of a fourth one: how much of the budget is to be spread evenly; scenes know what is best. It gives
            the modules heads that say so, and so needs `budgets`. 0 is neither.
        start: folder of modules to start from, of the same layers; None is from nothing.
        ratio_loss: "mse" (eq. 11) or "huber" (the sentence below it).
        temperature: of the Gumbel-softmax; not stated.
        decision_clip: cut the causal loss's gradient with respect to one decision of one row at this; None, as in the
            paper, cuts none and leaves outliers to `clip`, which scales everything else down with them.
        anneal: share of the steps in which the shares to aim at fall from 1 to `ratios`; the modules then begin by
            keeping nine tokens of ten. What matters shows clearest while little is missing. 0, as in the paper, aims
            at `ratios` from the start.
        visual_share: of each picture's tokens that a step looks at, drawn at random; below 1 it is cheaper.
        answers: let the modules read the answers as well; they then know what is asked for beforehand.
        checkpointing: recompute decoder layers in the backward pass; None is where too few rows fit otherwise.
        bf16: compute in bfloat16 on float32 modules.
        save_steps: steps between two checkpoints.
        log_steps: steps between two lines of the log.
        check_steps: steps between two examinations on held-out rows; None is never.
        above_random: the kind of held-out question that is to stay above `random` at the same layers; training stops
            where it is twice in a row below. None never stops.
        seed: of modules, order and noise.
    """

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] = (0.5, 0.3, 0.1)
    budgets: tuple[tuple[Keep, ...], ...] = ()
    start: str | None = None
    rate: float = 2e-6
    batch: int = 64
    micro: int | None = None
    epochs: int = 1
    steps: int | None = None
    warmup: float = 0.03
    decay: float = 0.0
    clip: float = 1.0
    causal_weight: float = 1.0
    ratio_weight: float = 2.0
    hint_weight: float = 0.0
    even_weight: float = 0.0
    ratio_loss: RatioLoss = "mse"
    temperature: float = 1.0
    decision_clip: float | None = None
    anneal: float = 0.0
    visual_share: float = 1.0
    answers: bool = False
    checkpointing: bool | None = None
    bf16: bool = True
    save_steps: int = 500
    log_steps: int = 10
    check_steps: int | None = None
    above_random: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)  # type: ignore[arg-type]
        for name in ("rate", "batch", "epochs", "clip", "temperature", "save_steps", "log_steps"):
            if not getattr(self, name) > 0:
                raise FoveateError(f"{name}={getattr(self, name)} is not above 0")
        for name in ("micro", "steps", "check_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise FoveateError(f"{name}={getattr(self, name)} is below 1; the smallest is {name}=1")
        for name in ("decay", "causal_weight", "ratio_weight", "hint_weight", "even_weight"):
            if getattr(self, name) < 0:
                raise FoveateError(f"{name}={getattr(self, name)} is below 0; the smallest is {name}=0")
        for name in ("warmup", "anneal"):
            if not 0 <= getattr(self, name) < 1:
                raise FoveateError(f"{name}={getattr(self, name)} is no share in [0, 1)")
        if not 0 < self.visual_share <= 1:
            raise FoveateError(f"visual_share={self.visual_share} is no share in (0, 1]; the nearest is 1.0")
        if not self.ratios or not all(0 < ratio <= 1 for ratio in self.ratios):
            raise FoveateError(f"ratios={self.ratios} are not all shares in (0, 1]")
        if any(later > earlier for earlier, later in zip(self.ratios, self.ratios[1:], strict=False)):
            raise FoveateError(f"ratios={self.ratios} rise, but a token that has left does not come back")
        stages = LAYERS if self.layers is None else self.layers
        if len(stages) != len(self.ratios):
            raise FoveateError(f"{len(self.ratios)} ratios {self.ratios} for {len(stages)} layers {stages}")
        self._check_budgets(len(stages))

    def _check_budgets(self, stages: int) -> None:
        for budget in self.budgets:
            if len(budget) != stages:
                raise FoveateError(f"budgets: {len(budget)} of {budget} for {stages} modules; give one for each")
            for keep in budget:
                check_keep(keep, f"budgets: {keep} of {budget}")
            if any(type(one) is type(two) and two > one for one, two in pairwise(budget)):
                raise FoveateError(f"budgets: {budget} rises, but a token that has left does not come back")
        if self.even_weight and not self.budgets:
            raise FoveateError("even_weight= teaches how much of a budget is spread evenly; give budgets= with it")
        if self.budgets and not self.causal_weight and not self.hint_weight:
            raise FoveateError("causal_weight=0 with budgets= leaves hints alone to teach; give hint_weight= with it")

    def targets(self, done: float, step: int = 0) -> tuple[Keep, ...]:
        """What to aim at when so much of the training, from 0 to 1, is done: one of `budgets`, drawn for each step."""
        if self.budgets:
            return random.Random(f"budget {self.seed} {step}").choice(self.budgets)
        left = max(0.0, 1 - done / self.anneal) if self.anneal else 0.0
        return tuple(ratio + (1 - ratio) * left for ratio in self.ratios)

    def depths(self, blocks: int) -> tuple[int, ...]:
        """Where the modules stand in a decoder of `blocks` blocks."""
        if self.layers is None:
            return scaled_layers(LAYERS, 32, blocks)
        check_depths(self.layers, blocks, "LVPruning")
        return self.layers


def train_lvpruning(
    base: Any,
    rows: Rows,
    out: str | Path,
    settings: Settings | None = None,
    *,
    name: str = "",
    resume: bool = False,
    max_seconds: float | None = None,
    report: Report | None = None,
    tell: Callable[[str], None] | None = None,
    card: str = "",
    held_out: Sequence[Row] = (),
) -> Path:
    """Train decision modules for `base` and return their folder, `out`/lvpruning.

    `out` holds `run.json` (what a resumed run must find equal), `checkpoint-*` (the last two), `tensorboard` (both
    losses and the share kept at each stage) and, once the steps or the time are over, `lvpruning`.

    Args:
        base: a loaded vision-language model; it is frozen, and not a bit of it changes.
        rows: `Conversations` or `SceneQuestions`.
        settings: the paper's where None.
        name: what the model is called, for the modules' configuration.
        resume: go on with the run in `out` as if it had never stopped.
        max_seconds: stop, with everything saved, after so many seconds of this call.
        report: called with each line of the log, in the first process.
        tell: called at the start with how a step is divided and what memory that takes, in the first process.
        card: text of the README beside the modules; by default it says what they were trained on and how.
        held_out: rows that are never trained on, to be answered every `settings.check_steps` steps beside `random` and
            `uniform` at the same layers; the result is a line of the log.

    Raises:
        FoveateError: a model that cannot be trained for, settings that cannot be met, a run in `out` and no `resume`,
            none and `resume`, one that is still at work, or another model, other data or settings than it was begun
            with.
    """
    settings, out = settings or Settings(), checked(out)
    check_trains(base, bool(settings.checkpointing))
    arguments = _arguments(settings, out, base.device)
    first = arguments.process_index == 0
    if first:
        check_run(out, resume)
    settings = _divided(settings, arguments, base, rows, tell if first and tell else lambda said: None)
    before = checkpoints.fingerprint(base)
    identity = _identity(settings, before, base, rows, arguments.world_size)
    gates = _gates(base, settings, name)
    with run_folder(out, identity, resume, first):
        trainer = _Trainer(_softened(base.to(arguments.device), gates, settings, arguments), arguments, rows, settings)
        if held_out and settings.check_steps:
            trainer.add_callback(trainer.examiner(held_out, report if first else None))
        _run(trainer, out, resume, max_seconds, report if first else None)
        if checkpoints.fingerprint(base) != before or any(one.grad is not None for one in base.parameters()):
            raise RuntimeError("training has changed the frozen model")
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathers what was sharded
        if first:
            card = card or describe(name, settings, gates, rows, trainer.state.global_step)
            _export(gates.config, weights, out / modules.FOLDER, card)
    return out / modules.FOLDER


def _run(trainer: _Trainer, out: Path, resume: bool, max_seconds: float | None, report: Report | None) -> None:
    """Train until the steps or the time are over, from the last checkpoint where one is to be resumed."""
    checkpoint = checkpoints.last_checkpoint(out) if resume else None
    if checkpoint is not None:
        trainer.go_on(checkpoint)
    trainer.remove_callback(PrinterCallback)
    for callback in _callbacks(out, max_seconds, report, trainer.figures):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _gates(base: Any, settings: Settings, name: str) -> modules.LVPruningModules:
    """What is trained: new modules, or those of `settings.start`, whose heads for evenness may be new."""
    before = None if settings.start is None else modules.load(settings.start)
    gates = modules.for_model(
        base.config,
        layers=settings.depths(len(base.get_decoder().layers)),
        seed=settings.seed,
        ratios=list(settings.ratios),
        answers=settings.answers,
        evenness=bool(settings.even_weight or (settings.budgets and before and before.config.evenness)),
        base_name=name,
    )
    if before is not None:
        before.check(base.config)
        if list(before.config.layers) != list(gates.config.layers):
            raise FoveateError(
                f"start={settings.start!r} holds modules after {list(before.config.layers)} blocks, not "
                f"{list(gates.config.layers)}; give the same layers"
            )
        given = before.float().state_dict()
        gates.load_state_dict({key: given.get(key, value) for key, value in gates.state_dict().items()})
    elif settings.anneal:
        gates.start_keeping(0.9)
    return gates


def _export(config: modules.LVPruningConfig, weights: dict[str, Tensor], folder: Path, card: str) -> None:
    whole = modules.build(config)
    whole.load_state_dict({key.partition("gates.")[2]: value for key, value in weights.items()})
    modules.save(whole, folder, card)


def describe(name: str, settings: Settings, gates: modules.LVPruningModules, rows: Rows, steps: int) -> str:
    """The card of trained modules: what they are for, and every setting that departs from the paper's."""
    stock, shape = Settings(), gates.config
    own = {
        key: value
        for key, value in dataclasses.asdict(settings).items()
        if value != getattr(stock, key) and key not in _NOT_OF_THE_RECIPE
    }
    departs = "".join(f"- {key}: {value} (by default {getattr(stock, key)})\n" for key, value in own.items())
    return (
        f"# Decision modules of LVPruning for {name or shape.base_type}\n\n"
        f"Cross-attention modules (https://arxiv.org/abs/2501.13652) after {_listed(shape.layers)} of "
        f"{shape.base_layers} decoder blocks of width {shape.width}; the model itself is unchanged.\n\n"
        "```python\nfoveate.prune(model, foveate.LVPruning.from_pretrained(FOLDER, keep=(0.5, 0.3, 0.1)))\n```\n\n"
        f"Trained for {steps} steps of {settings.batch} rows ({rows.fingerprint()['kind']}), {_aims(settings)}; any "
        "`keep` can be asked for.\n\n"
        f"Settings that depart from the paper's recipe:\n\n{departs or '- none'}\n"
    )


def _aims(settings: Settings) -> str:
    if settings.budgets:
        return f"each with one of the budgets {_listed('/'.join(map(str, one)) for one in settings.budgets)}"
    return f"aiming at shares of {_listed(settings.ratios)}"


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))


def _softened(base: Any, gates: modules.LVPruningModules, settings: Settings, arguments: TrainingArguments) -> Softened:
    # The loss is a mean over the rows of all parts that a process adds up for one step.
    rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return Softened(
        base,
        gates.float().train().requires_grad_(True),
        settings.ratios,
        causal_weight=settings.causal_weight,
        ratio_weight=settings.ratio_weight,
        hint_weight=settings.hint_weight,
        even_weight=settings.even_weight,
        told=bool(settings.budgets),
        ratio_kind=settings.ratio_loss,
        temperature=settings.temperature,
        share=settings.visual_share,
        limit=None if settings.decision_clip is None else settings.decision_clip / rows,
        answers=settings.answers,
        checkpointing=bool(settings.checkpointing),
    )


def _identity(settings: Settings, model: str, base: Any, rows: Rows, processes: int) -> dict[str, Any]:
    """What decides each step of a run."""
    kept = dataclasses.asdict(settings)
    for name in _NO_DIFFERENCE:
        del kept[name]
    return {**kept, "model": model, "dtype": str(base.dtype), "data": rows.fingerprint(), "processes": processes}


def _arguments(settings: Settings, out: Path, device: torch.device) -> TrainingArguments:
    options: dict[str, Any] = {"use_cpu": True} if device.type == "cpu" else {}
    if options and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        options["ddp_backend"] = "gloo"
    return TrainingArguments(
        output_dir=str(out),
        learning_rate=settings.rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        weight_decay=settings.decay,
        max_grad_norm=settings.clip,
        bf16=settings.bf16,
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=settings.log_steps,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
        label_names=[],
        seed=settings.seed,
        data_seed=settings.seed,
        **options,
    )


def _divided(
    settings: Settings, arguments: TrainingArguments, base: Any, rows: Rows, tell: Callable[[str], None]
) -> Settings:
    """The settings with how a step is divided, which the arguments are told as well."""
    steps = len(rows) // settings.batch * settings.epochs
    if steps == 0:
        raise FoveateError(f"batch={settings.batch}, but there are {len(rows)} rows; the most is batch={len(rows)}")
    division = divide(
        base,
        rows.extent(),
        settings.depths(len(base.get_decoder().layers)),
        batch=settings.batch,
        processes=arguments.world_size,
        micro=settings.micro,
        checkpointing=settings.checkpointing,
        bf16=settings.bf16,
    )
    tell(str(division))
    arguments.per_device_train_batch_size = division.micro
    arguments.gradient_accumulation_steps = division.parts
    arguments.max_steps = min(steps, settings.steps or steps)
    return dataclasses.replace(settings, micro=division.micro, checkpointing=division.checkpointing)


class _Trainer(Trainer):
    """Logs both losses and the kept shares, and draws noise that depends on seed, step and process alone."""

    def __init__(self, softened: Softened, arguments: TrainingArguments, rows: Rows, settings: Settings) -> None:
        pad = getattr(softened.base.config.get_text_config(decoder=True), "pad_token_id", None) or 0
        visual = {softened.image_token, getattr(softened.base.config, "video_token_id", None)}
        pad = pad if pad not in visual else next(other for other in range(3) if other not in visual)
        super().__init__(softened, arguments, data_collator=partial(collate, pad=pad), train_dataset=rows)
        self.softened, self.settings, self.pad = softened, settings, pad
        self.figures = Figures()
        self._examiner: Examiner | None = None
        self._drawn = (-1, 0)  # step, rows drawn for in it

    def examiner(self, rows: Sequence[Row], report: Report | None) -> Examiner:
        """What answers held-out rows, at each budget that is trained on."""
        held_out = HeldOut(rows, self.settings.budgets or (self.settings.ratios,), pad=self.pad)
        steps, kind = self.settings.check_steps, self.settings.above_random
        assert steps is not None
        self._examiner = Examiner(held_out, self.softened, steps, above_random=kind, report=report)
        return self._examiner

    def go_on(self, checkpoint: Path) -> None:
        """With what the run had added up when it wrote a checkpoint."""
        state = checkpoints.read_figures(checkpoint)
        self.figures.restore(state, self.args.device)
        if self._examiner is not None:
            self._examiner.below = state["below"]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **options: Any) -> Tensor:
        """One forward and backward pass."""
        step = self.state.global_step
        part = self._drawn[1] + 1 if self._drawn[0] == step else 0
        self._drawn = (step, part)
        number = (self.settings.seed * 1_000_003 + step) * 4096 + part
        number = number * 4096 + self.args.process_index
        self.softened.generator = torch.Generator(self.args.device).manual_seed(number % 2**63)
        self.softened.ratios = self.settings.targets(step / self.args.max_steps, step)
        loss: Tensor = super().training_step(model, inputs, *rest, **options)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        """The weighted loss."""
        outputs = model(**inputs)
        named = {name: outputs[name] for name in ("causal", "ratio", "hint", "even") if name in outputs}
        named |= {f"kept_{stage}": share for stage, share in enumerate(outputs["kept"].unbind(), start=1)}
        self.figures.add({"loss": outputs["loss"], **named})
        return outputs["loss"]

    def log(self, logs: dict[str, float], *rest: Any, **options: Any) -> None:
        """Add the means since the last line, over all processes, and to the last line those of the whole run.

        The Trainer's own figures know nothing of what was before a resumption.
        """
        logs = {**logs, **self.figures.line(self._over_processes)}
        if "train_loss" in logs:
            logs |= self.figures.run(self._over_processes, self.state.global_step, self.settings.batch)
        super().log(logs, *rest, **options)

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        """What is added up belongs to a checkpoint, which is complete once the Trainer's own state is written."""
        below = 0 if self._examiner is None else self._examiner.below
        figures = {**self.figures.state(self._over_processes), "below": below}
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with new_folder(folder):
            if self.args.should_save:
                checkpoints.write_figures(folder, figures)
            super()._save_checkpoint(*arguments, **options)

    def _over_processes(self, values: Tensor) -> Tensor:
        means: Tensor = self.accelerator.reduce(values.to(self.args.device), "mean")
        return means


def _callbacks(out: Path, max_seconds: float | None, report: Report | None, figures: Figures) -> list[TrainerCallback]:
    from transformers.integrations import TensorBoardCallback, is_tensorboard_available

    found: list[TrainerCallback] = []
    if is_tensorboard_available():
        board = TensorBoardCallback()
        board.logging_dir = str(out / "tensorboard")
        found.append(board)
    if report is not None:
        found.append(_Reporter(report, figures))
    if max_seconds is not None:
        found.append(_Deadline(max_seconds))
    return found


class _Reporter(TrainerCallback):
    """Hands each line of the log on."""

    def __init__(self, report: Report, figures: Figures) -> None:
        self.report, self.figures = report, figures

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """A line has been written."""
        line = {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}
        self.report({"step": state.global_step, "seconds": round(self.figures.seconds, 1), **line})


class _Deadline(TrainerCallback):
    """Stops, with everything saved, when the time is over; all processes stop together."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step is done."""
        over = torch.tensor(float(time.monotonic() > self.end), device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(over, torch.distributed.ReduceOp.MAX)
        if over.item():
            control.should_save = control.should_training_stop = True
