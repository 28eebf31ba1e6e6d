"""Verdicts on the course's statements, by measurement.

The statements stand in `labkit.statements`. A notebook calls `judge` with what it measured, and
`labkit sweep` judges the same quantity over several seeds. A verdict is "holds", "does not hold",
or "inconclusive" when the interval crosses the bar.

Numbers that come out of training differ a little between processors. They are printed through
`approx` ("≈0.93"), and `expect` beside them prints a constant line and raises outside a tolerance.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from labkit.errors import LabkitError
from labkit.paths import results_dir
from labkit.statements import CLAIMS, Bar, Claim, Interval


@dataclass(frozen=True)
class Verdict:
    """What a measurement says about a claim."""

    id: str
    statement: str
    verdict: str
    """holds | does not hold | inconclusive"""
    value: float
    interval: Interval | None
    bar: Bar
    rule: str
    """The bar in words, such as "at least 0.9"."""

    def __str__(self) -> str:
        """One line; the value is printed as approximate, since it may come out of training."""
        spread = ""
        if self.interval:
            spread = f", interval {approx(self.interval[0])} to {approx(self.interval[1])}"
        return f"{self.verdict}: {self.statement} ({approx(self.value)}{spread}; bar {self.rule})"

    def to_json(self) -> dict:
        """The claim's entry in a results file."""
        return json.loads(json.dumps(asdict(self)))


def judge(claim_id: str, value: float, interval: Interval | None = None) -> Verdict:
    """Verdict of a registered claim for a measured value; without an interval the value decides.

    Raises:
        ValueError: no such claim, a value that is not finite, or an interval that misses it.
    """
    claim = _claim(claim_id)
    value = _finite(claim_id, value)
    if interval is not None:
        interval = (_finite(claim_id, interval[0]), _finite(claim_id, interval[1]))
        if not interval[0] <= value <= interval[1]:
            raise ValueError(f"claim {claim_id!r}: value {value} lies outside interval {interval}")
    rule = claim.rule
    verdict = rule.verdict(value, interval)
    return Verdict(claim.id, claim.statement, verdict, value, interval, rule.bar, rule.words)


def judge_seeds(claim_id: str, values: Sequence[float]) -> Verdict:
    """Verdict over seeds: the mean, with Student's 95 % interval (90 % for an equivalence).

    An equivalence bar has two ends; a 90 % interval within it is the two one-sided tests at 5 %.

    Raises:
        ValueError: as `judge`, or fewer than two values.
    """
    from labkit.statistics import seed_interval

    two_sided = isinstance(_claim(claim_id).rule.bar, tuple)
    numbers = [_finite(claim_id, value) for value in values]
    interval = seed_interval(numbers, level=0.90 if two_sided else 0.95)
    # The mean of equal numbers may miss them by one rounding; half the interval cannot.
    return judge(claim_id, (interval[0] + interval[1]) / 2, interval)


def approx(x: float, digits: int = 2) -> str:
    """A number out of training, such as "≈0.93"; in scientific form where it would read 0.00."""
    if x and abs(x) < 0.5 * 10**-digits:
        return f"≈{x:.{max(digits - 1, 0)}e}"
    return f"≈{x:.{digits}f}"


# ---- the session's record ----------------------------------------------------------------------


@dataclass
class Record:
    """What a notebook measured in this process, or in one run of a sweep."""

    metrics: dict[str, Any] = field(default_factory=dict)
    claims: dict[str, float] = field(default_factory=dict)
    learning_rates: dict[str, dict] = field(default_factory=dict)
    """method -> {"tried": {rate: score}, "chosen": rate}"""
    misses: list[dict] = field(default_factory=list)
    """`expect`s that were not met, in sweep mode."""

    def add(self, kind: str, name: str, value: Any) -> None:
        """Take one entry; the last of a name wins, misses pile up."""
        if kind == "misses":
            self.misses.append({"name": name, **value})
        else:
            getattr(self, kind)[name] = value


_RECORD = Record()


def record(name: str, value: Any) -> None:
    """Keep a measured number, or a list or dict of numbers, for the sweep over seeds.

    Kept in memory, and appended to the file LABKIT_RECORD where that is set. A number that is not
    finite, such as the loss of a run that diverged, is kept as None.
    """
    _keep("metrics", name, _plain(value))


def record_claim(claim_id: str, value: float) -> None:
    """Keep what was measured for a registered claim.

    Raises:
        ValueError: no such claim, or a value that is not finite.
    """
    _claim(claim_id)
    _keep("claims", claim_id, _finite(claim_id, value))


def record_learning_rates(method: str, tried: dict[float, float], chosen: float) -> None:
    """Keep the rates tried for a method with their validation scores, and the one chosen.

    Raises:
        ValueError: the chosen rate was not tried.
    """
    if chosen not in tried:
        raise ValueError(f"chosen={chosen} is not among the rates tried: {sorted(tried)}")
    scores = {str(rate): _plain(value) for rate, value in tried.items()}
    _keep("learning_rates", method, {"tried": scores, "chosen": float(chosen)})


def recorded() -> dict[str, Any]:
    """Every metric recorded in this process: name -> value."""
    return dict(_RECORD.metrics)


def read_record(path: str | Path) -> Record:
    """What a notebook wrote to the file named by LABKIT_RECORD.

    Raises:
        LabkitError: no such file, or a line in it that is not a record.
    """
    path = Path(path)
    result = Record()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise LabkitError(f"{path}: cannot read the record ({error.strerror}); run again") from None
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            result.add(entry["kind"], entry["name"], entry["value"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LabkitError(f"{path}:{number}: not a record; delete it and run again") from None
    return result


def expect(name: str, got: Any, want: Any, tol: float = 0) -> None:
    """Print "ok  NAME", or raise where `got` is further than `tol` from `want`.

    The printed line holds no measured number, so that it is compared exactly on every machine.
    Numbers are compared within `tol`, lists of numbers one by one, everything else exactly. The
    expected values are those of the bundled model and seed 0: while a sweep runs (LABKIT_SWEEP=1)
    or another model is used (LABKIT_MODEL, LABKIT_PROFILE), a miss is reported, not raised.

    Raises:
        AssertionError: outside the tolerance; names what was got and wanted, and what to do.
        ValueError: tol is negative.
    """
    if not tol >= 0:
        raise ValueError(f"tol={tol} must be 0 or more")
    if _close(got, want, tol):
        print(f"ok  {name}")
        return
    margin = f" ± {tol:g}" if tol else ""
    if sweeping() or _another_model():
        _keep("misses", name, {"got": _plain(got), "want": _plain(want), "tol": tol})
        print(f"miss  {name}: the bundled model with profile cpu and seed 0 has {want!r}{margin}")
        return
    raise AssertionError(
        f"{name}: got {got!r}, want {want!r}{margin}. Restart the kernel and run every cell in "
        "order; if it stays, a setting above this cell was changed or a library behaves differently"
    )


def sweeping() -> bool:
    """Whether `labkit sweep` runs this notebook, and so wants the arms too long for a lesson."""
    return os.environ.get("LABKIT_SWEEP") == "1"


def _another_model() -> bool:
    """Whether this notebook runs on something else than the bundled model."""
    model = os.environ.get("LABKIT_MODEL") or "bundled"
    return model != "bundled" or (os.environ.get("LABKIT_PROFILE") or "cpu") != "cpu"


# ---- committed results -------------------------------------------------------------------------


def load_results(name: str) -> dict:
    """Multi-seed results of a notebook, from data/results/NAME.json.

    While a sweep makes the first ones, what this run recorded so far stands in for them.

    Raises:
        LabkitError: no such file, or one that is not JSON.
    """
    path = results_dir() / f"{name}.json"
    again = f"make it with `labkit sweep notebooks/{name}.ipynb`"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if sweeping():
            return _results_of_this_run()
        raise LabkitError(f"{path}: no results of {name!r} yet; {again}") from None
    except ValueError as error:
        raise LabkitError(f"{path}: damaged ({error}); {again}") from None


def _results_of_this_run() -> dict:
    metrics = {
        name: {"values": [value], "mean": value, "interval": [value, value]}
        for name, value in _RECORD.metrics.items()
        if isinstance(value, int | float)
    }
    verdicts = [judge(claim_id, value).to_json() for claim_id, value in _RECORD.claims.items()]
    rates = {
        method: {
            "tried": {rate: [score] for rate, score in kept["tried"].items()},
            "chosen": kept["chosen"],
            "chosen_per_seed": [kept["chosen"]],
        }
        for method, kept in _RECORD.learning_rates.items()
    }
    return {"metrics": metrics, "claims": verdicts, "learning_rates": rates}


def ledger() -> list[dict]:
    """Every judged claim of every results file, each with its notebook first."""
    return [
        {"notebook": path.stem, **claim}
        for path in sorted(results_dir().glob("*.json"))
        for claim in load_results(path.stem).get("claims", [])
    ]


def ledger_page(entries: Sequence[dict]) -> str:
    """The ledger as a Markdown page, one table a notebook; `docs/claims.md` is this page."""
    lines = [
        "# Every claim of the course, judged",
        "",
        "Each statement is decided by code over the seeds of its notebook: by the mean and its "
        "95 % interval, 90 % where the bar has two ends. *Does not hold* means that the interval "
        "lies outside the bar, *inconclusive* that it crosses it. Popular beliefs stand here "
        "beside our own. This page is printed by `labkit claims --markdown`; the seeds are made by "
        "`labkit sweep`.",
    ]
    for notebook in dict.fromkeys(entry["notebook"] for entry in entries):
        lines += [
            "",
            f"## {notebook}",
            "",
            "| statement | verdict | mean | interval | bar | what was measured | who says so |",
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for entry in entries:
            if entry["notebook"] == notebook:
                interval = " to ".join(f"{end:.3g}" for end in entry["interval"] or [])
                cells = [entry["statement"], entry["verdict"], f"{entry['value']:.3g}", interval]
                claim = _claim(entry["id"])
                cells += [entry["rule"], claim.quantity, claim.source]
                lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


# ---- helpers -----------------------------------------------------------------------------------


def _claim(claim_id: str) -> Claim:
    if claim_id not in CLAIMS:
        raise ValueError(f"claim {claim_id!r} is not registered: use one of {', '.join(CLAIMS)}")
    return CLAIMS[claim_id]


def _finite(claim_id: str, value: float) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"claim {claim_id!r}: value {value} is not finite, so it judges nothing")
    return value


def _plain(value: Any) -> Any:
    """`value` in JSON's own types: NumPy and torch scalars and arrays as numbers and lists."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise ValueError(f"value of type {type(value).__name__} cannot be recorded: give numbers")


def _keep(kind: str, name: str, value: Any) -> None:
    _RECORD.add(kind, name, value)
    path = os.environ.get("LABKIT_RECORD")
    if path:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps({"kind": kind, "name": name, "value": value}) + "\n")


def _close(got: Any, want: Any, tol: float) -> bool:
    got, want = (x.tolist() if hasattr(x, "tolist") else x for x in (got, want))
    if isinstance(want, list | tuple) and isinstance(got, list | tuple):
        return len(got) == len(want) and all(
            _close(a, b, tol) for a, b in zip(got, want, strict=True)
        )
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (got, want))
    # Written so that NaN is never close to anything.
    return abs(got - want) <= tol if numbers else type(got) is type(want) and got == want
