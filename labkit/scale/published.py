"""The throughput model beside what others measured: each published figure, the model's, the error.

`labkit.scale.throughput` is a model with two shares that are assumed. This table says how far to
trust it. Figures of papers stand in `data/memory/throughput.json` with their sources; none of them
chose a share. Runs of one and two devices stand in `data/memory/public.json`; the efficiency was
set after a look at them, so the errors there are in sample.

>>> volumes = [check for check in checks() if check.kind == "volume"]
>>> [(check.published, check.error) for check in volumes][-1]
(0.75, 0.0)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from labkit.memory import gpus, reference
from labkit.scale.throughput import VOLUMES, Assumptions, Cluster, StepTime, step_time, with_range

TERA = 10**12


@dataclass(frozen=True)
class Check:
    """One published figure and what the model says of it."""

    what: str
    kind: str
    """`volume`, `tflops`, `speedup`, `gpu hours` or `tokens per second`."""
    unit: str
    published: float
    published_range: tuple[float, float]
    """Where the source gives one; else the figure twice."""
    predicted: float
    low: float
    """The model's own range: with none of the traffic hidden, and with all that can be."""
    high: float
    source: str
    url: str
    where: str
    """At which place of the source."""
    why: str
    """What the model leaves out, where it is off."""

    @property
    def error(self) -> float:
        """Relative to the published figure, signed: above 0 where the model says more."""
        return self.predicted / self.published - 1

    @property
    def covered(self) -> bool:
        """Whether the published figure lies in the model's range, or within 5 % of it."""
        low, high = self.published_range
        return self.low * 0.95 <= high and low <= self.high * 1.05


def checks(assumptions: Assumptions | None = None) -> tuple[Check, ...]:
    """Every published figure, in the order of the files."""
    assumptions = assumptions or Assumptions()
    content = reference.read_json("throughput.json")
    found = [_check(row, content["models"], assumptions) for row in content["rows"]]
    measured = [row for row in reference.rows() if row.tokens_per_second]
    return (*found, *(_measured(row, assumptions) for row in measured))


def _check(row: Mapping[str, Any], models: Mapping[str, Any], assumptions: Assumptions) -> Check:
    """One row of throughput.json."""
    middle, *ends = _values(row, models, assumptions)
    published = row["published"]
    return Check(
        what=row["what"],
        kind=row["kind"],
        unit=row["unit"],
        published=published,
        published_range=tuple(row.get("published_range", (published, published))),
        predicted=middle,
        low=min(ends),
        high=max(ends),
        source=row["source"],
        url=row["url"],
        where=row["where"],
        why=row["why"],
    )


def _values(
    row: Mapping[str, Any], models: Mapping[str, Any], assumptions: Assumptions
) -> tuple[float, float, float]:
    """What the model says: as assumed, with no traffic hidden, and with all."""
    if row["kind"] == "volume":
        total = VOLUMES[row["strategy"]].total
        return (total, total, total)
    config = models.get(row["model"]) or reference.model(row["model"])
    cluster = Cluster(**row["cluster"])

    def three(strategy: str | None) -> tuple[StepTime, StepTime, StepTime]:
        step = step_time(config, cluster, assumptions, strategy=strategy, **row["options"])
        return (step, *with_range(step))

    steps = three(row.get("strategy"))
    if row["kind"] == "tflops":
        found = [step.flops_per_second / TERA for step in steps]
    elif row["kind"] == "gpu hours":
        found = [row["tokens"] / step.tokens_per_second / 3600 for step in steps]
    else:
        pairs = zip(steps, three(row["against"]), strict=True)
        found = [step.tokens_per_second / other.tokens_per_second for step, other in pairs]
    return (found[0], found[1], found[2])


def _measured(row: reference.Row, assumptions: Assumptions) -> Check:
    """A run of one or two devices, whose memory the estimator is held to as well."""
    devices = row.options.get("num_devices", 1)
    cluster = Cluster.of(gpus.find(row.gpu).name, devices=devices)
    options = {name: value for name, value in row.options.items() if name != "num_devices"}
    step = step_time(row.config, cluster, assumptions, **options)
    middle, *ends = (one.tokens_per_second / devices for one in (step, *with_range(step)))
    assert row.tokens_per_second is not None
    return Check(
        what=row.name,
        kind="tokens per second",
        unit="tokens per second of one device",
        published=row.tokens_per_second,
        published_range=(row.tokens_per_second, row.tokens_per_second),
        predicted=middle,
        low=min(ends),
        high=max(ends),
        source="foundation-model-stack/fms-acceleration",
        url="https://github.com/foundation-model-stack/fms-acceleration",
        where=row.file,
        why="one share of the peak for every training; this one reached another",
    )
