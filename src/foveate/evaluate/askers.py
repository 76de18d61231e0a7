"""Who asks for a search: scenes drawn for each round, or a folder's questions shared out among the rounds."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.core import FoveateError, Method
from foveate.evaluate.folder_rows import by_question, cost, scored
from foveate.evaluate.folder_run import answer_folder
from foveate.evaluate.left_out import LeaveOut
from foveate.evaluate.local_task import Folder
from foveate.evaluate.scenes_task import MOST_SEED, evaluate
from foveate.evaluate.tuning import ROUNDS, Reached, sizes


@dataclass(frozen=True)
class OfScenes:
    """Scenes; each round draws pictures of its own.

    Args:
        loaded: model and processor.
        questions: of the rounds together; as many again are fresh.

    Raises:
        FoveateError: too few questions, or a seed whose rounds leave the range.
    """

    loaded: Any
    questions: int
    seed: int = 0
    batch: int = 16
    clip: Any = None
    leave_out: LeaveOut | None = None

    def __post_init__(self) -> None:
        sizes(self.questions)
        if not 0 <= self.seed <= MOST_SEED - ROUNDS:
            raise FoveateError(f"seed={self.seed} is outside 0..{MOST_SEED - ROUNDS}, and each round takes the next")

    def __call__(self, specs: Mapping[str, tuple[Method, ...]], number: int) -> dict[str, Reached]:
        """What each candidate reached in a round."""
        count = [*sizes(self.questions), self.questions][number]
        settings: dict[str, Any] = {"samples": count, "seed": self.seed + number, "batch": self.batch}
        settings["leave_out"] = self.leave_out
        rivals = [stages for stages in specs.values() if stages]
        rows = evaluate(self.loaded.model, self.loaded.processor, rivals, clip=self.clip, **settings)
        return {
            row.method: Reached(
                [score for scores in row.scores.values() for score in scores],
                statistics.fmean(row.equivalent),
                row.to_dict()["prefill_flops_share"],
            )
            for row in rows
        }


@dataclass(frozen=True)
class OfFolder:
    """A folder's questions, shuffled; a third of them is fresh.

    Args:
        loaded: model and processor.
        name: how the user calls the model.
        run: a folder in which the answers of each round are written down.
        resume: go on with what is there.
        frames, fps: of videos, as `answer_folder` has them.

    Raises:
        FoveateError: too few questions.
    """

    loaded: Any
    folder: Folder
    name: str
    run: Path
    resume: bool = False
    seed: int = 0
    batch: int = 16
    max_new_tokens: int = 32
    clip: Any = None
    frames: int | None = None
    fps: float | None = None
    leave_out: LeaveOut | None = None

    def __call__(self, specs: Mapping[str, tuple[Method, ...]], number: int) -> dict[str, Reached]:
        """What each candidate reached in a round."""
        shares = check_folder(self.folder)
        start = sum(shares[:number])
        shuffled = random.Random(self.seed).sample(self.folder.questions, len(self.folder.questions))
        part = tuple(shuffled[start : start + shares[number]])
        asked = dataclasses.replace(self.folder, questions=part, digest=f"{self.folder.digest} {self.seed}/{number}")
        out = self.run / f"{number}-{_digest([*specs])}"
        settings: dict[str, Any] = {"batch": self.batch, "max_new_tokens": self.max_new_tokens, "clip": self.clip}
        settings |= {"frames": self.frames, "fps": self.fps, "leave_out": self.leave_out}
        settings |= {"name": self.name, "out": out, "resume": self.resume and out.exists()}
        lines = answer_folder(self.loaded.model, self.loaded.processor, asked, specs, **settings)
        found = {}
        for rival, kinds in scored(lines, asked, self.batch).items():
            spent = cost([line for line in lines if line.rival == rival])
            worth = [*by_question(kinds).values()]
            found[rival] = Reached(worth, spent["equivalent_tokens"], spent["prefill_flops_share"])
        return found


def check_folder(folder: Folder) -> list[int]:
    """How many of a folder's questions each round gets, the fresh ones last.

    Raises:
        FoveateError: it holds too few.
    """
    fresh = len(folder.questions) // 3
    return [*sizes(len(folder.questions) - fresh), fresh]


def _digest(specs: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(specs).encode()).hexdigest()[:12]
