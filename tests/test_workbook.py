"""The learner's copy: no solutions, reproducible, and the learner's own edits are safe."""

import symtable

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from labkit import paths
from labkit.errors import LabkitError
from labkit.notebooks.normalise import dumps, read
from labkit.notebooks.run import execute
from labkit.notebooks.workbook import (
    build_workbook,
    leaked_lines,
    main,
    solution_lines,
    strip_solutions,
)

SOLUTION = "# BEGIN SOLUTION\nhalf = 1000 // 8\n\n# END SOLUTION\nprint('checked', half)"


def tagged(cell: nbformat.NotebookNode, tag: str) -> nbformat.NotebookNode:
    cell.metadata.tags = [tag]
    return cell


def master(title: str = "# Steps") -> nbformat.NotebookNode:
    """A master notebook with one exercise, run."""
    stub = tagged(new_code_cell("half = ...  # your answer\nprint('asked', half)"), "exercise")
    solved = tagged(new_code_cell(SOLUTION), "solution")
    cells = [new_markdown_cell(title), new_code_cell("x = 1\nprint(x)"), stub, solved]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":
            cell.execution_count = number
            cell.outputs = [new_output("stream", name="stdout", text="output\n")]
    return new_notebook(cells=cells)


@pytest.fixture
def folders(tmp_path):
    """A folder with two masters, and one for the workbook that does not exist yet."""
    source = tmp_path / "notebooks"
    source.mkdir()
    for name in ("00_start.ipynb", "02_steps.ipynb"):
        (source / name).write_bytes(dumps(master()))
    return source, tmp_path / "workbook"


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_workbook_has_stubs_and_no_solutions_outputs_or_counts(folders):
    source, target = folders

    report = build_workbook(source, target)

    nb = read(target / "02_steps.ipynb")
    assert report.written == ("00_start.ipynb", "02_steps.ipynb")
    assert [cell.id for cell in nb.cells] == ["cell-0", "cell-1", "cell-2"]
    assert nb.cells[2].source == "half = ...  # your answer\nprint('asked', half)"
    assert all(not c.outputs and c.execution_count is None for c in nb.cells[1:])
    assert "1000 // 8" not in (target / "02_steps.ipynb").read_text(encoding="utf-8")


def test_building_twice_gives_the_same_bytes(folders, tmp_path):
    source, target = folders
    build_workbook(source, target)
    first = files(target)

    assert build_workbook(source, target).unchanged == ("00_start.ipynb", "02_steps.ipynb")
    build_workbook(source, tmp_path / "another")

    assert files(target) == first
    assert files(tmp_path / "another") == first


def test_an_untouched_file_is_updated_and_a_deleted_one_comes_back(folders):
    source, target = folders
    build_workbook(source, target)
    (source / "00_start.ipynb").write_bytes(dumps(master("# New title")))
    (target / "02_steps.ipynb").unlink()

    report = build_workbook(source, target)

    assert (report.updated, report.written) == (("00_start.ipynb",), ("02_steps.ipynb",))
    assert read(target / "00_start.ipynb").cells[0].source == "# New title"


def test_a_learners_file_is_never_overwritten(folders):
    source, target = folders
    build_workbook(source, target)
    mine = target / "00_start.ipynb"
    mine.write_text("my own words", encoding="utf-8")

    assert build_workbook(source, target).kept == ("00_start.ipynb",)
    assert len(files(target)) == 3  # no newer version, so nothing is put beside it

    (source / "00_start.ipynb").write_bytes(dumps(master("# New title")))
    report = build_workbook(source, target)
    (beside,) = report.beside
    assert mine.read_text(encoding="utf-8") == "my own words"
    assert read(target / beside).cells[0].source == "# New title"
    assert f"new version put beside yours: {beside}" in str(report)

    (target / beside).unlink()  # read and thrown away: it does not come back
    assert build_workbook(source, target).beside == ()
    assert mine.read_text(encoding="utf-8") == "my own words"


def test_a_file_that_was_there_before_the_course_is_kept(folders):
    source, target = folders
    target.mkdir()
    (target / "00_start.ipynb").write_text("older than the course", encoding="utf-8")

    report = build_workbook(source, target)

    assert report.kept == ("00_start.ipynb",)
    assert len(report.beside) == 1
    assert (target / "00_start.ipynb").read_text(encoding="utf-8") == "older than the course"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}', '{"files": {"a": 1}}'])
def test_a_damaged_manifest_costs_no_file(folders, content):
    source, target = folders
    build_workbook(source, target)
    (target / "00_start.ipynb").write_text("mine", encoding="utf-8")
    (target / ".labkit.json").write_text(content, encoding="utf-8")

    report = build_workbook(source, target)

    assert report.kept == ("00_start.ipynb",)
    assert report.unchanged == ("02_steps.ipynb",)


def test_an_interrupted_build_is_finished_by_the_next(folders, monkeypatch):
    source, target = folders
    build_workbook(source, target)
    for name in ("00_start.ipynb", "02_steps.ipynb"):
        (source / name).write_bytes(dumps(master("# New title")))
    from labkit.notebooks import workbook

    real, calls = workbook.write_atomic, []

    def killed_at_the_second_file(path, content):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(workbook, "write_atomic", killed_at_the_second_file)
    with pytest.raises(KeyboardInterrupt):
        build_workbook(source, target)
    monkeypatch.undo()

    report = build_workbook(source, target)
    assert (report.unchanged, report.updated) == (("00_start.ipynb",), ("02_steps.ipynb",))


def test_wrong_folders_are_refused(folders, tmp_path):
    source, target = folders
    with pytest.raises(ValueError, match="would overwrite the masters"):
        build_workbook(source, source)
    with pytest.raises(LabkitError, match="no notebooks"):
        build_workbook(tmp_path / "empty", target)
    target.write_text("a file where a folder should be", encoding="utf-8")
    with pytest.raises(LabkitError, match="cannot write"):
        build_workbook(source, target)


@pytest.mark.parametrize(
    ("source", "tag"),
    [
        ("half = 125", "solution"),
        ("# BEGIN SOLUTION\nhalf = 125\n# END SOLUTION", "exercise"),
        ("half = 125\n# END SOLUTION", "exercise"),
    ],
)
def test_a_solution_that_would_stay_in_the_workbook_is_refused(source, tag):
    nb = new_notebook(cells=[tagged(new_code_cell(source), tag)])

    with pytest.raises(ValueError, match="steps.ipynb: cell 0: a cell tagged 'solution'"):
        strip_solutions(nb, "steps.ipynb")


def test_a_solution_line_shown_elsewhere_is_found():
    nb = master()
    assert solution_lines(nb) == {"half = 1000 // 8"}
    assert leaked_lines(nb, strip_solutions(nb)) == set()

    nb.cells[1].source += "\n  half = 1000 // 8"
    assert leaked_lines(nb, strip_solutions(nb)) == {"half = 1000 // 8"}


def test_command_line_reports_what_it_did(folders, capsys):
    source, target = folders

    assert main(["--source", str(source), "--target", str(target)]) == 0
    assert "workbook: 2 written, 0 updated, 0 unchanged" in capsys.readouterr().out
    assert main(["--source", str(source), "--target", str(source)]) == 1


MASTERS = sorted(paths.notebooks_dir().glob("*.ipynb"))


@pytest.mark.parametrize("path", MASTERS, ids=lambda path: path.stem)
def test_course_workbook_shows_no_line_of_a_solution(path):
    nb = read(path)

    assert leaked_lines(nb, strip_solutions(nb, path.name)) == set()


def names(source: str) -> tuple[set[str], set[str]]:
    """Names that a cell assigns, and names that it reads, both at the top level of the notebook."""
    top = symtable.symtable(source, "cell", "exec")
    assigned = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    read_names, tables = {s.get_name() for s in top.get_symbols() if s.is_referenced()}, [top]
    while tables:
        inner = tables.pop().get_children()
        read_names |= {
            s.get_name() for table in inner for s in table.get_symbols() if s.is_global()
        }
        tables += inner
    return assigned, read_names


def test_names_of_a_cell_are_those_that_other_cells_can_see():
    source = "total = sum(x for x in rows)\ndef half(n):\n    return n / parts\n"
    assert names(source) == ({"total", "half"}, {"sum", "rows", "parts"})


@pytest.mark.parametrize("path", MASTERS, ids=lambda path: path.stem)
def test_course_workbook_does_all_that_the_master_does(path):
    """Without its solutions a notebook runs as the master does, which nbval runs and compares.

    No cell that stays reads or assigns a name that a solution assigns, and every stub, which the
    master runs too, says that it was not attempted.
    """
    of_solutions, of_others = set(), set()
    for cell in read(path).cells:
        if cell.cell_type != "code":
            continue
        tags = cell.metadata.get("tags", [])
        assigned, read_names = names(cell.source)
        if "solution" in tags:
            of_solutions |= assigned
        elif "exercise" in tags:
            assert "not attempted" in "".join(output.get("text", "") for output in cell.outputs)
        else:
            of_others |= assigned | read_names
    assert of_solutions, "a lesson without exercises"
    assert of_solutions & of_others == set()


def test_course_workbook_runs(tmp_path):
    """One real run of a stripped notebook; test_browser runs another one."""
    build_workbook(paths.notebooks_dir(), tmp_path)

    run = execute(tmp_path / "00_start_here.ipynb", {}, write=False)

    stubs = [cell for cell in run.notebook.cells if "exercise" in cell.metadata.get("tags", [])]
    assert stubs
    for cell in stubs:
        assert "not attempted" in "".join(output.get("text", "") for output in cell.outputs)
