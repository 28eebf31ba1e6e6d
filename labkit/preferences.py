"""Preference pairs: checked before DPO, watched while it runs, and the alarms in words.

DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7) lowers, for a prompt x with a chosen answer c
and a rejected one r,

    loss = -log sigmoid(beta * margin)
    margin = [log pi(c|x) - log ref(c|x)] - [log pi(r|x) - log ref(r|x)]

Only the difference counts. It also grows while both answers become less likely, as long as the
rejected one falls faster (Razin et al. 2024, arXiv:2410.08847; Pal et al. 2024, arXiv:2402.13228),
so the loss, the margin and the accuracy can be perfect on a ruined model. `watch` therefore shows
the log-probabilities themselves, and `alarms` says in words what to worry about.

A pair is a row with `prompt`, `chosen` and `rejected`, each a list of messages, as TRL reads it.

>>> import torch
>>> logits = torch.zeros(1, 3, 4)  # four tokens, all as likely: log(1/4) = -1.386 each
>>> completion_logps(logits, torch.tensor([[IGNORE_INDEX, 2, 3]])).item()
-2.7725887298583984
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from labkit.evaluation import evaluating, generate_answers

IGNORE_INDEX = -100
"""Label of a token that enters no loss, as everywhere in Hugging Face."""

CHOSEN_FALL = 0.1
"""Nats per token that the chosen answers may lose before `alarms` speaks."""
LENGTH_DRIFT = 0.2
"""Share by which answers may grow or shrink."""
GENERAL_FALL = 0.03
"""Points of the general score, of 1, that may be lost."""
_NOISE = 0.01  # nats per token; a smaller change of the chosen answers is none


@dataclass(frozen=True)
class PairReport:
    """How long the answers of some pairs are, and how little they differ.

    Where one side is mostly the longer one, DPO can learn the length instead of the content (Park
    et al. 2024, arXiv:2403.19159); where few tokens differ, both answers tend to fall together.
    """

    n: int
    """Number of pairs."""
    chosen_tokens: float
    """Mean tokens of a chosen answer, the end token included."""
    rejected_tokens: float
    chosen_longer: float
    """Share of pairs whose chosen answer has more tokens."""
    rejected_longer: float
    """Share of pairs whose rejected answer has more tokens; the rest are of equal length."""
    edit_distance: float
    """Mean number of tokens to insert, delete or replace to turn one answer into the other."""
    by_reason: dict[str, "PairReport"] = field(default_factory=dict, repr=False)
    """The same for the pairs of each reason, the most frequent reason first."""

    @property
    def reasons(self) -> dict[str, int]:
        """Number of pairs of each reason."""
        return {reason: report.n for reason, report in self.by_reason.items()}

    @property
    def length_ratio(self) -> float:
        """chosen_tokens / rejected_tokens; 1 is balanced."""
        return self.chosen_tokens / self.rejected_tokens

    def to_frame(self):
        """Table with a row per reason and one for all pairs, in columns named as the fields."""
        import pandas as pd

        columns = (
            "n",
            "chosen_tokens",
            "rejected_tokens",
            "chosen_longer",
            "rejected_longer",
            "edit_distance",
        )
        reports = {**self.by_reason, "all": self}
        return pd.DataFrame(
            [[name, *(getattr(report, c) for c in columns)] for name, report in reports.items()],
            columns=["reason", *columns],
        )


@dataclass(frozen=True)
class Watch:
    """What DPO has done to a model, measured on pairs; means over the pairs.

    "Per token" divides the sum over all answers by the number of their tokens, end tokens included.
    """

    n: int
    """Number of pairs."""
    beta: float
    loss: float
    """DPO's loss; ln 2 = 0.6931 while the model is its reference."""
    margin: float
    """See the module's head; nats per pair, beta left out. TRL logs beta * margin."""
    accuracy: float
    """Share of pairs with a margin above 0: 0 at the start, where all margins are 0."""
    ranking_accuracy: float
    """Share of pairs whose chosen answer the model itself finds more likely than the rejected."""
    chosen_logp: float
    """Log-probability of the chosen answers, nats per token."""
    rejected_logp: float
    chosen_change: float
    """chosen_logp minus the reference's; below 0 the right answers became less likely."""
    rejected_change: float
    kl: float
    """KL(model || reference) in nats per token, exact over the vocabulary at each token of the
    pairs' answers; `sampled_kl` asks it of the model's own answers."""

    @property
    def reward_margin(self) -> float:
        """beta * margin, which TRL logs as `rewards/margins`."""
        return self.beta * self.margin

    def to_dict(self) -> dict[str, float]:
        """Every field by its name, and reward_margin."""
        return {**asdict(self), "reward_margin": self.reward_margin}


# ---- log-probabilities ---------------------------------------------------------------------------


def completion_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each completion given its prompt, in nats.

    Summed over tokens, as log pi(y|x) is in the DPO loss (Rafailov et al. 2023, arXiv:2305.18290,
    eq. 7); dividing by length would give another loss.

    Args:
        logits: (batch, seq, vocab).
        labels: (batch, seq) token ids; prompt and padding hold IGNORE_INDEX.

    Returns:
        (batch,) float32, every value <= 0.

    Raises:
        ValueError: shapes disagree, or a row has no completion token.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, logits {tuple(logits.shape)}: "
            "give (batch, seq) labels to (batch, seq, vocab) logits"
        )
    targets = labels[:, 1:]  # a token is predicted by the logits one place earlier
    answers = targets != IGNORE_INDEX
    empty = (~answers).all(dim=1).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"row {empty[0]} of labels has no completion token: every label after the first is "
            f"{IGNORE_INDEX}, so there is no answer to take the probability of"
        )
    losses = cross_entropy(logits[:, :-1][answers].float(), targets[answers], reduction="none")
    return -_sum_rows(losses, answers)


def pair_batch(pairs: Sequence[dict], tokenizer) -> tuple[Tensor, Tensor]:
    """Pairs as one batch, n chosen rows above n rejected ones, as TRL's collator lays them out.

    Returns:
        input_ids and labels, both (2n, width), padded on the right; the labels hold the answers
        with their end tokens, and IGNORE_INDEX elsewhere.

    Raises:
        ValueError: no pairs, or the chat template renders a prompt differently once an answer
            follows.
    """
    if not len(pairs):
        raise ValueError("pairs is empty: give at least one pair")
    rows = _encode(pairs, tokenizer, "chosen") + _encode(pairs, tokenizer, "rejected")
    return _pad_right(rows, tokenizer)


# ---- pairs before training -----------------------------------------------------------------------


def check_pairs(
    pairs: Sequence[dict],
    tokenizer,
    max_length: int,
    model=None,
    reference=None,
    reference_tokenizer=None,
) -> None:
    """Refuse pairs that DPO would learn nothing or the wrong thing from.

    Args:
        max_length: tokens of a prompt with its answer; TRL cuts what is longer.
        model: if given, max_length must fit its window.
        reference: the model to stay near to, if given; its vocabulary must be that of `model`.
        reference_tokenizer: if given, its tokens must have the ids that `tokenizer` gives them.

    Raises:
        ValueError: no pairs; an empty answer; chosen and rejected alike (a tie); a pair that
            repeats or contradicts an earlier one; too many tokens; a reference of another
            vocabulary. It names the pair by its index and id.
    """
    _check_models(tokenizer, max_length, model, reference, reference_tokenizer)
    if not len(pairs):
        raise ValueError("pairs is empty: give at least one pair")
    earlier: dict[tuple, str] = {}
    for index, pair in enumerate(pairs):
        name = _name(index, pair)
        prompt, chosen, rejected = (_said(pair, side, name) for side in _SIDES)
        for side, answer in (("chosen", chosen), ("rejected", rejected)):
            if not answer[-1][1]:
                raise ValueError(f"{name}: the {side} answer is empty; write it or leave it out")
        if chosen == rejected:
            raise ValueError(
                f"{name} is a tie: chosen and rejected are both {chosen[-1][1]!r}; a pair must "
                "prefer something, so change one or leave the pair out"
            )
        if (prompt, chosen, rejected) in earlier:
            raise ValueError(
                f"{name} repeats {earlier[prompt, chosen, rejected]}; keep one of the two"
            )
        if (prompt, rejected, chosen) in earlier:
            raise ValueError(
                f"{name} contradicts {earlier[prompt, rejected, chosen]}, which prefers the other "
                "answer; decide on one"
            )
        earlier[prompt, chosen, rejected] = name
    for side in ("chosen", "rejected"):
        for index, (prompt, answer) in enumerate(_encode(pairs, tokenizer, side)):
            length = len(prompt) + len(answer)
            if length > max_length:
                raise ValueError(
                    f"{_name(index, pairs[index])}: prompt and {side} answer have {length} tokens, "
                    f"max_length={max_length}; shorten the pair, leave it out or raise max_length"
                )


def pair_report(pairs: Sequence[dict], tokenizer) -> PairReport:
    """Lengths of the answers and how far apart they are, for all pairs and for each reason.

    Raises:
        ValueError: as `pair_batch`.
    """
    if not len(pairs):
        raise ValueError("pairs is empty: give at least one pair")
    measured = list(
        zip(
            [len(answer) for _, answer in _encode(pairs, tokenizer, "chosen")],
            [len(answer) for _, answer in _encode(pairs, tokenizer, "rejected")],
            edit_distances(pairs, tokenizer),
            strict=True,
        )
    )
    groups = defaultdict(list)
    for pair, numbers in zip(pairs, measured, strict=True):
        groups[pair.get("reason") or "no reason given"].append(numbers)
    most_frequent_first = sorted(groups.items(), key=lambda group: -len(group[1]))
    return _report(measured, {reason: _report(some) for reason, some in most_frequent_first})


def edit_distances(pairs: Sequence[dict], tokenizer) -> list[int]:
    """Tokens to insert, delete or replace to turn each chosen answer into its rejected one."""
    chosen, rejected = (_encode(pairs, tokenizer, side) for side in ("chosen", "rejected"))
    return [edit_distance(c, r) for (_, c), (_, r) in zip(chosen, rejected, strict=True)]


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Fewest insertions, deletions and replacements that turn `a` into `b` (Levenshtein 1966).

    >>> edit_distance("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))  # row[j]: distance of what was read of a to b[:j]
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            cheapest = min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
            diagonal, row[j] = row[j], cheapest
    return row[-1]


# ---- the model while it is trained ---------------------------------------------------------------


def watch(
    model,
    tokenizer,
    pairs: Sequence[dict],
    reference=None,
    beta: float = 0.1,
    batch_size: int = 32,
) -> Watch:
    """Margin, absolute log-probabilities, KL and loss of a model on pairs, held out ones best.

    Args:
        reference: the model that DPO starts from; None is `model` with its PEFT adapter switched
            off.
        beta: of the loss; nothing else depends on it.
        batch_size: pairs in one forward pass.

    Raises:
        ValueError: no pairs, beta not above 0, no reference, or one of another vocabulary.
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be above 0; the paper takes 0.1")
    pairs = list(pairs)
    batches = []
    for start in range(0, max(len(pairs), 1), batch_size):
        input_ids, labels = pair_batch(pairs[start : start + batch_size], tokenizer)
        compared = _compare(model, reference, input_ids, labels)
        batches.append(compared.unflatten(1, (2, -1)))
    # Each (2, n): the chosen answers' row above the rejected ones'.
    now, before, kl, tokens = torch.cat(batches, dim=2)
    margins = (now - before)[0] - (now - before)[1]
    (chosen, rejected), (old_chosen, old_rejected) = (
        (logps.sum(dim=1) / tokens.sum(dim=1)).tolist() for logps in (now, before)
    )
    return Watch(
        n=len(pairs),
        beta=beta,
        loss=-logsigmoid(beta * margins).mean().item(),
        margin=margins.mean().item(),
        accuracy=(margins > 0).double().mean().item(),
        ranking_accuracy=(now[0] > now[1]).double().mean().item(),
        chosen_logp=chosen,
        rejected_logp=rejected,
        chosen_change=chosen - old_chosen,
        rejected_change=rejected - old_rejected,
        kl=(kl.sum() / tokens.sum()).item(),
    )


def sampled_kl(
    model,
    tokenizer,
    prompts: Sequence[list[dict]],
    reference=None,
    seed: int = 0,
    max_new_tokens: int = 24,
    batch_size: int = 32,
) -> float:
    """KL(model || reference) in nats per token, on one answer of the model's own to each prompt.

    At each sampled token the sum over the vocabulary is exact, which varies less than the log-ratio
    of the sampled token alone (Amini et al. 2025, arXiv:2504.10637). An answer that was cut off
    counts as if it had ended there.

    Raises:
        ValueError: as `generate_answers`, or as `watch`.
    """
    answers = generate_answers(
        model, tokenizer, prompts, max_new_tokens, batch_size, do_sample=True, seed=seed
    )
    talks = [
        {"prompt": prompt, "answer": [{"role": "assistant", "content": answer.text}]}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    kl, tokens = 0.0, 0.0
    for start in range(0, len(talks), batch_size):
        rows = _encode(talks[start : start + batch_size], tokenizer, "answer")
        _, _, kls, lengths = _compare(model, reference, *_pad_right(rows, tokenizer))
        kl, tokens = kl + kls.sum().item(), tokens + lengths.sum().item()
    return kl / tokens


def alarms(
    watched: Watch,
    lengths: tuple[float, float] | None = None,
    general: tuple[float, float] | None = None,
) -> list[str]:
    """What to worry about, a sentence each; an empty list when nothing is wrong.

    Args:
        watched: what `watch` measured, on held-out pairs.
        lengths: mean tokens of the model's answers before and now.
        general: general score in 0..1 before and now.

    Raises:
        ValueError: a length that is not above 0.
    """
    found = []
    change = watched.chosen_change
    if change < -CHOSEN_FALL:
        found.append(
            f"The right answers lost ≈{-change:.2f} nats per token, more than {CHOSEN_FALL}: lower "
            "the rate, train for fewer steps, or add the SFT loss on the chosen answers."
        )
    if watched.margin > 0 and change < -_NOISE:
        found.append(
            f"The margin rose to ≈{watched.margin:.2f} nats while the right answers became less "
            "likely: the model moves away from both answers, and a margin does not show it."
        )
    if lengths is not None:
        before, now = lengths
        if not (before > 0 and now > 0):
            raise ValueError(f"lengths={lengths} must be mean tokens above 0, before and now")
        if abs(now / before - 1) > LENGTH_DRIFT:
            way = "longer" if now > before else "shorter"
            found.append(
                f"Answers became {way}, from ≈{before:.1f} to ≈{now:.1f} tokens: read some, and "
                "compare the lengths of chosen and rejected answers."
            )
    if general is not None:
        before, now = general
        if before - now > GENERAL_FALL:
            found.append(
                f"The general score fell from ≈{before:.2f} to ≈{now:.2f}: lower the rate, raise "
                "beta, or mix in general data."
            )
    return found


# ---- tokens --------------------------------------------------------------------------------------

_SIDES = ("prompt", "chosen", "rejected")


def _name(index: int, pair: dict) -> str:
    return f"pair {index} (id {pair.get('id')!r})"


def _said(pair: dict, side: str, name: str) -> tuple[tuple[str, str], ...]:
    """(role, text) of each message of one side, outer spaces left out."""
    messages = pair.get(side)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name}: {side} must be a list of messages, got {messages!r}")
    return tuple((message["role"], message["content"].strip()) for message in messages)


def _encode(pairs: Sequence[dict], tokenizer, side: str) -> list[tuple[list[int], list[int]]]:
    """Ids of each prompt and of its answer, all that the template writes after it included."""
    prompts = [pair["prompt"] for pair in pairs]
    wholes = [pair["prompt"] + pair[side] for pair in pairs]
    encoded = []
    for index, (prompt, whole) in enumerate(
        zip(_render(tokenizer, prompts, True), _render(tokenizer, wholes, False), strict=True)
    ):
        if whole[: len(prompt)] != prompt:
            raise ValueError(
                f"{_name(index, pairs[index])}: the chat template renders the prompt differently "
                "once the answer follows; use one whose generation prompt is how an answer begins"
            )
        encoded.append((prompt, whole[len(prompt) :]))
    return encoded


def _render(tokenizer, conversations: list, add_generation_prompt: bool) -> list[list[int]]:
    if tokenizer.chat_template is None:
        raise ValueError(
            "tokenizer has no chat template: load it with labkit.models.load, which attaches one"
        )
    return tokenizer.apply_chat_template(
        conversations, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )["input_ids"]


def _pad_right(rows: list[tuple[list[int], list[int]]], tokenizer) -> tuple[Tensor, Tensor]:
    """(rows, width) input_ids and labels of prompts and answers."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    # What fills the batch never matters: a causal model does not look to the right.
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    input_ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), IGNORE_INDEX)
    for row, (prompt, answer) in enumerate(rows):
        start, stop = len(prompt), len(prompt) + len(answer)
        input_ids[row, :stop] = torch.tensor(prompt + answer)
        labels[row, start:stop] = torch.tensor(answer)
    return input_ids, labels


def _report(measured: list[tuple[int, int, int]], by_reason: dict | None = None) -> PairReport:
    """Means over (chosen tokens, rejected tokens, edit distance) of some pairs."""
    n = len(measured)
    chosen, rejected, distances = zip(*measured, strict=True)
    return PairReport(
        n=n,
        chosen_tokens=sum(chosen) / n,
        rejected_tokens=sum(rejected) / n,
        chosen_longer=sum(c > r for c, r, _ in measured) / n,
        rejected_longer=sum(r > c for c, r, _ in measured) / n,
        edit_distance=sum(distances) / n,
        by_reason=by_reason or {},
    )


# ---- models --------------------------------------------------------------------------------------


def _check_models(tokenizer, max_length: int, model, reference, reference_tokenizer) -> None:
    window = getattr(getattr(model, "config", None), "max_position_embeddings", math.inf)
    if max_length > window:
        raise ValueError(f"max_length={max_length} is more than the {window} tokens model can read")
    if model is not None and reference is not None:
        own, other = (each.get_input_embeddings().num_embeddings for each in (model, reference))
        if own != other:
            raise ValueError(_other_vocabulary(own, other))
    if reference_tokenizer is not None:
        own, other = tokenizer.get_vocab(), reference_tokenizer.get_vocab()
        differing = sorted(
            token for token in own.keys() | other.keys() if own.get(token) != other.get(token)
        )
        if differing:
            raise ValueError(
                f"reference_tokenizer gives {len(differing)} tokens another id than tokenizer, "
                f"such as {differing[0]!r}: the reference must be a model of the same vocabulary"
            )


def _other_vocabulary(own: int, other: int) -> str:
    return (
        f"reference has a vocabulary of {other} tokens, model one of {own}: their probabilities "
        "cannot be compared; take the model that training starts from as the reference"
    )


@contextmanager
def _reference_of(model, reference) -> Iterator:
    """The reference, ready to be called: another model, or this one without its adapter."""
    if reference is not None:
        with evaluating(reference):
            yield reference
    elif hasattr(model, "disable_adapter"):
        with model.disable_adapter(), evaluating(model):
            yield model
    else:
        raise ValueError(
            "reference is None, but model has no adapter to switch off: pass the model that "
            "training starts from"
        )


def _compare(model, reference, input_ids: Tensor, labels: Tensor) -> Tensor:
    """(4, rows) float64: log-probability now and in the reference, KL, number of answer tokens."""
    device = next(model.parameters()).device
    input_ids, labels = input_ids.to(device), labels.to(device)
    width = input_ids.shape[1]
    # A trained prompt's own tokens come first in the logits; they answer nothing.
    with evaluating(model):
        now = model(input_ids=input_ids, use_cache=False).logits[:, -width:]
    with _reference_of(model, reference) as other:
        before = other(input_ids=input_ids, use_cache=False).logits[:, -width:]
    if now.shape != before.shape:
        raise ValueError(_other_vocabulary(now.shape[-1], before.shape[-1]))
    answers = labels[:, 1:] != IGNORE_INDEX
    log_p, log_q = (logits[:, :-1][answers].float().log_softmax(dim=-1) for logits in (now, before))
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    logps = completion_logps(now, labels), completion_logps(before, labels)
    return torch.stack([*logps, _sum_rows(kl, answers), answers.sum(dim=1)]).double().cpu()


def _sum_rows(values: Tensor, where: Tensor) -> Tensor:
    """(rows,) sums of `values`, which hold one number for each True of `where`, row by row."""
    rows = where.nonzero()[:, 0]
    return values.new_zeros(len(where)).index_add(0, rows, values)
