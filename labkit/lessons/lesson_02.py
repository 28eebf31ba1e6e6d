"""Exercises and quiz of `02_full_fine_tuning`."""

from labkit.exercises import Choice, Exercise, Quiz, Result, correct, not_yet


def _check_steps(answer) -> Result:
    if answer == 487.5:
        return not_yet("that is the popular formula; it leaves out accumulation and rounding")
    if answer == 489:
        return not_yet("you rounded up the batches of an epoch; now count steps, not batches")
    if answer == 60:
        return not_yet("an epoch's last, shorter accumulation is a step too: round up, not down")
    if answer == 62:
        return not_yet("round inside each epoch: the trainer does not carry batches over")
    if answer == 63:
        return correct("163 batches an epoch make 21 steps, and each epoch rounds up by itself")
    return not_yet("divide the rows by both devices' batches, then by the accumulation, per epoch")


def _check_kept(answer) -> Result:
    kept = sorted(answer)
    if kept == [40, 90]:
        return correct("the last one and the best one; 'keep 2' holds even though 40 is old")
    if kept == [80, 90]:
        return not_yet("that is the last two, and it would delete the best checkpoint")
    if 90 not in kept:
        return not_yet("the trainer saves once more at the very end of the run")
    if kept == [40, 80, 90]:
        return not_yet("the best one counts towards the two that are kept")
    return not_yet("at most two stay: which one must never be deleted, and which is the newest?")


def _check_labels(function) -> Result:
    ids, supervised = [7, 8, 9, 2], [False, False, True, True]
    got = list(function(ids, supervised))
    if ids != [7, 8, 9, 2]:
        return not_yet("your function changed `ids` itself: build a new list")
    if got == ids:
        return not_yet("every token is learned, so the model is trained to write questions")
    if got == [7, 8, -100, -100]:
        return not_yet("it is the other way round: the question must be hidden from the loss")
    if got == [-100, -100, 9, -100]:
        return not_yet("the end token is hidden, so the model would never learn to stop")
    if got == [0, 0, 9, 2]:
        return not_yet("0 is a real token, the padding; the loss skips only -100")
    if len(got) != len(ids):
        return not_yet("labels must be as long as the row: hide tokens, do not drop them")
    if got != [-100, -100, 9, 2]:
        return not_yet("for ids [7, 8, 9, 2] with the last two supervised, want two times -100")
    if list(function([4, 5, 6, 2, 3], [False, True, False, True, False])) != [
        -100,
        5,
        -100,
        2,
        -100,
    ]:
        return not_yet("right for one turn; in a talk, learned and hidden stretches alternate")
    return correct("questions are context only; each answer and its end token are learned")


def _check_rate(answer) -> Result:
    rate, score = answer
    if (rate, score) == (1e-3, 0.95):
        return correct("validation chose, test only reported; 0.95 is what you may claim")
    if (rate, score) == (4e-3, 0.96):
        return not_yet("you chose with the test column; then nothing unseen is left to report")
    if rate == 1e-3 and score == 0.97:
        return not_yet("the rate is right, but that score is the one you chose with: optimistic")
    return not_yet("which column may be used to choose, and which only to report?")


EXERCISES = (
    Exercise(
        id="02-1",
        aim="Count the steps of a run as the trainer does.",
        difficulty="easy",
        minutes=3,
        check=_check_steps,
        hints=(
            "First: how many batches does one epoch have, over both devices?",
            "1,300 rows in batches of 8 are 162.5 batches; half a batch is still a batch.",
            "163 batches in groups of 8 make 20.4 groups, and the last short group steps too.",
        ),
        wrong_answers=("487.5", "60", "489", "62"),
    ),
    Exercise(
        id="02-2",
        aim="Say which checkpoints a run leaves behind.",
        difficulty="medium",
        minutes=5,
        check=_check_kept,
        hints=(
            "Which steps are saved at all? Do not forget the last one.",
            "With load_best_model_at_end the best one is never deleted.",
            "Two stay: the best one and the newest one.",
        ),
        wrong_answers=("[80, 90]", "[40, 80]", "[40, 80, 90]"),
    ),
    Exercise(
        id="02-3",
        aim="Write the loss mask of a row.",
        difficulty="medium",
        minutes=8,
        check=_check_labels,
        hints=(
            "The loss skips positions whose label is -100.",
            "Walk over ids and supervised together: zip(ids, supervised).",
            "[token if learned else -100 for token, learned in zip(ids, supervised)]",
        ),
        wrong_answers=(
            "lambda ids, supervised: ids",
            "lambda ids, supervised: [0 if not s else i for i, s in zip(ids, supervised)]",
            "lambda ids, supervised: [i for i, s in zip(ids, supervised) if s]",
            "lambda ids, supervised: [-100] * 2 + ids[2:]",
        ),
    ),
    Exercise(
        id="02-4",
        aim="Choose with validation data and report with test data.",
        difficulty="easy",
        minutes=4,
        check=_check_rate,
        hints=(
            "A score that you chose with is too good on average: it was picked for being high.",
            "Choose the row with the best validation score.",
            "Report the test score of that row, even if another row's is higher.",
        ),
        wrong_answers=("(4e-3, 0.96)", "(1e-3, 0.97)"),
    ),
)

QUIZZES = (
    Quiz(
        id="02-q1",
        question="Training loss falls and validation loss has risen for three evaluations. Now?",
        choices=(
            Choice("Train longer; the loss still falls.", "Only the training loss does."),
            Choice(
                "Stop, and go back to the checkpoint with the lowest validation loss.",
                "The weights since then fit the training rows better and unseen rows worse.",
                right=True,
            ),
            Choice("Stop, and keep the last weights.", "They are worse than the best ones."),
            Choice("Raise the learning rate.", "That moves away from the best weights faster."),
        ),
    ),
)
