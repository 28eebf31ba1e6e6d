"""From the last hidden states to the loss: the phase in which the vocabulary is the largest axis.

The logits of T tokens over a vocabulary of V are small as a product and large as copies. How many
copies live at once depends on who computes the loss:

| path | who | forward | backward |
|---|---|---|---|
| `upcast` | transformers up to 4.45 | fp32 logits, shifted copy, log-softmax: 12 B | 12 B |
| `shifted` | transformers 4.46 to 4.48 | the 16-bit logits too: 14 B | 12 B |
| `padded` | transformers from 4.49: labels are shifted, not logits | 10 B | 12 B |
| `fused` | Liger's and TRL's own heads (TRL 1.x) | no logits of all tokens at all | |

Bytes are for each token and word of the vocabulary, where the head computes in 16 bits; in fp32
casting copies nothing, so `shifted` has 12 as well and `padded` 8. In backward the log-softmax, the
gradient of the picked entries and the gradient of the logits live at once. `shifted` is the default
because it is the most that any of them takes, and what the public rows were measured with.
"""

from labkit.memory.architecture import Architecture
from labkit.memory.options import Options
from labkit.memory.terms import DERIVED, MEASURED, PUBLIC_ROWS, Term, term

FP32, INT64 = 4, 8


def forward_copies(path: str, width: int) -> int:
    """Bytes for each token and word while the loss is computed.

    Args:
        width: bytes of a number of the logits as the head gives them.
    """
    sixteen_bit = width if width < FP32 else 0
    return {
        "upcast": 3 * FP32,
        "shifted": sixteen_bit + 3 * FP32,
        "padded": sixteen_bit + 2 * FP32,
        "fused": 0,
    }[path]


def backward_copies(path: str) -> int:
    """Bytes for each token and word while the loss is taken back to the logits."""
    return 0 if path == "fused" else 3 * FP32


def kept_bytes(arch: Architecture, options: Options, width: int) -> int:
    """What the loss keeps for backward: the log-softmax, and the labels it picked.

    Args:
        width: bytes of a number of the logits as the head gives them; a soft cap keeps its tanh.
    """
    if options.loss_path == "fused":
        return INT64 * options.tokens
    each = FP32 + (width if arch.softcap_logits else 0)
    return options.tokens * (each * arch.vocabulary + INT64)


def loss_terms(arch: Architecture, options: Options, width: int, backward: bool) -> list[Term]:
    """The logits and their copies.

    Args:
        width: bytes of a number of the logits as the head gives them.
        backward: in the backward pass of the loss; else in its forward pass.
    """
    tokens, words = options.tokens, arch.vocabulary
    path = options.loss_path
    copies = backward_copies(path) if backward else forward_copies(path, width)
    capped = width if arch.softcap_logits and path != "fused" else 0
    status = MEASURED if path in ("shifted", "upcast") and not capped else DERIVED
    return [
        *term(
            "logits and their copies",
            (copies + capped) * tokens * words,
            f"{copies + capped} B x {tokens:,} tokens x {words:,} words"
            + (", the tanh of the soft cap among them" if capped else ""),
            f"transformers' ForCausalLMLoss, path {path!r}; {PUBLIC_ROWS}",
            status,
        ),
        *term(
            "shifted labels",
            INT64 * tokens,
            f"8 B x {tokens:,} tokens",
            "transformers' ForCausalLMLoss",
            MEASURED,
        ),
    ]
