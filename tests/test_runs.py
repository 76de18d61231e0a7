"""What is written is whole or not there; the message of a full disk names the file; a folder has one run at a time."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from foveate import runs
from foveate.core import FoveateError
from foveate.inference.pictures import save_image
from foveate.modules import storage
from foveate.scenes.runs import Progress, Run

LIMIT = 4096
LONG = "x" * (4 * LIMIT)


@contextmanager
def small_files(limit: int = LIMIT) -> Iterator[None]:
    """No file may grow beyond so many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def noise() -> Image.Image:
    return Image.effect_noise((96, 96), 90)


def write_tensors(path: Path) -> None:
    with runs.whole_file(path) as temporary:
        save_file({"a": torch.zeros(4 * LIMIT)}, temporary)


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: runs.write_text(path, LONG),
    "bytes": lambda path: runs.write_bytes(path, LONG.encode()),
    "json": lambda path: runs.write_json(path, {"a": LONG}),
    "line": lambda path: runs.append_line(path, LONG),
    "tensors": write_tensors,
    "picture": lambda path: save_image(noise(), path.with_suffix(".png")),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_names_the_file_and_leaves_what_was_there(name: str, tmp_path: Path) -> None:
    path = tmp_path / ("file.png" if name == "picture" else "file")
    path.write_bytes(b"before\n")
    with small_files(), pytest.raises(FoveateError, match=f"{path} cannot be written: .*File too large"):
        WRITERS[name](path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {path.name: b"before\n"}
    WRITERS[name](path)
    assert path.stat().st_size > LIMIT and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_no_half_of_a_folder(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    model = LlamaForCausalLM(config)
    folder = tmp_path / "new" / "modules"
    with small_files(), pytest.raises(FoveateError, match=f"{folder} cannot be written: .*File too large"):
        storage.write(model, folder, card="a card")
    assert list(folder.iterdir()) == []
    storage.write(model, folder, card="a card")
    assert {"README.md", "config.json", "model.safetensors"} <= {file.name for file in folder.iterdir()}
    assert not list(folder.glob(".*"))


def test_a_state_of_training_survives_a_full_disk(tmp_path: Path) -> None:
    run = Run(runs.make_folder(tmp_path / "run"))
    run.save(Progress(step=1), {"weights": torch.ones(8)})
    with small_files(), pytest.raises(FoveateError, match=r"state\.safetensors cannot be written: .*File too large"):
        run.save(Progress(step=2), {"weights": nn.Linear(64, 64).weight})
    progress, tensors = run.load() or pytest.fail("no state")
    assert progress.step == 1 and tensors["weights"].tolist() == [1.0] * 8


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whatever_ends_the_writing_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def stop(half: Path) -> None:
        half.write_text("half")
        raise error

    with pytest.raises(error), runs.whole_file(tmp_path / "file") as temporary:
        stop(temporary)
    with pytest.raises(error), runs.whole_folder(tmp_path) as folder:
        stop(folder / "file")
    assert list(tmp_path.iterdir()) == []


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        runs.write_text(tmp_path / "file", "text")
        with runs.whole_folder(tmp_path / "folder") as folder:
            (folder / "inside").write_text("text")
            (folder / "inside").chmod(0o600)  # as savers of others leave it
    finally:
        os.umask(before)
    for file in (tmp_path / "file", tmp_path / "folder" / "inside"):
        assert file.stat().st_mode & 0o777 == 0o640


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 251 + ".png")
    save_image(noise(), path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_weights_arrive_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = os.replace
    monkeypatch.setattr(runs.os, "replace", lambda old, new: (moved.append(Path(new).name), replace(old, new)))
    with runs.whole_folder(tmp_path) as folder:
        for name in ("a.safetensors", "config.json", "z.txt"):
            (folder / name).write_text(name)
    assert moved == ["config.json", "z.txt", "a.safetensors"]


def test_lines_are_added(tmp_path: Path) -> None:
    runs.append_line(tmp_path / "log", "one")
    runs.append_line(tmp_path / "log", "zwölf")
    assert (tmp_path / "log").read_text(encoding="utf-8") == "one\nzwölf\n"


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with runs.hold(folder):
        with (
            pytest.raises(FoveateError, match=f"another run is at work in {folder}; wait for its end"),
            runs.hold(folder),
        ):
            pass
        code = f"from foveate import runs\nwith runs.hold({str(folder)!r}): print('mine')"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "another run is at work" in other.stderr and other.stdout == ""
    with runs.hold(folder):
        pass


def test_a_killed_run_lets_go_and_is_cleared_away(tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom foveate import runs\n"
        f"with runs.hold({str(tmp_path)!r}) as folder, runs.whole_folder(folder) as inside, "
        "runs.whole_file(folder / 'state') as state:\n"
        "    (inside / 'file').write_text('half')\n    state.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert len(list(tmp_path.glob(f"{runs.PART}*"))) == 2
    with runs.hold(tmp_path):
        assert [file.name for file in tmp_path.iterdir()] == [runs.LOCK]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FoveateError, match=f"^{tmp_path / 'file'} is a file; give a folder$"):
        runs.make_folder(tmp_path / "file")


# ---------------------------------------------------------------------------------------------------------------------
# a run in a folder


def test_a_run_goes_on_with_equal_settings_only(tmp_path: Path) -> None:
    settings = {"rate": 1e-3, "layers": (1, 2), "data": {"kind": "scenes"}}
    folder = tmp_path / "run"
    with runs.run_folder(folder, settings, resume=False) as held:
        assert held == folder
    with runs.run_folder(folder, settings, resume=True):
        pass
    for changed, resume, message in [
        (settings, False, "already holds a run; go on with it by resume=True, or give another folder"),
        ({**settings, "rate": 2e-3}, True, r"was begun with rate=0\.001, not rate=0\.002; resume with the same"),
        ({**settings, "data": {"kind": "other"}}, True, "begun with data=.*scenes"),
        ({"rate": 1e-3}, True, "holds a run of another kind, or of another version of Foveate"),
    ]:
        with pytest.raises(FoveateError, match=message), runs.run_folder(folder, changed, resume):
            pytest.fail("it began")


def test_what_is_no_run_cannot_be_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(FoveateError, match="holds no run to go on with"), runs.run_folder(folder, {}, resume=True):
        pytest.fail("it began")
    assert not folder.exists()
    folder.mkdir()
    (folder / runs.SETTINGS).write_text("{")
    with pytest.raises(FoveateError, match=r"run\.json cannot be read"), runs.run_folder(folder, {}, resume=True):
        pytest.fail("it began")


def test_a_run_that_is_at_work_is_not_resumed_before_anything_is_read(tmp_path: Path) -> None:
    with runs.run_folder(tmp_path, {}, resume=False):
        with pytest.raises(FoveateError, match="another run is at work in"):
            runs.check_run(tmp_path, resume=True)
        with pytest.raises(FoveateError, match="already holds a run"):
            runs.check_run(tmp_path, resume=False)
    runs.check_run(tmp_path, resume=True)


def test_of_two_that_begin_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one has begun, and ended, between this one's first look and its lock."""
    hold = runs.hold

    @contextmanager
    def late(folder: Path) -> Iterator[Path]:
        monkeypatch.setattr(runs, "hold", hold)
        with runs.run_folder(folder, {"a": 1}, resume=False):
            pass
        with hold(folder) as held:
            yield held

    monkeypatch.setattr(runs, "hold", late)
    with pytest.raises(FoveateError, match="already holds a run"), runs.run_folder(tmp_path, {"a": 2}, resume=False):
        pytest.fail("it began")
    assert (tmp_path / runs.SETTINGS).read_text() == '{\n  "a": 1\n}\n'


def test_of_several_processes_the_first_one_holds_the_folder(tmp_path: Path) -> None:
    with runs.run_folder(tmp_path, {"a": 1}, resume=False), runs.run_folder(tmp_path, {"a": 1}, False, first=False):
        pass
    with pytest.raises(FoveateError, match="begun with a=1"), runs.run_folder(tmp_path, {"a": 2}, True, first=False):
        pytest.fail("it began")
