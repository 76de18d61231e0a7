"""Engines and references for the tests that run vLLM; without vLLM none of them is collected."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
    """Where other processes write the references that the chosen tests need, while the first engines start."""
    made = tmp_path_factory.mktemp("references")
    script, environment = str(TESTS / "references" / "vllm_answers.py"), {**os.environ, "PYTHONPATH": str(TESTS)}
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
