"""Exact match: the share of answers that equal their reference, letter by letter.

exact match = (1/N) * sum of [strip(prediction) == strip(reference)]

>>> exact_match(["Velden", " Velden ", "velden"], ["Velden", "Velden", "Velden"])
0.6666666666666666
"""

import datasets
import evaluate


def exact_match(predictions: list[str], references: list[str]) -> float:
    """Share in 0..1; spaces around an answer are ignored, case and punctuation count."""
    pairs = zip(predictions, references, strict=True)
    return sum(ours.strip() == gold.strip() for ours, gold in pairs) / len(references)


class ExactMatch(evaluate.Metric):
    """`compute(predictions=[str], references=[str])` gives {"exact_match": 0..1}."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions, references: lists of strings.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        return {"exact_match": exact_match(predictions, references)}
