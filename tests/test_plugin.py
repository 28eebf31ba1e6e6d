"""The strict nbval plugin, tested by running pytest on small notebooks."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nbformat
import pytest

from labkit import paths
from labkit.notebooks.normalise import dumps

# name -> (source of a cell, what it is stored to have printed, part of the complaint about it).
# A complaint of None means that the cell passes; a stored text of None, that it never ran.
CASES = {
    "same text": ("print('one')", "one\n", None),
    "stderr only": ("import os, sys\nprint(os.getpid(), file=sys.stderr)", "", None),
    "changed fact": ("print('rows 801')", "rows 800\n", "Cell outputs differ"),
    "changed decimal": ("print('loss 1.23')", "loss 1.24\n", "Cell outputs differ"),
    "missing line": ("print('steps')", "steps\nmore\n", "Cell outputs differ"),
    "marked number": ("print('loss ≈1.23')", "loss ≈1.31\n", None),
    "marked number in a column": ("print('loss  ≈-0.10')", "loss ≈12.00\n", None),
    "marked number that is none": ("print('≈nan')", "≈1.31\n", "Cell outputs differ"),
    "clock time": ("import time\nprint(f'{time.time():.2f} s')", "1.00 s\n", None),
    "address": ("print(object())", "<object object at 0x7f0000000000>\n", None),
    "machine line": ("import os\nprint(f'machine: {os.getpid()}')", "machine: 1\n", None),
    "mistyped magic": ("%matplotlob inline", "", "`%matplotlob` not found"),
    "exception": ("1 / 0", "", "division by zero"),
    "never ran": ("x = 1", None, "the cell was never run"),
    "empty cell": ("", None, None),
    "skipped": ("# NBVAL_SKIP\nx = 1", "", "not tested: remove the marker"),
    "clear_output": (
        "from IPython.display import clear_output\nclear_output()",
        "",
        "clear_output changes output already shown",
    ),
    "display id": (
        "from IPython.display import display\nshown = display(display_id='a')\nshown.update(1)",
        "",
        "update_display_data changes output already shown",
    ),
    "20,000 lines": (
        "for n in range(20_000):\n    print(n, flush=True)",
        "".join(f"{n}\n" for n in range(20_000)),
        None,
    ),
    "callers settings": (
        "import os\nprint(sorted(k for k in os.environ if k.startswith('LABKIT_')))",
        "[]\n",
        None,
    ),
}


def write(path: Path, *cells: tuple[str, str | None], tags: tuple[str, ...] = ()) -> Path:
    """Write a notebook of (source, what it is stored to have printed) cells."""
    nb = nbformat.v4.new_notebook()
    for count, (source, printed) in enumerate(cells, start=1):
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})
        cell.execution_count = None if printed is None else count
        if printed:
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=printed)]
        nb.cells.append(cell)
    path.write_bytes(dumps(nb))
    return path


def validate(path: Path, *options: str, **env: str) -> list[str]:
    """Run the plugin on a notebook in a pytest process of its own: the complaint of each cell."""
    config = path.with_name("pytest.ini")
    config.write_text("[pytest]\nfilterwarnings = error\n", encoding="utf-8")
    report = path.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-p", "labkit.notebooks.plugin", "--nbval"]
    command += [
        "-p",
        "no:cacheprovider",
        "--color=no",
        f"--junit-xml={report}",
        *options,
        path.name,
    ]
    environment = {**os.environ, "PYTHONPATH": str(paths.root()), **env}
    subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, timeout=300)
    cases = ElementTree.parse(report).iter("testcase")
    return ["".join(failure.text or "" for failure in case) for case in cases]


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the plugin says about every case; each is one cell of one notebook."""
    cells = [(source, printed) for source, printed, _ in CASES.values()]
    path = write(tmp_path_factory.mktemp("cases") / "cases.ipynb", *cells)
    settings = {"LABKIT_SEED": "9", "LABKIT_MODEL": "other", "LABKIT_SWEEP": "1"}
    return dict(zip(CASES, validate(path, **settings), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_each_cell_passes_or_fails_for_its_own_reason(complaints, name):
    expected = CASES[name][2]

    if expected is None:
        assert complaints[name] == ""
    else:
        assert expected in complaints[name]


def test_a_dead_kernel_is_noticed_within_seconds_and_named_in_later_cells(tmp_path):
    path = write(tmp_path / "dead.ipynb", ("import os", ""), ("os._exit(3)", ""), ("x = 1", ""))

    alive, died, dead = validate(path)

    assert alive == ""
    assert "the kernel died: look for a crash" in died
    assert "the kernel died in an earlier cell" in dead
    cases = ElementTree.parse(tmp_path / "dead.xml").iter("testcase")
    assert [float(case.attrib["time"]) < 15 for case in cases][1:] == [True, True]


def test_a_cell_that_takes_too_long_fails(tmp_path):
    path = write(tmp_path / "slow.ipynb", ("import time\ntime.sleep(60)", ""))

    (complaint,) = validate(path, "--nbval-cell-timeout=2")

    assert "Timeout of 2 seconds exceeded" in complaint


def test_an_expected_exception_passes_only_if_it_is_the_stored_one(tmp_path):
    path = write(
        tmp_path / "raises.ipynb", ("1 / 0", ""), ("1 / 0", ""), tags=("raises-exception",)
    )
    nb = nbformat.read(path, as_version=4)
    for cell, words in zip(nb.cells, ["division by zero", "another"], strict=True):
        error = {"ename": "ZeroDivisionError", "evalue": words, "traceback": []}
        cell.outputs = [nbformat.v4.new_output("error", **error)]
    path.write_bytes(dumps(nb))

    same, another = validate(path)

    assert same == ""
    assert "Cell outputs differ" in another


def test_a_kernel_computes_in_one_thread_whatever_the_caller_has(tmp_path):
    source = "import os\nprint(os.environ['OMP_NUM_THREADS'])"
    path = write(tmp_path / "threads.ipynb", (source, "1\n"))
    assert validate(path, OMP_NUM_THREADS="7") == [""]
