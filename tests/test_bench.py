"""The bench measures what it says: the same work on both sides, and bars read the right way."""

import json

import pytest
import torch
from tiny import tiny_model

from labkit import bench, cli, data, models, paths
from labkit.bench import Bench, Row
from labkit.errors import LabkitError

ANSWERS = ("Velden", "blue", "12 30 42", "unknown", "hello you", "9 7 4")


def rows(count: int) -> list[dict]:
    """Rows whose answers differ in length."""
    return [
        {
            "id": str(n),
            "entity": str(n),
            "skill": "facts",
            "messages": [
                {"role": "user", "content": f"Where does Mira {n} live?"},
                {"role": "assistant", "content": ANSWERS[n % len(ANSWERS)]},
            ],
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def tiny_loaded(tmp_path_factory):
    return models.load(tiny_model("llama", tmp_path_factory.mktemp("bench")), device="cpu")


def test_bench_reads_bars_in_both_directions():
    slow, quick = Row("time", 121, "s", 120), Row("time", 120, "s", 120)
    assert (slow.holds, quick.holds, quick.rule) == (False, True, "≤ 120")
    low, high = (Row("ratio", value, "times", 10, at_least=True) for value in (9.9, 10))
    assert (low.holds, high.holds, high.rule) == (False, True, "≥ 10")


def test_bench_json_has_the_promised_keys():
    table = Bench([Row("time", 1.5, "s", 2)], {"suite": "it failed"}).to_json()
    assert table["rows"] == [
        {"what": "time", "value": 1.5, "unit": "s", "bar": 2, "at_least": False, "holds": True}
    ]
    assert table["missing"] == {"suite": "it failed"}


def test_bench_spreads_rows_evenly():
    assert bench.spread(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert bench.spread(list(range(3)), 5) == [0, 1, 2]


def test_bench_refuses_an_unknown_part():
    with pytest.raises(ValueError, match="part 'wheels' is unknown: use import, start, estimate"):
        bench.measure(["wheels"])


def test_bench_a_part_that_fails_is_missing_and_the_others_are_measured(monkeypatch, capsys):
    def fails(table, say):
        raise LabkitError("no model: make one")

    def works(table, say):
        table.rows.append(Row("time", 1.0, "s", 2))

    monkeypatch.setattr(bench, "PARTS", {"first": fails, "second": works, "suite": fails})
    measured = bench.measure(say=lambda line: None)
    assert [row.what for row in measured.rows] == ["time"]
    assert measured.missing == {"first": "no model: make one"}  # suite only when it is named
    assert cli.main(["bench"]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].split() == ["time", "1", "s", "≤", "2", "yes"]
    assert "not measured: first: no model: make one" in printed.err


def test_bench_import_is_measured_and_written(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert cli.main(["bench", "--only", "import", "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text(encoding="utf-8"))
    importing, helping = printed["rows"]
    assert importing["what"] == "import labkit" and importing["bar"] == 0.3
    assert 0 < importing["value"] < helping["value"] < 60


def test_bench_trainer_and_bare_loop_do_the_same_work(tiny_loaded):
    model, tokenizer = tiny_loaded
    dataset = data.to_prompt_completion(data.as_dataset(rows(64)))
    steps = 2 * bench.LOGGING_STEPS
    measured = bench.compare_steps(model, tokenizer, dataset, steps=steps, warmup=2, batch_size=4)
    assert measured.ratio == measured.trainer / measured.bare > 0
    bare = torch.tensor(measured.bare_losses).view(2, bench.LOGGING_STEPS).mean(1)
    assert len(measured.bare_losses) == steps
    # Equal to the last step only if data, loss, clipping, optimizer and rate are all the same.
    torch.testing.assert_close(torch.tensor(measured.trainer_losses), bare, atol=2e-4, rtol=0)
    assert bare[1] < bare[0]


def test_bench_scoring_agrees_with_generate(tiny_loaded):
    model, tokenizer = tiny_loaded
    measured = bench.compare_scoring(model, tokenizer, rows(12), say=lambda line: None, chunks=2)
    assert measured.agreeing == 12
    assert measured.one_by_one_ratio > 0 and measured.batched_ratio > 0


def test_bench_start_refuses_an_environment_that_is_not_lab_pys(monkeypatch):
    monkeypatch.setattr(bench, "_SECOND_START", "import sys; sys.exit('run python3 lab.py once')")
    measured = bench.measure(["start"], say=lambda line: None)
    assert measured.rows == []
    assert measured.missing == {"start": "run python3 lab.py once"}


def test_bench_adds_up_what_the_sweeps_took(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "results_dir", lambda: tmp_path)
    assert "holds no results" in bench.measure(["results"], say=print).missing["results"]
    for name, seconds in (("02_x", 1800), ("03_x", 5400)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"seconds": seconds}))
    (row,) = bench.measure(["results"], say=print).rows
    assert (row.value, row.unit, row.bar, row.holds) == (2.0, "h", 6, True)


def test_bench_runs_notebooks_and_names_those_that_fail(tmp_path, monkeypatch):
    import nbformat

    monkeypatch.setattr(paths, "notebooks_dir", lambda: tmp_path)
    for name, source in (("00_good", "print(1)"), ("01_bad", "1 / 0")):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, id="cell")])
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    measured = bench.measure(["notebooks"], say=lambda line: None)
    seconds, memory = measured.rows
    assert (seconds.what, seconds.bar) == ("00_good: time", 120)
    assert (memory.what, memory.bar, memory.unit) == ("00_good: kernel memory", 1536, "MiB")
    assert 5 < memory.value < 1536
    assert (
        list(measured.missing) == ["01_bad"] and "ZeroDivisionError" in measured.missing["01_bad"]
    )
