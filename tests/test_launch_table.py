"""The launch table: the first configuration that fits, and that none before it does."""

import json

import pytest

from labkit.cli import main
from labkit.memory import estimate, fits, gpus, reference
from labkit.scale import config_path
from labkit.scale.launch_table import CARDS, METHODS, MODELS, ORDER, choose, launch_table
from labkit.scale.throughput import Cluster, step_time


@pytest.fixture(scope="module")
def table():
    return launch_table()


def test_the_table_has_a_row_for_every_model_method_and_card(table):
    assert [(row.model, row.method, row.gpu) for row in table] == [
        (model, method, card) for model in MODELS for method in METHODS for card in CARDS
    ]
    assert any(row.configuration is None for row in table)
    assert {row.file for row in table} >= {"1_gpu", "8_gpus_fsdp2", "8_gpus_zero3_offload"}


def test_every_row_fits_by_the_estimate_and_twice_its_batch_does_not(table):
    for row in table:
        if row.configuration is None:
            continue
        config, memory = reference.model(row.model), gpus.find(row.gpu).memory_bytes
        assert fits(config, memory, **row.options), row
        assert estimate(config, **row.options).peak_allocated_bytes == row.peak_bytes
        twice = {**row.options, "batch_size": 2 * row.batch_size}
        assert row.batch_size == 64 or not fits(config, memory, **twice), row
        assert row.host_bytes <= 2**40


def test_no_simpler_configuration_would_have_fitted(table):
    for row in table:
        config, memory = reference.model(row.model), gpus.find(row.gpu).memory_bytes
        place = ORDER.index(row.configuration) if row.configuration else len(ORDER)
        assert [reason.split(": ")[0] for reason in row.refused] == [
            one.name for one in ORDER[:place]
        ]
        for simpler in ORDER[:place]:
            if simpler.options.get("offload"):
                continue  # the host may be what is too small
            options = {"num_devices": simpler.devices, **simpler.options, "batch_size": 1}
            kept = {"method": row.method, "seq_len": row.seq_len, "loss_path": "fused"}
            dtype = {"dtype": "fp32" if row.method == "full" else "bf16", "autocast": True}
            assert not fits(config, memory, **kept, **dtype, **options), (row, simpler)


def test_every_configuration_has_its_file_and_its_devices():
    from labkit.scale import check_config

    for one in ORDER:
        plan = check_config(config_path(one.file))
        assert plan.processes == one.devices
        assert ("FSDP" in plan.engine) == (one.options.get("sharding") == "fsdp")
        assert (plan.engine == "DeepSpeed ZeRO-3") == (one.options.get("zero_stage") == 3)
        assert (plan.offload != "none") == ("offload" in one.options)
    assert [one.devices for one in ORDER] == sorted(one.devices for one in ORDER)


def test_full_tuning_of_8_billion_by_hand():
    # 16 B a parameter are 128 GB on one card and 16 GB on each of eight.
    row = choose("Meta-Llama-3-8B", "a100-80gb", "full")
    assert (row.file, row.devices, row.precision) == ("8_gpus_fsdp2", 8, "bf16 over fp32")
    assert row.refused[0].startswith("1 GPU: one row takes 149.")
    assert choose("Meta-Llama-3-8B", "H100", "lora").file == "1_gpu"
    assert choose("Meta-Llama-3-8B", "B200", "full").file == "1_gpu"


def test_full_tuning_of_70_billion_needs_a_large_host_or_two_machines():
    # Offloaded it takes 18 B a parameter on the host, half as much again with buffers.
    small = choose("Llama-2-70b", "A100 80GB", "full")
    assert small.configuration is None and len(small.refused) == len(ORDER)
    assert "the host would hold 1,734.47 GiB of 1,024.00 GiB" in small.refused[3]
    large = choose("Llama-2-70b", "A100 80GB", "full", host_bytes=2 * 2**40)
    assert large.file == "8_gpus_zero3_offload"
    assert large.host_bytes == round(1.5 * 18 * large_parameters())
    assert choose("Llama-2-70b", "H200", "full").file == "2_nodes_8_gpus_fsdp2"


def large_parameters() -> int:
    return estimate(reference.model("Llama-2-70b")).parameters


def test_deepspeed_cannot_divide_4_bit_weights_and_the_row_says_so():
    row = choose("Llama-2-70b", "T4", "qlora")
    assert row.configuration is None
    assert row.refused[3].startswith("8 GPUs, ZeRO-3, offload: method='qlora' with zero_stage=3")
    assert row.precision == "nf4, fp16"


def test_the_speed_is_the_throughput_models():
    row = choose("Meta-Llama-3-8B", "A100 80GB", "full")
    options = {name: value for name, value in row.options.items() if name != "num_devices"}
    step = step_time(
        reference.model("Meta-Llama-3-8B"), Cluster.of("A100 80GB", devices=8), **options
    )
    assert row.tokens_per_second == step.tokens_per_second
    low, high = row.tokens_per_second_range
    assert low < row.tokens_per_second < high


def test_larger_cards_never_need_more(table):
    places = {
        (row.model, row.method, row.gpu): ORDER.index(row.configuration)
        if row.configuration
        else len(ORDER)
        for row in table
    }
    for model in MODELS:
        for method in METHODS:
            order = [places[model, method, card] for card in ("T4", "RTX 4090", "A100 80GB")]
            assert order == sorted(order, reverse=True), (model, method, order)


def test_callers_mistakes_are_named():
    with pytest.raises(ValueError, match="gpu 'abacus' is not known"):
        choose("Llama-2-70b", "abacus")
    with pytest.raises(ValueError, match="no such file"):
        choose("no-such-model", "T4")
    with pytest.raises(ValueError, match="method='magic' is unknown"):
        choose("GPT-2", "T4", "magic")
    with pytest.raises(ValueError, match="seq_len=0"):
        choose("GPT-2", "T4", seq_len=0)
    with pytest.raises(ValueError, match="speed=1: no such option"):
        choose("Llama-2-70b", "T4", speed=1)


def test_command_line_prints_the_table_and_json(capsys):
    asked = ["launch-table", "Meta-Llama-3-8B", "--gpu", "h100", "--method", "full"]
    assert main(asked + ["--why"]) == 0
    printed = capsys.readouterr().out
    assert "8 GPUs, FSDP2" in printed and "labkit/scale/configs/8_gpus_fsdp2.yaml" in printed
    assert "    not 1 GPU: one row takes" in printed

    assert main(asked + ["--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["file"] == "8_gpus_fsdp2" and row["devices"] == 8
    assert row["peak_bytes"] > 2**30 and row["tokens_per_second"] > 1000

    assert main(["launch-table", "--gpu", "abacus"]) == 2
    assert capsys.readouterr().err.startswith("labkit: gpu 'abacus' is not known")
