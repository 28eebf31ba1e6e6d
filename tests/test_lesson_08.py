"""Exercise 08-2 has several right answers, each judged by the estimate, and names each mistake."""

import pytest

from labkit.exercises import find_exercise, grade

SMALL_PASSES = {"batch_size": 2, "accumulation_steps": 4}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "qlora"},
        {"method": "qlora", "loss_path": "fused", **SMALL_PASSES},
        {"method": "lora", "loss_path": "fused", **SMALL_PASSES},
        {"method": "lora", "batch_size": 1, "accumulation_steps": 8},
        {"method": "freeze", "batch_size": 1, "accumulation_steps": 8},
        {"zero_stage": 3, "offload": "cpu", "loss_path": "fused", **SMALL_PASSES},
    ],
    ids=str,
)
def test_many_ways_fit(changes):
    result = grade(find_exercise("08-2"), changes)
    assert result.ok, result.message
    assert "GiB to spare" in result.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "it peaks at 67.5 GiB, in the phase `optimizer step`"),
        ({"method": "lora", "lora_dropout": 0.0, "lora_rank": 4, "loss_path": "padded",
          "batch_size": 5}, "a step must still see 8 rows, yours sees 5"),
        (
            {"method": "lora", "target_modules": "q_proj,v_proj", "loss_path": "fused"},
            "21.9 GiB is less than the card's 23.5, but context and allocator need some",
        ),
        ({"device": "cpu"}, "leave `device` as it is"),
        ({"method": "magic"}, "the estimate refuses: method='magic' is unknown"),
        ({"dropout": 0}, "the estimate refuses: dropout=0: no such option"),
        ("qlora", "answer with a dict"),
    ],
    ids=str,
)  # fmt: skip
def test_each_mistake_has_its_own_words(changes, said):
    result = grade(find_exercise("08-2"), changes)
    assert not result.ok and said in result.message
