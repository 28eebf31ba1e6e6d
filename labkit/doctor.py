"""Is this machine ready for the course? Every finding says what was found and what to do."""

import hashlib
import json
import os
import platform
import re
import shutil
import socket
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from labkit import paths

GIB = 2**30
LAB_PORT = 8888
# GPU memory in bytes that a profile's own note in labkit.models asks for.
PROFILE_GPU_BYTES = {"cpu": 0, "gpu-small": 12 * GIB, "gpu": 16 * GIB}


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    status: str
    """`ok`, `note` (the course works, something differs) or `problem` (something will fail)."""
    detail: str
    next_step: str = ""
    """What to do; empty when everything is fine."""


def examine() -> list[Finding]:
    """Every check, in the order in which a reader wants them; takes a few seconds."""
    return [_run(name, check) for name, check in CHECKS.items()]


def _run(name: str, check: Callable[[], tuple[str, ...]]) -> Finding:
    """One check's finding; a check that breaks is a finding too, not the end of the others."""
    try:
        return Finding(name, *check())
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Finding(name, "problem", f"could not be checked ({reason})", "run python3 lab.py")


# ---- the machine -------------------------------------------------------------------------------


def check_python() -> tuple[str, ...]:
    return "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def check_cores() -> tuple[str, ...]:
    from labkit.machine import usable_cores

    cores = usable_cores()
    if cores == 1:
        return "note", "1 core", "notebooks take about twice their stated minutes"
    return "ok", f"{cores} cores"


def check_memory() -> tuple[str, ...]:
    import psutil

    total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    limit = container_limit_bytes()
    if limit is not None and limit < total:
        total, free = limit, min(free, limit)
    detail = f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    if free < 2 * GIB:
        return "problem", detail, "a notebook needs up to 1.5 GiB: close other programs"
    return "ok", detail


def container_limit_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that a container may use, where one is set (Linux control groups, both versions)."""
    for file in (folder / "memory.max", folder / "memory" / "memory.limit_in_bytes"):
        if file.is_file() and (text := file.read_text(encoding="utf-8").strip()).isdecimal():
            return int(text)
    return None


def check_disk() -> tuple[str, ...]:
    free = shutil.disk_usage(paths.root()).free
    detail = f"{free / 1e9:.1f} GB free"
    if free < 1e9:
        return "problem", detail, "free 1 GB: a notebook keeps several checkpoints of 60 MB"
    return "ok", detail


def check_gpu() -> tuple[str, ...]:
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return "ok", f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB"
    if torch.backends.mps.is_available():
        return "ok", "Apple GPU; the course runs on the CPU unless LABKIT_PROFILE says otherwise"
    if shutil.which("nvidia-smi"):
        step = "install a CUDA build of torch to use it; the course needs no GPU"
        return "note", "an NVIDIA driver is here, but torch sees no GPU", step
    return "ok", "none, and none is needed"


def check_bf16() -> tuple[str, ...]:
    """Whether what trains here, the CPU or a profile's GPU, is made for bf16."""
    import torch

    from labkit.machine import bf16_speedup

    if (os.environ.get("LABKIT_PROFILE") or "cpu") != "cpu" and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "ok", "this GPU computes in bf16"
        return "ok", "this GPU has no bf16, so notebooks train in fp32, slower"
    speedup = bf16_speedup()
    faster = "faster" if speedup > 1 else "slower"
    return "ok", f"bf16 on this CPU is {max(speedup, 1 / speedup):.1f} times {faster} than fp32"


def check_profile() -> tuple[str, ...]:
    import torch

    gpu_bytes = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    fits = [name for name, needed in PROFILE_GPU_BYTES.items() if needed <= gpu_bytes]
    chosen = os.environ.get("LABKIT_PROFILE") or "cpu"
    detail = f"{chosen}; the largest that fits is {fits[-1]}"
    if chosen not in PROFILE_GPU_BYTES:
        step = f"set LABKIT_PROFILE to one of {', '.join(PROFILE_GPU_BYTES)}, or unset it"
        return "problem", f"LABKIT_PROFILE={chosen!r} is unknown", step
    if chosen not in fits:
        return "problem", detail, f"set LABKIT_PROFILE={fits[-1]}"
    return "ok", detail


# ---- the course --------------------------------------------------------------------------------


def check_versions() -> tuple[str, ...]:
    """Installed packages against the pins; only the course's own dependencies must be there."""
    needed, pins = _direct_dependencies(), read_pins(paths.root() / "constraints.txt")
    missing = [name for name in needed if _installed(name) is None]
    if missing:
        step = "run python3 lab.py, which installs them"
        return "problem", f"not installed: {', '.join(missing)}", step
    other = {
        name: found
        for name, pin in pins.items()
        if (found := _installed(name)) is not None and found != pin
    }
    if not other:
        return "ok", f"all {len(needed)} packages of the course as tested"
    shown = ", ".join(f"{name} {found} (tested: {pins[name]})" for name, found in other.items())
    return "note", shown, "if something fails, run python3 lab.py, which installs the tested set"


def read_pins(file: Path) -> dict[str, str]:
    """Package name -> exact version, of the lines that apply to this system."""
    from packaging.requirements import Requirement

    lines = file.read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        requirement.name: next(iter(requirement.specifier)).version
        for requirement in wanted
        if requirement.marker is None or requirement.marker.evaluate()
    }


def _direct_dependencies() -> list[str]:
    """What pyproject.toml says the course imports, tests aside."""
    text = (paths.root() / "pyproject.toml").read_text(encoding="utf-8")
    found = [re.match(r"[\w.-]+", line) for line in tomllib.loads(text)["project"]["dependencies"]]
    return [match.group(0) for match in found if match]


def _installed(package: str) -> str | None:
    """Version without build suffix (2.13.0+cpu -> 2.13.0), or None."""
    try:
        return metadata.version(package).split("+")[0]
    except metadata.PackageNotFoundError:
        return None


def check_base_model() -> tuple[str, ...]:
    """The bundled model is whole: all of its files have the hashes that were shipped."""
    folder = paths.base_model_dir()
    repair = "restore it with `git checkout -- data/base_model`, or make it with `labkit pretrain`"
    sums = folder / "SHA256SUMS"
    if not folder.is_dir():
        return "problem", f"{folder} is missing", repair
    if not sums.is_file():
        return "problem", f"{sums} is missing, so nothing can be checked", repair
    listed = [line.split(maxsplit=1) for line in sums.read_text(encoding="utf-8").splitlines()]
    damaged = [name for wanted, name in listed if _sha256(folder / name) != wanted]
    if damaged:
        return "problem", f"missing or damaged: {', '.join(damaged)}", repair
    total = sum((folder / name).stat().st_size for _, name in listed)
    return "ok", f"{len(listed)} files, {total / 1e6:.0f} MB, undamaged"


def check_tasks() -> tuple[str, ...]:
    """The rows of every task are those that were shipped."""
    folder = paths.tasks_dir()
    repair = "restore them with `git checkout -- data/tasks`"
    if not (folder / "manifest.json").is_file():
        return "problem", f"{folder / 'manifest.json'} is missing", repair
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    damaged = [
        name for name, entry in manifest.items() if _sha256(folder / name) != entry["sha256"]
    ]
    if damaged:
        return "problem", f"missing or changed: {', '.join(damaged)}", repair
    rows = sum(entry["rows"] for entry in manifest.values())
    return "ok", f"{len(manifest)} files, {rows:,} rows, unchanged"


def _sha256(file: Path) -> str | None:
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_network() -> tuple[str, ...]:
    """Whether a notebook would have to fetch something; looks at files, not at the network."""
    model = os.environ.get("LABKIT_MODEL") or ""
    if not model and (os.environ.get("LABKIT_PROFILE") or "cpu") == "cpu":
        return "ok", "not needed: model, data and metrics are all here"
    if not model:
        detail = "the profile's model comes from Hugging Face on first use"
        return "note", detail, "run once while online, or set LABKIT_MODEL to a folder"
    if model == "bundled" or Path(model).expanduser().is_dir():
        return "ok", f"not needed: LABKIT_MODEL={model} is here"
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return "ok", f"not needed: LABKIT_MODEL={model} was downloaded earlier"
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    detail = f"LABKIT_MODEL={model} is no folder and was never downloaded"
    return ("problem" if offline else "note"), detail, f"while online: hf download {model}"


def check_writing() -> tuple[str, ...]:
    """Whether the course's folder can take a workbook and a notebook's checkpoints."""
    for folder in (paths.root(), paths.workbook_dir()):
        if not folder.is_dir():
            continue
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            step = "copy the course to a folder of your own and start it there"
            return "problem", f"{folder} cannot be written ({error.strerror})", step
    return "ok", "the course's folder can be written"


def check_port() -> tuple[str, ...]:
    """Whether JupyterLab's usual port is free; inside JupyterLab it is rightly taken."""
    if _can_listen(LAB_PORT):
        return "ok", f"{LAB_PORT} is free"
    if "JPY_PARENT_PID" in os.environ:  # set for kernels
        return "ok", f"{LAB_PORT} is in use, as it should be while JupyterLab runs"
    step = "lab.py takes the next free port by itself; choose one with --port"
    return "note", f"{LAB_PORT} is in use, perhaps by another JupyterLab", step


def _can_listen(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if os.name != "nt":  # a port that was just closed counts as free, as for JupyterLab
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


CHECKS: dict[str, Callable[[], tuple[str, ...]]] = {
    "Python": check_python,
    "cores": check_cores,
    "memory": check_memory,
    "disk": check_disk,
    "GPU": check_gpu,
    "bf16": check_bf16,
    "profile": check_profile,
    "versions": check_versions,
    "base model": check_base_model,
    "tasks": check_tasks,
    "network": check_network,
    "writing": check_writing,
    "port": check_port,
}
