"""The estimate asked backwards: what fits, what each change saves, and what would fit instead."""

import gc
import itertools
import json
import statistics
import subprocess
import sys
import time

import pytest

from labkit import cli, paths
from labkit.errors import LabkitError
from labkit.memory import (
    DoesNotFit,
    Options,
    estimate,
    find_ways,
    fits,
    gpus_that_fit,
    knobs,
    largest_batch,
    largest_seq_len,
    require_fit,
)
from labkit.memory import levers as lever_module
from labkit.memory import plan as plan_module
from labkit.memory.architecture import read
from labkit.memory.flops import step_flops
from labkit.memory.gpus import GPUS, find, reserve_bytes
from labkit.memory.levers import LEVERS
from labkit.memory.phases import Step
from labkit.memory.plan import make_plan
from labkit.memory.reference import model, models, read_json, rows
from labkit.memory.units import parse_size, size_text

GIB = 2**30
MISTRAL, LLAMA, QWEN, GPT2 = map(
    model, ("Mistral-7B-v0.1", "Meta-Llama-3-8B", "Qwen3-0.6B", "GPT-2")
)

# ---- cards -------------------------------------------------------------------------------------


def test_a_card_has_less_memory_than_its_label():
    for name, gpu in GPUS.items():
        label = {"T4": 16, "L4": 24, "A10G": 24, "RTX 3090": 24, "RTX 4090": 24, "RTX 5090": 32}
        label |= {"A40": 48, "L40S": 48, "RTX A6000": 48, "H200": 141 / 1.0737, "B200": 180}
        label |= {"RX 7900 XTX": 24, "MI300X": 192}
        gigabytes = label.get(name) or float(name.split()[-1].removesuffix("GB"))
        assert 0.9 < gpu.memory_bytes / GIB / gigabytes <= 1.07
        assert gpu.memory_bytes < gigabytes * 1.0737 * GIB
        assert gpu.flops > 1e13 and gpu.bandwidth > 1e11 and gpu.link_bandwidth > 1e10
        assert gpu.memory_source and gpu.source
        assert set(gpu.unchecked) <= set(vars(gpu))


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("h100", "H100 80GB"),
        ("RTX4090", "RTX 4090"),
        ("nvidia a100-80gb", "A100 80GB"),
        ("l4", "L4"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("AMD Radeon RX 7900 XTX", "RX 7900 XTX"),
    ],
)
def test_cards_are_found_however_they_are_written(said, meant):
    assert find(said).name == meant


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("a100", "gpu 'a100' may be any of A100 40GB, A100 80GB: name one"),
        ("k80", "gpu 'k80' is not known here: use one of RTX 3060 12GB, T4"),
        ("", "gpu '' is not known here"),
        ("NVIDIA", "gpu 'NVIDIA' is not known here"),
        ("NVIDIA H100 PCIe", "gpu 'NVIDIA H100 PCIe' is not known here"),  # a slower one
        ("Tesla V100-SXM2-16GB", "gpu 'Tesla V100-SXM2-16GB' is not known here"),
    ],
)
def test_unknown_cards_are_named(said, message):
    with pytest.raises(ValueError) as caught:
        find(said)
    assert message in str(caught.value)


def test_the_reserve_would_have_refused_every_public_run_that_ran_out_of_memory():
    failed = read_json("out_of_memory.json")["rows"]
    assert len(failed) == 18
    for row in failed:
        capacity = row["capacity_gib"] * GIB
        asked = (row["allocated_gib"] + row["tried_gib"]) * GIB
        assert asked > capacity - reserve_bytes(capacity), row["source"]


def test_the_reserve_refuses_no_public_run_that_ran():
    card = find("A100 80GB")
    for row in rows():
        assert row.gpu == "A100-80GB"
        assert row.peak_allocated_bytes <= card.memory_bytes - reserve_bytes(card.memory_bytes)


def test_the_reserve_by_hand():
    assert reserve_bytes(100 * GIB) == round(4.65 * GIB)  # 2.75 and 1.9 %
    assert reserve_bytes(40 * GIB, "cpu") == GIB


# ---- products ----------------------------------------------------------------------------------

TOY = {
    "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 32,
}  # fmt: skip


def flops(**options):
    given = {"seq_len": 4, "batch_size": 2, "attention": "eager", "lora_rank": 2, **options}
    return step_flops(read(TOY), Options(**given))


def test_products_of_a_toy_by_hand():
    # 8 tokens; a layer: q and o 8 x 8, k and v 8 x 4, three of 8 x 16; scores 2 x (2 x 4 keys x 8).
    layer = 2 * (2 * 64 + 2 * 32 + 3 * 128) + 2 * 2 * 4 * 8
    forward = 8 * (3 * layer + 2 * 32 * 8)
    full = flops(gradient_checkpointing=False)
    assert (full.forward, full.recomputed, full.reference) == (forward, 0, 0)
    assert full.backward == 2 * forward
    again = flops()
    assert again.recomputed == 8 * 3 * layer
    assert again.total == full.total + again.recomputed


def test_frozen_weights_save_the_products_of_their_gradients():
    frozen = flops(method="prompt", num_virtual_tokens=1, gradient_checkpointing=False)
    tokens = 2 * 5
    products, scores = 2 * (2 * 64 + 2 * 32 + 3 * 128), 2 * 2 * 5 * 8
    assert frozen.backward == tokens * (3 * (products + 2 * scores) + 2 * 32 * 8)
    lora = flops(method="lora", target_modules="q_proj", gradient_checkpointing=False)
    adapter = 2 * 2 * (8 + 8)
    assert lora.forward == flops(gradient_checkpointing=False).forward + 8 * 3 * adapter
    frozen_layers = flops(method="freeze", trainable_layers=1, gradient_checkpointing=False)
    assert frozen_layers.backward < flops(gradient_checkpointing=False).backward / 2


def test_frozen_layers_under_checkpointing_by_hand():
    # Computed again, all three of them; the gradient passes through the two that are frozen.
    frozen = {"method": "freeze", "trainable_layers": 1}
    again, kept = flops(**frozen), flops(**frozen, gradient_checkpointing=False)
    products, scores = 2 * (2 * 64 + 2 * 32 + 3 * 128), 2 * 2 * 4 * 8
    assert again.recomputed == flops().recomputed == 8 * 3 * (products + scores)
    assert again.backward == kept.backward + 8 * 2 * (products + 2 * scores)
    assert (again.forward, kept.recomputed) == (kept.forward, 0)
    every = {"method": "freeze", "trainable_layers": 3}
    assert flops(**every).backward == flops(**every, gradient_checkpointing=False).backward


def test_a_token_meets_only_its_experts():
    mixtral = read(model("Mixtral-8x7B-Instruct-v0.1"))
    one = step_flops(mixtral, Options(seq_len=64, gradient_checkpointing=False)).forward
    assert one / (2 * 64 * mixtral.parameters) == pytest.approx(12.9 / 46.7, rel=0.02)


def test_how_experts_lie_changes_no_product_but_those_of_their_adapters():
    values = model("Mixtral-8x7B-Instruct-v0.1")
    stacked, separate = (read(values, experts) for experts in ("stacked", "separate"))
    for options in (Options(seq_len=64), Options(method="lora", target_modules="q_proj")):
        assert step_flops(stacked, options) == step_flops(separate, options)
    # PEFT adds B A to the weights of all experts in each pass, whatever the batch.
    short, long = (
        step_flops(stacked, Options(method="lora", lora_dropout=0.0, seq_len=n, batch_size=64))
        for n in (1, 2)
    )
    update = 32 * 2 * 8 * (32 * 4096 * 2 * 14336 + 16 * 4096 * 14336)
    assert 2 * short.forward - long.forward == pytest.approx(update, rel=0.01)


def test_quantizing_is_no_way_to_shrink_stacked_experts():
    mixtral = model("Mixtral-8x7B-Instruct-v0.1")
    names = {
        experts: {knob.name for knob in knobs(mixtral, method="lora", experts=experts)}
        for experts in ("stacked", "separate")
    }
    assert names["separate"] - names["stacked"] == {"QLoRA instead of LoRA"}


def test_dpo_pays_for_its_reference():
    dpo = flops(objective="dpo")
    assert dpo.reference == dpo.forward == 2 * flops().forward
    assert flops(objective="dpo", precompute_reference=True).reference == 0


# ---- the largest that fits ---------------------------------------------------------------------

GRID = [
    {"method": method, "gradient_checkpointing": again, "loss_path": path, **more}
    for method, again, path, more in itertools.product(
        ("full", "lora", "qlora"),
        (True, False),
        ("shifted", "fused"),
        ({"seq_len": 512}, {"seq_len": 2048, "objective": "dpo", "attention": "eager"}),
    )
]


@pytest.mark.parametrize("memory", [12 * GIB, 80 * GIB], ids=["12 GiB", "80 GiB"])
@pytest.mark.parametrize("config", [MISTRAL, QWEN], ids=["Mistral", "Qwen3"])
def test_the_largest_batch_fits_and_one_more_does_not(config, memory):
    found = set()
    for options in GRID:
        batch = largest_batch(config, memory, **options)
        room = memory - reserve_bytes(memory)
        if batch is not None:
            peak = estimate(config, batch_size=batch, **options).peak_allocated_bytes
            assert peak <= room
            assert fits(config, memory, batch_size=batch, **options)
        assert estimate(config, batch_size=(batch or 0) + 1, **options).peak_allocated_bytes > room
        found.add(batch)
    assert None in found or memory > 12 * GIB
    assert found - {None}


@pytest.mark.parametrize("memory", [12 * GIB, 80 * GIB], ids=["12 GiB", "80 GiB"])
def test_the_longest_rows_fit_and_one_more_token_does_not(memory):
    for options in GRID:
        options = {**options, "batch_size": 2, "seq_len": None}
        tokens = largest_seq_len(MISTRAL, memory, **options)
        room = memory - reserve_bytes(memory)
        if tokens is not None:
            taken = estimate(MISTRAL, **{**options, "seq_len": tokens}).peak_allocated_bytes
            assert taken <= room
        if tokens != MISTRAL["max_position_embeddings"]:
            one_more = {**options, "seq_len": (tokens or 0) + 1}
            assert estimate(MISTRAL, **one_more).peak_allocated_bytes > room


def test_rows_are_no_longer_than_the_model_reads():
    assert largest_seq_len(GPT2, 80 * GIB) == 1024
    assert largest_seq_len(GPT2, 80 * GIB, method="prefix", num_virtual_tokens=24) == 1000
    assert largest_seq_len(QWEN, 10**15, method="lora") == 40960
    unlimited = {name: value for name, value in QWEN.items() if name != "max_position_embeddings"}
    assert largest_seq_len(unlimited, 10**18) == 2**20


def test_the_batch_that_was_asked_for_does_not_matter_to_the_largest():
    asked = {"method": "qlora", "seq_len": 1024}
    assert largest_batch(MISTRAL, 24 * GIB, **asked) == largest_batch(
        MISTRAL, 24 * GIB, batch_size=500, **asked
    )


def test_the_reserve_is_an_argument():
    room = estimate(MISTRAL, method="lora", seq_len=512).peak_allocated_bytes
    options = {"method": "lora", "seq_len": 512}
    assert fits(MISTRAL, room, reserve_bytes=0, **options)
    assert not fits(MISTRAL, room, **options)
    assert not fits(MISTRAL, room - 1, reserve_bytes=0, **options)
    assert largest_batch(MISTRAL, room, reserve_bytes=0, **options) == 1


# ---- the price of each change ------------------------------------------------------------------


def price(config, name, memory=None, **options):
    [found] = [knob for knob in knobs(config, memory, **options) if knob.name == name]
    return found


def test_the_fused_step_saves_the_roots_of_all_means():
    knob = price(MISTRAL, "fused AdamW", seq_len=512)
    # Not all of the 2 B x P: then the embedding's backward is higher, by the gradient of its input.
    assert knob.saved_bytes == pytest.approx(2 * 7_241_732_096, rel=1e-3)
    assert (knob.change, knob.time, knob.phase) == ({"fused": True}, 1.0, "layer backward")
    assert str(knob) == (
        "fused AdamW saves 13.48 GiB and costs no more products; then layer backward wins"
    )


def test_checkpointing_costs_a_third_of_full_tuning_and_half_of_lora():
    full = {"seq_len": 2048, "batch_size": 4, "gradient_checkpointing": False}
    knob = price(MISTRAL, "gradient checkpointing", **full)
    before, after = (
        estimate(MISTRAL, **{**full, "gradient_checkpointing": again}).peak_allocated_bytes
        for again in (False, True)
    )
    assert (knob.saved_bytes, knob.peak_allocated_bytes) == (before - after, after)
    assert knob.time == pytest.approx(4 / 3, abs=0.01) and knob.time_status == "model"
    assert str(knob).startswith("gradient checkpointing saves ")
    assert " and costs about 33 % time (model); then optimizer step wins" in str(knob)
    lora = price(MISTRAL, "gradient checkpointing", method="lora", **full)
    assert lora.time == pytest.approx(3 / 2, abs=0.03)  # adapters and scores are parts of four


@pytest.mark.parametrize(
    "options",
    [
        {"seq_len": 2048, "batch_size": 4},
        {"seq_len": 2048, "batch_size": 4, "gradient_checkpointing": False, "attention": "eager"},
        {"method": "lora", "objective": "dpo", "batch_size": 2, "dtype": "fp32"},
        {"objective": "dpo", "batch_size": 3, "padding": True},
        {"method": "qlora", "batch_size": 16, "num_devices": 2},
        {"zero_stage": 2, "num_devices": 4},
        {"sharding": "fsdp", "num_devices": 2, "optimizer": "adamw-8bit"},
        {"method": "prefix", "gradient_checkpointing": False},
    ],
    ids=str,
)
def test_every_price_is_what_the_estimate_says(options):
    before = estimate(MISTRAL, **options)
    found = knobs(MISTRAL, **options)
    assert len(found) >= 4
    assert [k.saved_bytes for k in found] == sorted((k.saved_bytes for k in found), reverse=True)
    for knob in found:
        after = estimate(MISTRAL, **{**options, **knob.change})
        assert knob.peak_allocated_bytes == after.peak_allocated_bytes
        assert knob.phase == after.phase
        assert knob.saved_bytes == before.peak_allocated_bytes - after.peak_allocated_bytes
        assert knob.cost and knob.fits is None
        assert (knob.time is None) == (knob.time_status == "unknown")
        # What saves nothing, or needs more, says so.
        words = "saves nothing" if knob.saved_bytes == 0 else "more and costs"
        assert (words in str(knob)) == (knob.saved_bytes <= 0)


def test_lora_without_checkpointing_can_need_more_than_full_tuning_and_says_so():
    options = {"seq_len": 2048, "batch_size": 4, "gradient_checkpointing": False}
    knob = price(LLAMA, "LoRA instead of full", **options)
    assert knob.saved_bytes < 0
    assert str(knob).startswith("LoRA instead of full needs ") and " more and costs" in str(knob)


def test_levers_that_are_pulled_or_have_no_meaning_are_left_out():
    def names(config=MISTRAL, **options):
        return {knob.name for knob in knobs(config, **options)}

    assert "gradient checkpointing" not in names()
    assert "gradient checkpointing" not in names(method="prefix", gradient_checkpointing=False)
    assert "LoRA instead of full" not in names(method="lora")
    assert "QLoRA instead of LoRA" in names(method="lora")
    assert "QLoRA instead of LoRA" not in names(GPT2, method="lora")  # bitsandbytes leaves Conv1D
    assert "precomputing the reference" in names(objective="dpo")
    assert "precomputing the reference" not in names()
    assert not {"8-bit AdamW", "offloading to the CPU"} & names(device="cpu")
    assert "accumulating smaller passes" not in names(batch_size=1)
    assert not {"fused AdamW", "8-bit AdamW"} & names(zero_stage=2, num_devices=2)


def test_sizes_are_the_gentlest_that_fit():
    options = {"method": "qlora", "batch_size": 12, "seq_len": 2048}
    memory = 24 * GIB
    knob = price(MISTRAL, "accumulating smaller passes", memory, **options)
    assert knob.change == {"batch_size": 6, "accumulation_steps": 2} and knob.fits
    small = price(MISTRAL, "accumulating smaller passes", 16 * GIB, **options)
    assert small.change == {"batch_size": 3, "accumulation_steps": 4}
    shards = price(MISTRAL, "sharding over devices", 24 * GIB)
    assert shards.change == {"sharding": "fsdp", "num_devices": 4}
    assert price(MISTRAL, "shortening rows", seq_len=2048).change == {"seq_len": 1024}


def test_measured_times_are_those_of_the_public_rows():
    speed = {row.name: row.tokens_per_second for row in rows("bar")}
    names = [f"Mistral-7B-v0.1 {method} bf16 batch 4" for method in ("full", "lora", "qlora")]
    full, lora, qlora = (speed[name] for name in names)
    assert (lever_module.FULL_SPEED, lever_module.LORA_SPEED) == (full, lora)
    assert lever_module.QLORA_SPEED == qlora
    knob = price(MISTRAL, "LoRA instead of full", seq_len=512)
    assert (knob.time, knob.time_status) == (full / lora, "measured")
    assert "costs no time: about 8 % less (measured)" in str(knob)
    [run] = [row for row in rows("bar") if row.name == names[1]]
    knob = price(MISTRAL, "QLoRA instead of LoRA", **run.options)
    assert (knob.time, knob.time_status) == (lora / qlora, "measured")
    small = price(QWEN, "LoRA instead of full", seq_len=512)  # nobody measured such a small one
    assert small.time_status == "model"


@pytest.mark.parametrize(
    ("lever", "public", "change"),
    [
        ("LoRA instead of full", "full", change)
        for change in (
            {"autocast": True, "dtype": "fp32"},
            {"dtype": "fp16"},
            {"num_devices": 2},
            {"num_devices": 2, "sharding": "fsdp"},
            {"num_devices": 2, "zero_stage": 2},
            {"objective": "dpo"},
            {"attention": "eager"},
            {"attention": "sdpa", "padding": True},
            {"gradient_checkpointing": False},
            {"method": "freeze"},
            {"device": "cpu", "attention": "sdpa"},
        )
    ]
    + [
        ("QLoRA instead of LoRA", "lora", change)
        for change in (
            {"autocast": True, "dtype": "fp32"},
            {"num_devices": 2},
            {"objective": "dpo"},
            {"attention": "sdpa"},
            {"seq_len": 512},
            {"batch_size": 1},
            {"lora_rank": 64},
            {"target_modules": "all-linear"},
            {"loss_path": "fused"},
            {"kbit_prepared": False},
        )
    ],
    ids=str,
)
def test_no_time_is_called_measured_that_was_not(lever, public, change):
    [run] = [row for row in rows("bar") if row.name == f"Mistral-7B-v0.1 {public} bf16 batch 4"]
    assert price(MISTRAL, lever, **run.options).time_status == "measured"
    assert price(MISTRAL, lever, **{**run.options, **change}).time_status == "model"


def test_one_row_is_one_row():
    cost = price(MISTRAL, "sharding over devices", seq_len=512).cost
    assert "each with its own 1 row;" in cost
    cost = price(MISTRAL, "sharding over devices", seq_len=512, batch_size=2).cost
    assert "each with its own 2 rows;" in cost


def test_shorter_rows_cost_the_tokens_that_are_cut_off():
    knob = price(MISTRAL, "shortening rows", method="lora", seq_len=2048, batch_size=4)
    less = round(100 * (1 - knob.time))
    assert less > 50  # half of the tokens, and fewer pairs of them
    said = f"costs the tokens that are cut off; a step takes about {less} % less time (model);"
    assert said in str(knob)
    assert knob.cost == "rows longer than 1,024 tokens are cut: the rest is not learned from"
    ways = find_ways(MISTRAL, 12 * GIB, method="qlora", seq_len=8192, batch_size=8)
    [pair] = [way for way in ways if "seq_len" in way.change and way.time is not None]
    assert "costs the tokens that are cut off; a step takes about " in str(pair)
    unknown = plan_module._costs({"seq_len": 8}, None, "unknown")
    assert unknown == "the tokens that are cut off, and time that is not known"


def test_traffic_has_a_size_and_no_invented_time():
    # 2 B x P of weights twice and gradients once, of which the half that is elsewhere travels.
    shards = price(MISTRAL, "sharding over devices", seq_len=512)
    assert (shards.time, shards.time_status) == (None, "unknown")
    assert f"receives {3 * 2 * 7.241732096 / 2:,.1f} GB in a pass" in shards.cost
    offload = price(MISTRAL, "offloading to the CPU", seq_len=512)
    assert f"PCIe: {4 * 2 * 7.241732096:,.1f} GB in a step" in offload.cost
    assert "costs time that is not known" in str(offload)


# ---- cards that fit ----------------------------------------------------------------------------


def test_cards_that_fit_are_those_with_room_for_the_reserve():
    found = gpus_that_fit(MISTRAL, method="qlora", batch_size=4, seq_len=2048)
    peak = estimate(MISTRAL, method="qlora", batch_size=4, seq_len=2048).peak_allocated_bytes
    assert len(found) == len(GPUS)
    usual = Options().cublas_workspace
    sizes = [one.gpu.memory_bytes for one in found]
    assert sizes == sorted(sizes)
    for one in found:
        own = peak + 2 * (one.gpu.cublas_workspace - usual)
        free = one.gpu.memory_bytes - reserve_bytes(one.gpu.memory_bytes) - own
        assert (one.free_bytes, one.fits) == (free, free >= 0)
    fitting = [one.gpu.name for one in found if one.fits]
    assert "RTX 3060 12GB" not in fitting and "RTX 4090" in fitting
    more = gpus_that_fit(MISTRAL, reserve_bytes=0, method="qlora", batch_size=4, seq_len=2048)
    assert sum(one.fits for one in more) >= len(fitting)


def test_cards_without_bf16_are_named():
    notes = {one.gpu.name: one.note for one in gpus_that_fit(QWEN)}
    assert notes["T4"] == "it does not compute in bf16: train in fp16" and notes["L4"] == ""
    assert {one.note for one in gpus_that_fit(QWEN, dtype="fp16")} == {""}


# ---- a refusal, with ways out ------------------------------------------------------------------

TOO_LARGE = [
    (MISTRAL, 24, {"seq_len": 2048, "batch_size": 4}),
    (MISTRAL, 24, {"method": "qlora", "seq_len": 2048, "batch_size": 16}),
    (MISTRAL, 16, {"method": "lora", "seq_len": 2048}),
    (LLAMA, 80, {"seq_len": 4096, "batch_size": 4}),
    (LLAMA, 24, {"method": "qlora", "seq_len": 4096, "batch_size": 2, "objective": "dpo"}),
    (LLAMA, 80, {"seq_len": 4096, "batch_size": 4, "gradient_checkpointing": False}),
    (model("Qwen3-8B"), 48, {"dtype": "fp32", "seq_len": 1024}),
    (model("Llama-2-70b"), 24, {"seq_len": 4096, "batch_size": 4}),
    (model("Mixtral-8x7B-Instruct-v0.1"), 48, {"method": "lora", "gradient_checkpointing": False}),
    (GPT2, 4.5, {"batch_size": 32, "attention": "eager", "gradient_checkpointing": False}),
    (MISTRAL, 24, {"zero_stage": 2, "num_devices": 2}),
]


@pytest.mark.parametrize(
    ("config", "gib", "options"),
    TOO_LARGE,
    ids=[f"{config['model_type']}, {gib} GiB, {options}" for config, gib, options in TOO_LARGE],
)
def test_every_way_that_is_offered_fits(config, gib, options):
    memory = gib * GIB
    with pytest.raises(DoesNotFit) as caught:
        require_fit(config, memory, **options)
    ways = caught.value.ways
    assert ways == find_ways(config, memory, **options)
    assert 1 <= len(ways) <= 3
    room = memory - reserve_bytes(memory)
    for way in ways:
        after = estimate(config, **{**options, **way.change})
        assert after.peak_allocated_bytes == way.peak_allocated_bytes <= room
        assert after.phase == way.phase
        assert fits(config, memory, **{**options, **way.change})
        assert len(way.names) == len(way.costs) <= 2
    # Different ideas, fewest changes first, and no pair that holds a change that is enough alone.
    assert len({frozenset(way.names) for way in ways}) == len(ways)
    assert [len(way.names) for way in ways] == sorted(len(way.names) for way in ways)
    alone = {way.names[0] for way in ways if len(way.names) == 1}
    assert not any(alone & set(way.names) for way in ways if len(way.names) == 2)
    message = str(caught.value)
    assert isinstance(caught.value, LabkitError) and "\n" not in message
    few = f"only {len(ways)} among single changes and pairs of changes that are not enough alone"
    assert (few in message) == (len(ways) < 3)
    assert all(str(way) in message for way in ways)


def test_single_changes_come_cheapest_first():
    ways = find_ways(MISTRAL, 24 * GIB, seq_len=2048, batch_size=4)
    assert [way.names for way in ways] == [
        ("LoRA instead of full",), ("offloading to the CPU",), ("sharding over devices",),
    ]  # fmt: skip
    ways = find_ways(LLAMA, 80 * GIB, seq_len=4096, batch_size=4)
    assert ways[0].names == ("fusing the loss",)
    assert all(way.same_result and way.time == 1.0 for way in ways)
    # 8-bit and paged 8-bit states are one idea.
    kinds = [way.names[0] for way in find_ways(LLAMA, 72 * GIB, seq_len=512)]
    assert len([kind for kind in kinds if "8-bit" in kind]) <= 1


def test_a_pair_is_as_mild_as_it_can_be():
    """The batch gives way all the way before rows are cut more than once."""
    ways = find_ways(MISTRAL, 12 * GIB, method="qlora", seq_len=8192, batch_size=8)
    assert ways[0].names == ("accumulating smaller passes", "shortening rows")
    assert ways[0].change == {"batch_size": 1, "accumulation_steps": 8, "seq_len": 4096}
    [tighter] = find_ways(MISTRAL, 10 * GIB, method="qlora", seq_len=8192, batch_size=8)
    assert tighter.change == {"batch_size": 1, "accumulation_steps": 8, "seq_len": 2048}


def test_what_fits_is_not_refused():
    options = {"method": "qlora", "seq_len": 2048, "batch_size": 4}
    found = require_fit(MISTRAL, 24 * GIB, **options)
    assert found == estimate(MISTRAL, **options)
    assert find_ways(MISTRAL, 24 * GIB, **options) == ()


def test_a_refusal_says_how_much_is_missing():
    with pytest.raises(DoesNotFit) as caught:
        require_fit(MISTRAL, 24 * GIB, seq_len=2048, batch_size=4)
    error = caught.value
    room = 24 * GIB - reserve_bytes(24 * GIB)
    assert error.short_bytes == error.estimate.peak_allocated_bytes - room
    lora = estimate(MISTRAL, method="lora", seq_len=2048, batch_size=4).peak_allocated_bytes
    assert str(error).startswith(
        "one step peaks at 67.46 GiB (optimizer step), and 20.79 GiB of the device's 24.00 GiB may "
        "hold tensors: 46.67 GiB too many. It would fit with: 1. LoRA instead of full "
        f"(method='lora'): peaks at {size_text(lora)}, costs no time: about 8 % less (measured)"
    )


def test_where_nothing_helps_it_says_so():
    with pytest.raises(
        DoesNotFit, match="No single change and no pair of changes is enough"
    ) as caught:
        require_fit(model("Llama-2-70b"), 3 * GIB, seq_len=8192, batch_size=8)
    assert caught.value.ways == ()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fits(MISTRAL, 0), "memory_bytes=0: give a number of bytes above 0"),
        (lambda: knobs(MISTRAL, -1), "memory_bytes=-1: give"),
        (lambda: fits(MISTRAL, True), "memory_bytes=True: give"),
        (lambda: largest_batch(MISTRAL, GIB, reserve_bytes=-1), "reserve_bytes=-1: give 0 or more"),
        (lambda: knobs(MISTRAL, method="lorra"), "method='lorra' is unknown"),
        (lambda: largest_seq_len(MISTRAL, GIB, batch=2), "batch=2: no such option"),
        (lambda: require_fit({"model_type": "llama"}, GIB), "config has no 'hidden_size'"),
        (lambda: model("gpt5"), "model 'gpt5' is not among those known here: bundled, GPT-2"),
        (lambda: rows("foo"), "group='foo' has no rows: use bar, held out, once held out, sharded"),
        (lambda: parse_size("24 QB"), "'24 QB' is no size: give one such as 24GiB or 80GB"),
        (lambda: parse_size("24"), "'24' would be bytes: give a unit, such as 24GiB"),
        (lambda: parse_size("1048575"), "'1048575' would be bytes: give a unit, such as 24GiB"),
        (lambda: parse_size("24G"), "'24G' may be either of two: write GB or GiB"),
        (lambda: parse_size("9" * 400), "is too large a size: give one such as 24GiB or 80GB"),
        (lambda: parse_size("1000001TB"), "is too large a size: give one such as 24GiB"),
    ],
)
def test_what_cannot_be_meant_is_named(call, said):
    with pytest.raises(ValueError) as caught:
        call()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_are_read_and_written():
    assert parse_size("24GiB") == 24 * GIB and parse_size("80 GB") == 80 * 10**9
    assert parse_size("1.5kib") == 1536 and parse_size("1000B") == 1000
    assert parse_size("0") == 0 and parse_size(str(2**20)) == 2**20
    assert parse_size("25769803776") == 24 * GIB and parse_size("1000000TB") == 10**18
    assert [size_text(n) for n in (5, 1536, 3 * GIB, -GIB)] == [
        "5 B", "1.50 KiB", "3.00 GiB", "-1.00 GiB",
    ]  # fmt: skip


def test_every_lever_has_a_name_of_its_own_and_is_met_somewhere():
    names = [lever.name for lever in LEVERS]
    assert len(names) == len(set(names))
    met = set()
    for config, gib, options in [
        *TOO_LARGE,
        (MISTRAL, 24, {"objective": "dpo"}),
        (MISTRAL, 24, {"method": "lora", "padding": True}),
    ]:
        met |= {knob.name for knob in knobs(config, gib * GIB, **options)}
    assert met == set(names)


def test_every_known_model_can_be_planned():
    for name, config in models().items():
        seq_len = min(512, config.get("max_position_embeddings", 512))
        assert largest_batch(config, 10**13, method="lora", seq_len=seq_len) > 1, name


# ---- the command -------------------------------------------------------------------------------


def run(capsys, *arguments: str, status: int = 0) -> str:
    assert cli.main(["plan", *arguments]) == status
    return capsys.readouterr().out


@pytest.fixture
def mistral_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MISTRAL), encoding="utf-8")
    return str(file)


def test_command_says_whether_it_fits_by_its_exit_code(mistral_file, capsys):
    fitting = ["--method", "qlora", "--batch-size", "4", "--seq-len", "2048"]
    text = run(capsys, mistral_file, *fitting, "--gpu", "RTX 4090")
    assert "config.json: fits: one training step peaks at 12.01 GiB" in text
    batch = largest_batch(MISTRAL, GPUS["RTX 4090"].memory_bytes, method="qlora", seq_len=2048)
    assert f"largest batch: {batch}\n" in text
    assert "sharding over devices saves" in text or "sharding over devices needs" in text
    assert "  RTX 3060 12GB   11.66 GiB  does not fit, 3.33 GiB too small" in text
    assert "train in fp16" in text
    refused = run(capsys, mistral_file, "--seq-len", "2048", "--memory", "24GiB", status=1)
    assert "does not fit: one training step peaks at 67.46 GiB (optimizer step); of 24" in refused
    assert "3.21 GiB are kept free and 20.79 GiB may hold tensors" in refused
    assert "ways that would fit, cheapest first:\n  1. LoRA instead of full" in refused
    assert "largest batch: none, not even 1 row fits" in refused
    without = run(capsys, mistral_file, "--seq-len", "2048")
    assert "largest batch" not in without and "gradient checkpointing" not in without


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        (24 * GIB, {"method": "qlora", "batch_size": 4, "seq_len": 2048}),
        (24 * GIB, {"batch_size": 4}),
        (None, {"target_modules": ["q_proj"], "method": "lora"}),
    ],
    ids=str,
)
def test_a_plan_asks_for_each_peak_once(monkeypatch, memory, options):
    asked = []

    class Counted(Step):
        def __init__(self, arch, options):
            asked.append(options)
            super().__init__(arch, options)

    monkeypatch.setattr(plan_module, "Step", Counted)
    report = make_plan(MISTRAL, memory, None, **options)
    assert len(asked) == len(set(asked)) > 5
    monkeypatch.undo()
    assert report["estimate"] == estimate(MISTRAL, **options)
    assert report["knobs"] == knobs(MISTRAL, memory, **options)
    assert report["gpus"] == gpus_that_fit(MISTRAL, **options)
    if memory is not None:
        assert report["fits"] == fits(MISTRAL, memory, **options)
        assert report["ways"] == find_ways(MISTRAL, memory, **options)
        assert report["largest_batch"] == largest_batch(MISTRAL, memory, **options)
        assert report["largest_seq_len"] == largest_seq_len(MISTRAL, memory, **options)


def test_command_says_where_it_is_tight(mistral_file, capsys):
    options = ("--method", "lora", "--seq-len", "512")
    peak = estimate(MISTRAL, method="lora", seq_len=512).peak_allocated_bytes
    text = run(capsys, mistral_file, *options, "--memory", str(peak + 1), status=1)
    assert "its tensors alone have room; others failed with as little left as this\n" in text
    named = (*options, "--memory", str(peak + GIB), "--reserve", "2GiB")
    text = run(capsys, mistral_file, *named, status=1)
    assert "it may run: its tensors alone have room\n" in text  # nobody reported of that reserve
    assert run(capsys, mistral_file, *options, "--memory", str(peak), "--reserve", "0")


def test_command_says_where_the_reserve_is_too_large(mistral_file, capsys):
    said = "nothing is left for tensors; keep less free with --reserve"
    for asked in (("--memory", "2GiB"), ("--gpu", "L4", "--reserve", "30GiB")):
        text = run(capsys, mistral_file, *asked, status=1)
        assert said in text and "\nno single change and no pair of changes is enough\n" in text
    assert said not in run(capsys, mistral_file, "--memory", "24GiB", status=1)


def test_command_says_where_it_looked_for_ways(mistral_file, capsys):
    asked = ("--method", "qlora", "--seq-len", "8192", "--batch-size", "8")
    text = run(capsys, mistral_file, *asked, "--memory", "10GiB", status=1)
    assert "no more than 1 among single changes and pairs of changes that are not enough" in text


def test_command_prints_json(mistral_file, capsys):
    text = run(capsys, mistral_file, "--memory", "24GiB", "--seq-len", "2048", "--json", status=1)
    printed = json.loads(text)
    assert (printed["fits"], printed["largest_batch"]) == (False, None)
    assert printed["estimate"] == json.loads(json.dumps(estimate(MISTRAL, seq_len=2048).to_json()))
    assert printed["peak_allocated_bytes"] == estimate(MISTRAL, seq_len=2048).peak_allocated_bytes
    assert [way["names"] for way in printed["ways"]][0] == ["LoRA instead of full"]
    assert {"name", "change", "saved_bytes", "time", "time_status", "cost", "fits"} <= set(
        printed["knobs"][0]
    )
    assert {"gpu", "fits", "free_bytes", "memory_bytes", "note"} == set(printed["gpus"][0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "much"], "'much' is no size: give one such as 24GiB"),
        (["--memory", "24GiB", "--gpu", "T4"], "not allowed with argument --memory"),
        (["--gpu", "K80"], "gpu 'K80' is not known here"),
        (["--memory", "24"], "argument --memory: '24' would be bytes: give a unit"),
        (["--memory", "0"], "argument --memory: '0' is no memory: give one above 0"),
        (
            ["--gpu", "T4", "--device", "cpu"],
            "--gpu 'T4' with --device cpu: a card's memory is not",
        ),
        (["--batch-size", "0"], "batch_size=0: give a whole number from 1"),
    ],
)
def test_command_refuses_bad_usage(mistral_file, capsys, arguments, said):
    try:
        status = cli.main(["plan", mistral_file, *arguments])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_command_takes_every_option_of_estimate(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    text = capsys.readouterr().out
    for name in Options.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text


def test_command_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from labkit.cli import main; main(['plan', 'bundled', '--gpu', 'T4'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'huggingface_hub'}\n"
        "print('loaded:', *sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=paths.root()
    )
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize(
    "options",
    [
        {"method": "qlora", "objective": "dpo", "batch_size": 4},
        {"batch_size": 10**9},
        {"batch_size": 10**9 + 7, "seq_len": 8192},
        {"batch_size": 2**39, "gradient_checkpointing": False, "objective": "dpo"},
    ],
    ids=str,
)
def test_a_plan_takes_a_fraction_of_a_second(options):
    seconds = []
    gc.disable()
    try:
        for _ in range(3):
            start = time.perf_counter()
            make_plan(LLAMA, 16 * GIB, None, **options)
            seconds.append(time.perf_counter() - start)
    finally:
        gc.enable()
    assert statistics.median(seconds) < 1.5  # the process's budget is 0.5 s, on a free machine
