"""One real training step of a model at hand, counted tensor by tensor.

A process's own memory says little about a small model on a CPU: the libraries and the allocator's
spare room are larger than what a method saves. So the tensors themselves are counted, in the
precision and with the attention of this machine. What a custom function keeps to itself, as the
int8 product of bitsandbytes does on a CPU, escapes the count.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.weights import model_tensors, tensor_bytes


@dataclass(frozen=True)
class StepBytes:
    """Bytes of the tensors of one training step with AdamW."""

    weights: int
    """Parameters, buffers, and the scales and code books of quantized layers."""
    activations: int
    """What the backward pass needs of the forward pass, bf16 copies of weights included."""
    gradients: int
    optimizer: int
    """AdamW's two means, for each trained number."""

    @property
    def peak(self) -> int:
        """Bytes held at once at the least: activations go while gradients come.

        Short-lived tensors inside an operation are not counted.
        """
        return self.weights + self.optimizer + max(self.activations, self.gradients)


def step_bytes(model: nn.Module, tokenizer, rows: Sequence[dict], bf16: bool = False) -> StepBytes:
    """Count the tensors of one training step over `rows` as one batch; no weight is changed.

    Gradients that are there are dropped, and so are those of this step.

    Args:
        model: any causal LM, with or without a PEFT adapter; what requires gradients is trained.
        rows: with `messages`; padded to the longest.
        bf16: compute under bf16 autocast.

    Raises:
        ValueError: no rows, or nothing to train.
    """
    if not len(rows):
        raise ValueError("rows is empty: give the rows of one batch")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    device = trained[0].device
    batch = tokenizer.apply_chat_template(
        [row["messages"] for row in rows],
        return_tensors="pt",
        return_dict=True,
        padding=True,
    ).to(device)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    model.zero_grad(set_to_none=True)
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng(), saved_for_backward(model_tensors(model)) as saved:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            activations = sum(saved.values())
            loss.backward()
        sizes = tensor_bytes(model)
        # A real step of the real optimizer, at a rate that moves nothing.
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
        optimizer.step()
        means = (t for state in optimizer.state.values() for t in state.values() if t.ndim)
        return StepBytes(
            weights=sizes["total"] - sizes["gradients"],
            activations=activations,
            gradients=sizes["gradients"],
            optimizer=sum(t.numel() * t.element_size() for t in means),
        )
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)


@contextmanager
def saved_for_backward(own: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Address → bytes of each storage that autograd keeps inside.

    Args:
        own: the model's tensors, which are there anyway.
    """
    mine = {tensor.untyped_storage().data_ptr() for tensor in own}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # else an operation's own result would keep itself alive

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved
