"""Other estimators on the same published rows: run for real, and counted by hand."""

import json
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest

from labkit import cli, paths
from labkit.errors import LabkitError
from labkit.memory import estimate, reference, rivals
from labkit.memory.rivals import ACCELERATE_ADAM, ACCELERATE_LOADED, ACCELERATE_MIXED, ZERO2, ZERO3
from labkit.memory.scoreboard import COUNTS, LOADED, OURS, PEAK, STATES, scoreboard, write

P = 7_241_732_096  # parameters of Mistral-7B
FULL = "Mistral-7B-v0.1 full bf16 batch 4"
HEAD = 32000 * 4096
needs_deepspeed = pytest.mark.skipif(not rivals.has_deepspeed(), reason="DeepSpeed is not here")


@pytest.fixture(scope="module")
def said():
    """What the other tools say now, in a process of their own."""
    return rivals.run()


@pytest.fixture(scope="module")
def board():
    return scoreboard()


def entry(board, tool, row, kind=PEAK):
    [found] = [e for e in board.entries if (e.tool, e.row, e.kind) == (tool, row, kind)]
    return found


# ---- the tools, run for real -------------------------------------------------------------------


def test_accelerate_says_what_was_committed(said):
    committed = reference.read_json("scoreboard.json")
    assert said["accelerate"] == committed["accelerate"]
    assert set(said["versions"]) >= {"accelerate", "transformers", "torch"}


@needs_deepspeed
def test_deepspeed_says_what_was_committed(said):
    assert said["deepspeed"] == reference.read_json("scoreboard.json")["deepspeed"]


def test_accelerate_counts_fp32_weights_without_the_output_head(said):
    mistral = said["accelerate"]["Mistral-7B-v0.1"]
    tables = 4 * (P - HEAD)
    # Buffers, which are the frequencies of the positions: two of 64 fp32 numbers.
    assert mistral[ACCELERATE_LOADED] - tables == 2 * 64 * 4
    assert mistral[ACCELERATE_ADAM] == 4 * mistral[ACCELERATE_LOADED]  # 16 B a parameter
    assert mistral[ACCELERATE_MIXED] == 2 * mistral[ACCELERATE_LOADED]  # 8 B: the largest part
    assert said["accelerate"]["ZeRO paper"][ACCELERATE_ADAM] == 120 * 10**9


@needs_deepspeed
def test_deepspeeds_formulas_by_hand(said):
    one, two = (
        said["deepspeed"][FULL],
        said["deepspeed"][f"{FULL[:-1]}2, 2 GPUs, transformers 4.48.1"],
    )
    assert one[ZERO2][0] == 20 * P
    assert two[ZERO2][0] == 2 * P + 9 * P
    largest = 4 * max(HEAD, 4096 * 14336)
    assert one[ZERO3][0] == largest + 18 * P
    assert two[ZERO3][0] == largest + 9 * P
    assert said["deepspeed"]["T5-3B, offload all"][ZERO3] == [
        4 * 32_000_000,
        18 * 2_851_000_000 * 1.5,
    ]


def test_the_look_up_is_given_back():
    def real(repo, token=None):
        raise AssertionError("the network was asked")

    command = SimpleNamespace(verify_on_hub=real)
    with pytest.raises(KeyError), rivals._answered(command):
        assert command.verify_on_hub("any").library_name == "transformers"
        raise KeyError
    assert command.verify_on_hub is real


def test_a_failing_tool_is_one_clear_error():
    with pytest.raises(
        LabkitError, match="ended with exit code 1 .*'gpt5' is not among those known"
    ):
        rivals.run(["gpt5"])


# ---- entries -----------------------------------------------------------------------------------


def test_labkit_has_an_entry_for_every_measured_row(board):
    ours = {e.row: e for e in board.entries if (e.tool, e.kind) == (OURS, PEAK)}
    assert list(ours) == [row.name for row in reference.rows()]
    for row in reference.rows():
        assert ours[row.name].predicted == estimate(row.config, **row.options).peak_allocated_bytes
        assert ours[row.name].error == row.error()


@pytest.mark.parametrize("rule", [8, 16, 18, 20])
def test_rules_of_thumb_by_hand(board, rule):
    found = entry(board, f"{rule} B x P", FULL)
    assert found.predicted == rule * P and found.published == 72_434_837_504
    assert found.error == pytest.approx(rule * P / 72_434_837_504 - 1)
    halved = entry(board, f"{rule} B x P", f"{FULL[:-1]}2, 2 GPUs, transformers 4.48.1")
    assert halved.predicted == rule * P / 2


def test_tools_of_full_tuning_are_not_asked_about_adapters(board):
    adapters = {row.name for row in reference.rows() if row.options.get("method", "full") != "full"}
    others = {e.row for e in board.entries if e.kind == PEAK and e.tool != OURS}
    assert adapters and not adapters & others
    two = {e.row for e in board.entries if e.tool == ACCELERATE_ADAM and "2 GPUs" in e.row}
    assert not two  # accelerate knows of one device


def test_the_zero_paper_on_what_each_counts(board):
    row = "ZeRO paper, 7.5 B, 64 devices, stage "
    assert entry(board, "16 B x P", row + "0", STATES).error == 0
    assert entry(board, "16 B x P", row + "3", STATES).predicted == 16 * 7.5e9 / 64
    assert entry(board, ACCELERATE_ADAM, row + "0", STATES).error == 0
    assert entry(board, ACCELERATE_MIXED, row + "0", STATES).error == -0.5
    assert entry(board, ZERO2, row + "2", STATES).predicted == int(2 * 7.5e9 + 18 * 7.5e9 / 64)
    assert abs(entry(board, OURS, row + "2", STATES).error) < 0.005
    docs = "DeepSpeed docs, T5-3B on 8 devices, offload none: device"
    assert abs(entry(board, ZERO3, docs, STATES).error) < 0.002


def test_published_models_and_counts(board):
    bert = entry(board, ACCELERATE_LOADED, "bert-base-cased, fp32", LOADED)
    assert abs(bert.error) < 0.002 and "does not cover it" in bert.note
    big = entry(board, OURS, "QLoRA paper, LLaMA-65B in 4 bits", LOADED)
    assert -0.1 < big.error < 0 and "does not say" in big.note
    counts = [e for e in board.entries if e.kind == "trained numbers"]
    assert [e.predicted for e in counts] == [
        2 * 96 * 2 * 12288, 8 * 2 * 96 * 2 * 12288, 2 * 4 * 2 * 96 * 2 * 12288,
    ]  # fmt: skip


# ---- scores ------------------------------------------------------------------------------------


def test_scores_are_medians_and_worst_errors(board):
    scores = {(s.tool, s.kind): s for s in board.scores()}
    errors = [e.error for e in board.entries if (e.tool, e.kind) == ("16 B x P", PEAK)]
    score = scores["16 B x P", PEAK]
    assert (score.rows, score.of) == (9, 41)
    assert score.median == statistics.median(map(abs, errors))
    assert score.worst == max(errors, key=abs)
    # Within a kind the best comes first.
    for kind in (PEAK, STATES):
        medians = [s.median for s in board.scores() if s.kind == kind]
        assert medians == sorted(medians)


def test_labkit_wins_on_peaks_and_says_which_rows_it_had_seen(board):
    best, second = [s for s in board.scores() if s.kind == PEAK][:2]
    assert best.tool == OURS and best.median < 0.0005 and abs(best.worst) < 0.0111
    assert second.median > 0.15
    [words] = [note for note in board.notes if "held-out" in note]
    held_out = [abs(row.error()) for row in reference.rows("held out")]
    assert f"median error is {statistics.median(held_out):.2%}" in words
    assert "its worst -1.10%" in words


def test_readme_says_the_same_of_labkit(board):
    first = next(score for score in board.scores() if score.kind == PEAK)
    readme = (paths.root() / "README.md").read_text(encoding="utf-8")
    row = f"| `labkit estimate` | {first.rows} | {first.median:.2%} | {first.worst:+.1%} |"
    assert row.replace("%", " %") in readme


def test_every_tool_says_what_it_counts(board):
    assert {e.tool for e in board.entries} == set(COUNTS)
    assert any("mixed precision" in note for note in board.notes)


def test_without_deepspeed_the_committed_numbers_stand_and_it_says_so(monkeypatch, board):
    committed = reference.read_json("scoreboard.json")
    answer = {"versions": {"accelerate": "9.9"}, "accelerate": committed["accelerate"]}
    monkeypatch.setattr(rivals, "run", lambda: answer)
    monkeypatch.setattr(rivals, "has_deepspeed", lambda: False)
    live = scoreboard(live=True)
    assert live.entries == board.entries
    assert live.versions["accelerate"] == "9.9"
    assert any("DeepSpeed is not installed here" in note for note in live.notes)


def test_what_was_said_can_be_written(tmp_path, said):
    write(said, tmp_path / "scoreboard.json")
    again = json.loads((tmp_path / "scoreboard.json").read_text(encoding="utf-8"))
    assert again["accelerate"] == said["accelerate"] and "labkit scoreboard --out" in again["about"]


# ---- the command -------------------------------------------------------------------------------


def test_command_prints_a_table_and_json(capsys):
    assert cli.main(["scoreboard", "--committed"]) == 0
    text = capsys.readouterr().out
    assert "whole peak: 41 published rows" in text
    assert "  labkit estimate" in text and "what each counts:" in text
    assert "numbers of data/memory/scoreboard.json, made with accelerate" in text
    assert cli.main(["scoreboard", "--committed", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"versions", "notes", "counts", "scores", "entries"} == set(printed)
    assert {"tool", "row", "kind", "predicted", "published", "error"} <= set(printed["entries"][0])


def test_committed_numbers_need_no_torch():
    code = (
        "import sys; from labkit.cli import main; main(['scoreboard', '--committed', '--json'])\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'deepspeed', 'numpy'}\n"
        "print('loaded:', *sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=paths.root()
    )
    assert done.stdout.splitlines()[-1] == "loaded:"
