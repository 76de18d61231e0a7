"""What methods share that choose by trained modules: these are read when first needed and must fit the fields."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Self

from foveate.core import FoveateError, Grid, Keep, Method
from foveate.methods._stages import check_stages, rounded_down

RANDOM = "random"
"""The path of untrained modules, built when first used: to measure speed, never answers."""


class TrainedMethod(Method):
    """A method with the modules of a folder or hub id; its dataclasses have these fields."""

    path: str | None
    modules: Any

    def _load(self, path: str) -> Any:
        """The modules of a folder or hub id."""
        raise NotImplementedError(f"{type(self).__name__} has no _load()")

    def _check_modules(self, modules: Any) -> None:
        """Refuse modules that the fields do not fit."""

    def _trained(self) -> Any:
        """The modules of `path`, read when they are first needed."""
        if self.modules is None:
            assert self.path is not None
            modules = self._load(self.path)
            self._check_modules(modules)
            object.__setattr__(self, "modules", modules)
        return self.modules

    def _ready(self) -> Self:
        """The method itself, its modules read."""
        self._trained()
        return self


class Words(NamedTuple):
    """How messages speak of trained modules."""

    modules: str  # in the plural
    read: str  # what they read
    of: str  # whose that is
    trained_for: str


class TrainedStages(TrainedMethod):
    """One with a module per stage, trained, or untrained and as wide as what it meets.

    Class attributes: `paper_layers`, the paper's depths; `words`, for messages; `missing`, the one where there are no
    modules.
    """

    paper_layers: ClassVar[tuple[int, ...]]
    words: ClassVar[Words]
    missing: ClassVar[str]

    layers: tuple[int, ...] | None
    keep: tuple[Keep, ...]

    def __post_init__(self) -> None:
        # With a path, how many stages there are is known once the modules are read.
        stages = self.paper_layers if self.path in (None, RANDOM) else tuple(range(1, len(self.keep) + 1))
        check_stages(type(self).__name__, self.keep, self.layers, stages)

    def count(self, original: int, grid: Grid | None = None, tiles: int = 1) -> tuple[int, ...] | None:
        return rounded_down(self.keep, original)

    def _build(self, width: int) -> Any:
        """Untrained modules."""
        raise NotImplementedError(f"{type(self).__name__} has no _build()")

    def _ready(self) -> Self:
        return self if self.path == RANDOM else super()._ready()

    def _check_modules(self, modules: Any) -> None:
        name, trained = type(self).__name__, tuple(modules.config.layers)
        if self.layers is not None and self.layers != trained:
            raise FoveateError(
                f"{name}: layers={self.layers}, but the {self.words.modules} in {self.path} belong after {trained} "
                "blocks; leave layers out"
            )
        if len(self.keep) != len(trained):
            raise FoveateError(
                f"{name}: {len(self.keep)} budgets {self.keep} for the {len(trained)} {self.words.modules} in "
                f"{self.path}"
            )

    def _given(self) -> Any:
        """The trained modules; None for untrained ones, which fit anything.

        Raises:
            FoveateError: there are none, or the fields do not fit them.
        """
        if self.path is None:
            raise FoveateError(self.missing)
        return None if self.path == RANDOM else self._trained()

    def _own_layers(self) -> tuple[int, ...] | None:
        """The depths that the fields or the trained modules give; None for the paper's."""
        return self.layers if self.path in (None, RANDOM) else tuple(self._trained().config.layers)

    def _modules_for(self, width: int) -> Any:
        """The modules that read hidden states of so many values.

        Raises:
            FoveateError: there are none, or others.
        """
        trained = self._given()
        modules = self._untrained(width) if trained is None else trained
        if modules.config.width != width:
            words = self.words
            raise FoveateError(
                f"{type(self).__name__}: the {words.modules} in {self.path} read {words.read} of "
                f"{modules.config.width} values, the {words.of} has {width}; load {words.modules} trained for this "
                f"{words.trained_for}"
            )
        return modules

    def _untrained(self, width: int) -> Any:
        if self.modules is None or self.modules.config.width != width:
            object.__setattr__(self, "modules", self._build(width))
        return self.modules
