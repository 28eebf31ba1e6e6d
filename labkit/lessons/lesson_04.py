"""Exercises and quiz of `04_qlora`."""

import math

from labkit.exercises import Choice, Exercise, Quiz, Result, correct, not_yet

_WEIGHTS = [0.6, -2.0, 0.1, 1.1]
_LEVELS = [-1.0, -0.5, 0.0, 0.5, 1.0]


def _check_block(function) -> Result:
    weights, levels = list(_WEIGHTS), list(_LEVELS)
    got = [float(value) for value in function(weights, levels)]
    if weights != _WEIGHTS:
        return not_yet("your function changed `weights` itself: build a new list")
    if got == [3, 0, 2, 3]:
        return not_yet("those are the codes; look each up in the levels, then scale it back")
    if _close(got, [0.5, -1.0, 0.0, 0.5]):
        return not_yet("those are the levels; multiply by the block's constant to get weights back")
    if _close(got, [0.5, -1.0, 0.0, 1.0]):
        return not_yet("the weights went to the levels as they are: divide by the constant first")
    if _close(got, [0.55, -1.1, 0.0, 1.1]):
        return not_yet("your constant is the largest weight; it must be the largest *absolute* one")
    if not _close(got, [1.0, -2.0, 0.0, 1.0]):
        return not_yet(f"for the weights {_WEIGHTS} and the levels {_LEVELS}, 0.6 becomes 1.0")
    try:
        zeros = [float(value) for value in function([0.0, 0.0], levels)]
    except ZeroDivisionError:
        zeros = [math.nan]
    if not _close(zeros, [0.0, 0.0]):
        return not_yet(
            "right, except for a block of zeros, whose constant nothing can be divided by"
        )
    return correct("one constant a block, the nearest level, and back: that is all of NF4")


def _close(got: list[float], want: list[float]) -> bool:
    return len(got) == len(want) and all(abs(a - b) < 1e-6 for a, b in zip(got, want, strict=True))


def _check_bits(answer) -> Result:
    answer = float(answer)
    if answer == 4.0625:
        return not_yet("nearly: 256 constants share one fp32 constant of their own")
    if abs(answer - (4 + 8 / 128 + 32 / (128 * 256))) < 6e-4:
        return correct("twice the block, half the constants; the error grows a little in exchange")
    if answer == 4:
        return not_yet("those are the codes alone: each block has a constant too")
    if answer == 4.25:
        return not_yet("that is an fp32 constant; double quantization stores it in 8 bits")
    if abs(answer - 4.127) < 1e-3:
        return not_yet("that is for blocks of 64, as in the notebook; here a block has 128 weights")
    if answer == 0.5 or abs(answer - 0.508) < 1e-3:
        return not_yet("give bits for each weight, not bytes")
    return not_yet("add up a block's codes, its constant, and its share of the constant's constant")


def _check_gigabytes(answer) -> Result:
    answer = float(answer)
    right = 6.5 * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 0.5 * 2
    if abs(answer - right) < 0.02:
        return correct("the half billion outside the linear layers takes nearly a quarter of it")
    if answer > 1e9:
        return not_yet("give gigabytes: divide by 10**9")
    if abs(answer - 3.5) < 0.02:
        return not_yet("that is half a byte for everything: constants and 16-bit parts are missing")
    if abs(answer - 3.61) < 0.02:
        return not_yet("the numbers outside the linear layers are not quantized")
    if abs(answer - 4.25) < 0.02:
        return not_yet("the constants are missing: a weight takes more than 4 bits")
    if abs(answer - 3.35) < 0.02:
        return not_yet("those are the linear layers alone; add what stays in bf16")
    if abs(answer - 14) < 0.02:
        return not_yet("that is the model in bf16, before anything was quantized")
    return not_yet("add two parts: 6.5 billion weights in bits, 0.5 billion numbers of two bytes")


def _check_unquantized(function) -> Result:
    import torch

    def stored(dtype, trained=False) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.zeros(4, dtype=dtype), requires_grad=trained)

    class Small(torch.nn.Module):
        """A model with one parameter of each kind; the names say what they are."""

        def __init__(self):
            super().__init__()
            self.embed_tokens = stored(torch.bfloat16)
            self.q_proj = stored(torch.uint8)
            self.up_proj = stored(torch.int8)
            self.input_norm = stored(torch.float32)
            self.lora_A = stored(torch.float32, trained=True)

    got = sorted(function(Small()))
    everything = ["embed_tokens", "input_norm", "lora_A", "q_proj", "up_proj"]
    if got == ["embed_tokens", "input_norm", "lora_A"]:
        return correct("a packed weight holds whole numbers; what stays holds floating-point ones")
    if got == everything:
        return not_yet("that is every parameter; leave out those that are packed")
    if got == ["q_proj", "up_proj"]:
        return not_yet("those are the quantized ones; the others were asked for")
    if got == ["embed_tokens", "input_norm", "lora_A", "up_proj"]:
        return not_yet("an int8 weight is quantized too, although it is not uint8")
    if got == ["input_norm", "lora_A"]:
        return not_yet("bf16 is no quantization: embeddings may be stored so")
    if got == ["lora_A"]:
        return not_yet("that is what is trained; frozen parts can be unquantized as well")
    if got and not isinstance(got[0], str):
        return not_yet("give names, as named_parameters() has them, not tensors")
    return not_yet("ask each parameter for its dtype: does it hold floating-point numbers?")


EXERCISES = (
    Exercise(
        id="04-1",
        aim="Round a block of weights to 4 bits and back.",
        difficulty="medium",
        minutes=8,
        check=_check_block,
        hints=(
            "Three steps: divide by the block's constant, find the nearest level, multiply again.",
            "The constant is max(abs(w) for w in weights); what if it is 0?",
            "min(levels, key=lambda level: abs(level - w / constant)) is the nearest level.",
        ),
        wrong_answers=(
            "lambda weights, levels: [3, 0, 2, 3]",
            "lambda weights, levels: [min(levels, key=lambda q: abs(q - w / 2)) for w in weights]",
            "lambda weights, levels: [min(levels, key=lambda q: abs(q - w)) for w in weights]",
            "lambda weights, levels: [1.1 * min(levels, key=lambda q: abs(q - w / 1.1)) "
            "for w in weights]",
            "lambda weights, levels: [max(map(abs, weights)) * min(levels, key=lambda q: "
            "abs(q - w / max(map(abs, weights)))) for w in weights]",
        ),
    ),
    Exercise(
        id="04-2",
        aim="Count the bits of a weight for any block size.",
        difficulty="easy",
        minutes=4,
        check=_check_bits,
        hints=(
            "A block of 128 weights has 128 codes of 4 bits, and one constant.",
            "With double quantization that constant takes 8 bits instead of 32.",
            "256 constants share 32 more bits, so 256 blocks of 128 weights do.",
        ),
        wrong_answers=("4.0", "4.25", "4.0625", "4.127", "4.5"),
    ),
    Exercise(
        id="04-3",
        aim="Say what a 4-bit model of 7 billion parameters takes, embeddings included.",
        difficulty="medium",
        minutes=5,
        check=_check_gigabytes,
        hints=(
            "Only the linear layers are quantized.",
            "6.5 billion weights of 4.127 bits: divide by 8 for bytes.",
            "0.5 billion numbers in bf16 take 1.0 GB; add the two.",
        ),
        wrong_answers=("3.5", "3.61", "4.25", "3.35", "14", "4.35e9"),
    ),
    Exercise(
        id="04-4",
        aim="Find what stays unquantized in any model.",
        difficulty="medium",
        minutes=6,
        check=_check_unquantized,
        hints=(
            "model.named_parameters() gives pairs of a name and a parameter.",
            "A weight that is packed here holds whole numbers: its dtype is enough to tell.",
            "parameter.is_floating_point() says which kind it holds.",
        ),
        wrong_answers=(
            "lambda model: [n for n, p in model.named_parameters()]",
            "lambda model: [n for n, p in model.named_parameters() if not p.is_floating_point()]",
            "lambda model: [n for n, p in model.named_parameters() if 'uint8' not in str(p.dtype)]",
            "lambda model: [n for n, p in model.named_parameters() if '32' in str(p.dtype)]",
            "lambda model: [n for n, p in model.named_parameters() if p.requires_grad]",
        ),
    ),
)

QUIZZES = (
    Quiz(
        id="04-q1",
        question="The GPU is full in the middle of a QLoRA run. What does a paged optimizer move?",
        choices=(
            Choice("Rows of the training data.", "They are on the host anyway, and small."),
            Choice("The 4-bit weights.", "Every forward pass needs them; they stay on the GPU."),
            Choice(
                "AdamW's two means of each trained number.",
                "They are needed once a step, so they can wait on the host in between.",
                right=True,
            ),
            Choice("Activations.", "Gradient checkpointing makes those smaller; paging does not."),
        ),
    ),
)
