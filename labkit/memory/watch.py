"""How high memory climbs in each phase of a real training step, on a CPU and on a GPU.

On a GPU torch's allocator keeps the score. On a CPU nobody does, so `TensorWatch` counts every
tensor as it is made and as it goes, operation by operation. What a compiled kernel takes and gives
back inside itself is seen by the first and not by the second.

>>> layer = nn.Linear(3, 5, bias=False)
>>> optimizer = torch.optim.SGD(layer.parameters())
>>> with TensorWatch(layer, optimizer) as live:
...     layer(torch.ones(2, 3)).sum().backward()
...     optimizer.step()
>>> live.samples[0].kinds["weights"], live.samples[-1].kinds["gradients"]
(60, 60)
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labkit.memory.phases import LAYER, LOSS, STEP
from labkit.memory.terms import GRADIENTS, KEPT, STATES, WEIGHTS, WORKING
from labkit.weights import model_tensors

FORWARD = "forward"
KINDS: tuple[str, ...] = (WEIGHTS, STATES, GRADIENTS, KEPT, WORKING)


@dataclass(frozen=True)
class Sample:
    """What was alive at one moment, in bytes."""

    phase: str
    bytes: int
    kinds: dict[str, int]
    """By kind; `working memory` is all that is none of the others: logits, gradients of
    activations, what a layer that is computed again keeps, inputs."""


class PhaseHooks:
    """Calls `begin` with a phase's name when a step enters it, whoever runs the step.

    `forward` begins with the model's forward pass; `loss` with the backward pass, if the model
    computed the loss; `layer backward` when the gradient reaches what the last norm reads; and
    `optimizer step` with the optimizer's step.
    """

    def __init__(self, model: nn.Module, optimizer: Any, begin: Callable[[str], None]) -> None:
        self._begin = begin
        self._handles = [
            model.register_forward_pre_hook(lambda *_: begin(FORWARD)),
            model.register_forward_hook(self._loss_is_known),
        ]
        norm = last_norm(model)
        if norm is not None:
            self._handles.append(norm.register_forward_hook(self._layers_end))
        if optimizer is not None:
            optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: begin(STEP)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _loss_is_known(self, module: nn.Module, inputs: Any, output: Any) -> None:
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(lambda gradient: self._begin(LOSS))

    def _layers_end(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: self._begin(LAYER))


def last_norm(model: nn.Module) -> nn.Module | None:
    """The norm after the decoder layers, or None where there is no such thing."""
    for module in model.modules():
        parts = list(module.named_children())
        lists = [at for at, (_, part) in enumerate(parts) if isinstance(part, nn.ModuleList)]
        for name, part in parts[lists[0] :] if lists else []:
            if "norm" in name or name.startswith("ln"):
                return part
    return None


class TensorWatch(TorchDispatchMode):
    """Counts the bytes of all living tensors while it is on, a storage once.

    Args:
        model: its weights are there from the start.
        optimizer: its states are told apart, and its step is a phase of its own.
        sampling: keep a `Sample` for each tensor that is made and each phase that begins. A tensor
            is working memory until it turns out to be a gradient, a state or kept for backward.

    Raises:
        RuntimeError: it is started a second time.
    """

    def __init__(self, model: nn.Module, optimizer: Any = None, *, sampling: bool = True) -> None:
        super().__init__()
        self._model, self._optimizer = model, optimizer
        self._sampling = sampling
        self._alive: dict[int, tuple[int, str]] = {}
        self._kinds: dict[str, int] = dict.fromkeys(KINDS, 0)
        self._total = 0
        self._open = contextlib.ExitStack()
        self._started = False
        self.phase = FORWARD
        self.peaks: dict[str, int] = {}
        """Phase -> most bytes at once, weights included."""
        self.samples: list[Sample] = []
        self.peak = Sample(FORWARD, 0, {})
        """The highest moment."""

    def begin(self, phase: str) -> None:
        """What follows belongs to `phase`; what is alive now is its first height."""
        self.phase = phase
        self._note_height()

    def start(self) -> "TensorWatch":
        """Begin to count; the same as entering a `with` block."""
        return self.__enter__()

    def stop(self) -> None:
        """Stop counting; `peaks` and `samples` stay."""
        self.__exit__(None, None, None)

    def __enter__(self) -> "TensorWatch":
        if self._started:  # its weights would be counted twice
            raise RuntimeError("this TensorWatch was started before: make a new one")
        self._started = True
        for tensor in model_tensors(self._model):
            self.see(tensor, WEIGHTS)
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                self.see(parameter.grad, GRADIENTS)
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(self._gradient_is_there)
                self._open.callback(handle.remove)
        self._see_states()
        hooks = PhaseHooks(self._model, self._optimizer, self.begin)
        self._open.callback(hooks.remove)
        if self._optimizer is not None:
            inner = getattr(self._optimizer, "optimizer", self._optimizer)
            handle = inner.register_step_post_hook(lambda *_: self._see_states())
            self._open.callback(handle.remove)
        self._open.enter_context(
            torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        )
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._open.close()
        self._alive.clear()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return result

    def see(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count a tensor's storage, unless it is counted; give it a kind, if one is named."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            kind = kind or WORKING
            self._alive[key] = (storage.nbytes(), kind)
            weakref.finalize(storage, self._gone, key).atexit = False
            self._change(kind, storage.nbytes())
            self._note_height()
        elif kind and self._alive[key][1] != kind:
            n_bytes, before = self._alive[key]
            self._alive[key] = (n_bytes, kind)
            self._change(before, -n_bytes)
            self._change(kind, n_bytes)

    def _gone(self, key: int) -> None:
        n_bytes, kind = self._alive.pop(key, (0, WORKING))
        self._change(kind, -n_bytes)

    def _change(self, kind: str, n_bytes: int) -> None:
        self._kinds[kind] += n_bytes
        self._total += n_bytes

    def _note_height(self) -> None:
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self._total)
        if self._sampling or self._total > self.peak.bytes:
            sample = Sample(self.phase, self._total, dict(self._kinds))
            self.peak = max(self.peak, sample, key=lambda one: one.bytes)
            if self._sampling:
                self.samples.append(sample)

    def _keep(self, tensor: Tensor) -> Tensor:
        """Autograd keeps this one, unless it is a weight. Detached: else it would keep itself."""
        key = tensor.untyped_storage()._cdata
        if self._alive.get(key, (0, ""))[1] == WORKING:
            self.see(tensor, KEPT)
        return tensor.detach()

    def _gradient_is_there(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.see(parameter.grad, GRADIENTS)

    def _see_states(self) -> None:
        if self._optimizer is not None:
            for tensor in state_tensors(self._optimizer):
                self.see(tensor, STATES)


class AllocatorWatch:
    """Peaks of torch's CUDA allocator, phase by phase.

    Args:
        cuda: what counts; `torch.cuda`, or a stand-in for tests.
    """

    def __init__(self, model: nn.Module, optimizer: Any, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._model, self._optimizer = model, optimizer
        self.phase = FORWARD
        self.peaks: dict[str, int] = {}
        """Phase -> `max_memory_allocated`, in bytes."""
        self.reserved = 0
        """`max_memory_reserved` of all phases, in bytes."""

    def begin(self, phase: str) -> None:
        """What follows belongs to `phase`."""
        self._note_height()
        self.phase = phase
        self._cuda.reset_peak_memory_stats()

    def __enter__(self) -> "AllocatorWatch":
        self._cuda.synchronize()
        self._cuda.reset_peak_memory_stats()
        self._hooks = PhaseHooks(self._model, self._optimizer, self.begin)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.remove()
        self._note_height()

    def _note_height(self) -> None:
        height = self._cuda.max_memory_allocated()
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), height)
        self.reserved = max(self.reserved, self._cuda.max_memory_reserved())


def state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """All tensors of an optimizer's states: means, their constants, counters of steps."""
    inner = getattr(optimizer, "optimizer", optimizer)
    for state in inner.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages under some tensors, each once."""
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())
