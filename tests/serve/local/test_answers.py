"""Answers over HTTP, by OpenAI's own client, are those of `generate()` on the same prompt, pruned alike."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from models import tiny
from serve.local.conftest import SPEC
from serve.local.running import asked, running

import foveate
from foveate.evaluate.scenes_task import Sample
from foveate.inference.answers import answer
from foveate.inference.loading import Loaded
from foveate.serve.local.server import application

SPECS = (
    "none",
    SPEC,
    "divprune:keep=64",
    "fastv:keep=0.5",
    "snapkv:capacity=256",
    "hiprune:keep=64",
    "cdpruner:keep=32",
)


def expected(mini: Loaded, samples: Sequence[Sample], spec: str) -> list[str]:
    handle = nullcontext() if spec == "none" else foveate.prune(mini.model, spec, processor=mini.processor)
    with handle:
        return [answer(mini.model, mini.processor, [one.image], [one.question])[0] for one in samples]


def ask(client: Any, sample: Sample, **more: Any) -> Any:
    messages = asked(sample.question, sample.image)
    return client.chat.completions.create(model="mini", messages=messages, temperature=0, **more)


def test_a_request_that_says_nothing_is_pruned_by_the_servers_spec(
    client: Any, mini: Loaded, samples: list[Sample]
) -> None:
    answers = [ask(client, sample) for sample in samples[:5]]
    assert [one.choices[0].message.content for one in answers] == expected(mini, samples[:5], SPEC)
    told = answers[0].foveate
    assert told["method"] == SPEC and told["visual_tokens"] == {"before": 576, "after": 144.0}
    assert told["prompt_tokens_unpruned"] - answers[0].usage.prompt_tokens == 576 - 144
    assert answers[0].usage.total_tokens == answers[0].usage.prompt_tokens + answers[0].usage.completion_tokens
    assert told["queue_ms"] >= 0
    assert 0 < told["choosing_ms"] < told["first_token_ms"] <= told["total_ms"]


@pytest.mark.parametrize("spec", SPECS)
def test_a_request_may_name_its_own(client: Any, mini: Loaded, samples: list[Sample], spec: str) -> None:
    answers = [ask(client, sample, extra_body={"foveate": spec}) for sample in samples[:2]]
    assert [one.choices[0].message.content for one in answers] == expected(mini, samples[:2], spec)
    assert {one.foveate["method"] for one in answers} == {spec}


def test_a_stream_brings_the_same_words(client: Any, mini: Loaded, samples: list[Sample]) -> None:
    parts = list(ask(client, samples[4], stream=True))
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text.strip() == expected(mini, samples[4:5], SPEC)[0]
    assert parts[-1].usage.prompt_tokens == parts[-1].foveate["prompt_tokens_unpruned"] - 432
    assert parts[-1].choices[0].finish_reason == "stop"


def test_a_stream_ends_as_openai_ends_it(address: str, samples: list[Sample]) -> None:
    body = {"messages": asked("how many objects are there", samples[0].image), "stream": True}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as reply:
        assert reply.read().endswith(b"\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_at_a_text(client: Any, mini: Loaded, samples: list[Sample], stream: bool) -> None:
    sample = next(one for one in samples if len(one.answer.split()) > 2)
    words = expected(mini, [sample], SPEC)[0].split()
    for stop in (words[1], ["no such", words[1]]):
        made = ask(client, sample, stop=stop, stream=stream)
        text = (
            "".join(one.choices[0].delta.content or "" for one in made) if stream else made.choices[0].message.content
        )
        assert text.split() == words[:2]


def test_an_answer_next_to_no_temperature_is_the_likeliest(client: Any, samples: list[Sample]) -> None:
    messages = asked(samples[0].question, samples[0].image)
    cold = [client.chat.completions.create(model="mini", messages=messages, temperature=one) for one in (0, 1e-200)]
    assert cold[0].choices[0].message.content == cold[1].choices[0].message.content


def test_the_other_interface(client: Any, mini: Loaded, samples: list[Sample]) -> None:
    sample = samples[1]
    parts = asked(sample.question, sample.image)[0]["content"]
    content = [
        {"type": "input_image", "image_url": parts[0]["image_url"]["url"]},
        {"type": "input_text", "text": sample.question},
    ]
    for question in ([{"role": "user", "content": content}], content):
        made = client.responses.create(model="mini", input=question)  # whole, unless it says otherwise
        assert made.output_text == expected(mini, [sample], SPEC)[0]
        assert made.usage.input_tokens == made.foveate["prompt_tokens_unpruned"] - 432
    *_, last = client.responses.create(model="mini", input=question, stream=True, extra_body={"foveate": "none"})
    assert last.type == "response.completed"
    assert last.response.output_text.strip() == expected(mini, [sample], "none")[0]
    assert last.response.usage.input_tokens == last.response.foveate["prompt_tokens_unpruned"]


def test_text_alone_runs(client: Any, mini: Loaded) -> None:
    messages = [{"role": "user", "content": "how many objects are there ?"}]
    made = client.chat.completions.create(model="mini", messages=messages)
    assert made.choices[0].message.content
    assert made.foveate["visual_tokens"] is None
    assert made.usage.prompt_tokens == made.foveate["prompt_tokens_unpruned"] < 20


def test_a_second_turn(client: Any, samples: list[Sample]) -> None:
    messages = [
        *asked(samples[0].question, samples[0].image),
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": samples[0].question},
    ]
    made = client.chat.completions.create(model="mini", messages=messages)
    assert made.choices[0].message.content
    assert made.foveate["visual_tokens"] == {"before": 576, "after": 144.0}


def test_many_clients_at_once_get_their_own_answers(client: Any, mini: Loaded, samples: list[Sample]) -> None:
    rows = [(sample, spec) for sample in samples[:4] for spec in SPECS[:3]]
    wanted = {spec: expected(mini, samples[:4], spec) for spec in SPECS[:3]}
    with ThreadPoolExecutor(10) as pool:
        got = list(pool.map(lambda row: ask(client, row[0], extra_body={"foveate": row[1]}), rows))
    texts = [one.choices[0].message.content for one in got]
    assert texts == [wanted[spec][number // 3] for number, (_, spec) in enumerate(rows)]
    assert [one.foveate["method"] for one in got] == [spec for _, spec in rows]


def test_the_figures_of_the_server(client: Any, address: str, samples: list[Sample]) -> None:
    def figures() -> dict[str, float]:
        with urllib.request.urlopen(f"{address}/metrics") as reply:
            lines = [line.rsplit(" ", 1) for line in reply.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = figures()
    ask(client, samples[0])
    grown = {name: value - before.get(name, 0.0) for name, value in figures().items()}
    assert grown['foveate_visual_tokens_total{when="before"}'] == 576
    assert grown['foveate_visual_tokens_total{when="after"}'] == 144
    assert grown['foveate_requests_total{path="/v1/chat/completions",status="200"}'] == 1
    assert grown["foveate_first_token_seconds_count"] == 1
    assert grown["foveate_per_token_seconds_count"] == grown["foveate_answer_tokens_total"] - 1
    assert figures()["foveate_requests_in_hand"] == 0


def test_the_model_and_the_health(client: Any, address: str) -> None:
    assert [model.id for model in client.models.list()] == ["mini"]
    with urllib.request.urlopen(f"{address}/health") as reply:
        assert json.load(reply) == {"status": "ok"}


def test_the_longest_answer(samples: list[Sample]) -> None:
    """A model that never ends stops where the client, the server and its context say."""
    from openai import OpenAI

    from foveate.serve.local.limits import Limits

    model = tiny.model()
    loaded = Loaded("tiny", model, tiny.processor(model))
    with running(application(loaded, limits=Limits(max_new_tokens=20))) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        picture = samples[0].image.resize((24, 24))
        counts = []
        for more in ({}, {"max_tokens": 7}, {"max_completion_tokens": 3}):
            made = client.chat.completions.create(model="tiny", messages=asked("w7 w8", picture), **more)
            assert made.choices[0].finish_reason == "length"
            counts.append(made.usage.completion_tokens)
        assert counts == [20, 7, 3]
        long = [{"role": "user", "content": "w7 " * 500}]
        made = client.chat.completions.create(model="tiny", messages=long)
        assert made.usage.completion_tokens == tiny.model().config.text_config.max_position_embeddings - 502 + 1


def test_sampling_follows_its_seed(client: Any, samples: list[Sample]) -> None:
    def drawn(seed: int) -> list[str]:
        more = dict(model="mini", seed=seed, temperature=2.0, max_tokens=8)
        messages = asked("describe the picture", samples[0].image)
        return [client.chat.completions.create(messages=messages, **more).choices[0].message.content for _ in range(2)]

    first, again = drawn(1)
    assert first == again
    assert len({first, *(drawn(seed)[0] for seed in range(2, 4))}) > 1
