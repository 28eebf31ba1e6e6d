"""Rows as `datasets.Dataset`: the tasks of the course, and columns under the names TRL expects."""

import os

from datasets import Dataset, DatasetDict

from labkit.data.formats import to_messages
from labkit.data.problems import quote
from labkit.data.rows import Rows
from labkit.data.validation import check_file
from labkit.errors import LabkitError
from labkit.paths import tasks_dir

TASKS = ("d1_tickets", "d2_newcomers", "d3_second_language", "d4_badcases", "d5_persona", "general")
_SPLIT_ORDER = ("train", "validation", "test")


def as_dataset(rows: Rows) -> Dataset:
    """The rows as a `Dataset` with every column of every row; a Dataset as it is.

    `Dataset.from_list` keeps the columns of the first row only, so it is not used.
    """
    if isinstance(rows, Dataset):
        return rows
    rows = list(rows)
    columns = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})


def load_task(name: str, split: str | None = None) -> DatasetDict | Dataset:
    """A fine-tuning task of the course: one split, or all of them by name.

    Args:
        name: one of `TASKS`, a folder of `data/tasks`.
        split: "train", "validation", "test", or another .jsonl file of that folder.

    Raises:
        ValueError: no task of that name.
        LabkitError: its files are missing, or one has a broken row; rows are never left out.
    """
    folder = tasks_dir() / name
    if not folder.is_dir() and name not in TASKS:
        raise ValueError(f"name={name!r} is no task; use one of {', '.join(TASKS)}")
    splits = sorted((path.stem for path in folder.glob("*.jsonl")), key=_position)
    if split is None and not splits:
        raise LabkitError(
            f"{folder} holds no .jsonl file; get it back with `git checkout {folder}`"
        )
    if split is None:
        return DatasetDict({each: _load_split(folder / f"{each}.jsonl") for each in splits})
    if split not in splits:
        found = f"found {', '.join(splits)}" if splits else "the folder is empty or missing"
        raise LabkitError(
            f"{folder / split}.jsonl does not exist ({found}); name one of those, "
            f"or get it back with `git checkout {folder}`"
        )
    return _load_split(folder / f"{split}.jsonl")


def _position(split: str) -> tuple[int, str]:
    known = _SPLIT_ORDER.index(split) if split in _SPLIT_ORDER else len(_SPLIT_ORDER)
    return known, split


def _load_split(path: os.PathLike) -> Dataset:
    problems, rows = check_file(path)
    errors = [*problems, *(found for row in rows for found in row.problems)]
    for found in errors:
        if found.severity == "error":
            raise LabkitError(
                f"{path}:{found.line}: {found.code}: {found.message}; "
                f"see every problem with `labkit validate {path}`"
            )
    return as_dataset(row.record.row for row in rows)


def to_prompt_completion(dataset: Rows) -> Dataset:
    """The rows with conversational `prompt` and `completion` columns, which TRL's trainers read.

    The completion is the last message, so of several turns only the last answer is learned. Rows
    of any accepted format will do; other columns are kept.

    Raises:
        ValueError: a row has no conversation, or one that does not end in an answer.
    """
    rows = []
    for index, row in enumerate(dataset):
        row = to_messages({name: value for name, value in row.items() if value is not None})
        messages = row.pop("messages")
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"row {index} must end in an assistant message, got {quote(messages[-1:])}; "
                "add its answer or leave the row out"
            )
        rows.append({**row, "prompt": messages[:-1], "completion": messages[-1:]})
    return as_dataset(rows)
