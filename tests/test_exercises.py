"""Checks, hints, solutions and quizzes, on a small lesson made here; then on the course's own."""

import sys
from types import ModuleType

import nbformat
import pytest

from labkit import exercises
from labkit.errors import LabkitError
from labkit.exercises import Choice, Exercise, Quiz, Result, check, grade, hint, quiz, solution


def check_steps(steps: int) -> Result:
    if steps == 125:
        return exercises.correct("1000 rows in batches of 8")
    if steps == 1000:
        return exercises.not_yet("that is the number of rows: a step takes a whole batch")
    return exercises.not_yet(f"{steps + 0} steps is not rows over batch size")


STEPS = Exercise(
    id="98-1",
    aim="Turn rows and batch size into steps.",
    difficulty="easy",
    minutes=3,
    check=check_steps,
    hints=("How many rows does one step see?", "Divide."),
    wrong_answers=("1000", "answer = 8 * 1000"),
)
ASKED = Quiz(
    "98-q1",
    "Which token ends an <answer>?",
    (
        Choice("the end token", "it is trained like any other token", right=True),
        Choice("the pad token", "padding only fills a batch"),
    ),
)


@pytest.fixture(autouse=True)
def lesson(monkeypatch):
    """A lesson 98 that exists for one test, and no hints shown yet."""
    module = ModuleType("labkit.lessons.lesson_98")
    module.EXERCISES, module.QUIZZES = (STEPS,), (ASKED,)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(exercises, "_hints_shown", {})


def printed_by(capsys, action, *arguments) -> str:
    action(*arguments)
    return capsys.readouterr().out.strip()


def test_check_tells_right_from_wrong_and_says_why(capsys):
    assert printed_by(capsys, check, "98-1", 125) == "98-1 correct: 1000 rows in batches of 8"
    assert printed_by(capsys, check, "98-1", 1000).startswith("98-1 not yet: that is the number")
    assert (
        printed_by(capsys, check, "98-1", 3) == "98-1 not yet: 3 steps is not rows over batch size"
    )


def only_dots(rows): ...


def dots_and_docstring(rows):
    """Count rows."""
    ...


def returns_dots(rows):
    return ...


def only_pass(rows):
    pass


@pytest.mark.parametrize(
    "stub",
    [
        ...,
        (1, ...),
        [...],
        {"a": {"b": ...}},
        only_dots,
        dots_and_docstring,
        returns_dots,
        only_pass,
    ],
)
def test_every_form_of_stub_is_not_attempted(capsys, stub):
    assert printed_by(capsys, check, "98-1", stub).startswith("98-1 not attempted: replace ...")


@pytest.mark.parametrize("answer", [None, 0, "", [], lambda: 0, print])
def test_an_answer_that_looks_empty_is_an_attempt(answer):
    assert grade(STEPS, answer).attempted


def test_a_check_that_raises_is_reported_and_not_raised(capsys):
    said = printed_by(capsys, check, "98-1", "many")

    assert said.startswith("98-1 not yet: your answer could not be used (TypeError:")


def test_a_fault_of_the_machine_is_not_called_a_wrong_answer():
    def needs_the_model(answer):
        raise LabkitError("the bundled model is missing")

    whole = {name: getattr(STEPS, name) for name in Exercise.__dataclass_fields__}
    with pytest.raises(LabkitError, match="the bundled model is missing"):
        grade(Exercise(**(whole | {"check": needs_the_model})), 1)


def test_hints_come_in_layers_and_end_at_the_solution(capsys):
    said = [printed_by(capsys, hint, "98-1") for _ in range(4)]

    assert said[0] == "98-1 hint 1 of 2: How many rows does one step see?"
    assert said[1] == "98-1 hint 2 of 2: Divide."
    assert said[2] == said[3]
    told, *code = said[2].splitlines()
    assert told == "98-1 no more hints: these two lines in a cell show one way to do it"
    exec("\n".join(code))  # it prints that this copy has no solution, as no notebook 98 exists
    assert "98-1 no solution in this copy" in capsys.readouterr().out


def test_solution_comes_from_the_master_notebook(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(exercises.paths, "notebooks_dir", lambda: tmp_path)
    assert "no solution in this copy" in printed_by(capsys, solution, "98-1")

    stub = nbformat.v4.new_code_cell('steps = ...\ncheck("98-1", steps)')
    answer = nbformat.v4.new_code_cell('steps = 1000 // 8\ncheck("98-1", steps)')
    answer.metadata.tags = ["solution"]
    nbformat.write(nbformat.v4.new_notebook(cells=[stub, answer]), tmp_path / "98_steps.ipynb")

    assert printed_by(capsys, solution, "98-1") == 'steps = 1000 // 8\ncheck("98-1", steps)'


@pytest.mark.parametrize("action", [check, hint, solution, quiz])
def test_an_unknown_id_is_the_callers_mistake(action):
    rest = (1,) if action is check else ()
    with pytest.raises(ValueError, match="no '98-7' among the (exercises|quizzes) of this lesson"):
        action("98-7", *rest)
    with pytest.raises(ValueError, match="no '97-1'.*none"):
        action("97-1", *rest)


def test_quiz_judges_the_chosen_answer_only_when_asked():
    question, buttons, judge, reply = quiz("98-q1").children
    assert "&lt;answer&gt;" in question.value
    assert buttons.index is None

    judge.click()
    assert "Choose one first" in reply.value
    buttons.index = 1
    assert "Choose one first" in reply.value
    judge.click()
    assert "Not yet: padding only fills a batch" in reply.value
    buttons.index = 0
    judge.click()
    assert "Correct: it is trained like any other token" in reply.value


def test_exercises_and_quizzes_refuse_to_be_half_written():
    whole = {name: getattr(STEPS, name) for name in Exercise.__dataclass_fields__}
    for field, value, message in [
        ("id", "2-1", "want NN-k"),
        ("difficulty", "trivial", "want one of"),
        ("hints", (), "write at least one"),
        ("wrong_answers", ("1",), "at least two"),
    ]:
        with pytest.raises(ValueError, match=message):
            Exercise(**(whole | {field: value}))
    with pytest.raises(ValueError, match="2 choices are right"):
        Quiz("98-q2", "?", (Choice("a", "", True), Choice("b", "", True)))


def test_weaknesses_of_an_exercise_are_found():
    def weaknesses(check, *wrong_answers):
        whole = {name: getattr(STEPS, name) for name in Exercise.__dataclass_fields__}
        return exercises.weaknesses(
            Exercise(**(whole | {"check": check, "wrong_answers": wrong_answers}))
        )

    assert exercises.weaknesses(STEPS) == []
    assert weaknesses(check_steps, "125", "3") == ["wrong answer '125' passes"]
    assert "makes the check raise" in weaknesses(check_steps, "'a'", "3")[0]
    assert "same message" in weaknesses(lambda _: exercises.not_yet("no"), "1", "2")[0]
    assert "not attempted" in weaknesses(check_steps, "...", "3")[0]


@pytest.mark.parametrize("exercise", exercises.all_exercises(), ids=lambda exercise: exercise.id)
def test_every_exercise_of_the_course_is_sound(exercise):
    assert exercises.weaknesses(exercise) == []
