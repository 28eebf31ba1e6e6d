"""Start real jobs of several processes on this machine, and bring back what their ranks say.

Every job is `torchrun` as a cluster would start it, on a free port that torchrun picks itself. One
thread a rank: two ranks with two threads each on two cores wait for each other most of the time.
Whatever happens, an error, a time limit or the stop button, no process is left behind.
"""

import contextlib
import importlib.util
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from labkit import paths
from labkit.errors import LabkitError
from labkit.scale.configs import config_path

GRACE_SECONDS = 5
"""That processes get to end by themselves once they were asked to."""
STEP = re.compile(r"step (\d+) of (\d+): loss (\S+)")


def run(
    probe: str,
    processes: int = 2,
    *,
    timeout: float = 120,
    folder: str | Path | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Run one probe in several processes under torchrun; returns what each rank measured.

    >>> import labkit
    >>> for rank in labkit.scale.run("fsdp2"):  # doctest: +SKIP
    ...     print(rank["parameters"], rank["losses"])

    Args:
        probe: `ddp`, `fsdp2`, `zero` or `checkpoint`; see `labkit.scale.probes`.
        processes: ranks, each a process with one thread.
        timeout: seconds until the job is stopped with an error.
        folder: keeps the job's files (results, output of each rank) there; None keeps none.
        options: arguments of the probe.

    Raises:
        LabkitError: a rank failed, or time ran out: which rank, and what it said last.
        ValueError: no process, or no such probe.
    """
    return run_many({probe: options}, processes, timeout=timeout, folder=folder)[probe]


def run_many(
    probes: Mapping[str, Mapping[str, Any]],
    processes: int = 2,
    *,
    timeout: float = 120,
    folder: str | Path | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Run several probes in one start of torchrun, which alone takes seconds.

    Args:
        probes: name of a probe → its options. A name may carry a suffix after a colon, as in
            `zero:torch`, to run one probe twice.

    Returns:
        name → a dict for each rank, in order of ranks. Errors are those of `run`.
    """
    if processes < 1:
        raise ValueError(f"processes={processes}: give 1 or more")
    from labkit.scale.probes import find

    for name in probes:
        find(name)
    with _folder(folder) as place:
        job = {name: dict(options) for name, options in probes.items()}
        (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
        logs = place / "logs"
        command = [
            *_torchrun(processes),
            "--redirects=3",
            f"--log-dir={logs}",
            "-m",
            "labkit.scale.probes",
            str(place),
        ]
        ended = _follow(command, timeout)
        if ended.status:
            raise LabkitError(_with_last_words(ended, logs))
        return read_results(place, probes, processes)


def read_results(
    folder: Path, names: Sequence[str] | Mapping[str, Any], processes: int
) -> dict[str, list[dict[str, Any]]]:
    """What the ranks left in a job's folder: name → a dict for each rank."""
    return {
        name: [
            json.loads((folder / result_file(name, rank)).read_text(encoding="utf-8"))
            for rank in range(processes)
        ]
        for name in names
    }


def result_file(probe: str, rank: int) -> str:
    return f"{probe.replace(':', '-')}.rank{rank}.json"


def zero_measured(processes: int = 2, timeout: float = 180) -> list[dict[str, Any]]:
    """What DeepSpeed's stages leave on each rank: measured here, or as committed for two ranks.

    Returns:
        what `run("zero", processes)` returns, bytes that do not depend on the machine; from
        `data/memory/zero_two_ranks.json` where DeepSpeed is not installed.

    Raises:
        LabkitError: DeepSpeed is not installed, and this number of processes was not measured.
    """
    if has_deepspeed():
        return run("zero", processes, timeout=timeout)
    file = paths.data_dir() / "memory" / "zero_two_ranks.json"
    ranks = json.loads(file.read_text(encoding="utf-8"))["ranks"]
    if processes != len(ranks):
        raise LabkitError(
            f"processes={processes}: without DeepSpeed only the measurement of {len(ranks)} is "
            "there; install it with `pip install labkit[scale]`"
        )
    return ranks


def has_deepspeed() -> bool:
    """Whether DeepSpeed is installed, without importing it."""
    return importlib.util.find_spec("deepspeed") is not None


# ---- training ----------------------------------------------------------------------------------


@dataclass
class TrainRun:
    """One run of the training script, finished or not."""

    command: str
    """What was started, as it would be typed."""
    finished: bool = False
    losses: dict[int, float] = field(default_factory=dict)
    """Step → loss in nats a token, as rank 0 printed them."""
    message: str = ""
    """Why it ended early, in one line; empty for a finished run."""
    seconds: float = 0.0
    seconds_to_end: float = 0.0
    """From the kill of a rank to the end of the whole job; 0 where nothing was killed."""

    @property
    def reason(self) -> str:
        """The first part of `message`, without the number of the process."""
        return re.sub(r" \(process \d+\)", "", self.message.split(";")[0])


LOCAL = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "assistant_only_loss": True,
    "ddp_find_unused_parameters": False,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}
"""Options of the training script that suit a few steps of a small model on this machine."""


def train_command(
    output_dir: str | Path, processes: int = 2, launcher: str = "torchrun", **options: Any
) -> list[str]:
    """The command line of a run of `labkit.scale.finetune` on this machine.

    Args:
        processes: 1 needs no launcher.
        launcher: `torchrun`, or `accelerate` with the configuration `2_cpu_processes`.
        options: of the script and of TRL's `SFTConfig`, over `LOCAL`.

    Raises:
        ValueError: another launcher.
    """
    if launcher not in ("torchrun", "accelerate"):
        raise ValueError(f"launcher={launcher!r} is unknown: use torchrun or accelerate")
    chosen = LOCAL | options
    script = ["-m", "labkit.scale.finetune", "--output_dir", str(output_dir)]
    script += [f"--{name}={value}" for name, value in chosen.items()]
    if processes == 1:
        return [sys.executable, *script]
    return [*(_torchrun if launcher == "torchrun" else _accelerate)(processes), *script]


def train(
    output_dir: str | Path,
    processes: int = 2,
    *,
    kill_rank: int | None = None,
    kill_at_step: int = 1,
    timeout: float = 300,
    **options: Any,
) -> TrainRun:
    """Run the training script in real processes, and kill one of them on the way if asked to.

    Args:
        output_dir: where checkpoints and the model go.
        kill_rank: this rank gets SIGKILL once `kill_at_step` is logged; None lets all live.
        options: as in `train_command`, for example `max_steps=8, save_steps=3`, or
            `resume_from_checkpoint="last"` to go on.

    Returns:
        what the run said, whether it finished or a killed rank ended it.

    Raises:
        LabkitError: a failure that was not asked for, or time ran out.
        ValueError: no such rank.
    """
    if kill_rank is not None and not 0 <= kill_rank < processes:
        raise ValueError(f"kill_rank={kill_rank} of processes={processes}: ranks count from 0")
    command = train_command(output_dir, processes, **options)
    result = TrainRun(command=shlex.join(["python", *command[1:]]))
    killed_at = 0.0

    def see(line: str, job: psutil.Process) -> None:
        nonlocal killed_at
        if not (match := STEP.search(line)):
            return
        step = int(match[1])
        result.losses[step] = float(match[3])
        if kill_rank is not None and not killed_at and step >= kill_at_step:
            _process_of_rank(job, kill_rank).kill()
            killed_at = time.perf_counter()

    started = time.perf_counter()
    ended = _follow(command, timeout, see)
    result.seconds = time.perf_counter() - started
    result.finished = ended.status == 0
    if killed_at:
        result.seconds_to_end = time.perf_counter() - killed_at
    if not result.finished:
        result.message = ended.last_line
        if not killed_at:
            raise LabkitError(ended.last_line)
    return result


def _process_of_rank(job: psutil.Process, rank: int) -> psutil.Process:
    """The process of one rank below torchrun's, known by the variable that torchrun gave it."""
    for child in job.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.environ().get("RANK") == str(rank):
                return child
    raise LabkitError(f"rank {rank} has no process: the job has ended already")


# ---- processes ---------------------------------------------------------------------------------


def _torchrun(processes: int) -> list[str]:
    """torchrun on this machine alone, through `labkit.scale.launch` for its one-line errors."""
    return [
        sys.executable,
        "-m",
        "labkit.scale.launch",
        "torchrun",
        "--standalone",  # a free port, found by torchrun
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={processes}",
    ]


def _accelerate(processes: int) -> list[str]:
    """The same by `accelerate launch`, which reads the rest from a configuration file."""
    return [
        sys.executable,
        "-m",
        "labkit.scale.launch",
        "accelerate",
        f"--config_file={config_path('2_cpu_processes')}",
        f"--num_processes={processes}",
    ]


@dataclass
class _Ended:
    status: int
    lines: list[str]

    @property
    def last_line(self) -> str:
        said = [line for line in self.lines if line.strip()]
        return said[-1].strip() if said else f"the job ended with status {self.status}"


def _environment() -> dict[str, str]:
    """This process's own, with one thread a rank and labkit where the ranks can import it."""
    own = str(paths.root())
    found = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([own, found] if found else [own]),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",  # these are lessons for a CPU; clusters have `configs`
    }


def _follow(command: list[str], timeout: float, see=lambda line, job: None) -> _Ended:
    """Run a command to its end, showing each of its lines to `see`; clean up whatever happens.

    Raises:
        LabkitError: it ran longer than `timeout` seconds.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=_environment(),
        start_new_session=True,  # the stop button's signal is for the notebook, which stops the job
    )
    assert process.stdout is not None
    said: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            said.put(line.rstrip("\n"))
        said.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    deadline = time.monotonic() + timeout
    lines: list[str] = []
    try:
        job = psutil.Process(process.pid)
        while (line := said.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
            lines.append(line)
            see(line, job)
        return _Ended(process.wait(timeout=max(0.1, deadline - time.monotonic())), lines)
    except (queue.Empty, subprocess.TimeoutExpired):
        raise LabkitError(
            f"the job was stopped after timeout={timeout:g} seconds; its last line was: "
            f"{_Ended(0, lines or ['nothing']).last_line}"
        ) from None
    finally:
        _stop(process)
        reader.join(timeout=GRACE_SECONDS)
        process.stdout.close()


def _stop(process: subprocess.Popen) -> None:
    """End a job and all below it: torchrun first, which ends its ranks, then whoever is left."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_SECONDS)
    for left in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    if process.poll() is None:
        process.kill()
        process.wait()
    psutil.wait_procs(below, timeout=GRACE_SECONDS)


@contextlib.contextmanager
def _folder(given: str | Path | None) -> Iterator[Path]:
    """The folder that was given, made if missing, or one that is deleted afterwards."""
    if given is not None:
        place = Path(given).absolute()
        place.mkdir(parents=True, exist_ok=True)
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="labkit-scale-") as name:
        yield Path(name)


def _with_last_words(ended: _Ended, logs: Path) -> str:
    """The launcher's line; where that names no exception, with the last line of the failed rank."""
    line = ended.last_line
    found = re.match(r"rank (\d+) .*ended with status", line)
    if not found:
        return line
    for file in sorted(logs.rglob(f"attempt_0/{found[1]}/stderr.log")):
        words = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if words:
            return f"{line} Its last line was: {words[-1].strip()}"
    return line
