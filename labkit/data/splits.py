"""Splits without leakage: a row's split follows from its key alone."""

import hashlib
import os
from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from labkit.data.problems import Problem, problem, quote
from labkit.data.rows import Rows
from labkit.data.validation import CheckedRow, check_file

if TYPE_CHECKING:
    from datasets import Dataset

_FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}


def split_by_key(
    rows: Rows,
    fractions: Mapping[str, float] = _FRACTIONS,
    key: str = "key",
    seed: int = 0,
) -> "dict[str, Dataset]":
    """Split rows by a hash of their key, so that equal keys always meet in one split.

    Whether a row is for testing depends on its key and the seed, not on the other rows: adding
    rows never moves an old one. The sizes follow `fractions` closely only for many keys.

    Args:
        rows: each with a field `key` that names the problem behind it.
        fractions: split name to its share of the keys; they add up to 1.

    Raises:
        ValueError: a row without the key, shares that do not add up, or a split left empty.
    """
    from labkit.data.tables import as_dataset

    if min(fractions.values(), default=0) <= 0 or abs(sum(fractions.values()) - 1) > 1e-9:
        raise ValueError(f"fractions={dict(fractions)} must be positive and add up to 1")
    dataset = as_dataset(rows)
    members: dict[str, list[int]] = {name: [] for name in fractions}
    for index, value in enumerate(_keys(dataset, key, "rows")):
        members[_split_of(value, fractions, seed)].append(index)
    for name, indices in members.items():
        if not indices:
            raise ValueError(
                f"split {name!r} is empty: {len(dataset)} rows are too few for "
                f"fractions={dict(fractions)}; add rows or ask for fewer splits"
            )
    return {name: dataset.select(indices) for name, indices in members.items()}


def _split_of(key: str, fractions: Mapping[str, float], seed: int) -> str:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    names = list(fractions)
    for name, upper in zip(names, accumulate(fractions.values()), strict=True):
        if position < upper:
            return name
    return names[-1]  # rounding left the sum a hair below 1


def _keys(rows: Rows, key: str, argument: str) -> list[str]:
    keys = []
    for index, row in enumerate(rows):
        if row.get(key) is None:
            raise ValueError(
                f"row {index} of {argument} has no field {key!r}; "
                f"name one of {', '.join(row)} with key="
            )
        keys.append(str(row[key]))
    return keys


def leaks(a: Rows, b: Rows, key: str = "key") -> list[str]:
    """Keys that stand in both sets of rows, sorted; an empty list when nothing leaks.

    Raises:
        ValueError: a row without the key.
    """
    return sorted(set(_keys(a, key, "a")) & set(_keys(b, key, "b")))


def validate_splits(
    paths: Mapping[str, str | os.PathLike], key: str = "key"
) -> dict[str, list[Problem]]:
    """Problems of each split's file, and `leak` where an earlier split has a row's key or prompt.

    Args:
        paths: split name to file, in the order train, validation, test.
        key: field that names the problem behind a row; its prompt counts too, since a key that
            is only a row number would hide the same question in two splits.
    """
    found: dict[str, list[Problem]] = {}
    first_seen: dict[str, tuple[str, int]] = {}
    for split, path in paths.items():
        problems, rows = check_file(path)
        problems = problems + [p for row in rows for p in row.problems]
        own: dict[str, tuple[str, int]] = {}
        for row in rows:
            marks = _leak_marks(row, key)
            name = next((mark for mark in marks if mark in first_seen), None)
            if name is not None:
                other, line = first_seen[name]
                message = f"{quote(name)} also stands in {other}, line {line}; keep it in one split"
                problems.append(problem(row.record.line, "leak", message))
            else:
                own |= {mark: (split, row.record.line) for mark in marks if mark not in own}
        first_seen |= own
        found[split] = sorted(problems, key=lambda p: p.line)
    return found


def _leak_marks(row: CheckedRow, key: str) -> list[str]:
    """What a row has in common with another one that asks the same: its key, and its prompt."""
    fields = row.record.row
    named = fields.get(key) if isinstance(fields, dict) else None
    prompt = row.said.prompt.replace("\0", " ") if row.said else ""
    return [mark for mark in ("" if named is None else str(named), prompt) if mark]
