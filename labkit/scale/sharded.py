"""Probes of FSDP2: what a rank holds, what it gathers, and checkpoints that other ranks go on from.

Checkpoints are written with accelerate's own functions, so they look as on a cluster:
`pytorch_model_fsdp_0/` and `optimizer_0/`, which `accelerate merge-weights` makes one file of.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from labkit import models
from labkit.scale.batches import ROWS, encode, mean_over_ranks, step_loss, ticket_rows

RATE = 1e-3


def shard(model: nn.Module, reshard_after_forward: bool | None = None) -> nn.Module:
    """Cut a model's tensors over all ranks: each decoder layer is a unit, the rest is the root.

    Args:
        reshard_after_forward: give gathered weights back between forward and backward; None is
            torch's default, yes for layers and no for the root.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:  # pyright: ignore
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward is not False)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward)
    return model


def local(tensor: Tensor) -> Tensor:
    """The piece of a sharded tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the numbers that this rank holds of some tensors."""
    return sum(local(tensor).nbytes for tensor in tensors)


def reserved_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the memory behind them, padding included, each storage once."""
    storages = [local(tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The optimizer's tensors, without its counters of steps."""
    return [t for state in optimizer.state.values() for t in state.values() if t.ndim]


def whole_bytes(module: nn.Module, without: nn.Module | None = None) -> int:
    """Bytes of a module's weights that are whole at this moment."""
    skipped = {id(p) for p in without.parameters()} if without else set()
    return sum(
        p.nbytes for p in module.parameters() if not isinstance(p, DTensor) and id(p) not in skipped
    )


def fsdp2(folder: Path, steps: int = 3) -> dict[str, Any]:
    """Bytes that `fully_shard` leaves on this rank, what it gathers, and the loss of each step.

    Returns:
        `parameters`, `gradients`, `optimizer`: bytes of numbers held, each with `_reserved`, the
        memory behind them; `gathered_layer` and `gathered_root`, the most that stood whole inside
        a layer; `layers_at_once`; `losses`; `losses_alone` of one process (on rank 0); `tracked`,
        bytes by kind at the peak of the last step, by torch's own FSDPMemTracker.
    """
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    model, tokenizer = models.load()
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    model.train()
    shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    layers, root = list(model.model.layers), []
    whole: list[list[int]] = []

    def look(*_: Any) -> None:
        whole.append([whole_bytes(layer) for layer in layers])
        root.append(whole_bytes(model) - sum(whole[-1]))

    for layer in layers:
        layer.mlp.register_forward_hook(look)
        layer.mlp.register_full_backward_hook(look)
    losses, sizes, tracked = [], {}, {}
    for step in range(steps):
        last = step == steps - 1
        if last:  # the first step has no optimizer state yet; the last one is like any later one
            whole.clear()
            root.clear()
        tracker = FSDPMemTracker(model, optimizer) if last else None
        with tracker or torch.enable_grad():
            loss = step_loss(model, tokenizer, ticket_rows(8 * step))
            loss.backward()
            if last:
                sizes["gradients"] = held_bytes(gradients(model))
                sizes["gradients_reserved"] = reserved_bytes(gradients(model))
            optimizer.step()
            optimizer.zero_grad()
        losses.append(mean_over_ranks(loss))
        if tracker:
            peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
            tracked = {getattr(kind, "name", str(kind)): n for kind, n in peak.items()}
    parameters = list(model.parameters())
    return sizes | {
        "parameters": held_bytes(parameters),
        "parameters_reserved": reserved_bytes(parameters),
        "optimizer": held_bytes(states(optimizer)),
        "optimizer_reserved": reserved_bytes(states(optimizer)),
        "gathered_layer": max(max(row) for row in whole),
        "gathered_root": max(root),
        "layers_at_once": max(sum(n > 0 for n in row) for row in whole),
        "losses": losses,
        "losses_alone": alone_losses(steps) if dist.get_rank() == 0 else [],
        "tracked": tracked,
        "shapes": shapes,
    }


def alone_losses(steps: int) -> list[float]:
    """Losses of one process that sees all rows of each step."""
    model, tokenizer = models.load()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses = []
    for step in range(steps):
        loss = model(**encode(tokenizer, ticket_rows(8 * step))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def checkpoint(
    folder: Path,
    to_step: int,
    save_at: int | None = None,
    save: str = "",
    resume: str = "",
    model_path: str = "bundled",
    rate: float = RATE,
    first_row: int = 0,
) -> dict[str, Any]:
    """Train under FSDP2, from a model or from a sharded checkpoint, and save another one.

    Args:
        to_step: the last step, counted from the first run on.
        save_at: the step after which to save; None is the last.
        save: folder of the checkpoint to write; empty writes none.
        resume: folder of a checkpoint that any number of ranks wrote.
        model_path: `bundled` or a folder, whose weights a checkpoint replaces.
        first_row: of the ticket rows, from where every step takes the next ones.

    Returns:
        `losses` by step, `first_step`, `files` that this run wrote and their bytes, and `logits`:
        the first few after the first ticket when the checkpoint was saved, else at the end.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import (
        load_fsdp_model,
        load_fsdp_optimizer,
        save_fsdp_model,
        save_fsdp_optimizer,
    )

    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    model, tokenizer = models.load(model_path)
    model.train()
    shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    first = 0
    if resume:
        load_fsdp_model(plugin, accelerator, model, resume)
        load_fsdp_optimizer(plugin, accelerator, optimizer, model, resume)
        first = int(next(iter(optimizer.state.values()))["step"])
    losses, logits = {}, []
    for step in range(first, to_step):
        loss = step_loss(model, tokenizer, ticket_rows(first_row + ROWS * step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[str(step + 1)] = mean_over_ranks(loss)
        if save and step + 1 == (save_at or to_step):
            save_fsdp_model(plugin, accelerator, model, save)
            save_fsdp_optimizer(plugin, accelerator, optimizer, model, save)
            model.config.save_pretrained(save)
            tokenizer.save_pretrained(save)
            logits = first_logits(model, tokenizer)
    written = sorted(Path(save).rglob("*.distcp")) if save else []
    return {
        "losses": losses,
        "first_step": first,
        "files": {str(file.relative_to(save)): file.stat().st_size for file in written},
        "logits": logits or first_logits(model, tokenizer),
    }


def first_logits(model: nn.Module, tokenizer, n: int = 8) -> list[float]:
    """A few logits after the first ticket, to tell two models apart, or not."""
    batch = encode(tokenizer, ticket_rows(0, 1))
    with torch.no_grad():
        return model(input_ids=batch["input_ids"]).logits[0, -1, :n].tolist()
