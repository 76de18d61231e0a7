"""Rows as vLLM is asked them: prompts of token ids with their pictures, and what becomes of its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.batch.rows import Row
from foveate.batch.work import Answer, open_picture
from foveate.inference.answers import prompt
from foveate.inference.loading import load_processor
from foveate.texts import check_text


@dataclass(frozen=True)
class Engine:
    """What every engine must know.

    Attributes:
        source: the file of rows.
        spec: what pictures are pruned by; "none" for nothing.
        max_new_tokens: of an answer.
        options: arguments of vLLM's engine, as `foveate.vllm.options` makes them.
    """

    source: Path
    spec: str
    max_new_tokens: int
    options: dict[str, Any]


class Requests:
    """Makes requests of rows, and answers of what comes back."""

    def __init__(self, engine: Engine) -> None:
        from transformers import AutoConfig

        from foveate.serve.vllm.outline import family_of

        self.engine, model = engine, str(engine.options["model"])
        trust = bool(engine.options.get("trust_remote_code"))
        self.processor = load_processor(model, model, trust)
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust)
        self._picture = family_of(config).image_token_id(config)
        self.sampling = sampling(model, engine.max_new_tokens)

    def request(self, row: Row) -> dict[str, Any]:
        """A prompt as vLLM takes one: ids, pictures, and the question for methods that read it.

        Raises:
            FoveateError: a picture cannot be read, or the question holds special tokens.
        """
        check_text(self.processor, row.question, "the question")
        pictures = [open_picture(picture, self.engine.source.parent) for picture in row.pictures]
        tokenizer, text = self.processor.tokenizer, prompt(self.processor, row.question, len(pictures))
        start = tokenizer.bos_token
        ids = tokenizer(text, add_special_tokens=not (start and text.startswith(start)))["input_ids"]
        return {
            "prompt_token_ids": list(ids),
            "multi_modal_data": {"image": pictures},
            "mm_processor_kwargs": {"question": row.question},
        }

    def before(self, pictures: Sequence[Any]) -> int:
        """Visual tokens of some pictures as they are."""
        sizes = [(picture.height, picture.width) for picture in pictures]
        return sum(self.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])

    def answer(self, row: Row, before: int, output: Any, seconds: float) -> Answer:
        """The answer to a row.

        Args:
            before: visual tokens of its pictures.
            output: text of the answer, and ids of the prompt that led to it.
            seconds: how long the engine had it.
        """
        text, ids = output
        tokens = {"before": before, "after": sum(one == self._picture for one in ids)}
        pruned = self.engine.spec != "none"
        return {
            "id": row.id,
            "answer": text.strip(),
            **({"tokens": tokens} if pruned else {}),
            "ms": round(seconds * 1e3, 2),
        }


def sampling(model: str, longest: int) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams` for greedy answers; what the checkpoint says of repetition holds, as in
    `generate()`."""
    from transformers import GenerationConfig

    try:
        penalty = GenerationConfig.from_pretrained(model).repetition_penalty
    except OSError:  # it has no such file
        penalty = None
    return {"temperature": 0.0, "max_tokens": longest, **({} if penalty is None else {"repetition_penalty": penalty})}
