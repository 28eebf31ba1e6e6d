"""The bundled model from nothing to its folder: precision, training with progress, shipping."""

import contextlib
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from labkit.card import Say, refuse_existing, ship
from labkit.checkpoints import free_disk_or_raise
from labkit.errors import LabkitError
from labkit.pretrain import Recipe, Run
from labkit.weights import n_parameters


class Meter(Protocol):
    """Shows a line of progress, not too often."""

    def __call__(self, line: str) -> None: ...

    def end(self) -> None: ...


def make_model(
    out: Path,
    checkpoints: Path,
    *,
    changes: dict[str, Any],
    precision: str,
    threads: int | None,
    save_every: int,
    force: bool,
    say: Say,
    meter: Meter,
) -> None:
    """Train a model, or go on with the run in `checkpoints`, and ship it to `out`.

    Args:
        out: folder of the finished model.
        checkpoints: folder of the run; what is in it decides where training goes on.
        changes: fields of Recipe that differ from the recipe's defaults.
        precision: bf16, fp32, or auto (a resumed run keeps its own, a new one measures).
        threads: of torch; None leaves torch's own choice. A resumed run repeats bit for bit only
            with the same number.
        save_every: steps between checkpoints.
        force: replace `out`.
        say: called with a line at each stage.
        meter: called with the line of progress.

    Raises:
        LabkitError: `out` exists, `checkpoints` holds a run with another recipe or a damaged
            checkpoint, or the disk is full.
    """
    refuse_existing(out, force)
    if threads:
        torch.set_num_threads(threads)
    free_disk_or_raise(checkpoints, 150_000_000)  # two checkpoints, while one replaces the other
    recipe = Recipe(**changes)
    recipe = replace(recipe, precision=_precision(precision, recipe, checkpoints, say))
    run = Run(recipe, checkpoints)
    parameters = n_parameters(run.model).total
    begin = f"going on at step {run.step:,}" if run.step else "starting"
    say(
        f"{begin} of {recipe.steps:,} in {checkpoints}: {parameters / 1e6:.2f} M parameters, "
        f"{recipe.precision}, threads: {torch.get_num_threads()}"
    )
    _train(run, save_every, meter)
    report = ship(run, out, seconds=seconds_spent(checkpoints), force=force, say=say)
    say(f"{out}: macro exact match {report.macro:.3f}; see its README.md, or labkit evaluate {out}")


def _precision(asked: str, recipe: Recipe, checkpoints: Path, say: Say) -> str:
    """The precision to train in."""
    if asked != "auto":
        return asked
    kept = checkpoints / "recipe.json"
    if kept.is_file():
        try:
            return json.loads(kept.read_text(encoding="utf-8"))["precision"]
        except (ValueError, KeyError, TypeError) as error:
            raise LabkitError(f"{kept} is damaged ({error}): delete {checkpoints}") from error
    say("measuring whether bf16 or fp32 is faster here")
    seconds = step_seconds(recipe)
    say(", ".join(f"{name} {value:.2f} s a step" for name, value in seconds.items()))
    return min(seconds, key=lambda name: seconds[name])


def step_seconds(recipe: Recipe, steps: int = 3) -> dict[str, float]:
    """Seconds of a training step in each precision: the best of some, taken in turns."""
    best = {"bf16": float("inf"), "fp32": float("inf")}
    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe, Path(folder))
        run.model.train()
        for _ in range(steps + 1):  # the first of each sets the kernels up
            for name in best:
                run.recipe = replace(recipe, precision=name)
                start = time.perf_counter()
                run.train_step()
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def _train(run: Run, save_every: int, meter: Meter) -> None:
    """Train to the end with a line of progress, keeping a log beside the checkpoints."""
    recipe, before = run.recipe, run.step

    def report(step: int, loss: float, seconds: float) -> None:
        nonlocal before
        entry = {"step": step, "steps": step - before, "loss": loss, "seconds_a_step": seconds}
        before = step
        with open(run.folder / LOG, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(entry) + "\n")
        meter(progress_line(recipe, step, loss, seconds))

    try:
        run.train(save_every, report)
    except RuntimeError as error:
        # torch.save reports a full disk as a RuntimeError of its zip writer.
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            raise LabkitError(
                f"{run.folder}: the checkpoint of step {run.step:,} could not be written, probably "
                "because the disk is full: free some space, then run the same command again"
            ) from error
        raise
    meter.end()


LOG = "log.jsonl"


def progress_line(recipe: Recipe, step: int, loss: float, seconds: float) -> str:
    """Step, loss, speed and time left."""
    tokens = recipe.rows * recipe.window / seconds
    left = seconds * (recipe.steps - step)
    time_left = f"{left / 3600:.1f} h" if left > 5400 else f"{left / 60:.0f} min"
    return (
        f"step {step:>6,}/{recipe.steps:,}  loss {loss:.3f}  {tokens:>6,.0f} tokens/s  "
        f"{time_left} left"
    )


def seconds_spent(checkpoints: Path) -> float | None:
    """Seconds of training of a run over all its starts, steps lost to kills included."""
    log = checkpoints / LOG
    if not log.is_file():
        return None
    seconds = 0.0
    for line in log.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a kill can cut a line short
            entry = json.loads(line)
            seconds += entry["steps"] * entry["seconds_a_step"]
    return seconds
