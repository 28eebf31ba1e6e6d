"""What several devices divide among themselves, what each gathers again, and what goes to the host.

ZeRO (Rajbhandari et al. 2020) counts bytes of mixed-precision Adam as 2 + 2 + 12 for each
parameter: 16-bit weight and gradient, and an fp32 copy with two means. Its stages divide the 12,
then the gradients, then the weights by the number of devices.

>>> [round(zero_states(7.5e9, stage, 64) / 1e9, 2) for stage in range(4)]
[120.0, 31.41, 16.64, 1.88]
"""

from dataclasses import dataclass

from labkit.memory.architecture import Architecture
from labkit.memory.options import DTYPES, Options
from labkit.memory.state import FP32, gradient_bytes, head_width, norm_width, trained_width
from labkit.memory.terms import (
    DERIVED,
    MEASURED,
    PUBLIC_ROWS,
    UNVERIFIED,
    Term,
    term,
    total,
)

BUCKET, PREFETCH = 500_000_000, 50_000_000
"""DeepSpeed's defaults, in numbers: of the bucket that is reduced or gathered, and of weights that
stage 3 gathers ahead."""
HOST_FACTOR = 1.5
"""DeepSpeed's own estimators take this much for buffers on the host."""


@dataclass(frozen=True)
class Shares:
    """Parts of the state that one device holds, from 0 to 1; 0 where it went to the host."""

    weights: float = 1.0
    gradients: float = 1.0
    states: float = 1.0
    note: str = ""


def shares(options: Options) -> Shares:
    """How ZeRO, FSDP or nothing divides the state of training."""
    n = options.num_devices
    part = 1 / n
    if options.sharding == "fsdp":
        note = f" / {n} devices" if n > 1 else ""
        if options.offload != "none":
            return Shares(0, 0, 0, ", on the host")
        return Shares(part, part, part, note)
    stage = options.zero_stage or 0
    weights = part if stage == 3 else 1.0
    gradients = part if stage >= 2 else 1.0
    states = part if stage >= 1 else 1.0
    if options.offload != "none":
        # ZeRO-Offload takes states and gradients, and at stage 3 the weights as well.
        return Shares(0 if stage == 3 else weights, gradients * (stage < 2), 0, ", on the host")
    return Shares(weights, gradients, states, f" / {n} devices" if stage and n > 1 else "")


def zero_states(parameters: float, stage: int, devices: int) -> float:
    """Bytes a device holds of full mixed-precision training: the table of the ZeRO paper.

    16 P, 4 P + 12 P / N, 2 P + 14 P / N and 16 P / N for stages 0 to 3.

    Raises:
        ValueError: a stage outside 0 to 3, or no device.
    """
    if stage not in (0, 1, 2, 3) or devices < 1:
        raise ValueError(f"stage={stage}, devices={devices}: give a stage from 0 to 3 and a device")
    divided = {0: 0, 1: 12, 2: 14, 3: 16}[stage]
    return parameters * (16 - divided + divided / devices)


def deepspeed_zero3(
    parameters: float, largest_layer: float, devices: int, offload: str = "none"
) -> tuple[float, float]:
    """(device, host) bytes as DeepSpeed's `estimate_zero3_model_states_mem_needs` counts them.

    It counts 18 B a parameter, fp32 gradients included, and one gathered layer of 4 B, on a single
    node.

    Args:
        offload: `none`, `optimizer`, or `all` (weights too).
    """
    layer = 4 * largest_layer
    if offload == "all":
        return layer, 18 * parameters * HOST_FACTOR
    if offload == "optimizer":
        return layer + 2 * parameters / devices, 16 * parameters * HOST_FACTOR
    return layer + 18 * parameters / devices, 4 * largest_layer * devices * HOST_FACTOR


def master_bytes(options: Options, trained: int) -> int:
    """fp32 copies of 16-bit weights, which DeepSpeed's optimizers keep and step on."""
    return FP32 * trained if options.deepspeed and trained_width(options) < FP32 else 0


def host_bytes(arch: Architecture, options: Options, trained: int) -> int:
    """Bytes that offloading moves to all hosts together, buffers included."""
    if options.offload == "none":
        return 0
    width = DTYPES[options.dtype]
    if options.sharding == "fsdp":
        moving = trained_width(options) * 4 * trained  # weight, gradient and two means
        return moving + (
            width * (arch.parameters - trained) if not options.is_peft else width * arch.parameters
        )
    states = trained * 16
    if options.zero_stage == 3:
        states += width * arch.parameters if options.is_peft else 2 * trained
    return round(states * HOST_FACTOR)


def _is_cut(options: Options) -> bool:
    """Whether a device holds less than all: one device without offload holds all of it."""
    return options.num_devices > 1 or options.offload != "none"


def gathered_terms(arch: Architecture, options: Options, in_layer: bool) -> list[Term]:
    """Weights that a device holds whole again while it computes.

    Args:
        in_layer: inside a decoder layer; else where the loss is computed.
    """
    width = 2 if options.autocast else DTYPES[options.dtype]
    ends = arch.embedding_parameters + arch.head_parameters + arch.norm_parameters
    layer = arch.layer_parameters
    layer_bytes = layer * width
    if options.is_4_bit:
        whole = norm_width(options) * arch.bare_weights
        layer_bytes = (arch.quantized_weights / 2 + whole) / arch.layers
    if options.sharding == "fsdp":
        if not _is_cut(options):
            return []
        found = term(
            "gathered: embedding, head and last norm",
            ends * (head_width(options) if options.is_4_bit else width),
            f"{ends:,} numbers: FSDP's root unit stays whole from forward to the end of backward",
            f"torch.distributed.fsdp, FULL_SHARD; {PUBLIC_ROWS}",
            MEASURED,
        )
        if not in_layer:
            return found
        # The next layer is gathered while this one computes, except by the last one in backward,
        # which is where frozen units peak.
        ahead = 1 if options.is_peft else 2
        return found + term(
            "gathered: decoder layers",
            ahead * layer_bytes,
            f"{ahead} x {layer:,} numbers of a layer",
            f"torch.distributed.fsdp, BACKWARD_PRE; {PUBLIC_ROWS}",
            MEASURED if options.is_peft else DERIVED,
        )
    if options.zero_stage == 3:
        largest = max(arch.vocabulary * arch.hidden, layer if in_layer else 0)
        ahead = min(PREFETCH, max(0, arch.parameters - largest))
        return term(
            "gathered weights",
            (largest + ahead) * width,
            f"{width} B x ({largest:,} of the unit at work + {ahead:,} fetched ahead)",
            "DeepSpeed stage3_prefetch_bucket_size",
            UNVERIFIED,
        )
    return []


def root_gradients_wait(options: Options) -> bool:
    """Whether gradients of head and embedding stay whole until backward ends, as under FSDP."""
    return options.sharding == "fsdp" and options.method == "full" and _is_cut(options)


def root_gradient_terms(arch: Architecture, options: Options, embedding: bool) -> list[Term]:
    """Whole gradients that FSDP's root unit holds: it divides them when backward is through.

    Args:
        embedding: with the embedding's gradient, which comes last; else the output end's alone.
    """
    if not root_gradients_wait(options):
        return []
    numbers = arch.norm_parameters + arch.vocabulary * arch.hidden
    if embedding:
        numbers = arch.embedding_parameters + arch.head_parameters + arch.norm_parameters
    width = 2 if options.autocast else DTYPES[options.dtype]
    return term(
        "whole gradients of FSDP's root unit",
        numbers * width,
        f"{width} B x {numbers:,} numbers of {'embedding, head' if embedding else 'the head'} and "
        "last norm, divided when backward is through",
        "torch.distributed.fsdp: a unit's gradients are reduced together",
        DERIVED,
    )


def copied(gradients: list[Term]) -> list[Term]:
    """A unit's gradients once more, side by side, as they are sent."""
    return term(
        "gradients copied to be sent",
        total(gradients),
        "a second copy of the whole gradients",
        "torch.distributed.fsdp: input of the reduce-scatter",
        DERIVED,
    )


def communication_terms(arch: Architecture, options: Options, trained: int) -> list[Term]:
    """Buffers that gradients travel in, alive from backward on."""
    if options.num_devices == 1 and not options.deepspeed:
        return []
    width = trained_width(options)
    if options.deepspeed:
        bucket = min(BUCKET, trained)
        copies = 1 if options.zero_stage == 3 else 2  # stages 1 and 2 gather weights in one, too
        return term(
            "DeepSpeed buckets",
            copies * bucket * width,
            f"{copies} x {width} B x {bucket:,} numbers, at most 5e8",
            "DeepSpeed reduce_bucket_size and allgather_bucket_size",
            UNVERIFIED,
        )
    if options.sharding == "fsdp":
        return []
    return term(
        "DDP buckets",
        gradient_bytes(arch, options),
        f"{width} B x Pt: a second copy of all gradients",
        "torch DistributedDataParallel without gradient_as_bucket_view",
        DERIVED,
    )


def retained_by_fsdp(arch: Architecture, options: Options) -> float:
    """Bytes of gradients that FSDP keeps until backward ends, under checkpointing with PEFT.

    A unit without trained weights gets a hook on its input, to know when backward is through with
    it. The hook holds the input's gradient accumulator, and that the recomputed layer's detached
    input with its `.grad`. So neither checkpoints nor the gradients between layers are freed.
    """
    frozen = options.sharding == "fsdp" and options.is_peft and options.num_devices > 1
    if not (frozen and options.gradient_checkpointing):
        return 0
    width = FP32 if options.is_4_bit and options.kbit_prepared else DTYPES[options.dtype]
    return max(0, arch.layers - 2) * options.tokens * arch.hidden * width


FSDP_HOOK = (
    "torch.distributed.fsdp._runtime_utils._register_post_backward_reshard_only_hook; "
    + PUBLIC_ROWS
)
