"""A real training step on this machine, measured, and what `estimate` says beside it.

The step is run twice: the first time what autograd keeps is counted, and the optimizer makes its
states; the second time, which is like every later one, the peak of each phase is taken. On a GPU
it runs a few times more, for its time.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from labkit import machine
from labkit.errors import LabkitError
from labkit.memory import gpus
from labkit.memory.architecture import Architecture, read
from labkit.memory.build import (
    Batch,
    build_model,
    build_optimizer,
    build_reference,
    check_trainable,
    dpo_loss,
    random_batch,
    sft_loss,
)
from labkit.memory.closed_form import (
    MemoryEstimate,
    build_options,
    build_step,
    explain,
    load_config,
)
from labkit.memory.options import Options
from labkit.memory.phases import LAYER, LOSS, STEP, Step
from labkit.memory.plan import require_fit
from labkit.memory.state import gradient_bytes
from labkit.memory.step import StepBytes, saved_for_backward, step_bytes
from labkit.memory.terms import WEIGHTS
from labkit.memory.watch import (
    FORWARD,
    AllocatorWatch,
    TensorWatch,
    state_tensors,
    storage_bytes,
)
from labkit.weights import model_tensors, quantization_tensors

Say = Callable[[str], None]
TIMED_STEPS, TIMED_SECONDS = 5, 1.5
__all__ = ["Compared", "Measurement", "StepBytes", "measure", "step_bytes"]

RSS_SAYS_LITTLE = (
    "the process's own memory says little on a CPU: libraries and the allocator's spare room are "
    "larger than what a method saves, so tensors were counted"
)
UNSEEN = "what a kernel takes and gives back inside itself was not seen"
DEVICE_USED = (
    "device_used_bytes is all that the device has given away: this process's CUDA context, the "
    "allocator's spare room, and other processes"
)


@dataclass(frozen=True)
class Compared:
    """One quantity, predicted and measured."""

    name: str
    predicted_bytes: int
    measured_bytes: int

    @property
    def error(self) -> float | None:
        """Signed and relative to what was measured; None where one of them is 0."""
        if not self.measured_bytes or not self.predicted_bytes:
            return None
        return self.predicted_bytes / self.measured_bytes - 1

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "error": self.error}


@dataclass(frozen=True)
class Measurement:
    """What one training step took on this machine, and what was predicted."""

    device: str
    """`cpu` or `cuda`."""
    options: Options
    compared: tuple[Compared, ...]
    phases: dict[str, int]
    """Phase -> peak bytes: forward, loss, layer backward, optimizer step."""
    predicted_phase: str
    """The one that was predicted to peak."""
    peak_allocated_bytes: int
    """`torch.cuda.max_memory_allocated`; on a CPU the most bytes of tensors at once."""
    reserved_bytes: int | None
    """`torch.cuda.max_memory_reserved`; None on a CPU."""
    device_used_bytes: int | None
    """What the device had given away to everyone at the end of the step; None on a CPU."""
    process_bytes: int
    """Most resident memory of this process so far."""
    seconds: float
    """Of one step: on a GPU the median of those that nobody watches; on a CPU of the second step,
    in which every tensor is counted."""
    notes: tuple[str, ...]

    def __getitem__(self, name: str) -> Compared:
        """The quantity of that name.

        Raises:
            KeyError: it was 0, or there is none of that name.
        """
        for one in self.compared:
            if one.name == name:
                return one
        raise KeyError(f"{name!r}: measured were {', '.join(one.name for one in self.compared)}")

    @property
    def phase(self) -> str:
        """The one that peaked, with the names that `estimate` has."""
        found = max(self.phases, key=lambda name: self.phases[name])
        return LOSS if found == FORWARD else found

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types; of the options those that are not the default."""
        usual = asdict(Options())
        chosen = {name: v for name, v in asdict(self.options).items() if v != usual[name]}
        return {
            **vars(self),
            "options": chosen,
            "compared": [one.to_json() for one in self.compared],
            "phase": self.phase,
            "notes": list(self.notes),
        }


def measure(
    config: Mapping[str, Any] | str | Path, *, say: Say = lambda line: None, **options: Any
) -> Measurement:
    """Run one training step for real and count its bytes.

    Args:
        config: as for `estimate`; a folder with weights is loaded, a config gets random weights.
        say: called with a line when something begins that may take seconds.
        options: as for `estimate`; `device` is the GPU where there is one.

    Raises:
        ValueError: as `estimate`, or options that need several devices.
        LabkitError: the step does not fit (`DoesNotFit`), or something it needs is not here.
    """
    values = load_config(config)
    arch = read(values, options.get("experts"))
    device = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    given = {**device_options(device), **options}
    chosen = build_options(arch, given)
    check_trainable(arch, chosen, chosen.device)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise LabkitError("device='cuda': torch finds no CUDA device here: use device='cpu'")
    say("building the model")
    predicted = require_fit(values, free_bytes(chosen.device), **given)
    expected = expected_bytes(Step(arch, chosen), predicted)
    return Run(config, arch, chosen).measurement(expected, predicted.phase, say)


def device_options(device: str) -> dict[str, Any]:
    """Options that the device decides: `device`, and on a GPU how much its products work in."""
    if device == "cpu" or not torch.cuda.is_available():
        return {"device": device}
    gpu = torch.cuda.get_device_properties(0)
    if torch.version.hip:
        large = gpu.gcnArchName.startswith(("gfx94", "gfx95"))
        kept = gpus.MI300 if large else gpus.ROCM
    else:
        kept = gpus.FROM_HOPPER if gpu.major >= 9 else gpus.BEFORE_HOPPER
    return {"device": device, "cublas_workspace": kept}


def free_bytes(device: str) -> int:
    """Memory that a step may take now."""
    if device == "cpu":
        return psutil.virtual_memory().available
    clean_gpu()
    return torch.cuda.mem_get_info()[0]


def clean_gpu() -> int:
    """Drop what earlier work left on the GPU; returns the bytes that are still allocated."""
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # the next product of matrices makes them anew
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()
    return 0


class Run:
    """One model on one device, and two steps of its training.

    Args:
        config: as for `measure`.
        arch: the same, read.
    """

    def __init__(
        self, config: Mapping[str, Any] | str | Path, arch: Architecture, options: Options
    ) -> None:
        self.arch, self.options = arch, options
        self.others = clean_gpu() if options.device == "cuda" else 0
        """Bytes on its device that this run has nothing to do with."""
        self.model = build_model(config, options, options.device)
        self.reference = build_reference(self.model, options)
        self.optimizer = build_optimizer(self.model, options)
        self.batch: Batch = random_batch(options, arch.vocabulary, options.device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def loss(self) -> Tensor:
        options = self.options
        kind = torch.float16 if options.dtype == "fp16" else torch.bfloat16
        with torch.autocast(options.device, kind, enabled=options.autocast):
            if options.objective == "dpo":
                return dpo_loss(self.model, self.reference, self.batch, options)
            return sft_loss(self.model, self.batch, options)

    def first_step(self) -> int:
        """Run it, and return the bytes that autograd kept between forward and backward."""
        models = [self.model] if self.reference is None else [self.model, self.reference]
        own = [tensor for one in models for tensor in model_tensors(one)]
        with saved_for_backward(own) as saved:
            loss = self.loss()
            kept = sum(saved.values())
        loss.backward()
        del loss
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return kept

    def second_step(self) -> tuple[TensorWatch | AllocatorWatch, int, float]:
        """Run it, and return (peaks, bytes of gradients, seconds)."""
        on_gpu = self.options.device == "cuda"
        watch = (
            AllocatorWatch(self.model, self.optimizer)
            if on_gpu
            else TensorWatch(self.model, self.optimizer, sampling=False)
        )
        start = time.perf_counter()
        with watch:
            if isinstance(watch, TensorWatch):
                for tensor in self.batch.tensors:
                    watch.see(tensor)
                for tensor in _parameters(self.reference):
                    watch.see(tensor, WEIGHTS)
            for _ in range(self.options.accumulation_steps):
                loss = self.loss()
                watch.begin(LOSS)
                loss.backward()
                del loss
            gradients = storage_bytes(p.grad for p in self.trained if p.grad is not None)
            self.optimizer.step()
            if on_gpu:
                torch.cuda.synchronize()
        return watch, gradients, time.perf_counter() - start

    def step(self) -> None:
        """One whole step that nobody watches; gradients are gone after it, as in a trainer."""
        for _ in range(self.options.accumulation_steps):
            self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds_of_a_step(self) -> float:
        """Median over steps on a GPU: `TIMED_STEPS`, or as many as begin in `TIMED_SECONDS`."""
        self.optimizer.zero_grad(set_to_none=True)
        seconds: list[float] = []
        while len(seconds) < TIMED_STEPS and sum(seconds) < TIMED_SECONDS:
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    def measurement(self, expected: dict[str, int], predicted_phase: str, say: Say) -> Measurement:
        on_gpu = self.options.device == "cuda"
        if on_gpu:  # what building the model left in the allocator is no part of a step
            torch.cuda.empty_cache()
        say("first step: what autograd keeps")
        kept = self.first_step()
        say("second step: the peak of each phase")
        watch, gradients, seconds = self.second_step()
        phases = {phase: height - self.others for phase, height in watch.peaks.items()}
        heights = {LOSS: max(phases[FORWARD], phases[LOSS])}
        heights |= {phase: phases[phase] for phase in (LAYER, STEP)}
        peak = max(heights.values())
        measured = {
            **self.static_bytes(),
            "gradients": gradients,
            "saved activations": kept,
            **{f"peak: {phase}": n_bytes for phase, n_bytes in heights.items()},
            "peak": peak,
        }
        free, total = torch.cuda.mem_get_info() if on_gpu else (0, 0)
        if on_gpu:
            say("more steps: how long one takes")
            seconds = self.seconds_of_a_step()
        return Measurement(
            device=self.options.device,
            options=self.options,
            compared=tuple(
                Compared(name, expected.get(name, 0), n_bytes)
                for name, n_bytes in measured.items()
                if n_bytes or expected.get(name)
            ),
            phases=phases,
            predicted_phase=predicted_phase,
            peak_allocated_bytes=peak,
            reserved_bytes=watch.reserved if isinstance(watch, AllocatorWatch) else None,
            device_used_bytes=total - free if on_gpu else None,
            process_bytes=machine.peak_memory()["process_bytes"],
            seconds=seconds,
            notes=(DEVICE_USED,) if on_gpu else (UNSEEN, RSS_SAYS_LITTLE),
        )

    def static_bytes(self) -> dict[str, int]:
        """What lies there from step to step, by the names that the comparison has."""
        peft = self.options.is_peft
        base = [p for p in self.model.parameters() if not (peft and p.requires_grad)]
        constants = quantization_tensors(self.model)
        states = [tensor for tensor in state_tensors(self.optimizer) if tensor.ndim]
        paged = [tensor for tensor in states if getattr(tensor, "is_paged", False)]
        held = [tensor for tensor in states if not getattr(tensor, "is_paged", False)]
        added = "adapters" if self.options.has_adapters else "soft prompt"
        return {
            "weights": storage_bytes([*base, *constants]),
            added: storage_bytes(self.trained) if peft else 0,
            "reference weights": storage_bytes(
                self.reference.parameters() if self.reference else ()
            ),
            "buffers": storage_bytes(self.model.buffers()),
            "optimizer states": storage_bytes(held),
            "paged optimizer states": storage_bytes(paged),
            "inputs": storage_bytes(self.batch.tensors),
        }


def _parameters(model: nn.Module | None) -> Iterator[Tensor]:
    return iter(()) if model is None else model.parameters()


_BASE = (
    "weights", "4-bit weights", "quantization constants", "weights that stay 16-bit or fp32",
)  # fmt: skip


def predict(
    config: Mapping[str, Any] | str | Path, **options: Any
) -> tuple[MemoryEstimate, dict[str, int]]:
    """The estimate, and the same by the names that the comparison has.

    Args:
        config, options: as for `estimate`.
    """
    step = build_step(config, options)
    found = explain(step)
    return found, expected_bytes(step, found)


def expected_bytes(step: Step, predicted: MemoryEstimate) -> dict[str, int]:
    """The estimate of a step, by the names that the comparison has."""
    lasting = {one.name: one.bytes for one in step.lasting}
    names = ("adapters", "soft prompt", "reference weights", "optimizer states", "inputs")
    return {
        "weights": sum(lasting.get(name, 0) for name in _BASE),
        **{name: lasting.get(name, 0) for name in names},
        "paged optimizer states": predicted.paged_bytes,
        "gradients": gradient_bytes(step.arch, step.options),
        "saved activations": predicted.saved_activations_bytes,
        **{f"peak: {phase}": n_bytes for phase, n_bytes in predicted.phases.items()},
        "peak": predicted.peak_allocated_bytes,
    }
