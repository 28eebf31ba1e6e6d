"""`labkit measure`: a step on this machine beside its prediction, the limit of a GPU, or a list."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.memory.closed_form import build_step
from labkit.memory.command import add_training_options
from labkit.memory.gpus import find
from labkit.memory.options import check_one_step
from labkit.memory.units import size_text
from labkit.usage import Parser

if TYPE_CHECKING:
    from labkit.memory.limits import Limit
    from labkit.memory.measurement import Measurement
    from labkit.memory.suite import Results


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; exits with 1 where a case of a list failed."""
    parser = build_parser()
    given = vars(parser.parse_args(arguments))
    config, as_json = given.pop("config"), given.pop("json")
    of_lists = ("suite", "limits", "limit", "gpu", "out", "quick")
    own = {name: given.pop(name) for name in of_lists}
    asked = {name: value for name, value in given.items() if value is not None}
    _check_usage(parser, config, own, asked)
    if own["suite"]:
        return _suite(own["out"], asked.get("device"), own["quick"], as_json)
    if own["limits"]:
        return _limits(own["out"], as_json)
    step = build_step(config, asked)
    check_one_step(step.arch, step.options)  # before torch, which takes seconds
    if own["limit"]:
        return _limit(config, own["gpu"], asked, as_json)
    from labkit.memory.measurement import measure

    found = measure(config, say=_say, **asked)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print("\n".join(_lines(found, config)))
    return 0


def _check_usage(
    parser: argparse.ArgumentParser,
    config: str | None,
    own: Mapping[str, Any],
    asked: Mapping[str, Any],
) -> None:
    """Stop at options that do not go together."""
    listed = next((name for name in ("suite", "limits") if own[name]), None)
    if listed:
        taken = {"device"} if listed == "suite" else set()
        named = [f"--{name.replace('_', '-')}" for name in asked if name not in taken]
        named += ["CONFIG"] * bool(config) + ["--gpu"] * (own["gpu"] is not None)
        named += ["--quick"] * (listed == "limits" and own["quick"])
        if named:
            parser.error(f"--{listed} has its own list: leave out {named[0]}")
    elif config is None or own["out"] or own["quick"]:
        parser.error(
            "name a CONFIG, or --suite, which --out and --quick belong to, or --limits, which has "
            "--out"
        )
    elif own["gpu"] is not None and not own["limit"]:
        parser.error("--gpu belongs to --limit: a step is measured on the GPU that is here")
    elif own["limit"] and "batch_size" in asked:
        parser.error("--limit grows the batch itself: leave out --batch-size")


def build_parser() -> argparse.ArgumentParser:
    """Options of `labkit measure`: those of `labkit estimate`, of limits, and of the two lists."""
    parser = Parser(
        prog="labkit measure",
        description=(
            "Run one training step on this machine, on a model with random weights, and print what "
            "it took beside what was predicted. On a CPU every tensor is counted; on a GPU torch's "
            "allocator counts. What does not fit is refused. With --limit the batch grows instead "
            "until the GPU, or a smaller card that it plays, runs out of memory."
        ),
        epilog="example: labkit measure bundled --method lora --dtype fp32 --loss-path padded",
    )
    parser.add_argument("config", nargs="?", help="a config.json, a model's folder, or `bundled`")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--suite", action="store_true", help="measure a fixed set of cases")
    kinds.add_argument("--limit", action="store_true", help="find the largest batch that runs")
    kinds.add_argument("--limits", action="store_true", help="find a fixed set of limits")
    parser.add_argument("--gpu", metavar="NAME", help="card that --limit plays (the whole GPU)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="of --suite (data/memory/<device>.json) and --limits (data/memory/limits.json)",
    )
    parser.add_argument("--quick", action="store_true", help="a few cases of the suite only")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_training_options(parser)
    return parser


def _suite(out: Path | None, device: str | None, quick: bool, as_json: bool) -> int:
    from labkit.memory.suite import run_suite

    results = run_suite(out, device, quick, say=_say)
    print(results.to_text() if as_json else "\n".join(_summary(results)))
    return _status(results)


def _status(results: "Results") -> int:
    failed = [row["error"] for row in results.rows.values() if "error" in row]
    return 1 if any(not error.startswith("not tried") for error in failed) else 0


def _limit(config: str, gpu: str | None, asked: dict[str, Any], as_json: bool) -> int:
    card = None if gpu is None else find(gpu)  # before torch, too
    from labkit.memory.limits import find_limit

    memory = None if card is None else card.memory_bytes
    found = find_limit(config, memory, say=_say, **asked)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print("\n".join(_limit_lines(found, config, card.name if card else "this GPU")))
    return 0


def _limits(out: Path | None, as_json: bool) -> int:
    from labkit.memory.limit_suite import run_limits

    results = run_limits(out, say=_say)
    print(results.to_text() if as_json else "\n".join(_limits_summary(results)))
    return _status(results)


def _lines(found: "Measurement", config: str) -> list[str]:
    """The table, and what it leaves out."""
    lines = [
        f"{config}: one training step on {found.device} peaked at "
        f"{size_text(found.peak_allocated_bytes)} ({found.peak_allocated_bytes:,} bytes), in "
        f"phase: {found.phase} (predicted: {found.predicted_phase})",
        "",
        f"{'':<26}{'predicted':>16}{'measured':>16}{'error':>9}",
    ]
    for one in found.compared:
        error = "" if one.error is None else f"{round(one.error, 4) + 0:+.2%}"
        lines.append(f"{one.name:<26}{one.predicted_bytes:>16,}{one.measured_bytes:>16,}{error:>9}")
    lines.append("")
    for name, n_bytes in (
        ("reserved by the allocator", found.reserved_bytes),
        ("given away by the device", found.device_used_bytes),
        ("resident memory of the process", found.process_bytes),
    ):
        if n_bytes is not None:
            lines.append(f"{name}: {size_text(n_bytes)}")
    return lines + [f"note: {note}" for note in found.notes]


def _limit_lines(found: "Limit", config: str, card: str) -> list[str]:
    """One limit, with what it was held against."""
    how = {"default": "torch's default allocator"}.get(found.allocator, found.allocator)
    lines = [
        f"{config}: {_rows(found.found)} ran on {card} ({size_text(found.memory_bytes)}) under "
        f"{how}",
        "",
        f"planned, with what `labkit plan` keeps free: {_rows(found.planned)}",
        f"tensors alone would have room for:           {_rows(found.tensors_alone)}",
        f"context and kernels took {size_text(found.context_bytes)}",
    ]
    if not found.kept_promise:
        lines.append("note: fewer ran than were planned: `labkit plan` was wrong here")
    if found.allocator == "default":
        lines.append("note: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may let more rows run")
    return lines


def _rows(number: int | None) -> str:
    return "not even 1 row" if number is None else f"{number:,} row{'s' * (number != 1)} of a pass"


def _limits_summary(results: "Results") -> list[str]:
    """Each limit in a line: planned, found, and where tensors alone would end."""
    found = {name: row for name, row in results.rows.items() if "found" in row}
    wide = max(map(len, found), default=0)
    lines = [f"{results.device}: {len(found)} of {len(results.rows)} limits found", ""]
    lines.append(f"{'most rows of a pass':<{wide}}{'planned':>9}{'ran':>6}{'no reserve':>12}")
    for name, row in found.items():
        planned, ran, most = (row[key] or 0 for key in ("planned", "found", "tensors_alone"))
        lines.append(f"{name:<{wide}}{planned:>9}{ran:>6}{most:>12}")
    return lines + _failures(results)


def _summary(results: "Results") -> list[str]:
    """Errors over all rows, term by term: median and worst."""
    measured = [row for row in results.rows.values() if "measured" in row]
    errors: dict[str, list[float]] = {}
    for row in measured:
        for name, error in row["errors"].items():
            errors.setdefault(name, []).append(abs(error))
    lines = [f"{results.device}: {len(measured)} of {len(results.rows)} cases measured", ""]
    lines.append(f"{'error of the prediction':<26}{'rows':>6}{'median':>9}{'worst':>9}")
    for name, found in errors.items():
        found.sort()
        median = found[len(found) // 2]
        lines.append(f"{name:<26}{len(found):>6}{median:>9.2%}{found[-1]:>9.2%}")
    return lines + _failures(results)


def _failures(results: "Results") -> list[str]:
    return [
        f"no measurement: {row['name']}: {row['error']}"
        for row in results.rows.values()
        if "error" in row
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
