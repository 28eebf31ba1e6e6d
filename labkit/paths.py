"""Where the course's folders are, whether labkit runs from a clone or from a workbook inside it."""

import os
from pathlib import Path


def root() -> Path:
    """Folder that holds `notebooks/`, `data/` and `labkit/`."""
    return Path(__file__).resolve().parent.parent


def data_dir() -> Path:
    """Folder of the committed data; `LABKIT_DATA` points it elsewhere (tests use this)."""
    override = os.environ.get("LABKIT_DATA")
    return Path(override) if override else root() / "data"


def base_model_dir() -> Path:
    """Folder of the bundled model, as `save_pretrained` wrote it."""
    return data_dir() / "base_model"


def tasks_dir() -> Path:
    """Folder of the fine-tuning tasks, one subfolder a task."""
    return data_dir() / "tasks"


def results_dir() -> Path:
    """Folder of the committed multi-seed results, one JSON file a notebook."""
    return data_dir() / "results"


def notebooks_dir() -> Path:
    """Folder of the master notebooks."""
    return root() / "notebooks"


def workbook_dir() -> Path:
    """Folder of the learner's own copy, ignored by git."""
    return root() / "workbook"
