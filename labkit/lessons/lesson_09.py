"""Exercises and quiz of `09_scale_out`."""

import math
from collections.abc import Mapping

from labkit.exercises import Choice, Exercise, Quiz, Result, correct, not_yet

_SHAPES = (
    ((1823, 256), 2),  # an odd number of rows
    ((5, 2, 3), 4),  # 2, 2, 1 and no row
    ((7,), 3),
    ((8, 4), 1),
)


def _rows_of(rows: int, rank: int, devices: int) -> int:
    """Rows that FSDP2 stores of a tensor on one device: chunks of ceil(rows / devices)."""
    chunk = -(-rows // devices)
    return max(0, min(chunk, rows - rank * chunk))


def _check_shard(function) -> Result:
    for shape, devices in _SHAPES:
        per_row = 4 * math.prod(shape[1:])
        for rank in range(devices):
            got = function(shape, rank, devices)
            want = per_row * _rows_of(shape[0], rank, devices)
            if got == want:
                continue
            where = f"shape {shape}, rank {rank} of {devices}"
            chunk = -(-shape[0] // devices)
            if got * 4 == want:
                return not_yet(f"{where}: you counted numbers; each takes 4 bytes in fp32")
            if got == 4 * _rows_of(shape[0], rank, devices) and len(shape) > 1:
                return not_yet(f"{where}: you counted rows; a row holds all further dimensions")
            if got == per_row * chunk:
                return not_yet(f"{where}: the last ranks get fewer rows: only what is left over")
            if got == per_row * (shape[0] // devices):
                return not_yet(f"{where}: rounding down loses the rows of the remainder")
            if math.isclose(got, per_row * shape[0] / devices):
                return not_yet(f"{where}: rows are not cut: a shard is a whole number of rows")
            if got < 0:
                return not_yet(
                    f"{where}: nothing is left for this rank, and bytes are never below 0"
                )
            return not_yet(f"{where}: want a chunk of ceil(rows / devices) rows, or what is left")
    return correct("chunks are rounded up, so the last ranks hold less, and sometimes nothing")


_RIGHT = {  # the lines of the file that need no repair
    "distributed_type": "FSDP",
    "num_machines": 2,
    "machine_rank": 0,
    "mixed_precision": "bf16",
    "fsdp_version": 2,
    "fsdp_reshard_after_forward": True,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
}
_REPAIRS = {"num_processes": 16, "fsdp_transformer_layer_cls_to_wrap": "MistralDecoderLayer"}


def _check_config(answer) -> Result:
    if not isinstance(answer, Mapping):
        return not_yet("answer with a dict: the keys to change, each with its right value")
    touched = sorted(key for key in set(answer) - set(_REPAIRS) if answer[key] != _RIGHT.get(key))
    if touched:
        reasons = {
            "num_machines": "num_machines is right: the job has two nodes",
            "fsdp_reshard_after_forward": "fsdp_reshard_after_forward is right for a model that is "
            "too large: it drops gathered weights after forward",
            "fsdp_version": "fsdp_version is right: fully_shard is version 2",
            "mixed_precision": "mixed_precision is right for these GPUs",
            "machine_rank": "machine_rank differs from node to node; 0 is right on the first",
        }
        right = "is right as it is" if touched[0] in _RIGHT else "is no key of the file"
        return not_yet(reasons.get(touched[0], f"{touched[0]} {right}"))
    wrong = {key: answer[key] for key in answer if answer[key] != (_RIGHT | _REPAIRS)[key]}
    if wrong.get("num_processes") == 2:
        return not_yet("num_processes counts GPUs of all nodes, one process each, not nodes")
    if "num_processes" in wrong:
        return not_yet("num_processes is that of the whole job: nodes times GPUs of a node")
    if wrong:
        return not_yet(
            "fsdp_transformer_layer_cls_to_wrap names the class of this model's decoder layer, as "
            "print(model) shows it"
        )
    if "num_processes" not in answer:
        return not_yet("one more: how many processes has the whole job?")
    if "fsdp_transformer_layer_cls_to_wrap" not in answer:
        return not_yet("one more: FSDP would look for a layer that this model does not have")
    return correct(
        "16 processes in all, and the layers are found; else the job hangs waiting for ranks, or "
        "FSDP stops because no layer has that name"
    )


def _check_stage(answer) -> Result:
    try:
        stage, gigabytes = answer
        stage, gigabytes = int(stage), round(float(gigabytes), 1)
    except (TypeError, ValueError):
        return not_yet("answer with a pair: the stage, and its GB on each device")
    sizes = {0: 120.0, 1: 41.2, 2: 28.1, 3: 15.0}  # 7.5 B on 8 devices
    if stage not in sizes:
        return not_yet("a stage is 0, 1, 2 or 3")
    if stage == 3:
        return not_yet("stage 3 fits, but another one fits too and sends less")
    if stage < 2:
        return not_yet(f"stage {stage} needs {sizes[stage]:g} GB here: more than the 30 GB at hand")
    if not math.isclose(gigabytes, sizes[2], abs_tol=0.11):
        if math.isclose(gigabytes, 15.0, abs_tol=0.11):
            return not_yet("16 P / N is stage 3's size: stage 2 keeps all weights on every device")
        if math.isclose(gigabytes, 120 / 8 * 2, abs_tol=0.11):
            return not_yet("2 P is not divided, 14 P is: do not divide first and double then")
        return not_yet("the stage is right; its size is 2 P + 14 P / N bytes")
    return correct("the first stage that fits, and the last one that sends no more than stage 0")


def _check_loss(function) -> Result:
    import torch

    # [device][micro-step]; 10 tokens in all, whose losses sum to 40.
    losses = [
        [torch.tensor([1.0, 3.0]), torch.tensor([6.0])],
        [torch.tensor([2.0, 2.0, 4.0, 4.0]), torch.tensor([5.0, 6.0, 7.0])],
    ]
    everywhere = sum(len(part) for device in losses for part in device)

    def step(of) -> float:
        """What DDP makes of it: micro-steps added up, then the mean over devices."""
        return sum(float(of(part)) for device in losses for part in device) / len(losses)

    got = step(lambda part: function(part, everywhere, 2, 3))
    mistakes = {
        4.0: None,
        step(lambda part: part.mean()): "each part's own mean: a token of a short part then "
        "counts for more than one of a long part",
        step(lambda part: part.mean() / 3): "each part's own mean: where parts differ in length, "
        "tokens no longer weigh alike, even averaged over micro-steps",
        2.0: "the devices are missing, over which DDP averages",
        4 / 3: "you divided by the micro-steps, whose gradients add up by themselves",
        20.0: "a bare sum: the step would grow with the number of tokens",
        12.0: "micro-steps add up by themselves: nothing has to be multiplied by their number",
        6.0: "DDP divides by the devices, not by the micro-steps, which add up by themselves",
        1.0: "you divided by the devices: DDP does that already, so it has to be undone",
    }
    for value, mistake in mistakes.items():
        if math.isclose(got, value, abs_tol=1e-5):
            return not_yet(mistake) if mistake else _on_one_device(function)
    return not_yet("want the part's sum, divided by all tokens, times what DDP divides by")


def _on_one_device(function) -> Result:
    import torch

    for accumulation in (1, 3):  # whose micro-steps add up by themselves
        got = float(function(torch.tensor([1.0, 3.0]), 2, 1, accumulation))
        if not math.isclose(got, 2.0, abs_tol=1e-5):
            return not_yet("on one device it must be the plain mean: use what you get")
    return correct("averaging over devices divides by their number, so each multiplies by it")


EXERCISES = (
    Exercise(
        id="09-1",
        aim="Predict the bytes of a shard.",
        difficulty="medium",
        minutes=6,
        check=_check_shard,
        hints=(
            "A tensor is cut along its first dimension, into chunks of whole rows.",
            "A chunk has ceil(rows / devices) rows, -(-rows // devices); the last get the rest.",
            "rows = max(0, min(chunk, shape[0] - rank * chunk)); times math.prod(shape[1:]) * 4.",
        ),
        wrong_answers=(
            "lambda shape, rank, devices: 4 * __import__('math').prod(shape) / devices",
            "lambda shape, rank, devices: 4 * __import__('math').prod(shape[1:])"
            " * (shape[0] // devices)",
            "lambda shape, rank, devices: 4 * __import__('math').prod(shape[1:])"
            " * -(-shape[0] // devices)",
            "lambda shape, rank, devices: __import__('math').prod(shape[1:])"
            " * max(0, min(-(-shape[0] // devices), shape[0] - rank * -(-shape[0] // devices)))",
            "lambda shape, rank, devices: 4"
            " * max(0, min(-(-shape[0] // devices), shape[0] - rank * -(-shape[0] // devices)))",
            "lambda shape, rank, devices: 4 * __import__('math').prod(shape[1:])"
            " * min(-(-shape[0] // devices), shape[0] - rank * -(-shape[0] // devices))",
        ),
    ),
    Exercise(
        id="09-2",
        aim="Find what is wrong in a configuration before a cluster waits for it.",
        difficulty="medium",
        minutes=5,
        check=_check_config,
        hints=(
            "Two of the lines do not fit the job that the text describes.",
            "How many processes run in all, one for each GPU? What is a decoder layer called here?",
            "16 processes; the class is the model's name with DecoderLayer after it.",
        ),
        wrong_answers=(
            "{'num_processes': 2}",
            "{'num_processes': 32}",
            "{'num_processes': 16}",
            "{'fsdp_transformer_layer_cls_to_wrap': 'MistralDecoderLayer'}",
            "{'num_processes': 16, 'fsdp_transformer_layer_cls_to_wrap': 'Mistral'}",
            "{'num_machines': 1}",
            "{'fsdp_reshard_after_forward': False}",
            "16",
        ),
    ),
    Exercise(
        id="09-3",
        aim="Choose a ZeRO stage by memory first, by what it sends second.",
        difficulty="easy",
        minutes=4,
        check=_check_stage,
        hints=(
            "Which stages fit in 40 - 10 GB? Use 16 P, 4 P + 12 P / N, 2 P + 14 P / N, 16 P / N.",
            "Of those that fit, which sends least? Stages 0 to 2 send 2 P, stage 3 sends 3 P.",
            "2 x 7.5 + 14 x 7.5 / 8 GB.",
        ),
        wrong_answers=("(3, 15)", "(1, 41.25)", "(0, 120)", "(2, 15)", "(2, 30)", "2"),
    ),
    Exercise(
        id="09-4",
        aim="Weigh every token alike, on whatever device and in whatever micro-step it lies.",
        difficulty="medium",
        minutes=6,
        check=_check_loss,
        hints=(
            "The goal is the sum over all tokens of the whole step, divided by their number.",
            "Gradients of micro-steps add up; those of devices are averaged by DDP.",
            "token_losses.sum() / n_tokens * devices; accumulation plays no part.",
        ),
        wrong_answers=(
            "lambda token_losses, n_tokens, devices, accumulation: token_losses.mean()",
            "lambda token_losses, n_tokens, devices, accumulation: token_losses.mean()"
            " / accumulation",
            "lambda token_losses, n_tokens, devices, accumulation: token_losses.sum() / n_tokens",
            "lambda token_losses, n_tokens, devices, accumulation: token_losses.sum()",
            "lambda token_losses, n_tokens, devices, accumulation: token_losses.sum() / n_tokens"
            " * devices * accumulation",
            "lambda token_losses, n_tokens, devices, accumulation: token_losses.sum() / n_tokens"
            " / devices",
            "lambda token_losses, n_tokens, devices, accumulation: token_losses.sum() / n_tokens"
            " * 2",
            "lambda token_losses, n_tokens, devices, accumulation: token_losses.sum() / n_tokens"
            " * accumulation",
        ),
    ),
)

QUIZZES = (
    Quiz(
        id="09-q1",
        question="You change ZeRO stage 2 to stage 3 and nothing else. What do you expect?",
        choices=(
            Choice(
                "A lower loss, as the model is better distributed.",
                "Sharding decides where numbers lie, not what they are.",
            ),
            Choice(
                "The same losses up to rounding, less memory on each device, more bytes sent.",
                "Weights are divided too, and so have to be gathered in forward and backward.",
                right=True,
            ),
            Choice(
                "The same losses and half the steps.",
                "Steps depend on rows, batch and devices; none of these changed.",
            ),
            Choice(
                "A faster step, as each device has less to do.",
                "Each device computes as much as before, and waits for gathered weights as well.",
            ),
        ),
    ),
)
