"""What is asked of a picture: the engine's spec or a request's own, the question, and what is refused at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from foveate import __version__
from foveate.serve.specs import UNPRUNED, stages_of
from foveate.serve.vllm.rooms import (
    JOINT,
    Family,
    FoveateError,
    Method,
    Tower,
    format_spec,
    parse_stages,
    tower_needs,
    why_not,
    working_methods,
)

SPEC, QUESTION = "foveate", "question"
"""Names in a request's mm_processor_kwargs; the first is the engine's in hf_overrides, too."""
METHODS, ALL = "foveate_methods", "all"
"""Name in hf_overrides: which methods requests may ask for; and what it says for all that run on the model."""
_OF_TEXT = ("text", "text_mask", "after_image")


@dataclass(frozen=True)
class Asked:
    """What one request asks of its pictures.

    Attributes:
        spec: in its one spelling; "none" for no pruning.
        question: as text; None where no method reads it.
        words: its ids, where a method reads embeddings of text.
    """

    spec: str
    question: str | None = None
    words: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods that act, in their order."""
        return parts_of(self.spec)

    @property
    def key(self) -> str:
        """What caches tell it by: everything that changes what a picture becomes, this version among it."""
        return json.dumps([__version__, self.spec, self.question])

    def packed(self) -> Tensor:
        """As bytes, to travel with a picture."""
        return torch.tensor(list(json.dumps([self.spec, self.question, self.words]).encode()), dtype=torch.uint8)

    @staticmethod
    def unpacked(packed: Tensor) -> Asked:
        """What `packed` made, padding behind it left out."""
        spec, question, words = json.loads(bytes(packed.tolist()).decode().rstrip("\0"))
        return Asked(spec, question, tuple(words))


@lru_cache(maxsize=256)
def parts_of(spec: str) -> tuple[Method, ...]:
    """The single-site methods of a spec; none for "none"."""
    if spec == UNPRUNED:
        return ()
    return tuple(part for stage in parse_stages(spec) for part in stage.parts())


def reads_question(parts: tuple[Method, ...]) -> bool:
    """Whether any of the methods reads the prompt's text."""
    return any(need in JOINT or need in _OF_TEXT for part in parts for need in part.needs)


def reads_words(parts: tuple[Method, ...]) -> bool:
    """Whether any reads the embeddings of text."""
    return any(need in _OF_TEXT for part in parts for need in part.needs)


def reads_one_block(parts: tuple[Method, ...]) -> bool:
    """Whether the methods read no more than one block of the encoder and what it hands over: nothing of the prompt."""
    blocks = tower_needs(need for part in parts for need in part.needs)
    return len(blocks) <= 1 and not reads_question(parts)


def reads_joint_space(parts: tuple[Method, ...]) -> bool:
    """Whether any compares question and picture in CLIP's joint space."""
    return any(need in JOINT for part in parts for need in part.needs)


def _name(stage: Method) -> str:
    """The public name of a method."""
    return format_spec(stage).partition(":")[0]


def _example(name: str) -> tuple[Method, ...]:
    """The parts of a method with the values of its example."""
    from foveate.methods import get

    return tuple(get(name).example().parts())


class Rules:
    """What one engine allows.

    Args:
        spec: the engine's own, for requests that name none.
        allowed: names of methods that requests may ask for beside the engine's own; ("all",) for all that run on the
            model, None for those of them that read one block of the encoder and no text, and so cost little.
        joint: the model brings a CLIP, or one was given.
        before: its encoder can run on a part of its patches.

    Attributes:
        allowed: the names of all methods that may run.
    """

    def __init__(
        self,
        spec: str,
        family: Family,
        tower: Tower,
        allowed: tuple[str, ...] | None = None,
        joint: bool = False,
        before: bool = False,
    ) -> None:
        self.family, self.tower, self.joint, self.before = family, tower, joint, before
        self.spec = self._checked(spec, of_request=False)
        own = {_name(stage) for stage in parse_stages(self.spec)} if self.spec != UNPRUNED else set()
        running = self.running()
        if allowed is None:
            named = {name for name in running if reads_one_block(_example(name))}
        else:
            named = set(running if allowed == (ALL,) else allowed)
        self.allowed = tuple(sorted(own | named))

    @property
    def may_read_joint_space(self) -> bool:
        """Whether a method that may run compares question and picture in CLIP's joint space."""
        return any(reads_joint_space(_example(name)) for name in self.allowed)

    def asked(self, given: Mapping[str, Any]) -> Asked:
        """What a request asks, from its mm_processor_kwargs.

        Raises:
            FoveateError: an unknown spec or field, a method that cannot run here, or a missing question.
        """
        spec = given.get(SPEC)
        if spec is not None and not isinstance(spec, str):
            raise FoveateError(f'mm_processor_kwargs["{SPEC}"]={spec!r} is no text; write "fopru:keep=0.25"')
        spec = self.spec if spec is None else self._checked(spec, of_request=True)
        question = given.get(QUESTION)
        if question is not None and not isinstance(question, str):
            raise FoveateError(f'mm_processor_kwargs["{QUESTION}"]={question!r} is no text; send the question as text')
        if not reads_question(parts_of(spec)):
            return Asked(spec)
        if not question or not question.strip():
            raise FoveateError(
                f'{spec} reads the question: send it with the request as mm_processor_kwargs={{"{QUESTION}": "..."}}, '
                "or ask for a method that reads the picture alone, such as fopru"
            )
        return Asked(spec, question.strip())

    def _checked(self, spec: str, of_request: bool) -> str:
        """The spec in its one spelling.

        Raises:
            FoveateError: it cannot run here.
        """
        stages = stages_of(spec, of_request)
        if not stages:
            return UNPRUNED
        for stage in stages:
            for part in stage.parts():
                self._check_part(part)
            if of_request and _name(stage) not in self.allowed:
                raise FoveateError(
                    f"{_name(stage)} is not among the methods that requests to this engine may name: "
                    f"{', '.join(self.allowed)}; it is started with {METHODS} for others"
                )
        return format_spec(stages)

    def _check_part(self, part: Method) -> None:
        reason = None
        if part.site == "picture":
            reason = "scales the picture before it is sent; send one that foveate.scale_down has made"
        elif part.site == "pixels" and not self.before:
            reason = "acts before the encoder, which transformers' model inside vLLM alone allows (foveate_route)"
            reason += ", and for Qwen3-VL an engine whose own spec acts there"
        elif part.site not in ("pixels", "input"):
            where = {"tower": "inside the encoder", "layer": "inside the decoder", "cache": "on the cache"}[part.site]
            reason = f"acts {where}, and vLLM prunes before the encoder or between encoder and decoder alone"
        elif part.adaptive and part.site == "input":
            reason = "decides its own count, and vLLM must know it before the picture is encoded"
        else:
            reason = why_not(part, self.family, self.tower)
        if reason is not None:
            raise FoveateError(f"{format_spec(part)} {reason}; the nearest that runs is {self.nearest(part)}")
        if reads_joint_space((part,)) and not self.joint:
            raise FoveateError(
                f"{format_spec(part)} compares question and picture in CLIP's joint space, and this model brings no "
                "CLIP; start the engine with --hf-overrides '{\"foveate_clip\": FOLDER_OR_HUB_ID}'"
            )

    def running(self) -> list[str]:
        """Names of the methods that run here."""
        found = []
        for name in working_methods(self.family, self.tower):
            parts = _example(name)
            joint = self.joint or not reads_joint_space(parts)
            counted = all(part.site == "pixels" or (part.site == "input" and not part.adaptive) for part in parts)
            if joint and counted and (self.before or all(part.site == "input" for part in parts)):
                found.append(name)
        return found

    def nearest(self, part: Method) -> str:
        """Of the methods that run, the one that reads most of what this one reads."""
        wanted = {need.rpartition(".")[2] for need in part.needs}
        running = self.running()

        def shared(name: str) -> tuple[int, bool]:
            needs = {need.rpartition(".")[2] for one in _example(name) for need in one.needs}
            return len(wanted & needs) - len(needs - wanted), name == "fopru"

        return max(running, key=shared)
