"""What the processor says will leave before the encoder is what leaves there; the engine is not needed for this."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from models import tiny, tiny_calls

from foveate.core import FoveateError
from foveate.families import family_of
from foveate.families.layouts import Encoded
from foveate.serve.vllm.before import left_of
from foveate.spec import parse


@pytest.mark.parametrize("spec", ["pixelprune", "pixelprune:threshold=0.8"])
@pytest.mark.parametrize("name", ["qwen2.5-vl", "internvl"])
def test_the_processor_knows_what_the_encoder_will_leave(name: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.methods.pixelprune._MARGIN", 9.0)  # the pixels of these models are drawn anywhere
    model = tiny.model(name)
    given = tiny_calls.repeating(tiny.inputs(model, "3i4", "2i1i5"))
    with tiny.prune(model, parse(spec)) as trace, torch.no_grad():
        model(**given)
    family = family_of(model)
    tower, row = family.tower_of(model)
    rows = [one.original for one in trace.images]
    layouts = family.layouts(Encoded(model, tower, given, rows, lambda: rows))
    outline = cast(Any, SimpleNamespace(model=model, encoder=tower, tower=row))
    left = left_of(outline, parse(spec).parts(), "image", given, layouts)
    assert [one.tolist() for one in left] == [image.kept.tolist() for image in trace.images]
    assert any(one.numel() < image.original for one, image in zip(left, trace.images, strict=True))
    with pytest.raises(FoveateError, match="acts before the encoder, which videos do not allow in vLLM"):
        left_of(outline, parse(spec).parts(), "video", given, layouts)
