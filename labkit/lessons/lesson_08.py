"""Exercises and quiz of `08_memory`."""

from labkit.exercises import Choice, Exercise, Quiz, Result, correct, not_yet

GIB = 2**30
ROWS, LEAST_TRAINED = 8, 1_000_000


def _check_size(answer) -> Result:
    billions = answer / 1.5e9
    if billions == 10:
        return correct(
            "2 for the weight, 2 for the gradient, 4 for two means, and 2 for the roots that the "
            "step takes of all second means at once: 15 GB"
        )
    mistakes = {
        2: "that is the weights alone: gradients and the optimizer live at that moment, too",
        4: "weights and gradients: the optimizer's two means are missing",
        6: "AdamW keeps two means, not one, and works with something while it steps",
        8: "what lasts is right; while all tensors are updated at once, one more copy lives",
        12: "two bytes too many a parameter: only the roots of the second means are made at once",
        16: "that is ZeRO's count of mixed precision, with fp32 copies: here all is bf16",
        18: "that counts fp32 copies and fp32 gradients: here all is bf16",
        20: "that is fp32: every number here has two bytes",
    }
    if billions in mistakes:
        return not_yet(mistakes[billions])
    if answer < 1000:
        return not_yet("want bytes: a whole number such as 3_000_000_000")
    return not_yet("count weight, gradient, two means, and what the step works with, in bf16")


def _check_fit(answer) -> Result:
    from labkit.memory import estimate, gpus, reference

    if not isinstance(answer, dict):
        return not_yet('answer with a dict of options to change, such as {"batch_size": 2}')
    job = {"seq_len": 2048, "batch_size": ROWS, "attention": "flash_attention_2", "dtype": "bf16"}
    changed = {**job, **answer}
    card = gpus.find("RTX 4090")
    if {"hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"} & set(answer):
        return not_yet("that is another model: change how it is trained, not what it is")
    if changed["seq_len"] != job["seq_len"]:
        return not_yet("rows of 2,048 tokens must stay: shorter rows cut the data")
    if changed.get("num_devices", 1) != 1:
        return not_yet("one card is all there is: what can one do?")
    if changed.get("device", "cuda") != "cuda":
        return not_yet("the card is a CUDA device: leave `device` as it is")
    try:
        found = estimate(reference.model("Mistral-7B-v0.1"), **changed)
    except ValueError as refusal:
        return not_yet(f"the estimate refuses: {refusal}")
    rows = changed["batch_size"] * changed.get("accumulation_steps", 1)
    if rows != ROWS:
        return not_yet(f"a step must still see {ROWS} rows, yours sees {rows}: accumulate passes")
    if found.trainable_parameters < LEAST_TRAINED:
        return not_yet(
            f"it trains {found.trainable_parameters:,} numbers, hardly anything: want a million"
        )
    if changed.get("method") == "prefix" and changed.get("gradient_checkpointing", True):
        return not_yet("a prefix with checkpointing fails: a recomputed layer drops the prefix")
    peak = found.peak_allocated_bytes
    room = card.memory_bytes - gpus.reserve_bytes(card.memory_bytes)
    if peak > card.memory_bytes:
        return not_yet(
            f"it peaks at {peak / GIB:.1f} GiB, in the phase `{found.phase}`: what lives there?"
        )
    if peak > room:
        return not_yet(
            f"{peak / GIB:.1f} GiB is less than the card's {card.memory_bytes / GIB:.1f}, but "
            f"context and allocator need some: {room / GIB:.1f} GiB are left for tensors"
        )
    return correct(
        f"{peak / GIB:.1f} GiB at the peak, in the phase `{found.phase}`, with "
        f"{(room - peak) / GIB:.1f} GiB to spare; other ways fit, too, at other prices"
    )


def _check_knobs(answer) -> Result:
    names = {answer} if isinstance(answer, str) else {str(name) for name in answer}
    known = {"half the batch", "fused AdamW", "shorter rows", "fused loss", "8-bit AdamW"}
    if unknown := sorted(names - known):
        return not_yet(f"{unknown[0]!r} is none of the five: {', '.join(sorted(known))}")
    if names == {"fused AdamW", "8-bit AdamW"}:
        return correct("the peak is the optimizer step: only what lives then can lower it")
    if names & {"half the batch", "shorter rows"}:
        return not_yet(
            "activations are gone when this peak comes: fewer tokens change next to nothing"
        )
    if "fused loss" in names:
        return not_yet("the logits are gone as well: they lower a phase that does not win")
    if names == {"fused AdamW"}:
        return not_yet("one of two: what else of the optimizer could be narrower?")
    if names == {"8-bit AdamW"}:
        return not_yet("one of two: what does the step work with, beside the states?")
    return not_yet("name at least one: what lives during the optimizer step?")


def _check_states(function) -> Result:
    got = [float(function(8e9, stage, 4)) for stage in range(4)]
    want = [128e9, 56e9, 44e9, 32e9]
    mistakes = (
        ([32e9] * 4, "every stage divides everything: stages 1 and 2 leave parts whole"),
        ([128e9] * 4, "nothing is divided yet: stage and devices must matter"),
        ([128e9, 32e9, 16e9, 8e9], "4x, 8x and 16x are limits: use the number of devices"),
        ([w / 1e9 for w in want], "want bytes, not GB"),
        ([128e9, 56e9, 68e9, 32e9], "stage 2 divides the optimizer's 12 as well as gradients"),
        ([128e9, 96e9, 80e9, 32e9], "the optimizer has 12 bytes a parameter, not 8"),
    )
    if got == want:
        alone = [float(function(8e9, stage, 1)) for stage in range(4)]
        if alone != [128e9] * 4:
            return not_yet("on one device no stage saves anything: 16 bytes a parameter")
        return correct("12 of 16 bytes are the optimizer's, so stage 1 alone brings most of it")
    for values, mistake in mistakes:
        if got == values:
            return not_yet(mistake)
    wrong = next(stage for stage in range(4) if got[stage] != want[stage])
    return not_yet(f"stage {wrong} is not right: which of 2 + 2 + 12 bytes does it divide by N?")


EXERCISES = (
    Exercise(
        id="08-1",
        aim="Count a full fine-tuning's bytes at its peak.",
        difficulty="easy",
        minutes=4,
        check=_check_size,
        hints=(
            "The riddle of section 2 has the answer for 7.24 B: divide.",
            "Weight, gradient, two means: four numbers of 2 bytes. What else lives in the step?",
            "The step takes the roots of all second means at once: 2 bytes more, so 10 x 1.5e9.",
        ),
        wrong_answers=("2 * 1.5e9", "8 * 1.5e9", "16 * 1.5e9", "20 * 1.5e9", "15"),
    ),
    Exercise(
        id="08-2",
        aim="Make a training fit by changing how it is done.",
        difficulty="medium",
        minutes=8,
        check=_check_fit,
        hints=(
            "Look at what lives at the peak: memory.estimate(MISTRAL, ...).terms, largest first.",
            "Full fine-tuning needs 72 GB before the first token: another method comes first.",
            "Smaller passes with accumulation, a fused loss and checkpointing shrink the rest.",
        ),
        wrong_answers=(
            '{"method": "lora"}',
            '{"method": "lora", "batch_size": 1}',
            '{"method": "lora", "target_modules": "q_proj,v_proj", "loss_path": "fused"}',
            '{"method": "qlora", "seq_len": 512}',
            '{"method": "qlora", "batch_size": 0}',
            '{"num_hidden_layers": 16}',
            '{"num_devices": 8, "zero_stage": 3}',
            '{"method": "prompt", "batch_size": 1, "accumulation_steps": 8}',
            '{"method": "prefix", "batch_size": 1, "accumulation_steps": 8}',
        ),
    ),
    Exercise(
        id="08-3",
        aim="Tell knobs that lower a peak from those that lower something else.",
        difficulty="medium",
        minutes=5,
        check=_check_knobs,
        hints=(
            "Which phase wins in this training? Look at the first panel of section 14.",
            "Ask of each knob whether what it shrinks is alive in the optimizer step.",
            "Tokens and logits are gone by then. States and the step's own copy are not.",
        ),
        wrong_answers=(
            "'half the batch'",
            "{'fused loss', 'fused AdamW', '8-bit AdamW'}",
            "{'fused AdamW'}",
            "{'8-bit AdamW'}",
            "{'LoRA'}",
        ),
    ),
    Exercise(
        id="08-4",
        aim="Write ZeRO's count.",
        difficulty="medium",
        minutes=5,
        check=_check_states,
        hints=(
            "16 bytes a parameter: 2 weights, 2 gradients, 12 for the optimizer.",
            "Stage 1 divides the 12, stage 2 the gradients too, stage 3 everything.",
            "parameters * (16 - divided + divided / devices), divided: 0, 12, 14, 16.",
        ),
        wrong_answers=(
            "lambda p, stage, n: 16 * p",
            "lambda p, stage, n: 16 * p / n",
            "lambda p, stage, n: 16 * p / (1, 4, 8, 16)[stage]",
            "lambda p, stage, n: p * (16, 4 + 12 / n, 14 + 14 / n / 4, 16 / n)[stage]",
            "lambda p, stage, n: p / 1e9 * (16, 4 + 12 / n, 2 + 14 / n, 16 / n)[stage]",
        ),
    ),
)

QUIZZES = (
    Quiz(
        id="08-q1",
        question="You turn checkpointing on, and the peak does not move. Why?",
        choices=(
            Choice(
                "Checkpointing is broken.",
                "It may well shrink what is kept: look at the phase that wins.",
            ),
            Choice(
                "The peak is a moment at which nothing is kept for backward.",
                "Such as the optimizer step: another knob helps there. At the loss what all layers "
                "keep still lives, so there it does move the peak, as section 12 shows.",
                right=True,
            ),
            Choice(
                "The batch is too small for it.",
                "With a small batch it saves little, but what matters is which phase wins.",
            ),
            Choice("The model is frozen.", "Frozen layers keep activations as well, as you saw."),
        ),
    ),
)
