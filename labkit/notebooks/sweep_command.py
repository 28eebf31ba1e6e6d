"""`labkit sweep`: options to sweeps. What runs notebooks takes seconds to import, so it is late."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labkit.errors import LabkitError
from labkit.notebooks.engines import ENGINES, open_engine
from labkit.usage import Parser, as_argument


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep and print the verdicts; exits with 1 where a seed failed."""
    options = build_parser().parse_args(arguments)
    from labkit.notebooks.sweep import sweep_together

    def say(line: str) -> None:
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)

    everything: list[dict[str, Any]] = []
    try:
        with open_engine(options.engine, options.jobs, options.address, options.gpus) as engine:
            # On this machine one notebook after the other, so that each has its results early.
            together = [options.notebook] if engine.travels else [[p] for p in options.notebook]
            for notebooks in together:
                seeds = ", ".join(map(str, options.seeds))
                say(f"{', '.join(path.name for path in notebooks)}: seeds {seeds}")
                results = sweep_together(
                    notebooks, options.seeds, engine=engine, fresh=options.fresh, progress=say
                )
                everything += results
                for claim in [claim for one in results for claim in one["claims"]]:
                    say(f"{claim['verdict']:<15} {claim['id']}: {claim['value']:.3g}")
    except (LabkitError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if options.json:
        print(json.dumps(everything))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Options of `labkit sweep`."""
    parser = Parser(
        prog="labkit sweep",
        description="Run notebooks once per seed and write data/results/NAME.json. Safe to stop "
        "and to start again.",
        epilog="example: labkit sweep notebooks/02_full_fine_tuning.ipynb --seeds 0-4",
    )
    parser.add_argument("notebook", nargs="+", type=Path)
    seeds = as_argument(parse_seeds)
    parser.add_argument("--seeds", type=seeds, default="0-4", help="such as 0-4 or 0,2,5")
    parser.add_argument(
        "--jobs", type=int, help="seeds at a time (1; with --engine ray, one for each core)"
    )
    parser.add_argument("--fresh", action="store_true", help="run finished seeds again, too")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="ray spreads all seeds of all notebooks over the machines of a Ray cluster (local)",
    )
    parser.add_argument(
        "--address", help="of a running Ray cluster, such as auto (RAY_ADDRESS, or this machine)"
    )
    parser.add_argument(
        "--gpus", type=float, default=0, metavar="N", help="GPUs that Ray sets aside per seed (0)"
    )
    return parser


def parse_seeds(text: str) -> list[int]:
    """Seeds from "0-4", "0,2,5" or a mix.

    Raises:
        ValueError: the text is neither.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise ValueError(f"seeds={text!r}: want numbers and ranges, such as 0-4 or 0,2,5")
        first, last = int(match[1]), int(match[2] or match[1])
        seeds.extend(range(first, last + 1))
    return seeds


if __name__ == "__main__":
    sys.exit(main())
