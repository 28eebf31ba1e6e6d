"""Figures of memory: bytes by kind, over a step, over a batch, and beside what others predict.

Each function draws on given axes and returns the same thing in words, to print beside the figure.
"""

import math
from typing import TYPE_CHECKING

from labkit.claims import approx
from labkit.report import COLORS, FAINT, INK, MARKERS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from labkit.memory import Moment
    from labkit.memory.watch import Sample

GB = 10**9
KIND_COLORS = {
    "weights": "#606060",
    "optimizer states": "#0072B2",
    "gradients": "#56B4E9",
    "kept for backward": "#E69F00",
    "logits": "#D55E00",
    "working memory": "#CC79A7",
}
"""A colour for each kind of `labkit.memory.terms`, from the bottom of a stack to its top."""
PHASES = ("loss", "layer backward", "optimizer step")
SHORT = {"loss": "loss", "layer backward": "layers,\nbackward", "optimizer step": "optimizer\nstep"}
MOST_SAMPLES = 300


def stack(ax: "Axes", bars: "Mapping[str, Mapping[str, int]]", unit: int = GB) -> str:
    """Stacked bars of bytes by kind, one bar a name, the highest one's total written on it.

    Args:
        bars: name -> kind -> bytes; kinds as in `KIND_COLORS`.
        unit: bytes of one unit of the axis.

    Raises:
        ValueError: no bars, or a kind that has no colour.
    """
    if not bars:
        raise ValueError("bars is empty: there is nothing to draw")
    unknown = {kind for kinds in bars.values() for kind in kinds} - set(KIND_COLORS)
    if unknown:
        raise ValueError(f"kinds {sorted(unknown)} have no colour: use {', '.join(KIND_COLORS)}")
    totals = {name: sum(kinds.values()) for name, kinds in bars.items()}
    highest = max(totals, key=totals.__getitem__)
    bottoms = [0.0] * len(bars)
    for kind, color in KIND_COLORS.items():
        heights = [kinds.get(kind, 0) / unit for kinds in bars.values()]
        if any(heights):
            ax.bar(
                range(len(bars)), heights, bottom=bottoms, color=color, label=kind, width=0.7,
                edgecolor="white", linewidth=0.5,
            )  # fmt: skip
        bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    for place, (name, n_bytes) in enumerate(totals.items()):
        ax.annotate(
            f"{n_bytes / unit:.1f}", (place, n_bytes / unit), (0, 3), textcoords="offset points",
            ha="center", fontsize=9.5, weight="bold" if name == highest else "normal",
        )  # fmt: skip
    ax.set_xticks(range(len(bars)), [SHORT.get(name, name) for name in bars], fontsize=9.5)
    ax.set_ylim(0, 1.12 * max(bottoms))
    ax.grid(visible=False, axis="x")
    ax.set_ylabel(_unit(unit))
    largest = max(bars[highest], key=bars[highest].__getitem__)
    share = bars[highest][largest] / totals[highest]
    each = ", ".join(f"{name} {n / unit:.1f}" for name, n in totals.items())
    return f"{each} {_unit(unit)}; {highest} is highest, {share:.0%} of it {largest}"


def phases(axes: "Sequence[Axes]", steps: "Mapping[str, Sequence[Moment]]", unit: int = GB) -> str:
    """The highest moment of each phase of several predicted steps, one step an axes.

    Args:
        steps: name -> its moments, from `labkit.memory.moments`.

    Raises:
        ValueError: another number of axes than of steps.
    """
    from labkit.memory.terms import by_kind

    if len(axes) != len(steps):
        raise ValueError(f"{len(axes)} axes for {len(steps)} steps: give one for each")
    words = []
    for ax, (name, moments) in zip(axes, steps.items(), strict=True):
        tops = {
            phase: max((m for m in moments if m.phase == phase), key=lambda m: m.bytes)
            for phase in PHASES
        }
        said = stack(ax, {phase: by_kind(top.terms) for phase, top in tops.items()}, unit)
        winner = max(tops.values(), key=lambda moment: moment.bytes).phase
        ax.set_title(f"{name}:\n{winner}", fontsize=11)
        ax.set_ylabel("")
        words.append(f"{name}: {said}")
    highest = max(moment.bytes for moments in steps.values() for moment in moments)
    for ax in axes:
        ax.set_ylim(0, 1.12 * highest / unit)
    axes[0].set_ylabel(_unit(unit))
    _legend_above(axes)
    return "; ".join(words)


def timelines(
    axes: "Sequence[Axes]",
    steps: "Mapping[str, tuple[Sequence[Sample], Mapping[str, int]]]",
    unit: int = 10**6,
) -> str:
    """Bytes over real steps, stacked by kind, with the predicted height of each phase as a line.

    Args:
        steps: name -> (samples of `labkit.memory.TensorWatch` in their order, phase -> predicted
            bytes, as an estimate's `phases`), one an axes.

    Raises:
        ValueError: another number of axes than of steps, or a step without samples.
    """
    if len(axes) != len(steps):
        raise ValueError(f"{len(axes)} axes for {len(steps)} steps: give one for each")
    words = []
    for ax, (name, (samples, predicted)) in zip(axes, steps.items(), strict=True):
        words.append(f"{name}: {_timeline(ax, name, _begun(samples), predicted, unit)}")
    tops = [
        max(*(one.bytes for one in samples), *predicted.values())
        for samples, predicted in steps.values()
    ]
    for ax in axes:
        ax.set_ylim(0, 1.06 * max(tops) / unit)
    axes[0].set_ylabel(_unit(unit))
    _legend_above(axes)
    return f"Peaks in {_unit(unit)}, predicted ones in brackets. {'; '.join(words)}"


def _timeline(
    ax: "Axes", name: str, samples: "Sequence[Sample]", predicted: "Mapping[str, int]", unit: int
) -> str:
    """One step; the words name the highest moment of each phase."""
    shown = _thinned(samples)
    kinds = [kind for kind in KIND_COLORS if any(one.kinds.get(kind) for _, one in shown)]
    ax.stackplot(
        [place for place, _ in shown],
        [[one.kinds.get(kind, 0) / unit for _, one in shown] for kind in kinds],
        colors=[KIND_COLORS[kind] for kind in kinds],
        labels=kinds,
    )
    words, middles, names = [], [], []
    for phase, start, end in _spans(samples):
        height = max(one.bytes for one in samples[start:end]) / unit
        said = f"{phase} {approx(height, 1)}"
        if phase in predicted:
            ax.plot([start, end], [predicted[phase] / unit] * 2, color=INK, linewidth=1.6)
            said += f" ({predicted[phase] / unit:.1f})"
        if start:
            ax.axvline(start, color=INK, linewidth=0.8, linestyle=":")
        words.append(said)
        middles.append((start + end) / 2)
        names.append(_SPAN_NAMES[phase])
    place, peak = max(enumerate(samples), key=lambda pair: pair[1].bytes)
    ax.plot(place, peak.bytes / unit, "v", color=INK, markersize=7)
    ax.set_xticks(middles, names, fontsize=9.5)
    ax.tick_params(axis="x", length=0)
    ax.grid(visible=False, axis="x")
    ax.set_xlim(0, len(samples))
    where = _SPAN_NAMES[_span_of(peak.phase)].replace("\n", " ")
    ax.set_title(f"{name}: {peak.bytes / unit:.0f} {_unit(unit)}, {where}", fontsize=11)
    return ", ".join(words)


_SPAN_NAMES = {
    "loss": "forward,\nloss", "layer backward": "backward", "optimizer step": "step"
}  # fmt: skip


def _begun(samples: "Sequence[Sample]") -> "Sequence[Sample]":
    """Samples from where weights and states that were there before have all been counted."""
    if not samples:
        raise ValueError("a step has no samples: watch it with sampling on")
    there = ("weights", "optimizer states")
    most = [max(one.kinds.get(kind, 0) for one in samples) for kind in there]
    for place, one in enumerate(samples):
        if [one.kinds.get(kind, 0) for kind in there] == most:
            return samples[place:]
    return samples


def _thinned(samples: "Sequence[Sample]") -> "list[tuple[int, Sample]]":
    """The highest of every few samples, with its place: no peak is lost."""
    every = math.ceil(len(samples) / MOST_SAMPLES)
    shown = []
    for start in range(0, len(samples), every):
        places = range(start, min(start + every, len(samples)))
        best = max(places, key=lambda place: samples[place].bytes)
        shown.append((best, samples[best]))
    return shown


def _span_of(phase: str) -> str:
    """The estimate's name of a phase: it counts the forward pass as part of the loss."""
    return "loss" if phase == "forward" else phase


def _spans(samples: "Sequence[Sample]") -> list[tuple[str, int, int]]:
    """(phase, first place, place after the last), in the order of the step."""
    starts: dict[str, int] = {}
    for place, one in enumerate(samples):
        starts.setdefault(_span_of(one.phase), place)
    ends = [*list(starts.values())[1:], len(samples)]
    return [(phase, start, end) for (phase, start), end in zip(starts.items(), ends, strict=True)]


def growth(
    ax: "Axes",
    xs: "Sequence[float]",
    lines: "Mapping[str, Sequence[float]]",
    xlabel: str,
    ylabel: str,
    *,
    measured: "Mapping[str, Sequence[tuple[float, float]]] | None" = None,
) -> str:
    """What grows with a batch or a number of devices, and where the first two lines cross.

    Args:
        xs: ascending.
        lines: name -> a value for each x; the first two are looked at for a crossing.
        measured: name of a line -> points (x, y) that were measured, drawn as marks.

    Raises:
        ValueError: a line with another number of values, or measured points of no line.
    """
    measured = measured or {}
    for name, ys in lines.items():
        if len(ys) != len(xs):
            raise ValueError(f"line {name!r} has {len(ys)} values for {len(xs)} xs")
    if strangers := set(measured) - set(lines):
        raise ValueError(f"measured holds {sorted(strangers)}, which no line is called")
    colors = _line_colors(list(lines))
    for name, ys in lines.items():
        ax.plot(xs, ys, color=colors[name])
        ax.annotate(
            name, (xs[-1], ys[-1]), (6, 0), textcoords="offset points", va="center",
            color=colors[name], annotation_clip=False, fontsize=10,
        )  # fmt: skip
        points = measured.get(name, ())
        if points:
            ax.plot(*zip(*points, strict=True), "o", color=colors[name], markersize=7)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    parts = [f"{name} from {ys[0]:.2f} to {ys[-1]:.2f}" for name, ys in lines.items()]
    words = f"{ylabel} for {xs[0]:g} to {xs[-1]:g} {xlabel}: {', '.join(parts)}"
    names = list(lines)
    if len(names) > 1:
        found = crossing(xs, lines[names[0]], lines[names[1]])
        if found is None:
            ax.set_title(f"{names[0]} and {names[1]} do not meet")
        else:
            x, y = found
            ax.plot(x, y, "X", color=INK, markersize=9, zorder=4)
            said = f"{names[1]} above {names[0]} from {x:.1f} {xlabel}"
            ax.set_title(said[0].upper() + said[1:])
            words += f"; {said}"
    if measured:
        words += f"; {sum(len(p) for p in measured.values())} measured points are marked"
    return words


def crossing(
    xs: "Sequence[float]", first: "Sequence[float]", second: "Sequence[float]"
) -> tuple[float, float] | None:
    """(x, y) where the second line rises above the first, between two xs by a straight line."""
    gaps = [b - a for a, b in zip(first, second, strict=True)]
    for place in range(1, len(xs)):
        before, after = gaps[place - 1], gaps[place]
        if before <= 0 < after:
            part = -before / (after - before)
            x = xs[place - 1] + part * (xs[place] - xs[place - 1])
            return x, first[place - 1] + part * (first[place] - first[place - 1])
    return None


def _line_colors(names: list[str]) -> dict[str, str]:
    """The colour of the method or the kind that a line names, else the next that is free."""
    from labkit.memory.terms import WORKING, kind_of

    own = {
        name: COLORS[word]
        for name in names
        for word in name.lower().replace(",", " ").split()
        if word in COLORS
    }
    own |= {name: KIND_COLORS[kind] for name in names if (kind := kind_of(name)) != WORKING}
    free = [color for color in [*KIND_COLORS.values(), "#009E73", INK] if color not in own.values()]
    others = [name for name in names if name not in own]
    return own | dict(zip(others, free, strict=False))


def errors(ax: "Axes", found: "Mapping[str, Sequence[float]]", bar: float | None = None) -> str:
    """How far predictions missed, each dot a measured row, one line a tool, in percent.

    Args:
        found: tool -> signed relative errors; the axis is logarithmic in their size.
        bar: a relative error to mark.

    Raises:
        ValueError: no tools, or one without errors.
    """
    from statistics import median

    if not found or not all(len(values) for values in found.values()):
        raise ValueError("found is empty: give each tool at least one error")
    smallest, words = 1e-3, []  # percent; what is less is drawn there
    order = sorted(found, key=lambda tool: median(abs(e) for e in found[tool]), reverse=True)
    markers = list(MARKERS.values())
    for place, tool in enumerate(order):
        percents = [100 * abs(error) for error in found[tool]]
        middle = median(percents)
        ax.plot(
            [max(p, smallest) for p in percents], [place] * len(percents), markers[0],
            color=COLORS["full"], alpha=0.45, markersize=6,
        )  # fmt: skip
        ax.plot(max(middle, smallest), place, "|", color=INK, markersize=20, markeredgewidth=2)
        low = sum(error < 0 for error in found[tool])
        words.append(
            f"{tool} median {_percent(middle)}, worst {_percent(max(percents))}, "
            f"too low on {low} of {len(percents)}"
        )
    if bar is not None:
        ax.axvline(100 * bar, color=INK, linestyle=":", linewidth=1.2)
    ax.set_xscale("log")
    ax.set_yticks(range(len(order)), order)
    ax.set_ylim(-0.6, len(order) - 0.4)
    ax.set_xlabel("error in % of what was measured (bar: median)")
    ax.set_title(f"Closest: {order[-1]}")
    return "; ".join(reversed(words))


def _percent(value: float) -> str:
    return f"{value:.3f} %" if value < 0.1 else f"{value:.1f} %"


def devices(
    ax: "Axes", bytes_by_stage: "Mapping[str, Sequence[float]]", ns: "Sequence[int]"
) -> str:
    """Bytes a device holds against the number of devices, both axes logarithmic, with the limits.

    Args:
        bytes_by_stage: stage -> bytes for each n; the first stage is what the others divide.
        ns: numbers of devices, ascending, starting at 1.
    """
    names = list(bytes_by_stage)
    whole = bytes_by_stage[names[0]][0]
    words = []
    for name, color in zip(names, ("#606060", "#56B4E9", "#E69F00", "#D55E00"), strict=True):
        values = bytes_by_stage[name]
        ax.plot(ns, [value / GB for value in values], color=color, marker="o", markersize=4)
        ax.annotate(
            f"{name}: {_times(whole / values[-1])} less" if name != names[0] else name,
            (ns[-1], values[-1] / GB), (6, 0), textcoords="offset points", va="center",
            color=color, annotation_clip=False, fontsize=10,
        )  # fmt: skip
        words.append(f"{name} {values[0] / GB:.1f} to {values[-1] / GB:.2f} GB")
    for limit in (4, 8):
        ax.axhline(whole / limit / GB, color=FAINT, linestyle="--", linewidth=1.2, zorder=0)
        ax.text(ns[0], whole / limit / GB, f"a limit: {limit}x", fontsize=9, va="bottom")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(ns, [str(n) for n in ns])
    ax.minorticks_off()
    ax.set(xlabel="devices", ylabel="GB of model states on each")
    ax.set_title("Stages 1 and 2 level off at 4x and 8x; stage 3 does not")
    return f"From {ns[0]} to {ns[-1]} devices: {', '.join(words)}"


def _times(factor: float) -> str:
    return f"{factor:,.0f}x" if factor >= 100 else f"{factor:.2f}x"


def _legend_above(axes: "Sequence[Axes]") -> None:
    """One legend for all axes of a figure, above them."""
    seen = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    figure = axes[0].get_figure(root=True)
    assert figure is not None
    figure.legend(
        list(seen.values()),
        list(seen),
        loc="outside upper center",
        ncols=min(3, len(seen)),
        fontsize=9.5,
    )


def _unit(unit: int) -> str:
    return {10**9: "GB", 10**6: "MB"}[unit]
