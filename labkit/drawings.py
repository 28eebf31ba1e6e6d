"""Drawings of how a method works, each with the same thing in words."""

import re
from typing import TYPE_CHECKING

from labkit.report import COLORS, FAINT, INK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

ENTRIES = {
    "prompt": "prompt tuning: trained vectors stand before the text, at the input only",
    "p-tuning": "P-tuning: the same place, but an encoder makes the vectors",
    "prefix": "prefix tuning (P-tuning v2): trained keys and values in every layer",
}
"""Where each method's trained numbers enter, by its name in `report.COLORS`."""

_TRAINED = {"prompt": "P", "p-tuning": "P", "prefix": "k, v"}


def where_prompts_enter(
    axes: "Sequence[Axes]", n_virtual: int = 2, n_text: int = 3, n_layers: int = 3
) -> str:
    """Draw the layers of a model and what each method puts beside the text, one method an axes.

    Columns are positions, virtual ones first; the lowest row is the input, the rows above are
    layers. Cells in the method's colour hold trained numbers, or in P-tuning what its encoder makes
    of trained numbers; grey ones are computed.

    Args:
        axes: three, in the order of `ENTRIES`.

    Returns:
        The drawing in words, to print beside it.

    Raises:
        ValueError: another number of axes, or nothing to draw.
    """
    if len(axes) != len(ENTRIES):
        raise ValueError(f"{len(axes)} axes: give {len(ENTRIES)}, one a method")
    if min(n_virtual, n_text, n_layers) < 1:
        raise ValueError("n_virtual, n_text and n_layers must each be 1 or more")
    for method, ax in zip(ENTRIES, axes, strict=True):
        _model(ax, method, n_virtual, n_text, n_layers)
    words = "; ".join(ENTRIES.values())
    return f"{words[0].upper()}{words[1:]}."


def _model(ax: "Axes", method: str, n_virtual: int, n_text: int, n_layers: int) -> None:
    from matplotlib.patches import Rectangle

    for row in range(n_layers + 1):
        for column in range(n_virtual + n_text):
            virtual = column < n_virtual
            trained = virtual and (row > 0 if method == "prefix" else row == 0)
            if virtual and method == "prefix" and row == 0:
                continue  # a prefix has no input: it lives in the layers
            ax.add_patch(
                Rectangle(
                    (column - 0.42, row - 0.38), 0.84, 0.76, edgecolor=INK, linewidth=0.8,
                    facecolor=COLORS[method] if trained else "none" if row == 0 else FAINT,
                )
            )  # fmt: skip
            text = _TRAINED[method] if trained else f"t{column - n_virtual + 1}" if row == 0 else ""
            color = "white" if trained else INK
            ax.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    if method == "p-tuning":
        middle, width = (n_virtual - 1) / 2, n_virtual - 0.16
        ax.add_patch(
            Rectangle(
                (middle - width / 2, -1.38), width, 0.76, facecolor=COLORS[method], edgecolor=INK
            )
        )
        ax.text(middle, -1, "encoder", ha="center", va="center", color="white", fontsize=9)
        ax.annotate("", (middle, -0.4), (middle, -0.6), arrowprops={"arrowstyle": "-|>"})
    ax.set_xlim(-0.6, n_virtual + n_text - 0.4)
    ax.set_ylim(-1.5, n_layers + 0.5)
    layers = [f"layer {row}" for row in range(1, n_layers + 1)]
    ax.set_yticks(range(n_layers + 1), ["input", *layers])
    ax.set_xticks([])
    ax.grid(visible=False)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    title = re.split(" \\(|:", ENTRIES[method])[0]
    ax.set_title(title, color=COLORS[method], fontsize=11)


SCHEMES = {
    "data": "data parallelism: every device holds the whole model and takes other rows; gradients "
    "travel",
    "tensor": "tensor parallelism: every matrix is cut in strips, all devices take all rows; "
    "activations travel, in every layer",
    "pipeline": "pipeline parallelism: whole layers are dealt out and all rows pass through them; "
    "activations travel, at each cut",
    "sharding": "sharding (ZeRO-3, FSDP): every device takes other rows and stores a slice of "
    "every tensor; whole layers are gathered when they are used; weights and gradients travel",
}
"""How several devices may divide one training step, by its short name."""

# Two shades that no method of the course has for itself in the notebook on devices.
_DEVICES = ("freeze", "qlora", "p-tuning", "prompt")


def held(units: "Mapping[str, int]", scheme: str, devices: int) -> dict[str, list[float]]:
    """The share of each unit's weights that each device stores between two steps.

    Args:
        units: numbers in each unit of a model, such as its embedding and layers, first one first.
        scheme: a key of `SCHEMES`.

    Returns:
        {unit: one share a device}; in a pipeline a unit goes where the middle of its numbers falls
        when all numbers are dealt out evenly in order. Small tensors that tensor parallelism copies
        are counted as cut.

    Raises:
        ValueError: an unknown scheme, no device, or no unit.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r} is unknown: use {', '.join(SCHEMES)}")
    if devices < 1 or not units:
        raise ValueError(f"devices={devices}, {len(units)} units: give at least one of each")
    if scheme == "data":
        return {name: [1.0] * devices for name in units}
    if scheme in ("tensor", "sharding"):
        return {name: [1 / devices] * devices for name in units}
    total, before, dealt = sum(units.values()), 0, {}
    for name, numbers in units.items():
        owner = min(int(devices * (before + numbers / 2) / total), devices - 1)
        dealt[name] = [float(device == owner) for device in range(devices)]
        before += numbers
    return dealt


def who_holds(axes: "Sequence[Axes]", units: "Mapping[str, int]", devices: int = 2) -> str:
    """Draw which weights each device stores under each scheme, one scheme an axes.

    Columns are devices, boxes the units of the model, as high as they have numbers. Coloured is
    what a device stores; hatched what it only gathers while it computes; empty what it never sees.

    Args:
        axes: four, in the order of `SCHEMES`.
        units: numbers in each unit of a model, first one first.
        devices: from 2 to 4.

    Returns:
        The drawing in words, to print beside it.

    Raises:
        ValueError: another number of axes or devices.
    """
    if len(axes) != len(SCHEMES):
        raise ValueError(f"{len(axes)} axes: give {len(SCHEMES)}, one a scheme")
    if not 2 <= devices <= len(_DEVICES):
        raise ValueError(f"devices={devices}: 2 to {len(_DEVICES)} can be told apart in a drawing")
    for scheme, ax in zip(SCHEMES, axes, strict=True):
        _stacks(ax, units, scheme, held(units, scheme, devices))
        ax.set_title(scheme, fontsize=11)
        rows = "own rows" if scheme in ("data", "sharding") else "all rows"
        ax.set_xticks(range(devices), [f"device {n}\n{rows}" for n in range(devices)], fontsize=9)
    for ax in axes[1:]:
        ax.set_yticks([])
    words = "; ".join(SCHEMES.values())
    return f"{words[0].upper()}{words[1:]}."


def _stacks(
    ax: "Axes", units: "Mapping[str, int]", scheme: str, shares: "Mapping[str, list[float]]"
) -> None:
    """One stack of boxes a device, the first unit at the bottom."""
    from matplotlib.patches import Rectangle

    bottom, middles = 0.0, []
    for name, numbers in units.items():
        for device, share in enumerate(shares[name]):
            left, width = device - 0.42, 0.84
            hatch = "////" if scheme == "sharding" else None
            ax.add_patch(
                Rectangle(
                    (left, bottom), width, numbers, facecolor="none", edgecolor=FAINT, hatch=hatch
                )
            )
            if not share:
                continue
            box = {
                "tensor": (left + device * share * width, bottom, share * width, numbers),
                "sharding": (left, bottom + device * share * numbers, width, share * numbers),
            }.get(scheme, (left, bottom, width, numbers))
            ax.add_patch(
                Rectangle(
                    box[:2], *box[2:], facecolor=COLORS[_DEVICES[device]], edgecolor=INK,
                    linewidth=0.8,
                )
            )  # fmt: skip
        middles.append(bottom + numbers / 2)
        bottom += numbers * 1.08  # a gap, so that units can be told apart
    devices = len(next(iter(shares.values())))
    ax.set(xlim=(-0.55, devices - 0.45), ylim=(-0.01 * bottom, bottom))
    ax.set_yticks(middles, list(units), fontsize=9)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
