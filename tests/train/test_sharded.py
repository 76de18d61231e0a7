"""The files of examples/lvpruning at work, on two processes without GPUs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from models import tiny
from PIL import Image

from foveate.modules.lvpruning import load

pytest.importorskip("accelerate")
TESTS = Path(__file__).parents[1]
FILES = TESTS.parent / "examples" / "lvpruning"
SETTINGS = "--layers 1/3 --ratios 0.5/0.3 --rate 1e-3 --batch 4 --micro 1 --steps 2 --log-steps 1 --device cpu".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and LLaVA's JSON of eight entries with their pictures."""
    root = tmp_path_factory.mktemp("sharded")
    tiny.save(tiny.model(), root / "model")
    (root / "images").mkdir()
    entries = []
    for number in range(8):
        Image.effect_noise((30, 30), 90).convert("RGB").save(root / "images" / f"{number}.png")
        said = [{"from": "human", "value": "<image>\nw10 w11"}, {"from": "gpt", "value": f"w{30 + number}"}]
        entries.append({"image": f"{number}.png", "conversations": said})
    (root / "data.json").write_text(json.dumps(entries))
    return root


def trained(folder: Path, name: str, *launched: str) -> tuple[str, dict[str, torch.Tensor]]:
    """What two processes say, and the weights that they leave.

    Args:
        launched: modules and options that start them, and what they run.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    launcher, *options = launched
    at = "--main_process_port" if "accelerate" in launcher else "--master_port"
    command = [sys.executable, "-m", launcher, at, port, *options, "train", "lvpruning"]
    command += ["--model", "model", "--data", "data.json", "--images", "images", "--out", name, *SETTINGS]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    made = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stderr, load(folder / name / "lvpruning").state_dict()


def losses(said: str) -> list[float]:
    """Of each step."""
    lines = [line.split() for line in said.splitlines() if line.startswith("step") and " loss " in line]
    return [float(line[line.index("loss") + 1]) for line in lines]


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Two processes that hold all of the modules each."""
    return trained(folder, "plain", "torch.distributed.run", "--nproc_per_node", "2", "-m", "foveate")


def check(sharded: tuple[str, dict[str, torch.Tensor]], plain: tuple[str, dict[str, torch.Tensor]]) -> None:
    """Both lost the same in each step and left the same, but for rounding of bfloat16."""
    assert losses(sharded[0]) == pytest.approx(losses(plain[0]), rel=1e-3) and len(losses(plain[0])) == 2
    assert sharded[1].keys() == plain[1].keys()
    close = [torch.isclose(sharded[1][name], one, rtol=0.02, atol=2e-4).flatten() for name, one in plain[1].items()]
    # Where a gradient is next to nothing, rounding decides which way Adam goes.
    assert torch.cat(close).float().mean() > 0.99


def test_fsdp(folder: Path, plain: tuple[str, dict[str, torch.Tensor]]) -> None:
    """The file as it is, but for the count of processes and one entry: accelerate sends modules round on GPUs alone."""
    file = ["--config_file", str(FILES / "fsdp.yaml"), "--num_processes", "2", "--fsdp_sync_module_states", "false"]
    script = str(TESTS / "models" / "sharded_on_cpus.py")
    sharded = trained(folder, "fsdp", "accelerate.commands.launch", *file, script)
    wrapped = [line.split()[1:] for line in sharded[0].splitlines() if line.startswith("FullyShardedDataParallel")]
    assert sorted(kind for kind, *_ in wrapped) == sorted(["DecisionModule", "DecisionModule", "Softened"] * 2)
    assert all(2 * int(mine) == int(whole) for _, mine, _, whole in wrapped)
    check(sharded, plain)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed, which compiles for minutes, is not installed")
def test_deepspeed(folder: Path, plain: tuple[str, dict[str, torch.Tensor]]) -> None:
    """The file as it is, but for the count of processes."""
    file = ["--config_file", str(FILES / "deepspeed.yaml"), "--num_processes", "2"]
    sharded = trained(folder, "deepspeed", "accelerate.commands.launch", *file, "-m", "foveate")
    parts = (folder / "deepspeed").glob("checkpoint-2/global_step*/*zero_pp_rank_*_optim_states.pt")
    assert sorted(int(part.name.partition("rank_")[2].partition("_")[0]) for part in parts) == [0, 1]
    check(sharded, plain)
