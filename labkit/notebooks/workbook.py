"""Build the learner's copy of the course: no outputs, no solutions, no edit of theirs ever lost.

    python -m labkit.notebooks.workbook

A small `.labkit.json` in the workbook holds the hash of each file as it was last written, and of
what it was made from. A file that still has it was not touched and is brought up to date. Any other
file belongs to the learner: it is left alone, and a newer version is put beside it as
`NAME.new-HASH.ipynb`, once.
"""

import argparse
import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from nbformat import NotebookNode

from labkit import paths
from labkit.errors import LabkitError
from labkit.exercises import BEGIN_SOLUTION, END_SOLUTION
from labkit.files import sha256, write_atomic
from labkit.notebooks.normalise import dumps, normalise, read

MANIFEST = ".labkit.json"


@dataclass(frozen=True)
class WorkbookReport:
    """What building the workbook did; all are file names."""

    written: tuple[str, ...]
    """New in the workbook."""
    updated: tuple[str, ...]
    """Replaced by a newer version; the learner had not touched them."""
    unchanged: tuple[str, ...]
    """Already up to date."""
    kept: tuple[str, ...]
    """Changed by the learner and left alone."""
    beside: tuple[str, ...]
    """Newer versions put beside files that were kept."""

    def __str__(self) -> str:
        counts = ((len(getattr(self, name)), name) for name in ("written", "updated", "unchanged"))
        lines = ["workbook: " + ", ".join(f"{n} {name}" for n, name in counts)]
        lines += [f"kept your {name}" for name in self.kept]
        lines += [f"new version put beside yours: {name}" for name in self.beside]
        return "\n".join(lines)


def build_workbook(source: Path | None = None, target: Path | None = None) -> WorkbookReport:
    """Write the learner's copy of every master notebook; safe to repeat and to interrupt.

    Args:
        source: folder of the masters; default `notebooks/`.
        target: folder of the workbook; default `workbook/`.

    Raises:
        ValueError: both folders are the same, or a master's solution markers are wrong.
        LabkitError: there are no masters, one is damaged, or the target cannot be written.
    """
    source = Path(source or paths.notebooks_dir())
    target = Path(target or paths.workbook_dir())
    if source.resolve() == target.resolve():
        raise ValueError(f"target={target}: would overwrite the masters: name another folder")
    masters = sorted(source.glob("*.ipynb"))
    if not masters:
        raise LabkitError(f"{source}: no notebooks: clone the course again")
    made_from = _made_from(masters)  # before they are read: a change in between builds once more
    fresh = {path.name: dumps(strip_solutions(read(path), path.name)) for path in masters}

    known = _read_manifest(target)
    report: dict[str, list[str]] = {name: [] for name in WorkbookReport.__dataclass_fields__}
    for name, content in fresh.items():
        report[_place(target / name, content, known.get(name))].append(name)
        if name in report["kept"] and known.get(name) != sha256(content):
            beside = f"{Path(name).stem}.new-{sha256(content)[:8]}.ipynb"
            if not (target / beside).exists():
                write_atomic(target / beside, content)
            report["beside"].append(beside)
    offered = known | {name: sha256(content) for name, content in fresh.items()}
    kept_hashes = {"files": offered, "made_from": made_from}
    manifest = json.dumps(kept_hashes, indent=1, sort_keys=True) + "\n"
    write_atomic(target / MANIFEST, manifest.encode("utf-8"))
    return WorkbookReport(**{name: tuple(names) for name, names in report.items()})


def _made_from(masters: list[Path]) -> dict[str, str]:
    """Path → hash of all that the copies depend on; lab.py compares them to skip this build."""
    code = (
        "labkit/exercises.py",
        "labkit/notebooks/normalise.py",
        "labkit/notebooks/workbook.py",
        "constraints.txt",
    )
    inputs = [*masters, *(paths.root() / name for name in code)]
    return {str(path.resolve()): sha256(path.read_bytes()) for path in inputs}


def strip_solutions(nb: NotebookNode, name: str = "notebook") -> NotebookNode:
    """A copy without solution cells, outputs and counts; the exercises' stubs stay.

    Raises:
        ValueError: a solution cell has no marked solution, or a marker stands elsewhere.
    """
    kept = []
    for index, cell in enumerate(nb.cells):
        is_solution = "solution" in cell.metadata.get("tags", [])
        if is_solution != bool(_marked_lines(cell.source)):
            raise ValueError(
                f"{name}: cell {index}: a cell tagged 'solution' holds lines between "
                f"{BEGIN_SOLUTION!r} and {END_SOLUTION!r}, and no other cell does"
            )
        if not is_solution:
            kept.append(copy.deepcopy(cell))
    for cell in kept:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    stripped = copy.copy(nb)
    stripped.cells = kept
    return normalise(stripped)


def solution_lines(nb: NotebookNode) -> set[str]:
    """Every line of code, without indentation, that stands between solution markers."""
    lines = {line.strip() for cell in nb.cells for line in _marked_lines(cell.source)}
    return {line for line in lines if any(letter.isalnum() for letter in line)}


def leaked_lines(master: NotebookNode, student: NotebookNode) -> set[str]:
    """Lines of a solution that the learner's copy still shows, anywhere in it."""
    shown = {line.strip() for cell in student.cells for line in cell.source.splitlines()}
    return solution_lines(master) & shown


def _marked_lines(source: str) -> list[str]:
    """Lines between the solution markers; a marker without its partner counts as marked."""
    lines = [line for line in source.splitlines() if line.strip()]
    marks = [line.strip() for line in lines]
    if BEGIN_SOLUTION not in marks and END_SOLUTION not in marks:
        return []
    begin = marks.index(BEGIN_SOLUTION) + 1 if BEGIN_SOLUTION in marks else 0
    end = marks.index(END_SOLUTION) if END_SOLUTION in marks else len(lines)
    return lines[begin:end]


def _place(path: Path, content: bytes, last_written: str | None) -> str:
    """Write one file unless it is the learner's; says which list of the report it belongs to."""
    if not path.exists():
        write_atomic(path, content)
        return "written"
    present = path.read_bytes()
    if present == content:
        return "unchanged"
    if sha256(present) != last_written:
        return "kept"
    write_atomic(path, content)
    return "updated"


def _read_manifest(target: Path) -> dict[str, str]:
    """Hashes of the files as last written; empty, so that nothing is overwritten, if unreadable."""
    try:
        return dict(json.loads((target / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def main(arguments: list[str] | None = None) -> int:
    """Command line: build the workbook."""
    parser = argparse.ArgumentParser(
        prog="python -m labkit.notebooks.workbook",
        description="Build or update the learner's copy of the course; your edits are kept.",
        epilog="example: python -m labkit.notebooks.workbook --target workbook",
    )
    parser.add_argument("--source", type=Path, help="folder of the masters")
    parser.add_argument("--target", type=Path, help="folder of the workbook")
    options = parser.parse_args(arguments)
    try:
        print(build_workbook(options.source, options.target))
    except (LabkitError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
