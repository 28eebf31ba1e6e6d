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


UNITS = {"embedding": 40, "layer 1": 100, "layer 2": 100}


def test_each_scheme_stores_the_model_once_but_data_parallelism_once_a_device():
    for scheme in drawings.SCHEMES:
        shares = drawings.held(UNITS, scheme, devices=3)
        copies = {name: round(sum(parts), 9) for name, parts in shares.items()}
        assert copies == dict.fromkeys(UNITS, 3 if scheme == "data" else 1)
    # 240 numbers, cut at 120: the middle of layer 1 lies at 90, that of layer 2 at 190.
    pipeline = drawings.held(UNITS, "pipeline", devices=2)
    assert pipeline == {"embedding": [1, 0], "layer 1": [1, 0], "layer 2": [0, 1]}


def test_what_is_coloured_is_what_a_device_stores():
    fig, axes = plt.subplots(1, 4)
    words = drawings.who_holds(axes, UNITS, devices=2)
    total = 0.84 * sum(UNITS.values())
    for scheme, ax, of_model in zip(drawings.SCHEMES, axes, (1, 1 / 2, None, 1 / 2), strict=True):
        stored = {"freeze": 0.0, "qlora": 0.0}  # the colours of devices 0 and 1
        for box in ax.patches:
            for name in stored:
                if to_hex(box.get_facecolor()) == report.COLORS[name].lower():
                    stored[name] += box.get_width() * box.get_height()
        want = [of_model * total] * 2 if of_model else [0.84 * 140, 0.84 * 100]
        assert list(stored.values()) == pytest.approx(want), scheme
    gathered = [len([box for box in ax.patches if box.get_hatch()]) for ax in axes]
    assert gathered == [0, 0, 0, 6]
    assert words.startswith("Data parallelism: every device holds the whole model")
    plt.close(fig)


def test_who_holds_says_what_is_wrong(axes):
    with pytest.raises(ValueError, match="3 axes: give 4, one a scheme"):
        drawings.who_holds(axes, UNITS)
    with pytest.raises(ValueError, match="scheme='ring' is unknown: use data, tensor"):
        drawings.held(UNITS, "ring", 2)
    with pytest.raises(ValueError, match="devices=0, 3 units: give at least one of each"):
        drawings.held(UNITS, "data", 0)
    with pytest.raises(ValueError, match="devices=9: 2 to 4 can be told apart"):
        drawings.who_holds([*axes, axes[0]], UNITS, devices=9)
