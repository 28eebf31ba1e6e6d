"""The same file without its problems, and a report of what was done; `labkit validate`."""

import csv
import io
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from labkit.data.formats import map_texts
from labkit.data.problems import Problem
from labkit.data.rows import Row, to_line
from labkit.data.texts import tidy
from labkit.data.validation import CheckedRow, check_file, validate
from labkit.errors import LabkitError


@dataclass(frozen=True)
class FixReport:
    """What `fix` did: kept + refused is every row of the file."""

    kept: int
    """Rows in `out`."""
    repaired: int
    """Rows among the kept ones whose white space was changed."""
    refused: int
    """Rows in `refused_path`, each with its line and reasons."""
    reasons: dict[str, int]
    """Code of a problem to the number of rows refused for it; a row may have several."""
    out: Path
    refused_path: Path
    problems: list[Problem]
    """Every problem of the file as it was."""

    def __str__(self) -> str:
        text = f"{self.out}: {self.kept} rows written, {self.repaired} of them repaired; "
        return text + f"{self.refused_path}: {self.refused} rows refused"


def fix(path: str | os.PathLike, out: str | os.PathLike) -> FixReport:
    """Write the clean rows of a file to `out`, and the refused ones with reasons beside it.

    Repaired are only things with one right answer: the encoding, a byte order mark, white space at
    the ends of a text, Windows line ends. Of two equal rows the first is kept; of rows that
    contradict each other none, since nobody but their author knows which is right. Neither file is
    ever half written, and `out` appears last.

    Args:
        path: file as in `validate`; never changed.
        out: .jsonl, .json or .csv; the refused rows go to `OUT.refused.jsonl` without `out`'s
            suffix, as `{"line", "reasons", "row" or "raw"}`.

    Raises:
        ValueError: `out` would overwrite `path`, or its suffix cannot hold the rows.
        LabkitError: `path` cannot be read, or the files cannot be written.
    """
    path, out = Path(path), Path(out)
    refused_path = out.with_name(out.stem + ".refused.jsonl")
    if path.resolve() in (out.resolve(), refused_path.resolve()):
        raise ValueError(f"out={out} would overwrite the file itself; name another file")
    file_problems, rows = check_file(path)
    refused = [row for row in rows if row.refused]
    kept = [_tidied(row) for row in rows if not row.refused]
    reasons = Counter(code for row in refused for code in {p.code for p in row.problems})
    refused_text = "".join(map(_refused_line, refused))
    _write_together({refused_path: refused_text, out: _serialise(kept, out)})
    problems = [*file_problems, *(found for row in rows for found in row.problems)]
    return FixReport(
        kept=len(kept),
        repaired=sum(bool(row.problems) for row in rows if not row.refused),
        refused=len(refused),
        reasons=dict(reasons),
        out=out,
        refused_path=refused_path,
        problems=sorted(problems, key=lambda found: found.line),
    )


def _tidied(row: CheckedRow) -> Row:
    return map_texts(row.record.row, row.format or "", tidy)


def _refused_line(row: CheckedRow) -> str:
    reasons = [{"code": found.code, "message": found.message} for found in row.problems]
    content = {"raw": row.record.raw} if row.record.problem else {"row": row.record.row}
    return to_line({"line": row.record.line, "reasons": reasons, **content}) + "\n"


def _serialise(rows: list[Row], out: Path) -> str:
    suffix = out.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return "".join(to_line(row) + "\n" for row in rows)
    if suffix == ".json":
        return "[\n" + ",\n".join(map(to_line, rows)) + "\n]\n"
    if suffix == ".csv":
        return _to_csv(rows, out)
    raise ValueError(f"out={out} ends in {suffix or 'nothing'!r}; use .jsonl, .json or .csv")


def _to_csv(rows: list[Row], out: Path) -> str:
    """CSV; messages become JSON in their cell, as `read_rows` reads them back."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _to_cell(value) for name, value in row.items()})
    return text.getvalue()


def _to_cell(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else to_line(value)


def _write_together(texts: dict[Path, str]) -> None:
    """Write files beside their places first, and move them there in order once all are complete."""
    drafts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in texts}
    try:
        for path, text in texts.items():
            drafts[path].write_text(text, encoding="utf-8", newline="\n")
        for path, draft in drafts.items():
            draft.replace(path)
    except UnicodeEncodeError as error:
        raise LabkitError(
            f"{next(iter(texts))}: a text holds half of a surrogate pair; mend that row"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise LabkitError(
            f"{error.filename or next(iter(texts))} cannot be written ({reason}); "
            "free some disk or name a file in another folder"
        ) from error
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def validate_file(
    path: str | os.PathLike, as_json: bool = False, fix_out: str | os.PathLike | None = None
) -> tuple[int, str]:
    """What `labkit validate FILE [--json] [--fix OUT]` exits with (0 clean, 1 not) and prints.

    The exit code is about FILE also with `--fix`. The JSON is a list of the problems alone.

    Raises:
        LabkitError: the file cannot be read, or OUT cannot be written.
        ValueError: OUT would overwrite FILE, or its suffix cannot hold the rows.
    """
    report = None if fix_out is None else fix(path, fix_out)
    problems = validate(path) if report is None else report.problems
    if as_json:
        text = json.dumps([vars(found) for found in problems], indent=2)
    else:
        lines = [f"{path}:{found.line}: {found.code}: {found.message}" for found in problems]
        lines = lines or [f"{path}: clean"]
        text = "\n".join(lines if report is None else [*lines, str(report)])
    return (1 if problems else 0), text
