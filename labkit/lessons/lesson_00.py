"""Exercises and quiz of `00_start_here`."""

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
    if not isinstance(question, str):
        return not_yet("give the question as a text, in quotation marks")
    if not question.strip():
        return not_yet("the question is empty")
    if question.strip().lower() == "unknown":
        return not_yet("that is the answer; give the question that leads to it")
    answer = _answer_of(question)
    if answer == "unknown":
        return correct("the model knows that it does not know this name")
    return not_yet(f"it answered {answer!r}; ask for a city, job, pet, food or color of a person")


def _check_learned(answer) -> Result:
    if answer == 3:
        return correct("the answer's two digits, and the end token that makes the model stop")
    if answer == 2:
        return not_yet("count once more: something after the answer is learned too")
    if answer == 1:
        return not_yet("the answer is more than one token: digits stand alone")
    return not_yet("count only the coloured tokens; the question is not learned")


EXERCISES = (
    Exercise(
        id="00-1",
        aim="Tell what a model knows from what it does not.",
        difficulty="easy",
        minutes=5,
        check=_check_edge,
        hints=(
            "It was taught to say so for people who do not exist.",
            "Put together a first and a last name that you saw above, but of different people.",
            'Try "Where does Gita Hobbs live?" with other names.',
        ),
        wrong_answers=("'Who are you?'", "'unknown'", "42"),
    ),
    Exercise(
        id="00-2",
        aim="Read a loss mask.",
        difficulty="easy",
        minutes=5,
        check=_check_learned,
        hints=(
            "Coloured tokens are supervised.",
            "`view.tokens` holds (id, text, supervised) for each token.",
            "sum(supervised for _, _, supervised in view.tokens)",
        ),
        wrong_answers=("2", "1", "14"),
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
