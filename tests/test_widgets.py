"""The chat and the explorers, driven as a learner's clicks and keys drive them."""

import copy
import re

import nbclient
import nbformat
import pytest
from peft import LoraConfig, get_peft_model
from tiny import tiny_model

from labkit import curves, memory, models, widgets
from labkit.badcases import Judged
from labkit.evaluation import Answer
from labkit.memory import reference
from labkit.memory.gpus import GPUS


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    return models.load(tiny_model("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture
def scripted(monkeypatch):
    """Answers from a script instead of a model; returns the talks that were sent."""
    talks = []

    def answer(model, tokenizer, prompts, **settings):
        talks.extend(prompts)
        return [Answer(f"answer <{len(talks)}>", True, 2)]

    monkeypatch.setattr(widgets, "generate_answers", answer)
    return talks


def roles(messages):
    return [message["role"] for message in messages]


def test_ask_answers_from_the_model_and_keeps_the_talk(model_and_tokenizer):
    chat = widgets.Chat(*model_and_tokenizer, system="Answer in one word.")
    first = chat.ask("Where does Mira Tolen live?")
    assert chat.messages[-1] == {"role": "assistant", "content": first}
    chat.ask("And where else?")
    assert roles(chat.messages) == ["system"] + ["user", "assistant"] * 2
    again = widgets.Chat(*model_and_tokenizer, system="Answer in one word.")
    assert again.ask("Where does Mira Tolen live?") == first  # greedy: the same every time


def test_the_model_reads_every_earlier_turn(model_and_tokenizer, scripted):
    chat = widgets.Chat(*model_and_tokenizer)
    chat.ask("One")
    chat.ask("Two")
    assert [message["content"] for message in scripted[1]] == ["One", "answer <1>", "Two"]


def test_enter_sends_and_empties_the_box(model_and_tokenizer, scripted):
    chat = widgets.Chat(*model_and_tokenizer)
    assert chat.box.continuous_update is False  # so that a value arrives on Enter, not per key
    chat.box.value = "Hello"
    assert chat.box.value == ""
    assert roles(chat.messages) == ["user", "assistant"]
    assert len(scripted) == 1  # emptying the box sent nothing


def test_buttons_send_and_start_a_new_talk(model_and_tokenizer, scripted):
    chat = widgets.Chat(*model_and_tokenizer, system="Be brief.")
    chat.send.click()  # an empty box: nothing to send
    assert roles(chat.messages) == ["system"]
    with chat.box.hold_trait_notifications():
        chat.box.value = "Hello"
        chat.send.click()
    assert roles(chat.messages) == ["system", "user", "assistant"]
    chat.again.click()
    assert roles(chat.messages) == ["system"]


def test_the_transcript_names_who_speaks_and_shows_markup_as_text(model_and_tokenizer, scripted):
    chat = widgets.Chat(*model_and_tokenizer, system="Be brief.")
    chat.ask("<b>bold</b> & more")
    text = chat.transcript.value
    assert re.findall(r"<strong>(.*?)</strong>", text) == ["System:", "You:", "Model:"]
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; more" in text
    assert "answer &lt;1&gt;" in text
    assert "<b>" not in text


def test_an_empty_message_is_refused(model_and_tokenizer):
    with pytest.raises(ValueError, match="text is empty: write a message"):
        widgets.Chat(*model_and_tokenizer).ask("  ")


def test_a_talk_longer_than_the_model_reads_is_refused_and_kept(model_and_tokenizer):
    chat = widgets.Chat(*model_and_tokenizer)
    chat.ask("Hello")
    before = list(chat.messages)
    with pytest.raises(ValueError, match=r"has \d+ tokens, the model takes 512"):
        chat.ask("Hello " * 500)
    assert chat.messages == before
    chat.box.value = "Hello " * 500  # the same from the box: said in words, not raised
    assert re.fullmatch(r"Not sent: .* the model takes 512.*", chat.status.value)
    chat.reset()
    assert chat.status.value == ""


def test_plan_follows_the_sliders():
    explorer = widgets.PlanExplorer(1000, batch_size=16, save_steps=50, save_total_limit=2)
    assert explorer.plan.total_steps == 63  # ceil(1000 / 16)
    explorer.accumulation.value = 4
    explorer.epochs.value = 3
    assert explorer.plan.total_steps == 48  # ceil(63 / 4) = 16 a pass
    rows = dict(re.findall(r"<th[^>]*>(.*?)</th><td[^>]*>(.*?)</td>", explorer.table.value))
    assert rows == {
        "Rows": "1000",
        "Rows per step": "64",
        "Steps per epoch": "16",
        "Steps in all": "48",
        "Checkpoints saved": "48",
        "Checkpoints kept": "48",
    }
    explorer.batch_size.value = 1
    rows = dict(re.findall(r"<th[^>]*>(.*?)</th><td[^>]*>(.*?)</td>", explorer.table.value))
    assert rows["Steps in all"] == "750"
    assert rows["Checkpoints saved"] == "50, 100, …, 750 (15)"
    assert rows["Checkpoints kept"] == "700, 750"


def facts_of(table: str) -> dict[str, str]:
    return dict(re.findall(r"<th[^>]*>(.*?)</th><td[^>]*>(.*?)</td>", table))


def test_the_lora_explorer_counts_what_peft_trains(model_and_tokenizer):
    model, _ = model_and_tokenizer
    explorer = widgets.LoraExplorer(model, rank=2)
    assert [label for label, _ in explorer.layers.options] == [
        "q and v", "attention", "MLP", "all linear",
    ]  # fmt: skip
    for targets in (["q_proj", "v_proj"], "all-linear"):
        explorer.layers.value, explorer.rank.value = targets, 3
        adapted = get_peft_model(
            copy.deepcopy(model), LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM")
        )
        trained, total = adapted.get_nb_trainable_parameters()
        assert explorer.parameters == trained
        facts = facts_of(explorer.table.value)
        assert facts["Parameters trained"] == f"{trained:,}"
        assert facts["Share of the model"] == f"{trained / (total - trained):.2%}"
    explorer.rank.value = 10**6
    assert explorer.rank.value == explorer.rank.max


def test_the_lora_explorer_offers_gpt2_what_it_has(tmp_path):
    model = models.load(tiny_model("gpt2", tmp_path), device="cpu")[0]
    explorer = widgets.LoraExplorer(model)
    assert [label for label, _ in explorer.layers.options] == ["all linear"]
    assert explorer.parameters > 0


def mixture(learned: float, lost: float, steps: float | None) -> dict[str, dict]:
    measures = {"d3": learned, "lost": lost} | ({} if steps is None else {"steps": steps})
    return {
        name: {"values": [value] * 5, "mean": value, "interval": [value - 0.01, value + 0.01]}
        for name, value in measures.items()
    }


MIXTURES = {
    "metrics": {
        f"{arm}/{measure}": metric
        for arm, measures in {
            "full domain only at 5e-04": mixture(1.00, 0.20, 40),
            "full 1:5 at 5e-04": mixture(0.98, 0.015, 240),
            "full 1:5 at 1e-03": mixture(0.99, 0.05, 240),
            "full 25 % at 5e-04": mixture(0.99, 0.10, 50),
            "lora r8 1:5 at 4e-03": mixture(0.97, 0.04, 240),
            "prefix 20": mixture(0.50, 0.30, None),
        }.items()
        for measure, metric in measures.items()
    }
}


def columns_of(table: str) -> dict[str, list[str]]:
    rows = re.findall(r'<th scope="row"[^>]*>(.*?)</th>(.*?)</tr>', table)
    return {name: re.findall(r"<td[^>]*>(.*?)</td>", cells) for name, cells in rows}


def test_the_mix_explorer_offers_what_was_measured_and_nothing_else():
    explorer = widgets.MixExplorer(MIXTURES)
    assert explorer.method.options == ("full", "lora r8", "prefix 20")
    assert explorer.mix.options == ("domain only", "25 %", "1:5")  # least general data first
    explorer.mix.value = "1:5"
    assert [label for label, _ in explorer.rate.options] == ["0.0005", "0.001"]
    explorer.rate.value = 1e-3
    assert (explorer.trial.arm.name, explorer.trial.lost) == ("full 1:5 at 1e-03", 0.05)
    explorer.method.value = "lora r8"  # the mix stays, the rate cannot
    assert (explorer.mix.options, explorer.mix.value) == (("1:5",), "1:5")
    assert explorer.trial.arm.name == "lora r8 1:5 at 4e-03"
    explorer.method.value = "prefix 20"
    assert explorer.trial.arm.rate is None and explorer.rate.label == "–"
    assert columns_of(explorer.table.value)["Steps"][0] == "–"


def test_the_mix_explorer_reaches_every_arm():
    explorer = widgets.MixExplorer(MIXTURES)
    reached = set()
    for method in explorer.method.options:
        explorer.method.value = method
        for mix in explorer.mix.options:
            explorer.mix.value = mix
            for _, rate in explorer.rate.options:
                explorer.rate.value = rate
                reached.add(explorer.trial.arm.name)
    assert reached == {name.rpartition("/")[0] for name in MIXTURES["metrics"]}


def test_the_mix_explorer_shows_the_choice_beside_the_best_within_the_budget():
    explorer = widgets.MixExplorer(MIXTURES, budget_points=3)
    assert columns_of(explorer.table.value) == {
        "Arm": ["full domain only at 5e-04", "full 1:5 at 5e-04"],
        "Learned": ["≈1.00 (≈0.99 to ≈1.01)", "≈0.98 (≈0.97 to ≈0.99)"],
        "Lost (points)": ["≈20.0 (≈19.0 to ≈21.0)", "≈1.5 (≈0.5 to ≈2.5)"],
        "Budget": ["over", "within"],
        "Steps": ["40", "240"],
        "Seconds": ["–", "–"],
    }
    assert "Best within the budget" in explorer.table.value
    explorer.budget.value = 30
    assert explorer.best.choice.arm.name == "full domain only at 5e-04"
    explorer.budget.value = 2
    assert explorer.best.verdict == "crosses"
    assert "Best that may be within the budget" in explorer.table.value
    explorer.budget.value = 0
    assert explorer.best.choice is None
    assert columns_of(explorer.table.value)["Arm"][1] == "no arm"
    alone = widgets.MixExplorer(MIXTURES, only=lambda arm: arm.method == "full")
    assert alone.method.options == ("full",) and len(alone.best.trials) == 4


def test_the_mix_explorer_needs_arms():
    with pytest.raises(ValueError, match="no arm of the results has both ARM/d1 and ARM/lost"):
        widgets.MixExplorer(MIXTURES, learned="d1")


def test_the_calculator_shows_the_estimate_of_its_choices():
    calculator = widgets.MemoryCalculator("Mistral-7B-v0.1", method="full", seq_len=512)
    options = {"method": "full", "batch_size": 1, "seq_len": 512, "gradient_checkpointing": True}
    said = memory.estimate(reference.model("Mistral-7B-v0.1"), dtype="bf16", **options)
    assert calculator.estimate == said and said.phase == "optimizer step"
    columns = columns_of(calculator.table.value)
    # 2 B x 7,241,732,096 of weights and gradients, 4 B of means, in every column of its phase.
    assert columns["weights"] == ["13.49 GiB"] * 3
    assert columns["optimizer states"] == ["26.98 GiB"] * 3
    assert columns["gradients"][2] == "13.49 GiB"
    assert columns["all together"][2] == "67.46 GiB"
    assert "optimizer step (highest)" in calculator.table.value
    assert "7,241,732,096 numbers are trained" in calculator.table.value


def test_the_calculator_follows_every_control():
    calculator = widgets.MemoryCalculator(method="full", devices=2)
    seen = {calculator.estimate.peak_allocated_bytes}

    def choose(control, value):
        getattr(calculator, control).value = value
        assert calculator.estimate is not None
        seen.add(calculator.estimate.peak_allocated_bytes)

    for control, value in [
        ("batch", 4), ("seq_len", 8192), ("checkpointing", False), ("optimizer", "sgd"),
        ("precision", "fp32"), ("method", "lora"), ("sharding", "FSDP"), ("devices", 8),
        ("model", "Qwen3-0.6B"),
    ]:  # fmt: skip
        choose(control, value)
    assert len(seen) == 10
    assert calculator.options == {
        "method": "lora", "batch_size": 4, "seq_len": 8192, "optimizer": "sgd",
        "gradient_checkpointing": False, "num_devices": 8, "dtype": "fp32", "sharding": "fsdp",
    }  # fmt: skip


def test_the_calculator_offers_every_model_and_plans_it():
    calculator = widgets.MemoryCalculator("bundled", seq_len=512)
    assert set(calculator.model.options) == set(reference.models())
    for name in calculator.model.options:
        calculator.model.value = name
        assert calculator.estimate.parameters > 0
        assert calculator.picture.value.count("<rect") > 6


def test_the_calculator_marks_the_cards_that_fit():
    calculator = widgets.MemoryCalculator("Mistral-7B-v0.1", method="qlora", batch_size=4)
    verdicts = {
        name: cells[1]
        for name, cells in columns_of(calculator.table.value).items()
        if len(cells) == 3 and "fit" in cells[1]
    }
    assert set(verdicts) == set(GPUS)
    fitting = [name for name, verdict in verdicts.items() if verdict.startswith("✓ fits")]
    assert fitting == calculator.fitting
    assert "RTX 4090" in fitting and "RTX 3060 12GB" not in fitting
    assert verdicts["V100 32GB"] == "✓ fits; it does not compute in bf16: train in fp16"
    calculator.method.value = "full"
    assert calculator.fitting[0] == "A100 80GB" or calculator.fitting[0] == "H100 80GB"


def test_the_calculators_bars_are_as_long_as_their_bytes():
    calculator = widgets.MemoryCalculator("Mistral-7B-v0.1", method="full", seq_len=512)
    widths = {
        said: float(wide)
        for wide, said in re.findall(
            r'width="([\d.]+)"[^>]*><title>(.*?)</title>', calculator.picture.value
        )
    }
    weights = widths["optimizer step: weights 13.49 GiB"]
    assert widths["optimizer step: optimizer states 26.98 GiB"] == pytest.approx(
        2 * weights, rel=0.01
    )
    assert widths["loss: weights 13.49 GiB"] == weights
    step = sum(wide for said, wide in widths.items() if said.startswith("optimizer step"))
    assert step == pytest.approx(545 - 130, abs=0.5)  # the highest bar fills the drawing
    assert re.search(
        r'aria-label="loss [^"]*; optimizer step is the highest"', calculator.picture.value
    )
    assert "▶ optimizer step" in calculator.picture.value


def test_the_calculator_says_what_cannot_be():
    calculator = widgets.MemoryCalculator("Mistral-7B-v0.1", method="qlora", devices=2)
    calculator.sharding.value = "ZeRO-3"
    assert calculator.estimate is None and calculator.fitting == []
    assert calculator.picture.value == ""
    assert "Not possible: method=&#x27;qlora&#x27; with zero_stage=3" in calculator.table.value
    calculator.sharding.value = "FSDP"
    assert calculator.estimate is not None and "Not possible" not in calculator.table.value
    calculator.model.value, calculator.seq_len.value = "GPT-2", 2048
    assert "2048 is more than the 1024 positions" in calculator.table.value


def test_the_calculator_works_from_the_keyboard():
    calculator = widgets.MemoryCalculator()
    controls = calculator.widget.children[0].children
    kinds = {type(control).__name__ for column in controls for control in column.children}
    assert kinds == {"Dropdown", "SelectionSlider", "Checkbox"}  # all take Tab and arrow keys
    assert all(control.description for column in controls for control in column.children)
    calculator.batch.index += 1  # what the right arrow key does
    assert calculator.batch.value == 2
    text = calculator._repr_mimebundle_()["text/plain"]
    calculator.method.value = "full"
    assert calculator._repr_mimebundle_()["text/plain"] == text


@pytest.mark.parametrize(("slider", "value"), [("batch_size", 0), ("epochs", 99)])
def test_sliders_stay_in_their_range(slider, value):
    explorer = widgets.PlanExplorer(100)
    getattr(explorer, slider).value = value
    assert explorer.plan.total_steps >= 1


def bad_answer(text: str, reason: str | None, system: str = "Be brief.") -> Judged:
    turns = ("system", system), ("user", "Which color?"), ("assistant", "red")
    messages = [{"role": role, "content": content} for role, content in turns]
    return Judged({"messages": messages}, text, reason)


BAD = [
    bad_answer("red and <b>blue</b>", "rambles on", system="Use <i> & brackets."),
    bad_answer("red", None),
    bad_answer("blue", "wrong fact"),
    bad_answer("green", "wrong fact"),
]


def test_the_reader_goes_from_case_to_case_by_button_and_by_key():
    reader = widgets.BadcaseReader(BAD)
    assert (reader.place.min, reader.place.max) == (1, 3)  # the good answer is left out
    assert reader.shown is BAD[0]
    reader.next.click()
    assert reader.shown is BAD[2] and "Case 2 of 3" in reader.card.value
    reader.place.value += 1  # what the right arrow key does to a slider
    assert reader.shown is BAD[3]
    reader.next.click()  # the last one stays
    assert reader.shown is BAD[3] and reader.place.value == 3
    for _ in range(5):
        reader.previous.click()
    assert reader.shown is BAD[0] and reader.place.value == 1


def test_the_reader_shows_one_reason_and_begins_at_its_first_case():
    reader = widgets.BadcaseReader(BAD)
    assert [label for label, _ in reader.reason.options] == [
        "all reasons (3)", "wrong fact (2)", "rambles on (1)",
    ]  # fmt: skip
    reader.next.click()
    reader.reason.value = "wrong fact"
    assert reader.shown is BAD[2] and "Case 1 of 2" in reader.card.value
    reader.place.value = 2
    reader.reason.value = "rambles on"
    assert reader.shown is BAD[0] and reader.place.max == 1
    reader.reason.value = ""
    assert reader.place.max == 3


def test_the_reader_shows_markup_as_text():
    facts = facts_of(widgets.BadcaseReader(BAD).card.value)
    assert facts == {
        "Prompt": "<em>system:</em> Use &lt;i&gt; &amp; brackets.<br><em>user:</em> Which color?",
        "Answer": "red and &lt;b&gt;blue&lt;/b&gt;",
        "Right answer": "red",
        "Reason": "rambles on",
    }


def test_the_reader_says_when_nothing_is_bad():
    reader = widgets.BadcaseReader(BAD[1:2])
    assert reader.shown is None and "There is no bad answer" in reader.card.value
    reader.next.click()
    assert "There is no bad answer" in reader.card.value
    assert "application/vnd.jupyter.widget-view+json" in reader._repr_mimebundle_()


def test_views_show_a_constant_text_where_no_widget_can_be_drawn(model_and_tokenizer, scripted):
    chat = widgets.Chat(*model_and_tokenizer)
    before = chat._repr_mimebundle_()["text/plain"]
    chat.ask("Hello")
    assert chat._repr_mimebundle_()["text/plain"] == before
    assert "application/vnd.jupyter.widget-view+json" in chat._repr_mimebundle_()


TRAINING_CELL = """
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments
from labkit import models
from labkit.training import LiveCurve

ids = [[6 + row, 7, 8, 9] for row in range(12)]
curve = LiveCurve()
trainer = Trainer(
    models.load({folder!r})[0],
    TrainingArguments(
        {folder!r}, per_device_train_batch_size=2, num_train_epochs=1, logging_steps=2,
        save_strategy="no", use_cpu=True, disable_tqdm=True, report_to="none",
    ),
    train_dataset=Dataset.from_dict({{"input_ids": ids, "labels": ids}}),
    callbacks=[curve],
)
trainer.remove_callback(PrinterCallback)
_ = trainer.train()
assert "<polyline" in curve.widget.value
"""


def test_a_notebook_stores_the_same_output_whatever_the_losses(tmp_path):
    # The same run from two sets of weights, in a real kernel: only the ≈numbers may differ.
    folders = [tiny_model("llama", tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    cells = [
        nbformat.v4.new_code_cell(TRAINING_CELL.format(folder=str(folder))) for folder in folders
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=300, store_widget_state=False).execute()

    def stored(cell):
        outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        shown = [output["data"]["text/plain"] for output in outputs if "data" in output]
        printed = "".join(output["text"] for output in outputs if "text" in output)
        return shown, re.sub(r"≈-?[\d.]+", "≈number", printed)

    first, second = map(stored, notebook.cells)
    assert first == second
    assert first[0] == [curves.PLAIN_TEXT]
    assert first[1].splitlines() == [f"step  {step}/6  loss ≈number" for step in (2, 4, 6)]
