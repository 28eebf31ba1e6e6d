"""Intervals by hand, against SciPy, and by how often they cover the truth."""

import numpy as np
import pytest
import scipy.stats

from labkit.statistics import (
    Difference,
    bootstrap_interval,
    equivalent,
    macro_interval,
    paired_difference,
    ratio_interval,
    seed_interval,
    t_quantile,
)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30, 199, 1000])
def test_t_quantile_equals_scipy(degrees):
    for probability in (0.5, 0.9, 0.95, 0.975, 0.9999):
        expected = scipy.stats.t.ppf(probability, degrees)
        assert t_quantile(probability, degrees) == pytest.approx(expected, abs=1e-8, rel=1e-10)


def test_t_quantile_refuses_what_it_cannot_answer():
    with pytest.raises(ValueError, match="probability=0.2"):
        t_quantile(0.2, 4)
    with pytest.raises(ValueError, match="degrees=0"):
        t_quantile(0.975, 0)


def test_seed_interval_by_hand():
    # Mean 0.9, standard deviation 0.1, and the table's t for 2 degrees is 4.303.
    low, high = seed_interval([0.8, 0.9, 1.0])
    half = 4.302653 * 0.1 / 3**0.5
    assert (low, high) == pytest.approx((0.9 - half, 0.9 + half), abs=1e-6)
    assert seed_interval([1.0, 1.0]) == (1.0, 1.0)


def test_seed_interval_needs_two_seeds_and_finite_numbers():
    with pytest.raises(ValueError, match="two seeds or more"):
        seed_interval([0.9])
    with pytest.raises(ValueError, match=r"values\[1\] is nan"):
        seed_interval([0.9, float("nan")])


def _coverage(make, truth, interval, trials=300):
    """Share of `trials` simulated data sets whose interval holds the truth."""
    hits = 0
    for trial in range(trials):
        low, high = interval(*make(np.random.default_rng(trial)))
        hits += low <= truth <= high
    return hits / trials


def _clustered(rng, n_clusters=40, size=5, truth=0.7):
    """Right and wrong answers; every cluster has its own share, drawn around the truth."""
    shares = rng.beta(truth * 4, (1 - truth) * 4, size=n_clusters)
    values = (rng.random((n_clusters, size)) < shares[:, None]).astype(float).ravel()
    return values, np.repeat(np.arange(n_clusters), size)


def test_clustered_bootstrap_covers_the_truth_95_times_in_100():
    interval = lambda values, clusters: bootstrap_interval(values, clusters, n=400)  # noqa: E731
    # 300 trials at 95 % spread by 1.3 points; 91 to 98.5 is three of those either way.
    assert 0.91 <= _coverage(_clustered, 0.7, interval) <= 0.985


def test_one_mistake_never_raises_the_lower_end():
    lows = [bootstrap_interval([1.0] * (150 - wrong) + [0.0] * wrong)[0] for wrong in range(8)]
    assert lows == sorted(lows, reverse=True)
    # Wilson's lower end for 149 of 150, by hand.
    assert lows[1] == pytest.approx(0.9632, abs=5e-4)


def test_scores_near_the_ceiling_are_covered_too():
    def nearly_right(rng):
        return (rng.random(150) < 0.975).astype(float), np.arange(150)

    interval = lambda values, clusters: bootstrap_interval(values, clusters, n=400)  # noqa: E731
    assert _coverage(nearly_right, 0.975, interval) >= 0.93


def test_few_clusters_are_covered_too():
    interval = lambda values, clusters: bootstrap_interval(values, clusters, n=400)  # noqa: E731
    assert _coverage(lambda rng: _clustered(rng, n_clusters=10), 0.7, interval) >= 0.91


def test_ignoring_the_clusters_covers_too_rarely():
    interval = lambda values, clusters: bootstrap_interval(values, n=400)  # noqa: E731
    assert _coverage(_clustered, 0.7, interval) <= 0.90


def test_all_right_is_not_certain():
    # Clopper and Pearson for 10 of 10: 0.025 ** (1/10) = 0.6915.
    assert bootstrap_interval([1.0] * 10) == pytest.approx((0.6915, 1.0), abs=1e-4)
    assert bootstrap_interval([0.0] * 10) == pytest.approx((0.0, 0.3085), abs=1e-4)
    # Fifty answers about ten people are no surer than ten.
    people = [str(number % 10) for number in range(50)]
    assert bootstrap_interval([1.0] * 50, people) == bootstrap_interval([1.0] * 10)
    expected = scipy.stats.binomtest(10, 10).proportion_ci(method="exact")
    assert bootstrap_interval([1.0] * 10) == pytest.approx(tuple(expected))


def test_interval_is_repeatable_and_holds_the_mean():
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    first = bootstrap_interval(values, seed=3)
    assert first == bootstrap_interval(values, seed=3)
    assert first[0] < 4 / 6 < first[1]
    narrow, wide = bootstrap_interval(values, level=0.5), bootstrap_interval(values, level=0.99)
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


def test_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    values = (rng.random(50) < 0.8).astype(float)
    whole = bootstrap_interval(values, n=500)
    monkeypatch.setattr("labkit.statistics._CHUNK_CELLS", 1000)
    assert bootstrap_interval(values, n=500) == whole


def test_labels_may_be_names_or_numbers():
    values = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    by_name = bootstrap_interval(values, ["Ada", "Ada", "Bo", "Bo", "Mira", "Mira"])
    assert by_name == bootstrap_interval(values, [7, 7, 8, 8, 9, 9])
    assert by_name != bootstrap_interval(values)


def test_ratio_weighs_every_token_the_same():
    # One text of 1 token at 5 nats, many of 9 tokens at 1 nat each: the mean is near 1, not 3.
    low, high = ratio_interval([5.0] + [9.0] * 20, [1.0] + [9.0] * 20)
    assert 1.0 <= low < 185 / 181 < high < 1.2
    with pytest.raises(ValueError, match="numerators has 2 values, denominators 1"):
        ratio_interval([1.0, 2.0], [1.0])


def test_macro_weighs_every_group_the_same():
    # 90 right of 90 in one skill, 5 of 10 in the other: micro 0.95, macro 0.75.
    values, skills = [1.0] * 90 + [1.0, 0.0] * 5, ["facts"] * 90 + ["sort"] * 10
    low, high = macro_interval(values, [1.0] * 100, None, skills)
    assert low < 0.75 < high < 0.95


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([]), "values must be a flat list"),
        (lambda: bootstrap_interval([1.0, 0.0], ["a"]), "1 labels for 2 values"),
        (lambda: bootstrap_interval([1.0, 0.0], ["a", "a"]), "two clusters or more"),
        (lambda: bootstrap_interval([1.0, 0.0], level=95), "level=95"),
        (lambda: bootstrap_interval([1.0, float("inf")]), r"values\[1\] is inf"),
        (lambda: paired_difference([1.0], [1.0, 0.0]), "a has 1 values, b 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_paired_difference_by_hand():
    difference = paired_difference([1, 1, 0, 1], [1, 0, 0, 0], ["Ada", "Ada", "Bo", "Bo"])
    assert difference.mean == 0.5
    assert (difference.n, difference.level) == (4, 0.90)
    opposite = paired_difference([1, 0, 0, 0], [1, 1, 0, 1], ["Ada", "Ada", "Bo", "Bo"])
    assert opposite.mean == -0.5


def test_pairing_is_sharper_than_two_intervals():
    rng = np.random.default_rng(0)
    before = (rng.random(400) < 0.5).astype(float)
    after = before.copy()
    after[np.flatnonzero(before == 0)[:12]] = 1.0
    low, high = paired_difference(after, before).interval
    assert 0 < low < 0.03 < high < 0.06


def test_no_item_differs_leaves_room_for_a_rare_change():
    same = [1.0, 0.0] * 250
    difference = paired_difference(same, same)
    assert difference.mean == 0
    assert difference.interval == pytest.approx((-0.00597, 0.00597), abs=1e-5)
    assert equivalent(difference, 0.01) == "equivalent"


def test_every_item_lost_is_mirrored():
    gained = paired_difference([1.0] * 20, [0.0] * 20)
    lost = paired_difference([0.0] * 20, [1.0] * 20)
    assert gained.interval[1] == 1 and lost.interval[0] == -1
    assert lost.interval == (-gained.interval[1], -gained.interval[0])


def test_paired_difference_over_groups():
    a, b = [1.0] * 9 + [0.0], [0.0] * 9 + [0.0]
    difference = paired_difference(a, b, groups=["facts"] * 9 + ["sort"])
    assert difference.mean == 0.5


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((-0.01, 0.02), "equivalent"),
        ((0.01, 0.02), "equivalent"),  # a sure difference, but a small one
        ((0.04, 0.09), "different"),
        ((-0.09, -0.04), "different"),
        ((-0.01, 0.05), "inconclusive"),
        ((0.01, 0.05), "inconclusive"),
        ((-0.30, 0.30), "inconclusive"),  # "not significant" is not "equivalent"
    ],
)
def test_equivalent(interval, verdict):
    assert equivalent(Difference(sum(interval) / 2, interval, 500, 0.90), margin=0.03) == verdict


def test_equivalent_needs_a_margin():
    with pytest.raises(ValueError, match="margin=0"):
        equivalent(Difference(0.0, (0.0, 0.0), 1, 0.9), margin=0)
