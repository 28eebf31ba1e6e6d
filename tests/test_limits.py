"""Where a GPU ends: the search by hand, the list with a stand-in, and what was found on an H200."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from labkit import cli, paths
from labkit.errors import LabkitError
from labkit.memory import estimate, fits, gpus, limit_suite, limits, measure_command, suite
from labkit.memory.gpus import find, reserve_bytes
from labkit.memory.limit_suite import TRAINING, WHOLE, LimitCase, limit_cases, run_limits
from labkit.memory.limits import DEFAULT, EXPANDABLE, Limit, allocator, find_limit, grow, plan_rows
from labkit.memory.plan import AT_THE_EDGE, make_plan
from labkit.memory.reference import model

GIB = 2**30
HOPPER = {"cublas_workspace": 2**25}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")

# ---- the search --------------------------------------------------------------------------------


def search(end: int, planned: int, most: int):
    """(what `grow` finds where rows up to `end` run, sizes that it tried)."""
    tried = []

    def holds(rows):
        tried.append(rows)
        return rows <= end

    return grow(holds, planned, most), tried


@pytest.mark.parametrize(
    ("end", "planned", "most", "tried"),
    [
        (21, 20, 24, [1, 20, 24, 22, 21]),  # between what was planned and what tensors alone take
        (20, 20, 21, [1, 20, 21]),  # exactly what was planned
        (24, 20, 24, [1, 20, 24, 25]),  # exactly where tensors alone would end
        (30, 20, 24, [1, 20, 24, 25, 27, 31, 29, 30]),  # planned too small
        (5, 20, 24, [1, 20, 10, 5, 7, 6]),  # planned too large
        (1, 1, 1, [1, 2]),
        (3, 1, 1, [1, 2, 4, 3]),
    ],
)
def test_the_search_by_hand(end, planned, most, tried):
    assert search(end, planned, most) == (end, tried)


def test_where_not_even_one_row_runs_one_is_tried():
    assert search(0, 20, 24) == (None, [1]) == search(0, 1, 1)


def test_every_end_is_found_in_few_tries_and_no_size_is_tried_twice():
    for planned, more, end in itertools.product((1, 2, 7, 40), (0, 1, 9), range(1, 70)):
        most = planned + more
        found, tried = search(end, planned, most)
        assert found == end and len(tried) == len(set(tried))
        assert len(tried) <= 3 + 2 * math.ceil(math.log2(max(end, planned) + 1))
        if planned <= end < most:
            assert len(tried) <= 3 + math.ceil(math.log2(most - planned))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, DEFAULT),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, EXPANDABLE),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, EXPANDABLE),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:True"}, EXPANDABLE),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, DEFAULT),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, DEFAULT),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, DEFAULT),
        (  # torch reads the second only where the first is not set
            {"PYTORCH_CUDA_ALLOC_CONF": "", "PYTORCH_ALLOC_CONF": "expandable_segments:True"},
            DEFAULT,
        ),
    ],
    ids=str,
)
def test_the_allocator_is_read_as_torch_reads_it(variables, said):
    assert allocator(variables) == said


# ---- one limit, on a stand-in for a GPU --------------------------------------------------------

SMALL = model("Qwen2.5-0.5B")
CONTEXT = 800 * 2**20


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 40 GiB on which passes of up to `end` rows run."""
    found = SimpleNamespace(end=8, total=40 * GIB, fractions=[], tried=[], fails_to_build=False)

    class Run:
        def __init__(self, config, arch, options):
            if found.fails_to_build:
                raise torch.OutOfMemoryError("CUDA out of memory")
            assert (options.device, options.batch_size) == ("cuda", 1) and not found.fractions
            self.arch, self.options = arch, options
            self.optimizer = SimpleNamespace(zero_grad=lambda set_to_none: None)

        def step(self):
            found.tried.append(self.options.batch_size)
            assert len(found.fractions) == 1  # as long as it is limited
            if self.batch != self.options.batch_size or self.batch > found.end:
                raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(limits, "Run", Run)
    monkeypatch.setattr(limits, "random_batch", lambda options, *_: options.batch_size)
    monkeypatch.setattr(limits, "_context_bytes", lambda: CONTEXT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(limits, "clean_gpu", lambda: 0)
    properties = SimpleNamespace(total_memory=found.total, major=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", found.fractions.append)
    for name in limits.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return found


def test_a_limit_is_found_on_a_card_that_is_played(gpu, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    card, lines = find("RTX 3060 12GB").memory_bytes, []
    found = find_limit(SMALL, card, say=lines.append, **TRAINING, batch_size=5)
    planned, most = plan_rows(SMALL, card, CONTEXT, TRAINING | HOPPER)
    assert found == Limit(card, CONTEXT, EXPANDABLE, planned, most, 8)
    assert planned < 8 < most and found.kept_promise
    assert gpu.fractions == [(card - CONTEXT) / gpu.total, 1.0]
    # Two steps of each size, as only the second has the optimizer's states from its start.
    assert gpu.tried == [1, 1, planned, planned, most, *[7, 7, 8, 8]]
    assert lines[0] == "building the model"
    assert lines[1:4] == [
        "rows of a pass: 1 ran", f"rows of a pass: {planned} ran",
        f"rows of a pass: {most} ran out of memory",
    ]  # fmt: skip


def test_without_a_card_it_is_the_whole_gpu(gpu):
    gpu.end = 0
    found = find_limit(SMALL, **TRAINING)
    assert (found.memory_bytes, found.allocator, found.found) == (gpu.total, DEFAULT, None)
    assert not found.kept_promise
    assert gpu.fractions == [(gpu.total - CONTEXT) / gpu.total, 1.0]


def test_a_limit_that_cannot_be_looked_for_is_refused_in_one_line(gpu, monkeypatch):
    for card in (gpu.total + 1, 0, -1):
        with pytest.raises(ValueError, match=r"this GPU can play cards of up to 40.00 GiB: name"):
            find_limit(SMALL, card, **TRAINING)
    with pytest.raises(ValueError, match="device='cpu': a limit is found on a CUDA device"):
        find_limit(SMALL, device="cpu")
    with pytest.raises(ValueError, match="num_devices=2: a step is measured on one device"):
        find_limit(SMALL, num_devices=2)
    monkeypatch.setattr(limits, "_context_bytes", lambda: 12 * GIB)
    with pytest.raises(LabkitError, match=r"12.00 GiB of the device are given away .*: end what"):
        find_limit(SMALL, 12 * GIB, **TRAINING)
    gpu.fails_to_build = True
    with pytest.raises(LabkitError, match="the model alone does not fit into this GPU's 40.00 GiB"):
        find_limit(SMALL, **TRAINING)
    assert not gpu.fractions


# ---- the list, with a stand-in for the process ---------------------------------------------------

CASES = limit_cases()
GPU_BYTES = 30 * GIB
TRIED = [case for case in CASES if case.card != "A100 40GB"]


def test_the_list_has_each_training_under_both_allocators():
    assert len({case.name for case in CASES}) == len(CASES) == 2 * len(limit_suite.LIMITS)
    for case in CASES:
        options = case.head()["options"]
        assert options.items() >= {"seq_len": 512, "dtype": "bf16", "device": "cuda"}.items()
        memory = 80 * GIB if case.card == WHOLE else find(case.card).memory_bytes
        assert fits(model(case.model), memory, **options)


class Stand:
    """Stands in for `subprocess.run`: finds what was planned, or fails."""

    def __init__(self, returncode=0, error="", found=None, dies_after=None):
        self.returncode, self.error, self.dies_after = returncode, error, dies_after
        self.found = found or {}
        self.calls = []

    def __call__(self, command, **how):
        if len(self.calls) == self.dies_after:
            raise KeyboardInterrupt
        config = json.loads(Path(command[4]).read_text(encoding="utf-8"))
        self.calls.append(SimpleNamespace(command=command, config=config, **how))
        card = command[command.index("--gpu") + 1] if "--gpu" in command else None
        memory = find(card).memory_bytes if card else GPU_BYTES
        planned, most = plan_rows(config, memory, CONTEXT, TRAINING | {"method": command[-1]})
        found = Limit(memory, CONTEXT, allocator(how["env"]), planned, most, planned or 1)
        said = json.dumps(found.to_json() | self.found)
        return subprocess.CompletedProcess(command, self.returncode, said, self.error)


@pytest.fixture
def machine(monkeypatch):
    about = {"gpu": "Test", "memory_bytes": GPU_BYTES}
    monkeypatch.setattr(suite, "describe_machine", lambda device: ("test", about))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.setenv("LABKIT_TEST", "stays")


def run(file, stand):
    lines = []
    return run_limits(file, say=lines.append, run=stand), lines


def test_each_limit_is_a_process_of_its_own_with_its_allocator(tmp_path, machine):
    stand = Stand()
    found, lines = run(tmp_path / "limits.json", stand)
    assert [*found.rows] == [case.name for case in CASES] and len(lines) == len(CASES)
    assert len(stand.calls) == len(TRIED)
    for case, call in zip(TRIED, stand.calls, strict=True):
        assert call.command[:4] == [sys.executable, "-m", "labkit.cli", "measure"]
        on = [] if case.card == WHOLE else ["--gpu", case.card]
        assert call.command[5:] == [
            "--limit", "--json", *on, "--dtype", "bf16", "--loss-path", "padded", "--no-reentrant",
            "--seq-len", "512", "--method", case.method,
        ]  # fmt: skip
        assert call.config == model(case.model)
        assert call.env["LABKIT_TEST"] == "stays" and "PYTORCH_ALLOC_CONF" not in call.env
        setting = "expandable_segments:True" if case.allocator == EXPANDABLE else None
        assert call.env.get("PYTORCH_CUDA_ALLOC_CONF") == setting
        row = found.rows[case.name]
        assert row["allocator"] == case.allocator and row["card"] == case.card
        assert row == limit_suite.with_plan(row) and row["context_bytes"] == CONTEXT
    assert lines[0].endswith(
        "Qwen2.5-0.5B, full, RTX 3060 12GB, default allocator: "
        f"{found.rows[CASES[0].name]['found']} rows ran, {found.rows[CASES[0].name]['planned']} "
        "were planned"
    )
    large = [row["error"] for row in found.rows.values() if row["card"] == "A100 40GB"]
    assert large == ["not tried: the card is larger than this GPU"] * 2
    assert suite.read_results(tmp_path / "limits.json") == found


def test_a_killed_list_goes_on_where_it_was(tmp_path, machine):
    file = tmp_path / "limits.json"
    with pytest.raises(KeyboardInterrupt):
        run(file, Stand(dies_after=3))
    assert [*suite.read_results(file).rows] == [case.name for case in CASES[:3]]
    again = Stand()
    found, lines = run(file, again)
    assert len(again.calls) == len(TRIED) - 3 and lines[0].startswith("  4 of 14, 0 s: ")
    assert [*found.rows] == [case.name for case in CASES]


def test_what_failed_or_changed_is_looked_for_again_and_the_rest_stays(
    tmp_path, machine, monkeypatch
):
    file = tmp_path / "limits.json"
    found, lines = run(file, Stand(1, "building the model\nlabkit: no memory is left\n"))
    said = "the process ended with exit code 1: labkit: no memory is left"
    assert [found.rows[case.name]["error"] for case in TRIED] == [said] * len(TRIED)
    assert lines[0].endswith(said)
    assert len(run(file, Stand())[1]) == len(CASES)
    values = json.loads(file.read_text(encoding="utf-8"))
    values["rows"][1]["options"]["seq_len"] = 7  # the list has changed since
    mine = values["rows"][0] | {
        "name": "another training",
        "card": None,
        "note": "kept",
        "found": 3,
    }
    values["rows"].insert(0, mine)
    file.write_text(json.dumps(values), encoding="utf-8")
    stand = Stand()
    found, _ = run(file, stand)
    assert len(stand.calls) == 1 and [*found.rows][-1] == "another training"
    assert found.rows["another training"] == mine
    monkeypatch.setattr(suite, "versions", lambda: {"torch": "9.9"})
    stand = Stand()
    assert "another training" not in run(file, stand)[0].rows and len(stand.calls) == len(TRIED)
    monkeypatch.setattr(suite, "describe_machine", lambda device: ("other", {"memory_bytes": 1}))
    with pytest.raises(LabkitError, match="measurements of test, and this is other: name another"):
        run(file, Stand())


def test_a_process_that_ends_hangs_or_has_another_allocator_is_a_row_with_its_reason():
    ended = limit_suite.find_in_process(CASES[0], Stand(-9))
    assert ended == CASES[0].head() | {
        "error": "the process ended with exit code -9: it said nothing"
    }

    def hangs(command, **how):
        raise subprocess.TimeoutExpired(command, how["timeout"])

    assert limit_suite.find_in_process(CASES[0], hangs)["error"] == "took more than 600 s"

    def chats(command, **how):
        return subprocess.CompletedProcess(command, 0, "Welcome!", "")

    assert limit_suite.find_in_process(CASES[0], chats)["error"] == (
        "the process printed no limit but 'Welcome!'"
    )
    other = limit_suite.find_in_process(CASES[1], Stand(found={"allocator": DEFAULT}))
    assert other["error"] == "it ran under another allocator: default"


@without_gpu
def test_a_real_process_says_what_is_missing():
    row = limit_suite.find_in_process(CASES[1])
    assert row["error"].startswith(
        "the process ended with exit code 1: labkit: torch finds no CUDA device here"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_limit_on_a_gpu_keeps_its_promise():
    row = limit_suite.find_in_process(CASES[0])
    assert row["planned"] <= row["found"] <= row["tensors_alone"]


# ---- what was found ------------------------------------------------------------------------------

FOUND = suite.read_results(paths.root() / "data" / "memory" / "limits.json").rows
BY_NAME = {case.name: case for case in CASES}
PAIRS = [  # the same training and card, under both allocators
    (FOUND[case.name], FOUND[both])
    for case in CASES
    if case.allocator == DEFAULT
    and case.name in FOUND
    and (both := LimitCase(case.model, case.method, case.card, EXPANDABLE).name) in FOUND
]


def left_bytes(row, more_rows=0):
    """Of what the allocator was allowed, with so many rows more than those that ran."""
    asked = {**row["options"], "batch_size": row["found"] + more_rows}
    allowed = row["memory_bytes"] - row["context_bytes"]
    return allowed - estimate(row["config"], **asked).peak_allocated_bytes


@pytest.mark.parametrize("row", FOUND.values(), ids=FOUND)
def test_all_that_is_planned_ran_and_no_more_than_tensors_have_room_for(row):
    """Against today's estimate and reserve: one that keeps less free is red here."""
    today = limit_suite.with_plan(row)
    assert today["planned"] <= row["found"] <= today["tensors_alone"]


@pytest.mark.parametrize("row", FOUND.values(), ids=FOUND)
def test_a_committed_row_has_todays_plan_and_is_of_a_case(row):
    assert limit_suite.with_plan(row) == row, "call labkit.memory.limit_suite.replan on the file"
    assert row["options"].items() >= TRAINING.items()
    if row["card"] is None:  # of a process in which other cases had run
        assert row["name"] not in BY_NAME and "earlier cases" in row["note"]
        assert row["context_bytes"] == 806_158_336
    else:
        head = BY_NAME[row["name"]].head()
        assert row["options"] == head.pop("options") | HOPPER and row.items() >= head.items()
        assert row["memory_bytes"] == find(row["card"]).memory_bytes


def test_what_was_measured_and_what_was_not():
    assert len(FOUND) == 12 and len(PAIRS) == 3
    assert sum(row["allocator"] == EXPANDABLE for row in FOUND.values()) == 3
    assert sum(row["card"] is None for row in FOUND.values()) == 5


def test_expandable_segments_never_held_less_and_plan_says_how_much_more():
    more = [after["found"] - before["found"] for before, after in PAIRS]
    assert min(more) >= 0
    assert f"it let {min(more)} to {max(more)} more rows of a pass run" in AT_THE_EDGE


def test_the_reserve_is_what_its_docstring_says_was_measured(monkeypatch):
    lost = {
        how: max(left_bytes(row, more_rows=1) for row in FOUND.values() if row["allocator"] == how)
        for how in (DEFAULT, EXPANDABLE)
    }
    assert lost[DEFAULT] / GIB == pytest.approx(2.34, abs=0.01) and lost[EXPANDABLE] < 0.1 * GIB
    assert min(left_bytes(row) for row in FOUND.values()) > 0
    contexts = {row["context_bytes"] for row in FOUND.values() if row["card"]}
    assert [round(of / GIB, 2) for of in (min(contexts), max(contexts))] == [0.67, 0.75]
    monkeypatch.setattr(gpus, "RESERVE_BYTES", round(2.25 * GIB))
    monkeypatch.setattr(gpus, "RESERVE_SHARE", 0.025)
    assert reserve_bytes(40 * GIB) == 3.25 * GIB
    broken = [
        row for row in map(limit_suite.with_plan, FOUND.values()) if row["planned"] > row["found"]
    ]
    assert len(broken) == 2


def test_a_file_is_planned_again_without_a_gpu(tmp_path):
    file = tmp_path / "limits.json"
    text = limit_suite.default_file().read_text(encoding="utf-8")
    values = json.loads(text)
    for row in values["rows"]:
        row["planned"] = row["tensors_alone"] = 0
    file.write_text(json.dumps(values), encoding="utf-8")
    limit_suite.replan(file)
    assert file.read_text(encoding="utf-8") == text


# ---- the commands --------------------------------------------------------------------------------


def test_plan_says_what_to_set_at_the_edge():
    training = {"method": "lora", "seq_len": 512}
    peak = estimate(SMALL, **training).peak_allocated_bytes
    assert make_plan(SMALL, 24 * GIB, None, **training)["notes"] == (AT_THE_EDGE,)
    tight = make_plan(SMALL, peak, None, **training)
    assert tight["notes"] == (AT_THE_EDGE,) and not tight["largest_batch"]
    assert make_plan(SMALL, peak - 1, None, **training)["notes"] == ()
    assert make_plan(SMALL, None, None, **training)["notes"] == ()
    assert make_plan(SMALL, 24 * GIB, None, device="cpu", **training)["notes"] == ()


def test_plan_prints_it_in_one_line(capsys):
    assert cli.main(["plan", "bundled", "--gpu", "T4"]) == 0
    assert f"\nnote: {AT_THE_EDGE}\n" in capsys.readouterr().out


def test_command_prints_a_limit_and_json(capsys, monkeypatch):
    asked = []

    def find_it(config, memory_bytes, *, say, **options):
        asked.append((config, memory_bytes, options))
        say("rows of a pass: 1 ran")
        return Limit(memory_bytes or 40 * GIB, CONTEXT, DEFAULT, 12, 16, 15)

    monkeypatch.setattr(limits, "find_limit", find_it)
    command = ["measure", "bundled", "--limit", "--gpu", "rtx4090", "--method", "lora"]
    assert cli.main(command) == 0
    text, progress = capsys.readouterr()
    assert progress == "rows of a pass: 1 ran\n"
    assert text.startswith(
        "bundled: 15 rows of a pass ran on RTX 4090 (23.52 GiB) under torch's default allocator\n"
    )
    assert "keeps free: 12 rows of a pass\n" in text and "room for:           16 rows" in text
    assert "context and kernels took 800.00 MiB\n" in text
    assert "note: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may let more" in text
    assert "labkit plan` was wrong" not in text
    memory = find("RTX 4090").memory_bytes
    assert asked == [("bundled", memory, {"method": "lora"})]
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "memory_bytes": memory, "context_bytes": CONTEXT, "allocator": DEFAULT, "planned": 12,
        "tensors_alone": 16, "found": 15,
    }  # fmt: skip
    assert cli.main(["measure", "bundled", "--limit"]) == 0
    assert "ran on this GPU (40.00 GiB)" in capsys.readouterr().out and asked[-1][1] is None


def test_a_limit_says_where_plan_was_wrong_and_where_nothing_ran():
    said = measure_command._limit_lines(Limit(GIB, 1, EXPANDABLE, 1, None, None), "it", "a card")
    assert said[0] == "it: not even 1 row ran on a card (1.00 GiB) under expandable segments"
    assert said[2].endswith(": 1 row of a pass") and said[3].endswith(" not even 1 row")
    assert said[-1] == "note: fewer ran than were planned: `labkit plan` was wrong here"


def test_command_finds_the_list(tmp_path, capsys, machine, monkeypatch):
    monkeypatch.setattr(limit_suite, "find_in_process", lambda case, run: fake_row(case))
    file = tmp_path / "limits.json"
    asked = ["measure", "--limits", "--out", str(file)]
    assert cli.main(asked) == 0  # what was not tried is no failure
    text, progress = capsys.readouterr()
    assert f"test: {len(TRIED)} of {len(CASES)} limits found" in text
    assert "no measurement: Qwen2.5-7B, lora, A100 40GB, default allocator: not tried" in text
    [line] = [one for one in text.splitlines() if one.startswith(CASES[0].name)]
    assert line.split()[-3:] == ["6", "7", "9"]
    assert len(progress.splitlines()) == len(CASES)
    assert cli.main([*asked, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == len(CASES)
    file.unlink()
    broken = CASES[0].head() | {"error": "took more than 600 s"}
    monkeypatch.setattr(limit_suite, "find_in_process", lambda case, run: broken)
    assert cli.main(asked) == 1


def fake_row(case):
    memory = GPU_BYTES if case.card == WHOLE else find(case.card).memory_bytes
    found = Limit(memory, CONTEXT, case.allocator, 6, 9, 7)
    return case.head() | found.to_json()


@without_gpu
@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        (["bundled", "--limit"], 1, "torch finds no CUDA device here, and a limit is found by"),
        (["--limits"], 1, "torch finds no CUDA device here: run it on a machine that has one"),
        (["--suite", "--device", "cuda"], 1, "torch finds no CUDA device here: run it on"),
        (["bundled", "--limit", "--device", "cpu"], 2, "device='cpu': a limit is found on a CUDA"),
        (["bundled", "--limit", "--gpu", "K80"], 2, "gpu 'K80' is not known here: use one of"),
        (["bundled", "--limit", "--num-devices", "2"], 2, "num_devices=2: a step is measured on"),
    ],
    ids=str,
)
def test_command_says_what_is_missing_in_one_line(asked, status, said, capsys):
    assert cli.main(["measure", *asked]) == status
    text = capsys.readouterr().err
    assert said in text and len(text.splitlines()) == 1
