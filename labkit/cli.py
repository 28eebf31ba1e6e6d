"""The `labkit` command: parses, calls the function that does the work, prints, and exits.

Exit codes: 0 done, 1 something failed or was found, 2 used wrongly, 130 interrupted. What a command
needs is imported when it runs, so that `labkit --help` is there at once.
"""

import argparse
import errno
import importlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import labkit
from labkit import paths
from labkit.errors import LabkitError
from labkit.quiet import drop_import_notices
from labkit.usage import Parser

# Commands whose options stand beside their function: name -> (module with a `main`, what it does).
DELEGATED = {
    "estimate": ("labkit.memory.command", "predict the memory of a training step, term by term"),
    "measure": ("labkit.memory.measure_command", "run a training step and count its bytes"),
    "plan": ("labkit.memory.plan_command", "say what fits, what would, and what each change saves"),
    "scoreboard": ("labkit.memory.scoreboard", "hold estimators of memory to measured runs"),
    "launch-table": ("labkit.scale.launch_table", "say what to launch for a model on a card"),
    "sweep": ("labkit.notebooks.sweep_command", "run a notebook once per seed, write its results"),
    "mutate": ("labkit.notebooks.mutate", "break the course on purpose and see the tests notice"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, and raises SystemExit(2) where argparse refuses."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a Windows console may lack a sign such as ≈
            stream.reconfigure(errors="replace")
    drop_import_notices()
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as a shell reports it
    except KeyboardInterrupt:
        return _fail("interrupted; nothing half written is left. Run it again to go on.", 130)
    except ValueError as error:
        return _fail(str(error), 2)
    except LabkitError as error:
        return _fail(str(error), 1)
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed: run python3 lab.py, which installs it", 1)
    except OSError as error:
        return _fail(explain_os_error(error), 1)


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in DELEGATED:
        module = importlib.import_module(DELEGATED[arguments[0]][0])
        return module.main(arguments[1:])
    options = build_parser().parse_args(arguments)
    return options.run(options)


def _fail(message: str, status: int) -> int:
    """Say in one line what went wrong."""
    line = " ".join(message.split())
    print(f"labkit: {line}", file=sys.stderr)
    return status


def explain_os_error(error: OSError) -> str:
    """One line for what the operating system refused, with the next step."""
    what = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{what}: the disk is full: free some space, then run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{what}: no permission ({error.strerror}): name another place, or change its rights"
    if error.errno == errno.ENOENT:
        return f"{what}: no such file or folder: check the name"
    return f"{what}: {error.strerror or error}: check the name and the disk"


# ---- the parser --------------------------------------------------------------------------------


class _Help(argparse.HelpFormatter):
    """Keeps each command's summary on its line: argparse forgets that commands are indented."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action.choices, dict):
            widest = max(map(len, action.choices)) + self._current_indent + self._indent_increment
            self._action_max_length = max(self._action_max_length, widest)


def build_parser() -> argparse.ArgumentParser:
    """Parser of all commands; `options.run(options)` does the work and returns the exit code."""
    parser = Parser(
        prog="labkit",
        description="Tools of the fine-tuning course. Each command has --help with an example.",
        epilog="example: labkit doctor",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"labkit {labkit.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        _doctor, _pretrain, _evaluate, _forgetting, _validate, _merge, _claims, _bench, _workbook,
        _release,
    ):  # fmt: skip
        add(commands)
    for name, (_, summary) in DELEGATED.items():
        commands.add_parser(name, help=summary)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=(run.__doc__ or "").replace("\n    ", "\n"),
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _doctor(commands: Any) -> None:
    summary = "check that this machine is ready for the course"
    _json_option(_command(commands, "doctor", doctor, summary, "labkit doctor"))


def _pretrain(commands: Any) -> None:
    parser = _command(
        commands,
        "pretrain",
        pretrain,
        "make the bundled model from nothing",
        "labkit pretrain --steps 300 --checkpoints .labkit/try --out .labkit/try/model",
    )
    parser.add_argument("--out", type=Path, help="folder of the model (data/base_model)")
    parser.add_argument("--force", action="store_true", help="replace --out if it is there")
    parser.add_argument("--checkpoints", type=Path, help="where to keep the run (.labkit/pretrain)")
    parser.add_argument("--steps", type=_above_zero, help="optimizer steps (the shipped recipe's)")
    parser.add_argument("--seed", type=_from_zero, help="of the corpus and the weights (0)")
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="auto",
        help="auto measures which one is faster here, and a resumed run keeps its own (auto)",
    )
    parser.add_argument(
        "--compile",
        dest="compiled",
        action="store_const",
        const=True,
        help="a fifth faster with torch.compile and a C compiler",
    )
    parser.add_argument("--threads", type=_above_zero, help="CPU threads (torch's own choice)")
    parser.add_argument(
        "--save-every", type=_above_zero, default=250, help="steps between checkpoints (250)"
    )


def _evaluate(commands: Any) -> None:
    parser = _command(
        commands,
        "evaluate",
        evaluate,
        "score a model on every general skill",
        "labkit evaluate data/base_model --json",
    )
    parser.add_argument("model", nargs="?", help="folder or Hugging Face id (the profile's model)")
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="(test)")
    _json_option(parser)


def _forgetting(commands: Any) -> None:
    parser = _command(
        commands,
        "forgetting",
        forgetting,
        "compare two models or adapters: what was lost on the way",
        "labkit forgetting bundled runs/adapter --figure forgot.png",
    )
    parser.add_argument("before", help="`bundled`, a model's or an adapter's folder, or an id")
    parser.add_argument("after", help="the same for what became of it")
    parser.add_argument("--base", metavar="MODEL", help="of the adapters (what their files name)")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="read this instead of the invented neutral text"
    )
    parser.add_argument(
        "--skills",
        action=argparse.BooleanOptionalAction,
        help="score the general skills (if BEFORE has the bundled model's vocabulary)",
    )
    parser.add_argument(
        "--rows", type=_above_zero, metavar="N", help="at most N questions and N texts (all)"
    )
    parser.add_argument(
        "--margin",
        type=_points,
        default=1.0,
        metavar="POINTS",
        help="a change that is called nothing, with 0.02 nats for each point (1)",
    )
    parser.add_argument(
        "--batch-size", type=_above_zero, default=16, help="rows of a forward pass (16)"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw it: .png, .svg or .pdf")
    _json_option(parser)


def _validate(commands: Any) -> None:
    parser = _command(
        commands,
        "validate",
        validate,
        "find every problem of a file of training rows",
        "labkit validate rows.jsonl --fix clean.jsonl",
    )
    parser.add_argument("file", type=Path, help=".jsonl, .json or .csv")
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write the clean rows here")
    _json_option(parser)


def _merge(commands: Any) -> None:
    parser = _command(
        commands,
        "merge",
        merge,
        "merge an adapter into its base model, and prove that it says the same",
        "labkit merge bundled runs/adapter runs/merged",
    )
    parser.add_argument("base", help="`bundled`, a folder, or a downloaded Hugging Face id")
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument("out", type=Path, help="folder to make; it must not exist")
    _json_option(parser)


def _claims(commands: Any) -> None:
    summary = "print every claim of the course and its verdict over several seeds"
    parser = _command(commands, "claims", claims, summary, "labkit claims")
    parser.add_argument("--markdown", action="store_true", help="print docs/claims.md")
    _json_option(parser)


def _bench(commands: Any) -> None:
    parser = _command(
        commands, "bench", bench, "measure the course's budgets", "labkit bench --only import step"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help=(
            "of import, start, estimate, trace, scoring, step, notebooks, results, suite "
            "(all but suite)"
        ),
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here, too")
    _json_option(parser)


def _workbook(commands: Any) -> None:
    parser = _command(
        commands,
        "workbook",
        workbook,
        "build or update the learner's copy of the notebooks",
        "labkit workbook",
    )
    parser.add_argument("--target", type=Path, help="folder of the copy (workbook)")


def _release(commands: Any) -> None:
    parser = _command(
        commands,
        "release",
        release,
        "make the student copy of the course, without solutions",
        "labkit release ../course.zip",
    )
    parser.add_argument("out", type=Path, help="a .zip file, or a folder, that is not there yet")
    parser.add_argument(
        "--costs", type=Path, metavar="FILE", help="take minutes and MB from `labkit bench --out`"
    )
    parser.add_argument("--no-run", action="store_true", help="leave minutes and MB unmeasured")


def _above_zero(text: str) -> int:
    return _whole_number(text, least=1)


def _from_zero(text: str) -> int:
    return _whole_number(text, least=0)


def _points(text: str) -> float:
    try:
        points = float(text)
    except ValueError:
        points = 0.0
    if not 0 < points < 100:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number between 0 and 100")
    return points


def _whole_number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from {least}")
    return int(text)


# ---- the commands; a docstring here is what --help shows ---------------------------------------


def doctor(options: argparse.Namespace) -> int:
    """Check this machine and this copy of the course: one line a check, `ok`, `note` or `problem`.

    Exits 1 when there is a problem. Nothing is changed and nothing is fetched.
    """
    from labkit.doctor import examine

    findings = examine()
    ready = all(finding.status != "problem" for finding in findings)
    if options.json:
        print(json.dumps({"ready": ready, "findings": [vars(f) for f in findings]}, indent=2))
        return 0 if ready else 1
    for finding in findings:
        step = f"\n{'':21}-> {finding.next_step}" if finding.next_step else ""
        print(f"{finding.status:<8} {finding.name:<11} {finding.detail}{step}")
    print("ready" if ready else "not ready: see the lines that start with `problem`")
    return 0 if ready else 1


def pretrain(options: argparse.Namespace) -> int:
    """Make the bundled model from nothing: tokenizer, training, scores, model card.

    Safe to kill at any moment: the same command goes on from the last checkpoint and ends with the
    same weights. Minutes to hours, by --steps and machine.
    """
    from labkit.base_model import make_model

    make_model(
        out=options.out or paths.base_model_dir(),
        checkpoints=options.checkpoints or paths.root() / ".labkit" / "pretrain",
        changes={
            name: value
            for name in ("steps", "seed", "compiled")
            if (value := getattr(options, name)) is not None
        },
        precision=options.precision,
        threads=options.threads,
        save_every=options.save_every,
        force=options.force,
        say=_say,
        meter=Meter(),
    )
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """Score a model on the held-out general items, skill by skill, with 95 % intervals.

    A bar marked `~` is one that the interval crosses. The bars are those of the bundled model.
    """
    from labkit import data

    rows = data.load_task("general", options.split)
    _say("loading the model")
    from labkit import evaluation, models
    from labkit.card import marks

    model, tokenizer = models.load(options.model)
    meter = Meter()
    report = evaluation.skill_report(
        model, tokenizer, rows, progress=lambda done, total: meter(f"scored {done:,} of {total:,}")
    )
    meter.end()
    if options.json:
        print(json.dumps({"split": options.split, **report.to_json()}, indent=2))
        return 0
    _table(
        ["skill", "n", "exact match", "95 % interval", "bar", "holds"],
        [
            [
                mark.what,
                f"{mark.n:,}",
                f"{mark.exact_match:.3f}",
                f"{mark.interval[0]:.3f} to {mark.interval[1]:.3f}",
                f"{mark.bar:.2f}",
                ("yes" if mark.holds else "no") + ("" if mark.sure else " ~"),
            ]
            for mark in marks(report)
        ],
    )
    return 0


def forgetting(options: argparse.Namespace) -> int:
    """Measure two models on the same questions and texts, and judge what changed between them.

    Exact match of the general skills, where BEFORE knows the invented world, and loss on text:
    little invented scenes, or your own FILE. A .jsonl, .json or .csv FILE holds rows with `text`,
    or talks, whose answers count; any other holds a text a line, or paragraphs with blank lines
    between. Intervals are 95 %, paired item by item. A skill marked `lost` or `gained` has an
    interval on one side of 0; of twenty unchanged skills, one has so by chance. Losses are per
    token, or per byte where the two models have other tokens.
    """
    from labkit.forgetting import MARGIN_NATS, check_figure, compare, read_texts

    if options.figure:
        check_figure(options.figure)
    texts = read_texts(options.text) if options.text else None
    meter = Meter()
    found = compare(
        options.before,
        options.after,
        base=options.base,
        skills=options.skills,
        texts=texts,
        most_rows=options.rows,
        margin_points=options.margin,
        margin_nats=MARGIN_NATS * options.margin,
        batch_size=options.batch_size,
        say=_say,
        progress=meter,
    )
    meter.end()
    if options.figure:
        found.figure(options.figure)
        _say(f"{options.figure}: drawn")
    if options.json:
        print(json.dumps(found.to_json(), indent=2))
        return 0
    _table(["measure", "before", "after", "change", "95 % interval", ""], found.rows())
    print(found.line)
    return 0


def validate(options: argparse.Namespace) -> int:
    """Print every problem of a file of training rows as FILE:LINE: code: message.

    Knows alpaca, sharegpt, messages, prompt/completion and preference rows. Exits 0 when the file
    is clean and 1 when not. --fix writes the clean rows to OUT and the refused ones, with their
    reasons, beside it; FILE is never changed.
    """
    from labkit import data

    status, text = data.validate_file(options.file, options.json, options.fix)
    print(text)
    return status


def merge(options: argparse.Namespace) -> int:
    """Merge an adapter into its base model, reload the result, and compare it with the adapter.

    The base model's hash is checked against the one that the adapter was trained on, where that
    was recorded. OUT gets the model, its tokenizer and merge_evidence.json; it is only written if
    the logits of all prompts agree. Neither input is ever changed.
    """
    from labkit import adapters

    say = print if not options.json else lambda line: print(line, file=sys.stderr)
    evidence = adapters.merge(options.base, options.adapter, options.out, say)
    if options.json:
        print(json.dumps(vars(evidence), indent=2))
        return 0
    print(
        f"{options.out}: {evidence.n_logits:,} logits of {evidence.n_prompts} prompts compared; "
        f"largest {evidence.largest_logit:.3g}, difference in memory "
        f"{evidence.difference_in_memory:.2g}, reloaded as {evidence.dtype} "
        f"{evidence.difference_reloaded:.2g}; same next token at "
        f"{100 * evidence.same_next_token:.1f} % of positions; the adapter itself moves a logit "
        f"by up to {evidence.effect:.3g}"
    )
    return 0


def claims(options: argparse.Namespace) -> int:
    """Print every statement of the course that was judged over several seeds, and its verdict."""
    from labkit.claims import ledger, ledger_page

    entries = ledger()
    if options.json:
        print(json.dumps(entries, indent=2))
        return 0
    if not entries:
        raise LabkitError(
            f"{paths.results_dir()} holds no results: make them with `labkit sweep NOTEBOOK`"
        )
    if options.markdown:
        print(ledger_page(entries), end="")
        return 0
    _table(
        ["notebook", "claim", "verdict", "value", "interval", "bar"],
        [
            [
                entry["notebook"],
                entry["id"],
                entry["verdict"],
                f"{entry['value']:.3g}",
                " to ".join(f"{end:.3g}" for end in entry["interval"] or []),
                entry["rule"],
            ]
            for entry in entries
        ],
    )
    return 0


def bench(options: argparse.Namespace) -> int:
    """Measure what the course promises about time and memory, on this machine.

    Parts: `import`, `start` and `estimate` (seconds), `scoring` and `step` (a minute), `notebooks`
    (each one is run), `results` (as recorded by the sweeps), `suite` (the whole test suite; only
    when named).
    Exits 1 when something could not be measured; a bar that does not hold is a result.
    """
    from labkit.bench import PARTS, measure

    unknown = sorted(set(options.only or []) - set(PARTS))
    if unknown:
        raise ValueError(f"--only {unknown[0]}: no such part: use {', '.join(PARTS)}")
    result = measure(options.only, say=_say)
    if options.out:
        from labkit.files import write_atomic

        write_atomic(options.out, (json.dumps(result.to_json(), indent=2) + "\n").encode())
    if options.json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        _table(
            ["what", "value", "unit", "bar", "holds"],
            [
                [row.what, f"{row.value:.4g}", row.unit, row.rule, "yes" if row.holds else "no"]
                for row in result.rows
            ],
        )
    for what, reason in result.missing.items():
        _say(f"not measured: {what}: {reason}")
    return 1 if result.missing else 0


def workbook(options: argparse.Namespace) -> int:
    """Build or update the learner's copy: no outputs, no solutions, and no edit of theirs lost."""
    from labkit.notebooks.workbook import build_workbook

    print(build_workbook(target=options.target))
    return 0


def release(options: argparse.Namespace) -> int:
    """Make the copy of the course that students get, as a folder or a .zip.

    Solutions and outputs are gone from the notebooks, and so are the tests. TIMETABLE.md says what
    each notebook takes in minutes and MB: every notebook is run to measure that, unless --costs or
    --no-run says otherwise.
    """
    from labkit.notebooks.release import make_release, timetable

    if options.costs and options.no_run:
        raise ValueError("--costs and --no-run exclude each other: give one of them")
    plan = timetable(costs=options.costs, run=not options.no_run, progress=_say)
    report = make_release(options.out, plan)
    print(plan)
    print(report)
    return 0


# ---- printing ----------------------------------------------------------------------------------


def _say(line: str) -> None:
    """Progress goes to stderr: stdout holds the result and nothing else."""
    print(line, file=sys.stderr, flush=True)


class Meter:
    """A line of progress that is rewritten on a terminal and printed now and then elsewhere."""

    def __init__(self, seconds_between_lines: float = 15) -> None:
        self._terminal = sys.stderr.isatty()
        self._pause = 0.2 if self._terminal else seconds_between_lines
        self._next = time.monotonic() + (0 if self._terminal else 2)

    def __call__(self, line: str) -> None:
        """Show the line, unless the last one was shown a moment ago."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._pause
        if self._terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            _say(line)

    def end(self) -> None:
        """Leave the line."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _table(head: list[str], rows: list[list[str]]) -> None:
    """Print columns: the first on the left, numbers on the right."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    numeric = [
        all(line[column][:1].isdigit() or line[column][:1] in "-+≤≥" for line in rows)
        for column in range(len(head))
    ]
    for line in lines:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
