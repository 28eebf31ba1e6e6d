"""`labkit measure --suite`: all cases of a device, and `data/memory/<device>.json`.

The file is written after each case, so a run that was killed goes on where it was; a row is
measured again when the versions of the libraries, or the case, are others. A case that fails, or
does not fit, keeps a row with the reason.
"""

import json
import multiprocessing
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from labkit import machine, paths
from labkit.errors import LabkitError
from labkit.files import write_atomic
from labkit.memory.cases import Case, cases, config
from labkit.memory.gpus import reserve_bytes
from labkit.memory.measurement import Compared, device_options, measure
from labkit.memory.measurement import predict as predict_step
from labkit.memory.reference import memory_dir

Say = Callable[[str], None]
AnyCase = TypeVar("AnyCase")
Measure = Callable[[Case, str], dict[str, Any]]
SECONDS_PER_CASE = 180
"""A case that takes longer is given up."""


# ---- the file ----------------------------------------------------------------------------------


@dataclass
class Results:
    """What one device measured, as its file holds it."""

    device: str
    machine: dict[str, Any]
    versions: dict[str, str]
    date: str = ""
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of the case -> its row."""

    def to_text(self) -> str:
        """JSON with one row a line, so that a change of one row is a change of one line."""
        head = {name: value for name, value in vars(self).items() if name != "rows"}
        lines = ",\n".join(json.dumps(row) for row in self.rows.values())
        return f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'


def read_results(file: Path) -> Results:
    """A file that `run_suite` wrote.

    Raises:
        LabkitError: it is not there, or it is none.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        rows = {row["name"]: row for row in values.pop("rows")}
        return Results(**values, rows=rows)
    except FileNotFoundError as error:
        raise LabkitError(f"{file} is not there: make it with `labkit measure --suite`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabkitError(
            f"{file} holds no measurements ({error}): move it away, or name another --out"
        ) from error


def describe_machine(device: str) -> tuple[str, dict[str, Any]]:
    """(short name of the device for a file, what it is), without names of hosts or people.

    Raises:
        LabkitError: torch finds no CUDA device.
    """
    if device == "cpu":
        about = {"processor": _processor(), "memory_bytes": psutil.virtual_memory().total}
        return "cpu", about
    if not torch.cuda.is_available():
        raise LabkitError("torch finds no CUDA device here: run it on a machine that has one")
    gpu = torch.cuda.get_device_properties(0)
    about = {
        "gpu": gpu.name,
        "memory_bytes": gpu.total_memory,
        "capability": f"{gpu.major}.{gpu.minor}",
        "cuda": torch.version.cuda,
        "processor": _processor(),
    }
    return re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-"), about


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def default_file(device: str, quick: bool) -> Path:
    """`data/memory/<device>.json`; a quick run, which has few rows, writes beside no data."""
    name = describe_machine(device)[0]
    if quick:
        return paths.root() / ".labkit" / f"measure-{name}.json"
    return memory_dir() / f"{name}.json"


# ---- one case ----------------------------------------------------------------------------------


def predict(case: Case, device: str) -> dict[str, int]:
    """What the estimate says of a case, by the names of the comparison."""
    return predict_step(config(case.model), **case.options, device=device)[1]


def measure_case(case: Case, device: str) -> dict[str, Any]:
    """The row of a case; a failure is a row with its reason."""
    row = head(case, device)
    where = case.model if case.model == "bundled" else config(case.model)
    try:
        found = measure(where, **case.options, device=device)
    except Exception as error:  # whatever it was, the other cases go on
        return row | {"error": f"{type(error).__name__}: {first_line(error)}"}
    values = found.to_json()
    kept = ("phase", "predicted_phase", "phases", "reserved_bytes", "device_used_bytes",
            "process_bytes")  # fmt: skip
    return row | {
        "measured": {one.name: one.measured_bytes for one in found.compared},
        **{name: values[name] for name in kept if values[name] is not None},
        "seconds": round(found.seconds, 3),
    }


def head(case: Case, device: str) -> dict[str, Any]:
    """What a row says of its case."""
    return {
        "name": case.name,
        "group": case.group,
        "model": case.model,
        "config": config(case.model),
        "options": {**case.options, **device_options(device)},
    }


def first_line(error: BaseException) -> str:
    """What an exception says, without the rest of a long message."""
    return (str(error).strip().splitlines() or ["no message"])[0]


def with_prediction(row: dict[str, Any]) -> dict[str, Any]:
    """A row with today's prediction and its errors beside what was measured."""
    if "measured" not in row:
        return row
    found, expected = predict_step(row["config"], **row["options"])
    compared = [
        Compared(name, expected.get(name, 0), n_bytes) for name, n_bytes in row["measured"].items()
    ]
    return row | {
        "predicted": {one.name: one.predicted_bytes for one in compared},
        "errors": {one.name: round(one.error, 6) for one in compared if one.error is not None},
        "predicted_phase": found.phase,
    }


class Worker:
    """A process of its own that measures; one that crashes costs its case and no other."""

    def __init__(self, seconds: float = SECONDS_PER_CASE, work: Measure | None = None) -> None:
        self._seconds = seconds
        self._work = work or measure_case
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, case: Case, device: str) -> dict[str, Any]:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
            self._pool = ProcessPoolExecutor(1, mp_context=context)
        try:
            row = self._pool.submit(self._work, case, device).result(self._seconds)
        except TookTooLong:
            row = head(case, device) | {"error": f"took more than {self._seconds:g} s"}
        except BrokenProcessPool:
            row = head(case, device) | {"error": "the process that measured it ended"}
        if "error" in row:  # after an error of CUDA nothing else works in that process
            self.close()
        return row

    def close(self) -> None:
        """End the process, whatever it is doing."""
        pool, self._pool = self._pool, None
        if pool is not None:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(cancel_futures=True)


# ---- all of them -------------------------------------------------------------------------------


def run_suite(
    out: Path | None = None,
    device: str | None = None,
    quick: bool = False,
    say: Say = lambda line: print(line, file=sys.stderr, flush=True),
    measure_one: Measure | None = None,
) -> Results:
    """Measure what a device's file lacks, and write it after each case.

    Args:
        out: the file; None is `default_file`.
        device: `cpu` or `cuda`; None is the GPU where there is one.
        quick: a few cases only.
        say: called with a line of progress for each case.
        measure_one: None measures in a process of its own on a GPU, and in this one on a CPU.

    Returns:
        all rows of the file, those that were there before too.

    Raises:
        LabkitError: the file is there and holds something else, or another device's rows.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    name, about = describe_machine(device)
    file = out or default_file(device, quick)
    results = Results(name, about, versions())
    known = {case.name: case for case in cases(device)}
    wanted = [case for case in known.values() if case.quick or not quick]
    if file.exists():
        kept = kept_rows(
            read_results(file),
            results,
            lambda row: row["name"] in known and same_case(row, head(known[row["name"]], device)),
        )
        results.rows = {name: with_prediction(row) for name, row in kept.items()}
    worker = Worker() if measure_one is None and device == "cuda" else None
    work = measure_one or worker or measure_case

    def make(case: Case) -> dict[str, Any]:
        return with_prediction(_row(case, device, about["memory_bytes"], work))

    try:
        fill(file, results, {case.name: case for case in wanted}, known, make, _said, say)
    finally:
        if worker is not None:
            worker.close()
    return results


def fill(
    file: Path,
    results: Results,
    wanted: Mapping[str, AnyCase],
    order: Iterable[str],
    make: Callable[[AnyCase], dict[str, Any]],
    said: Callable[[Mapping[str, Any]], str],
    say: Say,
) -> None:
    """Make the rows that are missing, and write the file after each.

    Args:
        wanted: name -> case.
        order: as for `write_results`.
        make: the row of a case.
        said: what a line of progress says of a row.
    """
    start = time.monotonic()
    for number, (name, case) in enumerate(wanted.items(), 1):
        if name in results.rows:
            continue
        row = results.rows[name] = make(case)
        results.date = datetime.now(UTC).date().isoformat()
        write_results(file, results, order)
        seconds = time.monotonic() - start
        say(f"{number:>3} of {len(wanted)}, {seconds:.0f} s: {name}: {said(row)}")
    write_results(file, results, order)


def versions() -> dict[str, str]:
    """Of the libraries that decide what a step holds."""
    names = ("python", "torch", "transformers", "trl", "peft", "bitsandbytes")
    return {name: machine.versions()[name] for name in names}


def kept_rows(
    before: Results, now: Results, still_wanted: Callable[[dict[str, Any]], bool]
) -> dict[str, dict[str, Any]]:
    """Rows of a file that need not be measured again; `now` takes their date.

    Args:
        before: what the file holds.
        now: this device and these versions.
        still_wanted: whether a row without an error is of a case as it is today.

    Raises:
        LabkitError: the file holds another device's rows.
    """
    if before.device != now.device:
        raise LabkitError(
            f"the file holds measurements of {before.device}, and this is {now.device}: name "
            "another --out"
        )
    if before.versions != now.versions:
        return {}
    now.date = before.date
    return {
        name: row for name, row in before.rows.items() if "error" not in row and still_wanted(row)
    }


def same_case(row: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a row was measured on the model and under the options that its case has today."""
    return all(row.get(name) == wanted[name] for name in ("config", "options"))


def _row(case: Case, device: str, memory_bytes: int, measure_one: Measure) -> dict[str, Any]:
    if device == "cuda":
        need = predict(case, device)["peak"]
        if need > memory_bytes - reserve_bytes(memory_bytes):
            return head(case, device) | {"error": f"not tried: {need:,} bytes were predicted"}
    return measure_one(case, device)


def write_results(file: Path, results: Results, order: Iterable[str]) -> None:
    """Write all rows, those named in `order` first and in that order."""
    place = {name: number for number, name in enumerate(order)}
    listed = sorted(results.rows.items(), key=lambda item: place.get(item[0], len(place)))
    results.rows = dict(listed)
    write_atomic(file, results.to_text().encode())


def _said(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return row["error"]
    return ", ".join(
        f"{name} {round(row['errors'][name], 4) + 0:+.2%}" for name in ("peak", "saved activations")
    )
