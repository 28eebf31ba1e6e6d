"""Break the course on purpose, one thing at a time, and see whether its tests notice.

    labkit mutate                       # all of them
    labkit mutate judge-never-in-doubt  # one
    labkit mutate --quick               # those that every test run includes

Each mutation is applied to a scratch copy of the repository and the tests that should notice are
run there. A mutation that survives is a hole in the tests.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from labkit import paths
from labkit.errors import LabkitError
from labkit.usage import Parser

TIMEOUT_SECONDS = 900
NOT_COPIED = {".git", ".venv", ".labkit", "workbook", "__pycache__", ".pytest_cache", ".ruff_cache"}
TESTS_FAILED = 1  # pytest's exit status; above it, tests could not be run at all
LAST_LINES = 15


@dataclass(frozen=True)
class Mutation:
    """One deliberate mistake and the tests that must notice it."""

    name: str
    description: str
    """The mistake, as someone could make it."""
    files: tuple[str, ...]
    """What is changed, below the root of the repository."""
    apply: Callable[[Path], None]
    """Makes the mistake in a copy of the repository."""
    tests: tuple[str, ...]
    """Arguments for pytest; these tests pass without the mistake and must fail with it."""
    quick: bool = False
    """True for a few that take seconds and are part of every test run."""


@dataclass(frozen=True)
class Outcome:
    """What became of one mutation."""

    name: str
    verdict: str
    """caught, survived, or broken: the tests could not be run, which proves nothing."""
    seconds: float
    detail: str = ""
    """Last lines of the tests' output unless it was caught."""


MUTATIONS: dict[str, Mutation] = {}


def register(mutation: Mutation) -> Mutation:
    """Add a mutation to the registry.

    Raises:
        ValueError: the name is taken, or no test is named.
    """
    if mutation.name in MUTATIONS:
        raise ValueError(f"mutation {mutation.name!r} is already registered: choose another name")
    if not mutation.tests:
        raise ValueError(f"mutation {mutation.name!r} names no tests: say which must notice it")
    MUTATIONS[mutation.name] = mutation
    return mutation


def replacing(
    name: str, description: str, file: str, old: str, new: str, *tests: str, quick: bool = False
) -> Mutation:
    """Register a mutation that replaces the one occurrence of `old` in a file by `new`.

    In a notebook the text is looked for in the sources of the cells.
    """

    def apply(folder: Path) -> None:
        replace_once(folder / file, old, new)

    return register(Mutation(name, description, (file,), apply, tests, quick))


def replace_once(path: Path, old: str, new: str) -> None:
    """Replace a text that occurs exactly once in a file, or in the cells of a notebook.

    Raises:
        LabkitError: it occurs never or more than once: the mutation no longer fits the code.
    """
    from labkit.notebooks.normalise import dumps, read  # nbformat takes seconds to import

    notebook = read(path) if path.suffix == ".ipynb" else None
    sources = [cell.source for cell in notebook.cells] if notebook else [path.read_text("utf-8")]
    count = sum(source.count(old) for source in sources)
    if count != 1:
        raise LabkitError(
            f"{path.name}: {old!r} occurs {count} times, not once: bring the mutation up to date"
        )
    if notebook:
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
        path.write_bytes(dumps(notebook))
    else:
        path.write_text(sources[0].replace(old, new), encoding="utf-8", newline="\n")


def run(
    names: Iterable[str] | None = None,
    *,
    quick: bool = False,
    root: Path | None = None,
    progress: Callable[[str], None] = print,
) -> list[Outcome]:
    """Apply mutations one by one and run the tests that must notice each.

    Args:
        names: which; default all that are registered.
        quick: of these, only the quick ones.
        root: the repository; it is not changed.
        progress: called with one line per mutation.

    Raises:
        ValueError: no such mutation.
        LabkitError: a mutation no longer fits the code, or tests fail without any mutation.
    """
    chosen = [_find(name) for name in (MUTATIONS if names is None else names)]
    chosen = [mutation for mutation in chosen if mutation.quick or not quick]
    root = root or paths.root()
    with tempfile.TemporaryDirectory(prefix="labkit-mutate-") as scratch:
        clean = copy_repository(root, Path(scratch) / "clean")
        for mutation in chosen:  # before any test is run: is every mutation up to date?
            mutated = Path(scratch) / mutation.name
            shutil.copytree(clean, mutated)
            mutation.apply(mutated)
        for tests in _test_groups(chosen):
            progress(f"without any mutation: {len(tests)} test arguments")
            status, _, words = _pytest(clean, tests)
            if status != 0:
                raise LabkitError(f"tests fail without any mutation: mend them first\n{words}")
        outcomes = []
        for mutation in chosen:
            status, seconds, words = _pytest(Path(scratch) / mutation.name, mutation.tests, "-x")
            verdict = {0: "survived", TESTS_FAILED: "caught"}.get(status, "broken")
            detail = "" if verdict == "caught" else words
            outcomes.append(Outcome(mutation.name, verdict, round(seconds, 1), detail))
            progress(f"{verdict:<9} {mutation.name} ({seconds:.1f} s): {mutation.description}")
        return outcomes


def copy_repository(root: Path, target: Path) -> Path:
    """Copy what git tracks or would track; without git, all but built and fetched folders.

    Plain copies, not links: nothing that a mutated test writes can reach the original.
    """
    for path in _repository_files(root):
        copy = target / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    return target


def _repository_files(root: Path) -> list[Path]:
    git = shutil.which("git")
    if git and (root / ".git").exists():
        command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
        files = [root / name for name in listed.decode("utf-8").split("\0") if name]
    else:
        files = list(root.rglob("*"))
    return [
        path
        for path in files
        if path.is_file() and not NOT_COPIED & set(path.relative_to(root).parts)
    ]


def _test_groups(mutations: list[Mutation]) -> list[tuple[str, ...]]:
    """Tests to run once without a mutation: plain ones together, those with options apart."""
    plain: dict[str, None] = {}
    groups: dict[tuple[str, ...], None] = {}
    for mutation in mutations:
        if any(argument.startswith("-") for argument in mutation.tests):
            groups[mutation.tests] = None
        else:
            plain |= dict.fromkeys(mutation.tests)
    return [*([tuple(plain)] if plain else []), *groups]


def _pytest(folder: Path, tests: tuple[str, ...], *options: str) -> tuple[int, float, str]:
    """Exit status, seconds, and last lines of a pytest run in a copy, with the copy's labkit."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *tests]
    switches = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("LABKIT_")}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=inherited | switches,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_SECONDS,
        )
        status, words = done.returncode, done.stdout
    except subprocess.TimeoutExpired:
        status, words = -1, f"the tests took longer than {TIMEOUT_SECONDS} s"
    return status, time.perf_counter() - started, "\n".join(words.splitlines()[-LAST_LINES:])


def _find(name: str) -> Mutation:
    if name not in MUTATIONS:
        raise ValueError(f"no mutation {name!r}: `labkit mutate --list` names all of them")
    return MUTATIONS[name]


# ---- scores and statistics -----------------------------------------------------------------------

replacing(
    "scorer-drops-end-token",
    "an answer counts as right although the model would not have stopped after it",
    "labkit/evaluation.py",
    "if stop is None else whole[: stop + 1]",
    "if stop is None else whole[:stop]",
    "tests/test_evaluation.py::test_end_token_is_part_of_the_match",
)
replacing(
    "bootstrap-ignores-clusters",
    "answers about one person are resampled as if they were independent",
    "labkit/statistics.py",
    "cluster, group = _codes(clusters, len(top)),",
    "cluster, group = _codes(None, len(top)),",
    "tests/test_statistics.py::test_clustered_bootstrap_covers_the_truth_95_times_in_100",
)
replacing(
    "judge-never-in-doubt",
    "an interval that crosses the bar counts as a refutation",
    "labkit/statements.py",
    'return "does not hold" if high < self.low or low > self.high else "inconclusive"',
    'return "does not hold"',
    "tests/test_claims.py::test_verdict_on_each_side_of_the_bar",
    quick=True,
)
replacing(
    "expect-accepts-nan",
    "a measurement that is not a number passes every tolerance",
    "labkit/claims.py",
    "return abs(got - want) <= tol if numbers",
    "return not abs(got - want) > tol if numbers",
    "tests/test_claims.py::test_expect_raises_outside_the_tolerance",
    quick=True,
)

# ---- data ----------------------------------------------------------------------------------------

replacing(
    "mask-supervises-prompt",
    "the loss learns to write questions, too",
    "labkit/data/masks.py",
    "Tokens(ids, [bool(bit) for bit in mask])",
    "Tokens(ids, [True for bit in mask])",
    "tests/test_data_tokens.py::test_the_mask_by_hand",
)
replacing(
    "validator-overlooks-placeholders",
    "a row that says {{NAME}} is called clean",
    "labkit/data/texts.py",
    "if gap := _placeholder(text):",
    "if (gap := _placeholder(text)) and not gap:",
    "tests/test_data_files.py::test_damaged_texts",
)
replacing(
    "split-leaks",
    "rows are split one by one, so one problem lands in train and in test",
    "labkit/data/splits.py",
    "_split_of(value, fractions, seed)",
    '_split_of(f"{index}:{value}", fractions, seed)',
    "tests/test_data_splits.py::test_equal_keys_meet_in_one_split_and_no_row_is_lost",
)
replacing(
    "mix-repeats-in-silence",
    "too few general rows are used twice without a word",
    "labkit/data/mixing.py",
    "if missing > 0 and not allow_repeats:",
    "if missing > 0 and allow_repeats is None:",
    "tests/test_data_tokens.py::test_too_few_general_rows_are_named_never_repeated_in_silence",
)

# ---- the invented world and pretraining ----------------------------------------------------------

replacing(
    "negation-is-overlooked",
    "`not good` is called positive",
    "labkit/world/language.py",
    "positive = (adjective in words.GOOD) != turned",
    "positive = adjective in words.GOOD",
    "tests/test_world.py::test_negation_turns_sentiment_around",
)
replacing(
    "held-out-wordings-are-trained-on",
    "the wordings kept for tests stand in the training data",
    "labkit/world/items.py",
    'phrasings[:-n_held_out] if split == "train" else phrasings',
    "phrasings",
    "tests/test_world.py::test_held_out_wordings_are_never_trained_on",
)
replacing(
    "politeness-makes-a-held-out-wording",
    "training asks politely in the very words that are kept for tests",
    "labkit/world/conversation.py",
    '"Please, {lowered}",',
    '"Please {lowered}",',
    "tests/test_world.py::test_polite_questions_are_asked_in_no_held_out_wording",
)
replacing(
    "biographies-only-people-are-asked-about",
    "extraction is tested on people whose answers were trained on",
    "labkit/world/knowledge.py",
    "person, attribute = rng.choice(population().asked), rng.choice(tuple(ATTRIBUTES))",
    "person, attribute = rng.choice(population().known), rng.choice(tuple(ATTRIBUTES))",
    "tests/test_world.py::test_people_of_biographies_only_are_never_asked_about",
)
replacing(
    "strangers-share-families-with-people",
    "names of nobody are drawn from families that exist",
    "labkit/world/population.py",
    "for last in words.STRANGE_LAST_NAMES",
    "for last in words.LAST_NAMES",
    "tests/test_world.py::test_unknown_names_are_of_families_that_nobody_belongs_to",
)
replacing(
    "practice-phases-in-the-wrong-order",
    "pretraining goes through its phases backwards",
    "labkit/pretrain.py",
    "return PHASES[begun - 1]",
    "return PHASES[-begun]",
    "tests/test_pretrain.py::test_pretrain_goes_through_its_phases",
)
replacing(
    "packed-documents-see-each-other",
    "a document reads the one before it in its row",
    "labkit/pretrain.py",
    "visible = (segment[:, :, None] == segment[:, None, :]) & causal",
    "visible = (segment[:, :, None] >= 0) & causal",
    "tests/test_pretrain.py::test_pretrain_documents_of_a_row_cannot_see_each_other",
)

# ---- notebooks as experiments --------------------------------------------------------------------

NBVAL = (
    "--nbval",
    "-p",
    "labkit.notebooks.plugin",
    "--nbval-sanitize-with",
    "labkit/notebooks/sanitize.cfg",
)
FULL_FINE_TUNING = "notebooks/02_full_fine_tuning.ipynb"
replacing(
    "full-at-half-the-rate",
    "the chosen learning rate is halved where the model is trained",
    FULL_FINE_TUNING,
    "args=dataclasses.replace(config, learning_rate=chosen_rate),",
    "args=dataclasses.replace(config, learning_rate=chosen_rate / 2),",
    *NBVAL,
    FULL_FINE_TUNING,
)
replacing(
    "full-supervises-the-prompt",
    "the loss learns questions as well as answers",
    FULL_FINE_TUNING,
    "assistant_only_loss=True",
    "assistant_only_loss=False",
    *NBVAL,
    FULL_FINE_TUNING,
)

LORA = "notebooks/03_lora.ipynb"
replacing(
    "lora-of-another-rank",
    "the adapter has rank 2 where the lesson says 3",
    LORA,
    "RANK, ALPHA, TARGETS = 3, 6,",
    "RANK, ALPHA, TARGETS = 2, 4,",
    *NBVAL,
    LORA,
)
replacing(
    "lora-at-half-the-rate",
    "the learning rate is halved where the adapter is trained",
    LORA,
    'rate=RATE["lora"], steps=STEPS',
    'rate=RATE["lora"] / 2, steps=STEPS',
    *NBVAL,
    LORA,
)
QLORA = "notebooks/04_qlora.ipynb"
replacing(
    "qlora-supervises-the-prompt",
    "the loss learns questions as well as answers",
    QLORA,
    "assistant_only_loss=True",
    "assistant_only_loss=False",
    *NBVAL,
    QLORA,
)
SOFT_PROMPTS = "notebooks/05_p_tuning.ipynb"
replacing(
    "soft-prompts-train-nothing",
    "the rate of every soft prompt is a thousandth of what it should be",
    SOFT_PROMPTS,
    "learning_rate=rate,",
    "learning_rate=rate / 1000,",
    *NBVAL,
    SOFT_PROMPTS,
)

FORGETTING = "notebooks/06_forgetting_and_mixing.ipynb"
replacing(
    "forgetting-at-half-the-rate",
    "the domain-only run forgets little because its rate is halved",
    FORGETTING,
    "domain, rate=RATE[FULL], callbacks=",
    "domain, rate=RATE[FULL] / 2, callbacks=",
    *NBVAL,
    FORGETTING,
)
replacing(
    "mixture-turned-around",
    "the ratio is read as general : domain, so 1:5 holds a fifth of general rows",
    FORGETTING,
    "return data.mix(domain, general, MIXES[mix],",
    "return data.mix(domain, general, 1 / MIXES[mix],",
    *NBVAL,
    FORGETTING,
)

DPO = "notebooks/07_dpo_for_badcases.ipynb"
replacing(
    "dpo-swaps-chosen-and-rejected",
    "the model is aligned towards its bad answers",
    DPO,
    'train_dataset=rows.select_columns(["prompt", "chosen", "rejected"]),',
    'train_dataset=rows.select_columns(["prompt", "chosen", "rejected"]).rename_columns('
    '{"chosen": "rejected", "rejected": "chosen"}),',
    *NBVAL,
    DPO,
)
replacing(
    "dpo-at-half-the-rate",
    "the learning rate is halved where the model is aligned",
    DPO,
    "align(start(), pairs, rate=RATE, callbacks",
    "align(start(), pairs, rate=RATE / 2, callbacks",
    *NBVAL,
    DPO,
)

MEMORY = "notebooks/08_memory.ipynb"
replacing(
    "checkpointing-not-handed-on",
    "the trainer keeps everything for backward where the lesson recomputes it",
    MEMORY,
    "activation_checkpointing=again,",
    "activation_checkpointing=False,",
    *NBVAL,
    MEMORY,
)
replacing(
    "adamw-steps-without-room",
    "the roots of AdamW's second means are left out, so 10 bytes a parameter become 8",
    "labkit/memory/state.py",
    "                width * everything,\n",
    "                0 * everything,\n",
    "tests/test_estimate.py::test_the_bar_rows_are_met_to_a_hundredth_of_a_percent",
    quick=True,
)

# ---- models and training -------------------------------------------------------------------------

replacing(
    "pad-equals-end",
    "padding shares the end token's id, so the end token is masked and never learned",
    "labkit/models.py",
    "if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:",
    "if tokenizer.pad_token is None:",
    "tests/test_models.py::test_pad_equal_to_end_is_replaced_by_an_unused_token",
)
replacing(
    "4-bit-weights-packed-anew",
    "the first evaluation of a 4-bit model repacks its weights, which training and merging misread",
    "labkit/models.py",
    "layer.support_avx512bf16_for_cpu = False",
    "layer.support_avx512bf16_for_cpu = True",
    "tests/test_models.py::test_evaluating_a_4_bit_model_leaves_its_weights_as_they_were",
)
replacing(
    "plan-forgets-last-accumulation",
    "the shorter last accumulation of an epoch is not counted as a step",
    "labkit/stepplan.py",
    "steps_per_epoch = math.ceil(batches / accumulation)",
    "steps_per_epoch = max(batches // accumulation, 1)",
    "tests/test_training.py::test_plan_counts_the_trainers_steps",
)
replacing(
    "resume-from-half-a-checkpoint",
    "a save that was cut short is resumed from",
    "labkit/checkpoints.py",
    "if not zipfile.is_zipfile(file):",
    "if not file.exists():",
    "tests/test_training.py::test_a_checkpoint_cut_short_is_skipped_and_named",
)

# ---- preferences and badcases --------------------------------------------------------------------

replacing(
    "margin-has-the-wrong-sign",
    "what is watched calls it a gain when the rejected answer becomes more likely",
    "labkit/preferences.py",
    "margins = (now - before)[0] - (now - before)[1]",
    "margins = (now - before)[1] - (now - before)[0]",
    "tests/test_preferences.py::test_margin_and_kl_by_hand",
    quick=True,
)
replacing(
    "ties-are-trained-on",
    "pairs whose chosen and rejected answers are the same are let through",
    "labkit/preferences.py",
    "if chosen == rejected:",
    "if chosen is rejected:",
    "tests/test_preferences.py::test_bad_pairs_are_refused_by_name",
)
replacing(
    "falling-answers-raise-no-alarm",
    "the chosen answers may become as unlikely as they like, as long as the margin grows",
    "labkit/preferences.py",
    "if change < -CHOSEN_FALL:",
    "if change < -CHOSEN_FALL and watched.margin < 0:",
    "tests/test_preferences.py::test_a_ruined_model_with_a_perfect_margin_sets_off_two_alarms",
)
replacing(
    "a-filter-peeks-at-the-right-answer",
    "rules are given the row's last message, so that their rates look better than they are",
    "labkit/filters.py",
    'return rule.fires(one.row["messages"][:-1], one.text, one.stopped)',
    'return rule.fires(one.row["messages"], one.text, one.stopped)',
    "tests/test_filters.py::test_no_rule_sees_the_right_answer",
)
replacing(
    "the-greeting-is-searched-for",
    "the retriever looks for who greets instead of what is asked",
    "labkit/retrieval.py",
    'return _last_question(messages).split(". ")[-1]',
    'return _last_question(messages).split(". ")[0]',
    "tests/test_retrieval.py::test_the_question_is_searched_for_and_not_the_greeting",
)

# ---- figures -------------------------------------------------------------------------------------

replacing(
    "plot-shifted-by-one-step",
    "the curve is drawn one step too late",
    "labkit/report.py",
    "ax.plot(steps, losses, color=COLORS[color]",
    "ax.plot([step + 1 for step in steps], losses, color=COLORS[color]",
    "tests/test_report.py::test_learning_curve_draws_the_log",
)

# ---- exercises and notebooks ---------------------------------------------------------------------

replacing(
    "stub-counts-as-answer",
    "an exercise that was not touched is called wrong",
    "labkit/exercises.py",
    "return answer is ... or (code is not None",
    "return (code is not None",
    "tests/test_exercises.py::test_every_form_of_stub_is_not_attempted",
    quick=True,
)
replacing(
    "workbook-keeps-solutions",
    "learners find the solution below the exercise",
    "labkit/notebooks/workbook.py",
    "        if not is_solution:\n",
    "        if True:\n",
    "tests/test_workbook.py::test_workbook_has_stubs_and_no_solutions_outputs_or_counts",
    quick=True,
)
replacing(
    "workbook-overwrites-edits",
    "a new version of the course replaces what a learner wrote",
    "labkit/notebooks/workbook.py",
    "if sha256(present) != last_written:",
    "if last_written is None:",
    "tests/test_workbook.py::test_a_learners_file_is_never_overwritten",
    quick=True,
)
replacing(
    "normaliser-keeps-execution-times",
    "running a notebook again changes lines in git",
    "labkit/notebooks/normalise.py",
    'KEPT_CELL_METADATA = ("jupyter", "tags")',
    'KEPT_CELL_METADATA = ("execution", "jupyter", "tags")',
    "tests/test_normalise.py::test_normalise_leaves_only_what_is_worth_committing",
    quick=True,
)
replacing(
    "sanitiser-hides-exact-numbers",
    "every number is replaced before outputs are compared, marked or not",
    "labkit/notebooks/sanitize.cfg",
    "regex: [ ]*≈ ?[-+]?",
    "regex: [ ]*≈? ?[-+]?",
    "tests/test_normalise.py::test_sanitisers_replace_what_may_differ_and_nothing_else",
    "tests/test_plugin.py::test_each_cell_passes_or_fails_for_its_own_reason",
)
replacing(
    "plugin-overlooks-cells-that-never-ran",
    "a cell without outputs passes because there is nothing to compare",
    "labkit/notebooks/plugin.py",
    "if item.cell.execution_count is None and item.cell.source.strip():",
    "if item.cell.execution_count == 0:",
    "tests/test_plugin.py::test_each_cell_passes_or_fails_for_its_own_reason",
)
replacing(
    "plugin-overlooks-error-replies",
    "a mistyped magic passes because it leaves no traceback",
    "labkit/notebooks/plugin.py",
    'if kernel.reply_error and not item.options["check_exception"]:',
    'if kernel.reply_error and item.options["check_exception"]:',
    "tests/test_plugin.py::test_each_cell_passes_or_fails_for_its_own_reason",
)
replacing(
    "adapters-fit-any-base",
    "an adapter is attached to a model that it was not trained on",
    "labkit/adapters.py",
    "if base_sha256(base) != wanted:",
    "if not wanted:",
    "tests/test_adapters.py::test_another_base_is_refused",
)
replacing(
    "merge-believes-itself",
    "a merged model that answers differently is written all the same",
    "labkit/adapters.py",
    "if not difference <= allowed:",
    "if difference < 0:",
    "tests/test_adapters.py::test_a_merge_that_changes_answers_writes_nothing",
)
replacing(
    "lora-is-counted-on-one-side",
    "the parameter formula forgets B",
    "labkit/adapters.py",
    "rank * (n_in + n_out) for",
    "rank * n_in for",
    "tests/test_adapters.py::test_lora_parameters_by_hand",
)
replacing(
    "nf4-ends-at-another-quantile",
    "the levels by hand are no longer those of the paper and of bitsandbytes",
    "labkit/quantization.py",
    "_OUTERMOST_QUANTILE = 0.9677083",
    "_OUTERMOST_QUANTILE = 0.98",
    "tests/test_quantization.py::test_nf4_levels_are_those_of_the_paper",
    quick=True,
)
replacing(
    "double-quantization-counts-nothing",
    "the constants of the constants cost no bits",
    "labkit/quantization.py",
    "return 4 + 8 / block + 32 / (block * CONSTANTS_BLOCK)",
    "return 4 + 8 / block",
    "tests/test_quantization.py::test_bits_per_parameter_are_the_papers",
    quick=True,
)
replacing(
    "prefix-is-counted-without-values",
    "a prefix is counted as keys alone",
    "labkit/soft_prompts.py",
    "kept = n * 2 * layers * width",
    "kept = n * layers * width",
    "tests/test_soft_prompts.py::test_soft_prompt_sizes_by_hand",
)
replacing(
    "weights-count-as-activations",
    "a step's bytes count the weights that its backward pass reads a second time",
    "labkit/memory/step.py",
    "if storage.data_ptr() not in mine:",
    "if storage.nbytes():",
    "tests/test_memory.py::test_step_bytes_by_hand",
)
replacing(
    "forgetting-changes-sign",
    "what was lost is called gained, and what was gained lost",
    "labkit/forgetting.py",
    'found["skills"] = _judge((-high, -low), self.margin_points)',
    'found["skills"] = _judge((low, high), self.margin_points)',
    "tests/test_forgetting.py::test_the_interval_decides_the_verdict",
    quick=True,
)
replacing(
    "loss-difference-per-text",
    "a rise of the loss is divided by the texts instead of by their tokens",
    "labkit/evaluation.py",
    "mean = sum(rises) / before.n_tokens",
    "mean = sum(rises) / len(rises)",
    "tests/test_evaluation.py::test_loss_difference_is_paired_over_texts",
)
replacing(
    "recommend-trusts-the-mean",
    "an arm keeps to a budget when its mean does, however wide its interval",
    "labkit/recipe.py",
    "if high <= budget + _ROUNDING:",
    "if trial.lost <= budget + _ROUNDING:",
    "tests/test_recipe.py",
    quick=True,
)
replacing(
    "frontier-turned-around",
    "the arms that lose most stand on the frontier",
    "labkit/report.py",
    "more >= gain and less <= loss and (more > gain or less < loss)",
    "more >= gain and less >= loss and (more > gain or less > loss)",
    "tests/test_report.py::test_the_frontier_is_what_no_other_arm_beats",
)
replacing(
    "sweep-trusts-stale-seeds",
    "results of older code, data or weights are mixed with new ones",
    "labkit/notebooks/sweep.py",
    'if kept["inputs"] == inputs and wanted <= kept.keys():',
    'if kept["inputs"] and wanted <= kept.keys():',
    "tests/test_sweep.py::test_changed_code_or_data_or_model_makes_seeds_stale_but_prose_and_exercises_do_not",
)
replacing(
    "ranks-average-their-own-means",
    "each rank divides its loss by its own tokens, so that DDP takes a mean of means",
    "labkit/scale/batches.py",
    "return model(**batch, num_items_in_batch=torch.tensor(everything)).loss * world",
    "return model(**batch).loss",
    "tests/test_scale.py::test_scale_gradients_of_two_ranks_are_those_of_one_process",
)
replacing(
    "the-last-shard-is-as-large-as-the-first",
    "every rank is said to hold a whole piece, the last one too",
    "labkit/scale/sizes.py",
    "held = piece if padded else min(piece, max(0, rows - rank * piece))",
    "held = piece",
    "tests/test_scale.py::test_scale_counts_pieces_as_torch_chunk_cuts_them",
    quick=True,
)
replacing(
    "an-all-reduce-is-sent-once",
    "what DDP sends is counted as a gathering alone",
    "labkit/scale/traffic.py",
    'SENT = {"all-reduce": 2,',
    'SENT = {"all-reduce": 1,',
    "tests/test_traffic.py::test_a_ring_sends_an_all_reduce_twice",
    quick=True,
)
replacing(
    "any-worker-will-do",
    "a machine with other data or another labkit runs seeds of a sweep",
    "labkit/notebooks/seeds.py",
    "if found[what] != needed:",
    "if found[what] is needed is ...:",
    "tests/test_engines.py::test_a_worker_with_other_data_refuses_and_is_named",
)
replacing(
    "stage-3-sends-no-more-than-data-parallelism",
    "the throughput model forgets that stage 3 gathers weights a second time, for backward",
    "labkit/scale/throughput.py",
    '"zero3": Volume(1, 1, 1),',
    '"zero3": Volume(1, 0, 1),',
    "tests/test_throughput.py",
    quick=True,
)


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 when every mutation was caught."""
    parser = Parser(
        prog="labkit mutate",
        description="Break a copy of the course on purpose and see whether the tests notice.",
        epilog="example: labkit mutate --quick",
    )
    parser.add_argument("name", nargs="*", help="which mutations (default: all)")
    parser.add_argument("--quick", action="store_true", help="only those of every test run")
    parser.add_argument("--list", action="store_true", help="name all mutations and run none")
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON")
    options = parser.parse_args(arguments)
    if options.list:
        for mutation in MUTATIONS.values():
            print(f"{mutation.name}{' (quick)' * mutation.quick}: {mutation.description}")
        return 0

    def say(line: str) -> None:
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)

    try:
        outcomes = run(options.name or None, quick=options.quick, progress=say)
    except (LabkitError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    missed = [outcome for outcome in outcomes if outcome.verdict != "caught"]
    for outcome in missed:
        say(f"--- {outcome.name} {outcome.verdict}\n{outcome.detail}")
    say(f"{len(outcomes) - len(missed)} of {len(outcomes)} mutations caught")
    if options.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes]))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
