"""The canonical form of a notebook, and executing a notebook into it."""

import copy
import subprocess
import sys

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from labkit.errors import LabkitError
from labkit.notebooks import normalise as module
from labkit.notebooks.normalise import dumps, normalise, read, sanitise, settle
from labkit.notebooks.run import RunError, execute, main, resident_bytes

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def stream(text: str, name: str = "stdout") -> nbformat.NotebookNode:
    return new_output("stream", name=name, text=text)


@pytest.fixture
def messy() -> nbformat.NotebookNode:
    """A notebook as an editor leaves it."""
    first = new_code_cell("print(1)", execution_count=17, id="first")
    first.metadata = nbformat.from_dict(
        {"tags": ["exercise"], "collapsed": False, "execution": {"iopub.status.busy": "now"}}
    )
    first.outputs = [stream("1\n"), stream("warning\n", "stderr"), stream(" 50%\r100%\n2\n")]
    second = new_code_cell("widget", execution_count=23, id="second")
    view = {"text/plain": "HTML()", WIDGET_VIEW: {"model_id": "abc"}}
    second.outputs = [
        new_output("execute_result", data=view, execution_count=23),
        stream("\n"),
        stream("only a warning\n", "stderr"),
    ]
    unrun = new_code_cell("never = 'ran'", id="unrun")
    nb = new_notebook(cells=[new_markdown_cell("# T", id="title"), first, unrun, second])
    nb.metadata = nbformat.from_dict(
        {
            "widgets": {"application/vnd.jupyter.widget-state+json": {"state": {}}},
            "kernelspec": {"display_name": "my env", "name": "my-env", "language": "python"},
            "language_info": {"name": "python", "version": "3.12.1"},
            "vscode": {"interpreter": "x"},
            "labkit": {"minutes": 2},
        }
    )
    return nb


def test_normalise_leaves_only_what_is_worth_committing(messy):
    nb = normalise(messy)

    title, first, unrun, second = nb.cells
    assert [cell.id for cell in nb.cells] == ["title", "first", "unrun", "second"]
    assert [first.execution_count, unrun.execution_count, second.execution_count] == [1, None, 2]
    assert first.metadata == {"tags": ["exercise"]}
    assert first.outputs == [stream("1\n100%\n2\n")]
    assert second.outputs[0].data == {"text/plain": "HTML()"}
    assert second.outputs[0].execution_count == 2
    assert second.outputs[1:] == [stream("\n")]
    assert nb.metadata.labkit == {"minutes": 2}
    assert set(nb.metadata) == {"kernelspec", "language_info", "labkit"}
    assert nb.metadata.kernelspec.name == "python3"


def test_normalise_is_idempotent_and_leaves_its_input_alone(messy):
    before = copy.deepcopy(messy)

    once = normalise(messy)

    assert messy == before
    assert dumps(normalise(once)) == dumps(once)


def test_missing_and_doubled_ids_are_replaced_the_same_way_each_time():
    nb = new_notebook()
    nb.cells = [new_code_cell(source, id="x") for source in "abc"]
    del nb.cells[0]["id"]

    ids = [cell.id for cell in normalise(nb).cells]

    assert len(set(ids)) == 3
    assert ids == [cell.id for cell in normalise(copy.deepcopy(nb)).cells]


def test_settle_keeps_old_times_but_takes_new_results_and_pictures():
    def outputs(seconds, loss, picture):
        cell = new_code_cell("train()", execution_count=1, id="train")
        shown = {"text/plain": f"<Figure at 0x7f{seconds:010d}>", "image/png": picture}
        cell.outputs = [stream(f"took {seconds} s\n"), stream(f"loss ≈{loss} after {seconds} s\n")]
        cell.outputs.append(new_output("display_data", data=shown))
        return new_notebook(cells=[cell])

    old, new = outputs(3, 0.5, "old"), outputs(4, 0.6, "new")
    settled = settle(new, old).cells[0].outputs

    assert settled[0].text == "took 3 s\n"
    assert settled[1].text == "loss ≈0.6 after 4 s\n"
    assert settled[2].data == {"text/plain": "<Figure at 0x7f0000000003>", "image/png": "new"}
    assert new.cells[0].outputs[0].text == "took 4 s\n"


@pytest.mark.parametrize(
    ("text", "sanitised"),
    [
        ("loss ≈1.23.", "loss ≈number."),
        ("≈-0.5 and ≈1.2e-05 and ≈1,234", " ≈number and ≈number and ≈number"),
        ("≈nan", "≈nan"),
        ("0.93", "0.93"),
        (
            "took 1.25 s, 12.3it/s, 4,000 tokens/s, 3 min",
            "took time s, timeit/s, time tokens/s, time min",
        ),
        ("100 steps, 12 rows", "100 steps, 12 rows"),
        ("at 10:30", "at 10:30"),
        ("[00:01<00:02]", "[time<time]"),
        ("<A at 0x7f3a2b1c0d9e>", "<A at 0xaddress>"),
        ("{'train_runtime': '3.2', 'loss': 1}", "{'train_runtime': time, 'loss': 1}"),
        ("/a/b/site-packages/torch/x.py:3", "site-packages/torch/x.py:3"),
        ("/tmp/ipykernel_12/34.py:1", "cell.py:1"),
        ("a\nmachine: 2 cores\nb", "a\nmachine: facts\nb"),
    ],
)
def test_sanitisers_replace_what_may_differ_and_nothing_else(text, sanitised):
    assert sanitise(text) == sanitised


def test_a_broken_file_is_named(tmp_path):
    with pytest.raises(LabkitError, match="no such notebook"):
        read(tmp_path / "none.ipynb")
    (tmp_path / "half.ipynb").write_text('{"cells": [', encoding="utf-8")
    with pytest.raises(LabkitError, match="half.ipynb: not a notebook .*restore it from git"):
        read(tmp_path / "half.ipynb")


def test_command_line_checks_and_then_normalises(tmp_path, messy, capsys):
    path = tmp_path / "messy.ipynb"
    path.write_bytes(dumps(messy))
    before = path.read_bytes()

    assert module.main([str(path), "--check"]) == 1
    assert path.read_bytes() == before
    assert module.main([str(path)]) == 0
    assert module.main([str(path), "--check"]) == 0
    assert "messy.ipynb: not normalised" in capsys.readouterr().out


def write(path, *sources):
    path.write_bytes(dumps(new_notebook(cells=[new_code_cell(source) for source in sources])))
    return path


def test_execute_stores_normalised_outputs_and_a_second_run_changes_no_byte(tmp_path):
    path = write(
        tmp_path / "nb.ipynb",
        "import os, sys, time\nprint(os.environ['LABKIT_SEED'], os.environ['EXTRA'])",
        "print('careful', file=sys.stderr)\nprint(f'{time.perf_counter():.3f} s {object()}')",
        "block = bytearray(150 * 2**20)\ntime.sleep(0.3)",
        "from labkit import paths\nos.path.samefile(os.getcwd(), os.environ['HERE'])",
    )
    env = {"EXTRA": "yes", "HERE": str(tmp_path)}

    run = execute(path, env=env, seed=3)
    first = path.read_bytes()
    execute(path, env=env, seed=3)

    assert path.read_bytes() == first
    cells = read(path).cells
    assert cells[0].outputs[0].text == "3 yes\n"
    assert cells[3].outputs[0].data["text/plain"] == "True"
    assert [cell.execution_count for cell in cells] == [1, 2, 3, 4]
    assert run.warnings == ("careful\n",)
    assert 150 * 2**20 < run.peak_bytes < 600 * 2**20
    assert [cell_id for cell_id, _ in run.cell_seconds] == [cell.id for cell in cells]


def test_memory_counts_what_a_child_holds_and_shared_libraries_once():
    code = "x = bytearray(b'1' * 100_000_000); print('ready', flush=True); input()"
    before = resident_bytes(psutil.Process())
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "ready\n"
        more = resident_bytes(psutil.Process()) - before
        info = psutil.Process(child.pid).memory_info()
    finally:
        child.communicate("\n")
    assert 100e6 < more < 130e6
    if hasattr(info, "shared"):
        assert more == pytest.approx(info.rss - info.shared, abs=3e6)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", r"nb.ipynb: cell 1 \(.*\): ZeroDivisionError: division by zero"),
        ("import os\nos._exit(3)", "cell 1 .*the kernel died"),
        ("import time\ntime.sleep(60)", "cell 1 .*took longer than 2 s"),
        ("%matplotlob", "UsageError: Line magic function"),
    ],
)
def test_a_run_that_fails_names_the_cell_and_leaves_the_file(tmp_path, source, message):
    path = write(tmp_path / "nb.ipynb", "x = 1", source)
    before = path.read_bytes()

    with pytest.raises(RunError, match=message):
        execute(path, timeout=2)

    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["nb.ipynb"]


def test_run_command_line_reports_cost_and_failure(tmp_path, capsys):
    assert main([str(write(tmp_path / "ok.ipynb", "1")), "--json"]) == 0
    assert '"notebook": "ok.ipynb", "seconds": ' in capsys.readouterr().out
    assert main([str(write(tmp_path / "bad.ipynb", "1 / 0"))]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
