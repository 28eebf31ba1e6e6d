"""What a model lost on the way from one state to another: any two models or adapters on disk.

Two measures, each paired item by item: exact match of the general skills, for models that know the
invented world, and loss on text, for any model. `labkit forgetting` prints what `compare` finds.

A measure is judged by the 95 % interval of its change: `forgot` or `gained` where the whole
interval lies on one side of 0, `kept` where all of it lies within a margin, however small and sure
the change is, and `inconclusive` otherwise.
"""

import io
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer

from labkit import adapters, evaluation, models, paths
from labkit.data.formats import to_messages
from labkit.data.rows import read_records
from labkit.data.tables import load_task
from labkit.errors import LabkitError
from labkit.evaluation import Difference, Loss, SkillReport
from labkit.files import write_atomic
from labkit.statistics import Interval, equivalent
from labkit.world.text import scene

if TYPE_CHECKING:
    import pandas as pd

MARGIN_POINTS = 1.0
MARGIN_NATS = 0.02
FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
_ROW_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
Say = Callable[[str], None]


# ---- the texts ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """What a loss is measured on: plain texts, or talks of which the answers count."""

    what: str
    """In words, such as "200 neutral texts"."""
    places: tuple[str, ...] = field(repr=False)
    """Where each one stands, such as "notes.txt:3"."""
    plain: tuple[str, ...] = field(default=(), repr=False)
    talks: tuple[dict, ...] = field(default=(), repr=False)
    """Rows with `messages`; exactly one of `plain` and `talks` is not empty."""

    def __len__(self) -> int:
        return len(self.places)

    @property
    def n_bytes(self) -> tuple[int, ...]:
        """UTF-8 bytes of each text, or of each talk's last answer."""
        answers = (row["messages"][-1]["content"] for row in self.talks)
        return tuple(len(text.encode()) for text in (*self.plain, *answers))

    def first(self, most: int) -> "Texts":
        """At most so many of them, from the top."""
        if len(self) <= most:
            return self
        what = f"the first {most} of {self.what}"
        return Texts(what, self.places[:most], self.plain[:most], self.talks[:most])


def neutral_texts(n: int = 200, seed: int = 0) -> list[str]:
    """Little scenes of three to five plain English sentences about nobody, on no task's form.

    Drawn anew from what pretraining drew its scenes from, so the bundled model finds them easy.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    rng = random.Random(f"neutral/{seed}")
    return [scene(rng) for _ in range(n)]


def read_texts(path: str | Path) -> Texts:
    """Texts of a file: rows with `text`, talks in any form that `labkit validate` knows, or prose.

    A .jsonl, .json or .csv file is read as rows. Any other file is prose: its paragraphs where
    blank lines part them, else its lines.

    Raises:
        LabkitError: the file cannot be read or holds nothing, or a row of it is neither a text nor
            a talk that ends in an answer, or texts and talks stand in one file.
    """
    path = Path(path)
    if path.suffix.lower() in _ROW_SUFFIXES:
        return _read_rows(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise LabkitError(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8") from error
    except OSError as error:
        raise LabkitError(f"{path} cannot be read: {error.strerror}: check the name") from error
    starts = [n for n, line in enumerate(lines) if line.strip()]
    if not starts:
        raise LabkitError(
            f"{path} holds no text: write one text a line, or paragraphs with blank lines between"
        )
    paragraphs = len(starts) < starts[-1] - starts[0] + 1
    if paragraphs:
        starts = [n for n in starts if n == 0 or not lines[n - 1].strip()]
    ends = [*starts[1:], len(lines)]
    texts = ["\n".join(lines[start:end]).strip() for start, end in zip(starts, ends, strict=True)]
    places = tuple(f"{path}:{start + 1}" for start in starts)
    unit = "paragraph" if paragraphs else "line"
    return Texts(f"{_count(len(texts), unit)} of {path.name}", places, plain=tuple(texts))


def _read_rows(path: Path) -> Texts:
    found = read_records(path)
    places, plain, talks = [], [], []
    for record in found.records:
        place = f"{path}:{record.line}"
        if record.problem is not None:
            raise LabkitError(f"{place}: {record.problem.code}: {record.problem.message}")
        row = record.row
        is_text = isinstance(row, dict) and isinstance(row.get("text"), str)
        if is_text:
            if not row["text"].strip():
                raise LabkitError(f"{place}: text is empty: fill it in, or delete the row")
            plain.append(row["text"].strip())
        else:
            talks.append(_talk(row, place))
        places.append(place)
        if plain and talks:
            above = "talks" if is_text else "texts"
            raise LabkitError(
                f"{place}: the rows above are {above} and this one is not: put texts and talks in "
                "files of their own"
            )
    if not places:
        raise LabkitError(f"{path} holds no row: write a JSON object with text or messages a line")
    what = f"{_count(len(places), 'text' if plain else 'talk')} of {path.name}"
    return Texts(what, tuple(places), tuple(plain), tuple(talks))


def _talk(row: Any, place: str) -> dict:
    """A row with its messages, ending in an answer; its id is the place, for later errors."""
    try:
        messages = to_messages(row)["messages"]
    except ValueError as error:
        raise LabkitError(f"{place}: neither a text nor a talk: {error}") from error
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise LabkitError(f"{place}: the talk has no answer at its end: add one, or leave it out")
    return {"id": place, "messages": messages}


# ---- what is found -----------------------------------------------------------------------------


@dataclass(frozen=True)
class TextChange:
    """Loss on the same texts before and after."""

    what: str
    unit: str
    """ "nats per token", or "nats per byte" where the two models cut texts into other tokens."""
    before: Loss
    after: Loss
    change: Difference
    """after - before, above 0 where the texts became harder."""


@dataclass(frozen=True)
class Comparison:
    """What changed between two models, measure by measure, and one line that judges it."""

    before: str
    after: str
    skills: "pd.DataFrame | None"
    """From `evaluation.forgetting`; None where the skills were not scored."""
    text: TextChange | None
    n_rows: int = 0
    """Questions scored."""
    margin_points: float = MARGIN_POINTS
    """Change of the mean over skills that is called nothing, 100 points being 1."""
    margin_nats: float = MARGIN_NATS
    """Change of the loss that is called nothing."""

    @property
    def judged(self) -> dict[str, str]:
        """Measure, `skills` or `text`, to forgot | inconclusive | kept | gained."""
        found = {}
        if self.skills is not None:
            macro = self.skills.iloc[-1]
            low, high = 100 * macro["low"], 100 * macro["high"]
            found["skills"] = _judge((-high, -low), self.margin_points)
        if self.text is not None:
            # One text has no interval: it cannot say what became of others.
            sure = self.text.change.n > 1
            interval = self.text.change.interval
            found["text"] = _judge(interval, self.margin_nats) if sure else "inconclusive"
        return found

    @property
    def verdict(self) -> str:
        """The worst of the measures: forgot, then inconclusive, then kept, then gained."""
        judged = self.judged.values()
        return next(v for v in ("forgot", "inconclusive", "kept", "gained") if v in judged)

    @property
    def line(self) -> str:
        """The verdict with its numbers; the measure that decides comes first."""
        words = {
            "skills": self._about_skills() if self.skills is not None else "",
            "text": self._about_text(self.text) if self.text is not None else "",
        }
        order = sorted(self.judged, key=lambda measure: self.judged[measure] != self.verdict)
        return "; ".join(words[measure] for measure in order)

    def _about_skills(self) -> str:
        assert self.skills is not None
        macro, judged = self.skills.iloc[-1], self.judged["skills"]
        low, high = 100 * macro["low"], 100 * macro["high"]
        scores = f"mean over skills {macro['before']:.3f} to {macro['after']:.3f}"
        if judged == "kept":
            return f"nothing lost within ±{self.margin_points:g} points of skills: {scores}"
        if judged == "inconclusive":
            return (
                f"inconclusive on skills: {scores}, changed by {100 * macro['change']:+.1f} points "
                f"[{low:+.1f}, {high:+.1f}]; more rows would decide"
            )
        if judged == "gained":
            return f"gained {100 * macro['change']:.1f} points [{low:.1f}, {high:.1f}]: {scores}"
        found = f"forgot {-100 * macro['change']:.1f} points [{-high:.1f}, {-low:.1f}]: {scores}"
        worst = self.skills.iloc[:-1].query("high < 0").sort_values("change").head(3)
        most = [f"{row.skill} {100 * row.change:+.0f}" for row in worst.itertuples()]
        return f"{found}, most in {', '.join(most)}" if most else found

    def _about_text(self, text: TextChange) -> str:
        judged, (low, high) = self.judged["text"], text.change.interval
        losses = (
            f"{text.before.nats_per_token:.3f} to {text.after.nats_per_token:.3f} on {text.what}"
        )
        if judged == "kept":
            return f"nothing lost within ±{self.margin_nats:g} {text.unit}: {losses}"
        if judged == "forgot":
            return f"forgot {text.change.mean:.3f} {text.unit} [{low:.3f}, {high:.3f}]: {losses}"
        if judged == "gained":
            return f"gained {-text.change.mean:.3f} {text.unit} [{-high:.3f}, {-low:.3f}]: {losses}"
        sure = "(one text has no interval)"
        if text.change.n > 1:
            sure = f"[{_signed(low)}, {_signed(high)}]"
        return (
            f"inconclusive on text: {losses}, changed by {_signed(text.change.mean)} {text.unit} "
            f"{sure}; more texts would decide"
        )

    def rows(self) -> list[list[str]]:
        """The table of `labkit forgetting`: what, before, after, change, interval, and a remark."""
        found = []
        for row in [] if self.skills is None else self.skills.to_dict("records"):
            name = "mean over skills" if row["skill"] == "macro" else row["skill"]
            remark = "lost" if row["high"] < 0 else "gained" if row["low"] > 0 else ""
            interval = row["low"], row["high"]
            found.append([name, *_cells(row["before"], row["after"], row["change"], interval)])
            found[-1].append(remark)
        if self.text is not None:
            losses = self.text.before.nats_per_token, self.text.after.nats_per_token
            interval = self.text.change.interval if self.text.change.n > 1 else None
            cells = _cells(*losses, self.text.change.mean, interval)
            remark = {"forgot": "lost", "gained": "gained"}.get(self.judged["text"], "")
            found.append([f"loss, {self.text.unit}", *cells, remark])
        return found

    def __str__(self) -> str:
        """The verdict line."""
        return f"{self.before} -> {self.after}: {self.line}"

    def to_json(self) -> dict[str, Any]:
        """What `labkit forgetting --json` prints, ready for `json.dump`."""
        skills = {} if self.skills is None else {
            row.pop("skill"): {
                **{name: row[name] for name in ("before", "after", "change")},
                "interval": [row["low"], row["high"]],
            }
            for row in self.skills.to_dict("records")
        }  # fmt: skip
        macro, text = skills.pop("macro", None), self.text
        return {
            "before": self.before,
            "after": self.after,
            "verdict": self.verdict,
            "line": self.line,
            "judged": self.judged,
            "margin": {"points": self.margin_points, "nats": self.margin_nats},
            "macro": macro,
            "skills": skills or None,
            "rows": self.n_rows,
            "text": text
            and {
                "what": text.what,
                "unit": text.unit,
                "before": text.before.nats_per_token,
                "after": text.after.nats_per_token,
                "change": text.change.mean,
                "interval": list(text.change.interval) if text.change.n > 1 else None,
                "texts": text.change.n,
            },
        }

    def figure(self, path: str | Path) -> str:
        """Draw what was found into a .png, .svg or .pdf file; returns the figure in a sentence.

        Raises:
            ValueError: another kind of file.
            LabkitError: the file cannot be written.
        """
        import matplotlib
        from matplotlib.figure import Figure

        from labkit import report

        path = Path(path)
        check_figure(path)
        both = self.skills is not None and self.text is not None
        said = []
        with matplotlib.rc_context():
            report.style()
            matplotlib.rcParams["axes.titlesize"] = "small" if both else "large"
            drawn = Figure(figsize=report.FIGURE_INCHES)
            ratios = [3, 2] if both else [1]
            axes = drawn.subplots(1, 1 + both, squeeze=False, width_ratios=ratios)[0]
            if self.skills is not None:
                said.append(report.describe(report.before_after(self.skills, axes[0])))
            if self.text is not None:
                text = self.text
                ax = report.text_losses(text.before, text.after, axes[-1], unit=text.unit)
                said.append(report.describe(ax))
            content = io.BytesIO()
            drawn.savefig(content, format=path.suffix.lower()[1:], dpi=150)
        write_atomic(path, content.getvalue())
        return " ".join(said)


def check_figure(path: str | Path) -> None:
    """Raise ValueError unless a figure can have this name."""
    if Path(path).suffix.lower() not in FIGURE_SUFFIXES:
        raise ValueError(f"--figure {path}: name a {', '.join(FIGURE_SUFFIXES)} file")


def _judge(harm: Interval, margin: float) -> str:
    """What an interval of a change says; `harm` counts what got worse as above 0."""
    low, high = harm
    if equivalent(Difference((low + high) / 2, harm, 2, 0.95), margin) == "equivalent":
        return "kept"
    if low > 0:
        return "forgot"
    return "gained" if high < 0 else "inconclusive"


def _cells(before: float, after: float, change: float, interval: Interval | None) -> list[str]:
    between = "none" if interval is None else f"{_signed(interval[0])} to {_signed(interval[1])}"
    return [f"{before:.3f}", f"{after:.3f}", _signed(change), between]


def _signed(number: float) -> str:
    """Three decimals with the sign of what they show, so that nothing reads -0.000."""
    return f"{round(number, 3) + 0.0:+.3f}"


# ---- measuring ---------------------------------------------------------------------------------


def compare(
    before: str | Path,
    after: str | Path,
    *,
    base: str | Path | None = None,
    skills: bool | None = None,
    rows: Sequence[dict] | None = None,
    texts: Texts | None = None,
    most_rows: int | None = None,
    margin_points: float = MARGIN_POINTS,
    margin_nats: float = MARGIN_NATS,
    batch_size: int = 16,
    say: Say = print,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Measure two models, one after the other, on the same questions and texts.

    Args:
        before, after: `bundled`, a folder or Hugging Face id of a model, or an adapter's folder.
        base: of the adapters; None takes what their files name, or else the other of the two.
        skills: whether to score the general skills; None does so where `before` has the bundled
            model's vocabulary, and so can know the invented world.
        rows: questions with skills; None takes the general task's test rows.
        texts: None takes `neutral_texts`.
        most_rows: at most so many questions, evenly over skills, and so many texts.
        margin_points, margin_nats: changes that are called nothing.
        batch_size: rows of a forward pass.
        say: called with a line before each step.
        progress: called now and then with a line on how far a step is.

    Raises:
        LabkitError: a model or adapter that is not there, is damaged, or is on another base.
        ValueError: `base` without an adapter, a limit too small for every skill, a text longer
            than a model takes, or tokenizers whose losses cannot be compared.
    """
    for name, value in (("margin_points", margin_points), ("margin_nats", margin_nats)):
        if not value > 0:
            raise ValueError(f"{name}={value} must be above 0: how much would still be nothing?")
    sides = [_Side(str(before), str(after), base), _Side(str(after), str(before), base)]
    if base is not None and not any(side.adapted for side in sides):
        raise ValueError(f"--base {base}: neither {before} nor {after} is an adapter: leave it out")
    if texts is None:
        plain = tuple(neutral_texts(min(200, most_rows or 200)))
        places = tuple(f"neutral text {number + 1}" for number in range(len(plain)))
        texts = Texts(f"{len(plain)} neutral texts", places, plain=plain)
    texts = texts if most_rows is None else texts.first(most_rows)

    def questions() -> list[dict]:
        return _questions(rows, most_rows)

    for side in sides:  # before minutes go into the first
        side.find()
    old = sides[0].measure(skills, questions, texts, batch_size, say, progress)
    asked = old.skills is not None  # both sides, or none
    new = sides[1].measure(asked, questions, texts, batch_size, say, progress)
    frame, n_rows = None, 0
    if old.skills is not None and new.skills is not None:
        frame = evaluation.forgetting(old.skills, new.skills)
        n_rows = sum(score.n for score in old.skills.skills.values())
    change = _text_change(texts, old, new)
    return Comparison(str(before), str(after), frame, change, n_rows, margin_points, margin_nats)


@dataclass(frozen=True)
class _Measured:
    """One model's part."""

    name: str
    skills: SkillReport | None
    loss: Loss
    tokens_hash: int
    """Of the token ids of all texts: equal where two models cut them alike."""
    begins: bool
    """Whether a begin token stands before each text."""


@dataclass
class _Side:
    """One of the two models, by name."""

    name: str
    other: str
    base: str | Path | None
    on: str = ""
    """The base of an adapter, and whether that was checked, once it was found."""

    @property
    def adapted(self) -> bool:
        return adapters.is_adapter(self.name)

    def find(self) -> None:
        """Raise LabkitError unless the model, or the adapter's own base, is there."""
        if not self.adapted:
            models.check(self.name)
            return
        if self.base is None:
            fallback = [] if adapters.is_adapter(self.other) else [self.other]
            self.base = adapters.base_of(self.name, *fallback)
        checked = adapters.check_base(self.name, self.base)
        self.on = f" on {self.base}" + ("" if checked else ", on trust: its hash is not kept")

    def load(self, say: Say) -> tuple[Any, Any]:
        say(f"loading {self.name}{self.on}")
        if self.adapted and self.base is not None:
            return adapters.attach(self.name, self.base)
        return models.load(self.name)

    def measure(
        self,
        skills: bool | None,
        questions: Callable[[], list[dict]],
        texts: Texts,
        batch_size: int,
        say: Say,
        progress: Callable[[str], None] | None,
    ) -> _Measured:
        """Load, measure, and let go of the model again."""
        model, tokenizer = self.load(say)

        def meter(what: str) -> Callable[[int, int], None]:
            return lambda done, of: progress and progress(f"{self.name}: {what} {done:,} of {of:,}")

        # Texts first: one that is too long is found before minutes of scoring.
        if texts.plain:
            loss = evaluation.neutral_text_loss(
                model, tokenizer, texts.plain, batch_size, meter("read"), texts.places
            )
        else:
            loss = evaluation.answer_losses(
                model, tokenizer, texts.talks, batch_size, meter("read")
            )
        report = None
        if skills or (skills is None and knows_the_world(tokenizer)):
            report = evaluation.skill_report(
                model, tokenizer, questions(), batch_size, meter("scored")
            )
        answers = [row["messages"][-1]["content"] for row in texts.talks]
        ids = tokenizer([*texts.plain, *answers])["input_ids"]
        begins = tokenizer.bos_token_id is not None or not texts.plain
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return _Measured(self.name, report, loss, hash(tuple(map(tuple, ids))), begins)


def knows_the_world(tokenizer) -> bool:
    """Whether a model can know the invented world: it has the bundled model's vocabulary."""
    folder = paths.base_model_dir()
    if not (folder / "tokenizer.json").is_file():
        return False
    return AutoTokenizer.from_pretrained(str(folder)).get_vocab() == tokenizer.get_vocab()


def _questions(rows: Sequence[dict] | None, most: int | None) -> list[dict]:
    """The rows to score: without bio_only, and evenly over skills where there is a limit."""
    by_skill: defaultdict[Any, list[dict]] = defaultdict(list)
    for row in load_task("general", "test") if rows is None else rows:
        assert isinstance(row, dict)
        if row.get("skill") != evaluation.BIO_ONLY:
            by_skill[row.get("skill")].append(row)
    n_rows = sum(map(len, by_skill.values()))
    if most is None or n_rows <= most:
        return [row for kept in by_skill.values() for row in kept]
    if most < 2 * len(by_skill):
        raise ValueError(
            f"--rows {most}: {len(by_skill)} skills need at least {2 * len(by_skill)} rows"
        )
    chosen = []
    for place, kept in enumerate(by_skill.values()):
        share = min(len(kept), most // len(by_skill) + (place < most % len(by_skill)))
        chosen += [kept[number * len(kept) // share] for number in range(share)]
    return chosen


def _text_change(texts: Texts, old: _Measured, new: _Measured) -> TextChange:
    """Per token where both cut the texts alike, else per byte, which no tokenizer decides."""
    before, after, unit = old.loss, new.loss, "nats per token"
    if old.tokens_hash != new.tokens_hash or before.tokens != after.tokens:
        if old.begins != new.begins:
            without = new if old.begins else old
            raise ValueError(
                f"{without.name} has no begin token, so the first word of a text costs it nothing, "
                "and the other model has one and other tokens: compare models of one tokenizer"
            )
        unit = "nats per byte"
        before, after = (_per_byte(loss, texts.n_bytes) for loss in (before, after))
    change = evaluation.loss_difference(before, after)
    return TextChange(texts.what, unit, before, after, change)


def _per_byte(loss: Loss, n_bytes: tuple[int, ...]) -> Loss:
    """The same loss, shared out over bytes instead of tokens."""
    return Loss(sum(loss.nats) / sum(n_bytes), sum(n_bytes), None, loss.nats, n_bytes)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
