"""Probe of ZeRO's stages: bytes of weights, gradients and optimizer state on this rank.

DeepSpeed measures them where it is installed. Elsewhere torch's own engines do: their strategies
divide the same state, in fp32, where DeepSpeed trains in bf16 with an fp32 copy.
"""

import importlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit import models
from labkit.scale.batches import ROWS, encode, share, step_loss, ticket_rows
from labkit.scale.sharded import gradients, held_bytes, local, reserved_bytes, shard, states
from labkit.weights import n_parameters

RATE = 1e-4


def zero(folder: Path, engine: str = "deepspeed", stages: list[int] | None = None) -> dict:
    """What this rank holds under each stage of ZeRO.

    Args:
        engine: `deepspeed`, or `torch`: ZeroRedundancyOptimizer for stage 1, FSDP2 that keeps
            weights whole between forward and backward for stage 2, FSDP2 for stage 3.

    Returns:
        `engine` with its version, `numbers` (P), and a row for each stage: `stage`, `strategy`,
        bytes of `parameters`, `gradients` and `optimizer`. Gradients are counted where the stages
        differ: between two micro-steps that are accumulated.
    """
    measure = {"deepspeed": _deepspeed, "torch": _torch}[engine]
    rows = [measure(stage) for stage in stages or (1, 2, 3)]
    version = torch.__version__ if engine == "torch" else _deepspeed_version()
    return {
        "engine": f"{engine} {version.split('+')[0]}",
        "numbers": n_parameters(models.load()[0]).total,
        "rows": rows,
    }


def _deepspeed_version() -> str:
    from importlib.metadata import version

    return version("deepspeed")


def _deepspeed(stage: int) -> dict[str, Any]:
    deepspeed: Any = importlib.import_module("deepspeed")  # the type checker may not have it
    # Its shared-memory collectives would be compiled for half a minute at first use. They are an
    # option for speed: where they do not build, gloo does the work, and so it does here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model, tokenizer = models.load()
    model.bfloat16().train()
    engine, optimizer, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=RATE),
        config={
            "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
            "gradient_accumulation_steps": 2,
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "bf16"},
            "zero_optimization": {"stage": stage},
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, which needs no compiler
        },
    )
    row: dict[str, Any] = {"stage": stage, "strategy": type(optimizer).__name__}
    for micro_step in range(2):
        rows = ticket_rows(ROWS * micro_step)
        batch = encode(tokenizer, share(rows, dist.get_rank(), dist.get_world_size()))
        engine.backward(engine(**batch).loss)
        if micro_step == 0:
            held = _deepspeed_gradients(engine, optimizer, stage)
            row["gradients"], row["gradients_reserved"] = held_bytes(held), reserved_bytes(held)
        engine.step()
    weights = list(engine.module.parameters())
    if stage == 3:
        weights = [p.ds_tensor for p in weights]
    masters = (
        optimizer.fp32_partitioned_groups_flat
        if stage == 3
        else optimizer.single_partition_of_fp32_groups
    )
    row["parameters"] = held_bytes(weights)
    row["optimizer"] = held_bytes([*masters, *states(optimizer.optimizer)])
    engine.destroy()
    return row


def _deepspeed_gradients(engine: Any, optimizer: Any, stage: int) -> list[Tensor]:
    """Where each stage keeps gradients between micro-steps: at the weights, or its own part."""
    if stage == 1:
        return gradients(engine.module)
    if stage == 2:
        return [t for group in optimizer.all_grad_tensors.values() for t in group or []]
    return [optimizer.grad_partitions_flat_buffer]


def _torch(stage: int) -> dict[str, Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, tokenizer = models.load()
    model.train()
    row: dict[str, Any] = {"stage": stage}
    if stage == 1:
        row["strategy"] = "DDP and ZeroRedundancyOptimizer"
        parallel: nn.Module = nn.parallel.DistributedDataParallel(model)
        optimizer: Any = ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=torch.optim.AdamW, lr=RATE
        )
    else:
        row["strategy"] = f"FSDP2, reshard_after_forward={stage == 3}"
        parallel = shard(model, reshard_after_forward=stage == 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    loss = step_loss(parallel, tokenizer, ticket_rows(0))
    # Between forward and backward: whole weights, or this rank's pieces of them.
    row["parameters"] = held_bytes(list(model.parameters()))
    loss.backward()
    row["gradients"] = held_bytes(gradients(model))
    row["gradients_reserved"] = reserved_bytes(gradients(model))
    optimizer.step()
    inner = optimizer.optim if stage == 1 else optimizer
    row["optimizer"] = sum(local(t).nbytes for t in states(inner))
    return row
