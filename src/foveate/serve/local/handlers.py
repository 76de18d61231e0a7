"""transformers' handlers of OpenAI's two interfaces, told what to prune by; their answers tell what that did."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import GenerationState

from foveate.core import FoveateError, Method, short
from foveate.inference.loading import Loaded
from foveate.prune import check_prunable
from foveate.runtime.limits import check_room, room_behind
from foveate.serve.local.bodies import CHAT, RESPONSES, SPEC, Interface, checked_fields, with_pictures
from foveate.serve.local.jobs import CURRENT, WATCHER, Job
from foveate.serve.local.limits import Limits
from foveate.serve.local.metrics import Metrics
from foveate.serve.local.pictures import read_picture
from foveate.serve.local.reports import event_with_report, with_report
from foveate.serve.specs import stages_of
from foveate.texts import check_text


class OneModel(ModelManager):
    """The model that was loaded before the server started, and no other."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self.loaded, self.force_model = loaded, loaded.name

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """As it was given: nothing is looked up in a hub."""
        return model_id

    def load_model_and_processor(self, *given: Any, **options: Any) -> Any:
        """The model and its processor."""
        return self.loaded.model, self.loaded.processor

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The one model, as OpenAI lists models."""
        return [{"id": self.loaded.name, "object": "model", "created": 0, "owned_by": "foveate"}]


class Desk:
    """Takes requests in: checks them, reads their pictures, and says what they are to be pruned by.

    Raises:
        FoveateError: the server's own spec cannot run on the model.
    """

    def __init__(self, loaded: Loaded, spec: str, limits: Limits, metrics: Metrics, clip: str | None = None) -> None:
        self.loaded, self.limits, self.metrics, self.clip = loaded, limits, metrics, clip
        self.stages = stages_of(spec, of_request=False)
        self._check(self.stages)
        self._checked: set[str] = set()

    def take(self, body: dict[str, Any], interface: Interface) -> tuple[dict[str, Any], Job]:
        """The request with its pictures read, and its job.

        Raises:
            FoveateError: whatever is wrong with the request.
        """
        taken = checked_fields(body, interface, self.limits)
        name = taken.setdefault("model", self.loaded.name)
        taken.setdefault("stream", False)  # of responses transformers would stream one that does not say
        if name != self.loaded.name:
            raise FoveateError(f"there is no model {short(repr(name))} here; {self.loaded.name} is the one")
        asked = [taken.pop(name) for name in interface.longest if name in taken]
        job = Job(self._stages(taken.pop(SPEC, None)), taken.pop("seed", None), min(asked, default=None))
        taken[interface.content] = with_pictures(
            taken[interface.content], interface.content, self.limits, self._picture, self._text
        )
        if isinstance(taken.get("instructions"), str):
            self._text(taken["instructions"], "instructions")
        elif "instructions" in taken:
            raise FoveateError("instructions is no text")
        return taken, job

    def _stages(self, spec: Any) -> tuple[Method, ...]:
        if spec is None:
            return self.stages
        stages = stages_of(spec)
        if stages and spec not in self._checked:
            self._check(stages)
            if len(self._checked) < 1000:
                self._checked.add(spec)
        return stages

    def _check(self, stages: tuple[Method, ...]) -> None:
        if stages:
            check_prunable(self.loaded.model, stages, processor=self.loaded.processor, clip=self.clip)

    def _picture(self, url: str, where: str) -> Any:
        return read_picture(url, where, self.limits.allow_urls)

    def _text(self, text: str, where: str) -> None:
        check_text(self.loaded.processor, text, where)

    def fitted(self, inputs: Any, job: Job) -> tuple[Any, int]:
        """A prompt as the model takes it, and the tokens that its answer may have.

        Raises:
            FoveateError: the prompt is too long, or what was asked for does not fit behind it.
        """
        length, most = inputs["input_ids"].shape[1], self.limits.max_prompt_tokens
        if most is not None and length > most:
            raise FoveateError(f"a prompt of {length} tokens; the most is {most}")
        model = self.loaded.model
        placed = inputs.to(model.device, dtype=model.dtype)
        if job.longest is not None:
            check_room(model, placed, job.longest)
            return placed, job.longest
        room = room_behind(model, placed)
        return placed, self.limits.max_new_tokens if room is None else min(self.limits.max_new_tokens, room)


class _Told:
    """What both handlers do alike; a mixin before one of transformers'."""

    interface: Interface
    model_manager: OneModel
    generation_state: GenerationState
    desk: Desk

    def _validate_request(self, body: dict[str, Any]) -> None:
        """The desk has."""

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict[str, Any]], modality: Any) -> list[dict[str, Any]]:
        """Messages as processors read them: parts of an unknown kind were refused, pictures are read."""
        made = ChatCompletionHandler.get_processor_inputs_from_messages(messages, modality)
        for message in made:
            content = message["content"]
            for part in content if isinstance(content, list) else ():
                if part["type"] == "image":
                    part["image"] = part.pop("url")
        return made

    def _build_generation_config(self, body: dict[str, Any], *given: Any, **options: Any) -> Any:
        """As transformers', but a temperature above 0 samples, and `stop` and the like keep to the limits."""
        config = super()._build_generation_config(body, *given, **options)  # type: ignore[misc]
        if "temperature" in body:
            config.do_sample = body["temperature"] > 0
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        config.num_beams, config.num_return_sequences, config.return_dict_in_generate = 1, 1, False
        return config

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer one request; whatever is wrong with it raises FoveateError before anything runs."""
        taken, job = await asyncio.to_thread(self.desk.take, body, self.interface)
        watcher = WATCHER.get()
        if watcher is not None:
            job.watched = True
            watcher(job)
        CURRENT.set(job)
        try:
            answer = await super().handle_request(taken, request_id)  # type: ignore[misc]
        except TemplateError as error:
            raise FoveateError(f"the model's chat template refuses these messages: {error}") from error
        if isinstance(answer, StreamingResponse):
            answer.body_iterator = self._streamed(answer.body_iterator, job)
            return answer
        told = with_report(json.loads(answer.body), job)
        self.desk.metrics.answered(job)
        return JSONResponse(told)

    async def _streamed(self, parts: Any, job: Job) -> AsyncIterator[str]:
        """Server-sent events with the report where usage stands, and OpenAI's last line."""
        try:
            async for part in parts:
                yield "".join(event_with_report(event, job) for event in str(part).split("\n\n") if event)
            if self.interface is CHAT:
                yield "data: [DONE]\n\n"
            self.desk.metrics.answered(job)
        finally:
            job.dropped.set()  # a client that goes while its answer waits has its answer not begun
            await parts.aclose()


class Chat(_Told, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    interface = CHAT

    def __init__(self, desk: Desk, manager: OneModel, state: GenerationState) -> None:
        super().__init__(manager, state)
        self.desk = desk


class Responses(_Told, ResponseHandler):
    """`/v1/responses`."""

    interface = RESPONSES

    def __init__(self, desk: Desk, manager: OneModel, state: GenerationState) -> None:
        super().__init__(manager, state)
        self.desk = desk
