"""The same score before and after: exact match, losses, answers, and what was forgotten.

Greedy decoding gives the gold answer exactly when, with the gold answer fed in, the most likely
token at every answer position is the gold one, the end token included. So exact match needs one
forward pass for a whole batch of answers (`exact_matches`) instead of one for every token
(`generate_answers`); the tests hold the two to the same verdicts.

A row is `{"id", "messages", "skill", "key", "entity"}`; the last message is the gold answer and
everything before it the prompt.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from labkit.metrics import load_metric
from labkit.statistics import (
    Difference,
    Interval,
    bootstrap_interval,
    equivalent,
    macro_interval,
    paired_difference,
    ratio_interval,
    seed_interval,
)

__all__ = [
    "Answer",
    "Difference",
    "Loss",
    "Score",
    "SkillReport",
    "answer_loss",
    "answer_losses",
    "bootstrap_interval",
    "chance",
    "equivalent",
    "exact_matches",
    "forgetting",
    "generate_answers",
    "load_metric",
    "loss_difference",
    "neutral_text_loss",
    "paired_difference",
    "score",
    "seed_interval",
    "skill_report",
]

Progress = Callable[[int, int], None]
Encoded = tuple[list[int], int]  # ids of a prompt and its answer, and where the answer starts
BIO_ONLY, UNKNOWN = "bio_only", "unknown"


@dataclass(frozen=True)
class Score:
    """Exact match of one set of rows."""

    name: str
    exact_match: float
    """Share in 0..1."""
    n: int
    interval: Interval
    """95 %, bootstrap clustered by entity."""
    correct: tuple[bool, ...] = field(repr=False)
    """One verdict a row, in the order of the rows."""
    ids: tuple[str, ...] = field(repr=False)
    clusters: tuple[str, ...] = field(repr=False)
    """The entity of each row, the bootstrap's unit."""

    def to_json(self) -> dict:
        """`exact_match`, `n` and `interval`, ready for `json.dump`."""
        return {"exact_match": self.exact_match, "n": self.n, "interval": list(self.interval)}


@dataclass(frozen=True)
class SkillReport:
    """Exact match skill by skill, and its mean over skills."""

    macro: float
    """Mean over `skills`, each skill counting the same."""
    macro_interval: Interval
    skills: dict[str, Score]
    bio_only: Score | None
    """Questions about people met in biographies only; outside `skills` and the macro."""
    unknown_names: Score | None
    """The skill `unknown`: names that do not exist, to be answered "unknown"."""

    def to_frame(self):
        """Table with columns skill, exact_match, n, low, high; the last row is the macro mean."""
        import pandas as pd

        scores = [*self.skills.values(), *([self.bio_only] if self.bio_only else [])]
        rows = [(s.name, s.exact_match, s.n, *s.interval) for s in scores]
        total = sum(s.n for s in self.skills.values())
        rows.append(("macro", self.macro, total, *self.macro_interval))
        return pd.DataFrame(rows, columns=["skill", "exact_match", "n", "low", "high"])

    def to_json(self) -> dict:
        """What `labkit evaluate --json` prints, ready for `json.dump`."""
        return {
            "macro": self.macro,
            "macro_interval": list(self.macro_interval),
            "skills": {name: score.to_json() for name, score in self.skills.items()},
            "bio_only": self.bio_only.to_json() if self.bio_only else None,
            "unknown_names": self.unknown_names.to_json() if self.unknown_names else None,
        }


@dataclass(frozen=True)
class Loss:
    """Mean loss of a model over the tokens of some texts."""

    nats_per_token: float
    n_tokens: int
    """Tokens predicted: the first of a text is given, unless a begin token stands before it."""
    interval: Interval | None
    """95 %, bootstrap over texts; None for one text, which cannot say how much texts differ."""
    nats: tuple[float, ...] = field(repr=False)
    """Loss of each text, summed over its tokens, in the order of the texts."""
    tokens: tuple[int, ...] = field(repr=False)
    """Tokens predicted of each text."""

    @property
    def perplexity(self) -> float:
        """exp(nats_per_token)."""
        return math.exp(self.nats_per_token)


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a prompt."""

    text: str
    """Without special tokens and outer spaces."""
    stopped: bool
    """True when the model wrote its end token, False when it was cut off."""
    n_tokens: int
    """Tokens written, the end token included."""


def score(model, tokenizer, rows: Sequence[dict], name: str = "", batch_size: int = 32) -> Score:
    """Exact match of `rows` with its 95 % interval.

    Raises:
        ValueError: as `exact_matches`.
    """
    return _score(name, rows, exact_matches(model, tokenizer, rows, batch_size))


def skill_report(
    model,
    tokenizer,
    rows: Sequence[dict],
    batch_size: int = 32,
    progress: Progress | None = None,
) -> SkillReport:
    """Exact match of every skill in `rows`, and the mean over skills.

    Raises:
        ValueError: as `exact_matches`, or a row without a skill, or only bio_only rows.
    """
    for row in rows:
        if not row.get("skill"):
            raise ValueError(f"row {row.get('id')!r} has no skill: every general row needs one")
    correct = exact_matches(model, tokenizer, rows, batch_size, progress)
    by_skill = defaultdict(list)
    for row, right in zip(rows, correct, strict=True):
        by_skill[row["skill"]].append((row, right))
    scores = {
        skill: _score(skill, *zip(*pairs, strict=True)) for skill, pairs in sorted(by_skill.items())
    }
    bio_only = scores.pop(BIO_ONLY, None)
    if not scores:
        raise ValueError("rows holds bio_only questions alone: a report needs another skill")
    flat = _verdicts(scores)
    return SkillReport(
        macro=sum(s.exact_match for s in scores.values()) / len(scores),
        macro_interval=macro_interval(flat, [1] * len(flat), *_labels(scores)),
        skills=scores,
        bio_only=bio_only,
        unknown_names=scores.get(UNKNOWN),
    )


def exact_matches(
    model,
    tokenizer,
    rows: Sequence[dict],
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[bool]:
    """Whether greedy decoding would give each row's gold answer exactly, end token included.

    Args:
        model: any causal LM, with or without a PEFT adapter.
        rows: see the module's head; the order of the verdicts is the order of the rows.
        batch_size: rows a forward pass; rows of like length are passed together.
        progress: called with (rows done, rows in all) after each batch.

    Raises:
        ValueError: no rows, a row without a gold answer, a row longer than the model takes, or
            a chat template that renders the prompt differently once the answer follows.
    """
    encoded = _encode_rows(model, tokenizer, rows)
    verdicts = [False] * len(rows)
    done = 0
    with evaluating(model):
        for indices in _batches([len(ids) for ids, _ in encoded], batch_size):
            batch = [encoded[i] for i in indices]
            gold, owner, predicted = _predict_answers(model, tokenizer, batch)
            # A row is right when none of its answer tokens is wrong.
            wrong = torch.bincount(owner[predicted != gold], minlength=len(batch)).tolist()
            for index, errors in zip(indices, wrong, strict=True):
                verdicts[index] = errors == 0
            done += len(batch)
            if progress:
                progress(done, len(rows))
    return verdicts


def answer_loss(model, tokenizer, rows: Sequence[dict], batch_size: int = 16) -> float:
    """Mean loss in nats of the gold answers' tokens, end token included, prompts left out.

    Raises:
        ValueError: as `exact_matches`.
    """
    return answer_losses(model, tokenizer, rows, batch_size).nats_per_token


def answer_losses(
    model,
    tokenizer,
    rows: Sequence[dict],
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Loss:
    """What `answer_loss` is the mean of, row by row, with the interval of that mean.

    Raises:
        ValueError: as `exact_matches`.
    """
    encoded = _encode_rows(model, tokenizer, rows)
    return _summed_losses(model, tokenizer, encoded, batch_size, progress)


def neutral_text_loss(
    model,
    tokenizer,
    texts: Sequence[str],
    batch_size: int = 16,
    progress: Progress | None = None,
    names: Sequence[str] | None = None,
) -> Loss:
    """Mean loss in nats over every token of plain texts, no chat template applied.

    A begin token is put in front where the tokenizer has one, so that the first word counts.

    Args:
        names: what an error calls each text, such as "notes.txt:3"; None is `texts[2]`.

    Raises:
        ValueError: no texts, a text too short to predict a token, or longer than the model takes.
    """
    if not texts:
        raise ValueError("texts is empty: give at least one text")
    names = names or [f"texts[{number}]" for number in range(len(texts))]
    encoded = []
    for name, text in zip(names, texts, strict=True):
        ids = list(tokenizer(text, verbose=False)["input_ids"])  # its own warning says less
        if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
            ids = [tokenizer.bos_token_id, *ids]
        if len(ids) < 2:
            raise ValueError(f"{name} is {text!r}: too short to predict a token")
        encoded.append((ids, 1))
    _check_lengths(model, [len(ids) for ids, _ in encoded], names)
    return _summed_losses(model, tokenizer, encoded, batch_size, progress)


def loss_difference(before: Loss, after: Loss, level: float = 0.95) -> Difference:
    """What the loss on the same texts rose by, after - before, in nats per token.

    The interval resamples texts, each with both of its losses, so that what makes a text hard for
    both models cancels. For one text it is the difference itself, which says nothing on others.

    Raises:
        ValueError: the two were measured on other texts, or in other tokens.
    """
    if before.tokens != after.tokens:
        raise ValueError(
            f"before has {len(before.tokens)} texts of {before.n_tokens} tokens, after "
            f"{len(after.tokens)} of {after.n_tokens}: measure both on the same texts, with one "
            "tokenizer"
        )
    rises = [new - old for new, old in zip(after.nats, before.nats, strict=True)]
    mean = sum(rises) / before.n_tokens
    if len(rises) < 2 or not any(rises):
        return Difference(mean, (mean, mean), len(rises), level)
    interval = ratio_interval(rises, before.tokens, level=level)
    return Difference(mean, interval, len(rises), level)


def generate_answers(
    model,
    tokenizer,
    prompts: Sequence[list[dict]],
    max_new_tokens: int = 48,
    batch_size: int = 32,
    do_sample: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Answer]:
    """Answers to prompts, each a list of messages, by greedy decoding or plain sampling.

    A model's own generation defaults (repetition penalty, top-k, top-p) are switched off: they
    would change the answers that the scores are about. Sampling leaves torch's random state as it
    was; its draws depend on `seed`, the prompts and `batch_size`.

    Raises:
        ValueError: no prompts, an empty prompt, a temperature that is not above 0, or a prompt
            that leaves the model no room for `max_new_tokens`.
    """
    if not prompts or not all(prompts):
        raise ValueError("prompts must hold at least one prompt, each with at least one message")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; greedy is do_sample=False")
    prompt_ids = _render(tokenizer, prompts, add_generation_prompt=True)
    names = [f"prompts[{number}] with its answer" for number in range(len(prompt_ids))]
    _check_lengths(model, [len(ids) + max_new_tokens for ids in prompt_ids], names)
    ends = _end_tokens(model, tokenizer)
    pad = _pad_token(tokenizer)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if do_sample else {}),
    )
    answers: list[Answer] = [Answer("", False, 0)] * len(prompts)
    device = _device(model)
    with evaluating(model), torch.random.fork_rng(enabled=do_sample):
        if do_sample:
            torch.manual_seed(seed)
        for indices in _batches([len(ids) for ids in prompt_ids], batch_size):
            # Padding on the left, so that every prompt ends where its answer starts.
            width = max(len(prompt_ids[i]) for i in indices)
            padding = [width - len(prompt_ids[i]) for i in indices]
            ids = [[pad] * gap + prompt_ids[i] for gap, i in zip(padding, indices, strict=True)]
            mask = [[0] * gap + [1] * (width - gap) for gap in padding]
            written = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=config,
            )
            for index, tokens in zip(indices, written[:, width:].tolist(), strict=True):
                answers[index] = _answer(tokenizer, tokens, ends)
    return answers


def forgetting(before: SkillReport, after: SkillReport, level: float = 0.95):
    """What every skill lost or gained between two reports over the same rows.

    Returns:
        pandas.DataFrame with columns skill, before, after, change, low, high: change is
        after - before, low and high its paired interval clustered by entity. The last row, macro,
        is the mean over skills.

    Raises:
        ValueError: the reports were made from different rows.
    """
    import pandas as pd

    if before.skills.keys() != after.skills.keys():
        raise ValueError(
            f"before has skills {sorted(before.skills)}, after {sorted(after.skills)}: "
            "score both models on the same rows"
        )
    rows = []
    for skill, old in before.skills.items():
        new = after.skills[skill]
        if old.ids != new.ids:
            raise ValueError(f"skill {skill!r}: before and after scored different rows")
        change = paired_difference(new.correct, old.correct, old.clusters, level=level)
        rows.append((skill, old.exact_match, new.exact_match, change.mean, *change.interval))
    old_flat, new_flat = _verdicts(before.skills), _verdicts(after.skills)
    clusters, groups = _labels(before.skills)
    macro = paired_difference(new_flat, old_flat, clusters, level=level, groups=groups)
    rows.append(("macro", before.macro, after.macro, macro.mean, *macro.interval))
    return pd.DataFrame(rows, columns=["skill", "before", "after", "change", "low", "high"])


def chance(rows: Sequence[dict]) -> dict[str, float]:
    """Exact match, per skill, of always giving the skill's most frequent gold answer.

    The trivial baseline, and a generous one: the most frequent answer is read off these rows.

    Raises:
        ValueError: no rows, or a row without a gold answer.
    """
    _check_rows(rows)
    answers = defaultdict(Counter)
    for row in rows:
        answers[row.get("skill") or ""][row["messages"][-1]["content"].strip()] += 1
    return {
        skill: counts.most_common(1)[0][1] / counts.total()
        for skill, counts in sorted(answers.items())
    }


@contextmanager
def evaluating(model) -> Iterator[None]:
    """No dropout and no gradients inside; every submodule's training flag is restored after."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


# ---- rows to token ids -------------------------------------------------------------------------


def _encode_rows(model, tokenizer, rows: Sequence[dict]) -> list[Encoded]:
    """Each row's prompt and answer as token ids, cut after the first end token."""
    _check_rows(rows)
    prompts = _render(tokenizer, [row["messages"][:-1] for row in rows], add_generation_prompt=True)
    wholes = _render(tokenizer, [row["messages"] for row in rows])
    ends = _end_tokens(model, tokenizer)
    encoded = []
    for row, prompt, whole in zip(rows, prompts, wholes, strict=True):
        start = len(prompt)
        if whole[:start] != prompt:
            raise ValueError(
                f"row {row.get('id')!r}: the chat template renders the prompt differently once "
                "the answer follows, so its answer cannot be found; use a template whose "
                "generation prompt is how an assistant turn begins"
            )
        # Templates may write a line break after the end token, which generation never reaches.
        stop = next((i for i in range(start, len(whole)) if whole[i] in ends), None)
        ids = [*whole, tokenizer.eos_token_id] if stop is None else whole[: stop + 1]
        encoded.append((ids, start))
    lengths = [len(ids) for ids, _ in encoded]
    _check_lengths(model, lengths, [f"row {row.get('id')!r}" for row in rows])
    return encoded


def _render(tokenizer, conversations, add_generation_prompt: bool = False) -> list[list[int]]:
    """Token ids of conversations in the chat format, without padding."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "tokenizer has no chat template: load it with labkit.models.load, which attaches one"
        )
    return tokenizer.apply_chat_template(
        list(conversations),
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=True,
        # Reasoning models then answer at once; other templates ignore the word.
        enable_thinking=False,
    )["input_ids"]


def _check_rows(rows: Sequence[dict]) -> None:
    if not len(rows):
        raise ValueError("rows is empty: give at least one row")
    for row in rows:
        messages = row.get("messages") or []
        if len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise ValueError(
                f"row {row.get('id')!r}: messages must hold a prompt and end with the assistant's "
                "answer; check the file with `labkit validate FILE`"
            )


def _check_lengths(model, lengths: list[int], names: Sequence[str]) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    for length, name in zip(lengths, names, strict=True):
        if limit is not None and length > limit:
            raise ValueError(f"{name} has {length} tokens, the model takes {limit}: shorten it")


def _end_tokens(model, tokenizer) -> set[int]:
    """Ids at which generation stops: the tokenizer's and the model's own."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    if not ends:
        raise ValueError("tokenizer has no end token: set tokenizer.eos_token")
    return ends


def _pad_token(tokenizer) -> int:
    """What fills a batch; its value never matters, since padding is masked or comes last."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _answer(tokenizer, tokens: list[int], ends: set[int]) -> Answer:
    """The answer in one row of generated ids, which padding follows once it has ended."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), None)
    written = tokens if stop is None else tokens[: stop + 1]
    text = tokenizer.decode(written, skip_special_tokens=True).strip()
    return Answer(text, stop is not None, len(written))


# ---- forward passes ----------------------------------------------------------------------------


def _batches(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, so that little is padded."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _device(model) -> torch.device:
    return next(model.parameters()).device


def _pad_right(model, tokenizer, batch: list[Encoded]) -> torch.Tensor:
    """(batch, width) ids. A causal model never looks right, so no attention mask is needed."""
    width = max(len(ids) for ids, _ in batch)
    pad = _pad_token(tokenizer)
    padded = [ids + [pad] * (width - len(ids)) for ids, _ in batch]
    return torch.tensor(padded, device=_device(model))


def _answer_positions(batch: list[Encoded], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every answer token of a batch, as two flat index tensors."""
    rows = [row for row, (ids, start) in enumerate(batch) for _ in range(start, len(ids))]
    columns = [column for ids, start in batch for column in range(start, len(ids))]
    return torch.tensor(rows, device=device), torch.tensor(columns, device=device)


def _predict_answers(
    model, tokenizer, batch: list[Encoded]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gold token, row and most likely token at every answer position, as three flat tensors."""
    ids = _pad_right(model, tokenizer, batch)
    rows, columns = _answer_positions(batch, ids.device)
    before = columns - 1  # the position that predicts a token is the one before it
    backbone, head = _split(model)
    if backbone is None or head is None:
        logits = _logits(model, ids)[rows, before]
    else:
        # The vocabulary is wide and answers are short: project the answer positions alone.
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
        logits = head(hidden[rows, before])
    return ids[rows, columns], rows, logits.argmax(-1).to(ids.device)


def _split(model):
    """(backbone, output embedding), or (None, None) where only the whole model will do.

    What a model does to its logits after the projection (scaling, soft-capping) keeps their
    order, so the most likely token is the same. A trained prompt lives in PEFT's own forward.
    """
    if hasattr(model, "peft_config"):
        if model.active_peft_config.is_prompt_learning:
            return None, None
        model = model.get_base_model()
    backbone, head = getattr(model, "base_model", None), model.get_output_embeddings()
    whole = backbone is None or backbone is model or head is None
    return (None, None) if whole else (backbone, head)


def _logits(model, ids: torch.Tensor) -> torch.Tensor:
    """(batch, width, vocab) of the tokens in `ids`, without those of a trained prompt."""
    return model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :]


def _summed_losses(
    model, tokenizer, encoded: list[Encoded], batch_size: int, progress: Progress | None
) -> Loss:
    """Loss of each row from its start on, summed, and the mean over all of their tokens."""
    nats = [0.0] * len(encoded)
    done = 0
    with evaluating(model):
        for indices in _batches([len(ids) for ids, _ in encoded], batch_size):
            losses = _losses(model, tokenizer, [encoded[i] for i in indices])
            for index, loss in zip(indices, losses, strict=True):
                nats[index] = loss
            done += len(indices)
            if progress:
                progress(done, len(encoded))
    counts = [len(ids) - start for ids, start in encoded]
    interval = ratio_interval(nats, counts) if len(counts) > 1 else None
    return Loss(sum(nats) / sum(counts), sum(counts), interval, tuple(nats), tuple(counts))


def _losses(model, tokenizer, batch: list[Encoded]) -> list[float]:
    """Loss in nats of each row, summed over its tokens from its start on."""
    ids = _pad_right(model, tokenizer, batch)
    rows, columns = _answer_positions(batch, ids.device)
    logits = _logits(model, ids)[rows, columns - 1].float()
    each = cross_entropy(logits, ids[rows, columns], reduction="none")
    # On a CPU, since a GPU adds in no fixed order: the same model would not have the same loss.
    return torch.zeros(len(batch)).index_add(0, rows.cpu(), each.cpu()).tolist()


# ---- scores ------------------------------------------------------------------------------------


def _score(name: str, rows: Sequence[dict], correct: Sequence[bool]) -> Score:
    ids = tuple(str(row.get("id", number)) for number, row in enumerate(rows))
    clusters = tuple(str(row.get("entity") or key) for row, key in zip(rows, ids, strict=True))
    # Rows that all share one entity say nothing about other entities; resample the rows then.
    if len(set(clusters)) < 2:
        clusters = tuple(str(number) for number in range(len(rows)))
    interval = bootstrap_interval([float(c) for c in correct], clusters)
    share = sum(correct) / len(correct)
    return Score(name, share, len(correct), interval, tuple(correct), ids, clusters)


def _verdicts(scores: dict[str, Score]) -> list[bool]:
    """Every verdict of several scores, in order."""
    return [right for score in scores.values() for right in score.correct]


def _labels(scores: dict[str, Score]) -> tuple[list[str], list[str]]:
    """Cluster and skill of every row of several scores, in order."""
    clusters = [cluster for score in scores.values() for cluster in score.clusters]
    skills = [skill for skill, score in scores.items() for _ in score.clusters]
    return clusters, skills
