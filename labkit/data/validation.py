"""What is wrong with a file of training rows, line by line."""

import contextlib
import gc
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from labkit.data.formats import Conversation, Fault, Turn, parse, texts_of
from labkit.data.problems import Problem, problem
from labkit.data.rows import Record, Row, read_records
from labkit.data.texts import text_faults

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPAIRABLE = {"whitespace"}


class Said(NamedTuple):
    """What makes two rows the same: one text for all of the prompt, and one for each answer."""

    prompt: str
    answer: str
    rejected: str | None


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """One row of a file and everything that is wrong with it."""

    record: Record
    format: str | None
    said: Said | None
    """None where the row holds no conversation."""
    problems: list[Problem]

    @property
    def refused(self) -> bool:
        """Whether `fix` must leave the row out because a person has to decide."""
        return any(found.code not in _REPAIRABLE for found in self.problems)

    def note(self, code: str, message: str) -> None:
        """Add a problem of this row."""
        self.problems.append(problem(self.record.line, code, message))


def validate(
    path: str | os.PathLike,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_tokens: int | None = None,
) -> list[Problem]:
    """Every problem of a file of training rows, in line order; an empty list when it is clean.

    Args:
        path: .jsonl, .json or .csv; each row alpaca, sharegpt, messages, prompt/completion or
            preference.
        tokenizer: also renders each row with its chat template, and finds rows that the template
            refuses, that teach nothing, or that are too long.
        max_tokens: longest row allowed, in tokens; needs a tokenizer.

    Raises:
        LabkitError: the file cannot be read.
        ValueError: `max_tokens` without a tokenizer, or below 1.
    """
    problems, rows = check_file(path, tokenizer, max_tokens)
    return sorted([*problems, *(p for row in rows for p in row.problems)], key=lambda p: p.line)


def check_file(
    path: str | os.PathLike,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_tokens: int | None = None,
) -> tuple[list[Problem], list[CheckedRow]]:
    """Problems of the file as a whole, and each of its rows with its own problems."""
    if max_tokens is not None and (tokenizer is None or max_tokens < 1):
        raise ValueError(
            f"max_tokens={max_tokens} needs a tokenizer and must be at least 1; pass tokenizer="
        )
    from tqdm.auto import tqdm

    with _without_collections():
        found = read_records(path)
        records = tqdm(found.records, "checked", delay=2, unit=" rows", leave=False, disable=None)
        rows = [_check_row(record, tokenizer, max_tokens) for record in records]
        _find_mixed_formats(rows)
        _find_repeats(rows)
    return found.problems, rows


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collection inside: rows make no cycles, and looking for some among 100,000 rows,
    again and again, takes a quarter of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _check_row(
    record: Record, tokenizer: "PreTrainedTokenizerBase | None", max_tokens: int | None
) -> CheckedRow:
    if record.problem is not None:
        return CheckedRow(record, None, None, [record.problem])
    conversation = parse(record.row)
    if conversation.faults:
        row = CheckedRow(record, conversation.format, None, [])
        faults = conversation.faults
    else:
        row = CheckedRow(record, conversation.format, _said(conversation), [])
        faults = [*_role_faults(conversation), *_content_faults(record.row, conversation)]
    if tokenizer is not None and not faults:
        faults += _token_faults(conversation, tokenizer, max_tokens)
    for fault in dict.fromkeys(faults):  # what is wrong with a shared prompt is found twice
        row.note(*fault)
    return row


def _said(conversation: Conversation) -> Said:
    rejected = conversation.rejected
    return Said(
        identity(conversation.prompt),
        identity(conversation.answer),
        None if rejected is None else identity(rejected),
    )


def identity(turns: Iterable[Turn]) -> str:
    """One text for a conversation: who says what, white space at the ends left out."""
    return "\0".join(f"{turn.role}\0{turn.content.strip()}" for turn in turns)


def _role_faults(conversation: Conversation) -> Iterator[Fault]:
    yield from _turn_faults(conversation.prompt + conversation.answer)
    if conversation.rejected is not None:
        yield from _turn_faults(conversation.prompt + conversation.rejected)


def _turn_faults(turns: list[Turn]) -> Iterator[Fault]:
    """Faults in who speaks when: an optional system message, then user and assistant in turn."""
    for turn in turns[1:]:
        if turn.role == "system":
            message = f"{turn.where} is a system message; move it to the start"
            yield Fault("system-not-first", message)
    spoken = [turn for turn in turns if turn.role != "system"]
    if not any(turn.role == "assistant" for turn in spoken):
        yield Fault("no-assistant", "no message is by the assistant; add the answer to learn")
        return
    expected = "user"
    for turn in spoken:
        if turn.role != expected:
            message = f"{turn.where} is by the {turn.role}, expected the {expected}"
            yield Fault("role-order", f"{message}; user and assistant must alternate")
            return
        expected = "assistant" if expected == "user" else "user"
    if spoken[-1].role == "user":
        message = f"{spoken[-1].where} is by the user and has no answer; add one or remove it"
        yield Fault("role-order", message)


def _content_faults(row: Row, conversation: Conversation) -> Iterator[Fault]:
    """Faults in what is said: blank messages, equal pairs, and damage inside a text."""
    answers = conversation.answer + (conversation.rejected or [])
    for turn in conversation.prompt + answers:
        if not turn.content.strip():
            code = "empty-answer" if turn.role == "assistant" else "empty-prompt"
            yield Fault(code, f"{turn.where} is blank; write it or remove the row")
    if conversation.rejected is not None:
        if identity(conversation.answer) == identity(conversation.rejected):
            yield Fault("identical-pair", "chosen and rejected are the same; change one of them")
    for where, text in texts_of(row, conversation.format or ""):
        yield from text_faults(where, text)


def _find_mixed_formats(rows: list[CheckedRow]) -> None:
    counts = Counter(row.format for row in rows if row.format is not None)
    if len(counts) < 2:
        return
    usual = counts.most_common(1)[0][0]
    for row in rows:
        if row.format not in (None, usual):
            message = f"the row is {row.format}, most are {usual}; keep one format in a file"
            row.note("mixed-formats", message)


def _find_repeats(rows: list[CheckedRow]) -> None:
    """Rows that repeat an earlier one, and rows that contradict each other.

    A row that is refused for another reason takes no part, so that it is never the reason to
    refuse a healthy one.
    """
    by_prompt: dict[str, list[CheckedRow]] = {}
    for row in rows:
        if row.said and not row.refused:
            by_prompt.setdefault(row.said.prompt, []).append(row)
    for group in by_prompt.values():
        if len(group) > 1:
            said = [(row, row.said) for row in group if row.said is not None]
            _find_duplicates(said)
            _find_contradictions([pair for pair in said if pair[1].rejected is None])
            _find_reversals([pair for pair in said if pair[1].rejected is not None])


_Group = list[tuple[CheckedRow, Said]]  # rows with the same prompt


def _find_duplicates(group: _Group) -> None:
    first_line: dict[Said, int] = {}
    for row, said in group:
        first = first_line.setdefault(said, row.record.line)
        if first != row.record.line:
            message = f"line {first} has the same prompt and answer; keep one of them"
            row.note("duplicate", message)


def _find_contradictions(group: _Group) -> None:
    """Rows that give one prompt several answers: all of them, as nobody knows which is right."""
    first_line: dict[str, int] = {}
    for row, said in group:
        first_line.setdefault(said.answer, row.record.line)
    if len(first_line) < 2:
        return
    first, second = list(first_line.values())[:2]
    for row, said in group:
        other = second if first_line[said.answer] == first else first
        message = f"line {other} answers the same prompt differently; decide on one"
        row.note("conflicting-answers", message)


def _find_reversals(group: _Group) -> None:
    """Preferences of one answer over another that a row with the same prompt turns around.

    A ranking of several answers, cut into pairs, is usual in preference data and no conflict.
    """
    pairs = [(row, said) for row, said in group if said.answer != said.rejected]
    preferred = {(said.answer, said.rejected): row.record.line for row, said in reversed(pairs)}
    for row, said in pairs:
        other = preferred.get((said.rejected or "", said.answer))
        if other is not None:
            message = f"line {other} prefers the other way round; decide on one"
            row.note("conflicting-answers", message)


def _token_faults(
    conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", max_tokens: int | None
) -> Iterator[Fault]:
    from jinja2 import TemplateError

    from labkit.data.masks import encode

    for row in _as_trained(conversation, tokenizer):
        try:
            tokens = encode(tokenizer, [row])[0]
        except TemplateError as error:
            reason = " ".join(str(error).split())
            message = f"the chat template refuses the row ({reason}); change its messages"
            yield Fault("template-error", message)
            continue
        if max_tokens is not None and len(tokens.ids) > max_tokens:
            message = f"{len(tokens.ids)} tokens, allowed are {max_tokens}; shorten or split it"
            yield Fault("too-long", message)
        if not any(tokens.supervised[:max_tokens]):
            yield Fault("nothing-supervised", "no token would be learned from; see data.mask_view")


def _as_trained(
    conversation: Conversation, tokenizer: "PreTrainedTokenizerBase"
) -> list[dict[str, list]]:
    """The rows a trainer would make of it: every answer of a chat, or the last one of a pair."""
    from labkit.chat_templates import has_generation_markers
    from labkit.data.masks import chat_template

    prompt, answer = _messages(conversation.prompt), _messages(conversation.answer)
    if conversation.rejected is not None:
        rejected = _messages(conversation.rejected)
        return [{"prompt": prompt, "completion": words} for words in (answer, rejected)]
    marked = has_generation_markers(chat_template(tokenizer))
    if marked and conversation.format != "prompt/completion":
        return [{"messages": prompt + answer}]
    return [{"prompt": prompt, "completion": answer}]


def _messages(turns: list[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]
