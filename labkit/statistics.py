"""Intervals and paired comparisons: how sure a score is, and whether two scores differ.

Three questions, three tools:
- how far could this score be off?           `bootstrap_interval`, over the items of one run
- how much does it vary from run to run?     `seed_interval`, over the seeds
- is B really better, or as good, than A?    `paired_difference`, then `equivalent`

Worked example: two models answer the same four questions about two people.

>>> difference = paired_difference([1, 1, 0, 1], [1, 0, 0, 0], clusters=["Ada", "Ada", "Bo", "Bo"])
>>> difference.mean
0.5
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, stdev

import numpy as np

Interval = tuple[float, float]

_FEW_CLUSTERS = 5
# Replicates per chunk times clusters: about 80 MB of resampling weights at a time.
_CHUNK_CELLS = 10_000_000


@dataclass(frozen=True)
class Difference:
    """A mean paired difference a - b with its interval."""

    mean: float
    interval: Interval
    n: int
    """Number of pairs."""
    level: float
    """Coverage of `interval`, 0.90 for an equivalence test at 5 %."""


def bootstrap_interval(
    values: Sequence[float],
    clusters: Sequence[str] | None = None,
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of `values`, by resampling whole clusters with replacement.

    Answers about one person stand or fall together, so the person is drawn, not the answer. The
    percentiles are widened for few clusters as in Hesterberg (2015, "What Teachers Should Know
    About the Bootstrap", section 5.3). Resampling values that are all 0 or all 1 shows no spread,
    so the exact binomial bound over the clusters is given instead (3 of 3 right is not "100 %").

    Args:
        values: one number an item, such as 1.0 right and 0.0 wrong.
        clusters: one label an item; None makes every item its own cluster.
        n: resamples.
        level: coverage.
        seed: of the resampling; the same input gives the same interval.

    Raises:
        ValueError: no values, lengths disagree, or a level outside (0, 1).
    """
    scores = _column(values, "values")
    low, high = ratio_interval(scores, np.ones_like(scores), clusters, n=n, level=level, seed=seed)
    if np.isin(scores, (0.0, 1.0)).all():
        cluster = _codes(clusters, len(scores))
        fewest = min(len(np.unique(cluster[scores == verdict])) for verdict in (0.0, 1.0))
        if 0 < fewest < _FEW_CLUSTERS:
            wilson = _wilson_interval(scores.mean(), cluster.max() + 1, level)
            low, high = min(low, wilson[0]), max(high, wilson[1])
    return low, high


def ratio_interval(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    clusters: Sequence[str] | None = None,
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of sum(numerators) / sum(denominators), such as nats per token over texts.

    Raises:
        ValueError: no values, lengths disagree, or a level outside (0, 1).
    """
    top, bottom = _column(numerators, "numerators"), _column(denominators, "denominators")
    if len(top) != len(bottom):
        raise ValueError(f"numerators has {len(top)} values, denominators {len(bottom)}")
    return macro_interval(top, bottom, clusters, n=n, level=level, seed=seed)


def macro_interval(
    numerators: Sequence[float] | np.ndarray,
    denominators: Sequence[float] | np.ndarray,
    clusters: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    n: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of the mean over groups of sum(numerators) / sum(denominators) within the group.

    Clusters are drawn once for all groups, so a person who appears in two skills moves both.

    Args:
        numerators, denominators: one number an item each.
        clusters: one label an item, or None.
        groups: one label an item, such as its skill; None is one group.

    Raises:
        ValueError: no values, lengths disagree, or a level outside (0, 1).
    """
    _check_level(level)
    top, bottom = _column(numerators, "numerators"), _column(denominators, "denominators")
    cluster, group = _codes(clusters, len(top)), _codes(groups, len(top), one=True)
    n_clusters, n_groups = cluster.max() + 1, group.max() + 1
    if np.array_equal(top, bottom) or not top.any():
        return _exact_bound(n_clusters, all_right=bool(top.any()), level=level)
    if np.array_equal(-top, bottom):
        low, high = _exact_bound(n_clusters, all_right=True, level=level)
        return -high, -low
    sums = np.zeros((2, n_clusters, n_groups))
    np.add.at(sums[0], (cluster, group), top)
    np.add.at(sums[1], (cluster, group), bottom)
    means = _resampled_means(sums[0], sums[1], n, seed)
    return _expanded_percentiles(means, n_clusters, level)


def seed_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean over seeds, for two values or more.

    Raises:
        ValueError: fewer than two values, a value that is not finite, or a level outside (0, 1).
    """
    _check_level(level)
    scores = _column(values, "values").tolist()
    if len(scores) < 2:
        raise ValueError("values has 1 number: an interval over seeds needs two seeds or more")
    half = t_quantile((1 + level) / 2, len(scores) - 1) * stdev(scores) / math.sqrt(len(scores))
    return fmean(scores) - half, fmean(scores) + half


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[str] | None = None,
    level: float = 0.90,
    groups: Sequence[str] | None = None,
    n: int = 2000,
    seed: int = 0,
) -> Difference:
    """Mean of a - b over the same items, with a bootstrap interval clustered as `clusters` say.

    The default level 0.90 makes `equivalent` the two one-sided tests at 5 % (Schuirmann 1987).
    With `groups`, such as the skill of each item, the mean over groups of each group's mean.

    Raises:
        ValueError: no values, lengths disagree, or a level outside (0, 1).
    """
    first, second = _column(a, "a"), _column(b, "b")
    if len(first) != len(second):
        raise ValueError(f"a has {len(first)} values, b {len(second)}: pair the same items")
    change, ones = first - second, np.ones(len(first))
    group = _codes(groups, len(change), one=True)
    mean = float((np.bincount(group, change) / np.bincount(group)).mean())
    low, high = macro_interval(change, ones, clusters, groups, n=n, level=level, seed=seed)
    if not change.any():
        # No item differs: what is left is a change too rare to be in the sample, either way.
        low = -high
    return Difference(mean, (low, high), len(change), level)


def equivalent(difference: Difference, margin: float) -> str:
    """Whether a difference is smaller than `margin` either way, as the data can tell.

    Returns:
        "equivalent" when the whole interval lies within the margin, "different" when the whole
        interval lies beyond it, "inconclusive" otherwise. A difference that is merely "not
        significant" is never called equivalent.

    Raises:
        ValueError: margin is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"margin={margin} must be above 0: how much would still be no difference?")
    low, high = difference.interval
    if -margin < low and high < margin:
        return "equivalent"
    return "different" if low >= margin or high <= -margin else "inconclusive"


@lru_cache
def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t for a probability in [0.5, 1); normal beyond 1,000 degrees.

    The distribution's closed form for whole degrees of freedom (Abramowitz and Stegun 1964,
    26.7.3 and 26.7.4), solved by bisection.

    Raises:
        ValueError: probability outside [0.5, 1), or degrees below 1.
    """
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(
            f"probability={probability} must lie in [0.5, 1) and degrees={degrees} be 1 or more"
        )
    if degrees > 1000:
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, math.pi / 2  # the angle theta = atan(t / sqrt(degrees))
    for _ in range(60):
        middle = (low + high) / 2
        below = (1 + _central_probability(middle, degrees)) / 2 < probability
        low, high = (middle, high) if below else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _central_probability(theta: float, degrees: int) -> float:
    """P(-t < T < t) for t = tan(theta) * sqrt(degrees)."""
    cosine, odd = math.cos(theta), degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(2 if odd else 1, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


def _resampled_means(tops: np.ndarray, bottoms: np.ndarray, n: int, seed: int) -> np.ndarray:
    """(n,) mean over groups of the resampled ratio; tops and bottoms are (clusters, groups)."""
    rng = np.random.default_rng(seed)
    n_clusters = len(tops)
    rows = max(1, _CHUNK_CELLS // n_clusters)
    chunks = []
    for start in range(0, n, rows):
        size = min(rows, n - start)
        # How often each cluster is drawn in each of `size` resamples.
        weights = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=size)
        drawn = weights @ bottoms
        # A group that no drawn cluster touches has no mean in that resample and is left out of it.
        ratio = np.divide(weights @ tops, drawn, out=np.full_like(drawn, np.nan), where=drawn > 0)
        chunks.append(np.nanmean(ratio, axis=1))
    return np.concatenate(chunks)


def _expanded_percentiles(means: np.ndarray, n_clusters: int, level: float) -> Interval:
    """Percentile interval, as wide as Student's t asks for instead of the normal."""
    if n_clusters < 2:
        raise ValueError("clusters has 1 label: an interval needs two clusters or more")
    reach = t_quantile((1 + level) / 2, int(n_clusters) - 1)
    reach *= math.sqrt(n_clusters / (n_clusters - 1))
    tail = NormalDist().cdf(-reach)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _wilson_interval(share: float, n_clusters: int, level: float) -> Interval:
    """Wilson's (1927) interval of a share of n clusters.

    With one to four clusters wrong (or right) resampling sees too few of them: at 149 of 150 its
    interval would start higher than at 150 of 150.
    """
    z, n = NormalDist().inv_cdf((1 + level) / 2), int(n_clusters)
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return float(middle - half), float(middle + half)


def _exact_bound(n_clusters: int, all_right: bool, level: float) -> Interval:
    """Clopper and Pearson's (1934) interval when every one of n clusters is right, or none is."""
    miss = ((1 - level) / 2) ** (1 / int(n_clusters))
    return (miss, 1.0) if all_right else (0.0, 1 - miss)


def _column(values: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    """`values` as float64, refused when empty or not finite."""
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or column.size == 0:
        raise ValueError(
            f"{name} must be a flat list of at least one number, got shape {column.shape}"
        )
    if not np.isfinite(column).all():
        where = int(np.flatnonzero(~np.isfinite(column))[0])
        raise ValueError(f"{name}[{where}] is {column[where]}: every value must be finite")
    return column


def _codes(labels: Sequence[str] | None, size: int, one: bool = False) -> np.ndarray:
    """Labels as 0, 1, 2, ...; None is a label an item, or one label for all."""
    if labels is None:
        return np.zeros(size, dtype=int) if one else np.arange(size)
    if len(labels) != size:
        raise ValueError(f"clusters has {len(labels)} labels for {size} values: give one an item")
    return np.unique(np.asarray(labels), return_inverse=True)[1]


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, such as 0.95")
