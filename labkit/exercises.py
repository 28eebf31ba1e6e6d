"""Exercises of the notebooks: checks that explain, hints in layers, and multiple-choice quizzes.

    my_steps = ...  # your answer
    check("02-1", my_steps)     # 02-1 not attempted: ...
    hint("02-1")                # 02-1 hint 1 of 3: ...
    quiz("02-q1")               # radio buttons and a Check button

Each `labkit/lessons/lesson_NN.py` lists the exercises and quizzes of one notebook.
"""

import dis
import html
import importlib
import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from labkit import paths
from labkit.errors import LabkitError

if TYPE_CHECKING:
    import ipywidgets

DIFFICULTIES = ("easy", "medium", "hard")
# Lessons import this module, so this one finds them by name, when one is asked for.
LESSONS = "labkit.lessons"

BEGIN_SOLUTION = "# BEGIN SOLUTION"
END_SOLUTION = "# END SOLUTION"

_hints_shown: dict[str, int] = {}


@dataclass(frozen=True)
class Result:
    """What a check says about one answer."""

    ok: bool
    message: str
    """Why it is right, or what exactly is not right yet; one sentence, without the answer."""
    attempted: bool = True
    """False while the stub's `...` still stands."""

    def __str__(self) -> str:
        if not self.attempted:
            return f"not attempted: {self.message}"
        return f"correct: {self.message}" if self.ok else f"not yet: {self.message}"


def correct(why: str) -> Result:
    """The answer is right; `why` says what it shows."""
    return Result(True, why)


def not_yet(message: str) -> Result:
    """The answer is wrong; `message` names the mistake, not the answer."""
    return Result(False, message)


@dataclass(frozen=True)
class Exercise:
    """One exercise of one notebook.

    Raises:
        ValueError: the id is not `NN-k`, the difficulty is unknown, there is no hint, or fewer than
            two wrong answers are listed.
    """

    id: str
    """`NN-k`: number of the notebook, number of the exercise in it."""
    aim: str
    """What the learner can do after it, in one sentence."""
    difficulty: str
    """easy, medium or hard."""
    minutes: int
    """How long it takes a learner, hints included."""
    check: Callable[[Any], Result]
    """Judges the answer; may raise, which is reported as "not yet"."""
    hints: tuple[str, ...]
    """From a nudge to nearly the solution."""
    wrong_answers: tuple[str, ...]
    """Typical mistakes as Python source: an expression, or statements that define `answer`."""

    def __post_init__(self) -> None:
        lesson, _, number = self.id.partition("-")
        if not (len(lesson) == 2 and lesson.isdigit() and number.isdigit()):
            raise ValueError(f"Exercise id={self.id!r}: want NN-k, such as '02-1'")
        if self.difficulty not in DIFFICULTIES:
            raise ValueError(
                f"Exercise {self.id}: difficulty={self.difficulty!r}: want one of {DIFFICULTIES}"
            )
        if not self.hints:
            raise ValueError(f"Exercise {self.id}: hints is empty: write at least one")
        if len(self.wrong_answers) < 2:
            raise ValueError(f"Exercise {self.id}: list at least two typical wrong_answers")


@dataclass(frozen=True)
class Choice:
    """One possible reply to a quiz question, and what is said to whoever picks it."""

    text: str
    why: str
    right: bool = False


@dataclass(frozen=True)
class Quiz:
    """A question with exactly one right choice; its id is `NN-qk`.

    Raises:
        ValueError: not exactly one choice is right.
    """

    id: str
    question: str
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        n_right = sum(choice.right for choice in self.choices)
        if n_right != 1:
            raise ValueError(f"Quiz {self.id}: {n_right} choices are right: mark exactly one")


def check(exercise_id: str, answer: Any) -> None:
    """Print what is right or not right yet about an answer; never raises because of the answer.

    Args:
        exercise_id: such as "02-1".
        answer: what the stub asked for; `...`, or a function or container of it, is no attempt.

    Raises:
        ValueError: there is no such exercise.
        LabkitError: the check needs a file that is missing or damaged.
    """
    print(f"{exercise_id} {grade(find_exercise(exercise_id), answer)}")


def hint(exercise_id: str) -> None:
    """Print the next hint of an exercise; after the last one, say where the solution is.

    Raises:
        ValueError: there is no such exercise.
    """
    hints = find_exercise(exercise_id).hints
    shown = _hints_shown.get(exercise_id, 0)
    if shown == len(hints):
        print(f"{exercise_id} no more hints: these two lines in a cell show one way to do it")
        print(f'from labkit.exercises import solution\nsolution("{exercise_id}")')
        return
    _hints_shown[exercise_id] = shown + 1
    print(f"{exercise_id} hint {shown + 1} of {len(hints)}: {hints[shown]}")


def solution(exercise_id: str) -> None:
    """Print the master notebook's solution, for after an honest try.

    Raises:
        ValueError: there is no such exercise.
    """
    find_exercise(exercise_id)
    for path in sorted(paths.notebooks_dir().glob(f"{exercise_id[:2]}_*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if "solution" in cell["metadata"].get("tags", []) and f'"{exercise_id}"' in source:
                print(source)
                return
    print(f"{exercise_id} no solution in this copy of the course: ask whoever gave it to you")


def quiz(quiz_id: str) -> "ipywidgets.VBox":
    """A multiple-choice question: arrow keys choose, Tab then Enter on Check judges.

    Returns:
        VBox of the question, the radio buttons, the button and the reply.

    Raises:
        ValueError: there is no such quiz.
    """
    import ipywidgets

    asked = _find(quiz_id, "QUIZZES")
    question = ipywidgets.HTML(f"<strong>{html.escape(asked.question)}</strong>")
    texts = [choice.text for choice in asked.choices]
    buttons = ipywidgets.RadioButtons(options=texts, index=None, layout={"width": "max-content"})
    judge = ipywidgets.Button(description="Check", tooltip="Check my choice")
    reply = ipywidgets.HTML()

    def show_reply(_: object) -> None:
        if buttons.index is None:
            text = "Choose one first."
        else:
            choice = asked.choices[buttons.index]
            text = f"{'Correct' if choice.right else 'Not yet'}: {choice.why}"
        # role="status" makes a screen reader speak the reply when it changes.
        reply.value = f'<p role="status">{html.escape(text)}</p>'

    judge.on_click(show_reply)
    return ipywidgets.VBox([question, buttons, judge, reply])


def grade(exercise: Exercise, answer: Any) -> Result:
    """Judge an answer to one exercise; a check that raises counts as a wrong answer."""
    if _is_stub(answer):
        nudge = f'replace ... with your answer, or call hint("{exercise.id}")'
        return Result(False, nudge, attempted=False)
    try:
        return exercise.check(answer)
    except LabkitError:  # the machine's fault, such as a missing model, is not a wrong answer
        raise
    except Exception as error:  # any mistake in a learner's function can surface here
        reason = f"{type(error).__name__}: {error}".strip(": \n")
        return not_yet(f"your answer could not be used ({reason})")


def find_exercise(exercise_id: str) -> Exercise:
    """The exercise with this id, from its lesson.

    Raises:
        ValueError: there is no such exercise; the message lists those that exist.
    """
    return _find(exercise_id, "EXERCISES")


def all_exercises() -> list[Exercise]:
    """Every exercise of every lesson, in the order of the course."""
    folders = importlib.import_module(LESSONS).__path__
    names = sorted(module.name for module in pkgutil.iter_modules(folders))
    modules = [importlib.import_module(f"{LESSONS}.{name}") for name in names]
    return [exercise for module in modules for exercise in module.EXERCISES]


def weaknesses(exercise: Exercise) -> list[str]:
    """What is wrong with an exercise itself; CI wants none for every exercise of the course.

    The stub must count as not attempted, every listed wrong answer must be refused by the check
    (not by an exception), and two different mistakes must get two different messages.
    """
    found = []
    if grade(exercise, ...).attempted:
        found.append("the stub ... counts as an attempt")
    messages = {}
    for source in exercise.wrong_answers:
        result = grade(exercise, _evaluate(source))
        if result.ok:
            found.append(f"wrong answer {source!r} passes")
        if not result.attempted:
            found.append(f"wrong answer {source!r} counts as not attempted")
        if "your answer could not be used" in result.message:
            found.append(f"wrong answer {source!r} makes the check raise: {result.message}")
        if result.message in messages:
            twin = messages[result.message]
            found.append(f"wrong answers {twin!r} and {source!r} get the same message")
        messages[result.message] = source
    return found


def _evaluate(source: str) -> Any:
    """The answer that a `wrong_answers` source stands for; it is our own text, from a lesson."""
    namespace: dict[str, Any] = {}
    try:
        return eval(source, namespace)
    except SyntaxError:
        exec(source, namespace)
        return namespace["answer"]


def _find(item_id: str, kind: str) -> Any:
    name = f"{LESSONS}.lesson_{item_id[:2]}"
    try:
        items = getattr(importlib.import_module(name), kind, ())
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        items = ()
    known = {item.id: item for item in items}
    if item_id not in known:
        listed = ", ".join(known) or "none"
        raise ValueError(f"no {item_id!r} among the {kind.lower()} of this lesson: {listed}")
    return known[item_id]


def _is_stub(answer: Any) -> bool:
    """Whether an answer is still the stub: `...`, a container of it, or a function of it alone."""
    if isinstance(answer, dict):
        return any(_is_stub(value) for value in answer.values())
    if isinstance(answer, (list, tuple)):
        return any(_is_stub(value) for value in answer)
    code = getattr(answer, "__code__", None)
    return answer is ... or (code is not None and _steps(code) in _EMPTY_BODIES)


def _steps(code: Any) -> list[tuple[str, Any]]:
    """Instructions of a function, without those that only mark lines or the start."""
    bare = [(step.opname, step.argval) for step in dis.get_instructions(code)]
    return [step for step in bare if step[0] not in ("RESUME", "NOP")]


def _only_dots() -> None: ...


def _returns_dots() -> Any:
    return ...


_EMPTY_BODIES = [_steps(_only_dots.__code__), _steps(_returns_dots.__code__)]
