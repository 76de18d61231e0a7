"""What benchmarks report of many scored answers: accuracies, F1, MME's sums, circular accuracy."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from foveate.evaluate.scoring import yes_or_no


@dataclass(frozen=True)
class Scored:
    """One answer and its score.

    Attributes:
        question: what tells the question from all others; the turns of a circular question share it.
        image: the name of its picture.
        group: such as a split of POPE or a subtask of MME; "" where there is none.
        prediction: what the model said.
        answer: the first right answer.
        score: from 0 to 1.
    """

    question: str
    image: str
    group: str
    prediction: str
    answer: str
    score: float


def measures(name: str, answers: Sequence[Scored]) -> dict[str, float]:
    """What the benchmarks of a type of question report, of answers of this type alone.

    `accuracy` is always there, the mean of `scores`. Shares are from 0 to 1, MME's `score` sums up to 200 a group.

    Args:
        name: the type of question.
        answers: at least one.
    """
    found = {"accuracy": mean(scores(name, answers).values())}
    found |= {"pope": _pope, "mme": _mme, "circular": _circular}.get(name, lambda answers: {})(answers)
    groups = _by(lambda one: one.group, answers)
    if len(groups) > 1:
        for group, ones in groups.items():
            found |= {f"{group}/{key}": value for key, value in measures(name, ones).items()}
    return found


def scores(name: str, answers: Iterable[Scored]) -> dict[str, float]:
    """The score of each question, from 0 to 1: of a circular one 1 only if every turn was right (Liu et al. 2023)."""
    turns = _by(lambda one: one.question, answers)
    join = min if name == "circular" else mean
    return {question: join([one.score for one in ones]) for question, ones in turns.items()}


def mean(values: Iterable[float]) -> float:
    """The mean of at least one value."""
    return statistics.fmean(values)


def _by(key: Callable[[Scored], Hashable], answers: Iterable[Scored]) -> dict[str, list[Scored]]:
    found: dict[str, list[Scored]] = defaultdict(list)
    for one in answers:
        found[str(key(one))].append(one)
    return dict(found)


def _pope(answers: Sequence[Scored]) -> dict[str, float]:
    """Precision, recall and F1 of `yes`, how often the model said it, and how often neither word (Li et al. 2023).

    A ratio of nothing is 0.
    """
    said = [yes_or_no(one.prediction) for one in answers]
    hits = sum(word == one.answer == "yes" for word, one in zip(said, answers, strict=True))
    precision = _ratio(hits, said.count("yes"))
    recall = _ratio(hits, sum(one.answer == "yes" for one in answers))
    return {
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(said.count("yes"), len(said)),
        "unclear": _ratio(said.count(None), len(said)),
    }


def _mme(answers: Sequence[Scored]) -> dict[str, float]:
    """Pictures with every question right; 100 points for each share, summed over groups (Fu et al. 2023)."""
    total, whole = 0.0, []
    for ones in _by(lambda one: one.group, answers).values():
        pictures = [min(one.score for one in asked) for asked in _by(lambda one: one.image, ones).values()]
        total += 100 * (mean(one.score for one in ones) + mean(pictures))
        whole += pictures
    return {"accuracy_plus": mean(whole), "score": total}


def _circular(answers: Sequence[Scored]) -> dict[str, float]:
    """The share of single turns that are right beside the accuracy of questions."""
    return {"turns": mean(one.score for one in answers)}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
