"""The notebook is the experiment: run it once per seed and collect what it recorded.

    python -m labkit.notebooks.sweep notebooks/02_full_fine_tuning.ipynb --seeds 0-4

Every finished seed is kept in `.labkit/sweeps/NAME/`, so a sweep that was killed continues where it
stopped. A kept seed counts only for the same code cells (exercises apart), base model and data.
"""

import argparse
import contextlib
import json
import platform
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from labkit import paths
from labkit.claims import judge_seeds, read_record
from labkit.errors import LabkitError
from labkit.files import sha256, write_atomic
from labkit.notebooks.normalise import read
from labkit.notebooks.run import RunError, execute
from labkit.statistics import seed_interval

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")
TRACEBACK_LINES = 8
CELL_TIMEOUT_SECONDS = 1800

_COLOUR_CODES = re.compile(r"\x1b\[[0-9;]*m")


class SweepError(LabkitError):
    """Some seeds failed; the others are kept, and the same command runs only these again."""


def sweep(
    path: Path | str,
    seeds: Sequence[int],
    out: Path | None = None,
    *,
    jobs: int = 1,
    cache: Path | None = None,
    fresh: bool = False,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run a notebook once per seed and write `data/results/NAME.json`.

    Args:
        path: the notebook; it is not changed.
        seeds: values of LABKIT_SEED, two or more.
        out: folder of the results; default `data/results/`.
        jobs: kernels at a time; with more than one, each computes in one thread.
        cache: folder of finished seeds; default `.labkit/sweeps/NAME/`.
        fresh: run seeds again that are already there.
        progress: called with a line whenever a seed starts, ends or is found.

    Returns:
        What was written: see the design, section 7.

    Raises:
        ValueError: fewer than two seeds, one named twice, or jobs below 1.
        SweepError: a seed failed, or recorded other names than the first; no results are written.
        LabkitError: the notebook is missing or damaged, or a folder cannot be written.
    """
    path, seeds = Path(path), list(seeds)
    if len(set(seeds)) < max(2, len(seeds)):
        raise ValueError(f"seeds={seeds}: name two or more, each once: one shows no spread")
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: want 1 or more")
    cache = cache or paths.root() / ".labkit" / "sweeps" / path.stem
    inputs = _inputs(path)

    def run_seed(seed: int) -> dict[str, Any]:
        file = cache / f"seed-{seed}.json"
        kept = None if fresh else _read_kept(file, inputs)
        if kept:
            progress(f"seed {seed}: already there ({kept['seconds']:.0f} s)")
            return kept
        progress(f"seed {seed}: running")
        try:
            result = _run(path, seed, one_thread=jobs > 1) | {"inputs": inputs}
        except RunError as error:
            progress(f"seed {seed}: failed: {error}")
            return {"seed": seed, "failed": _last_lines(error)}
        write_atomic(file, _to_json(result))
        missed = f", {len(result['misses'])} expectations missed" if result["misses"] else ""
        progress(f"seed {seed}: done in {result['seconds']:.0f} s{missed}")
        return result

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        runs = list(pool.map(run_seed, seeds))
    _stop_on_failures(path, runs)
    results = _combine(path.stem, runs, inputs)
    write_atomic((out or paths.results_dir()) / f"{path.stem}.json", _to_json(results))
    return results


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


def _inputs(path: Path) -> dict[str, str | None]:
    """Hashes of what a seed's result depends on; None for a file that is not there.

    Exercises and their solutions measure nothing, so they may be mended without a new sweep.
    """
    aside = {"exercise", "solution"}
    code = [
        cell.source
        for cell in read(path).cells
        if cell.cell_type == "code" and not aside & set(cell.metadata.get("tags", []))
    ]
    return {
        "notebook_sha256": sha256(json.dumps(code).encode("utf-8")),
        "base_model_sha256": _hash_of(paths.base_model_dir() / "model.safetensors"),
        "data_sha256": _hash_of(paths.tasks_dir() / "manifest.json"),
    }


def _hash_of(path: Path) -> str | None:
    return sha256(path.read_bytes()) if path.exists() else None


def _run(path: Path, seed: int, *, one_thread: bool) -> dict[str, Any]:
    """Execute the notebook for one seed; what it recorded and what it cost."""
    # A folder of its own: a kernel that outlives a killed sweep cannot write into a later one.
    with tempfile.TemporaryDirectory(prefix="labkit-sweep-") as folder:
        file = Path(folder) / "record.jsonl"
        file.touch()
        env = {"LABKIT_RECORD": str(file), "LABKIT_SWEEP": "1"}
        env |= {"OMP_NUM_THREADS": "1"} if one_thread else {}
        done = execute(path, env, seed, CELL_TIMEOUT_SECONDS, write=False)
        cost = {"seed": seed, "seconds": round(done.seconds, 1), "peak_bytes": done.peak_bytes}
        return cost | asdict(read_record(file))


def _read_kept(file: Path, inputs: dict[str, str | None]) -> dict[str, Any] | None:
    """A finished seed, unless it is missing, damaged, or came from other inputs."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(file.read_text(encoding="utf-8"))
        wanted = {"seed", "seconds", "metrics", "claims", "learning_rates", "misses"}
        if kept["inputs"] == inputs and wanted <= kept.keys():
            return kept
    return None


def _stop_on_failures(path: Path, runs: list[dict[str, Any]]) -> None:
    """Raise for seeds that failed, with their last words, or that recorded other names."""
    failed = [run for run in runs if "failed" in run]
    if failed:
        words = "\n".join(f"seed {run['seed']}:\n{run['failed']}" for run in failed)
        names = ", ".join(str(run["seed"]) for run in failed)
        raise SweepError(
            f"{path.name}: seed {names} failed, the other {len(runs) - len(failed)} are kept: "
            f"mend the cause and run the same command again\n{words}"
        )
    for kind in ("metrics", "claims", "learning_rates"):
        for run in runs[1:]:
            odd = sorted(runs[0][kind].keys() ^ run[kind].keys())
            if odd:
                raise SweepError(
                    f"{path.name}: seeds {runs[0]['seed']} and {run['seed']} did not both record "
                    f"the {kind} {', '.join(odd)}: record the same names for every seed"
                )


def _combine(name: str, runs: list[dict[str, Any]], inputs: dict[str, str | None]) -> dict:
    """The results file of all seeds."""
    from labkit.models import pick_precision  # loads torch, which takes a second

    first = runs[0]
    versions = {library: metadata.version(library) for library in LIBRARIES}
    return {
        "notebook": name,
        "seeds": [run["seed"] for run in runs],
        "metrics": {
            metric: _summary([run["metrics"][metric] for run in runs])
            for metric in first["metrics"]
        },
        "claims": [
            judge_seeds(claim, [run["claims"][claim] for run in runs]).to_json()
            for claim in first["claims"]
        ],
        "learning_rates": {
            method: _rates([run["learning_rates"][method] for run in runs])
            for method in first["learning_rates"]
        },
        "misses": [{"seed": run["seed"], **miss} for run in runs for miss in run["misses"]],
        **inputs,
        "versions": {"python": platform.python_version(), **versions},
        "precision": pick_precision(),
        "seconds": round(sum(run["seconds"] for run in runs), 1),
        "seconds_per_seed": [run["seconds"] for run in runs],
        "peak_bytes": max(run["peak_bytes"] for run in runs),
    }


def _summary(values: list[Any]) -> dict[str, Any]:
    """Values per seed with mean and 95 % interval; both are None unless every value is a number."""
    if not all(isinstance(value, int | float) for value in values):
        return {"values": values, "mean": None, "interval": None}
    return {"values": values, "mean": fmean(values), "interval": list(seed_interval(values))}


def _rates(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates tried by one method with the scores per seed, and the rate most seeds chose."""
    chosen = [record["chosen"] for record in records]
    votes = Counter(chosen)
    tried = sorted({rate for record in records for rate in record["tried"]}, key=float)
    return {
        "tried": {rate: [record["tried"].get(rate) for record in records] for rate in tried},
        "chosen": min(votes, key=lambda rate: (-votes[rate], rate)),
        "chosen_per_seed": chosen,
    }


def _last_lines(error: RunError) -> str:
    """The end of a failed cell's traceback, without colours."""
    lines = [line for line in _COLOUR_CODES.sub("", error.traceback).splitlines() if line.strip()]
    return "\n".join([*lines[-TRACEBACK_LINES:], str(error)])


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Command line: sweep notebooks over seeds."""
    parser = argparse.ArgumentParser(
        prog="labkit sweep",
        description="Run notebooks once per seed and write data/results/NAME.json. Safe to stop "
        "and to start again.",
        epilog="example: labkit sweep notebooks/02_full_fine_tuning.ipynb --seeds 0-4",
    )
    parser.add_argument("notebook", nargs="+", type=Path)
    parser.add_argument("--seeds", type=parse_seeds, default="0-4", help="such as 0-4 or 0,2,5")
    parser.add_argument("--jobs", type=int, default=1, help="kernels at a time (1)")
    parser.add_argument("--fresh", action="store_true", help="run finished seeds again, too")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args(arguments)

    def say(line: str) -> None:
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)

    everything = []
    try:
        for path in options.notebook:
            say(f"{path.name}: seeds {', '.join(map(str, options.seeds))}")
            results = sweep(
                path, options.seeds, jobs=options.jobs, fresh=options.fresh, progress=say
            )
            everything.append(results)
            for claim in results["claims"]:
                say(f"{claim['verdict']:<15} {claim['id']}: {claim['value']:.3g}")
    except (LabkitError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if options.json:
        print(json.dumps(everything))
    return 0


if __name__ == "__main__":
    sys.exit(main())
