"""`labkit plan`: does it fit, what is the most that would, what does each change save. No torch."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from labkit.memory import gpus, plan
from labkit.memory.command import add_config, add_training_options
from labkit.memory.units import parse_size, size_text
from labkit.usage import Parser, as_argument


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a plan; exits with 0 if it fits or no memory was named, with 1 if it does not fit."""
    given = vars(build_parser().parse_args(arguments))
    config, as_json = given.pop("config"), given.pop("json")
    memory, gpu, reserve = given.pop("memory"), given.pop("gpu"), given.pop("reserve")
    asked = {name: value for name, value in given.items() if value is not None}
    if gpu is not None:
        if asked.get("device") == "cpu":
            raise ValueError(
                f"--gpu {gpu!r} with --device cpu: a card's memory is not the CPU's: leave one "
                "out, or give --memory"
            )
        card = gpus.find(gpu)
        memory = card.memory_bytes
        asked.setdefault("cublas_workspace", card.cublas_workspace)
    report = plan.make_plan(config, memory, reserve, **asked)
    if as_json:
        print(json.dumps(_to_json(report), indent=2))
    else:
        print("\n".join(_lines(str(config), report)))
    return 1 if report["fits"] is False else 0


def build_parser() -> argparse.ArgumentParser:
    """Options of `labkit plan`: those of `labkit estimate`, and the memory to fit into."""
    parser = Parser(
        prog="labkit plan",
        description=(
            "Say whether a training step fits, the largest batch and the longest rows that would, "
            "what each change saves and costs, and which GPUs are large enough. Exits with 1 if "
            "it does not fit."
        ),
        epilog="example: labkit plan config.json --method qlora --batch-size 4 --gpu 'RTX 4090'",
    )
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    room = parser.add_mutually_exclusive_group()
    room.add_argument(
        "--memory",
        type=as_argument(_memory),
        metavar="SIZE",
        help="of the device, such as 24GiB or 80GB",
    )
    room.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(gpus.GPUS)}")
    parser.add_argument(
        "--reserve",
        type=as_argument(parse_size),
        metavar="SIZE",
        help="kept free for the CUDA context and the allocator (2.75 GiB and 1.9 %% of the memory)",
    )
    add_training_options(parser)
    return parser


def _memory(text: str) -> int:
    size = parse_size(text)
    if size == 0:
        raise ValueError(f"{text!r} is no memory: give one above 0, such as 24GiB")
    return size


def _to_json(report: dict[str, Any]) -> dict[str, Any]:
    found = report["estimate"]
    return {
        **report,
        "estimate": found.to_json(),
        "peak_allocated_bytes": found.peak_allocated_bytes,
        "phase": found.phase,
        **{name: [one.to_json() for one in report[name]] for name in ("knobs", "ways", "gpus")},
    }


def _lines(config: str, report: dict[str, Any]) -> list[str]:
    return [
        *_verdict(config, report),
        "",
        *_knob_lines(report),
        "",
        *_gpu_lines(report["gpus"]),
    ]


def _verdict(config: str, report: dict[str, Any]) -> list[str]:
    found, memory = report["estimate"], report["memory_bytes"]
    peak = f"one training step peaks at {size_text(found.peak_allocated_bytes)} ({found.phase})"
    if memory is None:
        return [f"{config}: {peak}"]
    room = memory - report["reserve_bytes"]
    lines = [
        f"{config}: {'fits' if report['fits'] else 'does not fit'}: {peak}; of "
        f"{size_text(memory)}, {size_text(report['reserve_bytes'])} are kept free and "
        f"{size_text(max(0, room))} may hold tensors"
    ]
    if room <= 0:
        lines.append(
            "the reserve is all of the memory: nothing is left for tensors; keep less free with "
            "--reserve"
        )
    if not report["fits"] and found.peak_allocated_bytes <= memory:
        tight = "it may run: its tensors alone have room"
        # The public messages behind the default reserve are from GPUs.
        known = report["default_reserve"] and report["device"] == "cuda"
        lines.append(f"{tight}; others failed with as little left as this" if known else tight)
    rows, tokens = report["largest_batch"], report["largest_seq_len"]
    lines += [
        "largest batch: " + (f"{rows:,}" if rows else "none, not even 1 row fits"),
        "longest rows: " + (f"{tokens:,} tokens" if tokens else "none, not even 1 token fits"),
        *(f"note: {note}" for note in report["notes"]),
    ]
    if report["ways"]:
        lines += ["", "ways that would fit, cheapest first:"]
        lines += [f"  {number}. {way}" for number, way in enumerate(report["ways"], 1)]
    if not report["fits"] and len(report["ways"]) < plan.WAYS:
        n = len(report["ways"])
        lines.append(f"  no more than {n} among {plan.SEARCHED}" if n else plan.NO_WAY)
    return lines


def _knob_lines(report: dict[str, Any]) -> list[str]:
    lines = ["what each change saves at the peak, and costs:"]
    for knob in report["knobs"]:
        enough = " [enough]" if knob.fits and not report["fits"] else ""
        lines += [f"  {knob}{enough}", f"      {knob.cost}"]
    return lines


def _gpu_lines(found: list[plan.GpuFit]) -> list[str]:
    lines = ["GPU classes, with what stays free there:"]
    for one in found:
        free = size_text(abs(one.free_bytes))
        verdict = f"fits, {free} free" if one.fits else f"does not fit, {free} too small"
        note = f"; {one.note}" if one.note else ""
        lines.append(f"  {one.gpu.name:<14} {size_text(one.gpu.memory_bytes):>10}  {verdict}{note}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
