"""Videos: what of a header is refused, in which order frames come, and which of them a model is shown."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.core import FoveateError
from foveate.inference import videos
from foveate.inference.videos import Header, Sampler, check_torchvision, read_header

needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="needs PyAV")
needs_torchvision = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")

FRAMES, FPS = 30, 10


def grey(number: int) -> Image.Image:
    return Image.new("RGB", (64, 48), (8 * number,) * 3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames of rising brightness, whose names have no zeros in front."""
    folder = tmp_path_factory.mktemp("frames")
    for number in range(12):
        grey(number).save(folder / f"frame_{number + 1}.png")
    (folder / ".hidden").write_text("no frame")
    return folder


def write_video(path: Path, frames: int = FRAMES) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(grey(number))))
        container.mux(stream.encode())
    return path


def stand_in(**settings: Any) -> Any:
    """A processor whose video processor is told what to sample, and says what it was asked."""
    asked: list[dict[str, Any]] = []
    names = ("num_frames", "fps", "do_sample_frames", "temporal_patch_size")
    reader = SimpleNamespace(valid_kwargs=SimpleNamespace(__annotations__=dict.fromkeys(names)), asked=asked)
    vars(reader).update(settings)

    def sample_frames(metadata: Any, **given: Any) -> Any:
        asked.append(given)
        count = given["num_frames"] or int(metadata.duration * given["fps"])
        return np.arange(count) * metadata.total_num_frames // count

    reader.sample_frames = sample_frames
    return SimpleNamespace(video_processor=reader)


def test_frames_of_a_folder_come_by_number(pictures: Path) -> None:
    header = read_header(pictures, fps=4)
    assert (header.frames, header.fps, header.width, header.height) == (12, 4.0, 64, 48)
    assert [picture.name for picture in header.pictures] == [f"frame_{number}.png" for number in range(1, 13)]
    clip = Sampler(stand_in(do_sample_frames=True, fps=2)).clip(header)
    assert clip.frames.shape == (6, 48, 64, 3)
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 16, 32, 48, 64, 80]
    assert (clip.metadata.frames_indices, clip.metadata.duration) == ([0, 2, 4, 6, 8, 10], 3.0)
    assert clip.metadata.timestamps == [0, 0.5, 1, 1.5, 2, 2.5]


def test_numbers_of_the_user_replace_both_of_the_processor(pictures: Path) -> None:
    header, processor = read_header(pictures, fps=4), stand_in(do_sample_frames=True, fps=2, num_frames=None)
    assert Sampler(processor, frames=3).chosen(header) == [0, 4, 8]
    assert Sampler(processor, fps=1).chosen(header) == [0, 4, 8]
    assert [(given["num_frames"], given["fps"]) for given in processor.video_processor.asked] == [(3, None), (None, 1)]


def test_every_frame_is_shown_where_the_processor_samples_none(pictures: Path) -> None:
    assert Sampler(stand_in(do_sample_frames=False)).chosen(read_header(pictures, fps=4)) == [*range(12)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(frames=0), "frames=0 shows nothing; the smallest is 1"),
        (dict(fps=0.0), "fps=0 shows nothing; it is above 0"),
        (dict(fps=float("nan")), "fps=nan shows nothing"),
        (dict(frames=2, fps=1.0), "frames=2 and fps=1 both say how many frames are shown"),
    ],
)
def test_numbers_that_show_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        Sampler(stand_in(do_sample_frames=True, fps=2), **settings)


def test_what_cannot_be_sampled_is_refused(pictures: Path) -> None:
    header = read_header(pictures, fps=4)
    with pytest.raises(FoveateError, match="SimpleNamespace reads no videos; ask about pictures"):
        Sampler(SimpleNamespace(video_processor=SimpleNamespace(model_input_names=[])))
    with pytest.raises(FoveateError, match=r"cannot sample .* \(12 frames at 4 a second\): unsupported operand"):
        Sampler(stand_in(do_sample_frames=True)).chosen(header)  # neither number is known
    stubborn = stand_in(do_sample_frames=True)
    stubborn.video_processor.sample_frames = lambda metadata, **given: [*range(9)]
    with pytest.raises(FoveateError, match=r"takes 9 frames of .* whatever is asked for; leave frames=4 out"):
        Sampler(stubborn, frames=4).chosen(header)
    stubborn.video_processor.sample_frames = lambda metadata, **given: []
    with pytest.raises(FoveateError, match=r"takes no frame of .*, which is too short"):
        Sampler(stubborn).chosen(header)
    large = Header(Path("large.mp4"), 1000, 25.0, 1920, 1080)
    with pytest.raises(
        FoveateError, match=r"large.mp4 shows 1000 frames of 1920 x 1080 .* 6221 MB; the most is 1500 MB, 241 frames"
    ):
        Sampler(stand_in(do_sample_frames=False)).chosen(large)


def test_folders_that_are_no_video_are_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="is a folder of frames, of which nothing says how many a second has"):
        read_header(pictures)
    with pytest.raises(FoveateError, match="fps=-1 shows nothing"):
        read_header(pictures, fps=-1)
    with pytest.raises(FoveateError, match="holds no frames"):
        read_header(tmp_path, fps=1)
    grey(1).save(tmp_path / "1.png")
    Image.new("RGB", (3, 5)).save(tmp_path / "2.png")
    with pytest.raises(FoveateError, match=r"several sizes \(1.png 64 x 48, 2.png 3 x 5\)"):
        read_header(tmp_path, fps=1)
    (tmp_path / "2.png").write_text("no picture")
    with pytest.raises(FoveateError, match=r"2\.png is no picture that can be decoded"):
        read_header(tmp_path, fps=1)


def test_torchvision_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FoveateError, match="through torchvision, which is missing; install the one that belongs to"):
        check_torchvision()


def test_pyav_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"anything")
    with pytest.raises(FoveateError, match=r"video files need PyAV; install foveate\[video\], or give folders of"):
        read_header(tmp_path / "a.mp4")


def test_files_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="is no file; give the path of a video"):
        read_header(tmp_path / "gone.mp4")
    path = tmp_path / "a.mp4"
    path.touch()
    with pytest.raises(FoveateError, match="fps=2 is of a folder of frames"):
        read_header(path, fps=2)
    os.truncate(path, videos.MOST_BYTES + 1)
    with pytest.raises(FoveateError, match="has 2000 MB; the most is 2000 MB"):
        read_header(path)


@needs_av
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_frames_of_a_file_are_those_that_were_written(tmp_path: Path, suffix: str) -> None:
    """Of a container that says how many frames it holds, and of one that does not."""
    header = read_header(write_video(tmp_path / f"a.{suffix}"))
    assert (header.frames, header.fps, header.width, header.height) == (FRAMES, FPS, 64, 48)
    clip = Sampler(stand_in(do_sample_frames=True), frames=5).clip(header)
    assert clip.metadata.frames_indices == [0, 6, 12, 18, 24]
    brightness = clip.frames.mean(axis=(1, 2, 3))
    assert np.abs(brightness - 8 * np.array([0, 6, 12, 18, 24])).max() < 4


@needs_av
def test_a_playlist_does_not_open_other_files(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\na.mp4\n")
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    for name in ("list.mp4", "concat.mp4"):
        with pytest.raises(FoveateError, match=f"{name} is no video that can be decoded"):
            read_header(tmp_path / name)


@needs_av
def test_files_that_are_no_video_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_video(tmp_path / "a.avi")
    (tmp_path / "text.mp4").write_text("no video" * 99)
    with pytest.raises(FoveateError, match=r"text\.mp4 is no video that can be decoded: .*; MP4, MOV, MKV"):
        read_header(tmp_path / "text.mp4")
    monkeypatch.setattr(videos, "MOST_FRAMES", FRAMES - 1)
    with pytest.raises(FoveateError, match="announces 30 frames; the most is 29"):
        read_header(whole)
    monkeypatch.setattr(videos, "MOST_FRAMES", FRAMES)
    monkeypatch.setattr(videos, "MOST_PIXELS", 64 * 48 - 1)
    with pytest.raises(FoveateError, match="announces frames of 64 x 48 pixels"):
        read_header(whole)
    monkeypatch.undo()
    header, data = read_header(whole), whole.read_bytes()
    whole.write_bytes(data[: len(data) // 2])
    with pytest.raises(FoveateError, match=r"cannot be decoded up to frame|is no video that can be decoded"):
        Sampler(stand_in(do_sample_frames=False)).clip(header)


@needs_av
@needs_torchvision
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Qwen3VLVideoProcessor", {}),
        ("Qwen3VLVideoProcessor", {"num_frames": 8, "fps": None}),
        ("Qwen2VLVideoProcessor", {"fps": 4}),
        ("InternVLVideoProcessor", {"num_frames": 5}),
        ("LlavaOnevisionVideoProcessor", {"num_frames": 7}),
        ("SmolVLMVideoProcessor", {"num_frames": 6, "fps": 3}),
    ],
)
def test_frames_are_those_that_the_stock_processor_decodes(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    """As `transformers` reads a file through PyAV with the processor's own rule."""
    import transformers
    from transformers.video_utils import load_video

    reader = getattr(transformers, kind)()
    given = {name: getattr(reader, name, None) for name in reader.valid_kwargs.__annotations__} | settings
    path = write_video(tmp_path / "a.mp4")
    rule = functools.partial(reader.sample_frames, **given)
    frames, metadata = load_video(str(path), backend="pyav", sample_indices_fn=rule)
    if kind.startswith("Smol"):  # which has both numbers by itself
        reader.num_frames, reader.fps, asked = 6, 3, {}
        reader.do_sample_frames = True
    else:
        asked = {"frames": settings.get("num_frames"), "fps": settings.get("fps")}
    clip = Sampler(SimpleNamespace(video_processor=reader), **asked).clip(read_header(path))
    assert np.array_equal(clip.frames, frames)
    assert clip.metadata.frames_indices == [int(number) for number in metadata.frames_indices]
    assert (clip.metadata.fps, clip.metadata.duration) == (metadata.fps, metadata.duration)
