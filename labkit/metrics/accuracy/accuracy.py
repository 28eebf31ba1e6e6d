"""Accuracy: the share of labels that are right.

>>> accuracy([0, 1, 1, 0], [0, 1, 0, 1])
0.5
"""

import datasets
import evaluate


def accuracy(predictions: list, references: list) -> float:
    """Share in 0..1 of equal labels."""
    pairs = zip(predictions, references, strict=True)
    return sum(ours == gold for ours, gold in pairs) / len(references)


class Accuracy(evaluate.Metric):
    """`compute(predictions=labels, references=labels)` gives {"accuracy": 0..1}."""

    def _info(self):
        number, text = datasets.Value("int64"), datasets.Value("string")
        return evaluate.MetricInfo(
            description="Share of labels that are right.",
            citation="",
            inputs_description="predictions, references: labels, whole numbers or strings.",
            features=[
                datasets.Features({"predictions": number, "references": number}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(self, predictions, references):
        return {"accuracy": accuracy(predictions, references)}
