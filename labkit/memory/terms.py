"""One line of an estimate: what takes the bytes, by which formula, and how sure that is."""

from collections.abc import Iterable
from dataclasses import dataclass

MEASURED, DERIVED, UNVERIFIED = "measured", "derived", "unverified"
"""`measured`: the formula gave the bytes of a real run, on a GPU in public or here on a CPU.
`derived`: it follows from code or a paper that was read. `unverified`: nothing was held against it.
"""

ZERO_PAPER = "Rajbhandari et al. 2020, arXiv:1910.02054, section 3"
QLORA_PAPER = "Dettmers et al. 2023, arXiv:2305.14314, section 3"
PUBLIC_ROWS = "data/memory/public.json"
AUTOGRAD = "labkit.memory.layers: tensors that autograd keeps, operation by operation"


@dataclass(frozen=True)
class Term:
    """Bytes on one device, and where they come from."""

    name: str
    bytes: int
    formula: str
    source: str
    status: str

    def to_json(self) -> dict:
        return vars(self)


def term(name: str, n_bytes: float, formula: str, source: str, status: str = DERIVED) -> list[Term]:
    """The term as a list of one, or of none where it takes no bytes."""
    whole = round(n_bytes)
    return [Term(name, whole, formula, source, status)] if whole else []


def total(terms: list[Term]) -> int:
    """Bytes of all terms."""
    return sum(one.bytes for one in terms)


# ---- kinds, for figures and for a first look ---------------------------------------------------

WEIGHTS, STATES, GRADIENTS = "weights", "optimizer states", "gradients"
KEPT, LOGITS, WORKING = "kept for backward", "logits", "working memory"
_KINDS = {
    WEIGHTS: (
        "weights", "4-bit weights", "quantization constants", "adapters", "soft prompt",
        "reference weights", "gathered",
    ),
    STATES: ("optimizer states", "fp32 copies of trained weights"),
    GRADIENTS: (
        "gradients of this layer's weights", "second gradient", "gradient of the output head",
        "DDP buckets", "DeepSpeed buckets", "whole gradients of FSDP", "gradients copied",
    ),
    KEPT: (
        "checkpoints", "kept for backward", "cosines and sines", "attention mask", "dropout mask",
        "autocast's copies",
    ),
    LOGITS: ("logits", "tile of logits", "gradient of the logits", "shifted labels"),
}  # fmt: skip


def kind_of(name: str) -> str:
    """Which of six kinds a term is, by its name: working memory is what is none of the others."""
    if name == GRADIENTS:  # other gradients, such as those inside a layer, come and go
        return GRADIENTS
    for kind, beginnings in _KINDS.items():
        if name.startswith(beginnings):
            return kind
    return WORKING


def by_kind(terms: Iterable[Term]) -> dict[str, int]:
    """Bytes of each kind, in the order of a stack: what lasts first."""
    sums: dict[str, int] = dict.fromkeys((*_KINDS, WORKING), 0)
    for one in terms:
        sums[kind_of(one.name)] += one.bytes
    return sums
