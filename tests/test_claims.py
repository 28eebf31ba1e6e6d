"""Verdicts on each side of the bar, `expect` that can fail, and a record that sweeps can read."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from labkit import claims, paths
from labkit.claims import (
    approx,
    expect,
    judge,
    judge_seeds,
    ledger,
    load_results,
    read_record,
    record,
    record_claim,
    record_learning_rates,
    recorded,
)
from labkit.errors import LabkitError
from labkit.statements import CLAIMS, Claim, at_least, at_most, equivalent, within


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(claims, "_RECORD", claims.Record())
    monkeypatch.delenv("LABKIT_RECORD", raising=False)
    monkeypatch.delenv("LABKIT_SWEEP", raising=False)


# ---- verdicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "value", "interval", "verdict"),
    [
        (at_least(0.9), 0.9, None, "holds"),
        (at_least(0.9), 0.8999, None, "does not hold"),
        (at_least(0.9), 0.95, (0.92, 0.97), "holds"),
        (at_least(0.9), 0.95, (0.90, 0.97), "holds"),
        (at_least(0.9), 0.95, (0.89, 0.97), "inconclusive"),
        (at_least(0.9), 0.85, (0.80, 0.91), "inconclusive"),
        (at_least(0.9), 0.85, (0.80, 0.89), "does not hold"),
        (at_most(0.1), 0.05, (0.01, 0.09), "holds"),
        (at_most(0.1), 0.05, (0.01, 0.11), "inconclusive"),
        (at_most(0.1), 0.20, (0.11, 0.30), "does not hold"),
        (within(0.2, 0.4), 0.3, (0.2, 0.4), "holds"),
        (within(0.2, 0.4), 0.3, (0.1, 0.35), "inconclusive"),
        (within(0.2, 0.4), 0.1, (0.0, 0.15), "does not hold"),
        (within(0.2, 0.4), 0.6, (0.5, 0.7), "does not hold"),
        (equivalent(0.03), 0.0, (-0.02, 0.02), "holds"),
        (equivalent(0.03), 0.0, (-0.2, 0.2), "inconclusive"),
    ],
)
def test_verdict_on_each_side_of_the_bar(monkeypatch, rule, value, interval, verdict):
    monkeypatch.setitem(CLAIMS, "probe", Claim("probe", "S.", "here", "q", rule))
    assert judge("probe", value, interval).verdict == verdict


def test_verdict_carries_the_claim():
    verdict = judge("full-learns-d1", 0.95, (0.93, 0.97))
    assert verdict.statement == CLAIMS["full-learns-d1"].statement
    assert (verdict.value, verdict.interval, verdict.bar) == (0.95, (0.93, 0.97), 0.90)
    assert str(verdict) == (
        "holds: Full fine-tuning teaches the ticket task to the small model. "
        "(≈0.95, interval ≈0.93 to ≈0.97; bar at least 0.9)"
    )
    assert verdict.to_json() == {
        "id": "full-learns-d1",
        "statement": verdict.statement,
        "verdict": "holds",
        "value": 0.95,
        "interval": [0.93, 0.97],
        "bar": 0.90,
        "rule": "at least 0.9",
    }


def test_bars_in_words_and_numbers():
    assert (at_least(0.9).bar, at_least(0.9).words) == (0.9, "at least 0.9")
    assert (at_most(0).bar, at_most(0).words) == (0, "at most 0")
    assert (within(1, 2).bar, within(1, 2).words) == ((1, 2), "1 to 2")
    with pytest.raises(ValueError, match="low=2 is above high=1"):
        within(2, 1)


def test_judge_refuses_what_judges_nothing():
    with pytest.raises(ValueError, match="claim 'nope' is not registered"):
        judge("nope", 1.0)
    with pytest.raises(ValueError, match="not finite"):
        judge("full-forgets", math.nan)
    with pytest.raises(ValueError, match=r"value 0.5 lies outside interval \(0.6, 0.7\)"):
        judge("full-forgets", 0.5, (0.6, 0.7))


def test_seeds_are_judged_by_their_interval():
    # Mean 0.95, t interval 0.93 to 0.97 or so.
    assert judge_seeds("full-learns-d1", [0.94, 0.95, 0.96, 0.95, 0.95]).verdict == "holds"
    assert judge_seeds("full-learns-d1", [0.99, 0.80, 0.95, 0.97, 0.90]).verdict == "inconclusive"
    assert judge_seeds("full-learns-d1", [0.70, 0.71, 0.69, 0.70, 0.72]).verdict == "does not hold"
    exact = judge_seeds("save-every-2000-never-saves", [0, 0, 0, 0, 0])
    assert (exact.verdict, exact.value, exact.interval) == ("holds", 0.0, (0.0, 0.0))
    third = judge_seeds("full-forgets", [0.1] * 3)  # whose mean rounds to another number
    assert third.interval[0] <= third.value <= third.interval[1]
    with pytest.raises(ValueError, match="two seeds or more"):
        judge_seeds("full-forgets", [0.1])


def test_equivalence_over_seeds_takes_a_90_percent_interval(monkeypatch):
    monkeypatch.setitem(CLAIMS, "probe", Claim("probe", "S.", "here", "q", equivalent(0.03)))
    # Standard error 0.01 over 5 seeds: t(4) is 2.132 at 90 % and 2.776 at 95 %.
    values = (
        (np.array([-1, -0.5, 0, 0.5, 1]) / np.std([-1, -0.5, 0, 0.5, 1], ddof=1)) * 5**0.5 * 0.01
    )
    low, high = judge_seeds("probe", values.tolist()).interval
    assert (low, high) == pytest.approx((-0.02132, 0.02132), abs=1e-5)


def test_every_registered_claim_is_a_sentence_with_a_source_and_a_bar():
    assert len(CLAIMS) >= 8
    for claim_id, claim in CLAIMS.items():
        assert claim_id == claim.id and claim_id == claim_id.lower()
        assert claim.statement[0].isupper() and claim.statement.endswith(".")
        assert claim.source and claim.quantity
        assert claim.rule.low <= claim.rule.high


# ---- numbers in print --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.934, 2, "≈0.93"),
        (-0.5, 2, "≈-0.50"),
        (0, 2, "≈0.00"),
        (2e-5, 2, "≈2.0e-05"),
        (0.004, 2, "≈4.0e-03"),
        (0.006, 2, "≈0.01"),
        (0.0004, 3, "≈4.00e-04"),
        (1234.5, 0, "≈1234"),
    ],
)
def test_approx(value, digits, text):
    assert approx(value, digits) == text


@pytest.mark.parametrize(
    ("got", "want", "tol"),
    [
        (42, 42, 0),
        (0.93, 0.95, 0.03),
        (0.5, 0.75, 0.25),
        ("Velden", "Velden", 0),
        ([1, 2.0], (1, 2), 0),
        ([0.1, 0.2], [0.11, 0.19], 0.02),
        ({"a": 1}, {"a": 1}, 0),
        (True, True, 0),
        (np.float32(0.5), 0.5, 0),
        (np.array([1, 2]), [1, 2], 0),
        (None, None, 0),
    ],
)
def test_expect_prints_a_constant_line(capsys, got, want, tol):
    expect("steps of the run", got, want, tol)
    assert capsys.readouterr().out == "ok  steps of the run\n"


@pytest.mark.parametrize(
    ("got", "want", "tol"),
    [
        (42, 43, 0),
        (0.93, 0.97, 0.03),
        (math.nan, 0.97, 0.03),
        (math.nan, math.nan, 1),
        ("Velden", "velden", 0),
        ([1, 2], [1, 2, 3], 0),
        ([0.1, 0.3], [0.1, 0.2], 0.05),
        (True, 1, 0),
        (1, True, 5),
        ("1", 1, 0),
        (None, 0, 1),
    ],
)
def test_expect_raises_outside_the_tolerance(capsys, got, want, tol):
    with pytest.raises(AssertionError, match="^final loss: got .* want .*Restart the kernel"):
        expect("final loss", got, want, tol)
    assert capsys.readouterr().out == ""


def test_expect_names_numbers_and_tolerance():
    with pytest.raises(AssertionError, match="final loss: got 0.5, want 0.9 ± 0.1"):
        expect("final loss", 0.5, 0.9, tol=0.1)
    with pytest.raises(ValueError, match="tol=-1"):
        expect("final loss", 0.5, 0.9, tol=-1)


def test_a_sweep_records_a_miss_instead(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LABKIT_SWEEP", "1")
    monkeypatch.setenv("LABKIT_RECORD", str(tmp_path / "seed-1.jsonl"))
    expect("final loss", math.nan, 0.9, tol=0.1)
    assert capsys.readouterr().out == (
        "miss  final loss: the bundled model with profile cpu and seed 0 has 0.9 ± 0.1\n"
    )
    expected = [{"name": "final loss", "got": None, "want": 0.9, "tol": 0.1}]
    assert read_record(tmp_path / "seed-1.jsonl").misses == expected


@pytest.mark.parametrize(
    ("switch", "value", "raises"),
    [
        ("LABKIT_MODEL", "some/model", False),
        ("LABKIT_PROFILE", "gpu-small", False),
        ("LABKIT_MODEL", "bundled", True),
        ("LABKIT_PROFILE", "cpu", True),
    ],
)
def test_another_model_is_not_held_to_the_bundled_ones_numbers(
    monkeypatch, capsys, switch, value, raises
):
    monkeypatch.setenv(switch, value)
    if raises:
        with pytest.raises(AssertionError, match="final loss"):
            expect("final loss", 2.0, 0.9, tol=0.1)
    else:
        expect("final loss", 2.0, 0.9, tol=0.1)
        assert capsys.readouterr().out.startswith("miss  final loss")


# ---- records and results -----------------------------------------------------------------------


def test_record_is_kept_and_written(monkeypatch, tmp_path):
    path = tmp_path / "seed-0.jsonl"
    monkeypatch.setenv("LABKIT_RECORD", str(path))
    record("task", np.float64(0.5))
    record("task", 0.93)  # the last of a name wins
    record("losses", [np.float32(1.5), math.inf, 2])
    record_claim("full-forgets", 0.25)
    record_learning_rates("full", {2e-5: 0.02, 5e-4: 0.97}, chosen=5e-4)
    assert recorded() == {"task": 0.93, "losses": [1.5, None, 2]}
    found = read_record(path)
    assert found.metrics == recorded()
    assert found.claims == {"full-forgets": 0.25}
    assert found.learning_rates == {
        "full": {"tried": {"2e-05": 0.02, "0.0005": 0.97}, "chosen": 5e-4}
    }
    assert len(path.read_text(encoding="utf-8").splitlines()) == 5


def test_recorded_is_a_copy():
    record("task", 0.5)
    recorded()["task"] = 0.9
    assert recorded() == {"task": 0.5}


def test_record_refuses_what_it_cannot_keep():
    with pytest.raises(ValueError, match="value of type object cannot be recorded"):
        record("task", object())
    with pytest.raises(ValueError, match="claim 'nope' is not registered"):
        record_claim("nope", 1.0)
    with pytest.raises(ValueError, match="not finite"):
        record_claim("full-forgets", math.inf)
    with pytest.raises(ValueError, match="chosen=0.1 is not among the rates tried"):
        record_learning_rates("full", {2e-5: 0.02}, chosen=0.1)
    assert recorded() == {}


def test_damaged_record_is_named(tmp_path):
    path = tmp_path / "seed-0.jsonl"
    with pytest.raises(LabkitError, match="seed-0.jsonl: cannot read the record"):
        read_record(path)
    for broken in ('{"kind": "metrics", "name"', "[]", '{"kind": "nope", "name": "a", "value": 1}'):
        path.write_text('{"kind": "metrics", "name": "a", "value": 1}\n' + broken, encoding="utf-8")
        with pytest.raises(LabkitError, match="seed-0.jsonl:2: not a record"):
            read_record(path)


def test_results_and_ledger(monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    (tmp_path / "results").mkdir()
    assert ledger() == []
    with pytest.raises(LabkitError, match="labkit sweep notebooks/02_full_fine_tuning.ipynb"):
        load_results("02_full_fine_tuning")
    verdict = judge("full-learns-d1", 0.95).to_json()
    path = tmp_path / "results" / "02_full_fine_tuning.json"
    path.write_text(json.dumps({"claims": [verdict]}), encoding="utf-8")
    assert load_results("02_full_fine_tuning")["claims"] == [verdict]
    assert ledger() == [{"notebook": "02_full_fine_tuning", **verdict}]
    path.write_text("{", encoding="utf-8")
    with pytest.raises(LabkitError, match="02_full_fine_tuning.json: damaged"):
        ledger()


def test_claims_need_no_torch():
    code = "import sys, labkit.claims; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_first_sweep_stands_on_its_own_run(monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    monkeypatch.setenv("LABKIT_SWEEP", "1")
    record("d1", 0.5)
    record_claim("full-learns-d1", 0.5)
    results = load_results("never_made")
    assert results["metrics"]["d1"] == {"values": [0.5], "mean": 0.5, "interval": [0.5, 0.5]}
    assert {"full-learns-d1": "does not hold"}.items() <= {
        claim["id"]: claim["verdict"] for claim in results["claims"]
    }.items()


def test_committed_results_are_judged_by_todays_claims():
    for kept in claims.ledger():
        claim = CLAIMS[kept["id"]]
        assert (kept["statement"], kept["rule"]) == (claim.statement, claim.rule.words)


def test_the_page_of_claims_is_what_the_results_say():
    page = (paths.root() / "docs" / "claims.md").read_text(encoding="utf-8")
    assert page == claims.ledger_page(claims.ledger()), "labkit claims --markdown > docs/claims.md"


def test_first_sweep_reads_its_own_rates_as_results(monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_SWEEP", "1")
    monkeypatch.setattr(claims, "results_dir", lambda: tmp_path)
    assert claims.sweeping()
    record("full/d1", 0.5)
    record_learning_rates("full", {1e-3: 0.4, 2e-3: 0.6}, chosen=2e-3)
    results = load_results("nothing_yet")
    assert results["metrics"]["full/d1"]["mean"] == 0.5
    assert results["learning_rates"]["full"] == {
        "tried": {"0.001": [0.4], "0.002": [0.6]},
        "chosen": 2e-3,
        "chosen_per_seed": [2e-3],
    }
    monkeypatch.delenv("LABKIT_SWEEP")
    assert not claims.sweeping()
