"""Loading, counting and fingerprinting three architectures, and what damaged files say."""

import json
import shutil
import warnings

import pytest
import torch
from tiny import TEMPLATE, tiny_model, tiny_tokenizer
from transformers import BitsAndBytesConfig

from labkit import chat_templates, models, paths
from labkit.errors import LabkitError

KINDS = ("llama", "qwen3", "gpt2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny_model(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture
def llama(folders, tmp_path):
    """A copy of the tiny Llama that a test may break."""
    return shutil.copytree(folders["llama"], tmp_path / "llama")


# Loading


@pytest.mark.parametrize("kind", KINDS)
def test_load_gives_an_eval_model_in_fp32_with_its_own_template(folders, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a healthy model gives no warning
        model, tokenizer = models.load(folders[kind])
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_load_without_template_attaches_chatml_with_markers_and_warns(tmp_path, kind):
    folder = tiny_model(kind, tmp_path, template=False)
    with pytest.warns(UserWarning, match="no chat template, so labkit's minimal ChatML"):
        _, tokenizer = models.load(folder)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Velden"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    assert text == "<|im_start|>user\nHi<|end|>\n<|im_start|>assistant\nVelden<|end|>\n"
    assert learned(tokenizer, talk) == "Velden<|end|>"


def learned(tokenizer, talk):
    """Text of the tokens that the template marks as the assistant's."""
    encoded = tokenizer.apply_chat_template(
        talk, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return tokenizer.decode([token for token, mask in pairs if mask]).strip()


def test_labkit_model_overrides_the_profile(folders, monkeypatch):
    monkeypatch.setenv("LABKIT_MODEL", str(folders["qwen3"]))
    model, _ = models.load()
    assert model.config.model_type == "qwen3"
    assert models.current_profile().model == str(folders["qwen3"])


def test_unknown_profile_is_named(monkeypatch):
    monkeypatch.setenv("LABKIT_PROFILE", "tpu")
    with pytest.raises(ValueError, match="LABKIT_PROFILE='tpu' is unknown: set it to cpu, gpu-sm"):
        models.current_profile()


@pytest.mark.parametrize("profile", models.PROFILES.values(), ids=lambda profile: profile.name)
def test_profile_steps_are_whole_passes_over_its_rows(profile):
    rows_seen = profile.steps * profile.batch_size * profile.accumulation
    assert rows_seen % profile.rows == 0
    assert profile.precision in ("fp32", "bf16")
    assert isinstance(getattr(torch, profile.dtype), torch.dtype)


# A pad token that is not the end token


def save_tokenizer(folder, **changes):
    tokenizer = tiny_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)


def test_pad_equal_to_end_is_replaced_by_an_unused_token(llama):
    save_tokenizer(llama, pad_token="<|end|>")
    with pytest.warns(UserWarning, match=r"end token as pad token; its own token <\|pad\|>"):
        model, tokenizer = models.load(llama)
    assert tokenizer.pad_token_id == 0
    assert model.config.pad_token_id == 0
    assert model.get_input_embeddings().num_embeddings == 300  # nothing was added


def test_missing_pad_without_a_spare_token_adds_one_row(llama):
    file = llama / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<|pad|>", "<|x|>"), encoding="utf-8")
    config = json.loads((llama / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["pad_token"]
    (llama / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"no pad token; a new token <\|pad\|> now pads"):
        model, tokenizer = models.load(llama)
    assert tokenizer.pad_token_id == 300
    assert model.get_input_embeddings().num_embeddings == 301


# What is missing or damaged


def test_missing_folder():
    with pytest.raises(LabkitError, match="model folder ./nowhere is missing: check the path"):
        models.load("./nowhere")


def test_id_that_is_not_on_this_disk(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LabkitError, match="'labkit/none-such' is no folder here .* `hf download"):
        models.load("labkit/none-such")


def test_missing_bundled_model(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    with pytest.raises(LabkitError, match="bundled model's folder .* is missing: restore it with"):
        models.load("bundled")


def without(name):
    return lambda folder: (folder / name).unlink()


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def header_only(folder):
    (folder / "model.safetensors").write_bytes(b"\x10")


def adapter_only(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def one_flipped_byte(folder):
    file = folder / "model.safetensors"
    (folder / "SHA256SUMS").write_text(f"{models.sha256_of(file)}  {file.name}\n", encoding="utf-8")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def a_file_listed_but_gone(folder):
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  extra.json\n", encoding="utf-8")


def broken_config(folder):
    (folder / "config.json").write_text("{", encoding="utf-8")


def truncated_tokenizer(folder):
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-1000])


def fewer_layers_than_the_config(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def a_longer_vocabulary(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("config.json"), "has no config.json: give a folder that save_pretrained wrote"),
        (adapter_only, "is an adapter, not a model: load its base model first"),
        (broken_config, r"config.json is no JSON .*: restore it"),
        (without("model.safetensors"), r"has no weights \(\*.safetensors\): restore it"),
        (truncated, r"model.safetensors is damaged: it holds [\d,]+ bytes where its header says"),
        (header_only, "model.safetensors is damaged: it holds 1 bytes, less than its own header"),
        (one_flipped_byte, "model.safetensors is damaged: its SHA-256 is not the one listed"),
        (a_file_listed_but_gone, "extra.json is missing although SHA256SUMS lists it"),
        (without("tokenizer.json"), r"has no tokenizer \(tokenizer.json\): copy it from the model"),
        (truncated_tokenizer, r"tokenizer.json is no JSON .*: restore it"),
        (fewer_layers_than_the_config, r"lacks \d+ of its tensors, model.layers.2"),
        (a_longer_vocabulary, "tokenizer has 301 tokens and its model rows for 300"),
    ],
)
def test_damage_is_named_with_the_next_step(llama, damage, message):
    damage(llama)
    with pytest.raises(LabkitError, match=message) as caught:
        models.load(llama)
    assert "\n" not in str(caught.value)


# Counting


def test_parameters_by_hand(folders):
    # Llama: 300 x 64 in and out; a layer has q, o: 64 x 64, k, v: 64 x 32, three MLP matrices of
    # 64 x 128 and two norms of 64; one norm at the end.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    model, _ = models.load(folders["llama"])
    assert models.n_parameters(model).total == 2 * 300 * 64 + 2 * layer + 64
    # Qwen3 ties the output head to the embedding and norms q and k heads of width 16.
    model, _ = models.load(folders["qwen3"])
    assert models.n_parameters(model).total == 300 * 64 + 2 * (layer + 2 * 16) + 64


def test_frozen_parameters_are_not_trainable(folders):
    model, _ = models.load(folders["llama"])
    model.model.requires_grad_(False)
    counts = models.n_parameters(model)
    assert counts.trainable == 300 * 64
    assert counts.trainable_share == pytest.approx(300 * 64 / counts.total)


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_table_adds_up(folders, kind):
    model, _ = models.load(folders[kind])
    table = models.parameter_table(model)
    assert table["parameters"].sum() == models.n_parameters(model).total
    assert table["bytes"].sum() == models.tensor_bytes(model)["parameters"]
    assert table["share"].sum() == pytest.approx(1)
    assert "other" not in set(table["group"])
    tied = model.config.tie_word_embeddings
    assert (table.set_index("group")["parameters"]["output head"] == 0) == tied


def test_tensor_bytes_count_gradients_after_a_backward_pass(folders):
    model, tokenizer = models.load(folders["qwen3"])
    before = models.tensor_bytes(model)
    assert before["gradients"] == 0
    ids = torch.tensor([tokenizer("Velden")["input_ids"]])
    model(input_ids=ids, labels=ids).loss.backward()
    after = models.tensor_bytes(model)
    assert after["gradients"] == before["parameters"] == 4 * models.n_parameters(model).total
    assert after["total"] == sum(value for name, value in after.items() if name != "total")


@pytest.mark.parametrize(("quantization", "bits"), [("nf4", 4), ("fp4", 4), ("int8", 8)])
def test_quantized_layers_count_their_real_shape(folders, quantization, bits):
    plain, _ = models.load(folders["llama"])
    model, _ = models.load(folders["llama"], quantization=quantization)
    assert models.n_parameters(model).total == models.n_parameters(plain).total
    linear = sum(
        module.weight.numel()
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    saved = models.tensor_bytes(plain)["parameters"] - models.tensor_bytes(model)["parameters"]
    assert saved == linear * (32 - bits) // 8
    scales = models.tensor_bytes(model)["quantization"]
    assert scales > 0
    model(input_ids=torch.tensor([[8, 9, 10]]))  # int8 scales move to their layers then
    assert models.tensor_bytes(model)["quantization"] == scales


def test_a_bitsandbytes_configuration_is_used_as_it_is(folders):
    single = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model, _ = models.load(folders["llama"], quantization=single)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.quant_type == "nf4"
    assert layer.compute_dtype == torch.bfloat16
    assert not layer.weight.quant_state.nested  # its constants are fp32 ...
    doubled, _ = models.load(folders["llama"], quantization="nf4")
    assert doubled.model.layers[0].self_attn.q_proj.weight.quant_state.nested  # ... not these

    eight, _ = models.load(folders["llama"], quantization=BitsAndBytesConfig(load_in_8bit=True))
    assert eight.model.layers[0].self_attn.q_proj.weight.dtype == torch.int8


def test_a_configuration_that_rounds_nothing_is_refused(folders):
    with pytest.raises(ValueError, match="a BitsAndBytesConfig that rounds nothing: set load_in_4"):
        models.load(folders["llama"], quantization=BitsAndBytesConfig())


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by configuration"])
def test_evaluating_a_4_bit_model_leaves_its_weights_as_they_were(folders, named):
    from bitsandbytes.functional import dequantize_4bit

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model, tokenizer = models.load(folders["llama"], quantization="nf4" if named else nf4)
    layer = model.model.layers[0].self_attn.q_proj

    def weight():
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).clone()

    before = weight()
    ids = tokenizer("a b c d", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model(input_ids=ids)  # on some CPUs bitsandbytes would pack the weights anew here
    assert torch.equal(weight(), before)
    assert not getattr(layer, "support_avx512bf16_for_cpu", False)  # so on every other CPU, too


def test_a_quantized_folder_loads_as_it_is_and_is_not_quantized_again(folders, tmp_path):
    model, tokenizer = models.load(folders["llama"], quantization="nf4")
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(LabkitError, match="small is quantized already: load it without"):
        models.load(tmp_path / "small", quantization="fp4")
    again, _ = models.load(tmp_path / "small")
    assert models.tensor_bytes(again) == models.tensor_bytes(model)


def test_unknown_quantization(folders):
    with pytest.raises(ValueError, match="quantization='int3' is unknown: use None, 'nf4'"):
        models.load(folders["llama"], quantization="int3")


def test_fingerprint_survives_saving_and_sees_one_changed_number(folders, tmp_path):
    model, _ = models.load(folders["qwen3"])
    fingerprint = models.fingerprint(model)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert models.fingerprint(models.load(tmp_path)[0]) == fingerprint
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    assert models.fingerprint(model) != fingerprint
    assert models.fingerprint(models.load(tmp_path, dtype=torch.bfloat16)[0]) != fingerprint


def test_describe_device_is_of_this_machine():
    device = models.describe_device()
    assert device["device"] == "cpu"  # the default profile, with or without a GPU
    assert device["cores"] >= 1
    assert device["memory_bytes"] > 2**30
    assert device["bf16_faster"] == (device["bf16_speedup"] > 1)


# Generation markers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BRACKETS = (  # as Llama 2: the user's marks around the words, no system role
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] | trim }}"
    "{{ ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (  # as Qwen 2.5: a system turn of its own when none is given
    "{% if messages[0]['role'] != 'system' %}{{ '<|system|>\nBe kind.<|end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PLAIN = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.mark.parametrize(
    "template",
    [CHATML, BRACKETS, DEFAULT_SYSTEM, PLAIN],
    ids=["chatml", "brackets", "default-system", "bundled"],
)
def test_markers_change_no_character_and_mark_answers_only(template):
    tokenizer = tiny_tokenizer(template)
    talk = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Velden"},
        {"role": "user", "content": "What is 12 plus 30?"},
        {"role": "assistant", "content": "42"},
    ]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    prompt = tokenizer.apply_chat_template(talk[:3], tokenize=False, add_generation_prompt=True)
    assert models.with_generation_markers(tokenizer) is tokenizer
    assert chat_templates.has_generation_markers(tokenizer.chat_template)
    assert tokenizer.apply_chat_template(talk, tokenize=False) == text
    again = tokenizer.apply_chat_template(talk[:3], tokenize=False, add_generation_prompt=True)
    assert again == prompt
    assert learned(tokenizer, talk).replace(" ", "") == "Velden<|end|>42<|end|>"


def test_markers_of_a_template_trl_knows():
    from trl.chat_template_utils import qwen2_5_chat_template

    tokenizer = tiny_tokenizer(qwen2_5_chat_template)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Velden"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    models.with_generation_markers(tokenizer)
    assert tokenizer.apply_chat_template(talk, tokenize=False) == text
    assert "Velden" in learned(tokenizer, talk)
    assert "Hi" not in learned(tokenizer, talk)


def test_markers_that_would_change_a_thinking_template_are_refused():
    # Qwen3 writes an empty <think> block before the last answer only; TRL's version before all.
    from trl.chat_template_utils import qwen3_chat_template

    with pytest.raises(ValueError, match="no chat template with generation markers renders like"):
        models.with_generation_markers(tiny_tokenizer(qwen3_chat_template))


def test_markers_leave_a_marked_template_alone():
    tokenizer = models.with_generation_markers(tiny_tokenizer())
    assert tokenizer.chat_template == TEMPLATE


def test_no_equivalent_template_is_refused_and_nothing_changes():
    shouting = "{% for m in messages %}{{ m['content'] | upper }}{{ loop.index }}{% endfor %}"
    tokenizer = tiny_tokenizer(shouting)
    with pytest.raises(ValueError, match="no chat template with generation markers renders like"):
        models.with_generation_markers(tokenizer)
    assert tokenizer.chat_template == shouting


def test_markers_without_any_template():
    with pytest.raises(ValueError, match="this tokenizer has no chat template: set"):
        models.with_generation_markers(tiny_tokenizer(template=False))


# The bundled model


@pytest.mark.skipif(not paths.base_model_dir().is_dir(), reason="the bundled model is not made yet")
def test_bundled_model_loads_whole_with_markers_and_its_own_pad_token():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tokenizer = models.load("bundled")
    assert (paths.base_model_dir() / "SHA256SUMS").is_file()
    assert chat_templates.has_generation_markers(tokenizer.chat_template)
    assert tokenizer.pad_token != tokenizer.eos_token
    assert 3e6 < models.n_parameters(model).total < 11e6


def test_precision_is_bf16_only_where_this_cpu_is_faster_in_it(monkeypatch):
    monkeypatch.delenv("LABKIT_PROFILE", raising=False)
    for speedup, wanted in ((2.5, "bf16"), (0.6, "fp32")):
        monkeypatch.setattr(models.machine, "bf16_speedup", lambda speedup=speedup: speedup)
        assert models.pick_precision() == wanted
    monkeypatch.setenv("LABKIT_PROFILE", "gpu-small")
    monkeypatch.setattr(models, "pick_device", lambda: "cpu")  # no GPU in it: still this CPU
    assert models.pick_precision() == "fp32"
    monkeypatch.setattr(models, "pick_device", lambda: "cuda")  # a GPU's is the profile's
    for has_bf16, wanted in ((True, models.PROFILES["gpu-small"].precision), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bf16, **_: has)
        assert models.pick_precision() == wanted


def test_a_precision_can_be_chosen_by_hand(monkeypatch):
    monkeypatch.setattr(models.machine, "bf16_speedup", lambda: 9.0)
    monkeypatch.setenv("LABKIT_PRECISION", "fp32")
    assert models.pick_precision() == "fp32"
    monkeypatch.setenv("LABKIT_PRECISION", "fp16")
    with pytest.raises(LabkitError, match="LABKIT_PRECISION=fp16: set it to bf16 or fp32"):
        models.pick_precision()


def test_a_product_that_was_interrupted_does_not_decide_the_precision(monkeypatch):
    took = {torch.float32: 0.003, torch.bfloat16: 0.001}
    calls = []

    def seconds(tokens, weight):
        calls.append(tokens.dtype)
        return took[tokens.dtype] + (0.5 if len(calls) % 7 else 0.0)  # mostly interrupted

    monkeypatch.setattr(models.machine, "_product_seconds", seconds)
    assert models.machine.bf16_speedup.__wrapped__() == pytest.approx(3.0)  # not what was kept


@pytest.mark.skipif(not paths.base_model_dir().is_dir(), reason="the bundled model is not made yet")
def test_the_bundled_model_computes_attention_plainly_on_a_cpu():
    model, _ = models.load("bundled", device="cpu")
    assert model.config._attn_implementation == "eager"
