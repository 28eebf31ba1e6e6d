"""The doctor finds what is wrong, says what to do, and survives whatever it meets."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from labkit import cli, doctor, paths
from labkit.doctor import Finding, examine


@pytest.fixture
def course_data(tmp_path, monkeypatch):
    """A small whole data folder, which a test may damage."""
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    (tmp_path / "base_model").mkdir()
    (tmp_path / "base_model" / "config.json").write_bytes(b"{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    (tmp_path / "base_model" / "SHA256SUMS").write_text(f"{digest}  config.json\n")
    (tmp_path / "tasks" / "d1").mkdir(parents=True)
    (tmp_path / "tasks" / "d1" / "test.jsonl").write_bytes(b"{}\n")
    digest = hashlib.sha256(b"{}\n").hexdigest()
    manifest = {"d1/test.jsonl": {"sha256": digest, "rows": 1}}
    (tmp_path / "tasks" / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def finding(name: str) -> Finding:
    return doctor._run(name, doctor.CHECKS[name])


def test_doctor_examines_everything_once(course_data):
    findings = examine()
    assert [found.name for found in findings] == list(doctor.CHECKS)
    assert {found.status for found in findings} <= {"ok", "note", "problem"}
    assert all(found.next_step for found in findings if found.status != "ok")
    assert all("\n" not in found.detail + found.next_step for found in findings)


def test_doctor_a_check_that_breaks_is_a_finding_and_not_the_end(monkeypatch):
    def breaks():
        raise RuntimeError("no such thing\nas this")

    monkeypatch.setitem(doctor.CHECKS, "cores", breaks)
    by_name = {found.name: found for found in examine()}
    expected = "could not be checked (RuntimeError: no such thing)"
    assert (by_name["cores"].status, by_name["cores"].detail) == ("problem", expected)
    assert by_name["Python"].status == "ok"


def test_doctor_accepts_a_whole_course(course_data):
    assert finding("base model").status == "ok"
    assert finding("tasks").detail == "1 files, 1 rows, unchanged"


@pytest.mark.parametrize(
    ("damage", "name", "detail"),
    [
        (lambda d: shutil.rmtree(d / "base_model"), "base model", "base_model is missing"),
        (lambda d: (d / "base_model/SHA256SUMS").unlink(), "base model", "SHA256SUMS is missing"),
        (lambda d: (d / "base_model/config.json").write_text("{ }"), "base model", "config.json"),
        (lambda d: (d / "base_model/config.json").unlink(), "base model", "config.json"),
        (lambda d: (d / "tasks/d1/test.jsonl").write_text("{}"), "tasks", "d1/test.jsonl"),
        (lambda d: (d / "tasks/manifest.json").unlink(), "tasks", "manifest.json is missing"),
    ],
)
def test_doctor_names_what_is_damaged(damage, name, detail, course_data):
    damage(course_data)
    found = finding(name)
    assert found.status == "problem"
    assert detail in found.detail
    assert "git checkout -- data/" in found.next_step


def test_doctor_damaged_manifest_is_a_problem_too(course_data):
    (course_data / "tasks" / "manifest.json").write_text("{")
    assert finding("tasks").status == "problem"


def test_doctor_reads_pins_for_this_system_only(tmp_path):
    file = tmp_path / "constraints.txt"
    file.write_text(
        "# a comment\ntorch==2.13.0\nlate==1 ; python_version >= '3.11'\n"
        "early==1 ; python_version < '3.0'\n"
    )
    assert doctor.read_pins(file) == {"torch": "2.13.0", "late": "1"}


def test_doctor_compares_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=2", "pytest"]\n')
    installed = {"torch": "2.13.0", "pytest": "9.2.0"}
    monkeypatch.setattr(doctor, "_installed", installed.get)

    (tmp_path / "constraints.txt").write_text("torch==2.13.0\npytest==9.2.0\nabsent==1\n")
    assert finding("versions").detail == "all 2 packages of the course as tested"

    (tmp_path / "constraints.txt").write_text("torch==2.12.0\npytest==9.2.0\n")
    found = finding("versions")
    assert (found.status, found.detail) == ("note", "torch 2.13.0 (tested: 2.12.0)")

    del installed["pytest"]
    found = finding("versions")
    assert (found.status, found.detail) == ("problem", "not installed: pytest")
    assert "python3 lab.py" in found.next_step


@pytest.mark.parametrize(
    ("variables", "status", "detail"),
    [
        ({}, "ok", "not needed: model, data and metrics"),
        ({"LABKIT_MODEL": "bundled"}, "ok", "LABKIT_MODEL=bundled is here"),
        ({"LABKIT_MODEL": "some/model"}, "problem", "some/model is no folder"),
        ({"LABKIT_MODEL": "some/model", "HF_HUB_OFFLINE": "0"}, "note", "some/model is no folder"),
        ({"LABKIT_PROFILE": "gpu"}, "note", "comes from Hugging Face"),
    ],
)
def test_doctor_says_whether_the_network_is_needed(variables, status, detail, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = finding("network")
    assert found.status == status
    assert detail in found.detail


def test_doctor_knows_the_profiles_of_labkit(monkeypatch):
    from labkit.models import PROFILES

    assert list(doctor.PROFILE_GPU_BYTES) == list(PROFILES)
    for name, needed in doctor.PROFILE_GPU_BYTES.items():
        assert not needed or f"{needed // doctor.GIB} GiB" in PROFILES[name].note
    monkeypatch.setenv("LABKIT_PROFILE", "huge")
    assert finding("profile").detail == "LABKIT_PROFILE='huge' is unknown"


def test_doctor_says_of_what_trains_whether_it_has_bf16(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setenv("LABKIT_PROFILE", "gpu-small")
    assert finding("bf16").detail == "this GPU has no bf16, so notebooks train in fp32, slower"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert finding("bf16").detail == "this GPU computes in bf16"
    monkeypatch.setenv("LABKIT_PROFILE", "cpu")  # then the CPU trains, whatever GPU there is
    assert finding("bf16").detail.startswith("bf16 on this CPU is")


def test_doctor_profile_that_does_not_fit(monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so a GPU profile may fit")
    monkeypatch.setenv("LABKIT_PROFILE", "gpu")
    found = finding("profile")
    assert (found.status, found.next_step) == ("problem", "set LABKIT_PROFILE=cpu")


def test_doctor_sees_a_port_in_use(monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(doctor, "LAB_PORT", server.getsockname()[1])
        monkeypatch.delenv("JPY_PARENT_PID", raising=False)
        assert finding("port").status == "note"
        monkeypatch.setenv("JPY_PARENT_PID", "1")
        assert finding("port").status == "ok"
    assert "is free" in finding("port").detail


def test_doctor_finds_memory_and_disk_short(monkeypatch):
    import psutil

    class Memory:
        total, available = 4 * doctor.GIB, doctor.GIB

    class Disk:
        free = 10**8

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk)
    assert (finding("memory").status, finding("disk").status) == ("problem", "problem")


def test_doctor_reads_a_containers_memory_limit(tmp_path):
    assert doctor.container_limit_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.container_limit_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("2147483648\n")
    assert doctor.container_limit_bytes(tmp_path) == 2 * doctor.GIB


def test_doctor_no_write_permission(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    found = finding("writing")
    assert found.status == "problem"
    assert "cannot be written (Permission denied)" in found.detail


def test_doctor_command_prints_and_exits_1_on_a_problem(monkeypatch, capsys):
    good, bad = Finding("cores", "ok", "2 cores"), Finding("disk", "problem", "full", "free some")
    monkeypatch.setattr(doctor, "examine", lambda: [good])
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ready"
    monkeypatch.setattr(doctor, "examine", lambda: [good, bad])
    assert cli.main(["doctor"]) == 1
    assert "-> free some" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 1
    got = json.loads(capsys.readouterr().out)
    assert got["ready"] is False
    assert got["findings"][1] == {
        "name": "disk",
        "status": "problem",
        "detail": "full",
        "next_step": "free some",
    }


def test_doctor_needs_no_transformers(course_data):
    """Which alone would take it longer than everything that it looks at."""
    code = "import sys; from labkit.doctor import examine; examine()\n"
    code += "print('transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(paths.root())},
    )
    assert done.stdout.strip() == "False"
