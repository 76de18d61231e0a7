"""What rivals reached on a folder's questions: one row each, with intervals and differences of the same questions."""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from foveate import methods
from foveate.core import FoveateError, Method
from foveate.evaluate.folder_run import Answered, check_rival, each
from foveate.evaluate.local_task import Folder
from foveate.evaluate.measures import Scored, measures, scores
from foveate.evaluate.paired import bootstrap, difference
from foveate.evaluate.results import BASELINES
from foveate.evaluate.scenes_task import NONE
from foveate.evaluate.scoring import score
from foveate.spec import format as format_spec


def with_baselines(
    model: Any, processor: Any, rivals: Mapping[str, Sequence[Method]], folder: Folder
) -> tuple[dict[str, tuple[Method, ...]], dict[str, list[str]], dict[str, str]]:
    """The rivals, and the baselines at the `keep` of each one's last stage.

    Args:
        folder: whose pictures a baseline must be able to scale to its budget, or whose videos to prune.

    Returns:
        the stages of all of them by spec, the unpruned model first; of each rival the specs of its baselines; and why
        a baseline is missing, by its spec.
    """
    everyone = {NONE: (), **{spec: tuple(stages) for spec, stages in rivals.items()}}
    beside: dict[str, list[str]] = {}
    missing: dict[str, str] = {}
    for spec, stages in rivals.items():
        keep = getattr(stages[-1], "keep", None) if stages else None
        keep = keep[-1] if isinstance(keep, tuple) else keep
        if keep is None:
            continue
        beside[spec] = []
        for name in BASELINES:
            kind: Any = methods.get(name)
            made = kind(keep=keep)
            written = format_spec((made,))
            if written in missing or written == spec:
                continue
            try:
                check_rival(model, processor, (made,), folder)
            except FoveateError as error:
                missing[written] = str(error)
                continue
            everyone.setdefault(written, (made,))
            beside[spec].append(written)
    return everyone, beside, missing


def rows(
    lines: Sequence[Answered], folder: Folder, *, batch: int, beside: Mapping[str, Sequence[str]] | None = None
) -> list[dict[str, Any]]:
    """One row a rival, of values that JSON can hold.

    `accuracy` is the mean score of all questions and `interval` its 95 % bootstrap interval; `measures` what the
    benchmarks of each type of question report; `against` the difference from the unpruned model, and from each baseline
    of `beside`, on the same questions, with its interval and the p of a sign test. Shares are of all prompts.

    Args:
        lines: what `answer_folder` returned.
        batch: the size of its batches.
    """
    answers = scored(lines, folder, batch)
    single = {rival: by_question(kinds) for rival, kinds in answers.items()}
    found = []
    for rival, kinds in answers.items():
        values = [*single[rival].values()]
        others = [NONE, *(beside or {}).get(rival, ())] if rival != NONE else []
        found.append(
            {
                "method": rival,
                "accuracy": statistics.fmean(values),
                "interval": list(bootstrap(values)),
                "questions": len(values),
                **cost([line for line in lines if line.rival == rival]),
                "measures": {kind: measures(kind, ones) for kind, ones in kinds.items()},
                "against": {
                    other: dataclasses.asdict(difference(values, [*single[other].values()]))
                    for other in others
                    if other in single
                },
            }
        )
    return found


def by_question(kinds: Mapping[str, Sequence[Scored]]) -> dict[str, float]:
    """The score of each question by its id, of a rival's answers by type of question."""
    return {question: value for kind, ones in kinds.items() for question, value in scores(kind, ones).items()}


def scored(lines: Sequence[Answered], folder: Folder, batch: int) -> dict[str, dict[str, list[Scored]]]:
    """The answers of each rival by type of question, each with what it is worth."""
    answers: dict[str, dict[str, list[Scored]]] = defaultdict(lambda: defaultdict(list))
    for rival, ask, said in each(lines, folder, batch):
        asked = ask.question
        right = score(asked.kind, said, asked.answers, asked.options)
        one = Scored(asked.id, asked.shown, asked.group, said, asked.answers[0], right)
        answers[rival][asked.kind].append(one)
    return answers


def cost(lines: Sequence[Answered]) -> dict[str, Any]:
    """Tokens, and shares of what the unpruned prompts cost."""
    flops = [sum(line.flops[place] for line in lines) for place in (0, 1)]
    held = [sum(line.bytes[place] for line in lines) for place in (0, 1)]
    prompts = sum(len(line.answers) for line in lines)
    weighted = [[count * len(line.answers) for count in line.layers] for line in lines]
    layers = [sum(counts) / prompts for counts in zip(*weighted, strict=True)]
    return {
        "tokens": statistics.fmean(count for line in lines for count in line.tokens),
        "equivalent_tokens": statistics.fmean(layers),
        "layers": layers,
        "prefill_flops_share": flops[0] / flops[1] if flops[1] else 1.0,
        "kv_bytes_share": held[0] / held[1] if held[1] else 1.0,
    }
