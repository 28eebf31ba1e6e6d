"""The model of a step's time: by hand, in its limits, and beside what was published."""

import statistics
from dataclasses import replace

import pytest

from labkit.memory import reference
from labkit.scale.published import checks
from labkit.scale.throughput import (
    VOLUMES,
    Assumptions,
    Cluster,
    pipeline_bubble,
    step_time,
    tensor_parallel_bytes,
    traffic,
    with_range,
)

GPT = {
    "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100,
    "n_positions": 32,
}  # fmt: skip
SLOW = Cluster(flops=1e9, devices=4, node_size=2, link_bandwidth=1e6, node_bandwidth=1e5)
PLAIN = {"dtype": "bf16", "batch_size": 2, "seq_len": 16, "gradient_checkpointing": False}


# ---- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "total"), [("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 3)]
)
def test_every_rank_sends_what_the_papers_say_times_what_a_ring_of_n_leaves(strategy, total):
    for devices in (2, 8, 400):
        sent = traffic(strategy, 1e9, 1e9, devices).bytes
        assert sent == pytest.approx(total * 1e9 * (devices - 1) / devices)
    assert VOLUMES[strategy].total == total


def test_zero_plus_plus_sends_a_quarter_between_machines_and_the_rest_inside():
    zero, plus = (traffic(strategy, 1e9, 1e9, 384, 16) for strategy in ("zero3", "zero++"))
    assert zero.bytes == pytest.approx(4 * plus.bytes)
    assert plus.inside_bytes == pytest.approx(1e9 * 15 / 16)


@pytest.mark.parametrize("strategy", VOLUMES)
def test_one_device_sends_nothing(strategy):
    alone = traffic(strategy, 1e9, 1e9, devices=1)
    assert alone.bytes == alone.inside_bytes == 0
    assert step_time(GPT, replace(SLOW, devices=1), **PLAIN).communication_seconds == 0


def test_micro_batches_repeat_what_cannot_wait():
    # M = 8 bytes of weights and of gradients, two devices: half of every multiple is sent.
    sent = {name: traffic(name, 8, 8, 2, passes=3).bytes for name in VOLUMES if name != "zero++"}
    assert sent == {"ddp": 8, "zero1": 8, "zero2": 3 * 4 + 4, "zero3": 3 * 12, "fsdp": 3 * 12}


def test_frozen_weights_are_gathered_and_never_reduced():
    sent = traffic("fsdp", weights_bytes=1000, gradients_bytes=10, devices=2)
    assert (sent.gather_bytes, sent.reduce_bytes) == (1000, 5)
    assert traffic("ddp", weights_bytes=1000, gradients_bytes=10, devices=2).bytes == 10


def test_tensor_parallel_layer_by_hand():
    # 4 all-reduces of 10 x 8 numbers of 2 bytes, each sent 2 x 3/4 times by one of 4 ranks.
    assert tensor_parallel_bytes(10, 8, devices=4) == 4 * 1.5 * 160
    assert tensor_parallel_bytes(10, 8, devices=4, checkpointing=True) == 6 * 1.5 * 160
    assert tensor_parallel_bytes(10, 8, devices=1) == 0


def test_pipeline_bubble_by_hand():
    assert pipeline_bubble(1, 4) == 0
    assert pipeline_bubble(4, 1) == 3 / 4  # nothing to fill the pipeline with
    assert pipeline_bubble(4, 12) == 3 / 15
    assert pipeline_bubble(4, 12, chunks=3) == 1 / 13


# ---- seconds -------------------------------------------------------------------------------------


def test_a_step_by_hand():
    # Matrices of a layer 12 h^2, the head V h: 6 operations for each of their numbers and token.
    # Scores: 2 products of 2 h for each of 8 keys (half of 16), once forward and 2.5 times back.
    tokens, matrices = 32, 2 * 12 * 64**2 + 100 * 64
    flops = tokens * (6 * matrices + 2 * 3.5 * 4 * 64 * 8)
    step = step_time(GPT, SLOW, Assumptions(efficiency=0.25, overlap=0), **PLAIN)
    assert step.flops == step.model_flops == pytest.approx(flops)
    assert step.compute_seconds == pytest.approx(flops / 0.25e9)
    # DDP: 2 x 3/4 of the gradients in bf16, at the speed of the wire between machines.
    parameters = 2 * (12 * 64**2 + 13 * 64) + 2 * 64 + (100 + 32) * 64
    assert step.communication_seconds == pytest.approx(1.5 * 2 * parameters / 1e5)
    assert step.seconds == pytest.approx(step.compute_seconds + step.communication_seconds)
    assert step.tokens_per_second == pytest.approx(4 * tokens / step.seconds)


def test_overlap_hides_the_shorter_of_both_and_gives_the_range():
    half = step_time(GPT, SLOW, **PLAIN)
    none, all_of_it = with_range(half)
    assert all_of_it.seconds == max(half.compute_seconds, half.communication_seconds)
    assert none.seconds == half.compute_seconds + half.communication_seconds
    assert half.seconds == pytest.approx((none.seconds + all_of_it.seconds) / 2)


@pytest.mark.parametrize("name", ["flops", "link_bandwidth", "node_bandwidth"])
@pytest.mark.parametrize(
    "how", [{}, {"sharding": "fsdp"}, {"zero_stage": 2}, {"strategy": "zero++"}]
)
def test_faster_parts_never_slow_a_step(name, how):
    seconds = [
        step_time(
            GPT, replace(SLOW, **{name: getattr(SLOW, name) * factor}), **PLAIN, **how
        ).seconds
        for factor in (0.01, 1, 10, 1000)
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]


def test_checkpointing_costs_a_third_and_lora_saves_a_part():
    arch = {**reference.model("Mistral-7B-v0.1")}
    one, options = Cluster.of("H100 80GB"), {"seq_len": 128, "batch_size": 1}

    def seconds(**how):
        return step_time(arch, one, **options, **how).seconds

    plain = seconds(gradient_checkpointing=False)
    assert seconds() / plain == pytest.approx(4 / 3, abs=0.02)
    assert seconds(gradient_checkpointing=False, method="lora") / plain == pytest.approx(
        2 / 3, abs=0.03
    )


def test_shared_models_divide_the_work_and_wait_for_each_other():
    big = Cluster(flops=1e9, devices=16, node_size=4, link_bandwidth=1e6, node_bandwidth=1e6)
    options = {**PLAIN, "accumulation_steps": 4}
    alone = step_time(GPT, replace(big, devices=1), **options)
    shared = step_time(GPT, big, tensor_parallel=4, pipeline_parallel=2, **options)
    assert shared.compute_seconds == pytest.approx(alone.compute_seconds / 8)
    assert shared.tokens == 2 * alone.tokens
    assert shared.tensor_seconds == pytest.approx(tensor_parallel_bytes(32, 64, 4) * 4 / 1e6)
    working = shared.compute_seconds + shared.tensor_seconds
    assert shared.bubble_seconds / (shared.bubble_seconds + working) == pytest.approx(1 / 5)


def test_offloading_takes_what_the_host_takes():
    assumptions = Assumptions(host_bandwidth=1e6, host_link_bandwidth=1e5)
    cluster = replace(SLOW, node_size=4)
    how = {**PLAIN, "zero_stage": 3}
    parameters = 2 * (12 * 64**2 + 13 * 64) + 2 * 64 + (100 + 32) * 64
    step = step_time(GPT, cluster, assumptions, offload="cpu", **how)
    # Up twice and down once, a quarter each; 30 bytes a parameter in the host's memory.
    assert step.host_seconds == pytest.approx(3 * 2 * parameters / 4 / 1e5 + 30 * parameters / 1e6)
    assert step_time(GPT, cluster, assumptions, **how).host_seconds == 0


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: Assumptions(efficiency=0), "efficiency=0"),
        (lambda: Assumptions(overlap=1.5), "overlap=1.5"),
        (lambda: Assumptions(host_bandwidth=0), "host_bandwidth=0"),
        (lambda: Cluster(flops=0), "flops=0"),
        (lambda: Cluster(flops=1, devices=0), "devices=0"),
        (lambda: Cluster.of("abacus"), "abacus"),
        (lambda: traffic("zero4", 1, 1, 2), "zero4.*ddp, zero1"),
        (lambda: traffic("ddp", 1, 1, 0), "devices=0"),
        (lambda: pipeline_bubble(0, 1), "stages=0"),
        (lambda: step_time(GPT, SLOW, tensor_parallel=3, **PLAIN), "does not divide 4 devices"),
        (lambda: step_time(GPT, SLOW, strategy="magic", **PLAIN), "magic"),
        (lambda: step_time(GPT, SLOW, **PLAIN, speed=1), "no such option"),
    ],
)
def test_callers_mistakes_are_named(wrong, match):
    with pytest.raises(ValueError, match=match):
        wrong()


# ---- beside what was published -------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    return checks()


def test_every_published_figure_has_its_source_and_a_word_on_the_error(found):
    assert len(found) >= 39
    for check in found:
        assert check.source and check.where and check.why and check.url.startswith("https://")
        assert check.low <= check.predicted <= check.high


def test_counts_are_exact(found):
    assert all(check.error == 0 for check in found if check.kind == "volume")


def test_tuning_runs_of_one_and_two_devices_come_within_a_quarter(found):
    errors = [abs(check.error) for check in found if check.kind == "tokens per second"]
    assert len(errors) == 20
    assert statistics.median(errors) < 0.12
    assert max(errors) < 0.25


def test_speedups_of_less_traffic_come_within_a_fifth(found):
    errors = [check.error for check in found if check.kind == "speedup"]
    assert len(errors) == 3 and max(map(abs, errors)) < 0.2
    # With four times less traffic a wire four times slower does: figure 8 of the post.
    model = {"model_type": "gpt2", "n_embd": 6144, "n_layer": 40, "n_head": 48, "vocab_size": 50257}
    slow, fast = (Cluster(125e12, 384, 16, 150e9, wire) for wire in (25e9, 100e9))
    options = {"seq_len": 1024, "dtype": "fp16", "zero_stage": 3}
    plus = step_time(model, slow, strategy="zero++", **options)
    assert plus.tokens_per_second / step_time(model, fast, **options).tokens_per_second == (
        pytest.approx(1, abs=0.15)
    )


def test_the_share_of_the_peak_is_among_those_that_runs_reached():
    share = Assumptions().efficiency
    reached = [
        check.published / check.high * share
        for check in checks()
        if check.kind == "tokens per second"
    ]
    assert min(reached) < share < max(reached)
    assert statistics.median(reached) == pytest.approx(share, abs=0.05)
