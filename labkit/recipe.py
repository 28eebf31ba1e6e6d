"""Which mixture to train with: given how much may be forgotten, what learns most, by measurement.

The evidence is a notebook's results over several seeds, with metrics named `ARM/MEASURE` and arms
named METHOD, MIX, `at RATE`, such as "lora r8 1:5 at 4e-03".

>>> parse_arm("lora r8 1:5 at 4e-03")
Arm(name='lora r8 1:5 at 4e-03', method='lora r8', mix='1:5', ratio=5.0, rate=0.004)
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from labkit.claims import approx

if TYPE_CHECKING:
    import pandas as pd

Interval = tuple[float, float]

DOMAIN_ONLY = "domain only"
_MIX = re.compile(rf"(?<!\S)({DOMAIN_ONLY}|1:\d+(?:\.\d+)?|\d+(?:\.\d+)? %)(?!\S)")
_RATE = re.compile(r"(?<!\S)at (\d[\d.]*(?:e[+-]?\d+)?)(?!\S)")
_ROUNDING = 1e-9
"""Shares such as 0.97 - 0.94 miss 0.03 by less than this."""


@dataclass(frozen=True)
class Arm:
    """What an arm's name says."""

    name: str
    method: str
    """Every word that is neither mix nor rate, such as "full" or "lora r8"."""
    mix: str
    """domain : general as written: "domain only", "5 %" or "1:5"."""
    ratio: float
    """General rows per domain row; 0 for domain only."""
    rate: float | None
    """Learning rate, where the name has one."""


@dataclass(frozen=True)
class Trial:
    """What an arm learned, lost and cost, as means over seeds."""

    arm: Arm
    learned: float
    """Score of the new task, 0 to 1."""
    learned_interval: Interval
    lost: float
    """General score before training minus after it, 0 to 1; below 0 where it rose."""
    lost_interval: Interval
    steps: float | None
    """Optimizer steps."""
    seconds: float | None
    """Of training."""
    seeds: int


@dataclass(frozen=True)
class Recommendation:
    """The arm that learns most within a budget of forgetting, and all that it was chosen from."""

    budget_points: float
    verdict: str
    """within | crosses | none: how sure it is that the choice keeps to the budget."""
    choice: Trial | None
    """None where every arm surely loses more than the budget."""
    trials: tuple[Trial, ...] = field(repr=False)
    """Every arm considered."""
    tie_points: float

    def to_frame(self) -> "pd.DataFrame":
        """The evidence, what learned most first.

        Columns arm, learned, lost, each with low and high, steps, and budget: "within", "crosses"
        or "over".
        """
        import pandas as pd

        rows = [
            {
                "arm": trial.arm.name,
                "learned": trial.learned,
                "learned low": trial.learned_interval[0],
                "learned high": trial.learned_interval[1],
                "lost": trial.lost,
                "lost low": trial.lost_interval[0],
                "lost high": trial.lost_interval[1],
                "steps": trial.steps,
                "budget": keeps_to(trial, self.budget_points),
            }
            for trial in sorted(self.trials, key=lambda trial: -trial.learned)
        ]
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        """The choice with its evidence, or that there is none; measured numbers carry "≈"."""
        budget = _count(self.budget_points)
        if self.choice is None:
            least = min(self.trials, key=lambda trial: trial.lost)
            return (
                f"No arm keeps to a budget of {budget}: the least is lost by {least.arm.name}, "
                f"{_points(least)}. Raise the budget, or mix in more general data."
            )
        kept = [t for t in self.trials if keeps_to(t, self.budget_points) == self.verdict]
        equal = _equal(kept, self.tie_points)
        found = (
            f"{self.choice.arm.name}. It learned {approx(self.choice.learned)} "
            f"({_range(self.choice.learned_interval)}) and lost {_points(self.choice)}"
        )
        if self.choice.steps is not None:
            found += f", in {self.choice.steps:,.0f} steps"
        seeds = self.choice.seeds
        found += f", over {seeds} seeds." if seeds > 1 else ", in one seed, so without intervals."
        if len(equal) > 1:
            found += (
                f" Of {len(equal)} arms that learned the same to within "
                f"{_count(self.tie_points)} it takes the fewest steps."
            )
        if self.verdict == "within":
            return (
                f"Within a budget of {budget}: {found} "
                f"{len(kept)} of {len(self.trials)} arms keep to the budget."
            )
        return (
            f"No arm surely keeps to a budget of {budget}; it may be kept by {found} "
            "Its interval crosses the budget: more seeds would decide."
        )


def parse_arm(name: str) -> Arm:
    """Method, mix and rate from an arm's name; a name without a mix trained on the domain only.

    Raises:
        ValueError: nothing is left to be the method.
    """
    mix, rate = _MIX.search(name), _RATE.search(name)
    method = " ".join(_RATE.sub(" ", _MIX.sub(" ", name, count=1), count=1).split())
    if not method:
        raise ValueError(f"arm {name!r} names no method: write METHOD MIX at RATE")
    words = mix[1] if mix else DOMAIN_ONLY
    return Arm(name, method, words, _ratio(words), float(rate[1]) if rate else None)


def _ratio(mix: str) -> float:
    if mix == DOMAIN_ONLY:
        return 0.0
    return float(mix[2:]) if mix.startswith("1:") else float(mix.removesuffix(" %")) / 100


def arms_of(results: dict, learned: str = "d3", lost: str = "lost") -> list[Trial]:
    """Every arm of a results file that has both measures, in the file's order.

    Args:
        results: from `claims.load_results`; metrics named `ARM/MEASURE`.
        learned, lost: the measures' names; the costs are `ARM/steps` and `ARM/seconds`.

    Raises:
        ValueError: no arm has both.
    """
    metrics = results.get("metrics", {})
    names = dict.fromkeys(arm for name in metrics if (arm := name.rpartition("/")[0]))
    trials = []
    for name in names:
        gain, loss = (_measured(metrics, f"{name}/{what}") for what in (learned, lost))
        if gain is None or loss is None:
            continue
        trials.append(
            Trial(
                arm=parse_arm(name),
                learned=gain["mean"],
                learned_interval=tuple(gain["interval"]),
                lost=loss["mean"],
                lost_interval=tuple(loss["interval"]),
                steps=_mean(metrics, f"{name}/steps"),
                seconds=_mean(metrics, f"{name}/seconds"),
                seeds=min(len(gain["values"]), len(loss["values"])),
            )
        )
    if not trials:
        raise ValueError(
            f"no arm of the results has both ARM/{learned} and ARM/{lost}: name the measures of "
            "this notebook with learned= and lost="
        )
    return trials


def recommend(
    results: dict,
    budget_points: float,
    *,
    learned: str = "d3",
    lost: str = "lost",
    tie_points: float = 1.0,
    only: Callable[[Arm], bool] | None = None,
) -> Recommendation:
    """The arm that learned most among those that lost no more than the budget.

    An arm keeps to the budget when its whole interval does; where none does, arms whose interval
    crosses it are considered, and the recommendation says so. Arms that learned the same to within
    `tie_points` are equals, and the one with the fewest steps is taken.

    Args:
        results: from `claims.load_results`.
        budget_points: of general score that may be lost; 3 allows 0.97 to become 0.94.
        learned, lost: as in `arms_of`.
        tie_points: differences in what was learned that do not matter.
        only: which arms to consider, such as `lambda arm: arm.method == "full"`; None is all.

    Raises:
        ValueError: a budget or tie below 0, no arm with both measures, or `only` leaves none.
    """
    for name, points in (("budget_points", budget_points), ("tie_points", tie_points)):
        if not (points >= 0 and math.isfinite(points)):
            raise ValueError(f"{name}={points} must be 0 or more: points, 3 for 0.97 to 0.94")
    trials = arms_of(results, learned, lost)
    trials = [trial for trial in trials if only is None or only(trial.arm)]
    if not trials:
        raise ValueError("only= leaves no arm: name a method, mix or rate that was tried")
    for verdict in ("within", "crosses"):
        kept = [trial for trial in trials if keeps_to(trial, budget_points) == verdict]
        if kept:
            cost = {trial: math.inf if trial.steps is None else trial.steps for trial in kept}
            choice = min(_equal(kept, tie_points), key=lambda t: (cost[t], t.lost, -t.learned))
            return Recommendation(budget_points, verdict, choice, tuple(trials), tie_points)
    return Recommendation(budget_points, "none", None, tuple(trials), tie_points)


def keeps_to(trial: Trial, budget_points: float) -> str:
    """Whether what an arm lost is "within" a budget, "over" it, or its interval "crosses" it."""
    budget = budget_points / 100
    low, high = trial.lost_interval
    if high <= budget + _ROUNDING:
        return "within"
    return "over" if low > budget + _ROUNDING else "crosses"


def _equal(trials: list[Trial], tie_points: float) -> list[Trial]:
    """Those that learned as much as the best, to within `tie_points`."""
    best = max(trial.learned for trial in trials)
    return [trial for trial in trials if trial.learned >= best - tie_points / 100 - _ROUNDING]


def _measured(metrics: dict[str, Any], name: str) -> dict[str, Any] | None:
    metric = metrics.get(name)
    return None if metric is None or metric["mean"] is None else metric


def _mean(metrics: dict[str, Any], name: str) -> float | None:
    metric = _measured(metrics, name)
    return None if metric is None else metric["mean"]


def _range(interval: Interval, scale: float = 1, digits: int = 2) -> str:
    low, high = (approx(scale * end, digits) for end in interval)
    return f"{low} to {high}"


def _count(points: float) -> str:
    return f"{points:g} point{'' if points == 1 else 's'}"


def _points(trial: Trial) -> str:
    return f"{approx(100 * trial.lost, 1)} points ({_range(trial.lost_interval, 100, 1)})"
