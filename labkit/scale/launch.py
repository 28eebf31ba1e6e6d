"""`torchrun` or `accelerate launch`, ending in one clear line when a rank fails.

    python -m labkit.scale.launch torchrun --standalone --nproc-per-node 2 SCRIPT ...
    python -m labkit.scale.launch accelerate --config_file FILE SCRIPT ...

What follows the engine's name goes to that engine as it is. A failed rank stops all others, which
is the engine's doing; here its report becomes one line: which rank, why, what was saved last, and
the command that goes on from there.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

ENGINES = ("torchrun", "accelerate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an engine with its own arguments; returns the exit status."""
    engine, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if engine not in ENGINES:
        print(f"engine {engine!r} is unknown: use {' or '.join(ENGINES)}", file=sys.stderr)
        return 2
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        _start(engine, rest)
    except ChildFailedError as error:
        print(explain(error, rest, f"python -m labkit.scale.launch {engine}"), file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:  # accelerate's way to run one process
        print(f"the training process ended with status {error.returncode}", file=sys.stderr)
        return 1
    return 0


def _start(engine: str, arguments: list[str]) -> None:
    if engine == "torchrun":
        from torch.distributed import run

        run.run(run.parse_args(arguments))
    else:
        from accelerate.commands.launch import launch_command, launch_command_parser

        launch_command(launch_command_parser().parse_args(arguments))


def explain(error: "ChildFailedError", arguments: Sequence[str], launcher: str) -> str:
    """One line for a failed job: the rank, the reason, the newest checkpoint, the next command.

    Args:
        arguments: the engine's arguments, the script's included; `--output_dir` is looked up there.
        launcher: the command before them.
    """
    rank, failure = _root_cause(error)
    line = f"rank {rank} (process {failure.pid}) {reason(failure)}; all other ranks were stopped."
    folder = _output_dir(arguments)
    if folder is None:
        return line
    from labkit.checkpoints import latest_checkpoint

    newest = latest_checkpoint(folder)
    if newest is None:
        return f"{line} {folder} has no checkpoint yet: start again, with a smaller --save_steps."
    again = [argument for argument in arguments if not argument.startswith(RESUME)]
    command = f"{launcher} {shlex.join([*again, f'{RESUME}=last'])}"
    return f"{line} The newest whole checkpoint is {newest}. Go on from it with: {command}"


RESUME = "--resume_from_checkpoint"


def _root_cause(error: "ChildFailedError") -> "tuple[int, ProcessFailure]":
    """The failure that came first: a killed process before those who lost their connection to it.

    torch's own choice goes by whole seconds, which a broken connection is well within.
    """
    # SIGTERM is how the engine stops the others.
    own = {r: f for r, f in error.failures.items() if f.exitcode != -signal.SIGTERM}
    killed = {rank: failure for rank, failure in own.items() if failure.exitcode < 0}
    return min((killed or own or error.failures).items(), key=lambda item: item[1].timestamp)


def reason(failure: "ProcessFailure") -> str:
    """Why a process ended, in words: a signal, an exception that `record` saw, or a status."""
    if failure.exitcode < 0:
        hint = ""
        if failure.signal_name() == "SIGKILL":
            hint = ", as the system does when memory runs out"
        return f"was killed by {failure.signal_name()}{hint}"
    if not os.path.isfile(failure.error_file):  # it ended without an exception, or before `record`
        return f"ended with status {failure.exitcode}"
    message: Any = failure.message
    text = message["message"] if isinstance(message, dict) else message
    return f"failed with {' '.join(str(text).split())}"


def _output_dir(arguments: Sequence[str]) -> str | None:
    """The script's `--output_dir`, in either spelling."""
    for place, argument in enumerate(arguments):
        if argument == "--output_dir" and place + 1 < len(arguments):
            return arguments[place + 1]
        if argument.startswith("--output_dir="):
            return argument.split("=", 1)[1]
    return None


if __name__ == "__main__":
    sys.exit(main())
