"""Real models without memory: tensors that have a shape, a type and a size, and no numbers.

torch's FakeTensorMode runs every operation for the shape of its result alone. A model is built on
torch's `meta` device, where libraries may cast and replace its weights as they like, and then each
of its tensors becomes a fake CPU tensor: autograd, autocast and optimizers of a torch without CUDA
run on those. What a GPU does differently is done here by name, in `cuda_kernels`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from labkit.memory.state import BLOCK, CONSTANTS_BLOCK

aten = torch.ops.aten
FP32 = 4


@contextmanager
def faking() -> Iterator[None]:
    """Within it every new tensor is fake, and stacked experts compute in any precision.

    transformers looks at the positions of a batch to learn whether several texts share a row, and
    takes it that they do where there is nothing to look at. Here they do not.
    """
    from transformers import masking_utils

    look, grouped = masking_utils.find_packed_sequence_indices, functional.grouped_mm
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    functional.grouped_mm = _grouped_mm  # pyright: ignore
    try:
        # PEFT keeps the ids of virtual tokens outside its modules; they may stay real.
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        masking_utils.find_packed_sequence_indices = look
        functional.grouped_mm = grouped


def _grouped_mm(x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
    """Products of stacked experts: torch's own has shapes for bf16 only, and kernels for more.

    Args:
        x: (tokens, in), sorted by expert.
        weight: (experts, in, out).
        offs: (experts,) int32, where the tokens of each end.

    Returns:
        (tokens, out).
    """
    if x.dtype == torch.bfloat16:
        return torch._grouped_mm(x, weight, offs=offs)  # pyright: ignore
    return _GroupedProduct.apply(x, weight, offs)


class _GroupedProduct(torch.autograd.Function):
    """Keeps each factor whose partner needs a gradient, as torch's own does."""

    @staticmethod
    def forward(ctx, x, weight, offs):
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None, offs)
        ctx.shapes = x.shape, weight.shape
        return x.new_empty(x.shape[0], weight.shape[2])

    @staticmethod
    def backward(ctx, gradient):
        made = (
            gradient.new_empty(shape) if needed else None
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad[:2], strict=True)
        )
        return *made, None


# ---- a model of the meta device, as fake tensors -----------------------------------------------


def as_fake(model: nn.Module, double_quant: bool = True) -> nn.Module:
    """Put a fake CPU tensor in the place of each of the model's own, and return the model.

    Must run inside `faking`. A tied weight stays one; a 4-bit weight becomes what bitsandbytes
    packs it into.

    Args:
        double_quant: whether the constants of 4-bit weights are quantized, too.
    """
    made: dict[int, nn.Parameter] = {}
    for layer in model.modules():
        for name, weight in list(layer._parameters.items()):
            if weight is None:
                continue
            if id(weight) not in made:
                four_bit = type(weight).__name__ == "Params4bit"
                made[id(weight)] = _packed(layer, weight, double_quant) if four_bit else _as(weight)
            layer._parameters[name] = made[id(weight)]
        for name, buffer in list(layer._buffers.items()):
            if buffer is not None:
                layer._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def _as(weight: nn.Parameter) -> nn.Parameter:
    values = torch.empty(weight.shape, dtype=weight.dtype)
    return nn.Parameter(values, requires_grad=weight.requires_grad)


def _packed(layer: nn.Module, weight: nn.Parameter, double_quant: bool) -> nn.Parameter:
    """The weight of bitsandbytes' `Linear4bit`: two weights in a byte, constants beside them.

    Packing reads the numbers, so its results are laid out here as `quantize_4bit` of bitsandbytes
    lays them out; the layer that computes with them is its own.
    """
    from bitsandbytes.functional import QuantState

    n_blocks = math.ceil(weight.numel() / BLOCK)
    outer = QuantState(
        absmax=torch.empty(math.ceil(n_blocks / CONSTANTS_BLOCK)),
        code=torch.empty(256),
        blocksize=CONSTANTS_BLOCK,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.empty(n_blocks, dtype=torch.uint8 if double_quant else torch.float32),
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=torch.empty(()) if double_quant else None,
        state2=outer if double_quant else None,
    )
    codes = torch.empty(math.ceil(weight.numel() / 2), 1, dtype=torch.uint8)
    packed: Any = nn.Parameter(codes, requires_grad=False)
    packed.quant_state, packed.module, packed.bnb_quantized = state, layer, True
    return packed


# ---- what a GPU does differently ---------------------------------------------------------------


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """Within it fake CPU tensors keep for backward what tensors on a GPU would.

    Functions of torch are exchanged by name, because a mode that stands between is off while
    backward computes a layer again.
    """
    before = [(place, name, getattr(place, name)) for place, name in _ON_CUDA]
    try:
        for (place, name), replacement in _ON_CUDA.items():
            setattr(place, name, replacement)
        yield
    finally:
        for place, name, function in before:
            setattr(place, name, function)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """CUDA's kernel keeps a mask of one byte a number; a CPU keeps one as wide as the numbers."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that torch picks on a recent GPU.

    Flash attention takes 16-bit numbers and no mask; the memory-efficient kernel takes the rest,
    but no keys that heads share; what is left is written out as products and a softmax.
    """
    if torch.is_autocast_enabled("cpu"):
        kind = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(kind) for tensor in (query, key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype).masked_fill(~attn_mask, -1e9)
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    if key.shape[1] == query.shape[1]:
        rows, heads, queries, _ = query.shape
        if attn_mask is not None:
            attn_mask = attn_mask.expand(rows, heads, queries, key.shape[2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def _in_fp32(function: Callable) -> Callable:
    """An operation for which CUDA's autocast casts 16-bit numbers to fp32, and a CPU's does not."""

    def exact(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu") and x.is_floating_point():
            x = x.float()
        return function(x, *args, **kwargs)

    return exact


_autocast_enabled = torch.is_autocast_enabled


def _is_autocast_enabled(device_type: str = "cpu") -> bool:
    """PEFT asks whether autocast is on without saying where, which means on CUDA."""
    return _autocast_enabled(device_type)


_ON_CUDA: dict[tuple[Any, str], Callable] = {
    (torch, "is_autocast_enabled"): _is_autocast_enabled,
    (functional, "dropout"): _dropout,
    (functional, "scaled_dot_product_attention"): _attention,
    (functional, "layer_norm"): _in_fp32(functional.layer_norm),
    (functional, "softmax"): _in_fp32(functional.softmax),
    (torch, "pow"): _in_fp32(torch.pow),
}

_BACKWARD = (
    aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
)


def kernel_scratch(function: Any, arguments: tuple) -> int:
    """Bytes that a CUDA kernel takes for itself and gives back, which fake tensors do not show.

    The backward pass of fused attention sums the gradient of the queries in fp32, has one number a
    query and head, and where heads share keys, first makes the gradients of keys and values for
    each head (torch's flash_attn/flash_api.cpp, mha_bwd).
    """
    if function not in _BACKWARD:
        return 0
    query, key = arguments[1], arguments[2]
    sums = query.numel() // query.shape[-1] * FP32
    each_head = 2 * query.numel() * query.element_size() if key.shape[1] != query.shape[1] else 0
    return sums + FP32 * query.numel() + each_head
