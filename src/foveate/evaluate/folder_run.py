"""Answers of several rivals to a folder's questions, written down batch by batch, so that a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from foveate.checkpoints import fingerprint
from foveate.core import FoveateError, Method
from foveate.evaluate.left_out import LeaveOut, LeftOut
from foveate.evaluate.local_task import Folder, Question, turns
from foveate.evaluate.scenes_task import AHEAD
from foveate.evaluate.unpruned import decoder_layers, unpruned_of_all, visual_tokens
from foveate.families import family_of
from foveate.inference.answers import decode, encode, greedy
from foveate.inference.pictures import load_image, upright_size
from foveate.inference.processes import ALONE, Processes
from foveate.inference.resizing import Scaler, check_runnable, scalers_of, scaling
from foveate.inference.videos import Clip, Sampler, read_header
from foveate.paths import Given
from foveate.prune import prune, share_encoding
from foveate.runs import append_line, drop_torn, run_folder
from foveate.spec import format as format_spec
from foveate.texts import check_text

if TYPE_CHECKING:
    from PIL import Image

ANSWERS = "answers.jsonl"
"""One line for each batch that a rival has answered, whole or not there. Processes beside the first have files of their
own, `answers-1.jsonl` and so on."""

Progress: TypeAlias = Callable[[int], None]


@dataclass(frozen=True)
class Ask:
    """One prompt: a question, and which turn of its options."""

    question: Question
    turn: int = 0


@dataclass(frozen=True)
class Answered:
    """One batch answered by one rival.

    Attributes:
        rival: its spec; "none" for the unpruned model.
        batch: which of the batches of `asks`.
        answers: of its prompts, in their order.
        tokens: visual tokens of each prompt that reached the end of the prefill.
        layers: visual tokens of a prompt that each decoder layer sees, a mean of the batch.
        flops, bytes: of all prompts together, pruned and unpruned; of the unpruned model both are 0.
    """

    rival: str
    batch: int
    answers: list[str]
    tokens: list[int]
    layers: list[float]
    flops: list[float]
    bytes: list[int]


def asks(folder: Folder) -> list[Ask]:
    """Every prompt of a folder, in the order of its lines."""
    return [Ask(one, turn) for question in folder.questions for turn, one in enumerate(turns(question))]


def settings(
    name: str,
    model: Any,
    folder: Folder,
    rivals: Mapping[str, Sequence[Method]],
    *,
    frames: Any,
    fps: Any,
    **asked: Any,
) -> dict[str, Any]:
    """What must be equal for a run to go on as if it had never stopped.

    Args:
        name: how the user calls the model.
        frames, fps: of videos.
        asked: further settings that an answer depends on.
    """
    import torch
    import transformers

    return {
        "model": name,
        "weights": fingerprint(model),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "data": folder.digest,
        "rivals": list(rivals),
        **asked,
        **({"frames": frames, "fps": fps} if folder.videos else {}),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def answer_folder(
    model: Any,
    processor: Any,
    folder: Folder,
    rivals: Mapping[str, Sequence[Method]],
    *,
    name: str,
    out: Given,
    resume: bool = False,
    batch: int = 16,
    max_new_tokens: int = 32,
    clip: Any = None,
    frames: int | None = None,
    fps: float | None = None,
    progress: Progress = lambda count: None,
    among: Processes = ALONE,
    leave_out: LeaveOut | None = None,
) -> list[Answered]:
    """Greedy answers of every rival to the same prompts, in the same batches; what a killed run has is not asked again.

    Args:
        rivals: stages by spec; one without stages is the unpruned model.
        name: how the user calls the model.
        out: the folder of the run, which gets `answers.jsonl`.
        resume: go on with the run that is there.
        clip: as `prune` takes it.
        frames, fps: of videos, how many are shown of each, or of each second; else what the processor does by itself.
        progress: called with the number of prompts answered since the last call; at first with those that are there.
        among: processes that share the batches; a run that was killed may be resumed by fewer or more of them.
        leave_out: as `left_out.LeaveOut`; without it a rival that does not fit a picture is an error.

    Returns:
        a line for each rival that was not left out and batch; in processes beside the first nothing.

    Raises:
        FoveateError: `out` holds a run and `resume` is False, or one of other settings; a question holds special tokens
            of the model; or a method cannot run on it, or not on one of the pictures.
    """
    groups = _batches(asks(folder), batch)
    _check(model, processor, folder, rivals, clip)
    sampler = sampler_of(processor, folder, frames, fps)
    asked: dict[str, Any] = {"batch": batch, "max_new_tokens": max_new_tokens, "frames": frames, "fps": fps}
    identity = settings(name, model, folder, rivals, **asked)
    with run_folder(out, identity, resume, among.first) as path:
        scalers, left = scalers_of(model, processor, rivals), LeftOut(leave_out)
        run = _Run(model, processor, rivals, scalers, clip, path / _file(among), max_new_tokens, progress, left)
        # Others may be at work on their files as soon as the first has read them.
        before = among.told(lambda: [line for file in files_of(path) for line in read_answers(file)])
        done = {(line.rival, line.batch): line for line in before}
        fresh: list[Answered] = []
        run.progress(sum(len(line.answers) for line in done.values()))
        for number, group in enumerate(groups):
            missing = [spec for spec in rivals if (spec, number) not in done and spec not in left.why]
            if not missing or not among.takes(number):
                continue
            fresh += run.answer_all(missing, number, _shown(folder, group, sampler))
        done |= {(line.rival, line.batch): line for line in among.gathered(fresh)}
        left.share(among)
    there = [spec for spec in rivals if spec not in left.why and among.first]
    return [done[spec, number] for spec in there for number in range(len(groups))]


def _batches(prompts: Sequence[Ask], batch: int) -> list[Sequence[Ask]]:
    return [prompts[start : start + batch] for start in range(0, len(prompts), batch)]


def files_of(folder: Path) -> list[Path]:
    """The files of a run's answers, of as many processes as there ever were."""
    return sorted(folder.glob(f"{Path(ANSWERS).stem}*.jsonl"))


def _file(among: Processes) -> str:
    return ANSWERS if among.first else f"{Path(ANSWERS).stem}-{among.number}.jsonl"


def _together(rivals: Mapping[str, Sequence[Method]]) -> tuple[list[str], set[str]]:
    """Which rivals look at the same encoding, as whatever acts behind the encoder does, and what they need of it."""
    parts = {spec: [part for stage in stages for part in stage.parts()] for spec, stages in rivals.items()}
    together = [spec for spec in rivals if all(part.site not in AHEAD for part in parts[spec])]
    return together, {need for spec in together for part in parts[spec] for need in part.needs}


def _check(model: Any, processor: Any, folder: Folder, rivals: Mapping[str, Sequence[Method]], clip: Any) -> None:
    """Refuse questions with marks of the model, and rivals that cannot run on it or scale a picture to their budget."""
    for ask in asks(folder):
        check_text(processor, ask.question.prompt, f"the question {ask.question.id!r}")
    for stages in rivals.values():
        if stages:
            check_rival(model, processor, stages, folder, clip)


def check_rival(model: Any, processor: Any, stages: Sequence[Method], folder: Folder, clip: Any = None) -> None:
    """Refuse stages that cannot run on a model, or not on what a folder's questions are about; nothing is encoded.

    Raises:
        FoveateError: as `check_runnable`, or videos that cannot be pruned.
    """
    family, scales = family_of(model), scaling(stages) is not None
    if folder.videos and scales:
        raise FoveateError(f"{format_spec(tuple(stages))} scales pictures, and these questions are about videos")
    if folder.videos and family.videos is None and not family.frames:
        raise FoveateError(f"videos of {family.name} cannot be pruned; pictures can")
    check_runnable(model, processor, stages, sizes_of(folder) if scales else (), clip=clip)


def sampler_of(processor: Any, folder: Folder, frames: int | None, fps: float | None) -> Sampler | None:
    """What chooses the frames of a folder's videos; None where its questions are about pictures.

    Raises:
        FoveateError: the processor reads no videos, or cannot sample one so; it is named.
    """
    if not folder.videos:
        if frames is not None or fps is not None:
            raise FoveateError("frames and fps are of videos, and these questions are about pictures")
        return None
    sampler = Sampler(processor, frames, fps)
    for path, own in dict.fromkeys((question.video, question.fps) for question in folder.questions):
        sampler.chosen(read_header(folder.path / path, own))
    return sampler


def read_answers(file: Path) -> list[Answered]:
    """The lines of a run, without one that a kill has cut short, which leaves the file too.

    Raises:
        FoveateError: another line is damaged; it is named.
    """
    if not file.exists():
        return []
    drop_torn(file)
    found = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            found.append(Answered(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise FoveateError(
                f"{file} is damaged in line {number}; take the line out, or start in another folder"
            ) from error
    return found


@lru_cache(maxsize=4)  # asked for each rival that scales them
def sizes_of(folder: Folder) -> tuple[tuple[int, int], ...]:
    """Width and height of a folder's pictures, as their headers say them; each size once."""
    names = dict.fromkeys(question.image for question in folder.questions)
    return tuple(dict.fromkeys(upright_size(folder.path / name) for name in names))


def _shown(
    folder: Folder, group: Sequence[Ask], sampler: Sampler | None
) -> tuple[list[list[Image.Image | Clip]], list[str]]:
    """The picture or video of each prompt, and its text."""
    ones = {ask.question.shown: ask.question for ask in group}
    seen = {name: load_shown(folder, question, sampler) for name, question in ones.items()}
    return [[seen[ask.question.shown]] for ask in group], [ask.question.prompt for ask in group]


def load_shown(folder: Folder, question: Question, sampler: Sampler | None) -> Image.Image | Clip:
    """The picture that a question is about, or the frames of its video."""
    if sampler is None:
        return load_image(folder.path / question.image)
    return sampler.clip(read_header(folder.path / question.video, question.fps))


@dataclass(frozen=True)
class _Run:
    """A model at work on the questions, and the file in which its answers are written down."""

    model: Any
    processor: Any
    rivals: Mapping[str, Sequence[Method]]
    scalers: Mapping[str, Scaler]
    clip: Any
    file: Path
    max_new_tokens: int
    progress: Progress
    left: LeftOut
    handles: dict[str, Any] = field(default_factory=dict)  # made when first needed: a resumed run may need none

    def answer_all(self, specs: Sequence[str], number: int, shown: Any) -> list[Answered]:
        """Answer one batch by rivals, of which those share an encoding that can; without such as are left out.

        Args:
            shown: pictures or videos, and questions.
        """
        together, needs = _together(self.rivals)
        inputs = encode(self.model, self.processor, *shown)
        lines: list[Answered] = []
        with share_encoding(self.model, needs):
            for spec in (spec for spec in specs if spec in together):
                lines += self.left.tried(spec, partial(self.answer, spec, number, inputs))
        for spec in (spec for spec in specs if spec not in together):
            lines += self.left.tried(spec, partial(self.answer_alone, spec, number, shown, inputs))
        return lines

    def answer(self, spec: str, number: int, inputs: Any) -> Answered:
        """Answer one batch, through the rival's handle where there is one, and write it down."""
        rows, length = inputs["input_ids"].shape
        if not self.rivals[spec]:
            output = greedy(self.model, inputs, max_new_tokens=self.max_new_tokens)
            tokens = visual_tokens(self.model, inputs)
            layers = [sum(tokens) / rows] * decoder_layers(self.model)
            figures: dict[str, Any] = {"layers": layers, "flops": [0.0, 0.0], "bytes": [0, 0]}
        else:
            with self._handle(spec) as trace:
                output = greedy(self.model, inputs, max_new_tokens=self.max_new_tokens)
            images = trace.images
            tokens = [sum(image.after for image in images if image.row == row) for row in range(rows)]
            figures = {
                "layers": [count * len(images) / rows for count in trace.budget.tokens],
                "flops": [trace.budget.prefill_flops, trace.unpruned.prefill_flops],
                "bytes": [trace.budget.kv_bytes, trace.unpruned.kv_bytes],
            }
        return self._written(
            Answered(spec, number, decode(self.processor, self.model, output, length), tokens, **figures)
        )

    def answer_alone(self, spec: str, number: int, asked: Any, whole: Any) -> Answered:
        """Answer one batch by a rival that changes what is encoded, or the pictures themselves, and write it down.

        Args:
            asked: pictures and questions.
            whole: the inputs of the whole pictures.
        """
        if spec not in self.scalers:
            return self.answer(spec, number, whole)
        inputs = self.scalers[spec].encode(*asked)
        output = greedy(self.model, inputs, max_new_tokens=self.max_new_tokens)
        said = decode(self.processor, self.model, output, inputs["input_ids"].shape[1])
        tokens, flops, held = unpruned_of_all(self.model, inputs)
        _, of_whole, held_whole = unpruned_of_all(self.model, whole)
        layers = [sum(tokens) / len(tokens)] * decoder_layers(self.model)
        costs: dict[str, Any] = {"flops": [flops, of_whole], "bytes": [held, held_whole]}
        return self._written(Answered(spec, number, said, tokens, layers, **costs))

    def _written(self, line: Answered) -> Answered:
        append_line(self.file, json.dumps(vars(line)))
        self.progress(len(line.answers))
        return line

    def _handle(self, spec: str) -> Any:
        if spec not in self.handles:
            stages = [*self.rivals[spec]]
            self.handles[spec] = prune(self.model, stages, processor=self.processor, clip=self.clip)
        return self.handles[spec]


def each(lines: Sequence[Answered], folder: Folder, batch: int) -> Iterator[tuple[str, Ask, str]]:
    """(rival, prompt, what it answered) of every line."""
    prompts = asks(folder)
    for line in lines:
        start = line.batch * batch
        for ask, answer in zip(prompts[start : start + batch], line.answers, strict=True):
            yield line.rival, ask, answer
