"""ROUGE: how much of a reference a summary recovers (Lin 2004), as the F1 of shared pieces.

rouge1 and rouge2 count shared words and word pairs; rougeL the longest common subsequence.
F1 = 2 P R / (P + R), averaged over texts; words are lower-case letters and digits, not stemmed,
as in the rouge-score package.

>>> rouge(["the cat sat"], ["the cat lay"])
{'rouge1': 0.6666666666666666, 'rouge2': 0.5, 'rougeL': 0.6666666666666666}
"""

import re
from collections import Counter
from statistics import fmean

import datasets
import evaluate


def words(text: str) -> list[str]:
    """Lower-case runs of the letters a to z and digits."""
    return re.findall(r"[a-z0-9]+", text.lower())


def shared_ngrams(ours: list[str], gold: list[str], order: int) -> float:
    """F1 of the n-grams of one order."""
    a, b = [Counter(zip(*(side[k:] for k in range(order)), strict=False)) for side in (ours, gold)]
    pieces = a.total() + b.total()
    return 2 * (a & b).total() / pieces if pieces else 0.0


def shared_subsequence(ours: list[str], gold: list[str]) -> float:
    """F1 of the longest common subsequence, one row of the table at a time."""
    if not ours or not gold:
        return 0.0
    row = [0] * (len(gold) + 1)
    for word in ours:
        above = row
        row = [0]
        for column, other in enumerate(gold):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
    return 2 * row[-1] / (len(ours) + len(gold))


def rouge(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Mean F1 in 0..1 of rouge1, rouge2 and rougeL."""
    pairs = [(words(a), words(b)) for a, b in zip(predictions, references, strict=True)]
    return {
        "rouge1": fmean(shared_ngrams(a, b, 1) for a, b in pairs),
        "rouge2": fmean(shared_ngrams(a, b, 2) for a, b in pairs),
        "rougeL": fmean(shared_subsequence(a, b) for a, b in pairs),
    }


class Rouge(evaluate.Metric):
    """`compute(predictions=[str], references=[str])` gives rouge1, rouge2, rougeL in 0..1."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE F1, equal to the rouge-score package without stemming.",
            citation="Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
            inputs_description="predictions, references: lists of strings.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        return rouge(predictions, references)
