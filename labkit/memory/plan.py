"""The estimate asked backwards: what fits, what each change would save, and what would fit instead.

>>> config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
...           "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
...           "vocab_size": 32000}
>>> options = {"seq_len": 2048, "loss_path": "fused"}
>>> largest_batch(config, 24 * 2**30, method="qlora", **options)
8
>>> largest_batch(config, 24 * 2**30, method="full", **options) is None
True
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from labkit.errors import LabkitError
from labkit.memory.architecture import read
from labkit.memory.closed_form import MemoryEstimate, build_options, explain, load_config
from labkit.memory.flops import step_flops
from labkit.memory.gpus import GPUS, Gpu
from labkit.memory.gpus import reserve_bytes as default_reserve
from labkit.memory.levers import LEVERS, Change, Lever
from labkit.memory.options import Options, check_fit
from labkit.memory.phases import Moment, Step
from labkit.memory.units import size_text

Config = Mapping[str, Any] | str | Path

MOST_ROWS, MOST_TOKENS = 2**16, 2**20
"""Where the searches stop: nobody trains on larger passes or longer rows."""
WAYS = 3
SEARCHED = "single changes and pairs of changes that are not enough alone, variants aside"
NO_WAY = "no single change and no pair of changes is enough"
AT_THE_EDGE = (
    "for a batch near the largest set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: where both "
    "were measured, it let 0 to 3 more rows of a pass run than torch's default allocator"
)
"""Of the limits in data/memory/limits.json."""
MEASURED, MODEL, UNKNOWN = "measured", "model", "unknown"
"""How sure the time of a change is: measured in public, counted in products, or neither."""


# ---- one question, many options ----------------------------------------------------------------


class Planner:
    """Peaks of one architecture under many options, each computed once."""

    def __init__(self, config: Config, given: Mapping[str, Any]) -> None:
        self.values = load_config(config)
        self.arch = read(self.values, given.get("experts"))
        self.options = self.build(given)
        self._peaks: dict[Options, Moment] = {}

    def build(self, given: Mapping[str, Any]) -> Options:
        options = build_options(self.arch, given)
        check_fit(self.arch, options)
        if not isinstance(options.target_modules, str):  # a list cannot be a key
            options = replace(options, target_modules=",".join(options.target_modules))
        return options

    def peak(self, options: Options) -> Moment:
        """The highest moment; raises ValueError where the options cannot be meant."""
        if options not in self._peaks:
            check_fit(self.arch, options)
            moments = Step(self.arch, options).moments()
            self._peaks[options] = max(moments, key=lambda moment: moment.bytes)
        return self._peaks[options]

    def estimate(self) -> MemoryEstimate:
        """All of the estimate under the options that were given."""
        found = explain(Step(self.arch, self.options))
        self._peaks[self.options] = Moment(found.phase, found.moment, found.terms)
        return found

    def settings(self, lever: Lever, options: Options) -> Iterator[Options]:
        """The options after each setting of a lever that the estimate can count, gentlest first."""
        for change in lever.changes(self.arch, options):
            try:
                after = self._settle(replace(options, **change))
                self.peak(after)
            except ValueError:
                continue  # such as ZeRO-3 under 4-bit weights
            yield after

    def pull(self, lever: Lever, options: Options, room: float | None) -> Options | None:
        """The options after a lever: its gentlest setting that fits, else the one nearest to it.

        Without a room to fit into it is the gentlest. None where the lever does not apply.
        """
        nearest: Options | None = None
        for after in self.settings(lever, options):
            if room is None or self.peak(after).bytes <= room:
                return after
            if nearest is None or self.peak(after).bytes < self.peak(nearest).bytes:
                nearest = after
        return nearest

    def strongest(self, levers: tuple[Lever, ...]) -> Options | None:
        """The options after all levers at their strongest; None where one does not apply."""
        options = self.options
        for lever in levers:
            changes = lever.changes(self.arch, options)
            if not changes:
                return None
            try:
                options = self._settle(replace(options, **changes[-1]))
                self.peak(options)
            except ValueError:
                return None
        return options

    def _settle(self, options: Options) -> Options:
        """What the estimate makes of options, such as autocast under a prepared 4-bit model."""
        given = {name: getattr(options, name) for name in Options.__dataclass_fields__}
        return build_options(self.arch, given)

    def time(self, before: Options, after: Options) -> float:
        """Operations for each row after a change, as a multiple of those before it."""
        rows_before, rows_after = before.batch_size, after.batch_size
        was, now = step_flops(self.arch, before).total, step_flops(self.arch, after).total
        return (now / rows_after) / (was / rows_before)


def _room(memory_bytes: float, reserve: int | None, options: Options) -> float:
    """Bytes that tensors may take; raises ValueError where there is no such memory."""
    if isinstance(memory_bytes, bool) or not memory_bytes > 0:
        raise ValueError(f"memory_bytes={memory_bytes!r}: give a number of bytes above 0")
    if reserve is None:
        reserve = default_reserve(memory_bytes, options.device)
    if reserve < 0:
        raise ValueError(f"reserve_bytes={reserve}: give 0 or more")
    return memory_bytes - reserve


def fits(
    config: Config, memory_bytes: float, reserve_bytes: int | None = None, **options: Any
) -> bool:
    """Whether one training step fits into a device with what must stay free.

    Args:
        config, options: as for `labkit.memory.estimate`.
        memory_bytes: of the device, as it reports it.
        reserve_bytes: kept free for the context and the allocator; None is the default of
            `labkit.memory.gpus.reserve_bytes`, 0 is none.

    Raises:
        ValueError: as `estimate`, and a memory or reserve below 0.
    """
    planner = Planner(config, options)
    return planner.peak(planner.options).bytes <= _room(
        memory_bytes, reserve_bytes, planner.options
    )


def largest_batch(
    config: Config, memory_bytes: float, reserve_bytes: int | None = None, **options: Any
) -> int | None:
    """Most rows (pairs in DPO) of one pass on one device that fit; None where not even one does.

    A `batch_size` among the options is not used. At most 65,536.

    Raises:
        ValueError: as `fits`.
    """
    planner = Planner(config, {**options, "batch_size": 1})
    return _most_rows(planner, _room(memory_bytes, reserve_bytes, planner.options))


def _most_rows(planner: Planner, room: float) -> int | None:
    return _largest(
        lambda rows: planner.peak(replace(planner.options, batch_size=rows)).bytes <= room,
        MOST_ROWS,
    )


def largest_seq_len(
    config: Config, memory_bytes: float, reserve_bytes: int | None = None, **options: Any
) -> int | None:
    """Longest rows in tokens that fit; None where not even one token does.

    A `seq_len` among the options is not used. At most what the model was made for
    (`max_position_embeddings`, or learned positions less the virtual tokens), else 1,048,576.

    Raises:
        ValueError: as `fits`.
    """
    planner = Planner(config, {**options, "seq_len": 1})
    return _most_tokens(planner, _room(memory_bytes, reserve_bytes, planner.options))


def _most_tokens(planner: Planner, room: float) -> int | None:
    return _largest(
        lambda tokens: planner.peak(replace(planner.options, seq_len=tokens)).bytes <= room,
        _longest_row(planner),
    )


def _longest_row(planner: Planner) -> int:
    if planner.arch.positions is not None:
        virtual = planner.options.keys - planner.options.seq_len
        return max(1, planner.arch.positions - virtual)
    return planner.arch.made_for or MOST_TOKENS


def _largest(holds: Callable[[int], bool], most: int) -> int | None:
    """Largest number from 1 to `most` for which a test holds that only ever turns false."""
    if not holds(1):
        return None
    low, high = 1, 2
    while high <= most and holds(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


# ---- the price of each change ------------------------------------------------------------------


@dataclass(frozen=True)
class Knob:
    """One change to a training: what it saves at the peak, and what it costs."""

    name: str
    change: Mapping[str, Any]
    """Options that it sets."""
    saved_bytes: int
    """Less at the peak; 0 or below where something else is the peak, or it needs more."""
    peak_allocated_bytes: int
    """Afterwards."""
    phase: str
    """The one that peaks afterwards."""
    time: float | None
    """Of a step over the same rows, as a multiple of the time before; None where no model says."""
    time_status: str
    """`measured`, `model` (a count of products) or `unknown`."""
    cost: str
    same_result: bool
    """Whether the same numbers are trained on the same data by the same rule."""
    fits: bool | None
    """Whether it alone is enough; None where no memory was given."""

    def __str__(self) -> str:
        if self.saved_bytes > 0:
            saved = f"saves {size_text(self.saved_bytes)}"
        elif self.saved_bytes == 0:
            saved = "saves nothing at this peak"
        else:
            saved = f"needs {size_text(-self.saved_bytes)} more"
        costs = _costs(self.change, self.time, self.time_status)
        return f"{self.name} {saved} and costs {costs}; then {self.phase} wins"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "change": dict(self.change)}


def _costs(change: Mapping[str, Any], time: float | None, status: str) -> str:
    """What a change takes: time, and where rows get shorter the tokens that are cut off."""
    if "seq_len" not in change:
        return _time(time, status)
    if time is not None and round(100 * (1 - time)) > 0:
        return (
            f"the tokens that are cut off; a step takes about {round(100 * (1 - time))} % less "
            f"time ({status})"
        )
    return f"the tokens that are cut off, and {_time(time, status)}"


def _time(time: float | None, status: str) -> str:
    """What a step takes more or less: `about 33 % time (model)`."""
    if time is None:
        return "time that is not known"
    percent = round(100 * (time - 1))
    if percent == 0:
        return "no more products"
    if percent < 0:
        return f"no time: about {-percent} % less ({status})"
    return f"about {percent} % time ({status})"


def knobs(
    config: Config,
    memory_bytes: float | None = None,
    reserve_bytes: int | None = None,
    **options: Any,
) -> list[Knob]:
    """The price list: every change that applies, largest saving first.

    Args:
        config, options: as for `labkit.memory.estimate`.
        memory_bytes: of the device. With it, a change that has sizes (a smaller pass, shorter rows,
            more devices) takes the gentlest that fits; without it, the gentlest.
        reserve_bytes: as for `fits`.

    Raises:
        ValueError: as `fits`.
    """
    planner = Planner(config, options)
    room = None
    if memory_bytes is not None:
        room = _room(memory_bytes, reserve_bytes, planner.options)
    return _knobs(planner, room)


def _knobs(planner: Planner, room: float | None) -> list[Knob]:
    found = []
    for lever in LEVERS:
        after = planner.pull(lever, planner.options, room)
        if after is not None:
            found.append(_knob(planner, lever, after, room))
    return sorted(found, key=lambda knob: -knob.saved_bytes)


def _knob(planner: Planner, lever: Lever, after: Options, room: float | None) -> Knob:
    before, peak = planner.options, planner.peak(after)
    time, status, cost = _price(planner, lever, before, after)
    return Knob(
        name=lever.name,
        change=_difference(before, after),
        saved_bytes=planner.peak(before).bytes - peak.bytes,
        peak_allocated_bytes=peak.bytes,
        phase=peak.phase,
        time=time,
        time_status=status,
        cost=cost,
        same_result=lever.same_result,
        fits=None if room is None else peak.bytes <= room,
    )


def _price(
    planner: Planner, lever: Lever, before: Options, after: Options
) -> tuple[float | None, str, str]:
    """(time, its status, cost in words)."""
    cost = lever.cost(planner.arch, before, after)
    measured = lever.measured(planner.arch, before)
    if measured is not None:
        time, where = measured
        return time, MEASURED, f"{cost}; time measured {where}"
    if lever.traffic:
        return None, UNKNOWN, cost
    return planner.time(before, after), MODEL, cost


def _difference(before: Options, after: Options) -> Change:
    return {
        name: getattr(after, name)
        for name in Options.__dataclass_fields__
        if getattr(after, name) != getattr(before, name)
    }


# ---- which cards ------------------------------------------------------------------------------


@dataclass(frozen=True)
class GpuFit:
    """Whether a training fits on a class of card."""

    gpu: Gpu
    fits: bool
    free_bytes: int
    """Left beside the tensors and the reserve; below 0 where it does not fit."""
    note: str
    """What else stands in the way, such as a card without bf16; empty where nothing does."""

    def to_json(self) -> dict[str, Any]:
        own = {"fits": self.fits, "free_bytes": self.free_bytes, "note": self.note}
        return {"gpu": self.gpu.name, "memory_bytes": self.gpu.memory_bytes, **own}


def gpus_that_fit(config: Config, reserve_bytes: int | None = None, **options: Any) -> list[GpuFit]:
    """Every class of card, smallest first, and whether one training step fits on it.

    With `num_devices` above 1 it is as many cards of that class.

    Raises:
        ValueError: as `fits`.
    """
    return _gpu_fits(Planner(config, {**options, "device": "cuda"}), reserve_bytes)


def _gpu_fits(planner: Planner, reserve_bytes: int | None) -> list[GpuFit]:
    needs_bf16 = planner.options.dtype == "bf16"
    found = []
    for gpu in sorted(GPUS.values(), key=lambda one: one.memory_bytes):
        on_gpu = replace(planner.options, device="cuda", cublas_workspace=gpu.cublas_workspace)
        free = _room(gpu.memory_bytes, reserve_bytes, on_gpu) - planner.peak(on_gpu).bytes
        note = "it does not compute in bf16: train in fp16" if needs_bf16 and not gpu.bf16 else ""
        found.append(GpuFit(gpu, free >= 0, round(free), note))
    return found


# ---- a refusal, with ways out -------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """Changes that together make a training fit."""

    names: tuple[str, ...]
    change: Mapping[str, Any]
    """Options that they set."""
    peak_allocated_bytes: int
    phase: str
    time: float | None
    time_status: str
    costs: tuple[str, ...]
    same_result: bool

    def __str__(self) -> str:
        sets = ", ".join(f"{name}={value!r}" for name, value in self.change.items())
        return (
            f"{' and '.join(self.names)} ({sets}): peaks at "
            f"{size_text(self.peak_allocated_bytes)}, costs "
            f"{_costs(self.change, self.time, self.time_status)}"
        )

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "change": dict(self.change)}


class DoesNotFit(LabkitError):
    """A training that would run out of memory, with up to three ways that would not."""

    def __init__(self, message: str, estimate: MemoryEstimate, short: int, ways: tuple[Way, ...]):
        super().__init__(message)
        self.estimate, self.short_bytes, self.ways = estimate, short, ways


def require_fit(
    config: Config, memory_bytes: float, reserve_bytes: int | None = None, **options: Any
) -> MemoryEstimate:
    """The estimate of a training that fits; else a refusal with ways that would.

    Args:
        config, options, memory_bytes, reserve_bytes: as for `fits`.

    Raises:
        DoesNotFit: it needs more than there is. `ways` has up to three that fit, cheapest first,
            each checked by the estimate: single changes first, then pairs.
        ValueError: as `fits`.
    """
    planner = Planner(config, options)
    room = _room(memory_bytes, reserve_bytes, planner.options)
    found = planner.estimate()
    peak = planner.peak(planner.options)
    if peak.bytes <= room:
        return found
    ways = _ways(planner, room)
    short = round(peak.bytes - room)
    said = (
        f"one step peaks at {size_text(peak.bytes)} ({peak.phase}), and "
        f"{size_text(max(0, room))} of the device's {size_text(memory_bytes)} may hold tensors: "
        f"{size_text(short)} too many. {_offer(ways)}"
    )
    raise DoesNotFit(said, found, short, ways)


def _offer(ways: tuple[Way, ...]) -> str:
    if not ways:
        return f"{NO_WAY.capitalize()}: take a smaller model, or more and larger devices"
    listed = "; ".join(f"{number}. {way}" for number, way in enumerate(ways, 1))
    few = "" if len(ways) == WAYS else f" (only {len(ways)} among {SEARCHED})"
    return f"It would fit with{few}: {listed}"


def find_ways(
    config: Config, memory_bytes: float, reserve_bytes: int | None = None, **options: Any
) -> tuple[Way, ...]:
    """Up to three ways that would fit, as `require_fit` offers them; none where it fits already.

    Raises:
        ValueError: as `fits`.
    """
    planner = Planner(config, options)
    return _ways(planner, _room(memory_bytes, reserve_bytes, planner.options))


def _ways(planner: Planner, room: float) -> tuple[Way, ...]:
    """Single changes that fit, cheapest first; then pairs of those that do not fit alone.

    None where nothing needs to change.
    """
    if planner.peak(planner.options).bytes <= room:
        return ()
    singles = sorted(_that_fit(planner, [(lever,) for lever in LEVERS], room), key=_expense)
    ways = _one_of_each_idea(singles)[:WAYS]
    if len(ways) < WAYS:
        enough = {way.names[0] for way in singles}
        rest = [lever for lever in LEVERS if lever.name not in enough]
        pairs = sorted(_that_fit(planner, combinations(rest, 2), room), key=_expense)
        ways = _one_of_each_idea(ways + pairs)[:WAYS]
    return tuple(ways)


def _that_fit(planner: Planner, sets: Iterable[tuple[Lever, ...]], room: float) -> Iterator[Way]:
    """The sets of levers that fit when pulled together, each at its mildest settings that do."""
    for levers in sets:
        strongest = planner.strongest(levers)
        if strongest is None or planner.peak(strongest).bytes > room:
            continue  # then no milder setting fits, and it need not be looked at
        settings = [
            (strength, steps)
            for strength, steps in _settings(planner, planner.options, levers)
            if planner.peak(steps[-1]).bytes <= room
        ]
        _, steps = min(settings, key=lambda setting: setting[0])
        yield _way(planner, levers, steps)


def _settings(
    planner: Planner, before: Options, levers: tuple[Lever, ...]
) -> Iterator[tuple[tuple[int, int], tuple[Options, ...]]]:
    """Every setting of the levers, one after the other: (how strong, options after each).

    Strength counts steps from the mildest setting, first those of levers that change the result or
    need devices.
    """
    if not levers:
        yield (0, 0), ()
        return
    lever, *rest = levers
    for strength, after in enumerate(planner.settings(lever, before)):
        matters = not lever.same_result or lever.needs_devices
        for (more, less), steps in _settings(planner, after, tuple(rest)):
            weight = (more + strength, less) if matters else (more, less + strength)
            yield weight, (after, *steps)


def _way(planner: Planner, levers: tuple[Lever, ...], steps: tuple[Options, ...]) -> Way:
    befores = (planner.options, *steps)
    prices = [_price(planner, *of) for of in zip(levers, befores, steps, strict=False)]
    peak = planner.peak(steps[-1])
    times = [time for time, _, _ in prices]
    statuses = {status for _, status, _ in prices}
    known = [time for time in times if time is not None]
    return Way(
        names=tuple(lever.name for lever in levers),
        change=_difference(planner.options, steps[-1]),
        peak_allocated_bytes=peak.bytes,
        phase=peak.phase,
        time=math.prod(known) if len(known) == len(times) else None,
        time_status=next((s for s in (UNKNOWN, MODEL) if s in statuses), MEASURED),
        costs=tuple(cost for _, _, cost in prices),
        same_result=all(lever.same_result for lever in levers),
    )


def _expense(way: Way) -> tuple:
    """Cheapest first: fewest changes, known times, no new devices, the same result, least time."""
    more_devices = "num_devices" in way.change
    return (
        len(way.names),
        way.time is None,
        more_devices,
        not way.same_result,
        way.time or 0.0,
    )


def _one_of_each_idea(ways: list[Way]) -> list[Way]:
    """Ways that are no variants of an earlier one."""
    group = {lever.name: lever.group or lever.name for lever in LEVERS}
    seen: set[frozenset[str]] = set()
    kept = []
    for way in ways:
        ideas = frozenset(group[name] for name in way.names)
        if ideas not in seen:
            seen.add(ideas)
            kept.append(way)
    return kept


# ---- all of it ----------------------------------------------------------------------------------


def make_plan(
    config: Config, memory_bytes: int | None, reserve_bytes: int | None, **options: Any
) -> dict[str, Any]:
    """Everything that `labkit plan` says, as a dict of results; each peak is computed once.

    Raises:
        ValueError: as `fits`.
    """
    planner = Planner(config, options)
    device, room = planner.options.device, None
    found = planner.estimate()
    if memory_bytes is not None:
        room = _room(memory_bytes, reserve_bytes, planner.options)
    report: dict[str, Any] = {
        "estimate": found,
        "memory_bytes": memory_bytes,
        "reserve_bytes": None,
        "default_reserve": reserve_bytes is None,
        "device": device,
        "fits": None,
        "largest_batch": None,
        "largest_seq_len": None,
        "knobs": _knobs(planner, room),
        "ways": (),
        "gpus": _gpu_fits(planner, reserve_bytes),
        "notes": (),
    }
    if memory_bytes is not None and room is not None:
        if reserve_bytes is None:
            reserve_bytes = default_reserve(memory_bytes, device)
        report |= {
            "reserve_bytes": reserve_bytes,
            "fits": found.peak_allocated_bytes <= room,
            "largest_batch": _most_rows(planner, room),
            "largest_seq_len": _most_tokens(planner, room),
            "ways": _ways(planner, room),
        }
        at_an_edge = report["largest_batch"] or found.peak_allocated_bytes <= memory_bytes
        if device == "cuda" and at_an_edge:
            report["notes"] = (AT_THE_EDGE,)
    return report
