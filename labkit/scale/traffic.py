"""Probe of what travels: the collectives of one step, counted as torch hands them to gloo.

A ring sends (N - 1) / N of a tensor from every rank to gather it or to reduce and scatter it, and
twice that to reduce it for everyone (Patarasuk and Yuan 2009), so counts of bytes become volumes.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labkit import models
from labkit.scale.batches import step_loss, ticket_rows
from labkit.scale.sharded import shard

COLLECTIVES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}
SENT = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
"""Times (N - 1) / N of the whole tensor, from each rank."""


class CountedCollectives(TorchDispatchMode):
    """Adds up the bytes of every collective of real numbers that runs under it.

    Backward on a CPU runs in the thread that called it, so this sees both passes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        """Count one call and make it."""
        name = COLLECTIVES.get(func.overloadpacket.__name__) if func.namespace == "c10d" else None
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if name and tensors and tensors[0].is_floating_point():  # not the count of tokens
            self.calls[name] += 1
            self.bytes[name] += max(tensor.nbytes for tensor in tensors)  # the whole, not a piece
        return func(*args, **(kwargs or {}))


def sent_bytes(collectives: dict[str, int], devices: int) -> float:
    """Bytes that each rank sends, from the bytes of whole tensors by collective."""
    part = (devices - 1) / devices
    return sum(SENT[name] * part * n_bytes for name, n_bytes in collectives.items())


def traffic(folder: Path) -> dict[str, Any]:
    """Collectives of a forward and backward pass under DDP and FSDP2.

    Returns:
        for `ddp`, `fsdp2` and `fsdp2, weights kept` (whole between forward and backward):
        `calls` and `bytes` by collective, and `sent`, bytes that each rank sends by a ring.
    """
    found: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp2", "fsdp2, weights kept"):
        model, tokenizer = models.load()
        model.train()
        parallel: nn.Module
        if strategy == "ddp":
            parallel = nn.parallel.DistributedDataParallel(model)
        else:
            parallel = shard(model, reshard_after_forward=strategy == "fsdp2")
        step_loss(parallel, tokenizer, ticket_rows(0)).backward()  # DDP sorts its buckets now
        with CountedCollectives() as counted:
            step_loss(parallel, tokenizer, ticket_rows(8)).backward()
        found[strategy] = {
            "calls": dict(counted.calls),
            "bytes": dict(counted.bytes),
            "sent": sent_bytes(counted.bytes, dist.get_world_size()),
        }
    return found
