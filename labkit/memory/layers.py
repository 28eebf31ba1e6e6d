"""One decoder layer, operation by operation, as transformers runs it, on a tape of sizes.

What is written here is what the modeling files of transformers do, in their order, with what each
operation keeps for backward. It is checked against the saved tensors of real models in the tests.
"""

from collections.abc import Callable
from dataclasses import dataclass

from labkit.memory.architecture import Architecture, Matrix
from labkit.memory.tape import Tape, Value

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Work:
    """What one forward pass is given, and in which precision it computes."""

    rows: int
    queries: int
    """Tokens of a row, a soft prompt's included."""
    keys: int
    """Tokens that attention sees: a prefix comes on top."""
    compute: int
    """Bytes of a number in a matrix product."""
    weights: int
    """Bytes of a number of a weight that is not quantized."""
    norms: int
    """The same for the weight of a norm, of a router, and of stacked experts."""
    tables: int
    """The same for the cosines and sines of rotary positions."""
    autocast: bool = False
    quantized: bool = False
    attention: str = "sdpa"
    masked: bool = False
    """Whether sdpa gets a mask: see `labkit.memory.options.needs_mask`."""
    rank: int = 0
    """Of the adapter of a linear layer."""
    adapter: int = FP32
    """Bytes of a number of an adapter: PEFT keeps adapters of a 16-bit base in fp32."""
    adapter_dropout: float = 0.0
    as_needed: bool = False
    """Whether a layer is computed again as backward needs it: then a kept tensor goes when it was
    read, and else when the results of what read it are there."""
    on_gpu: bool = True
    """A GPU keeps dropout masks of one byte a number, a CPU as wide as the numbers; and PEFT asks
    CUDA alone whether autocast is on."""

    @property
    def tokens(self) -> int:
        return self.rows * self.queries

    @property
    def key_tokens(self) -> int:
        return self.rows * self.keys


@dataclass(frozen=True)
class Trained:
    """Which parts of one decoder layer are trained."""

    weights: bool
    """All weights of the layer: full fine-tuning, or a layer that freezing left out."""
    adapted: Callable[[Matrix], bool] = lambda matrix: False
    """Whether LoRA adapts a matrix."""


def decoder_layer(
    arch: Architecture,
    work: Work,
    trained: Trained,
    input_width: int,
    input_grad: bool,
    recomputed: bool,
) -> Tape:
    """One decoder layer on a tape.

    Args:
        input_width: bytes of a number of the residual stream where it enters.
        input_grad: whether a gradient flows to the layer's input.
        recomputed: under checkpointing the input is the checkpoint, which is counted elsewhere.
    """
    layer = _Layer(arch, work, trained)
    x = layer.tape.source(
        "layer input",
        work.tokens * arch.hidden,
        input_width,
        grad=input_grad,
        held=0 if recomputed else None,
    )
    layer.run(x)
    return layer.tape


def final_norm(arch: Architecture, work: Work, trained: bool, width: int, grad: bool) -> Tape:
    """The norm after the last layer, and what the output head keeps of its input.

    Args:
        trained: whether the norm and the head are.
    """
    layer = _Layer(arch, work, Trained(trained))
    layer.tape.group = "final norm"
    x = layer.tape.source("last layer's output", work.tokens * arch.hidden, width, grad=grad)
    out = layer.norm("final norm", x)
    head = Matrix("lm_head", arch.hidden, arch.vocabulary, arch.head_bias)
    if trained:
        kept = layer.tape.cast(out, work.compute)
        layer.tape.operation("output head", [kept], 0, work.compute, kept=[kept])
    if work.autocast and work.tables == FP32 and out.grad:
        copy = layer.tape.source("bf16 copy of the head", head.weights, work.compute, grad=False)
        layer.tape.operation("output head's copy", [out], 0, work.compute, kept=[copy])
    return layer.tape


class _Layer:
    """Builds a layer; every method is one building block."""

    def __init__(self, arch: Architecture, work: Work, trained: Trained) -> None:
        self.arch, self.work, self.trained = arch, work, trained
        self.tape = Tape()
        self.matrices = iter(arch.matrices)

    def run(self, x: Value) -> Value:
        arch, tape = self.arch, self.tape
        tape.group = "norms"
        normed = self.norm("input norm", x)
        with tape.holding(normed):
            attended = self.attention_block(normed)
        if arch.norms == 4:
            tape.group = "norms"
            attended = self.norm("norm after attention", attended)
        if arch.parallel:
            out = self.mlp_block(normed)
            both = tape.add("attention + MLP", attended, out)
            return tape.add("residual", both, x)
        x = tape.add("residual after attention", attended, x)
        tape.group = "norms"
        normed = self.norm("MLP norm", x)
        with tape.holding(normed):
            out = self._feed_forward(normed)
        if arch.norms == 4:
            tape.group = "norms"
            out = self.norm("norm after the MLP", out)
        return tape.add("residual after the MLP", out, x)

    # ---- norms

    def norm(self, name: str, x: Value) -> Value:
        """A norm over the model's width."""
        return self._norm(name, x, x.numbers / self.arch.hidden, self.arch.norm_parameters)

    def head_norm(self, name: str, x: Value) -> Value:
        """A norm over each head's queries or keys."""
        return self._norm(name, x, x.numbers / self.arch.head_dim, self.arch.head_dim)

    def _norm(self, name: str, x: Value, rows: float, parameters: int) -> Value:
        tape, trains, width = self.tape, self.trained.weights, self.work.norms
        gradient = parameters * width * trains
        if self.arch.norm == "layer":
            if self.work.autocast:
                x = tape.cast(x, FP32)
            statistics = tape.source(f"{name}: mean and 1/deviation", 2 * rows, FP32, grad=False)
            return tape.operation(name, [x], x.numbers, x.width, [x, statistics], gradient)
        # x / sqrt(mean(x^2)): the square and the product keep x in fp32, the root keeps itself.
        entered = x.width
        exact = tape.cast(x, FP32, f"{name}: input in fp32")
        scale = tape.source(f"{name}: 1/root mean square", rows, FP32, grad=False)
        work = 2 * exact.numbers * FP32
        scaled = tape.operation(
            f"{name}, scaled", [exact], exact.numbers, FP32, [exact, scale], scratch=work
        )
        if self.arch.norm == "rms":
            scaled = tape.cast(scaled, entered)
            width = max(width, entered)
        else:  # Gemma multiplies by 1 + w in fp32 and casts afterwards
            width = FP32
        kept = [scaled] if trains else []
        if self.arch.norm == "rms_one_plus" and scaled.grad:
            kept.append(tape.source(f"{name}: 1 + w", parameters, FP32, grad=False))
        out = tape.operation(name, [scaled], scaled.numbers, width, kept, gradient)
        return tape.cast(out, entered) if self.arch.norm == "rms_one_plus" else out

    # ---- linear layers

    def next_linear(self, x: Value) -> Value:
        """The next linear layer of the architecture, applied to x."""
        return self.linear(next(self.matrices), x, x.numbers)

    def linear(self, matrix: Matrix, x: Value, numbers: float) -> Value:
        """A linear layer, 4-bit or not, with its LoRA adapter where it has one.

        Args:
            numbers: of the input: tokens times `n_in`.
        """
        tokens = numbers / matrix.n_in
        with self.tape.holding(x):
            compute = self._quantized if self._is_4_bit else self._plain
            base = compute(matrix, x, tokens)
            if not self.trained.adapted(matrix):
                return base
            return self._adapter(matrix, x, base, tokens)

    @property
    def _is_4_bit(self) -> bool:
        return self.work.quantized

    def _plain(self, matrix: Matrix, x: Value, tokens: float) -> Value:
        """y = x W: keeps x for the gradient of W, and W, or a copy that autocast made, for x's."""
        work, tape = self.work, self.tape
        inside = tape.cast(x, work.compute)
        kept = [inside] if self.trained.weights else []
        copied = work.autocast and work.weights != work.compute
        if copied and x.grad:
            copy = tape.source(f"{matrix.name}: copy for autocast", matrix.weights, work.compute)
            kept.append(copy)
            copy.group = "weight copies"
        gradient = matrix.parameters * work.weights * self.trained.weights
        return tape.operation(
            matrix.name,
            [inside],
            tokens * matrix.n_out,
            work.compute,
            kept,
            gradient * x.share,
            scratch=matrix.weights * work.compute if copied and self.trained.weights else 0,
            share=x.share,
        )

    def _quantized(self, matrix: Matrix, x: Value, tokens: float) -> Value:
        """A 4-bit layer keeps nothing: backward unpacks the weight again, one layer at a time."""
        entered = x.width
        inside = self.tape.cast(x, self.work.compute)
        unpacked = matrix.n_in * matrix.n_out * self.work.compute
        out = self.tape.operation(
            matrix.name,
            [inside],
            tokens * matrix.n_out,
            self.work.compute,
            scratch=unpacked,
            share=x.share,
        )
        return self.tape.cast(out, entered)

    def _adapter(self, matrix: Matrix, x: Value, base: Value, tokens: float) -> Value:
        """base + B(A(dropout(x))) * scale, in the adapter's precision."""
        tape, work = self.tape, self.work
        group, tape.group = tape.group, "adapter inputs"
        # A 4-bit layer leaves the cast to autocast on a GPU; others cast to the adapter first.
        if not (work.autocast and self._is_4_bit and work.on_gpu):
            x = tape.cast(x, work.adapter, f"{matrix.name}: input in the adapter's precision")
        with tape.holding(x):
            scaled = self._low_rank(matrix, x, tokens)
        tape.group = group
        out = tape.add(f"{matrix.name} + adapter", base, scaled)
        return tape.cast(out, base.width)

    def _low_rank(self, matrix: Matrix, x: Value, tokens: float) -> Value:
        """B(A(dropout(x))) * scale."""
        tape, work = self.tape, self.work
        if work.adapter_dropout:
            x = self.dropout(f"{matrix.name}: adapter dropout", x)
        inside = work.compute if work.autocast else work.adapter
        dropped, x = x, tape.cast(x, inside)
        small = []
        if work.autocast and work.adapter != inside:
            for part, numbers in (("A", matrix.n_in), ("B", matrix.n_out)):
                copy = f"{matrix.name}: copy of {part} for autocast"
                small.append(tape.source(copy, work.rank * numbers, inside, grad=False))
        a_gradient = work.rank * matrix.n_in * work.adapter
        b_gradient = work.rank * matrix.n_out * work.adapter
        with tape.holding(dropped):
            down = tape.operation(
                f"{matrix.name}: A", [x], tokens * work.rank, inside, [x, *small[:1]], a_gradient
            )
        up = tape.operation(
            f"{matrix.name}: B",
            [down],
            tokens * matrix.n_out,
            inside,
            [down, *small[1:]],
            b_gradient,
        )
        return tape.operation(f"{matrix.name}: scale", [up], up.numbers, inside)

    def dropout(self, name: str, x: Value) -> Value:
        """Keeps its mask."""
        width = 1 if self.work.on_gpu else x.width
        mask = self.tape.source(f"{name}: mask", x.numbers, width, grad=False)
        return self.tape.operation(name, [x], x.numbers, x.width, [mask])

    # ---- attention

    def attention_block(self, x: Value) -> Value:
        self.tape.group = "attention"
        names = [matrix.name for matrix in self.arch.matrices]
        if names[0] in ("c_attn", "qkv_proj"):
            q, k, v = self._split(self.next_linear(x))
        else:
            q, k, v = (self.next_linear(x) for _ in range(3))
        if self.arch.qk_norm:
            self.tape.group = "norms"
            q, k = self.head_norm("query norm", q), self.head_norm("key norm", k)
            self.tape.group = "attention"
        if self.arch.rotary:
            q, k = self._rotate("rotated queries", q), self._rotate("rotated keys", k)
        k, v = self._with_prefix("keys", k), self._with_prefix("values", v)
        if self.work.attention == "eager":
            out = self._eager(q, k, v)
        elif self.arch.attention_dropout and not self.work.on_gpu:
            # torch has no fused kernel with dropout for a CPU: it writes attention out, in fp32.
            out = self.tape.cast(self._eager(q, k, v, width=FP32), q.width)
        else:
            out = self._fused(q, k, v)
        out = self.next_linear(out)
        return self.dropout("residual dropout", out) if self.arch.residual_dropout else out

    def _split(self, fused: Value) -> tuple[Value, Value, Value]:
        """Views of one tensor: what keeps one of them keeps all of it."""
        tokens, arch = self.work.tokens, self.arch
        q, k, v = (
            self.tape.operation(name, [fused], tokens * width, fused.width)
            for name, width in (("q", arch.q_width), ("k", arch.kv_width), ("v", arch.kv_width))
        )
        copied = self.work.keys != self.work.queries  # a prefix is copied before keys and values
        q.held = fused.numbers if copied else 0
        k.held = None if copied else 0
        v.held = None if copied else fused.numbers
        return q, k, v

    def _rotate(self, name: str, x: Value) -> Value:
        """q cos + rotate(q) sin: keeps the two tables, which all layers share."""
        width = max(x.width, self.work.tables)
        return self.tape.operation(name, [x], x.numbers, width, scratch=2 * x.numbers * width)

    def _with_prefix(self, name: str, x: Value) -> Value:
        if self.work.keys == self.work.queries:
            return x
        numbers = x.numbers / self.work.queries * self.work.keys
        out = self.tape.operation(f"prefix and {name}", [x], numbers, x.width)
        out.grad = True  # the prefix is trained
        return out

    def _fused(self, q: Value, k: Value, v: Value) -> Value:
        """Flash attention: keeps q, k, v, the result, and one number a query and head.

        With a mask, transformers' sdpa repeats shared keys and values, and torch makes numbers of
        the mask; flash_attention_2 drops padding instead.
        """
        tape, arch, work = self.tape, self.arch, self.work
        masked = work.masked and work.attention == "sdpa"
        if masked and arch.heads != arch.kv_heads:
            k, v = self._repeated(k), self._repeated(v)
        width = 2 if work.autocast or work.attention == "flash_attention_2" else q.width
        q, k, v = (tape.cast(value, width) for value in (q, k, v))
        sums = tape.source("log of the sums", work.tokens * arch.heads, FP32, grad=False)
        shared = 2 * q.numbers * width if arch.heads != arch.kv_heads else 0
        masks = []
        if masked:
            square = work.rows * work.queries * work.keys
            masks = [tape.source("mask as numbers", square, width, grad=False)]
        out = tape.operation(
            "attention",
            [q, k, v],
            q.numbers,
            width,
            # Backward accumulates the queries' gradient in fp32, and that of shared keys a head
            # at a time.
            scratch=sums.bytes + q.numbers * FP32 + shared,
        )
        if out.grad:
            tape.keep(out, [q, k, v, out, sums, *masks])
        if arch.rotary_parts:  # the result lies as the queries do: joined, head by head
            out = tape.operation("attention, heads side by side", [out], out.numbers, width)
        return out

    def _repeated(self, x: Value) -> Value:
        """Keys or values, once for each head that shares them."""
        numbers = self.work.key_tokens * self.arch.q_width
        return self.tape.operation(f"{x.name}, repeated", [x], numbers, x.width)

    def _eager(self, q: Value, k: Value, v: Value, width: int | None = None) -> Value:
        """softmax(q k^T) v written out: keeps the square of scores, in fp32 and in q's type.

        Args:
            width: to compute in; None is that of q, or autocast's.
        """
        tape, arch, work = self.tape, self.arch, self.work
        tape.group = "attention scores"
        if arch.heads != arch.kv_heads:
            k, v = self._repeated(k), self._repeated(v)
        entered = width or q.width
        width = width or (work.compute if work.autocast else q.width)
        q, k, v = (tape.cast(value, width) for value in (q, k, v))
        square = work.rows * arch.heads * work.queries * work.keys
        scores = tape.operation("scores", [q, k], square, width, [q, k])
        scores = tape.operation("scaled scores", [scores], square, width)
        if arch.softcap_attention:
            scores = tape.operation("soft cap", [scores], square, width)
            tape.keep(scores, [scores])
            scores = tape.operation("cap", [scores], square, width)
        scores = tape.operation("masked scores", [scores], square, width, passes_gradient=True)
        exact = work.autocast or arch.model_type != "gpt2"  # GPT-2 stays in the type of its scores
        scores = tape.cast(scores, FP32) if exact else scores
        share = tape.operation("softmax", [scores], square, scores.width)
        if share.grad:
            tape.keep(share, [share])
        share = tape.cast(tape.cast(share, entered), width)
        if arch.attention_dropout:
            share = self.dropout("attention dropout", share)
        out = tape.operation("values", [share, v], q.numbers, width, [share, v])
        tape.group = "attention"
        return tape.operation("attention, heads side by side", [out], out.numbers, width)

    # ---- MLP

    def mlp_block(self, x: Value) -> Value:
        tape = self.tape
        tape.group = "MLP"
        if self.arch.gated:
            gate, up = self._gate_and_up(x)
            x = tape.multiply("gate x up", self.activation(gate), up)
        else:
            x = self.activation(self.next_linear(x))
        out = self.next_linear(x)
        return self.dropout("MLP dropout", out) if self.arch.residual_dropout else out

    def _gate_and_up(self, x: Value) -> tuple[Value, Value]:
        """Two projections of x, or the two halves of one."""
        if any(matrix.name == "gate_up_proj" for matrix in self.arch.matrices):
            return self._halves(self.next_linear(x))
        return self.next_linear(x), self.next_linear(x)

    def _halves(self, both: Value) -> tuple[Value, Value]:
        """Views of one tensor: what keeps one keeps all."""
        half = both.numbers / 2
        gate, up = (
            self.tape.operation(name, [both], half, both.width, share=both.share)
            for name in ("gate", "up")
        )
        gate.held, up.held = both.numbers, 0
        return gate, up

    def activation(self, x: Value) -> Value:
        """SiLU and GELU keep their input; GPT-2's GELU is written out and keeps four tensors."""
        tape = self.tape
        if self.arch.activation != "gelu_new":
            return tape.operation(self.arch.activation, [x], x.numbers, x.width, [x], share=x.share)
        curve = tape.operation("tanh", [x], x.numbers, x.width, [x], scratch=2 * x.bytes)
        tape.keep(curve, [curve])
        half = tape.operation("x / 2", [x], x.numbers, x.width)
        plus = tape.operation("1 + tanh", [curve], x.numbers, x.width, passes_gradient=True)
        return tape.multiply("gelu_new", half, plus)

    def _feed_forward(self, x: Value) -> Value:
        if not self.arch.experts:
            return self.mlp_block(x)
        if any(matrix.stacked for matrix in self.arch.matrices):
            return self.stacked_experts(x)
        return self.moe_block(x)

    def moe_block(self, x: Value) -> Value:
        """Router, and experts in turn: what all of them keep, and the gradients of one of them.

        The busiest expert is taken to get twice an even share, which is the capacity that GShard
        gives one (Lepikhin et al. 2020, arXiv:2006.16668, section 2.2).
        """
        tape, arch, work = self.tape, self.arch, self.work
        tape.group = "experts"
        sent = work.tokens * arch.experts_per_token
        one = min(1.0, 2 / arch.experts)
        logits = self.next_linear(x)
        scores = tape.operation("router", [logits], logits.numbers, FP32)
        if scores.grad:
            tape.keep(scores, [scores])
        chosen = tape.operation("chosen experts", [scores], sent, x.width)
        inputs = tape.operation(
            "tokens of the experts", [x], sent * arch.hidden, x.width, share=one
        )
        gate_matrix, up_matrix, down_matrix = (next(self.matrices) for _ in range(3))
        gate = self.linear(gate_matrix, inputs, inputs.numbers)
        up = self.linear(up_matrix, inputs, inputs.numbers)
        product = tape.multiply("gate x up", self.activation(gate), up)
        out = self.linear(down_matrix, product, product.numbers)
        weighted = tape.multiply("weighted by the router", out, chosen)
        return tape.operation("sum over experts", [weighted], work.tokens * arch.hidden, x.width)

    def stacked_experts(self, x: Value) -> Value:
        """Router, and all experts at once, in products that are grouped by expert.

        As `grouped_mm_experts_forward` of transformers.integrations.moe: no token waits for its
        expert's turn, so that how evenly a router spreads them changes no byte. GPUs before Ampere
        have no such product, and what transformers does there is not counted: it makes a gradient
        of all experts even where they are frozen.
        """
        tape, arch, work = self.tape, self.arch, self.work
        tape.group = "experts"
        router, gate_up, down = (next(self.matrices) for _ in range(3))
        sent = work.tokens * arch.experts_per_token
        logits = self._bare(router, x, x.numbers, self._adapted_copy(router))
        scores = tape.operation("router", [logits], logits.numbers, FP32)
        if scores.grad:
            tape.keep(scores, [scores])
        # Mixtral leaves them in fp32, and so makes fp32 of what the experts' results become.
        width = FP32 if arch.model_type == "mixtral" else logits.width
        chosen = tape.operation("chosen experts", [scores], sent, width)
        places = tape.source("places of tokens and experts", 3 * sent, INT64, grad=False)
        way_back = tape.source("places to put results back", sent, INT64, grad=False)
        factors = [self._factors(matrix) for matrix in (gate_up, down)]
        inputs = tape.operation("tokens of the experts", [x], sent * arch.hidden, x.width, [places])
        with tape.holding(inputs):
            weight = self._adapted_copy(gate_up, factors[0])
            both = self._bare(gate_up, inputs, inputs.numbers, weight)
            with tape.holding(both):
                gate, up = self._halves(both)
                product = tape.multiply("gate x up", self.activation(gate), up)
            weight = self._adapted_copy(down, factors[1])
            out = self._bare(down, product, product.numbers, weight)
            with tape.holding(out):
                width = max(out.width, chosen.width)
                # Backward makes whole tensors of both gradients, and then casts the first.
                scratch = out.numbers * width
                if out.width < width:
                    scratch += scratch - work.as_needed * out.bytes
                weighted = tape.multiply("weighted by the router", out, chosen, scratch=scratch)
                placed = tape.operation(
                    "put back", [weighted], weighted.numbers, weighted.width, [way_back]
                )
        numbers = work.tokens * arch.hidden
        total = tape.operation(
            "sum over experts", [placed], numbers, placed.width, passes_gradient=True
        )
        return tape.cast(total, x.width)

    def _bare(self, matrix: Matrix, x: Value, numbers: float, weight: Value | None) -> Value:
        """A product with a parameter that no linear layer holds.

        Autocast reaches the router's, and not the grouped one, which casts x to its weights.

        Args:
            weight: a copy of the parameter with the update of an adapter in it.
        """
        tape, work = self.tape, self.work
        inside = tape.cast(x, work.norms if matrix.stacked else work.compute)
        trains = self.trained.weights or weight is not None
        return tape.operation(
            matrix.name,
            [inside] if weight is None else [inside, weight],
            numbers / matrix.n_in * matrix.n_out,
            inside.width,
            [inside] * trains + ([] if weight is None else [weight]),
            matrix.weights * work.norms * self.trained.weights,
        )

    def _factors(self, matrix: Matrix) -> Value | None:
        """A and B of a bare parameter's adapter, in the precision of that parameter."""
        work = self.work
        if not self.trained.adapted(matrix):
            return None
        rank = work.rank * len(matrix.targets) * matrix.copies
        numbers = rank * (matrix.n_in + matrix.n_out)
        factors = self.tape.operation(
            f"{matrix.name}: A and B",
            [],
            numbers,
            work.norms,
            weight_gradient=numbers * work.adapter,
        )
        if work.norms == work.adapter:
            factors.held = 0  # they are the adapter itself
        return factors

    def _adapted_copy(self, matrix: Matrix, factors: Value | None = None) -> Value | None:
        """W + BA, all experts of it: PEFT's ParamWrapper makes it anew in each forward pass."""
        factors = factors or self._factors(matrix)
        if factors is None:
            return None
        name = f"{matrix.name}: copy with the adapter's update"
        return self.tape.operation(name, [factors], matrix.weights, self.work.norms, [factors])
