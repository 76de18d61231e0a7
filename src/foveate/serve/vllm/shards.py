"""An encoder whose heads several devices share: each of them sees all heads, and so chooses the same tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

from foveate.serve.vllm.rooms import PackedWatch, Probe, Watch


class Gathering:
    """Goes before a watch: what it is shown of this device's heads it reads together with that of the others.

    Attributes:
        heads: of the whole encoder.
    """

    heads: int

    def read_attention(self, queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float, *more: Any) -> None:
        """Note what the queries and keys (B, H, N, d) of all devices say about each patch."""
        if queries.shape[1] < self.heads and get_tensor_model_parallel_world_size() > 1:
            queries, keys = (tensor_model_parallel_all_gather(one.contiguous(), dim=1) for one in (queries, keys))
        super().read_attention(queries, keys, mask, scale, *more)  # type: ignore[misc]


class GatheringWatch(Gathering, Watch):
    """One block of an encoder that runs pictures apart."""


class GatheringPackedWatch(Gathering, PackedWatch):
    """One block of an encoder that runs the patches of all pictures as one sequence."""


class EngineProbe(Probe):
    """A probe of an encoder inside an engine."""

    kinds: ClassVar[tuple[type[Watch], type[PackedWatch]]] = (GatheringWatch, GatheringPackedWatch)
    """For encoders that run pictures apart, and for those that run them as one sequence."""

    def watch(self, number: int, fields: Iterable[str]) -> Watch:
        """Observe a block, and more of it than so far where it is observed already; before install()."""
        if number not in self._watches:
            block, row = self._blocks[number], self._row
            made = self.kinds[row.packed](block, getattr(block, row.attention), set(), row.summary)
            vision = self._model.config.vision_config
            made.heads = getattr(vision, "num_attention_heads", None) or vision.num_heads  # type: ignore[attr-defined]
            self._watches[number] = made
        return super().watch(number, fields)
