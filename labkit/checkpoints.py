"""Checkpoints on disk: the newest one that is whole, and room for the next."""

import json
import re
import shutil
import warnings
import zipfile
from pathlib import Path

from labkit.errors import LabkitError
from labkit.weights import safetensors_problem


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Newest complete `checkpoint-N` in a run's folder, to resume from; None where there is none.

    A save that was interrupted leaves a folder that Trainer would resume from with an error, or
    without its optimizer and in silence; such a folder is skipped with a warning that says why.
    """
    folder = Path(folder)
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else [])
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    for step, path in sorted(found, reverse=True):
        problem = checkpoint_problem(path, step)
        if problem is None:
            return path
        warnings.warn(f"{path.name} is skipped, no run can go on from it: {problem}", stacklevel=2)
    return None


def checkpoint_problem(path: Path, step: int) -> str | None:
    """What keeps a run from resuming exactly from a checkpoint folder, or None."""
    state = path / "trainer_state.json"  # Trainer writes it last
    if not state.is_file():
        return "trainer_state.json is missing"
    try:
        saved_step = json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except (ValueError, KeyError):
        return "trainer_state.json is not readable"
    if saved_step != step:
        return f"trainer_state.json is of step {saved_step}"

    # Names of sharded and distributed saves included.
    for part, patterns in {
        "weights": ("*.safetensors", "pytorch_model*", "adapter_model*", "global_step*"),
        "optimizer state": ("optimizer*", "global_step*"),
        "scheduler state": ("scheduler.pt", "global_step*"),
        "random state": ("rng_state*.pth",),
    }.items():
        if not any(file for pattern in patterns for file in path.glob(pattern)):
            return f"its {part} is missing ({patterns[0]})"
    for file in path.glob("*.safetensors"):
        if problem := safetensors_problem(file):
            return f"{file.name} {problem}"
    for file in [*path.glob("*.pt"), *path.glob("*.pth")]:
        if not zipfile.is_zipfile(file):  # torch.save writes a zip; its directory comes last
            return f"{file.name} is cut short"
    return None


def free_disk_or_raise(folder: str | Path, needed_bytes: int) -> None:
    """Raise LabkitError unless the disk that holds `folder` has `needed_bytes` free."""
    existing = Path(folder).resolve()
    while not existing.exists():
        existing = existing.parent
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise LabkitError(
            f"{folder} has {free_bytes / 1e6:,.0f} MB free and needs {needed_bytes / 1e6:,.0f} MB: "
            "free some disk, raise save_steps or lower save_total_limit"
        )
