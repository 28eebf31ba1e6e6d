"""Every statement of the course that a measurement decides, notebook by notebook.

A claim is one sentence, where it comes from, the quantity that decides it, and the rule that makes
it hold. Popular beliefs stand here beside our own and are judged the same way, by `labkit.claims`.
"""

import math
from dataclasses import dataclass

Interval = tuple[float, float]
Bar = float | tuple[float, float]


@dataclass(frozen=True)
class Rule:
    """Which values of a quantity make a claim hold: those in [low, high]."""

    low: float
    high: float

    @property
    def bar(self) -> Bar:
        """The one finite end, or both."""
        if math.isinf(self.high):
            return self.low
        return self.high if math.isinf(self.low) else (self.low, self.high)

    @property
    def words(self) -> str:
        """The rule as it is read aloud: "at least 0.9"."""
        if math.isinf(self.high):
            return f"at least {self.low:g}"
        return (
            f"at most {self.high:g}" if math.isinf(self.low) else f"{self.low:g} to {self.high:g}"
        )

    def verdict(self, value: float, interval: Interval | None = None) -> str:
        """ "holds" inside, "does not hold" outside, "inconclusive" across an end."""
        low, high = interval or (value, value)
        if self.low <= low and high <= self.high:
            return "holds"
        return "does not hold" if high < self.low or low > self.high else "inconclusive"


def at_least(bar: float) -> Rule:
    """Holds from `bar` up."""
    return Rule(bar, math.inf)


def at_most(bar: float) -> Rule:
    """Holds up to `bar`."""
    return Rule(-math.inf, bar)


def within(low: float, high: float) -> Rule:
    """Holds from `low` to `high`, both included."""
    if not low <= high:
        raise ValueError(f"low={low} is above high={high}: swap them")
    return Rule(low, high)


def equivalent(margin: float) -> Rule:
    """Holds for a difference of at most `margin` either way; judge it with a 90 % interval."""
    return within(-margin, margin)


@dataclass(frozen=True)
class Claim:
    """One statement that a measurement decides."""

    id: str
    statement: str
    source: str
    """Who says so: a paper, or a popular guide whose belief is put to the test."""
    quantity: str
    """What is measured, with its unit."""
    rule: Rule


_FULL_FINE_TUNING = (
    Claim(
        "full-learns-d1",
        "Full fine-tuning teaches the ticket task to the small model.",
        "shared by all guides; measured in notebook 02",
        "exact match on the ticket task's test rows after full fine-tuning",
        at_least(0.90),
    ),
    Claim(
        "full-forgets",
        "Full fine-tuning on one task alone costs general ability.",
        "McCloskey and Cohen 1989, catastrophic interference; measured in notebook 02",
        "general macro exact match before minus after",
        at_least(0.05),
    ),
    Claim(
        "pad-is-not-end",
        "Every row's end token is learned from, so the model is trained to stop.",
        "common failure on trackers: pad = end, and the model never stops",
        "share of training rows whose end token is supervised",
        at_least(1.0),
    ),
    Claim(
        "save-every-2000-never-saves",
        "A checkpoint every 2,000 steps leaves a short run without one before its last step.",
        "popular guides: save every 2,000 steps",
        "checkpoints written before the last step, at an interval of 2,000",
        at_most(0),
    ),
    Claim(
        "steps-formula-is-wrong",
        "The popular step formula at least doubles the steps of a run that accumulates gradients.",
        "popular guides: steps = epochs x rows / (devices x batch)",
        "formula divided by real steps: 1,000 rows, batch 8, 2 devices, accumulation 4, 3 epochs",
        at_least(2.0),
    ),
    Claim(
        "early-stopping-restores-best",
        "With load_best_model_at_end, training ends with the best validation loss, not the last.",
        "transformers documentation; trackers report lost best models",
        "validation loss of the final model minus the lowest logged one, in nats per token",
        at_most(0.001),
    ),
    Claim(
        "higher-rate-forgets-more",
        "At equal steps, the highest rate tried costs more general ability than the lowest.",
        "popular guides: lower the rate against forgetting",
        "general macro drop at the highest rate minus the drop at the lowest one",
        at_least(0.02),
    ),
    Claim(
        "full-rate-2e-5-is-too-low-here",
        "In 50 steps, the usual 2e-5 of billion-parameter models teaches far less than a faster "
        "rate.",
        "popular guides: full fine-tuning at 2e-5",
        "exact match on tickets after 50 steps at the best rate tried minus at 2e-5",
        at_least(0.20),
    ),
)

CLAIMS: dict[str, Claim] = {claim.id: claim for claim in (*_FULL_FINE_TUNING,)}
