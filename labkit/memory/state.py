"""What lies on the device from step to step: weights, adapters, gradients, optimizer state.

Numbers times bytes, with no batch in it. `P` is parameters, `Pt` trained ones.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from labkit.memory.architecture import Architecture
from labkit.memory.options import DTYPES, Options, adapted_matrices, adapter_rank
from labkit.memory.terms import DERIVED, MEASURED, QLORA_PAPER, Term, term

FP32 = 4
BLOCK, CONSTANTS_BLOCK = 64, 256
"""Weights that share a constant in NF4, and constants that share one in double quantization."""
OPTIMIZER_BLOCK, SMALLEST_8_BIT, SMALLEST_PAGED = 256, 4096, 100_000
"""bitsandbytes: states that share a constant; tensors below these sizes stay fp32 or unpaged."""
LEVELS_BYTES = 2 * 256 * FP32
"""Of the two tables of what 8 bits stand for, one for each mean."""


@dataclass(frozen=True)
class Parameter:
    """A tensor that is trained, or several of one shape."""

    name: str
    rows: int
    columns: int
    """1 for a vector."""
    copies: int = 1
    embedding: bool = False
    matrix: bool = True
    stack: int = 1
    """Matrices that lie in one tensor."""
    autocast: bool = True
    """Whether autocast casts it: stacked experts compute in the precision of their weights."""

    @property
    def size(self) -> int:
        """Numbers of one copy."""
        return self.rows * self.columns * self.stack

    @property
    def numbers(self) -> int:
        return self.size * self.copies


def trained_parameters(arch: Architecture, options: Options) -> list[Parameter]:
    """Everything that gets a gradient, tensor by tensor."""
    if options.has_adapters:
        return _adapters(arch, options)
    if options.is_soft_prompt:
        return _soft_prompt(arch, options)
    layers = options.trainable_layers if options.method == "freeze" else arch.layers
    trained = [Parameter("layer norms", arch.norm_parameters, 1, arch.norms * layers, matrix=False)]
    if arch.qk_norm:
        trained.append(Parameter("head norms", arch.head_dim, 1, 2 * layers, matrix=False))
    for matrix in arch.matrices:
        copies = layers * matrix.copies
        if matrix.stacked:
            shape = Parameter(matrix.name, matrix.n_out, matrix.n_in, layers)
            trained.append(replace(shape, stack=matrix.copies, autocast=False))
            continue
        trained.append(Parameter(matrix.name, matrix.n_out, matrix.n_in, copies))
        if matrix.bias:
            trained.append(Parameter(f"{matrix.name} bias", matrix.n_out, 1, copies, matrix=False))
    if options.method == "full":
        embedding = Parameter("embedding", arch.vocabulary, arch.hidden, embedding=True)
        trained += [embedding, Parameter("final norm", arch.norm_parameters, 1, matrix=False)]
        if arch.positions:
            trained.append(Parameter("positions", arch.positions, arch.hidden, embedding=True))
        if not arch.tied:
            trained.append(Parameter("output head", arch.vocabulary, arch.hidden))
        if arch.head_bias:
            trained.append(Parameter("head bias", arch.vocabulary, 1, matrix=False))
    return trained


def _adapters(arch: Architecture, options: Options) -> list[Parameter]:
    """A and B of each adapted matrix; those of stacked experts lie side by side in one A and B."""
    found = []
    for matrix in adapted_matrices(arch, options):
        rank, copies = adapter_rank(matrix, options), arch.layers * matrix.copies
        if matrix.stacked:
            rank, copies = rank * matrix.copies, arch.layers
        for name, rows, columns in (("A", rank, matrix.n_in), ("B", matrix.n_out, rank)):
            name = f"{matrix.name}: {name}"
            found.append(Parameter(name, rows, columns, copies, autocast=not matrix.stacked))
    return found


def _soft_prompt(arch: Architecture, options: Options) -> list[Parameter]:
    """As PEFT builds them; P-tuning with its default encoder, three linear layers."""
    tokens, hidden = options.num_virtual_tokens, arch.hidden
    if options.method == "prefix":
        return [Parameter("prefix", tokens, 2 * arch.layers * arch.kv_width, embedding=True)]
    prompt = [Parameter("virtual tokens", tokens, hidden, embedding=True)]
    if options.method == "prompt":
        return prompt
    width = options.encoder_hidden_size or hidden
    shapes = ((hidden, width), (width, width), (width, hidden))
    for number, (n_in, n_out) in enumerate(shapes):
        prompt.append(Parameter(f"encoder {number}", n_out, n_in))
        prompt.append(Parameter(f"encoder {number} bias", n_out, 1, matrix=False))
    return prompt


def numbers(parameters: Iterable[Parameter]) -> int:
    return sum(parameter.numbers for parameter in parameters)


def trained_width(options: Options) -> int:
    """Bytes of a trained number: PEFT keeps what it adds in fp32, DeepSpeed casts it to 16 bits."""
    if options.is_peft and not options.deepspeed:
        return FP32
    return DTYPES[options.dtype]


# ---- weights -----------------------------------------------------------------------------------


def norm_width(options: Options) -> int:
    """Bytes of a number of a norm, and of whatever else is neither a linear layer nor an end.

    `prepare_model_for_kbit_training` makes fp32 of every parameter that is not packed, and so of
    stacked experts.
    """
    prepared = options.is_4_bit and options.kbit_prepared
    return FP32 if prepared else DTYPES[options.dtype]


def head_width(options: Options) -> int:
    """Bytes of a number of the embedding and the output head.

    `prepare_model_for_kbit_training` makes them fp32; TRL's trainer then cast them back to bf16,
    which is what the public rows show. For fp16 it did not.
    """
    prepared = options.is_4_bit and options.kbit_prepared and options.dtype == "fp16"
    return FP32 if prepared else DTYPES[options.dtype]


def nf4_bytes(n: int, double: bool) -> tuple[int, int]:
    """(packed weights, constants) of one matrix of n weights, both in bytes.

    0.5 for a code; 4/64 for a block's constant, or 1/64 + 4/(64 x 256) when constants are
    quantized themselves; the tables of levels are 64 bytes, and 1,028 more for the second time.
    """
    blocks = math.ceil(n / BLOCK)
    packed = math.ceil(n / 2)
    if double:
        return packed, blocks + FP32 * math.ceil(blocks / CONSTANTS_BLOCK) + 64 + 1028
    return packed, FP32 * blocks + 64


def weight_terms(arch: Architecture, options: Options) -> list[Term]:
    """The base model's weights."""
    width = DTYPES[options.dtype]
    if not options.is_4_bit:
        formula = f"{width} B x P, P = {arch.parameters:,}"
        return term("weights", width * arch.parameters, formula, "shapes of config.json", MEASURED)
    packed = constants = biases = 0
    for matrix in arch.matrices:
        if matrix.bare:
            continue
        one = nf4_bytes(matrix.n_in * matrix.n_out, options.double_quant)
        copies = arch.layers * matrix.copies
        packed, constants = packed + copies * one[0], constants + copies * one[1]
        biases += copies * matrix.bias * matrix.n_out * width
    ends = arch.vocabulary * arch.hidden + arch.head_parameters
    norms = arch.layers * arch.layer_norm_parameters + arch.norm_parameters
    norms += (arch.positions or 0) * arch.hidden  # a learned table of positions is cast as they are
    bare = arch.bare_weights
    others = f"{norms:,} of norms" + (f" and {bare:,} of experts and routers" if bare else "")
    constant = "1/64 + 4/16384" if options.double_quant else "4/64"
    q = f"{arch.quantized_weights:,} weights of linear layers"
    return [
        *term("4-bit weights", packed, f"0.5 B x {q}", QLORA_PAPER, MEASURED),
        *term("quantization constants", constants, f"({constant}) B x {q}", QLORA_PAPER, MEASURED),
        *term(
            "weights that stay 16-bit or fp32",
            ends * head_width(options) + (norms + bare) * norm_width(options) + biases,
            f"{head_width(options)} B x {ends:,} of embedding and head, {norm_width(options)} B x "
            f"{others}",
            "bitsandbytes quantizes linear layers only; PEFT and TRL cast the rest",
            MEASURED,
        ),
    ]


def buffer_terms(arch: Architecture, options: Options) -> list[Term]:
    """Tables that older models kept beside their weights; no sharding divides them."""
    if not (options.tables_per_layer and arch.made_for):
        return []
    width, positions = DTYPES[options.dtype], arch.made_for
    return term(
        "tables of all positions in each layer",
        2 * arch.layers * positions * arch.head_dim * width,
        f"2 x {width} B x {arch.layers} layers x {positions:,} positions x {arch.head_dim}",
        "transformers' MistralRotaryEmbedding._set_cos_sin_cache of early 2024",
        MEASURED,
    )


def trained_terms(arch: Architecture, options: Options) -> list[Term]:
    """What the method adds to the base model: adapters or soft prompts."""
    if not options.is_peft:
        return []
    added, width = numbers(trained_parameters(arch, options)), trained_width(options)
    name = "adapters" if options.has_adapters else "soft prompt"
    return term(name, width * added, f"{width} B x Pt, Pt = {added:,}", "PEFT", MEASURED)


def reference_terms(arch: Architecture, options: Options) -> list[Term]:
    """DPO's frozen copy of the model, unless the base under an adapter serves as one."""
    if options.objective != "dpo" or options.is_peft or options.precompute_reference:
        return []
    width = DTYPES[options.dtype]
    return term(
        "reference weights", width * arch.parameters, f"{width} B x P", "TRL's DPOTrainer", DERIVED
    )


# ---- gradients and optimizer -------------------------------------------------------------------


def gradient_bytes(arch: Architecture, options: Options) -> int:
    """Gradients of all that is trained, each as wide as its weight."""
    return trained_width(options) * numbers(trained_parameters(arch, options))


def state_bytes(parameters: Iterable[Parameter], options: Options, width: int) -> tuple[int, int]:
    """(bytes in the device's allocator, bytes in memory that pages to the host)."""
    held = paged = 0
    eight_bit = False
    for parameter in parameters:
        n, constants = parameter.size, 0
        if options.optimizer == "adamw":
            one = 2 * n * width
        elif options.optimizer == "adafactor":
            one = FP32 * (parameter.rows + parameter.columns if parameter.matrix else n)
        elif options.optimizer == "sgd":
            one = 0
        elif n < SMALLEST_8_BIT or parameter.embedding:
            one = 2 * n * FP32
        else:
            one, constants = 2 * n, 2 * FP32 * math.ceil(n / OPTIMIZER_BLOCK)
            eight_bit = True
        if options.optimizer.startswith("paged") and n >= SMALLEST_PAGED:
            paged += one * parameter.copies
            held += constants * parameter.copies  # bitsandbytes pages the states alone
        else:
            held += (one + constants) * parameter.copies
    return held + LEVELS_BYTES * eight_bit, paged


STATE_FORMULAS = {
    "adamw": ("two means, each as wide as the weight", "torch.optim.AdamW"),
    "adamw-8bit": (
        "2 x (1 + 4/256) B; fp32 for embeddings and tensors under 4,096 numbers",
        "bitsandbytes' blockwise states; transformers.Trainer keeps embeddings in fp32",
    ),
    "paged-adamw-8bit": (
        "as adamw-8bit; states of 100,000 numbers or more are managed memory, not allocated, and "
        "their constants stay",
        "bitsandbytes' paged states",
    ),
    "sgd": ("no state without momentum", "torch.optim.SGD"),
    "adafactor": ("4 B x (rows + columns) of a matrix", "Shazeer and Stern 2018, arXiv:1804.04235"),
}


def step_scratch(
    parameters: list[Parameter], options: Options, width: int
) -> tuple[float, str, str]:
    """(bytes, formula, source) of what the optimizer works with during its step."""
    largest = max(parameter.size for parameter in parameters)
    everything = numbers(parameters)
    if options.optimizer == "adamw":
        if options.fused:
            return 0, "none: one kernel reads and writes in place", "torch.optim.AdamW, fused"
        if options.foreach and options.device == "cuda":
            return (
                width * everything,
                f"{width} B x Pt: the roots of all second means at once",
                "torch.optim.adam._multi_tensor_adam",
            )
        before = [None, *parameters]
        most = max(
            2 * one.size + (0 if last is None or one.embedding else last.size)
            for last, one in zip(before, parameters, strict=False)
        )
        return (
            width * most,
            f"{width} B x {most:,}: a tensor's root, divided, and that of the tensor before",
            "torch.optim.adam._single_tensor_adam",
        )
    if options.optimizer == "adafactor":
        copies = 4 if width < FP32 else 2
        return (
            copies * FP32 * largest,
            f"{copies} fp32 copies of the largest tensor, {largest:,} numbers",
            "transformers.optimization.Adafactor.step",
        )
    return 0, "none: in place", STATE_FORMULAS[options.optimizer][1]
