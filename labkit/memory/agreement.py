"""The closed form and the trace side by side: how far apart, and why.

The two answer one question in two ways. Where they are within 2 % they agree. Where they are not,
one of them leaves something out, and a reason must say what it is and how many bytes it moves, from
a formula and never from the difference itself; else the difference is flagged.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from labkit.memory.architecture import Architecture, read
from labkit.memory.closed_form import MemoryEstimate, build_options, estimate, load_config
from labkit.memory.loss import FP32, predicted_tokens
from labkit.memory.options import Options, needs_mask
from labkit.memory.phases import LOSS, SUMMED, Step
from labkit.memory.terms import total
from labkit.memory.tracing import ModuleBytes, TraceEstimate, trace
from labkit.memory.units import size_text

TOLERANCE = 0.02
AGREE, EXPLAINED, UNEXPLAINED = "agree", "explained", "unexplained"


@dataclass(frozen=True)
class Reason:
    """Something that one of the two counts and the other does not."""

    what: str
    bytes: int
    """Closed form minus trace that comes of it, at the peak."""
    source: str


@dataclass(frozen=True)
class Agreement:
    """Closed form and trace of one step."""

    closed: MemoryEstimate
    traced: TraceEstimate
    reasons: tuple[Reason, ...]

    @property
    def difference(self) -> float:
        """Of the peaks, signed and relative to the trace."""
        return self.closed.peak_allocated_bytes / self.traced.peak_allocated_bytes - 1

    @property
    def differences(self) -> dict[str, float]:
        """The same of the peak, of each phase, and of what is kept for backward."""
        phases = {
            phase: self.closed.phases[phase] / n_bytes - 1
            for phase, n_bytes in self.traced.phases.items()
        }
        kept = self.closed.saved_activations_bytes / self.traced.saved_activations_bytes - 1
        return {"peak": self.difference, **phases, "saved activations": kept}

    @property
    def unexplained_bytes(self) -> int:
        """Closed form minus trace, without what the reasons account for."""
        apart = self.closed.peak_allocated_bytes - self.traced.peak_allocated_bytes
        return apart - sum(reason.bytes for reason in self.reasons)

    @property
    def verdict(self) -> str:
        """`agree` within 2 %; `explained` if the reasons account for the rest; `unexplained`."""
        if abs(self.difference) <= TOLERANCE:
            return AGREE
        rest = abs(self.unexplained_bytes) / self.traced.peak_allocated_bytes
        return EXPLAINED if rest <= TOLERANCE else UNEXPLAINED

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {
            "difference": self.difference,
            "differences": self.differences,
            "verdict": self.verdict,
            "unexplained_bytes": self.unexplained_bytes,
            "reasons": [vars(reason) for reason in self.reasons],
            "closed": self.closed.to_json(),
            "traced": self.traced.to_json(),
        }

    def __str__(self) -> str:
        return "\n".join(_comparison(self))


def compare(config: Mapping[str, Any] | str | Path, **options: Any) -> Agreement:
    """Ask the closed form and the trace the same question.

    Args:
        config, options: as for `trace`.

    Raises:
        ValueError: as `trace`.
    """
    values = load_config(config)
    arch = read(values, options.get("experts"))
    chosen = build_options(arch, options)
    traced = trace(values, **options)
    closed = estimate(values, **options)
    reasons = (reason(values, arch, chosen, closed) for reason in _REASONS)
    return Agreement(closed, traced, tuple(one for one in reasons if one is not None))


# ---- known reasons -----------------------------------------------------------------------------


def _shifted_copy(
    values: Mapping[str, Any], arch: Architecture, options: Options, closed: MemoryEstimate
) -> Reason | None:
    """The closed form counts blocks of the allocator, the trace counts numbers."""
    if closed.phase != LOSS or options.loss_path not in ("shifted", "upcast"):
        return None
    tokens = predicted_tokens(arch, options) - predicted_tokens(
        arch, replace(options, device="cpu")
    )
    copies = 3 if "gradient" in closed.moment else 2
    if not tokens:
        return None
    return Reason(
        "a shifted copy of the logits lies in a block that is as large as the logits",
        copies * FP32 * tokens * arch.vocabulary,
        "torch's CUDACachingAllocator cuts no large block where 1 MiB or less is left",
    )


def _written_out_attention(
    values: Mapping[str, Any], arch: Architecture, options: Options, closed: MemoryEstimate
) -> Reason | None:
    """torch has no fused kernel for fp32 where heads share keys, and keeps the square of scores."""
    exact = options.dtype == "fp32" and not options.autocast and options.attention == "sdpa"
    shared = arch.heads != arch.kv_heads and not needs_mask(arch, options)
    if not (exact and shared and options.device == "cuda"):
        return None
    given = {name: getattr(options, name) for name in Options.__dataclass_fields__}
    written_out = estimate(values, **{**given, "attention": "eager"})
    return Reason(
        "sdpa in fp32 with shared keys runs as products and a softmax, which keep the scores",
        closed.peak_allocated_bytes - written_out.peak_allocated_bytes,
        "torch's sdp_utils.cpp: the memory-efficient kernel wants a key head for each query head",
    )


def _tiles_without_triton(
    values: Mapping[str, Any], arch: Architecture, options: Options, closed: MemoryEstimate
) -> Reason | None:
    """TRL's head computes a tile of logits with a kernel of Triton, where there is a GPU."""
    if options.loss_path != "fused" or options.device != "cuda":
        return None
    here, there = (
        max(total(Step(arch, one)._loss_terms(backward)) for backward in (False, True))
        for one in (options, replace(options, device="cpu"))
    )
    with_tiles = max(closed.peak_allocated_bytes, closed.phases[LOSS] + there - here)
    if with_tiles == closed.peak_allocated_bytes:
        return None
    return Reason(
        "TRL's head has kernels for a GPU; the trace runs what it does on a CPU",
        closed.peak_allocated_bytes - with_tiles,
        "trl.kernels.chunked_logprob",
    )


def _sum_in_place(
    values: Mapping[str, Any], arch: Architecture, options: Options, closed: MemoryEstimate
) -> Reason | None:
    """Under autocast torch sums a tied matrix's two gradients in place, unless a mode watches."""
    step = Step(arch, options)
    if not (step.sums_in_place and options.method == "full" and arch.tied):
        return None
    copy = step.end_gradient_bytes
    summed = max(moment.bytes for moment in step.moments() if moment.what == SUMMED)
    if summed + copy <= closed.peak_allocated_bytes:
        return None
    return Reason(
        "the two gradients of the tied matrix are summed in place, and fake tensors never are",
        closed.peak_allocated_bytes - summed - copy,
        "torch's input_buffer.cpp, can_accumulate_inplace; measured on an H200",
    )


_REASONS: tuple[Callable[..., Reason | None], ...] = (
    _shifted_copy,
    _written_out_attention,
    _tiles_without_triton,
    _sum_in_place,
)


# ---- as text -----------------------------------------------------------------------------------


def lines(agreement: Agreement, title: str) -> list[str]:
    """Both engines side by side, and the table of modules."""
    return [title, "", *_comparison(agreement), "", *_module_table(agreement.traced)]


def _comparison(agreement: Agreement) -> list[str]:
    closed, traced = agreement.closed, agreement.traced
    found = [f"{'':<18}{'closed form':>13}{'trace':>13}  difference"]
    rows = {
        "peak": (closed.peak_allocated_bytes, traced.peak_allocated_bytes),
        **{phase: (closed.phases[phase], size) for phase, size in traced.phases.items()},
        "saved activations": (closed.saved_activations_bytes, traced.saved_activations_bytes),
    }
    for name, (left, right) in rows.items():
        difference = agreement.differences[name]
        found.append(f"{name:<18}{size_text(left):>13}{size_text(right):>13}  {difference:+10.2%}")
    found += [
        "",
        f"closed form peaks in {closed.phase}: {closed.moment}",
        f"trace peaks in {traced.phase}: {traced.moment}",
        "at the traced peak: "
        + "; ".join(f"{kind} {size_text(size)}" for kind, size in traced.kinds.items()),
        f"verdict: {agreement.verdict} ({agreement.difference:+.2%}); "
        f"traced {traced.operations:,} operations in {traced.seconds:.1f} s",
    ]
    found += [
        f"reason: {one.what}: {one.bytes / traced.peak_allocated_bytes:+.2%} ({one.source})"
        for one in agreement.reasons
    ]
    return found + [f"note: {note}" for note in traced.notes]


def _module_table(traced: TraceEstimate) -> list[str]:
    """One line a module; layers that are alike share theirs."""
    rows = [
        (
            name,
            f"{one.parameters:,}",
            *(size_text(size) if size else "" for size in one.sizes[1:]),
        )
        for name, one in _alike(traced.modules)
    ]
    header = ("module", "parameters", "weights", "gradients", "kept by forward")
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def _alike(modules: tuple[ModuleBytes, ...]) -> Iterator[tuple[str, ModuleBytes]]:
    """(name with its range of numbers, module); whatever holds nothing is left out."""
    numbered: dict[tuple[str, ...], dict[int, list[ModuleBytes]]] = {}
    plain: list[ModuleBytes | tuple[str, ...]] = []
    for one in modules:
        parts = one.name.split(".")
        place = next((at for at, part in enumerate(parts) if part.isdigit()), None)
        if place is None:
            plain.append(one)
            continue
        stem = tuple(parts[:place])
        if stem not in numbered:
            numbered[stem] = {}
            plain.append(stem)
        numbered[stem].setdefault(int(parts[place]), []).append(one)
    for entry in plain:
        if isinstance(entry, ModuleBytes):
            if any(entry.sizes):
                yield entry.name or "the whole model", entry
            continue
        layers = numbered[entry]
        for _, run in groupby(layers, key=lambda number: [one.sizes for one in layers[number]]):
            same = list(run)
            span = str(same[0]) if len(same) == 1 else f"{same[0]}-{same[-1]}"
            for one in layers[same[0]]:
                if any(one.sizes):
                    inside = one.name.split(".")[len(entry) + 1 :]
                    yield ".".join([*entry, span, *inside]), one
