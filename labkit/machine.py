"""What this process uses and what this machine can do."""

import os
import platform
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil
import torch

PACKAGES = (
    "torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes",
    "tokenizers", "safetensors", "numpy",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on, without build suffixes (+cpu)."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package).split("+")[0]
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def peak_memory() -> dict[str, int]:
    """Most memory this process has held so far, in bytes.

    Returns:
        `process_bytes`: resident memory of the process; `allocated_bytes`: tensors on the GPU as
        torch's allocator counts them, 0 without one.
    """
    gpu = torch.cuda.is_available()
    return {
        "process_bytes": _peak_resident_bytes(),
        "allocated_bytes": torch.cuda.max_memory_allocated() if gpu else 0,
    }


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # Linux; getrusage there also counts the process that started this one
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def usable_cores() -> int:
    """Cores this process may run on, which containers and schedulers set below the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def bf16_speedup() -> float:
    """How many times faster this CPU multiplies in bfloat16 than in float32, measured once.

    Below 1 on a CPU without bf16 instructions, which converts every number there and back. The
    products are those of one feed-forward layer, 512 tokens by 256, and the types take turns: on a
    busy machine each needs only one short product that nothing interrupts.
    """
    layers = [
        (torch.ones(512, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for tokens, weight in layers:
        _ = tokens @ weight  # the first product of a type also sets the library up
    timings = [[_product_seconds(*layer) for layer in layers] for _ in range(25)]
    fp32, bf16 = (min(column) for column in zip(*timings, strict=True))
    return fp32 / bf16


def _product_seconds(tokens: torch.Tensor, weight: torch.Tensor) -> float:
    start = time.perf_counter()
    _ = tokens @ weight
    return time.perf_counter() - start
