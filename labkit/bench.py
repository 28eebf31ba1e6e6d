"""What the course promises about time and memory, measured on this machine."""

import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from labkit import paths
from labkit.errors import LabkitError

MIB = 2**20
LOGGING_STEPS = 10
Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One promise and what was measured."""

    what: str
    value: float
    unit: str
    bar: float
    at_least: bool = False
    """Whether the bar is the least, not the most."""

    @property
    def holds(self) -> bool:
        """Whether the promise is kept here."""
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    @property
    def rule(self) -> str:
        """The bar in a table: "≤ 120"."""
        return f"{'≥' if self.at_least else '≤'} {self.bar:g}"


@dataclass
class Bench:
    """The budget table."""

    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """What could not be measured, and why."""

    def to_json(self) -> dict[str, Any]:
        """`rows` of `what`, `value`, `unit`, `bar`, `at_least`, `holds`; and `missing`."""
        return {"rows": [vars(row) | {"holds": row.holds} for row in self.rows]} | {
            "missing": self.missing
        }


def measure(only: Iterable[str] | None = None, say: Say = print) -> Bench:
    """Measure the parts named, or all but `suite`.

    A part that fails is reported in `missing`, and the others are measured all the same.

    Raises:
        ValueError: no such part.
    """
    chosen = list(only) if only else [part for part in PARTS if part != "suite"]
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise ValueError(f"part {unknown[0]!r} is unknown: use {', '.join(PARTS)}")
    bench = Bench()
    for part in chosen:
        say(f"measuring: {part}")
        try:
            PARTS[part](bench, say)
        except LabkitError as error:
            bench.missing[part] = str(error)
    return bench


# ---- starting ----------------------------------------------------------------------------------


def measure_import(bench: Bench, say: Say) -> None:
    """`import labkit` alone, and the command line as a process of its own."""
    timed = "import time; t = time.perf_counter(); import labkit; print(time.perf_counter() - t)"
    seconds = [float(_python("-c", timed)) for _ in range(5)]
    bench.rows.append(Row("import labkit", statistics.median(seconds), "s", 0.3))
    seconds = [_timed(_python, "-m", "labkit.cli", "--help")[1] for _ in range(5)]
    bench.rows.append(Row("labkit --help, as a process", statistics.median(seconds), "s", 0.3))


def measure_estimate(bench: Bench, say: Say) -> None:
    """One closed-form estimate of memory, and the command as a process of its own."""
    from labkit.memory import estimate

    seconds = [_timed(estimate, "bundled")[1] for _ in range(50)]
    bench.rows.append(Row("closed-form memory estimate", statistics.median(seconds) * 1e3, "ms", 5))
    seconds = [_timed(_python, "-m", "labkit.cli", "estimate", "bundled")[1] for _ in range(5)]
    bench.rows.append(Row("labkit estimate, as a process", statistics.median(seconds), "s", 0.5))


LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 8192,
}  # fmt: skip
"""Llama 3 8B, 8,030,261,248 parameters."""


def measure_trace(bench: Bench, say: Say) -> None:
    """A full bf16 AdamW step of an 8 B Llama, 4,096 tokens, traced without memory, in one thread.

    In a process of its own, whose peak memory is read at its end, imports of torch included.
    """
    options = {"seq_len": 4096, "dtype": "bf16", "loss_path": "padded"}
    traced = json.loads(_python("-c", _TRACE.format(config=LLAMA_8B, options=options)))
    what = "traced step of an 8 B Llama"
    bench.rows += [
        Row(what, traced["seconds"], "s", 60),
        Row(f"{what}: process memory", traced["process_bytes"] / MIB, "MiB", 2048),
    ]
    say(f"{what}: {traced['peak_allocated_bytes']:,} bytes at the peak, {traced['phase']}")


_TRACE = """
import json, torch
from labkit import machine
from labkit.memory import trace
torch.set_num_threads(1)
found = trace({config}, **{options})
told = dict(seconds=found.seconds, process_bytes=machine.peak_memory()["process_bytes"])
told |= dict(peak_allocated_bytes=found.peak_allocated_bytes, phase=found.phase)
print(json.dumps(told))
"""


def measure_start(bench: Bench, say: Say) -> None:
    """What a second `python3 lab.py` does before it becomes JupyterLab."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder).as_posix()  # backslashes would not survive being code in code
        code = _SECOND_START.format(root=str(paths.root()), target=target)
        _python("-c", code)  # a first start fills the workbook
        seconds = statistics.median(_timed(_python, "-c", code)[1] for _ in range(3))
    bench.rows.append(Row("second start of lab.py, before JupyterLab", seconds, "s", 3))


# The steps of lab.open_lab, with a workbook of its own, and without ever installing anything.
_SECOND_START = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import lab
if not lab.is_ready([], lab.environment_key()):
    sys.exit("lab.py has not made .venv from today's pins: run python3 lab.py once")
code = "from pathlib import Path; from labkit.notebooks.workbook import build_workbook; "
code += "print(build_workbook(target=Path({target!r})))"
lab.BUILD_WORKBOOK, lab.WORKBOOK = code, Path({target!r})
lab.build_workbook()
lab.choose_port(None)
"""


def _python(*arguments: str) -> str:
    """What a new Python prints.

    Raises:
        LabkitError: it failed; its last line says why.
    """
    path = os.pathsep.join(filter(None, [str(paths.root()), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        raise LabkitError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout


def _timed(action: Callable[..., T], *arguments: Any) -> tuple[T, float]:
    """What an action gives, and the seconds it took."""
    start = time.perf_counter()
    result = action(*arguments)
    return result, time.perf_counter() - start


# ---- scoring -----------------------------------------------------------------------------------


def measure_scoring(bench: Bench, say: Say) -> None:
    """Exact match of 1,000 general answers, by one pass a batch and by generating them."""
    from labkit import data, models

    model, tokenizer = models.load("bundled", device="cpu")
    rows = spread(data.load_task("general", "test"), 1000)
    scored = compare_scoring(model, tokenizer, rows, say)
    what = f"scoring {len(rows):,} answers"
    faster = {"one by one": scored.one_by_one_ratio, "in batches": scored.batched_ratio}
    for how, ratio in faster.items():
        bench.rows.append(
            Row(f"{what}: than generate, {how}", ratio, "times faster", 10, at_least=True)
        )
    bench.rows.append(
        Row(f"{what}: same verdicts", scored.agreeing, "answers", len(rows), at_least=True)
    )


@dataclass(frozen=True)
class Scoring:
    """The same verdicts reached in three ways; ratios are medians over chunks of rows."""

    one_by_one_ratio: float
    """How many times faster scoring is than `generate`, one prompt after the other."""
    batched_ratio: float
    """The same for `generate` on padded batches."""
    agreeing: int
    """Rows on which all three say the same."""


def spread(rows: Sequence[dict], count: int) -> list[dict]:
    """`count` rows evenly spread over all of them, so that every skill is among them."""
    count = min(count, len(rows))
    return [rows[k * len(rows) // count] for k in range(count)]


def compare_scoring(
    model, tokenizer, rows: list[dict], say: Say = print, chunks: int = 10
) -> Scoring:
    """Time `exact_matches` against `generate_answers` in turns, on chunks of the same rows."""
    from labkit.evaluation import exact_matches, generate_answers

    gold = [row["messages"][-1]["content"].strip() for row in rows]
    # One token more than the longest answer has, for its end token.
    longest = 1 + max(map(len, tokenizer(gold, add_special_tokens=False)["input_ids"]))

    def generated(chunk: list[dict], batch_size: int) -> list[bool]:
        prompts = [row["messages"][:-1] for row in chunk]
        answers = generate_answers(model, tokenizer, prompts, longest, batch_size=batch_size)
        wanted = [row["messages"][-1]["content"].strip() for row in chunk]
        return [a.stopped and a.text == w for a, w in zip(answers, wanted, strict=True)]

    exact_matches(model, tokenizer, rows[:32])  # sets the kernels up
    single, batched, agreeing = [], [], 0
    for number in range(chunks):
        say(f"scoring and generating, part {number + 1} of {chunks}")
        chunk = rows[number::chunks]
        scored, seconds = _timed(exact_matches, model, tokenizer, chunk)
        one_by_one, single_seconds = _timed(generated, chunk, 1)
        in_batches, batched_seconds = _timed(generated, chunk, 32)
        single.append(single_seconds / seconds)
        batched.append(batched_seconds / seconds)
        verdicts = zip(scored, one_by_one, in_batches, strict=True)
        agreeing += sum(len(set(three)) == 1 for three in verdicts)
    return Scoring(statistics.median(single), statistics.median(batched), agreeing)


# ---- a training step ---------------------------------------------------------------------------


def measure_step(bench: Bench, say: Say) -> None:
    """A step of TRL's SFTTrainer against a bare PyTorch loop, on the ticket task."""
    from labkit import data, models

    model, tokenizer = models.load("bundled", device="cpu")
    rows = data.to_prompt_completion(data.load_task("d1_tickets", "train"))
    seconds = compare_steps(model, tokenizer, rows)
    bench.rows.append(Row("training step, SFTTrainer / bare loop", seconds.ratio, "times", 1.15))
    say(f"a step: SFTTrainer {seconds.trainer:.4f} s, bare loop {seconds.bare:.4f} s (medians)")


@dataclass(frozen=True)
class StepSeconds:
    """Median seconds of a step, and the losses that show that both did the same work."""

    trainer: float
    bare: float
    trainer_losses: list[float] = field(repr=False)
    """Mean of every LOGGING_STEPS steps, as the trainer logs it."""
    bare_losses: list[float] = field(repr=False)
    """Of every step."""

    @property
    def ratio(self) -> float:
        """What a trainer's step costs in bare steps."""
        return self.trainer / self.bare


def compare_steps(
    model, tokenizer, rows, steps: int = 60, warmup: int = 10, batch_size: int = 16
) -> StepSeconds:
    """Time training steps of a TRL trainer and of a bare loop in turns, on the same batches.

    After each of the trainer's steps the bare loop takes one on its own copy of the model with the
    rows that the trainer had, so a slow moment of the machine meets both. A trainer's step runs
    from the end of one to the end of the next, whatever the trainer does in between.

    Args:
        rows: datasets.Dataset with conversational `prompt` and `completion`.
        steps: of each; the first `warmup` are not counted.
    """
    from transformers import PrinterCallback
    from trl.trainer.sft_trainer import SFTTrainer

    bare_model = copy.deepcopy(model).train()
    with tempfile.TemporaryDirectory() as folder, _without_bars():
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=rows,
            args=_configuration(folder, steps, batch_size),
        )
        bare = BareLoop(bare_model, trainer.data_collator, trainer.args.learning_rate)
        trainer.data_collator = bare.overhear
        in_turns = _in_turns(bare)
        trainer.add_callback(in_turns)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return StepSeconds(
        statistics.median(in_turns.seconds[warmup:]),
        statistics.median(bare.seconds[warmup:]),
        losses,
        bare.losses,
    )


def _configuration(folder: str, steps: int, batch_size: int):
    """The settings of the course's notebooks on a CPU."""
    from trl.trainer.sft_config import SFTConfig

    return SFTConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        max_length=128,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=LOGGING_STEPS,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        seed=0,
    )


def _in_turns(bare: "BareLoop"):
    """A callback that gives the bare loop its turn after each step; `seconds` are the trainer's."""
    from transformers import TrainerCallback

    class InTurns(TrainerCallback):
        def __init__(self):
            self.seconds: list[float] = []
            self.resumed = 0.0

        def on_train_begin(self, args, state, control, **kwargs):
            self.resumed = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds.append(time.perf_counter() - self.resumed)
            bare.step()
            self.resumed = time.perf_counter()

    return InTurns()


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the progress bars of datasets, which last for seconds only."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


class BareLoop:
    """The least that a training step needs in PyTorch: collate, forward, backward, clip, AdamW."""

    def __init__(self, model, collate: Callable[[list], dict], rate: float) -> None:
        import torch

        self.model, self.collate = model, collate
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=rate, weight_decay=0.0, fused=True
        )
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._heard: deque[list] = deque()

    def overhear(self, examples: list) -> dict:
        """The trainer's collator, which remembers the rows for this loop's own step."""
        self._heard.append(examples)
        return self.collate(examples)

    def step(self) -> None:
        """One step on the oldest batch that was overheard."""
        import torch

        start = time.perf_counter()
        batch = self.collate(self._heard.popleft())
        loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


# ---- notebooks, results, suite -----------------------------------------------------------------


def measure_notebooks(bench: Bench, say: Say) -> None:
    """Each notebook from a new kernel to its last cell."""
    from labkit.notebooks.run import execute

    for path in sorted(paths.notebooks_dir().glob("*.ipynb")):
        say(f"running {path.name}")
        try:
            run = execute(path, write=False, progress=say)
        except LabkitError as error:
            bench.missing[path.stem] = str(error)
            continue
        bench.rows += [
            Row(f"{path.stem}: time", run.seconds, "s", 120),
            Row(f"{path.stem}: kernel memory", run.peak_bytes / MIB, "MiB", 1536),
        ]


def measure_results(bench: Bench, say: Say) -> None:
    """All multi-seed results from nothing, as the sweeps recorded their own time."""
    files = sorted(paths.results_dir().glob("*.json"))
    if not files:
        raise LabkitError(f"{paths.results_dir()} holds no results: make them with labkit sweep")
    seconds = sum(json.loads(file.read_text(encoding="utf-8"))["seconds"] for file in files)
    bench.rows.append(Row("all multi-seed results", seconds / 3600, "h", 6))


def measure_suite(bench: Bench, say: Say) -> None:
    """The whole test suite, as `python3 lab.py test` runs it."""
    say("running the whole test suite, which takes many minutes")
    command = [str(paths.root() / "lab.py"), "test", "-q"]
    seconds = _timed(_python, *command)[1]
    bench.rows.append(Row("whole test suite", seconds / 60, "min", 25))


PARTS: dict[str, Callable[[Bench, Say], None]] = {
    "import": measure_import,
    "start": measure_start,
    "estimate": measure_estimate,
    "trace": measure_trace,
    "scoring": measure_scoring,
    "step": measure_step,
    "notebooks": measure_notebooks,
    "results": measure_results,
    "suite": measure_suite,
}
