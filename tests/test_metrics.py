"""The shipped metrics against scikit-learn, sacreBLEU and rouge-score, offline and side by side."""

import os
import random
import subprocess
import sys

import evaluate
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score

from labkit.metrics import METRICS, load_metric, metric_path
from labkit.metrics.bleu.bleu import corpus_bleu
from labkit.metrics.chrf.chrf import corpus_chrf
from labkit.metrics.exact_match.exact_match import exact_match
from labkit.metrics.f1.f1 import macro_f1
from labkit.metrics.rouge.rouge import rouge

WORDS = (
    "the a cat dog lives in Velden, Mira Tolen paid 3.50 for 2,000 well-known apples-and 7-8 "
    "pears. Was it 'good'? yes! (no) &quot;ok&quot; &amp; a/b naïve Größe ÉTÉ 東京 x_y #1 $5 50% "
    "<skipped> … mother's"
).split(" ")


def _texts(seed: int, count: int = 40) -> tuple[list[str], list[str], list[str]]:
    """Predictions, first references and second references: some equal, some empty."""
    rng = random.Random(seed)
    golds = [" ".join(rng.choices(WORDS, k=rng.randint(1, 14))) for _ in range(count)]
    others = [" ".join(rng.choices(WORDS, k=rng.randint(1, 14))) for _ in range(count)]
    ours = []
    for gold in golds:
        words = [rng.choice(WORDS) if rng.random() < 0.3 else word for word in gold.split(" ")]
        rng.random() < 0.3 and rng.shuffle(words)
        ours.append("" if rng.random() < 0.1 else " ".join(words))
    return ours, golds, others


@pytest.mark.parametrize("seed", range(10))
def test_bleu_equals_sacrebleu(seed):
    ours, golds, others = _texts(seed)
    expected = sacrebleu.corpus_bleu(ours, [golds]).score
    assert corpus_bleu(ours, [[gold] for gold in golds]) == pytest.approx(expected, abs=1e-9)
    assert load_metric("bleu").compute(predictions=ours, references=golds)["bleu"] == (
        pytest.approx(expected, abs=1e-9)
    )
    both = sacrebleu.corpus_bleu(ours, [golds, others]).score
    pairs = [list(pair) for pair in zip(golds, others, strict=True)]
    assert corpus_bleu(ours, pairs) == pytest.approx(both, abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_chrf_equals_sacrebleu(seed):
    ours, golds, others = _texts(seed)
    expected = sacrebleu.corpus_chrf(ours, [golds]).score
    assert load_metric("chrf").compute(predictions=ours, references=golds)["chrf"] == (
        pytest.approx(expected, abs=1e-9)
    )
    both = sacrebleu.corpus_chrf(ours, [golds, others]).score
    pairs = [list(pair) for pair in zip(golds, others, strict=True)]
    assert corpus_chrf(ours, pairs) == pytest.approx(both, abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_rouge_equals_rouge_score(seed):
    ours, golds, _ = _texts(seed)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score(gold, mine) for mine, gold in zip(ours, golds, strict=True)]
    found = load_metric("rouge").compute(predictions=ours, references=golds)
    for name, value in found.items():
        expected = sum(score[name].fmeasure for score in scores) / len(scores)
        assert value == pytest.approx(expected, abs=1e-12), name


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("labels", [[0, 1, 2, 7], ["buy", "return", "other", ""]])
def test_labels_equal_scikit_learn(seed, labels):
    rng = random.Random(seed)
    golds = rng.choices(labels, weights=[6, 3, 1, 1], k=50)
    ours = [gold if rng.random() < 0.6 else rng.choice(labels[:3]) for gold in golds]
    accuracy = load_metric("accuracy").compute(predictions=ours, references=golds)["accuracy"]
    assert accuracy == pytest.approx(accuracy_score(golds, ours))
    f1 = load_metric("f1").compute(predictions=ours, references=golds)["f1"]
    assert f1 == pytest.approx(f1_score(golds, ours, average="macro", zero_division=0))


def test_by_hand():
    assert exact_match(["Velden", " Velden ", "velden"], ["Velden"] * 3) == pytest.approx(2 / 3)
    # Label a: TP 1, FP 0, FN 0 -> 1; label b: never right -> 0; label c: never right -> 0.
    assert macro_f1(["a", "b"], ["a", "c"]) == pytest.approx(1 / 3)
    # One of three words, no pair; subsequence "cat".
    scores = rouge(["a cat ran"], ["the cat sat"])
    assert scores == pytest.approx({"rouge1": 1 / 3, "rouge2": 0.0, "rougeL": 1 / 3})
    # p = 5/6, 3/5, 2/4, 1/3, equal lengths: (1/12) ** (1/4) = 0.5373.
    bleu = corpus_bleu(["the cat sat on the mat"], [["the cat sat on a mat"]])
    assert bleu == pytest.approx(100 * (1 / 12) ** 0.25)
    # Orders 1 to 3: P = R = (2/3 + 1/2 + 0) / 3 = 7/18.
    assert corpus_chrf(["abc"], [["abd"]]) == pytest.approx(100 * 7 / 18)


def test_identical_and_disjoint_texts_are_the_ends_of_the_scale():
    text = ["Mira Tolen lives in Velden"]
    assert corpus_bleu(text, [text]) == pytest.approx(100)
    assert corpus_chrf(text, [text]) == pytest.approx(100)
    assert corpus_bleu(["x y z"], [["a b c"]]) == corpus_chrf(["x"], [["a"]]) == 0
    assert corpus_bleu([""], [["a"]]) == corpus_chrf([""], [["a"]]) == 0


def test_unknown_metric_is_named():
    with pytest.raises(ValueError, match="metric 'meteor' is not shipped: use one of exact_match"):
        load_metric("meteor")


@pytest.mark.parametrize("name", [name for name in METRICS if name != "perplexity"])
def test_compute_refuses_unequal_lengths(name):
    with pytest.raises(ValueError, match="Mismatch in the number of predictions"):
        load_metric(name).compute(predictions=["a", "b"], references=["a"])


LOAD_ALL = """
import sys, evaluate
from labkit.metrics import METRICS, load_metric, metric_path
for name in METRICS:
    direct = sys.argv[1] == "direct"
    metric = load_metric(name) if direct else evaluate.load(str(metric_path(name)))
    if name != "perplexity":  # which needs a model
        metric.compute(predictions=["a", "b"], references=["a", "c"])
    print(name)
"""


def _start(home, how: str) -> subprocess.Popen:
    """A fresh process with its own Hugging Face home, offline, that loads every metric."""
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    for cache in ("HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
        environment.pop(cache, None)
    return subprocess.Popen(
        [sys.executable, "-c", LOAD_ALL, how],
        env=environment,
        cwd=metric_path("f1").parents[3],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def test_evaluate_load_works_offline_in_two_processes_at_once(tmp_path):
    started = [_start(tmp_path / "home", "evaluate") for _ in range(2)]
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.split() == list(METRICS)


def test_load_metric_needs_no_writable_home(tmp_path):
    # A file where the folder should be refuses every write, even root's.
    home = tmp_path / "home"
    home.write_text("not a folder", encoding="utf-8")
    process = _start(home, "direct")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.split() == list(METRICS)


def test_both_ways_of_loading_agree(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "metrics")
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", tmp_path / "modules")
    ours, golds, _ = _texts(0)
    through_evaluate = evaluate.load(str(metric_path("chrf")))
    expected = through_evaluate.compute(predictions=ours, references=golds)
    assert load_metric("chrf").compute(predictions=ours, references=golds) == expected
