"""labkit: what the notebooks of the fine-tuning course are built from, and what tests them.

`import labkit` costs nothing: a part is imported when it is first used, and torch with it.

>>> import labkit
>>> labkit.paths.notebooks_dir().name
'notebooks'
"""

import importlib
from types import ModuleType

from labkit.quiet import drop_import_notices

__version__ = "0.1.0"

drop_import_notices()

_PARTS = (
    "adapters",
    "badcases",
    "base_model",
    "bench",
    "byte_figures",
    "calculator",
    "card",
    "chat_templates",
    "checkpoints",
    "claims",
    "cli",
    "curves",
    "data",
    "doctor",
    "errors",
    "evaluation",
    "exercises",
    "files",
    "filters",
    "forgetting",
    "lessons",
    "machine",
    "memory",
    "metrics",
    "models",
    "notebooks",
    "paths",
    "preferences",
    "pretrain",
    "quantization",
    "quiet",
    "recipe",
    "report",
    "retrieval",
    "scale",
    "soft_prompts",
    "statements",
    "statistics",
    "stepplan",
    "training",
    "usage",
    "weights",
    "widgets",
    "world",
)


def __getattr__(name: str) -> ModuleType:
    """Import a part of labkit on first use (PEP 562)."""
    if name in _PARTS:
        return importlib.import_module(f"labkit.{name}")
    raise AttributeError(f"labkit has no part {name!r}; its parts are {', '.join(_PARTS)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PARTS])
