"""Splits by key, leaks, tasks on disk, and rows as datasets."""

import json

import pytest
from datasets import Dataset

from labkit import data
from labkit.errors import LabkitError


def row(i, **fields):
    messages = [
        {"role": "user", "content": f"Question {i}?"},
        {"role": "assistant", "content": f"Answer {i}"},
    ]
    return {"id": f"r{i}", "messages": messages, "key": f"k{i}", **fields}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def ids(splits):
    return {name: set(split["id"]) for name, split in splits.items()}


def test_equal_keys_meet_in_one_split_and_no_row_is_lost():
    rows = [row(i, key=f"k{i // 3}") for i in range(600)]
    splits = data.split_by_key(rows)
    assert list(splits) == ["train", "validation", "test"]
    assert sorted(i for split in splits.values() for i in split["id"]) == sorted(
        r["id"] for r in rows
    )
    for a, b in [("train", "test"), ("train", "validation"), ("validation", "test")]:
        assert data.leaks(splits[a], splits[b]) == []


def test_sizes_follow_the_fractions():
    splits = data.split_by_key([row(i) for i in range(5000)], {"train": 0.7, "test": 0.3})
    # 3500 of 5000 expected; the binomial deviation is 32.
    assert abs(len(splits["train"]) - 3500) < 4 * 32


def test_adding_and_reordering_rows_moves_no_old_one():
    few = [row(i) for i in range(200)]
    many = [row(i) for i in range(1000)][::-1]
    before, after = ids(data.split_by_key(few)), ids(data.split_by_key(many))
    assert all(before[name] <= after[name] for name in before)


def test_the_seed_and_the_hash_decide():
    rows = [row(i) for i in range(200)]
    assert ids(data.split_by_key(rows)) == ids(data.split_by_key(Dataset.from_list(rows)))
    assert ids(data.split_by_key(rows)) != ids(data.split_by_key(rows, seed=1))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"id": "a"}] * 9, {}, "row 0 of rows has no field 'key'; name one of id with key="),
        ([row(1)] * 9, {}, "split '.*' is empty: 9 rows are too few"),
        ([row(1)], {"fractions": {"train": 0.8, "test": 0.1}}, "must be positive and add up to 1"),
        ([row(1)], {"fractions": {"train": 1.1, "test": -0.1}}, "must be positive and add up to 1"),
        ([row(1)], {"fractions": {}}, "must be positive and add up to 1"),
    ],
)
def test_split_refuses(rows, options, message):
    with pytest.raises(ValueError, match=message):
        data.split_by_key(rows, **options)


def test_leaks_are_sorted_keys_of_both():
    a, b = [row(3), row(1), row(2)], [row(2), row(3), row(9)]
    assert data.leaks(a, b) == ["k2", "k3"]
    assert data.leaks(a, [row(7)]) == []
    with pytest.raises(ValueError, match="row 0 of b has no field 'entity'"):
        data.leaks([row(1, entity="x")], b, key="entity")


def test_validate_splits_names_the_leaking_row_and_its_twin(tmp_path):
    no_key = {name: value for name, value in row(5).items() if name != "key"}
    files = {
        "train": write(tmp_path / "train.jsonl", [row(1), row(2), no_key]),
        "test": write(tmp_path / "test.jsonl", [row(8), row(7, key="k2"), {**no_key, "id": "x"}]),
    }
    problems = data.validate_splits(files)
    assert problems["train"] == []
    assert [(p.line, p.code) for p in problems["test"]] == [(2, "leak"), (3, "leak")]
    assert problems["test"][0].message == (
        "'k2' also stands in train, line 2; keep it in one split"
    )


def test_a_key_that_is_only_a_row_number_hides_no_leak(tmp_path):
    files = {
        "train": write(tmp_path / "train.jsonl", [row(1, key="1")]),
        "test": write(tmp_path / "test.jsonl", [row(1, key="2")]),
    }
    assert [p.code for p in data.validate_splits(files)["test"]] == ["leak"]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    return tmp_path / "tasks"


def test_load_task_gives_every_row_of_every_split(tasks):
    for name, n_rows in (("validation", 2), ("test", 3), ("train", 4), ("extra", 1)):
        write(tasks / "d1_tickets" / f"{name}.jsonl", [row(i) for i in range(n_rows)])
    task = data.load_task("d1_tickets")
    assert list(task) == ["train", "validation", "test", "extra"]
    assert [len(split) for split in task.values()] == [4, 2, 3, 1]
    assert data.load_task("d1_tickets", "test")[1] == row(1)


def test_load_task_names_the_broken_line(tasks):
    path = write(tasks / "d1_tickets" / "train.jsonl", [row(1), row(2, messages=[])])
    message = r"train.jsonl:2: no-assistant: .*; see every problem with `labkit validate .*train"
    with pytest.raises(LabkitError, match=message):
        data.load_task("d1_tickets")
    path.write_text("", encoding="utf-8")
    with pytest.raises(LabkitError, match="train.jsonl:1: empty-file"):
        data.load_task("d1_tickets", "train")


def test_load_task_names_what_is_missing(tasks):
    with pytest.raises(ValueError, match="name='d1_ticket' is no task; use one of d1_tickets"):
        data.load_task("d1_ticket")
    with pytest.raises(LabkitError, match="d1_tickets holds no .jsonl file; get it back with `git"):
        data.load_task("d1_tickets")
    write(tasks / "d1_tickets" / "train.jsonl", [row(1)])
    with pytest.raises(LabkitError, match=r"test.jsonl does not exist \(found train\)"):
        data.load_task("d1_tickets", "test")


def test_as_dataset_keeps_columns_that_the_first_row_lacks():
    dataset = data.as_dataset([{"a": 1}, {"a": 2, "b": "x"}])
    assert dataset.to_list() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]
    assert data.as_dataset(dataset) is dataset


def test_to_prompt_completion_takes_the_last_answer():
    turns = row(1)["messages"] + row(2)["messages"]
    dataset = Dataset.from_list([row(1, messages=turns)])
    (converted,) = data.to_prompt_completion(dataset)
    assert converted == {
        "id": "r1",
        "key": "k1",
        "prompt": turns[:3],
        "completion": [{"role": "assistant", "content": "Answer 2"}],
    }
    assert dataset.column_names == ["id", "messages", "key"]  # the input is as it was
    with pytest.raises(ValueError, match="row 0 must end in an assistant message, got .*user"):
        data.to_prompt_completion([row(1, messages=turns[:1])])


def test_to_prompt_completion_reads_other_formats():
    rows = [{"instruction": "Name a colour.", "input": None, "output": "red"}]
    assert data.to_prompt_completion(rows).to_list() == [
        {
            "prompt": [{"role": "user", "content": "Name a colour."}],
            "completion": [{"role": "assistant", "content": "red"}],
        }
    ]
