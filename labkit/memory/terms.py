"""One line of an estimate: what takes the bytes, by which formula, and how sure that is."""

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
