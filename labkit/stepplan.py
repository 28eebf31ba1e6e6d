"""How many optimizer steps a run takes and which checkpoints it leaves, before it is started."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepPlan:
    """Steps and checkpoints of one run, as transformers' Trainer will make them."""

    rows_per_step: int
    """Rows behind one optimizer step; the last step of an epoch may see fewer."""
    steps_per_epoch: int
    total_steps: int
    checkpoints_saved: list[int]
    """Steps after which a checkpoint is written, the last step always among them."""
    save_total_limit: int | None
    disk_bytes: int
    """Most bytes of checkpoints on disk at once: a new one is written before an old one goes."""

    def checkpoints_kept(self, best: int | None = None) -> list[int]:
        """Steps whose checkpoints are on disk after training.

        Args:
            best: step of the best checkpoint (`load_best_model_at_end=True`), which is never
                deleted; None for a run that keeps no best one.

        Raises:
            ValueError: no checkpoint was saved at step `best`.
        """
        if best is not None and best not in self.checkpoints_saved:
            raise ValueError(
                f"best={best} was never saved: choose one of {self.checkpoints_saved}, or evaluate "
                "at the steps that save"
            )
        kept, _ = _on_disk(self.checkpoints_saved, self.save_total_limit, best)
        return kept


def plan_steps(
    rows: int,
    *,
    batch_size: int,
    accumulation: int = 1,
    devices: int = 1,
    epochs: float = 1,
    save_steps: float | None = None,
    save_total_limit: int | None = None,
    load_best_model_at_end: bool = False,
    checkpoint_bytes: int = 0,
) -> StepPlan:
    """Optimizer steps and checkpoints of a run of transformers' Trainer.

    One epoch takes ceil(ceil(rows / (batch_size x devices)) / accumulation) steps: the last,
    smaller batch and the last, shorter accumulation are both used. The whole run takes
    ceil(epochs x that).

    Args:
        rows: training rows after truncation, packing and the dropping of rows without an answer.
        batch_size: rows per device and forward pass (`per_device_train_batch_size`).
        accumulation: forward passes per optimizer step (`gradient_accumulation_steps`).
        devices: processes or GPUs that share each step's rows.
        epochs: passes over the rows; 0.5 is half a pass.
        save_steps: a checkpoint every so many steps, below 1 a share of all steps; None saves none.
        save_total_limit: newest checkpoints to keep; None or 0 keeps all.
        load_best_model_at_end: keeps the best checkpoint too, which needs more disk at limit 1.
        checkpoint_bytes: size of one checkpoint; with AdamW about three times the trained weights.

    Raises:
        ValueError: an argument that is not positive.
    """
    for name, value in (
        ("rows", rows),
        ("batch_size", batch_size),
        ("accumulation", accumulation),
        ("devices", devices),
        ("epochs", epochs),
        ("save_steps", math.inf if save_steps is None else save_steps),
    ):
        if value <= 0:
            raise ValueError(f"{name}={value} must be above 0")
    batches = math.ceil(rows / (batch_size * devices))
    steps_per_epoch = math.ceil(batches / accumulation)
    total_steps = math.ceil(epochs * steps_per_epoch)
    saved = _saved(total_steps, save_steps)
    # The first checkpoint as the best one is the case with the most folders.
    best = saved[0] if saved and load_best_model_at_end else None
    _, most_folders = _on_disk(saved, save_total_limit, best)
    return StepPlan(
        rows_per_step=batch_size * accumulation * devices,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        checkpoints_saved=saved,
        save_total_limit=save_total_limit,
        disk_bytes=most_folders * checkpoint_bytes,
    )


def _saved(total_steps: int, save_steps: float | None) -> list[int]:
    if save_steps is None:
        return []
    every = math.ceil(total_steps * save_steps) if save_steps < 1 else int(save_steps)
    return sorted({*range(every, total_steps + 1, every), total_steps})


def _on_disk(saved: list[int], limit: int | None, best: int | None) -> tuple[list[int], int]:
    """Checkpoints left after a run, and the most at any moment, by the rules of Trainer.

    After each save the oldest go until `limit` are left, but never the newest or the best. At
    limit 1 those two stay until the run ends, then only the best.
    """
    folders: list[int] = []
    most = 0
    for step in saved:
        folders.append(step)
        most = max(most, len(folders))
        deletable = [folder for folder in folders if folder not in (step, best)]
        excess = len(folders) - limit if limit else 0
        doomed = deletable[: max(excess, 0)]
        folders = [folder for folder in folders if folder not in doomed]
    if limit == 1 and best is not None:
        folders = [best]
    return folders, most
