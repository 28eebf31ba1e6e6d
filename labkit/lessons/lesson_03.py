"""Exercises and quiz of `03_lora`."""

from labkit.exercises import Choice, Exercise, Quiz, Result, correct, not_yet


def _check_parameters(answer) -> Result:
    if answer == 3_407_872:
        return correct("rank x (in + out), for both matrices of each of 32 layers: 0.04 % of 8 B")
    if answer == 4_194_304:
        return not_yet("v_proj is not square here: its output is 1,024 wide, as heads share values")
    if answer == 106_496:
        return not_yet("that is one layer: the model has 32 of them")
    if answer == 2_097_152:
        return not_yet("that is A alone: B, out x rank, is trained too")
    if answer == 32 * (4096 * 4096 + 4096 * 1024):
        return not_yet("that is what full fine-tuning would train of these matrices: use the rank")
    if answer == 2 * 3_407_872:
        return not_yet("alpha scales the correction; it adds no numbers")
    return not_yet("add up rank x (in + out) over q_proj and v_proj, then over the layers")


def _check_merge(function) -> Result:
    import torch

    W = torch.arange(12.0).reshape(3, 4)
    A = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, -1.0]])
    B = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 0.0]])
    before = W.clone()
    got = function(W, A, B, 8.0)
    if not torch.equal(W, before):
        return not_yet("your function changed W itself: then nobody can go back to the base")
    got = torch.as_tensor(got)
    if got.shape != W.shape:
        return not_yet("the result must have W's shape: B is (out, r) and A is (r, in)")
    scales = {1.0: "the scale is missing", 8.0: "alpha is not yet divided by the rank"}
    for scale, mistake in scales.items():
        if torch.allclose(got, before + scale * B @ A):
            return not_yet(f"{mistake}: an adapter counts alpha / r times")
    if torch.allclose(got, before + 8.0 / 3 * B @ A):
        return not_yet("you divided alpha by W's rows: the rank is what A and B share")
    if torch.allclose(got, 4.0 * B @ A):
        return not_yet("that is the correction alone: add it to W")
    if not torch.allclose(got, before + 4.0 * B @ A):
        return not_yet("want W plus alpha / r times B @ A, in this order")
    return correct("one addition per matrix, after which A and B are not needed at run time")


def _check_alpha(answer) -> Result:
    plain, stabilised = (round(float(alpha), 2) for alpha in answer)
    if (plain, stabilised) == (32, 8):
        return correct("alpha / r is 2 for both: 32 / 16, and 8 / 4, since the root of 16 is 4")
    if (plain, stabilised) == (16, 16):
        return not_yet("with alpha kept, doubling the rank halves the scale of plain LoRA")
    if plain == 8:
        return not_yet("that way round the scale becomes a half: multiply the rank by it")
    if plain == 32 and stabilised == 32:
        return not_yet("rank-stabilised LoRA divides by the root of the rank, not by the rank")
    if plain == 32 and stabilised == 22.63:
        return not_yet("that keeps what rank-stabilised LoRA had at rank 8; want the scale 2")
    return not_yet("solve alpha / 16 = 2, and alpha / sqrt(16) = 2")


def _check_smallest(answer) -> Result:
    if answer == "MLP r6":
        return correct(
            "its interval reaches into the best one's, at a fifth of the numbers; a paired "
            "comparison over the same seeds would be sharper"
        )
    if answer == "all linear r16":
        return not_yet("the highest mean, but which smaller arms can you tell from it at all?")
    if answer == "all linear r4":
        return not_yet("it cannot be told from the best one; is it the smallest of those?")
    if answer == "q and v r16":
        return not_yet("its whole interval lies below the best one's")
    if answer == "q and v r1":
        return not_yet("the smallest of all, and clearly worse")
    return not_yet("answer with the name of one arm of the table, such as 'q and v r1'")


EXERCISES = (
    Exercise(
        id="03-1",
        aim="Predict what an adapter trains in a model of 8 B parameters.",
        difficulty="easy",
        minutes=4,
        check=_check_parameters,
        hints=(
            "A is rank x in, B is out x rank: how many numbers is that for one matrix?",
            "q_proj adds 8 x (4096 + 4096); v_proj is narrower, 8 x (4096 + 1024).",
            "Add both, then multiply by the 32 layers.",
        ),
        wrong_answers=("4_194_304", "106_496", "2_097_152", "32 * (4096 * 4096 + 4096 * 1024)"),
    ),
    Exercise(
        id="03-2",
        aim="Write a merge.",
        difficulty="medium",
        minutes=6,
        check=_check_merge,
        hints=(
            "W is (out, in), B is (out, r), A is (r, in): which product has W's shape?",
            "The rank is the number of rows of A: A.shape[0].",
            "W + (alpha / A.shape[0]) * B @ A, as a new tensor.",
        ),
        wrong_answers=(
            "lambda W, A, B, alpha: W + B @ A",
            "lambda W, A, B, alpha: W + alpha * B @ A",
            "lambda W, A, B, alpha: W + alpha / B.shape[0] * B @ A",
            "lambda W, A, B, alpha: alpha / A.shape[0] * B @ A",
            "lambda W, A, B, alpha: W.add_(alpha / A.shape[0] * B @ A)",
        ),
    ),
    Exercise(
        id="03-3",
        aim="Choose alpha so that a larger rank does not also change the scale.",
        difficulty="medium",
        minutes=5,
        check=_check_alpha,
        hints=(
            "Which number multiplies B A at rank 8 and alpha 16?",
            "Plain LoRA: alpha / r. Rank-stabilised LoRA: alpha / sqrt(r).",
            "The scale is 2: alpha is 2 x 16 in one case, 2 x sqrt(16) in the other.",
        ),
        wrong_answers=("(16, 16)", "(32, 32)", "(32, 32 / 2**0.5)", "(8, 8)"),
    ),
    Exercise(
        id="03-4",
        aim="Read a table of ranks and layers with its intervals.",
        difficulty="medium",
        minutes=4,
        check=_check_smallest,
        hints=(
            "Find the arm with the highest mean, and look at its whole interval.",
            "Which other arms have an interval that reaches into it?",
            "Of these, the one with the fewest numbers.",
        ),
        wrong_answers=("'all linear r16'", "'all linear r4'", "'q and v r16'", "'q and v r1'"),
    ),
)

QUIZZES = (
    Quiz(
        id="03-q1",
        question="LoRA starts with B at zero and A at random. What if both started at zero?",
        choices=(
            Choice("It would learn faster.", "With both at zero it could not learn at all."),
            Choice(
                "Nothing would ever be learned.",
                "A's gradient holds B as a factor and B's holds A: both are zero, step after step.",
                right=True,
            ),
            Choice("The same, only slower.", "Each gradient has the other as a factor."),
            Choice(
                "The first answers would differ from the base model's.",
                "They would not: the correction is zero either way.",
            ),
        ),
    ),
)
