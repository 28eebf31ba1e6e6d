"""`labkit measure --limits`: a fixed list of limits, and `data/memory/limits.json`.

Each is found by `labkit measure --limit` in a process of its own (`labkit.memory.limits` says why),
once under torch's default allocator and once under expandable segments. As in the suite of single
steps, the file is written after each case, so a run that was killed goes on where it was, and a
case that fails keeps a row with the reason.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit import paths
from labkit.errors import LabkitError
from labkit.memory import suite
from labkit.memory.gpus import find
from labkit.memory.limits import DEFAULT, EXPANDABLE, SETTINGS, plan_rows
from labkit.memory.measurement import Say, device_options
from labkit.memory.reference import memory_dir, model

Process = Callable[..., subprocess.CompletedProcess[str]]
SECONDS_PER_LIMIT = 600
"""A search that takes longer is given up."""
WHOLE = "whole GPU"
"""Instead of a card's name: the GPU at hand as it is."""
TRAINING = {"dtype": "bf16", "loss_path": "padded", "reentrant": False, "seq_len": 512}
"""What all cases share; the loss and checkpointing are those of transformers 5."""
LIMITS = (
    ("Qwen2.5-0.5B", "full", "RTX 3060 12GB"),
    ("Qwen2.5-1.5B", "full", "RTX 4090"),
    ("Mistral-7B-v0.1", "lora", "RTX 4090"),
    ("Mistral-7B-v0.1", "qlora", "RTX 4090"),
    ("Qwen2.5-7B", "qlora", "RTX 3090"),
    ("Qwen2.5-7B", "lora", "A100 40GB"),
    ("Meta-Llama-3-8B", "full", WHOLE),
)
"""Model, method, and the card whose end is looked for."""


@dataclass(frozen=True)
class LimitCase:
    """One limit to be found."""

    model: str
    """A name of `labkit.memory.reference.model`."""
    method: str
    card: str
    """A name of `labkit.memory.gpus`, or `WHOLE`."""
    allocator: str
    """`default` or `expandable segments`."""

    @property
    def options(self) -> dict[str, Any]:
        """As `find_limit` takes them."""
        return {**TRAINING, "method": self.method}

    @property
    def name(self) -> str:
        how = "default allocator" if self.allocator == DEFAULT else self.allocator
        return ", ".join([self.model, self.method, self.card, how])

    def head(self) -> dict[str, Any]:
        """What a row says of its case."""
        return {
            "name": self.name,
            "model": self.model,
            "config": model(self.model),
            "options": {**self.options, **device_options("cuda")},
            "card": self.card,
            "allocator": self.allocator,
        }


def limit_cases() -> list[LimitCase]:
    """The fixed list, each training under both allocators."""
    return [LimitCase(*of, how) for of in LIMITS for how in (DEFAULT, EXPANDABLE)]


# ---- one limit ---------------------------------------------------------------------------------


def find_in_process(case: LimitCase, run: Process = subprocess.run) -> dict[str, Any]:
    """The row of a case, found by a new Python; a failure is a row with its reason.

    Args:
        run: starts the process and waits for it, as `subprocess.run` does.
    """
    try:
        limit = _ask(case, run)
    except LabkitError as error:
        return case.head() | {"error": suite.first_line(error)}
    return case.head() | limit


def _ask(case: LimitCase, run: Process) -> dict[str, Any]:
    on = [] if case.card == WHOLE else ["--gpu", case.card]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(model(case.model)), encoding="utf-8")
        command = [sys.executable, "-m", "labkit.cli", "measure", str(file), "--limit", "--json"]
        try:
            done = run(
                [*command, *on, *_arguments(case.options)],
                env=environment(case.allocator, os.environ),
                cwd=paths.root(),
                capture_output=True,
                encoding="utf-8",
                timeout=SECONDS_PER_LIMIT,
            )
        except subprocess.TimeoutExpired as error:
            raise LabkitError(f"took more than {SECONDS_PER_LIMIT} s") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise LabkitError(f"the process ended with exit code {done.returncode}: {said}")
    try:
        limit = json.loads(done.stdout)
    except ValueError as error:
        raise LabkitError(f"the process printed no limit but {done.stdout[:100]!r}") from error
    if limit["allocator"] != case.allocator:
        raise LabkitError(f"it ran under another allocator: {limit['allocator']}")
    return limit


def environment(allocator: str, variables: Mapping[str, str]) -> dict[str, str]:
    """Variables of a process whose torch has that allocator, whatever it was told here."""
    kept = {name: value for name, value in variables.items() if name not in SETTINGS}
    return kept | ({SETTINGS[0]: "expandable_segments:True"} if allocator == EXPANDABLE else {})


def _arguments(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield from (f"--{flag}", str(value))


def with_plan(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what is planned today beside what was found."""
    if "error" in row:
        return row
    planned, most = plan_rows(
        row["config"], row["memory_bytes"], row["context_bytes"], row["options"]
    )
    return row | {"planned": planned, "tensors_alone": most}


# ---- all of them -------------------------------------------------------------------------------


def default_file() -> Path:
    """`data/memory/limits.json`."""
    return memory_dir() / "limits.json"


def run_limits(
    out: Path | None = None,
    say: Say = lambda line: print(line, file=sys.stderr, flush=True),
    run: Process = subprocess.run,
) -> suite.Results:
    """Find the limits that a file lacks, and write it after each.

    Rows of trainings that are not on the list stay, as long as the versions are the same.

    Args:
        out: the file; None is `default_file`.
        say: called with a line of progress for each case.
        run: as for `find_in_process`.

    Returns:
        all rows of the file, those that were there before too.

    Raises:
        LabkitError: there is no CUDA device, or the file holds something else, or another
            device's rows.
    """
    name, about = suite.describe_machine("cuda")
    file = out or default_file()
    results = suite.Results(name, about, suite.versions())
    wanted = {case.name: case for case in limit_cases()}
    if file.exists():
        kept = suite.kept_rows(
            suite.read_results(file),
            results,
            lambda row: (
                row["name"] not in wanted or suite.same_case(row, wanted[row["name"]].head())
            ),
        )
        results.rows = {name: with_plan(row) for name, row in kept.items()}
    suite.fill(
        file,
        results,
        wanted,
        wanted,
        lambda case: _row(case, about["memory_bytes"], run),
        _said,
        say,
    )
    return results


def _row(case: LimitCase, gpu_bytes: int, run: Process) -> dict[str, Any]:
    if case.card != WHOLE and find(case.card).memory_bytes > gpu_bytes:
        return case.head() | {"error": "not tried: the card is larger than this GPU"}
    return find_in_process(case, run)


def _said(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return row["error"]
    return f"{row['found'] or 0} rows ran, {row['planned'] or 0} were planned"


def replan(file: Path) -> suite.Results:
    """Write a file again with what is planned today; this takes no GPU.

    Raises:
        LabkitError: it is not there, or holds something else.
    """
    results = suite.read_results(file)
    results.rows = {name: with_plan(row) for name, row in results.rows.items()}
    suite.write_results(file, results, [case.name for case in limit_cases()])
    return results
