"""What a model's tensors are: how many numbers, how many bytes, which ones, and are they whole."""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model holds; a tied matrix counts once, a 4-bit one by its real shape."""

    total: int
    trainable: int
    tied_once: bool = True

    @property
    def trainable_share(self) -> float:
        """Trainable part of all parameters, 0 to 1."""
        return self.trainable / self.total


def n_parameters(model: nn.Module) -> Parameters:
    """Count a model's parameters, each shared tensor once."""
    counts = [(_numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return Parameters(
        total=sum(count for count, _ in counts),
        trainable=sum(count for count, trains in counts if trains),
    )


def _numel(parameter: Tensor) -> int:
    """Numbers in a parameter; bitsandbytes packs two 4-bit numbers into each stored byte."""
    quantization = getattr(parameter, "quant_state", None)
    return math.prod(quantization.shape) if quantization is not None else parameter.numel()


def tensor_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's tensors, each storage once: what the process holds, not what it reserved.

    Returns:
        `parameters`, `buffers`, `quantization` (scales and code books of bitsandbytes layers),
        `gradients` (0 until a backward pass), and their sum `total`.
    """
    seen: set[int] = set()

    def size(tensors: Iterable[Tensor]) -> int:
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += tensor.numel() * tensor.element_size()
        return total

    parameters = list(model.parameters())
    sizes = {
        "parameters": size(parameters),
        "buffers": size(model.buffers()),
        "quantization": size(quantization_tensors(model)),
        "gradients": size([p.grad for p in parameters if p.grad is not None]),
    }
    return sizes | {"total": sum(sizes.values())}


def model_tensors(model: nn.Module) -> list[Tensor]:
    """Everything that a model holds: parameters, buffers, scales and code books of its layers."""
    return [*model.parameters(), *model.buffers(), *quantization_tensors(model)]


def quantization_tensors(model: nn.Module) -> list[Tensor]:
    """Scales and code books kept beside quantized weights, double quantization's included."""
    # int8: one scale a row, which moves from the weight to its layer in the first forward pass.
    found = [getattr(getattr(layer, "state", None), "SCB", None) for layer in model.modules()]
    for parameter in model.parameters():
        found.append(getattr(parameter, "SCB", None))
        state = getattr(parameter, "quant_state", None)  # 4-bit: largest of each block, levels
        while state is not None:
            found += [state.absmax, state.code, getattr(state, "offset", None)]
            state = getattr(state, "state2", None)
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over every tensor's name, type, shape and bytes, in the order of the names.

    Two models with equal fingerprints are equal bit for bit; a run that resumed exactly has the
    fingerprint of the run that was never stopped.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # numpy has no bfloat16: look at the bytes.
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# The first pattern found in a parameter's name decides its group.
GROUPS = {
    "adapter": r"lora_|prompt_encoder|prompt_embeddings|ia3_",
    "token embedding": r"embed_tokens|wte",
    "position embedding": r"wpe|embed_positions",
    "output head": r"lm_head",
    "norm": r"norm|ln_",
    "attention": r"attn|attention",
    "mlp": r"mlp|feed_forward|fc",
    "other": r"",
}


def parameter_table(model: nn.Module) -> pd.DataFrame:
    """Parameters of a model by module group, largest first; a tied output head counts 0.

    Returns:
        one row per group: `group`, `tensors`, `parameters`, `share` (0 to 1), `trainable`, `bytes`.
    """
    columns = ["tensors", "parameters", "share", "trainable", "bytes"]
    total = n_parameters(model).total
    groups: dict[str, dict[str, float]] = {}
    if getattr(model.config, "tie_word_embeddings", False):
        groups["output head"] = dict.fromkeys(columns, 0)
    for name, parameter in model.named_parameters():
        group = next(group for group, pattern in GROUPS.items() if re.search(pattern, name))
        row = groups.setdefault(group, dict.fromkeys(columns, 0))
        row["tensors"] += 1
        row["parameters"] += _numel(parameter)
        row["share"] += _numel(parameter) / total
        row["trainable"] += _numel(parameter) if parameter.requires_grad else 0
        row["bytes"] += parameter.numel() * parameter.element_size()
    largest_first = sorted(groups, key=lambda group: (-groups[group]["parameters"], group))
    return pd.DataFrame([{"group": group} | groups[group] for group in largest_first])


def safetensors_problem(path: Path) -> str | None:
    """Why a safetensors file is not whole, or None; reads its header only.

    The file is 8 bytes of header length, a JSON header, then the data; a save that was cut short
    has fewer bytes than the header's last offset says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > size - 8:
            return f"holds {size:,} bytes, less than its own header"
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError:
            return "has an unreadable header"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + header_bytes + max(ends, default=0)
    return None if size == expected else f"holds {size:,} bytes where its header says {expected:,}"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
