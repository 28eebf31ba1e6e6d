"""Row formats: which one a row has, and the conversation in it.

| format            | fields                                                                  |
|-------------------|-------------------------------------------------------------------------|
| messages          | `messages`: list of `{"role", "content"}`                               |
| sharegpt          | `conversations`: list of `{"from": human or gpt, "value"}`, `system`    |
| alpaca            | `instruction`, `output`, and perhaps `input`, `system`, `history`       |
| prompt/completion | `prompt`, `completion`: both text, or both lists of messages            |
| preference        | `chosen`, `rejected`, and `prompt`, or the prompt at the start of both  |
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from labkit.data.problems import quote
from labkit.data.rows import Row

# Fields of each format, the deciding ones first. Preference stands before messages because public
# preference sets often carry a `messages` column besides.
FIELDS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected", "prompt"),
    "messages": ("messages",),
    "sharegpt": ("conversations", "system"),
    "alpaca": ("instruction", "output", "input", "system", "history"),
    "prompt/completion": ("completion", "prompt"),
}
_DECIDING = {
    "preference": {"chosen", "rejected"},
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "alpaca": {"instruction", "output"},
    "prompt/completion": {"prompt", "completion"},
}
_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = _ROLES | {"human": "user", "gpt": "assistant"}


class Turn(NamedTuple):
    """One message and the field it came from."""

    role: str
    content: str
    where: str


class Fault(NamedTuple):
    """A problem that has no line yet."""

    code: str
    message: str


@dataclass(slots=True)
class Conversation:
    """What a row says: `prompt`, then `answer` (and, in a preference, what was `rejected`)."""

    format: str | None
    prompt: list[Turn] = field(default_factory=list)
    answer: list[Turn] = field(default_factory=list)
    rejected: list[Turn] | None = None
    faults: list[Fault] = field(default_factory=list)


def detect_format(row: Row) -> str | None:
    """Name of the row's format, or None; a field that holds null counts only if no other does."""
    filled = {name for name, value in row.items() if value is not None}
    for names in (filled, set(row)):
        for format_name, deciding in _DECIDING.items():
            if names & deciding:
                return format_name
    return None


def to_messages(row: Row) -> Row:
    """The row with its conversation under `messages`; the other fields stay as they are.

    An alpaca `input` follows its `instruction` on a new line. A preference keeps its chosen answer.

    Raises:
        ValueError: the row has none of the accepted formats, or a field of the wrong type.
    """
    conversation = parse(row)
    if conversation.faults:
        code, message = conversation.faults[0]
        raise ValueError(f"row {quote(row)}: {code}: {message}")
    consumed = FIELDS[conversation.format or ""]
    turns = conversation.prompt + conversation.answer
    rest = {name: value for name, value in row.items() if name not in consumed}
    return rest | {"messages": [{"role": turn.role, "content": turn.content} for turn in turns]}


def parse(row: object) -> Conversation:
    """The conversation in a row of any format; what is wrong with its shape stands in `faults`."""
    if not isinstance(row, dict):
        kind = type(row).__name__
        return Conversation(
            None, faults=[Fault("wrong-type", f"a row must be an object, got {kind} {quote(row)}")]
        )
    found = Conversation(detect_format(row))
    if found.format is None:
        fields = ", ".join(map(str, row)) or "none"
        found.faults.append(
            Fault("unknown-format", f"found the fields {quote(fields, 80)}; {_ACCEPTED}")
        )
        return found
    _PARSERS[found.format](row, found)
    return found


_ACCEPTED = (
    "use messages, conversations, instruction + output, prompt + completion, "
    "or prompt + chosen + rejected"
)


def _parse_messages(row: Row, found: Conversation) -> None:
    turns = _turns(row, "messages", found)
    found.prompt, found.answer = turns[:-1], turns[-1:]


def _parse_sharegpt(row: Row, found: Conversation) -> None:
    turns = _turns(row, "conversations", found, "from", "value", _SHAREGPT_ROLES)
    turns = _system(row, found) + turns
    found.prompt, found.answer = turns[:-1], turns[-1:]


def _parse_alpaca(row: Row, found: Conversation) -> None:
    instruction, output = _text(row, "instruction", found), _text(row, "output", found)
    context = _text(row, "input", found, required=False)
    question = "\n".join(part for part in (instruction, context) if part)
    found.prompt = _system(row, found) + _history(row, found)
    found.prompt.append(Turn("user", question, "instruction"))
    found.answer = [Turn("assistant", output, "output")]


def _parse_prompt_completion(row: Row, found: Conversation) -> None:
    found.prompt = _text_or_turns(row, "prompt", "user", found)
    found.answer = _text_or_turns(row, "completion", "assistant", found)


def _parse_preference(row: Row, found: Conversation) -> None:
    found.answer = _text_or_turns(row, "chosen", "assistant", found)
    found.rejected = _text_or_turns(row, "rejected", "assistant", found)
    if _starts_with_prompt(found.answer) and _starts_with_prompt(found.rejected):
        shared = _shared_length(found.answer, found.rejected)
        found.prompt = found.answer[:shared]
        found.answer, found.rejected = found.answer[shared:], found.rejected[shared:]
        if any(turn.role != "assistant" for turn in found.answer + found.rejected):
            message = "chosen and rejected part before the last answer; give both the same prompt"
            found.faults.append(Fault("role-order", message))
    else:
        found.prompt = _text_or_turns(row, "prompt", "user", found)


_PARSERS: dict[str, Callable[[Row, Conversation], None]] = {
    "messages": _parse_messages,
    "sharegpt": _parse_sharegpt,
    "alpaca": _parse_alpaca,
    "prompt/completion": _parse_prompt_completion,
    "preference": _parse_preference,
}


def _starts_with_prompt(turns: list[Turn]) -> bool:
    return bool(turns) and turns[0].role != "assistant"


def _shared_length(a: list[Turn], b: list[Turn]) -> int:
    """Number of messages that both start with, never the last one, which is the answer."""
    length = 0
    for left, right in zip(a[:-1], b[:-1], strict=False):
        if left[:2] != right[:2]:
            break
        length += 1
    return length


def _system(row: Row, found: Conversation) -> list[Turn]:
    text = _text(row, "system", found, required=False)
    return [Turn("system", text, "system")] if text else []


def _history(row: Row, found: Conversation) -> list[Turn]:
    """Earlier turns of an alpaca row: a list of [question, answer] pairs."""
    turns = []
    pairs = row.get("history") or []
    for index, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
        where = f"history[{index}]"
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            found.faults.append(
                Fault("wrong-type", f"{where} must be [question, answer], got {quote(pair)}")
            )
            continue
        turns += [Turn("user", pair[0], where), Turn("assistant", pair[1], where)]
    return turns


def _text(row: Row, name: str, found: Conversation, required: bool = True) -> str:
    value = row.get(name)
    if value is None:
        if required:
            found.faults.append(Fault("missing-field", f"{name} is missing; add it as a text"))
        return ""
    if not isinstance(value, str):
        found.faults.append(Fault("wrong-type", _not_a_text(name, value)))
        return ""
    return value


def _not_a_text(where: str, value: object) -> str:
    return f"{where} must be a text, got {type(value).__name__} {quote(value)}; put it in quotes"


def _text_or_turns(row: Row, name: str, role: str, found: Conversation) -> list[Turn]:
    """A list of messages, or one text as one message by `role`.

    A plain prompt and its completion are often joined by a space at the seam; it belongs to
    neither of them once they are messages.
    """
    value = row.get(name)
    if isinstance(value, list):
        return _turns(row, name, found)
    text = _text(row, name, found)
    text = text.removesuffix(" ") if role == "user" else text.removeprefix(" ")
    return [Turn(role, text, name)]


def _turns(
    row: Row,
    name: str,
    found: Conversation,
    role_field: str = "role",
    text_field: str = "content",
    roles: dict[str, str] = _ROLES,
) -> list[Turn]:
    """The messages of a list; whatever is no message is a fault."""
    value = row.get(name)
    if value is None:
        found.faults.append(Fault("missing-field", f"{name} is missing; add a list of messages"))
        return []
    if not isinstance(value, list):
        message = f"{name} must be a list of messages, got {type(value).__name__} {quote(value)}"
        found.faults.append(Fault("wrong-type", message))
        return []
    turns = []
    for index, message in enumerate(value):
        turn = _turn(message, f"{name}[{index}]", found, role_field, text_field, roles)
        if turn is not None:
            turns.append(turn)
    return turns


def _turn(
    message: Any,
    where: str,
    found: Conversation,
    role_field: str,
    text_field: str,
    roles: dict[str, str],
) -> Turn | None:
    if not isinstance(message, dict):
        text = f"{where} must be an object with {role_field} and {text_field}, got {quote(message)}"
        found.faults.append(Fault("wrong-type", text))
        return None
    role, content = message.get(role_field), message.get(text_field)
    for name, value in ((role_field, role), (text_field, content)):
        if value is None:
            found.faults.append(Fault("missing-field", f"{where}.{name} is missing; add it"))
            return None
    if not isinstance(content, str):
        found.faults.append(Fault("wrong-type", _not_a_text(f"{where}.{text_field}", content)))
        return None
    if not isinstance(role, str) or role not in roles:
        text = f"{where}.{role_field} is {quote(role)}; use one of {', '.join(roles)}"
        found.faults.append(Fault("unknown-role", text))
        return None
    return Turn(roles[role], content, f"{where}.{text_field}")


def texts_of(row: Row, format_name: str) -> list[tuple[str, str]]:
    """Every text that a model would read, with the field it stands in."""
    found: list[tuple[str, str]] = []

    def note(where: str, text: str) -> str:
        found.append((where, text))
        return text

    map_texts(row, format_name, note)
    return found


def map_texts(row: Row, format_name: str, change: Callable[[str, str], str]) -> Row:
    """The row with `change(where, text)` in place of every text that a model would read."""
    changed = dict(row)
    for name in FIELDS[format_name]:
        if name in row:
            changed[name] = _map_value(row[name], name, change)
    return changed


def _map_value(value: Any, where: str, change: Callable[[str, str], str]) -> Any:
    if isinstance(value, str):
        return change(where, value)
    if isinstance(value, list):
        return [_map_value(item, f"{where}[{i}]", change) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {
            name: _map_value(item, f"{where}.{name}", change)
            if name in ("content", "value")
            else item
            for name, item in value.items()
        }
    return value
