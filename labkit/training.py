"""What surrounds a training run: seeds, versions, step plans, the live curve, its log, resuming.

The trainer itself, and its configuration, stand in full in the notebooks.
"""

import os
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

import pandas as pd
from datasets import Dataset
from transformers import Trainer, set_seed

from labkit.checkpoints import free_disk_or_raise, latest_checkpoint
from labkit.curves import LiveCurve
from labkit.machine import peak_memory, versions
from labkit.quiet import drop_trainer_notices
from labkit.stepplan import StepPlan, plan_steps

__all__ = [
    "LiveCurve",
    "StepPlan",
    "SupervisedRows",
    "free_disk_or_raise",
    "history",
    "latest_checkpoint",
    "peak_memory",
    "plan_steps",
    "seed_everything",
    "seed_from_env",
    "supervised_rows",
    "versions",
]

drop_trainer_notices()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device), so that a run on one machine repeats exactly."""
    set_seed(seed)


def seed_from_env(default: int = 0) -> int:
    """Seed of this run: `LABKIT_SEED` if set, as `labkit sweep` does, else `default`."""
    text = os.environ.get("LABKIT_SEED") or str(default)
    if not text.isdecimal():
        raise ValueError(f"LABKIT_SEED={text!r} is no seed: set it to a whole number from 0")
    return int(text)


def history(trainer: Trainer) -> pd.DataFrame:
    """A run's log as a table, one row per step that logged or evaluated.

    Returns:
        columns `step`, `epoch`, `loss`, `eval_loss`, `learning_rate`, `grad_norm` and whatever
        else was logged; NaN where a step did not report a column. Losses are nats per token.
    """
    steps: dict[int, dict[str, float]] = {}
    for entry in trainer.state.log_history:
        if "train_runtime" not in entry:  # the summary of the whole run
            steps.setdefault(int(entry["step"]), {}).update(entry)
    first = ["step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm"]
    table = pd.DataFrame([steps[step] for step in sorted(steps)])
    others = [column for column in table.columns if column not in first]
    return table.reindex(columns=first + others)


@dataclass(frozen=True)
class SupervisedRows:
    """What a loss really learns from in a tokenized dataset."""

    rows: int
    fully_masked: int
    """Rows in which no token counts towards the loss."""
    supervised_tokens: int
    """Tokens that are predicted and counted: the first token of a row has nothing to predict it."""
    dropped: int
    """Rows that went in and are not in the dataset; TRL drops rows whose answer was cut off."""


def supervised_rows(
    trainer_or_dataset: Trainer | Dataset, given: Sized | int | None = None
) -> SupervisedRows:
    """Count the rows and tokens that a loss learns from, and the rows that went missing.

    Args:
        trainer_or_dataset: a TRL trainer (its prepared training set) or a tokenized dataset with
            `labels`, or with `assistant_masks` or `completion_mask` as TRL makes on the way there.
        given: the rows handed to the trainer, or their number; None reports nothing dropped.

    Raises:
        ValueError: the dataset is not tokenized.
    """
    dataset: Any = getattr(trainer_or_dataset, "train_dataset", trainer_or_dataset)
    columns = [c for c in ("assistant_masks", "completion_mask") if c in dataset.column_names]
    if "labels" in dataset.column_names:
        flags = ([label != -100 for label in row] for row in dataset["labels"])
    elif columns:
        masks = zip(*(dataset[column] for column in columns), strict=True)
        flags = ([all(bits) for bits in zip(*row, strict=True)] for row in masks)
    else:
        raise ValueError(
            f"this dataset has columns {dataset.column_names}, no labels: pass the trainer, whose "
            "train_dataset is tokenized"
        )
    counts = [sum(row[1:]) for row in flags]
    given = len(counts) if given is None else given if isinstance(given, int) else len(given)
    return SupervisedRows(
        rows=len(counts),
        fully_masked=counts.count(0),
        supervised_tokens=sum(counts),
        dropped=given - len(counts),
    )
