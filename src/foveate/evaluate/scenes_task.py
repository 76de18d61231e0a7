"""The task "scenes": how many questions about fresh scenes a model answers, unpruned and with each rival method."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from foveate import spec
from foveate.core import FoveateError, Method
from foveate.evaluate.left_out import LeaveOut, LeftOut
from foveate.evaluate.oracle import Box, Oracle
from foveate.evaluate.unpruned import decoder_layers, unpruned_of_all
from foveate.inference.answers import decode, encode, greedy
from foveate.inference.processes import ALONE, Processes
from foveate.inference.resizing import scalers_of, scaling
from foveate.prune import prune, share_encoding
from foveate.scenes import generator, pages, questions, scoring

if TYPE_CHECKING:
    from PIL import Image

    from foveate.inference.resizing import Scaler
    from foveate.runtime.handle import Handle
    from foveate.trace import Trace

CEILING = "ceiling (tokens of the object asked about)"
NONE = "none"

AHEAD = ("picture", "pixels", "tower")
"""Sites of methods that change what is encoded, or how."""

MOST_SEED = 9_999

_CHUNK = 100  # pictures drawn at once: a multiple of the kinds of questions, so that each chunk is balanced
LONGEST = 32
"""Tokens of an answer; seven objects are described in 22."""

Rival: TypeAlias = "str | Method | Sequence[Method] | None"
Progress: TypeAlias = Callable[[int], None]


@dataclass(frozen=True)
class Sample:
    """One question about one picture, and the boxes of what it asks about, as shares of the picture's sides."""

    image: Image.Image
    kind: str
    question: str
    answer: str
    boxes: tuple[Box, ...]


@dataclass
class Row:
    """What one method reached.

    Attributes:
        method: its spec; "none" for the unpruned model.
        scores: of each answer, from 0 to 1, by kind of question.
        tokens: visual tokens of each picture that reached the end of the prefill.
        equivalent: the same averaged over the decoder's layers, mean of its batch.
        layers: sums over the pictures of the visual tokens that each decoder layer sees.
        prefill_flops, unpruned_flops: of all prompts.
        kv_bytes, unpruned_bytes: of all prompts.
    """

    method: str
    scores: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in questions.KINDS})
    tokens: list[int] = field(default_factory=list)
    equivalent: list[float] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)
    prefill_flops: float = 0.0
    unpruned_flops: float = 0.0
    kv_bytes: int = 0
    unpruned_bytes: int = 0

    def add(self, more: Row) -> None:
        """Count what the same method reached on further questions."""
        for kind, scores in more.scores.items():
            self.scores[kind] += scores
        self.tokens += more.tokens
        self.equivalent += more.equivalent
        _add_layers(self, more.layers)
        self.prefill_flops += more.prefill_flops
        self.unpruned_flops += more.unpruned_flops
        self.kv_bytes += more.kv_bytes
        self.unpruned_bytes += more.unpruned_bytes

    @property
    def accuracy(self) -> float:
        """Mean score over all questions."""
        return _mean([score for scores in self.scores.values() for score in scores])

    def to_dict(self) -> dict[str, Any]:
        """One row of the table: figures that JSON can hold; None where no question of a kind was asked."""
        count = sum(map(len, self.scores.values()))
        low, high = wilson(self.accuracy, count)
        return {
            "method": self.method,
            "accuracy": self.accuracy,
            "interval": [low, high],
            **{kind: _mean(scores) if scores else None for kind, scores in self.scores.items()},
            "tokens": _mean(self.tokens),
            "equivalent_tokens": _mean(self.equivalent),
            "layers": [total / len(self.tokens) for total in self.layers],
            "prefill_flops_share": self.prefill_flops / self.unpruned_flops if self.unpruned_flops else 1.0,
            "kv_bytes_share": self.kv_bytes / self.unpruned_bytes if self.unpruned_bytes else 1.0,
            "samples": count,
        }


def evaluate(
    model: Any,
    processor: Any,
    rivals: Sequence[Rival] = (),
    *,
    samples: int = 500,
    batch: int = 16,
    seed: int = 0,
    ceiling: bool = False,
    clip: Any = None,
    progress: Progress | None = None,
    on: Paper | None = None,
    among: Processes = ALONE,
    leave_out: LeaveOut | None = None,
) -> list[Row]:
    """Greedy answers of the unpruned model and of each rival to the same questions about the split "test".

    Args:
        rivals: specs, methods or sequences of methods; the unpruned model comes first whether or not it is among them.
        samples: questions, one for each picture; the five kinds occur equally often, and so do yes and no.
        batch: prompts answered at once.
        seed: of pictures and questions.
        ceiling: add the row of `Oracle`: the tokens of the object asked about, from its box; those of all objects where
            a question asks about no single one (counts, descriptions, things that are not there).
        clip: as `prune` takes it.
        progress: called with the number of answers given since the last call; `len(rows) * samples` in all.
        on: pages that the objects are stamped on; None for photos.
        among: processes that share the batches: the first gets the rows that one alone would have, others empty ones.
        leave_out: as `left_out.LeaveOut`; without it a rival that does not fit the pictures is an error.

    Raises:
        FoveateError: fewer than one sample or prompt at once, a seed out of range, or a spec that names no method.
    """
    check(samples=samples, batch=batch, seed=seed)
    named = parse_rivals(rivals)
    rows = [Row(name) for name in named] + ([Row(CEILING)] if ceiling else [])
    scalers = scalers_of(model, processor, named)
    for scaler in scalers.values():
        scaler.check([(generator.SIZE, generator.SIZE)])
    pruning = {name: stages for name, stages in named.items() if stages and name not in scalers}
    handles = {name: prune(model, stages, processor=processor, clip=clip) for name, stages in pruning.items()}
    # Whatever acts behind the encoder looks at the same encoding; the others make their own.
    parts = {row.method: [part for stage in named.get(row.method, ()) for part in stage.parts()] for row in rows}
    together = [name for name in parts if all(part.site not in AHEAD for part in parts[name])]
    needs = {need for name in together for part in parts[name] for need in part.needs}
    left = LeftOut(leave_out)
    rivals_at_work = _Rivals(model, processor, [*parts], handles, scalers, together, needs, left)
    done = []
    for number, group in enumerate(_batches(samples, batch, seed, on)):
        if among.takes(number):
            done.append((number, rivals_at_work.answer(group, progress or (lambda count: None))))
    # In the order of the batches, in which one process alone would have added them up.
    by_name = {row.method: row for row in rows}
    for _, found in sorted(among.gathered(done), key=lambda each: each[0]):
        for more in found:
            by_name[more.method].add(more)
    left.share(among)
    return [row for row in rows if row.method not in left.why]


@dataclass(frozen=True)
class _Rivals:
    """Methods ready to answer, and which of them look at the same encoding."""

    model: Any
    processor: Any
    names: list[str]
    handles: dict[str, Handle]
    scalers: dict[str, Scaler]
    together: list[str]
    needs: set[str]
    left: LeftOut

    def answer(self, group: list[Sample], progress: Progress) -> list[Row]:
        """What each that is not left out reaches on one batch."""
        rows = {name: Row(name) for name in self.names}
        said = self.model, self.processor
        pictures, asked = [[sample.image] for sample in group], [sample.question for sample in group]
        inputs = encode(self.model, self.processor, pictures, asked)
        handles: dict[str, Handle] = dict(self.handles)
        if CEILING in rows:
            handles[CEILING] = prune(self.model, Oracle([sample.boxes for sample in group]))
        with share_encoding(self.model, self.needs):
            for name in self.together:
                self.left.tried(name, partial(_answer, *said, handles.get(name), inputs, group, rows[name]))
        for name, row in rows.items():
            if name in self.scalers:
                own = self.scalers[name].encode(pictures, asked)
                _answer(*said, None, own, group, row)
                _compare(self.model, own, inputs, row)
            elif name not in self.together:
                self.left.tried(name, partial(_answer, *said, handles[name], inputs, group, row))
            progress(len(group))
        return [row for name, row in rows.items() if name not in self.left.why]


def check(*, samples: int, batch: int, seed: int) -> None:
    """Refuse settings that cannot be evaluated.

    Raises:
        FoveateError: fewer than one sample or prompt at once, or a seed out of range.
    """
    for name, value in (("samples", samples), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise FoveateError(f"{name}={value!r} measures nothing; the smallest is {name}=1")
    if not 0 <= seed <= MOST_SEED:
        raise FoveateError(f"seed={seed} is outside 0..{MOST_SEED}; the nearest is {min(max(seed, 0), MOST_SEED)}")


def parse_rivals(rivals: Sequence[Rival]) -> dict[str, tuple[Method, ...]]:
    """The stages of each rival by its spec, the unpruned model first; rivals that are the same occur once.

    Raises:
        FoveateError: a spec that names no method, that gives one a wrong value, or that joins stages that cannot be.
    """
    named: dict[str, tuple[Method, ...]] = {NONE: ()}
    for rival in rivals:
        if rival is None or rival == NONE:
            continue
        stages = spec.parse_stages(rival) if isinstance(rival, str) else rival
        stages = (stages,) if isinstance(stages, Method) else tuple(stages)
        scaling(stages)  # refuses what cannot be joined
        if stages:
            named[spec.format(stages)] = stages
    return named


@dataclass(frozen=True)
class Paper:
    """Pages that objects are stamped on.

    Attributes:
        jpeg: the quality at which the pictures have been through JPEG; None for lossless ones.
    """

    jpeg: int | None = None

    def __post_init__(self) -> None:
        pages.check_quality(self.jpeg)


def draw_samples(count: int, *, seed: int, on: Paper | None = None) -> Iterator[Sample]:
    """`count` questions about as many pictures of the split "test"; the same seed asks the same.

    A longer draw begins like a shorter one in steps of 100.
    """
    for number, start in enumerate(range(0, count, _CHUNK)):
        stream = seed * 100_000 + number  # chunks of two seeds meet beyond 10 million samples only
        pictures = min(_CHUNK, count - start)
        if on is None:
            scenes = generator.generate(pictures, seed=stream, split="test")
        else:
            scenes = pages.stamped(pictures, seed=stream, jpeg=on.jpeg)
        for row, asked in enumerate(questions.sample(scenes, seed=stream)):
            objects = range(int(scenes.count[row])) if asked.target is None else [asked.target]
            boxes = tuple(tuple(edge / generator.SIZE for edge in scenes.boxes[row, one].tolist()) for one in objects)
            yield Sample(scenes.image(row), asked.kind, asked.text, asked.answer, boxes)


def digest(count: int, *, seed: int, on: Paper | None = None) -> str:
    """What tells the questions of `draw_samples` from those that another version or another seed draws: 64 digits."""
    found = hashlib.sha256()
    for sample in draw_samples(count, seed=seed, on=on):
        found.update(sample.image.tobytes())
        found.update(repr((sample.kind, sample.question, sample.answer)).encode())
    return found.hexdigest()


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` answers (Wilson 1927).

    Scores between 0 and 1 vary less than right-or-wrong answers of the same mean, so that it is wide enough for them.
    """
    if count == 0:
        return 0.0, 1.0
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    middle, scale = share + z * z / (2 * count), 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def _batches(samples: int, batch: int, seed: int, on: Paper | None) -> Iterator[list[Sample]]:
    """Batches of one kind of question as far as they go: rows with short answers wait for those with long ones."""
    drawn = list[Sample]()
    for number, sample in enumerate(draw_samples(samples, seed=seed, on=on), start=1):
        drawn.append(sample)
        if number % _CHUNK and number < samples:
            continue
        drawn.sort(key=lambda one: questions.KINDS.index(one.kind))
        yield from (drawn[start : start + batch] for start in range(0, len(drawn), batch))
        drawn = []


def _answer(model: Any, processor: Any, handle: Handle | None, inputs: Any, group: list[Sample], row: Row) -> None:
    """Answer one batch, through `handle` where there is one, and add its figures to `row`."""
    if handle is None:
        output = greedy(model, inputs, max_new_tokens=LONGEST)
        visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
        row.tokens += [visual // len(group)] * len(group)
        row.equivalent += [float(visual // len(group))] * len(group)
        _add_layers(row, [float(visual)] * decoder_layers(model))
    else:
        with handle as trace:
            output = greedy(model, inputs, max_new_tokens=LONGEST)
        _add(trace, row)
    answers = decode(processor, model, output, inputs["input_ids"].shape[1])
    for sample, answer in zip(group, answers, strict=True):
        row.scores[sample.kind].append(scoring.score(sample.kind, answer, sample.answer))


def _add_layers(row: Row, more: Sequence[float]) -> None:
    row.layers = [before + count for before, count in zip(row.layers or [0.0] * len(more), more, strict=True)]


def _compare(model: Any, own: Any, whole: Any, row: Row) -> None:
    """Add what prompts about smaller pictures cost, beside those about whole ones."""
    _, flops, held = unpruned_of_all(model, own)
    _, of_whole, held_whole = unpruned_of_all(model, whole)
    row.prefill_flops += flops
    row.unpruned_flops += of_whole
    row.kv_bytes += held
    row.unpruned_bytes += held_whole


def _add(trace: Trace, row: Row) -> None:
    row.tokens += [image.after for image in trace.images]
    row.equivalent += [trace.budget.equivalent_tokens] * len(trace.images)
    _add_layers(row, [count * len(trace.images) for count in trace.budget.tokens])
    row.prefill_flops += trace.budget.prefill_flops
    row.unpruned_flops += trace.unpruned.prefill_flops
    row.kv_bytes += trace.budget.kv_bytes
    row.unpruned_bytes += trace.unpruned.kv_bytes
