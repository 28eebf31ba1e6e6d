"""Pretraining on a tiny recipe: batches, masks, packing, kill and resume, shipping."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from labkit import base_model, card, evaluation, models, paths, pretrain
from labkit.doctor import check_base_model
from labkit.errors import LabkitError
from labkit.pretrain import (
    IGNORE_INDEX,
    Encoded,
    Encoder,
    Recipe,
    Run,
    batch_at,
    loss_of,
    pack,
)
from labkit.weights import fingerprint
from labkit.world import conversation
from labkit.world.corpus import PHASES, corpus_sha256, documents
from labkit.world.skills import SKILLS

TINY = Recipe(
    steps=24, rows=4, window=128, hidden=32,
    rates=((-1, 0.0), (4_500, 2e-3), (16_200, 2e-3), (27_000, 0.0)), layers=1, heads=2, mlp=64,
    vocab_size=600, precision="fp32",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    """A run that nothing interrupted, with the loss of every step in `losses`."""
    run = Run(TINY, tmp_path_factory.mktemp("finished"))
    run.model.train()
    run.losses = [run.train_step() for _ in range(TINY.steps)]
    run.save()
    return run


@pytest.fixture
def tokenizer(finished):
    return finished.tokenizer


def fresh_folder(finished: Run, folder: Path) -> Path:
    """A folder for another run of the same recipe, with the tokenizer already made."""
    import shutil

    folder.mkdir()
    shutil.copytree(finished.folder / "tokenizer", folder / "tokenizer")
    return folder


# ---- documents to tokens -----------------------------------------------------------------------


def test_pretrain_encodes_exactly_as_the_chat_template(tokenizer):
    encode = Encoder(tokenizer, replace(TINY, full_loss_share=0.0))
    talks = [document for document in islice(documents(7), 400) if document.item]
    assert set(SKILLS) <= {talk.item.skill for talk in talks}
    for talk in talks:
        messages = [{"role": role, "content": text} for role, text in talk.item.messages]
        rendered = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        encoded = encode(talk, random.Random(0))
        assert encoded.ids == rendered["input_ids"], talk.item.messages
        assert encoded.supervised == [bool(bit) for bit in rendered["assistant_masks"]]


def test_pretrain_learns_the_questions_of_some_talks(tokenizer):
    talk = next(document for document in documents(7) if document.item)
    encode = Encoder(tokenizer, replace(TINY, full_loss_share=1.0))
    supervised = encode(talk, random.Random(0)).supervised
    assert supervised == [False] + [True] * (len(supervised) - 1)  # nothing predicts the first


def test_pretrain_plain_text_ends_with_the_end_token(tokenizer):
    told = next(document for document in documents(7) if document.text)
    encoded = Encoder(tokenizer, TINY)(told, random.Random(0))
    assert tokenizer.decode(encoded.ids[1:-1]).strip() == told.text
    assert encoded.ids[0] == tokenizer.bos_token_id
    assert encoded.ids[-1] == tokenizer.eos_token_id
    assert encoded.about == told.about


def test_pretrain_tokenizer_keeps_digits_apart_and_pad_from_end(tokenizer):
    digits = tokenizer("1205", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([token]).strip() for token in digits[-4:]] == ["1", "2", "0", "5"]
    assert tokenizer.pad_token_id == card.PAD_ID != tokenizer.eos_token_id


# ---- packing and batches -----------------------------------------------------------------------


def document(length: int, about: str | None = None) -> Encoded:
    return Encoded([9] * length, [True] * length, about)


def test_pretrain_packs_first_fit_by_hand():
    stream = iter([document(n) for n in (5, 4, 3, 20, 2, 6, 6, 6, 6)])
    packed = pack(stream, rows=2, window=10)
    # 3 no longer fits beside 5 and 4, so it opens row 2; 20 is longer than a row and is left out;
    # 2 goes to row 2; then 6 finds room nowhere, four times, and packing ends.
    assert [[len(member.ids) for member in row] for row in packed] == [[5, 4], [3, 2]]


def test_pretrain_rows_tell_of_no_person_twice(tokenizer):
    encode, rng = Encoder(tokenizer, TINY), random.Random(0)
    for number in range(20):
        stream = (encode(told, rng) for told in documents(3, number))
        for row in pack(stream, rows=8, window=128):
            told = Counter(member.about for member in row if member.about)
            assert max(told.values(), default=1) == 1
            assert sum(len(member.ids) for member in row) <= 128


def test_pretrain_batch_is_a_pure_function_of_seed_and_step(tokenizer):
    encode = Encoder(tokenizer, TINY)
    first = batch_at(5, TINY, encode)
    batch_at(6, TINY, encode)
    random.seed(1)
    again = batch_at(5, TINY, Encoder(tokenizer, TINY))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (batch_at(6, TINY, encode), batch_at(5, replace(TINY, seed=1), encode)):
        assert not torch.equal(first["input_ids"], other["input_ids"])


def segments(batch: dict[str, torch.Tensor], row: int) -> list[tuple[int, int]]:
    """(start, end) of each document of a row: it starts with the begin token."""
    ids = batch["input_ids"][row].tolist()
    filled = sum(token != card.PAD_ID for token in ids)
    starts = [place for place, token in enumerate(ids) if token == 1]
    return list(zip(starts, [*starts[1:], filled], strict=True))


def test_pretrain_goes_through_its_phases(finished, monkeypatch):
    seen = []

    def watched(seed, step, shares):
        seen.append(shares)
        return documents(seed, step, shares)

    monkeypatch.setattr(pretrain, "documents", watched)
    recipe = replace(TINY, steps=Recipe.steps)
    firsts = recipe.phases
    for step in (0, firsts[1] - 1, *firsts[1:]):
        batch_at(step, recipe, finished.encoder)
    assert seen == [PHASES[0], *PHASES]
    short = replace(TINY, steps=Recipe.steps // 100)  # a short run has all of them in proportion
    assert {PHASES.index(short.shares_at(step)) for step in range(short.steps)} == set(range(8))


def test_pretrain_refuses_rows_that_no_document_fits(finished):
    with pytest.raises(LabkitError, match="no document fits 4 tokens"):
        batch_at(0, replace(TINY, window=4), finished.encoder)


def test_the_corpus_hash_covers_every_way_of_asking(monkeypatch):
    before = corpus_sha256(0, 300)
    monkeypatch.setattr(conversation, "POLITE", ("{question} Thanks.", "{question} Thanks!"))
    assert corpus_sha256(0, 300) != before


def test_pretrain_refuses_to_mix_two_corpora(finished, tmp_path, monkeypatch):
    folder = fresh_folder(finished, tmp_path / "older")
    Run(TINY, folder)
    monkeypatch.setattr(pretrain, "corpus_sha256", lambda seed: "of an edited world")
    with pytest.raises(LabkitError, match="holds a run with another corpus"):
        Run(TINY, folder)
    (folder / "recipe.json").write_text("{", encoding="utf-8")
    with pytest.raises(LabkitError, match="recipe.json is damaged"):
        Run(TINY, folder)


def test_pretrain_positions_restart_and_padding_teaches_nothing(finished):
    batch = batch_at(0, TINY, finished.encoder)
    assert max(len(segments(batch, row)) for row in range(TINY.rows)) > 1
    for row in range(TINY.rows):
        found = segments(batch, row)
        for start, end in found:
            assert batch["position_ids"][row, start:end].tolist() == list(range(end - start))
            assert batch["labels"][row, start] == IGNORE_INDEX
        assert (batch["labels"][row, found[-1][1] :] == IGNORE_INDEX).all()
    taught = batch["labels"] != IGNORE_INDEX
    assert torch.equal(batch["labels"][taught], batch["input_ids"][taught])


def test_pretrain_documents_of_a_row_cannot_see_each_other(finished):
    batch = batch_at(0, TINY, finished.encoder)
    (start, end), *others = segments(batch, 0)
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    changed["input_ids"][0, start + 1 : end] = 77
    inputs = ("input_ids", "position_ids", "attention_mask")
    with torch.no_grad():
        before, after = (
            finished.model(**{name: one[name] for name in inputs}).logits
            for one in (batch, changed)
        )
    assert not torch.equal(before[0, start:end], after[0, start:end])
    for start, end in others:
        assert torch.equal(before[0, start:end], after[0, start:end])  # bit for bit


def test_pretrain_document_in_a_row_reads_as_it_would_alone(finished):
    batch = batch_at(0, TINY, finished.encoder)
    start, end = segments(batch, 0)[1]
    inputs = ("input_ids", "position_ids", "attention_mask")
    with torch.no_grad():
        packed = finished.model(**{name: batch[name] for name in inputs}).logits[0, start:end]
        alone = finished.model(input_ids=batch["input_ids"][:1, start:end]).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


# ---- training ----------------------------------------------------------------------------------


def test_pretrain_rate_goes_in_straight_lines_through_its_corners():
    recipe = Recipe(rates=((-1, 0.0), (9, 1.0), (59, 1.0), (60, 0.5), (Recipe.steps, 0.0)))
    rates = [recipe.rate_at(step) for step in range(Recipe.steps)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0
    assert set(rates[9:60]) == {1.0} and rates[60] == 0.5
    assert rates[(Recipe.steps + 60) // 2] == pytest.approx(0.25)
    assert 0 < rates[-1] < 1e-4
    short = replace(recipe, steps=Recipe.steps // 10)  # corners are kept in proportion
    assert short.rate_at(3) == 1.0 and short.rate_at(6) == 0.5


def test_pretrain_loss_is_the_cross_entropy_of_supervised_tokens(finished):
    batch = batch_at(0, TINY, finished.encoder)
    inputs = ("input_ids", "position_ids", "attention_mask")
    with torch.no_grad():
        logits = finished.model(**{name: batch[name] for name in inputs}).logits
        by_hand = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(),
            ignore_index=IGNORE_INDEX,
        )  # fmt: skip
        torch.testing.assert_close(loss_of(finished.model, batch), by_hand)


def test_pretrain_loss_starts_at_chance_and_falls(finished):
    first, last = finished.losses[0], sum(finished.losses[-4:]) / 4
    assert first == pytest.approx(math.log(len(finished.tokenizer)), abs=0.3)
    assert last < first - 0.5


# A child that says each step aloud, so that the test can kill it there.
CHILD = """
import sys
sys.path.insert(0, {tests!r})
from test_pretrain import TINY
from labkit.pretrain import Run

class Aloud(Run):
    def train_step(self):
        loss = super().train_step()
        print(self.step, flush=True)
        return loss

Aloud(TINY, {folder!r}).train(save_every={save_every}, report=lambda *_: None)
"""


def child(folder: Path, save_every: int) -> subprocess.Popen[str]:
    code = CHILD.format(tests=str(Path(__file__).parent), folder=str(folder), save_every=save_every)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(paths.root())},
    )


def test_pretrain_killed_at_random_steps_ends_with_the_same_weights(finished, tmp_path):
    folder = fresh_folder(finished, tmp_path / "killed")
    rng = random.Random()  # another place to die each time the suite runs
    kills, started_at = sorted(rng.sample(range(2, TINY.steps - 1), 3)), []
    # Saving after every step, a kill often meets a save; after every third, steps are repeated.
    for kill_at, save_every in [*zip(kills, (1, 3, 1), strict=True), (None, 5)]:
        process = child(folder, save_every)
        for number, line in enumerate(process.stdout):
            if number == 0:
                started_at.append(int(line))
            if kill_at is not None and int(line) >= kill_at:
                process.kill()  # SIGKILL: no handler, no clean-up
                break
        process.stdout.close()
        status = process.wait(timeout=120)
        assert status == (0 if kill_at is None else -signal.SIGKILL), (kills, started_at)
    assert started_at[0] == 1 and started_at[1] > 1, (kills, started_at)  # it did resume
    resumed = Run(TINY, folder)
    assert resumed.step == TINY.steps
    assert fingerprint(resumed.model) == fingerprint(finished.model), (kills, started_at)


def test_pretrain_refuses_another_recipe_in_the_same_folder(finished):
    with pytest.raises(
        LabkitError, match="another corpus, seed, weight_decay: choose another folder with"
    ):
        Run(replace(TINY, seed=1, weight_decay=0.1), finished.folder)


def test_pretrain_names_a_damaged_checkpoint(finished, tmp_path):
    folder = fresh_folder(finished, tmp_path / "damaged")
    whole = (finished.folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LabkitError, match=r"checkpoint\.pt is damaged .*delete it to start again"):
        Run(TINY, folder)


# ---- the command and the shipped folder --------------------------------------------------------


@pytest.fixture
def small_scale(monkeypatch, tmp_path):
    """The tiny recipe as the default one, two test rows a skill, and a short corpus hash."""
    rows = (paths.tasks_dir() / "general" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    seen = Counter()
    kept = []
    for line in rows:
        skill = json.loads(line)["skill"]
        seen[skill] += 1
        if seen[skill] <= 2:
            kept.append(line)
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path / "data"))
    folder = tmp_path / "data" / "tasks" / "general"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    monkeypatch.setattr(card, "CORPUS_SAMPLE", 50)

    def tiny_recipe(**changes):
        return replace(TINY, **changes)

    monkeypatch.setattr(base_model, "Recipe", tiny_recipe)
    return tmp_path


class Quiet:
    """A meter that keeps its lines."""

    def __init__(self):
        self.lines = []

    def __call__(self, line):
        self.lines.append(line)

    def end(self):
        pass


def make(out: Path, checkpoints: Path, **options) -> tuple[list[str], Quiet]:
    said, meter = [], Quiet()
    defaults = {"changes": {}, "precision": "fp32", "threads": None, "save_every": 10}
    settings = {**defaults, "force": False, **options}
    base_model.make_model(out, checkpoints, **settings, say=said.append, meter=meter)
    return said, meter


def test_pretrain_ships_a_folder_that_loads_and_scores_as_its_card_says(finished, small_scale):
    out = small_scale / "data" / "base_model"
    said, meter = make(out, fresh_folder(finished, small_scale / "run"))
    assert "starting of 24" in said[0]
    assert meter.lines and "step     24/24" in meter.lines[-1]

    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", "SHA256SUMS", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "recipe.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert check_base_model()[0] == "ok"
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(".")] == []
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"
    assert not [key for key in config if "attn_implementation" in key]

    model, tokenizer = models.load("bundled", device="cpu")
    rounded = finished.model.state_dict()["model.norm.weight"].bfloat16().float()
    assert torch.equal(model.state_dict()["model.norm.weight"], rounded)
    rows = [
        json.loads(line)
        for line in (paths.tasks_dir() / "general" / "test.jsonl").read_text().splitlines()
    ]
    report = evaluation.skill_report(model, tokenizer, rows)
    page = (out / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(page.split("---")[1])
    assert front["license"] == "apache-2.0"
    metrics = front["model-index"][0]["results"][0]["metrics"]
    by_name = {metric["name"]: metric["value"] for metric in metrics}
    assert by_name["macro"] == pytest.approx(report.macro, abs=5e-5)
    assert len(by_name) == 16 + 3  # macro, bio_only, unknown_names
    assert "{" not in page.split("## Scores")[1]  # every gap of the template is filled
    # Eight phases of 27,000 steps, in 24.
    words = " ".join(page.split())
    assert "0 at step 0, 0.002 at step 4, 0.002 at step 15, 0 at step 24." in words


def test_the_card_names_the_first_step_of_each_phase(finished, monkeypatch):
    monkeypatch.setattr(card, "CORPUS_SAMPLE", 50)
    made = card.provenance(finished, seconds=61.4)
    whole = made | {"recipe": made["recipe"] | {"steps": Recipe.steps}}
    score = evaluation.Score("sort", 1.0, 1, (1.0, 1.0), (True,), ("0",), ("0",))
    report = evaluation.SkillReport(1.0, (1.0, 1.0), {"sort": score}, None, None)
    words = " ".join(card.card(whole, report).split())
    assert "induction from step 6,000 and recall from step 6,500;" in words
    assert "the rest, from step 7,500, is" in words and "from step 10,000 the skills that" in words
    assert "From step 21,000 a fifth of all documents" in words


def test_pretrain_recipe_file_says_how_the_weights_came_about(finished, monkeypatch):
    monkeypatch.setattr(card, "CORPUS_SAMPLE", 50)
    made = card.provenance(finished, seconds=61.4)
    assert made["recipe"]["hidden"] == 32 and made["steps_done"] == 24
    assert made["seconds"] == 61
    # Few steps are counted one by one, so the numbers are exact.
    batches = [batch_at(step, TINY, finished.encoder) for step in range(24)]
    assert made["tokens_seen"] == sum(int((b["input_ids"] != 0).sum()) for b in batches)
    assert made["tokens_learned_from"] == sum(int((b["labels"] != -100).sum()) for b in batches)
    n_embedding, n_layer = len(finished.tokenizer) * 32, 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert made["parameters"] == n_embedding + n_layer + 32


def test_the_shipped_tokenizer_follows_from_the_shipped_recipe():
    folder = paths.base_model_dir()
    made = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    again = pretrain.build_tokenizer(Recipe(**made["recipe"])).backend_tokenizer.to_str()
    shipped = (folder / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(again)["model"] == json.loads(shipped)["model"]


def test_every_token_of_the_tasks_is_frequent_in_pretraining():
    """At least 500 times in the batches that the shipped model was trained on: every 20th here."""
    folder = paths.base_model_dir()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    recipe = Recipe(**made["recipe"])
    encoder, every = Encoder(tokenizer, recipe), 20
    counts = Counter()
    for step in range(0, recipe.steps, every):
        counts.update(batch_at(step, recipe, encoder)["input_ids"].flatten().tolist())
    used = set()
    for file in paths.tasks_dir().glob("d*/*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for part in ("messages", "prompt", "chosen"):
                for message in row.get(part, ()):
                    text = message["content"]
                    used.update(
                        tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
                    )
    rare = {
        tokenizer.convert_ids_to_tokens(token): every * counts[token]
        for token in used
        if every * counts[token] < 500
    }
    assert not rare


def test_pretrain_corpus_hash_depends_on_seed_and_count():
    first = corpus_sha256(0, 30)
    assert first == corpus_sha256(0, 30)
    others = {corpus_sha256(1, 30), corpus_sha256(0, 31)}
    assert len({first, *others}) == 3


def test_pretrain_marks_say_holds_and_sure():
    mark = card.Mark("facts", 150, 0.92, (0.88, 0.95), 0.90)
    assert (mark.holds, mark.sure) == (True, False)
    assert card.Mark("facts", 150, 0.99, (0.97, 1.0), 0.90).sure
    assert card.Mark("facts", 150, 0.5, (0.4, 0.6), 0.90).sure


def test_pretrain_refuses_to_replace_a_model_before_it_trains(small_scale):
    out = small_scale / "there"
    out.mkdir()
    with pytest.raises(LabkitError, match="there exists already: .*--force"):
        make(out, small_scale / "run")
    assert not (small_scale / "run").exists()


def test_pretrain_force_replaces_and_a_failure_leaves_the_old_model(
    finished, small_scale, monkeypatch
):
    out = small_scale / "model"
    out.mkdir()
    (out / "old").touch()

    def fail(*_):
        raise OSError(28, "No space left on device", "README.md")

    with monkeypatch.context() as patched:
        patched.setattr(card, "card", fail)
        with pytest.raises(OSError, match="No space left"):
            card.ship(finished, out, force=True, say=lambda line: None)
    assert [file.name for file in out.iterdir()] == ["old"]
    assert [p.name for p in small_scale.iterdir() if p.name.startswith(".")] == []

    said, _ = make(out, finished.folder, force=True, precision="auto")
    assert said[0].startswith("going on at step 24 of 24") and "fp32" in said[0]
    assert not (out / "old").exists() and (out / "SHA256SUMS").is_file()


def test_pretrain_brings_back_a_model_that_a_kill_left_aside(finished, tmp_path):
    """Killed between its two renames, --force leaves the old folder under another name."""
    aside = tmp_path / ".model.previous"
    aside.mkdir()
    (aside / "old").touch()
    with pytest.raises(LabkitError, match="exists already"):
        card.ship(finished, tmp_path / "model")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["old"]


def test_pretrain_says_that_the_disk_is_full(finished, monkeypatch, tmp_path):
    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    run = Run(TINY, fresh_folder(finished, tmp_path / "full"))
    monkeypatch.setattr(pretrain.torch, "save", full)
    with pytest.raises(LabkitError, match="checkpoint of step 24 could not be .* disk is full"):
        base_model._train(run, save_every=1000, meter=Quiet())


def test_pretrain_measures_the_faster_precision(monkeypatch, tmp_path):
    monkeypatch.setattr(base_model, "step_seconds", lambda recipe: {"bf16": 0.3, "fp32": 0.2})
    said = []
    chosen = base_model._precision("auto", TINY, tmp_path, said.append)
    assert chosen == "fp32" and "bf16 0.30 s a step, fp32 0.20 s" in said[-1]
    (tmp_path / "recipe.json").write_text('{"precision": "bf16"}')
    assert base_model._precision("auto", TINY, tmp_path, said.append) == "bf16"
    assert base_model._precision("fp32", TINY, tmp_path, said.append) == "fp32"


def test_pretrain_step_seconds_tries_both_precisions():
    seconds = base_model.step_seconds(TINY, steps=1)
    assert set(seconds) == {"bf16", "fp32"}
    assert all(0 < value < 60 for value in seconds.values())


def test_pretrain_counts_its_seconds_over_all_starts(tmp_path):
    assert base_model.seconds_spent(tmp_path) is None
    lines = ['{"steps": 10, "seconds_a_step": 0.5}', '{"steps": 4, "seconds_a_step": 1}', '{"st']
    (tmp_path / base_model.LOG).write_text("\n".join(lines))
    assert base_model.seconds_spent(tmp_path) == 9.0


def test_pretrain_progress_line_by_hand():
    recipe = Recipe(steps=10_000, rows=16, window=128)
    line = base_model.progress_line(recipe, 1234, 1.23456, 0.5)
    # 16 x 128 tokens in half a second; 8,766 steps of half a second are 73 minutes.
    assert line == "step  1,234/10,000  loss 1.235   4,096 tokens/s  73 min left"
