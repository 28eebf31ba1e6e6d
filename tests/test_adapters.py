"""Adapters on three architectures: counts by formula, what changed, whose they are, merging."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from labkit import adapters, cli, models
from labkit.errors import LabkitError

ATTENTION = {"llama": ["q_proj", "v_proj"], "qwen3": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
KINDS = tuple(ATTENTION)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folder of a tiny model of each architecture."""
    return {kind: tiny_model(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def trained(base, config, scale: float = 0.3):
    """A model with an adapter whose every number is random, as if it had been trained."""
    model, tokenizer = models.load(base, device="cpu")
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return model.eval(), tokenizer


def lora(kind: str, **options) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION[kind]} | options
    return LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2", **options)


@pytest.fixture(scope="module")
def saved(bases, tmp_path_factory):
    """Folder of a LoRA adapter for each architecture."""
    folders = {}
    for kind in KINDS:
        folders[kind] = tmp_path_factory.mktemp("adapters") / kind
        adapters.save(trained(bases[kind], lora(kind))[0], folders[kind], bases[kind])
    return folders


# ---- what it trains ----------------------------------------------------------------------------


def test_lora_parameters_by_hand(bases):
    model, _ = models.load(bases["llama"], device="cpu")
    # 2 layers; q_proj is 64 by 64 and v_proj 64 by 32, since two of four heads share keys.
    assert adapters.lora_parameters(model, 4, ["q_proj", "v_proj"]) == 2 * 4 * (128 + 96)
    model, _ = models.load(bases["gpt2"], device="cpu")
    assert adapters.target_shapes(model, ["c_attn"])["transformer.h.0.attn.c_attn"] == (64, 192)
    assert adapters.lora_parameters(model, 4, ["c_attn"]) == 2 * 4 * (64 + 192)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_lora_parameters_are_what_peft_trains(bases, kind, targets):
    targets = ATTENTION[kind] if targets == "attention" else targets
    model, _ = models.load(bases[kind], device="cpu")
    predicted = adapters.lora_parameters(model, 3, targets)
    wrapped = get_peft_model(model, lora(kind, r=3, target_modules=targets))
    assert models.n_parameters(wrapped).trainable == predicted


def test_unknown_targets_and_ranks_are_named(bases):
    model, _ = models.load(bases["llama"], device="cpu")
    with pytest.raises(ValueError, match=r"'query', which no layer .* it has down_proj, .*q_proj"):
        adapters.lora_parameters(model, 4, ["q_proj", "query"])
    with pytest.raises(ValueError, match=r"rank=33 is more than .*v_proj .* 64 by 32: .*most 32"):
        adapters.lora_parameters(model, 33, ["v_proj"])
    with pytest.raises(ValueError, match="rank=0: give 1 or more"):
        adapters.lora_parameters(model, 0, ["v_proj"])


# ---- what it changed ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_changes_no_tensor_of_its_base(bases, kind):
    before = adapters.base_tensors(models.load(bases[kind], device="cpu")[0])
    model, _ = trained(bases[kind], lora(kind))
    assert adapters.changed_tensors(before, adapters.base_tensors(model)) == []
    merged = adapters.base_tensors(model.merge_and_unload())
    changed = adapters.changed_tensors(before, merged)
    assert len(changed) == 2 * len(ATTENTION[kind])
    assert all(name.split(".")[-2] in ATTENTION[kind] for name in changed)


def test_a_change_of_the_same_model_is_seen(bases):
    model, _ = models.load(bases["llama"], device="cpu")
    before = adapters.base_tensors(model)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    found = adapters.changed_tensors(before, adapters.base_tensors(model))
    assert found == ["model.layers.1.mlp.up_proj.weight"]


def test_changed_tensors_names_what_only_one_side_has():
    one = torch.ones(2)
    found = adapters.changed_tensors({"a": one, "b": one}, {"b": one + 1, "c": one})
    assert found == ["a", "b", "c"]


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_the_base_answers_bit_for_bit(bases, kind):
    base, tokenizer = models.load(bases[kind], device="cpu")
    ids = tokenizer("Where does Mira live?", return_tensors="pt")["input_ids"]
    model, _ = trained(bases[kind], lora(kind))
    with torch.no_grad():
        plain, attached = base(ids).logits, model(ids).logits
        with model.disable_adapter():
            off = model(ids).logits
    assert torch.equal(plain, off)
    assert not torch.allclose(plain, attached, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_share_one_base_and_leave_each_other_alone(bases, kind):
    base, tokenizer = models.load(bases[kind], device="cpu")
    before = adapters.base_tensors(base)
    ids = tokenizer("Where does Mira live?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = base(ids).logits
    model, _ = trained(bases[kind], lora(kind))
    with torch.no_grad():
        first = model(ids).logits
        model.add_adapter("second", lora(kind, r=2, init_lora_weights="gaussian"))
        model.set_adapter("second")
        untrained = model(ids).logits
        for name, parameter in model.named_parameters():
            if ".second." in name:
                parameter.fill_(0.2)
        second = model(ids).logits
        model.set_adapter("default")
        again = model(ids).logits
        with model.disable_adapter():
            off = model(ids).logits
    assert torch.equal(untrained, plain) and torch.equal(off, plain)
    assert torch.equal(again, first)
    assert not torch.allclose(second, first, atol=1e-2)
    assert adapters.changed_tensors(before, adapters.base_tensors(model)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_usual_choices_of_layers_are_names_of_the_model(bases, kind):
    model, _ = models.load(bases[kind], device="cpu")
    choices = adapters.target_choices(model)
    layers = {
        name: len(adapters.target_shapes(model, targets)) for name, targets in choices.items()
    }
    if kind == "gpt2":  # queries, keys and values lie in one layer: c_attn, c_proj, c_fc, c_proj
        assert layers == {"all linear": 2 * 4}
    else:
        assert layers == {"q and v": 4, "attention": 8, "MLP": 6, "all linear": 14}


# ---- whose it is -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_attached_again_it_says_the_same(bases, saved, kind):
    model, tokenizer = trained(bases[kind], lora(kind))
    again, _ = adapters.attach(saved[kind], bases[kind], device="cpu")
    ids = tokenizer("Where does Mira live?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_another_base_is_refused(bases, saved, tmp_path):
    other = tiny_model("llama", tmp_path / "other", seed=7)
    with pytest.raises(LabkitError, match="trained on other weights than .*other has"):
        adapters.attach(saved["llama"], other)
    with pytest.raises(LabkitError, match="trained on other weights"):
        adapters.merge(other, saved["llama"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_a_record_of_another_shape_is_refused(bases, saved, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copytree(saved["gpt2"], foreign)
    (foreign / adapters.RECORD).unlink()
    assert adapters.check_base(foreign, bases["llama"]) is False
    with pytest.raises(LabkitError, match="does not fit this model"):
        adapters.attach(foreign, bases["llama"], device="cpu")


def test_damaged_and_missing_files_are_named(bases, saved, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(saved["llama"], damaged)
    (damaged / adapters.RECORD).write_text("{", encoding="utf-8")
    with pytest.raises(LabkitError, match="labkit_base.json is damaged"):
        adapters.attach(damaged, bases["llama"])
    (damaged / adapters.RECORD).unlink()
    (damaged / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(LabkitError, match="adapter_config.json is no adapter's configuration"):
        adapters.attach(damaged, bases["llama"])
    with pytest.raises(LabkitError, match="has no adapter_config.json"):
        adapters.attach(bases["llama"], bases["llama"])
    with pytest.raises(LabkitError, match="is no folder and was not downloaded"):
        adapters.base_sha256("nobody/nothing")


def test_a_folder_with_files_is_not_overwritten(bases, saved):
    model, _ = trained(bases["llama"], lora("llama"))
    before = {file.name: file.read_bytes() for file in saved["llama"].iterdir()}
    with pytest.raises(LabkitError, match="is not empty"):
        adapters.save(model, saved["llama"], bases["llama"])
    assert {file.name: file.read_bytes() for file in saved["llama"].iterdir()} == before


# ---- merging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_comes_with_its_evidence(bases, saved, tmp_path, kind):
    inputs = [*bases[kind].iterdir(), *saved[kind].iterdir()]
    before = {file: file.read_bytes() for file in inputs}
    out = tmp_path / "merged"
    evidence = adapters.merge(bases[kind], saved[kind], out, say=lambda line: None)
    assert evidence.base_was_checked
    assert evidence.effect > 100 * evidence.difference_reloaded
    assert evidence.same_next_token == 1.0
    assert json.loads((out / adapters.EVIDENCE).read_text())["n_logits"] == evidence.n_logits
    assert evidence.merged_sha256 == adapters.base_sha256(out) != evidence.base_sha256
    assert {file: file.read_bytes() for file in inputs} == before
    assert not list(tmp_path.glob(".*"))


def test_a_merged_model_answers_as_its_adapter_in_a_process_of_its_own(bases, saved, tmp_path):
    out = tmp_path / "merged"
    adapters.merge(bases["llama"], saved["llama"], out, say=lambda line: None)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        "model = A.from_pretrained(sys.argv[1], dtype=torch.float32).eval()\n"
        "print(model(torch.arange(8, 24)[None]).logits.double().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True
    )
    attached, _ = adapters.attach(saved["llama"], bases["llama"], device="cpu")
    with torch.no_grad():
        wanted = attached(torch.arange(8, 24)[None]).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(wanted, rel=1e-4)


def test_a_merge_never_writes_over_an_input_or_anything_else(bases, saved, tmp_path):
    for out in (bases["llama"], saved["llama"] / "merged", tmp_path):
        with pytest.raises(LabkitError, match="is an input|exists already"):
            adapters.merge(bases["llama"], saved["llama"], out)


def test_a_merge_that_changes_answers_writes_nothing(bases, saved, tmp_path, monkeypatch):
    real, calls = adapters._logits, []

    def wrong_when_reloaded(model, tokenizer):
        calls.append(model)
        return real(model, tokenizer) + (0.5 if len(calls) == 4 else 0.0)

    monkeypatch.setattr(adapters, "_logits", wrong_when_reloaded)
    with pytest.raises(LabkitError, match="reloaded, differs from the adapter by 0.5"):
        adapters.merge(bases["llama"], saved["llama"], tmp_path / "out", say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_merged_says_why(bases, tmp_path):
    model, _ = trained(
        bases["llama"], PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    adapters.save(model, tmp_path / "prefix", bases["llama"])
    with pytest.raises(LabkitError, match="PREFIX_TUNING adapter: it prepends vectors"):
        adapters.merge(bases["llama"], tmp_path / "prefix", tmp_path / "out")
    quantized = tmp_path / "quantized"
    shutil.copytree(bases["llama"], quantized)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}})
    )
    foreign = tmp_path / "foreign"
    adapters.save(trained(bases["llama"], lora("llama"))[0], foreign, bases["llama"])
    (foreign / adapters.RECORD).unlink()
    with pytest.raises(LabkitError, match="is quantized: merge into the 16-bit model"):
        adapters.merge(quantized, foreign, tmp_path / "out", say=lambda line: None)


def test_an_adapter_that_rounding_would_erase_is_not_merged(bases, tmp_path):
    base = tmp_path / "bf16"
    shutil.copytree(bases["llama"], base)
    model, _ = models.load(base, device="cpu")
    model.to(torch.bfloat16).save_pretrained(base)
    adapters.save(trained(base, lora("llama"))[0], tmp_path / "strong", base)
    evidence = adapters.merge(base, tmp_path / "strong", tmp_path / "fine", say=lambda line: None)
    assert evidence.dtype == "bfloat16"
    assert 0 < evidence.difference_reloaded < evidence.effect / 5
    adapters.save(trained(base, lora("llama"), scale=1e-3)[0], tmp_path / "weak", base)
    with pytest.raises(LabkitError, match="rounding would erase it"):
        adapters.merge(base, tmp_path / "weak", tmp_path / "out", say=lambda line: None)


def test_half_of_an_adapter_is_refused(bases, saved, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(saved["llama"], half)
    tensors = load_file(half / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.0." in name}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, half / "adapter_model.safetensors")
    with pytest.raises(LabkitError, match="does not fit this model: .*missing adapter keys"):
        adapters.attach(half, bases["llama"], device="cpu")


def test_other_adapters_merge_too(bases, tmp_path):
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )  # fmt: skip
    model, _ = trained(bases["llama"], config, scale=1.0)
    assert get_peft_model_state_dict(model)
    adapters.save(model, tmp_path / "ia3", bases["llama"])
    evidence = adapters.merge(
        bases["llama"], tmp_path / "ia3", tmp_path / "out", say=lambda line: None
    )
    assert evidence.effect > 0.01 > evidence.difference_reloaded


@pytest.mark.parametrize("variant", [{"use_rslora": True}, {"use_dora": True}])
def test_variants_of_lora_merge_too(bases, tmp_path, variant):
    model, _ = trained(bases["llama"], lora("llama", **variant))
    adapters.save(model, tmp_path / "adapter", bases["llama"])
    evidence = adapters.merge(
        bases["llama"], tmp_path / "adapter", tmp_path / "out", say=lambda line: None
    )
    assert evidence.effect > 0.01 > 100 * evidence.difference_reloaded


def test_the_command_prints_evidence(bases, saved, tmp_path, capsys):
    command = ["merge", str(bases["qwen3"]), str(saved["qwen3"]), str(tmp_path / "out"), "--json"]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["same_next_token"] == 1.0
    assert cli.main(command[:-1]) == 1
    assert "exists already" in capsys.readouterr().err
