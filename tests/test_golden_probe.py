"""Golden files of CLIP's attention: the streamed sums and rows of stored toy encoders, and what FoPru makes of them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from golden import files as golden_files
from golden.files import FOLDER
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from foveate.core import Block, Signals
from foveate.methods.fopru import FoPru
from foveate.ops import scores
from foveate.ops.scores import attention_sums, row_attention

CLOSE = dict(rtol=0.0, atol=1e-4)
"""How the index recommends to compare these files; probabilities are near 1/577, so that sums get a tighter bound."""
TIGHT = dict(rtol=1e-3, atol=1e-7)


class Encoded(NamedTuple):
    """One stored case: queries and keys (B, H, 1 + N, d) of every block, computed here, and the stored arrays."""

    queries: list[Tensor]
    keys: list[Tensor]
    scale: float
    arrays: dict[str, np.ndarray]


def entries() -> dict[str, dict[str, Any]]:
    index = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))
    return {entry["file"]: entry for entry in index["files"] if entry["method"] == "clip_probe"}


FILES = sorted(entries())


@cache
def encoded(file: str) -> Encoded:
    """Run the stored weights on the stored picture."""
    arrays = golden_files.arrays_of(FOLDER, file)
    config = CLIPVisionConfig(**entries()[file]["hyperparameters"]["config"])
    model = CLIPVisionModel(config).eval()
    names = {name.removeprefix("vision_model."): name for name in model.state_dict()}
    weights = {
        names[name.removeprefix("weights.vision_model.")]: torch.from_numpy(array)
        for name, array in arrays.items()
        if name.startswith("weights.")
    }
    model.load_state_dict(weights)
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        model(torch.from_numpy(arrays["pixel_values"]))
    heads = config.num_attention_heads
    queries, keys = (
        [value.unflatten(-1, (heads, -1)).transpose(1, 2) for name, value in seen.items() if name.endswith(kind)]
        for kind in ("q_proj", "k_proj")
    )
    return Encoded(queries, keys, (config.hidden_size // heads) ** -0.5, arrays)


def whole_map(case: Encoded, block: int) -> np.ndarray:
    """(B, N, N) mean over heads of the patches' attention to the patches, CLS dropped on both axes, in float64."""
    queries, keys = (side[block].double().numpy() for side in (case.queries, case.keys))
    logits = np.einsum("bhmd,bhnd->bhmn", queries, keys) * case.scale
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=1)[:, 1:, 1:]


each_file = pytest.mark.parametrize("file", FILES)


def test_both_files_are_here() -> None:
    assert len(FILES) == 2


@each_file
@pytest.mark.parametrize("chunk", [1 << 24, 100_000])
def test_received_attention(file: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "CHUNK_VALUES", chunk)
    case = encoded(file)
    sums = attention_sums(case.queries[-2], case.keys[-2], case.scale, skip=1)
    torch.testing.assert_close(sums.received_all, torch.from_numpy(case.arrays["received"]), **TIGHT)
    torch.testing.assert_close(sums.received, torch.from_numpy(case.arrays["received_patches"]), **TIGHT)
    wrong = torch.from_numpy(case.arrays["received_patches"])
    assert not torch.allclose(sums.received_all, wrong, **TIGHT), "with and without the CLS query must be told apart"


@each_file
def test_given_attention(file: str) -> None:
    case = encoded(file)
    sums = attention_sums(case.queries[-2], case.keys[-2], case.scale, skip=1)
    wanted = torch.from_numpy(whole_map(case, -2).mean(axis=2))
    torch.testing.assert_close(sums.given.double(), wanted, rtol=1e-5, atol=1e-9)


@each_file
@pytest.mark.parametrize(
    ("name", "block"), [("cls_attention", -2), ("cls_attention_first", 0), ("cls_attention_last", -1)]
)
def test_attention_of_cls(file: str, name: str, block: int) -> None:
    case = encoded(file)
    row = row_attention(case.queries[block][:, :, :1], case.keys[block], case.scale)[:, :, 0, 1:]
    torch.testing.assert_close(row, torch.from_numpy(case.arrays[name]), **CLOSE)
    torch.testing.assert_close(row, torch.from_numpy(case.arrays[name]), rtol=1e-3, atol=1e-6)


@each_file
def test_keys_of_the_block_that_is_read(file: str) -> None:
    case = encoded(file)
    torch.testing.assert_close(case.keys[-2][:, :, 1:].mean(dim=1), torch.from_numpy(case.arrays["keys_mean"]), **CLOSE)


# ---------------------------------------------------------------------------------------------------------------------
# FoPru


def fopru_by_numpy(attention: np.ndarray, keep: float, strategy: str, direction: str) -> list[int]:
    """What the paper keeps of one image's (N, N) map: equations 3 and 4, then algorithm 1."""
    given, received = attention.mean(axis=1), attention.mean(axis=0)
    first, second = (given, received) if direction == "high" else (received, given)
    significance = first if given.var() > received.var() else second
    tokens = len(significance)
    if strategy == "rank":
        return sorted(np.argsort(-significance, kind="stable")[: round(tokens * keep)].tolist())
    side = round(tokens**0.5)
    rows = np.argsort(-significance.reshape(side, side).sum(axis=1), kind="stable")[: round(side * keep)]
    return sorted((rows[:, None] * side + np.arange(side)).flatten().tolist())


@each_file
@pytest.mark.parametrize("keep", [0.002, 0.0625, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("strategy", ["rank", "row"])
@pytest.mark.parametrize("direction", ["high", "low"])
def test_fopru_keeps_what_the_paper_keeps(file: str, keep: float, strategy: Any, direction: Any) -> None:
    if strategy == "row" and keep < 0.02:
        keep = 1 / 24
    case = encoded(file)
    sums = attention_sums(case.queries[-2], case.keys[-2], case.scale, skip=1)
    batch = case.queries[-2].shape[0]
    signals = Signals(
        original=576,
        index=torch.arange(576).expand(batch, 576),
        grid=(24, 24),
        tower={"read": Block(received=sums.received, given=sums.given)},
    )
    method = FoPru(keep=keep, strategy=strategy, direction=direction)
    selection = method.select(signals)
    selection.check(576, batch, str(method))
    wanted = [fopru_by_numpy(one, keep, strategy, direction) for one in whole_map(case, -2)]
    assert [row.tolist() for row in selection.indices] == wanted
    if direction == "high":
        stored = Block(received=torch.from_numpy(case.arrays["received_patches"]), given=sums.given)
        again = method.select(Signals(576, signals.index, grid=(24, 24), tower={"read": stored}))
        assert [row.tolist() for row in again.indices] == wanted
