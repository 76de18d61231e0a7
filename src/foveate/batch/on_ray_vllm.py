"""The same answers by vLLM engines on a cluster: Ray Data's own processor, whose requests and answers are made here."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator
from typing import Any

from foveate.batch.on_ray import connected, rows_in, windows_on
from foveate.batch.requests import Engine, Requests
from foveate.batch.rows import Id, Row
from foveate.batch.work import Answer
from foveate.core import FoveateError

FAULT = "__inference_error__"
"""Ray's column of what went wrong with a row, which it then hands on past every stage."""
_AT_ONCE = 4  # times what an engine has in work: rows that a task reads, and that are asked again where an engine dies
_OF_CPUS = 0.5  # of a core, that an engine without a GPU reserves: what makes requests needs some, too


def answers_on_ray_vllm(
    engine: Engine, done: Container[Id], *, address: str, workers: int | None = None
) -> Iterator[list[Answer]]:
    """The answers to rows that are not done, in an order of their own; what a killed engine had is asked again.

    An answer may then come twice, equal both times: whoever writes takes the first.

    Args:
        address, workers: as `answers_on_ray` takes them; a worker is an engine, on as many GPUs as its tensor
            parallelism says.

    Raises:
        FoveateError: there is no such cluster, it has too few GPUs or cores, or an engine fails.
    """
    with connected(address) as ray:
        size = max(1, int(engine.options.get("max_num_seqs", 1)))
        count, more = room_of(ray.cluster_resources(), int(engine.options.get("tensor_parallel_size", 1)), workers)
        rows = windows_on(ray, engine.source, done, size * _AT_ONCE)
        asked = processor(engine, size, count, more)(rows.flat_map(_Rows(engine).read))
        for row in asked.iter_rows():
            yield [_told(row)]


def room_of(resources: dict[str, float], devices: int, workers: int | None) -> tuple[int, dict[str, Any]]:
    """How many engines run, and what Ray's processor is told of where.

    Raises:
        FoveateError: the cluster has no room for so many.
    """
    gpus, cores = int(resources.get("GPU", 0)), resources.get("CPU", 0.0)
    if gpus:
        room, has, placed = gpus // devices, f"{gpus} GPUs", {}
    else:
        room, has = int((cores - 1) / (_OF_CPUS * devices)), f"{cores:g} cores and no GPU"
        placed = {"placement_group_config": {"bundles": [{"CPU": _OF_CPUS}] * devices}}
    wanted = workers if workers is not None else room if gpus else 1
    if not 1 <= wanted <= room:
        raise FoveateError(
            f"the cluster has {has}, room for {room} engines of {devices} devices each, not workers={max(1, wanted)}"
        )
    return wanted, placed


def processor(engine: Engine, size: int, count: int, more: dict[str, Any]) -> Any:
    """Ray Data's processor of a data set whose rows are what `_Rows` reads.

    Args:
        size: rows of a block that an engine is handed.
        count: engines.
        more: of its configuration.
    """
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    options = {name: value for name, value in engine.options.items() if name != "model"}
    config = vLLMEngineProcessorConfig(
        model_source=engine.options["model"],
        engine_kwargs={"disable_log_stats": True, **options},
        batch_size=size,
        concurrency=(count, count),
        should_continue_on_error=True,
        log_engine_metrics=False,
        # Prompts come as ids and answers as text.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        **more,
    )
    rows = _Rows(engine)
    return build_processor(config, preprocess=rows.request, postprocess=rows.answer)


class _Rows:
    """What Ray's tasks do with rows, in whichever process they run."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def read(self, given: dict[str, str]) -> Iterator[dict[str, Any]]:
        """The rows of a window."""
        for row in rows_in(self.engine.source, given["window"]):
            yield {"row": row}

    def request(self, given: dict[str, Any]) -> dict[str, Any]:
        """A row as Ray's engine stage takes one, or with its fault."""
        row: Row = given["row"]
        try:
            if row.fault is not None:
                raise FoveateError(row.fault)
            requests = _requests(self.engine)
            made = requests.request(row)
            pictures = made["multi_modal_data"]["image"]
        except FoveateError as error:
            return {FAULT: str(error)}
        return {
            "tokenized_prompt": made["prompt_token_ids"],
            "multimodal_data": made["multi_modal_data"],
            "mm_processor_kwargs": made["mm_processor_kwargs"],
            "sampling_params": dict(requests.sampling),
            "before": requests.before(pictures),
        }

    def answer(self, made: dict[str, Any]) -> dict[str, str]:
        """An answer, as a line of JSON, of what the engine stage says of a row."""
        told = made["generated_text"], made["prompt_token_ids"]
        answer = _requests(self.engine).answer(made["row"], made["before"], told, made["time_taken_llm"])
        return {"answer": json.dumps(answer)}


_MADE: dict[str, Requests] = {}


def _requests(engine: Engine) -> Requests:
    """What this process makes requests by; Ray unpacks `_Rows` anew for each of its tasks."""
    name = repr(engine)
    if name not in _MADE:
        _MADE[name] = Requests(engine)
    return _MADE[name]


def _told(row: dict[str, Any]) -> Answer:
    """The answer in what Ray's processor gives back: a row with a fault passes it as it was."""
    if row.get(FAULT):
        # Ray writes the kind of an engine's error before it.
        return {"id": row["row"].id, "error": re.sub(r"^\w+Error: ", "", row[FAULT])}
    answer: Answer = json.loads(row["answer"])
    return answer
