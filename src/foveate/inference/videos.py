"""Videos from files, or from folders of their frames: refused by their header when too large, sampled as models do."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from foveate.core import FoveateError
from foveate.inference.pictures import load_image, upright_size
from foveate.paths import checked

MOST_BYTES = 2_000_000_000
MOST_FRAMES = 500_000
MOST_PIXELS = 16_000_000
"""Of one frame."""
MOST_MEMORY = 1_500_000_000
"""Bytes of all frames of a video that a model is shown, as RGB."""

# What FFmpeg may take a file for: others name further files or addresses, which it would open.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"
_KNOWN = "MP4, MOV, MKV, WebM, AVI, MPEG, FLV, WMV and Ogg are read"


@dataclass(frozen=True)
class Header:
    """What is known of a video before a frame of it is decoded.

    Attributes:
        path: the file, or the folder of its frames.
        frames: how many it has.
        fps: frames a second.
        width, height: of each frame, in pixels.
        pictures: the frames, where a folder holds them.
    """

    path: Path
    frames: int
    fps: float
    width: int
    height: int
    pictures: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Clip:
    """The frames of a video that a model is shown.

    Attributes:
        frames: (F, height, width, 3) RGB, 0 to 255.
        metadata: of the video and of which frames these are, as `transformers.video_utils.VideoMetadata` has it.
    """

    frames: numpy.ndarray
    metadata: Any


def read_header(path: str | Path, fps: float | None = None) -> Header:
    """The header of a video; no frame of a file is decoded.

    Args:
        path: a file that FFmpeg reads, or a folder whose pictures are its frames, by rising numbers in their names.
        fps: frames a second of a folder, which does not say it; a file does.

    Raises:
        FoveateError: no such file or folder, PyAV is missing, bytes that are no video, more than 2 GB, 500,000 frames
            or 16 megapixels a frame; or a folder without `fps`, with other things than pictures, or pictures of several
            sizes.
    """
    path = checked(path)
    if path.is_dir():
        if fps is None:
            raise FoveateError(f"{path} is a folder of frames, of which nothing says how many a second has; give fps")
        return _of_pictures(path, fps)
    if fps is not None:
        raise FoveateError(f"fps={fps:g} is of a folder of frames; {path} is a file, which says it itself")
    if not path.is_file():
        raise FoveateError(f"{path} is no file; give the path of a video, or of a folder of its frames")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise FoveateError(f"{path} has {size / 1e6:.0f} MB; the most is {MOST_BYTES / 1e6:.0f} MB")
    return _of_file(path)


def check_torchvision() -> None:
    """Refuse videos where no processor can read them.

    Raises:
        FoveateError: torchvision is missing.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise FoveateError(
            "processors read videos through torchvision, which is missing; install the one that belongs to this torch, "
            "as https://pytorch.org/get-started/locally says"
        )


class Sampler:
    """Chooses the frames that a model is shown, by its processor's own rule, and decodes those alone.

    Args:
        processor: of the model; its `video_processor` says which frames it looks at.
        frames: how many of each video, instead of what the processor does by itself.
        fps: how many of each second, likewise.

    Raises:
        FoveateError: the processor reads no videos, or both numbers are given, or one that shows nothing.
    """

    def __init__(self, processor: Any, frames: int | None = None, fps: float | None = None) -> None:
        check_sampling(frames, fps)
        found = getattr(processor, "video_processor", None)
        if found is None or not hasattr(found, "sample_frames"):
            raise FoveateError(
                f"{type(processor).__name__} reads no videos; ask about pictures, or take a model whose processor has "
                "a video processor (`foveate models` says of which videos can be pruned)"
            )
        self._videos = found
        given = {name: getattr(found, name, None) for name in found.valid_kwargs.__annotations__}
        asked = frames is not None or fps is not None
        self._samples = asked or bool(given["do_sample_frames"])
        self._given = {**given, "num_frames": frames, "fps": fps} if asked else given
        self._most = frames

    def chosen(self, header: Header) -> list[int]:
        """Numbers of the frames that the model is shown, from 0; all of them where its processor samples none.

        Raises:
            FoveateError: the processor cannot sample this video so, or the frames would take more than 1.5 GB.
        """
        numbers = self._sampled(header) if self._samples else [*range(header.frames)]
        memory = len(numbers) * header.width * header.height * 3
        if memory > MOST_MEMORY:
            most = MOST_MEMORY // (header.width * header.height * 3)
            raise FoveateError(
                f"{header.path} shows {len(numbers)} frames of {header.width} x {header.height} pixels, which take "
                f"{memory / 1e6:.0f} MB; the most is {MOST_MEMORY / 1e6:.0f} MB, {most} frames: give frames or fps"
            )
        return numbers

    def clip(self, header: Header) -> Clip:
        """The frames that the model is shown.

        Raises:
            FoveateError: as `chosen`, or a frame cannot be decoded.
        """
        numbers = self.chosen(header)
        if header.pictures:
            frames = numpy.stack([numpy.asarray(load_image(header.pictures[number])) for number in numbers])
        else:
            frames = _decoded(header, numbers)
        return Clip(frames, _metadata(header, numbers))

    def _sampled(self, header: Header) -> list[int]:
        try:
            found = [int(number) for number in self._videos.sample_frames(metadata=_metadata(header), **self._given)]
        # Processors raise what their arithmetic leads to: ValueError, ZeroDivisionError, TypeError.
        except Exception as error:
            raise FoveateError(f"{type(self._videos).__name__} cannot sample {_told(header)}: {error}") from error
        if not found:
            raise FoveateError(f"{type(self._videos).__name__} takes no frame of {_told(header)}, which is too short")
        together = getattr(self._videos, "temporal_patch_size", None) or 1  # it rounds to frames that go together
        if self._most is not None and len(found) >= self._most + together:
            raise FoveateError(
                f"{type(self._videos).__name__} takes {len(found)} frames of {_told(header)} whatever is asked for; "
                f"leave frames={self._most} out"
            )
        return found


def check_sampling(frames: int | None, fps: float | None) -> None:
    """Refuse numbers of frames that show nothing.

    Raises:
        FoveateError: one of them is below its smallest, or both are given.
    """
    if frames is not None and fps is not None:
        raise FoveateError(f"frames={frames} and fps={fps:g} both say how many frames are shown; give one of them")
    if frames is not None and frames < 1:
        raise FoveateError(f"frames={frames} shows nothing; the smallest is 1")
    if fps is not None and not 0 < fps < float("inf"):
        raise FoveateError(f"fps={fps:g} shows nothing; it is above 0, such as 1")


def _told(header: Header) -> str:
    return f"{header.path} ({header.frames} frames at {header.fps:.4g} a second)"


def _metadata(header: Header, numbers: Sequence[int] | None = None) -> Any:
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(
        total_num_frames=header.frames,
        fps=header.fps,
        width=header.width,
        height=header.height,
        duration=header.frames / header.fps,
        frames_indices=None if numbers is None else [*numbers],
    )


def _of_pictures(folder: Path, fps: float) -> Header:
    check_sampling(None, fps)
    names = sorted((path.name for path in folder.iterdir() if not path.name.startswith(".")), key=_by_number)
    if not names:
        raise FoveateError(f"{folder} holds no frames; give a folder with the pictures of a video")
    if len(names) > MOST_FRAMES:
        raise FoveateError(f"{folder} holds {len(names)} frames; the most is {MOST_FRAMES}")
    pictures = tuple(folder / name for name in names)
    sizes = {upright_size(picture): picture.name for picture in pictures}
    if len(sizes) > 1:
        told = ", ".join(f"{name} {width} x {height}" for (width, height), name in [*sizes.items()][:2])
        raise FoveateError(f"the frames in {folder} have several sizes ({told}); give them one")
    ((width, height),) = sizes
    _check_size(folder, len(names), width, height)
    return Header(folder, len(names), fps, width, height, pictures)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Frame 9 comes before frame 10, however many zeros their names have."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _of_file(path: Path) -> Header:
    with _opened(path) as container:
        stream = container.streams.video[0]
        rate, width, height = stream.average_rate or stream.guessed_rate, stream.width, stream.height
        # Some formats do not say how many frames they hold; each of them is a packet then.
        frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    if not (frames and rate and width and height):
        raise FoveateError(f"{path} does not say its size, or how many frames a second of it has; write it as MP4")
    _check_size(path, frames, width, height)
    return Header(path, frames, float(rate), width, height)


def _check_size(path: Path, frames: int, width: int, height: int) -> None:
    if frames > MOST_FRAMES:
        raise FoveateError(f"{path} announces {frames} frames; the most is {MOST_FRAMES}")
    if width * height > MOST_PIXELS:
        raise FoveateError(
            f"{path} announces frames of {width} x {height} pixels, {width * height / 1e6:.1f} megapixels; the most is "
            f"{MOST_PIXELS / 1e6:.0f}"
        )


def _decoded(header: Header, numbers: Sequence[int]) -> numpy.ndarray:
    """Frames of a file by their numbers, (F, height, width, 3)."""
    found: dict[int, numpy.ndarray] = {}
    with _opened(header.path) as container:
        wanted, last = set(numbers), max(numbers)
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24", width=header.width, height=header.height)
            if number >= last:
                break
    missing = sorted(wanted.difference(found))
    if missing:
        raise FoveateError(f"{_told(header)} cannot be decoded up to frame {missing[0]}; write the video anew")
    return numpy.stack([found[number] for number in numbers])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A video file, opened by PyAV."""
    try:
        import av
    except ImportError as error:
        raise FoveateError("video files need PyAV; install foveate[video], or give folders of frames") from error
    try:
        with av.open(str(path), container_options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"}) as one:
            if not one.streams.video:
                raise FoveateError(f"{path} holds no video; {_KNOWN}")
            yield one
    except FoveateError:
        raise
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise FoveateError(f"{path} is no video that can be decoded: {reason}; {_KNOWN}") from error
