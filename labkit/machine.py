"""What this process uses and what this machine can do."""

import os
import platform
import sys
import time
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


def bf16_speedup() -> float:
    """How many times faster this CPU multiplies in bfloat16 than in float32, measured in 0.1 s.

    Below 1 on a CPU without bf16 instructions, which converts every number there and back.
    """
    return _matmul_seconds(torch.float32) / _matmul_seconds(torch.bfloat16)


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Best of five timings of the products of one feed-forward layer: 512 tokens, 256 wide."""
    tokens, weight = torch.ones(512, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
    _ = tokens @ weight  # the first product of a type also sets the library up
    timings = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(4):
            _ = tokens @ weight
        timings.append(time.perf_counter() - start)
    return min(timings)
