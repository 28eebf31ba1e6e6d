"""What can be wrong with a file of training rows: the codes, what each means, how bad it is."""

from dataclasses import dataclass

# An error breaks the training or makes it learn something else than the file says. A warning is
# very likely a mistake, and a person decides. `labkit validate` shows both and exits 1 on either.
CODES: dict[str, tuple[str, str]] = {
    "bom": ("warning", "the file starts with a byte order mark, which many readers refuse"),
    "not-utf8": ("error", "the bytes are not UTF-8"),
    "empty-file": ("error", "the file holds no rows"),
    "not-json": ("error", "the line is not one JSON value"),
    "not-csv": ("error", "quotes are left open, or a row has more or fewer values than columns"),
    "unknown-format": ("error", "the fields fit none of the accepted formats"),
    "mixed-formats": ("warning", "the row has another format than most rows of the file"),
    "missing-field": ("error", "a field that the format needs is missing or null"),
    "wrong-type": ("error", "a field holds something else than text, or than a list of messages"),
    "unknown-role": ("error", "a message is by someone else than system, user or assistant"),
    "no-assistant": ("error", "no message is by the assistant, so there is nothing to learn"),
    "role-order": ("error", "user and assistant do not alternate from a user to an assistant"),
    "system-not-first": ("error", "a system message stands after another message"),
    "empty-answer": ("error", "an assistant message is blank"),
    "empty-prompt": ("error", "a user or system message is blank"),
    "identical-pair": ("error", "chosen and rejected are the same, so the pair prefers nothing"),
    "special-token": ("error", "the text holds a token that belongs to a chat template"),
    "template-error": ("error", "the tokenizer's chat template refuses the row"),
    "too-long": ("error", "the row has more tokens than max_tokens and would be cut"),
    "nothing-supervised": ("error", "no token of the row would be learned from"),
    "leak": ("error", "the row's key also stands in an earlier split"),
    "duplicate": ("warning", "an earlier row has the same prompt and answer"),
    "conflicting-answers": ("warning", "the same prompt is answered in different ways"),
    "placeholder": ("warning", "the text still holds a gap to fill in"),
    "control-chars": ("warning", "the text holds invisible control characters"),
    "mojibake": ("warning", "the text was decoded with the wrong encoding"),
    "whitespace": ("warning", "a text starts or ends with white space, or has Windows line ends"),
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one row, or with the whole file."""

    line: int
    """Line of the file where the row starts, counted from 1; problems of the file stand at 1."""
    code: str
    """One of `CODES`."""
    message: str
    """One line: the field, what was found, and what to do."""
    severity: str
    """"error" or "warning"."""


def problem(line: int, code: str, message: str) -> Problem:
    """Problem with the severity that `CODES` gives its code."""
    return Problem(line, code, message, CODES[code][0])


def quote(value: object, limit: int = 40) -> str:
    """`value` as one short printable line, in quotes; `repr` escapes what cannot be printed."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 4] + "..." + text[-1]
