"""Things to click: a talk with a model, bad answers to read, explorers of a run's plan, of what a
LoRA needs and of what a mix brings, and a calculator of the memory that a training takes."""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ipywidgets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from labkit import memory
from labkit.badcases import Judged, reason_counts
from labkit.byte_figures import KIND_COLORS
from labkit.claims import approx
from labkit.curves import widget_bundle
from labkit.evaluation import generate_answers
from labkit.memory import reference
from labkit.memory.units import size_text
from labkit.recipe import (
    Arm,
    Interval,
    Recommendation,
    Trial,
    arms_of,
    keeps_to,
    recommend,
)
from labkit.stepplan import StepPlan, plan_steps
from labkit.weights import n_parameters

MAX_NEW_TOKENS = 48
_STYLE = {"description_width": "9em"}


class Chat:
    """A talk with a model: `ask` in code, or `widget` with a box whose Enter key sends.

    Args:
        model, tokenizer: as `models.load` returns them; the template decides what the model sees.
        system: instruction that stands before the talk; None for none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
    ):
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.messages: list[dict[str, str]] = []
        self.transcript = ipywidgets.HTML()
        self.status = ipywidgets.HTML()
        # Without continuous_update the value changes once a message is complete: on Enter, or when
        # the focus leaves the box.
        self.box = ipywidgets.Text(
            description="You:", placeholder="Type a message, Enter sends", continuous_update=False
        )
        self.send = ipywidgets.Button(description="Send")
        self.again = ipywidgets.Button(description="New talk")
        self.box.layout.width = "32em"
        self.box.observe(lambda change: self._send(), names="value")
        self.send.on_click(lambda button: self._send())
        self.again.on_click(lambda button: self.reset())
        controls = ipywidgets.HBox([self.box, self.send, self.again])
        self.widget = ipywidgets.VBox([self.transcript, controls, self.status])
        self.reset()

    def ask(self, text: str) -> str:
        """Send one message and return the model's greedy answer; both join the talk.

        Raises:
            ValueError: an empty message, or a talk longer than the model can read (`reset` starts a
                new one); the talk stays as it was.
        """
        if not text.strip():
            raise ValueError("text is empty: write a message")
        talk = [*self.messages, {"role": "user", "content": text}]
        [answer] = generate_answers(
            self.model, self.tokenizer, [talk], max_new_tokens=MAX_NEW_TOKENS
        )
        self.messages = [*talk, {"role": "assistant", "content": answer.text}]
        self._show()
        return answer.text

    def reset(self) -> None:
        """Forget the talk; the system instruction stays."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        self.messages = system
        self.status.value = ""
        self._show()

    def _send(self) -> None:
        text = self.box.value.strip()
        if not text:  # also when the line below empties the box
            return
        self.box.value = ""
        self.status.value = "The model is answering…"
        try:
            self.ask(text)
            self.status.value = ""
        except Exception as error:  # a widget's callback has nowhere else to show it
            self.status.value = html.escape(f"Not sent: {error}. “New talk” starts over.")

    def _show(self) -> None:
        names = {"system": "System", "user": "You", "assistant": "Model"}
        lines = [
            f"<p><strong>{names[message['role']]}:</strong> "
            f'<span style="white-space:pre-wrap">{html.escape(message["content"])}</span></p>'
            for message in self.messages
        ]
        # role=log lets a screen reader speak each new message.
        self.transcript.value = f'<div role="log">{"".join(lines)}</div>'

    def _repr_mimebundle_(self, **kwargs) -> dict[str, object]:
        return widget_bundle(self.widget, "A talk with the model: run this cell, type, Enter.")


class BadcaseReader:
    """One bad answer after the other: what was asked, what the model said, what is wrong with it.

    Args:
        judged: answers as `badcases.judge_samples` or `badcases.load` give them; good ones are left
            out.

    Click `previous` and `next`, move `place` with the arrow keys, choose a `reason`; or set
    `place.value` and `reason.value` ("" for all) in code. `shown` and `card` follow.
    """

    def __init__(self, judged: Sequence[Judged]):
        self._bad = [one for one in judged if one.reason is not None]
        counts = {"": len(self._bad), **reason_counts(self._bad)}
        self.reason = ipywidgets.Dropdown(
            options=[(f"{name or 'all reasons'} ({n})", name) for name, n in counts.items()],
            value="",
            description="Reason",
        )
        self.place = ipywidgets.IntSlider(1, min=1, max=1, description="Case")
        self.previous = ipywidgets.Button(description="Previous")
        self.next = ipywidgets.Button(description="Next")
        self.card = ipywidgets.HTML()
        self.reason.observe(lambda change: self._choose(), names="value")
        self.place.observe(lambda change: self._show(), names="value")
        # The slider keeps its value within its range.
        self.previous.on_click(lambda button: self._move(-1))
        self.next.on_click(lambda button: self._move(1))
        controls = ipywidgets.HBox([self.previous, self.next, self.place])
        self.widget = ipywidgets.VBox([self.reason, controls, self.card])
        self.shown: Judged | None = None
        self._choose()

    def _choose(self) -> None:
        """Keep the answers of the chosen reason, and begin at the first."""
        chosen = self.reason.value
        self._cases = [one for one in self._bad if chosen in ("", one.reason)]
        self.place.max = max(len(self._cases), 1)
        self.place.value = 1
        self._show()

    def _move(self, by: int) -> None:
        self.place.value += by

    def _show(self) -> None:
        if not self._cases:
            self.card.value = "<p>There is no bad answer to read.</p>"
            return
        one = self.shown = self._cases[self.place.value - 1]
        talk = "<br>".join(
            f"<em>{html.escape(message['role'])}:</em> {html.escape(message['content'])}"
            for message in one.row["messages"][:-1]
        )
        facts = {
            "Prompt": talk,
            "Answer": html.escape(one.text),
            "Right answer": html.escape(one.gold),
            "Reason": html.escape(str(one.reason)),
        }
        cells = (
            f'<tr><th scope="row" style="text-align:left;vertical-align:top">{name}</th>'
            f'<td style="padding-left:1em;white-space:pre-wrap">{value}</td></tr>'
            for name, value in facts.items()
        )
        caption = f"Case {self.place.value} of {len(self._cases)}"
        # aria-live lets a screen reader speak each new case.
        table = f"<table><caption>{caption}</caption>{''.join(cells)}</table>"
        self.card.value = f'<div aria-live="polite">{table}</div>'

    def _repr_mimebundle_(self, **kwargs) -> dict[str, object]:
        return widget_bundle(self.widget, "Bad answers to read: run this cell, use the arrow keys.")


class PlanExplorer:
    """The step plan of a run over `rows` rows, under sliders for batch, accumulation and epochs.

    Set a slider's `value` in code or move it with the arrow keys; `plan` and `table` follow.
    """

    def __init__(
        self,
        rows: int,
        *,
        batch_size: int = 16,
        accumulation: int = 1,
        epochs: int = 1,
        save_steps: float | None = None,
        save_total_limit: int | None = None,
    ):
        self.rows, self.save_steps, self.save_total_limit = rows, save_steps, save_total_limit
        self.batch_size = _slider("Batch", batch_size, 64)
        self.accumulation = _slider("Accumulation", accumulation, 16)
        self.epochs = _slider("Epochs", epochs, 10)
        self.table = ipywidgets.HTML()
        sliders = [self.batch_size, self.accumulation, self.epochs]
        for slider in sliders:
            slider.observe(lambda change: self._update(), names="value")
        self.widget = ipywidgets.VBox([*sliders, self.table])
        self.plan: StepPlan
        self._update()

    def _update(self) -> None:
        self.plan = plan_steps(
            self.rows,
            batch_size=self.batch_size.value,
            accumulation=self.accumulation.value,
            epochs=self.epochs.value,
            save_steps=self.save_steps,
            save_total_limit=self.save_total_limit,
        )
        facts: dict[str, int | str] = {
            "Rows": self.rows,
            "Rows per step": self.plan.rows_per_step,
            "Steps per epoch": self.plan.steps_per_epoch,
            "Steps in all": self.plan.total_steps,
        }
        if self.save_steps is not None:
            facts["Checkpoints saved"] = _steps(self.plan.checkpoints_saved)
            facts["Checkpoints kept"] = _steps(self.plan.checkpoints_kept())
        self.table.value = _facts_table("Step plan", facts)

    def _repr_mimebundle_(self, **kwargs) -> dict[str, object]:
        return widget_bundle(self.widget, "Sliders over a step plan: run this cell to move them.")


class LoraExplorer:
    """What LoRA trains, stores and needs, under a slider for the rank and a choice of layers.

    Memory is that of training in fp32, without activations.

    Args:
        model: any causal language model without an adapter; it is not changed.
        rank: to begin with.

    Set `rank.value` or `layers.value` in code, or with the arrow keys; `parameters` and `table`
    follow.
    """

    def __init__(self, model: PreTrainedModel, *, rank: int = 8):
        from labkit import adapters  # loads PEFT, which takes a second

        self._count, self._model = adapters.lora_parameters, model
        self._choices = choices = adapters.target_choices(model)
        most = min(map(min, adapters.target_shapes(model, "all-linear").values()))
        self._total = n_parameters(model).total
        self._layers = {
            name: len(adapters.target_shapes(model, targets)) for name, targets in choices.items()
        }
        self.rank = _slider("Rank", min(rank, most), most)
        self.layers = ipywidgets.ToggleButtons(
            options=list(choices.items()), description="Layers", style={"description_width": "7em"}
        )
        self.table = ipywidgets.HTML()
        for control in (self.rank, self.layers):
            control.observe(lambda change: self._update(), names="value")
        self.widget = ipywidgets.VBox([self.rank, self.layers, self.table])
        self.parameters: int
        self._update()

    def _update(self) -> None:
        chosen = str(self.layers.label)
        self.parameters = self._count(self._model, self.rank.value, self._choices[chosen])
        trained, total = self.parameters, self._total
        # Weights for all; gradients and AdamW's two means for what is trained; 4 bytes each.
        lora_bytes, full_bytes = 4 * (total + trained) + 12 * trained, 16 * total
        self.table.value = _facts_table(
            "LoRA of this rank",
            {
                "Layers adapted": self._layers[chosen],
                "Parameters trained": f"{trained:,}",
                "Share of the model": f"{trained / total:.2%}",
                "Adapter file, fp32": f"{4 * trained / 10**6:,.1f} MB",
                "Weights, gradients, AdamW, fp32": f"{lora_bytes / 10**6:,.0f} MB",
                "The same, all trained": f"{full_bytes / 10**6:,.0f} MB",
            },
        )

    def _repr_mimebundle_(self, **kwargs) -> dict[str, object]:
        return widget_bundle(self.widget, "A slider over LoRA's rank: run this cell to move it.")


class MixExplorer:
    """What each measured mixture learned, lost and cost, beside the best one within a budget.

    Args:
        results: from `claims.load_results`, with arms named METHOD MIX at RATE; see `recipe`.
        learned, lost: the measures' names.
        budget_points: of general score that may be lost, to begin with.
        only: which arms to offer, as for `recipe.recommend`; None is all.

    Set `method.value`, `mix.value`, `rate.value` or `budget.value` in code, or with the arrow
    keys; `trial`, `best` and `table` follow. Only what was measured can be chosen.
    """

    def __init__(
        self,
        results: dict,
        *,
        learned: str = "d3",
        lost: str = "lost",
        budget_points: float = 3.0,
        only: Callable[[Arm], bool] | None = None,
    ):
        def best(points: float) -> Recommendation:
            return recommend(results, points, learned=learned, lost=lost, only=only)

        self._recommend = best
        trials = arms_of(results, learned, lost)
        self._trials = [trial for trial in trials if only is None or only(trial.arm)]
        self.method = _dropdown("Method")
        self.mix = _dropdown("Domain : general")
        self.rate = _dropdown("Learning rate")
        self.budget = ipywidgets.FloatSlider(
            budget_points, min=0, max=30, step=0.5, description="Budget (points)", style=_STYLE
        )
        self.table = ipywidgets.HTML()
        self.trial: Trial
        _choose_from(self.method, list(dict.fromkeys(t.arm.method for t in self._trials)))
        self._offer()
        self.method.observe(lambda change: self._offer(), names="value")
        self.mix.observe(lambda change: self._offer_rates(), names="value")
        for control in (self.rate, self.budget):
            control.observe(lambda change: self._update(), names="value")
        self.widget = ipywidgets.VBox([self.method, self.mix, self.rate, self.budget, self.table])
        self._update()

    def _offer(self) -> None:
        """Mixes that the method was tried with; the chosen mix stays where it is one of them."""
        tried = [trial.arm for trial in self._trials if trial.arm.method == self.method.value]
        ratios = {arm.mix: arm.ratio for arm in tried}
        _choose_from(self.mix, sorted(ratios, key=lambda mix: ratios[mix]))
        self._offer_rates()

    def _offer_rates(self) -> None:
        chosen = self.method.value, self.mix.value
        tried = {
            _rate(trial.arm)
            for trial in self._trials
            if (trial.arm.method, trial.arm.mix) == chosen
        }
        _choose_from(self.rate, [(f"{rate:g}" if rate else "–", rate) for rate in sorted(tried)])
        self._update()

    def _update(self) -> None:
        chosen = self.method.value, self.mix.value, self.rate.value
        self.trial = next(
            trial
            for trial in self._trials
            if (trial.arm.method, trial.arm.mix, _rate(trial.arm)) == chosen
        )
        points = float(self.budget.value)
        self.best = self._recommend(points)
        beside = {
            "within": "Best within the budget",
            "crosses": "Best that may be within the budget",
            "none": "Within the budget",
        }[self.best.verdict]
        self.table.value = _comparison_table(
            f"Mixtures at a budget of {points:g} points",
            {"Chosen": self.trial, beside: self.best.choice},
            points,
        )

    def _repr_mimebundle_(self, **kwargs) -> dict[str, object]:
        return widget_bundle(self.widget, "Mixtures to choose from: run this cell to see them.")


PRECISIONS = {
    "bf16": {"dtype": "bf16"},
    "fp16": {"dtype": "fp16"},
    "fp32": {"dtype": "fp32"},
    "bf16 autocast over fp32": {"dtype": "fp32", "autocast": True},
}
"""What a calculator calls a precision, and the options of `labkit.memory` that it means."""
SHARDINGS = {
    "none": {},
    "FSDP": {"sharding": "fsdp"},
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-3": {"zero_stage": 3},
}
"""The same for what several devices share; with none each holds everything (DDP)."""


class MemoryCalculator:
    """Bytes of a training step on one device: by phase and kind, and the cards it fits on.

    Args:
        model: a name of `labkit.memory.reference.models()`, to begin with; so are the others.
        method, optimizer: as for `labkit.memory.estimate`.
        precision, sharding: a name of `PRECISIONS`, and one of `SHARDINGS`.

    Set the `value` of a control in code, or use Tab and the arrow keys. `estimate` follows (None
    where the choices exclude each other, and then `table` says why), and so do `picture`, `table`
    and `fitting`: the names of the cards with room for it and for what must stay free.
    """

    def __init__(
        self,
        model: str = "Meta-Llama-3-8B",
        *,
        method: str = "lora",
        batch_size: int = 1,
        seq_len: int = 2048,
        precision: str = "bf16",
        optimizer: str = "adamw",
        checkpointing: bool = True,
        devices: int = 1,
        sharding: str = "none",
    ):
        from labkit.memory.options import METHODS, OPTIMIZERS

        self.model = _dropdown("Model", reference.models(), model)
        self.method = _dropdown("Method", METHODS, method)
        self.batch = _powers("Batch", 64, batch_size)
        self.seq_len = _powers("Tokens a row", 2**15, seq_len, least=64)
        self.precision = _dropdown("Precision", PRECISIONS, precision)
        self.optimizer = _dropdown("Optimizer", OPTIMIZERS, optimizer)
        self.checkpointing = ipywidgets.Checkbox(
            checkpointing, description="Gradient checkpointing", style=_STYLE
        )
        self.devices = _powers("Devices", 64, devices)
        self.sharding = _dropdown("Shared by devices", SHARDINGS, sharding)
        self.picture, self.table = ipywidgets.HTML(), ipywidgets.HTML()
        controls = [
            self.model, self.method, self.batch, self.seq_len, self.precision, self.optimizer,
            self.checkpointing, self.devices, self.sharding,
        ]  # fmt: skip
        for control in controls:
            control.observe(lambda change: self._update(), names="value")
        half = (len(controls) + 1) // 2
        columns = [ipywidgets.VBox(controls[:half]), ipywidgets.VBox(controls[half:])]
        self.widget = ipywidgets.VBox([ipywidgets.HBox(columns), self.picture, self.table])
        self.estimate: memory.MemoryEstimate | None
        self.fitting: list[str]
        self._update()

    @property
    def options(self) -> dict[str, Any]:
        """The choices as `labkit.memory.estimate` takes them."""
        return {
            "method": self.method.value,
            "batch_size": self.batch.value,
            "seq_len": self.seq_len.value,
            "optimizer": self.optimizer.value,
            "gradient_checkpointing": self.checkpointing.value,
            "num_devices": self.devices.value,
            **PRECISIONS[str(self.precision.value)],
            **SHARDINGS[str(self.sharding.value)],
        }

    def _update(self) -> None:
        config, options = reference.model(str(self.model.value)), self.options
        try:
            self.estimate = memory.estimate(config, **options)
        except ValueError as error:
            self.estimate, self.fitting, self.picture.value = None, [], ""
            self.table.value = f'<p role="alert">Not possible: {html.escape(str(error))}.</p>'
            return
        phases: dict[str, memory.Moment] = {}
        for moment in memory.moments(config, **options):
            if moment.phase not in phases or moment.bytes > phases[moment.phase].bytes:
                phases[moment.phase] = moment
        kinds = {phase: memory.by_kind(moment.terms) for phase, moment in phases.items()}
        cards = memory.gpus_that_fit(config, **options)
        self.fitting = [card.gpu.name for card in cards if card.fits]
        self.picture.value = _bars_svg(kinds, self.estimate.phase)
        # aria-live lets a screen reader speak the new numbers.
        tables = _kinds_table(kinds, self.estimate) + _cards_table(cards)
        self.table.value = f'<div aria-live="polite">{tables}</div>'

    def _repr_mimebundle_(self, **kwargs) -> dict[str, object]:
        return widget_bundle(self.widget, "A memory calculator: run this cell to use it.")


def _bars_svg(bars: Mapping[str, Mapping[str, int]], winner: str) -> str:
    """A stacked bar for each phase, the highest one marked, on white: it reads in a dark theme."""
    width, left, right, top, step, high = 640, 130, 545, 10, 34, 24
    totals = {phase: sum(kinds.values()) for phase, kinds in bars.items()}
    unit = (right - left) / max(totals.values())
    shown = [kind for kind in KIND_COLORS if any(kinds.get(kind) for kinds in bars.values())]
    height = top + step * len(bars) + 24 * ((len(shown) + 2) // 3) + 8
    parts = [f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for row, (phase, kinds) in enumerate(bars.items()):
        y, x = top + row * step, float(left)
        weight = ' font-weight="bold"' if phase == winner else ""
        mark = "▶ " if phase == winner else ""
        parts.append(
            f'<text x="{left - 8}" y="{y + 16}" text-anchor="end"{weight}>{mark}{phase}</text>'
        )
        for kind in shown:
            wide = kinds.get(kind, 0) * unit
            if wide:
                said = f"{phase}: {kind} {size_text(kinds[kind])}"
                parts.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{high}" '
                    f'fill="{KIND_COLORS[kind]}" stroke="#fff"><title>{said}</title></rect>'
                )
            x += wide
        parts.append(
            f'<text x="{x + 6:.1f}" y="{y + 16}"{weight}>{size_text(totals[phase])}</text>'
        )
    for place, kind in enumerate(shown):
        x, y = left + 165 * (place % 3), top + step * len(bars) + 24 * (place // 3)
        parts += [
            f'<rect x="{x}" y="{y}" width="12" height="12" fill="{KIND_COLORS[kind]}"/>',
            f'<text x="{x + 18}" y="{y + 11}">{kind}</text>',
        ]
    spoken = "; ".join(f"{phase} {size_text(total)}" for phase, total in totals.items())
    label = html.escape(f"{spoken}; {winner} is the highest")
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%" style="max-width:{width}px" role="img" '
        f'aria-label="{label}" font-family="sans-serif" font-size="12" fill="#333">'
        f"{''.join(parts)}</svg>"
    )


def _kinds_table(kinds: Mapping[str, Mapping[str, int]], estimate: memory.MemoryEstimate) -> str:
    """Bytes by kind and phase, the phase that wins marked in words."""
    names = [kind for kind in KIND_COLORS if any(of.get(kind) for of in kinds.values())]
    rows = {kind: [size_text(of.get(kind, 0)) for of in kinds.values()] for kind in names}
    rows["all together"] = [size_text(sum(of.values())) for of in kinds.values()]
    heads = [f"{phase} (highest)" if phase == estimate.phase else phase for phase in kinds]
    caption = (
        f"One step on one device: {size_text(estimate.peak_allocated_bytes)} at most; "
        f"{estimate.trainable_parameters:,} numbers are trained"
    )
    return _grid(caption, heads, rows)


def _cards_table(cards: Sequence[memory.GpuFit]) -> str:
    """Which cards it fits on, with what must stay free there."""
    rows = {
        card.gpu.name: [
            size_text(card.gpu.memory_bytes),
            ("✓ fits" if card.fits else "✗ does not fit") + (f"; {card.note}" if card.note else ""),
            size_text(card.free_bytes) if card.fits else "–",
        ]
        for card in cards
    }
    return _grid("Cards, with what must stay free on each", ["memory", "verdict", "left"], rows)


def _grid(caption: str, heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """An HTML table with row and column headings."""
    left, cell = 'style="text-align:left"', 'style="text-align:right;padding-left:1em"'
    head = "".join(f'<th scope="col" {cell}>{html.escape(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row" {left}>{html.escape(name)}</th>'
        + "".join(f"<td {cell}>{html.escape(value)}</td>" for value in values)
        + "</tr>"
        for name, values in rows.items()
    )
    return f"<table><caption>{caption}</caption><tr><td></td>{head}</tr>{body}</table>"


def _comparison_table(caption: str, trials: Mapping[str, Trial | None], points: float) -> str:
    """Trials side by side as an HTML table with row and column headings; None is "no arm"."""
    facts = [_trial_facts(trial, points) for trial in trials.values()]
    return _grid(caption, list(trials), {name: [one[name] for one in facts] for name in facts[0]})


def _trial_facts(trial: Trial | None, points: float) -> dict[str, str]:
    if trial is None:
        names = ("Learned", "Lost (points)", "Budget", "Steps", "Seconds")
        return {"Arm": "no arm"} | dict.fromkeys(names, "–")
    return {
        "Arm": trial.arm.name,
        "Learned": _with_interval(trial.learned, trial.learned_interval, 2),
        "Lost (points)": _with_interval(
            100 * trial.lost, (100 * trial.lost_interval[0], 100 * trial.lost_interval[1]), 1
        ),
        "Budget": keeps_to(trial, points),
        "Steps": "–" if trial.steps is None else f"{trial.steps:,.0f}",
        "Seconds": "–" if trial.seconds is None else approx(trial.seconds, 0),
    }


def _with_interval(value: float, interval: Interval, digits: int) -> str:
    low, high = (approx(end, digits) for end in interval)
    return f"{approx(value, digits)} ({low} to {high})"


def _choose_from(dropdown: ipywidgets.Dropdown, options: list) -> None:
    """Offer other options, keeping the chosen one where it is among them, else the first."""
    values = [option[1] if isinstance(option, tuple) else option for option in options]
    chosen = dropdown.value
    dropdown.options = options
    dropdown.value = chosen if chosen in values else values[0]


def _rate(arm: Arm) -> float:
    """An arm's learning rate; 0, as None is no choice in a dropdown, where its name has none."""
    return arm.rate or 0.0


def _dropdown(name: str, options: Iterable[str] = (), value: str | None = None):
    chosen = {} if value is None else {"value": value}
    return ipywidgets.Dropdown(options=list(options), description=name, style=_STYLE, **chosen)


def _powers(name: str, most: int, value: int, least: int = 1) -> ipywidgets.SelectionSlider:
    """A slider over the powers of two, and over the value it begins with."""
    steps = [least * 2**power for power in range((most // least).bit_length())]
    options = sorted({*steps, value})
    return ipywidgets.SelectionSlider(
        options=[(f"{one:,}", one) for one in options], value=value, description=name, style=_STYLE
    )


def _facts_table(caption: str, facts: Mapping[str, int | str]) -> str:
    """Names and values as an HTML table with row headings."""
    cells = (
        f'<tr><th scope="row" style="text-align:left">{name}</th>'
        f'<td style="text-align:right;padding-left:1em">{value}</td></tr>'
        for name, value in facts.items()
    )
    return f"<table><caption>{caption}</caption>{''.join(cells)}</table>"


def _slider(name: str, value: int, most: int) -> ipywidgets.IntSlider:
    return ipywidgets.IntSlider(
        value, min=1, max=most, description=name, style={"description_width": "7em"}
    )


def _steps(steps: list[int]) -> str:
    """Steps as text; a long list by its ends."""
    if len(steps) <= 6:
        return ", ".join(map(str, steps)) or "none"
    return f"{steps[0]}, {steps[1]}, …, {steps[-1]} ({len(steps)})"
