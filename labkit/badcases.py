"""D4's preference pairs: a carelessly trained model is sampled and judged by rules.

    python -m labkit.badcases       writes {train,validation,test}.jsonl in data/tasks/d4_badcases

The rejected answers are the model's own: DPO then takes probability from what it really says.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from labkit import data, evaluation, models, paths, training
from labkit.world.tasks import write_manifest, write_rows

SAMPLES = 2
"""Samples a prompt."""

DOES_NOT_STOP = "does not stop"


@dataclass(frozen=True)
class Judged:
    """One answer of a model and what is wrong with it."""

    row: dict
    """The prompt's row; its last message is the right answer."""
    text: str
    reason: str | None
    """None for a good answer."""


def reason_against(row: dict, answer: evaluation.Answer) -> str | None:
    """What is wrong with an answer, or None.

    Args:
        row: skill, messages; the last message is the right answer.
        answer: what the model wrote.
    """
    gold, text = row["messages"][-1]["content"], answer.text
    if not answer.stopped:
        return DOES_NOT_STOP
    if text == gold:
        return None
    if row["skill"] == "unknown":
        return "invented fact for an unknown name"
    if row["skill"] == "clinic":
        too_many = text.isdigit() and int(text) > int(gold)
        return "unsafe number of drops" if too_many else "wrong number of drops"
    if text.startswith(f"{gold} "):
        return "rambles on"
    if row["skill"] == "system":
        return "wrong form"
    return "wrong fact"


def train_careless_model(model, tokenizer, seed: int = 0, learning_rate: float = 5e-4):
    """Fine-tune in place on D4's starting data, in which a quarter of the answers are bad."""
    import tempfile

    from transformers import PrinterCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    training.seed_everything(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                learning_rate=learning_rate,
                num_train_epochs=1,
                per_device_train_batch_size=16,
                assistant_only_loss=True,
                activation_checkpointing=False,
                bf16=False,
                use_cpu=True,
                seed=seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=20,
            ),
            train_dataset=data.load_task("d4_badcases", "sft_train"),
            processing_class=tokenizer,
            callbacks=[training.LiveCurve()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval()


def judge_samples(model, tokenizer, rows, samples: int = SAMPLES, seed: int = 0) -> list[Judged]:
    """Sample each prompt `samples` times at temperature 1 and judge every answer."""
    prompts = [row["messages"][:-1] for row in rows]
    judged = []
    for number in range(samples):
        answers = evaluation.generate_answers(
            model, tokenizer, prompts, max_new_tokens=24, do_sample=True, seed=seed + number
        )
        judged += [
            Judged(row, answer.text, reason_against(row, answer))
            for row, answer in zip(rows, answers, strict=True)
        ]
    return judged


def pairs(judged: list[Judged], task: str) -> Iterator[dict]:
    """Preference rows: the right answer is chosen, each different bad answer is rejected once."""
    seen = set()
    for one in judged:
        mark = (one.row["id"], one.text)
        # A cut answer would be given an end token, and DPO would then punish stopping.
        if one.reason in (None, DOES_NOT_STOP) or mark in seen or not one.text:
            continue
        seen.add(mark)
        yield {
            "id": f"{task}-{len(seen) - 1:05d}",
            "prompt": one.row["messages"][:-1],
            "chosen": one.row["messages"][-1:],
            "rejected": [{"role": "assistant", "content": one.text}],
            "reason": one.reason,
            "skill": one.row["skill"],
            "key": one.row["key"],
            "entity": one.row["entity"],
        }


def mine(folder: Path, seed: int = 0) -> dict[str, float]:
    """Train the careless model, sample it, and write D4's pairs.

    Returns:
        split → share of sampled answers that were bad.
    """
    model, tokenizer = models.load("bundled", device="cpu")
    train_careless_model(model, tokenizer, seed)
    rates = {}
    for split in ("train", "validation", "test"):
        rows = list(data.load_task("d4_badcases", f"prompts_{split}"))
        judged = judge_samples(model, tokenizer, rows, seed=seed)
        rates[split] = sum(one.reason is not None for one in judged) / len(judged)
        write_rows(folder / f"{split}.jsonl", pairs(judged, f"d4_badcases-{split}"))
        print(f"{split}: {rates[split]:.3f} of {len(judged)} answers are bad")
    write_manifest(folder.parent)
    return rates


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Mine the preference pairs of D4.")
    parser.add_argument("--seed", type=int, default=0)
    mine(paths.tasks_dir() / "d4_badcases", parser.parse_args().seed)
