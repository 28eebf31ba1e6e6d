"""Which configuration to launch: for a model, a card and a method, the simplest one that fits.

Simple is what stands first in `ORDER`: fewer machines before more, and on the same machines what
asks for less before what asks for more. Whether one fits is the estimate's word (`labkit.memory`),
with what `labkit.memory.plan` keeps free; how fast it is, is the throughput model's.

>>> row = choose("Meta-Llama-3-8B", "A100 80GB", "full")
>>> row.configuration.name, row.file
('8 GPUs, FSDP2', '8_gpus_fsdp2')
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from labkit.memory import gpus
from labkit.memory.closed_form import estimate, load_config
from labkit.memory.gpus import Gpu
from labkit.memory.plan import fits, largest_batch
from labkit.memory.units import size_text
from labkit.scale.throughput import Cluster, step_time, with_range
from labkit.usage import Parser

HOST_BYTES = 2**40
"""Memory of one machine that offloading may fill: about what cloud machines with eight A100 have.
An assumption; `host_bytes` takes another."""
MOST_ROWS = 64
"""Largest batch of a row: more rows in one pass no longer make a device faster."""
NODE_SIZE = 8


@dataclass(frozen=True)
class Configuration:
    """One way to launch, as one of `labkit.scale.configs` describes it to accelerate."""

    name: str
    file: str
    """Of `labkit/scale/configs`, without `.yaml`."""
    devices: int
    options: Mapping[str, Any]
    """As `labkit.memory.estimate` takes them."""
    why: str
    """What it costs beside the ones before it."""


ORDER = (
    Configuration(
        "1 GPU", "1_gpu", 1, {"gradient_checkpointing": False},
        "nothing is sent and nothing is computed twice",
    ),
    Configuration(
        "1 GPU, checkpointing", "1_gpu", 1, {},
        "one switch; products of a layer are made once more",
    ),
    Configuration(
        "8 GPUs, FSDP2", "8_gpus_fsdp2", 8, {"sharding": "fsdp"},
        "a whole machine; weights travel twice in each step",
    ),
    Configuration(
        "8 GPUs, ZeRO-3, offload", "8_gpus_zero3_offload", 8,
        {"zero_stage": 3, "offload": "cpu"},
        "the same machine and DeepSpeed; the host steps the optimizer, slowly",
    ),
    Configuration(
        "2 x 8 GPUs, FSDP2", "2_nodes_8_gpus_fsdp2", 16, {"sharding": "fsdp"},
        "a second machine; the wire between them is the slowest",
    ),
)  # fmt: skip
"""From the simplest on. Offloading stands before a second machine: it needs nothing that is not
there already. It is often the slower one, which is what the table shows."""


@dataclass(frozen=True)
class Row:
    """What to launch for one model, card and method."""

    model: str
    gpu: str
    method: str
    seq_len: int
    precision: str
    """Of the products; and of the weights, where they are wider."""
    configuration: Configuration | None
    """The first of `ORDER` that fits; None where none does."""
    batch_size: int = 0
    """Rows of one pass on one device: the largest power of two that fits, at most 64."""
    peak_bytes: int = 0
    """Allocated on one device, by the estimate."""
    host_bytes: int = 0
    """On one machine's host."""
    tokens_per_second: float = 0.0
    """Of all devices, by the throughput model."""
    tokens_per_second_range: tuple[float, float] = (0.0, 0.0)
    """The model's own: with none of the traffic hidden, and with all that can be."""
    refused: tuple[str, ...] = ()
    """Why each simpler configuration was not taken."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """All options of the estimate, to ask it again."""

    @property
    def file(self) -> str | None:
        return self.configuration.file if self.configuration else None

    @property
    def devices(self) -> int:
        return self.configuration.devices if self.configuration else 0

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types; the configuration by its name."""
        own = {name: value for name, value in vars(self).items() if name != "configuration"}
        chosen = self.configuration
        return {
            **own,
            "configuration": chosen and chosen.name,
            "devices": self.devices,
            "file": self.file,
            "options": dict(self.options),
        }


MODELS = ("Qwen2.5-0.5B", "Qwen2.5-3B", "Meta-Llama-3-8B", "LLaMA-33B", "Llama-2-70b")
CARDS = ("T4", "RTX 4090", "A100 80GB", "H100 80GB")
METHODS = ("full", "lora", "qlora")


def launch_table(
    models: Iterable[str] = MODELS,
    cards: Iterable[str] = CARDS,
    methods: Iterable[str] = METHODS,
    **options: Any,
) -> tuple[Row, ...]:
    """A row for every model, method and card, in that order; arguments as `choose` takes them.

    Raises:
        ValueError: as `choose`.
    """
    cards, methods = tuple(cards), tuple(methods)
    return tuple(
        choose(model, card, method, **options)
        for model in models
        for method in methods
        for card in cards
    )


def choose(
    model: str,
    card: str,
    method: str = "full",
    *,
    seq_len: int = 2048,
    reserve_bytes: int | None = None,
    host_bytes: int = HOST_BYTES,
    **options: Any,
) -> Row:
    """The simplest configuration of `ORDER` that trains a model on a class of card.

    Args:
        model: as for `labkit.memory.estimate`.
        card: as `labkit.memory.gpus.find` takes it.
        method: as of `estimate`; `options` too. The loss is computed as TRL 1.x does, in parts.
        reserve_bytes: kept free on the card; None is the default of `labkit.memory.plan`.
        host_bytes: memory of one machine that offloading may fill.

    Raises:
        ValueError: an unknown model, card or option.
    """
    gpu = gpus.find(card)
    config = load_config(model)
    own = {"loss_path": "fused", "cublas_workspace": gpu.cublas_workspace}
    given = {**own, **options, "method": method, "seq_len": seq_len}
    refused: list[str] = []
    for configuration in ORDER:
        wanted = {**given, **_precision(method, configuration), **configuration.options}
        wanted |= {"num_devices": configuration.devices, **options}
        reason = _refusal(config, gpu, configuration, wanted, reserve_bytes, host_bytes)
        if reason:
            refused.append(f"{configuration.name}: {reason}")
            continue
        return _row(model, config, gpu, configuration, wanted, reserve_bytes, tuple(refused))
    return Row(model, gpu.name, method, seq_len, _words(gpu, given), None, refused=tuple(refused))


def _precision(method: str, configuration: Configuration) -> dict[str, Any]:
    """What accelerate's `mixed_precision` makes of each method.

    Full tuning computes in 16 bits over fp32 weights; adapters are fp32 beside a 16-bit base;
    DeepSpeed holds 16-bit weights, and the fp32 copy in its optimizer.
    """
    if "zero_stage" in configuration.options:
        return {"dtype": "bf16"}
    return {"dtype": "fp32" if method == "full" else "bf16", "autocast": True}


def _words(gpu: Gpu, options: Mapping[str, Any]) -> str:
    """Precision in words; fp16 takes the same bytes as bf16, where a card has no bf16."""
    narrow = "bf16" if gpu.bf16 else "fp16"
    if options["method"] == "qlora":
        return f"nf4, {narrow}"
    return f"{narrow} over fp32" if options.get("dtype") == "fp32" else narrow


def _refusal(
    config: Mapping[str, Any],
    gpu: Gpu,
    configuration: Configuration,
    options: dict[str, Any],
    reserve: int | None,
    host_bytes: int,
) -> str | None:
    """Why a configuration cannot be taken with even one row; None where it can."""
    one_row = {**options, "batch_size": 1}
    try:
        found = estimate(config, **one_row)
    except ValueError as error:
        if "num_devices" in str(error) or configuration.devices == 1:
            raise
        return str(error)
    if not fits(config, gpu.memory_bytes, reserve, **one_row):
        kept = gpus.reserve_bytes(gpu.memory_bytes) if reserve is None else reserve
        return (
            f"one row takes {size_text(found.peak_allocated_bytes)} of the "
            f"{size_text(gpu.memory_bytes - kept)} that tensors may have"
        )
    on_host = found.host_bytes / _nodes(configuration)
    if on_host > host_bytes:
        return f"the host would hold {size_text(on_host)} of {size_text(host_bytes)}"
    return None


def _nodes(configuration: Configuration) -> int:
    return -(-configuration.devices // NODE_SIZE)


def _row(
    model: str,
    config: Mapping[str, Any],
    gpu: Gpu,
    configuration: Configuration,
    options: dict[str, Any],
    reserve: int | None,
    refused: tuple[str, ...],
) -> Row:
    rows = largest_batch(config, gpu.memory_bytes, reserve, **options)
    assert rows, "one row was found to fit"
    options = {**options, "batch_size": min(MOST_ROWS, 1 << (rows.bit_length() - 1))}
    found = estimate(config, **options)
    cluster = Cluster.of(gpu.name, configuration.devices, node_size=NODE_SIZE)
    on_all = {name: value for name, value in options.items() if name != "num_devices"}
    step = step_time(config, cluster, **on_all)
    slow, fast = with_range(step)
    return Row(
        model=model,
        gpu=gpu.name,
        method=options["method"],
        seq_len=options["seq_len"],
        precision=_words(gpu, options),
        configuration=configuration,
        batch_size=options["batch_size"],
        peak_bytes=found.peak_allocated_bytes,
        host_bytes=round(found.host_bytes / _nodes(configuration)),
        tokens_per_second=step.tokens_per_second,
        tokens_per_second_range=(slow.tokens_per_second, fast.tokens_per_second),
        refused=refused,
        options=options,
    )


# ---- the command ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; exits with 0."""
    parser = Parser(
        prog="labkit launch-table",
        description="For each model, method and card, the simplest configuration that fits, the "
        "largest batch, the peak by the estimate, and tokens per second by a model that is one.",
        epilog="example: labkit launch-table Meta-Llama-3-8B --gpu h100 --method full --why",
    )
    parser.add_argument(
        "model", nargs="*", help=f"names, or paths of a config.json ({', '.join(MODELS)})"
    )
    parser.add_argument(
        "--gpu", action="append", help=f"a class of card; may be repeated ({', '.join(CARDS)})"
    )
    parser.add_argument(
        "--method", action="append", choices=METHODS, help="may be repeated (all three)"
    )
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a row (2048)")
    parser.add_argument("--why", action="store_true", help="say why no simpler one was taken")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(arguments)
    rows = launch_table(
        given.model or MODELS,
        given.gpu or CARDS,
        given.method or METHODS,
        seq_len=given.seq_len,
    )
    if given.json:
        print(json.dumps([row.to_json() for row in rows], indent=1))
        return 0
    print("\n".join(table_lines(rows, why=given.why)))
    return 0


HEAD = ("model", "method", "GPU", "configuration", "precision", "batch", "peak", "tokens/s (model)")


def table_lines(rows: Sequence[Row], why: bool = False) -> list[str]:
    """The table as text: a line for each row, the files and the order below it.

    Args:
        why: below each row, why the simpler configurations were not taken.
    """
    cells = [HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEAD))]
    numbers = range(len(HEAD) - 3, len(HEAD))
    lines = []
    for row, line in zip([None, *rows], cells, strict=True):
        lines.append(
            "  ".join(
                text.rjust(width) if column in numbers else text.ljust(width)
                for column, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
        )
        if row and why:
            lines += [f"    not {reason}" for reason in row.refused]
    used = {row.file for row in rows}
    files = {one.name: one.file for one in ORDER if one.file in used}
    return [
        *lines,
        "",
        f"{rows[0].seq_len:,} tokens a row; simplest first: {'; '.join(one.name for one in ORDER)}",
        "tokens/s: of all devices, by a model that nobody measured; in brackets its range. Small "
        "models on fast cards stay below it.",
        *(f"{name}: labkit/scale/configs/{file}.yaml" for name, file in files.items()),
    ]


def _cells(row: Row) -> tuple[str, ...]:
    if row.configuration is None:
        return (row.model, row.method, row.gpu, "none of them fits", row.precision, "", "", "")
    low, high = row.tokens_per_second_range
    speed = f"{_rounded(row.tokens_per_second)}"
    if _rounded(low) != _rounded(high):
        speed += f" ({_rounded(low)} to {_rounded(high)})"
    return (
        row.model,
        row.method,
        row.gpu,
        row.configuration.name,
        row.precision,
        str(row.batch_size),
        size_text(row.peak_bytes),
        speed,
    )


def _rounded(value: float) -> str:
    """Two figures that count: the model knows no more."""
    return f"{float(f'{value:.2g}'):,.0f}"


if __name__ == "__main__":
    sys.exit(main())
