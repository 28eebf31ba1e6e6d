"""Things to click: a talk with a model, the step plan of a run, what a LoRA trains and needs."""

import html
from collections.abc import Mapping

import ipywidgets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from labkit.curves import widget_bundle
from labkit.evaluation import generate_answers
from labkit.stepplan import StepPlan, plan_steps
from labkit.weights import n_parameters

MAX_NEW_TOKENS = 48


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
