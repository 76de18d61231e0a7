"""A Qwen2-VL of random weights that OpenVINO GenAI runs, whose visual tokens its CDPruner drops."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from answering import Ticks, answer_commands

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PACKAGES = ("openvino-genai", "openvino", "optimum-intel", "transformers", "torch")


def save_stock(folder: Path, text: dict[str, Any], vision: dict[str, Any]) -> None:
    """Write the model as transformers has it, with a tokenizer of single bytes and the pictures' processor."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2TokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    bytes_.add_special_tokens(list(SPECIAL))
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=bytes_, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None,
        additional_special_tokens=list(SPECIAL[1:]),
    )  # fmt: skip
    # Who exports looks for one, and who asks here goes without.
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    start, end, image, video = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names)
    ids = {"vision_start_token_id": start, "vision_end_token_id": end, "image_token_id": image, "video_token_id": video}
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 2048).save_pretrained(folder)


def made(asked: dict[str, Any]) -> dict[str, Any]:
    """What can be asked.

    Args:
        asked: the number of `threads`, the `folder` to write models to, the `text` and `vision` configuration, the
            `side` of the picture in pixels, the `words` around it, and the tokens of an `answer`.
    """
    import numpy
    import openvino
    import openvino_genai as genai

    folder = Path(asked["folder"])
    pixels = numpy.random.default_rng(0).integers(0, 256, (1, asked["side"], asked["side"], 3), dtype=numpy.uint8)
    picture, pipes = openvino.Tensor(pixels), {}

    class Noting(genai.StreamerBase):
        def __init__(self) -> None:
            super().__init__()
            self.ticks = Ticks()

        def write(self, _: Any) -> Any:
            self.ticks.note()
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def export() -> dict[str, Any]:
        stock, exported = folder / "stock", folder / "openvino"
        if not (exported / "openvino_detokenizer.xml").exists():  # what is written last
            save_stock(stock, asked["text"], asked["vision"])
            tool = str(Path(sys.executable).with_name("optimum-cli"))
            task = ["--task", "image-text-to-text", "--weight-format", "fp32"]
            subprocess.run([tool, "export", "openvino", "--model", str(stock), *task, str(exported)], check=True)
        return {"config": json.loads((stock / "config.json").read_text(encoding="utf-8"))}

    def load(precision: str) -> dict[str, Any]:
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching, scheduler.cache_size, scheduler.max_num_batched_tokens = False, 1, 8192
        hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": asked["threads"]}
        pipes.clear()
        pipes["now"] = genai.VLMPipeline(str(folder / "openvino"), "CPU", scheduler_config=scheduler, **hints)
        return {}

    def answer(pruned: int) -> dict[str, float]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = asked["answer"], True, False
        config.apply_chat_template, config.pruning_ratio = False, pruned
        streamer = Noting()
        said = pipes["now"].generate(
            "a" * asked["words"], images=[picture], generation_config=config, streamer=streamer
        )
        return {**streamer.ticks.figures(), "prompt": said.perf_metrics.get_num_input_tokens()}

    versions = {name: version(name) for name in PACKAGES}
    return {"export": export, "load": load, "answer": answer, "versions": lambda: versions}


if __name__ == "__main__":
    answer_commands(made)
