"""Chat templates that say which tokens are the assistant's, so that a loss can be masked to them.

A template with `{% generation %}` markers around each answer lets `apply_chat_template` return a
mask of the assistant's tokens. Many published models ship a template without them; then TRL's
`assistant_only_loss=True` has nothing to go by.
"""

import json
import os
import re

from transformers import PreTrainedTokenizerBase

# ChatML in its smallest form. An answer ends with the tokenizer's own end token instead of
# <|im_end|>, so that generation stops without adding a token that nothing has trained.
MINIMAL_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def has_generation_markers(template: str | None) -> bool:
    """Whether a chat template marks the assistant's words with `{% generation %}`."""
    return template is not None and re.search(r"\{%-?\s*generation\b", template) is not None


def with_generation_markers(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer's chat template generation markers without changing a character of its text.

    A template that TRL knows is replaced by TRL's training version. Any other is taken apart by
    rendering probes: what stands before the first turn, around each role's words and before the
    next answer. Either result counts only if it renders every sample to the same text.

    Args:
        tokenizer: changed in place, as its `chat_template` decides what training sees.

    Returns:
        the same tokenizer.

    Raises:
        ValueError: no template, or no equivalent found (for example one that treats the last turn
            differently); nothing is changed then.
    """
    original = tokenizer.chat_template
    if isinstance(original, dict):  # named variants; the default is what training uses
        original = original["default"]
    if has_generation_markers(original):
        return tokenizer
    if original is None:
        raise ValueError(
            "this tokenizer has no chat template: set tokenizer.chat_template = "
            "labkit.chat_templates.MINIMAL_CHAT_TEMPLATE, or load a chat model"
        )
    for candidate in (_known_to_trl(tokenizer), _taken_apart(tokenizer)):
        if candidate is not None and _same_text(tokenizer, candidate):
            tokenizer.chat_template = candidate
            return tokenizer
    raise ValueError(
        "no chat template with generation markers renders like this tokenizer's own "
        f"({original[:40]!r}...): write the markers into it by hand, or train on prompt/completion "
        "rows with completion_only_loss=True, which needs none"
    )


def _known_to_trl(tokenizer: PreTrainedTokenizerBase) -> str | None:
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except Exception:  # TRL does not know it, or could not render its own tool probe with it
        return None


# Words no template contains, to find where a template puts each role's words.
_PROBES = {"system": "SYSTEMPROBE", "user": "USERPROBE", "assistant": "ANSWERPROBE"}


def _message(role: str, content: str | None = None) -> dict[str, str]:
    return {"role": role, "content": _PROBES[role] if content is None else content}


def _render(tokenizer, messages, template=None, prompt=False) -> str | None:
    """Text of a conversation, or None where the template refuses it (no system role, say)."""
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception:  # a template raises jinja errors of its own choice
        return None


def _taken_apart(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template written from what the original renders; None if it is no plain row of turns."""
    user, answer = _message("user"), _message("assistant")
    one = _render(tokenizer, [user, answer])
    two = _render(tokenizer, [user, answer, user, answer])
    prompt = _render(tokenizer, [user], prompt=True)
    bare = _render(tokenizer, [user])
    if one is None or two is None or prompt is None or bare is None:
        return None
    if one.count(_PROBES["user"]) != 1 or two.count(_PROBES["user"]) != 2:
        return None

    # one = head + user turn + answer turn + tail, and `two` repeats both turns. Behind the first
    # answer of `two` stand the answer's end and the next user's start; behind the answer of `one`
    # its end and the tail. What the two share is the answer's end.
    before_user, _, rest = one.partition(_PROBES["user"])
    between, found, after_answer = rest.partition(_PROBES["assistant"])
    if not found:
        return None
    end_and_start = two.partition(_PROBES["assistant"])[2].partition(_PROBES["user"])[0]
    answer_end = os.path.commonprefix([end_and_start, after_answer])
    user_start = end_and_start.removeprefix(answer_end)
    head, tail = before_user.removesuffix(user_start), after_answer.removeprefix(answer_end)
    user_end = bare.removeprefix(before_user + _PROBES["user"]).removesuffix(tail)
    answer_start = between.removeprefix(user_end)
    generation = prompt.removeprefix(bare.removesuffix(tail)).removesuffix(tail)

    system = _render(tokenizer, [_message("system"), user])
    system_start = system_end = None
    if system is not None and _PROBES["system"] in system:
        system_start, _, rest = system.partition(_PROBES["system"])
        system_end = rest.partition(user_start + _PROBES["user"])[0]

    spaced = _render(tokenizer, [_message("user", f"  {_PROBES['user']}  "), answer])
    words = "message['content']" + ("" if f"  {_PROBES['user']}" in (spaced or "") else " | trim")
    return _write_template(
        head=head,
        turns={"user": (user_start, user_end), "assistant": (answer_start, answer_end)},
        system=None if system_start is None else (system_start, system_end),
        words=words,
        end_token=tokenizer.eos_token or "",
        generation=generation,
        tail=tail,
    )


def _write_template(*, head, turns, system, words, end_token, generation, tail) -> str:
    """Jinja source of: head, turns in order, tail, opening of the next answer."""

    def text(value: str) -> str:
        return "{{ " + json.dumps(value, ensure_ascii=False) + " }}" if value else ""

    start, end = turns["assistant"]
    # The end token is learned, the line break behind it is not.
    learned, separator, unlearned = end.partition(end_token) if end_token else (end, "", "")
    branches = [
        "{% if message['role'] == 'assistant' %}"
        + text(start)
        + "{% generation %}{{ " + words + " }}" + text(learned + separator)
        + "{% endgeneration %}" + text(unlearned),
        "{% elif message['role'] == 'user' %}"
        + text(turns["user"][0]) + "{{ " + words + " }}" + text(turns["user"][1]),
    ]  # fmt: skip
    if system is None:
        opening = text(head)
    else:
        opening = "{% if messages[0]['role'] != 'system' %}" + text(head) + "{% endif %}"
        branches.append(
            "{% elif message['role'] == 'system' %}"
            + text(system[0]) + "{{ " + words + " }}" + text(system[1])
        )  # fmt: skip
    loop = "{% for message in messages %}" + "".join(branches) + "{% endif %}{% endfor %}"
    return (
        opening
        + loop
        + text(tail)
        + ("{% if add_generation_prompt %}" + text(generation) + "{% endif %}")
    )


def _same_text(tokenizer: PreTrainedTokenizerBase, candidate: str) -> bool:
    """Whether a template renders like the tokenizer's own on samples, and marks every answer."""
    turn = [_message("user", "How many?"), _message("assistant", "  Four,\nplus one. ")]
    later = [_message("user", 'And "then"?'), _message("assistant", "{x: 'é'}")]
    system = [_message("system", " Answer in one word.")]
    samples = [turn, turn + later, system + turn, system + turn + later]
    for messages in samples:
        for sample, prompt in ((messages, False), (messages[:-1], True)):
            wanted = _render(tokenizer, sample, prompt=prompt)
            if wanted is not None and wanted != _render(tokenizer, sample, candidate, prompt):
                return False
    return _marks_answers(tokenizer, candidate, turn + later)


def _marks_answers(tokenizer, candidate: str, messages: list[dict[str, str]]) -> bool:
    """Whether the mask covers each answer's last word and no word of the user."""
    rendered = tokenizer.apply_chat_template(
        messages,
        chat_template=candidate,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = rendered["input_ids"], rendered["assistant_masks"]
    learned = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    ignored = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if not m])
    asked = [message["content"] for message in messages if message["role"] == "user"]
    return (
        "plus one" in learned
        and "{x:" in learned
        and "How many" in ignored
        and not any(question in learned for question in asked)
    )
