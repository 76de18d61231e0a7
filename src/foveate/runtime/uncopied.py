"""What a handle puts into a model is never copied with it: a copy would be pruned by what is another model's."""

from __future__ import annotations

from typing import NoReturn

from foveate.core import FoveateError


class Uncopied:
    """Whatever belongs to one model alone."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise FoveateError(
            "a model cannot be copied or pickled while a handle prunes it, nor can that handle; stop() it first, by "
            "foveate.restore(model) where it is out of reach"
        )
