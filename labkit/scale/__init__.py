"""Training on more than one device, for real: here as processes on a CPU that talk over gloo.

`run` starts `torchrun` and returns what each rank measured, `train` runs the one training script
as a cluster would, and `configs` holds what `accelerate launch` needs for real machines. Engines
are torch, accelerate and DeepSpeed; nothing of them is made again.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.scale.configs import Plan, check_config, config_path, config_paths
    from labkit.scale.local import (
        TrainRun,
        has_deepspeed,
        run,
        run_many,
        train,
        train_command,
        zero_measured,
    )
    from labkit.scale.sizes import shard_numbers, zero_parts

_WHERE = {
    "Plan": "configs",
    "TrainRun": "local",
    "check_config": "configs",
    "config_path": "configs",
    "config_paths": "configs",
    "has_deepspeed": "local",
    "run": "local",
    "run_many": "local",
    "train": "local",
    "shard_numbers": "sizes",
    "train_command": "local",
    "zero_measured": "local",
    "zero_parts": "sizes",
}

__all__ = [
    "Plan",
    "TrainRun",
    "check_config",
    "config_path",
    "config_paths",
    "has_deepspeed",
    "run",
    "run_many",
    "train",
    "shard_numbers",
    "train_command",
    "zero_measured",
    "zero_parts",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for on first use (PEP 562); nothing here needs torch before it runs."""
    if name not in _WHERE:
        raise AttributeError(f"labkit.scale has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"labkit.scale.{_WHERE[name]}"), name)
