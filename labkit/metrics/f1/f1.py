"""Macro F1: the F1 of each label, averaged so that a rare label counts as much as a common one.

F1 of a label = 2 TP / (2 TP + FP + FN); a label counts if it occurs among either list.

>>> macro_f1(["a", "a", "b"], ["a", "b", "b"])
0.6666666666666666
"""

from statistics import fmean

import datasets
import evaluate


def macro_f1(predictions: list, references: list) -> float:
    """Mean over labels of F1, in 0..1."""
    pairs = list(zip(predictions, references, strict=True))
    scores = []
    for label in sorted({*predictions, *references}):
        both = sum(ours == label == gold for ours, gold in pairs)
        either = sum((ours == label) + (gold == label) for ours, gold in pairs)
        scores.append(2 * both / either)
    return fmean(scores)


class F1(evaluate.Metric):
    """`compute(predictions=labels, references=labels)` gives {"f1": 0..1}, macro average."""

    def _info(self):
        number, text = datasets.Value("int64"), datasets.Value("string")
        return evaluate.MetricInfo(
            description="Macro F1: the mean of each label's F1.",
            citation="",
            inputs_description="predictions, references: labels, whole numbers or strings.",
            features=[
                datasets.Features({"predictions": number, "references": number}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(self, predictions, references):
        return {"f1": macro_f1(predictions, references)}
