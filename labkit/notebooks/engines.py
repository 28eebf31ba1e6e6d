"""Where the seeds of a sweep run: in threads of this process, or on the machines of a Ray cluster.

Both engines do one thing: call a function once for every task, so many at a time, say as each ends,
and hand back what became of each, in the order of the tasks.

>>> with LocalEngine(jobs=2) as engine:
...     [outcome.result for outcome in engine.map(abs, [-3, 2])]
[3, 2]
"""

import contextlib
import logging
import os
import re
import secrets
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

from labkit import paths
from labkit.errors import LabkitError

ENGINES = ("local", "ray")


class EngineError(LabkitError):
    """An engine cannot start, or lost the process that ran a task."""


@dataclass(frozen=True)
class Outcome:
    """What became of one task."""

    result: Any = None
    error: Exception | None = None
    """What the task raised; `result` is None then."""


Started = Callable[[int], None]
Ended = Callable[[int, Outcome], None]


class Engine(ABC):
    """Runs tasks; a context manager that leaves nothing running."""

    travels = False
    """Whether tasks leave this machine: the function and they must then be picklable, and files
    named in them mean nothing."""

    def __init__(self, jobs: int) -> None:
        if jobs < 1:
            raise ValueError(f"jobs={jobs}: want 1 or more")
        self.jobs = jobs
        """Tasks at a time."""

    @abstractmethod
    def map(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        started: Started = lambda index: None,
        ended: Ended = lambda index, outcome: None,
    ) -> list[Outcome]:
        """Call `function` for every task.

        Args:
            started: called with a task's index when it is handed out.
            ended: called with its index and outcome when it ends, whatever ends first.

        Returns:
            One outcome for each task, in their order. An error ends its own task only.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop what the engine started."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_engine(
    name: str, jobs: int | None = None, address: str | None = None, gpus_per_task: float = 0
) -> Engine:
    """The engine of that name, started.

    Args:
        jobs: tasks at a time; None is one for `local`, and one for each core for `ray`.
        address: of a running Ray cluster, as `ray.init` takes it (`auto`, `HOST:PORT`); None is
            RAY_ADDRESS where that is set, else a Ray of this machine's own for as long as needed.
        gpus_per_task: GPUs that Ray sets aside for a task.

    Raises:
        ValueError: an unknown name, jobs below 1, or an option of Ray's for `local`.
        EngineError: Ray is not installed, does not start, or is not found at the address.
    """
    if name == "ray":
        return RayEngine(jobs, address, gpus_per_task)
    if name != "local":
        raise ValueError(f"engine={name!r}: use {' or '.join(ENGINES)}")
    if address or gpus_per_task:
        raise ValueError("address and gpus_per_task belong to engine='ray': leave them out")
    return LocalEngine(1 if jobs is None else jobs)


class LocalEngine(Engine):
    """Threads of this process; each one waits for the kernel that does the work."""

    def map(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        started: Started = lambda index: None,
        ended: Ended = lambda index, outcome: None,
    ) -> list[Outcome]:
        """As `Engine.map`; `started` and `ended` are called in the threads."""

        def run(index: int) -> Outcome:
            started(index)
            try:
                outcome = Outcome(function(tasks[index]))
            except Exception as error:  # kept for the caller, who knows which ones to expect
                outcome = Outcome(error=error)
            ended(index, outcome)
            return outcome

        with ThreadPoolExecutor(max_workers=self.jobs) as pool:
            return list(pool.map(run, range(len(tasks))))

    def close(self) -> None:
        """Nothing to stop: the threads end with `map`."""


class RayEngine(Engine):
    """Processes on the machines of a Ray cluster: https://docs.ray.io."""

    travels = True

    def __init__(
        self, jobs: int | None = None, address: str | None = None, gpus_per_task: float = 0
    ) -> None:
        super().__init__(1 if jobs is None else jobs)
        self._gpus_per_task = gpus_per_task
        self._folder: str | None = None
        address = address or os.environ.get("RAY_ADDRESS")
        self._ray = _import_ray(private=not address)
        self._borrowed = self._ray.is_initialized()
        if not self._borrowed:
            if address:
                self._join(address)
            else:
                self._start(jobs or os.cpu_count() or 1)
        if jobs is None:
            self.jobs = max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def _join(self, address: str) -> None:
        try:
            self._ray.init(address, **_QUIET)
        except Exception as error:
            raise EngineError(
                f"no Ray cluster to use at {address!r} ({_first_line(error)}): start one with "
                "`ray start --head`, or leave the address out to use this machine"
            ) from error

    def _start(self, cpus: int) -> None:
        """A Ray of our own, which nobody else can reach and which leaves no file behind."""
        # Names of sockets may have about 100 characters, and Ray's own part takes 70.
        self._folder = tempfile.mkdtemp(prefix="lk-", dir="/tmp" if os.name == "posix" else None)
        try:
            with _importing_labkit():
                self._ray.init(
                    "local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=self._folder,
                    **_QUIET,
                )
        except Exception as error:
            self.close()
            raise EngineError(
                f"Ray does not start here ({_first_line(error)}): use --engine local"
            ) from error

    def map(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        started: Started = lambda index: None,
        ended: Ended = lambda index, outcome: None,
    ) -> list[Outcome]:
        """As `Engine.map`; each task gets one core. Ray starts a task of a lost machine again."""
        remote = self._ray.remote(num_cpus=1, num_gpus=self._gpus_per_task)(function)
        outcomes: dict[int, Outcome] = {}
        waiting, running = deque(range(len(tasks))), {}
        while waiting or running:
            while waiting and len(running) < self.jobs:
                index = waiting.popleft()
                started(index)
                running[remote.remote(tasks[index])] = index
            (done, *_), _ = self._ray.wait(list(running), num_returns=1)
            index = running.pop(done)
            outcomes[index] = self._outcome(done)
            ended(index, outcomes[index])
        return [outcomes[index] for index in range(len(tasks))]

    def _outcome(self, reference: Any) -> Outcome:
        errors = self._ray.exceptions
        try:
            return Outcome(self._ray.get(reference))
        except errors.RayTaskError as error:
            if isinstance(error.cause, LabkitError):
                return Outcome(error=error.cause)
            # Perhaps the worker could not even begin, because it has no labkit.
            where = re.search(r"\(pid=(?P<pid>\d+), ip=(?P<ip>[^,)\s]+)", str(error))
            worker = f"{where['ip']} (process {where['pid']})" if where else "somewhere"
            cause = str(error.cause).strip().splitlines()[-1:] or [type(error.cause).__name__]
            return Outcome(error=EngineError(f"worker {worker}: {cause[0]}"))
        except errors.RayError as error:
            return Outcome(
                error=EngineError(f"the worker was lost ({_first_line(error)}): run it again")
            )

    def close(self) -> None:
        """Stop the Ray that this engine started, or leave the cluster that it joined."""
        if not self._borrowed:
            self._ray.shutdown()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


_QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
_OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's least; records of seeds are a few kB."""


def _import_ray(private: bool) -> Any:
    """Ray, told to report nothing to anybody and to hide no GPU; it reads all this on import.

    Args:
        private: the Ray to come is for this process alone. Ray would write a token for it into the
            user's home; one that lives as long as the process keeps others out as well.

    Raises:
        EngineError: it is not installed.
    """
    wanted = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if private:
        wanted |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if "ray" not in sys.modules:
        for name, value in wanted.items():
            os.environ.setdefault(name, value)
    with contextlib.suppress(ModuleNotFoundError):
        import ray

        return ray
    raise EngineError(
        'ray is not installed: run `python -m pip install -e ".[scale]"` in the course\'s folder, '
        "or use --engine local"
    )


@contextlib.contextmanager
def _importing_labkit() -> Iterator[None]:
    """Processes that start meanwhile find this labkit, wherever the sweep was started."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(paths.root()), before]))
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _first_line(error: BaseException | None) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
