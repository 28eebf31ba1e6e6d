"""What others measured and published, and the models they measured: read from `data/memory/`.

>>> row = rows("bar")[0]
>>> row.name, row.peak_allocated_bytes
('Mistral-7B-v0.1 full bf16 batch 4', 72434837504)
>>> abs(row.error()) < 1e-4
True
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from labkit import paths
from labkit.memory.closed_form import MemoryEstimate, estimate, load_config

BUNDLED = "bundled"


def memory_dir() -> Path:
    """Folder of the memory data: public rows, models, and what devices measured."""
    return paths.root() / "data" / "memory"


def read_json(name: str) -> dict[str, Any]:
    """A file of `data/memory/`, by its name."""
    return json.loads((memory_dir() / name).read_text(encoding="utf-8"))


# ---- models ------------------------------------------------------------------------------------


@cache
def models() -> Mapping[str, Mapping[str, Any]]:
    """Name -> the keys of its config.json that matter, smallest model first."""
    known = {BUNDLED: load_config(BUNDLED), **read_json("models.json")}
    return MappingProxyType({name: MappingProxyType(config) for name, config in known.items()})


def model(name: str) -> dict[str, Any]:
    """Configuration of a model by its name; a copy, so that it may be changed.

    Raises:
        ValueError: no such model.
    """
    if name not in models():
        raise ValueError(f"model {name!r} is not among those known here: {', '.join(models())}")
    return dict(models()[name])


# ---- public rows -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One run that others measured."""

    name: str
    group: str
    """`bar`, `held out`, `once held out` or `sharded`; see data/README.md."""
    model: str
    gpu: str
    options: Mapping[str, Any]
    """As `labkit.memory.estimate` takes them."""
    peak_allocated_bytes: int
    """`torch.cuda.max_memory_allocated`."""
    file: str
    versions: Mapping[str, str]
    note: str | None = None
    """What is special about that version."""
    tokens_per_second: float | None = None
    """Of one device, as the Trainer logged it."""
    device_used_bytes: int | None = None
    """What nvidia-smi showed at most: context, allocator's spare room and all."""

    @property
    def config(self) -> dict[str, Any]:
        return model(self.model)

    @property
    def parameters(self) -> int:
        """Of the base model."""
        return self.estimate().parameters

    def estimate(self) -> MemoryEstimate:
        """What the closed form says of this run."""
        return estimate(self.config, **self.options)

    def error(self) -> float:
        """Relative error of the closed form, signed: above 0 where it says too much."""
        return self.estimate().peak_allocated_bytes / self.peak_allocated_bytes - 1


@cache
def public() -> Mapping[str, Any]:
    """`data/memory/public.json`: rows, and the tables of papers and documentation."""
    return MappingProxyType(read_json("public.json"))


def rows(group: str | None = None) -> tuple[Row, ...]:
    """The measured rows, of one group or all.

    Raises:
        ValueError: a group without rows.
    """
    found = [Row(**row) for row in public()["rows"]]
    if group is None:
        return tuple(found)
    groups = list(dict.fromkeys(row.group for row in found))
    if group not in groups:
        raise ValueError(f"group={group!r} has no rows: use {', '.join(groups)}")
    return tuple(row for row in found if row.group == group)
