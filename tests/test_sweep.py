"""A notebook run over seeds: the results file, and what a kill, a fault or a stale file does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from labkit import paths
from labkit.errors import LabkitError
from labkit.notebooks import sweep as module
from labkit.notebooks.normalise import dumps
from labkit.notebooks.sweep import SweepError, sweep
from labkit.notebooks.sweep_command import main, parse_seeds

EXPERIMENT = """
import os
from labkit.claims import expect, record, record_claim, record_learning_rates
seed = int(os.environ["LABKIT_SEED"])
record("score", 0.5 + 0.1 * seed)
record("curve", [seed, 2 * seed])
record_claim("full-learns-d1", 0.95 + 0.01 * seed)
record_learning_rates("full", {1e-3: 0.5 + seed, 1e-2: 0.9}, 1e-2 if seed else 1e-3)
expect("the seed is small", seed, 0, tol=1)
open("runs.txt", "a").write(f"{seed} {os.environ.get('OMP_NUM_THREADS')}\\n")
"""


def write(path: Path, source: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source)]
    path.write_bytes(dumps(nbformat.v4.new_notebook(cells=cells)))
    return path


@pytest.fixture
def places(tmp_path):
    """Keyword arguments that keep results and finished seeds inside the test's folder."""
    return {"out": tmp_path / "results", "cache": tmp_path / "cache"}


@pytest.fixture
def fake_run(monkeypatch):
    """Seeds that cost nothing: record one metric and one claim; fails for the seeds it holds."""
    failing, ran = set(), []

    def run(path, seed, *, one_thread):
        ran.append(seed)
        if seed in failing:
            raise module.RunError(
                f"cell 3: KeyError: seed {seed}", "\x1b[31mline one\x1b[0m\nline two"
            )
        recorded = {"metrics": {"m": seed / 2}, "claims": {}, "learning_rates": {}, "misses": []}
        return {"seed": seed, "seconds": 1.5, "peak_bytes": 10 + seed, **recorded}

    monkeypatch.setattr(module, "_run", run)
    return failing, ran


def test_results_hold_every_seed_and_the_verdicts(tmp_path, places):
    path = write(tmp_path / "99_demo.ipynb", EXPERIMENT)
    before = path.read_bytes()

    results = sweep(path, [0, 1, 2], **places)

    assert json.loads((tmp_path / "results" / "99_demo.json").read_text("utf-8")) == results
    assert path.read_bytes() == before
    assert results["notebook"] == "99_demo"
    assert results["seeds"] == [0, 1, 2]
    score = results["metrics"]["score"]
    assert score["values"] == pytest.approx([0.5, 0.6, 0.7])
    assert score["mean"] == pytest.approx(0.6)
    # Student's t for 2 degrees of freedom is 4.303; the standard error is 0.1 / sqrt(3).
    assert score["interval"] == pytest.approx([0.6 - 0.2484, 0.6 + 0.2484], abs=1e-4)
    assert results["metrics"]["curve"] == {
        "values": [[0, 0], [1, 2], [2, 4]],
        "mean": None,
        "interval": None,
    }
    (claim,) = results["claims"]
    assert (claim["id"], claim["verdict"]) == ("full-learns-d1", "holds")
    assert claim["value"] == pytest.approx(0.96)
    assert claim["bar"] == 0.90
    rates = results["learning_rates"]["full"]
    assert rates["tried"] == {"0.001": [0.5, 1.5, 2.5], "0.01": [0.9, 0.9, 0.9]}
    assert (rates["chosen"], rates["chosen_per_seed"]) == (0.01, [0.001, 0.01, 0.01])
    assert [miss["seed"] for miss in results["misses"]] == [2]
    assert set(results["versions"]) >= {"python", "torch", "trl"}
    assert {"base_model_sha256", "data_sha256", "seconds"} <= results.keys()
    assert results["precision"] in ("bf16", "fp32")


def test_every_seed_trains_in_the_precision_that_the_results_name(tmp_path, places, monkeypatch):
    cell = (
        "import os; from labkit import claims\nclaims.record('in', os.environ['LABKIT_PRECISION'])"
    )
    path = write(tmp_path / "99_demo.ipynb", cell)
    monkeypatch.setenv("LABKIT_PRECISION", "fp32")
    results = sweep(path, [0, 1], **places)
    assert results["precision"] == "fp32"
    assert results["metrics"]["in"]["values"] == ["fp32", "fp32"]


def test_two_kernels_at_a_time_give_the_same_results_in_one_thread_each(tmp_path, places):
    path = write(tmp_path / "99_demo.ipynb", EXPERIMENT)

    results = sweep(path, [3, 1], jobs=2, **places)

    assert results["seeds"] == [3, 1]
    assert results["metrics"]["score"]["values"] == pytest.approx([0.8, 0.6])
    assert sorted((tmp_path / "runs.txt").read_text().splitlines()) == ["1 1", "3 1"]


def test_finished_seeds_are_not_run_again(tmp_path, places, fake_run):
    path = write(tmp_path / "99_demo.ipynb", "x = 1")
    _, ran = fake_run

    first = sweep(path, [0, 1], **places)
    more = sweep(path, [0, 1, 2], **places)
    sweep(path, [0, 1], fresh=True, **places)

    assert ran == [0, 1, 2, 0, 1]
    assert first["metrics"]["m"]["values"] == [0, 0.5]
    assert more["metrics"]["m"]["values"] == [0, 0.5, 1]
    assert (more["seconds"], more["peak_bytes"]) == (4.5, 12)


@pytest.mark.parametrize("damage", ["", '{"seed": 0', "[]", '{"seed": 0, "inputs": {}}'])
def test_a_damaged_seed_is_run_again(tmp_path, places, fake_run, damage):
    path = write(tmp_path / "99_demo.ipynb", "x = 1")
    sweep(path, [0, 1], **places)
    (places["cache"] / "seed-0.json").write_text(damage, encoding="utf-8")

    sweep(path, [0, 1], **places)

    assert fake_run[1] == [0, 1, 0]


def test_changed_code_or_data_or_model_makes_seeds_stale_but_prose_and_exercises_do_not(
    tmp_path, places, fake_run, monkeypatch
):
    data = tmp_path / "data"
    (data / "tasks").mkdir(parents=True)
    (data / "base_model").mkdir()
    monkeypatch.setenv("LABKIT_DATA", str(data))
    path = write(tmp_path / "99_demo.ipynb", "x = 1")
    _, ran = fake_run

    def seeds_run_after(change) -> int:
        before = len(ran)
        change()
        sweep(path, [0, 1], **places)
        return len(ran) - before

    cells = [nbformat.v4.new_markdown_cell("words"), nbformat.v4.new_code_cell("x = 1")]
    cells += [
        nbformat.v4.new_code_cell("steps = ...", metadata={"tags": ["exercise"]}),
        nbformat.v4.new_code_cell("steps = 5", metadata={"tags": ["solution"]}),
    ]
    nb = nbformat.v4.new_notebook(cells=cells)
    assert seeds_run_after(lambda: None) == 2
    assert seeds_run_after(lambda: path.write_bytes(dumps(nb))) == 0
    assert seeds_run_after(lambda: write(path, "x = 2")) == 2
    assert seeds_run_after(lambda: (data / "tasks" / "manifest.json").write_text("1")) == 2
    assert seeds_run_after(lambda: (data / "base_model/model.safetensors").write_text("1")) == 2
    assert seeds_run_after(lambda: None) == 0


def test_a_failed_seed_is_named_and_the_others_are_kept(tmp_path, places, fake_run):
    path = write(tmp_path / "99_demo.ipynb", "x = 1")
    failing, ran = fake_run
    failing.add(1)

    with pytest.raises(SweepError, match="seed 1 failed, the other 2 are kept") as raised:
        sweep(path, [0, 1, 2], **places)

    assert "seed 1:\nline one\nline two\ncell 3: KeyError: seed 1" in str(raised.value)
    assert not places["out"].exists()
    failing.clear()
    assert sweep(path, [0, 1, 2], **places)["seeds"] == [0, 1, 2]
    assert ran == [0, 1, 2, 1]


def test_a_cell_that_raises_fails_its_seed_with_the_traceback(tmp_path, places):
    path = write(
        tmp_path / "99_demo.ipynb", "import os\nvalue = 1 / int(os.environ['LABKIT_SEED'])"
    )

    with pytest.raises(SweepError, match="seed 0 failed, the other 1 are kept") as raised:
        sweep(path, [0, 1], **places)

    assert "ZeroDivisionError: division by zero" in str(raised.value)
    assert [file.name for file in places["cache"].iterdir()] == ["seed-1.json"]


def test_seeds_that_record_different_names_are_refused(tmp_path, places):
    source = (
        "import os\nfrom labkit.claims import record\nrecord('m' + os.environ['LABKIT_SEED'], 1)"
    )
    path = write(tmp_path / "99_demo.ipynb", source)

    with pytest.raises(SweepError, match="seeds 0 and 1 did not both record the metrics m0, m1"):
        sweep(path, [0, 1], **places)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a POSIX signal")
def test_a_killed_sweep_continues_with_the_seeds_that_are_missing(tmp_path, places):
    # Seed 1 waits until it is killed the first time, and finishes the second time.
    path = write(
        tmp_path / "99_demo.ipynb",
        "import os, time\nfrom labkit.claims import record\n"
        "if os.environ['LABKIT_SEED'] == '1' and not os.path.exists('killed'):\n"
        "    open('waiting', 'w').close()\n    time.sleep(60)\n"
        "record('m', 1)\nopen('ran-' + os.environ['LABKIT_SEED'], 'a').write('x')",
    )
    code = (
        "import sys\nfrom pathlib import Path\nfrom labkit.notebooks.sweep import sweep\n"
        "path, out, cache = map(Path, sys.argv[1:])\nsweep(path, [0, 1], out=out, cache=cache)"
    )
    command = [sys.executable, "-c", code, str(path), str(places["out"]), str(places["cache"])]
    env = {**os.environ, "PYTHONPATH": str(paths.root())}
    child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "waiting").exists():
        assert child.poll() is None and time.monotonic() < deadline, "seed 1 never started"
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (tmp_path / "killed").touch()

    results = sweep(path, [0, 1], **places)

    assert results["metrics"]["m"]["values"] == [1, 1]
    assert (tmp_path / "ran-0").read_text() == "x"  # not run a second time


def test_callers_mistakes_are_named(tmp_path, places):
    path = write(tmp_path / "99_demo.ipynb", "x = 1")
    with pytest.raises(ValueError, match=r"seeds=\[0\]: name two or more"):
        sweep(path, [0], **places)
    with pytest.raises(ValueError, match="each once"):
        sweep(path, [0, 0, 1], **places)
    with pytest.raises(ValueError, match="jobs=0"):
        sweep(path, [0, 1], jobs=0, **places)
    with pytest.raises(LabkitError, match="no such notebook"):
        sweep(tmp_path / "none.ipynb", [0, 1], **places)


def test_parse_seeds():
    assert parse_seeds("0-4") == [0, 1, 2, 3, 4]
    assert parse_seeds("0,2, 5-6") == [0, 2, 5, 6]
    with pytest.raises(ValueError, match="want numbers and ranges"):
        parse_seeds("a-b")


def test_command_line_prints_verdicts_and_names_failures(tmp_path, monkeypatch, capsys, fake_run):
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(module.paths, "root", lambda: tmp_path)
    path = write(tmp_path / "99_demo.ipynb", "x = 1")

    assert main([str(path), "--seeds", "0-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["seeds"] == [0, 1]
    assert (tmp_path / "data/results/99_demo.json").exists()
    fake_run[0].add(2)
    assert main([str(path), "--seeds", "1-2"]) == 1
    assert "seed 2 failed" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(path), "--seeds", "many"])
