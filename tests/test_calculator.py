"""Calculator calls of a model: read by a small grammar, never by eval."""

import ast
import random
from pathlib import Path

import pytest

from labkit import calculator, data, models
from labkit.calculator import calculate, find_call, run_call


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("4821 + 3077", 7898),
        ("4821-3077", 1744),
        ("12 * 12", 144),
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("10 - 3 - 2", 5),  # from the left
        ("-(2 - 5) * 4", 12),
        ("2 -- 3", 5),
        (" 999999999 * 999999999 ", 999_999_998_000_000_001),
    ],
)
def test_calculate_by_hand(expression, value):
    assert calculate(expression) == value


def test_calculate_agrees_with_python_on_random_expressions():
    rng = random.Random(0)

    def grow(depth: int) -> str:
        if depth == 0 or rng.random() < 0.3:
            return str(rng.randint(0, 999))
        left, right = grow(depth - 1), grow(depth - 1)
        text = f"{left} {rng.choice('+-*')} {right}"
        return rng.choice((text, f"({text})", f"-({text})"))

    expressions = [text for text in (grow(3) for _ in range(300)) if len(text) <= 60]
    assert len(expressions) > 200
    for text in expressions:
        assert calculate(text) == eval(text), text  # our own text, no model's


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "expression ends where a number is missing"),
        ("1 +", "expression ends where a number is missing"),
        ("* 2", r"'\*' stands where a number is missing"),
        ("2 ** 9", r"'\*' stands where a number is missing"),
        ("1 2", r"expression '1 2': '2' is not expected there"),
        ("1 + 2)", r"'\)' is not expected there"),
        ("(1 + 2", "an open bracket that is never closed"),
        ("1 / 2", "'/' is not allowed; use whole numbers"),
        ("1.5 + 2", r"'\.' is not allowed"),
        ("٣ + 1", "'٣' is not allowed"),
        ("__import__('os')", "'_' is not allowed"),
        ("9 if 1 else 2", "'i' is not allowed"),
        ("1234567890 + 1", "number 1234567890 has 10 digits, allowed are 9"),
        ("(" * 31 + "1" + ")" * 31, "expression has 63 characters, allowed are 60"),
    ],
)
def test_calculate_refuses_in_one_line(expression, message):
    with pytest.raises(ValueError, match=message) as error:
        calculate(expression)
    assert "\n" not in str(error.value)


def test_brackets_as_deep_as_allowed_are_read():
    assert calculate("(" * 29 + "1" + ")" * 29) == 1


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("calculator(1 + 2)", "1 + 2"),
        (" calculator((1 + 2) * 3) ", "(1 + 2) * 3"),
        ("calculator()", ""),
        ("The answer is calculator(1 + 2)", None),
        ("calculator(1 + 2) over", None),
        ("calculator 1 + 2", None),
        ("3", None),
    ],
)
def test_find_call(text, expression):
    assert find_call(text) == expression


def test_every_call_that_the_world_teaches_is_run():
    rows = [row for row in data.load_task("general", "test") if row["skill"] == "tool"]
    assert len(rows) > 100
    for row in rows:
        call = row["messages"][-1]["content"]
        left, operator, right = call.removeprefix("calculator(").removesuffix(")").split(" ")
        a, b = int(left), int(right)
        want = {"+": a + b, "-": a - b, "*": a * b}[operator]
        assert run_call(call) == calculator.ToolAnswer(str(want), call)


def test_other_answers_stay_and_bad_calls_say_why():
    assert run_call("Jorvik") == calculator.ToolAnswer("Jorvik", "Jorvik", None)
    bad = run_call("calculator(12 / 4)")
    assert bad.text == bad.written == "calculator(12 / 4)"
    assert "'/' is not allowed" in bad.error


def test_the_bundled_model_gets_large_sums_right_with_the_tool_only():
    model, tokenizer = models.load("bundled", device="cpu")
    talks = [
        [{"role": "user", "content": f"What is {a} + {b}?"}]
        for a, b in ((4821, 3077), (1250, 8096), (7331, 2408))
    ]
    answers = calculator.answers_with_tool(model, tokenizer, talks)
    assert [answer.text for answer in answers] == ["7898", "9346", "9739"]
    assert [answer.error for answer in answers] == [None] * 3
    assert answers[0].written == "calculator(4821 + 3077)"
    assert calculator.answer_with_tool(model, tokenizer, talks[1]) == answers[1]


def test_the_calculator_holds_no_eval():
    tree = ast.parse(Path(calculator.__file__).read_text(encoding="utf-8"))
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"eval", "exec", "compile", "__import__"}
