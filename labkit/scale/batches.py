"""The batches that every probe trains on, and a step's loss as several ranks share it.

Data are rows of the course's own task, weights the bundled model's in fp32, so that differences of
precision hide nothing.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labkit import data

ROWS = 8
"""Of one step, all ranks together."""


def encode(tokenizer, rows: list[dict], answers_only: bool = True) -> dict[str, Tensor]:
    """Rows as one padded batch; `labels` are -100 wherever the loss does not look.

    Args:
        answers_only: the loss sees the assistant's tokens; else every real token.
    """
    batch = tokenizer.apply_chat_template(
        [row["messages"] for row in rows],
        return_tensors="pt",
        return_dict=True,
        padding=True,
        return_assistant_tokens_mask=True,
    )
    counts = batch["assistant_masks" if answers_only else "attention_mask"]
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "labels": batch["input_ids"].masked_fill(counts == 0, -100),
    }


def supervised_tokens(batch: dict[str, Tensor]) -> int:
    """Tokens that the loss counts: the first of a row has nothing that predicts it."""
    return int((batch["labels"][:, 1:] != -100).sum())


def share(rows: list[dict], rank: int, world: int) -> list[dict]:
    """The rows of one rank: neighbours stay together, as a sharded data loader hands them out."""
    size = len(rows) // world
    return rows[rank * size : (rank + 1) * size]


def ticket_rows(start: int, n: int = ROWS) -> list[dict]:
    """Training rows of the ticket task."""
    return data.load_task("d1_tickets", "train").select(range(start, start + n)).to_list()


def total_over_ranks(number: int) -> int:
    """The sum of what each rank holds."""
    summed = torch.tensor(number)
    dist.all_reduce(summed)
    return int(summed)


def step_loss(model: nn.Module, tokenizer, rows: list[dict], answers_only: bool = True) -> Tensor:
    """This rank's part of a step's loss: the ranks' parts, averaged, are the mean over all tokens.

    Engines average gradients over ranks, so each rank divides by the tokens of all ranks
    (`num_items_in_batch`) and takes the result times the ranks, as transformers' Trainer does.
    """
    world = dist.get_world_size()
    batch = encode(tokenizer, share(rows, dist.get_rank(), world), answers_only)
    everything = total_over_ranks(supervised_tokens(batch))
    return model(**batch, num_items_in_batch=torch.tensor(everything)).loss * world


def mean_over_ranks(value: Tensor) -> float:
    """The mean of a number that each rank holds."""
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()
