"""Engines and references for the tests that run vLLM; without vLLM none of them is collected."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

TESTS = Path(__file__).parents[3]
PATIENCE = 900  # seconds until a reference must be there

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


_WRITERS: list[subprocess.Popen[bytes]] = []


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where other processes write the references that the chosen tests need, while the first engines start.

    A server that is needed later starts meanwhile, too.
    """
    made = tmp_path_factory.mktemp("references")
    if any("launched" in item.fixturenames for item in request.session.items if isinstance(item, pytest.Function)):
        request.getfixturevalue("launched")
    script = str(TESTS / "references" / "vllm_answers.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    needed = {"families" if "families" in item.path.name else "mini" for item in request.session.items}
    commands = [[sys.executable, script, str(made), what] for what in sorted(needed)]
    _WRITERS.extend(subprocess.Popen(command, env=environment) for command in commands)
    yield made
    for process in _WRITERS:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def reference(folder: Path) -> Callable[[str], Any]:
    """Answers of a family, or of `mini`, once they are written."""

    def wait(name: str) -> Any:
        until = time.monotonic() + PATIENCE
        while not (folder / f"{name}.json").is_file():
            assert time.monotonic() < until, f"no reference for {name}"
            assert not any(process.poll() for process in _WRITERS), "a reference could not be made; see above"
            time.sleep(0.2)
        return json.loads((folder / f"{name}.json").read_text())

    return wait


_ENGINES: list[Any] = []  # one that is collected takes what others share with it


@pytest.fixture(scope="session")
def engine() -> Callable[..., Any]:
    """Start an engine: a model, a spec or None for a stock engine, and what differs from usual."""
    from vllm import LLM

    import foveate

    def start(model: str, spec: str | None, **more: Any) -> Any:
        usual: dict[str, Any] = dict(
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=64,
            block_size=32,  # so that short prompts are found again
            num_gpu_blocks_override=2048,
            limit_mm_per_prompt={"image": 3},
        )
        usual |= more
        given = {"model": model, **usual} if spec is None else foveate.vllm.options(model, spec, **usual)
        _ENGINES.append(LLM(**given))
        return _ENGINES[-1]

    return start


@dataclass(frozen=True)
class Launched:
    """A server that was started, and may not answer yet."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """`foveate serve`, as a user starts it."""
    from references.vllm_answers import MINI

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "foveate", "serve", "mini", "--engine", "vllm", "--prune", MINI[0]]
    command += ["--foveate-methods", "visionzip,cdpruner", "--limit-mm-per-prompt", '{"image": 1}']
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8"]
    command += ["--num-gpu-blocks-override", "256", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        running = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    yield Launched(running, f"http://127.0.0.1:{port}", log)
    os.killpg(running.pid, signal.SIGTERM)
    running.wait(60)
