"""Files to rows: JSON Lines, JSON and CSV in any of the encodings people save them in."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.data.problems import Problem, problem, quote
from labkit.errors import LabkitError

Row = dict[str, Any]
# A list of rows or a `datasets.Dataset`; iterating over either gives dicts.
Rows = Iterable[Any]

# The longer mark first: UTF-16's is the start of UTF-32's.
_MARKS = [
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
]
_UTF8_MARK = b"\xef\xbb\xbf"
_LIST_COLUMNS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
_LARGEST_CELL = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file, or what stood there instead."""

    line: int
    row: Any = None
    """The parsed row; None where parsing failed."""
    raw: str = ""
    """The text that could not be parsed."""
    problem: Problem | None = None
    """Why it could not be parsed."""


@dataclass(frozen=True)
class Records:
    """Every row of a file in order, with what is wrong with the file as a whole."""

    records: list[Record]
    problems: list[Problem]


def read_rows(path: str | os.PathLike) -> list[Row]:
    """Rows of a .jsonl, .json or .csv file; the content decides between the two JSON forms.

    Raises:
        LabkitError: the file cannot be read, or one of its lines is not a row.
    """
    rows = []
    for record in read_records(path).records:
        if record.problem is not None:
            found = f"{path}:{record.line}: {record.problem.code}: {record.problem.message}"
            raise LabkitError(f"{found}; see every problem with `labkit validate {path}`")
        if not isinstance(record.row, dict):
            raise LabkitError(
                f"{path}:{record.line}: wrong-type: a row must be a JSON object, "
                f"got {quote(record.row)}; see every problem with `labkit validate {path}`"
            )
        rows.append(record.row)
    return rows


def read_records(path: str | os.PathLike) -> Records:
    """Every row of a file with its line number; damaged lines are kept beside the good ones.

    Raises:
        LabkitError: the file is missing, is a folder, or cannot be opened.
    """
    path = Path(path)
    content, problems = _to_utf8(_read_bytes(path))
    records = list(_parse(content, path.suffix.lower()))
    if not records:
        problems.append(problem(1, "empty-file", "there is no row in it; write one row a line"))
    return Records(records, problems)


def to_line(value: object) -> str:
    """`value` as one line of JSON that every UTF-8 reader accepts, without the line end."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: only its escape can be stored
        line = json.dumps(value)
    return line


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise LabkitError(f"{path} is a folder; name a .jsonl, .json or .csv file in it")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise LabkitError(f"{path} does not exist; check the name and the folder") from None
    except OSError as error:
        reason = error.strerror or error
        raise LabkitError(f"{path} cannot be read ({reason}); check its permissions") from error


def _to_utf8(content: bytes) -> tuple[bytes, list[Problem]]:
    """The content in UTF-8 without a mark, and what had to be done for that."""
    if content.startswith(_UTF8_MARK):
        message = "the file starts with a byte order mark; save it as UTF-8 without one"
        return content[len(_UTF8_MARK) :], [problem(1, "bom", message)]
    encoding = _wide_encoding(content)
    if encoding is None:
        return content, []
    message = f"the file is {encoding.upper()}; save it as UTF-8"
    # Half a character at the end of a file that was cut off becomes U+FFFD, which is found later.
    return content.decode(encoding, "replace").encode(), [problem(1, "not-utf8", message)]


def _wide_encoding(content: bytes) -> str | None:
    """UTF-16 or UTF-32 by its mark, or UTF-16 without one by the zero byte in each letter."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return encoding
    head = content[:1000]
    if head.count(0) * 3 < len(head) or not head:
        return None
    return "utf-16-le" if head[1:2] == b"\0" else "utf-16-be"


def _parse(content: bytes, suffix: str) -> Iterator[Record]:
    stripped = content.lstrip()
    if not stripped:
        return
    if suffix in (".csv", ".tsv"):
        yield from _whole_text(content, _parse_csv)
    elif stripped[:1] not in (b"[", b"{") and suffix not in (".jsonl", ".ndjson", ".json"):
        message = f"a {suffix or 'nameless'} file is not known; save it as .jsonl, .json or .csv"
        raw = content.decode(errors="backslashreplace")
        yield Record(1, raw=raw, problem=problem(1, "unknown-format", message))
    elif _is_json_lines(stripped, suffix):
        yield from _parse_lines(content)
    elif stripped.startswith(b"["):
        yield from _whole_text(content, _parse_array)
    else:
        yield from _whole_text(content, _parse_object)


def _is_json_lines(content: bytes, suffix: str) -> bool:
    """Whether each line is a row, rather than the whole file one list or one object."""
    first, _, rest = content.partition(b"\n")
    if first.startswith(b"["):
        return bool(rest.strip()) and not _load(first.decode(errors="replace"))[1]
    return suffix != ".json" or not rest.strip() or rest.lstrip().startswith(b"{")


def _whole_text(content: bytes, parse) -> Iterator[Record]:
    """Records of a format in which a row may span lines, so that one bad byte spoils the file."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raw = content.decode(errors="backslashreplace")
        yield Record(line, raw=raw, problem=problem(line, "not-utf8", _bad_byte(error)))
        return
    yield from parse(text)


def _bad_byte(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"byte 0x{byte:02X} at offset {error.start} is not UTF-8; save the file as UTF-8"


def _parse_lines(content: bytes) -> Iterator[Record]:
    """JSON Lines. Split at line feeds only: `splitlines` would also cut at U+2028 inside a text."""
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            found = problem(number, "not-utf8", _bad_byte(error))
            yield Record(number, raw=line.decode(errors="backslashreplace"), problem=found)
            continue
        row, complaint = _load(text)
        if complaint:
            cut = number == len(lines) and _is_cut_off(text)
            advice = "the file looks cut off here; copy it again" if cut else "mend the line"
            found = problem(number, "not-json", f"{complaint}; {advice}")
            yield Record(number, raw=text, problem=found)
        else:
            yield Record(number, row=row)


def _is_cut_off(text: str) -> bool:
    """Whether the JSON of a line stops before it is complete."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    return False


def _parse_array(text: str) -> Iterator[Record]:
    """One JSON list of rows. Rows before a fault are kept; what follows it cannot be read."""
    position = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    while position < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield _broken(text, counted, line, _complaint(error))
            return
        yield Record(line, row=row)
        position = _skip_space(text, position)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            yield _broken(text, position, line, "a comma or ] is missing after a row")
            return
    after = _skip_space(text, position + 1)
    if position >= len(text):
        line += text.count("\n", counted, position)
        yield _broken(text, position, line, "the closing ] is missing")
    elif after < len(text):
        line += text.count("\n", counted, after)
        yield _broken(text, after, line, "there is more text after the closing ]")


def _broken(text: str, position: int, line: int, complaint: str) -> Record:
    message = f"{complaint}; nothing after it can be read, so mend it or copy the file again"
    return Record(line, raw=text[position:], problem=problem(line, "not-json", message))


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _parse_object(text: str) -> Iterator[Record]:
    row, complaint = _load(text)
    if complaint:
        yield _broken(text, 0, 1, complaint)
    else:
        yield Record(1, row=row)


def _parse_csv(text: str) -> Iterator[Record]:
    """CSV with a header; comma, semicolon or tab, whichever the header holds most of."""
    header_line = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = max(",;\t", key=header_line.count)
    previous_limit = csv.field_size_limit(_LARGEST_CELL)
    try:
        yield from _csv_records(list(io.StringIO(text, newline="")), delimiter)
    finally:
        csv.field_size_limit(previous_limit)


def _csv_records(lines: list[str], delimiter: str) -> Iterator[Record]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while reader.line_num < len(lines):
        line, complaint, cells = reader.line_num + 1, "", []
        try:
            cells = next(reader)
        except csv.Error as error:
            complaint = f"{error}; close every quote, and double a quote inside a text"
        if header is None and any(cells):
            header = [name.strip() for name in cells]
            twice = next((name for name in header if name and header.count(name) > 1), None)
            if twice is not None:
                message = f"column {quote(twice)} stands twice; rename or drop one"
                yield Record(line, raw=lines[line - 1], problem=problem(line, "not-csv", message))
                return
            continue
        if header is not None and cells and len(cells) != len(header):
            complaint = (
                f"{len(cells)} values under {len(header)} column names; "
                "put quotes around a value that holds the separator"
            )
        if complaint:
            raw = "".join(lines[line - 1 : reader.line_num])
            yield Record(line, raw=raw, problem=problem(line, "not-csv", complaint))
        elif header is not None and cells:
            yield Record(line, row=_csv_row(header, cells))


def _csv_row(header: list[str], cells: list[str]) -> Row:
    """One row; a cell of a message column that holds a JSON list becomes that list."""
    row: Row = dict(zip(header, cells, strict=True))
    for name in _LIST_COLUMNS:
        if row.get(name, "").lstrip().startswith("[{"):
            value, complaint = _load(row[name])
            row[name] = row[name] if complaint else value
    return row


def _no_constants(name: str):
    raise ValueError(f"{name} is not a JSON number")


def _unique_fields(pairs: list[tuple[str, Any]]) -> Row:
    """The object; a field that stands twice would lose its first value in silence."""
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {quote(twice)} stands twice in one object")
    return row


_DECODER = json.JSONDecoder(parse_constant=_no_constants, object_pairs_hook=_unique_fields)


def _load(text: str) -> tuple[Any, str]:
    """The JSON value of `text` and "", or None and what is wrong with it."""
    try:
        return _DECODER.decode(text), ""
    except (ValueError, RecursionError) as error:
        return None, _complaint(error)


def _complaint(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "lists are nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error)
