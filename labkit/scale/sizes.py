"""How many numbers a rank holds, by the formulas of FSDP and ZeRO.

>>> shard_numbers([(1823, 256)], devices=2, rank=0), shard_numbers([(1823, 256)], devices=2, rank=1)
(233472, 233216)
>>> zero_parts(4_992_000, stage=2, devices=2)["gradients"]
4992000.0
"""

import math
from collections.abc import Iterable, Sequence


def shard_numbers(
    shapes: Iterable[Sequence[int]], devices: int, rank: int, padded: bool = False
) -> int:
    """Numbers of all tensors that FSDP2 leaves on one rank.

    Each tensor is cut along its first dimension into pieces of ceil(rows / devices) rows, as
    `torch.chunk` does: the last ranks may hold fewer rows, or none.

    Args:
        shapes: of the whole tensors, each shared one once.
        padded: count the memory that is set aside, as large on every rank as on rank 0, so that
            the pieces can travel in one collective of equal parts.

    Raises:
        ValueError: no such rank.
    """
    if not 0 <= rank < devices:
        raise ValueError(f"rank={rank} of devices={devices}: ranks count from 0 to devices - 1")
    total = 0
    for rows, *others in shapes:
        piece = math.ceil(rows / devices)
        held = piece if padded else min(piece, max(0, rows - rank * piece))
        total += held * math.prod(others)
    return total


def zero_parts(parameters: int, stage: int, devices: int, width: int = 2) -> dict[str, float]:
    """Bytes on one device of weights, gradients and optimizer state under a ZeRO stage, with Adam.

    Rajbhandari et al. 2020 (arXiv:1910.02054, section 3): 2 P + 2 P + 12 P in mixed precision,
    where the 12 are an fp32 copy and two means; stage 1 divides these by N, stage 2 the gradients
    as well, stage 3 the weights as well. With `width=4` all is fp32 and needs no copy: 4 + 4 + 8.

    Raises:
        ValueError: a stage outside 0 to 3, no device, or a width that is neither 2 nor 4.
    """
    if stage not in (0, 1, 2, 3) or devices < 1 or width not in (2, 4):
        raise ValueError(
            f"stage={stage}, devices={devices}, width={width}: give a stage from 0 to 3, a device, "
            "and 2 or 4 bytes"
        )
    whole = {"parameters": width, "gradients": width, "optimizer": 12 if width == 2 else 8}
    first_divided = {"parameters": 3, "gradients": 2, "optimizer": 1}
    return {
        name: each * parameters / (devices if stage >= first_divided[name] else 1)
        for name, each in whole.items()
    }
