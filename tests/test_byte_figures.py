"""Figures of memory: heights are the bytes, winners are named, lines cross where they cross."""

import matplotlib
import pytest
from matplotlib.colors import to_hex

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from labkit import byte_figures, memory  # noqa: E402
from labkit.memory import reference  # noqa: E402
from labkit.memory.options import METHODS  # noqa: E402
from labkit.memory.terms import kind_of  # noqa: E402
from labkit.memory.watch import Sample  # noqa: E402

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 300,
}


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


@pytest.fixture
def two():
    fig, axes = plt.subplots(1, 2)
    yield axes
    plt.close(fig)


# ---- kinds and moments -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_byte_of_a_moment_has_a_kind_with_a_colour(method):
    options = {"method": method, "num_devices": 8, "sharding": "fsdp", "accumulation_steps": 2}
    for moment in memory.moments(LLAMA, **options):
        kinds = memory.by_kind(moment.terms)
        assert list(kinds) == list(byte_figures.KIND_COLORS)
        assert sum(kinds.values()) == moment.bytes


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("weights that stay 16-bit or fp32", "weights"),
        ("fp32 copies of trained weights", "optimizer states"),
        ("gradients", "gradients"),
        ("gradients inside the layer", "working memory"),
        ("gradient of the logits", "logits"),
        ("checkpoints", "kept for backward"),
        ("kept for backward: MLP", "kept for backward"),
        ("optimizer's working memory", "working memory"),
    ],
)
def test_a_term_has_the_kind_of_its_name(name, kind):
    assert kind_of(name) == kind


def test_the_highest_moment_is_the_estimate():
    options = {"method": "lora", "lora_rank": 2}
    found, moments = memory.estimate(LLAMA, **options), memory.moments(LLAMA, **options)
    assert max(moment.bytes for moment in moments) == found.peak_allocated_bytes
    order = list(dict.fromkeys(moment.phase for moment in moments))
    assert order == ["loss", "layer backward", "optimizer step"]


# ---- bars --------------------------------------------------------------------------------------


def test_stacked_bars_are_as_high_as_their_bytes(ax):
    bars = {"a": {"weights": 2, "logits": 3}, "b": {"weights": 4}}
    words = byte_figures.stack(
        ax, {n: {k: v * 10**9 for k, v in b.items()} for n, b in bars.items()}
    )
    heights = {
        (to_hex(bar.get_facecolor()), round(bar.get_center()[0])): bar.get_height()
        for bar in ax.patches
    }
    colors = {kind: color.lower() for kind, color in byte_figures.KIND_COLORS.items()}
    assert heights[colors["weights"], 0] == 2 and heights[colors["weights"], 1] == 4
    assert heights[colors["logits"], 0] == 3
    assert [text.get_text() for text in ax.texts] == ["5.0", "4.0"]
    assert words == "a 5.0, b 4.0 GB; a is highest, 60% of it logits"


def test_each_panel_names_the_phase_that_wins(two):
    public = {row.name: row for row in reference.rows("bar")}
    runs = {method: public[f"Mistral-7B-v0.1 {method} bf16 batch 4"] for method in ("full", "lora")}
    steps = {method: memory.moments(row.config, **row.options) for method, row in runs.items()}
    words = byte_figures.phases(two, steps)
    assert [ax.get_title() for ax in two] == ["full:\noptimizer step", "lora:\nloss"]
    assert "optimizer step 72.4 GB; optimizer step is highest" in words
    assert two[0].get_ylim() == two[1].get_ylim()
    with pytest.raises(ValueError, match="2 axes for 1 steps"):
        byte_figures.phases(two, {"full": steps["full"]})


def test_bars_without_a_colour_or_without_bytes_are_refused(ax):
    with pytest.raises(ValueError, match="bars is empty"):
        byte_figures.stack(ax, {})
    with pytest.raises(ValueError, match=r"kinds \['cake'\] have no colour"):
        byte_figures.stack(ax, {"a": {"cake": 1}})


# ---- a step over time --------------------------------------------------------------------------


def sample(phase: str, weights: int, kept: int = 0, gradients: int = 0) -> Sample:
    kinds = {"weights": weights, "kept for backward": kept, "gradients": gradients}
    return Sample(phase, sum(kinds.values()), kinds)


MB = 10**6
STEP = [
    sample("forward", 1 * MB),  # the watch is still counting what was there
    sample("forward", 4 * MB),
    sample("forward", 4 * MB, kept=6 * MB),
    sample("loss", 4 * MB, kept=8 * MB),
    sample("layer backward", 4 * MB, kept=5 * MB, gradients=1 * MB),
    sample("layer backward", 4 * MB, gradients=4 * MB),
    sample("optimizer step", 4 * MB, gradients=4 * MB),
]


def test_a_timeline_shows_measured_and_predicted_heights_of_each_phase(two):
    said = byte_figures.timelines(
        two, {"kept": (STEP, {"loss": 11 * MB, "layer backward": 10 * MB}), "again": (STEP, {})}
    )
    assert "kept: loss ≈12.0 (11.0), layer backward ≈10.0 (10.0), optimizer step ≈8.0" in said
    assert two[0].get_title() == "kept: 12 MB, forward, loss"
    # What the watch had not yet counted is left out, so nothing begins below the weights.
    lowest = two[0].collections[0].get_paths()[0].vertices[:, 1].max()
    assert lowest == 4
    levels = [line.get_ydata()[0] for line in two[0].lines if len(set(line.get_ydata())) == 1]
    assert 11 in levels and 10 in levels
    assert two[0].get_ylim() == two[1].get_ylim()


def test_no_peak_is_lost_where_samples_are_thinned(two):
    many = [sample("forward", 4 * MB, kept=n) for n in range(2000)]
    many[777] = sample("forward", 4 * MB, kept=9 * MB)
    byte_figures.timelines(two, {"a": (many, {}), "b": (many, {})})
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in two[0].collections]
    assert max(tops) == 13
    with pytest.raises(ValueError, match="has no samples"):
        byte_figures.timelines(two, {"a": ([], {}), "b": (many, {})})


# ---- growth ------------------------------------------------------------------------------------


def test_lines_cross_where_they_cross(ax):
    lines = {"LoRA": [10, 20, 30], "QLoRA": [4, 19, 34]}
    words = byte_figures.growth(ax, [1, 2, 3], lines, "rows", "GB", measured={"LoRA": [(2, 20)]})
    # From -1 at 2 rows to +4 at 3: a fifth of the way.
    assert byte_figures.crossing([1, 2, 3], *lines.values()) == pytest.approx((2.2, 22))
    assert ax.get_title() == "QLoRA above LoRA from 2.2 rows"
    assert "QLoRA above LoRA from 2.2 rows; 1 measured points are marked" in words


def test_lines_that_do_not_meet_are_said_not_to(ax):
    byte_figures.growth(ax, [1, 2], {"full": [5, 5], "LoRA": [1, 2]}, "rows", "GB")
    assert ax.get_title() == "full and LoRA do not meet"
    assert byte_figures.crossing([1, 2], [1, 1], [2, 3]) is None
    colors = {line.get_color() for line in ax.lines}
    assert colors == {"#0072B2", "#D55E00"}  # the methods' own


def test_growth_says_what_is_wrong(ax):
    with pytest.raises(ValueError, match="line 'a' has 1 values for 2 xs"):
        byte_figures.growth(ax, [1, 2], {"a": [1]}, "rows", "GB")
    with pytest.raises(ValueError, match=r"measured holds \['b'\]"):
        byte_figures.growth(ax, [1], {"a": [1]}, "rows", "GB", measured={"b": [(1, 1)]})


def test_stages_are_drawn_with_their_limits(ax):
    stages = {"stage 0": [16e9] * 2, "stage 1": [16e9, 5e9], "stage 3": [16e9, 0.1e9]}
    words = byte_figures.devices(ax, {**stages, "stage 2": [16e9, 4e9]}, [1, 160])
    texts = [text.get_text() for text in ax.texts]
    assert "stage 1: 3.20x less" in texts and "stage 3: 160x less" in texts
    assert [line.get_ydata()[0] for line in ax.lines if len(line.get_xdata()) == 2][-2:] == [4, 2]
    assert words.startswith("From 1 to 160 devices: stage 0 16.0 to 16.00 GB")


# ---- errors of tools ---------------------------------------------------------------------------


def test_tools_stand_in_the_order_of_their_median_error(ax):
    words = byte_figures.errors(ax, {"rule": [-0.5, 0.7, 0.6], "ours": [0.001, 0.0001, 0.0]}, 0.1)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rule", "ours"]
    assert ax.get_title() == "Closest: ours"
    assert words == (
        "ours median 0.010 %, worst 0.1 %, too low on 0 of 3; "
        "rule median 60.0 %, worst 70.0 %, too low on 1 of 3"
    )
    with pytest.raises(ValueError, match="at least one error"):
        byte_figures.errors(ax, {"rule": []})
