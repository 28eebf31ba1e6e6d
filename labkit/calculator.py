"""The calculator that the base model calls for sums too large for its head.

Asked "What is 4821 + 3077?", the base writes a call, `calculator(4821 + 3077)`, and stops. Somebody
must run it, and what a model wrote is a stranger's text: it is never given to `eval`. A small
grammar is read instead, and what it does not know is refused.

    sum     = product { ("+" | "-") product }
    product = factor { "*" factor }
    factor  = number | "-" factor | "(" sum ")"

The base was never taught to read a result, so the result itself is the answer; a model that was
taught would be called again with the result in its talk.

>>> calculate(find_call("calculator(4821 + 3077)"))
7898
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from labkit.evaluation import generate_answers

MAX_CHARACTERS = 60
"""Longest expression; it also bounds how deep brackets can nest."""
MAX_DIGITS = 9
"""Digits of one number."""
_CALL = re.compile(r"calculator\((.*)\)", re.DOTALL)
_TOKEN = re.compile(r"\s*(\d+|[-+*()])", re.ASCII)


@dataclass(frozen=True)
class ToolAnswer:
    """An answer after any calculator call in it was run."""

    text: str
    """What the user sees: the result of the call, or else what the model wrote."""
    written: str
    """What the model wrote."""
    error: str | None = None
    """Why a call was refused; None when it ran, or when there was none."""


def find_call(text: str) -> str | None:
    """The expression of an answer that is a calculator call and nothing else, or None."""
    match = _CALL.fullmatch(text.strip())
    return match and match.group(1)


def calculate(expression: str) -> int:
    """The value of an expression of whole numbers, +, -, * and brackets.

    Raises:
        ValueError: the expression is longer than MAX_CHARACTERS, holds a number of more than
            MAX_DIGITS digits, or is not of the grammar in the module's head.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(
            f"expression has {len(expression)} characters, allowed are {MAX_CHARACTERS}: "
            "calculate it in parts"
        )
    tokens = _tokens(expression)
    value = _sum(tokens)
    if tokens:
        raise ValueError(f"expression {expression!r}: {tokens[0]!r} is not expected there")
    return value


def answer_with_tool(
    model, tokenizer, messages: list[dict], max_new_tokens: int = 48
) -> ToolAnswer:
    """The model's greedy answer to one talk, with a calculator call replaced by its result.

    Raises:
        ValueError: as `evaluation.generate_answers`; a bad call is no error but noted in `error`.
    """
    [answer] = answers_with_tool(model, tokenizer, [messages], max_new_tokens)
    return answer


def answers_with_tool(
    model,
    tokenizer,
    prompts: Sequence[list[dict]],
    max_new_tokens: int = 48,
    batch_size: int = 32,
) -> list[ToolAnswer]:
    """As `answer_with_tool`, for many talks at once."""
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens, batch_size)
    return [run_call(answer.text) for answer in answers]


def run_call(written: str) -> ToolAnswer:
    """What the user sees of an answer: the result where it is a calculator call."""
    expression = find_call(written)
    if expression is None:
        return ToolAnswer(written, written)
    try:
        return ToolAnswer(str(calculate(expression)), written)
    except ValueError as error:
        return ToolAnswer(written, written, str(error))


def _tokens(expression: str) -> list[str]:
    """Numbers, operators and brackets in order."""
    tokens, place = [], 0
    end = len(expression.rstrip())
    while place < end:
        match = _TOKEN.match(expression, place)
        if match is None:
            wrong = expression[place:].lstrip()[0]
            raise ValueError(
                f"expression {expression!r}: {wrong!r} is not allowed; "
                "use whole numbers, +, -, * and brackets"
            )
        tokens.append(match.group(1))
        place = match.end()
    long = [token for token in tokens if len(token) > MAX_DIGITS]
    if long:
        raise ValueError(f"number {long[0]} has {len(long[0])} digits, allowed are {MAX_DIGITS}")
    return tokens


# Each of these reads its part of the grammar off the front of `tokens`.


def _sum(tokens: list[str]) -> int:
    value = _product(tokens)
    while tokens and tokens[0] in "+-":
        value += _product(tokens) if tokens.pop(0) == "+" else -_product(tokens)
    return value


def _product(tokens: list[str]) -> int:
    value = _factor(tokens)
    while tokens and tokens[0] == "*":
        tokens.pop(0)
        value *= _factor(tokens)
    return value


def _factor(tokens: list[str]) -> int:
    if not tokens:
        raise ValueError("expression ends where a number is missing")
    token = tokens.pop(0)
    if token.isdigit():
        return int(token)
    if token == "-":
        return -_factor(tokens)
    if token == "(":
        value = _sum(tokens)
        if not tokens or tokens.pop(0) != ")":
            raise ValueError("expression has an open bracket that is never closed")
        return value
    raise ValueError(f"{token!r} stands where a number is missing")
