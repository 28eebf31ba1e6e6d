"""House rules for the master notebooks, checked without running them.

    python -m labkit.notebooks.lint notebooks/*.ipynb

An error fails CI; a warning is advice.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbformat import NotebookNode

from labkit.errors import LabkitError
from labkit.notebooks.normalise import dumps, normalise, read
from labkit.notebooks.workbook import leaked_lines, strip_solutions

PROSE_WORDS = range(20, 61)
IGNORED_SHARE = 0.05

FORBIDDEN_CODE = (
    ("output-widget", r"\bwith\s+[\w.]*\bOutput\(", "set the value of an HTML widget instead"),
    (
        "interact",
        r"\binteract(?:_manual|ive_output|ive)?\b\s*\(",
        "write a handler that sets .value",
    ),
    ("interact", r"^\s*@(?:\w+\.)?interact", "write a handler that sets .value"),
    ("clear-output", r"\bclear_output\b", "set the value of a widget instead"),
    ("display-id", r"\bdisplay_id\b", "set the value of a widget instead"),
    ("skipped-cell", r"NBVAL_SKIP", "every cell is tested: remove the marker"),
)
MACHINE_PATH = re.compile(
    r"(?<![\w.~-])/(?:home|root|Users|tmp|private|var/folders)/|[A-Z]:\\Users\\"
)
VAGUE_LINK = re.compile(r"\[(?:here|this|link|click here|read more|more|source|page)\]\(", re.I)
BARE_LINK = re.compile(r"(?<![(<\"'])\bhttps?://|\[https?://")
FIGURE_REPR = re.compile(r"^<(?:Figure|Axes)\b.*>$|^(?:Text|\[<)")


@dataclass(frozen=True)
class Finding:
    """One rule that one cell breaks."""

    code: str
    cell: int
    """Index among all cells of the notebook, from 0."""
    cell_id: str
    message: str
    """What is wrong, and what to do instead."""
    severity: str = "error"
    """error or warning."""

    def __str__(self) -> str:
        return f"cell {self.cell} ({self.cell_id}): {self.severity}: {self.code}: {self.message}"


def lint(nb: NotebookNode) -> list[Finding]:
    """Every house rule that a master notebook breaks, in the order of its cells."""
    found: list[Finding] = []
    for rule in (_headings, _prose, _code, _ignored, _runs, _outputs, _plots, _exercises):
        for index, code, message in rule(nb.cells):
            severity = "warning" if code in ("short-prose", "long-prose") else "error"
            found.append(Finding(code, index, nb.cells[index].get("id", "?"), message, severity))
    if nb.cells and dumps(normalise(nb)) != dumps(nb):
        again = "run python -m labkit.notebooks.normalise on it"
        found.append(Finding("not-normalised", 0, nb.cells[0].get("id", "?"), again))
    return sorted(found, key=lambda finding: finding.cell)


# Each rule below gets all cells and yields (index of a cell, code, message).
Broken = Iterator[tuple[int, str, str]]


def _headings(cells: list[NotebookNode]) -> Broken:
    """One H1, first of all; no level left out on the way down."""
    levels = [(index, level) for index, level in _heading_levels(cells)]
    titles = [index for index, level in levels if level == 1]
    if not levels or levels[0] != (0, 1):
        yield 0, "no-title", "start the first cell with one line '# The question'"
    for index in titles[1:]:
        yield index, "second-title", "only the first cell has a '#' heading: use '##'"
    for (_, above), (index, level) in zip(levels, levels[1:], strict=False):
        if level > above + 1:
            yield index, "heading-order", f"level {level} follows level {above}: leave none out"


def _heading_levels(cells: list[NotebookNode]) -> Iterator[tuple[int, int]]:
    for index, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            for line in _without_code(cell.source).splitlines():
                if heading := re.match(r"(#{1,6})\s", line):
                    yield index, len(heading[1])


def _prose(cells: list[NotebookNode]) -> Broken:
    """20 to 60 words a cell, and links that say where they lead."""
    for index, cell in enumerate(cells):
        if cell.cell_type != "markdown":
            continue
        text = _without_code(cell.source)
        outside_code = re.sub(r"`[^`]*`", "", text)
        if VAGUE_LINK.search(outside_code) or BARE_LINK.search(outside_code):
            yield index, "vague-link", "let the words of the link say where it leads"
        n_words = len(_prose_words(text))
        if 0 < n_words < PROSE_WORDS.start:
            yield index, "short-prose", f"{n_words} words: say what to look at and why"
        elif n_words >= PROSE_WORDS.stop:
            yield index, "long-prose", f"{n_words} words: split the cell or cut"


def _prose_words(text: str) -> list[str]:
    """Words of running text: no headings, tables, lists, display equations or HTML comments."""
    text = re.sub(r"\$\$.*?\$\$|<!--.*?-->", "", text, flags=re.S)
    lines = (line.strip() for line in text.splitlines())
    kept = [line for line in lines if not re.match(r"#|\||[-*+] |\d+[.)] ", line)]
    return [word for word in " ".join(kept).split() if any(c.isalnum() for c in word)]


def _without_code(markdown: str) -> str:
    return re.sub(r"^(```|~~~).*?^\1\s*$", "", markdown, flags=re.S | re.M)


def _code(cells: list[NotebookNode]) -> Broken:
    """Nothing whose output a comparison cannot follow, and no hidden results."""
    for index, cell in _code_cells(cells):
        for code, pattern, instead in FORBIDDEN_CODE:
            if re.search(pattern, cell.source, re.M):
                yield index, code, instead
        if _ends_in_semicolon(cell.source):
            yield index, "semicolon", "assign the last value to _ instead of hiding it with ';'"


def _ends_in_semicolon(source: str) -> bool:
    """Whether the last statement ends in ';', comments and strings apart."""
    python = "\n".join(
        line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))
    )
    try:
        statements = ast.parse(python).body
    except SyntaxError:
        return source.rstrip().endswith(";")
    if not statements:
        return False
    lines = python.encode("utf-8").splitlines()
    last = statements[-1]
    rest = lines[(last.end_lineno or 1) - 1][last.end_col_offset or 0 :]
    return rest.strip().startswith(b";")


def _ignored(cells: list[NotebookNode]) -> Broken:
    """Output that is not compared: at most one cell in twenty (or one), each with its reason."""
    marked = [index for index, cell in _code_cells(cells) if _ignores_output(cell)]
    allowed = max(1, int(IGNORED_SHARE * sum(1 for _ in _code_cells(cells))))
    for index in marked[allowed:]:
        yield index, "too-many-ignored", f"{len(marked)} cells ignore output: {allowed} may"
    for index in marked:
        match = re.search(r"# *NBVAL_IGNORE_OUTPUT\n# *(\S+(?: \S+){2,})", cells[index].source)
        if not match:
            yield index, "ignored-without-reason", "give the reason in a comment on the next line"


def _ignores_output(cell: NotebookNode) -> bool:
    return "NBVAL_IGNORE_OUTPUT" in cell.source or "nbval-ignore-output" in _tags(cell)


def _runs(cells: list[NotebookNode]) -> Broken:
    """Every cell was run, from top to bottom, and none failed."""
    for index, cell in _code_cells(cells):
        if cell.execution_count is None and cell.source.strip():
            yield index, "not-run", "run python -m labkit.notebooks.run on the notebook"
        errors = [output for output in cell.outputs if output.output_type == "error"]
        if errors and "raises-exception" not in _tags(cell):
            yield index, "error-output", f"{errors[0].ename}: mend the cell and run again"


def _outputs(cells: list[NotebookNode]) -> Broken:
    """No path of one machine and no number that is not one in committed outputs."""
    for index, cell in _code_cells(cells):
        text = "\n".join(_texts(cell))
        if path := MACHINE_PATH.search(text):
            yield index, "machine-path", f"{path[0]}... in the output: print a relative path"
        if re.search(r"≈\s*(?:nan|[-+]?inf)", text):
            yield index, "not-a-number", "a marked number is nan or inf: mend the computation"


def _plots(cells: list[NotebookNode]) -> Broken:
    """A picture has its table or sentence in the same cell's output, or in the next cell's."""
    code_cells = list(_code_cells(cells))
    for place, (index, cell) in enumerate(code_cells):
        if not any(
            m.startswith("image/") for output in cell.outputs for m in output.get("data", {})
        ):
            continue
        beside = [cell, *(following for _, following in code_cells[place + 1 : place + 2])]
        if not any(_says_something(neighbour) for neighbour in beside):
            yield index, "plot-without-text", "print a sentence or a table that says the same"


def _says_something(cell: NotebookNode) -> bool:
    """Whether the output has text other than the name of a figure object."""
    return any(
        line.strip() and not FIGURE_REPR.match(line.strip())
        for text in _texts(cell)
        for line in text.splitlines()
    )


def _exercises(cells: list[NotebookNode]) -> Broken:
    """Each exercise is followed by its solution; both were checked; nothing of it leaks."""
    waiting: int | None = None
    for index, cell in _code_cells(cells):
        text = "\n".join(_texts(cell))
        if "exercise" in _tags(cell):
            if waiting is not None:
                yield waiting, "no-solution", "put a cell tagged 'solution' after the exercise"
            waiting = index
            if "not attempted" not in text:
                yield index, "stub-not-checked", "assign ... and call check(id, answer)"
        if "solution" in _tags(cell):
            if waiting is None:
                yield index, "no-exercise", "put a cell tagged 'exercise' before the solution"
            elif _checked_ids(cell) != _checked_ids(cells[waiting]):
                yield index, "other-exercise", "check the same id as the exercise before it"
            waiting = None
            if "correct:" not in text:
                yield index, "solution-not-correct", "call check(id, answer) and see it say correct"
    if waiting is not None:
        yield waiting, "no-solution", "put a cell tagged 'solution' after the exercise"
    nb = NotebookNode(cells=cells, metadata=NotebookNode())
    try:
        leaked = leaked_lines(nb, strip_solutions(nb))
    except ValueError as error:
        yield 0, "solution-markers", str(error)
    else:
        for line in sorted(leaked):
            where = next(
                i
                for i, cell in enumerate(cells)
                if line in map(str.strip, cell.source.splitlines())
            )
            yield where, "solution-leak", f"the line {line!r} of a solution stands here as well"


def _checked_ids(cell: NotebookNode) -> list[str]:
    return re.findall(r"""\bcheck\(\s*["']([\w-]+)["']""", cell.source)


def _code_cells(cells: list[NotebookNode]) -> Iterator[tuple[int, NotebookNode]]:
    return ((index, cell) for index, cell in enumerate(cells) if cell.cell_type == "code")


def _tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _texts(cell: NotebookNode) -> Iterator[str]:
    """Every text in a cell's outputs."""
    for output in cell.outputs:
        if "text" in output:
            yield output.text
        for mime, value in output.get("data", {}).items():
            if mime.startswith("text/"):
                yield value


def main(arguments: list[str] | None = None) -> int:
    """Command line: print one line per finding; 1 if any is an error."""
    parser = argparse.ArgumentParser(
        prog="python -m labkit.notebooks.lint",
        description="Check master notebooks against the house rules.",
        epilog="example: python -m labkit.notebooks.lint notebooks/00_start_here.ipynb",
    )
    parser.add_argument("notebook", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    findings = []
    try:
        for path in options.notebook:
            for finding in lint(read(path)):
                findings.append(finding)
                print(f"{path.name}: {finding}")
    except LabkitError as error:
        print(error, file=sys.stderr)
        return 1
    return int(any(finding.severity == "error" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
