"""Exercises and quiz of `06_forgetting_and_mixing`."""

from labkit.exercises import Choice, Exercise, Quiz, Result, correct, not_yet


def _check_steps(answer) -> Result:
    if answer == 1_100:
        return correct("400 rows and 4,000 general ones are 550 batches, read twice")
    if answer == 100:
        return not_yet("that is the domain alone: ten general rows come with each of its rows")
    if answer == 1_000:
        return not_yet("that is the general part alone: the domain's rows are in the mixture too")
    if answer == 550:
        return not_yet("that is one pass: the run makes two")
    if answer == 110:
        return not_yet(
            "you read the ratio the other way round: domain : general = 1:10 has ten times as many "
            "general rows, not a tenth"
        )
    if answer == 8_800:
        return not_yet("those are rows read: a step takes a batch of 8")
    return not_yet("rows of both kinds, divided by the batch, times the passes")


def _check_penalty(function) -> Result:
    import torch

    weights = {"a": torch.tensor([[1.0, 2.0], [3.0, -1.0]]), "b": torch.tensor([0.5])}
    anchor = {"a": torch.tensor([[0.0, 2.0], [1.0, 1.0]]), "b": torch.tensor([2.0])}
    fisher = {"a": torch.tensor([[4.0, 9.0], [0.5, 1.0]]), "b": torch.tensor([4.0])}
    before = [{k: v.clone() for k, v in given.items()} for given in (weights, anchor, fisher)]
    got = torch.as_tensor(function(weights, anchor, fisher, 3.0))
    for given, old in zip((weights, anchor, fisher), before, strict=True):
        if not all(torch.equal(given[name], old[name]) for name in old):
            return not_yet("your function changed what it was handed: build new tensors instead")
    if got.numel() != 1:
        return not_yet("a loss is one number: sum over the weights of every tensor")
    # a: 4 * 1 + 0 + 0.5 * 4 + 1 * 4 = 10; b: 4 * 2.25 = 9
    value = round(got.item(), 4)
    if value == 28.5:
        return correct("half of the strength, times Fisher, times the squared move, over all")
    if value == 57.0:
        return not_yet("equation 3 of the paper has a half before the sum")
    if value == 9.5:
        return not_yet("the strength is missing: it says how much the old task counts")
    if value == 15.0:
        return not_yet("that is tensor a alone: add up over every name")
    if value == 16.875:
        return not_yet("Fisher is missing: then every weight is held alike, which is plain L2")
    if value == 19.5:
        return not_yet("take the square of the move, not its size")
    return not_yet("strength / 2 times the sum over all weights of fisher * (weight - anchor)²")


def _check_share(answer) -> Result:
    share, rows = (round(float(number), 3) for number in answer)
    if (share, rows) == (0.25, 3):
        return correct("4 of 16 loss tokens are general, and three short answers weigh one long")
    if share == 0.5:
        return not_yet("that is the share of rows; a general answer has fewer tokens")
    if share == 0.333:
        return not_yet("that is 4 for each 12; the share is 4 of all 16")
    if share == 0.75:
        return not_yet("that is the domain's share: what is left is general")
    if share == 0.25 and rows == 0.333:
        return not_yet("the other way round: short answers need more rows, not fewer")
    if share == 0.25:
        return not_yet("the share is right; how many answers of 4 tokens make 12?")
    return not_yet("general loss tokens over all loss tokens; then 12 over 4")


def _check_budget(answer) -> Result:
    if answer == "1:5":
        return correct("its whole interval stays below 3 points, and it learned most of those")
    if answer == "1:1":
        return not_yet("its mean is within the budget, but its interval reaches above 4 points")
    if answer == "1:10":
        return not_yet("it is safe, but another safe arm learned more in fewer steps")
    if answer == "25 %":
        return not_yet("it learned most, and loses more than twice the budget")
    if answer == "domain only":
        return not_yet("it loses eight times the budget")
    return not_yet("answer with the name of one arm of the table, such as '1:1'")


EXERCISES = (
    Exercise(
        id="06-1",
        aim="Turn a ratio into steps before paying for them.",
        difficulty="easy",
        minutes=4,
        check=_check_steps,
        hints=(
            "domain : general = 1:10 means ten general rows for one row of the new task.",
            "The mixture has 400 + 4,000 rows.",
            "Divide by the batch, then count both passes.",
        ),
        wrong_answers=("100", "1_000", "550", "110", "8_800"),
    ),
    Exercise(
        id="06-2",
        aim="Write the penalty of elastic weight consolidation.",
        difficulty="medium",
        minutes=7,
        check=_check_penalty,
        hints=(
            "For one tensor: fisher times the squared move from the anchor, then summed.",
            "Go over the names, and add the sums up.",
            "Half of the strength stands before the sum: strength / 2 * sum(...).",
        ),
        wrong_answers=(
            "lambda w, a, f, s: s * sum((f[k] * (w[k] - a[k]) ** 2).sum() for k in w)",
            "lambda w, a, f, s: sum((f[k] * (w[k] - a[k]) ** 2).sum() for k in w) / 2",
            "lambda w, a, f, s: s / 2 * sum(((w[k] - a[k]) ** 2).sum() for k in w)",
            "lambda w, a, f, s: s / 2 * (f['a'] * (w['a'] - a['a']) ** 2).sum()",
            "lambda w, a, f, s: s / 2 * sum((f[k] * (w[k] - a[k]).abs()).sum() for k in w)",
            "lambda w, a, f, s: s / 2 * f['a'] * (w['a'] - a['a']) ** 2",
            "lambda w, a, f, s: sum(w[k].sub_(a[k]).sum() for k in w)",
        ),
    ),
    Exercise(
        id="06-3",
        aim="Tell a ratio of rows from a ratio of loss tokens.",
        difficulty="medium",
        minutes=5,
        check=_check_share,
        hints=(
            "One domain row and one general row: how many answer tokens together?",
            "Four of these sixteen are general.",
            "Half of the loss needs 12 general tokens for 12 of the domain.",
        ),
        wrong_answers=("(0.5, 1)", "(4 / 12, 3)", "(0.75, 3)", "(0.25, 4 / 12)", "(0.25, 2)"),
    ),
    Exercise(
        id="06-4",
        aim="Choose a mixture for a budget, with its interval in view.",
        difficulty="medium",
        minutes=5,
        check=_check_budget,
        hints=(
            "Sure means that the whole interval of the points lost is at most 3.",
            "Two arms are left: which learned more?",
            "It is also the one with fewer steps.",
        ),
        wrong_answers=("'1:1'", "'1:10'", "'25 %'", "'domain only'"),
    ),
)

QUIZZES = (
    Quiz(
        id="06-q1",
        question="A LoRA adapter was trained on one task, the base is frozen. What is forgotten?",
        choices=(
            Choice(
                "Nothing: the base's weights never moved.",
                "They did not move, but with the adapter attached every layer answers otherwise.",
            ),
            Choice(
                "Attached, the model may forget; switched off, it is the base again.",
                "Every bit of it: the adapter adds, and what is added can be left out.",
                right=True,
            ),
            Choice(
                "What was forgotten is lost for good, as with full fine-tuning.",
                "Full fine-tuning has no switch; an adapter has one.",
            ),
            Choice(
                "Only skills that use the same layers as the adapter.",
                "It stands in every layer here, and later layers read what earlier ones write.",
            ),
        ),
    ),
)
