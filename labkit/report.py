"""Tables and figures of the course, each with the same thing in words.

One style, one colour a method from the first notebook to the last, and beside every figure a
sentence from `describe`, because a screen reader sees no picture.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from labkit.claims import approx

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from torch import Tensor

    from labkit.evaluation import Loss, SkillReport

# Okabe and Ito's palette (2008), told apart with every kind of colour vision. Its yellow is too
# faint on a light ground: prefix tuning takes a dark brown instead, and the base model a grey.
COLORS = {
    "base": "#606060",
    "full": "#0072B2",
    "freeze": "#56B4E9",
    "lora": "#D55E00",
    "qlora": "#E69F00",
    "prompt": "#CC79A7",
    "p-tuning": "#009E73",
    "prefix": "#661100",
    "dpo": "#000000",
}
# A second sign beside the colour, for prints in black and white.
MARKERS = dict(zip(COLORS, "osD^vPX*d", strict=True))
GROUND, INK, FAINT = "#FCFCFC", "#222222", "#C8C8C8"
FIGURE_INCHES = (8.0, 4.5)

_SUMMARIES: "WeakKeyDictionary[Axes, str]" = WeakKeyDictionary()


def style() -> None:
    """Set matplotlib's defaults; the light ground keeps figures readable in a dark theme."""
    import matplotlib as mpl
    from cycler import cycler

    order = ["full", "lora", "p-tuning", "prompt", "qlora", "freeze", "prefix", "dpo"]
    mpl.rcParams.update(
        {
            "figure.figsize": FIGURE_INCHES,
            "figure.facecolor": GROUND,
            "figure.constrained_layout.use": True,
            "savefig.facecolor": GROUND,
            "axes.facecolor": GROUND,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.prop_cycle": cycler(color=[COLORS[name] for name in order]),
            "grid.color": FAINT,
            "grid.linewidth": 0.6,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "font.size": 11.0,
            "lines.linewidth": 2.0,
            "legend.frameon": False,
        }
    )


# ---- numbers -----------------------------------------------------------------------------------


def gib(n_bytes: float) -> str:
    """Bytes as GiB (2**30), such as "1.50 GiB"."""
    return f"{n_bytes / 2**30:,.2f} GiB"


def mb(n_bytes: float) -> str:
    """Bytes as MB (10**6), such as "10.1 MB"."""
    return f"{n_bytes / 10**6:,.1f} MB"


# ---- tables ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table that a screen reader can walk through: caption, column heads and row heads."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    """One flag a column: numbers stand to the right."""

    def __str__(self) -> str:
        """Plain text; columns of approximate numbers are not padded, as their width may vary."""
        cells = [self.columns, *self.rows]
        widths = [
            0 if any(cell.startswith("≈") for cell in column) else max(map(len, column))
            for column in zip(*cells, strict=True)
        ]
        lines = [
            " | ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, self.numeric, strict=True)
            ).rstrip()
            for row in cells
        ]
        return "\n".join([self.caption, *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The first column heads its row."""
        align = ["right" if right else "left" for right in self.numeric]
        head = "".join(
            f'<th scope="col" style="text-align:{side}">{html.escape(name)}</th>'
            for name, side in zip(self.columns, align, strict=True)
        )
        body = ""
        for first, *rest in self.rows:
            cells = "".join(
                f'<td style="text-align:{side}">{html.escape(cell)}</td>'
                for cell, side in zip(rest, align[1:], strict=True)
            )
            side = f'style="text-align:{align[0]}"'
            body += f'<tr><th scope="row" {side}>{html.escape(first)}</th>{cells}</tr>\n'
        caption = f'<caption style="text-align:left">{html.escape(self.caption)}</caption>'
        return f"<table>{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"


def table(df: "pd.DataFrame", caption: str, exact: Sequence[str] = (), digits: int = 2) -> Table:
    """A data frame as an accessible table, shown as HTML in a notebook and as text elsewhere.

    Args:
        df: its columns become the table's; the index is left out.
        caption: says what the numbers are and their unit.
        exact: columns of floats that are facts, not measurements of a training run; they are
            printed as they are, all other floats as "≈0.93".
        digits: decimals of the approximate numbers.

    Raises:
        ValueError: no rows, or `exact` names a column that is not there.
    """
    if df.empty:
        raise ValueError("df has no rows: there is nothing to show")
    missing = [name for name in exact if name not in df.columns]
    if missing:
        raise ValueError(f"exact names columns {missing}, df has {list(df.columns)}")
    columns = [
        [_cell(value, name in exact, digits) for value in df[name].tolist()] for name in df.columns
    ]
    numeric = [df[name].dtype.kind in "iuf" for name in df.columns]
    names = tuple(str(name) for name in df.columns)
    return Table(caption, names, tuple(zip(*columns, strict=True)), tuple(numeric))


def _cell(value: Any, exact: bool, digits: int) -> str:
    if isinstance(value, bool | str):
        return str(value)
    if value is None or value != value:  # NaN alone differs from itself
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}" if exact else approx(value, digits)
    return str(value)


# ---- figures -----------------------------------------------------------------------------------


def describe(ax: "Axes") -> str:
    """The figure in one sentence, to print beside it; numbers carry "≈", words never change.

    Raises:
        ValueError: the axes were not drawn by this module.
    """
    if ax not in _SUMMARIES:
        raise ValueError("ax was not drawn by labkit.report: describe it in a sentence of your own")
    return _SUMMARIES[ax]


def dodge(n: int, width: float = 0.6) -> list[float]:
    """Offsets of n marks side by side around a tick, so that their intervals do not overlap."""
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    return [(k - (n - 1) / 2) * width / n for k in range(n)]


def learning_curve(history: "pd.DataFrame", ax: "Axes | None" = None) -> "Axes":
    """Training and validation loss over steps, from `training.history`.

    Args:
        history: columns step and loss, and eval_loss where it was measured; gaps are NaN.

    Raises:
        ValueError: no step or loss column, or no logged loss.
    """
    _need(history, "step", "loss")
    ax = _axes(ax)
    curves = {"training": history[["step", "loss"]].dropna()}
    if "eval_loss" in history:
        curves["validation"] = history[["step", "eval_loss"]].dropna()
    if curves["training"].empty:
        raise ValueError("history holds no logged loss: set logging_steps below the run's steps")
    parts = []
    for (name, curve), color in zip(curves.items(), ("full", "lora"), strict=False):
        if curve.empty:
            continue
        steps, losses = (curve[column].tolist() for column in curve.columns)
        ax.plot(steps, losses, color=COLORS[color], marker="o", markersize=3, label=name)
        ax.annotate(
            name, (steps[-1], losses[-1]), (6, 0), textcoords="offset points", va="center",
            color=COLORS[color], annotation_clip=False,
        )  # fmt: skip
        best = min(range(len(losses)), key=losses.__getitem__)
        parts.append(
            f"{name} loss goes from {approx(losses[0])} to {approx(losses[-1])} nats per token, "
            f"lowest {approx(losses[best])} near step ≈{steps[best]:g}"
        )
    logged = curves["training"]["loss"].tolist()
    first, last = logged[0], logged[-1]
    verb = "falls" if last < first else "rises"
    ax.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    ax.set_title(f"Training loss {verb} from {first:.2f} to {last:.2f}")
    return _summarise(ax, "; ".join(parts))


def before_after(df: "pd.DataFrame", ax: "Axes | None" = None) -> "Axes":
    """What each skill scored before and after, one line a skill, from `evaluation.forgetting`.

    Args:
        df: columns skill, before, after, change; with low and high the change's interval is
            drawn around `after`.

    Raises:
        ValueError: a column is missing, or there are no rows.
    """
    _need(df, "skill", "before", "after", "change")
    ax = _axes(ax)
    rows = df.to_dict("records")[::-1]  # the first skill on top
    for place, row in enumerate(rows):
        ax.plot([row["before"], row["after"]], [place, place], color=FAINT, linewidth=3, zorder=1)
        if "low" in row:
            ends = [row["before"] + row["low"], row["before"] + row["high"]]
            ax.plot(ends, [place, place], color=COLORS["full"], linewidth=1, zorder=2)
    for name, method in (("before", "base"), ("after", "full")):
        values = [row[name] for row in rows]
        places = range(len(rows))
        ax.scatter(values, places, color=COLORS[method], marker=MARKERS[method], s=45, label=name)
    ax.set_yticks(range(len(rows)), [row["skill"] for row in rows])
    ax.set(xlabel="exact match", xlim=(-0.03, 1.03))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.06), ncols=2)
    worst = min(rows, key=lambda row: row["change"])
    lost = worst["change"] < 0
    ax.set_title(
        f"Lost most: {worst['skill']} ({worst['change']:+.2f})" if lost else "Nothing lost"
    )
    parts = [f"{r['skill']} {approx(r['before'])} to {approx(r['after'])}" for r in rows[::-1]]
    return _summarise(ax, f"exact match before and after: {', '.join(parts)}")


def weight_levels(
    weights: "Tensor", levels: "Tensor", ax: "Axes | None" = None, block: int = 64
) -> "Axes":
    """Histogram of weights, each divided by the largest of its block, with the levels marked.

    Args:
        weights: any shape, read row by row; the last block is left out where it is not full.
        levels: where the weights will be rounded to, in [-1, 1], lowest first.
        block: weights that share one largest value.

    Raises:
        ValueError: fewer weights than one block.
    """
    if weights.numel() < block:
        raise ValueError(f"weights holds {weights.numel()} numbers, less than one block of {block}")
    whole = weights.detach().float().flatten()[: weights.numel() // block * block]
    blocks = whole.reshape(-1, block)
    scaled = (blocks / blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-38)).flatten()
    half = scaled.abs().median().item()
    marks = levels.tolist()
    within = sum(abs(mark) <= half for mark in marks)
    ax = _axes(ax)
    ax.hist(scaled.cpu().numpy(), bins=100, range=(-1, 1), color=COLORS["base"])
    for mark in marks:
        ax.axvline(mark, color=COLORS["qlora"], linewidth=1.2)
    ax.set(xlabel="weight, divided by the largest of its block", ylabel="weights")
    ax.set_title(
        f"Half of the weights lie within {half:.2f} of 0, and {within} of {len(marks)} levels"
    )
    return _summarise(
        ax,
        f"half of the weights lie within {approx(half)} of 0, and so do {within} of the "
        f"{len(marks)} levels; "
        f"steps between levels are {marks[1] - marks[0]:.2f} wide at the lower end, "
        f"{min(b - a for a, b in zip(marks, marks[1:], strict=False)):.2f} at the narrowest, and "
        f"{marks[-1] - marks[-2]:.2f} at the upper end",
    )


def skills(skill_report: "SkillReport", ax: "Axes | None" = None) -> "Axes":
    """Exact match of each skill with its 95 % interval, the weakest at the bottom.

    Args:
        skill_report: from `evaluation.skill_report`.
    """
    ax = _axes(ax)
    scores = sorted(skill_report.skills.values(), key=lambda score: score.exact_match)
    for place, score in enumerate(scores):
        ax.plot(score.interval, [place, place], color=COLORS["base"], linewidth=2)
        ax.scatter([score.exact_match], [place], color=COLORS["full"], zorder=3, s=40)
    ax.axvline(skill_report.macro, color=INK, linestyle=":", linewidth=1.2)
    ax.set_yticks(range(len(scores)), [score.name for score in scores])
    ax.set(xlabel="exact match, 95 % interval", xlim=(-0.03, 1.03))
    ax.set_title(f"Weakest: {scores[0].name}; mean of all: {skill_report.macro:.2f}")
    parts = [f"{score.name} {approx(score.exact_match)}" for score in reversed(scores)]
    return _summarise(ax, f"exact match of each skill: {', '.join(parts)}")


def rate_sweep(df: "pd.DataFrame", ax: "Axes | None" = None, chosen: float | None = None) -> "Axes":
    """Scores against the learning rate, on a logarithmic axis.

    Args:
        df: a column rate, and one column of scores for each line, such as task and general.
        chosen: the rate to mark.

    Raises:
        ValueError: no rate column, no column of scores, or a rate that is not above 0.
    """
    _need(df, "rate")
    names = [name for name in df.columns if name != "rate"]
    if not names:
        raise ValueError("df has a rate column alone: give a column of scores beside it")
    if min(df["rate"]) <= 0:
        raise ValueError(f"rate holds {min(df['rate'])}: every learning rate must be above 0")
    ax = _axes(ax)
    df = df.sort_values("rate")
    rates = df["rate"].tolist()
    parts = []
    for name, method in zip(names, ("full", "base", "lora", "p-tuning"), strict=False):
        scores = df[name].tolist()
        ax.plot(rates, scores, color=COLORS[method], marker=MARKERS[method], label=name)
        points = zip(scores, rates, strict=True)
        parts.append(
            f"{name} " + ", ".join(f"{approx(score)} at rate {rate:g}" for score, rate in points)
        )
    ax.set_xscale("log")
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.minorticks_off()
    if chosen is not None:
        ax.axvline(chosen, color=INK, linestyle=":", linewidth=1.2)
        parts.append(f"rate {chosen:g} is marked")
    ax.set(xlabel="learning rate", ylabel="score")
    ax.legend()
    scores = df[names[0]].tolist()
    ax.set_title(f"{names[0]} is highest at {rates[scores.index(max(scores))]:g}")
    return _summarise(ax, "; ".join(parts))


def arms(results: dict, *measures: str) -> "pd.DataFrame":
    """Multi-seed results of several arms as a table, one line an arm.

    Args:
        results: from `claims.load_results`; metrics named `ARM/MEASURE`, such as `lora r4/d1`.
        measures: the ones to show, in order; arms that have none of them are left out.

    Returns:
        columns arm, and for each measure its mean, with its 95 % interval over seeds in columns
        `MEASURE low` and `MEASURE high`; NaN where an arm was not measured so.

    Raises:
        ValueError: no arm has any of the measures.
    """
    import pandas as pd

    rows: dict[str, dict[str, Any]] = {}
    for name, metric in results.get("metrics", {}).items():
        arm, _, measure = name.rpartition("/")
        if arm and measure in measures and metric["mean"] is not None:
            low, high = metric["interval"]
            row = rows.setdefault(arm, {"arm": arm})
            row |= {measure: metric["mean"], f"{measure} low": low, f"{measure} high": high}
    if not rows:
        raise ValueError(f"no metric of the results ends with {' or '.join(measures)} after a /")
    columns = [f"{measure}{end}" for measure in measures for end in ("", " low", " high")]
    return pd.DataFrame(list(rows.values())).reindex(columns=["arm", *columns])


def learning_rates(results: dict) -> "pd.DataFrame":
    """The rates that each method of a results file tried, as a table, one line a method.

    Returns:
        columns method, `validation by rate` (each rate with its mean score over the seeds that
        tried it), and `chosen by seeds`, how many seeds chose which.
    """
    from collections import Counter
    from statistics import fmean

    import pandas as pd

    rows = []
    for method, kept in results["learning_rates"].items():
        scores = {
            float(rate): [score for score in values if score is not None]
            for rate, values in kept["tried"].items()
        }
        tried = ", ".join(f"{r:g}: {approx(fmean(s)) if s else 'none'}" for r, s in scores.items())
        votes = Counter(kept["chosen_per_seed"])
        chosen = ", ".join(f"{rate:g} by {n}" for rate, n in sorted(votes.items()))
        rows.append({"method": method, "validation by rate": tried, "chosen by seeds": chosen})
    return pd.DataFrame(rows)


def rate_scores(results: dict, *methods: str) -> "pd.DataFrame":
    """Validation scores over the seeds for each rate that the methods tried, for `curves`.

    Args:
        results: from `claims.load_results`.
        methods: the ones to show, in order; none shows all.

    Returns:
        columns method, rate, score, `score low`, `score high`: the mean with its 95 % interval
        over seeds, which is the mean itself where only one seed tried the rate.

    Raises:
        ValueError: a method that the results do not hold.
    """
    from statistics import fmean

    import pandas as pd

    from labkit.statistics import seed_interval

    kept = results["learning_rates"]
    missing = [name for name in methods if name not in kept]
    if missing:
        raise ValueError(f"methods {missing} tried no rates: the results have {list(kept)}")
    rows = []
    for method in methods or kept:
        for rate, values in kept[method]["tried"].items():
            scores = [score for score in values if score is not None]
            if scores:
                mean = fmean(scores)
                low, high = seed_interval(scores) if len(scores) > 1 else (mean, mean)
                rows.append((method, float(rate), mean, low, high))
    return pd.DataFrame(rows, columns=["method", "rate", "score", "score low", "score high"])


def curves(
    df: "pd.DataFrame", x: str, y: str, by: str, xlabel: str, ylabel: str, ax: "Axes | None" = None
) -> "Axes":
    """One line for each group, with the intervals of its points, over a logarithmic axis.

    Args:
        df: columns x, y, `Y low`, `Y high` and by, as `arms` makes them.
        x, y: columns of numbers; x above 0.
        by: the column that names a point's group. A group named after a method has its colour.

    Raises:
        ValueError: a column is missing, no row has both numbers, or there are too many groups.
    """
    _need(df, x, y, f"{y} low", f"{y} high", by)
    df = df.dropna(subset=[x, y])
    if df.empty:
        raise ValueError(f"no row has both {x} and {y}")
    ax, parts = _axes(ax), []
    groups = {str(name): group.sort_values(x) for name, group in df.groupby(by, sort=False)}
    for (name, group), method in zip(groups.items(), _colored(list(groups)), strict=True):
        xs, ys = group[x].tolist(), group[y].tolist()
        around = [group[y] - group[f"{y} low"], group[f"{y} high"] - group[y]]
        ax.errorbar(
            xs, ys, yerr=around, color=COLORS[method], marker=MARKERS[method], capsize=3, label=name
        )
        points = ", ".join(f"{approx(b)} at {a:,g}" for a, b in zip(xs, ys, strict=True))
        parts.append(f"{name}: {points}")
    ax.set_xscale("log")
    ax.set(xlabel=xlabel, ylabel=f"{ylabel}, 95 % interval")
    ax.legend()
    best = df.loc[df[y].idxmax()]
    ax.set_title(f"Highest: {best[by]} at {best[x]:,g}")
    return _summarise(ax, f"{ylabel} by {xlabel}. {'; '.join(parts)}")


def heat_map(
    df: "pd.DataFrame",
    x: str,
    y: str,
    value: str,
    label: str,
    ax: "Axes | None" = None,
    *,
    lowest: bool = False,
    limits: "tuple[float, float] | None" = None,
) -> "Axes":
    """One number for each pair of settings, as a shade with the number written on it.

    Args:
        df: columns x, y and value, one row a pair; x and y may be numbers or words, and keep the
            order in which they first come. A pair without a number stays blank.
        label: what the number is, with its unit.
        lowest: whether the title names the lowest number, as for a loss, and not the highest.
        limits: numbers of the darkest and the lightest shade, so that several maps can share them;
            None takes the lowest and the highest number. What lies outside is shaded as they are.

    Raises:
        ValueError: a column is missing, no pair has a number, or a pair stands there twice.
    """
    _need(df, x, y, value)
    df = df.dropna(subset=[value])
    if df.empty:
        raise ValueError(f"no pair of {x} and {y} has a {value}")
    if df.duplicated([x, y]).any():
        twice = df[df.duplicated([x, y])].iloc[0]
        raise ValueError(
            f"{x} {_name(twice[x])} with {y} {_name(twice[y])} stands there twice: give one row"
        )
    ax, parts = _axes(ax), []
    across, down = (list(dict.fromkeys(df[name])) for name in (x, y))
    grid = [[float("nan")] * len(across) for _ in down]
    for a, b, number in zip(df[x], df[y], df[value], strict=True):
        grid[down.index(b)][across.index(a)] = number
        parts.append(f"{approx(number)} at {x} {_name(a)}, {y} {_name(b)}")
    # From one dark to one light end, in the same order for every kind of colour vision.
    dark, light = limits or (min(df[value]), max(df[value]))
    image = ax.imshow(grid, cmap="cividis", aspect="auto", vmin=dark, vmax=light)
    middle = (dark + light) / 2
    decimals = 2 if max(map(abs, df[value])) < 10 else 1  # four figures do not fit into a field
    for row, numbers in enumerate(grid):
        for column, number in enumerate(numbers):
            if number == number:  # NaN alone differs from itself
                ink = "white" if number <= middle else "black"
                ax.text(column, row, f"{number:.{decimals}f}", ha="center", va="center", color=ink)
    ax.set_xticks(range(len(across)), [_name(a) for a in across])
    ax.set_yticks(range(len(down)), [_name(b) for b in down])
    ax.grid(visible=False)
    ax.set(xlabel=x, ylabel=y)
    below, above = min(df[value]) < dark, max(df[value]) > light
    beyond = "both" if below and above else "min" if below else "max" if above else "neither"
    ax.figure.colorbar(image, ax=ax, label=label, extend=beyond)
    which, best = ("Lowest", df[value].min()) if lowest else ("Highest", df[value].max())
    at = df[df[value] == best].iloc[0]
    ax.set_title(f"{which}: {best:.2f} at {x} {_name(at[x])}, {y} {_name(at[y])}")
    return _summarise(ax, f"{label}: {', '.join(parts)}")


def _name(setting: Any) -> str:
    """A setting as a label: a number without trailing zeros."""
    return setting if isinstance(setting, str) else f"{setting:g}"


def _arms_with_both(df: "pd.DataFrame", learned: str, other: str) -> "pd.DataFrame":
    """The arms with both measures; ValueError if there is none, or no such column."""
    ends = ("", " low", " high")
    _need(df, "arm", *(f"{name}{end}" for name in (learned, other) for end in ends))
    df = df.dropna(subset=[learned, other])
    if df.empty:
        raise ValueError(f"no arm has both {learned} and {other}")
    return df


def learned_and_lost(
    df: "pd.DataFrame", learned: str, kept: str, ax: "Axes | None" = None
) -> "Axes":
    """What each arm learned against what it kept, with both intervals: up and right is better.

    Args:
        df: columns arm, and for both measures its value, low and high, as `arms` makes them.

    Raises:
        ValueError: a column is missing, or no arm has both.
    """
    df = _arms_with_both(df, learned, kept)
    ax, parts, points = _axes(ax), [], []
    for row in df.to_dict("records"):
        method = _method_of(row["arm"]) or "base"
        color = COLORS[method]
        ax.plot([row[f"{kept} low"], row[f"{kept} high"]], [row[learned]] * 2, color=color, lw=1)
        ax.plot([row[kept]] * 2, [row[f"{learned} low"], row[f"{learned} high"]], color=color, lw=1)
        ax.plot(row[kept], row[learned], MARKERS[method], color=color, markersize=8)
        points.append((row[kept], row[learned], row["arm"], color))
        parts.append(f"{row['arm']} learned {approx(row[learned])}, kept {approx(row[kept])}")
    ax.set(xlabel=f"kept: {kept}", ylabel=f"learned: {learned}")
    best = df.loc[(df[learned] + df[kept]).idxmax()]
    ax.set_title(f"Most of both together: {best['arm']}")
    _label_points(ax, points)
    return _summarise(ax, "; ".join(parts))


def on_frontier(df: "pd.DataFrame", learned: str, lost: str) -> list[bool]:
    """Whether no other arm did better: learned at least as much, lost no more, and one of them so.

    Args:
        df: columns learned and lost, one row an arm; a row without both is on no frontier.

    Raises:
        ValueError: a column is missing, or there are no rows.
    """
    _need(df, learned, lost)
    pairs = list(zip(df[learned].tolist(), df[lost].tolist(), strict=True))
    return [
        gain == gain
        and loss == loss  # NaN alone differs from itself
        and not any(
            more >= gain and less <= loss and (more > gain or less < loss) for more, less in pairs
        )
        for gain, loss in pairs
    ]


def frontier(
    df: "pd.DataFrame",
    learned: str,
    lost: str,
    ax: "Axes | None" = None,
    *,
    budget_points: float | None = None,
    names: Mapping[str, str] | None = None,
) -> "Axes":
    """What each arm learned against what it lost, and the line of those that no other arm beats.

    Up and left is better. Arms on the line are large and named; the others keep their colour and
    their intervals, and the legend tells their methods. Scale the axes before, not after: names
    are placed by what is drawn.

    Args:
        df: columns arm, and for both measures its value, low and high, as `arms` makes them. Both
            are shares, 0 to 1; losses are drawn in points, 100 times that.
        budget_points: of loss, to mark.
        names: what to call an arm in the figure; a beaten arm is named only if it is among these.

    Raises:
        ValueError: a column is missing, or no arm has both.
    """
    df = _arms_with_both(df, learned, lost)
    from matplotlib.lines import Line2D

    ax, points, line, methods = _axes(ax), [], [], {}
    best, names = on_frontier(df, learned, lost), names or {}
    for row, unbeaten in zip(df.to_dict("records"), best, strict=True):
        method = _method_of(row["arm"]) or "base"
        x, y = 100 * row[lost], row[learned]
        look: dict[str, Any] = {"color": COLORS[method], "alpha": 1.0 if unbeaten else 0.45}
        ax.plot([100 * row[f"{lost} low"], 100 * row[f"{lost} high"]], [y, y], lw=1, **look)
        ax.plot([x, x], [row[f"{learned} low"], row[f"{learned} high"]], lw=1, **look)
        size = 9 if unbeaten else 5
        ax.plot(x, y, MARKERS[method], markersize=size, zorder=3, **look)
        methods[method] = Line2D([], [], color=COLORS[method], marker=MARKERS[method], ls="")
        if unbeaten:
            line.append((x, y, row["arm"]))
        # A name left blank takes no room; the mark is kept clear all the same.
        name = names.get(row["arm"], row["arm"] if unbeaten else "")
        points.append((x, y, name, COLORS[method]))
    line.sort()
    xs, ys = [loss for loss, _, _ in line], [gain for _, gain, _ in line]
    ax.plot(xs, ys, color=INK, lw=1.2, drawstyle="steps-post", zorder=1, label="frontier")
    if budget_points is not None:
        ax.axvline(budget_points, color=INK, linestyle=":", linewidth=1.2)
    ax.set(xlabel=f"{lost} (points), 95 % interval", ylabel=f"learned: {learned}, 95 % interval")
    ax.legend(list(methods.values()), list(methods), loc="lower right")
    verb = "is" if len(line) == 1 else "are"
    ax.set_title(f"{len(line)} of {len(df)} arms {verb} beaten by no other")
    _label_points(ax, points)
    parts = [f"{arm} learned {approx(gain)}, lost {approx(loss, 1)}" for loss, gain, arm in line]
    sentence = f"not beaten by another arm, least lost (in points) first: {'; '.join(parts)}"
    beaten = df[[not unbeaten for unbeaten in best]]
    if len(beaten):
        gains, losses = beaten[learned].tolist(), [100 * loss for loss in beaten[lost]]
        sentence += (
            f"; the other {len(beaten)} learned {approx(min(gains))} to {approx(max(gains))} and "
            f"lost {approx(min(losses), 1)} to {approx(max(losses), 1)}"
        )
    if budget_points is not None:
        sentence += f"; a budget of {budget_points:g} points is marked"
    return _summarise(ax, sentence)


def text_losses(
    before: "Loss", after: "Loss", ax: "Axes | None" = None, *, unit: str = "nats per token"
) -> "Axes":
    """Each text's loss before against after; what lies above the diagonal became harder.

    Args:
        before, after: of the same texts, from `evaluation.neutral_text_loss` or `answer_losses`.
        unit: what the losses are in.

    Raises:
        ValueError: the two were measured on other texts, or in other tokens.
    """
    from labkit.evaluation import loss_difference

    change = loss_difference(before, after).mean
    ax = _axes(ax)
    old, new = (
        [nats / tokens for nats, tokens in zip(loss.nats, loss.tokens, strict=True)]
        for loss in (before, after)
    )
    worse = sum(b > a for a, b in zip(old, new, strict=True))
    ends = [min(*old, *new), max(*old, *new)]
    ax.plot(ends, ends, color=FAINT, zorder=0)
    ax.scatter(old, new, color=COLORS["full"], marker=MARKERS["full"], s=18, alpha=0.6)
    ax.set(xlabel=f"loss before ({unit})", ylabel=f"loss after ({unit})")
    verb = "rises" if change > 0 else "does not rise"
    ax.set_title(f"Loss on text {verb}: {before.nats_per_token:.2f} to {after.nats_per_token:.2f}")
    return _summarise(
        ax,
        f"loss on {len(old)} texts goes from {approx(before.nats_per_token)} to "
        f"{approx(after.nats_per_token)} {unit}; it is higher after than before for "
        f"{approx(100 * worse / len(old), 0)} % of the texts",
    )


def _label_points(ax: "Axes", points: Sequence[tuple[float, float, str, str]]) -> None:
    """Name points so that no name covers another name or a mark, as far as there is room.

    Each takes the free place nearest to its point, inside the axes, with a thin line to the point
    where that is not beside it. Call it last: what is drawn or scaled later is not looked at.

    Args:
        points: x, y, name and colour; a point without a name is only kept clear.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    ax.autoscale_view()
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())
    figure.draw_without_rendering()  # lays out the axes, whose size in pixels is needed
    unit = figure.dpi / 72  # pixels in a typographic point
    spots = ax.transData.transform([(x, y) for x, y, *_ in points]).tolist()
    frame = ax.get_window_extent().extents
    taken = [(x - 5 * unit, y - 5 * unit, x + 5 * unit, y + 5 * unit) for x, y in spots]
    if legend := ax.get_legend():
        taken.append(legend.get_window_extent().extents)
    for (x, y, name, color), (left, bottom) in zip(points, spots, strict=True):
        if not name:
            continue
        label = ax.annotate(
            name, (x, y), (0, 0), textcoords="offset points", color=color, ha="center",
            va="center", fontsize=9.5, zorder=4,
        )  # fmt: skip
        label.set_in_layout(False)
        size = label.get_window_extent()
        places = _places(left, bottom, size.width + 2 * unit, size.height, unit)
        best = min(places, key=lambda box: _crowding(box[0], taken, frame) + box[1])
        box, away = best
        taken.append(box)
        middle = ((box[0] + box[2]) / 2 - left) / unit, ((box[1] + box[3]) / 2 - bottom) / unit
        label.set_position(middle)
        if away > 10:
            ends = (left - box[0]) / (box[2] - box[0]), (bottom - box[1]) / (box[3] - box[1])
            near = [min(max(end, 0.0), 1.0) for end in ends]
            ax.annotate(
                "", (x, y),
                ((box[0] + near[0] * (box[2] - box[0]) - left) / unit,
                 (box[1] + near[1] * (box[3] - box[1]) - bottom) / unit),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkA": 0},
            ).set_in_layout(False)  # fmt: skip


Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""


def _places(x: float, y: float, width: float, height: float, unit: float) -> list[tuple[Box, int]]:
    """Where a name may stand around a point, each with its distance from it in points."""
    found = []
    for away in (7, 9, 14, 20, 28, 38, 50, 64, 80, 100):
        for turn in range(24):
            across, up = math.cos(turn * math.pi / 12), math.sin(turn * math.pi / 12)
            middle = x + across * (away * unit + width / 2), y + up * (away * unit + height / 2)
            left, bottom = middle[0] - width / 2, middle[1] - height / 2
            found.append(((left, bottom, left + width, bottom + height), away))
    return found


def _crowding(box: Box, taken: Sequence[Box], frame: Sequence[float]) -> float:
    """How much of a box lies over taken ones or, which counts more, outside the frame."""
    over = sum(
        max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
        * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
        for other in taken
    )
    outside = sum(
        max(0.0, excess)
        for excess in (frame[0] - box[0], frame[1] - box[1], box[2] - frame[2], box[3] - frame[3])
    )
    return 1000 * (over + (box[3] - box[1]) * 10 * outside)


def _method_of(arm: str) -> str | None:
    """The method whose colour an arm has: the first word of its name that is one."""
    return next((word for word in arm.lower().split() if word in COLORS), None)


def _colored(names: list[str]) -> list[str]:
    """A method for each name, whose colour it takes: its own, or one that no other name has."""
    own = {name: method for name in names if (method := _method_of(name))}
    free = [method for method in COLORS if method not in own.values()]
    others = [name for name in names if name not in own]
    if len(others) > len(free):
        raise ValueError(f"{len(names)} groups: there are colours for {len(COLORS)}")
    taken = own | dict(zip(others, free, strict=False))
    return [taken[name] for name in names]


def seeds_plot(
    results: dict,
    today: dict[str, float] | None = None,
    names: Sequence[str] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Committed values of every seed with mean and interval, and today's run on top.

    Args:
        results: from `claims.load_results`; its `metrics` hold values, mean and interval.
        today: name -> what was measured in this session.
        names: the metrics to show, in order; None shows all that are single numbers.

    Raises:
        ValueError: a name that the results do not hold, or none to show.
    """
    metrics = results.get("metrics", {})
    numbers = [name for name in metrics if metrics[name]["mean"] is not None]
    names = numbers if names is None else list(names)
    missing = [name for name in names if name not in numbers]
    if missing or not names:
        raise ValueError(f"results hold no number {missing or 'at all'}: they have {numbers}")
    today = today or {}
    ax = _axes(ax)
    blue, parts = COLORS["full"], []
    for place, name in enumerate(reversed(names)):  # the first name on top
        metric = metrics[name]
        values, (low, high) = metric["values"], metric["interval"]
        heights = [place + offset for offset in dodge(len(values), 0.3)]
        ax.plot([low, high], [place, place], color=blue, linewidth=6, alpha=0.3)
        ax.plot(values, heights, "o", color=blue, markersize=5, label=f"seeds of {name}")
        ax.plot(metric["mean"], place, "|", color=blue, markersize=18)
        part = f"{name} mean {approx(metric['mean'])} over {len(values)} seeds"
        part += f", interval {approx(low)} to {approx(high)}"
        if name in today:
            ax.plot(today[name], place, "D", color=COLORS["lora"], markersize=8, label="today")
            part += f", today {approx(today[name])}"
        parts.append(part)
    ax.set_yticks(range(len(names)), list(reversed(names)))
    ax.set(xlabel="value (dots: seeds, bar: interval of the mean, diamond: today)")
    ax.set_ylim(-0.6, len(names) - 0.4)
    shown = [name for name in names if name in today]
    ranges = [(min(metrics[name]["values"]), max(metrics[name]["values"])) for name in shown]
    inside = sum(
        low <= today[name] <= high for name, (low, high) in zip(shown, ranges, strict=True)
    )
    ax.set_title(
        f"Today's run: {inside} of {len(shown)} within the range of the seeds"
        if shown
        else f"Every seed of {len(names)} results"
    )
    return _summarise(ax, "; ".join(reversed(parts)))


def _axes(ax: "Axes | None") -> "Axes":
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    style()
    return plt.subplots(figsize=FIGURE_INCHES)[1]


def _need(df: "pd.DataFrame", *columns: str) -> None:
    missing = [name for name in columns if name not in df.columns]
    if missing:
        raise ValueError(f"columns {missing} are missing: the frame has {list(df.columns)}")
    if df.empty:
        raise ValueError("the frame has no rows: there is nothing to draw")


def _summarise(ax: "Axes", sentence: str) -> "Axes":
    _SUMMARIES[ax] = f"{sentence[0].upper()}{sentence[1:]}."
    return ax
