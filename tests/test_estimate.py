"""The closed-form estimate: counted against transformers, autograd, and what others measured."""

import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import time
import weakref

import pytest
import torch
import transformers
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labkit import cli, paths
from labkit.memory import (
    Options,
    estimate,
    estimate_generation,
    estimate_merge,
    gpus,
    reference,
    step_bytes,
)
from labkit.memory.architecture import read
from labkit.memory.closed_form import moments
from labkit.memory.options import METHODS, check_one_step
from labkit.memory.phases import Step
from labkit.memory.reference import rows
from labkit.memory.sharding import deepspeed_zero3, zero_states
from labkit.memory.state import nf4_bytes
from labkit.memory.tape import Tape

PUBLIC = reference.public()
MISTRAL = reference.model("Mistral-7B-v0.1")
GIB = 2**30

# ---- parameters, against the models that transformers builds -----------------------------------

SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 320,
    "vocab_size": 600,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = {name: SMALL[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
GPT2 = {"n_embd": 128, "n_layer": 3, "n_head": 4, "vocab_size": 600, "n_positions": 512}
FAMILIES = {
    "llama": ("LlamaConfig", SMALL),
    "llama, biases, tied": (
        "LlamaConfig",
        SMALL | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama, other head size": ("LlamaConfig", SMALL | {"head_dim": 48}),
    "mistral": ("MistralConfig", SMALL),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen3": ("Qwen3Config", SMALL | {"head_dim": 32}),
    "qwen3, tied": ("Qwen3Config", SMALL | {"tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    "gemma": ("GemmaConfig", SMALL | {"head_dim": 64}),
    "gemma2": ("Gemma2Config", SMALL | {"head_dim": 64}),
    "gemma3": ("Gemma3TextConfig", SMALL | {"head_dim": 64}),
    "phi": ("PhiConfig", SMALL),
    "phi3": ("Phi3Config", SMALL),
    "gpt2": ("GPT2Config", GPT2 | TOKENS | {"attn_pdrop": 0.0}),
    "mixtral": ("MixtralConfig", SMALL),
}


def make_config(family: str):
    name, values = FAMILIES[family]
    return getattr(transformers, name)(**values)


def lora(family: str, rank: int, dropout: float = 0.0) -> LoraConfig:
    """An adapter on all linear layers; GPT-2's lie the other way round."""
    return LoraConfig(
        r=rank,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_transformers(family):
    config = make_config(family)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    real = sum(parameter.numel() for parameter in model.parameters())
    for written in (config.to_dict(), config.to_diff_dict()):
        assert read(written).parameters == real
    assert estimate(config.to_dict(), seq_len=64).trainable_parameters == real


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "phi3", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "prompt", "p-tuning", "prefix"])
def test_trained_numbers_are_those_of_peft(family, method):
    config = make_config(family)
    width = 24
    adapter = {
        "lora": lora(family, 3),
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
        "p-tuning": PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=7, encoder_hidden_size=width
        ),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    }[method]
    model = get_peft_model(transformers.AutoModelForCausalLM.from_config(config), adapter)
    real = sum(p.numel() for p in model.parameters() if p.requires_grad)
    options = {"lora_rank": 3, "num_virtual_tokens": 7, "encoder_hidden_size": width, "seq_len": 64}
    assert estimate(config.to_dict(), method=method, **options).trainable_parameters == real


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("targets", ["all-linear", ["k_proj"]], ids=str)
def test_trained_numbers_of_stacked_experts_are_those_of_peft(family, targets):
    config = make_config(family)
    adapter = LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        model = get_peft_model(model, adapter)
    real = sum(p.numel() for p in model.parameters() if p.requires_grad)
    options = {"method": "lora", "lora_rank": 3, "target_modules": targets, "seq_len": 64}
    assert estimate(config.to_dict(), **options).trainable_parameters == real


def test_stacked_experts_by_hand():
    mixtral = make_config("mixtral").to_dict()  # 8 experts, 128 wide, 320 inside, 3 layers
    lora = {"method": "lora", "lora_rank": 4, "lora_dropout": 0.0, "seq_len": 64}
    attention = 4 * (2 * (128 + 128) + 2 * (128 + 64))
    router = 4 * (128 + 8)
    stacked = 8 * (8 * (128 + 640) + 4 * (320 + 128))  # gate and up joined have twice the rank
    separate = 8 * 4 * 3 * (128 + 320)
    for experts, adapters in (("stacked", stacked), ("separate", separate)):
        found = estimate(mixtral, **lora, experts=experts)
        assert found.trainable_parameters == 3 * (attention + router + adapters)
        assert found.parameters == estimate(mixtral, seq_len=64).parameters
    # Every layer keeps a copy of its experts, and backward makes a gradient of one.
    less, more = (
        estimate(mixtral, **lora, experts=experts, gradient_checkpointing=False)
        for experts in ("separate", "stacked")
    )
    copies = 2 * 3 * 8 * 3 * 128 * 320
    assert more.saved_activations_bytes - less.saved_activations_bytes > 0.95 * copies
    assert estimate(mixtral, method="lora", target_modules="w1,w3", lora_rank=4, seq_len=64)
    with pytest.raises(ValueError, match="target_modules lacks 'w3': stacked experts have it in"):
        estimate(mixtral, method="lora", target_modules="q_proj,w1", seq_len=64)


def test_bitsandbytes_leaves_stacked_experts_as_they_are():
    mixtral = reference.model("Mixtral-8x7B-Instruct-v0.1")
    experts = 32 * (8 * 3 * 4096 * 14336 + 8 * 4096)

    def weights(**options):
        found = estimate(mixtral, method="qlora", seq_len=64, **options)
        return found, sum(one.bytes for one in found.terms if "weights" in one.name)

    prepared, most = weights()
    plain, less = weights(kbit_prepared=False)
    _, packed = weights(kbit_prepared=False, experts="separate")
    assert most - less == pytest.approx(2 * experts, rel=0.001)
    assert less - packed == pytest.approx((2 - 0.5) * experts, rel=0.001)
    assert less > 2 * experts
    (note,) = [note for note in prepared.notes if "bitsandbytes issue 1849" in note]
    assert "counted in 32 bits" in note
    (note,) = [note for note in plain.notes if "bitsandbytes issue 1849" in note]
    assert "counted as they are" in note


def test_experts_that_are_adapted_take_no_dropout_and_say_so():
    mixtral = make_config("mixtral").to_dict()
    options = {"method": "lora", "lora_rank": 4, "seq_len": 64}
    asked, none = (estimate(mixtral, **options, lora_dropout=rate) for rate in (0.1, 0.0))
    assert asked == none
    assert any("without lora_dropout" in note for note in asked.notes)
    for changed in ({"experts": "separate"}, {"target_modules": "q_proj"}):
        asked, none = (
            estimate(mixtral, **options, **changed, lora_dropout=rate) for rate in (0.1, 0.0)
        )
        assert asked.peak_allocated_bytes > none.peak_allocated_bytes
        assert not any("lora_dropout" in note for note in asked.notes)


PEAKS_OF_MIXTURES = [
    36731213696, 48769456000, 57743306752, 65229647872, 21205460864, 28422317952,
]  # fmt: skip
"""What the closed form said of the public rows when it knew of transformers 4 only."""


def test_public_rows_of_transformers_4_have_separate_experts():
    mixtures = [row for row in rows() if read(row.config).experts]
    assert len(mixtures) == 6
    for row in mixtures:
        assert row.versions["transformers"] == "4.48.1"
        assert row.options["experts"] == "separate"
    assert [row.estimate().peak_allocated_bytes for row in mixtures] == PEAKS_OF_MIXTURES


def test_a_known_model_has_its_known_parameters():
    assert read(MISTRAL).parameters == 7_241_732_096
    assert read({"model_type": "gpt2"}).parameters == 124_439_808


# ---- what others measured ----------------------------------------------------------------------


@pytest.mark.parametrize("row", rows("bar"), ids=lambda row: row.name)
def test_the_bar_rows_are_met_to_a_hundredth_of_a_percent(row):
    assert abs(row.error()) < 1e-4


@pytest.mark.parametrize(
    "row", [*rows("held out"), *rows("once held out"), *rows("sharded")], ids=lambda row: row.name
)
def test_other_public_rows(row):
    assert abs(row.error()) < (0.0035 if row.group == "once held out" else 0.014)


def test_the_bars_of_the_course_hold():
    alone = [abs(row.error()) for row in rows("held out")]
    assert len(alone) == 16 and statistics.median(alone) <= 0.0002 and max(alone) <= 0.0111
    # The term for their tables was written after these had been missed by up to 3.4 %.
    later = [abs(row.error()) for row in rows("once held out")]
    assert len(later) == 6 and max(later) <= 0.0033
    sharded = [abs(row.error()) for row in rows("sharded")]
    assert statistics.mean(sharded) <= 0.03 and max(sharded) <= 0.08


def test_the_phase_that_wins():
    common = {"seq_len": 4096, "batch_size": 4, "attention": "flash_attention_2"}
    assert estimate(MISTRAL, **common).phase == "optimizer step"
    assert estimate(MISTRAL, method="lora", lora_dropout=0.0, **common).phase == "loss"
    # Dropout costs a copy of each adapter's input and its mask, while a layer is computed again.
    assert estimate(MISTRAL, method="lora", **common).phase == "layer backward"
    # A large model over a small vocabulary: one layer weighs more than the logits.
    llama = reference.model("Llama-2-70b")
    assert estimate(llama, method="qlora", **common).phase == "layer backward"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_table_of_the_zero_paper(stage):
    zero = PUBLIC["zero"]
    states = zero_states(zero["parameters"], stage, zero["devices"])
    assert states / 1e9 == pytest.approx(zero["gigabytes"][str(stage)], rel=0.005)
    found = estimate(MISTRAL, zero_stage=stage, num_devices=zero["devices"], seq_len=128)
    n = found.parameters
    assert found.model_states_bytes == pytest.approx(zero_states(n, stage, 64), rel=1e-6)
    assert found.peak_allocated_bytes > found.model_states_bytes


@pytest.mark.parametrize("offload", ["none", "optimizer", "all"])
def test_deepspeeds_own_estimates(offload):
    table = PUBLIC["deepspeed"]
    device, host = deepspeed_zero3(
        table["parameters"], table["largest_layer"], table["devices"], offload
    )
    want_device, want_host = table["gib"][offload]
    assert device / GIB == pytest.approx(want_device, abs=0.011)
    assert host / GIB == pytest.approx(want_host, rel=0.03)


def test_lora_of_gpt3():
    table = PUBLIC["lora"]
    shape = {"model_type": "llama", "vocab_size": 50257, "num_attention_heads": 96}
    shape |= {"hidden_size": table["hidden"], "num_hidden_layers": table["layers"]}
    shape |= {"intermediate_size": 4 * table["hidden"]}
    for rank, numbers in table["trainable"].items():
        found = estimate(shape, method="lora", lora_rank=int(rank), target_modules="q_proj,v_proj")
        assert found.trainable_parameters == pytest.approx(numbers, rel=0.005)


def test_bits_of_nf4():
    n = 4096 * 4096
    for double, bits in ((False, PUBLIC["qlora"]["without"]), (True, PUBLIC["qlora"]["with"])):
        packed, constants = nf4_bytes(n, double)
        assert 8 * packed / n == 4
        assert 8 * constants / n == pytest.approx(bits, rel=0.006)


# ---- what autograd keeps, against real models --------------------------------------------------

ROWS, LENGTH = 2, 64


class Ids:
    """Stands in for a tokenizer: the same ids whatever is said."""

    def apply_chat_template(self, talks, **options):
        class Batch(dict):
            def to(self, device):
                return self

        ids = torch.randint(0, 600, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
        return Batch(input_ids=ids, attention_mask=torch.ones_like(ids))


def build(family: str, method: str, dtype: str, attention: str, dropout: float):
    """A small real model, ready to be trained by a method."""
    config = make_config(family)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=kind
    )
    # Trainers turn the cache off; a prefix is handed over as one.
    model.config.use_cache = method == "prefix"
    if method == "qlora":
        quantize(model, kind)
    if method in ("lora", "qlora"):
        return get_peft_model(model, lora(family, 4, dropout)), config
    if method == "prefix":
        adapter = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
        return get_peft_model(model, adapter), config
    if method == "prompt":
        adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
        return get_peft_model(model, adapter), config
    if method == "freeze":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(f".{layer}." in name for layer in (1, 2)))
    return model, config


def quantize(model, kind) -> None:
    """Put bitsandbytes' 4-bit layers in the place of all linear layers but the head."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, torch.nn.Linear) or name == "lm_head":
            continue
        four_bit = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=kind,
            quant_type="nf4",
        )
        four_bit.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4"
        )
        if layer.bias is not None:
            four_bit.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, four_bit.to("cpu"))
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)


def kept(family, method, *, dtype="fp32", attention="sdpa", dropout=0.0, autocast=False, again):
    """(counted by autograd's hooks, estimated) bytes that are kept for backward."""
    torch.manual_seed(0)
    model, config = build(family, method, dtype, attention, dropout)
    if again:
        model.activation_checkpointing_enable()
        if method in ("lora", "qlora"):
            model.enable_input_require_grads()
    real = step_bytes(model, Ids(), [{"messages": []}] * ROWS, bf16=autocast).activations
    found = estimate(
        config.to_dict(),
        method=method,
        lora_rank=4,
        lora_dropout=dropout,
        num_virtual_tokens=8,
        batch_size=ROWS,
        seq_len=LENGTH,
        dtype=dtype,
        autocast=autocast,
        attention=attention,
        gradient_checkpointing=again,
        loss_path="padded",  # that of the installed transformers
        kbit_prepared=False,
        device="cpu",
    )
    return real, found.saved_activations_bytes


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prefix", "prompt", "freeze"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_what_is_kept_for_backward(family, method, again):
    if method == "prefix" and again:
        pytest.skip("a recomputed layer drops the prefix: this training fails")
    if method == "qlora" and family == "gpt2":
        pytest.skip("bitsandbytes does not quantize GPT-2's Conv1D here")
    real, found = kept(family, method, again=again)
    assert found == pytest.approx(real, rel=0.001)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"dtype": "bf16"}),
        ("llama", {"autocast": True}),
        ("llama", {"attention": "eager", "dtype": "bf16"}),
        ("gpt2", {"attention": "eager"}),
        ("qwen2", {}),
        ("mistral", {"attention": "eager"}),
        ("gemma", {}),
        ("gemma2", {"attention": "eager"}),
        ("gemma3", {}),
        ("phi", {}),
        ("phi3", {}),
        ("mixtral", {}),
        ("qwen3_moe", {}),
    ],
    ids=str,
)
def test_what_full_fine_tuning_keeps_in_other_families_and_precisions(family, options):
    real, found = kept(family, "full", again=False, **options)
    assert found == pytest.approx(real, rel=0.006)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"dtype": "bf16", "dropout": 0.1}),
        ("lora", {"autocast": True, "dropout": 0.1}),
        ("qlora", {"dtype": "bf16", "dropout": 0.1}),
    ],
    ids=str,
)
def test_what_adapters_keep_in_other_precisions(method, options):
    real, found = kept("llama", method, again=False, **options)
    assert found == pytest.approx(real, rel=0.006)


def test_the_bundled_model():
    config = json.loads((paths.base_model_dir() / "config.json").read_text(encoding="utf-8"))
    step = estimate("bundled", dtype="fp32", batch_size=8, seq_len=128, device="cpu")
    assert step.trainable_parameters == step.parameters == read(config).parameters
    assert step.model_states_bytes == 16 * step.parameters


# ---- the height of a real step, operation by operation -----------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive while it is on, without the model's own."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        own = [*model.parameters(), *model.buffers()]
        self.known = {tensor.untyped_storage()._cdata for tensor in own}
        self.alive: dict[int, int] = {}
        self.phase, self.peaks = "forward", {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return result

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.known or storage._cdata in self.alive:
            return
        self.alive[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), sum(self.alive.values()))


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_height_of_each_phase_is_that_of_a_real_step(method, again):
    torch.manual_seed(0)
    model, config = build("llama", method, "bf16", "eager", dropout=0.0)
    model.train()
    if again:
        model.activation_checkpointing_enable({"use_reentrant": True})
    inner = model.get_base_model() if method == "lora" else model
    ids = Ids().apply_chat_template(None)["input_ids"]
    mask, labels = torch.ones_like(ids), ids.clone()
    with Live(model) as live:
        for given in (ids, mask, labels):
            live.see(given)

        def layers_begin(module, inputs, output):
            inputs[0].register_hook(lambda gradient: setattr(live, "phase", "layer backward"))

        inner.model.norm.register_forward_hook(layers_begin)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        live.phase = "loss"
        loss.backward()
    arch = read(config.to_dict())
    options = Options(
        method=method, lora_rank=4, lora_dropout=0.0, batch_size=ROWS, seq_len=LENGTH,
        attention="eager", gradient_checkpointing=again, loss_path="padded", device="cpu",
    )  # fmt: skip
    step = Step(arch, options)
    always = sum(one.bytes for one in step.lasting if one.name != "inputs")
    heights = {"forward": 0, "loss": 0, "layer backward": 0}
    for moment in step.moments():
        forward = moment.what == "the loss is computed from the logits"
        phase = "forward" if forward else moment.phase
        heights[phase] = max(heights.get(phase, 0), moment.bytes - always)
    for phase, peak in live.peaks.items():
        assert heights[phase] == pytest.approx(peak, rel=0.01), phase


# ---- the tape, by hand -------------------------------------------------------------------------


def test_a_product_keeps_a_factor_only_for_the_other_ones_gradient():
    tape = Tape()
    frozen = tape.source("frozen", 10, 4, grad=False)
    tape.multiply("product", frozen, tape.source("trained", 10, 4))
    assert [value.name for value in tape.kept()] == ["frozen"]


def test_a_sum_passes_its_gradient_on_and_frozen_operations_keep_nothing():
    tape = Tape()
    x, y = tape.source("x", 10, 4), tape.source("y", 10, 4)
    tape.add("sum", x, y)
    assert tape.kept_bytes() == 0
    assert tape.backward().peak_bytes == 40  # one gradient, shared by all three
    still = Tape()
    a = still.source("a", 10, 4, grad=False)
    still.multiply("square", a, a)
    assert still.kept() == [] and still.backward().peak_bytes == 0


def test_what_was_kept_is_freed_on_the_way_back():
    tape = Tape()
    x = tape.source("x", 10, 4)
    first = tape.operation("first", [x], 10, 4, kept=[x])
    big = tape.source("big", 1000, 4, grad=False)
    tape.operation("second", [first], 10, 4, kept=[big])
    # At `second`: x and big are kept, and two gradients; at `first` big is gone.
    climb = tape.backward()
    assert (climb.peak_bytes, climb.operation) == (40 + 4000 + 80, "second")


# ---- orderings ---------------------------------------------------------------------------------

BASE = {"batch_size": 2, "seq_len": 512, "target_modules": "all-linear"}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "gpt2", "mixtral"])
def test_qlora_takes_less_than_lora_and_lora_less_than_full(family):
    # Wide enough that weights weigh something, as they do in real models.
    config = make_config(family).to_dict()
    wide = {"hidden_size": 2048, "n_embd": 2048, "intermediate_size": 5632, "head_dim": 512}
    config |= {name: value for name, value in wide.items() if name in config}
    config |= {"moe_intermediate_size": 2048} if "moe_intermediate_size" in config else {}
    peaks = [
        estimate(config, method=method, kbit_prepared=False, **BASE).peak_allocated_bytes
        for method in ("qlora", "lora", "full")
    ]
    assert peaks == sorted(peaks) and len(set(peaks)) == 3


@pytest.mark.parametrize("method", ["full", "freeze", "lora", "qlora", "prompt", "prefix"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("batch_size", (1, 2, 3, 8, 64)),
        ("seq_len", (16, 17, 512, 4096)),
        ("lora_rank", (1, 8, 64)),
        ("num_virtual_tokens", (1, 20, 200)),
        ("accumulation_steps", (1, 4)),
        ("lora_dropout", (0.0, 0.1)),
        ("gradient_checkpointing", (True, False)),
        ("loss_path", ("fused", "padded", "shifted")),
        ("objective", ("sft", "dpo")),
        ("double_quant", (True, False)),
        ("kbit_prepared", (False, True)),
        ("padding", (False, True)),
        ("attention", ("flash_attention_2", "sdpa", "eager")),
        ("foreach", (False, True)),
        ("optimizer", ("sgd", "adamw-8bit", "adamw")),
        ("optimizer", ("paged-adamw-8bit", "adamw-8bit")),
    ],
)
def test_more_of_anything_never_takes_less(method, again, name, values):
    options = {**BASE, "method": method, "gradient_checkpointing": again}
    peaks = [
        estimate(MISTRAL, **(options | {name: value})).peak_allocated_bytes for value in values
    ]
    assert peaks == sorted(peaks)


@pytest.mark.parametrize(
    ("key", "values"),
    [("num_hidden_layers", (1, 2, 40)), ("vocab_size", (100, 50_000)), ("hidden_size", (64, 4096))],
)
def test_more_model_never_takes_less(key, values):
    peaks = [
        estimate(MISTRAL | {key: value}, method="lora", lora_rank=2, **BASE).peak_allocated_bytes
        for value in values
    ]
    assert peaks == sorted(peaks) and len(set(peaks)) == len(values)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("sharding", [{"sharding": "fsdp"}, {"zero_stage": 3}])
def test_more_devices_never_take_more_on_each(method, sharding):
    peaks = [
        estimate(MISTRAL, method=method, num_devices=n, **sharding, **BASE).peak_allocated_bytes
        for n in (2, 4, 64)
    ]
    assert peaks == sorted(peaks, reverse=True)


def test_offloading_moves_bytes_to_the_host():
    here, there = (
        estimate(MISTRAL, zero_stage=3, num_devices=8, offload=where, **BASE)
        for where in ("none", "cpu")
    )
    assert there.peak_allocated_bytes < here.peak_allocated_bytes
    assert (here.host_bytes, there.host_bytes) == (0, round(18 * 1.5 * here.parameters))


def test_every_option_gives_terms_that_sum_and_explain_themselves():
    tried = {
        "method": ("full", "freeze", "lora", "qlora", "prompt", "p-tuning", "prefix"),
        "objective": ("sft", "dpo"),
        "attention": ("eager", "sdpa", "flash_attention_2"),
        "optimizer": ("adamw", "adamw-8bit", "paged-adamw-8bit", "sgd", "adafactor"),
        "dtype": ("fp32", "fp16", "bf16"),
        "autocast": (True,),
        "fused": (True,),
        "gradient_checkpointing": (False,),
        "zero_stage": (0, 1, 2),
        "sharding": ("fsdp",),
        "device": ("cpu",),
        "precompute_reference": (True,),
    }
    for name, values in tried.items():
        for value in values:
            for method in ("full", "qlora"):
                options = {"method": method, "num_devices": 2, name: value}
                found = estimate(MISTRAL, **options)
                assert sum(one.bytes for one in found.terms) == found.peak_allocated_bytes
                assert len({one.name for one in found.terms}) == len(found.terms)
                assert max(found.phases.values()) == found.peak_allocated_bytes
                assert all(one.bytes > 0 and one.formula and one.source for one in found.terms)
                statuses = {one.status for one in found.terms}
                assert statuses <= {"measured", "derived", "unverified"}


# ---- optimizers, by hand -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "per_parameter"),
    [
        ({}, 10),  # weight 2, gradient 2, means 4, their roots 2
        ({"fused": True}, 8),
        ({"dtype": "fp32"}, 20),
        ({"dtype": "fp32", "fused": True}, 16),
        ({"optimizer": "sgd"}, 4),
    ],
    ids=str,
)
def test_bytes_of_the_optimizer_step(options, per_parameter):
    found = estimate(MISTRAL, seq_len=16, **options)
    step = found.phases["optimizer step"]
    assert step == pytest.approx(per_parameter * found.parameters, rel=0.001)


def test_8_bit_states_are_a_quarter_and_embeddings_stay_whole():
    found = estimate(MISTRAL, seq_len=16, optimizer="adamw-8bit")
    states = next(one.bytes for one in found.terms if one.name == "optimizer states")
    embedding, small = 32000 * 4096, 0
    blocks = found.parameters - embedding - small
    assert states == pytest.approx(2 * (1 + 4 / 256) * blocks + 8 * embedding, rel=1e-4)
    paged = estimate(MISTRAL, seq_len=16, optimizer="paged-adamw-8bit")
    # The states page; a constant for each 256 of them and the embedding's fp32 ones differ.
    matrices = blocks - (2 * 32 + 1) * 4096
    assert paged.paged_bytes == 2 * matrices + 8 * embedding
    held = next(one.bytes for one in paged.terms if one.name == "optimizer states")
    assert held + paged.paged_bytes == states
    assert held == pytest.approx(2 * 4 / 256 * matrices, rel=0.01)


def test_models_of_early_2024_kept_tables_in_every_layer():
    """MistralRotaryEmbedding cached cosines and sines of all positions, in the model's type."""
    shared, kept = (
        estimate(MISTRAL, seq_len=16, dtype="fp16", tables_per_layer=each) for each in (False, True)
    )
    more = kept.peak_allocated_bytes - shared.peak_allocated_bytes
    assert more == 32 * 2 * 32_768 * 128 * 2
    with pytest.raises(ValueError, match="names no max_position_embeddings"):
        estimate({**MISTRAL, "max_position_embeddings": None}, tables_per_layer=True)
    with pytest.raises(ValueError, match="the installed transformers shares them"):
        check_one_step(read(MISTRAL), Options(tables_per_layer=True))


# ---- what a GPU showed -------------------------------------------------------------------------


def test_each_thread_that_multiplies_has_a_workspace():
    usual, hopper = (
        estimate(MISTRAL, seq_len=16, **given)
        for given in ({}, {"cublas_workspace": gpus.find("H200").cublas_workspace})
    )
    assert hopper.peak_allocated_bytes - usual.peak_allocated_bytes == 2 * (2**25 - 8_519_680)
    sizes = {gpu.name: gpu.cublas_workspace for gpu in gpus.GPUS.values()}
    assert sizes["A100 80GB"] == sizes["RTX 4090"] == Options().cublas_workspace == 8_519_680
    assert sizes["H100 80GB"] == sizes["B200"] == 2**25


def test_a_window_inside_a_row_costs_a_mask_and_repeated_keys():
    def asked(config=MISTRAL, **options):
        found = estimate(config, method="lora", batch_size=3, loss_path="padded", **options)
        masks = [one.bytes for one in found.terms if one.name == "attention mask"]
        return masks, found.phases["layer backward"]

    shorter, _ = asked(seq_len=4095)
    masked, with_mask = asked(seq_len=4096)
    free, without = asked({**MISTRAL, "sliding_window": None}, seq_len=4096)
    flash, in_kernel = asked(seq_len=4096, attention="flash_attention_2")
    assert shorter == free == flash == [] and masked == [3 * 4096 * 4096]
    assert with_mask - masked[0] > without == in_kernel


def test_gemma_3_has_a_window_in_all_layers_but_each_sixth():
    gemma = {
        "model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 7, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
        "vocab_size": 300, "sliding_window": 8,
    }  # fmt: skip
    assert [read(gemma).local_layers(*span) for span in ((), (5,), (6, 7), (5, 6))] == [6, 1, 1, 0]
    assert read({**gemma, "sliding_window_pattern": 3}).local_layers() == 5
    assert read({**gemma, "sliding_window": None}).local_layers() == 0
    kinds = ["sliding_attention", "full_attention"] * 3 + ["full_attention"]
    listed = {**gemma, "layer_types": kinds}
    assert read(listed).local_layers() == 3 and read(listed).local_layers(3) == 1
    for wrong, said in (
        (kinds[:3], "layer_types has 3 entries, and num_hidden_layers is 7"),
        ([*kinds[:6], "x"], "give a list of sliding_attention and full_attention"),
        ("sliding_attention", "give a list of sliding_attention and full_attention"),
    ):
        with pytest.raises(ValueError, match=said):
            read({**gemma, "layer_types": wrong})
    every_second = {**gemma, "model_type": "gemma2", "sliding_window_pattern": 0}
    assert read(every_second).local_layers() == 4 and read(MISTRAL).local_layers() == 32
    assert read({**MISTRAL, "model_type": "qwen2", "sliding_window": 8}).local_layers() == 0
    kept = [
        estimate(
            {**gemma, **more}, seq_len=16, gradient_checkpointing=False
        ).saved_activations_bytes
        for more in ({"sliding_window": None}, {}, {"layer_types": ["sliding_attention"] * 7})
    ]
    assert kept[1] - kept[0] == 6 * (kept[2] - kept[1]) > 0  # each layer with a window the same


def test_only_the_layers_that_train_count_their_windows():
    """Of Gemma 3's 7 layers the sixth has none: of the top ones that train, all but that one."""
    gemma = {
        "model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 7, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
        "vocab_size": 300,
    }  # fmt: skip

    def masks(trained):
        with_window, without = (
            estimate(
                {**gemma, "sliding_window": window}, method="freeze", trainable_layers=trained,
                seq_len=16, gradient_checkpointing=False,
            ).saved_activations_bytes
            for window in (8, None)
        )  # fmt: skip
        return with_window - without

    assert masks(1) == masks(2) > 0 and masks(3) == 2 * masks(1) and masks(7) == 6 * masks(1)


@pytest.mark.parametrize("tied", [True, False])
def test_where_passes_accumulate_a_gradient_waits_beside_what_is_there(tied):
    """A tied matrix's first of two, and the embedding's own while it is made."""
    many_words = {**MISTRAL, "vocab_size": 128_000, "tie_word_embeddings": tied}
    one, two = (
        estimate(many_words, seq_len=16, optimizer="sgd", accumulation_steps=passes)
        for passes in (1, 2)
    )
    more = two.phases["layer backward"] - one.phases["layer backward"]
    assert more == 2 * 128_000 * 4096


def test_autocast_sums_a_tied_matrix_in_place_where_it_casts():
    tied = {**MISTRAL, "vocab_size": 500_000, "tie_word_embeddings": True}

    def layer(**more):
        return estimate(tied, seq_len=16, optimizer="sgd", **more).phases["layer backward"]

    saved = layer(dtype="fp32") - layer(dtype="fp32", autocast=True)
    assert saved == pytest.approx(4 * 500_000 * 4096, rel=1e-4)
    assert layer(dtype="bf16") == layer(dtype="bf16", autocast=True)


# ---- generating and merging --------------------------------------------------------------------


def test_generation_counts_weights_and_the_cache():
    found = estimate_generation(MISTRAL, new_tokens=4000, batch_size=4, seq_len=96)
    terms = found.to_json()["terms"]
    assert terms["weights"] == 2 * 7_241_732_096
    # 2 x 32 layers x 8 heads x 128 x 2 bytes = 128 KiB a token.
    assert terms["cache of keys and values"] == 4 * 4096 * 128 * 1024
    longer = estimate_generation(MISTRAL, new_tokens=4001, batch_size=4, seq_len=96)
    assert longer.peak_allocated_bytes - found.peak_allocated_bytes == 4 * 128 * 1024


def test_more_new_tokens_than_can_be_meant_are_refused():
    with pytest.raises(ValueError, match="new_tokens=.a number of 1329 bits.: give at most"):
        estimate_generation(MISTRAL, new_tokens=10**400)


def test_generation_peaks_at_the_prompt_or_at_the_last_token():
    def terms(**options):
        found = estimate_generation(MISTRAL, batch_size=4, seq_len=4000, **options)
        said = found.to_json()["terms"]
        assert sum(said.values()) == found.peak_allocated_bytes
        return said

    prompt, last = terms(new_tokens=96), terms(new_tokens=40_000)
    assert prompt["cache of keys and values"] == 4 * 4000 * 128 * 1024
    assert prompt["one layer over the prompt"] == 2 * 16_000 * (2 * 4096 + 3 * 14336)
    assert "logits of the last token" not in prompt and "one layer over the prompt" not in last
    assert last["cache of keys and values"] == 4 * 44_000 * 128 * 1024
    eager = terms(new_tokens=96, attention="eager")
    assert eager["attention scores of the prompt"] == (2 + 4) * 4 * 32 * 4000 * 4000
    assert "attention scores of the prompt" not in prompt


@pytest.mark.parametrize(
    "options",
    [{"num_devices": 2}, {"zero_stage": 3}, {"sharding": "fsdp"}],
    ids=str,
)
@pytest.mark.parametrize("task", [estimate_generation, estimate_merge])
def test_jobs_without_gradients_are_counted_on_one_device(task, options):
    with pytest.raises(ValueError, match="counted on one device: leave it out"):
        task(MISTRAL, **options)


@pytest.mark.parametrize(
    ("task", "method"),
    [
        *((estimate_generation, method) for method in METHODS),
        *((estimate_merge, method) for method in ("lora", "qlora")),
    ],
)
def test_jobs_without_gradients_take_the_options_that_move_a_byte_and_no_other(task, method):
    others = {
        "objective": "dpo", "lora_rank": 3, "target_modules": "q_proj", "lora_dropout": 0.0,
        "num_virtual_tokens": 9, "encoder_hidden_size": 32, "trainable_layers": 1, "batch_size": 7,
        "seq_len": 8000, "accumulation_steps": 3, "dtype": "fp32", "autocast": True,
        "optimizer": "sgd", "foreach": False, "fused": True, "attention": "eager", "padding": True,
        "gradient_checkpointing": False, "reentrant": False, "loss_path": "fused",
        "double_quant": False, "kbit_prepared": True, "precompute_reference": True,
        "experts": "separate",
        "num_devices": 1, "zero_stage": 0, "sharding": "none", "offload": "none", "device": "cpu",
        "cublas_workspace": 2**25, "tables_per_layer": True,
    }  # fmt: skip
    fields = {field.name for field in dataclasses.fields(Options)}
    assert set(others) == fields - {"method"}
    usual = task(MISTRAL, method=method).terms
    for name, value in others.items():
        try:
            assert task(MISTRAL, method=method, **{name: value}).terms != usual, name
        except ValueError as error:
            said = str(error)
            assert said.startswith((f"{name}={value!r} changes nothing in ", f"{name}=0: "))
            assert said.endswith("leave it out")


def test_stacked_experts_are_copied_to_generate_and_merged_at_once():
    mixtral = make_config("mixtral").to_dict()
    stack = 8 * 3 * 128 * 320
    adapted = {"method": "lora", "lora_rank": 4, "dtype": "bf16"}
    short = {"seq_len": 8, "new_tokens": 1}
    copied, apart = (
        estimate_generation(mixtral, **adapted, **short, experts=experts).to_json()["terms"]
        for experts in ("stacked", "separate")
    )
    copy = "one layer's experts with the adapter's update"
    assert copied[copy] == 2 * stack and copy not in apart
    assert copied["weights"] == apart["weights"]
    merged, apart = (
        estimate_merge(mixtral, **adapted, experts=experts).to_json()["terms"]
        for experts in ("stacked", "separate")
    )
    assert merged["update of the largest matrix"] == 4 * 8 * 2 * 128 * 320
    assert apart["update of the largest matrix"] == 4 * 128 * 320
    with pytest.raises(ValueError, match="experts='separate' changes nothing in merging"):
        estimate_merge(MISTRAL, experts="separate")


def test_merging_needs_room_for_one_matrix():
    found = estimate_merge(MISTRAL, lora_rank=16)
    extra = 4096 * 14336 * (4 + 2)
    adapter = 4 * estimate(MISTRAL, method="lora", lora_rank=16).trainable_parameters
    assert found.peak_allocated_bytes == 2 * 7_241_732_096 + extra + adapter + 8_519_680
    four_bit = estimate_merge(MISTRAL, method="qlora", lora_rank=16)
    assert four_bit.peak_allocated_bytes < found.peak_allocated_bytes
    with pytest.raises(ValueError, match="method='prefix' leaves nothing to merge"):
        estimate_merge(MISTRAL, method="prefix")


# ---- what cannot be meant ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "lorra"}, "method='lorra' is unknown: use full, freeze, lora"),
        ({"batch_size": 0}, "batch_size=0: give a whole number from 1"),
        ({"seq_len": -5}, "seq_len=-5: give a whole number from 1"),
        ({"batch_size": 1.5}, "batch_size=1.5: give a whole number"),
        ({"num_devices": True}, "num_devices=True: give a whole number"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0: give a share"),
        ({"zero_stage": 4}, "zero_stage=4 is unknown"),
        ({"zero_stage": 2, "sharding": "fsdp"}, "DeepSpeed and FSDP shard the same state"),
        ({"offload": "cpu"}, "offload='cpu' without sharding"),
        ({"offload": "nvme", "zero_stage": 2}, "ZeRO-Infinity only"),
        ({"method": "qlora", "zero_stage": 3}, "cannot shard bitsandbytes"),
        ({"method": "lora", "lora_rank": 5000}, "lora_rank=5000 is more than q_proj can have"),
        ({"method": "lora", "target_modules": "q_prj"}, "'q_prj', which no layer of mistral"),
        ({"method": "lora", "target_modules": []}, "which no layer of mistral"),
        ({"method": "freeze", "trainable_layers": 33}, "the model has 32 layers"),
        ({"precision": "bf16"}, "precision='bf16': no such option"),
        ({"seq_len": 10**400}, "seq_len=(a number of 1329 bits): give at most 1,000,000,000,000"),
        ({"encoder_hidden_size": "a"}, "encoder_hidden_size='a': give a whole number from 1"),
        ({"encoder_hidden_size": 1.5}, "encoder_hidden_size=1.5: give a whole number from 1"),
        ({"target_modules": 5}, "target_modules=5: give 'all-linear', or names"),
        ({"target_modules": ["q_proj", 5]}, "target_modules=['q_proj', 5]: give 'all-linear'"),
        ({"lora_dropout": "a"}, "lora_dropout='a': give a share"),
        ({"autocast": "no"}, "autocast='no': give True or False"),
        ({"experts": "piled"}, "experts='piled' is unknown: use stacked, separate"),
        ({"zero_stage": True}, "zero_stage=True is unknown"),
        ({"zero_stage": 2.0}, "zero_stage=2.0 is unknown"),
        ({"attention": "flash_attention_2", "dtype": "fp32"}, "dtype='fp32' without autocast"),
        ({"attention": "flash_attention_2", "device": "cpu"}, "with device='cpu': the kernel"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_impossible_options_are_named(options, said):
    with pytest.raises(ValueError) as caught:
        estimate(MISTRAL, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "config has no 'hidden_size'"),
        ({"hidden_size": -4096}, "hidden_size=-4096: give a whole number from 1"),
        ({"hidden_size": "4096"}, "hidden_size='4096': give a whole number"),
        ({"num_key_value_heads": 7}, "num_attention_heads=32 is no multiple"),
        ({"hidden_size": 4097}, "hidden_size=4097 is no multiple of num_attention_heads=32"),
        (
            {"model_type": "novel", "vocab_size": None},
            "model_type='novel' is no family that is known",
        ),
        ({"model_type": "bert"}, "model_type='bert' has an encoder"),
        ({"model_type": "novel", "is_encoder_decoder": True}, "'novel' has an encoder"),
        ({"attention_dropout": [1]}, "attention_dropout=[1]: give a share from 0 to below 1"),
        ({"attention_dropout": "x"}, "attention_dropout='x': give a share"),
        ({"attention_dropout": float("nan")}, "attention_dropout=nan: give a share"),
        ({"attention_dropout": -3}, "attention_dropout=-3: give a share"),
        ({"model_type": "gpt2", "attn_pdrop": "x"}, "attn_pdrop='x': give a share"),
        ({"model_type": "gpt2", "embd_pdrop": 1}, "embd_pdrop=1: give a share"),
        ({"model_type": "phi3", "resid_pdrop": True}, "resid_pdrop=True: give a share"),
        ({"vocab_size": 10**5000}, "vocab_size=(a number of 16610 bits): give at most"),
        ({"vocab_size": -(10**5000)}, "vocab_size=(a number of 16610 bits): give a whole number"),
        ({"text_config": {"text_config": {}}}, "text_config holds another text_config"),
        (
            {"hidden_size": 64, "num_attention_heads": 128, "num_key_value_heads": 1},
            "num_attention_heads=128 is more than hidden_size=64",
        ),
        ({"head_dim": 65}, "head_dim=65 is odd"),
    ],
    ids=lambda value: str(value)[:60] if not isinstance(value, dict) else "-".join(value),
)
def test_impossible_configs_are_named(change, said):
    with pytest.raises(ValueError) as caught:
        estimate(MISTRAL | change)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_a_file_says_are_packed_are_noted():
    packed = MISTRAL | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    found = estimate(packed)
    assert found.notes[0].startswith("quantization_config ('gptq') was not read")
    assert found.peak_allocated_bytes == estimate(MISTRAL).peak_allocated_bytes


def whole_in_root(**options) -> dict[str, int]:
    """Label of a moment -> bytes of gradients that FSDP's root unit has whole in it."""
    root = "whole gradients of FSDP's root unit"
    return {
        moment.what: sum(one.bytes for one in moment.terms if one.name == root)
        for moment in moments(MISTRAL, sharding="fsdp", **options)
    }


def test_fsdps_root_unit_keeps_gradients_whole_until_backward_ends():
    head = 2 * (32_000 * 4_096 + 4_096)  # bf16; the last norm is in this unit, too
    both = head + 2 * 32_000 * 4_096
    found = whole_in_root(num_devices=8, gradient_checkpointing=True)
    inside = [held for label, held in found.items() if "layer, at" in label]
    assert inside == [head, head]
    assert found["backward through the embedding"] == both
    assert found["FSDP's root unit copies its gradients to divide them"] == both
    assert set(whole_in_root(num_devices=8, method="lora").values()) == {0}
    assert set(whole_in_root(num_devices=1).values()) == {0}


def test_sharded_gradients_of_the_layers_are_counted_once():
    whole = estimate(MISTRAL, num_devices=1)
    cut = estimate(MISTRAL, num_devices=4, sharding="fsdp")
    layers = 7_241_732_096 - 2 * 32_000 * 4_096 - 4_096
    for moment in moments(MISTRAL, num_devices=4, sharding="fsdp"):
        if moment.what == "backward through the embedding":
            assert sum(t.bytes for t in moment.terms if t.name == "gradients") == 2 * layers // 4
    assert cut.peak_allocated_bytes < whole.peak_allocated_bytes


def test_learned_positions_end_somewhere():
    with pytest.raises(ValueError, match="seq_len=1025 is more than the 1024 positions"):
        estimate({"model_type": "gpt2"}, seq_len=1025)
    with pytest.raises(ValueError, match="with the virtual tokens"):
        estimate({"model_type": "gpt2"}, seq_len=1010, method="prefix")


def test_an_unknown_family_says_what_was_not_counted():
    config = MISTRAL | {"model_type": "novel", "memory_slots": 64, "swiglu_limit": 7.0}
    found = estimate(config)
    assert (
        found.peak_allocated_bytes
        == estimate(MISTRAL | {"model_type": "llama"}).phases["optimizer step"]
    )
    assert "'novel' is unknown: counted as a Llama" in found.notes[0]
    assert "memory_slots, swiglu_limit" in found.notes[0]
    kept = estimate(config, gradient_checkpointing=False, batch_size=64).terms
    assert {one.status for one in kept if one.name.startswith("kept")} == {"unverified"}


def test_the_text_part_of_a_larger_model_is_read():
    outer = {"model_type": "gemma3", "text_config": make_config("gemma3").to_dict()}
    found = estimate(outer)
    assert found.parameters == estimate(outer["text_config"]).parameters
    assert "only the text part was counted" in found.notes[0]


# ---- the command -------------------------------------------------------------------------------


def run(capsys, *arguments: str) -> str:
    assert cli.main(["estimate", *arguments]) == 0
    return capsys.readouterr().out


def test_command_prints_json_with_the_promised_keys(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MISTRAL), encoding="utf-8")
    row = rows("bar")[2]
    printed = json.loads(
        run(
            capsys, str(file), "--json", "--method", "lora", "--lora-rank", "16",
            "--target-modules", "q_proj,k_proj,v_proj,o_proj", "--batch-size", "4",
            "--seq-len", "4096", "--dtype", "bf16", "--optimizer", "adamw", "--foreach",
            "--attention", "flash_attention_2", "--gradient-checkpointing", "--no-autocast",
            "--num-devices", "1", "--zero-stage", "0", "--offload", "none", "--objective", "sft",
        )
    )  # fmt: skip
    assert printed["peak_allocated_bytes"] == pytest.approx(row.peak_allocated_bytes, rel=1e-4)
    assert sum(printed["terms"].values()) == printed["peak_allocated_bytes"]
    assert (printed["phase"], printed["trainable_parameters"]) == ("loss", 13_631_488)
    assert {"name", "bytes", "formula", "source", "status"} == set(printed["explained"][0])


def test_command_prints_a_table_largest_first(capsys):
    text = run(capsys, "bundled", "--method", "lora", "--lora-dropout", "0")
    assert text.splitlines()[0].startswith("bundled: one training step peaks at ")
    assert "logits and their copies" in text and "phases: loss" in text
    assert "cache of keys and values" in run(capsys, "bundled", "--task", "generate")
    assert "update of the largest matrix" in run(capsys, "bundled", "--task", "merge")


def test_command_finds_a_downloaded_model(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "models--acme--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc", encoding="utf-8")
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(MISTRAL), encoding="utf-8")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert json.loads(run(capsys, "acme/tiny", "--json"))["parameters"] == 7_241_732_096


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{not json", "is not JSON"),
        ("[1, 2]", "holds list, no object"),
        (None, "no such file"),
        ("[" * 200_000, "is not JSON (maximum recursion depth"),
        (f'{{"vocab_size": {"9" * 5000}}}', "config.json is not JSON (Exceeds the limit"),
    ],
    ids=["no json", "list", "missing", "nested", "long number"],
)
def test_command_refuses_what_is_no_config_in_one_line(tmp_path, capsys, content, said):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    assert cli.main(["estimate", str(file)]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


def test_command_names_a_folder_of_no_user(capsys):
    assert cli.main(["estimate", "~nosuchuser/x.json"]) == 2
    message = capsys.readouterr().err
    assert "'~nosuchuser/x.json': no such file" in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "generate", "--optimizer", "sgd"], "optimizer='sgd' changes nothing in gener"),
        (["--task", "generate", "--gradient-checkpointing"], "gradient_checkpointing=True changes"),
        (["--task", "generate", "--lora-rank", "8"], "in generating text with method='full'"),
        (["--task", "merge", "--batch-size", "4"], "batch_size=4 changes nothing in merging"),
        (["--task", "merge", "--new-tokens", "4"], "--new-tokens with --task merge: only text"),
        (["--new-tokens", "256"], "--new-tokens with --task train: only text has any"),
    ],
)
def test_command_refuses_what_means_nothing_in_the_task(arguments, said, capsys):
    assert cli.main(["estimate", "bundled", *arguments]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


def test_bad_input_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "no.json").write_text("{not json", encoding="utf-8")
    ways = [["measure"], ["estimate", "--trace"]]
    given = [
        [str(tmp_path / "gone.json")],
        [str(tmp_path / "no.json")],
        ["bundled", "--method", "lora", "--lora-rank", "100000"],
        ["bundled", "--seq-len", "-5"],
        ["bundled", "--num-devices", "2"],
        ["bundled", "--method", "prefix"],
    ]
    code = (
        "import sys; sys.modules['torch'] = None  # whoever imports it gets a ModuleNotFoundError\n"
        "from labkit.cli import main\n"
        f"print(*[main(way + more) for way in {ways} for more in {given}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=paths.root()
    )
    assert done.stdout.split() == ["2"] * len(ways) * len(given)
    assert len(done.stderr.splitlines()) == len(ways) * len(given)


def test_command_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from labkit.cli import main; main(['estimate', 'bundled', '--json'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'huggingface_hub'}\n"
        "print('loaded:', *sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=paths.root()
    )
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_an_estimate_takes_milliseconds():
    seconds = []
    gc.disable()
    try:
        for _ in range(9):
            start = time.perf_counter()
            estimate(MISTRAL, method="qlora", batch_size=4)
            seconds.append(time.perf_counter() - start)
    finally:
        gc.enable()
    assert statistics.median(seconds) < 0.05  # ten times the budget that labkit bench shows


def test_every_option_of_the_design_is_an_option_of_the_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["estimate", "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(Options):
        assert f"--{field.name.replace('_', '-')}" in text


def test_a_well_known_model_needs_neither_file_nor_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert estimate("Mistral-7B-v0.1").parameters == 7_241_732_096
    with pytest.raises(ValueError, match="no name in data/memory/models.json"):
        estimate("Mistral-8B-v0.1")
