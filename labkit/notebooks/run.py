"""Execute a notebook in its own kernel and write it back in canonical form.

python -m labkit.notebooks.run notebooks/02_full_fine_tuning.ipynb
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipykernel.kernelspec
import psutil
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from labkit import paths
from labkit.errors import LabkitError
from labkit.files import write_atomic
from labkit.notebooks.normalise import dumps, normalise, read, settle

MEMORY_SAMPLE_SECONDS = 0.2  # a look at a kernel and its children costs 4 ms
SWITCHES_OF_ONE_RUN = ("LABKIT_SEED", "LABKIT_RECORD", "LABKIT_SWEEP")


class RunError(LabkitError):
    """A notebook did not run to its end; `traceback` holds the failing cell's own words."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


@dataclass(frozen=True)
class Run:
    """What one execution of a notebook gave and cost."""

    notebook: NotebookNode
    """Executed and normalised."""
    seconds: float
    """From before the kernel starts to after the last cell."""
    peak_bytes: int
    """Largest `resident_bytes` of the kernel, sampled five times a second."""
    cell_seconds: tuple[tuple[str, float], ...]
    """(cell id, seconds) in order."""
    warnings: tuple[str, ...]
    """What the cells wrote to stderr; it is not kept in the notebook."""


ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For outputs that are committed and compared: a text of a half-trained model depends on the number
of threads, and two kernels with a thread for each core wait for each other most of the time."""


class ThisPython(KernelSpecManager):
    """Finds one kernel only: the Python that runs labkit, whatever kernels a user has installed."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The kernel spec of the running interpreter."""
        # Log level 40 hides the warning about unencrypted traffic, which stays on this machine.
        details = ipykernel.kernelspec.get_kernel_dict(extra_arguments=["--log-level=40"])
        return KernelSpec(resource_dir=ipykernel.kernelspec.RESOURCES, **details)


def kernel_env(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment for a kernel: this process's, offline, importing this labkit, plus `env`.

    Seed, record file and sweep mode belong to one run, so they come from `env` alone. A plotting
    backend set for this process would keep the kernel from drawing inline.
    """
    dropped = (*SWITCHES_OF_ONE_RUN, "MPLBACKEND")
    full = {key: value for key, value in os.environ.items() if key not in dropped}
    full["PYTHONPATH"] = os.pathsep.join(filter(None, [str(paths.root()), full.get("PYTHONPATH")]))
    full["HF_HUB_OFFLINE"] = "1"
    return full | dict(env or {})


def execute(
    path: Path | str,
    env: Mapping[str, str] | None = None,
    seed: int | None = None,
    timeout: float = 600,
    *,
    write: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Run:
    """Run every cell of a notebook in a fresh kernel, in the notebook's folder.

    Args:
        path: the notebook; with `write` its outputs are replaced, all at once, when all cells ran.
        env: environment variables for the kernel, on top of this process's.
        seed: value of LABKIT_SEED.
        timeout: seconds that one cell may take.
        progress: called with one line for each cell that took longer than 2 s.

    Raises:
        RunError: a cell raised, took too long or killed its kernel; the file is as it was.
        LabkitError: the file is missing, is not a notebook, or cannot be written.
    """
    path = Path(path)
    before = read(path)
    watch = _Watch(progress)
    seeded = {} if seed is None else {"LABKIT_SEED": str(seed)}
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisPython())

    def follow_memory(notebook: NotebookNode) -> None:
        provisioner: Any = manager.provisioner
        watch.kernel_started(provisioner.pid)

    # An unlimited queue: a cell that prints faster than we read would otherwise lose output.
    manager.context.rcvhwm = 0
    client = NotebookClient(
        normalise(before),
        km=manager,
        timeout=timeout,
        iopub_timeout=60,
        raise_on_iopub_timeout=True,
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent.resolve())}},
        on_notebook_start=follow_memory,
        on_cell_execute=watch.cell_started,
        on_cell_executed=watch.cell_ended,
        on_cell_error=watch.cell_ended,
    )
    client.owns_km = True  # so that the kernel is shut down whatever happens
    try:
        # A loop of our own, closed here; the selector kind because ZeroMQ needs it on Windows.
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            executed = runner.run(client.async_execute(env=kernel_env(seeded | dict(env or {}))))
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise _explain(error, path, watch, timeout) from None
    finally:
        watch.stop()
    warnings = tuple(
        output.text
        for cell in executed.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    )
    notebook = settle(normalise(executed), before)
    if write:
        write_atomic(path, dumps(notebook))
    return Run(notebook, watch.seconds(), watch.peak_bytes, tuple(watch.cells), warnings)


class _Watch:
    """Follows one execution: the running cell, seconds per cell, the kernel's memory."""

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.progress = progress
        self.cells: list[tuple[str, float]] = []
        self.cell_name = "before the first cell"
        self.peak_bytes = 0
        self._started = self._cell_started = time.perf_counter()
        self._stopped = threading.Event()

    def kernel_started(self, pid: int) -> None:
        threading.Thread(target=self._sample, args=(pid,), daemon=True).start()

    def cell_started(self, cell: NotebookNode, cell_index: int) -> None:
        self.cell_name = f"cell {cell_index} ({cell.id})"
        self._cell_started = time.perf_counter()

    def cell_ended(self, cell: NotebookNode, cell_index: int, execute_reply: object) -> None:
        seconds = time.perf_counter() - self._cell_started
        self.cells.append((cell.id, seconds))
        if self.progress and seconds > 2:
            first_line = cell.source.strip().splitlines()[0]
            self.progress(f"{self.cell_name} {seconds:6.1f} s  {first_line[:60]}")

    def stop(self) -> None:
        self._stopped.set()

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def _sample(self, pid: int) -> None:
        stopped = False
        while not stopped:
            with contextlib.suppress(psutil.Error):  # one of them ended between two looks
                self.peak_bytes = max(self.peak_bytes, resident_bytes(psutil.Process(pid)))
            stopped = self._stopped.wait(MEMORY_SAMPLE_SECONDS)


def resident_bytes(process: psutil.Process) -> int:
    """Resident memory of a process and of its child processes.

    Pages of files, such as torch's libraries, lie in memory once however many processes map them:
    where the system tells them apart (Linux), those of the children are left out.
    """
    children = [child.memory_info() for child in process.children(recursive=True)]
    own = sum(info.rss - getattr(info, "shared", 0) for info in children)
    return process.memory_info().rss + own


def _explain(error: Exception, path: Path, watch: _Watch, timeout: float) -> RunError:
    """One line that names the cell and the cause."""
    where = f"{path.name}: {watch.cell_name}"
    if isinstance(error, DeadKernelError):
        return RunError(f"{where}: the kernel died: look for a crash or too little memory")
    if isinstance(error, CellTimeoutError):
        return RunError(f"{where}: took longer than {timeout:g} s: shorten it or raise --timeout")
    assert isinstance(error, CellExecutionError)
    reason = f"{error.ename}: {error.evalue}".splitlines()[0]
    return RunError(f"{where}: {reason}: mend the cell and run again", str(error))


def main(arguments: list[str] | None = None) -> int:
    """Command line: execute notebooks and write them back."""
    parser = argparse.ArgumentParser(
        prog="python -m labkit.notebooks.run",
        description="Execute notebooks from top to bottom and write them back normalised.",
        epilog="example: python -m labkit.notebooks.run notebooks/00_start_here.ipynb",
    )
    parser.add_argument("notebook", nargs="+", type=Path)
    parser.add_argument("--seed", type=int, help="LABKIT_SEED of the kernel (default: not set)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one cell (600)")
    parser.add_argument("--no-write", action="store_true", help="leave the file as it is")
    parser.add_argument("--json", action="store_true", help="print seconds and bytes as JSON")
    options = parser.parse_args(arguments)
    costs = []
    for path in options.notebook:
        try:
            run = execute(
                path,
                env=ONE_THREAD,
                seed=options.seed,
                timeout=options.timeout,
                write=not options.no_write,
                progress=lambda line: print(line, file=sys.stderr, flush=True),
            )
        except LabkitError as error:
            print(getattr(error, "traceback", ""), error, sep="\n", file=sys.stderr)
            return 1
        for warning in run.warnings:
            print(f"stderr: {warning.rstrip()}", file=sys.stderr)
        cost = {"notebook": path.name, "seconds": run.seconds, "peak_bytes": run.peak_bytes}
        costs.append(cost)
        if not options.json:
            mebibytes = run.peak_bytes / 2**20
            print(f"{path.name}: {run.seconds:.1f} s, kernel peak {mebibytes:.0f} MiB")
    if options.json:
        print(json.dumps(costs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
