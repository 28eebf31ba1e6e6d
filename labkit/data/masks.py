"""Rows as the model sees them: token ids, and which of them the loss learns from."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from labkit.chat_templates import has_generation_markers
from labkit.data.formats import to_messages
from labkit.data.problems import quote
from labkit.data.rows import Row, Rows

if TYPE_CHECKING:
    import pandas

_BATCH = 1000
# Supervised tokens differ in colour and in weight and underline, so that no one depends on colour.
_STYLE = {
    True: "background:#0072B2;color:#fff;font-weight:bold;text-decoration:underline",
    False: "background:#E8E8E8;color:#333",
}


@dataclass(frozen=True)
class Tokens:
    """One rendered row."""

    ids: list[int]
    supervised: list[bool]
    """True where a token enters the loss; as long as `ids`."""


@dataclass(frozen=True)
class MaskView:
    """A row's tokens with its loss mask, for reading; a notebook shows it in colour."""

    tokens: list[tuple[int, str, bool]]
    """Id, text, and whether the loss learns from it."""

    @property
    def n_supervised(self) -> int:
        """Number of tokens that the loss learns from."""
        return sum(supervised for *_, supervised in self.tokens)

    def text(self) -> str:
        """A plain table, one line a token."""
        lines = [self._summary(), "position     id  learned  token"]
        for position, (token_id, text, supervised) in enumerate(self.tokens):
            mark = "yes" if supervised else "-"
            lines.append(f"{position:8}  {token_id:5}  {mark:7}  {text!r}")
        return "\n".join(lines)

    def _summary(self) -> str:
        return f"{len(self.tokens)} tokens, {self.n_supervised} of them learned"

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        spans = "".join(
            f'<span style="{_STYLE[supervised]};padding:1px;margin:1px;border-radius:2px" '
            f'title="id {token_id}{", learned" if supervised else ""}">{_visible(text)}</span>'
            for token_id, text, supervised in self.tokens
        )
        legend = f"{self._summary()} (underlined on blue)"
        style = "font-family:monospace;line-height:1.9;white-space:pre-wrap"
        return f'<div style="{style}">{spans}<br>{legend}</div>'


def mask_view(tokenizer: PreTrainedTokenizerBase, row: Row) -> MaskView:
    """Tokens of a row and which of them TRL's SFTTrainer learns from.

    Of `messages`, the spans that the template marks (`assistant_only_loss=True`); of
    conversational `prompt` and `completion`, the completion (`completion_only_loss`, its default).
    Other formats are turned into messages first.

    Raises:
        ValueError: no chat template, or `messages` and a template without generation markers; a
            preference, which has two answers.
    """
    if row.get("chosen") is not None:
        raise ValueError(
            f"row {quote(row)} is a preference with two answers; "
            "show one of them, for instance data.to_messages(row) for the chosen one"
        )
    tokens = encode(tokenizer, [row])[0]
    texts = [_token_text(tokenizer, token_id) for token_id in tokens.ids]
    return MaskView(list(zip(tokens.ids, texts, tokens.supervised, strict=True)))


def token_lengths(tokenizer: PreTrainedTokenizerBase, dataset: Rows) -> "pandas.DataFrame":
    """Tokens of each row: `prompt` up to where the last answer starts, `completion`, `total`.

    Raises:
        ValueError: no chat template, or a row that has no conversation.
    """
    import pandas

    encoded = _encode_pairs(tokenizer, [_prompt_and_completion(row) for row in dataset])
    frame = pandas.DataFrame(
        {
            "completion": [sum(tokens.supervised) for tokens in encoded],
            "total": [len(tokens.ids) for tokens in encoded],
        },
        dtype="int64",
    )
    frame.insert(0, "prompt", frame["total"] - frame["completion"])
    return frame


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any]) -> list[Tokens]:
    """Token ids and loss mask of rows that are all `messages` or all `prompt`/`completion`."""
    if rows and _is_prompt_completion(rows[0]):
        return _encode_pairs(tokenizer, [(row["prompt"], row["completion"]) for row in rows])
    if not has_generation_markers(chat_template(tokenizer)):
        raise ValueError(
            "the chat template has no {% generation %} markers, so answer tokens cannot be told "
            "from prompt tokens; use models.with_generation_markers(tokenizer), "
            "or data.to_prompt_completion(rows)"
        )
    encoded = []
    for batch in _batches([_messages(row) for row in rows]):
        rendered = _render(tokenizer, batch, return_assistant_tokens_mask=True)
        for ids, mask in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True):
            encoded.append(Tokens(ids, [bool(bit) for bit in mask]))
    return encoded


def _encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[list[dict], list[dict]]]
) -> list[Tokens]:
    """As TRL does it: the completion starts where the prompt alone and the whole row diverge."""
    chat_template(tokenizer)
    encoded = []
    for batch in _batches(pairs):
        prompts = [prompt for prompt, _ in batch]
        rows = [prompt + completion for prompt, completion in batch]
        prompt_ids = _render(tokenizer, prompts, add_generation_prompt=True)["input_ids"]
        row_ids = _render(tokenizer, rows)["input_ids"]
        for prompt, ids in zip(prompt_ids, row_ids, strict=True):
            shared = _common_length(prompt, ids)
            encoded.append(Tokens(ids, [position >= shared for position in range(len(ids))]))
    return encoded


def _render(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict]], **options: Any
) -> Any:
    """Lists of token ids under "input_ids", and of 0 and 1 under "assistant_masks" if asked for."""
    return tokenizer.apply_chat_template(conversations, return_dict=True, **options)


def _common_length(a: list[int], b: list[int]) -> int:
    for position, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return position
    return min(len(a), len(b))


def _batches(rows: list) -> Iterator[list]:
    return (rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH))


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template; a ValueError when it has none."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template; set tokenizer.chat_template = "
            "labkit.chat_templates.MINIMAL_CHAT_TEMPLATE, or load it with models.load"
        )
    return tokenizer.get_chat_template()


def _is_prompt_completion(row: Row) -> bool:
    """Whether TRL would take the row as it is; plain texts become messages instead."""
    lists = (isinstance(row.get(name), list) for name in ("prompt", "completion"))
    return row.get("messages") is None and all(lists)


def _messages(row: Row) -> list[dict]:
    if row.get("messages") is not None:
        return row["messages"]
    return to_messages({name: value for name, value in row.items() if value is not None})[
        "messages"
    ]


def _prompt_and_completion(row: Row) -> tuple[list[dict], list[dict]]:
    if _is_prompt_completion(row):
        return row["prompt"], row["completion"]
    messages = _messages(row)
    return messages[:-1], messages[-1:]


def _token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """What a token writes; one that is part of a character shows its name in the vocabulary."""
    name = str(tokenizer.convert_ids_to_tokens(token_id))
    if name.startswith("▁"):  # decoding it alone would lose the space it stands for
        return " " + name[1:]
    text = str(tokenizer.decode([token_id]))
    return name if "\ufffd" in text else text


def _visible(text: str) -> str:
    return html.escape(text).replace("\n", "↵\n") or "∅"
