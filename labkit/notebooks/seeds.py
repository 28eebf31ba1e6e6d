"""One seed of a notebook: run it here, or pack it up, send it to another machine and run it there.

A parcel holds the notebook itself, so a worker needs no copy of it. What the notebook builds on
(labkit, the base model, the data) a worker has of its own: it must be the same, or it refuses.
"""

import json
import os
import platform
import socket
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import labkit
from labkit import paths
from labkit.claims import read_record
from labkit.errors import LabkitError
from labkit.files import sha256
from labkit.notebooks.normalise import read
from labkit.notebooks.run import execute

CELL_TIMEOUT_SECONDS = 7200  # one cell of 06 trains 48 runs, which takes above half an hour
SETTINGS = ("LABKIT_MODEL", "LABKIT_PROFILE")
"""The user's choices; they reach a worker with the parcel, whatever the worker's own are."""


class WorkerRefused(LabkitError):
    """A worker whose labkit, base model or data are not the ones the sweep was started with."""


def run_seed(path: Path, seed: int, *, one_thread: bool) -> dict[str, Any]:
    """Execute the notebook for one seed; what it recorded and what it cost.

    Raises:
        RunError: a cell failed.
        LabkitError: the notebook is missing or damaged.
    """
    from labkit.models import pick_precision  # loads torch, which takes a second

    # A folder of its own: a kernel that outlives a killed sweep cannot write into a later one.
    with tempfile.TemporaryDirectory(prefix="labkit-sweep-") as folder:
        file = Path(folder) / "record.jsonl"
        file.touch()
        precision = pick_precision()  # now, so that what is recorded is what the kernel takes
        env = {"LABKIT_RECORD": str(file), "LABKIT_SWEEP": "1", "LABKIT_PRECISION": precision}
        env |= {"OMP_NUM_THREADS": "1"} if one_thread else {}
        done = execute(path, env, seed, CELL_TIMEOUT_SECONDS, write=False)
        cost = {"seed": seed, "seconds": round(done.seconds, 1), "peak_bytes": done.peak_bytes}
        cost |= {"precision": precision}
        return cost | asdict(read_record(file))


def input_hashes(path: Path) -> dict[str, str | None]:
    """Hashes of what a seed's result depends on; None for a file that is not there.

    Exercises and their solutions measure nothing, so they may be mended without a new sweep.
    """
    aside = {"exercise", "solution"}
    code = [
        cell.source
        for cell in read(path).cells
        if cell.cell_type == "code" and not aside & set(cell.metadata.get("tags", []))
    ]
    return {"notebook_sha256": sha256(json.dumps(code).encode("utf-8")), **_files_of_the_course()}


def _files_of_the_course() -> dict[str, str | None]:
    return {
        "base_model_sha256": _hash_of(paths.base_model_dir() / "model.safetensors"),
        "data_sha256": _hash_of(paths.tasks_dir() / "manifest.json"),
    }


def _hash_of(path: Path) -> str | None:
    return sha256(path.read_bytes()) if path.exists() else None


# ---- to another machine ------------------------------------------------------------------------


@dataclass(frozen=True)
class Parcel:
    """All that a worker gets; it can be pickled."""

    name: str
    """File name of the notebook."""
    source: bytes
    """Its content."""
    seed: int
    needs: dict[str, str | None]
    """What `surroundings` must say on the worker."""
    settings: dict[str, str]
    """Values of `SETTINGS` that are set where the sweep was started, and its precision."""


def pack(path: Path, seed: int) -> Parcel:
    """A seed made ready to travel."""
    from labkit.models import pick_precision  # loads torch, which takes a second

    settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    settings["LABKIT_PRECISION"] = pick_precision()  # of all workers, whatever each would pick
    return Parcel(path.name, path.read_bytes(), seed, surroundings(), settings)


def run_parcel(parcel: Parcel) -> dict[str, Any]:
    """Run a seed that came from another machine, in one thread, in a folder of its own.

    Returns:
        As `run_seed`; files that the notebook wrote are gone.

    Raises:
        WorkerRefused: something it builds on differs here.
        RunError: a cell failed.
    """
    found = surroundings()
    for what, needed in parcel.needs.items():
        if found[what] != needed:
            raise WorkerRefused(
                f"worker {worker_name()}: {what} is {_short(found[what])} there and "
                f"{_short(needed)} here: bring its copy of the course to the same commit"
            )
    for name in SETTINGS:
        os.environ.pop(name, None)
    os.environ.update(parcel.settings)  # kernels inherit it; a worker runs one parcel at a time
    with tempfile.TemporaryDirectory(prefix="labkit-parcel-") as folder:
        path = Path(folder) / parcel.name
        path.write_bytes(parcel.source)
        return run_seed(path, parcel.seed, one_thread=True)


def surroundings() -> dict[str, str | None]:
    """Labkit's version, and hashes of its code, the base model and the data on this machine."""
    code = Path(labkit.__file__).parent
    files = sorted(path for path in code.rglob("*.py"))
    listed = [[path.relative_to(code).as_posix(), sha256(path.read_bytes())] for path in files]
    return {
        "labkit's version": labkit.__version__,
        "the hash of labkit's code": sha256(json.dumps(listed).encode("utf-8")),
        **{f"the hash {name}": value for name, value in _files_of_the_course().items()},
    }


def worker_name() -> str:
    """Names this process among all machines."""
    return f"{socket.gethostname() or platform.node()} (process {os.getpid()})"


def _short(value: str | None) -> str:
    """A hash as people compare it."""
    if value is None:
        return "missing"
    return value[:12] if len(value) == 64 else value
