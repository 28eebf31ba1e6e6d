"""The student copy of the course, without solutions, outputs and tests, and with a timetable.

Files, order and times inside a .zip are always the same, so two releases of one course are equal.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from labkit import paths
from labkit.errors import LabkitError
from labkit.exercises import all_exercises
from labkit.notebooks.normalise import dumps, read
from labkit.notebooks.run import execute
from labkit.notebooks.workbook import leaked_lines, strip_solutions

INCLUDED = (
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "docs",
    "lab.py",
    "pyproject.toml",
    "constraints.txt",
    "labkit",
    "notebooks",
    "data",
)
TIMETABLE = "TIMETABLE.md"
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that the format can say


@dataclass(frozen=True)
class NotebookCost:
    """What one notebook takes."""

    name: str
    seconds: float | None
    """To run it from top to bottom; None where nobody measured."""
    peak_bytes: int | None
    """Of its kernel."""
    exercises: int
    exercise_minutes: int
    """For a learner, hints included."""

    def line(self) -> str:
        """Its row of the timetable."""
        minutes = "not measured" if self.seconds is None else f"{self.seconds / 60:.1f}"
        megabytes = "not measured" if self.peak_bytes is None else f"{self.peak_bytes / 1e6:.0f}"
        cells = (self.name, minutes, megabytes, self.exercises, self.exercise_minutes)
        return f"| {' | '.join(map(str, cells))} |"


@dataclass(frozen=True)
class Timetable:
    """What every notebook takes; printed as a Markdown table."""

    costs: tuple[NotebookCost, ...]

    def __str__(self) -> str:
        head = [
            "| notebook | minutes to run | kernel memory (MB) | exercises | minutes for them |",
            "|---|---|---|---|---|",
        ]
        return "\n".join([*head, *(cost.line() for cost in self.costs)])


@dataclass(frozen=True)
class ReleaseReport:
    """What was written."""

    out: Path
    files: int
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.out}: {self.files} files, {self.size_bytes / 1e6:.1f} MB, no solutions"


def timetable(
    costs: Path | None = None, run: bool = True, progress: Callable[[str], None] = print
) -> Timetable:
    """What each notebook takes, measured by running it or taken from a bench file.

    Args:
        costs: a file that `labkit bench --out` wrote; nothing is run then.
        run: run every notebook; with False and no `costs`, time and memory stay open.
        progress: called with a line for each notebook that is run.

    Raises:
        LabkitError: a notebook fails, or `costs` cannot be read.
    """
    measured = _read_costs(costs) if costs else {}
    rows = []
    for path in _masters():
        seconds, peak_bytes = measured.get(path.stem, (None, None))
        if run and not costs:
            progress(f"running {path.name} for its time and memory")
            done = execute(path, write=False)
            seconds, peak_bytes = done.seconds, done.peak_bytes
        exercises = [e for e in all_exercises() if e.id.startswith(path.stem[:2] + "-")]
        minutes = sum(exercise.minutes for exercise in exercises)
        rows.append(NotebookCost(path.stem, seconds, peak_bytes, len(exercises), minutes))
    return Timetable(tuple(rows))


def _masters() -> list[Path]:
    masters = sorted(paths.notebooks_dir().glob("*.ipynb"))
    if not masters:
        raise LabkitError(f"{paths.notebooks_dir()}: no notebooks: clone the course again")
    return masters


def _read_costs(file: Path) -> dict[str, tuple[float | None, int | None]]:
    """Notebook -> (seconds, peak bytes), from the rows of a bench file."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        values = {row["what"]: row["value"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise LabkitError(
            f"--costs {file}: not a bench file ({error}): make one with `labkit bench --out FILE`"
        ) from error
    found = {}
    for path in _masters():
        mebibytes = values.get(f"{path.stem}: kernel memory")
        peak_bytes = None if mebibytes is None else round(mebibytes * 2**20)
        found[path.stem] = (values.get(f"{path.stem}: time"), peak_bytes)
    return found


def make_release(out: Path, plan: Timetable, source: Path | None = None) -> ReleaseReport:
    """Write the student copy as a folder, or as a .zip, all of it or nothing.

    Args:
        out: must not be there yet; ends in .zip for an archive.
        plan: goes into the copy as TIMETABLE.md.
        source: the course; default this one.

    Raises:
        LabkitError: `out` is there, lies inside the course's own parts, or cannot be written.
        ValueError: a notebook's solution markers are wrong.
    """
    out, source = Path(out), source or paths.root()
    if out.exists():
        raise LabkitError(f"{out} exists already: name another file or folder, or delete it")
    if any(out.resolve().is_relative_to((source / name).resolve()) for name in INCLUDED):
        raise LabkitError(f"{out} lies inside the course: name a place outside it")
    draft = out.with_name(f".{out.name}.partial")
    remove(draft)
    try:
        files = dict(_files(source)) | {TIMETABLE: _timetable_page(plan).encode()}
        write = _write_zip if out.suffix == ".zip" else _write_folder
        write(draft, files)
        os.replace(draft, out)
    finally:
        remove(draft)
    return ReleaseReport(out, len(files), sum(map(len, files.values())))


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """(path in the copy, content) of every file, in order; notebooks without solutions."""
    for name in INCLUDED:
        root = source / name
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            relative = path.relative_to(source)
            hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
            if path.is_file() and not hidden:
                yield relative.as_posix(), _content(path)


def _content(path: Path) -> bytes:
    if path.suffix != ".ipynb":
        return path.read_bytes()
    master = read(path)
    student = strip_solutions(master, path.name)
    leaked = leaked_lines(master, student)
    if leaked:
        raise ValueError(f"{path.name}: {sorted(leaked)[0]!r} of a solution also stands elsewhere")
    return dumps(student)


def _timetable_page(plan: Timetable) -> str:
    return f"""# What each notebook takes

{plan}

Minutes to run are those of all cells from top to bottom on the machine that made this copy, and the
memory is the most that the kernel held there; JupyterLab itself takes about 150 MB more. Minutes
for exercises are for a learner who uses the hints. Reading comes on top.
"""


def _write_folder(target: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)


def _write_zip(target: Path, files: dict[str, bytes]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(f"course/{name}", ZIP_TIME)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED, compresslevel=6)
