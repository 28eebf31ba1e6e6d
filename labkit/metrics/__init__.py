"""Metrics that work offline, as modules of the `evaluate` library, one folder each.

Each `NAME/NAME.py` holds the formula as a plain function and a thin `evaluate.Metric` over it.
`evaluate.load(str(metric_path("bleu")))` works with no network; `load_metric("bleu")` gives the
same object without the copy of the script that `evaluate.load` writes into the user's cache.
"""

import importlib
import inspect
import tempfile
from pathlib import Path

METRICS = ("exact_match", "accuracy", "f1", "bleu", "chrf", "rouge", "perplexity")


def metric_path(name: str) -> Path:
    """Script of a shipped metric, for `evaluate.load`.

    Raises:
        ValueError: no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"metric {name!r} is not shipped: use one of {', '.join(METRICS)}")
    return Path(__file__).parent / name / f"{name}.py"


def load_metric(name: str):
    """A shipped metric as an `evaluate` module, whose `compute` gives a dict of numbers.

    Nothing is downloaded and nothing stays on disk, so it works in a read-only home folder and in
    many processes at once.

    Raises:
        ValueError: no such metric.
    """
    metric_path(name)
    import evaluate

    module = importlib.import_module(f"labkit.metrics.{name}.{name}")
    (metric,) = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, evaluate.Metric) and member.__module__ == module.__name__
    ]
    # evaluate makes its data folder even when told to keep everything in memory.
    with tempfile.TemporaryDirectory() as unused:
        return metric(keep_in_memory=True, cache_dir=unused)
