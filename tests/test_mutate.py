"""Deliberate mistakes: the machinery on a toy repository, then the course's own quick ones."""

import re
from pathlib import Path

import nbformat
import pytest

from labkit import paths
from labkit.errors import LabkitError
from labkit.notebooks import mutate
from labkit.notebooks.mutate import (
    MUTATIONS,
    Mutation,
    copy_repository,
    replace_once,
    replacing,
    run,
)


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """A repository of one module with one test, and an empty registry."""
    monkeypatch.setattr(mutate, "MUTATIONS", {})
    root = tmp_path / "toy"
    (root / "tests").mkdir(parents=True)
    (root / "toy.py").write_text("def add(a, b):\n    return a + b\n", encoding="utf-8")
    (root / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    (root / "tests" / "test_toy.py").write_text(
        "from toy import add\n\n"
        "def test_add():\n    assert add(2, 3) == 5\n\n"
        "def test_zero():\n    assert add(0, 0) == 0\n",
        encoding="utf-8",
    )
    return root


def test_mutations_are_caught_or_survive_or_prove_nothing(toy):
    before = {path: path.read_bytes() for path in toy.rglob("*.py")}
    replacing("minus", "subtracts", "toy.py", "a + b", "a - b", "tests/test_toy.py::test_add")
    replacing("unseen", "subtracts", "toy.py", "a + b", "a - b", "tests/test_toy.py::test_zero")
    replacing("crash", "does not import", "toy.py", "def add", "def", "tests/test_toy.py::test_add")
    lines: list[str] = []

    outcomes = {outcome.name: outcome for outcome in run(root=toy, progress=lines.append)}

    assert {name: outcome.verdict for name, outcome in outcomes.items()} == {
        "minus": "caught",
        "unseen": "survived",
        "crash": "broken",
    }
    assert outcomes["minus"].detail == ""
    assert "1 passed" in outcomes["unseen"].detail
    assert "SyntaxError" in outcomes["crash"].detail
    assert lines[1].startswith("caught    minus (")
    assert {path: path.read_bytes() for path in toy.rglob("*.py")} == before


def test_names_and_quick_choose(toy):
    replacing("slow", "subtracts", "toy.py", "a + b", "a - b", "tests/test_toy.py")
    replacing("fast", "subtracts", "toy.py", "a + b", "a - b", "tests/test_toy.py", quick=True)

    assert [outcome.name for outcome in run(quick=True, root=toy)] == ["fast"]
    assert run(["slow"], quick=True, root=toy) == []
    with pytest.raises(ValueError, match="no mutation 'other': `labkit mutate --list`"):
        run(["other"], root=toy)


def test_tests_that_fail_anyway_prove_nothing(toy):
    (toy / "toy.py").write_text("def add(a, b):\n    return a + b + 1\n", encoding="utf-8")
    replacing("minus", "subtracts", "toy.py", "a + b", "a - b", "tests/test_toy.py")

    with pytest.raises(LabkitError, match="tests fail without any mutation"):
        run(root=toy)


def test_a_mutation_that_no_longer_fits_fails_loudly(toy):
    replacing("gone", "", "toy.py", "a * b", "a - b", "tests/test_toy.py")

    with pytest.raises(LabkitError, match=r"toy.py: 'a \* b' occurs 0 times, not once"):
        run(root=toy)
    with pytest.raises(LabkitError, match="'a' occurs 3 times"):
        replace_once(toy / "toy.py", "a", "b")


def test_notebooks_are_changed_in_their_cells_only(tmp_path):
    path = tmp_path / "nb.ipynb"
    cell = nbformat.v4.new_code_cell('rate = 1e-3\nname = "x"', execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="rate = 1e-3\n")]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)

    replace_once(path, 'rate = 1e-3\nname = "x"', 'rate = 5e-4\nname = "y"')

    (changed,) = nbformat.read(path, as_version=4).cells
    assert changed.source == 'rate = 5e-4\nname = "y"'
    assert changed.outputs[0].text == "rate = 1e-3\n"


def test_the_registry_refuses_doubles_and_mutations_without_tests(toy):
    replacing("minus", "subtracts", "toy.py", "a + b", "a - b", "tests/test_toy.py")

    with pytest.raises(ValueError, match="'minus' is already registered"):
        replacing("minus", "subtracts", "toy.py", "a + b", "a - b", "tests/test_toy.py")
    with pytest.raises(ValueError, match="'untested' names no tests"):
        mutate.register(Mutation("untested", "", (), lambda folder: None, ()))


def test_copies_leave_out_what_was_built(toy, tmp_path):
    for name in (".venv/lib/x.py", "__pycache__/x.pyc", "workbook/mine.ipynb", "data/rows.jsonl"):
        (toy / name).parent.mkdir(parents=True, exist_ok=True)
        (toy / name).write_text("x", encoding="utf-8")

    copied = copy_repository(toy, tmp_path / "copy")

    names = {path.relative_to(copied).as_posix() for path in copied.rglob("*") if path.is_file()}
    assert names == {"toy.py", "pytest.ini", "tests/test_toy.py", "data/rows.jsonl"}


def test_command_line_fails_when_one_survives(toy, monkeypatch, capsys):
    monkeypatch.setattr(mutate.paths, "root", lambda: toy)
    replacing("minus", "subtracts", "toy.py", "a + b", "a - b", "tests/test_toy.py::test_add")
    assert mutate.main([]) == 0
    assert "1 of 1 mutations caught" in capsys.readouterr().out

    replacing("unseen", "subtracts", "toy.py", "a + b", "a - b", "tests/test_toy.py::test_zero")
    assert mutate.main(["unseen", "--json"]) == 1
    assert '"verdict": "survived"' in capsys.readouterr().out
    assert mutate.main(["--list"]) == 0
    assert "minus: subtracts" in capsys.readouterr().out
    assert mutate.main(["other"]) == 2


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=lambda mutation: mutation.name)
def test_every_mutation_of_the_course_fits_the_code_and_its_tests_exist(mutation, tmp_path):
    for name in mutation.files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((paths.root() / name).read_bytes())

    mutation.apply(tmp_path)

    changed = [
        (tmp_path / n).read_bytes() != (paths.root() / n).read_bytes() for n in mutation.files
    ]
    assert all(changed)
    for argument in mutation.tests:
        if argument.startswith("tests/"):
            file, _, function = argument.partition("::")
            source = (paths.root() / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {re.escape(function.split('[')[0])}", source, re.MULTILINE)


def test_quick_mutations_of_the_course_are_caught():
    outcomes = run(quick=True)

    assert len(outcomes) >= 5
    assert {outcome.name: outcome.verdict for outcome in outcomes} == {
        outcome.name: "caught" for outcome in outcomes
    }, "\n".join(outcome.detail for outcome in outcomes)
