"""Exercises and quiz of `07_dpo_for_badcases`."""

import math

from labkit.exercises import Choice, Exercise, Quiz, Result, correct, not_yet


def _check_loss(function) -> Result:
    arguments = (-2.0, -3.5, -2.5, -3.0, 0.4)  # chosen, rejected, their references, beta
    chosen, rejected, ref_chosen, ref_rejected, beta = arguments
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    got = float(function(*arguments))

    def loss(x: float) -> float:
        return math.log1p(math.exp(-x))

    mistakes = {
        loss(beta * margin): None,
        -loss(beta * margin): "the sign is turned: a loss falls while the margin grows",
        loss(margin): "beta is missing: it multiplies the margin",
        loss(margin / beta): "you divided by beta: it multiplies the margin",
        loss(beta * (chosen - rejected)): "the reference is missing: subtract its numbers",
        loss(-beta * margin): "chosen and rejected are swapped: this prefers the bad answer",
        1 / (1 + math.exp(-beta * margin)): "that is the probability: take minus its logarithm",
        -beta * margin: "that is minus the margin: put it through log sigmoid",
    }
    for value, mistake in mistakes.items():
        if math.isclose(got, value, abs_tol=1e-4):
            return not_yet(mistake) if mistake else _at_the_start(function)
    return not_yet("want -log sigmoid(beta * margin), the margin against the reference")


def _at_the_start(function) -> Result:
    if not math.isclose(float(function(-7.0, -1.0, -7.0, -1.0, 0.1)), math.log(2), abs_tol=1e-4):
        return not_yet("where model and reference agree, the loss must be ln 2")
    return correct("and it is ln 2 wherever model and reference agree, however bad the answers are")


def _check_ruined(answer) -> Result:
    names = {answer} if isinstance(answer, str) else {str(name) for name in answer}
    unknown = sorted(names - {"A", "B", "C", "D"})
    if unknown or not names:
        return not_yet("answer with a set of names out of A, B, C and D, such as {'A', 'B'}")
    if names == {"B", "D"}:
        return correct(
            "B's right answers fell under a splendid margin, D grew long and far from its "
            "reference; neither margin nor accuracy shows it"
        )
    if names == {"C"}:
        return not_yet("C has the smallest margin: slow, but nothing of it got worse")
    if "A" in names:
        return not_yet("A's chosen answers rose, and length and general score stayed: it is well")
    if "C" in names:
        return not_yet("C's small margin is no harm: look for numbers that got worse")
    if names == {"B"}:
        return not_yet("B is one of two: look at the length and the distance of another")
    return not_yet("D is one of two: whose right answers became rarer?")


def _check_pairs_kept(answer) -> Result:
    try:
        kept = sorted(answer)
    except TypeError:
        return not_yet("answer with a list of ids, such as ['p1', 'p4']")
    if kept == ["p1", "p5"]:
        return correct(
            "a tie, a duplicate, a chosen answer that the rule calls bad, and one cut off are left "
            "out; what stays can teach"
        )
    mistakes = {
        "p2": "p2 prefers nothing: both answers are alike",
        "p3": "p3 says p1 again: it would count twice",
        "p4": "p4's chosen answer is itself bad: the rule gives it a reason",
        "p6": "p6's rejected answer was cut off: DPO would learn that stopping there is bad",
    }
    for name, mistake in mistakes.items():
        if name in kept:
            return not_yet(mistake)
    missing = [name for name in ("p1", "p5") if name not in kept]
    if missing:
        return not_yet(f"{missing[0]} is a sound pair: nothing speaks against it")
    return not_yet("answer with ids of the table, such as ['p1', 'p4']")


def _check_rates(answer) -> Result:
    try:
        false_positive, false_negative = (round(float(rate), 3) for rate in answer)
    except (TypeError, ValueError):
        return not_yet("answer with a pair of shares, (false positives, false negatives)")
    if (false_positive, false_negative) == (0.025, 0.3):
        return correct(
            "20 of 800 good answers are stopped, 60 of 200 bad ones pass: one rate says nothing "
            "of the other"
        )
    if (false_positive, false_negative) == (0.3, 0.025):
        return not_yet("the two are swapped: a false positive stops a good answer")
    if (false_positive, false_negative) == (0.02, 0.06):
        return not_yet("divide by the good answers and by the bad ones, not by all 1,000")
    if (false_positive, false_negative) == (0.125, 0.3):
        return not_yet("20 of 160 is the share of stopped answers that were good: another question")
    if false_negative == 0.7:
        return not_yet("0.7 of the bad ones are caught: a false negative is one that passes")
    return not_yet("good answers stopped / all good ones, and bad ones passed / all bad ones")


EXERCISES = (
    Exercise(
        id="07-1",
        aim="Write DPO's loss for one pair.",
        difficulty="medium",
        minutes=6,
        check=_check_loss,
        hints=(
            "How much more likely than in the reference is the chosen answer? And the rejected?",
            "The margin is the difference of these two differences.",
            "-log sigmoid(x) is log(1 + exp(-x)), with x = beta * margin.",
        ),
        wrong_answers=tuple(
            f"lambda c, r, rc, rr, beta: {formula}"
            for formula in (
                "__import__('math').log(1 + __import__('math').exp(-((c - rc) - (r - rr))))",
                "__import__('math').log(1 + __import__('math').exp(-beta * (c - r)))",
                "__import__('math').log(1 + __import__('math').exp(beta * ((c - rc) - (r - rr))))",
                "-__import__('math').log(1 + __import__('math').exp(beta * ((rc - c) + (r - rr))))",
                "1 / (1 + __import__('math').exp(-beta * ((c - rc) - (r - rr))))",
            )
        ),
    ),
    Exercise(
        id="07-2",
        aim="Tell ruined runs from healthy ones by what was watched.",
        difficulty="easy",
        minutes=4,
        check=_check_ruined,
        hints=(
            "Margin and accuracy are what the loss wants: pass them over.",
            "Which numbers should stay where they were? The chosen answers, length, general score.",
            "Two of the four runs have such a number that got worse by much.",
        ),
        wrong_answers=("'C'", "{'A', 'B'}", "{'B'}", "{'D'}", "{'B', 'C', 'D'}"),
    ),
    Exercise(
        id="07-3",
        aim="Sort preference pairs before anything is trained on them.",
        difficulty="medium",
        minutes=5,
        check=_check_pairs_kept,
        hints=(
            "Ask of each pair: what would the model learn from it?",
            "Look for a tie, a duplicate, a bad answer among the chosen, an answer without an end.",
            "Two of the six pairs have none of these four faults.",
        ),
        wrong_answers=(
            "['p1', 'p2', 'p5']",
            "['p1', 'p3', 'p5']",
            "['p1', 'p4', 'p5']",
            "['p1', 'p5', 'p6']",
            "['p1']",
        ),
    ),
    Exercise(
        id="07-4",
        aim="Compute both error rates of a filter.",
        difficulty="easy",
        minutes=4,
        check=_check_rates,
        hints=(
            "Of which answers is a false positive a share: of all, of the stopped, of the good?",
            "A false positive is a good answer stopped; a false negative a bad one that passes.",
            "20 / 800, and (200 - 140) / 200.",
        ),
        wrong_answers=("(0.3, 0.025)", "(0.02, 0.06)", "(0.125, 0.3)", "(0.025, 0.7)"),
    ),
)

QUIZZES = (
    Quiz(
        id="07-q1",
        question="A DPO run logs a first loss of 0.31. What does that tell you?",
        choices=(
            Choice("The pairs are easy.", "At the start the margin is zero, however easy."),
            Choice("The rate is well chosen.", "The first loss comes before the first step."),
            Choice(
                "Model and reference are not the same model.",
                "Where they agree the margin is 0 and the loss ln 2, whatever the pairs.",
                right=True,
            ),
            Choice("Beta is too small.", "Beta multiplies a margin of zero."),
        ),
    ),
)
