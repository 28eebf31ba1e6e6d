"""Step plans against the real Trainer, checkpoints cut short, the live curve, seeds and counts."""

import json
import math
import os
import random
import re
import shutil
import time

import numpy
import pytest
import torch
from datasets import Dataset
from tiny import tiny_model, tiny_tokenizer
from transformers import (
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import TrainerState

from labkit import curves, models, training
from labkit.errors import LabkitError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


def rows(n, length=6):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, 300, (n, length), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def trainer(folder, out, n_rows, batch_size=2, callbacks=None, trainer_class=Trainer, **changes):
    settings = {
        "per_device_train_batch_size": batch_size,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 0,
    }
    made = trainer_class(
        model=LlamaForCausalLM.from_pretrained(folder),
        args=TrainingArguments(str(out), **settings | changes),
        train_dataset=rows(n_rows),
        eval_dataset=rows(2),
        callbacks=callbacks,
    )
    made.remove_callback(PrinterCallback)
    return made


# Step plans


class ScriptedEvaluation(Trainer):
    """A trainer that reads its evaluation losses from a script: a test decides the best step."""

    script: list[float]

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": self.script.pop(0)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def folders_on_disk(out):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("n_rows", "batch_size", "accumulation", "epochs"),
    [
        (8, 2, 1, 1),
        (9, 2, 1, 2),  # a last batch of one row
        (10, 2, 3, 2),  # 5 batches an epoch: a last accumulation of two
        (3, 4, 2, 3),  # fewer rows than a batch
        (7, 1, 4, 0.5),  # half an epoch
        (11, 2, 4, 1.5),
    ],
)
def test_plan_counts_the_trainers_steps(folder, tmp_path, n_rows, batch_size, accumulation, epochs):
    run = trainer(
        folder,
        tmp_path,
        n_rows,
        batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
    )
    run.train()
    plan = training.plan_steps(
        n_rows, batch_size=batch_size, accumulation=accumulation, epochs=epochs
    )
    assert plan.total_steps == run.state.global_step
    assert plan.checkpoints_saved == folders_on_disk(tmp_path) == []


@pytest.mark.parametrize(
    ("n_steps", "save_steps", "limit"),
    [(7, 3, None), (6, 2, 2), (7, 2, 1), (5, 1, 3), (3, 2000, 2), (8, 0.25, 2), (7, 2, 0)],
)
def test_plan_names_the_kept_checkpoints(folder, tmp_path, n_steps, save_steps, limit):
    run = trainer(
        folder,
        tmp_path,
        2 * n_steps,
        num_train_epochs=1,
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=limit,
    )
    run.train()
    plan = training.plan_steps(
        2 * n_steps, batch_size=2, save_steps=save_steps, save_total_limit=limit
    )
    assert plan.total_steps == run.state.global_step == n_steps
    assert plan.checkpoints_kept() == folders_on_disk(tmp_path)
    assert plan.checkpoints_saved[-1] == n_steps  # the trainer always saves the last step


@pytest.mark.parametrize("limit", [1, 2, 3, None])
@pytest.mark.parametrize(
    "losses",
    [
        (5, 4, 3, 2, 1),  # always better: the last one is best
        (1, 2, 3, 4, 5),  # the first one is best
        (5, 1, 3, 4, 2),  # an early best, replaced once
        (3, 4, 2, 5, 4),  # the middle one
    ],
)
def test_plan_names_the_kept_checkpoints_with_the_best(folder, tmp_path, losses, limit):
    run = trainer(
        folder,
        tmp_path,
        18,  # nine steps of two rows, saved at 2, 4, 6, 8 and 9
        num_train_epochs=1,
        trainer_class=ScriptedEvaluation,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=limit,
        load_best_model_at_end=True,
    )
    run.script = list(losses)
    most = MostFolders(tmp_path)
    run.add_callback(most)
    run.train()
    plan = training.plan_steps(
        18,
        batch_size=2,
        save_steps=2,
        save_total_limit=limit,
        load_best_model_at_end=True,
        checkpoint_bytes=1000,
    )
    best = plan.checkpoints_saved[losses.index(min(losses))]
    assert plan.checkpoints_saved == [2, 4, 6, 8, 9]
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert plan.checkpoints_kept(best) == folders_on_disk(tmp_path)
    # When the trainer reports a save it has already deleted; the plan counts the moment before.
    deleted_one = 0 if limit is None else 1
    assert plan.disk_bytes >= 1000 * (most.seen + deleted_one)


class MostFolders(TrainerCallback):
    """Most checkpoint folders that were on disk after a save."""

    def __init__(self, out):
        self.out, self.seen = out, 0

    def on_save(self, args, state, control, **kwargs):
        self.seen = max(self.seen, len(folders_on_disk(self.out)))


def test_disk_by_hand():
    def disk(limit, best=False):
        plan = training.plan_steps(
            100,
            batch_size=1,
            save_steps=10,
            save_total_limit=limit,
            load_best_model_at_end=best,
            checkpoint_bytes=7,
        )
        return plan.disk_bytes

    assert disk(None) == 10 * 7
    assert disk(3) == 4 * 7  # the fourth is written before the first is deleted
    assert disk(1) == 2 * 7
    assert disk(1, best=True) == 3 * 7  # best, newest, and the one being written


def test_the_popular_formula_forgets_accumulation_and_rounding():
    # "epochs x rows / (devices x batch)" gives 3 x 1000 / (2 x 16) = 93.75.
    plan = training.plan_steps(1000, batch_size=16, accumulation=4, devices=2, epochs=3)
    assert plan.rows_per_step == 128
    assert plan.steps_per_epoch == 8  # 32 batches in groups of four
    assert plan.total_steps == 24


def test_plan_refuses_what_no_run_can_be():
    with pytest.raises(ValueError, match="batch_size=0 must be above 0"):
        training.plan_steps(10, batch_size=0)
    with pytest.raises(ValueError, match="save_steps=-1 must be above 0"):
        training.plan_steps(10, batch_size=1, save_steps=-1)
    plan = training.plan_steps(10, batch_size=1, save_steps=4)
    with pytest.raises(ValueError, match=r"best=5 was never saved: choose one of \[4, 8, 10\]"):
        plan.checkpoints_kept(best=5)


# Checkpoints and resuming


@pytest.fixture(scope="module")
def finished_run(folder, tmp_path_factory):
    """A run of six steps, saved every two, never stopped."""
    out = tmp_path_factory.mktemp("whole")
    run = trainer(folder, out, 12, num_train_epochs=1, save_strategy="steps", save_steps=2)
    run.train()
    return run, out


@pytest.fixture
def run_folder(finished_run, tmp_path):
    """A copy of that run's folder, which a test may damage."""
    return shutil.copytree(finished_run[1], tmp_path / "run")


def test_latest_checkpoint_is_the_highest_step_not_the_last_name(tmp_path, run_folder):
    (run_folder / "checkpoint-6").rename(run_folder / "checkpoint-10")
    state = run_folder / "checkpoint-10" / "trainer_state.json"
    state.write_text(json.dumps({"global_step": 10}), encoding="utf-8")
    assert training.latest_checkpoint(run_folder).name == "checkpoint-10"
    assert training.latest_checkpoint(tmp_path / "nothing") is None


def cut(name, keep=0.5):
    def damage(checkpoint):
        file = checkpoint / name
        os.truncate(file, int(file.stat().st_size * keep))

    return damage


def gone(name):
    return lambda checkpoint: (checkpoint / name).unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (gone("trainer_state.json"), "trainer_state.json is missing"),
        (cut("trainer_state.json"), "trainer_state.json is not readable"),
        (cut("model.safetensors"), "model.safetensors holds .* bytes where its header says"),
        (gone("model.safetensors"), "its weights is missing"),
        (gone("optimizer.pt"), "its optimizer state is missing"),
        (cut("optimizer.pt", 0.9), "optimizer.pt is cut short"),
        (gone("scheduler.pt"), "its scheduler state is missing"),
        (gone("rng_state.pth"), "its random state is missing"),
        (cut("rng_state.pth"), "rng_state.pth is cut short"),
    ],
)
def test_a_checkpoint_cut_short_is_skipped_and_named(run_folder, damage, reason):
    damage(run_folder / "checkpoint-6")
    with pytest.warns(UserWarning, match=f"checkpoint-6 is skipped, .*: {reason}"):
        assert training.latest_checkpoint(run_folder).name == "checkpoint-4"


def test_no_checkpoint_is_left_when_all_are_cut_short(run_folder):
    for checkpoint in run_folder.iterdir():
        (checkpoint / "trainer_state.json").unlink()
    with pytest.warns(UserWarning, match="is skipped") as caught:
        assert training.latest_checkpoint(run_folder) is None
    named = [str(warning.message).split()[0] for warning in caught]
    assert named == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]


def test_resuming_behind_a_broken_save_gives_the_weights_of_the_whole_run(
    folder, finished_run, run_folder
):
    whole, _ = finished_run
    cut("model.safetensors")(run_folder / "checkpoint-6")
    with pytest.warns(UserWarning, match="checkpoint-6 is skipped"):
        checkpoint = training.latest_checkpoint(run_folder)
    resumed = trainer(
        folder, run_folder, 12, num_train_epochs=1, save_strategy="steps", save_steps=2
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert models.fingerprint(resumed.model) == models.fingerprint(whole.model)
    same = training.history(whole)["loss"].tolist()
    assert training.history(resumed)["loss"].tolist() == same
    assert len(same) == 6


def test_free_disk(tmp_path):
    training.free_disk_or_raise(tmp_path / "not" / "yet", 1)
    with pytest.raises(LabkitError, match="needs 1,000,000,000,000,000 MB: free some disk"):
        training.free_disk_or_raise(tmp_path, 10**21)


# The live curve


def test_without_a_notebook_the_curve_prints_one_rounded_line_per_log(folder, tmp_path, capsys):
    curve = training.LiveCurve()
    run = trainer(
        folder,
        tmp_path,
        24,
        callbacks=[curve],
        num_train_epochs=1,
        logging_steps=4,
        eval_strategy="steps",
        eval_steps=8,
    )
    run.train()
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"\d+\.\d\d", "N", line) for line in lines] == [
        "step   4/12  loss ≈N",
        "step   8/12  loss ≈N",
        "step   8/12  eval loss ≈N",
        "step  12/12  loss ≈N",
        "step  12/12  eval loss ≈N",
    ]
    assert curve.widget is None


def shown(monkeypatch):
    """Pretend to be a notebook; returns what was displayed."""
    displayed = []
    monkeypatch.setattr(curves, "_in_notebook", lambda: True)
    monkeypatch.setattr(curves, "show_widget", lambda widget, text: displayed.append(text))
    return displayed


def test_in_a_notebook_the_output_is_constant_and_the_widget_holds_the_curve(
    folder, tmp_path, monkeypatch
):
    displayed = shown(monkeypatch)
    curve = training.LiveCurve()
    run = trainer(
        folder, tmp_path, 24, callbacks=[curve], num_train_epochs=1, eval_strategy="epoch"
    )
    run.train()
    assert displayed == [curves.PLAIN_TEXT]
    last = training.history(run)["loss"].dropna().iloc[-1]
    value = curve.widget.value
    assert value.count("<polyline") == 2  # loss and evaluation loss
    assert f">loss {last:.2f}</text>" in value
    assert "step 12 of 12" in value
    assert f"loss {last:.2f}" in value
    assert re.search(r"[\d,]+ tokens/s · 0:00 left · [\d,]+ MB in this process at most", value)


def test_tokens_are_those_trained_on_without_padding_and_evaluation(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    counter = curves.TokenCounter()
    hook = counter.watch(model)
    ids = torch.full((2, 4), 7)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    model.train()
    model(input_ids=ids, attention_mask=mask)
    assert int(counter.seen) == 5
    model(input_ids=ids)
    assert int(counter.seen) == 5 + 8
    model.eval()
    model(input_ids=ids)
    hook.remove()
    model.train()
    model(input_ids=ids)
    assert int(counter.seen) == 5 + 8


def test_the_curve_leaves_no_hook_on_the_model(folder, tmp_path):
    run = trainer(folder, tmp_path, 4, callbacks=[training.LiveCurve()], num_train_epochs=1)
    run.train()
    assert not run.model._forward_pre_hooks


def test_drawing_puts_points_where_they_belong():
    log = curves.LossLog(loss=[(0, 4.0), (50, 2.0), (100, 0.0)])
    svg = curves.loss_svg(log, total_steps=100)
    middle = (curves.LEFT + curves.RIGHT) / 2, (curves.TOP + curves.BOTTOM) / 2
    first, half, last = re.search(r'points="(.*?)"', svg)[1].split()[:3]
    assert first == f"{curves.LEFT:.1f},{curves.TOP:.1f}"
    assert half == f"{middle[0]:.1f},{middle[1]:.1f}"
    assert last == f"{curves.RIGHT:.1f},{curves.BOTTOM:.1f}"
    assert 'aria-label="loss 4.00 at step 0, 0.00 at step 100"' in svg


def test_a_loss_that_overflowed_is_printed_and_left_out_of_the_drawing(capsys):
    log = curves.LossLog(loss=[(1, 2.0), (2, math.nan), (3, math.inf)])
    svg = curves.loss_svg(log, 3)
    assert "nan" not in svg
    assert "inf" not in svg
    state = TrainerState(global_step=2, max_steps=3)
    training.LiveCurve().on_log(None, state, None, logs={"loss": math.nan})
    assert capsys.readouterr().out == "step  2/3  loss ≈nan\n"


def test_a_long_run_draws_few_points():
    log = curves.LossLog(loss=[(step, 1.0) for step in range(20_000)])
    assert len(curves.loss_svg(log, 20_000)) < 10_000


def test_a_drawing_costs_under_three_percent_of_a_step(monkeypatch):
    # A step of the bundled model takes about 50 ms, and there is one drawing per 0.3 s at most:
    # 9 ms a drawing would be the limit. The fastest of 20 leaves the machine's other work out.
    shown(monkeypatch)
    curve, state = training.LiveCurve(), TrainerState(max_steps=400)
    curve.on_train_begin(None, state, None)
    timings = []
    for step in range(1, 401):
        state.global_step = step
        curve.on_step_begin(None, state, None)
        curve.on_step_end(None, state, None)
        curve.on_log(None, state, None, logs={"loss": 1 / step, "learning_rate": 1e-3})
        if step > 380:
            start = time.perf_counter()
            curve._draw(state, now=True)
            timings.append(time.perf_counter() - start)
    assert min(timings) < 0.03 * curves.SECONDS_BETWEEN_DRAWINGS


# Logs and counts


def test_history_has_one_row_per_step_with_both_losses(folder, tmp_path):
    run = trainer(
        folder,
        tmp_path,
        8,
        num_train_epochs=2,
        logging_steps=2,
        eval_strategy="epoch",
    )
    run.train()
    table = training.history(run)
    assert table["step"].tolist() == [2, 4, 6, 8]
    assert list(table.columns[:4]) == ["step", "epoch", "loss", "eval_loss"]
    assert table["loss"].notna().all()
    assert table.loc[table["eval_loss"].notna(), "step"].tolist() == [4, 8]
    assert "train_runtime" not in table


def test_supervised_rows_by_hand():
    tokenized = Dataset.from_dict(
        {
            "input_ids": [[1, 2, 3, 4], [1, 2], [5, 6, 7]],
            "labels": [[-100, -100, 3, 4], [-100, -100], [5, 6, 7]],
        }
    )
    # The third row's first token has nothing before it that could predict it.
    assert training.supervised_rows(tokenized, given=5) == training.SupervisedRows(
        rows=3, fully_masked=1, supervised_tokens=2 + 0 + 2, dropped=2
    )


def test_supervised_rows_need_both_masks():
    masked = Dataset.from_dict(
        {"assistant_masks": [[0, 1, 1, 1]], "completion_mask": [[0, 0, 1, 1]]}
    )
    assert training.supervised_rows(masked).supervised_tokens == 2
    with pytest.raises(ValueError, match=r"has columns \['text'\], no labels: pass the trainer"):
        training.supervised_rows(Dataset.from_dict({"text": ["a"]}))


def test_supervised_rows_count_what_trl_drops(folder, tmp_path):
    from trl import SFTConfig, SFTTrainer

    def talk(question, answer):
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }

    given = Dataset.from_list([talk("Hi", "Velden"), talk("Hello " * 40, "Velden")])
    run = SFTTrainer(
        model=LlamaForCausalLM.from_pretrained(folder),
        args=SFTConfig(
            str(tmp_path),
            max_length=32,
            assistant_only_loss=True,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=given,
        processing_class=tiny_tokenizer(),
    )
    counts = training.supervised_rows(run, given)
    assert (counts.rows, counts.fully_masked, counts.dropped) == (1, 0, 1)
    answer = run.processing_class(["Velden<|end|>"], add_special_tokens=False)["input_ids"][0]
    assert counts.supervised_tokens == len(answer)


# Seeds, versions, memory


def test_seed_everything_repeats_every_generator():
    def draw():
        training.seed_everything(7)
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_seed_from_env(monkeypatch):
    monkeypatch.delenv("LABKIT_SEED", raising=False)
    assert training.seed_from_env(default=3) == 3
    monkeypatch.setenv("LABKIT_SEED", "12")
    assert training.seed_from_env() == 12
    monkeypatch.setenv("LABKIT_SEED", "one")
    with pytest.raises(ValueError, match="LABKIT_SEED='one' is no seed: set it to a whole number"):
        training.seed_from_env()


def test_versions_have_no_build_suffix():
    versions = training.versions()
    assert versions["torch"] == torch.__version__.split("+")[0]
    assert {"python", "transformers", "trl", "peft", "datasets"} <= set(versions)
    assert not any("+" in version for version in versions.values())


def test_peak_memory_grows_with_a_large_tensor():
    before = training.peak_memory()["process_bytes"]
    torch.ones(64 * 2**20)  # 256 MiB
    after = training.peak_memory()
    assert after["process_bytes"] >= max(before, 256 * 2**20)
    assert after["allocated_bytes"] == 0 or torch.cuda.is_available()
