"""chrF: the F-score of shared runs of 1 to 6 characters (Popovic 2015), kind to word endings.

chrF = (1 + b^2) P R / (b^2 P + R), b = 2

P and R are precision and recall of character n-grams over the whole corpus, averaged over the
orders; spaces are left out. Equal to sacreBLEU's default chrF2, 0 to 100.

>>> round(corpus_chrf(["abc"], [["abd"]]), 2)
38.89
"""

from collections import Counter

import datasets
import evaluate

MAX_ORDER = 6
BETA_SQUARED = 4


def ngrams(text: str) -> list[Counter]:
    """Counts of the character n-grams of order 1 to MAX_ORDER, without spaces."""
    text = "".join(text.split())
    return [
        Counter(text[start : start + order] for start in range(len(text) - order + 1))
        for order in range(1, MAX_ORDER + 1)
    ]


def f_score(statistics: list[list[int]]) -> float:
    """F in 0..100 from the counts [ours, gold, matched] of each order that both texts have."""
    orders = [order for order in statistics if order[0] and order[1]]
    if not any(matched for _, _, matched in orders):
        return 0.0
    precision = sum(matched / ours for ours, _, matched in orders) / len(orders)
    recall = sum(matched / gold for _, gold, matched in orders) / len(orders)
    return 100 * (1 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall)


def corpus_chrf(predictions: list[str], references: list[list[str]]) -> float:
    """chrF in 0..100 over the corpus, each text against the reference that suits it best."""
    totals = [[0, 0, 0] for _ in range(MAX_ORDER)]
    for prediction, golds in zip(predictions, references, strict=True):
        candidates = []
        for gold in golds:
            pairs = zip(ngrams(prediction), ngrams(gold), strict=True)
            # An order that the reference is too short for counts against nobody.
            candidates.append(
                [[a.total() if b else 0, b.total(), (a & b).total()] for a, b in pairs]
            )
        for total, counts in zip(totals, max(candidates, key=f_score), strict=True):
            total[:] = [x + y for x, y in zip(total, counts, strict=True)]
    return f_score(totals)


class Chrf(evaluate.Metric):
    """`compute(predictions=[str], references=[str or [str]])` gives {"chrf": 0..100}."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Corpus chrF2, equal to sacreBLEU's default.",
            citation="Popovic 2015, chrF: character n-gram F-score for automatic MT evaluation",
            inputs_description="predictions: strings; references: a string or a list of them each.",
            features=[
                datasets.Features({"predictions": text, "references": text}),
                datasets.Features({"predictions": text, "references": datasets.List(text)}),
            ],
        )

    def _compute(self, predictions, references):
        golds = [[gold] if isinstance(gold, str) else gold for gold in references]
        return {"chrf": corpus_chrf(predictions, golds)}
