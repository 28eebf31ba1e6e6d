"""What can be changed about a training to need less memory: each change, and what it costs.

A lever says which options it would set, gentlest setting first, and what that costs in words. What
it saves is left to the estimate (`labkit.memory.plan`), and how long it takes to a count of
products (`labkit.memory.flops`) or to a public measurement, where there is one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from labkit.memory.architecture import Architecture
from labkit.memory.options import DTYPES, Options, window_ends_in_row
from labkit.memory.sharding import host_bytes
from labkit.memory.state import numbers, trained_parameters, trained_width

Change = dict[str, Any]
GB = 10**9
PCIE4 = 32 * GB
A100_RUNS = (
    "on an A100: public rows of Mistral-7B, batch 4, 4,096 tokens, under checkpointing; that LoRA "
    "ran without autocast and QLoRA with it, its norms not prepared"
)
MOST_SETTINGS = 6
"""At how many sizes of a pass a plan looks: a refusal must not take longer than an estimate."""
MOST_DEVICES = 8
"""Up to how many devices sharding is proposed: one machine's."""


@dataclass(frozen=True)
class Lever:
    """One way to need less memory."""

    name: str
    changes: Callable[[Architecture, Options], Sequence[Change]]
    """Options to set, the gentlest first; none where the lever does not apply or is pulled."""
    cost: Callable[[Architecture, Options, Options], str]
    """What it costs, in words, from the options before and after."""
    same_result: bool = True
    """Whether the same numbers are trained on the same data by the same rule; rounding aside."""
    group: str = ""
    """Levers of one group are variants of one idea."""
    measured: Callable[[Architecture, Options], tuple[float, str] | None] = lambda arch, before: (
        None
    )
    """(time of a step as a multiple of that before, where it was measured), or None."""
    traffic: bool = False
    """Whether it moves bytes over a link, whose time no count of products knows."""
    needs_devices: bool = False


def _says(words: str) -> Callable[[Architecture, Options, Options], str]:
    return lambda arch, before, after: words


# ---- which options a lever sets ----------------------------------------------------------------


def _fused_loss(arch: Architecture, options: Options) -> list[Change]:
    return [] if options.loss_path == "fused" else [{"loss_path": "fused"}]


def _fused_step(arch: Architecture, options: Options) -> list[Change]:
    plain = options.optimizer == "adamw" and not options.fused and not options.deepspeed
    return [{"fused": True}] if plain else []


def _kernel_attention(arch: Architecture, options: Options) -> list[Change]:
    """sdpa where flash cannot be: in fp32 and on a CPU."""
    sixteen_bit = options.autocast or options.dtype != "fp32"
    if options.attention == "eager":
        if sixteen_bit and options.device == "cuda":
            return [{"attention": "flash_attention_2"}]
        return [] if arch.softcap_attention else [{"attention": "sdpa"}]
    # Not a prefix: it trains without checkpointing and with short rows, where a mask is small.
    limited = options.padding or window_ends_in_row(arch, options)
    masked = options.attention == "sdpa" and limited
    if masked and sixteen_bit and options.device == "cuda":
        return [{"attention": "flash_attention_2"}]
    return []


def _checkpointing(arch: Architecture, options: Options) -> list[Change]:
    if options.gradient_checkpointing or options.method == "prefix":
        return []  # a recomputed layer would drop the prefix
    return [{"gradient_checkpointing": True}]


def _accumulation(arch: Architecture, options: Options) -> list[Change]:
    """Smaller passes with as many rows in a step: parts of the batch that divide it."""
    batch = options.batch_size
    return [
        {"batch_size": part, "accumulation_steps": options.accumulation_steps * batch // part}
        for part in _parts(batch)
    ]


def _parts(batch: int) -> list[int]:
    """Divisors of a batch from large to small, each one of the next; a few of them, and 1.

    >>> _parts(64), _parts(12), _parts(7), _parts(1)
    ([32, 16, 8, 4, 2, 1], [6, 3, 1], [1], [])
    """
    parts, divisor = [], 2
    while batch > 1:
        if divisor * divisor > batch:
            divisor = batch  # what is left is a prime
        while batch % divisor == 0:
            batch //= divisor
            parts.append(batch)
        divisor += 1
    thinned = -(-len(parts) // MOST_SETTINGS)
    return parts[:-1][::thinned] + parts[-1:] if parts else []


def _precomputed(arch: Architecture, options: Options) -> list[Change]:
    if options.objective != "dpo" or options.precompute_reference:
        return []
    return [{"precompute_reference": True}]


def _eight_bit(arch: Architecture, options: Options) -> list[Change]:
    fits = options.optimizer == "adamw" and options.device == "cuda" and not options.deepspeed
    return [{"optimizer": "adamw-8bit"}] if fits else []


def _paged(arch: Architecture, options: Options) -> list[Change]:
    adam = options.optimizer in ("adamw", "adamw-8bit")
    if not adam or options.device != "cuda" or options.deepspeed:
        return []
    return [{"optimizer": "paged-adamw-8bit"}]


def _sixteen_bit(arch: Architecture, options: Options) -> list[Change]:
    return [{"dtype": "bf16", "autocast": False}] if options.dtype == "fp32" else []


def _shards(arch: Architecture, options: Options) -> list[Change]:
    """The state over more devices, each with its own rows; FSDP unless DeepSpeed was chosen."""
    sharded = options.sharding == "fsdp" or options.zero_stage == 3
    first = 2 * options.num_devices if sharded or options.num_devices == 1 else options.num_devices
    engine: Change = {"sharding": "fsdp"}
    if options.deepspeed:
        engine = {"zero_stage": 2 if options.method == "qlora" else 3}
    counts = [n for n in (first, 2 * first, 4 * first) if n <= max(MOST_DEVICES, first)]
    return [{**engine, "num_devices": n} for n in counts]


def _offload(arch: Architecture, options: Options) -> list[Change]:
    if options.offload != "none" or options.device != "cuda":
        return []
    if options.zero_stage or options.sharding == "fsdp":
        return [{"offload": "cpu"}]
    if options.method == "qlora":
        return [{"sharding": "fsdp", "offload": "cpu"}]
    return [{"zero_stage": 3, "offload": "cpu"}]


def _lora(arch: Architecture, options: Options) -> list[Change]:
    return [{"method": "lora"}] if options.method in ("full", "freeze") else []


def _qlora(arch: Architecture, options: Options) -> list[Change]:
    # bitsandbytes quantizes linear layers; GPT-2's are Conv1D, and stacked experts are none.
    quantizable = arch.model_type != "gpt2" and not arch.bare_weights
    return [{"method": "qlora"}] if options.method == "lora" and quantizable else []


def _shorter(arch: Architecture, options: Options) -> list[Change]:
    return [{"seq_len": part} for part in (options.seq_len // 2, options.seq_len // 4) if part > 0]


# ---- what it costs -----------------------------------------------------------------------------


def _accumulation_cost(arch: Architecture, before: Options, after: Options) -> str:
    passes = after.accumulation_steps
    return (
        f"{passes} passes of {after.batch_size} instead of {before.accumulation_steps} of "
        f"{before.batch_size}: as many products, in smaller pieces, which use a GPU less well (not "
        "measured); gradients stay between the passes"
    )


def _shards_cost(arch: Architecture, before: Options, after: Options) -> str:
    n = after.num_devices
    gathered = _base_bytes(arch, after)
    reduced = trained_width(after) * numbers(trained_parameters(arch, after))
    sent = (2 * gathered + reduced) * (n - 1) / n
    rows = "1 row" if after.batch_size == 1 else f"{after.batch_size} rows"
    return (
        f"{n} devices, each with its own {rows}; each receives "
        f"{sent / GB:,.1f} GB in a pass: weights twice, gradients once"
    )


def _offload_cost(arch: Architecture, before: Options, after: Options) -> str:
    trained = numbers(trained_parameters(arch, after))
    moved = 2 * _base_bytes(arch, after) + 2 * trained_width(after) * trained
    return (
        f"weights, gradients and updates cross PCIe: {moved / GB:,.1f} GB in a step, "
        f"{moved / PCIE4:,.1f} s at the 32 GB/s of PCIe 4 at the least; a CPU does the update; the "
        f"hosts hold {host_bytes(arch, after, trained) / GB:,.0f} GB"
    )


def _base_bytes(arch: Architecture, options: Options) -> float:
    """Bytes of the base model's weights as they travel."""
    whole = DTYPES[options.dtype] * arch.parameters
    return whole - arch.quantized_weights * (DTYPES[options.dtype] - 0.5) * options.is_4_bit


def _lora_cost(arch: Architecture, before: Options, after: Options) -> str:
    trained = numbers(trained_parameters(arch, after))
    return (
        f"trains {trained:,} numbers, {trained / arch.parameters:.2%} of the model, with a rate "
        "about 10 times higher; lesson 03 compares what is learned"
    )


def _shorter_cost(arch: Architecture, before: Options, after: Options) -> str:
    return f"rows longer than {after.seq_len:,} tokens are cut: the rest is not learned from"


FULL_SPEED, LORA_SPEED, QLORA_SPEED = 3062.694, 3324.155, 3595.662
"""Tokens per second of the public rows of Mistral-7B at batch 4; the tests read them there."""

_ONE_GPU: Change = {
    "objective": "sft", "gradient_checkpointing": True, "dtype": "bf16", "autocast": False,
    "padding": False, "device": "cuda", "num_devices": 1, "zero_stage": None, "sharding": "none",
    "offload": "none",
}  # fmt: skip
"""How all of those runs were done."""
_LORA_RUN: Change = {
    "batch_size": 4, "seq_len": 4096, "attention": "flash_attention_2", "loss_path": "shifted",
    "lora_rank": 16, "lora_dropout": 0.1, "target_modules": "q_proj,k_proj,v_proj,o_proj",
    "double_quant": True, "kbit_prepared": True,
}  # fmt: skip
"""The LoRA run, whose price of 4 bits depends on all of it; prepared, for QLoRA then runs under
autocast, as it did there."""


def _measured(
    method: str, slower: float, faster: float, run: Change
) -> Callable[[Architecture, Options], tuple[float, str] | None]:
    """The public measurement, for a change of method in a large model trained as in `run`."""

    def look_up(arch: Architecture, before: Options) -> tuple[float, str] | None:
        wanted = {**_ONE_GPU, **run, "method": method}
        alike = all(getattr(before, name) == value for name, value in wanted.items())
        # Without a mask sdpa runs a flash kernel as well.
        alike = alike and before.attention != "eager"
        return (slower / faster, A100_RUNS) if alike and arch.parameters > 10**9 else None

    return look_up


LEVERS: tuple[Lever, ...] = (
    Lever(
        "fusing the loss", _fused_loss,
        _says("the logits are made and used piece by piece, by Liger's or TRL's own head"),
    ),
    Lever(
        "fused AdamW", _fused_step,
        _says("one kernel updates in place (transformers calls it adamw_torch_fused)"),
    ),
    Lever(
        "attention in a kernel", _kernel_attention,
        _says("one more product of queries and keys in backward, and far less traffic: faster in "
              "practice, which is not in the time"),
    ),
    Lever(
        "gradient checkpointing", _checkpointing,
        _says("every layer's forward pass runs twice"),
    ),
    Lever("accumulating smaller passes", _accumulation, _accumulation_cost),
    Lever(
        "precomputing the reference", _precomputed,
        _says("one forward pass over the data before training instead of one in every epoch"),
    ),
    Lever(
        "8-bit AdamW", _eight_bit,
        _says("states in 8 bits with a constant for each 256; Dettmers et al. 2022, "
              "arXiv:2110.02861, reach the same scores with them"),
        group="8-bit states",
    ),
    Lever(
        "paged 8-bit AdamW", _paged,
        _says("as 8-bit AdamW, and states go to the host where memory runs short; then a step "
              "waits for PCIe (not measured)"),
        group="8-bit states",
    ),
    Lever(
        "holding weights in bf16", _sixteen_bit,
        _says("weights and updates are rounded to 8 bits of mantissa: small updates are lost"),
        same_result=False,
    ),
    Lever("sharding over devices", _shards, _shards_cost, traffic=True, needs_devices=True),
    Lever("offloading to the CPU", _offload, _offload_cost, traffic=True),
    Lever(
        "LoRA instead of full", _lora, _lora_cost, same_result=False,
        measured=_measured("full", FULL_SPEED, LORA_SPEED, {}),
    ),
    Lever(
        "QLoRA instead of LoRA", _qlora,
        _says("weights in 4 bits, unpacked at each use; lesson 04 compares what is learned"),
        same_result=False,
        measured=_measured("lora", LORA_SPEED, QLORA_SPEED, _LORA_RUN),
    ),
    Lever("shortening rows", _shorter, _shorter_cost, same_result=False),
)  # fmt: skip
