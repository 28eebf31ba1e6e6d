"""Products of a training step, counted: a model of time where nothing was measured.

A product of a (m x k) and a (k x n) matrix is 2 m k n operations. A layer's forward pass is one
part; backward has one part for the gradient of its input and one for that of its weights, which
frozen weights do not have. Recomputing a layer is one more part. So checkpointing costs full
fine-tuning one part on three, 33 %, and LoRA one part on two, 50 %. A count of operations knows
nothing of memory traffic, of kernels that start, or of casts: it bounds time from one side.

>>> config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
...           "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}
>>> from labkit.memory.architecture import read
>>> arch = read(config)
>>> step = step_flops(arch, Options(seq_len=512, gradient_checkpointing=False))
>>> round(step.backward / step.forward, 1)
2.0
>>> products = arch.parameters - arch.vocabulary * arch.hidden       # the embedding is a look-up
>>> round(step.total / (6 * products * 512), 2)                      # the rule of 6 P T, and scores
1.01
"""

from dataclasses import dataclass

from labkit.memory.architecture import Architecture, Matrix
from labkit.memory.options import Options, adapted_matrices, adapter_rank


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one pass over one batch on one device."""

    forward: float
    backward: float
    recomputed: float
    """Forward passes of layers that checkpointing runs a second time."""
    reference: float
    """DPO's forward pass without training."""

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recomputed + self.reference


def step_flops(arch: Architecture, options: Options) -> Flops:
    """Operations of `batch_size` rows through forward and backward on one device.

    The optimizer's own work is left out: a few operations a parameter, against 6 a parameter and
    token.
    """
    tokens = options.tokens
    frozen = options.is_peft
    layers = arch.layers
    flowing = options.trainable_layers if options.method == "freeze" else layers

    matrices = sum(_products(arch, matrix) for matrix in arch.matrices)
    adapters = sum(_adapter(arch, matrix, options) for matrix in adapted_matrices(arch, options))
    scores = _scores(arch, options)
    head = 2 * arch.vocabulary * arch.hidden

    layer = matrices + adapters + scores
    # Two products become four, and kernels that keep no scores make them once more.
    scores_backward = scores * (2 if options.attention == "eager" else 2.5)
    layer_backward = matrices * (1 if frozen else 2) + 2 * adapters + scores_backward
    head_backward = head * (2 if options.method == "full" else 1)

    forward = tokens * (layers * layer + head)
    again = options.gradient_checkpointing
    # A checkpoint's output asks for its gradient, whether its layer is trained or not: so the
    # gradient passes through the frozen layers of `freeze`, too, and each is computed again.
    passed = layers - flowing if again else 0
    through = passed * (matrices + scores_backward)
    reference = options.objective == "dpo" and not options.precompute_reference
    return Flops(
        forward=forward,
        backward=tokens * (flowing * layer_backward + through + head_backward),
        recomputed=tokens * layers * layer if again else 0,
        reference=forward if reference else 0,
    )


def _products(arch: Architecture, matrix: Matrix) -> float:
    """Operations of one token's forward pass through one matrix of a layer."""
    return 2 * matrix.n_in * matrix.n_out * _share(arch, matrix)


def _adapter(arch: Architecture, matrix: Matrix, options: Options) -> float:
    """Operations of one token's forward pass through the adapter of a matrix.

    Of a bare parameter PEFT adds B A to all weights, once in a pass, however many tokens share it.
    """
    rank = adapter_rank(matrix, options)
    if matrix.bare:
        return 2 * rank * matrix.weights / options.tokens
    return 2 * rank * (matrix.n_in + matrix.n_out) * _share(arch, matrix)


def _share(arch: Architecture, matrix: Matrix) -> int:
    """How many copies of a matrix one token meets: the chosen ones, where there are experts."""
    return arch.experts_per_token if matrix.copies > 1 else 1


def _scores(arch: Architecture, options: Options) -> float:
    """Operations of one token's attention: queries with keys, and scores with values.

    Kernels that know the mask is causal skip the half that it hides.
    """
    local = arch.local_layers() / arch.layers
    keys = local * min(options.keys, arch.window or 0) + (1 - local) * options.keys
    seen = keys if options.attention == "eager" else keys / 2
    return 2 * 2 * seen * arch.q_width
