#!/usr/bin/env python3
"""Make the course's environment and open it in JupyterLab, or run its tests.

    python3 lab.py                    open the course (the first start installs about 2 GB)
    python3 lab.py --port 8890        ... on another port
    python3 lab.py --no-browser       ... without opening a browser window
    python3 lab.py test               run the whole test suite
    python3 lab.py test -k structure  ... or part of it: everything after `test` goes to pytest

Both commands may be interrupted at any point and repeated. The environment is made in .venv; a
small JSON stamp inside it says whether it is complete and what it was made from. An environment
that is not complete is never used: it is removed, and the one it was to replace comes back.
"""

# Only the standard library is used. The file must stay readable for Python 3.6, so that an old
# Python gets a sentence instead of a SyntaxError: no newer grammar, above the version check
# nothing that 3.6 cannot run.

import argparse
import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

OLDEST_PYTHON = (3, 11)


def newer_python():
    """The first command on the PATH that names a Python the course can use, or None."""
    names = [f"python3.{minor}" for minor in (13, 12, 11, 14)]
    return next((name for name in names if shutil.which(name)), None)


def python_too_old(version):
    """What to say to a Python of this (major, minor, ...) version; None when it is new enough."""
    if tuple(version[:2]) >= OLDEST_PYTHON:
        return None
    found = newer_python()
    step = (
        f"Run: {found} lab.py"
        if found
        else "Install Python 3.12 from python.org or your system's packages, then run it with that."
    )
    have = ".".join(str(part) for part in version[:3])
    return f"lab.py: this course needs Python 3.11 or newer, and this is Python {have}.\n  {step}"


if python_too_old(sys.version_info):
    sys.exit(python_too_old(sys.version_info))

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PREVIOUS = ROOT / ".venv.previous"  # the complete environment that is being replaced
TRASH = ROOT / ".venv.trash"  # on its way out; never used again
WHEELS = ROOT / "wheels"  # packages brought along for a room without a network
STATE = ROOT / ".labkit"
LOCK = STATE / "lab.lock"
RUNNING = STATE / "running.lock"  # shared by every JupyterLab of this course
LOG = STATE / "install.log"
STAMP = "labkit-stamp.json"
WORKBOOK = ROOT / "workbook"
BUILD_WORKBOOK = "from labkit.notebooks.workbook import build_workbook; print(build_workbook())"
FIRST_NOTEBOOK = "00_start_here.ipynb"
DEFAULT_PORT = 8888
FREE_BYTES_NEEDED = 4 * 10**9  # 3.0 GB when installed with the test tools, and the downloads

# JupyterLab asks the network for news and updates unless these settings say no.
QUIET_SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
    }
}
NO_TELEMETRY = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
}

# What a failed installation's output says -> the next step. The first match wins, so causes stand
# before the complaints that follow from them.
NEXT_STEPS = (
    (
        r"Long Path support|WinError 206|filename or extension is too long",
        r"The path is too long for Windows: move the course to a short one such as C:\course, "
        "then run the same command again.",
    ),
    (
        r"No space left on device|not enough space|Errno 28",
        "The disk is full: free some space in {root}, in the temporary folder {temp} "
        "or in pip's cache (python3 -m pip cache purge), then run the same command again.",
    ),
    (
        r"ensurepip is not available|No module named '?(ensurepip|venv)",
        "Python came without its venv module: on Debian or Ubuntu run "
        "`sudo apt install python3-venv`, then run the same command again.",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError",
        "The package index's certificate was not accepted, often because of a company proxy: "
        "set PIP_CERT to its certificate file, then run the same command again.",
    ),
    (
        r"name resolution|NameResolutionError|NewConnectionError|ProxyError|Network is unreachable"
        r"|getaddrinfo failed|nodename nor servname|ReadTimeout|ConnectTimeout|Connection refused"
        r"|ConnectionResetError|IncompleteRead",
        "The package index could not be reached: check the network (behind a proxy set "
        "HTTPS_PROXY), then run the same command again; what was downloaded is kept.",
    ),
    (
        r"No matching distribution found|is not a supported wheel",
        "A package has no build for {python} on {system}: use Python 3.11 to 3.14 on 64-bit "
        "Linux, Windows or an Apple-silicon Mac.",
    ),
    (
        r"Permission denied|Access is denied|Read-only file system",
        "A folder could not be written: copy the course to a folder of your own and close "
        "programs that use .venv, then run the same command again.",
    ),
)


class LabFailure(Exception):
    """What failed, and the next step: both are shown to the user, without a traceback."""

    def __init__(self, what: str, step: str):
        super().__init__(f"{what}\n  {step}")


# --- The environment: complete, or not there -----------------------------------------------------


def venv_python() -> Path:
    """Path of the environment's Python."""
    return VENV / "Scripts" / "python.exe" if os.name == "nt" else VENV / "bin" / "python"


def environment_key() -> str:
    """Hash of everything that an installed environment depends on; another hash, another .venv."""
    import tomllib  # not in the Pythons that only get as far as python_too_old

    try:
        pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    except ValueError as error:
        raise LabFailure(
            f"pyproject.toml is damaged: {error}.", "Restore it: git checkout pyproject.toml"
        ) from error
    parts = {
        "python": sys.version_info[:2],
        "machine": [sys.platform, platform.machine()],
        "root": str(ROOT),  # scripts in a .venv hold its absolute path: a moved clone needs another
        "build-system": pyproject["build-system"],
        "project": pyproject["project"],
        "constraints": (ROOT / "constraints.txt").read_text(encoding="utf-8"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_stamp(venv: Path) -> dict:
    """What lab.py wrote about an environment; {} where it wrote nothing."""
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(venv: Path, key: str | None, extras: list[str]) -> None:
    """Say, in one atomic step, what this environment is; `key` is None while it is being made."""
    draft = venv / (STAMP + ".draft")
    draft.write_text(json.dumps({"key": key, "extras": sorted(extras)}), encoding="utf-8")
    os.replace(draft, venv / STAMP)


def is_ready(extras: list[str], key: str) -> bool:
    """Whether .venv is complete, made from today's pins, and holds these extras."""
    stamp = read_stamp(VENV)
    return (
        stamp.get("key") == key
        and set(extras) <= set(stamp.get("extras", ()))
        and venv_python().exists()
    )


def discard(venv: Path) -> None:
    """Remove an environment; killed half-way, the rest is never mistaken for an environment."""
    remove_trash()
    if TRASH.exists():
        raise LabFailure(
            f"{TRASH} cannot be removed.",
            "Close programs that use it, delete that folder, then run the same command again.",
        )
    move(venv, TRASH)
    remove_trash()


def move(venv: Path, target: Path) -> None:
    """Rename an environment; Windows refuses while a program of it runs."""
    try:
        venv.rename(target)
    except PermissionError as error:
        raise LabFailure(
            f"{venv} cannot be moved: it is in use, or its folder is write-protected.",
            "Close JupyterLab and other programs that use it, then run the same command again.",
        ) from error


def remove_trash() -> None:
    shutil.rmtree(TRASH, ignore_errors=True)


def recover() -> None:
    """Undo what a killed start left: half of an environment goes, the one set aside comes back."""
    remove_trash()
    if VENV.is_dir():
        stamp = read_stamp(VENV)
        just_made = all(file.name == STAMP + ".draft" for file in VENV.iterdir())
        if just_made or (stamp and stamp.get("key") is None):
            discard(VENV)
    if PREVIOUS.exists():
        if VENV.exists():
            discard(PREVIOUS)
        else:
            PREVIOUS.rename(VENV)


def keep_foreign_environment() -> None:
    """Move a .venv that lab.py did not make out of the way, and say where it is."""
    number = 1
    while (ROOT / f".venv.yours-{number}").exists():
        number += 1
    kept = ROOT / f".venv.yours-{number}"
    move(VENV, kept)
    print(f"The .venv that was here is not of lab.py's making; it is kept as {kept.name}.")


def ensure_environment(extras: list[str]) -> None:
    """Make .venv unless a complete one is there; on any failure leave things as they were.

    Raises:
        LabFailure: it cannot be made; the message holds the next step.
    """
    key = environment_key()
    if is_ready(extras, key) and not (PREVIOUS.exists() or TRASH.exists()):
        return
    with one_at_a_time() as lock:
        recover()
        if is_ready(extras, key):  # the start that held the lock made it
            return
        check_venv_module()
        check_disk()
        stamp = read_stamp(VENV)
        # A development environment stays one when the pins change.
        wanted = sorted(set(extras) | set(stamp.get("extras", ())))
        if stamp:
            refuse_while_running()
            move(VENV, PREVIOUS)
        elif VENV.exists():
            keep_foreign_environment()
        try:
            VENV.mkdir()
            write_stamp(VENV, None, wanted)
            install(wanted, lock)
            write_stamp(VENV, key, wanted)
        except BaseException:  # Ctrl-C and SIGTERM too
            with contextlib.suppress(LabFailure, OSError):  # the next start would do it
                discard(VENV)
                if PREVIOUS.exists():
                    PREVIOUS.rename(VENV)
            raise
        if PREVIOUS.exists():
            discard(PREVIOUS)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[TextIO]:
    """Hold the lock file while the environment is made; a second start waits for the first.

    The operating system lets go of the lock when its holders end. The installer that we start
    holds it too, so a start that was killed cannot leave an installer writing beside the next one.
    """
    try:
        STATE.mkdir(exist_ok=True)
        lock = open(LOCK, "a+", encoding="utf-8")
    except OSError as error:
        raise LabFailure(
            f"The course's folder {ROOT} cannot be written: {error.strerror}.",
            "Copy the course to a folder of your own and run lab.py there.",
        ) from error
    with lock:
        told = False
        while not take_lock(lock):
            if not told:
                holder = LOCK.read_text(encoding="utf-8").strip() or "unknown"
                print(f"Another start (process {holder}) is making the environment; waiting.")
                told = True
            time.sleep(0.2)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield lock


def take_lock(lock: TextIO) -> bool:
    """Try to lock an open file for this process; False when another holds it."""
    try:
        if os.name == "nt":
            import msvcrt

            lock.seek(1 << 20)  # far behind the text, which others must still be able to read
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            return True  # a file system without locks: nothing tells two starts apart there
        raise
    return True


def hold_while_running() -> None:
    """Mark the environment as in use for as long as the JupyterLab that we become runs."""
    if os.name != "nt":  # Windows itself refuses to move a folder that is in use
        import fcntl

        with contextlib.suppress(OSError):
            STATE.mkdir(exist_ok=True)
            held = os.open(RUNNING, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.set_inheritable(held, True)  # the server keeps it open, its kernels do not


def refuse_while_running() -> None:
    """Refuse to replace an environment that a JupyterLab of this course still runs from."""
    if os.name == "nt":
        return
    with open(RUNNING, "a", encoding="utf-8") as lock:
        if not take_lock(lock):
            raise LabFailure(
                "The environment must be made again, and a JupyterLab still runs in it.",
                "Stop it (Ctrl-C in its window), then run the same command again.",
            )


def check_venv_module() -> None:
    """Refuse early when Python came without venv or ensurepip, as Debian ships it."""
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            version = ".".join(str(part) for part in sys.version_info[:2])
            raise LabFailure(
                f"This Python ({sys.executable}) came without its {module} module.",
                f"On Debian or Ubuntu run `sudo apt install python3-venv` (or python{version}-venv)"
                ", elsewhere install Python from python.org; then run the same command again.",
            )


def check_disk() -> None:
    """Refuse early when the packages would not fit."""
    free = shutil.disk_usage(ROOT).free
    if free < FREE_BYTES_NEEDED:
        raise LabFailure(
            f"The installation needs about {FREE_BYTES_NEEDED / 1e9:.0f} GB free in {ROOT}, "
            f"and {free / 1e9:.1f} GB are.",
            "Free some space, then run the same command again.",
        )


def install(extras: list[str], lock: TextIO) -> None:
    """Fill .venv: Python itself, the build tool, labkit with the pinned packages, settings."""
    # Started from inside an environment, `_base_executable` is the Python that it was made from.
    python = getattr(sys, "_base_executable", None) or sys.executable
    pip = [str(venv_python()), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    pip += ["--disable-pip-version-check", "--constraint", "constraints.txt"]
    if WHEELS.is_dir():
        pip += ["--no-index", "--find-links", str(WHEELS)]
    package = f".[{','.join(extras)}]" if extras else "."
    LOG.unlink(missing_ok=True)
    started = time.monotonic()
    run_logged("Making .venv", [python, "-m", "venv", str(VENV)], lock)
    # With the pinned build tool in place, pip needs to fetch no other for the editable install.
    run_logged("Installing the build tool", [*pip, "setuptools"], lock)
    print("Next: about 2 GB of packages, some minutes. Ctrl-C is safe.", flush=True)
    editable = ["--no-build-isolation", "--editable", package]
    run_logged("Installing the packages", pip + editable, lock)
    settings = VENV / "share" / "jupyter" / "lab" / "settings"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "overrides.json").write_text(json.dumps(QUIET_SETTINGS), encoding="utf-8")
    print(f"The environment is ready after {time.monotonic() - started:.0f} s.", flush=True)


def clean_environ(**additions: str) -> dict[str, str]:
    """This process's environment variables, less those that would mix other packages in."""
    unwanted = ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "__PYVENV_LAUNCHER__")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return {**kept, "PIP_USER": "0", "PYTHONUTF8": "1", **additions}


def run_logged(what: str, command: list[str], lock: TextIO) -> None:
    """Run a command into the log with a line of progress on the screen.

    Raises:
        LabFailure: it failed; names the last lines, the next step and where the full log is.
    """
    inherit = {} if os.name == "nt" else {"pass_fds": (lock.fileno(),)}
    with open(LOG, "ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command,
            cwd=str(ROOT),
            env=clean_environ(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            **inherit,
        )
        try:
            show_progress(what, process)
        finally:
            stop(process)
    if process.returncode:
        raise LabFailure(f"{what} failed:\n{last_lines(LOG)}", next_step(LOG))


def show_progress(what: str, process: subprocess.Popen) -> None:
    """Until the process ends, show the log's newest line: rewritten on a terminal, else rarely."""
    terminal = sys.stdout.isatty()
    started = time.monotonic()
    print(f"{what} ...", end="" if terminal else "\n", flush=True)
    while is_running(process, seconds=0.5 if terminal else 15):
        newest = last_lines(LOG, count=1).strip()
        width = shutil.get_terminal_size().columns - 1
        line = f"{what} ({time.monotonic() - started:.0f} s): {newest}"[:width]
        if terminal:
            print("\r" + line.ljust(width), end="", flush=True)
        else:
            print(line, flush=True)
    if terminal:
        print(flush=True)


def is_running(process: subprocess.Popen, seconds: float) -> bool:
    """Wait for the process; True when it is still running after these seconds."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def stop(process: subprocess.Popen) -> None:
    """End a process that is still running, because we were interrupted, and wait for it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_lines(log: Path, count: int = 8) -> str:
    """The last non-empty lines of a log, indented, each cut to 160 characters."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(
        "    " + line[:160] for line in [line for line in lines if line.strip()][-count:]
    )


def next_step(log: Path) -> str:
    """What to do about a failed installation, judged by what it wrote, and where its log is."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if shutil.disk_usage(ROOT).free < 10**8:  # too full even for pip to write why it failed
        text += "No space left on device"
    step = next(
        (step for cause, step in NEXT_STEPS if re.search(cause, text)),
        "Read the lines above, then run the same command again.",
    )
    step = step.format(
        root=ROOT,
        temp=tempfile.gettempdir(),
        python=f"Python {platform.python_version()}",
        system=f"{platform.system()} {platform.machine()}",
    )
    return f"{step}\n  The full log is in {log}; nothing half made is left."


# --- The two commands ----------------------------------------------------------------------------


def workbook_is_current() -> bool:
    """Whether nothing that the workbook was made from has changed, and no notebook of it is gone.

    Only hashes are compared, since starting another Python to find out takes seconds.
    """
    try:
        manifest = json.loads((WORKBOOK / ".labkit.json").read_text(encoding="utf-8"))
        made_from = manifest["made_from"]
        masters = list((ROOT / "notebooks").glob("*.ipynb"))
        whole = all(str(path) in made_from and (WORKBOOK / path.name).exists() for path in masters)
        return whole and all(
            hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest
            for path, digest in made_from.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def build_workbook() -> None:
    """Bring the learner's workbook up to date with the course's notebooks."""
    if workbook_is_current():
        print("workbook: up to date", flush=True)
        return
    done = subprocess.run(
        [str(venv_python()), "-c", BUILD_WORKBOOK],
        cwd=str(ROOT),
        env=clean_environ(),
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LabFailure(
            f"The workbook could not be built: {reason}",
            f"Check that {WORKBOOK} can be written and that `git status` shows no missing file.",
        )
    print(done.stdout, end="", flush=True)


def is_free(port: int) -> bool:
    """Whether JupyterLab could listen on this port of this machine."""
    addresses = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    for family, address in addresses if socket.has_ipv6 else addresses[:1]:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if os.name != "nt":  # as JupyterLab does: a port that was just closed is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:  # no IPv6 here: nothing can listen there
                    return False
    return True


def choose_port(asked: int | None) -> int:
    """The port to serve on: the one asked for, or else the first free one from 8888 on.

    Raises:
        LabFailure: the port asked for, or every one that was tried, is in use.
    """
    first = asked or DEFAULT_PORT
    if is_free(first):
        return first
    candidates = range(first + 1, min(first + 100, 65536))
    free = next((port for port in candidates if is_free(port)), None)
    if free is None:
        raise LabFailure(
            f"Port {first} and the ports after it are in use.", "Choose one: --port NUMBER"
        )
    if asked:
        raise LabFailure(
            f"Port {asked} cannot be used: another program listens there, or it is reserved.",
            f"Choose a free one: python3 lab.py --port {free}",
        )
    print(f"Port {first} is in use, perhaps by another JupyterLab; this one uses port {free}.")
    return free


def open_lab(asked_port: int | None, browser: bool) -> int:
    """Prepare everything and become JupyterLab in workbook/."""
    ensure_environment([])
    build_workbook()
    port = choose_port(asked_port)
    command = [str(venv_python()), "-m", "jupyterlab"]
    command += [f"--ServerApp.root_dir={WORKBOOK}"]
    retries = 0 if asked_port else 50  # another start may take the port before JupyterLab does
    command += [f"--ServerApp.port={port}", f"--ServerApp.port_retries={retries}"]
    command += ["--LabApp.extension_manager=readonly"]  # the other one asks a package index
    if (WORKBOOK / FIRST_NOTEBOOK).exists():
        command += [f"--LabApp.default_url=/lab/tree/{FIRST_NOTEBOOK}"]
    if not browser:
        command += ["--no-browser"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command += ["--allow-root"]  # containers run as root; the server listens on localhost only
    print(f"Opening JupyterLab on port {port}; stop it with Ctrl-C.", flush=True)
    hold_while_running()
    settings = {
        # The environment's own kernel wins over one of the same name in the user's home folder.
        "JUPYTER_PREFER_ENV_PATH": "1",
        # `labkit` and `pip` in a terminal of the lab are the course's own.
        "PATH": str(venv_python().parent) + os.pathsep + os.environ.get("PATH", ""),
    }
    return become(command, clean_environ(**settings, **NO_TELEMETRY))


def run_tests(arguments: list[str]) -> int:
    """Prepare everything and become pytest over tests/ and, cell by cell, notebooks/."""
    if not (ROOT / "tests").is_dir():
        raise LabFailure("This copy of the course has no tests.", "Get the whole repository.")
    ensure_environment(["test"])
    command = [str(venv_python()), "-m", "pytest", "--nbval", "-p", "labkit.notebooks.plugin"]
    command += ["--nbval-sanitize-with", "labkit/notebooks/sanitize.cfg", *arguments]
    pairs = zip(["", *arguments], arguments)
    if not any(names_tests(argument) for before, argument in pairs if before not in ("-k", "-m")):
        command += ["tests", "notebooks"]
    if not arguments:
        # Every test computes in one thread, so two files at a time fit two cores. A notebook, or a
        # file of tests, stays in one process, in order.
        command += ["--numprocesses", "2", "--dist", "loadscope"]
    os.chdir(ROOT)
    return become(command, clean_environ(**OFFLINE, **NO_TELEMETRY))


def names_tests(argument: str) -> bool:
    """Whether a pytest argument is a file, a folder or FILE::TEST of the course."""
    return not argument.startswith("-") and (ROOT / argument.split("::")[0]).exists()


def become(command: list[str], environ: dict[str, str]) -> int:
    """Replace this process by another program; on Windows, run it and return its exit status."""
    sys.stdout.flush()
    if os.name != "nt":
        os.execve(command[0], command, environ)
    process = subprocess.Popen(command, env=environ)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches the program too: let it end in its own way
            pass


def port_number(text: str) -> int:
    """A port from the command line."""
    port = int(text)
    if not 1 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is not a port: give a number from 1 to 65535")
    return port


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line -> namespace; `test` keeps all that follows it for pytest."""
    parser = argparse.ArgumentParser(
        prog="python3 lab.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", choices=["test"], help="run the tests instead")
    parser.add_argument("--port", type=port_number, help="serve JupyterLab on this port")
    parser.add_argument("--no-browser", action="store_true", help="print the address only")
    if arguments[:1] == ["test"] and not {"-h", "--help"} & set(arguments):
        parsed = parser.parse_args(["test"])
        parsed.pytest_arguments = arguments[1:]
        return parsed
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # an old code page must not end an installation
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    clean_up_when_ended()
    try:
        refuse_sudo()
        if parsed.command == "test":
            return run_tests(parsed.pytest_arguments)
        return open_lab(parsed.port, browser=not parsed.no_browser)
    except LabFailure as failure:
        print(f"lab.py: {failure}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno == errno.ENOSPC:
            print(
                f"lab.py: {error}\n  The disk is full: free some space, then run the same "
                "command again.",
                file=sys.stderr,
            )
            return 1
        print(
            f"lab.py: {error}\n  Check that this copy of the course is whole (git status) and "
            "that its folder can be written, then run the same command again.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(
            "\nlab.py: interrupted; nothing half made is left. Run the same command to go on.",
            file=sys.stderr,
        )
        return 130


def clean_up_when_ended() -> None:
    """Treat a request to end, or a closed terminal, like Ctrl-C."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows knows no SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets
            signal.signal(number, interrupt)


def refuse_sudo() -> None:
    """Refuse to make files in somebody's folder that would belong to root."""
    if os.name == "nt":
        return
    if os.environ.get("SUDO_USER") and os.geteuid() == 0 and ROOT.stat().st_uid != 0:
        raise LabFailure(
            "Started with sudo: what it makes would belong to root.", "Run it without sudo."
        )


if __name__ == "__main__":
    sys.exit(main())
