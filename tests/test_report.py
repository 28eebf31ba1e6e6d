"""What is drawn is what was given, in words as in marks, and readable by everybody."""

import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from labkit import report  # noqa: E402
from labkit.evaluation import Loss, Score, SkillReport  # noqa: E402

HISTORY = pd.DataFrame(
    {
        "step": [10, 20, 30, 40],
        "loss": [3.0, 1.5, np.nan, 0.25],
        "eval_loss": [np.nan, 2.0, np.nan, 1.0],
    }
)
FORGETTING = pd.DataFrame(
    {
        "skill": ["facts", "sort", "macro"],
        "before": [1.0, 0.9, 0.95],
        "after": [0.5, 1.0, 0.75],
        "change": [-0.5, 0.1, -0.2],
        "low": [-0.6, 0.05, -0.3],
        "high": [-0.4, 0.15, -0.1],
    }
)
SWEEP = pd.DataFrame(
    {"rate": [1e-3, 2e-5, 5e-4], "task": [0.99, 0.02, 0.97], "general": [0.4, 0.99, 0.8]}
)
RESULTS = {
    "metrics": {
        "task": {"values": [0.90, 0.95, 0.94], "mean": 0.93, "interval": [0.90, 0.96]},
        "drop": {"values": [0.20, 0.30, 0.25], "mean": 0.25, "interval": [0.13, 0.37]},
    }
}


ARMS = {
    "metrics": {
        f"{arm}/{measure}": {"values": [mean], "mean": mean, "interval": [mean - 0.1, mean + 0.1]}
        for arm, measures in {
            "full": {"d1": 0.9, "kept": 0.3, "size": 1_000},
            "lora r1": {"d1": 0.5, "kept": 0.8, "size": 10},
            "lora r4": {"d1": 0.8, "kept": 0.7, "size": 40},
            "freeze": {"size": 7},
        }.items()
        for measure, mean in measures.items()
    }
    | {"d1": {"values": [1.0], "mean": 1.0, "interval": [1.0, 1.0]}}  # no arm's
    | {"train_seconds": {"values": [1.0], "mean": 1.0, "interval": [1.0, 1.0]}},
    "learning_rates": {
        "lora": {
            "tried": {"0.001": [0.2, 0.4], "0.002": [0.9, None], "0.004": [None]},
            "chosen": 0.002,
            "chosen_per_seed": [0.002, 0.002],
        }
    },
}


@pytest.fixture(autouse=True)
def _default_style():
    with plt.rc_context():
        yield
    plt.close("all")


def _points(ax, label):
    (line,) = [line for line in ax.get_lines() if line.get_label() == label]
    return list(zip(*(np.asarray(side).tolist() for side in line.get_data()), strict=True))


# ---- figures -----------------------------------------------------------------------------------


def test_learning_curve_draws_the_log():
    ax = report.learning_curve(HISTORY)
    assert _points(ax, "training") == [(10, 3.0), (20, 1.5), (40, 0.25)]
    assert _points(ax, "validation") == [(20, 2.0), (40, 1.0)]
    assert ax.get_title(loc="left") == "Training loss falls from 3.00 to 0.25"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("optimizer step", "loss (nats per token)")
    assert report.describe(ax) == (
        "Training loss goes from ≈3.00 to ≈0.25 nats per token, lowest ≈0.25 near step ≈40; "
        "validation loss goes from ≈2.00 to ≈1.00 nats per token, lowest ≈1.00 near step ≈40."
    )


def test_learning_curve_without_validation():
    ax = report.learning_curve(HISTORY[["step", "loss"]])
    assert [line.get_label() for line in ax.get_lines()] == ["training"]


def test_before_after_draws_the_frame():
    ax = report.before_after(FORGETTING)
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels == ["macro", "sort", "facts"]  # from the bottom up: the first row on top
    drawn = {c.get_label(): np.asarray(c.get_offsets()).tolist() for c in ax.collections}
    assert drawn["before"] == [[0.95, 0], [0.9, 1], [1.0, 2]]
    assert drawn["after"] == [[0.75, 0], [1.0, 1], [0.5, 2]]
    assert ax.get_title(loc="left") == "Lost most: facts (-0.50)"
    assert report.describe(ax) == (
        "Exact match before and after: facts ≈1.00 to ≈0.50, sort ≈0.90 to ≈1.00, "
        "macro ≈0.95 to ≈0.75."
    )
    # The interval of the change stands around `after`.
    ends = [line.get_xdata() for line in ax.get_lines() if line.get_linewidth() == 1]
    assert any(np.allclose(pair, [0.4, 0.6]) for pair in ends)


def test_skills_are_drawn_from_the_weakest_up_with_their_intervals():
    def scored(name, value):
        low, high = value - 0.1, value + 0.05
        return Score(name, value, 40, (low, high), correct=(), ids=(), clusters=())

    skills = {"sort": scored("sort", 0.3), "chat": scored("chat", 0.9)}
    ax = report.skills(SkillReport(0.6, (0.5, 0.7), skills, bio_only=None, unknown_names=None))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["sort", "chat"]
    points = [c.get_offsets().tolist()[0] for c in ax.collections]
    assert np.allclose(points, [[0.3, 0], [0.9, 1]])
    ends = [line.get_xdata() for line in ax.get_lines() if line.get_linewidth() == 2]
    assert np.allclose(ends, [[0.2, 0.35], [0.8, 0.95]])
    assert ax.get_title(loc="left") == "Weakest: sort; mean of all: 0.60"
    assert report.describe(ax) == "Exact match of each skill: chat ≈0.90, sort ≈0.30."


def test_nothing_lost_is_said():
    kept = FORGETTING.assign(after=FORGETTING["before"], change=0.0)
    assert report.before_after(kept).get_title(loc="left") == "Nothing lost"


def test_rate_sweep_draws_every_rate_in_order():
    ax = report.rate_sweep(SWEEP, chosen=5e-4)
    assert _points(ax, "task") == [(2e-5, 0.02), (5e-4, 0.97), (1e-3, 0.99)]
    assert ax.get_xscale() == "log"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2e-05", "0.0005", "0.001"]
    assert ax.get_title(loc="left") == "task is highest at 0.001"
    assert report.describe(ax).startswith("Task ≈0.02 at rate 2e-05, ≈0.97 at rate 0.0005")
    assert report.describe(ax).endswith("rate 0.0005 is marked.")


def test_seeds_plot_draws_every_seed_and_today():
    ax = report.seeds_plot(RESULTS, {"task": 0.94, "drop": 0.40})
    assert [x for x, _ in _points(ax, "seeds of task")] == [0.90, 0.95, 0.94]
    today = [line for line in ax.get_lines() if line.get_label() == "today"]
    assert sorted(np.ravel(line.get_xdata())[0] for line in today) == [0.40, 0.94]
    assert ax.get_title(loc="left") == "Today's run: 1 of 2 within the range of the seeds"
    assert report.describe(ax) == (
        "Task mean ≈0.93 over 3 seeds, interval ≈0.90 to ≈0.96, today ≈0.94; "
        "drop mean ≈0.25 over 3 seeds, interval ≈0.13 to ≈0.37, today ≈0.40."
    )
    assert len(report.seeds_plot(RESULTS, names=["drop"]).get_yticks()) == 1


def test_seeds_plot_leaves_curves_out():
    curve = {"values": [[1, 2], [1, 3]], "mean": None, "interval": None}
    results = {"metrics": {**RESULTS["metrics"], "losses": curve}}
    assert len(report.seeds_plot(results).get_yticks()) == 2
    with pytest.raises(ValueError, match=r"no number \['losses'\]"):
        report.seeds_plot(results, names=["losses"])


def test_arms_are_one_line_each_with_their_intervals():
    table = report.arms(ARMS, "d1", "kept")
    assert table["arm"].tolist() == ["full", "lora r1", "lora r4"]  # freeze has neither
    assert table.columns.tolist() == [
        "arm", "d1", "d1 low", "d1 high", "kept", "kept low", "kept high",
    ]  # fmt: skip
    first = table.iloc[0]
    assert (first["d1"], first["d1 low"], first["kept high"]) == (0.9, 0.8, 0.4)
    sizes = report.arms(ARMS, "size", "d1")
    assert sizes["arm"].tolist()[-1] == "freeze" and np.isnan(sizes["d1"].iloc[-1])


def test_learning_rates_say_what_was_tried_and_who_chose_it():
    [row] = report.learning_rates(ARMS).to_dict("records")
    assert row["method"] == "lora"
    assert row["validation by rate"] == "0.001: ≈0.30, 0.002: ≈0.90, 0.004: none"
    assert row["chosen by seeds"] == "0.002 by 2"


def test_rate_scores_are_one_line_a_rate_that_some_seed_tried():
    table = report.rate_scores(ARMS, "lora")
    assert table["rate"].tolist() == [0.001, 0.002]  # 0.004 diverged for every seed
    assert table["score"].tolist() == pytest.approx([0.3, 0.9])
    low, high = table.loc[0, "score low"], table.loc[0, "score high"]
    assert low == pytest.approx(0.3 - 0.1 * 12.706, abs=1e-3) and high == pytest.approx(0.6 - low)
    assert table.loc[1, ["score low", "score high"]].tolist() == [0.9, 0.9]  # one seed: no spread
    with pytest.raises(ValueError, match=r"methods \['full'\] tried no rates: .*'lora'"):
        report.rate_scores(ARMS, "lora", "full")


def test_curves_draw_a_line_for_each_group_in_the_order_of_x():
    df = report.arms(ARMS, "size", "d1").dropna()
    df["family"] = [arm.split()[0] for arm in df["arm"]]
    ax = report.curves(df.iloc[::-1], "size", "d1", "family", "numbers trained", "exact match")
    assert report.describe(ax) == (
        "Exact match by numbers trained. lora: ≈0.50 at 10, ≈0.80 at 40; full: ≈0.90 at 1,000."
    )
    assert ax.get_xscale() == "log"
    assert ax.get_title(loc="left") == "Highest: full at 1,000"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["lora", "full"]
    lines = [bars[0] for bars in ax.containers]
    assert [line.get_xdata().tolist() for line in lines] == [[10, 40], [1_000]]
    assert [line.get_color() for line in lines] == [report.COLORS["lora"], report.COLORS["full"]]
    many = pd.concat([df.assign(family=str(n)) for n in range(10)])
    with pytest.raises(ValueError, match="10 groups: there are colours for 9"):
        report.curves(many, "size", "d1", "family", "x", "y")


def test_learned_and_lost_puts_each_arm_where_both_measures_say():
    ax = report.learned_and_lost(report.arms(ARMS, "d1", "kept"), "d1", "kept")
    marks = {tuple(map(float, p)) for line in ax.get_lines() for p in line.get_xydata()}
    assert {(0.3, 0.9), (0.8, 0.5), (0.7, 0.8)} <= marks
    assert ax.get_title(loc="left") == "Most of both together: lora r4"
    assert "Full learned ≈0.90, kept ≈0.30" in report.describe(ax)
    colors = {text.get_text(): text.get_color() for text in ax.texts}
    assert colors["lora r4"] == report.COLORS["lora"] and colors["full"] == report.COLORS["full"]


MIXES = pd.DataFrame(
    {
        "arm": ["full alone", "full 1:5", "lora 1:5", "lora alone", "prefix"],
        "d3": [1.0, 0.98, 0.97, 0.99, np.nan],
        "lost": [0.20, 0.02, 0.02, 0.30, 0.5],
    }
).assign(
    **{
        f"{name}{end}": lambda df, name=name, sign=sign: df[name] + sign * 0.01
        for name in ("d3", "lost")
        for end, sign in ((" low", -1), (" high", 1))
    }
)


def test_the_frontier_is_what_no_other_arm_beats():
    # LoRA learned less at the same loss, and less at a greater one; a missing number beats none.
    assert report.on_frontier(MIXES, "d3", "lost") == [True, True, False, False, False]
    twins = pd.DataFrame({"d3": [0.9, 0.9], "lost": [0.1, 0.1]})
    assert report.on_frontier(twins, "d3", "lost") == [True, True]


def test_frontier_draws_every_arm_and_names_those_on_the_line():
    ax = report.frontier(MIXES, "d3", "lost", budget_points=3)
    assert _points(ax, "frontier") == [(2.0, 0.98), (20.0, 1.0)]  # losses in points
    marks = {tuple(map(float, p)) for line in ax.get_lines() for p in line.get_xydata()}
    assert {(2.0, 0.97), (30.0, 0.99)} <= marks
    assert [text.get_text() for text in ax.texts if text.get_text()] == ["full alone", "full 1:5"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["full", "lora"]
    assert 3.0 in [line.get_xdata()[0] for line in ax.get_lines() if line.get_linestyle() == ":"]
    assert ax.get_title(loc="left") == "2 of 4 arms are beaten by no other"
    assert report.describe(ax) == (
        "Not beaten by another arm, least lost (in points) first: full 1:5 learned ≈0.98, lost "
        "≈2.0; full alone learned ≈1.00, lost ≈20.0; the other 2 learned ≈0.97 to ≈0.99 and lost "
        "≈2.0 to ≈30.0; a budget of 3 points is marked."
    )


def test_frontier_takes_names_for_beaten_and_unbeaten_arms():
    ax = report.frontier(MIXES, "d3", "lost", names={"full 1:5": "1:5", "lora alone": "no mix"})
    named = [text.get_text() for text in ax.texts if text.get_text()]
    assert named == ["full alone", "1:5", "no mix"]
    assert _points(ax, "frontier") == [(2.0, 0.98), (20.0, 1.0)]  # a name puts none on the line
    alone = report.frontier(MIXES.head(1), "d3", "lost")
    assert alone.get_title(loc="left") == "1 of 1 arms is beaten by no other"


def test_names_of_crowded_points_cover_neither_each_other_nor_the_edge():
    crowd = pd.DataFrame(
        {
            "arm": [f"full 1:{n} at 5e-04" for n in range(12)],
            "d1": [0.97 + 0.002 * (n % 4) for n in range(12)],
            "kept": [0.95 + 0.002 * (n % 3) for n in range(12)],
        }
    )
    wide = {f"{name}{end}": crowd[name] for name in ("d1", "kept") for end in (" low", " high")}
    ax = report.learned_and_lost(crowd.assign(**wide), "d1", "kept")
    names = [text for text in ax.texts if text.get_text()]
    boxes = [text.get_window_extent() for text in names]
    assert len(boxes) == 12
    frame = ax.get_window_extent()
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1
        assert frame.y0 <= box.y0 and box.y1 <= frame.y1


def test_text_losses_draws_each_text_before_against_after():
    before = Loss(1.5, 4, None, nats=(2.0, 4.0), tokens=(2, 2))
    after = Loss(2.0, 4, None, nats=(6.0, 2.0), tokens=(2, 2))
    ax = report.text_losses(before, after)
    assert ax.collections[0].get_offsets().tolist() == [[1.0, 3.0], [2.0, 1.0]]
    assert ax.get_title(loc="left") == "Loss on text rises: 1.50 to 2.00"
    assert report.describe(ax) == (
        "Loss on 2 texts goes from ≈1.50 to ≈2.00 nats per token; it is higher after than before "
        "for ≈50 % of the texts."
    )
    with pytest.raises(ValueError, match="before has 2 texts"):
        report.text_losses(before, Loss(1.0, 2, None, nats=(2.0,), tokens=(2,)))


def test_weight_levels_scale_each_block_and_mark_every_level():
    weights = torch.tensor([[0.5, -2.0, 0.0, 0.1], [8.0, 4.0, -8.0, 0.4]])
    ax = report.weight_levels(weights, torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]), block=4)
    heights = [bar.get_height() for bar in ax.patches]
    assert sum(heights) == 8
    # By hand: 0.25, -1, 0, 0.05 and 1, 0.5, -1, 0.05 of their blocks' largest.
    assert heights[0] == 2 and heights[-1] == 1  # both blocks' -1, one 1
    assert [line.get_xdata()[0] for line in ax.lines] == [-1.0, -0.5, 0.0, 0.5, 1.0]
    # Sizes 0, 0.05, 0.05, 0.25, 0.5, 1, 1, 1: the lower median is 0.25, where one level stands.
    assert report.describe(ax).startswith(
        "Half of the weights lie within ≈0.25 of 0, and so do 1 of the 5 levels; steps between "
        "levels are 0.50 wide at the lower end"
    )


def test_figures_are_drawn_on_given_axes_and_fit_the_page():
    figure, axes = plt.subplots(1, 2)
    assert report.learning_curve(HISTORY, ax=axes[0]) is axes[0]
    assert report.before_after(FORGETTING, ax=axes[1]) is axes[1]
    plt.close(figure)
    width, height = report.rate_sweep(SWEEP).figure.get_size_inches()
    assert width <= 8 and height <= 4.5


def test_two_runs_that_differ_a_little_are_described_in_the_same_words():
    sanitised = [
        re.sub(r"≈-?[\d.]+(e-?\d+)?", "≈number", report.describe(report.learning_curve(history)))
        for history in (HISTORY, HISTORY.assign(loss=HISTORY["loss"] * 1.01))
    ]
    assert sanitised[0] == sanitised[1]
    tables = [
        re.sub(r"≈-?[\d.]+(e-?\d+)?", "≈number", str(report.table(frame, "Scores")))
        for frame in (FORGETTING, FORGETTING.assign(change=[-0.5001, -1e-5, 0.02]))
    ]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: report.learning_curve(HISTORY[["step"]]), r"columns \['loss'\] are missing"),
        (lambda: report.learning_curve(HISTORY.assign(loss=np.nan)), "no logged loss"),
        (lambda: report.before_after(FORGETTING.head(0)), "no rows"),
        (lambda: report.rate_sweep(SWEEP.assign(rate=0.0)), "must be above 0"),
        (lambda: report.rate_sweep(SWEEP[["rate"]]), "a rate column alone"),
        (lambda: report.seeds_plot(RESULTS, names=["loss"]), r"no number \['loss'\]"),
        (lambda: report.seeds_plot({}), "no number at all"),
        (lambda: report.describe(plt.subplots()[1]), "not drawn by labkit.report"),
        (lambda: report.dodge(0), "n=0"),
        (lambda: report.arms(ARMS, "d9"), "no metric of the results ends with d9"),
        (lambda: report.curves(SWEEP, "rate", "task", "arm", "x", "y"), "task low"),
        (lambda: report.learned_and_lost(SWEEP, "task", "general"), "arm"),
        (lambda: report.on_frontier(SWEEP, "task", "lost"), "columns .*lost.* are missing"),
        (lambda: report.frontier(SWEEP, "task", "general"), "columns .*arm.* are missing"),
        (lambda: report.frontier(MIXES.tail(1), "d3", "lost"), "no arm has both d3 and lost"),
        (lambda: report.weight_levels(torch.ones(9), torch.ones(3)), "9 numbers, less than one bl"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_dodge_is_centred():
    assert report.dodge(1) == [0]
    assert report.dodge(3, width=0.6) == pytest.approx([-0.2, 0, 0.2])


# ---- colours -----------------------------------------------------------------------------------


def _luminance(color: str) -> float:
    """Relative luminance of sRGB (WCAG 2)."""
    channels = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in matplotlib.colors.to_rgb(color)
    ]
    return float(np.dot([0.2126, 0.7152, 0.0722], channels))


def _contrast(a: str, b: str) -> float:
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# Machado et al. 2009, severity 1.0, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
}


@pytest.mark.parametrize("vision", BLINDNESS)
def test_methods_are_told_apart(vision):
    colors = np.array([matplotlib.colors.to_rgb(c) for c in report.COLORS.values()])
    seen = np.clip((colors**2.2) @ np.array(BLINDNESS[vision]).T, 0, 1) ** (1 / 2.2)
    for first in range(len(seen)):
        for second in range(first):
            assert np.linalg.norm(seen[first] - seen[second]) > 0.12, (first, second)
    assert len(set(report.MARKERS.values())) == len(report.COLORS)


def test_text_and_marks_stand_out_from_the_ground():
    assert _contrast(report.INK, report.GROUND) >= 7
    assert all(_contrast(color, report.GROUND) >= 2 for color in report.COLORS.values())


def test_style_sets_a_light_ground():
    report.style()
    assert plt.rcParams["figure.facecolor"] == plt.rcParams["axes.facecolor"] == report.GROUND
    assert plt.rcParams["savefig.facecolor"] == report.GROUND


# ---- tables and numbers ------------------------------------------------------------------------


class _Cells(HTMLParser):
    """Collects (tag, scope, text) of every caption and cell."""

    def __init__(self, text: str):
        super().__init__()
        self.cells, self._open = [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag in ("caption", "th", "td"):
            self._open = (tag, dict(attrs).get("scope"))

    def handle_data(self, data):
        if self._open:
            self.cells.append((*self._open, data))
            self._open = None


def test_table_for_screen_readers():
    frame = pd.DataFrame({"method": ["full", "a<b"], "rows": [1000, 2], "score": [0.931, np.nan]})
    shown = report.table(frame, "Scores & rows")
    assert _Cells(shown._repr_html_()).cells == [
        ("caption", None, "Scores & rows"),
        ("th", "col", "method"),
        ("th", "col", "rows"),
        ("th", "col", "score"),
        ("th", "row", "full"),
        ("td", None, "1,000"),
        ("td", None, "≈0.93"),
        ("th", "row", "a<b"),
        ("td", None, "2"),
        ("td", None, "–"),
    ]
    assert str(shown).splitlines() == [
        "Scores & rows",
        "method |  rows | score",
        "full   | 1,000 | ≈0.93",
        "a<b    |     2 | –",
    ]
    assert repr(shown) == str(shown)


def test_exact_floats_are_printed_as_they_are():
    frame = pd.DataFrame({"rate": [2e-5, 0.5], "loss": [1.234, 0.00001]})
    shown = report.table(frame, "Rates", exact=["rate"])
    assert shown.rows == (("2e-05", "≈1.23"), ("0.5", "≈1.0e-05"))


def test_table_names_bad_input():
    with pytest.raises(ValueError, match="no rows"):
        report.table(pd.DataFrame({"a": []}), "Empty")
    with pytest.raises(ValueError, match=r"exact names columns \['b'\], df has \['a'\]"):
        report.table(pd.DataFrame({"a": [1]}), "One", exact=["b"])


def test_bytes_in_units():
    assert report.gib(3 * 2**29) == "1.50 GiB"
    assert report.gib(8 * 10**9) == "7.45 GiB"
    assert report.mb(10_104_832) == "10.1 MB"


HEAT = pd.DataFrame(
    {
        "rate": [0.01, 0.1, 0.01, 0.1],
        "tokens": [5, 5, 20, 20],
        "score": [0.25, 0.5, np.nan, 0.125],
    }
)


def test_heat_map_writes_each_number_where_its_pair_stands():
    fig, ax = plt.subplots()
    report.heat_map(HEAT, "rate", "tokens", "score", "exact match", ax)
    written = {text.get_position(): text.get_text() for text in ax.texts}
    assert written == {(0, 0): "0.25", (1, 0): "0.50", (1, 1): "0.12"}
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0.01", "0.1"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["5", "20"]
    assert ax.get_title() == "Highest: 0.50 at rate 0.1, tokens 5"
    assert report.describe(ax) == (
        "Exact match: ≈0.25 at rate 0.01, tokens 5, ≈0.50 at rate 0.1, tokens 5, "
        "≈0.12 at rate 0.1, tokens 20."
    )
    plt.close(fig)


def test_heat_map_of_a_loss_names_the_lowest():
    fig, ax = plt.subplots()
    report.heat_map(HEAT, "rate", "tokens", "score", "nats", ax, lowest=True)
    assert ax.get_title() == "Lowest: 0.12 at rate 0.1, tokens 20"
    plt.close(fig)


def test_heat_maps_can_share_their_shades():
    fig, ax = plt.subplots()
    report.heat_map(HEAT, "rate", "tokens", "score", "points", ax, limits=(0.2, 0.4))
    assert ax.images[0].get_clim() == (0.2, 0.4)
    assert ax.images[0].colorbar.extend == "both"  # 0.12 lies below, 0.50 above
    inks = {text.get_text(): text.get_color() for text in ax.texts}
    assert inks == {"0.25": "white", "0.50": "black", "0.12": "white"}
    plt.close(fig)


def test_heat_map_of_large_numbers_writes_one_decimal():
    fig, ax = plt.subplots()
    report.heat_map(HEAT.assign(score=100 * HEAT["score"]), "rate", "tokens", "score", "points", ax)
    assert sorted(text.get_text() for text in ax.texts) == ["12.5", "25.0", "50.0"]
    plt.close(fig)


def test_heat_map_says_what_is_wrong():
    with pytest.raises(ValueError, match="rate 0.01 with tokens 5 stands there twice"):
        report.heat_map(pd.concat([HEAT, HEAT[:1]]), "rate", "tokens", "score", "exact match")
    with pytest.raises(ValueError, match="no pair of rate and tokens has a score"):
        report.heat_map(HEAT[2:3], "rate", "tokens", "score", "exact match")
    with pytest.raises(ValueError, match="columns \\['loss'\\] are missing"):
        report.heat_map(HEAT, "rate", "tokens", "loss", "nats")
