"""House rules for notebooks: each is broken once, and a notebook that keeps them all is clean."""

import copy

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from labkit import paths
from labkit.notebooks.lint import lint, main
from labkit.notebooks.normalise import dumps, normalise, read

SENTENCE = "This paragraph says in enough words what the reader should look at in the plot below. "
PROSE = SENTENCE + "And why it matters."


def code(source: str, text: str = "", image: bool = False, tags: tuple[str, ...] = ()):
    """A code cell that ran and printed `text`, and drew a picture if asked."""
    cell = new_code_cell(source, execution_count=1, metadata={"tags": list(tags)})
    if text:
        cell.outputs.append(new_output("stream", name="stdout", text=text))
    if image:
        shown = {"image/png": "aGk=", "text/plain": "<Figure size 800x450 with 1 Axes>"}
        cell.outputs.append(new_output("display_data", data=shown))
    return cell


def exercise_cells():
    stub = code('half = ...\ncheck("99-1", half)', "99-1 not attempted: ...\n", tags=("exercise",))
    solved = code(
        '# BEGIN SOLUTION\nhalf = 1000 // 8\n# END SOLUTION\ncheck("99-1", half)',
        "99-1 correct: 1000 rows\n",
        tags=("solution",),
    )
    return [stub, solved]


def notebook(*cells) -> nbformat.NotebookNode:
    nb = new_notebook()
    nb.cells = [new_markdown_cell("# A question?"), *map(copy.deepcopy, cells)]
    return normalise(nb)


def codes(*cells) -> list[str]:
    return [finding.code for finding in lint(notebook(*cells))]


def test_a_clean_notebook_has_no_findings():
    cells = [
        new_markdown_cell(f"## First\n\n{PROSE} See [the LoRA paper](https://arxiv.org/abs/1)."),
        code("x = 1\nplot(x)", "the loss falls\n", image=True),
        new_markdown_cell("### Deeper"),
        code("plot(x)", image=True),
        code("table(x)", "a b\n1 2\n"),
        new_markdown_cell("## Exercises"),
        *exercise_cells(),
    ]

    assert lint(notebook(*cells)) == []


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (new_markdown_cell("# Another title"), "second-title"),
        (new_markdown_cell("### Too deep"), "heading-order"),
        (new_markdown_cell("Few words only."), "short-prose"),
        (new_markdown_cell(PROSE * 4), "long-prose"),
        (new_markdown_cell(f"{PROSE} Read [here](https://a.b)."), "vague-link"),
        (new_markdown_cell(f"{PROSE} Read https://a.b/c."), "vague-link"),
        (code("with widgets.Output():\n    print(1)"), "output-widget"),
        (
            code("from ipywidgets import Output\nout = 1\nwith Output() as o:\n    pass"),
            "output-widget",
        ),
        (code("interact(show, rate=(0, 1))"), "interact"),
        (code("@widgets.interact\ndef show(x): print(x)"), "interact"),
        (code("clear_output(wait=True)"), "clear-output"),
        (code("display(x, display_id=True)"), "display-id"),
        (code("# NBVAL_SKIP\nx = 1"), "skipped-cell"),
        (code("plt.plot(x);"), "semicolon"),
        (code("%matplotlib inline\nplt.plot(x)  ;  # hidden"), "semicolon"),
        (code("# NBVAL_IGNORE_OUTPUT\nx = 1"), "ignored-without-reason"),
        (new_code_cell("x = 1"), "not-run"),
        (code("print(p)", "/home/ada/data\n"), "machine-path"),
        (code("print(p)", "saved to C:\\Users\\ada\n"), "machine-path"),
        (code("print(loss)", "loss ≈nan\n"), "not-a-number"),
        (code("plot(x)", image=True), "plot-without-text"),
    ],
)
def test_each_rule_is_noticed(cell, expected):
    assert codes(cell) == [expected]


@pytest.mark.parametrize(
    "cell",
    [
        new_markdown_cell("## Head\n\n```python\n# a comment, not a title\n```"),
        new_markdown_cell("## Head\n\n- a list\n- of items\n\n| a | table |\n\n$$x + y$$"),
        new_markdown_cell(f"{PROSE} Call `https://a.b` or [the guide](https://a.b)."),
        code("print('a;')"),
        code("x = 1  # not hidden;"),
        code("a = 1; b = 2"),
        code("interaction = interactions(x)"),
        code("# NBVAL_IGNORE_OUTPUT\n# it lists the machine's disks\nx = 1"),
        code("print(p)", "notebooks/home/data and a/tmp/b\n"),
        new_code_cell(""),
    ],
)
def test_what_only_looks_broken_is_let_through(cell):
    assert codes(cell) == []


def test_only_one_cell_in_twenty_may_be_ignored():
    ignored = code("# NBVAL_IGNORE_OUTPUT\n# it lists the machine's disks\nx = 1")
    plain = [code("x = 1") for _ in range(38)]

    assert codes(ignored, *plain, ignored) == []
    assert codes(ignored, *plain, ignored, ignored) == ["too-many-ignored"]


def test_a_notebook_that_failed_or_has_no_title_is_noticed():
    broken = code("1 / 0")
    error = {"ename": "ZeroDivisionError", "evalue": "", "traceback": []}
    broken.outputs = [new_output("error", **error)]
    assert codes(broken) == ["error-output"]

    untitled = normalise(new_notebook(cells=[new_markdown_cell(PROSE)]))
    assert [finding.code for finding in lint(untitled)] == ["no-title"]


def test_a_notebook_that_is_not_normalised_is_noticed():
    nb = notebook(code("x = 1"))
    nb.cells[1].execution_count = 7

    assert [finding.code for finding in lint(nb)] == ["not-normalised"]


def change_nothing(stub, solved):
    return [stub, solved]


def drop_solution(stub, solved):
    return [stub]


def drop_stub(stub, solved):
    return [solved]


def check_another(stub, solved):
    solved.source = solved.source.replace("99-1", "99-2")
    return [stub, solved]


def fail_solution(stub, solved):
    solved.outputs[0].text = "99-1 not yet: no\n"
    return [stub, solved]


def fill_stub(stub, solved):
    stub.outputs[0].text = "99-1 correct: yes\n"
    return [stub, solved]


def leak_line(stub, solved):
    return [code("half = 1000 // 8"), stub, solved]


def drop_marker(stub, solved):
    solved.source = solved.source.replace("# END SOLUTION\n", "").replace("# BEGIN SOLUTION\n", "")
    return [stub, solved]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_nothing, []),
        (drop_solution, ["no-solution"]),
        (drop_stub, ["no-exercise"]),
        (check_another, ["other-exercise"]),
        (fail_solution, ["solution-not-correct"]),
        (fill_stub, ["stub-not-checked"]),
        (leak_line, ["solution-leak"]),
        (drop_marker, ["solution-markers"]),
    ],
)
def test_exercises_are_whole(change, expected):
    assert codes(*change(*copy.deepcopy(exercise_cells()))) == expected


def test_command_line_fails_on_errors_but_not_on_advice(tmp_path, capsys):
    path = tmp_path / "99.ipynb"
    path.write_bytes(dumps(notebook(new_markdown_cell("Few words."))))
    assert main([str(path)]) == 0
    assert "99.ipynb: cell 1" in capsys.readouterr().out
    path.write_bytes(dumps(notebook(code("plot(x);"))))
    assert main([str(path)]) == 1
    assert main([str(tmp_path / "none.ipynb")]) == 1


@pytest.mark.parametrize(
    "path", sorted(paths.notebooks_dir().glob("*.ipynb")), ids=lambda path: path.stem
)
def test_course_notebooks_keep_the_house_rules(path):
    assert [str(f) for f in lint(read(path)) if f.severity == "error"] == []
