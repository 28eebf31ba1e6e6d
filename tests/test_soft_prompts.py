"""Sizes of trained prompts by formula, against what PEFT builds on three architectures."""

import copy

import pytest
import torch
from peft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from tiny import tiny_model
from transformers import GPT2Config, LlamaConfig, Qwen3Config
from trl import SFTConfig

from labkit import adapters, models
from labkit.soft_prompts import PromptSize, check_training, key_width, soft_prompt_size

KINDS = ("llama", "qwen3", "gpt2")
CONFIGS = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning, MLP": PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=12
    ),
    "p-tuning, MLP as wide as the model": PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3
    ),
    "p-tuning, LSTM": PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        encoder_hidden_size=12,
        encoder_reparameterization_type="LSTM",
        encoder_num_layers=2,
        encoder_dropout=0.0,
    ),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix, projected at its own width": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True
    ),
    "prefix, projected": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=12
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: tiny_model(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_soft_prompts_have_the_predicted_size(bases, kind, name):
    model, _ = models.load(bases[kind], device="cpu")
    predicted = soft_prompt_size(model, CONFIGS[name])
    adapted = get_peft_model(model, copy.deepcopy(CONFIGS[name]))  # PEFT fills it in
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    kept = sum(tensor.numel() for tensor in get_peft_model_state_dict(adapted).values())
    assert (predicted.trained, predicted.kept) == (trained, kept)


def prompted(base, name: str):
    """A model behind a soft prompt whose every number is random, as if trained, and its ids."""
    model, tokenizer = models.load(base, device="cpu")
    model = get_peft_model(model, copy.deepcopy(CONFIGS[name]))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model, tokenizer("Where does Mira live?", return_tensors="pt")["input_ids"]


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # generate counts its own
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_soft_prompt_steers_answers_and_switched_off_leaves_the_base(bases, kind, name):
    base, _ = models.load(bases[kind], device="cpu")
    model, ids = prompted(bases[kind], name)
    model.eval()
    options = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 2,
        "output_logits": True,  # a tiny model may well say the same, so compare what it weighed
        "return_dict_in_generate": True,
    }
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        attached = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        with model.disable_adapter():
            off = model(input_ids=ids).logits
        steered = model.generate(**options, do_sample=False).logits
        untouched = base.generate(**options, do_sample=False).logits
    assert torch.equal(plain, off)
    assert not torch.allclose(plain, attached[:, -ids.shape[1] :], atol=1e-2)
    assert not any(
        torch.allclose(*pair, atol=1e-2) for pair in zip(steered, untouched, strict=True)
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_prompt_gets_gradients(bases, kind, name):
    model, ids = prompted(bases[kind], name)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    touched = {name for name, tensor in model.named_parameters() if tensor.grad is not None}
    assert touched and all(name.startswith("prompt_encoder.") for name in touched)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_saved_without_its_encoder_and_attached_again_it_says_the_same(bases, kind, name, tmp_path):
    model, ids = prompted(bases[kind], name)
    model.eval()
    adapters.save(model, tmp_path / "adapter", bases[kind])
    again, _ = adapters.attach(tmp_path / "adapter", bases[kind], device="cpu")
    with torch.no_grad():
        here, there = (
            which(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            for which in (model, again)
        )
    assert torch.allclose(here, there, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_of_zeros_takes_attention_from_the_text(bases, kind):
    """PEFT calls it a no-op; a key of zeros still scores 0, and e^0 is 1."""
    base, tokenizer = models.load(bases[kind], device="cpu")
    ids = tokenizer("Where does Mira live?", return_tensors="pt")["input_ids"]
    zero = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, init_weights="zero")
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        model = get_peft_model(base, zero).eval()
        model.base_model.eval()
        prefixed = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert not torch.allclose(plain, prefixed, atol=1e-3)


def arguments(folder, checkpointing: bool) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder), activation_checkpointing=checkpointing, use_cpu=True, bf16=False
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prefix_with_activation_checkpointing_is_refused(tmp_path, name):
    config = CONFIGS[name]
    check_training(config, arguments(tmp_path, checkpointing=False))
    if not name.startswith("prefix"):
        check_training(config, arguments(tmp_path, checkpointing=True))
        return
    with pytest.raises(
        ValueError, match=r"activation_checkpointing=True .* give activation_checkpointing=False"
    ):
        check_training(config, arguments(tmp_path, checkpointing=True))


def test_a_recomputed_layer_really_drops_the_prefix(bases):
    """The day that this trains, `check_training` refuses what works."""
    model, ids = prompted(bases["llama"], "prefix")
    model.get_base_model().activation_checkpointing_enable()
    model.train()
    with pytest.raises(RuntimeError, match="must match the size"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


def test_soft_prompt_sizes_by_hand(bases):
    model, _ = models.load(bases["llama"], device="cpu")
    # 64 wide, 2 layers, 2 heads for keys and values of 16 each.
    assert soft_prompt_size(model, CONFIGS["prompt"]) == PromptSize(320, 320)
    assert soft_prompt_size(model, CONFIGS["prefix"]) == PromptSize(640, 640)
    # 5 x 64, and linear layers 64 -> 12 -> 12 -> 64 with their biases.
    assert soft_prompt_size(model, CONFIGS["p-tuning, MLP"]).trained == 320 + 780 + 156 + 832


def test_keys_are_as_wide_as_the_configuration_says():
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert key_width(Qwen3Config(**shape, head_dim=32)) == 64
    assert key_width(LlamaConfig(**shape)) == 32
    assert key_width(GPT2Config(n_embd=48, n_head=4)) == 48


def test_soft_prompts_say_what_is_wrong(bases):
    model, _ = models.load(bases["llama"], device="cpu")
    with pytest.raises(ValueError, match="num_virtual_tokens=0: a soft prompt needs 1 or more"):
        soft_prompt_size(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=0))
    many = model.config.max_position_embeddings
    with pytest.raises(ValueError, match="leaves no room for text"):
        soft_prompt_size(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=many))
    with pytest.raises(TypeError, match="LoraConfig is no soft prompt counted here"):
        soft_prompt_size(model, LoraConfig(task_type="CAUSAL_LM"))
    multitask = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    with pytest.raises(
        TypeError, match="MultitaskPromptTuningConfig is no soft prompt counted here"
    ):
        soft_prompt_size(model, multitask)
