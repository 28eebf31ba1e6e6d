"""Where the bytes of a training step go: predicted in closed form, and measured.

`estimate` answers from a `config.json` alone and needs no torch; what measures loads it on first
use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.memory.agreement import Agreement, compare
    from labkit.memory.architecture import Architecture, Matrix
    from labkit.memory.closed_form import MemoryEstimate, estimate, moments
    from labkit.memory.inference import estimate_generation, estimate_merge
    from labkit.memory.measurement import Compared, Measurement, measure
    from labkit.memory.options import Options
    from labkit.memory.phases import Moment
    from labkit.memory.plan import (
        DoesNotFit,
        GpuFit,
        find_ways,
        fits,
        gpus_that_fit,
        knobs,
        largest_batch,
        largest_seq_len,
        require_fit,
    )
    from labkit.memory.step import StepBytes, step_bytes
    from labkit.memory.terms import Term, by_kind
    from labkit.memory.tracing import ModuleBytes, TraceEstimate, trace
    from labkit.memory.watch import TensorWatch

_WHERE = {
    "Agreement": "agreement",
    "Architecture": "architecture",
    "Compared": "measurement",
    "DoesNotFit": "plan",
    "GpuFit": "plan",
    "Matrix": "architecture",
    "Measurement": "measurement",
    "MemoryEstimate": "closed_form",
    "ModuleBytes": "tracing",
    "Moment": "phases",
    "Options": "options",
    "StepBytes": "step",
    "TensorWatch": "watch",
    "Term": "terms",
    "TraceEstimate": "tracing",
    "by_kind": "terms",
    "compare": "agreement",
    "estimate": "closed_form",
    "estimate_generation": "inference",
    "estimate_merge": "inference",
    "find_ways": "plan",
    "fits": "plan",
    "gpus_that_fit": "plan",
    "knobs": "plan",
    "largest_batch": "plan",
    "largest_seq_len": "plan",
    "measure": "measurement",
    "moments": "closed_form",
    "require_fit": "plan",
    "step_bytes": "step",
    "trace": "tracing",
}

__all__ = [
    "Agreement",
    "Architecture",
    "Compared",
    "DoesNotFit",
    "GpuFit",
    "Matrix",
    "Measurement",
    "MemoryEstimate",
    "ModuleBytes",
    "Moment",
    "Options",
    "StepBytes",
    "TensorWatch",
    "Term",
    "TraceEstimate",
    "by_kind",
    "compare",
    "estimate",
    "estimate_generation",
    "estimate_merge",
    "find_ways",
    "fits",
    "gpus_that_fit",
    "knobs",
    "largest_batch",
    "largest_seq_len",
    "measure",
    "moments",
    "require_fit",
    "step_bytes",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for on first use (PEP 562): `measure` brings torch, `estimate` not."""
    if name not in _WHERE:
        raise AttributeError(f"labkit.memory has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"labkit.memory.{_WHERE[name]}"), name)
