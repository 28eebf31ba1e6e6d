"""Where a GPU really ends: the batch grows until a step runs out of memory, beside what plan said.

A smaller card is played by a larger one: torch's allocator is allowed only what such a card would
leave it, which is its memory less the context that this process was seen to take. What the
allocator cannot use for want of a large enough hole counts, as it would there.

One process finds one limit. What an earlier training leaves in a process, such as the pages of
bitsandbytes' paged states, stays until it ends and would be taken for a part of the context.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from labkit.errors import LabkitError
from labkit.memory.architecture import read
from labkit.memory.build import check_trainable, random_batch
from labkit.memory.closed_form import build_options, load_config
from labkit.memory.measurement import Run, Say, clean_gpu, device_options
from labkit.memory.plan import largest_batch
from labkit.memory.units import size_text

Holds = Callable[[int], bool]
DEFAULT, EXPANDABLE = "default", "expandable segments"
SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables of torch's allocator. The first that is set counts, as in CUDAAllocatorConfig.h."""


@dataclass(frozen=True)
class Limit:
    """The largest batch of one training on one card, planned and found."""

    memory_bytes: int
    """Of the card."""
    context_bytes: int
    """What the device had given away beside the allocator's blocks: context and kernels."""
    allocator: str
    """`default` or `expandable segments`: how torch's allocator asked the device for memory."""
    planned: int | None
    """Most rows of a pass that `plan` says fit, with its reserve; None where none does."""
    tensors_alone: int | None
    """The same where only the context is kept free: more cannot fit if the estimate is right."""
    found: int | None
    """Most rows that ran; None where not even one did."""

    @property
    def kept_promise(self) -> bool:
        """Whether all that was planned ran."""
        return (self.found or 0) >= (self.planned or 0)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def find_limit(
    config: Mapping[str, Any] | str | Path,
    memory_bytes: int | None = None,
    *,
    say: Say = lambda line: None,
    **options: Any,
) -> Limit:
    """Train with more and more rows in a pass until memory runs out.

    Call it once in a process: see the module.

    Args:
        config: as for `measure`.
        memory_bytes: of the card that is played; None is this GPU as it is.
        say: called with a line when something begins that may take seconds, and for each size.
        options: as for `estimate`; a `batch_size` is not used.

    Raises:
        ValueError: as `measure`, `device='cpu'`, or a card that is larger than this GPU.
        LabkitError: there is no CUDA device, or the model alone, or what else runs on the device,
            takes all of it.
    """
    given = {**device_options("cuda"), **options, "batch_size": 1}
    if given["device"] != "cuda":
        raise ValueError(
            f"device={given['device']!r}: a limit is found on a CUDA device: leave it out"
        )
    arch = read(load_config(config), options.get("experts"))
    chosen = build_options(arch, given)
    if not torch.cuda.is_available():
        raise LabkitError(
            "torch finds no CUDA device here, and a limit is found by running into it: run it on a "
            "machine that has one, or ask `labkit plan`"
        )
    check_trainable(arch, chosen, "cuda")
    total = torch.cuda.get_device_properties(0).total_memory
    card = total if memory_bytes is None else memory_bytes
    if not 0 < card <= total:
        raise ValueError(
            f"memory_bytes={card:,} ({size_text(card)}): this GPU can play cards of up to "
            f"{size_text(total)}: name one of those"
        )
    say("building the model")
    try:
        run = Run(config, arch, chosen)
    except torch.OutOfMemoryError as error:
        raise LabkitError(
            f"the model alone does not fit into this GPU's {size_text(total)}: take a smaller one"
        ) from error
    context = _context_bytes()
    if context >= card:
        raise LabkitError(
            f"{size_text(context)} of the device are given away beside this model, more than a "
            f"card of {size_text(card)} has: end what else runs on it"
        )
    planned, most = plan_rows(config, card, context, given)
    with _allocator_limited_to(card - context, total):
        found = grow(lambda rows: _runs(run, rows, say), planned or 1, most or 1)
    return Limit(card, context, allocator(os.environ), planned, most, found)


def allocator(environment: Mapping[str, str]) -> str:
    """How torch's allocator asks for memory under such variables: `default`, or in segments.

    Other settings of the allocator are not told apart.

    >>> allocator({"PYTORCH_ALLOC_CONF": "max_split_size_mb:128,expandable_segments:True"})
    'expandable segments'
    """
    setting = next((environment[name] for name in SETTINGS if name in environment), "")
    values = dict(part.split(":", 1) for part in setting.split(",") if ":" in part)
    wanted = {name.strip(): value.strip() for name, value in values.items()}
    return EXPANDABLE if wanted.get("expandable_segments") == "True" else DEFAULT


def plan_rows(
    config: Mapping[str, Any] | str | Path,
    memory_bytes: int,
    context_bytes: int,
    options: Mapping[str, Any],
) -> tuple[int | None, int | None]:
    """Rows of a pass that `plan` says fit: with its reserve, and with the context's alone."""
    return (
        largest_batch(config, memory_bytes, **options),
        largest_batch(config, memory_bytes, reserve_bytes=context_bytes, **options),
    )


def grow(holds: Holds, planned: int, most: int) -> int | None:
    """Most rows that hold, searched from what was planned and from where the end should be.

    Args:
        holds: whether so many rows run; where some do not, more do not.

    Returns:
        None where not even one row holds.

    >>> tried = []
    >>> grow(lambda rows: tried.append(rows) or rows <= 21, planned=20, most=24), tried
    (21, [1, 20, 24, 22, 21])
    """
    if not holds(1):
        return None
    low, high = 1, None  # most rows that ran, fewest that did not
    for rows in (planned, most):
        if rows > low and high is None:
            low, high = (rows, None) if holds(rows) else (low, rows)
    step = 1
    while high is None:  # the end comes later than it should
        low, high = (low + step, None) if holds(low + step) else (low, low + step)
        step *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _runs(run: Run, rows: int, say: Say) -> bool:
    """Whether two steps with so many rows end; the very first makes the optimizer's states."""
    run.options = replace(run.options, batch_size=rows)
    try:
        run.batch = random_batch(run.options, run.arch.vocabulary, "cuda")
        run.step()
        run.step()
        torch.cuda.synchronize()
        ended = True
    except torch.OutOfMemoryError:
        ended = False
    run.optimizer.zero_grad(set_to_none=True)
    clean_gpu()
    say(f"rows of a pass: {rows} {'ran' if ended else 'ran out of memory'}")
    return ended


def _context_bytes() -> int:
    """What the device has given away beside the blocks of this process's allocator."""
    torch.ones(256, 256, device="cuda").matmul(torch.ones(256, 256, device="cuda"))
    clean_gpu()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


@contextmanager
def _allocator_limited_to(n_bytes: int, total: int) -> Iterator[None]:
    torch.cuda.set_per_process_memory_fraction(n_bytes / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
