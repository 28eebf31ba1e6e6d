"""The chat and the explorers, driven as a learner's clicks and keys drive them."""

import copy
import re

import nbclient
import nbformat
import pytest
from peft import LoraConfig, get_peft_model
from tiny import tiny_model

from labkit import curves, models, widgets
from labkit.evaluation import Answer


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


@pytest.mark.parametrize(("slider", "value"), [("batch_size", 0), ("epochs", 99)])
def test_sliders_stay_in_their_range(slider, value):
    explorer = widgets.PlanExplorer(100)
    getattr(explorer, slider).value = value
    assert explorer.plan.total_steps >= 1


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
