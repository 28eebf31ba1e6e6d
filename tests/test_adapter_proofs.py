"""The same proofs for every adapter with weights, on three architectures.

At the start it changes nothing; attached it steers; switched off the base answers bit for bit;
saved and attached again it says the same; merged it says the same. Soft prompts, which have no
weights to merge, are proven in `test_soft_prompts`.
"""

import copy

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from tiny import tiny_model

from labkit import adapters, models

NAMES = {  # queries, what the feed-forward part ends with, and the norms
    "llama": ("q_proj", "down_proj", ["input_layernorm"]),
    "qwen3": ("q_proj", "down_proj", ["input_layernorm"]),
    "gpt2": ("c_attn", "mlp.c_proj", ["ln_1"]),
}
KINDS = tuple(NAMES)
# PEFT knows norms by nn.LayerNorm only, and says so of every other class.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type .*Norm")


def config_of(method: str, kind: str, quantized: bool = False):
    query, down, norms = NAMES[kind]
    turned = kind == "gpt2" and not quantized  # GPT-2's weights lie the other way round
    if method == "ia3":
        return IA3Config(
            task_type="CAUSAL_LM", target_modules=[query, down], feedforward_modules=[down],
            fan_in_fan_out=turned,
        )  # fmt: skip
    if method == "norms":
        return LNTuningConfig(task_type="CAUSAL_LM", target_modules=norms)
    return LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=[query, down],
        fan_in_fan_out=turned, use_rslora=method == "rslora", use_dora=method == "dora",
    )  # fmt: skip


METHODS = ("lora", "rslora", "dora", "ia3", "norms")
EVERY = [(method, kind) for method in METHODS for kind in KINDS]
PROMPT = "Where does Mira live?"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folder of a tiny model of each architecture."""
    return {kind: tiny_model(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def adapted(base, method: str, kind: str, quantization: str | None = None):
    model, tokenizer = models.load(base, device="cpu", quantization=quantization)
    model = get_peft_model(model, config_of(method, kind, bool(quantization))).eval()
    return model, tokenizer(PROMPT, return_tensors="pt")["input_ids"]


def shake(model, by: float = 0.2) -> None:
    """Move every trained number, as training would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += by * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize(("method", "kind"), EVERY)
def test_an_adapter_starts_as_nothing_steers_and_switches_off(bases, method, kind):
    base, _ = models.load(bases[kind], device="cpu")
    model, ids = adapted(bases[kind], method, kind)
    plain = logits(base, ids)
    assert torch.allclose(logits(model, ids), plain, atol=1e-5)
    shake(model)
    assert not torch.allclose(logits(model, ids), plain, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize(("method", "kind"), EVERY)
def test_only_the_adapter_gets_gradients(bases, method, kind):
    model, ids = adapted(bases[kind], method, kind)
    shake(model)  # at the start LoRA's A has none, since B is zero
    model(input_ids=ids, labels=ids).loss.backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert touched == trained
    assert all("lora_" in name or "ia3_" in name or "ln_tuning" in name for name in trained)


@pytest.mark.parametrize(("method", "kind"), EVERY)
def test_saved_attached_again_and_merged_an_adapter_says_the_same(bases, method, kind, tmp_path):
    model, ids = adapted(bases[kind], method, kind)
    shake(model)
    attached = logits(model, ids)
    adapters.save(model, tmp_path / "adapter", bases[kind])
    again, _ = adapters.attach(tmp_path / "adapter", bases[kind], device="cpu")
    assert torch.equal(logits(again, ids), attached)
    merged = model.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert torch.allclose(logits(merged, ids), attached, atol=1e-4)
    evidence = adapters.merge(
        bases[kind], tmp_path / "adapter", tmp_path / "merged", say=lambda line: None
    )
    assert evidence.effect > 0.01 > 100 * evidence.difference_in_memory


@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters_on_one_base_are_switched_and_do_not_mix(bases, kind):
    base, _ = models.load(bases[kind], device="cpu")
    alone = {}
    for seed in (1, 2):
        model, ids = adapted(bases[kind], "lora", kind)
        shake(model, 0.1 * seed)
        alone[seed] = logits(model, ids), copy.deepcopy(model.state_dict())
    both, ids = adapted(bases[kind], "lora", kind)
    both.add_adapter("second", config_of("lora", kind))
    for seed, name in ((1, "default"), (2, "second")):
        weights = {
            key.replace(".default.", f".{name}."): value
            for key, value in alone[seed][1].items()
            if "lora_" in key
        }
        both.load_state_dict(weights, strict=False)
    both.eval()
    for name, seed in (("default", 1), ("second", 2), ("default", 1)):
        both.set_adapter(name)
        assert torch.equal(logits(both, ids), alone[seed][0])
    with both.disable_adapter():
        assert torch.equal(logits(both, ids), logits(base, ids))


# PEFT turns the adapter around for GPT-2's own layers, and says so.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_an_adapter_on_a_4_bit_base(bases, kind, quantization, tmp_path):
    base, _ = models.load(bases[kind], device="cpu", quantization=quantization)
    model, ids = adapted(bases[kind], "lora", kind, quantization)
    plain = logits(base, ids)
    assert torch.equal(logits(model, ids), plain)
    shake(model)
    attached = logits(model, ids)
    assert not torch.allclose(attached, plain, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), plain)
    adapters.save(model, tmp_path / "adapter", bases[kind])
    again, _ = adapters.attach(
        tmp_path / "adapter", bases[kind], device="cpu", quantization=quantization
    )
    assert torch.equal(logits(again, ids), attached)
    # Into the weights before they were rounded: the adapter's effect stays, the rounding goes.
    adapters.merge(bases[kind], tmp_path / "adapter", tmp_path / "out", say=lambda line: None)
    exact, _ = models.load(tmp_path / "out", device="cpu")
    off = (logits(exact, ids) - attached).abs().mean()
    assert 0 < off < (attached - plain).abs().mean()
