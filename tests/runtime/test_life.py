"""The life of a handle: started, stopped, lost and found again; and that nothing of it is copied."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from models.untouched import untouched
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

import foveate
from foveate import FoPru, FoveateError, Random

# Inside the encoder, behind it, inside the decoder, on the cache.
METHODS = ("tome:keep=9", "fopru:keep=0.25", "fastv:layer=1,keep=0.25", "h2o:heavy=0.2,recent=0.2")
each_method = pytest.mark.parametrize("method", METHODS)
TESTS = Path(__file__).parents[1]
ON = "on LlavaForConditionalGeneration"


def generate(model: Any, given: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**given, max_new_tokens=4, **options)


# -- states -----------------------------------------------------------------------------------------------------------


def test_it_says_what_it_is_and_how_it_stands() -> None:
    handle = foveate.prune(tiny.model(), ["fopru:keep=0.5", "fastv:layer=2,keep=0.25"])
    names = "fopru:keep=0.5+fastv:keep=0.25"
    assert repr(handle) == f"<Handle of {names} {ON}: not started>"
    with handle:
        assert repr(handle) == f"<Handle of {names} {ON}: at work>"
    assert repr(handle) == f"<Handle of {names} {ON}: stopped>"


def test_stopping_what_is_not_at_work_warns() -> None:
    model = tiny.model()
    handle = foveate.prune(model, Random())
    with untouched(model):
        with pytest.warns(
            UserWarning, match=f"<Handle of random:keep=0.25 {ON}: not started> is not at work, so stop.. changes"
        ):
            handle.stop()
        handle.start()
        handle.stop()
        with pytest.warns(UserWarning, match=f"<Handle of random:keep=0.25 {ON}: stopped> is not at work"):
            handle.stop()
    other = foveate.prune(model, FoPru()).start()
    with pytest.warns(UserWarning, match="is not at work") as warned:
        handle.stop()
    assert str(warned[0].message) == (
        f"<Handle of random:keep=0.25 {ON}: stopped> is not at work, so stop() changes nothing; <Handle of "
        f"fopru:keep=0.25 {ON}: at work> is, and foveate.restore(model) stops it"
    )
    assert warned[0].filename == __file__
    assert other.active, "a handle stops only itself"
    other.stop()


def test_a_context_may_be_stopped_inside() -> None:
    model = tiny.model()
    handle = foveate.prune(model, Random())
    with handle:
        handle.stop()
    with foveate.prune(model, Random()):
        foveate.restore(model)
        with foveate.prune(model, FoPru()):
            pass


# -- lost and found ---------------------------------------------------------------------------------------------------


def test_a_handle_that_is_lost_can_be_found() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    unpruned = generate(model, given)
    with untouched(model):
        handle = foveate.prune(model, Random()).start()
        handle = foveate.prune(model, FoPru(keep=0.25))  # the same cell of a notebook, run again
        gc.collect()
        with pytest.raises(
            FoveateError, match=r"another handle already .*random.*foveate.restore\(model\) where it is"
        ):
            handle.start()
        foveate.restore(model)
        assert torch.equal(generate(model, given), unpruned)
        with handle as trace:
            generate(model, given)
    assert trace.images[0].after == 9


def test_restoring_a_model_that_nobody_prunes_changes_nothing() -> None:
    model = tiny.model()
    with untouched(model):
        foveate.restore(model)


def test_a_handle_that_was_never_started_warns_when_it_is_lost() -> None:
    model = tiny.model()
    with pytest.warns(UserWarning, match="never started") as warned:
        foveate.prune(model, FoPru(keep=0.25))
    assert str(warned[0].message) == (
        f"<Handle of fopru:keep=0.25 {ON}: not started> was made and never started, so nothing was pruned; use `with "
        "foveate.prune(...):`, or start() it"
    )
    with foveate.prune(model, FoPru(keep=0.25)):
        pass
    foveate.prune(model, FoPru()).discard()
    gc.collect()


def test_it_warns_at_the_end_of_a_script() -> None:
    script = "from models import tiny; import foveate; handle = foveate.prune(tiny.model(), 'random')"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=TESTS)
    assert "not started> was made and never started, so nothing was pruned" in ran.stderr


# -- while a call runs ------------------------------------------------------------------------------------------------


class Does(LogitsProcessor):
    """Does something before the second word."""

    def __init__(self, what: Any) -> None:
        self.what, self.calls = what, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            self.what()
        return scores


@each_method
def test_a_handle_does_not_stop_inside_a_call(method: str) -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    message = "this handle cannot stop while a call of its model is running, from inside that call; stop.. it when"
    with untouched(model):
        handle = foveate.prune(model, method).start()
        expected = generate(model, given)
        for stop in (handle.stop, lambda: foveate.restore(model)):
            with pytest.raises(FoveateError, match=message):
                generate(model, given, logits_processor=[Does(stop)])
            assert handle.active

        def caught() -> None:
            with pytest.raises(FoveateError, match=message):
                handle.stop()

        assert torch.equal(generate(model, given, logits_processor=[Does(caught)]), expected)
        hook = model.lm_head.register_forward_pre_hook(lambda *_: handle.stop())
        with pytest.raises(FoveateError, match=message), torch.no_grad():
            model(**given)
        hook.remove()
        assert torch.equal(generate(model, given), expected)
        handle.stop()


@each_method
def test_another_thread_stops_it_when_the_call_is_over(method: str) -> None:
    """As where one thread reads a streamer and leaves the context while the other is still about to return."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    begun, go_on = threading.Event(), threading.Event()

    class Slow(BaseStreamer):
        def put(self, value: Tensor) -> None:
            begun.set()
            assert go_on.wait(30)

        def end(self) -> None:
            pass

    found: list[Tensor] = []
    stopped: list[bool] = []
    with untouched(model):
        handle = foveate.prune(model, method)
        with handle:
            expected = generate(model, given)
        handle.start()
        runs = threading.Thread(target=lambda: found.append(generate(model, given, streamer=Slow())))
        stops = threading.Thread(target=lambda: stopped.append(handle.stop() is None))
        runs.start()
        assert begun.wait(30)
        stops.start()
        stops.join(0.3)
        assert not stopped, "it waits"
        assert handle.active
        go_on.set()
        runs.join()
        stops.join()
        assert stopped
        assert not handle.active
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_call_holds_the_model_no_longer(error: type[BaseException]) -> None:
    """An interrupt runs no hook, so that nothing tells that the call is over."""
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    found: list[Tensor] = []

    def interrupt(*_: Any) -> None:
        raise error

    with torch.no_grad(), untouched(model):
        handle = foveate.prune(model, "fastv:layer=1,keep=0.25").start()
        expected = generate(model, given)
        for call in (lambda: model(**given), lambda: generate(model, given)):
            hook = model.get_decoder().layers[2].register_forward_pre_hook(interrupt)
            with pytest.raises(error):
                call()
            hook.remove()
            thread = threading.Thread(target=lambda: found.append(generate(model, given)))
            thread.start()
            thread.join()
        hook = model.lm_head.register_forward_pre_hook(interrupt)
        with pytest.raises(error):
            model(**given)
        hook.remove()
        handle.stop()
    assert len(found) == 2
    assert all(torch.equal(one, expected) for one in found)


def test_nothing_of_a_call_waits_for_the_collector() -> None:
    """Pictures of a call are gone as soon as their caller lets them go."""
    model = tiny.model()
    gc.collect()
    gc.disable()
    try:
        with foveate.prune(model, "fastv:layer=1,keep=0.25"), torch.no_grad():
            for call in (lambda given: generate(model, given), lambda given: model(**given)):
                given = tiny.inputs(model, "3i4")
                gone = weakref.ref(given["pixel_values"])
                call(given)
                del given
                assert gone() is None
    finally:
        gc.enable()


# -- copies -----------------------------------------------------------------------------------------------------------

COPIES = {
    "copied": copy.deepcopy,
    "pickled": pickle.dumps,
}
UNCOPIED = (
    r"a model cannot be copied or pickled while a handle prunes it, nor can that handle; stop\(\) it first, by "
    r"foveate.restore\(model\)"
)


@each_method
@pytest.mark.parametrize("how", COPIES)
def test_a_model_at_work_is_not_copied(how: str, method: str) -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    handle = foveate.prune(model, method)
    with handle:
        expected = generate(model, given)
        for what in (model, handle, model.model, model.get_decoder()):
            with pytest.raises(FoveateError, match=UNCOPIED):
                COPIES[how](what)
        assert torch.equal(generate(model, given), expected)
    copy.deepcopy(model)


def test_a_part_that_is_only_watched_is_not_copied() -> None:
    model = tiny.model()
    with foveate.prune(model, FoPru(keep=0.25)), pytest.raises(FoveateError, match=UNCOPIED):
        copy.deepcopy(model.model.vision_tower)


def test_torch_save_refuses_the_model_but_not_its_weights(tmp_path: Any) -> None:
    model = tiny.model()
    with foveate.prune(model, FoPru(keep=0.25)):
        with pytest.raises(FoveateError, match=UNCOPIED):
            torch.save(model, tmp_path / "model.pt")
        torch.save(model.state_dict(), tmp_path / "weights.pt")


def test_a_method_that_somebody_held_on_to_is_the_stock_one_afterwards() -> None:
    model = tiny.model()
    given = tiny.inputs(model, "3i4")
    unpruned = generate(model, given)
    with foveate.prune(model, FoPru(keep=0.25)):
        held = model.generate
    assert torch.equal(held(**given, max_new_tokens=4), unpruned)
