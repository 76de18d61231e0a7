"""Beside peers: kvpress, which shortens caches, and OpenVINO GenAI, which drops visual tokens by its CDPruner.

python benchmarks/peers.py [--quick] [--parts kvpress,float32,bfloat16] [--kvpress PYTHON] [--openvino PYTHON]
                           [--threads N] [--models FOLDER] [--out FILE.json]

Each peer runs in an environment of its own, which is passed over where it is not there, and answers over a pipe, so
that all take turns, round by round, on as many cores. The environments, above .venv (a torch without a version may be
one for GPUs):

    python3.11 -m venv .venv-kvpress
    .venv-kvpress/bin/pip install kvpress==0.5.5 transformers==5.2.0 torch==2.13.0
    python3.11 -m venv .venv-openvino
    .venv-openvino/bin/pip install openvino==2026.4.1 openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 \\
        optimum-intel==2.2.0 transformers==4.57.6 torch==2.13.0
    .venv-openvino/bin/pip uninstall --yes torchvision    # where its build does not fit that torch

kvpress: a Llama of width 512, 4 layers, head width 64, a prompt of 1,084, of which 256 stay in the cache; its times are
divided by those of its own stock model, ours by those of ours, a LLaVA with that decoder and next to no encoder.
ObservedAttentionPress needs eager attention, and so is divided by a stock model with that; beside it stands what it is
against one with sdpa.

OpenVINO: a Qwen2-VL of 8 blocks of width 640, 4,096 patches, and 8 layers of width 1,024, in float32 and bfloat16,
nothing, half and three quarters pruned; prefix cache off, the cache in the precision that OpenVINO chooses. In bfloat16
it ends with a floating-point exception on one thread, and works on two. All weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from cpu import Row, llava, prompt, row, show
from in_peers.answering import Ticks
from overhead import qwen_prompt
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2VLForConditionalGeneration
from written import write_figures

import foveate
from foveate.inference.compiling import compiled_decoding
from foveate.runtime.seams import CACHE

Figures = dict[str, float]
KINDS = ("process", "clock")
VISUAL, WORDS, KEPT, WINDOW = 1024, 60, 256, 64
LLAMA = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 64,
    "vocab_size": 1000,
}  # fmt: skip
TEXT = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 1000, "max_position_embeddings": 8192, "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
}  # fmt: skip
VISION = {"depth": 8, "embed_dim": 640, "hidden_size": 1024, "num_heads": 10, "patch_size": 14}
PRUNED = (0, 50, 75)  # percent


class Missing(RuntimeError):
    """A peer is not to be had, or has ended."""


class Peer:
    """A peer's process, which answers one command after the other."""

    def __init__(self, python: Path, script: str, **asked: Any) -> None:
        path = Path(__file__).with_name("in_peers") / script
        threads = {"OMP_NUM_THREADS": str(asked["threads"]), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [str(python), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **threads},
        )  # fmt: skip
        missing = self._exchange(asked).get("missing")
        if missing:
            self.end()
            raise Missing(f"{python} lacks a package: {missing}")

    def _exchange(self, sent: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(sent) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise Missing(f"{self._process.args} ended with {self._process.wait()} when it was sent {sent}")
        return json.loads(line)

    def ask(self, do: str, **options: Any) -> Any:
        """What one command gives."""
        return self._exchange({"do": do, **options})

    def end(self) -> None:
        """Let it go."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@contextmanager
def started(python: Path, script: str, **asked: Any) -> Iterator[Peer]:
    """A peer at work.

    Raises:
        Missing: its environment is not there, or lacks a package.
    """
    if not python.exists():
        raise Missing(f"{python} is not there; the first lines of {Path(__file__).name} say how to make it")
    peer = Peer(python, script, **asked)
    try:
        yield peer
    finally:
        peer.end()


def in_turns(rivals: Mapping[str, Callable[[], Figures]], rounds: int) -> dict[str, Figures]:
    """Medians of what each rival gives, one after the other in every round; the first round warms up and is dropped."""
    found: dict[str, list[Figures]] = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        for name, run in rivals.items():
            figures = run()
            said = ", ".join(f"{one} {value:,.1f}" for one, value in figures.items())
            print(f"round {turn} of {rounds}, {name}: {said}", file=sys.stderr)  # a round takes minutes
            if turn:
                found[name].append(figures)
    return {
        name: {one: statistics.median(all_[one] for all_ in found[name]) for one in found[name][0]} for name in found
    }


def ours(model: Any, inputs: Any, spec: str | None, answer: int, **options: Any) -> Callable[[], Figures]:
    """One answer of the model under a method, measured as the peers measure theirs; with the bytes of the cache."""
    handle = foveate.prune(model, spec) if spec else nullcontext()  # one, which keeps its graphs

    def run() -> Figures:
        with torch.no_grad(), handle:
            ticks = Ticks()
            given = {**inputs, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
            said = model.generate(**given, max_new_tokens=answer, streamer=ticks, return_dict_in_generate=True)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in said[CACHE].layers)
        return {**ticks.figures(), "bytes": held}

    return run


def ratio(one: Figures, other: Figures, what: str) -> dict[str, float]:
    """One's time over another's, by each clock."""
    return {kind: one[f"{what}, {kind}"] / other[f"{what}, {kind}"] for kind in KINDS}


# ---------------------------------------------------------------------------------------------------------------------
# kvpress


def beside_kvpress(peer: Peer, rounds: int, answer: int) -> list[Row]:
    """SnapKV and H2O, each against the unpruned model of the same library."""
    vision = CLIPVisionConfig(
        image_size=448, patch_size=14, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1
    )
    model = llava(vision, LlamaConfig(**LLAMA))
    inputs = prompt(model, words=WORDS)
    half = KEPT // 2
    rivals = {
        "kvpress, stock": lambda: peer.ask("answer", press=None, attention="sdpa"),
        "kvpress, stock eager": lambda: peer.ask("answer", press=None, attention="eager"),
        "SnapKVPress": lambda: peer.ask("answer", press="SnapKVPress", attention="sdpa"),
        "ObservedAttentionPress": lambda: peer.ask("answer", press="ObservedAttentionPress", attention="eager"),
        "stock": ours(model, inputs, None, answer),
        "snapkv": ours(model, inputs, f"snapkv:capacity={KEPT},window={WINDOW}", answer),
        "h2o": ours(model, inputs, f"h2o:heavy={half},recent={half}", answer),
    }
    found = in_turns(rivals, rounds)
    rows = []
    pairs = (("snapkv", "SnapKVPress", "kvpress, stock"), ("h2o", "ObservedAttentionPress", "kvpress, stock eager"))
    for mine, theirs, stock in pairs:
        for what, title in (("first", "first token"), ("token", "per token")):
            own, other = ratio(found[mine], found["stock"], what), ratio(found[theirs], found[stock], what)
            rows += _of_both(f"{title}, {mine} / unpruned", own, f"{title}, {theirs} / its unpruned", other)
            if "eager" in stock:
                with_sdpa = ratio(found[theirs], found["kvpress, stock"], what)
                rows += [
                    row(f"{title}, {theirs} / its unpruned with sdpa, {kind}", with_sdpa[kind], "reported", None)
                    for kind in KINDS
                ]
        held = [found[name]["bytes"] for name in (mine, theirs)]
        rows.append(row(f"bytes of the cache, {mine} / {theirs}", held[0] / held[1], "<= 1", held[0] <= held[1]))
    rows[0]["detail"] = found
    return rows


def _of_both(mine: str, own: dict[str, float], theirs: str, other: dict[str, float]) -> list[Row]:
    """Our ratio and theirs by each clock; theirs is what ours is held to, with a twentieth for noise."""
    rows = []
    for kind in KINDS:
        met = own[kind] <= 1.05 * other[kind]
        rows.append(row(f"{mine}, {kind}", own[kind], f"<= {other[kind]:.3f} + 5 %".replace("%", "percent"), met))
        rows.append(row(f"{theirs}, {kind}", other[kind], "reported", None))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# OpenVINO


def beside_openvino(peer: Peer, folder: Path, name: str, side: int, rounds: int, answer: int) -> list[Row]:
    """The same checkpoint in both, in the precision of this name, as it is and with compiled decoding."""
    torch._dynamo.reset()
    peer.ask("export")
    peer.ask("load", precision={"float32": "f32", "bfloat16": "bf16"}[name])
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder / "stock", dtype=getattr(torch, name)).eval()
    inputs, rivals = qwen_prompt(model, side, words=WORDS), dict[str, Callable[[], Figures]]()
    for pruned in PRUNED:
        spec = f"cdpruner:keep={1 - pruned / 100},space=decoder" if pruned else None
        rivals[f"OpenVINO {pruned}"] = lambda pruned=pruned: peer.ask("answer", pruned=pruned)
        rivals[f"as it is {pruned}"] = ours(model, inputs, spec, answer)
        rivals[f"compiled {pruned}"] = ours(model, inputs, spec, answer, **compiled_decoding(model))
    found = in_turns(rivals, rounds)
    rows = [line for pruned in PRUNED for line in _beside(f"{name}, {pruned} percent pruned", found, pruned)]
    rows[0]["detail"] = found
    return rows


def _beside(name: str, found: Mapping[str, Figures], pruned: int) -> list[Row]:
    theirs, rows = found[f"OpenVINO {pruned}"], []
    for kind in KINDS:
        first = ratio(found[f"as it is {pruned}"], theirs, "first")[kind]
        each = ratio(found[f"as it is {pruned}"], theirs, "token")[kind]
        compiled = ratio(found[f"compiled {pruned}"], theirs, "token")[kind]
        rows.append(row(f"{name}: first token / OpenVINO's, {kind}", first, "<= 1", first <= 1))
        rows.append(row(f"{name}: per token / OpenVINO's, {kind}", each, "reported", None))
        rows.append(row(f"{name}: per token, compiled / OpenVINO's, {kind}", compiled, "<= 1.2", compiled <= 1.2))
    return rows


# ---------------------------------------------------------------------------------------------------------------------


def measured(options: argparse.Namespace, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """All rows, and the versions of the peers that were there.

    Args:
        folder: where exported models are.
    """
    rounds, answer, side = (2, 8, 16) if options.quick else (options.rounds, 32, 64)
    asked: dict[str, Any] = {"threads": options.threads, "answer": answer}
    llama = {"config": LLAMA, "length": VISUAL + WORDS, "kept": KEPT, "window": WINDOW}
    qwen = {"folder": str(folder), "text": TEXT, "vision": VISION, "side": side * 14, "words": WORDS}
    rows, versions = list[Row](), dict[str, Any]()
    for part in options.parts.split(","):
        of_kvpress = part == "kvpress"
        python, script = (options.kvpress, "with_kvpress.py") if of_kvpress else (options.openvino, "with_openvino.py")
        try:
            with started(python, script, **asked, **(llama if of_kvpress else qwen)) as peer:
                said = peer.ask("versions")
                if of_kvpress:
                    rows += beside_kvpress(peer, rounds, answer)
                else:
                    rows += beside_openvino(peer, folder, part, side, rounds, answer)
                versions[part] = said
        except Missing as error:
            print(f"{part} is passed over: {error}", file=sys.stderr)
    return rows, versions


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds and small pictures, to see that it runs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", default="kvpress,float32,bfloat16", help="any of these")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="cores of each rival")
    parser.add_argument("--kvpress", type=Path, default=Path(".venv-kvpress/bin/python"), metavar="PYTHON")
    parser.add_argument("--openvino", type=Path, default=Path(".venv-openvino/bin/python"), metavar="PYTHON")
    parser.add_argument("--models", type=Path, help="folder that keeps the exported model for another run")
    parser.add_argument("--out", type=Path, default=None, help="write the figures to this JSON file")
    return parser.parse_args(arguments)


def main() -> None:
    """Run what is there, print one table, keep the figures."""
    options = _options()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        rows, versions = measured(options, options.models or Path(name))
    if not rows:
        return
    show(rows)
    write_figures(options.out, load, peers=versions, rows=rows)


if __name__ == "__main__":
    main()
