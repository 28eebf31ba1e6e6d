"""A loss curve that grows while a model trains, and leaves the same stored output on every run."""

import html
import math
import time
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import TrainerCallback

from labkit.machine import peak_memory

SECONDS_BETWEEN_DRAWINGS = 0.3  # a drawing costs about a millisecond
PLAIN_TEXT = "A loss curve grows here while the model trains; the lines below say the same."


@dataclass
class TokenCounter:
    """Real tokens, padding left out, that a model was trained on."""

    seen: int | Tensor = 0

    def watch(self, model: nn.Module):
        """Count from now on; returns a handle whose `remove()` stops it."""
        return model.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, model: nn.Module, args: tuple, inputs: dict) -> None:
        if not model.training:
            return
        mask = inputs.get("attention_mask")
        ids = inputs.get("input_ids", args[0] if args else None)
        if mask is not None:
            self.seen = self.seen + mask.sum()  # stays on the device: .item() would wait for a GPU
        elif ids is not None:
            self.seen = self.seen + ids.numel()


@dataclass
class LossLog:
    """Points of the two curves: (step, loss in nats per token)."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    eval_loss: list[tuple[int, float]] = field(default_factory=list)

    def add(self, entry: dict[str, float], step: int) -> None:
        """Keep what one entry of the trainer's log says about the losses."""
        for name in ("loss", "eval_loss"):
            if name in entry:
                getattr(self, name).append((step, float(entry[name])))


class LiveCurve(TrainerCallback):
    """Draws loss and evaluation loss while training, above one printed line per logging step.

    In a notebook it shows one ipywidgets.HTML and updates its value, which sends messages and
    stores nothing; printed numbers carry a leading ≈ and two decimals. Elsewhere it only prints.
    Take transformers' own printer away: `trainer.remove_callback(PrinterCallback)`.

    Args:
        total_steps: length of the x-axis; None takes the trainer's own.
    """

    def __init__(self, total_steps: int | None = None):
        self.total_steps = total_steps
        self.widget = None
        self._log = LossLog()
        self._learning_rate = math.nan
        self._hook = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Show the empty curve; after a resume, with the points of the run so far."""
        self._log = LossLog()
        for entry in state.log_history:
            self._log.add(entry, entry["step"])
        self._first_step, self._started = state.global_step, time.perf_counter()
        self._step_seconds, self._last_drawn = 0.0, 0.0
        self._tokens = TokenCounter()
        self._stop_counting()
        if model is not None:
            self._hook = self._tokens.watch(model)
        if state.is_world_process_zero and _in_notebook():
            from ipywidgets import HTML

            self.widget = HTML(value="Waiting for the first step.")
            show_widget(self.widget, PLAIN_TEXT)

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock of one step, so that evaluations and saves do not count as training."""
        self._step_started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Add the step's time, and draw now and then between two logging steps."""
        self._step_seconds += time.perf_counter() - self._step_started
        self._draw(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print one rounded line, and draw."""
        logs = logs or {}
        self._log.add(logs, state.global_step)
        self._learning_rate = logs.get("learning_rate", self._learning_rate)
        if state.is_world_process_zero:
            total = str(self.total_steps or state.max_steps)
            for name, label in (("loss", "loss"), ("eval_loss", "eval loss")):
                if name in logs:
                    step = f"{state.global_step:>{len(total)}}/{total}"
                    print(f"step  {step}  {label} ≈{float(logs[name]):.2f}")
        self._draw(state)

    def on_train_end(self, args, state, control, **kwargs):
        """Draw the last state and stop counting tokens."""
        self._draw(state, now=True)
        self._stop_counting()

    def _stop_counting(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _draw(self, state, now: bool = False) -> None:
        if self.widget is None:
            return
        if not now and time.perf_counter() - self._last_drawn < SECONDS_BETWEEN_DRAWINGS:
            return
        total = self.total_steps or state.max_steps
        svg = loss_svg(self._log, total)
        self.widget.value = f"{svg}<div>{html.escape(self._status(state.global_step, total))}</div>"
        self._last_drawn = time.perf_counter()

    def _status(self, step: int, total: int) -> str:
        """One line: step, losses, rate, tokens per second, time left, memory."""
        parts = [f"step {step} of {total}"]
        for points, label in ((self._log.loss, "loss"), (self._log.eval_loss, "eval loss")):
            if points:
                parts.append(f"{label} {points[-1][1]:.2f}")
        if not math.isnan(self._learning_rate):
            parts.append(f"rate {self._learning_rate:.1e}")
        done = step - self._first_step
        if done and self._step_seconds:
            parts.append(f"{int(self._tokens.seen) / self._step_seconds:,.0f} tokens/s")
            left = (time.perf_counter() - self._started) / done * max(total - step, 0)
            parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        memory = peak_memory()
        on_gpu = memory["allocated_bytes"] > 0
        peak = memory["allocated_bytes" if on_gpu else "process_bytes"]
        where = "on the GPU" if on_gpu else "in this process"
        parts.append(f"{peak / 1e6:,.0f} MB {where} at most")
        return " · ".join(parts)


def _in_notebook() -> bool:
    try:
        from IPython.core.getipython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None


def show_widget(widget, plain_text: str) -> None:
    """Display a widget with a constant text beside it, for readers without a running kernel."""
    from IPython.display import display

    display(widget_bundle(widget, plain_text), raw=True)


def widget_bundle(widget, plain_text: str) -> dict[str, object]:
    """A widget and its text by MIME type, as `_repr_mimebundle_` returns them."""
    return {
        "text/plain": plain_text,
        "application/vnd.jupyter.widget-view+json": widget.get_view_spec(),
    }


# One drawing: 640 x 240 units, the plot between these edges.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 240, 48, 530, 14, 206
# Okabe and Ito's blue and vermilion, which colour-blind readers tell apart.
CURVES = (("loss", "loss", "#0072B2"), ("eval_loss", "eval loss", "#D55E00"))
MOST_POINTS = 300  # more than the drawing has room for


def loss_svg(log: LossLog, total_steps: int) -> str:
    """The two curves as one SVG picture on white, which reads in a dark theme too."""
    curves = [(label, colour, _finite(getattr(log, name))) for name, label, colour in CURVES]
    top = max((loss for _, _, points in curves for _, loss in points), default=1.0) or 1.0

    def x(step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / max(total_steps, 1)

    def y(loss: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * max(loss, 0) / top

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>']
    for share in (0, 0.5, 1):
        height, step = y(share * top), round(share * total_steps)
        parts += [
            f'<path d="M{LEFT} {height:.1f}H{RIGHT}" stroke="#ddd"/>',
            f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{share * top:.2f}</text>',
            f'<text x="{x(step):.1f}" y="{BOTTOM + 16}" text-anchor="middle">{step}</text>',
        ]
    parts += [
        f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>',
        f'<text x="{RIGHT}" y="{TOP - 4}" text-anchor="end">nats per token</text>',
    ]

    label_heights: list[float] = []
    for label, colour, points in curves:
        if not points:
            continue
        shown = points[:: math.ceil(len(points) / MOST_POINTS)] + points[-1:]
        path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in shown)
        step, loss = points[-1]
        height = y(loss)
        if any(abs(height - other) < 14 for other in label_heights):  # labels never overlap
            height = label_heights[-1] + (14 if label_heights[-1] < HEIGHT / 2 else -14)
        label_heights.append(height)
        parts += [
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<circle cx="{x(step):.1f}" cy="{y(loss):.1f}" r="3" fill="{colour}"/>',
            f'<text x="{x(step) + 7:.1f}" y="{height + 4:.1f}" fill="{colour}">'
            f"{label} {loss:.2f}</text>",
        ]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" style="max-width:{WIDTH}px" role="img" '
        f'aria-label="{html.escape(describe_curves(log))}" font-family="sans-serif" font-size="12" '
        f'fill="#333">{"".join(parts)}</svg>'
    )


def describe_curves(log: LossLog) -> str:
    """The picture in one sentence, for readers who do not see it."""
    sentences = []
    for name, label, _ in CURVES:
        points = _finite(getattr(log, name))
        if points:
            (start, first), (end, last) = points[0], points[-1]
            sentences.append(f"{label} {first:.2f} at step {start}, {last:.2f} at step {end}")
    return "; ".join(sentences) or "no loss logged yet"


def _finite(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Points that can be drawn: a loss that overflowed stays in the text and out of the picture."""
    return [(step, loss) for step, loss in points if math.isfinite(loss)]
