"""Estimators of memory, held to the same published rows: `labkit scoreboard`.

Tools count different things, so a row is compared twice where that is fair: with the whole peak,
which is what decides whether a training fits, and with what a tool says it counts. An error is
signed: above 0 the tool says too much. The rules of thumb are bytes a parameter, without
activations; they and accelerate speak of full fine-tuning only, and have no entry elsewhere.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.memory import estimate, estimate_generation, reference, rivals
from labkit.memory.architecture import read
from labkit.memory.rivals import ACCELERATE_ADAM, ACCELERATE_LOADED, ACCELERATE_MIXED, ZERO2, ZERO3
from labkit.memory.sharding import deepspeed_zero3, zero_states
from labkit.memory.units import GIB, MIB
from labkit.usage import Parser

OURS = "labkit estimate"
PEAK, STATES, LOADED, COUNT = "whole peak", "model states", "loaded model", "trained numbers"
"""What an entry is compared on: bytes of the whole peak of a step, of weights, gradients and
optimizer, of a model that was loaded; or how many numbers are trained."""
COMMITTED = "scoreboard.json"

RULES = {
    8: "8 B x P: bf16 weights, gradients and Adam's two means, without the step's working memory",
    16: "16 B x P: ZeRO's count of mixed precision, 2 + 2 + 12",
    18: "18 B x P: fp32 weights with a 16-bit copy, fp32 gradients, Adam: 6 + 4 + 8",
    20: "20 B x P: fp32 AdamW with the foreach step, or mixed precision with fp32 gradients",
}
"""Bytes a parameter that people quote, and what each counts; sharded runs divide them by devices.
"""
COUNTS = {
    OURS: "every tensor of a step, phase by phase: what torch.cuda.max_memory_allocated would say",
    ACCELERATE_ADAM: "the largest of weights, gradients, states and step in fp32, no activations; "
    "without the output head",
    ACCELERATE_MIXED: "the same for mixed precision, where the largest part is Adam's fp32 states: "
    "8 B a parameter; parts are not added up",
    ACCELERATE_LOADED: "fp32 weights of transformers' AutoModel",
    ZERO2: "2 + 18 / N B a parameter: mixed precision with fp32 gradients, no activations",
    ZERO3: "18 / N B a parameter and one gathered layer of 4 B, no activations",
    **{f"{rule} B x P": words for rule, words in RULES.items()},
}
"""What each tool says it counts."""


@dataclass(frozen=True)
class Entry:
    """What one tool says of one published row."""

    tool: str
    row: str
    kind: str
    """What is compared: `whole peak`, `model states`, `loaded model` or `trained numbers`."""
    predicted: float
    published: float
    unit: str = "bytes"
    note: str = ""

    @property
    def error(self) -> float:
        """Relative and signed: above 0 the tool says too much."""
        return self.predicted / self.published - 1

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "error": self.error}


@dataclass(frozen=True)
class Score:
    """A tool over all its entries of one kind."""

    tool: str
    kind: str
    rows: int
    of: int
    """Published rows of this kind."""
    median: float
    """Of the errors without their signs."""
    worst: float
    """The error that is furthest from 0, with its sign."""


@dataclass(frozen=True)
class Scoreboard:
    """All entries, and where those of other tools came from."""

    entries: tuple[Entry, ...]
    versions: dict[str, str]
    notes: tuple[str, ...]

    def scores(self) -> list[Score]:
        """One line a tool and kind, best median first within a kind."""
        found = []
        for kind in dict.fromkeys(entry.kind for entry in self.entries):
            of_kind = [entry for entry in self.entries if entry.kind == kind]
            rows = len({entry.row for entry in of_kind})
            lines = []
            for tool in dict.fromkeys(entry.tool for entry in of_kind):
                errors = [entry.error for entry in of_kind if entry.tool == tool]
                lines.append(
                    Score(
                        tool, kind, len(errors), rows,
                        statistics.median(map(abs, errors)), max(errors, key=abs),
                    )
                )  # fmt: skip
            found += sorted(lines, key=lambda line: line.median)
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "versions": self.versions,
            "notes": list(self.notes),
            "counts": COUNTS,
            "scores": [vars(score) for score in self.scores()],
            "entries": [entry.to_json() for entry in self.entries],
        }


def scoreboard(live: bool = False) -> Scoreboard:
    """All tools on all rows.

    Args:
        live: run the other tools now, in another process, which takes some seconds; else their
            numbers are those of `data/memory/scoreboard.json`, which such a run wrote. A tool that
            is not installed keeps its committed numbers, and `notes` says so.

    Raises:
        LabkitError: the other tools failed.
    """
    committed = reference.read_json(COMMITTED)
    said, notes = committed, []
    made = ", ".join(f"{name} {version}" for name, version in committed["versions"].items())
    if live:
        said = {**committed, **rivals.run()}
        said["versions"] = {**committed["versions"], **said["versions"]}
        if not rivals.has_deepspeed():
            notes.append(
                f"DeepSpeed is not installed here: its numbers are those of data/memory/{COMMITTED}"
            )
    else:
        notes.append(f"other tools: numbers of data/memory/{COMMITTED}, made with {made}")
    entries = (*_peaks(said), *_states(said), *_loaded(said), *_counts())
    return Scoreboard(entries, said["versions"], (*CAVEATS, _held_out(), *notes))


CAVEATS = (
    "the measured runs train in pure bf16 or fp16; the other tools and the rules of 16 to 20 B "
    "count mixed precision with fp32 states, so their errors on the whole peak are mostly that: "
    "the rows of model states compare them on what they count",
)


def _held_out() -> str:
    """How labkit does on rows that its formulas were not written from."""
    errors = [row.error() for row in reference.rows("held out")]
    return (
        "labkit's formulas were written beside the 8 `bar` rows, the term for what FSDP keeps "
        "beside Mistral's sharded ones, and that for tables in each layer after the fp16 rows had "
        f"been missed; on the {len(errors)} held-out rows alone its median error "
        f"is {statistics.median(map(abs, errors)):.2%}, its worst {max(errors, key=abs):+.2%}"
    )


# ---- entries, kind by kind ---------------------------------------------------------------------


def _peaks(said: dict) -> Iterator[Entry]:
    """Measured runs: the whole peak of a step on one device."""
    for row in reference.rows():
        published = row.peak_allocated_bytes
        yield Entry(OURS, row.name, PEAK, row.estimate().peak_allocated_bytes, published)
        if row.options.get("method", "full") != "full":
            continue
        devices = row.options.get("num_devices", 1)
        parameters = read(row.config).parameters
        for rule in RULES:
            yield Entry(f"{rule} B x P", row.name, PEAK, rule * parameters / devices, published)
        if devices == 1:  # it knows of one device only
            for tool in (ACCELERATE_ADAM, ACCELERATE_MIXED):
                yield Entry(tool, row.name, PEAK, said["accelerate"][row.model][tool], published)
        for stage in (ZERO2, ZERO3):
            yield Entry(stage, row.name, PEAK, said["deepspeed"][row.name][stage][0], published)


def _states(said: dict) -> Iterator[Entry]:
    """Tables of model states: the ZeRO paper's, and DeepSpeed's own documentation."""
    paper = reference.public()["zero"]
    parameters, devices = paper["parameters"], paper["devices"]
    for stage, gigabytes in paper["gigabytes"].items():
        row, published = f"ZeRO paper, 7.5 B, {devices} devices, stage {stage}", gigabytes * 1e9
        yield Entry(OURS, row, STATES, zero_states(parameters, int(stage), devices), published)
        if stage in ("0", "3"):  # all of it on one device, or all of it divided
            for rule in RULES:
                predicted = rule * parameters / (devices if stage == "3" else 1)
                yield Entry(f"{rule} B x P", row, STATES, predicted, published)
        if stage == "0":
            for tool in (ACCELERATE_ADAM, ACCELERATE_MIXED):
                yield Entry(tool, row, STATES, said["accelerate"]["ZeRO paper"][tool], published)
        tool = {"2": ZERO2, "3": ZERO3}.get(stage)
        if tool:
            device, _ = said["deepspeed"]["ZeRO paper"][tool]
            note = "counts fp32 gradients too, 20 B a parameter in all; the paper counts 16"
            yield Entry(tool, row, STATES, device, published, note=note)
    docs = reference.public()["deepspeed"]
    for offload, published in docs["gib"].items():
        ours = deepspeed_zero3(docs["parameters"], docs["largest_layer"], docs["devices"], offload)
        theirs = said["deepspeed"][f"T5-3B, offload {offload}"][ZERO3]
        for place, which in enumerate(("device", "host")):
            row = f"DeepSpeed docs, T5-3B on 8 devices, offload {offload}: {which}"
            size = published[place] * GIB
            note = "from parameter counts as printed; labkit restates DeepSpeed's formula"
            yield Entry(OURS, row, STATES, ours[place], size, note=note)
            yield Entry(ZERO3, row, STATES, theirs[place], size, note=note)


def _loaded(said: dict) -> Iterator[Entry]:
    """Models that were loaded: 4-bit ones of the QLoRA paper, and accelerate's own example."""
    qlora = reference.public()["qlora"]
    for name, gigabytes in qlora["model_gigabytes"].items():
        found = estimate_generation(
            reference.model(name), new_tokens=0, method="qlora", lora_rank=64, seq_len=1
        )
        yield Entry(
            OURS, f"QLoRA paper, {name} in 4 bits", LOADED, found.peak_allocated_bytes,
            gigabytes * 1e9, note="the paper gives whole GB and does not say what is in them",
        )  # fmt: skip
    bert = reference.public()["bert"]
    yield Entry(
        ACCELERATE_LOADED, "bert-base-cased, fp32", LOADED,
        said["accelerate"]["bert-base-cased"][ACCELERATE_LOADED], bert["mebibytes"] * MIB,
        note="no decoder: labkit does not cover it",
    )  # fmt: skip


def _counts() -> Iterator[Entry]:
    """How many numbers LoRA trains of GPT-3, and the size of its file."""
    lora = reference.public()["lora"]
    gpt3 = {
        "model_type": "llama",
        "vocab_size": 50257,
        "num_attention_heads": 96,
        "hidden_size": lora["hidden"],
        "num_hidden_layers": lora["layers"],
        "intermediate_size": 4 * lora["hidden"],
    }

    def trained(rank: int) -> int:
        options = {"method": "lora", "lora_rank": rank, "target_modules": "q_proj,v_proj"}
        return estimate(gpt3, **options).trainable_parameters

    for rank, published in lora["trainable"].items():
        row = f"LoRA paper, GPT-3 175B, r={rank} on q and v"
        yield Entry(OURS, row, COUNT, trained(int(rank)), published, unit="numbers")
    file = lora["checkpoint"]
    yield Entry(
        OURS, f"LoRA paper, adapter file of r={file['rank']}", COUNT, 2 * trained(file["rank"]),
        file["adapter_megabytes"] * 1e6, note="the paper's 35 MB: 36 MiB in 16 bits",
    )  # fmt: skip


# ---- the command -------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the scoreboard; exits with 0."""
    options = build_parser().parse_args(arguments)
    if options.out:
        write(rivals.run(), options.out)
        print(f"wrote {options.out}")
        return 0
    if not options.committed:
        print("running accelerate and DeepSpeed in another process", file=sys.stderr)
    board = scoreboard(live=not options.committed)
    if options.json:
        print(json.dumps(board.to_json(), indent=2))
        return 0
    print("\n".join(_lines(board)))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Options of `labkit scoreboard`."""
    parser = Parser(
        prog="labkit scoreboard",
        description=(
            "Hold estimators of training memory to the same published runs: accelerate's and "
            "DeepSpeed's, run for real, rules of thumb, and labkit's. Errors side by side."
        ),
        epilog="example: labkit scoreboard --committed",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--committed",
        action="store_true",
        help="take the other tools' numbers from data/memory/scoreboard.json: no seconds, no torch",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="run the other tools and write their numbers here"
    )
    return parser


def write(said: dict[str, Any], file: Path) -> None:
    """Write what the other tools said, as `data/memory/scoreboard.json` holds it."""
    about = (
        "What other estimators of memory say of the rows of public.json; made by `labkit "
        "scoreboard --out`. accelerate: bytes by model; deepspeed: [device, host] bytes by row."
    )
    text = json.dumps({"about": about, **said}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")


def _lines(board: Scoreboard) -> list[str]:
    lines = []
    width = max(len(score.tool) for score in board.scores())
    for kind in dict.fromkeys(score.kind for score in board.scores()):
        scores = [score for score in board.scores() if score.kind == kind]
        lines += [
            f"{kind}: {scores[0].of} published rows",
            f"  {'tool':<{width}}  rows  median error  worst error",
        ]
        lines += [
            f"  {one.tool:<{width}}  {one.rows:>4}  {one.median:>12.2%}  {one.worst:>+11.2%}"
            for one in scores
        ]
        lines.append("")
    lines += ["row by row (signed errors):"]
    for kind in dict.fromkeys(entry.kind for entry in board.entries):
        rows = dict.fromkeys(entry.row for entry in board.entries if entry.kind == kind)
        for row in rows:
            entries = [e for e in board.entries if (e.kind, e.row) == (kind, row)]
            said = ", ".join(f"{entry.tool} {entry.error:+.2%}" for entry in entries)
            lines.append(f"  {row}: {said}")
    lines += ["", "what each counts:"]
    lines += [
        f"  {words if tool in words else f'{tool}: {words}'}" for tool, words in COUNTS.items()
    ]
    return lines + [f"note: {note}" for note in board.notes]


if __name__ == "__main__":
    sys.exit(main())
