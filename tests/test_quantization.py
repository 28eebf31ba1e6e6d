"""4-bit quantization by hand: its levels, its constants, its cost, and bitsandbytes' kernels."""

import warnings

import pytest
import torch
from bitsandbytes import functional
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from tiny import tiny_model

from labkit import adapters, models, paths, quantization
from labkit.quantization import bits_per_parameter, quantize, relative_error


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """The linear layers of the bundled model, as they were trained."""
    tensors = load_file(paths.base_model_dir() / "model.safetensors")
    return {name: tensor.float() for name, tensor in tensors.items() if "_proj" in name}


def test_nf4_levels_are_those_of_the_paper():
    levels = quantization.nf4_levels()
    assert levels.tolist() == pytest.approx(
        functional.get_4bit_type("nf4", device="cpu").tolist(), abs=1e-6
    )
    assert levels[7] == 0 and levels[0] == -1 and levels[15] == 1
    assert (levels < 0).sum() == 7 and (levels > 0).sum() == 8


def test_normal_weights_use_nf4_levels_more_evenly_than_uniform_ones():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2**16, generator=generator)
    uniform = torch.rand(2**16, generator=generator) * 2 - 1

    def shares(weight):
        counts = torch.bincount(quantize(weight).codes.long(), minlength=16)
        return counts[1:-1] / counts.sum()

    assert shares(normal).std() < 0.8 * shares(uniform).std()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_quantization_by_hand_equals_bitsandbytes_on_the_trained_weights(weights, kind):
    for name, weight in weights.items():
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
        kernel = functional.dequantize_4bit(packed, state)
        by_hand = quantize(weight, kind).dequantize()
        torch.testing.assert_close(by_hand, kernel, atol=1e-6, rtol=1e-5, msg=name)


def test_double_quantization_by_hand_equals_bitsandbytes_on_the_trained_weights(weights):
    for name, weight in weights.items():
        packed, state = functional.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=True
        )
        kernel = functional.dequantize_4bit(packed, state)
        differences = (
            quantize(weight, double=True).dequantize() - kernel
        ).abs() / weight.abs().max()
        # A constant within 1e-5 of the middle between two levels goes to the farther one in the
        # kernel for CPUs; the whole block then differs by the step between these levels.
        assert (differences < 1e-6).float().mean() > 0.98, name
        assert differences.max() < 1e-2, name


def test_dynamic_levels_are_those_of_bitsandbytes():
    assert torch.equal(quantization.dynamic_levels(), functional.create_dynamic_map())


def errors(weight: torch.Tensor) -> dict[str, float]:
    return {kind: relative_error(weight, quantize(weight, kind)) for kind in quantization.LEVELS}


def test_nf4_rounds_normal_weights_as_the_literature_says():
    error = errors(torch.randn(2**18, generator=torch.Generator().manual_seed(4)))
    assert error["nf4"] == pytest.approx(0.092, abs=0.001)
    assert error["int4"] == pytest.approx(0.108, abs=0.001)
    assert error["nf4"] < error["int4"] < error["fp4"]


def test_nf4_rounds_the_trained_weights_better_than_fp4_and_int4(weights):
    error = errors(torch.cat([weight.flatten() for weight in weights.values()]))
    assert error["nf4"] < min(error["int4"], error["fp4"])


def test_uniform_weights_are_rounded_better_by_int4():
    error = errors(torch.rand(2**15, generator=torch.Generator().manual_seed(1)) * 2 - 1)
    assert error["int4"] == pytest.approx(0.070, abs=0.001)
    assert error["nf4"] == pytest.approx(0.091, abs=0.001)


def test_quantization_of_a_block_by_hand():
    weight = torch.tensor([0.5, -2.0, 0.1, 1.0])  # the constant is 2
    made = quantize(weight, "int4", block=4)
    assert made.absmax.tolist() == [2.0]
    # 0.25, -1, 0.05 and 0.5 of the constant: the nearest sevenths are 2, -7, 0 and 3 or 4.
    assert made.codes.tolist()[:3] == [9, 0, 7]
    assert made.codes[3] in (10, 11)
    assert made.dequantize()[:3].tolist() == pytest.approx([4 / 7, -2.0, 0.0])


def test_quantization_pads_the_last_block_and_keeps_shape_and_zeros():
    weight = torch.randn(7, 13, generator=torch.Generator().manual_seed(2))
    weight[0] = 0
    made = quantize(weight)
    assert made.absmax.shape == (2,)
    back = made.dequantize()
    assert back.shape == weight.shape
    assert not back[0].any()
    assert not quantize(torch.zeros(64)).dequantize().any()


def test_quantization_is_stable():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    once = quantize(weight).dequantize()
    assert torch.allclose(quantize(once).dequantize(), once, atol=1e-6)


def test_bits_per_parameter_are_the_papers():
    assert bits_per_parameter(64) == 4.5
    assert bits_per_parameter(64, double=True) == pytest.approx(4.127, abs=5e-4)
    assert bits_per_parameter(64) - bits_per_parameter(64, double=True) == pytest.approx(
        0.373, abs=5e-4
    )
    assert quantize(torch.ones(64), double=True).bits_per_parameter == bits_per_parameter(64, True)


def test_double_quantization_costs_little_accuracy(weights):
    weight = next(iter(weights.values()))
    single, double = (relative_error(weight, quantize(weight, double=on)) for on in (False, True))
    assert double / single == pytest.approx(1, abs=0.02)


def test_quantization_says_what_is_wrong():
    packed, _ = functional.quantize_4bit(torch.randn(64, 64))
    with pytest.raises(ValueError, match="uint8.*quantized already"):
        quantize(packed)
    with pytest.raises(ValueError, match="choose one of nf4, fp4, int4"):
        quantize(torch.ones(4), "nf3")
    with pytest.raises(ValueError, match="block=0"):
        quantize(torch.ones(4), block=0)


# QLoRA: an adapter on a rounded base, on three architectures


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_a_qlora_adapter_merges_exactly_into_the_rounded_weights_written_out(kind, tmp_path):
    base, ids = tiny_model(kind, tmp_path / "base"), torch.tensor([[7, 20, 33, 41, 55]])
    rounded, _ = models.load(base, quantization="nf4")
    before = adapters.base_tensors(rounded)
    model = prepare_model_for_kbit_training(rounded, use_gradient_checkpointing=False)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).eval()

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    with model.disable_adapter():
        plain = logits(model)
    assert torch.equal(logits(model), plain)  # B is zero: nothing has changed yet

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    attached = logits(model)
    effect = (attached - plain).abs().max()
    assert effect > 0.1
    assert not adapters.changed_tensors(before, adapters.base_tensors(model))  # codes are frozen

    adapters.save(model, tmp_path / "adapter", base)
    again, _ = adapters.attach(tmp_path / "adapter", base, quantization="nf4")
    torch.testing.assert_close(logits(again), attached, atol=1e-5, rtol=1e-5)

    written_out, _ = models.load(base, quantization="nf4")
    attached_again = PeftModel.from_pretrained(written_out.dequantize(), str(tmp_path / "adapter"))
    merged = logits(attached_again.eval().merge_and_unload())
    torch.testing.assert_close(merged, attached, atol=1e-4 * attached.abs().max(), rtol=1e-4)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that rounding follows
        rounded_again = logits(again.merge_and_unload())
    # The sum is rounded once more, so it cannot be the same; it may even undo the training.
    assert (rounded_again - attached).abs().max() > 100 * (merged - attached).abs().max()
