"""One canonical form for a notebook file, so that running it again changes nothing in git.

python -m labkit.notebooks.normalise notebooks/*.ipynb [--check]
"""

import argparse
import copy
import re
import sys
from functools import cache
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from labkit.errors import LabkitError
from labkit.files import sha256, write_atomic

SANITIZE_FILE = Path(__file__).with_name("sanitize.cfg")
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
KEPT_CELL_METADATA = ("jupyter", "tags")
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

_CARRIAGE_RETURN = re.compile(r"^.*\r(?=[^\n])", re.MULTILINE)


def normalise(nb: NotebookNode) -> NotebookNode:
    """A copy in canonical form; normalising that again gives the same.

    Widget state and views, execution times, editors' metadata and stderr are gone, consecutive
    streams are one, executed cells count from 1, and the kernel is plain `python3`. Ids, sources,
    tags and the `labkit` metadata stay. A cell that never ran keeps its missing count.
    """
    nb = copy.deepcopy(nb)
    nb.nbformat, nb.nbformat_minor = 4, 5
    kept = {"labkit": nb.metadata["labkit"]} if "labkit" in nb.metadata else {}
    nb.metadata = nbformat.from_dict(
        {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}, **kept}
    )
    _name_cells(nb.cells)
    count = 0
    for cell in nb.cells:
        cell.source = "".join(cell.source)
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in KEPT_CELL_METADATA if cell.metadata.get(key)}
        )
        if cell.cell_type != "code":
            continue
        if cell.execution_count is not None:
            count += 1
            cell.execution_count = count
        cell.outputs = _normalise_outputs(cell.outputs, cell.execution_count)
    return nb


def settle(nb: NotebookNode, old: NotebookNode) -> NotebookNode:
    """A copy of a re-run notebook with the old text where only clock times and addresses moved.

    Numbers marked with ≈ are taken from the new run: they are results, and on one machine they
    repeat. Pictures are always the new ones.
    """
    nb = copy.deepcopy(nb)
    old_cells = {cell.get("id"): cell for cell in old.cells}
    patterns = [pair for pair in sanitisers() if "≈" not in pair[1]]
    for cell in nb.cells:
        before = old_cells.get(cell.get("id"))
        if cell.cell_type != "code" or before is None or before.cell_type != "code":
            continue
        if len(before.outputs) == len(cell.outputs):
            for new_output, old_output in zip(cell.outputs, before.outputs, strict=True):
                _settle_output(new_output, old_output, patterns)
    return nb


@cache
def sanitisers(path: Path = SANITIZE_FILE) -> tuple[tuple[str, str], ...]:
    """The (regex, replacement) pairs of a sanitiser file, in its order."""
    pairs = re.findall(r"^regex: (.*)$\n^replace: (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return tuple(pairs)


def sanitise(text: str, patterns: tuple[tuple[str, str], ...] | None = None) -> str:
    """Text with everything replaced that may differ between two runs."""
    for regex, replacement in sanitisers() if patterns is None else patterns:
        text = re.sub(regex, replacement, text)
    return text


def read(path: Path) -> NotebookNode:
    """A notebook from disk.

    Raises:
        LabkitError: the file is missing or is not a notebook.
    """
    try:
        return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    except FileNotFoundError:
        raise LabkitError(f"{path}: no such notebook: check the name") from None
    except (UnicodeDecodeError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise LabkitError(f"{path}: not a notebook ({reason}): restore it from git") from None


def dumps(nb: NotebookNode) -> bytes:
    """The bytes of a notebook file, the same on every system.

    Raises:
        ValueError: the notebook breaks the nbformat schema.
    """
    try:
        nbformat.validate(nb)
    except nbformat.ValidationError as error:
        raise ValueError(f"not a valid notebook: {str(error).splitlines()[0]}") from error
    text = nbformat.writes(nb, version=nbformat.NO_CONVERT, ensure_ascii=False, indent=1)
    return (text.rstrip("\n") + "\n").encode("utf-8")


def normalise_file(path: Path, *, write: bool = True) -> bool:
    """Bring one file into canonical form; True if it was not yet.

    Raises:
        LabkitError: the file is missing, is not a notebook, or cannot be written.
    """
    content = dumps(normalise(read(path)))
    changed = content != path.read_bytes()
    if changed and write:
        write_atomic(path, content)
    return changed


def _name_cells(cells: list[NotebookNode]) -> None:
    """Give cells without an id, or with one already taken, an id derived from what they say."""
    taken = set()
    for index, cell in enumerate(cells):
        if not cell.get("id") or cell.id in taken:
            cell.id = sha256(f"{index} {''.join(cell.source)}".encode())[:8]
        taken.add(cell.id)


def _normalise_outputs(outputs: list[NotebookNode], count: int | None) -> list[NotebookNode]:
    """Outputs without stderr and widget views; consecutive stdout in one piece."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue  # warnings name paths and times; `run` shows them to the author instead
            output.text = "".join(output.text)
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        if output.output_type == "execute_result":
            output.execution_count = count
        if "data" in output:
            output.data.pop(WIDGET_VIEW, None)
            output.metadata.pop(WIDGET_VIEW, None)
            for mime, value in output.data.items():
                if isinstance(value, list):
                    output.data[mime] = "".join(value)
        kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = _CARRIAGE_RETURN.sub("", output.text)
    return [output for output in kept if output.get("text", True)]


def _settle_output(new: NotebookNode, old: NotebookNode, patterns: list[tuple[str, str]]) -> None:
    """Put the old text into a new output wherever both are the same once sanitised."""

    def same(one: object, other: object) -> bool:
        if not (isinstance(one, str) and isinstance(other, str)):
            return False
        return sanitise(one, tuple(patterns)) == sanitise(other, tuple(patterns))

    if new.output_type != old.output_type:
        return
    if same(new.get("text"), old.get("text")):
        new.text = old.text
    for mime, value in new.get("data", {}).items():
        if mime.startswith("text/") and same(value, old.data.get(mime)):
            new.data[mime] = old.data[mime]


def main(arguments: list[str] | None = None) -> int:
    """Command line: normalise files, or with --check only say which are not."""
    parser = argparse.ArgumentParser(
        prog="python -m labkit.notebooks.normalise",
        description="Bring notebooks into the form that is committed.",
        epilog="example: python -m labkit.notebooks.normalise notebooks/00_start_here.ipynb",
    )
    parser.add_argument("notebook", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if needed")
    options = parser.parse_args(arguments)
    try:
        changed = [p for p in options.notebook if normalise_file(p, write=not options.check)]
    except LabkitError as error:
        print(error, file=sys.stderr)
        return 1
    for path in changed:
        print(f"{path}: {'not normalised' if options.check else 'normalised'}")
    return 1 if changed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
