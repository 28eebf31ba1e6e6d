"""Probe of data parallelism: whose gradients DDP really averages."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit import data, models
from labkit.scale.batches import (
    ROWS,
    encode,
    share,
    step_loss,
    supervised_tokens,
    ticket_rows,
    total_over_ranks,
)


def ddp(folder: Path) -> dict[str, Any]:
    """Gradients of DDP beside those of one process, for two ways to average the loss.

    Returns:
        `batches`: for three kinds of batch, the tokens of this rank and of all, and how far the
        gradients stand from those of one process that saw all rows, after a mean of each rank's
        mean (`mean_of_means`) and after one mean over all tokens (`num_items_in_batch`).
        `gradient_bytes`, and the `buckets` that DDP sends them in.
    """
    model, tokenizer = models.load()
    alone, _ = models.load()
    parallel = nn.parallel.DistributedDataParallel(model)
    rank, world = dist.get_rank(), dist.get_world_size()
    by_length = sorted(ticket_rows(0), key=lambda row: len(encode(tokenizer, [row])["labels"][0]))
    general = data.load_task("general", "train").select(range(ROWS // 2)).to_list()
    kinds = {
        "tickets, answers only": (ticket_rows(0), True),
        "tickets, every token": (by_length, False),
        "tickets on rank 0, general on rank 1": (ticket_rows(0, ROWS // 2) + general, True),
    }
    found = []
    for kind, (rows, answers_only) in kinds.items():
        alone.zero_grad()
        alone(**encode(tokenizer, rows, answers_only)).loss.backward()
        goal = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}

        mine = encode(tokenizer, share(rows, rank, world), answers_only)
        model.zero_grad()
        parallel(**mine).loss.backward()  # each rank's own mean; DDP then averages over ranks
        wrong = distance(model, goal)
        model.zero_grad()
        step_loss(parallel, tokenizer, rows, answers_only).backward()
        found.append(
            {
                "batch": kind,
                "tokens": supervised_tokens(mine),
                "tokens_of_all": total_over_ranks(supervised_tokens(mine)),
                "mean_of_means": wrong,
                "num_items_in_batch": distance(model, goal),
            }
        )
    if rank == 0:  # of the last batch, for whoever wants to compare them in a process of its own
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        torch.save(gradients, folder / "ddp_gradients.pt")
    log = parallel._get_ddp_logging_data()
    return {
        "batches": found,
        "gradient_bytes": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "bucket_bytes": [int(size) for size in log["rebuilt_bucket_sizes"].split(", ")],
    }


def distance(model: nn.Module, goal: dict[str, Tensor]) -> dict[str, float]:
    """How far gradients are from others: the largest difference, and the norms' ratio."""
    differences, sizes, largest = 0.0, 0.0, 0.0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        difference = parameter.grad - goal[name]
        largest = max(largest, float(difference.abs().max()))
        differences += float(difference.double().pow(2).sum())
        sizes += float(goal[name].double().pow(2).sum())
    return {"largest": largest, "relative": (differences / sizes) ** 0.5}
