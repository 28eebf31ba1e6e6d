"""From the last hidden states to the loss: the phase in which the vocabulary is the largest axis.

The logits of T tokens over a vocabulary of V are small as a product and large as copies. How many
copies live at once depends on who computes the loss:

| path | who | forward | backward |
|---|---|---|---|
| `upcast` | transformers up to 4.45 | fp32 logits, shifted copy, log-softmax: 12 B | 12 B |
| `shifted` | transformers 4.46 to 4.48 | the 16-bit logits too: 14 B | 12 B |
| `padded` | transformers from 4.49: labels are shifted, not logits | 10 B | 12 B |
| `fused` | TRL's own head (TRL 1.x), and in another way Liger's | a tile of logits at a time | |

Bytes are for each token and word of the vocabulary, where the head computes in 16 bits; in fp32
casting copies nothing, so `shifted` has 12 as well and `padded` 8. In backward the log-softmax, the
gradient of the picked entries and the gradient of the logits live at once. A shifted copy has one
token less in each row, and a single row needs none (10 B). `shifted` is the default because it is
the most that any of them takes, and what the public rows were measured with.
"""

from labkit.memory.architecture import Architecture
from labkit.memory.options import Options
from labkit.memory.terms import DERIVED, MEASURED, PUBLIC_ROWS, Term, term

FP32, INT64 = 4, 8
UNCUT = 2**20
"""What torch's CUDACachingAllocator leaves at the end of a large block."""


def predicted_tokens(arch: Architecture, options: Options) -> int:
    """Tokens of the log-softmax: where logits are shifted, none for the last of a row.

    On a GPU that seldom shows. CUDA's allocator gives a shifted copy a block as large as the
    logits', and does not cut a large block where 1 MiB or less would be left.
    """
    if options.loss_path not in ("shifted", "upcast"):
        return options.tokens
    last_ones, every = (FP32 * arch.vocabulary * n for n in (options.rows, options.tokens))
    if options.device == "cuda" and options.rows > 1 and last_ones <= UNCUT < every:
        return options.tokens
    return options.tokens - options.rows


def forward_bytes(arch: Architecture, options: Options, width: int) -> int:
    """Bytes for each word while the loss is computed, over all tokens.

    Args:
        width: bytes of a number of the logits as the head gives them.
    """
    every, shifted = options.tokens, predicted_tokens(arch, options)
    sixteen_bit = width * every if width < FP32 else 0
    # All but the last token of a single row lie side by side: they need no copy.
    copies = FP32 * every + FP32 * shifted * (2 if options.rows > 1 else 1)
    return {
        "upcast": copies,
        "shifted": sixteen_bit + copies,
        "padded": sixteen_bit + 2 * FP32 * every,
        "fused": 0,
    }[options.loss_path]


def backward_bytes(arch: Architecture, options: Options) -> int:
    """Bytes for each word while the loss is taken back to the logits, over all tokens."""
    return 0 if options.loss_path == "fused" else 3 * FP32 * predicted_tokens(arch, options)


def kept_bytes(arch: Architecture, options: Options, width: int, hidden_width: int) -> int:
    """What the loss keeps for backward: the log-softmax, and the labels it picked.

    Args:
        width: bytes of a number of the logits as the head gives them; a soft cap keeps its tanh.
        hidden_width: bytes of a number of the last hidden states.
    """
    if options.loss_path == "fused":
        tokens = _labelled(options)
        # A trained head keeps the hidden states anyway, and they are counted there.
        states = hidden_width * arch.hidden * (options.method != "full")
        return tokens * (states + _FUSED_KEEPS)
    capped = width * options.tokens if arch.softcap_logits else 0
    predicted = predicted_tokens(arch, options)
    return (FP32 * predicted + capped) * arch.vocabulary + INT64 * predicted


def loss_terms(arch: Architecture, options: Options, width: int, backward: bool) -> list[Term]:
    """The logits and their copies.

    Args:
        width: bytes of a number of the logits as the head gives them.
        backward: in the backward pass of the loss; else in its forward pass.
    """
    tokens, words = options.tokens, arch.vocabulary
    path = options.loss_path
    copies = backward_bytes(arch, options) if backward else forward_bytes(arch, options, width)
    capped = width * tokens if arch.softcap_logits and path != "fused" else 0
    status = MEASURED if path in ("shifted", "upcast") and not capped else DERIVED
    return [
        *term(
            "logits and their copies",
            (copies + capped) * words,
            f"{(copies + capped) / tokens:.4g} B x {tokens:,} tokens x {words:,} words"
            + (", the tanh of the soft cap among them" if capped else ""),
            f"transformers' ForCausalLMLoss, path {path!r}; {PUBLIC_ROWS}",
            status,
        ),
        *term(
            "shifted labels",
            INT64 * predicted_tokens(arch, options),
            "8 B x tokens",
            "transformers' ForCausalLMLoss",
            MEASURED,
        ),
    ]


# ---- a head that makes no logits of all tokens -------------------------------------------------

TILE_TOKENS, TILE_WORDS = 4096, 32_768
"""Logits that TRL's head has at a time."""
CHUNKED = "trl.kernels.chunked_logprob"
_FUSED_KEEPS = INT64 + FP32 + 1
"""Bytes for each token: its label, the log of its sum, and whether it counts."""
_FUSED_STATISTICS = 7 * FP32
_CPU_FORWARD, _CPU_BACKWARD = 3 * FP32, 7 * FP32 + 1
"""Bytes for each logit of a tile that torch's operations take where there is no Triton."""


def _labelled(options: Options) -> int:
    """Tokens that are predicted: all but the first of each row."""
    return options.tokens - options.rows


def fused_terms(
    arch: Architecture,
    options: Options,
    hidden_width: int,
    compute: int,
    weight_width: int,
    backward: bool,
) -> list[Term]:
    """What TRL's head works with: a tile of logits, and in backward gradients in fp32.

    Args:
        hidden_width: bytes of a number of the last hidden states.
        compute: bytes of a number of the tile.
        weight_width: bytes of a number of the head.
        backward: in the backward pass of the loss; else in its forward pass.
    """
    tokens, hidden, words = _labelled(options), arch.hidden, arch.vocabulary
    rows, columns = min(tokens, TILE_TOKENS), min(words, TILE_WORDS)
    scratch = (_CPU_BACKWARD if backward else _CPU_FORWARD) * rows * columns
    scratch = scratch if options.device == "cpu" else 0
    scratch += compute * columns * hidden * (weight_width != compute)
    gradients = results = 0
    if backward:
        widths = [(tokens, hidden_width)] + [(words, weight_width)] * (options.method == "full")
        gradients = sum(FP32 * hidden * n for n, _ in widths)
        results = sum(width * hidden * n for n, width in widths if width != FP32)
    copies = hidden_width * tokens * hidden
    if backward and options.method == "full":
        copies = 0  # what the head keeps is counted with the last norm
    each = _FUSED_KEEPS + (0 if backward else _FUSED_STATISTICS)
    return [
        *term(
            "tile of logits",
            compute * rows * TILE_WORDS + max(scratch, results),
            f"{compute} B x {rows:,} tokens x {TILE_WORDS:,} words, and what works on it",
            CHUNKED,
        ),
        *term(
            "gradients of the fused head",
            gradients,
            "4 B x h x (tokens" + (" + V)" if options.method == "full" else ")"),
            CHUNKED,
        ),
        *term(
            "hidden states that are predicted from",
            copies,
            f"{hidden_width} B x {tokens:,} tokens x {hidden}",
            CHUNKED,
        ),
        *term("labels and sums of the fused head", each * tokens, f"{each} B x tokens", CHUNKED),
    ]
