"""Trains the modules of any learned method on `transformers.Trainer`, while the model that they serve stays frozen."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from foveate.core import FoveateError
from foveate.modules import storage
from foveate.paths import checked
from foveate.runs import check_run, new_folder, run_folder
from foveate.train import checkpoints
from foveate.train.conversations import Extent, Row, collate
from foveate.train.figures import Figures
from foveate.train.learner import Learner
from foveate.train.settings import NO_DIFFERENCE, Settings

Report = Callable[[dict[str, Any]], None]

_NOT_OF_THE_RECIPE = ("steps", "micro", "checkpointing", *NO_DIFFERENCE)


class Rows(Protocol):
    """Training data: numbered rows that a resumed run finds again."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Row: ...
    def fingerprint(self) -> dict[str, Any]: ...
    def extent(self) -> Extent: ...


class Recipe:
    """What a learned method brings: its settings, how its modules are made and taught, and where they go.

    Class attributes: `folder`, of the modules in a run; `title` and `paper`, for their card.
    """

    folder: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]

    def __init__(self, base: Any, settings: Any, name: str = "") -> None:
        self.base, self.settings, self.name = base, settings, name

    def check(self) -> None:
        """Refuse a model that modules cannot be trained for, before anything is written; FoveateError."""
        raise NotImplementedError(f"{type(self).__name__} has no check()")

    def divided(self, rows: Rows, processes: int, tell: Callable[[str], None]) -> Any:
        """The settings with how a step is divided: `micro` is a number.

        Raises:
            FoveateError: a step cannot be split like this.
        """
        share, left = divmod(self.settings.batch, processes)
        micro = self.settings.micro or next(rows for rows in range(min(4, share) or 1, 0, -1) if share % rows == 0)
        if left or share % micro:
            nearest = max(1, round(self.settings.batch / (micro * processes))) * micro * processes
            raise FoveateError(
                f"batch={self.settings.batch} cannot be split over {processes} processes of {micro} rows at once; "
                f"nearest: batch={nearest}"
            )
        tell(f"{micro} rows at once, {share // micro} times a step")
        return dataclasses.replace(self.settings, micro=micro)

    def build(self) -> PreTrainedModel:
        """New modules, or those of `settings.start`."""
        raise NotImplementedError(f"{type(self).__name__} has no build()")

    def learner(self, modules: PreTrainedModel, rows: int) -> Learner:
        """The modules in training; `rows` that a process adds up for one step, of whose losses it takes the mean."""
        raise NotImplementedError(f"{type(self).__name__} has no learner()")

    def save(self, modules: PreTrainedModel, folder: Path, card: str) -> None:
        """Write trained modules."""
        storage.write(modules, folder, card)

    def shape(self, modules: PreTrainedModel) -> str:
        """A sentence for the card: what the modules are and where they stand."""
        raise NotImplementedError(f"{type(self).__name__} has no shape()")

    def call(self) -> str:
        """Python that prunes by modules in FOLDER, for the card."""
        raise NotImplementedError(f"{type(self).__name__} has no call()")

    def card(self, modules: PreTrainedModel, rows: Rows, steps: int) -> str:
        """The card of trained modules: what they are for, and every setting that departs from the defaults."""
        stock, settings = type(self.settings)(), self.settings
        own = {
            key: value
            for key, value in dataclasses.asdict(settings).items()
            if value != getattr(stock, key) and key not in _NOT_OF_THE_RECIPE
        }
        departs = "".join(f"- {key}: {value} (by default {getattr(stock, key)})\n" for key, value in own.items())
        return (
            f"# {self.title} for {self.name or self.base.config.model_type}\n\n{self.shape(modules)}\n\n"
            f"```python\n{self.call()}\n```\n\n"
            f"Trained for {steps} steps of {settings.batch} rows ({rows.fingerprint()['kind']}), aiming at "
            f"{settings.asked()}; any `keep` can be asked for.\n\n"
            f"Settings that depart from the recipe's:\n\n{departs or '- none'}\n"
        )


def train(
    recipe: Recipe,
    rows: Rows,
    out: str | Path,
    *,
    resume: bool = False,
    max_seconds: float | None = None,
    report: Report | None = None,
    tell: Callable[[str], None] | None = None,
    card: str = "",
    examine: Callable[[Learner, int, Report | None], TrainerCallback | None] | None = None,
) -> Path:
    """Train a method's modules and return their folder, `out`/`recipe.folder`.

    `out` holds `run.json` (what a resumed run must find equal), `checkpoint-*` (the last two), `tensorboard` (each loss
    and the share kept at each stage) and, once the steps or the time are over, the modules.

    Args:
        rows: `Conversations` or `SceneQuestions`.
        resume: go on with the run in `out` as if it had never stopped.
        max_seconds: stop, with everything saved, after so many seconds of this call.
        report: called with each line of the log, in the first process.
        tell: called at the start with how a step is divided, in the first process.
        card: text of the README beside the modules; by default it says what they were trained on and how.
        examine: makes what judges the modules while they train, of the learner, the padding token and `report`.

    Raises:
        FoveateError: a model that cannot be trained for, settings that cannot be met, a run in `out` and no `resume`,
            none and `resume`, one that is still at work, or another model, other data or settings than it was begun
            with.
    """
    base, out = recipe.base, checked(out)
    recipe.check()
    arguments = training_arguments(recipe.settings, out, base.device)
    first = arguments.process_index == 0
    if first:
        check_run(out, resume)
    divide(recipe, arguments, rows, tell if first and tell else lambda said: None)
    before = checkpoints.fingerprint(base)
    identity = _identity(recipe.settings, before, base, rows, arguments.world_size)
    modules = recipe.build()
    with run_folder(out, identity, resume, first):
        base.to(arguments.device)
        share = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        learner = recipe.learner(modules.float().train().requires_grad_(True), share)
        trainer = _Trainer(learner, arguments, rows, recipe.settings)
        if examine is not None:
            trainer.examined_by(examine(learner, trainer.pad, report if first else None))
        _run(trainer, out, resume, max_seconds, report if first else None)
        if checkpoints.fingerprint(base) != before or any(one.grad is not None for one in base.parameters()):
            raise RuntimeError("training has changed the frozen model")
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathers what was sharded
        if first:
            whole = type(modules)(modules.config)
            whole.load_state_dict({key.partition("gates.")[2]: value for key, value in weights.items()})
            recipe.save(whole, out / recipe.folder, card or recipe.card(whole, rows, trainer.state.global_step))
    return out / recipe.folder


def _run(trainer: _Trainer, out: Path, resume: bool, max_seconds: float | None, report: Report | None) -> None:
    """Train until the steps or the time are over, from the last checkpoint where one is to be resumed."""
    checkpoint = checkpoints.last_checkpoint(out) if resume else None
    if checkpoint is not None:
        trainer.go_on(checkpoint)
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks(out, max_seconds, report, trainer.figures):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _identity(settings: Settings, model: str, base: Any, rows: Rows, processes: int) -> dict[str, Any]:
    """What decides each step of a run."""
    kept = {name: value for name, value in dataclasses.asdict(settings).items() if name not in NO_DIFFERENCE}
    return {**kept, "model": model, "dtype": str(base.dtype), "data": rows.fingerprint(), "processes": processes}


def training_arguments(settings: Settings, out: Path, device: torch.device) -> TrainingArguments:
    """What the Trainer is told, but for how a step is divided."""
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


def divide(recipe: Recipe, arguments: TrainingArguments, rows: Rows, tell: Callable[[str], None]) -> None:
    """Give the recipe and the arguments how a step is divided."""
    settings = recipe.settings
    steps = len(rows) // settings.batch * settings.epochs
    if steps == 0:
        raise FoveateError(f"batch={settings.batch}, but there are {len(rows)} rows; the most is batch={len(rows)}")
    recipe.settings = settings = recipe.divided(rows, arguments.world_size, tell)
    assert settings.micro is not None
    arguments.per_device_train_batch_size = settings.micro
    arguments.gradient_accumulation_steps = settings.batch // arguments.world_size // settings.micro
    arguments.max_steps = min(steps, settings.steps or steps)


class _Trainer(Trainer):
    """Logs each loss and the kept shares, and draws noise that depends on seed, step and process alone."""

    def __init__(self, learner: Learner, arguments: TrainingArguments, rows: Rows, settings: Settings) -> None:
        pad = getattr(learner.base.config.get_text_config(decoder=True), "pad_token_id", None) or 0
        visual = {learner.image_token, getattr(learner.base.config, "video_token_id", None)}
        pad = pad if pad not in visual else next(other for other in range(3) if other not in visual)
        super().__init__(learner, arguments, data_collator=partial(collate, pad=pad), train_dataset=rows)
        self.learner, self.settings, self.pad = learner, settings, pad
        self.figures = Figures()
        self._examiner: Any = None
        self._drawn = (-1, 0)  # step, rows drawn for in it

    def examined_by(self, examiner: Any) -> None:
        """Let an examiner judge the modules; None is nobody."""
        if examiner is not None:
            self._examiner = examiner
            self.add_callback(examiner)

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
        self.learner.generator = torch.Generator(self.args.device).manual_seed(number % 2**63)
        self.learner.ratios = self.settings.targets(step / self.args.max_steps, step)
        loss: Tensor = super().training_step(model, inputs, *rest, **options)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        """The weighted loss."""
        outputs = model(**inputs)
        named = {name: value for name, value in outputs.items() if name not in ("loss", "kept")}
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


def callbacks(out: Path, max_seconds: float | None, report: Report | None, figures: Figures) -> list[TrainerCallback]:
    """What writes the figures down, hands them on, and stops when the time is over."""
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
