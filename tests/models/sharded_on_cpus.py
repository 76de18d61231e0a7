"""Runs `foveate` where accelerate shards modules on CPUs, and says on stderr what was sharded.

accelerate reads a file for FSDP on GPUs alone: of processes on CPUs it takes no notice of it. Here it is told that
these are GPUs' once they have found each other over gloo.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def taken_for_gpus() -> None:
    """Let accelerate look at its file for FSDP."""
    stock = PartialState.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        stock(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def told(kind: Any) -> None:
    """Say of each module that is wrapped in `kind` what it is, and how many of its numbers this process holds."""
    stock = kind.__init__

    def init(self: Any, module: Any, *arguments: Any, **options: Any) -> None:
        options["device_id"] = torch.device("cpu")  # accelerate gives it a number
        whole = sum(one.numel() for one in module.parameters())
        stock(self, module, *arguments, **options)
        mine = sum(one.numel() for one in self.parameters())
        sys.stderr.write(f"{kind.__name__} {type(module).__name__} {mine} of {whole}\n")

    kind.__init__ = init


def copied(kind: Any) -> None:
    """Let gathered weights be copied: torch copies nothing to a CPU that lies on one, and frees it too early."""
    kind.offload_to_cpu = property(lambda self: False, lambda self, value: None)


def main() -> int:
    """Run the command line."""
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel

    from foveate.cli import main as foveate

    taken_for_gpus()
    copied(FullStateDictConfig)
    told(FullyShardedDataParallel)
    return foveate(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
