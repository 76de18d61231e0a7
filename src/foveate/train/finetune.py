"""Tunes a model's decoder and projector by low-rank adapters while its visual tokens are pruned.

The model runs pruned, as it will in inference: tokens leave, and labels shrink with them. Yu et al. 2024 (image-text
interaction, Table 3) tune LLaVA-1.5 so, by its own recipe (LoRA of rank 128, Liu et al. 2023).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer

from foveate.core import FoveateError
from foveate.families import family_of
from foveate.inference import adapters
from foveate.paths import checked
from foveate.prune import check_prunable, prune
from foveate.runs import check_run, new_folder, run_folder
from foveate.spec import format as format_spec
from foveate.spec import parse_stages
from foveate.train import checkpoints
from foveate.train.conversations import Row, collate
from foveate.train.figures import Figures
from foveate.train.settings import NO_DIFFERENCE
from foveate.train.settings import Settings as Common
from foveate.train.trainer import Recipe, Report, Rows, callbacks, divide, training_arguments

FOLDER = "adapter"
_NOT_OF_THE_MODEL = ("wanted", "even")  # of rows, for modules that learn to choose


@dataclass(frozen=True)
class Settings(Common):
    """How to tune; the defaults are LLaVA-1.5's for LoRA.

    Attributes:
        prune: spec by which tokens leave meanwhile, and in inference.
        rank, alpha, dropout: of the adapters; what they add is scaled by alpha / rank.
        checkpointing: keep no activations inside decoder blocks, and compute them again going back.
    """

    positive = (*Common.positive, "alpha")
    from_one = (*Common.from_one, "rank")
    shares = (*Common.shares, "dropout")

    rate: float = 2e-4
    batch: int = 128
    prune: str = "fopru"
    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05
    checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = parse_stages(self.prune)
        object.__setattr__(self, "prune", format_spec(stages))
        sites = {part.site for stage in stages for part in stage.parts()}
        instead = "give a method that drops visual tokens, such as prune=fopru:keep=64"
        if sites == {"cache"}:
            raise FoveateError(
                f"prune={self.prune} acts on the cache alone, which a training step does not fill; {instead}"
            )
        if "picture" in sites:
            raise FoveateError(f"prune={self.prune} scales the picture, and no token of it leaves; {instead}")

    def asked(self) -> str:
        return f"pruned by {self.prune}"


def finetune(
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
) -> Path:
    """Tune a model while it is pruned, and return the folder of the adapter, `out`/adapter.

    The adapter is PEFT's, with the spec beside it; `foveate.inference.adapters.attach` puts it into the model, which is
    then pruned by that spec alone. `out` holds `run.json`, `checkpoint-*` (the last two) and `tensorboard` besides.

    Args:
        base: a loaded vision-language model; its own weights stay as they are, and it has no adapter afterwards.
        rows: `Conversations` or `SceneQuestions` with pixels.
        name: how the user calls the model.
        resume: go on with the run in `out` as if it had never stopped.
        max_seconds: stop, with everything saved, after so many seconds of this call.
        report: called with each line of the log, in the first process.
        tell: called at the start with how a step is divided, in the first process.

    Raises:
        FoveateError: the method cannot run on the model, a step that cannot be divided, a run in `out` and no `resume`,
            none and `resume`, or another model, other data or settings than it was begun with.
    """
    out, recipe = checked(out), Recipe(base, settings or Settings(), name)
    check_learns_in(base.dtype)
    processor = getattr(rows, "processor", None)
    check_prunable(base, recipe.settings.prune, processor=processor)
    arguments = training_arguments(recipe.settings, out, base.device)
    arguments.gradient_checkpointing = recipe.settings.checkpointing
    arguments.gradient_checkpointing_kwargs = {"use_reentrant": False}
    first = arguments.process_index == 0
    if first:
        check_run(out, resume)
    divide(recipe, arguments, rows, tell if first and tell else lambda said: None)
    tuned: Settings = recipe.settings
    with _adapted(base, tuned) as model:
        identity = _identity(tuned, base, rows, arguments.world_size)
        with run_folder(out, identity, resume, first):
            handle = prune(base, tuned.prune, processor=processor, short_outputs=True)
            trainer = _Tuner(model, arguments, rows, handle)
            _run(trainer, out, resume, max_seconds, report if first else None)
            if first:
                adapters.write(model, out / FOLDER, spec=tuned.prune, name=name or base.config.model_type)
    return out / FOLDER


def check_learns_in(dtype: torch.dtype | None) -> None:
    """Refuse numbers of a model that gradients pass through.

    Raises:
        FoveateError: float16.
    """
    if dtype == torch.float16:
        raise FoveateError(
            "dtype=float16 cannot hold small gradients; load the model with dtype=bfloat16, or dtype=float32"
        )


def targets(model: Any) -> list[str]:
    """Names of the linear layers in decoder and projector, where adapters go.

    Raises:
        FoveateError: there are none.
    """
    inside = {id(one) for part in (model.get_decoder(), family_of(model).projector_of(model)) for one in part.modules()}
    found = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and id(one) in inside]
    if not found:
        raise FoveateError(f"a {model.config.model_type} model has no linear layers in decoder and projector to adapt")
    return found


@contextmanager
def _adapted(base: Any, settings: Settings) -> Iterator[Any]:
    """The model with new adapters, the only weights that learn; as it was once the context is left."""
    modes = [(one, one.training) for one in base.modules()]
    learning = [(one, one.requires_grad) for one in base.parameters()]
    stated = dict(vars(base.config))
    torch.manual_seed(settings.seed)
    shape = adapters.check_peft().LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets(base),
        bias="none",
    )
    model = adapters.with_adapters(base, shape)
    try:
        yield model
    finally:
        if settings.checkpointing:
            base.gradient_checkpointing_disable()
            base.disable_input_require_grads()
        model.unload()
        for module, mode in modes:
            module.training = mode
        for parameter, learns in learning:
            parameter.requires_grad = learns
        vars(base.config).clear()  # the Trainer says there that nothing is cached
        vars(base.config).update(stated)


def _identity(settings: Settings, base: Any, rows: Rows, processes: int) -> dict[str, Any]:
    """What decides each step of a run; new adapters are a part of the model's digest, and seeded."""
    kept = {name: value for name, value in dataclasses.asdict(settings).items() if name not in NO_DIFFERENCE}
    digest = checkpoints.fingerprint(base)
    return {**kept, "model": digest, "dtype": str(base.dtype), "data": rows.fingerprint(), "processes": processes}


def _run(trainer: _Tuner, out: Path, resume: bool, max_seconds: float | None, report: Report | None) -> None:
    """Tune until the steps or the time are over, from the last checkpoint where one is to be resumed."""
    checkpoint = checkpoints.last_checkpoint(out) if resume else None
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks(out, max_seconds, report, trainer.figures):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _batch(rows: list[Row], pad: int) -> dict[str, Tensor]:
    made = collate(rows, pad)
    return {name: value for name, value in made.items() if name not in _NOT_OF_THE_MODEL}


class _Tuner(Trainer):
    """Runs each step pruned, and logs the share of the visual tokens that was left."""

    def __init__(self, model: Any, arguments: Any, rows: Rows, handle: Any) -> None:
        base = model.get_base_model()
        pad = getattr(base.config.get_text_config(decoder=True), "pad_token_id", None) or 0
        visual = {family_of(base).image_token_id(base.config), getattr(base.config, "video_token_id", None)}
        pad = pad if pad not in visual else next(other for other in range(3) if other not in visual)
        super().__init__(model, arguments, data_collator=partial(_batch, pad=pad), train_dataset=rows)
        self.handle, self.kept = handle, [0, 0]  # visual tokens since the last line: left, and in all
        self.figures = Figures()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **options: Any) -> Tensor:
        """One forward and backward pass, which may run blocks again: both are pruned alike."""
        with self.handle as trace:
            loss: Tensor = super().training_step(model, {**inputs, "use_cache": False}, *rest, **options)
        for place, name in enumerate(("after", "original")):
            self.kept[place] += sum(getattr(one, name) for one in trace.images)
        return loss

    def log(self, logs: dict[str, float], *rest: Any, **options: Any) -> None:
        """Add the share that was left since the last line, in this process."""
        if self.kept[1]:
            logs = {**logs, "kept": self.kept[0] / self.kept[1]}
            self.kept = [0, 0]
        super().log(logs, *rest, **options)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter alone; whether the vocabulary has grown, which PEFT would ask the hub, it has not."""
        assert self.model is not None
        self.model.save_pretrained(
            output_dir or self.args.output_dir, state_dict=state_dict, save_embedding_layers=False
        )

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        """Complete, or not there."""
        with new_folder(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*arguments, **options)
