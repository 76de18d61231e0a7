"""A server under load: many clients with pictures, pruned and not, mixed; answers, losses, memory and seconds.

python benchmarks/serve.py [--clients N] [--requests N] [--model M] [--out FILE.json]

Starts `foveate serve` on this machine's own address. Every answer is compared with that of `generate()` in this
process, a client in ten leaves in mid-stream, and the server's memory is read while it works.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import foveate
from foveate.evaluate.scenes_task import Sample, draw_samples
from foveate.inference.answers import answer
from foveate.inference.loading import load
from foveate.runs import write_json

SPECS = ("none", "fopru:keep=0.25", "divprune:keep=64")
JSON = {"Content-Type": "application/json"}
LONGEST = 24
LEAVES = 10  # one request in so many is left by its client


def body(sample: Sample, spec: str, stream: bool) -> bytes:
    """One request."""
    picture = io.BytesIO()
    sample.image.save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sample.question}]
    messages = [{"role": "user", "content": content}]
    return json.dumps({"messages": messages, "foveate": spec, "stream": stream, "max_tokens": LONGEST}).encode()


def ask(host: str, sent: bytes, leave: bool) -> tuple[str, str | None, float]:
    """What became of a request: its status or "left", its answer, and seconds; told to wait, it comes again."""
    start = time.perf_counter()
    while True:
        with closing(http.client.HTTPConnection(host)) as connection:
            connection.request("POST", "/v1/chat/completions", sent, JSON)
            reply = connection.getresponse()
            if leave and reply.status == 200:
                reply.readline()
                return "left", None, time.perf_counter() - start
            told = json.load(reply)
            if reply.status != 429:
                text = told["choices"][0]["message"]["content"].strip() if reply.status == 200 else None
                return str(reply.status), text, time.perf_counter() - start
            time.sleep(float(reply.headers["Retry-After"]))


def megabytes(process: int) -> float:
    """Memory of a process now."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def expected(model: str, samples: list[Sample]) -> dict[tuple[int, str], str]:
    """The answer to every sample under every spec."""
    loaded = load(model)
    found = {}
    for spec in SPECS:
        handle: Any = nullcontext()
        if spec != "none":
            handle = foveate.prune(loaded.model, spec, processor=loaded.processor)
        with handle:
            for number, one in enumerate(samples):
                pictures, questions = [one.image], [one.question]
                texts = answer(loaded.model, loaded.processor, pictures, questions, max_new_tokens=LONGEST)
                found[number, spec] = texts[0]
    return found


def main() -> None:
    """Run it and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    samples = list(draw_samples(20, seed=9))
    wanted = expected(options.model, samples)
    command = [sys.executable, "-m", "foveate", "serve", options.model, "--port", "0", "--timeout", "3600"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        host = next(line for line in server.stderr if "running on" in line).partition("http://")[2].split()[0]
        drain = ThreadPoolExecutor(1)
        drain.submit(server.stderr.read)
        try:
            rows = [(number % len(samples), SPECS[number % len(SPECS)]) for number in range(options.requests)]
            leaves = [number % LEAVES == LEAVES - 1 for number in range(options.requests)]
            sent = [body(samples[number], spec, leave) for (number, spec), leave in zip(rows, leaves, strict=True)]
            memory, start = [], time.perf_counter()
            with ThreadPoolExecutor(options.clients) as pool:
                made = [pool.submit(ask, host, data, leave) for data, leave in zip(sent, leaves, strict=True)]
                while not all(one.done() for one in made):
                    memory.append(megabytes(server.pid))
                    time.sleep(1)
            spent = time.perf_counter() - start
        finally:
            server.terminate()
    results = [one.result() for one in made]
    wrong = sum(text is not None and text != wanted[row] for row, (_, text, _) in zip(rows, results, strict=True))
    quarter = max(1, len(memory) // 4)
    figures = {
        "clients": options.clients,
        "requests": dict(Counter(status for status, _, _ in results)),
        "wrong": wrong,
        "requests_per_second": round(len(results) / spent, 2),
        "median_seconds": round(statistics.median(seconds for _, _, seconds in results), 2),
        # What a run begins with is loaded when it is first needed: the second quarter is the measure.
        "memory_mb": {
            "second_quarter": round(statistics.median(memory[quarter : 2 * quarter] or memory)),
            "last_quarter": round(statistics.median(memory[-quarter:])),
        },
    }
    print(json.dumps(figures, indent=2))
    if options.out is not None:
        write_json(options.out, figures)


if __name__ == "__main__":
    main()
