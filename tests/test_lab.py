"""lab.py: an environment is complete or not there, and every failure says what to do next.

No test installs anything: the installer is replaced by a few lines that write files.
"""

import ast
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import lab

SOURCE = Path(lab.__file__)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """An empty clone of the course in a scratch folder, which `lab` takes for its own."""
    names = {
        "ROOT": "",
        "VENV": ".venv",
        "PREVIOUS": ".venv.previous",
        "TRASH": ".venv.trash",
        "STATE": ".labkit",
        "LOCK": ".labkit/lab.lock",
        "RUNNING": ".labkit/running.lock",
        "WHEELS": "wheels",
        "LOG": ".labkit/install.log",
        "WORKBOOK": "workbook",
    }
    for name, path in names.items():
        monkeypatch.setattr(lab, name, tmp_path / path)
    monkeypatch.setattr(lab, "clean_up_when_ended", lambda: None)  # pytest keeps its own handlers
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n", encoding="utf-8")
    write_pyproject(tmp_path, dependencies=["torch"])
    return tmp_path


def write_pyproject(folder: Path, dependencies: list[str], ruff_line: int = 100) -> None:
    text = f"""
        [build-system]
        requires = ["setuptools"]
        [project]
        name = "labkit"
        dependencies = {json.dumps(dependencies)}
        [tool.ruff]
        line-length = {ruff_line}
    """
    (folder / "pyproject.toml").write_text(textwrap.dedent(text), encoding="utf-8")


@pytest.fixture
def installer(monkeypatch):
    """A stand-in for `lab.install` that makes a Python-shaped file and counts its calls."""
    calls = []

    def install(extras, lock):
        lab.venv_python().parent.mkdir(parents=True)
        lab.venv_python().write_text("new", encoding="utf-8")
        calls.append(list(extras))

    monkeypatch.setattr(lab, "install", install)
    return calls


def fail_with(error: BaseException):
    """A stand-in for `lab.install` that leaves half of an environment behind."""

    def install(extras, lock):
        (lab.VENV / "half.txt").write_text("half", encoding="utf-8")
        raise error

    return install


def folders(clone: Path) -> set[str]:
    return {path.name for path in clone.iterdir() if path.is_dir()}


# --- Old Pythons ---------------------------------------------------------------------------------


def test_an_old_python_can_read_the_file():
    ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 6))


def test_an_old_python_gets_a_sentence(monkeypatch):
    monkeypatch.setattr(lab.shutil, "which", lambda name: None)
    message = lab.python_too_old((3, 6, 15))
    assert "needs Python 3.11 or newer, and this is Python 3.6.15" in message
    assert "Install Python" in message


def test_an_old_python_names_a_newer_one_that_is_there(monkeypatch):
    monkeypatch.setattr(lab.shutil, "which", lambda name: name if name == "python3.12" else None)
    assert lab.python_too_old((3, 10, 2)).endswith("Run: python3.12 lab.py")


def test_the_oldest_supported_python_is_not_refused():
    assert lab.python_too_old((3, 11, 0)) is None


def test_above_the_version_check_stand_no_annotations():
    """Python 3.6 runs the file down to the check; `X | None` would be a TypeError there."""
    for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If):
            return
        if isinstance(node, ast.FunctionDef):
            assert node.returns is None
            assert all(argument.annotation is None for argument in node.args.args)
    pytest.fail("lab.py has no version check")


# --- The stamp -----------------------------------------------------------------------------------


def test_key_follows_pins_and_dependencies_but_not_the_tools(clone):
    key = lab.environment_key()
    write_pyproject(clone, ["torch"], ruff_line=80)
    assert lab.environment_key() == key
    write_pyproject(clone, ["torch", "numpy"])
    assert lab.environment_key() != key
    write_pyproject(clone, ["torch"])
    assert lab.environment_key() == key
    (clone / "constraints.txt").write_text("torch==2.13.1\n", encoding="utf-8")
    assert lab.environment_key() != key


def test_key_follows_python_and_the_folder(clone, monkeypatch):
    key = lab.environment_key()
    monkeypatch.setattr(lab.sys, "version_info", (3, 99, 0))
    other_python = lab.environment_key()
    monkeypatch.undo()
    assert key != other_python
    assert lab.environment_key() != key  # the real folder again, not the scratch clone


def test_a_damaged_pyproject_is_named(clone):
    (clone / "pyproject.toml").write_text("<<<<<<< HEAD", encoding="utf-8")
    with pytest.raises(lab.LabFailure, match=r"pyproject.toml is damaged.*\n.*git checkout"):
        lab.environment_key()


def test_the_environment_is_made_once(clone, installer):
    lab.ensure_environment([])
    lab.ensure_environment([])
    assert installer == [[]]
    assert folders(clone) == {".venv", ".labkit"}


def test_tests_add_their_packages_and_the_lab_keeps_them(clone, installer):
    lab.ensure_environment([])
    lab.ensure_environment(["test"])
    lab.ensure_environment([])
    assert installer == [[], ["test"]]
    (clone / "constraints.txt").write_text("torch==2.14.0\n", encoding="utf-8")
    lab.ensure_environment([])
    assert installer == [[], ["test"], ["test"]]


def test_an_environment_whose_python_vanished_is_made_again(clone, installer):
    lab.ensure_environment([])
    lab.venv_python().unlink()
    lab.ensure_environment([])
    assert len(installer) == 2


# --- Failures and interruptions ------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), lab.LabFailure("no", "do"), OSError("x")])
def test_a_failed_install_leaves_nothing(clone, monkeypatch, error):
    monkeypatch.setattr(lab, "install", fail_with(error))
    with pytest.raises(type(error)):
        lab.ensure_environment([])
    assert folders(clone) == {".labkit"}


def test_a_failed_update_brings_the_old_environment_back(clone, installer, monkeypatch):
    lab.ensure_environment([])
    before = lab.read_stamp(lab.VENV)
    lab.venv_python().write_text("old", encoding="utf-8")
    (clone / "constraints.txt").write_text("torch==2.14.0\n", encoding="utf-8")
    monkeypatch.setattr(lab, "install", fail_with(lab.LabFailure("no network", "check it")))
    with pytest.raises(lab.LabFailure, match="no network"):
        lab.ensure_environment([])
    assert lab.read_stamp(lab.VENV) == before
    assert lab.venv_python().read_text(encoding="utf-8") == "old"
    assert folders(clone) == {".venv", ".labkit"}


def test_an_update_replaces_the_old_environment(clone, installer):
    lab.ensure_environment([])
    (lab.VENV / "stale.txt").write_text("stale", encoding="utf-8")
    (clone / "constraints.txt").write_text("torch==2.14.0\n", encoding="utf-8")
    lab.ensure_environment([])
    assert not (lab.VENV / "stale.txt").exists()
    assert folders(clone) == {".venv", ".labkit"}


def test_an_environment_of_the_users_own_is_kept(clone, installer, capsys):
    (clone / ".venv").mkdir()
    (clone / ".venv" / "mine.txt").write_text("mine", encoding="utf-8")
    (clone / ".venv.yours-1").mkdir()
    lab.ensure_environment([])
    assert (clone / ".venv.yours-2" / "mine.txt").exists()
    assert "kept as .venv.yours-2" in capsys.readouterr().out


KILLED_AT = {
    "before the new one was stamped": [".venv.previous complete", ".venv bare"],
    "while installing": [".venv building"],
    "while updating": [".venv.previous complete", ".venv building"],
    "after the old one was set aside": [".venv.previous complete"],
    "while the old one was removed": [".venv complete", ".venv.trash building"],
    "before the old one was removed": [".venv complete", ".venv.previous complete"],
}


@pytest.mark.parametrize("moment", KILLED_AT)
def test_the_next_start_repairs_a_kill(clone, installer, moment):
    """SIGKILL runs no cleanup, so each state it can leave on disk is laid out by hand."""
    for entry in KILLED_AT[moment]:
        name, state = entry.split()
        (clone / name).mkdir()
        if state == "bare":
            (clone / name / (lab.STAMP + ".draft")).write_text("{", encoding="utf-8")
            continue
        complete = state == "complete"
        lab.write_stamp(clone / name, lab.environment_key() if complete else None, [])
        if complete:
            python = clone / name / lab.venv_python().relative_to(lab.VENV)
            python.parent.mkdir(parents=True)
            python.write_text("old", encoding="utf-8")
        else:
            (clone / name / "half.txt").write_text("half", encoding="utf-8")
    lab.ensure_environment([])
    assert lab.is_ready([], lab.environment_key())
    assert not (lab.VENV / "half.txt").exists()
    assert folders(clone) - {".labkit"} == {".venv"}
    old_was_usable = any("complete" in entry for entry in KILLED_AT[moment])
    assert len(installer) == (0 if old_was_usable else 1)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("which", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_real_process_stopped_in_the_middle(clone, which):
    """`lab.py` itself, with an installer that hangs; the second start finds a clean folder."""
    code = f"""
        import sys, time; sys.path.insert(0, {str(SOURCE.parent)!r})
        import lab
        from pathlib import Path
        for name in ("ROOT", "VENV", "PREVIOUS", "TRASH", "STATE", "LOCK", "LOG"):
            old = getattr(lab, name).relative_to({str(SOURCE.parent)!r})
            setattr(lab, name, Path({str(clone)!r}) / old)
        def install(extras, lock):
            lab.run_logged("Sleeping", [sys.executable, "-c", "import time; time.sleep(60)"], lock)
        lab.install = install
        sys.exit(lab.main([]))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    with process:
        wait_until(lambda: "sleep" in read(clone / ".labkit" / "install.log"))
        process.send_signal(getattr(signal, which))
        if which != "SIGKILL":
            assert "nothing half made is left" in process.communicate(timeout=20)[1]
            assert process.returncode == 130
            assert folders(clone) == {".labkit"}
            return
        process.wait(timeout=20)
        with open(lab.LOCK, "a+", encoding="utf-8") as lock:
            assert not lab.take_lock(lock), "the orphaned installer must still hold the lock"
            os.killpg(process.pid, signal.SIGKILL)
            wait_until(lambda: lab.take_lock(lock))
        lab.recover()
        assert folders(clone) == {".labkit"}


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def test_a_second_start_waits_for_the_first(clone, installer, monkeypatch, capsys):
    """The first holder finishes while we wait: its environment is used, nothing is installed."""

    def finish_the_first(seconds):
        first.close()
        lab.VENV.mkdir()
        lab.write_stamp(lab.VENV, lab.environment_key(), [])
        lab.venv_python().parent.mkdir(parents=True)
        lab.venv_python().write_text("first", encoding="utf-8")

    with contextlib.ExitStack() as stack:
        first = stack.enter_context(subprocess_lock(clone))
        monkeypatch.setattr(lab.time, "sleep", finish_the_first)
        lab.ensure_environment([])
    assert installer == []
    assert "Another start (process 4321) is making the environment" in capsys.readouterr().out


@contextlib.contextmanager
def subprocess_lock(clone: Path):
    """The lock as another start holds it."""
    lab.STATE.mkdir()
    with open(lab.LOCK, "a+", encoding="utf-8") as lock:
        lock.write("4321")
        lock.flush()
        assert lab.take_lock(lock)
        yield lock


# --- One message a failure -----------------------------------------------------------------------

CAUSES = [
    ("OSError: [Errno 28] No space left on device", "The disk is full"),
    ("The virtual environment was not created: ensurepip is not available", "python3-venv"),
    ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]", "PIP_CERT"),
    ("<urllib3> [Errno -3] Temporary failure in name resolution", "check the network"),
    ("Caused by ProxyError('Cannot connect to proxy.'", "HTTPS_PROXY"),
    ("ERROR: No matching distribution found for torch==2.13.0", "has no build for Python 3"),
    ("PermissionError: [Errno 13] Permission denied: 'x'", "folder of your own"),
    ("ERROR: something new", "Read the lines above"),
]


@pytest.mark.parametrize(("output", "step"), CAUSES)
def test_a_failed_installer_shows_its_last_lines_and_the_next_step(clone, output, step):
    lab.STATE.mkdir()
    code = f"import sys; print('early'); [print() for _ in range(3)]; sys.exit({output!r})"
    with open(lab.LOCK, "a+", encoding="utf-8") as lock, pytest.raises(lab.LabFailure) as failure:
        lab.run_logged("Installing the packages", [sys.executable, "-c", code], lock)
    message = str(failure.value)
    assert message.startswith("Installing the packages failed:\n")
    assert f"    {output}\n" in message
    assert step in message
    assert f"The full log is in {lab.LOG}" in message
    assert "early" in read(lab.LOG)


def test_an_unreachable_index_is_told_apart_from_a_missing_build(clone):
    """pip ends with the second line in both cases; the first one tells."""
    lab.STATE.mkdir()
    lab.LOG.write_text(
        "WARNING: Retrying after connection broken by 'NewConnectionError(\n"
        "ERROR: No matching distribution found for torch==2.13.0\n",
        encoding="utf-8",
    )
    assert "check the network" in lab.next_step(lab.LOG)


def test_main_shows_a_failure_without_a_traceback(clone, monkeypatch, capsys):
    monkeypatch.setattr(lab, "install", fail_with(lab.LabFailure("It failed.", "Do this.")))
    assert lab.main(["--no-browser"]) == 1
    assert capsys.readouterr().err == "lab.py: It failed.\n  Do this.\n"


def test_an_incomplete_clone_is_named(clone, capsys):
    (clone / "constraints.txt").unlink()
    assert lab.main([]) == 1
    message = capsys.readouterr().err
    assert "constraints.txt" in message
    assert "git status" in message


def test_too_little_disk_is_refused_before_anything_is_made(clone, installer, monkeypatch):
    usage = lab.shutil.disk_usage(clone)._replace(free=1_200_000_000)
    monkeypatch.setattr(lab.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(lab.LabFailure, match=r"needs about 4 GB free in .*, and 1\.2 GB are"):
        lab.ensure_environment([])
    assert folders(clone) == {".labkit"}


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_venv_names_the_package(clone, installer, monkeypatch, module):
    find = lab.importlib.util.find_spec
    monkeypatch.setattr(
        lab.importlib.util, "find_spec", lambda name: None if name == module else find(name)
    )
    with pytest.raises(lab.LabFailure, match=f"without its {module} module.*\n.*python3-venv"):
        lab.ensure_environment([])


def test_a_folder_that_cannot_be_written_is_named(clone, installer):
    (clone / ".labkit").write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(lab.LabFailure, match="cannot be written: .*\n.*folder of your own"):
        lab.ensure_environment([])


def test_a_workbook_that_cannot_be_built_gives_its_reason(clone, monkeypatch):
    monkeypatch.setattr(lab, "venv_python", lambda: Path(sys.executable))
    monkeypatch.setenv("PYTHONPATH", "dropped")
    with pytest.raises(lab.LabFailure, match=r"workbook could not be built: \w*Error: "):
        monkeypatch.setattr(lab, "BUILD_WORKBOOK", "raise OSError('disk')")
        lab.build_workbook()


# --- Ports ---------------------------------------------------------------------------------------


@pytest.fixture
def taken_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_free_port_is_used_as_asked(monkeypatch):
    monkeypatch.setattr(lab, "is_free", lambda port: True)
    assert lab.choose_port(9000) == 9000
    assert lab.choose_port(None) == 8888


def test_a_listening_port_is_not_free(taken_port):
    assert not lab.is_free(taken_port)


def test_without_a_wish_the_next_free_port_is_taken_and_named(monkeypatch, capsys):
    monkeypatch.setattr(lab, "is_free", lambda port: port >= 8890)
    assert lab.choose_port(None) == 8890
    assert "Port 8888 is in use" in capsys.readouterr().out


def test_a_port_that_was_asked_for_is_never_changed(monkeypatch):
    monkeypatch.setattr(lab, "is_free", lambda port: port != 9000)
    with pytest.raises(lab.LabFailure, match=r"Port 9000 cannot be used.*\n.*--port 9001"):
        lab.choose_port(9000)


def test_no_free_port_at_all(monkeypatch):
    monkeypatch.setattr(lab, "is_free", lambda port: False)
    with pytest.raises(lab.LabFailure, match="Port 65535 and the ports after it"):
        lab.choose_port(65535)


@pytest.mark.parametrize("port", ["0", "65536", "lab"])
def test_a_port_that_is_none_is_bad_usage(port, capsys):
    with pytest.raises(SystemExit, match="2"):
        lab.main(["--port", port])
    assert "--port" in capsys.readouterr().err


# --- What the two commands start -----------------------------------------------------------------


@pytest.fixture
def started(clone, installer, monkeypatch):
    """The command and environment that lab.py would become."""
    seen = {}
    monkeypatch.setattr(lab, "become", lambda command, env: seen.update(c=command, e=env) or 0)
    monkeypatch.setattr(lab, "build_workbook", lambda: None)
    monkeypatch.setattr(lab, "is_free", lambda port: True)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.chdir(clone)
    return seen


def test_the_lab_opens_in_the_workbook(started, clone):
    (clone / "workbook").mkdir()
    (clone / "workbook" / lab.FIRST_NOTEBOOK).write_text("{}", encoding="utf-8")
    assert lab.main(["--port", "9001", "--no-browser"]) == 0
    assert started["c"][:3] == [str(lab.venv_python()), "-m", "jupyterlab"]
    assert f"--ServerApp.root_dir={clone / 'workbook'}" in started["c"]
    assert {"--ServerApp.port=9001", "--ServerApp.port_retries=0", "--no-browser"} <= set(
        started["c"]
    )
    assert "--LabApp.default_url=/lab/tree/00_start_here.ipynb" in started["c"]
    assert not any("token" in argument or "ip=" in argument for argument in started["c"])
    assert "PYTHONPATH" not in started["e"]
    assert started["e"]["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_tests_cover_both_folders_and_pass_arguments_on(started, clone):
    (clone / "tests").mkdir()
    assert lab.main(["test", "-x", "-k", "notebooks", "--durations=5"]) == 0
    command = started["c"]
    assert command[1:5] == ["-m", "pytest", "--nbval", "-p"]
    assert command[-6:] == ["-x", "-k", "notebooks", "--durations=5", "tests", "notebooks"]
    assert "--numprocesses" not in command
    assert started["e"]["HF_HUB_OFFLINE"] == "1"


def test_the_whole_suite_runs_two_files_at_a_time(started, clone):
    (clone / "tests").mkdir()
    assert lab.main(["test"]) == 0
    assert started["c"][-4:] == ["--numprocesses", "2", "--dist", "loadscope"]


def test_tests_of_one_file_are_only_those(started, clone):
    (clone / "tests").mkdir()
    (clone / "tests" / "test_lab.py").write_text("", encoding="utf-8")
    assert lab.main(["test", "tests/test_lab.py::test_x"]) == 0
    assert started["c"][-1] == "tests/test_lab.py::test_x"


def test_a_copy_without_tests_says_so(clone, installer, capsys):
    assert lab.main(["test"]) == 1
    assert "has no tests" in capsys.readouterr().err
    assert not installer


def test_a_terminal_of_the_lab_finds_the_courses_own_commands(started):
    assert lab.main(["--no-browser"]) == 0
    assert started["e"]["PATH"].startswith(str(lab.venv_python().parent) + os.pathsep)
    # Without a wish for a port, JupyterLab may move on when another start took it meanwhile.
    assert "--ServerApp.port_retries=50" in started["c"]


@pytest.mark.skipif(os.name == "nt", reason="Windows itself refuses to move what is in use")
def test_packages_are_not_replaced_under_a_running_lab(started, clone):
    assert lab.main(["--no-browser"]) == 0  # its stand-in holds the mark until this process ends
    before = lab.read_stamp(lab.VENV)
    (clone / "constraints.txt").write_text("torch==2.14.0\n", encoding="utf-8")
    with pytest.raises(lab.LabFailure, match="JupyterLab still runs"):
        lab.ensure_environment([])
    assert lab.read_stamp(lab.VENV) == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no sudo of this kind")
def test_sudo_is_refused(clone, installer, monkeypatch, capsys):
    monkeypatch.setenv("SUDO_USER", "ada")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    root = type("Root", (), {"stat": lambda self: os.stat_result([0] * 4 + [1000] + [0] * 5)})
    monkeypatch.setattr(lab, "ROOT", root())
    assert lab.main([]) == 1
    assert "Run it without sudo" in capsys.readouterr().err


def test_packages_brought_along_need_no_index(clone, monkeypatch):
    commands = []
    monkeypatch.setattr(lab, "run_logged", lambda what, command, lock: commands.append(command))
    lab.VENV.mkdir()
    lab.STATE.mkdir()
    with lab.one_at_a_time() as lock:
        lab.install([], lock)
        assert not any("--no-index" in command for command in commands)
        lab.WHEELS.mkdir()
        commands.clear()
        lab.install([], lock)
    for command in commands[1:]:
        assert command[command.index("--find-links") + 1] == str(lab.WHEELS)
        assert "--no-index" in command


def test_a_workbook_is_built_again_only_when_something_changed(clone, monkeypatch, capsys):
    master = clone / "notebooks" / "00.ipynb"
    copied = clone / "workbook" / "00.ipynb"
    for file in (master, copied):
        file.parent.mkdir()
        file.write_text("{}", encoding="utf-8")
    made_from = {str(master): hashlib.sha256(master.read_bytes()).hexdigest()}
    manifest = clone / "workbook" / ".labkit.json"
    manifest.write_text(json.dumps({"files": {}, "made_from": made_from}), encoding="utf-8")
    monkeypatch.setattr(lab, "venv_python", lambda: clone / "never started")
    lab.build_workbook()
    assert "up to date" in capsys.readouterr().out
    changes = {
        "an edited master": lambda: master.write_text("{ }", encoding="utf-8"),
        "a new master": lambda: (master.parent / "01.ipynb").write_text("{}", encoding="utf-8"),
        "a notebook that the learner deleted": copied.unlink,
        "a damaged manifest": lambda: manifest.write_text("[", encoding="utf-8"),
    }
    for change in changes.values():
        kept = {file: file.read_bytes() for file in (master, copied, manifest)}
        change()
        assert not lab.workbook_is_current()
        for file, content in kept.items():
            file.write_bytes(content)
        (master.parent / "01.ipynb").unlink(missing_ok=True)
        assert lab.workbook_is_current()


def test_help_installs_nothing(clone, capsys):
    for arguments in (["--help"], ["test", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            lab.main(arguments)
        assert "python3 lab.py test" in capsys.readouterr().out
    assert folders(clone) == set()


def test_an_unknown_command_is_bad_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        lab.main(["tset"])
    assert "tset" in capsys.readouterr().err
