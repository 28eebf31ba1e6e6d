"""A tiny autograd in which a tensor is its size: what backward keeps, and how high it climbs.

PyTorch's memory in training follows from two rules. Each operation keeps the tensors that its own
backward pass needs, and no others: a product keeps a factor only if the other factor needs a
gradient. And backward frees what an operation kept as soon as it has passed it, while it makes a
gradient of each input. Written down once for each kind of operation, these rules say which bytes
are alive at every moment of the backward pass.

>>> tape = Tape()
>>> gate, up = tape.source("gate", 100, width=2), tape.source("up", 100, width=2)
>>> product = tape.multiply("gate x up", gate, up)
>>> tape.kept_bytes()                    # both factors
400
>>> tape.backward().peak_bytes           # both factors, the gradient of the product and of both
1000.0
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class Value:
    """A tensor: how many numbers of how many bytes, and whether a gradient flows to it."""

    name: str
    numbers: float
    width: int
    """Bytes of one number."""
    grad: bool = True
    share: float = 1.0
    """Part of its gradient that is alive at a time: less than 1 where experts take turns."""
    held: float | None = None
    """Numbers of the storage that keeping it holds, where that is not its own size: all of a tensor
    that it is a view of, or none, where that is counted elsewhere."""
    group: str = ""
    """What the tensor belongs to, for a breakdown."""

    @property
    def bytes(self) -> float:
        return (self.numbers if self.held is None else self.held) * self.width

    @property
    def gradient_bytes(self) -> float:
        return self.numbers * self.width * self.share


@dataclass(eq=False)
class _Operation:
    name: str
    inputs: tuple[Value, ...]
    output: Value
    kept: tuple[Value, ...]
    passes_gradient: bool
    """Whether the inputs' gradient is the output's own, as a sum's is: no new bytes."""
    weight_gradient: float
    scratch: float
    held: tuple[Value, ...]
    """What names of the running code keep alive in the forward pass, used again or not."""


@dataclass(frozen=True)
class Climb:
    """The highest moment of a pass over a tape."""

    peak_bytes: float
    operation: str
    """What is under way at that moment."""
    kept: dict[str, float]
    """Bytes that are still kept at that moment, by group."""
    gradients_bytes: float
    """Gradients of activations at that moment, and what an operation works with."""
    weight_gradients_bytes: float
    """Gradients of weights that were made since backward began, at that moment."""


@dataclass(eq=False)
class Tape:
    """Operations in the order of the forward pass."""

    group: str = ""
    """Given to every value that is made from now on."""
    _operations: list[_Operation] = field(default_factory=list)
    _held: list[Value] = field(default_factory=list)

    @contextmanager
    def holding(self, value: Value) -> Iterator[None]:
        """A name of the running code holds the value, as an argument is until its call returns."""
        self._held.append(value)
        yield
        self._held.pop()

    def source(self, name: str, numbers: float, width: int, **how) -> Value:
        """A tensor that comes from outside: no operation of this tape made it."""
        return Value(name, numbers, width, group=self.group, **how)

    def operation(
        self,
        name: str,
        inputs: Iterable[Value],
        numbers: float,
        width: int,
        kept: Iterable[Value] = (),
        weight_gradient: float = 0,
        passes_gradient: bool = False,
        scratch: float = 0,
        share: float = 1.0,
    ) -> Value:
        """Add an operation and return its result.

        Args:
            kept: what backward needs; counted only if a gradient flows through the operation.
            weight_gradient: bytes of the gradient of its own weights; 0 where they are frozen.
            scratch: bytes that only its backward pass has, while it runs.
        """
        inputs = tuple(inputs)
        grad = bool(weight_gradient) or any(value.grad for value in inputs)
        output = Value(name, numbers, width, grad, share, group=self.group)
        if grad:
            self._operations.append(
                _Operation(
                    name,
                    inputs,
                    output,
                    tuple(kept),
                    passes_gradient,
                    weight_gradient,
                    scratch,
                    tuple(self._held),
                )
            )
        return output

    def keep(self, result: Value, kept: Iterable[Value]) -> None:
        """Let the operation that made `result` keep more, such as its own result."""
        for operation in self._operations:
            if operation.output is result:
                operation.kept = (*operation.kept, *kept)

    def cast(self, value: Value, width: int, name: str = "") -> Value:
        """The same numbers in another precision; nothing is kept, the gradient is cast back."""
        if value.width == width:
            return value
        name = name or f"{value.name}, cast"
        return self.operation(name, [value], value.numbers, width, share=value.share)

    def multiply(self, name: str, left: Value, right: Value, scratch: float = 0) -> Value:
        """An elementwise product: keeps each factor whose partner needs a gradient."""
        kept = [left] * right.grad + [right] * left.grad
        width, share = max(left.width, right.width), min(left.share, right.share)
        return self.operation(
            name, [left, right], left.numbers, width, kept, scratch=scratch, share=share
        )

    def add(self, name: str, left: Value, right: Value) -> Value:
        """A sum of two tensors: nothing is kept, and both get the gradient of the result as is."""
        width = max(left.width, right.width)
        wide = self.cast(left, width), self.cast(right, width)
        for value, cast in zip((left, right), wide, strict=True):
            cast.held = value.bytes / width  # the sum reads both in their own precision
        return self.operation(name, wide, left.numbers, width, passes_gradient=True)

    def kept(self) -> list[Value]:
        """Every tensor that the operations keep for backward, once."""
        seen: dict[int, Value] = {}
        for operation in self._operations:
            seen.update((id(value), value) for value in operation.kept)
        return list(seen.values())

    def kept_bytes(self) -> float:
        """Bytes of all that is kept for backward."""
        return sum(value.bytes for value in self.kept())

    def kept_by_group(self) -> dict[str, float]:
        """The same, by the values' groups."""
        return _by_group(self.kept())

    def forward(self, inherited_bytes: float = 0, needed_only: bool = False) -> Climb:
        """Walk the tape as the forward pass does, and find the highest moment.

        A tensor is alive from the operation that makes it to the last one that reads it or under
        which a name holds it; and to the end if backward needs it.

        Args:
            inherited_bytes: alive all the time, such as the gradient that waits for the layer.
            needed_only: stop when the last tensor that backward needs is there, before the result
                of the operation that needs it.
        """
        operations = self._operations
        last = {
            id(value): number
            for number, one in enumerate(operations)
            for value in (*one.inputs, *one.held, one.output)
        }
        if needed_only:
            needed = (number for number, one in enumerate(operations) if one.kept)
            operations = operations[: 1 + max(needed, default=-1)]
        kept: dict[int, Value] = {}
        local: dict[int, Value] = {}
        kept_bytes, best = 0.0, (inherited_bytes, 0.0, "nothing to train", 0)
        for number, operation in enumerate(operations):
            for value in operation.kept:
                if id(value) not in kept:
                    kept[id(value)] = value
                    kept_bytes += value.bytes
            made = () if needed_only and operation is operations[-1] else (operation.output,)
            for value in (*operation.inputs, *operation.held, *made):
                local[id(value)] = value
            working = sum(value.bytes for key, value in local.items() if key not in kept)
            if inherited_bytes + working + kept_bytes > best[0]:
                height = inherited_bytes + working + kept_bytes
                best = (height, working, operation.name, len(kept))
            local = {key: value for key, value in local.items() if last[key] > number}
        height, working, name, n_kept = best
        return Climb(
            height, name, _by_group(list(kept.values())[:n_kept]), inherited_bytes + working, 0
        )

    def gradients_before_need(self) -> float:
        """Bytes of gradients that are alive when backward first needs a tensor that was kept."""
        if not self._operations:
            return 0
        last = self._operations[-1].output
        pending = {id(last): (id(last), last.gradient_bytes)}
        for operation in reversed(self._operations):
            if operation.kept:
                break
            _pass_back(operation, pending)
        return _alive(pending)

    def backward(self, inherited_bytes: float = 0, accumulates: bool = False) -> Climb:
        """Walk back over the tape, freeing what was kept, and find the highest moment.

        Args:
            inherited_bytes: alive all the time, such as the result of a recomputed layer.
            accumulates: a weight's gradient is added to that of an earlier pass, and goes.
        """
        uses: dict[int, int] = {}
        alive: dict[int, Value] = {}
        for operation in self._operations:
            for value in operation.kept:
                uses[id(value)] = uses.get(id(value), 0) + 1
                alive[id(value)] = value
        kept_bytes = sum(value.bytes for value in alive.values())
        # Gradients by value: (which storage, its bytes). A sum's inputs share one storage.
        pending: dict[int, tuple[int, float]] = {}
        if self._operations:
            last = self._operations[-1].output
            pending[id(last)] = (id(last), last.gradient_bytes)
        best, weights = None, 0.0
        for operation in reversed(self._operations):
            before, made = _pass_back(operation, pending)
            weights = operation.weight_gradient + (0 if accumulates else weights)
            gradients = inherited_bytes + before + made + operation.scratch
            now = kept_bytes + gradients + weights
            if best is None or now > best[0]:
                best = (now, operation.name, list(alive.values()), gradients, weights)
            for value in operation.kept:
                uses[id(value)] -= 1
                if not uses[id(value)]:
                    kept_bytes -= alive.pop(id(value)).bytes
        if best is None:
            return Climb(inherited_bytes, "nothing to train", {}, inherited_bytes, 0)
        peak, name, values, gradients, weights = best
        return Climb(peak, name, _by_group(values), gradients, weights)


def _pass_back(operation: _Operation, pending: dict[int, tuple[int, float]]) -> tuple[float, float]:
    """Take the gradient of an operation's result to its inputs.

    Args:
        pending: gradients by value: which storage, its bytes. It is changed.

    Returns:
        (bytes that were alive before, bytes that were made); both live until this returns.
    """
    result = operation.output
    storage, _ = pending.setdefault(id(result), (id(result), result.gradient_bytes))
    before, made = _alive(pending), 0.0
    for value in operation.inputs:
        if not value.grad:
            continue
        new = (id(value), value.gradient_bytes)
        if operation.passes_gradient and id(value) not in pending:
            new = (storage, pending[id(result)][1])
        else:
            made += value.gradient_bytes
        pending[id(value)] = new
    del pending[id(result)]
    return before, made


def _alive(pending: dict[int, tuple[int, float]]) -> float:
    """Bytes of gradients, each storage once."""
    return sum(dict(pending.values()).values())


def _by_group(values: Iterable[Value]) -> dict[str, float]:
    groups: dict[str, float] = {}
    for value in values:
        groups[value.group] = groups.get(value.group, 0) + value.bytes
    return groups
