"""The `labkit` command, from outside: exit codes, one-line errors, progress, JSON, releases."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import pytest

from labkit import cli, paths
from labkit.errors import LabkitError
from labkit.notebooks.release import NotebookCost, Timetable, make_release, timetable

COMMANDS = (
    "doctor pretrain evaluate estimate measure plan scoreboard launch-table forgetting validate "
    "merge claims bench workbook release sweep mutate"
).split()
HEAVY = (
    *("torch", "transformers", "datasets", "pandas", "matplotlib", "numpy", "ray"),
    *("nbclient", "nbformat", "jsonschema", "jupyter_client"),
)
GOOD_ROW = {
    "messages": [
        {"role": "user", "content": "Where does Mira live?"},
        {"role": "assistant", "content": "Velden"},
    ]
}


def labkit(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "labkit.cli", *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(paths.root()), **options.pop("env", {})},
        **options,
    )


def write_rows(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def one_line(text: str) -> bool:
    return text.count("\n") == 1 and text.startswith("labkit: ")


# ---- help and bad usage ------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_cli_help_of_every_command_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"example: labkit {command}" in capsys.readouterr().out


def test_cli_help_names_every_command_and_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['labkit', '--help']\nfrom labkit.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print('loaded:', *[name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=paths.root()
    )
    assert all(f"\n    {command} " in done.stdout for command in COMMANDS)
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_cli_help_of_no_command_loads_anything_heavy():
    code = (
        "import sys\nfrom labkit.cli import main\n"
        f"for command in {COMMANDS}:\n"
        "    try: main([command, '--help'])\n    except SystemExit: pass\n"
        f"print('loaded:', *[name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=paths.root()
    )
    assert done.stdout.count("usage: labkit ") == len(COMMANDS)
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["estimat"], "invalid choice: 'estimat'"),
        (["doctor", "--jsn"], "unrecognized arguments: --jsn"),
        (["pretrain", "--steps", "0"], "--steps: '0': give a whole number from 1"),
        (["pretrain", "--seed", "-1"], "--seed: '-1': give a whole number from 0"),
        (["pretrain", "--precision", "fp8"], "invalid choice: 'fp8'"),
        (["evaluate", "--split", "train"], "invalid choice: 'train'"),
        (["forgetting", "bundled"], "the following arguments are required: after"),
        (["forgetting", "a", "b", "--rows", "0"], "--rows: '0': give a whole number from 1"),
        (["forgetting", "a", "b", "--margin", "0"], "'0': give a number between 0 and 100"),
        (["forgetting", "a", "b", "--margin", "few"], "'few': give a number between 0 and 100"),
        (["claims", "more"], "unrecognized arguments: more"),
        (["estimate"], "the following arguments are required: config"),
        (["estimate", "bundled", "--seq-len", "long"], "argument --seq-len: invalid int value"),
        (["estimate", "bundled", "--rows", "2"], "unrecognized arguments: --rows 2"),
        (["measure", "bundled", "--optimizer", "lion"], "argument --optimizer: invalid choice"),
        (["measure", "--suite", "--seq-len", "8"], "--suite has its own list: leave out --seq-len"),
        (["plan", "bundled", "--memory", "much"], "argument --memory: 'much' is no size: give"),
        (["scoreboard", "--out"], "argument --out: expected one argument"),
        (["launch-table", "--method", "dora"], "argument --method: invalid choice: 'dora'"),
        (["sweep", "x.ipynb", "--seeds", "many"], "argument --seeds: seeds='many': want numbers"),
        (["sweep"], "the following arguments are required: notebook"),
        (["mutate", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_cli_bad_usage_exits_2_and_says_in_one_line_what_and_where_help_is(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error and one_line(error)
    command = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    assert error.endswith(f"; see `{f'labkit {command}'.strip()} --help`\n")


def test_cli_a_callers_mistake_found_later_exits_2_in_one_line(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", GOOD_ROW)
    assert cli.main(["validate", str(rows), "--fix", str(rows)]) == 2
    assert "would overwrite" in (error := capsys.readouterr().err) and one_line(error)
    assert cli.main(["bench", "--only", "wheels"]) == 2
    assert "--only wheels: no such part: use import" in (error := capsys.readouterr().err)
    assert one_line(error)


# ---- errors, interruptions, pipes --------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (LabkitError("a.json: damaged:\nrestore it"), 1, "a.json: damaged: restore it"),
        (ValueError("ratio=-1 must be above 0"), 2, "ratio=-1 must be above 0"),
        (OSError(errno.ENOSPC, "No space left on device", "out.json"), 1, "out.json: the disk is "),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "out: no permission (Perm"),
        (OSError(errno.EROFS, "Read-only file system", "out"), 1, "out: no permission (Read-only"),
        (FileNotFoundError(errno.ENOENT, "No such file", "gone"), 1, "gone: no such file or fol"),
        (ModuleNotFoundError("No module named 'trl'", name="trl"), 1, "trl is not installed: run"),
        (KeyboardInterrupt(), 130, "interrupted; nothing half written is left"),
    ],
)
def test_cli_says_every_failure_in_one_line(raised, status, said, monkeypatch, capsys):
    def fail(*_):
        raise raised

    monkeypatch.setattr("labkit.data.validate_file", fail, raising=False)
    assert cli.main(["validate", "rows.jsonl"]) == status
    error = capsys.readouterr().err
    assert one_line(error) and said in error


def test_cli_a_missing_file_is_named_with_the_next_step(tmp_path):
    done = labkit("validate", tmp_path / "gone.jsonl")
    assert done.returncode == 1 and done.stdout == ""
    assert one_line(done.stderr) and "gone.jsonl" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for a child")
def test_cli_ctrl_c_exits_130_with_one_line(tmp_path):
    rows = tmp_path / "rows.jsonl"
    os.mkfifo(rows)  # reading it blocks, so the command is surely at work
    process = subprocess.Popen(
        [sys.executable, "-m", "labkit.cli", "validate", str(rows)],
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=paths.root(),
    )
    writer = os.open(rows, os.O_WRONLY)  # returns once the command has opened it to read
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    os.close(writer)
    assert process.returncode == 130
    assert error.startswith("labkit: interrupted") and one_line(error)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes close in another way")
def test_cli_a_reader_that_leaves_is_no_error(tmp_path):
    # More than a pipe holds, so that the command writes after its reader has gone.
    rows = write_rows(tmp_path / "rows.jsonl", *({"messages": []} for _ in range(3000)))
    command = f"'{sys.executable}' -m labkit.cli validate '{rows}' | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        encoding="utf-8",
        cwd=paths.root(),
    )
    assert done.stdout.count("\n") == 1
    assert (done.returncode, done.stderr) == (141, "")


# ---- commands ----------------------------------------------------------------------------------


def test_cli_validate_exits_by_what_it_found(tmp_path):
    clean = write_rows(tmp_path / "clean.jsonl", GOOD_ROW)
    assert labkit("validate", clean).returncode == 0
    empty = {"role": "assistant", "content": ""}
    dirty = write_rows(
        tmp_path / "dirty.jsonl", GOOD_ROW, {"messages": [GOOD_ROW["messages"][0], empty]}
    )
    done = labkit("validate", dirty, "--json")
    assert done.returncode == 1
    (found,) = json.loads(done.stdout)
    assert (found["line"], found["code"], found["severity"]) == (2, "empty-answer", "error")


def test_cli_claims_prints_the_ledger(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    assert cli.main(["claims", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert cli.main(["claims"]) == 1
    assert "holds no results: make them with `labkit sweep" in capsys.readouterr().err
    claim = {
        "id": "full-forgets",
        "statement": "It forgets.",
        "verdict": "holds",
        "value": 0.25,
        "interval": [0.2, 0.3],
        "bar": 0.05,
        "rule": "at least 0.05",
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "02_x.json").write_text(json.dumps({"claims": [claim]}))
    assert cli.main(["claims"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == "02_x full-forgets holds 0.25 0.2 to 0.3 at least 0.05".split()
    assert cli.main(["claims", "--markdown"]) == 0
    page = capsys.readouterr().out
    assert "## 02_x\n" in page
    assert "| It forgets. | holds | 0.25 | 0.2 to 0.3 | at least 0.05 | general macro" in page
    assert "| McCloskey" in page


def test_cli_evaluate_scores_a_folder(tmp_path, monkeypatch, capsys):
    from tiny import tiny_model

    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    folder = tmp_path / "tasks" / "general"
    folder.mkdir(parents=True)
    rows = [
        {"id": str(n), "skill": skill, "key": str(n), "entity": str(n), **GOOD_ROW}
        for n, skill in enumerate(["facts", "unknown", "bio_only"] * 4)
    ]
    write_rows(folder / "test.jsonl", *rows)
    model = tiny_model("llama", tmp_path / "model")
    assert cli.main(["evaluate", str(model), "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["macro"] == 0.0  # random weights never write Velden and stop
    assert sorted(got["skills"]) == ["facts", "unknown"]
    assert got["skills"]["facts"]["n"] == got["bio_only"]["n"] == got["unknown_names"]["n"] == 4
    assert cli.main(["evaluate", str(model)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in table[1:]] == [
        *("facts", "unknown", "macro", "bio_only", "unknown_names")
    ]
    assert table[3][1:3] == ["8", "0.000"] and table[3][6] == "0.97" and "no" in table[3]


def test_cli_forgetting_prints_what_was_measured(tmp_path, capsys):
    from tiny import tiny_model

    before = tiny_model("llama", tmp_path / "before")
    after = tiny_model("llama", tmp_path / "after", seed=1)
    text, figure = tmp_path / "notes.txt", tmp_path / "forgot.svg"
    text.write_text("Mira lives in Velden.\nSort 9 4 7.\n", encoding="utf-8")
    arguments = ["forgetting", str(before), str(after), "--text", str(text)]
    capsys.readouterr()  # what saving the models printed
    assert cli.main([*arguments, "--figure", str(figure)]) == 0
    out, progress = capsys.readouterr()
    head, row, line = out.splitlines()
    assert head.split()[:4] == ["measure", "before", "after", "change"]
    assert row.startswith("loss, nats per token  ") and " on 2 lines of notes.txt" in line
    assert progress.splitlines()[:2] == [f"loading {before}", f"loading {after}"]
    assert figure.read_text(encoding="utf-8").startswith("<?xml")
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["skills"] is None and found["text"]["texts"] == 2
    assert found["text"]["change"] == pytest.approx(
        found["text"]["after"] - found["text"]["before"], abs=1e-9
    )
    assert f"{found['text']['before']:.3f}" in row


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["bundled", "./nowhere"], 1, "model folder ./nowhere is missing: check the path"),
        (["bundled", "bundled", "--figure", "x.gif"], 2, "--figure x.gif: name a .png, .svg, .pdf"),
        (["bundled", "bundled", "--base", "bundled"], 2, "neither bundled nor bundled is an adapt"),
        (["bundled", "bundled", "--text", "gone.txt"], 1, "gone.txt cannot be read: No such file"),
    ],
)
def test_cli_forgetting_says_what_is_wrong_in_one_line(arguments, status, said, capsys):
    assert cli.main(["forgetting", *arguments]) == status
    error = capsys.readouterr().err
    assert one_line(error) and said in error


def test_cli_evaluate_names_a_missing_model(tmp_path):
    done = labkit("evaluate", tmp_path / "nothing")
    assert done.returncode == 1
    assert "nothing" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_cli_table_aligns_text_left_and_numbers_right(capsys):
    cli._table(["what", "n"], [["a", "5"], ["long name", "1,000"]])
    assert capsys.readouterr().out == "what           n\na              5\nlong name  1,000\n"


def test_cli_meter_prints_seldom_where_no_one_watches(capsys):
    meter = cli.Meter()
    for n in range(1000):
        meter(f"{n} of 1000")
    meter.end()
    assert capsys.readouterr().err == ""  # all of it took less than 2 s


# ---- releases ----------------------------------------------------------------------------------

PLAN = Timetable((NotebookCost("02_x", 63.0, 900_000_000, 2, 15),))


def small_course(folder: Path) -> Path:
    """A course of one notebook with one solution."""
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# A question?", id="title"),
            nbformat.v4.new_code_cell("steps = ...  # your answer", id="stub"),
            nbformat.v4.new_code_cell(
                "# BEGIN SOLUTION\nsteps = 1600 // 16\n# END SOLUTION",
                id="solved",
                metadata={"tags": ["solution"]},
            ),
        ]
    )
    for part in ("labkit/__pycache__", "notebooks", "data", "tests"):
        (folder / part).mkdir(parents=True)
    nbformat.write(notebook, folder / "notebooks" / "02_x.ipynb")
    for name in ("lab.py", "labkit/cli.py", "labkit/__pycache__/cli.pyc", "tests/test_x.py"):
        (folder / name).write_text("pass\n")
    (folder / "data" / ".hidden").write_text("secret")
    return folder


def test_cli_release_leaves_out_solutions_tests_and_hidden_files(tmp_path):
    course, out = small_course(tmp_path / "course"), tmp_path / "students"
    report = make_release(out, PLAN, course)
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert names == ["TIMETABLE.md", "lab.py", "labkit/cli.py", "notebooks/02_x.ipynb"]
    assert report.files == 4
    notebook = (out / "notebooks" / "02_x.ipynb").read_text(encoding="utf-8")
    assert "your answer" in notebook and "1600 // 16" not in notebook
    page = (out / "TIMETABLE.md").read_text(encoding="utf-8")
    assert "| 02_x | 1.1 | 900 | 2 | 15 |" in page  # 63 s and 9e8 bytes


def test_cli_release_as_zip_is_the_same_every_time(tmp_path):
    course = small_course(tmp_path / "course")
    make_release(tmp_path / "one.zip", PLAN, course)
    time.sleep(0.01)
    make_release(tmp_path / "two.zip", PLAN, course)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert "course/notebooks/02_x.ipynb" in archive.namelist()


def test_cli_release_overwrites_nothing_and_leaves_no_half(tmp_path):
    course = small_course(tmp_path / "course")
    (tmp_path / "here").mkdir()
    with pytest.raises(LabkitError, match="here exists already: name another"):
        make_release(tmp_path / "here", PLAN, course)
    with pytest.raises(LabkitError, match="lies inside the course"):
        make_release(course / "data" / "copy", PLAN, course)
    notebook = nbformat.read(course / "notebooks" / "02_x.ipynb", as_version=4)
    notebook.cells[0].source = "steps = 1600 // 16"
    nbformat.write(notebook, course / "notebooks" / "02_x.ipynb")
    with pytest.raises(ValueError, match="of a solution also stands elsewhere"):
        make_release(tmp_path / "students", PLAN, course)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["course", "here"]


def test_cli_release_takes_its_minutes_from_a_bench_file(tmp_path, monkeypatch):
    course = small_course(tmp_path / "course")
    monkeypatch.setattr(paths, "notebooks_dir", lambda: course / "notebooks")
    bench = tmp_path / "bench.json"
    rows = [{"what": "02_x: time", "value": 63.0}, {"what": "02_x: kernel memory", "value": 1024}]
    bench.write_text(json.dumps({"rows": rows}))
    (cost,) = timetable(costs=bench).costs
    assert (cost.name, cost.seconds, cost.peak_bytes) == ("02_x", 63.0, 2**30)
    (cost,) = timetable(run=False).costs
    assert "not measured" in cost.line()
    bench.write_text("[]")
    with pytest.raises(LabkitError, match="--costs .*bench.json: not a bench file"):
        timetable(costs=bench)


def test_cli_workbook_builds_into_a_folder(tmp_path, monkeypatch, capsys):
    course = small_course(tmp_path / "course")
    monkeypatch.setattr(paths, "notebooks_dir", lambda: course / "notebooks")
    assert cli.main(["workbook", "--target", str(tmp_path / "mine")]) == 0
    assert "workbook: 1 written" in capsys.readouterr().out
    assert (tmp_path / "mine" / "02_x.ipynb").is_file()
