"""How transformers' serving generates: on its one thread, but inside a handle, and only for clients that are there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    GenerateManager,
    GenerationState,
    _GenerationCancelled,
)

from foveate.core import FoveateError
from foveate.prune import prune
from foveate.serve.local.errors import FAILED
from foveate.serve.local.jobs import CURRENT, Job

_log = logging.getLogger("foveate.serve")


class Clock:
    """A streamer that notes when tokens come, hands them on, and ends the answer once its client has gone."""

    def __init__(self, job: Job, streamer: Any) -> None:
        self.job, self.streamer = job, streamer

    def put(self, value: Tensor) -> None:
        """Take a token (1,); the prompt (1, L) comes first."""
        if self.job.dropped.is_set():
            raise _GenerationCancelled
        if value.ndim == 1:
            self.job.ticks.append(time.perf_counter())
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        """Nothing yet: whoever waits for the end reads what the job says, and that is known once the handle is done."""


class Ends(StoppingCriteria):
    """An answer ends once it holds one of some texts.

    Args:
        texts: one, or several.
        length: of the prompt.
    """

    def __init__(self, processor: Any, texts: str | list[str], length: int) -> None:
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.texts, self.length = [texts] if isinstance(texts, str) else texts, length

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Whether each answer is done (1,)."""
        text = self.tokenizer.decode(input_ids[0, self.length :], skip_special_tokens=True)
        return torch.tensor([any(one in text for one in self.texts)], device=input_ids.device)


class Pruned:
    """A model as serving sees it, whose `generate` runs inside a handle of one job."""

    def __init__(self, model: Any, processor: Any, job: Job, clip: str | None) -> None:
        self._model, self._processor, self._job, self._clip = model, processor, job, clip

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **options: Any) -> Tensor:
        """One answer (1, L), prompt included."""
        job = self._job
        if job.dropped.is_set():
            raise _GenerationCancelled
        job.begun = time.perf_counter()
        streamer = options.get("streamer")
        options["streamer"] = Clock(job, streamer)
        self._end_at_texts(options)
        if job.seed is not None:
            torch.manual_seed(job.seed)
        stages = job.stages
        handle: Any = nullcontext()
        if stages:
            handle = prune(self._model, stages, processor=self._processor, clip=self._clip)
        try:
            with torch.inference_mode(), handle as trace:
                output: Tensor = self._model.generate(**options)
        except (FoveateError, _GenerationCancelled):
            raise
        except Exception as error:  # its text may tell of the server what clients are not to know
            _log.error("an answer failed", exc_info=error)
            raise RuntimeError(FAILED) from error
        job.note(trace, options["input_ids"].shape[1])
        if streamer is not None:
            streamer.end()
        return output

    def _end_at_texts(self, options: dict[str, Any]) -> None:
        """Look for the texts that end an answer ourselves: transformers' way knows no tokenizer of whole words."""
        options.pop("tokenizer", None)
        config: Any = options.get("generation_config")
        texts = getattr(config, "stop_strings", None)
        if texts:
            config.stop_strings = None
            length = options["input_ids"].shape[1]
            options["stopping_criteria"] = [*options.get("stopping_criteria", ()), Ends(self._processor, texts, length)]


class Manager(GenerateManager):
    """Answers of one model, one after the other, each inside the handle of its job.

    Args:
        fitted: takes a prompt and its job; returns the prompt as the model takes it, and the most tokens of its answer.
    """

    def __init__(self, fitted: Callable[[Any, Job], tuple[Any, int]], clip: str | None) -> None:
        super().__init__()
        self._fitted, self._clip = fitted, clip

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> Any:
        """As transformers', for the current job."""
        job = CURRENT.get()
        inputs, gen_config.max_new_tokens = self._fitted(inputs, job)
        pruned: Any = Pruned(model, processor, job, self._clip)
        return super().generate_streaming(pruned, processor, inputs, gen_config, request_id, response_parser)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        """As transformers', for the current job; it ends when its client goes."""
        job = CURRENT.get()
        inputs, gen_config.max_new_tokens = self._fitted(inputs, job)
        pruned: Any = Pruned(model, processor, job, self._clip)
        work = asyncio.ensure_future(super().generate_non_streaming(pruned, processor, inputs, gen_config, request_id))
        work.add_done_callback(_seen)
        try:
            # What the thread will set must stay there to be set, also after the client has gone.
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            job.dropped.set()
            raise


def _seen(work: asyncio.Future[Any]) -> None:
    """Take an error that nobody waits for any more."""
    if not work.cancelled():
        work.exception()


class State(GenerationState):
    """Hands out the one manager."""

    def __init__(self, manager: Manager) -> None:
        super().__init__()
        self._manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        """The manager of the server's model."""
        return self._manager
