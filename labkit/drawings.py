"""Drawings of how a method works, each with the same thing in words."""

import re
from typing import TYPE_CHECKING

from labkit.report import COLORS, FAINT, INK

if TYPE_CHECKING:
    from collections.abc import Sequence

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
