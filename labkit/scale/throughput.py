"""How long a training step takes on many devices: a MODEL, of products and bytes that are counted.

Nothing here is measured. Seconds are counts divided by rates: the products of a step by what a
device reaches of its peak, the bytes on the wire by the slowest link of a ring. What no count
gives, the share of the peak and the share of the traffic that hides behind the products, stands
in `Assumptions`. `labkit.scale.published` holds the model to what others measured.

>>> mistral = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
...            "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
...            "vocab_size": 32000}
>>> one = step_time(mistral, Cluster.of("A100 80GB"), batch_size=4, seq_len=4096)
>>> eight = step_time(mistral, Cluster.of("A100 80GB", devices=8), sharding="fsdp",
...                   batch_size=4, seq_len=4096)
>>> one.communication_seconds, 7 < eight.tokens_per_second / one.tokens_per_second < 8
(0.0, True)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from labkit.memory.architecture import Architecture, read
from labkit.memory.closed_form import build_options, load_config
from labkit.memory.flops import step_flops
from labkit.memory.gpus import find
from labkit.memory.options import DTYPES, Options, check_fit
from labkit.memory.phases import Step
from labkit.memory.state import trained_width

GB = 10**9
SENT = 2
"""Bytes of a number on the wire where an engine casts it for the way, and of all activations."""


@dataclass(frozen=True)
class Assumptions:
    """What is assumed because nothing here can count it. Change one, and see what it decides."""

    efficiency: float = 0.5
    """Share of a device's peak that products reach while they run. The 20 public runs of
    data/memory/public.json lie between 0.41 and 0.65, and 0.5 is a round number among them. On an
    H200 a plain loop reached 0.42 to 0.46 with all of 7 to 8 B trained, 0.28 to 0.34 with LoRA."""
    overlap: float = 0.5
    """Share of the shorter of products and traffic that runs behind the longer one, 0 to 1. FSDP
    and ZeRO both fetch ahead; how much of it hides differs, so 0 and 1 give the range."""
    host_bandwidth: float = 100 * GB
    """Bytes per second between a host's memory and its cores, which an optimizer on the host is
    bound by: half the peak of eight DDR4-3200 channels. Unverified."""
    host_link_bandwidth: float = 25 * GB
    """Bytes per second between a host and one of its devices, one direction. Unverified."""

    def __post_init__(self) -> None:
        for name in ("efficiency", "overlap"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "efficiency" and value == 0):
                raise ValueError(f"{name}={value}: give a share from 0 to 1")
        for name in ("host_bandwidth", "host_link_bandwidth"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give bytes per second above 0")


@dataclass(frozen=True)
class Cluster:
    """Equal devices in equal machines."""

    flops: float
    """Dense 16-bit operations of one device per second, peak."""
    devices: int = 1
    """On all machines together."""
    node_size: int = 8
    """Devices of one machine."""
    link_bandwidth: float = 300 * GB
    """Bytes per second of one device to the others of its machine, one direction."""
    node_bandwidth: float = 50 * GB
    """Bytes per second of a whole machine to the others, one direction; all of its adapters. The
    default is 400 Gbit/s, as cloud machines with eight A100 have it."""

    def __post_init__(self) -> None:
        for name in ("flops", "link_bandwidth", "node_bandwidth"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: give a number above 0")
        for name in ("devices", "node_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")

    @classmethod
    def of(cls, gpu: str, devices: int = 1, **other: Any) -> "Cluster":
        """A cluster of a class of card, with that card's peak and links.

        Args:
            gpu: as `labkit.memory.gpus.find` takes it.
            other: other fields, such as `node_bandwidth`.

        Raises:
            ValueError: no such card, or a field that makes no sense.
        """
        card = find(gpu)
        return cls(card.flops, devices, **{"link_bandwidth": card.link_bandwidth, **other})

    @property
    def nodes(self) -> int:
        """Machines that it takes."""
        return -(-self.devices // self.node_size)

    def ring_bandwidth(self, rings: int = 1) -> float:
        """Bytes per second along a ring of devices: its slowest link decides.

        Args:
            rings: how many cross between the same two machines at a time, and share the wire.
        """
        if self.nodes == 1:
            return self.link_bandwidth
        return min(self.link_bandwidth, self.node_bandwidth / rings)


# ---- bytes on the wire ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Volume:
    """What one step moves between devices, as multiples of the model's size."""

    gather_forward: float
    """Of all weights, before they are used."""
    gather_backward: float
    reduce: float
    """Of gradients."""
    gather_updated: float = 0.0
    """Of the weights that were trained, after the optimizer's step."""
    inside: float = 0.0
    """Of all weights, but within each machine only."""

    @property
    def total(self) -> float:
        """As papers count it: what crosses between machines when everything is trained."""
        return self.gather_forward + self.gather_backward + self.reduce + self.gather_updated


VOLUMES: Mapping[str, Volume] = {
    "ddp": Volume(0, 0, 2),  # an all-reduce is a reduce-scatter and an all-gather
    "zero1": Volume(0, 0, 1, gather_updated=1),
    "zero2": Volume(0, 0, 1, gather_updated=1),
    "zero3": Volume(1, 1, 1),
    "fsdp": Volume(1, 1, 1),
    "zero++": Volume(0.5, 0, 0.25, inside=1),
}
"""ZeRO (arXiv:1910.02054, section 7): 2 for data parallelism and stages 1 and 2, 3 for stage 3.
FSDP (arXiv:2304.11277, section 3.2.2): 3. ZeRO++ (arXiv:2306.10209, section 1): weights in 8 bits
forward, none between machines backward, gradients in 4 bits: 0.75."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank sends in one step, along a ring."""

    gather_bytes: float
    """Of weights."""
    reduce_bytes: float
    """Of gradients."""
    inside_bytes: float = 0.0
    """Of weights, within a machine only."""

    @property
    def bytes(self) -> float:
        """All that goes around the ring of all devices."""
        return self.gather_bytes + self.reduce_bytes


def traffic(
    strategy: str,
    weights_bytes: float,
    gradients_bytes: float,
    devices: int,
    node_size: int = 8,
    passes: int = 1,
) -> Traffic:
    """What each rank sends in one optimizer step.

    To gather M bytes, or to reduce and scatter them, every rank of a ring of N sends (N - 1) / N
    times M (Patarasuk and Yuan 2009). Nothing is sent where there is one device.

    Args:
        strategy: of `VOLUMES`.
        weights_bytes: of all weights as they travel, frozen ones too.
        gradients_bytes: of what is trained, as it travels.
        devices: that hold the same data-parallel model.
        passes: micro-batches of the step. Stage 3, FSDP and ZeRO++ gather and reduce in each,
            stage 2 reduces in each, DDP and stage 1 once for all.

    Raises:
        ValueError: an unknown strategy, or a number below 1.
    """
    if strategy not in VOLUMES:
        raise ValueError(f"strategy={strategy!r}: use {', '.join(VOLUMES)}")
    if min(devices, node_size, passes) < 1:
        raise ValueError(
            f"devices={devices}, node_size={node_size}, passes={passes}: give 1 or more"
        )
    volume = VOLUMES[strategy]
    gathers = passes if volume.gather_forward else 1
    reduces = passes if volume.gather_forward or strategy == "zero2" else 1
    part = (devices - 1) / devices
    within = min(devices, node_size)
    gathered = (volume.gather_forward + volume.gather_backward) * weights_bytes * gathers
    return Traffic(
        part * (gathered + volume.gather_updated * gradients_bytes),
        part * volume.reduce * gradients_bytes * reduces,
        (within - 1) / within * volume.inside * weights_bytes * gathers,
    )


def tensor_parallel_bytes(
    tokens: int, hidden: int, devices: int, checkpointing: bool = False
) -> float:
    """Bytes that each rank sends for one layer when its matrices are divided among devices.

    Attention and MLP each end in an all-reduce of tokens x hidden numbers, forward and backward
    (Shoeybi et al. 2019, arXiv:1909.08053, section 3), and forward again under checkpointing.
    """
    all_reduces = 6 if checkpointing else 4
    return all_reduces * 2 * (devices - 1) / devices * tokens * hidden * SENT


def pipeline_bubble(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """Share of a step in which a stage waits: (p - 1) / (m + p - 1).

    Huang et al. 2018 (arXiv:1811.06965, section 2.3). With `chunks` v of layers on each stage in
    turn, the wait is v times shorter (Narayanan et al. 2021, arXiv:2104.04473, section 2.2).

    Raises:
        ValueError: a number below 1.
    """
    if min(stages, micro_batches, chunks) < 1:
        raise ValueError(
            f"stages={stages}, micro_batches={micro_batches}, chunks={chunks}: give 1 or more"
        )
    waits = (stages - 1) / chunks
    return waits / (micro_batches + waits)


# ---- seconds -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTime:
    """One optimizer step, by the model."""

    tokens: int
    """Of all devices."""
    devices: int
    model_flops: float
    """Operations on one device, without what checkpointing repeats."""
    flops: float
    """Operations on one device, all of them."""
    compute_seconds: float
    communication_seconds: float
    """Of the traffic among data-parallel devices, hidden or not."""
    hidden_seconds: float
    """Of the shorter of the two above, behind the longer one."""
    tensor_seconds: float
    """Of the traffic of divided matrices, which the products wait for."""
    bubble_seconds: float
    """That a pipeline stage waits."""
    host_seconds: float
    """For what offloading does on the host, and on the way there."""
    assumptions: Assumptions

    @property
    def seconds(self) -> float:
        return (
            self.compute_seconds
            + self.communication_seconds
            - self.hidden_seconds
            + self.tensor_seconds
            + self.bubble_seconds
            + self.host_seconds
        )

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.tokens / self.seconds

    @property
    def flops_per_second(self) -> float:
        """Of one device, with what checkpointing repeats: the TFLOP/s that papers report."""
        return self.flops / self.seconds


def step_time(
    config: Mapping[str, Any] | str | Path,
    cluster: Cluster,
    assumptions: Assumptions | None = None,
    *,
    strategy: str | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    **options: Any,
) -> StepTime:
    """Seconds of one optimizer step of a training on a cluster.

    Left out: the optimizer's step on a device, casts, kernel starts, and what one pipeline stage
    sends the next; all are small beside the products of batches that fill a device.

    Args:
        config, options: as for `labkit.memory.estimate`; `num_devices` is the cluster's own.
            `batch_size` is of one data-parallel device, or of the group that shares one model;
            `accumulation_steps` are the micro-batches of the step.
        strategy: of `VOLUMES`; None takes what the options say: `sharding`, `zero_stage`, or DDP.
        tensor_parallel: devices of one machine that share each matrix.
        pipeline_parallel: stages that share the layers, one machine or more each.

    Raises:
        ValueError: devices that the parallel sizes do not divide, or as `labkit.memory.estimate`.
    """
    assumptions = assumptions or Assumptions()
    shared = tensor_parallel * pipeline_parallel
    if min(tensor_parallel, pipeline_parallel) < 1 or cluster.devices % shared:
        raise ValueError(
            f"tensor_parallel={tensor_parallel} x pipeline_parallel={pipeline_parallel} does not "
            f"divide {cluster.devices} devices: choose sizes that do"
        )
    arch = read(load_config(config), options.get("experts"))
    replicas = cluster.devices // shared
    chosen = build_options(arch, {**options, "num_devices": replicas})
    check_fit(arch, chosen)
    passes = chosen.accumulation_steps

    counted = step_flops(arch, chosen)
    flops = counted.total * passes / shared
    compute = flops / (cluster.flops * assumptions.efficiency)
    sent_per_layer = tensor_parallel_bytes(
        chosen.tokens, arch.hidden, tensor_parallel, chosen.gradient_checkpointing
    )
    tensor = sent_per_layer * arch.layers / pipeline_parallel * passes / cluster.link_bandwidth
    bubble = pipeline_bubble(pipeline_parallel, passes)
    communication = _data_parallel_seconds(
        strategy or _strategy(chosen), arch, chosen, cluster, tensor_parallel, shared
    )
    return StepTime(
        tokens=chosen.tokens * passes * replicas,
        devices=cluster.devices,
        model_flops=(counted.forward + counted.backward) * passes / shared,
        flops=flops,
        compute_seconds=compute,
        communication_seconds=communication,
        hidden_seconds=assumptions.overlap * min(compute, communication),
        tensor_seconds=tensor,
        bubble_seconds=(compute + tensor) * bubble / (1 - bubble),
        host_seconds=_host_seconds(arch, chosen, cluster, assumptions),
        assumptions=assumptions,
    )


def with_range(step: StepTime) -> tuple[StepTime, StepTime]:
    """The same step with no traffic hidden, and with all that can be: the model's own range."""
    shorter = min(step.compute_seconds, step.communication_seconds)
    return (
        replace(step, hidden_seconds=0.0, assumptions=replace(step.assumptions, overlap=0)),
        replace(step, hidden_seconds=shorter, assumptions=replace(step.assumptions, overlap=1)),
    )


def _strategy(options: Options) -> str:
    if options.sharding == "fsdp":
        return "fsdp"
    return f"zero{options.zero_stage}" if options.zero_stage else "ddp"


def _trained(arch: Architecture, options: Options) -> int:
    return Step(arch, options).n_trained


def _data_parallel_seconds(
    strategy: str,
    arch: Architecture,
    options: Options,
    cluster: Cluster,
    tensor_parallel: int,
    shared: int,
) -> float:
    """Seconds of the traffic among devices that hold the same model, or parts of one."""
    width = SENT if options.autocast else DTYPES[options.dtype]
    weights = arch.parameters * width
    if options.is_4_bit:  # packed weights travel as they lie
        weights = arch.quantized_weights / 2 + (arch.parameters - arch.quantized_weights) * width
    # DDP reduces gradients as wide as they are; FSDP and DeepSpeed cast them for the way.
    cast = options.deepspeed or (options.sharding == "fsdp" and options.autocast)
    sent = traffic(
        strategy,
        weights / shared,
        _trained(arch, options) * (SENT if cast else trained_width(options)) / shared,
        options.num_devices,
        cluster.node_size,
        options.accumulation_steps,
    )
    around = sent.bytes / cluster.ring_bandwidth(rings=tensor_parallel)
    return around + sent.inside_bytes / cluster.link_bandwidth


def _host_seconds(
    arch: Architecture, options: Options, cluster: Cluster, assumptions: Assumptions
) -> float:
    """Gradients go down, the host's cores step Adam, weights come up (arXiv:2101.06840).

    Adam reads the gradient, the fp32 copy and two means and writes all but the first, and the
    16-bit weight: 30 B a parameter.
    """
    if options.offload == "none":
        return 0.0
    trained = _trained(arch, options)
    held = DTYPES[options.dtype] * arch.parameters / cluster.devices
    whole = options.zero_stage == 3 or options.sharding == "fsdp"
    up = held * 2 * options.accumulation_steps if whole else SENT * trained / cluster.devices
    down = SENT * trained / cluster.devices * options.accumulation_steps
    moved = (up + down) / assumptions.host_link_bandwidth
    return moved + 30 * trained / cluster.nodes / assumptions.host_bandwidth
