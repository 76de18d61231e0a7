"""The reference for the plug-in: stock transformers and Foveate, in a process of its own, since vLLM changes classes.

python vllm_answers.py FOLDER families|mini writes FOLDER/NAME.json; for a family also its checkpoint, FOLDER/NAME.
python vllm_answers.py FOLDER near SPEC NUMBER writes FOLDER/near.json: what `mini` may answer but for rounding.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from models import vllm_checkpoints as checkpoints
from transformers import AutoModelForImageTextToText, AutoProcessor

import foveate
from foveate.evaluate.scenes_task import draw_samples

SPECS = ("fopru:keep=0.4", "divprune:keep=3", "none")
"""What is asked of the tiny families."""
BEFORE = ("pixelprune:threshold=0.8", "pixelprune:threshold=0.8+fopru:keep=3")
BEFORE_FAMILIES = ("llava-1.5", "qwen2.5-vl", "qwen3-vl", "internvl")
"""What is asked of some beside it: tokens leave before the encoder, as many as repeat."""
TOKENS = 8
MINI = ("fopru:keep=64", "divprune:keep=64", "visionzip:keep=64", "fastervlm:keep=64", "cdpruner:keep=64")
MINI_SPECS = (*MINI, "uniform:keep=64", "none")
"""What is asked of `mini`."""
QUESTIONS = int(os.environ.get("FOVEATE_QUESTIONS", "20"))
"""About scenes, for each spec."""
LONGEST = 24
MOVED, ROUNDING = 16, 1e-6
"""How often, and by which share of itself, each pixel is moved to see which tokens tie."""
TWO_WAY = "gemma3"
"""The family that shows why pictures that look both ways are refused."""


def generated(model: Any, inputs: Any, spec: str, tokens: int, **more: Any) -> dict[str, Any]:
    """Ids of a greedy answer, the first token's log-probability, and the prompt's length as the decoder saw it."""
    handle = contextlib.nullcontext() if spec == "none" else foveate.prune(model, spec, **more)
    with handle as trace, torch.no_grad():
        made = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
    length = inputs["input_ids"].shape[1]
    dropped = 0 if trace is None else sum(image.original - image.after for image in trace.images)
    return {
        "ids": made.sequences[0, length:].tolist(),
        "logprob": float(torch.log_softmax(made.scores[0][0].float(), -1).max()),
        "length": length - dropped,
    }


def of_family(folder: Path, family: str) -> dict[str, Any]:
    """Answers of a tiny family to every prompt, by spec."""
    place = folder / family
    checkpoints.write(family, place)
    model = AutoModelForImageTextToText.from_pretrained(place, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(place)
    holder = checkpoints.holder(processor)
    specs = (*SPECS, *BEFORE) if family in BEFORE_FAMILIES else SPECS
    found: dict[str, Any] = {spec: [] for spec in specs}
    for prompt in checkpoints.PROMPTS:
        pictures, text = checkpoints.pictures(prompt), checkpoints.text(prompt, holder)
        inputs = processor(images=pictures, text=[text], return_tensors="pt")
        for spec in specs:
            found[spec].append(generated(model, inputs, spec, TOKENS))
    return found


def of_two_way() -> dict[str, Any]:
    """Answers of a tiny Gemma 3 to the first prompt: as it is, and as if its pictures looked back alone."""
    place = Path(sys.argv[1]) / TWO_WAY
    checkpoints.write(TWO_WAY, place)
    model = AutoModelForImageTextToText.from_pretrained(place, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(place)
    prompt = checkpoints.PROMPTS[0]
    text = checkpoints.text(prompt, checkpoints.holder(processor))
    inputs = processor(images=checkpoints.pictures(prompt), text=[text], return_tensors="pt")
    causal = {**inputs, "token_type_ids": torch.zeros_like(inputs["token_type_ids"])}
    found = {"both ways": inputs, "causal": causal}
    return {name: generated(model, given, "none", TOKENS) for name, given in found.items()}


class Mini:
    """`mini` on stock transformers, asked about scenes."""

    def __init__(self) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(foveate.MINI, dtype=torch.float32)
        self.processor = AutoProcessor.from_pretrained(foveate.MINI)
        self.samples = list(draw_samples(QUESTIONS, seed=3))

    def asked(self, chat: list[dict[str, Any]], sample: Any, spec: str, question: str, noise: float = 0.0) -> Any:
        """Text of an answer, its first log-probability and the prompt's length."""
        prompt = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = self.processor(images=[sample.image], text=prompt, return_tensors="pt")
        inputs["pixel_values"] *= 1 + noise * torch.randn(inputs["pixel_values"].shape)
        made = generated(self.model, inputs, spec, LONGEST, processor=self.processor, question=question)
        made["text"] = self.processor.tokenizer.decode(made.pop("ids"), skip_special_tokens=True).strip()
        return made

    @staticmethod
    def turn(question: str) -> dict[str, Any]:
        """A user's, with the picture."""
        return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}

    def one(self, spec: str, number: int, noise: float = 0.0) -> dict[str, Any]:
        """Answer to one question, and which it was."""
        sample = self.samples[number]
        answer = self.asked([self.turn(sample.question)], sample, spec, sample.question, noise)
        return {**answer, "spec": spec, "number": number}


def of_mini() -> dict[str, Any]:
    """Answers of `mini` to questions about scenes, by spec, and to the second question about one."""
    mini = Mini()
    found: dict[str, Any] = {spec: [mini.one(spec, number) for number in range(QUESTIONS)] for spec in MINI_SPECS}
    first, second = mini.samples[:2]
    more = {"role": "user", "content": [{"type": "text", "text": second.question}]}
    chat = [mini.turn(first.question), {"role": "assistant", "content": [{"type": "text", "text": first.answer}]}, more]
    found["conversation"] = mini.asked(chat, first, MINI[0], second.question)
    return found


def near(spec: str, number: int) -> list[dict[str, Any]]:
    """What `mini` answers when its pixels are moved by rounding: a choice between two tokens that tie may fall so."""
    mini = Mini()
    torch.manual_seed(0)
    return [mini.one(spec, number, ROUNDING) for _ in range(MOVED)]


def main() -> None:
    """Write what was asked for."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    work: dict[str, Any] = {"mini": of_mini} if sys.argv[2] == "mini" else {}
    if sys.argv[2] == "near":
        work["near"] = lambda: near(sys.argv[3], int(sys.argv[4]))
    if sys.argv[2] == "families":
        work = {family: lambda family=family: of_family(folder, family) for family in checkpoints.FAMILIES}
        work[TWO_WAY] = of_two_way
    for name, answer in work.items():
        unfinished = folder / f"{name}.part"
        unfinished.write_text(json.dumps(answer()))
        os.replace(unfinished, folder / f"{name}.json")


if __name__ == "__main__":
    main()
