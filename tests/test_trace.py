"""The traced estimate: against real steps, torch's own tracker, and the closed form."""

import contextlib
import dataclasses
import json

import psutil
import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from labkit import cli, memory
from labkit.memory import compare, fake, tracing
from labkit.memory.architecture import read
from labkit.memory.build import build_model
from labkit.memory.closed_form import build_options
from labkit.memory.phases import LAYER, LOSS, STEP
from labkit.memory.tape import Tape
from labkit.memory.watch import FORWARD

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 320, "vocab_size": 600, "max_position_embeddings": 512, **TOKENS,
}  # fmt: skip
CONFIGS = {
    "llama": SHAPE,
    "qwen3": SHAPE | {"head_dim": 32, "tie_word_embeddings": True},
    "mistral": SHAPE,
    "gemma": SHAPE | {"head_dim": 64},
    "gemma2": SHAPE | {"head_dim": 64},
    "phi": SHAPE,
    "phi3": SHAPE,
    "mixtral": SHAPE,
    "qwen3_moe": SHAPE
    | {"head_dim": 32, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 96},
    "gpt2": {"n_embd": 128, "n_layer": 3, "n_head": 4, "vocab_size": 600, "n_positions": 512}
    | TOKENS,
}
WIDE = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 8192,
}  # fmt: skip
METHODS = ("full", "freeze", "lora", "qlora", "prompt", "p-tuning", "prefix")
SMALL = {
    "seq_len": 64, "batch_size": 2, "lora_rank": 4, "num_virtual_tokens": 8, "dtype": "bf16",
    "loss_path": "padded",
}  # fmt: skip


def config(family: str) -> dict:
    return {"model_type": family, **CONFIGS[family]}


def ledger(family: str, real: bool, **options) -> tracing.Ledger:
    """One counted step, on real CPU tensors or on fake ones."""
    values = config(family)
    chosen = build_options(read(values), {**SMALL, "device": "cpu", **options})
    model = build_model(values, chosen, "cpu" if real else "meta")
    with contextlib.nullcontext() if real else fake.faking():
        if not real:
            fake.as_fake(model, chosen.double_quant)
        return tracing.run_step(model, None, chosen)


# ---- against real steps ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "again"),
    [(method, False) for method in METHODS] + [("full", True), ("qlora", True), ("prompt", True)],
)
def test_fake_tensors_take_what_real_ones_take(method, again):
    options = {"method": method, "gradient_checkpointing": again}
    pretended, real = (ledger("llama", real, **options) for real in (False, True))
    # The ids of virtual tokens, which PEFT holds outside the model, stay real among fake tensors.
    ids = 8 * SMALL["num_virtual_tokens"] * (method in ("prompt", "p-tuning", "prefix"))
    for phase, n_bytes in real.peaks.items():
        assert n_bytes - ids <= pretended.peaks[phase] <= n_bytes, phase
    assert pretended.saved_bytes == real.saved_bytes > 0
    assert pretended.modules == real.modules


@pytest.mark.parametrize(
    ("family", "method", "rel"),
    [
        ("qwen3", "lora", 1e-4),
        # Experts in fp32, as PEFT prepares them: torch's shapes of grouped products are for bf16.
        ("mixtral", "qlora", 1e-3),
    ],
)
def test_a_measured_step_is_the_traced_one(family, method, rel):
    options = {**SMALL, "method": method, "device": "cpu", "gradient_checkpointing": False}
    traced = memory.trace(config(family), **options)
    measured = memory.measure(config(family), **options)
    assert measured["saved activations"].measured_bytes == traced.saved_activations_bytes
    for phase, n_bytes in traced.phases.items():
        assert measured[f"peak: {phase}"].measured_bytes == pytest.approx(n_bytes, rel=rel)


def test_torchs_own_tracker_finds_the_same_peak():
    values = config("llama")
    options = build_options(read(values), {**SMALL, "device": "cpu"})
    model = build_model(values, options, "meta")
    with fake.faking():
        fake.as_fake(model)
        optimizer = tracing._ready_optimizer(model, options)
        batch = tracing._batch(options)
        tracker = MemTracker()
        tracker.track_external(model, optimizer, *batch.tensors)
        with tracker:
            unmasked = dataclasses.replace(batch, mask=None)
            tracing._loss(model, None, unmasked, options).backward()
            optimizer.step()
        (found,) = tracker.get_tracker_snapshot("peak").values()
    traced = memory.trace(values, **SMALL, device="cpu")
    assert found["Total"] == traced.peak_allocated_bytes


# ---- against the closed form -------------------------------------------------------------------


def agreement(family: str, **options) -> memory.Agreement:
    return compare(config(family), **{**SMALL, **options})


# A layer that is computed again drops a prefix, so that training fails.
GRID = [(method, "kept") for method in METHODS]
GRID += [(method, "reentrant") for method in METHODS if method != "prefix"]
GRID += [(method, "as needed") for method in ("full", "freeze", "lora", "qlora")]


@pytest.mark.parametrize(("method", "how"), GRID)
def test_both_engines_agree_on_every_method(method, how):
    found = agreement(
        "llama",
        method=method,
        gradient_checkpointing=how != "kept",
        reentrant=how == "reentrant",
        device="cpu",
    )
    # 2 % is the bar of the course; these are far below it.
    assert found.verdict == "agree"
    assert max(abs(one) for one in found.differences.values()) < 0.005, found.differences


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {"method": "full"}),
        ("qwen3", {"method": "lora"}),
        ("gpt2", {"method": "full", "gradient_checkpointing": False}),
        ("gpt2", {"method": "lora"}),
        ("gpt2", {"method": "qlora"}),
        ("mistral", {"method": "lora"}),
        ("mistral", {"method": "qlora", "gradient_checkpointing": False}),
        ("gemma", {"method": "full"}),
        ("gemma2", {"method": "lora"}),
        ("phi", {"method": "full", "gradient_checkpointing": False}),
        ("phi3", {"method": "lora"}),
        ("mixtral", {"method": "full"}),
        ("llama", {"dtype": "fp32", "autocast": True}),
        ("llama", {"dtype": "fp16", "attention": "eager", "gradient_checkpointing": False}),
        ("llama", {"optimizer": "sgd", "padding": True, "gradient_checkpointing": False}),
        ("llama", {"optimizer": "adamw", "fused": True, "accumulation_steps": 4}),
        ("llama", {"method": "lora", "loss_path": "upcast", "foreach": False}),
        ("llama", {"method": "lora", "batch_size": 1, "loss_path": "shifted"}),
        ("llama", {"objective": "dpo", "method": "lora", "gradient_checkpointing": False}),
    ],
    ids=str,
)
def test_both_engines_agree_on_other_families_and_options(family, options):
    found = agreement(family, **options)
    assert found.verdict == "agree", str(found)


ATTENTION = "q_proj,k_proj,v_proj,o_proj"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"method": "full", "gradient_checkpointing": False}),
        ("mixtral", {"method": "lora"}),
        ("mixtral", {"method": "lora", "gradient_checkpointing": False}),
        ("mixtral", {"method": "lora", "reentrant": False, "batch_size": 8, "seq_len": 512}),
        ("mixtral", {"method": "lora", "target_modules": ATTENTION}),
        ("mixtral", {"method": "qlora"}),
        ("mixtral", {"method": "qlora", "kbit_prepared": False, "gradient_checkpointing": False}),
        ("qwen3_moe", {"method": "full", "optimizer": "sgd"}),
        ("qwen3_moe", {"method": "lora"}),
        ("qwen3_moe", {"method": "lora", "gradient_checkpointing": False, "batch_size": 8}),
        ("qwen3_moe", {"method": "qlora", "gradient_checkpointing": False}),
    ],
    ids=str,
)
def test_both_engines_agree_on_stacked_experts(family, options):
    found = agreement(family, **options)
    assert found.verdict == "agree", str(found)
    closed, traced = found.closed, found.traced
    assert closed.parameters == traced.parameters
    assert closed.trainable_parameters == traced.trainable_parameters
    assert closed.saved_activations_bytes == pytest.approx(traced.saved_activations_bytes, rel=0.02)


@pytest.mark.parametrize("task", [memory.trace, memory.measure, compare])
def test_experts_that_the_installed_transformers_has_not_are_refused(task):
    with pytest.raises(ValueError, match="experts='separate': the installed transformers stacks"):
        task(config("mixtral"), **SMALL, experts="separate", device="cpu")


def test_models_without_experts_do_not_care():
    found = agreement("llama", experts="separate")
    assert found.verdict == "agree"
    assert found.closed == memory.estimate(config("llama"), **SMALL)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_both_engines_agree_at_the_width_of_a_real_model(method):
    before = psutil.Process().memory_info().rss
    found = compare(WIDE, method=method, seq_len=4096)
    assert abs(found.difference) < 0.002, str(found)
    # 1.5 billion numbers, and next to no memory for them.
    assert found.traced.parameters == 1_486_901_248
    assert psutil.Process().memory_info().rss - before < 200 * 2**20
    if method == "full":
        assert found.traced.phases[STEP] == pytest.approx(10 * 1_486_901_248, rel=0.002)


def test_a_known_difference_is_explained_and_an_unknown_one_flagged():
    options = {"dtype": "fp32", "seq_len": 256, "gradient_checkpointing": False}
    found = agreement("llama", **options)
    assert found.verdict == "explained" and abs(found.difference) > 0.02
    (reason,) = found.reasons
    assert "sdpa in fp32 with shared keys" in reason.what and reason.bytes < 0
    assert abs(found.unexplained_bytes) < 0.02 * found.traced.peak_allocated_bytes
    flagged = dataclasses.replace(found, reasons=())
    assert flagged.verdict == "unexplained"
    assert "verdict: unexplained" in str(flagged)


# ---- what a trace tells ------------------------------------------------------------------------


def test_modules_add_up():
    found = memory.trace(config("llama"), **SMALL, device="cpu", gradient_checkpointing=False)
    whole, layers = found.module(""), [found.module(f"model.layers.{n}") for n in range(3)]
    assert whole.parameters == found.parameters == found.trainable_parameters
    assert whole.activations_bytes == found.saved_activations_bytes
    assert whole.gradients_bytes == 2 * found.parameters
    one_layer = 2 * (128 * 128 + 128 * 64) + 3 * 128 * 320 + 2 * 128
    assert {layer.parameters for layer in layers} == {one_layer}
    assert {layer.weights_bytes for layer in layers} == {2 * one_layer}
    # The first layer keeps the ids' embedding, and all keep the same of their own.
    assert layers[1].activations_bytes == layers[2].activations_bytes
    up = found.module("model.layers.1.mlp.up_proj")
    assert (up.depth, up.kind) == (5, "Linear")
    assert up.activations_bytes == 2 * 64 * 320 * 2  # rows, tokens, width, bytes: for the product
    with pytest.raises(KeyError, match="no module is called 'model.layers.3'"):
        found.module("model.layers.3")


def test_kinds_are_what_is_alive_at_the_peak():
    found = memory.trace(config("llama"), **SMALL)
    assert sum(found.kinds.values()) == found.peak_allocated_bytes == max(found.phases.values())
    assert found.phase == STEP and "optimizer step: _foreach_sqrt" in found.moment
    n = found.parameters
    inputs = 2 * 2 * 64 * 8  # mask and labels; the embedding keeps the ids
    assert found.kinds["gradients"] == found.kinds["working memory"] - inputs == 2 * n
    assert found.kinds["optimizer states"] == pytest.approx(4 * n, rel=1e-3)
    as_json = json.loads(json.dumps(found.to_json()))
    assert as_json["modules"][0]["name"] == "" and as_json["phases"][STEP] == found.phases[STEP]


def test_a_gpu_keeps_masks_of_one_byte_and_flash_attention():
    options = {**SMALL, "method": "lora", "gradient_checkpointing": False}
    gpu, cpu = (memory.trace(config("llama"), **options, device=name) for name in ("cuda", "cpu"))
    # Inputs of seven adapters in three layers; those that read the embedding need no mask, because
    # no gradient flows to it.
    numbers = 2 * 64 * (3 * (6 * 128 + 320) - 3 * 128)
    more = cpu.saved_activations_bytes - gpu.saved_activations_bytes
    assert more == pytest.approx((4 - 1) * numbers, rel=0.001)


def test_scratch_of_flash_attentions_backward_by_hand():
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    query, key = (torch.empty(2, heads, 64, 32, dtype=torch.bfloat16) for heads in (8, 2))
    sums, exact, each_head = 2 * 8 * 64 * 4, 2 * 8 * 64 * 32 * 4, 2 * 2 * 8 * 64 * 32 * 2
    assert fake.kernel_scratch(backward, (query, query, key)) == sums + exact + each_head
    assert fake.kernel_scratch(backward, (query, query, query)) == sums + exact
    assert fake.kernel_scratch(torch.ops.aten.mm.default, (query, query, key)) == 0


def test_functions_of_torch_are_put_back():
    before = torch.nn.functional.dropout, torch.is_autocast_enabled
    with pytest.raises(RuntimeError), fake.cuda_kernels():
        assert torch.nn.functional.dropout is not before[0]
        raise RuntimeError
    assert (torch.nn.functional.dropout, torch.is_autocast_enabled) == before


def test_dpo_keeps_the_policy_while_the_reference_answers():
    options = {**SMALL, "batch_size": 1, "method": "lora"}
    asked = memory.trace(config("llama"), objective="dpo", **options)
    known = memory.trace(config("llama"), objective="dpo", precompute_reference=True, **options)
    assert asked.phases[LOSS] > known.phases[LOSS]
    assert asked.phases[LAYER] == known.phases[LAYER]


def test_the_forward_pass_belongs_to_the_loss():
    found = ledger("llama", real=False, gradient_checkpointing=False)
    traced = memory.trace(config("llama"), **SMALL, device="cpu", gradient_checkpointing=False)
    assert traced.phases[LOSS] == max(found.peaks[FORWARD], found.peaks[LOSS])


# ---- what cannot be traced ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "adamw-8bit"}, "optimizer='adamw-8bit': the kernels of bitsandbytes"),
        ({"attention": "flash_attention_2"}, "trace 'sdpa', which runs the same kernel"),
        ({"method": "prefix"}, "give gradient_checkpointing=False"),
        ({"num_devices": 2}, "num_devices=2: a step is measured on one device"),
        ({"method": "lora", "lora_rank": 500}, "lora_rank=500 is more than"),
        ({"precision": "bf16"}, "precision='bf16': no such option"),
    ],
    ids=str,
)
def test_what_cannot_be_traced_is_said_in_one_line(options, said):
    with pytest.raises(ValueError) as caught:
        memory.trace(config("llama"), **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ---- the command -------------------------------------------------------------------------------


def test_command_prints_both_side_by_side(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")
    arguments = ["estimate", str(file), "--trace", "--seq-len", "64", "--loss-path", "padded"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "closed form" in text and "verdict: agree" in text
    (layer,) = [line for line in text.splitlines() if line.startswith("model.layers.0-1 ")]
    assert layer.split()[1] == "172,288"
    assert cli.main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"] == "agree" and abs(printed["difference"]) < 0.02
    assert printed["traced"]["peak_allocated_bytes"] == printed["traced"]["phases"][STEP]
    assert cli.main([*arguments, "--task", "merge"]) == 2
    assert "--trace with --task merge" in capsys.readouterr().err


# ---- the tape's forward pass, by hand ----------------------------------------------------------


def test_forward_holds_what_is_read_later_and_what_backward_needs():
    tape = Tape()
    x = tape.source("x", 10, 4)
    wide = tape.operation("wide", [x], 100, 4)
    narrow = tape.operation("narrow", [wide], 10, 4, kept=[wide])
    tape.add("residual", narrow, x)
    # At `narrow`: x waits for the sum, wide is kept, narrow is made.
    climb = tape.forward()
    assert (climb.peak_bytes, climb.operation) == (40 + 400 + 40 + 40, "residual")
    # As needed only: it stops at `narrow`, before its result; x waits all the same.
    climb = tape.forward(needed_only=True)
    assert (climb.peak_bytes, climb.operation) == (40 + 400, "wide")
    # Backward first needs a tensor at `narrow`, which has its result's gradient, the sum's own.
    assert tape.gradients_before_need() == 40


def test_forward_counts_what_a_name_holds():
    tape = Tape()
    x = tape.source("x", 1000, 1)
    with tape.holding(x):
        small = tape.operation("small", [x], 1, 1)
        big = tape.operation("big", [small], 1000, 1)
    tape.operation("last", [big], 1, 1)
    assert tape.forward().peak_bytes == 1000 + 1 + 1000
