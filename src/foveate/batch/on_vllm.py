"""The same answers by one vLLM engine in this process, which is handed rows as fast as it finishes them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from foveate.batch.requests import Engine, Requests
from foveate.batch.rows import Row
from foveate.batch.work import Answer
from foveate.core import FoveateError


class VllmAnswers:
    """An engine that is asked rows."""

    def __init__(self, engine: Engine) -> None:
        from vllm import EngineArgs, LLMEngine, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.requests = Requests(engine)
        self._params = SamplingParams(**self.requests.sampling, output_kind=RequestOutputKind.FINAL_ONLY)
        self._waiting: dict[str, tuple[Row, int, float]] = {}
        self._engine = LLMEngine.from_engine_args(EngineArgs(**engine.options))
        self._most = 2 * self._engine.vllm_config.scheduler_config.max_num_seqs

    def answers(self, rows: Iterable[Row]) -> Iterator[list[Answer]]:
        """The answers to rows in the order in which they are finished; a row's fault is its answer."""
        for row in rows:
            fault = self._add(row)
            if fault is not None:
                yield [{"id": row.id, "error": fault}]
            # More than can run are waiting, so that none that runs waits for pictures to be read.
            while len(self._waiting) >= self._most:
                yield from self._finished()
        while self._waiting:
            yield from self._finished()

    def _add(self, row: Row) -> str | None:
        """Ask a row; why it cannot be asked, if so."""
        if row.fault is not None:
            return row.fault
        from vllm.exceptions import VLLMClientError

        name = str(row.number)
        try:
            request = self.requests.request(row)
            before = self.requests.before(request["multi_modal_data"]["image"])
            (rendered,) = self._engine.renderer.render_cmpl([request])
            self._engine.add_request(name, rendered, self._params.clone())
        except (FoveateError, ValueError, VLLMClientError) as error:
            return str(error)
        self._waiting[name] = (row, before, time.perf_counter())
        return None

    def _finished(self) -> Iterator[list[Answer]]:
        """What one step of the engine finishes."""
        made = []
        for output in self._engine.step():
            if output.finished:
                row, before, since = self._waiting.pop(output.request_id)
                told: Any = output.outputs[0].text, output.prompt_token_ids
                made.append(self.requests.answer(row, before, told, time.perf_counter() - since))
        if made:
            yield made
