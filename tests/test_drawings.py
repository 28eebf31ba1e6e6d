"""What is drawn in a method's colour is what the method trains."""

import matplotlib
import pytest
from matplotlib.colors import to_hex

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from labkit import drawings, report  # noqa: E402


@pytest.fixture
def axes():
    fig, axes = plt.subplots(1, 3)
    yield axes
    plt.close(fig)


def trained_cells(ax, method: str) -> set[tuple[int, int]]:
    """(column, row) of the cells in the method's colour; the lowest row, 0, is the input."""
    colour = report.COLORS[method].lower()
    return {
        (round(box.get_center()[0]), round(box.get_center()[1]))
        for box in ax.patches
        if to_hex(box.get_facecolor()) == colour and box.get_width() < 1
    }


def test_vectors_stand_where_each_method_trains_them(axes):
    drawings.where_prompts_enter(axes, n_virtual=2, n_text=3, n_layers=4)
    at_the_input = {(0, 0), (1, 0)}
    assert trained_cells(axes[0], "prompt") == at_the_input
    assert trained_cells(axes[1], "p-tuning") == at_the_input
    in_every_layer = {(column, row) for column in (0, 1) for row in (1, 2, 3, 4)}
    assert trained_cells(axes[2], "prefix") == in_every_layer
    words = [text.get_text() for text in axes[2].texts]
    assert [word for word in words if word.startswith("t")] == ["t1", "t2", "t3"]
    assert "encoder" in [text.get_text() for text in axes[1].texts]


def test_the_drawing_comes_in_words(axes):
    words = drawings.where_prompts_enter(axes)
    assert [ax.get_title() for ax in axes] == [
        "prompt tuning",
        "P-tuning",
        "prefix tuning",
    ]
    assert words.startswith("Prompt tuning: ")
    assert words.endswith("prefix tuning (P-tuning v2): trained keys and values in every layer.")


def test_drawings_say_what_is_wrong(axes):
    with pytest.raises(ValueError, match="2 axes: give 3, one a method"):
        drawings.where_prompts_enter(axes[:2])
    with pytest.raises(ValueError, match="must each be 1 or more"):
        drawings.where_prompts_enter(axes, n_virtual=0)
