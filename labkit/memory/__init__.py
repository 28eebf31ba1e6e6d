"""Where the bytes of a training step go: predicted in closed form, and measured.

`estimate` answers from a `config.json` alone and needs no torch; what measures loads it on first
use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.memory.architecture import Architecture, Matrix
    from labkit.memory.closed_form import MemoryEstimate, estimate
    from labkit.memory.inference import estimate_generation, estimate_merge
    from labkit.memory.measure import StepBytes, step_bytes
    from labkit.memory.options import Options
    from labkit.memory.terms import Term

_WHERE = {
    "Architecture": "architecture",
    "Matrix": "architecture",
    "MemoryEstimate": "closed_form",
    "Options": "options",
    "StepBytes": "measure",
    "Term": "terms",
    "estimate": "closed_form",
    "estimate_generation": "inference",
    "estimate_merge": "inference",
    "step_bytes": "measure",
}

__all__ = [
    "Architecture",
    "Matrix",
    "MemoryEstimate",
    "Options",
    "StepBytes",
    "Term",
    "estimate",
    "estimate_generation",
    "estimate_merge",
    "step_bytes",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for on first use (PEP 562): `measure` brings torch, `estimate` not."""
    if name not in _WHERE:
        raise AttributeError(f"labkit.memory has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"labkit.memory.{_WHERE[name]}"), name)
