"""`labkit measure`: one step on this machine beside its prediction, or a fixed set of them."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from labkit.memory.closed_form import build_step
from labkit.memory.command import add_training_options
from labkit.memory.options import check_one_step
from labkit.memory.units import size_text
from labkit.usage import Parser

if TYPE_CHECKING:
    from labkit.memory.measurement import Measurement
    from labkit.memory.suite import Results


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; exits with 1 where a case of the suite failed."""
    parser = build_parser()
    given = vars(parser.parse_args(arguments))
    config, as_json = given.pop("config"), given.pop("json")
    suite, out, quick = given.pop("suite"), given.pop("out"), given.pop("quick")
    asked = {name: value for name, value in given.items() if value is not None}
    if suite:
        named = [f"--{name.replace('_', '-')}" for name in asked if name != "device"]
        named += ["CONFIG"] * bool(config)
        if named:
            parser.error(f"--suite has its own list: leave out {named[0]}")
        return _suite(out, asked.get("device"), quick, as_json)
    if config is None or out or quick:
        parser.error("name a CONFIG, or --suite, which --out and --quick belong to")
    step = build_step(config, asked)
    check_one_step(step.arch, step.options)  # before torch, which takes seconds
    from labkit.memory.measurement import measure

    found = measure(config, say=_say, **asked)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print("\n".join(_lines(found, config)))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Options of `labkit measure`: those of `labkit estimate`, and the suite's."""
    parser = Parser(
        prog="labkit measure",
        description=(
            "Run one training step on this machine, on a model with random weights, and print what "
            "it took beside what was predicted. On a CPU every tensor is counted; on a GPU torch's "
            "allocator counts. What does not fit is refused."
        ),
        epilog="example: labkit measure bundled --method lora --dtype fp32 --loss-path padded",
    )
    parser.add_argument("config", nargs="?", help="a config.json, a model's folder, or `bundled`")
    parser.add_argument("--suite", action="store_true", help="measure a fixed set of cases")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="of --suite (data/memory/<device>.json)"
    )
    parser.add_argument("--quick", action="store_true", help="a few cases of the suite only")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_training_options(parser)
    return parser


def _suite(out: Path | None, device: str | None, quick: bool, as_json: bool) -> int:
    from labkit.memory.suite import run_suite

    results = run_suite(out, device, quick, say=_say)
    print(results.to_text() if as_json else "\n".join(_summary(results)))
    failed = [row for row in results.rows.values() if "measured" not in row]
    return 1 if any(not row["error"].startswith("not tried") for row in failed) else 0


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
    for row in results.rows.values():
        if "error" in row:
            lines.append(f"no measurement: {row['name']}: {row['error']}")
    return lines


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
