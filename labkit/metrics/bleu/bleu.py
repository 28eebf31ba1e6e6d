"""BLEU: how many runs of 1 to 4 words a translation shares with its references (Papineni 2002).

BLEU = BP * exp( (1/4) * sum over n of log p_n ),   BP = min(1, exp(1 - r / c))

p_n is the clipped precision of n-grams over the whole corpus, c the length of the predictions and
r that of the references. Words are split as WMT's mteval-v13a does, and an order without a match
gets 1/2, 1/4, ... of a match, so the score equals sacreBLEU's default (Post 2018), 0 to 100.

>>> round(corpus_bleu(["the cat sat on the mat"], [["the cat sat on a mat"]]), 2)
53.73
"""

import math
import re
from collections import Counter

import datasets
import evaluate

MAX_ORDER = 4
ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
# mteval-v13a: symbols stand alone, but a point or comma within a number, and a dash between
# letters, stay where they are.
SPLITS = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def words(text: str) -> list[str]:
    """Words and symbols of a line, split as mteval-v13a splits it."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in ENTITIES.items():
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in SPLITS:
        text = pattern.sub(replacement, text)
    return text.split()


def ngrams(tokens: list[str]) -> Counter:
    """Counts of every run of 1 to MAX_ORDER tokens."""
    return Counter(
        tuple(tokens[start : start + order])
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(tokens) - order + 1)
    )


def corpus_bleu(predictions: list[str], references: list[list[str]]) -> float:
    """BLEU in 0..100 of one text against its references, over the whole corpus."""
    matches, totals = [0] * MAX_ORDER, [0] * MAX_ORDER
    ours_length = gold_length = 0
    for prediction, golds in zip(predictions, references, strict=True):
        ours, golds = words(prediction), [words(gold) for gold in golds]
        ours_length += len(ours)
        # The reference closest in length; the shorter one of two as close.
        gold_length += min((abs(len(gold) - len(ours)), len(gold)) for gold in golds)[1]
        allowed = Counter()
        for gold in golds:
            allowed |= ngrams(gold)
        for ngram, count in ngrams(ours).items():
            matches[len(ngram) - 1] += min(count, allowed[ngram])
            totals[len(ngram) - 1] += count
    if not any(matches) or not all(totals):
        return 0.0
    log_precision, smoothing = 0.0, 1.0
    for matched, total in zip(matches, totals, strict=True):
        if matched == 0:
            smoothing /= 2
        log_precision += math.log((matched or smoothing) / total) / MAX_ORDER
    brevity = min(1.0, math.exp(1 - gold_length / ours_length))
    return 100 * brevity * math.exp(log_precision)


class Bleu(evaluate.Metric):
    """`compute(predictions=[str], references=[str or [str]])` gives {"bleu": 0..100}."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Corpus BLEU, equal to sacreBLEU's default.",
            citation="Papineni et al. 2002, BLEU; Post 2018, arXiv:1804.08771",
            inputs_description="predictions: strings; references: a string or a list of them each.",
            features=[
                datasets.Features({"predictions": text, "references": text}),
                datasets.Features({"predictions": text, "references": datasets.List(text)}),
            ],
        )

    def _compute(self, predictions, references):
        golds = [[gold] if isinstance(gold, str) else gold for gold in references]
        return {"bleu": corpus_bleu(predictions, golds)}
