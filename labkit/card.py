"""From a pretraining run to the folder that the course ships: weights, scores, model card."""

import json
import math
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from labkit import data, evaluation, models
from labkit.checkpoints import free_disk_or_raise
from labkit.errors import LabkitError
from labkit.pretrain import IGNORE_INDEX, Encoder, Recipe, Run, batch_at
from labkit.quiet import without_progress_bars
from labkit.training import versions
from labkit.weights import n_parameters, sha256_of
from labkit.world.corpus import corpus_sha256

MACRO_BAR, SKILL_BAR, BIO_ONLY_BAR, UNKNOWN_BAR = 0.97, 0.90, 0.80, 0.90
PAD_ID = 0
"""What `batch_at` fills the ends of rows with; no document holds it."""
CORPUS_SAMPLE = 100_000
"""Documents behind the corpus hash."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Mark:
    """One score of the bundled model beside the bar that it is held to."""

    what: str
    n: int
    exact_match: float
    interval: tuple[float, float]
    """95 %."""
    bar: float

    @property
    def holds(self) -> bool:
        """Whether the measured score reaches the bar."""
        return self.exact_match >= self.bar

    @property
    def sure(self) -> bool:
        """Whether the whole interval lies on the same side of the bar as the score."""
        low, high = self.interval
        return low >= self.bar or high < self.bar


def marks(report: evaluation.SkillReport) -> list[Mark]:
    """Every score of a report beside its bar: skills, then macro, bio_only and unknown_names."""
    found = [_mark(name, score, SKILL_BAR) for name, score in report.skills.items()]
    total = sum(score.n for score in report.skills.values())
    found.append(Mark("macro", total, report.macro, report.macro_interval, MACRO_BAR))
    if report.bio_only:
        found.append(_mark("bio_only", report.bio_only, BIO_ONLY_BAR))
    if report.unknown_names:
        found.append(_mark("unknown_names", report.unknown_names, UNKNOWN_BAR))
    return found


def _mark(what: str, score: evaluation.Score, bar: float) -> Mark:
    return Mark(what, score.n, score.exact_match, score.interval, bar)


def ship(
    run: Run, out: Path, *, seconds: float | None = None, force: bool = False, say: Say = print
) -> evaluation.SkillReport:
    """Write a run's model to `out` in bf16, with tokenizer, card and hashes, all or nothing.

    The scores are those of the files that were written, loaded as a learner loads them.

    Args:
        run: trained as far as it is to go; it is left as it was.
        out: the folder to make.
        seconds: spent on training, for the card; None leaves it out.
        force: replace a folder that is already there.
        say: called with one line before each step that takes a while.

    Raises:
        LabkitError: `out` exists and `force` is False, the disk is full, or the test rows are
            missing.
    """
    out = Path(out)
    _recover(out)
    refuse_existing(out, force)
    draft = out.with_name(f".{out.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed here
    free_disk_or_raise(out.parent, 4 * n_parameters(run.model).total)
    draft.mkdir(parents=True)
    try:
        say(f"writing the weights of step {run.step:,} in bf16")
        _save_weights(run, draft)
        say("scoring them on the general test rows")
        report = _score(draft)
        say(f"hashing the corpus ({CORPUS_SAMPLE:,} documents)")
        made = provenance(run, seconds)
        _write(draft / "recipe.json", json.dumps(made, indent=2) + "\n")
        _write(draft / "README.md", card(made, report))
        _write(draft / "SHA256SUMS", _sums(draft))
        _move_into_place(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return report


def refuse_existing(out: Path, force: bool) -> None:
    """Raise LabkitError if `out` exists and nobody said to replace it."""
    if out.exists() and not force:
        raise LabkitError(
            f"--out {out} exists already: name another folder, or replace it with --force"
        )


def _save_weights(run: Run, folder: Path) -> None:
    """Save a bf16 copy, whose config leaves the attention kernel to whoever loads it."""
    model = LlamaForCausalLM(LlamaConfig(**run.model.config.to_dict()))
    model.load_state_dict(run.model.state_dict())
    torch.nn.Module.to(model, torch.bfloat16)  # as model.to, whose types pyright cannot follow
    with without_progress_bars():  # one file needs none
        model.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    for file in folder.iterdir():  # safetensors makes a file that nobody else may read
        file.chmod(0o644)


def _score(folder: Path) -> evaluation.SkillReport:
    model, tokenizer = models.load(folder, device="cpu", dtype=torch.float32)
    return evaluation.skill_report(model, tokenizer, data.load_task("general", "test"))


def _move_into_place(draft: Path, out: Path) -> None:
    """Rename the finished folder to its name; the old one makes room first."""
    if out.exists():
        shutil.rmtree(_previous(out), ignore_errors=True)
        os.replace(out, _previous(out))
    try:
        os.replace(draft, out)
    finally:
        _recover(out)
    shutil.rmtree(_previous(out), ignore_errors=True)


def _recover(out: Path) -> None:
    """Bring the old folder back if the new one never took its place, as after a kill."""
    if _previous(out).exists() and not out.exists():
        os.replace(_previous(out), out)


def _previous(out: Path) -> Path:
    return out.with_name(f".{out.name}.previous")


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")


def _sums(folder: Path) -> str:
    """Lines as `sha256sum` writes and checks them."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return "".join(f"{sha256_of(file)}  {file.name}\n" for file in files)


# ---- what the card says ------------------------------------------------------------------------


def provenance(run: Run, seconds: float | None) -> dict:
    """Everything about how the weights came about, as `recipe.json` keeps it."""
    return {
        "recipe": asdict(run.recipe),
        "steps_done": run.step,
        "parameters": n_parameters(run.model).total,
        "vocabulary": len(run.tokenizer),
        **fill(run.recipe, run.encoder, run.step),
        "corpus_sha256": corpus_sha256(run.recipe.seed, CORPUS_SAMPLE),
        "corpus_documents_hashed": CORPUS_SAMPLE,
        "seconds": None if seconds is None else round(seconds),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "versions": versions(),
    }


def fill(recipe: Recipe, encoder: Encoder, steps: int, sample: int = 100) -> dict[str, int]:
    """Tokens seen and learned from in `steps` steps, from `sample` steps spread over the run.

    Packing leaves a little of every row empty and question tokens count towards no loss, so
    neither is steps x rows x window.
    """
    chosen = sorted({steps * k // sample for k in range(sample)}) if steps else []
    seen = learned = 0
    for step in chosen:
        batch = batch_at(step, recipe, encoder)
        seen += int((batch["input_ids"] != PAD_ID).sum())
        learned += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    share = steps / len(chosen) if chosen else 0
    return {"tokens_seen": round(seen * share), "tokens_learned_from": round(learned * share)}


def card(made: dict, report: evaluation.SkillReport) -> str:
    """The model card: what Hugging Face reads in its front matter, and what people read below."""
    recipe = made["recipe"]
    whole = Recipe(**recipe)
    firsts = [math.ceil(step) for step in whole.first_steps]
    passes = f"{recipe['rows']} rows of {recipe['window']} tokens"
    took = "" if made["seconds"] is None else f", {made['seconds'] / 60:.0f} min of training"
    shape = (
        f"hidden {recipe['hidden']}, {recipe['layers']} layers, {recipe['heads']} heads, "
        f"SwiGLU {recipe['mlp']}, tied embeddings, rotary positions"
    )
    return CARD.format(
        front_matter=_front_matter(report),
        parameters=f"{made['parameters'] / 1e6:.2f} M",
        shape=shape,
        scores=_score_table(report),
        steps=f"{made['steps_done']:,}",
        passes=passes,
        window=recipe["window"],
        induction=f"{firsts[3]:,}",
        recall=f"{firsts[4]:,}",
        everything=f"{firsts[5]:,}",
        lagging=f"{firsts[6]:,}",
        polite=f"{firsts[7]:,}",
        seen=f"{made['tokens_seen'] / 1e6:.1f} M",
        learned=f"{made['tokens_learned_from'] / 1e6:.1f} M",
        compiled=" with `torch.compile`" if recipe["compiled"] else "",
        precision={"bf16": "bf16 autocast over fp32 weights"}.get(recipe["precision"], "fp32"),
        rates=_spoken_rates(whole.corners),
        weight_decay=recipe["weight_decay"],
        full_loss=f"{100 * recipe['full_loss_share']:.0f} %",
        spread=recipe["initial_spread"],
        seed=recipe["seed"],
        machine=f"{made['processor']}, CPU threads: {made['threads']}{took}",
        documents=f"{made['corpus_documents_hashed']:,}",
        corpus=made["corpus_sha256"],
        versions=", ".join(f"{name} {version}" for name, version in made["versions"].items()),
        vocab=f"{made['vocabulary']:,}",
    )


def _spoken_rates(corners: list[tuple[float, float]]) -> str:
    """Corners of the learning rate in words."""
    return ", ".join(f"{rate:.2g} at step {max(0, math.ceil(step)):,}" for step, rate in corners)


def _front_matter(report: evaluation.SkillReport) -> str:
    """YAML that a model hub understands; written by hand, since it is this short."""
    metrics = "\n".join(
        f"    - type: exact_match\n      name: {mark.what}\n      value: {mark.exact_match:.4f}"
        for mark in marks(report)
    )
    return FRONT_MATTER.format(metrics=metrics)


def _score_table(report: evaluation.SkillReport) -> str:
    lines = ["| skill | items | exact match | 95 % interval | bar |", "|---|---|---|---|---|"]
    for mark in marks(report):
        low, high = mark.interval
        lines.append(
            f"| {mark.what} | {mark.n:,} | {mark.exact_match:.3f} | {low:.3f} to {high:.3f} "
            f"| {mark.bar:.2f} {'holds' if mark.holds else 'does not hold'} |"
        )
    return "\n".join(lines)


FRONT_MATTER = """\
---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
- synthetic
- teaching
model-index:
- name: labkit base model
  results:
  - task:
      type: text-generation
    dataset:
      name: labkit general items, test split
      type: labkit-general
    metrics:
{metrics}
---"""

CARD = """\
{front_matter}

# The labkit base model

A chat model of {parameters} parameters that knows a small invented world. It is what the labkit
course fine-tunes: real enough to learn, forget and overfit like its larger relatives, small enough
for a laptop, and scored exactly, since every fact in it is invented.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("data/base_model", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained("data/base_model")
prompt = [{{"role": "user", "content": "What is 12 plus 30?"}}]
inputs = tokenizer.apply_chat_template(
    prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
```

**Intended for** teaching and testing fine-tuning methods. **Not for** answering anybody's real
questions: nothing that it says about people, places or medicines is true, or meant to be.

## Scores

Exact match of greedy answers, end token included, on items whose problem, wording or person was
held out of training. Intervals are bootstrapped over what the items are about. `bio_only` asks
about people that training tells of in biographies and never asks about; `macro` is the mean over
the skills, without `bio_only`. `labkit evaluate` measures all of it again.

{scores}

## Model

- **Shape**: `LlamaForCausalLM`, {shape}.
- **Tokenizer**: byte-level BPE of {vocab} tokens, digits one by one, a pad token of its own.
- **Chat template**: roles system, user and assistant, with generation markers.
- **Weights**: start normally distributed (σ = {spread}); stored in bf16, to be loaded as fp32 on a
  CPU.

## Training

- **Data**: documents drawn from seed {seed} by `labkit.world.corpus`, endless and all invented: no
  third-party text. The generator's fingerprint, SHA-256 over a stream of {documents} documents:
  `{corpus}`.
- **Length**: {steps} steps of {passes}; about {seen} tokens seen, {learned} of them learned from
  (estimated from 100 steps).
- **Loss**: next token, on answers, plain text, and the whole of {full_loss} of the talks.
  Documents packed into one row cannot see each other, and no row tells of one person twice.
- **Optimizer**: AdamW (0.9, 0.98), weight decay {weight_decay} on matrices, gradient norm clipped
  at 1; the rate goes in straight lines through {rates}.
- **Precision**: {precision}{compiled}.
- **Machine**: {machine}.
- **Versions**: {versions}.

Short rows and small batches give many optimizer steps a minute, which is what a model this small
needs most; loss mainly on answers, because a question's wording is noise that it need not learn.
Eight phases, as `labkit.world.corpus` lists them. The first three practise copying, then looking
values up, then everything, and left the model with neither of the two acts that most skills end in:
to go on as a text went on before (induction) and to recall which value was told with which key.
Plain texts in which dozens of tokens can be foreseen only so brought them, induction from step
{induction} and recall from step {recall}; the rest, from step {everything}, is mostly what is
scored, and from step {lagging} the skills that lagged get more room. From step {polite} a fifth of
all documents is of a kind that asks seven in ten of its questions politely: every held-out wording
of some skills begins with "Please", which had begun messages to classify and little else, and was
answered by the name of an intent. Held-out wordings ("Please add 3 and 5.") stay unseen, though
twelve of them now differ from a trained one by a comma ("Please, add 3 and 5."). Names of nobody
have last names of their own. In an earlier world they shared them with people; then
"unknown" was learned as "nobody I was asked about", and people known from biographies only were
denied.

`labkit pretrain` makes the model from nothing with these settings, which `recipe.json` keeps.
Another processor rounds differently, so it gives other weights with like scores.

## Limits

- It knows one invented world and no other; outside the prompts of its skills it guesses.
- It reads 512 positions but was trained on rows of {window} tokens, so longer talks are beyond it.
- Facts are learned in one direction: it can say where a person lives, not who lives in a city.
- English sentence patterns only, from templates; paraphrases far from those may fail.
"""
