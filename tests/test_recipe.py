"""The choice of a mixture for a budget of forgetting, on results small enough to choose by eye."""

import math

import pytest

from labkit.recipe import Arm, arms_of, keeps_to, parse_arm, recommend


def metric(mean, low=None, high=None, seeds=5):
    interval = [mean if low is None else low, mean if high is None else high]
    return {"values": [mean] * seeds, "mean": mean, "interval": interval}


def results(**changes):
    """Learned, lost with its interval, and steps of five arms; `changes` replaces metrics."""
    arms = {
        "full domain only at 5e-04": (1.000, (0.20, 0.18, 0.22), 40),
        "full 1:1 at 5e-04": (0.990, (0.04, 0.035, 0.045), 80),
        "full 1:5 at 5e-04": (0.985, (0.02, 0.01, 0.03), 240),
        "full 1:10 at 5e-04": (0.990, (0.01, 0.0, 0.02), 440),
        "lora r8 25 % at 4e-03": (0.900, (0.06, 0.02, 0.10), 50),
    }
    metrics = {}
    for name, (learned, lost, steps) in arms.items():
        metrics |= {f"{name}/d3": metric(learned, learned - 0.01, learned + 0.01)}
        metrics |= {f"{name}/lost": metric(*lost), f"{name}/steps": metric(float(steps))}
    return {"metrics": metrics | changes}


def chosen(*arguments, **options):
    found = recommend(results(), *arguments, **options)
    return found.verdict, found.choice and found.choice.arm.name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("full 1:5 at 5e-04", ("full", "1:5", 5.0, 5e-4)),
        ("lora r8 25 %", ("lora r8", "25 %", 0.25, None)),
        ("prefix 20 domain only at 1e-01", ("prefix 20", "domain only", 0.0, 0.1)),
        ("full 1:10 at 0.0005 same compute", ("full same compute", "1:10", 10.0, 5e-4)),
        ("full ewc 10 at 5e-04", ("full ewc 10", "domain only", 0.0, 5e-4)),
        ("base", ("base", "domain only", 0.0, None)),
    ],
)
def test_an_arms_name_says_method_mix_and_rate(name, expected):
    arm = parse_arm(name)
    assert (arm.method, arm.mix, arm.ratio, arm.rate) == expected
    assert arm.name == name


def test_an_arm_without_a_method_is_refused():
    with pytest.raises(ValueError, match="arm '1:5 at 5e-04' names no method"):
        parse_arm("1:5 at 5e-04")


def test_arms_need_both_measures_and_are_never_guessed():
    half = {
        "freeze k2/d3": metric(0.5),  # nobody measured what it lost
        "freeze k1/d3": {"values": [0.5, None], "mean": None, "interval": None},
        "freeze k1/lost": metric(0.1),
        "train_seconds": metric(1.0),  # no arm's
        "full 1:1 at 5e-04/seconds": metric(7.0),
    }
    trials = arms_of(results(**half))
    assert [trial.arm.method for trial in trials] == ["full"] * 4 + ["lora r8"]
    assert (trials[1].learned, trials[1].lost_interval) == (0.99, (0.035, 0.045))
    assert (trials[1].steps, trials[1].seconds, trials[1].seeds) == (80, 7.0, 5)
    assert trials[0].seconds is None
    with pytest.raises(ValueError, match="no arm of the results has both ARM/d1 and ARM/lost"):
        arms_of(results(), learned="d1")


def test_the_whole_interval_must_keep_to_the_budget():
    _, one, five, ten, lora = arms_of(results())
    assert [keeps_to(trial, 3) for trial in (one, five, ten, lora)] == [
        "over", "within", "within", "crosses",
    ]  # fmt: skip
    # 1:5 lost 2 points on average, and up to 3: 2.5 is crossed.
    assert keeps_to(five, 2.5) == "crosses"
    assert keeps_to(lora, 2) == "crosses"  # an end on the budget is not over it


def test_what_learned_most_within_the_budget_is_chosen():
    # 0.985 and 0.990 are the same to within a point: 240 steps are fewer than 440.
    assert chosen(3) == ("within", "full 1:5 at 5e-04")
    assert chosen(3, tie_points=0) == ("within", "full 1:10 at 5e-04")
    assert chosen(2.5) == ("within", "full 1:10 at 5e-04")
    assert chosen(4.5) == ("within", "full 1:1 at 5e-04")
    assert chosen(30) == ("within", "full domain only at 5e-04")


def test_where_no_arm_surely_keeps_to_it_that_is_said():
    assert chosen(1) == ("crosses", "full 1:5 at 5e-04")
    text = str(recommend(results(), 1))
    assert text.startswith("No arm surely keeps to a budget of 1 point; it may be kept by full 1:5")
    assert text.endswith("Its interval crosses the budget: more seeds would decide.")


def test_where_every_arm_loses_more_none_is_chosen():
    def alone(arm: Arm) -> bool:
        return arm.ratio == 0

    found = recommend(results(), 3, only=alone)
    assert (found.verdict, found.choice, len(found.trials)) == ("none", None, 1)
    assert str(found) == (
        "No arm keeps to a budget of 3 points: the least is lost by full domain only at 5e-04, "
        "≈20.0 points (≈18.0 to ≈22.0). Raise the budget, or mix in more general data."
    )


def test_the_sentence_holds_the_evidence():
    assert str(recommend(results(), 3)) == (
        "Within a budget of 3 points: full 1:5 at 5e-04. It learned ≈0.98 (≈0.97 to ≈0.99) and "
        "lost ≈2.0 points (≈1.0 to ≈3.0), in 240 steps, over 5 seeds. Of 2 arms that learned the "
        "same to within 1 point it takes the fewest steps. 2 of 5 arms keep to the budget."
    )
    one_seed = {
        name: metric(entry["mean"], seeds=1) for name, entry in results()["metrics"].items()
    }
    assert "in one seed, so without intervals." in str(recommend({"metrics": one_seed}, 3))


def test_the_frame_holds_every_arm_with_its_place_in_the_budget():
    frame = recommend(results(), 3).to_frame()
    assert list(frame["learned"]) == [1.0, 0.99, 0.99, 0.985, 0.9]
    assert dict(zip(frame["arm"], frame["budget"], strict=True)) == {
        "full domain only at 5e-04": "over",
        "full 1:1 at 5e-04": "over",
        "full 1:10 at 5e-04": "within",
        "full 1:5 at 5e-04": "within",
        "lora r8 25 % at 4e-03": "crosses",
    }
    row = frame.set_index("arm").loc["full 1:5 at 5e-04"]
    assert (row["lost"], row["lost low"], row["lost high"], row["steps"]) == (0.02, 0.01, 0.03, 240)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_points": -1}, "budget_points=-1 must be 0 or more"),
        ({"budget_points": math.nan}, "budget_points=nan must be 0 or more"),
        ({"budget_points": 3, "tie_points": -1}, "tie_points=-1 must be 0 or more"),
        ({"budget_points": 3, "only": lambda arm: False}, "only= leaves no arm"),
    ],
)
def test_bad_requests_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        recommend(results(), **arguments)
