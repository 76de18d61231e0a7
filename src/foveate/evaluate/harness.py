"""The model `foveate` of lmms-eval: whatever `foveate run` loads, pruned as a spec says, in the community's harness."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from PIL import Image
from tqdm import tqdm

from foveate.core import FoveateError, Method, did_you_mean, short
from foveate.evaluate.scenes_task import NONE
from foveate.inference.answers import decode, prepared, templated
from foveate.inference.loading import find_device, load
from foveate.inference.pictures import load_image
from foveate.inference.resizing import Scaler, scaling
from foveate.prune import prune as install
from foveate.runtime.limits import room_behind
from foveate.spec import format as format_spec
from foveate.spec import parse_stages
from foveate.texts import check_text
from foveate.trace import Trace

GENERATION = ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "do_sample", "until")
"""What a task may say of its answers; all else of its `generation_kwargs` is about other models, and is named once."""


def manifest() -> Any:
    """What the entry point `lmms_eval.models` hands over, a `ModelManifest`."""
    # Importing it looks for entry points, and would find this module half imported.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("foveate", chat_class_path=f"{__name__}.Foveate")


@dataclass(frozen=True)
class _Prompt:
    """One request, ready to be asked."""

    place: int  # among the requests
    text: str  # in the model's chat template
    images: list[Image.Image]
    settings: dict[str, Any]


class Foveate(lmms):
    """Any family that can be pruned, with or without a method.

    Args:
        pretrained: mini, a folder, or a hub id.
        prune: a spec such as `fopru:keep=64`, stages joined by +, @file, or none. In `--model_args`, which splits at
            commas, a spec of several fields stands in quotes: `prune='fastv:layer=2,keep=64'`.
        clip: as `foveate.prune` takes it.
        batch_size: prompts answered at once.
        device: auto, cpu, cuda, cuda:1, mps; of several processes each takes the GPU of its number.
        dtype: auto, float32, bfloat16, float16.
        max_new_tokens: of answers whose task does not say.
        trust_remote_code: run the Python code that a hub repository ships.
        max_batch_size: of no use here; the harness hands it to every model.
        others: refused.

    Raises:
        FoveateError: as `inference.loading.load`; an unknown argument, a wrong spec, number or device, all before the
            model is loaded; or a method that cannot run on the model.
    """

    is_simple: ClassVar[bool] = False

    def __init__(
        self,
        pretrained: str = "mini",
        prune: str = "none",
        clip: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        max_new_tokens: int = 1024,
        trust_remote_code: bool = False,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        _refuse(others, inspect.signature(type(self)).parameters)
        self.batch_size = _count("batch_size", batch_size)
        self.max_new_tokens = _count("max_new_tokens", max_new_tokens)
        stages = _stages(str(prune))
        self.device = self._place(device)
        loaded = load(str(pretrained), device=str(self.device), dtype=dtype, trust_remote_code=trust_remote_code)
        self.model, self.processor = loaded.model, loaded.processor
        self.prune = format_spec(stages) if stages else NONE
        small = scaling(stages)
        self._scaler = None if small is None else Scaler(self.model, self.processor, small)
        pruned = bool(stages) and self._scaler is None
        options = {"processor": self.processor, "clip": clip}
        self._handle = install(self.model, [*stages], **options) if pruned else nullcontext()
        self.spent = _Spent()
        self._named: set[str] = set()

    def _place(self, device: str | None) -> torch.device:
        """The device of this process, after those that run with it have found each other."""
        place: torch.device = find_device(device or "auto")
        self._world_size, self._rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        if self._world_size == 1:
            return place
        from accelerate import Accelerator

        # The harness's command line has made one before, and all of a process are on one kind of device.
        self.accelerator = Accelerator()
        if place.type != self.accelerator.device.type:
            raise FoveateError(
                f"device={device!r}, but the processes of this run work on {self.accelerator.device.type}; name that, "
                "or set ACCELERATE_USE_CPU=true for a run on cpu"
            )
        return self.accelerator.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests, in batches of those that are to be answered alike."""
        found: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), desc="foveate", disable=self.rank != 0) as bar:
            for batch in self._batches(requests):
                for prompt, answer in zip(batch, self._answers(batch), strict=True):
                    found[prompt.place] = answer
                    request = requests[prompt.place]
                    self.cache_hook.add_partial("generate_until", (prompt.text, request.args[2]), answer.text)
                bar.update(len(batch))
        if self.spent.pictures:
            logger.info(f"foveate: {self.prune}: {self.spent}")
        return [found[place] for place in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused: pruning is about what a model answers."""
        raise FoveateError("tasks that compare likelihoods are not answered by foveate; take those that generate")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused: later rounds depend on how a task reads earlier answers."""
        raise FoveateError("tasks of several rounds are not answered by foveate; take those of one question each")

    def _prompt(self, place: int, request: Instance) -> _Prompt:
        """The text and pictures of one request.

        Raises:
            FoveateError: it holds a video or a sound, or a text with marks of the model's own.
        """
        _, to_messages, settings, number, task, split = request.args
        images: list[Image.Image] = []
        messages = []
        for message in to_messages(self.task_dict[task][split][number]):
            parts = []
            for part in _parts(message["content"]):
                if part["type"] == "image":
                    picture = _picture(part["url"])
                    images.append(picture if self._scaler is None else self._scaler.scaled(picture))
                    parts.append({"type": "image"})
                elif part["type"] == "text":
                    check_text(self.processor, part["text"], f"question {number} of {task}")
                    parts.append({"type": "text", "text": part["text"]})
                else:
                    raise FoveateError(f"question {number} of {task} holds a {part['type']}; pictures are answered")
            messages.append({"role": message["role"], "content": parts})
        return _Prompt(place, templated(self.processor, messages), images, self._settings(settings or {}))

    def _settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `generate()` is told; greedy unless a task wants a temperature."""
        for name in given.keys() - {*GENERATION}:
            self._warn(name, f"{name}={given[name]!r} of the task's generation_kwargs says nothing to this model")
        warm = float(given.get("temperature") or 0) if given.get("do_sample") is not False else 0.0
        sampled = {"temperature": warm, "top_p": given.get("top_p"), "top_k": given.get("top_k")}
        until = given.get("until") or []
        return {
            "do_sample": warm > 0,
            **(sampled if warm > 0 else dict.fromkeys(sampled)),
            "num_beams": given.get("num_beams") or 1,
            "max_new_tokens": given.get("max_new_tokens") or self.max_new_tokens,
            "until": (until,) if isinstance(until, str) else tuple(until),
        }

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[_Prompt]]:
        """Prompts that are answered alike: with the same settings, and all of them with pictures or none.

        Pictures are opened shortly before their turn: a benchmark has more of them than memory holds.
        """
        waiting: dict[str, list[_Prompt]] = {}
        for place, request in enumerate(requests):
            prompt = self._prompt(place, request)
            kind = f"{prompt.settings} {bool(prompt.images)}"
            alike = waiting.setdefault(kind, [])
            alike.append(prompt)
            if len(alike) == self.batch_size:
                yield waiting.pop(kind)
        yield from waiting.values()

    def _answers(self, batch: Sequence[_Prompt]) -> list[GenerationResult]:
        settings = dict(batch[0].settings)
        until = settings.pop("until")
        inputs = prepared(self.model, self.processor, [one.images for one in batch], [one.text for one in batch])
        settings["max_new_tokens"] = self._room(inputs, settings["max_new_tokens"])
        with self._handle as trace, torch.inference_mode():
            output = self.model.generate(**inputs, **settings)
        if trace is not None and batch[0].images:
            self.spent.add(trace)
        length = inputs["input_ids"].shape[1]
        texts = decode(self.processor, self.model, output, length)
        counts = TokenCounts(input_tokens=length, output_tokens=output.shape[1] - length)
        return [GenerationResult(_cut(text, until), counts) for text in texts]

    def _room(self, inputs: Any, wanted: int) -> int:
        """As many new tokens as are wanted, or as fit: some tasks let answers be as long as a context.

        Raises:
            FoveateError: a prompt leaves the decoder's context by itself.
        """
        room = room_behind(self.model, inputs)
        if room is None or wanted <= room:
            return wanted
        self._warn("max_new_tokens", f"max_new_tokens={wanted} leaves the decoder's context; answers end with it")
        return room

    def _warn(self, name: str, text: str) -> None:
        """Say something once."""
        if name not in self._named:
            self._named.add(name)
            logger.warning(f"foveate: {text}")


class _Spent:
    """What the pruned prompts of a run kept and cost, summed over its batches."""

    def __init__(self) -> None:
        self.pictures = self.before = self.after = 0
        self.flops, self.bytes = [0.0, 0.0], [0, 0]

    def add(self, trace: Trace) -> None:
        """Count one batch."""
        self.pictures += len(trace.images)
        self.before += sum(image.original for image in trace.images)
        self.after += sum(image.after for image in trace.images)
        for place, budget in enumerate((trace.budget, trace.unpruned)):
            self.flops[place] += budget.prefill_flops
            self.bytes[place] += budget.kv_bytes

    def __str__(self) -> str:
        before, after = self.before / self.pictures, self.after / self.pictures
        flops, held = (f"{one[0] / one[1]:.0%}" for one in (self.flops, self.bytes))
        return (
            f"{before:.4g} -> {after:.4g} visual tokens a picture, {flops} of the prefill FLOPs, {held} of the KV bytes"
        )


def _refuse(others: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse arguments that are none; what follows a comma of a spec without quotes looks like one."""
    for name in others:
        raise FoveateError(
            f"unknown argument {short(repr(name))}; {did_you_mean(name, {*known} - {'others', 'max_batch_size'})} "
            "A spec that holds commas stands in quotes: prune='fastv:layer=2,keep=64'"
        )


def _count(name: str, value: Any) -> int:
    """A number that is at least 1, as the harness hands it over."""
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
        raise FoveateError(f"{name}={short(repr(value))} is no number of at least 1, such as {name}=16")
    return int(value)


def _stages(prune: str) -> tuple[Method, ...]:
    """The stages of a spec, which may still have the quotes that keep its commas together."""
    text = prune.strip().strip("'\"").strip()
    stages = () if text == NONE else parse_stages(text)
    scaling(stages)  # refuses what cannot be joined
    return stages


def _parts(content: Any) -> list[dict[str, Any]]:
    """The parts of a message; a plain text is one."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _picture(given: Any) -> Image.Image:
    """A picture as tasks give it: opened already, or the path of its file."""
    if isinstance(given, Image.Image):
        return given
    if isinstance(given, str | os.PathLike):
        return load_image(os.fspath(given))
    raise FoveateError(f"a task gave {short(repr(given))} as a picture; a PIL picture or the path of a file is one")


def _cut(text: str, until: Sequence[str]) -> str:
    """An answer as far as the first of the texts that end it."""
    ends = [text.index(end) for end in until if end and end in text]
    return text[: min(ends)].strip() if ends else text
