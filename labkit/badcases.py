"""Bad answers: judged by rules that know the truth, counted, kept in a file, made into pairs.

    python -m labkit.badcases       writes {train,validation,test}.jsonl in data/tasks/d4_badcases

A carelessly trained model is sampled. The rejected answers of D4 are its own: DPO then takes
probability from what it really says.
"""

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labkit import data, evaluation, models, paths, training
from labkit.calculator import find_call
from labkit.data.problems import quote
from labkit.data.rows import read_records
from labkit.errors import LabkitError
from labkit.statistics import Interval, bootstrap_interval
from labkit.world.conversation import SYSTEM_FORMS, has_form
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
    stopped: bool = True
    """True when the model wrote its end token, False when it was cut off."""
    n_tokens: int = 0
    """Tokens written, the end token included; 0 where nobody counted."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How the answer was decoded, so that it can be had again."""

    @property
    def gold(self) -> str:
        """The right answer."""
        return self.row["messages"][-1]["content"]


@dataclass(frozen=True)
class Rate:
    """A share of answers."""

    share: float
    """In 0..1."""
    interval: Interval
    """95 %, bootstrap clustered by entity."""
    n: int
    """Answers judged."""


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
    if row["skill"] == "tool":  # asked with a number as the right answer
        return "call not executed" if find_call(text) is not None else "wrong number"
    if text.startswith(f"{gold} "):
        return "rambles on"
    if row["skill"] == "system":
        in_form = any(has_form(gold, form) and has_form(text, form) for form in SYSTEM_FORMS)
        return "wrong fact" if in_form else "wrong form"
    return "wrong fact"


def train_careless_model(model, tokenizer, seed: int = 0, learning_rate: float = 5e-4):
    """Fine-tune in place on D4's starting data, in which about a quarter of the answers are bad."""
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


def judge_samples(
    model,
    tokenizer,
    rows: Sequence[dict],
    samples: int = SAMPLES,
    seed: int = 0,
    *,
    do_sample: bool = True,
    temperature: float = 1.0,
    max_new_tokens: int = 24,
    batch_size: int = 32,
    prompts: Sequence[list[dict]] | None = None,
) -> list[Judged]:
    """Sample each prompt `samples` times and judge every answer, sample after sample.

    Args:
        rows: prompts with right answers, such as the splits `prompts_*` of d4_badcases.
        samples: answers a prompt; 1 for greedy decoding.
        do_sample: False decodes greedily.
        batch_size: prompts decoded together; sampling draws differ between batch sizes.
        prompts: what the model is asked instead of each row's own prompt, for instance with a
            retrieved passage; it is judged by the row all the same.

    Raises:
        ValueError: several greedy samples, which would all be alike; prompts that are not one a
            row; or as `evaluation.generate_answers`.
    """
    if samples > 1 and not do_sample:
        raise ValueError(f"samples={samples} with do_sample=False are all alike: use samples=1")
    rows = list(rows)
    prompts = [row["messages"][:-1] for row in rows] if prompts is None else list(prompts)
    if len(prompts) != len(rows):
        raise ValueError(f"prompts has {len(prompts)} talks for {len(rows)} rows: give one a row")
    judged = []
    for number in range(samples):
        decoding = {"do_sample": do_sample, "max_new_tokens": max_new_tokens}
        if do_sample:
            decoding |= {"temperature": temperature, "seed": seed + number}
        answers = evaluation.generate_answers(
            model, tokenizer, prompts, batch_size=batch_size, **decoding
        )
        judged += [
            Judged(
                row,
                answer.text,
                reason_against(row, answer),
                stopped=answer.stopped,
                n_tokens=answer.n_tokens,
                settings=decoding,
            )
            for row, answer in zip(rows, answers, strict=True)
        ]
    return judged


def right_answer_probabilities(
    model, tokenizer, rows: Sequence[dict], batch_size: int = 64
) -> list[float]:
    """Probability that a model sampled at temperature 1 gives each row's right answer and stops.

    Each prompt has one right answer, so 1 minus the mean is the badcase rate without the noise of
    sampling, at the cost of one forward pass. It is that of the answer's usual tokens; the same
    text in other tokens is sampled so rarely that it does not show.

    Raises:
        ValueError: as `evaluation.exact_matches`.
    """
    losses = evaluation.answer_losses(model, tokenizer, rows, batch_size)
    return [math.exp(-nats) for nats in losses.nats]


def badcase_rate(judged: Sequence[Judged], reason: str | None = None) -> Rate:
    """Share of answers that are bad, or bad for one reason.

    Samples of one prompt, and prompts about one person, stand or fall together; the interval
    resamples entities.

    Raises:
        ValueError: nothing judged.
    """
    if not judged:
        raise ValueError("judged is empty: judge at least one answer")
    bad = [one.reason is not None and reason in (None, one.reason) for one in judged]
    interval = bootstrap_interval([float(b) for b in bad], [one.row["entity"] for one in judged])
    return Rate(sum(bad) / len(bad), interval, len(bad))


def reason_counts(judged: Sequence[Judged]) -> dict[str, int]:
    """Number of bad answers by reason, the most frequent first."""
    return dict(Counter(one.reason for one in judged if one.reason is not None).most_common())


_TEXTS = ("id", "answer", "reason", "gold", "skill", "key", "entity")
"""Fields of a badcase file that hold text."""


def save(path: str | Path, judged: Sequence[Judged], settings: Mapping | None = None) -> int:
    """Write the bad answers to a badcase file, one JSON line each.

    A line has `id`, `prompt` (messages), `answer`, `stopped`, `n_tokens`, `reason`, `gold`,
    `skill`, `key`, `entity` and `settings`.

    Args:
        settings: what to write with each answer's own decoding, such as {"model": "careless"}.

    Returns:
        Number of lines.

    Raises:
        LabkitError: the file exists; it may hold someone's reading, so it is never overwritten.
        ValueError: no answer is bad.
    """
    path = Path(path)
    if path.exists():
        raise LabkitError(f"{path} exists and is not overwritten: choose another name or delete it")
    lines = [
        {
            "id": one.row["id"],
            "prompt": one.row["messages"][:-1],
            "answer": one.text,
            "stopped": one.stopped,
            "n_tokens": one.n_tokens,
            "reason": one.reason,
            "gold": one.gold,
            "skill": one.row["skill"],
            "key": one.row["key"],
            "entity": one.row["entity"],
            "settings": {**one.settings, **(settings or {})},
        }
        for one in judged
        if one.reason is not None
    ]
    if not lines:
        raise ValueError(f"none of {len(judged)} answers is bad: there is no badcase to save")
    write_rows(path, lines)
    return len(lines)


def load(path: str | Path) -> list[Judged]:
    """The answers of a badcase file, as they were judged.

    Raises:
        LabkitError: the file is missing or empty, or a line of it is no badcase; it names the line.
    """
    records = read_records(path)
    for problem in records.problems:
        raise LabkitError(f"{path}:{problem.line}: {problem.code}: {problem.message}")
    judged = []
    for record in records.records:
        found = record.problem.message if record.problem else _fault(record.row)
        if found:
            raise LabkitError(f"{path}:{record.line}: {found}")
        row = record.row
        gold = {"role": "assistant", "content": row["gold"]}
        question = {"id": row["id"], "messages": [*row["prompt"], gold]}
        question |= {name: row[name] for name in ("skill", "key", "entity")}
        judged.append(
            Judged(
                question,
                row["answer"],
                row["reason"],
                stopped=row["stopped"],
                n_tokens=row["n_tokens"],
                settings=row["settings"],
            )
        )
    return judged


def _fault(row: Any) -> str | None:
    """What keeps a parsed line from being a badcase."""
    if not isinstance(row, dict):
        return f"a badcase is a JSON object, got {quote(row)}"
    for name in (*_TEXTS, "prompt", "stopped", "n_tokens", "settings"):
        if name not in row:
            return f"field {name!r} is missing; write the file with badcases.save"
    for name in _TEXTS:
        if not isinstance(row[name], str):
            return f"{name} must be a text, got {quote(row[name])}"
    prompt = row["prompt"]
    if not isinstance(prompt, list) or not prompt or not all(map(_is_message, prompt)):
        return f"prompt must be a list of messages with role and content, got {quote(prompt)}"
    if not isinstance(row["stopped"], bool):
        return f"stopped must be true or false, got {quote(row['stopped'])}"
    if type(row["n_tokens"]) is not int or row["n_tokens"] < 0:
        return f"n_tokens must be a number of tokens, got {quote(row['n_tokens'])}"
    if not isinstance(row["settings"], dict):
        return f"settings must be an object, got {quote(row['settings'])}"
    if not row["reason"].strip():
        return "reason is empty; a badcase file holds bad answers only"
    return None


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(name), str) for name in ("role", "content")
    )


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
        rates[split] = badcase_rate(judged).share
        write_rows(folder / f"{split}.jsonl", pairs(judged, f"d4_badcases-{split}"))
        print(f"{split}: {rates[split]:.3f} of {len(judged)} answers are bad")
    write_manifest(folder.parent)
    return rates


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Mine the preference pairs of D4.")
    parser.add_argument("--seed", type=int, default=0)
    mine(paths.tasks_dir() / "d4_badcases", parser.parse_args().seed)
