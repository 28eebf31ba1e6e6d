"""The notebook is the experiment: run it once per seed and collect what it recorded.

    labkit sweep notebooks/02_full_fine_tuning.ipynb --seeds 0-4
    labkit sweep notebooks/0[2-7]*.ipynb --engine ray --address auto

Every finished seed is kept in `.labkit/sweeps/NAME/`, so a sweep that was killed continues where it
stopped. A kept seed counts only for the same code cells (exercises apart), base model and data.
"""

import contextlib
import json
import platform
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from labkit import paths
from labkit.claims import judge_seeds
from labkit.errors import LabkitError
from labkit.files import write_atomic
from labkit.notebooks.engines import (
    Engine,
    EngineError,
    LocalEngine,
    Outcome,
)
from labkit.notebooks.run import RunError
from labkit.notebooks.seeds import WorkerRefused, input_hashes, pack, run_parcel
from labkit.notebooks.seeds import run_seed as _run
from labkit.statistics import seed_interval

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")
TRACEBACK_LINES = 8

_COLOUR_CODES = re.compile(r"\x1b\[[0-9;]*m")


class SweepError(LabkitError):
    """Some seeds failed; the others are kept, and the same command runs only these again."""


@dataclass(frozen=True)
class Arm:
    """One notebook of a sweep."""

    path: Path
    cache: Path
    """Folder of its finished seeds."""
    inputs: dict[str, str | None]
    """Hashes that a finished seed must have been made from."""


def sweep(
    path: Path | str,
    seeds: Sequence[int],
    out: Path | None = None,
    *,
    jobs: int = 1,
    cache: Path | None = None,
    fresh: bool = False,
    progress: Callable[[str], None] = print,
    engine: Engine | None = None,
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
        engine: where seeds run instead; `jobs` is the engine's own then.

    Returns:
        What was written: see the design, section 7.

    Raises:
        ValueError: fewer than two seeds, one named twice, or jobs below 1.
        SweepError: a seed failed, or recorded other names than the first; no results are written.
        LabkitError: the notebook is missing or damaged, or a folder cannot be written.
    """
    seeds = _checked(seeds)
    engine = engine or LocalEngine(jobs)
    arm = _arm(Path(path), cache)
    return _sweep([arm], seeds, out, engine, fresh, progress)[0]


def sweep_together(
    notebooks: Sequence[Path | str],
    seeds: Sequence[int],
    out: Path | None = None,
    *,
    engine: Engine,
    cache: Path | None = None,
    fresh: bool = False,
    progress: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run several notebooks, all seeds of all of them side by side; results as `sweep` writes them.

    Args:
        cache: folder with a folder of finished seeds for each notebook; default `.labkit/sweeps/`.

    Raises:
        As `sweep`; a notebook whose seeds all ended well has its results written even then.
    """
    notebooks = [Path(path) for path in notebooks]
    names = [path.stem for path in notebooks]
    if len(set(names)) < len(names):
        raise ValueError(f"notebooks={names}: name each once, its results have its name")
    arms = [_arm(path, cache and cache / path.stem) for path in notebooks]
    return _sweep(arms, _checked(seeds), out, engine, fresh, progress)


def _checked(seeds: Sequence[int]) -> list[int]:
    if len(set(seeds)) < max(2, len(seeds)):
        raise ValueError(f"seeds={list(seeds)}: name two or more, each once: one shows no spread")
    return list(seeds)


def _arm(path: Path, cache: Path | None) -> Arm:
    return Arm(path, cache or paths.root() / ".labkit" / "sweeps" / path.stem, input_hashes(path))


def _sweep(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    out: Path | None,
    engine: Engine,
    fresh: bool,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Find or run every seed of every arm, and write the results of the arms that are whole."""
    runs: dict[tuple[int, int], dict[str, Any]] = {}
    missing: list[tuple[int, int]] = []

    def say(which: tuple[int, int], words: str) -> None:
        name = f"{arms[which[0]].path.stem} " if len(arms) > 1 else ""
        progress(f"{name}seed {which[1]}: {words}")

    for which in [(number, seed) for number in range(len(arms)) for seed in seeds]:
        kept = None if fresh else _read_kept(_file(arms, which), arms[which[0]].inputs)
        if kept:
            say(which, f"already there ({kept['seconds']:.0f} s)")
            runs[which] = kept
        else:
            missing.append(which)

    def ended(index: int, outcome: Outcome) -> None:
        which, error = missing[index], outcome.error
        if isinstance(error, RunError | WorkerRefused | EngineError):
            say(which, f"failed: {error}")
            runs[which] = {"seed": which[1], "failed": _last_lines(error)}
        elif error is None:
            result = outcome.result | {"inputs": arms[which[0]].inputs}
            write_atomic(_file(arms, which), _to_json(result))
            missed = f", {len(result['misses'])} expectations missed" if result["misses"] else ""
            say(which, f"done in {result['seconds']:.0f} s{missed}")
            runs[which] = result
        else:
            raise error

    function, tasks = _work(arms, missing, engine)
    engine.map(function, tasks, lambda index: say(missing[index], "running"), ended)
    results, failures = [], []
    for number, arm in enumerate(arms):
        of_arm = [runs[number, seed] for seed in seeds]
        try:
            _stop_on_failures(arm.path, of_arm)
        except SweepError as failure:
            failures.append(str(failure))
            continue
        results.append(_combine(arm.path.stem, of_arm, arm.inputs))
        write_atomic((out or paths.results_dir()) / f"{arm.path.stem}.json", _to_json(results[-1]))
    if failures:
        raise SweepError("\n".join(failures))
    return results


def _file(arms: Sequence[Arm], which: tuple[int, int]) -> Path:
    """Where a finished seed is kept."""
    return arms[which[0]].cache / f"seed-{which[1]}.json"


def _work(
    arms: Sequence[Arm], missing: Sequence[tuple[int, int]], engine: Engine
) -> tuple[Callable[[Any], Any], list[Any]]:
    """The function to run and one task for each missing seed, as the engine can take them."""
    if engine.travels:
        return run_parcel, [pack(arms[number].path, seed) for number, seed in missing]

    def run_here(which: tuple[int, int]) -> dict[str, Any]:
        return _run(arms[which[0]].path, which[1], one_thread=engine.jobs > 1)

    return run_here, list(missing)


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
        "precision": _precision(runs),
        "seconds": round(sum(run["seconds"] for run in runs), 1),
        "seconds_per_seed": [run["seconds"] for run in runs],
        "peak_bytes": max(run["peak_bytes"] for run in runs),
    }


def _precision(runs: list[dict[str, Any]]) -> str | None:
    """What all seeds trained in; both names where they differ, None for seeds of older sweeps."""
    return " and ".join(sorted({run["precision"] for run in runs if "precision" in run})) or None


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


def _last_lines(error: Exception) -> str:
    """The end of a failed cell's traceback, without colours, and what went wrong."""
    traceback = _COLOUR_CODES.sub("", getattr(error, "traceback", ""))
    lines = [line for line in traceback.splitlines() if line.strip()]
    return "\n".join([*lines[-TRACEBACK_LINES:], str(error)])


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
