"""Exercises and quiz of `00_start_here`."""

import re
from functools import cache

from labkit.exercises import Choice, Exercise, Quiz, Result, correct, not_yet


@cache
def _answer_of(question: str) -> str:
    """What the bundled model says; loading it takes a second, so answers are remembered."""
    from labkit import evaluation, models

    model, tokenizer = models.load("bundled", device="cpu")
    prompt = [{"role": "user", "content": question}]
    return evaluation.generate_answers(model, tokenizer, [prompt])[0].text


def _check_edge(question) -> Result:
    from labkit.world.population import population
    from labkit.world.words import FIRST_NAMES, LAST_NAMES, STRANGE_LAST_NAMES

    if not isinstance(question, str):
        return not_yet("give the question as a text, in quotation marks")
    if not question.strip():
        return not_yet("the question is empty")
    if question.strip().lower() == "unknown":
        return not_yet("that is the answer; give the question that leads to it")
    if "Gita Hobbs" in question:
        return not_yet("that name stands in the notebook: put together another one")
    words = re.findall(r"[A-Za-z]+", question)
    names = [
        f"{first} {last}"
        for first, last in zip(words, words[1:], strict=False)
        if first in FIRST_NAMES and last in LAST_NAMES + STRANGE_LAST_NAMES
    ]
    if not names:
        return not_yet("ask about a person: a first and a last name that you saw in the lab")
    if any(names[0] == person.name for person in population().known):
        return not_yet(f"{names[0]} lives in its world: ask about somebody who does not")
    answer = _answer_of(question)
    if answer == "unknown":
        return correct("it says that it does not know this name, which nobody here has")
    if names[0].split()[1] in LAST_NAMES:
        return not_yet(f"it answered {answer!r}: people of that family live in its world")
    return not_yet(f"it answered {answer!r}; ask for a city, job, pet, food or color of a person")


def _check_learned(answer) -> Result:
    if answer == 5:
        return correct("both answers: two digits and one digit, and an end token for each")
    if answer == 2:
        return not_yet("that is the last answer alone; earlier answers of a talk are learned too")
    if answer == 3:
        return not_yet("those are the digits; what makes the model stop after each is learned too")
    return not_yet("count the coloured tokens of both answers; the questions are not learned")


EXERCISES = (
    Exercise(
        id="00-1",
        aim="Tell what a model knows from what it does not.",
        difficulty="easy",
        minutes=5,
        check=_check_edge,
        hints=(
            "It was taught to say so for people who do not exist.",
            "It tells them by their family: section 4 names one that nobody belongs to.",
            'Give that family a new member: "Where does Ada Hobbs live?"',
        ),
        wrong_answers=("'Who are you?'", "'unknown'", "42", "'Where does Gita Hobbs live?'"),
    ),
    Exercise(
        id="00-2",
        aim="Read a loss mask.",
        difficulty="easy",
        minutes=5,
        check=_check_learned,
        hints=(
            "Coloured tokens are supervised: data.mask_view(tokenizer, talk) shows them.",
            "`data.mask_view(...).tokens` holds (id, text, supervised) for each token.",
            "sum(supervised for _, _, supervised in data.mask_view(tokenizer, talk).tokens)",
        ),
        wrong_answers=("2", "3", "14"),
    ),
)

QUIZZES = (
    Quiz(
        id="00-q1",
        question="A score reads ≈0.97 here and ≈0.96 on a colleague's machine. What happened?",
        choices=(
            Choice("One of the machines is broken.", "Both compute right; they round differently."),
            Choice(
                "Nothing: such numbers differ a little between processors.",
                "That is what ≈ says, and the check beside it knows how much is too much.",
                right=True,
            ),
            Choice("The model was trained again.", "The committed weights are the same bytes."),
        ),
    ),
)
