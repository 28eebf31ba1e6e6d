"""What the ranks run: the job that `labkit.scale.run` starts under torchrun.

The job's folder names the probes; each trains a little with a real engine and says what it
measured, and each rank leaves that there as one JSON file.
"""

import gc
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from labkit.scale.local import result_file

PROBES = {
    "ddp": "parallel",
    "fsdp2": "sharded",
    "checkpoint": "sharded",
    "zero": "zero",
    "traffic": "traffic",
    "broken": "probes",
    "endless": "probes",
}
"""Probe → the module of labkit.scale that holds the function of that name."""


def find(name: str) -> Callable[..., dict[str, Any]]:
    """The function of a probe; a name may have a suffix after a colon.

    Raises:
        ValueError: no such probe.
    """
    plain = name.split(":")[0]
    if plain not in PROBES:
        raise ValueError(f"probe {name!r} is unknown: use {', '.join(PROBES)}")
    return getattr(importlib.import_module(f"labkit.scale.{PROBES[plain]}"), plain)


def broken(folder: Path, rank: int = 1, status: int = 0) -> dict[str, Any]:
    """A rank that fails while the others wait for it: what a mistake looks like.

    Args:
        status: above 0 the process ends with it and raises nothing.
    """
    if dist.get_rank() == rank:
        if status:
            print("this rank gives up", file=sys.stderr, flush=True)
            os._exit(status)
        raise ValueError(f"rank {rank} fails on purpose")
    dist.barrier()
    return {}


def endless(folder: Path) -> dict[str, Any]:
    """Ranks that never finish, for time limits and interrupts."""
    (folder / f"waiting{dist.get_rank()}").touch()
    while True:
        dist.barrier()


@record
def main(folder: Path) -> None:
    """Run the probes that the folder's `job.json` names, one after another, on this rank."""
    # torch renamed two collectives; FSDP and DeepSpeed still call them by the older names.
    warnings.filterwarnings("ignore", message=r".*_tensor` is deprecated", category=FutureWarning)
    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    probes = {name: find(name) for name in job}
    dist.init_process_group("gloo")
    for name, options in job.items():
        result = probes[name](folder=folder, **options)
        file = folder / result_file(name, dist.get_rank())
        file.write_text(json.dumps(result), encoding="utf-8")
        gc.collect()  # wrapped models hold themselves in circles
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
