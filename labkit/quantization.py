"""4-bit weights by hand: levels, blocks, double quantization, in PyTorch alone.

The teaching version of what bitsandbytes does inside its kernels (Dettmers et al. 2023, QLoRA,
section 3), and the oracle that the kernels are compared with. It packs nothing: a code keeps its
own byte, so that it can be looked at. For training use bitsandbytes.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
"""Weights that share one constant, their largest absolute value."""
CONSTANTS_BLOCK = 256
"""Constants that share one constant of their own in double quantization."""
_OUTERMOST_QUANTILE = 0.9677083
"""Where NF4's grid of probabilities ends, as in bitsandbytes: the mean of 1 - 1/32 and 1 - 1/30."""


# ---- levels ------------------------------------------------------------------------------------


def nf4_levels() -> Tensor:
    """The 16 levels of NF4 in [-1, 1]: quantiles of a normal distribution, with an exact zero.

    Dense around zero and sparse at the ends, as normally distributed weights are (QLoRA, section 3
    and appendix E). The levels are not used equally often all the same, because a block's largest
    weight decides its scale, and that depends on the block's size (Yoshida 2023).
    """
    below = torch.linspace(_OUTERMOST_QUANTILE, 0.5, 8, dtype=torch.float64)[:-1]
    above = torch.linspace(_OUTERMOST_QUANTILE, 0.5, 9, dtype=torch.float64)[:-1]
    quantiles = torch.cat(
        [-torch.special.ndtri(below), torch.zeros(1), torch.special.ndtri(above).flip(0)]
    )
    return (quantiles / quantiles.max()).float()


def fp4_levels() -> Tensor:
    """The 15 levels of FP4: a sign, two bits of exponent and one of mantissa.

    The tiny pair next to zero is bitsandbytes' subnormal.
    """
    positive = torch.tensor([0.0625, 2, 3, 4, 6, 8, 12]) / 12
    return torch.cat([-positive.flip(0), torch.zeros(1), positive])


def int4_levels() -> Tensor:
    """The 15 levels of a symmetric 4-bit integer: even steps from -7/7 to 7/7."""
    return torch.arange(-7, 8) / 7


LEVELS = {"nf4": nf4_levels, "fp4": fp4_levels, "int4": int4_levels}
"""Data type → its levels, lowest first."""


# ---- quantizing --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantized:
    """A weight as codes of 4 bits and one constant for each block."""

    codes: Tensor
    """(n,) uint8, each below 16: which level a weight fell to."""
    absmax: Tensor
    """(ceil(n / block),) fp32: largest absolute value of each block, as dequantizing uses it."""
    levels: Tensor
    """(16,) or (15,) fp32."""
    block: int
    shape: torch.Size
    """Of the weight."""
    doubled: bool
    """Whether the constants went through 8 bits themselves."""

    def dequantize(self) -> Tensor:
        """The weight as it is computed with, fp32: each code's level times its block's constant."""
        n = self.codes.numel()
        scale = self.absmax.repeat_interleave(self.block)[:n]
        return (self.levels[self.codes.long()] * scale).reshape(self.shape)

    @property
    def bits_per_parameter(self) -> float:
        """Bits that a file or a device would keep for each weight, packed, constants included."""
        return bits_per_parameter(self.block, double=self.doubled)


def quantize(
    weight: Tensor, kind: str = "nf4", block: int = BLOCK, double: bool = False
) -> Quantized:
    """Round a weight to the levels of a 4-bit type, block by block.

    Args:
        weight: any shape, fp32, bf16 or fp16; read row by row.
        kind: `nf4`, `fp4` or `int4`.
        block: weights that share a constant.
        double: quantize the constants to 8 bits too.

    Raises:
        ValueError: another kind, a block below 1, or a weight that holds no floating-point
            numbers, such as one that is packed into 4 bits already.
    """
    if kind not in LEVELS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(LEVELS)}")
    if block < 1:
        raise ValueError(f"block={block}: give 1 or more")
    if not weight.is_floating_point():
        raise ValueError(
            f"the weight holds {weight.dtype}, no floating-point numbers: it is quantized already. "
            "Quantize the weights of the 16-bit model"
        )
    flat = weight.detach().float().flatten()
    blocks = _in_blocks(flat, block)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]
    levels = LEVELS[kind]()
    codes = nearest(scaled.flatten()[: flat.numel()], levels)
    if double:
        absmax = _through_8_bits(absmax)
    return Quantized(codes, absmax, levels, block, weight.shape, double)


def _in_blocks(values: Tensor, block: int) -> Tensor:
    """(ceil(n / block), block): numbers in blocks, the last one filled up with zeros."""
    n_blocks = math.ceil(values.numel() / block)
    padded = torch.nn.functional.pad(values, (0, n_blocks * block - values.numel()))
    return padded.reshape(n_blocks, block)


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Index of each value's nearest level, uint8; `levels` are sorted, lowest first."""
    midpoints = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(values, midpoints).to(torch.uint8)


# ---- double quantization -----------------------------------------------------------------------


def dynamic_levels() -> Tensor:
    """The 256 levels of the signed dynamic 8-bit type (Dettmers 2016): (256,) fp32, sorted.

    Seven powers of ten; the larger the number, the more levels its power has.
    """
    levels = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (power - 6)
        levels += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(levels))


def _through_8_bits(constants: Tensor) -> Tensor:
    """Constants as double quantization gives them back.

    Absolute maxima are all positive and much alike, so their mean is taken away first.
    """
    mean = constants.mean()
    levels = dynamic_levels()
    centered = constants - mean
    blocks = _in_blocks(centered, CONSTANTS_BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    codes = nearest(blocks / scale.clamp(min=1e-38), levels)
    return (levels[codes.long()] * scale).flatten()[: constants.numel()] + mean


# ---- what it costs -----------------------------------------------------------------------------


def bits_per_parameter(block: int = BLOCK, double: bool = False) -> float:
    """Bits for each weight: its code, and its share of the constants.

    A block's constant takes 32 bits; with double quantization 8, and 32 more for every 256 of
    them (QLoRA, section 3).
    """
    if double:
        return 4 + 8 / block + 32 / (block * CONSTANTS_BLOCK)
    return 4 + 32 / block


def relative_error(weight: Tensor, quantized: Quantized) -> float:
    """Root mean square of the rounding error, over that of the weight."""
    exact = weight.detach().float()
    error = quantized.dequantize() - exact
    return (error.square().mean().sqrt() / exact.square().mean().sqrt()).item()
