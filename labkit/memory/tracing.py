"""Peak memory of a training step by running it: the real model and optimizer, without memory.

The same question as `estimate`'s, asked of the real code: the model of transformers, the adapter of
PEFT, the layers of bitsandbytes, the optimizer of torch run one step on fake tensors, and every
tensor is counted as it comes and goes. What the closed form leaves out or gets wrong shows here;
what a compiled kernel does inside itself does not.

torch has a tracker of its own for this, `torch.distributed._tools.mem_tracker.MemTracker`. It looks
at every module after every operation, which takes 43 s for an 8 B model where this takes 8 s, and
keeps one peak for the whole step instead of one for each phase. The tests hold its peak against the
one that is found here.
"""

import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from labkit.memory import fake
from labkit.memory.architecture import Architecture
from labkit.memory.build import (
    TORCH_DTYPES,
    Batch,
    build_model,
    build_optimizer,
    build_reference,
    dpo_loss,
    sft_loss,
)
from labkit.memory.closed_form import build_step, load_config
from labkit.memory.options import Options, check_traceable, window_ends_in_row
from labkit.memory.phases import LAYER, LOSS, MULTIPLYING_THREADS, STEP
from labkit.memory.watch import FORWARD, KEPT, WEIGHTS, TensorWatch, storage_bytes
from labkit.weights import model_tensors

WORKSPACE_KIND = "cuBLAS workspace"


@dataclass(frozen=True)
class ModuleBytes:
    """What one module holds, the modules inside it included."""

    name: str
    """As in `named_modules`; empty for the whole model."""
    kind: str
    """Name of its class."""
    parameters: int
    weights_bytes: int
    """Constants of 4-bit weights and buffers included."""
    gradients_bytes: int
    activations_bytes: int
    """What its forward pass leaves for backward."""

    @property
    def depth(self) -> int:
        """Modules above it."""
        return self.name.count(".") + 1 if self.name else 0

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Everything but the name: what modules must have in common to be alike."""
        return self.parameters, self.weights_bytes, self.gradients_bytes, self.activations_bytes


@dataclass(frozen=True)
class TraceEstimate:
    """What a training step took on fake tensors at its highest moment."""

    peak_allocated_bytes: int
    phase: str
    """`loss`, `layer backward` or `optimizer step`: the one that peaks."""
    moment: str
    """Which module and operation were under way at the peak."""
    kinds: dict[str, int]
    """Bytes at the peak: weights, optimizer states, gradients, what is kept for backward, working
    memory, and on a GPU the workspace of cuBLAS."""
    phases: dict[str, int]
    """Highest bytes of each phase; the forward pass belongs to `loss`."""
    modules: tuple[ModuleBytes, ...]
    """In the order of the model."""
    parameters: int
    """Of the base model; a tied matrix counts once."""
    trainable_parameters: int
    saved_activations_bytes: int
    """What autograd held between forward and backward."""
    operations: int
    """That were run."""
    seconds: float
    """That building and running took."""
    notes: tuple[str, ...]

    def module(self, name: str) -> ModuleBytes:
        """The module of that name.

        Raises:
            KeyError: there is none.
        """
        for one in self.modules:
            if one.name == name:
                return one
        raise KeyError(f"no module is called {name!r}: see TraceEstimate.modules")

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types."""
        modules = [vars(one) for one in self.modules]
        return {**vars(self), "modules": modules, "notes": list(self.notes)}


def trace(config: Mapping[str, Any] | str | Path, **options: Any) -> TraceEstimate:
    """Peak bytes of one training step on one device, by running it on fake tensors.

    The step is like every one after the first: states of the optimizer are there when it begins,
    and gradients are not.

    Args:
        config: as for `estimate`; weights are never read.
        options: as for `estimate`, for one device.

    Raises:
        ValueError: as `estimate`; options that need several devices or that no fake tensor can
            follow; a training that fails, such as a prefix under checkpointing.
    """
    start = time.perf_counter()
    values = load_config(config)
    step = build_step(values, options)
    arch, chosen = step.arch, step.options
    check_traceable(arch, chosen)
    model = build_model(values, chosen, "meta")
    reference = build_reference(model, chosen)
    parameters, trainable = _count(model, chosen)
    with fake.faking():
        for one in (model, reference):
            if one is not None:
                fake.as_fake(one, chosen.double_quant)
        # In a model of two kinds of layers a mask that is handed over reaches both.
        masked = window_ends_in_row(arch, chosen) and arch.local_layers() == arch.layers
        ledger = run_step(model, reference, chosen, masked)
    lasting = MULTIPLYING_THREADS * chosen.cublas_workspace * (chosen.device == "cuda")
    phases = {
        LOSS: max(ledger.peaks[FORWARD], ledger.peaks[LOSS]) + lasting,
        LAYER: ledger.peaks.get(LAYER, 0) + lasting,
        STEP: ledger.peaks[STEP] + lasting,
    }
    phase = max(phases, key=lambda name: phases[name])
    kinds = {kind: n_bytes for kind, n_bytes in ledger.peak.kinds.items() if n_bytes}
    return TraceEstimate(
        peak_allocated_bytes=phases[phase],
        phase=phase,
        moment=ledger.moment,
        kinds=kinds | ({WORKSPACE_KIND: lasting} if lasting else {}),
        phases=phases,
        modules=ledger.modules,
        parameters=parameters,
        trainable_parameters=trainable,
        saved_activations_bytes=ledger.saved_bytes,
        operations=ledger.operations,
        seconds=time.perf_counter() - start,
        notes=_notes(arch, chosen),
    )


def _count(model: nn.Module, options: Options) -> tuple[int, int]:
    """(numbers of the base model, trained numbers), while 4-bit weights still have their shapes."""
    parameters = list(model.parameters())
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    everything = sum(one.numel() for one in parameters)
    return everything - trained * options.is_peft, trained


def _notes(arch: Architecture, options: Options) -> tuple[str, ...]:
    notes = [
        "what a kernel takes and gives back inside itself is not seen, but for the backward pass "
        "of fused attention, which is counted from its source"
    ]
    if options.device == "cuda":
        notes.append(
            "fake CPU tensors with CUDA's attention, dropout, autocast and foreach; allocated "
            "bytes only, not rounded up to blocks of 512"
        )
    if options.is_4_bit:
        notes.append(
            "4-bit weights are laid out as bitsandbytes packs them; its layers compute with them"
        )
    if arch.experts:
        notes.append("no router decides on fake tensors: see the moment at the experts")
    return tuple(notes)


# ---- the step ----------------------------------------------------------------------------------


def run_step(
    model: nn.Module, reference: nn.Module | None, options: Options, masked: bool = False
) -> "Ledger":
    """One step that is like every one after the first, counted.

    Works on fake tensors as well as on real ones.

    Args:
        masked: hand the batch's mask over, as a trainer does. transformers drops one that hides
            nothing after a look at its numbers, which fake tensors have none of.
    """
    optimizer = _ready_optimizer(model, options)
    batch = _batch(options)
    unmasked = batch if masked or options.padding else replace(batch, mask=None)
    with Ledger(model, optimizer, options.device) as ledger:
        for tensor in batch.tensors:
            ledger.see(tensor)
        for tensor in model_tensors(reference) if reference is not None else ():
            ledger.see(tensor, WEIGHTS)
        with fake.cuda_kernels() if options.device == "cuda" else nullcontext():
            for _ in range(min(2, options.accumulation_steps)):  # a third is like the second
                loss = _loss(model, reference, unmasked, options)
                ledger.forward_is_over()
                loss.backward()
                del loss
            optimizer.step()
        ledger.step_is_over()
    return ledger


def _loss(model: nn.Module, reference: nn.Module | None, batch: Batch, options: Options) -> Tensor:
    kind = TORCH_DTYPES["fp16" if options.dtype == "fp16" else "bf16"]
    with torch.autocast("cpu", kind, enabled=options.autocast):
        if options.objective == "dpo":
            return dpo_loss(model, reference, batch, options)
        return sft_loss(model, batch, options)


def _ready_optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """The optimizer with its states, as a first step leaves it."""
    optimizer = build_optimizer(model, options)
    if options.device == "cuda" and not options.fused:
        for group in optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = options.foreach
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _batch(options: Options) -> Batch:
    shape = (options.rows, options.seq_len)
    ids, mask, labels = (torch.ones(shape, dtype=torch.long) for _ in range(3))
    return Batch(ids, mask, labels)


# ---- the count ---------------------------------------------------------------------------------


class Ledger(TensorWatch):
    """Counts all living tensors, and remembers which module made each of them."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> None:
        super().__init__(model, optimizer, sampling=False)
        self._on_cuda = device == "cuda"
        self._where, self._function = "", ""
        self._maker: dict[int, str] = {}
        self._left: dict[str, int] = {}
        self.operations = 0
        self.moment = ""
        self.modules: tuple[ModuleBytes, ...] = ()

    def __enter__(self) -> "Ledger":
        for name, module in self._model.named_modules():
            for handle in self._follow(name, module):
                self._open.callback(handle.remove)
        super().__enter__()
        return self

    def _follow(self, name: str, module: nn.Module) -> Iterable[Any]:
        """Hooks that say when a module computes, forward, again, and backward."""
        above = name.rpartition(".")[0]

        def enter(*_: Any) -> None:
            self._where = name

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self._where = above
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(enter)

        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._function = str(function)
        self.operations += 1
        scratch = fake.kernel_scratch(function, args) if self._on_cuda else 0
        self._change("working memory", scratch)
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self._change("working memory", -scratch)
        return result

    def see(self, tensor: Tensor, kind: str | None = None) -> None:
        key = tensor.untyped_storage()._cdata
        if key not in self._alive:
            self._maker[key] = self._where
        super().see(tensor, kind)

    def _note_height(self) -> None:
        if self._total > self.peak.bytes:
            done = self._function.removeprefix("aten.").partition(".")[0]
            self.moment = f"{self.phase}: {done} in {self._where or 'the model itself'}"
        super()._note_height()

    def forward_is_over(self) -> None:
        """The loss is known: what is kept now is what the forward pass leaves."""
        self._left = {}
        for key, (n_bytes, kind) in self._alive.items():
            if kind == KEPT:
                made_in = self._maker[key]
                self._left[made_in] = self._left.get(made_in, 0) + n_bytes
        self.begin(LOSS)

    @property
    def saved_bytes(self) -> int:
        """All that the forward pass left for backward."""
        return sum(self._left.values())

    def step_is_over(self) -> None:
        """Read off each module, while its gradients are there."""
        found = []
        for name, module in self._model.named_modules():
            inside = f"{name}." if name else ""
            own = list(module.parameters())
            left = sum(
                n_bytes
                for made_in, n_bytes in self._left.items()
                if made_in == name or made_in.startswith(inside)
            )
            found.append(
                ModuleBytes(
                    name,
                    type(module).__name__,
                    sum(one.numel() for one in own),
                    storage_bytes(model_tensors(module)),
                    storage_bytes(one.grad for one in own if one.grad is not None),
                    left,
                )
            )
        self.modules = tuple(found)
