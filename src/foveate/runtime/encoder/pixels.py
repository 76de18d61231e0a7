"""What an encoder is given, seen as the pixels of each token: for methods that choose before it runs.

Shapes: P patches of all tiles, C channels, V values of one channel of a patch; n tokens of a tile, G patches behind
each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import cached_file

from foveate.choosing.lanes import Lanes
from foveate.core import FoveateError
from foveate.families.layouts import Tile
from foveate.families.towers import Tower
from foveate.ops.device import on_device
from foveate.paths import read_json
from foveate.runtime.uncopied import Uncopied

_GREYS = 255
# An 8-bit grey as the 16-bit one that it stands for, over 2**16: differences of such numbers are exact, and k greys are
# no more than k / 255, so that distances can be compared with thresholds in greys.
_OF_GREY = 257 / 65536
_NEAR = 0.01  # greys: what arithmetic in float32 is off
_STATED_IN = ("preprocessor_config.json", "processor_config.json")


class Pixels(Uncopied):
    """The pixels of one encoder's calls, from install() to remove()."""

    def __init__(self, model: Any, tower: Any, row: Tower) -> None:
        self.tower, self.row = tower, row
        self._mean, self._std = normalised_by(model, row)
        self._given: tuple[Tensor, Any] | None = None  # pixels of the encoding in progress, and sizes
        self._seen: dict[str, list[Tensor]] = {}  # those of each tile's tokens, once asked for
        self._hook: Any = None

    def install(self) -> None:
        """Note from now on what the encoder is given."""
        self._hook = self.tower.register_forward_pre_hook(self._before, with_kwargs=True)

    def remove(self) -> None:
        """Stop."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        self.forget()

    def forget(self) -> None:
        """An encoding is over."""
        self._given, self._seen = None, {}

    def _before(self, tower: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = next((options[name] for name in ("pixel_values", "hidden_states") if name in options), None)
        pixels = arguments[0] if arguments else given
        self.forget()
        if isinstance(pixels, Tensor):
            self._given = pixels.detach(), options.get("image_sizes")

    @property
    def entries(self) -> int:
        """Pictures, tiles or patches in what the encoder was given last."""
        return 0 if self._given is None else int(self._given[0].shape[0])

    def of(self, tiles: Sequence[Tile], kind: str, name: str = "pixels") -> list[Tensor]:
        """(n, P) of each tile that has tokens: all patches of a token side by side.

        Args:
            tiles: of the encoding in progress, in the order in which the encoder sees them.
            kind: "image" or "video".
            name: "pixels" are in [0, 1], the frames of a still picture once; those "normalised" are as they were given.

        Raises:
            FoveateError: the encoder was handed its pixels in another way than transformers does.
        """
        if name in self._seen:
            return self._seen[name]
        if self._given is None:
            raise FoveateError(
                f"{type(self.tower).__name__} was called without pixel values, so its tokens cannot be chosen by them"
            )
        patches, known = self._patches(kind == "image" and name == "pixels"), sum(tile.length for tile in tiles)
        if patches.shape[0] != known:
            raise FoveateError(
                f"the encoder was given the pixels of {patches.shape[0]} patches, but the sizes of its pictures say "
                f"{known}; pass what the processor made"
            )
        each = patches.split([tile.length for tile in tiles])
        rows = [self._in_greys(mine) for mine in each] if name == "pixels" else each
        # Where some tokens are interpolated between patches, the others have theirs as often: all are of one width.
        behind = max(tile.sources.shape[1] for tile in tiles)
        self._seen[name] = [
            _side_by_side(mine.flatten(1), tile.sources.repeat(1, behind // tile.sources.shape[1]))
            for tile, mine in zip(tiles, rows, strict=True)
            if tile.sources.shape[0]
        ]
        return self._seen[name]

    def left(self, lanes: Lanes, kind: str, name: str, numbers: Sequence[int]) -> list[Tensor]:
        """(K, P) of what is left of some tiles, numbered among those that have tokens; see `of`."""
        whole, found = self.of([lane.tile for lane in lanes.lanes], kind, name), []
        for number in numbers:
            mine, tokens = whole[number], lanes.tokens[number]
            found.append(mine if tokens.untouched else mine[on_device(tokens.index, mine.device)])
        return found

    def _patches(self, once: bool) -> Tensor:
        """(P, C, V) as they were given: patches as rows, pictures of one size, or pictures padded to one.

        Args:
            once: of patches of several frames the first alone.
        """
        assert self._given is not None
        pixels, sizes = self._given
        channels, side = len(self._mean), _side(self.tower.config)
        if not self.row.pictures:
            frames = int(getattr(self.tower.config, "temporal_patch_size", 1))
            whole = pixels.reshape(-1, channels, frames, side * side)
            return whole[:, :, 0] if once else whole.flatten(2)
        if sizes is None or not self.row.packed:
            return _cut(pixels, side)
        sizes = sizes.tolist() if isinstance(sizes, Tensor) else sizes
        both = zip(pixels, sizes, strict=True)
        return torch.cat([_cut(one[None, :, :height, :width], side) for one, (height, width) in both])

    def _in_greys(self, patches: Tensor) -> Tensor:
        """(p, C, V) of one tile in [0, 1] again; where all are 8-bit greys, as exact numbers.

        Whatever is no more off whole greys than the rounding of its dtype makes it counts as whole.
        """
        mean, std = (on_device(torch.tensor(one)[:, None] * _GREYS, patches.device) for one in (self._mean, self._std))
        spread = patches.float() * std
        greys = spread + mean
        whole = greys.round()
        rounding = spread.abs_().mul_(torch.finfo(patches.dtype).eps).add_(_NEAR)
        all_whole = ((greys - whole).abs_() <= rounding).all()
        return torch.where(all_whole, whole.mul_(_OF_GREY), greys.div_(_GREYS))


def _side_by_side(patches: Tensor, of: Tensor) -> Tensor:
    """(p, W) of a tile -> (n, G * W) of its tokens, of which (n, G) says the patches; on the host.

    Where they stand in that order already nothing is copied.
    """
    if torch.equal(of.flatten(), torch.arange(patches.shape[0])):
        return patches.reshape(of.shape[0], -1)
    return patches[on_device(of, patches.device)].flatten(1)


def _side(config: Any) -> int:
    side = config.patch_size
    return int(side if isinstance(side, int) else side[0])


def _cut(pictures: Tensor, side: int) -> Tensor:
    """(T, C, h, w) -> (P, C, V), row by row of each; what is less than a patch is left out, as convolutions do."""
    count, channels, height, width = pictures.shape
    down, across = height // side, width // side
    squares = pictures[..., : down * side, : across * side].reshape(count, channels, down, side, across, side)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(count * down * across, channels, side * side)


def normalised_by(model: Any, row: Tower) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, by channel, by which a model's processor normalises pixels.

    As the files beside its checkpoint say, where they are on this machine; else what encoders of its kind were trained
    with.
    """
    stated = _stated(str(getattr(model.config, "_name_or_path", "") or ""))
    if stated is None:
        return row.normal
    mean, std = _channels(stated.get("image_mean")), _channels(stated.get("image_std"))
    if stated.get("do_normalize") is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    if mean is None or std is None:
        return row.normal
    scale = float(stated.get("rescale_factor") or 1 / _GREYS) * _GREYS
    return tuple(one / scale for one in mean), tuple(one / scale for one in std)


def _stated(name: str) -> dict[str, Any] | None:
    """What the checkpoint's processor says of pictures; None where no such file is here."""
    for file in _STATED_IN if name else ():
        if Path(name).is_dir():
            path = Path(name) / file
        else:
            quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries")}
            found = cached_file(
                name, file, local_files_only=True, _raise_exceptions_for_connection_errors=False, **quiet
            )
            path = Path(found or "")
        if path.is_file():
            held = read_json(path, str(path))
            held = held.get("image_processor", held) if isinstance(held, dict) else None
            if isinstance(held, dict) and "image_mean" in held:
                return held
    return None


def _channels(value: Any) -> tuple[float, ...] | None:
    """Three numbers, where these are any."""
    right = isinstance(value, list) and len(value) == 3 and all(isinstance(one, int | float) for one in value)
    return tuple(map(float, value)) if right else None
