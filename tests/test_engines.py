"""Where seeds run: threads here, and the real Ray with two workers, give the same and lose nothing.

One Ray serves the whole file: starting it takes longer than everything that is done with it.
"""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest

from labkit.notebooks import sweep as module
from labkit.notebooks.engines import EngineError, LocalEngine, RayEngine, open_engine
from labkit.notebooks.normalise import dumps
from labkit.notebooks.sweep import SweepError, sweep, sweep_together
from labkit.notebooks.sweep_command import main

# Each seed waits until the other one has begun: it ends only if both run at the same time.
SIDE_BY_SIDE = """
import os, time
from pathlib import Path
from labkit.claims import record
began, seed, here = time.time(), int(os.environ["LABKIT_SEED"]), Path({folder!r})
(here / f"began-{{seed}}").touch()
deadline = time.monotonic() + 30
while not (here / f"began-{{1 - seed}}").exists():
    assert time.monotonic() < deadline, "the other seed does not run beside this one"
    time.sleep(0.02)
record("score", 0.5 + 0.1 * seed)
record("threads", int(os.environ["OMP_NUM_THREADS"]))
record("profile", {{"cpu": 1}}.get(os.environ.get("LABKIT_PROFILE"), 0))
record("when and where", [began, time.time(), os.getpid(), os.getppid()])
"""

# Seed 1 fails until the cause is mended; every run leaves a mark.
FAILS_AT_FIRST = """
import os
from pathlib import Path
from labkit.claims import record
seed, here = int(os.environ["LABKIT_SEED"]), Path({folder!r})
with open(here / "runs", "a") as runs:
    runs.write(f"{{seed}} ")
ratio = 1 / (seed - (not (here / "mended").exists()))
record("ratio", ratio)
"""


def write(path: Path, source: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source.format(folder=str(path.parent)))]
    path.write_bytes(dumps(nbformat.v4.new_notebook(cells=cells)))
    return path


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    """A results file names the precision; asking for it loads torch, which has no part in this."""
    fake = SimpleNamespace(pick_precision=lambda: "fp32")
    monkeypatch.setitem(sys.modules, "labkit.models", fake)


@pytest.fixture(scope="module")
def ray():
    """Ray with two workers; at the end nothing of it is left."""
    if not importlib.util.find_spec("ray"):
        pytest.skip("ray is not installed: it has no build for every system")
    home = Path.home() / ".ray"
    before = sorted(home.rglob("*"))
    started = {child.pid for child in psutil.Process().children(recursive=True)}
    with RayEngine(jobs=2) as engine:
        folder = Path(engine._folder)
        assert folder.exists()
        yield engine
    left = [
        child
        for child in psutil.Process().children(recursive=True)
        if child.pid not in started and child.status() != psutil.STATUS_ZOMBIE
    ]
    assert (left, folder.exists(), sorted(home.rglob("*"))) == ([], False, before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    write(folder / "98_side_by_side.ipynb", SIDE_BY_SIDE)
    write(folder / "99_fails_at_first.ipynb", FAILS_AT_FIRST)
    return folder


@pytest.fixture(scope="module")
def first_time(ray, place):
    """Both notebooks, two seeds each, in one sweep; what it said and how it failed."""
    said, notebooks = [], sorted(place.glob("*.ipynb"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SweepError) as raised:
        patch.setenv("LABKIT_PROFILE", "cpu")  # set after the workers began: the parcel brings it
        patch.setitem(sys.modules, "labkit.models", SimpleNamespace(pick_precision=lambda: "fp32"))
        sweep_together(
            notebooks,
            [0, 1],
            place / "data" / "results",
            engine=ray,
            cache=place / ".labkit" / "sweeps",
            progress=said.append,
        )
    return said, raised.value


def record_of(place: Path, name: str, seed: int) -> dict:
    return json.loads((place / ".labkit" / "sweeps" / name / f"seed-{seed}.json").read_text())


@pytest.mark.parametrize("name", ["local", "ray"])
def test_outcomes_come_in_order_and_an_error_ends_its_own_task_only(name, request):
    engine = LocalEngine(2) if name == "local" else request.getfixturevalue("ray")
    began, ended = [], {}

    def double(number):
        if number == 3:
            raise EngineError("three is too much")
        return 2 * number

    outcomes = engine.map(double, [4, 3, 0, 5], began.append, ended.__setitem__)

    assert [outcome.result for outcome in outcomes] == [8, None, 0, 10]
    assert str(outcomes[1].error) == "three is too much"
    assert sorted(began) == [0, 1, 2, 3]
    assert [ended[index] for index in range(4)] == outcomes
    assert engine.map(double, []) == []


def test_ray_names_the_worker_of_an_error_that_nobody_expected(ray):
    (outcome,) = ray.map(json.loads, ["no JSON"])
    assert isinstance(outcome.error, EngineError)
    assert re.fullmatch(
        r"worker [\d.]+ \(process \d+\): Expecting value: line 1 column 1 \(char 0\)",
        str(outcome.error),
    )


def test_ray_runs_two_seeds_at_the_same_time_in_two_processes(place, first_time):
    zero, one = (
        record_of(place, "98_side_by_side", seed)["metrics"]["when and where"] for seed in (0, 1)
    )
    assert max(zero[0], one[0]) < min(zero[1], one[1])
    assert len({os.getpid(), *zero[2:], *one[2:]}) == 5  # this one, two workers, two kernels


def test_ray_writes_the_results_of_a_whole_notebook_and_names_the_seed_that_failed(
    place, first_time
):
    said, error = first_time
    assert [file.name for file in (place / "data" / "results").iterdir()] == [
        "98_side_by_side.json"
    ]
    assert "99_fails_at_first.ipynb: seed 1 failed, the other 1 are kept" in str(error)
    assert "ZeroDivisionError: division by zero" in str(error)
    assert sum("98_side_by_side seed" in line and ": done in" in line for line in said) == 2
    assert any(line.startswith("99_fails_at_first seed 1: failed") for line in said)
    assert not (place / "began-0.json").exists()


def test_ray_continues_with_the_seeds_that_are_missing(ray, place, first_time):
    (place / "mended").touch()
    said = []

    both = sweep_together(
        sorted(place.glob("*.ipynb")),
        [0, 1],
        place / "data" / "results",
        engine=ray,
        cache=place / ".labkit" / "sweeps",
        progress=said.append,
    )

    assert sorted((place / "runs").read_text().split()) == ["0", "1", "1"]
    assert both[1]["metrics"]["ratio"]["values"] == [-1, 1]
    assert sum("already there" in line for line in said) == 3


def test_ray_and_local_give_the_same_results(place, first_time, monkeypatch):
    monkeypatch.setenv("LABKIT_PROFILE", "cpu")

    here = sweep(
        place / "98_side_by_side.ipynb",
        [0, 1],
        place / "local",
        jobs=2,
        cache=place / "local cache",
    )

    there = json.loads((place / "data" / "results" / "98_side_by_side.json").read_text())
    for results in (here, there):
        assert len(results.pop("seconds_per_seed")) == 2
        assert results.pop("seconds") > 0 and results.pop("peak_bytes") > 0
        assert results["metrics"].pop("when and where")
    assert here == there
    assert here["metrics"]["score"]["values"] == pytest.approx([0.5, 0.6])
    assert here["metrics"]["profile"]["values"] == [1, 1]


def test_a_worker_with_other_data_refuses_and_is_named(ray, place, tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "manifest.json").write_text("{}")
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))  # the workers keep the course's own

    with pytest.raises(SweepError) as raised:
        sweep_together(
            [place / "98_side_by_side.ipynb"], [0, 1], engine=ray, cache=tmp_path / "cache"
        )

    lines = str(raised.value).splitlines()
    assert "seed 0, 1 failed, the other 0 are kept" in lines[0]
    assert lines[2].startswith("worker ") and "(process " in lines[2]
    assert "the hash base_model_sha256 is " in lines[2] and "missing here" in lines[2]
    assert lines[2].endswith("bring its copy of the course to the same commit")


def test_command_line_takes_both_notebooks_together(ray, place, first_time, monkeypatch, capsys):
    (place / "mended").touch()
    monkeypatch.setenv("LABKIT_DATA", str(place / "data"))
    monkeypatch.setattr(module.paths, "root", lambda: place)
    monkeypatch.setattr(
        module, "input_hashes", lambda path: record_of(place, path.stem, 0)["inputs"]
    )
    notebooks = [str(path) for path in sorted(place.glob("*.ipynb"))]

    assert main([*notebooks, "--seeds", "0-1", "--engine", "ray", "--json"]) == 0

    printed = capsys.readouterr()
    results = json.loads(printed.out)
    assert [one["notebook"] for one in results] == ["98_side_by_side", "99_fails_at_first"]
    assert printed.err.startswith("98_side_by_side.ipynb, 99_fails_at_first.ipynb: seeds 0, 1")


def test_callers_mistakes_are_named(place, monkeypatch, capsys):
    with pytest.raises(ValueError, match="engine='dask': use local or ray"):
        open_engine("dask")
    with pytest.raises(ValueError, match="belong to engine='ray'"):
        open_engine("local", address="auto")
    with pytest.raises(ValueError, match="jobs=0: want 1 or more"):
        open_engine("ray", jobs=0)
    with pytest.raises(ValueError, match="name each once"):
        sweep_together([place / "a.ipynb", "a.ipynb"], [0, 1], engine=LocalEngine(1))
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert main([str(place / "98_side_by_side.ipynb"), "--engine", "ray"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("ray is not installed: run `python -m pip install -e")
    assert said.count("\n") == 1
