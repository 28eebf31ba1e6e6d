"""The moments of a training step at which memory may peak, each as a list of terms.

A peak is a maximum over moments, not a sum of everything that ever lives:

- `loss`: all checkpoints, or all that the layers keep, and the logits with their copies;
- `layer backward`: one layer, computed again under checkpointing, with the gradients inside it;
- `optimizer step`: weights, all gradients, all states, and what the step works with.
"""

from dataclasses import dataclass
from functools import cached_property

from labkit.memory import loss, sharding
from labkit.memory.architecture import Architecture
from labkit.memory.layers import Trained, Work, decoder_layer, final_norm
from labkit.memory.options import DTYPES, Options, adapted_matrices
from labkit.memory.state import (
    FP32,
    STATE_FORMULAS,
    gradient_bytes,
    head_width,
    norm_width,
    numbers,
    reference_terms,
    state_bytes,
    step_scratch,
    trained_parameters,
    trained_terms,
    trained_width,
    weight_terms,
)
from labkit.memory.tape import Climb, Tape
from labkit.memory.terms import (
    AUTOGRAD,
    DERIVED,
    MEASURED,
    PUBLIC_ROWS,
    UNVERIFIED,
    ZERO_PAPER,
    Term,
    term,
    total,
)

WORKSPACE = 2 * (4096 * 2 + 16 * 8) * 1024
"""Bytes of cuBLAS's workspaces, two of :4096:2:16:8 KiB: one for the thread of the forward pass,
one for autograd's. torch takes 32 MiB each on Hopper."""
COUNTED = (
    "gemma", "gemma2", "gemma3_text", "gpt2", "llama", "mistral", "mixtral", "phi", "phi3",
    "qwen2", "qwen3",
)  # fmt: skip
"""Families whose saved tensors were counted on real models, small ones, in the tests."""
LOSS, LAYER, STEP = "loss", "layer backward", "optimizer step"


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment of a step."""

    phase: str
    what: str
    """Which operation is under way."""
    terms: tuple[Term, ...]

    @property
    def bytes(self) -> int:
        return total(list(self.terms))


class Step:
    """One training step of one architecture under one set of options."""

    def __init__(self, arch: Architecture, options: Options) -> None:
        self.arch, self.options = arch, options
        self.adapted = adapted_matrices(arch, options)
        self.trained = trained_parameters(arch, options)
        self.n_trained = numbers(self.trained)
        self.shares = sharding.shares(options)
        self.work = self._work()
        self.flowing = options.trainable_layers if options.method == "freeze" else arch.layers
        """Decoder layers that a gradient goes through; the rest keep nothing."""

    # ---- widths and tapes

    def _work(self) -> Work:
        options = self.options
        compute = 2 if options.autocast else DTYPES[options.dtype]
        return Work(
            rows=options.rows,
            queries=options.queries,
            keys=options.keys,
            compute=compute,
            weights=DTYPES[options.dtype],
            norms=norm_width(options),
            tables=head_width(options),
            autocast=options.autocast,
            quantized=options.is_4_bit,
            attention=options.attention,
            masked=options.padding or options.method == "prefix",
            rank=options.lora_rank,
            adapter=trained_width(options),
            adapter_dropout=options.lora_dropout,
            mask=1 if options.device == "cuda" else 0,
        )

    @property
    def first_width(self) -> int:
        """Bytes of a number of the residual stream as the embedding gives it."""
        return head_width(self.options)

    @property
    def stream_width(self) -> int:
        """The same after the first layer: an fp32 norm makes fp32 of what follows it.

        Gemma's norm gives back the type that it was given.
        """
        if self.arch.norm == "rms_one_plus":
            return self.first_width
        return max(self.first_width, self.work.norms)

    @property
    def logits_width(self) -> int:
        return self.work.compute if self.options.autocast else head_width(self.options)

    def _tape(self, first: bool) -> Tape:
        options = self.options
        inner = not first or self.embedding_has_gradient
        names = {id(matrix) for matrix in self.adapted}
        return decoder_layer(
            self.arch,
            self.work,
            Trained(not options.is_peft, lambda matrix: id(matrix) in names),
            self.first_width if first else self.stream_width,
            inner,
            options.gradient_checkpointing,
        )

    @property
    def embedding_has_gradient(self) -> bool:
        """Whether one flows to what the first layer reads.

        Under checkpointing transformers asks for it even where the embedding is frozen: a layer
        whose input has none would not be computed again.
        """
        options = self.options
        return options.gradient_checkpointing or options.method in ("full", "prompt", "p-tuning")

    @cached_property
    def first_layer(self) -> Tape:
        return self._tape(first=True)

    @cached_property
    def later_layer(self) -> Tape:
        return self._tape(first=False) if self.flowing > 1 else self.first_layer

    @cached_property
    def last_norm(self) -> Tape:
        return final_norm(
            self.arch, self.work, self.options.method == "full", self.stream_width, True
        )

    def _climb(self, tape: Tape) -> Climb:
        again = self.options.gradient_checkpointing
        output = self.options.tokens * self.arch.hidden * self.stream_width
        climb = tape.backward(output if again else 0)
        return (
            max(climb, self._recomputing(tape), key=lambda one: one.peak_bytes) if again else climb
        )

    def _recomputing(self, tape: Tape) -> Climb:
        """The forward half of a recomputed layer, at its last matrix, if that has an adapter.

        By then the layer has kept all it keeps. On top are the gradient that waits outside, the
        residual and the normed stream, the matrix's input and result, and the adapter's, scaled.
        """
        last, tokens = self.arch.matrices[-1], self.options.tokens
        if all(matrix is not last for matrix in self.adapted) or self.arch.experts:
            return Climb(0, "", {}, 0, 0)
        work = self.work
        inside = work.compute if work.autocast else work.adapter
        local = last.n_in * work.compute + last.n_out * (work.compute + 2 * inside)
        working = tokens * (3 * self.arch.hidden * self.stream_width + local)
        height = tape.kept_bytes() + working
        return Climb(height, f"{last.name}, computed again", tape.kept_by_group(), working, 0)

    # ---- what is there all the time

    @cached_property
    def lasting(self) -> list[Term]:
        """Weights, states and inputs: alive at every moment from the second step on."""
        arch, options = self.arch, self.options
        held = []
        for one in [*weight_terms(arch, options), *trained_terms(arch, options)]:
            split = one.name != "quantization constants"  # FSDP shards the packed weights only
            share = self.shares.weights if split else 1.0
            note = self.shares.note if share != 1 else ""
            held += term(one.name, one.bytes * share, one.formula + note, one.source, one.status)
        for one in reference_terms(arch, options):
            share = self.shares.weights
            held += term(one.name, one.bytes * share, one.formula, one.source, one.status)
        held += self._state_terms()
        held += term(
            "inputs",
            24 * options.rows * options.seq_len,
            "3 x 8 B x tokens: ids, mask and labels",
            PUBLIC_ROWS,
            MEASURED,
        )
        if options.device == "cuda":
            held += term(
                "cuBLAS workspace",
                WORKSPACE,
                "2 x 8,519,680 B; 2 x 32 MiB on Hopper",
                f"torch CUDABlas getChosenWorkspaceSize; {PUBLIC_ROWS}",
                MEASURED,
            )
        if options.accumulation_steps > 1:
            held += self.gradient_terms(1.0, "kept between the passes of one step")
        return held

    def _state_terms(self) -> list[Term]:
        options = self.options
        held, _ = state_bytes(self.trained, options, self._state_width)
        formula, source = STATE_FORMULAS[options.optimizer]
        if options.optimizer == "adamw":
            formula = f"2 x {self._state_width} B x Pt, Pt = {self.n_trained:,}"
        status = MEASURED if options.optimizer == "adamw" else DERIVED
        master = sharding.master_bytes(options, self.n_trained)
        share = self.shares.states
        return [
            *term("optimizer states", held * share, formula + self.shares.note, source, status),
            *term(
                "fp32 copies of trained weights",
                master * share,
                f"4 B x Pt{self.shares.note}",
                ZERO_PAPER,
                DERIVED,
            ),
        ]

    @property
    def _state_width(self) -> int:
        return FP32 if self.options.deepspeed else trained_width(self.options)

    def gradient_terms(self, part: float, note: str) -> list[Term]:
        """Gradients of weights; `part` of all of them, 0 to 1."""
        share = self.shares.gradients
        return term(
            "gradients",
            part * gradient_bytes(self.arch, self.options) * share,
            f"{trained_width(self.options)} B x Pt{self.shares.note if share != 1 else ''}, {note}",
            "autograd's .grad",
            MEASURED,
        )

    def _gradients_so_far(self, part: float, note: str) -> list[Term]:
        if self.options.accumulation_steps > 1:
            return []
        return self.gradient_terms(part, note)

    @cached_property
    def _communication(self) -> list[Term]:
        return sharding.communication_terms(self.arch, self.options, self.n_trained)

    # ---- what the forward pass leaves

    @cached_property
    def tables(self) -> list[Term]:
        arch, options = self.arch, self.options
        found = []
        if arch.rotary:
            found = term(
                "cosines and sines of positions",
                2 * options.queries * arch.head_dim * self.work.tables,
                f"2 x {self.work.tables} B x {options.queries} positions x {arch.head_dim}",
                "shared by all rows and layers",
                MEASURED,
            )
        masked = self.work.masked and options.attention == "sdpa"
        if options.attention == "eager" or masked:
            width = 1 if masked else self.first_width
            found += term(
                "attention mask",
                options.rows * options.queries * options.keys * width,
                f"{width} B x rows x queries x keys",
                "transformers.masking_utils",
            )
        if arch.embedding_dropout and self.embedding_has_gradient:
            mask = self.work.mask or self.first_width
            found += term(
                "dropout mask of the embedding",
                options.tokens * arch.hidden * mask,
                f"{mask} B x tokens x h",
                AUTOGRAD,
            )
        return found

    def checkpoints(self, layers: int | None = None) -> list[Term]:
        """Inputs of the layers that are still to be computed again, frozen ones included."""
        layers = self.arch.layers if layers is None else layers
        width, tokens = self.stream_width, self.options.tokens
        n_bytes = tokens * self.arch.hidden * (width * (layers - 1) + self.first_width)
        return term(
            "checkpoints",
            n_bytes,
            f"{width} B x {layers} layers x {tokens:,} tokens x {self.arch.hidden}"
            + (f", the first one {self.first_width} B" if self.first_width != width else ""),
            f"one input for each layer; {PUBLIC_ROWS}",
            MEASURED,
        )

    def kept_by_layers(self, without_last: bool = False) -> list[Term]:
        """Everything the layers keep for backward, without checkpointing."""
        groups: dict[str, float] = {}
        later = self.flowing - 1 - without_last
        for tape, times in ((self.first_layer, 1), (self.later_layer, later)):
            for group, n_bytes in tape.kept_by_group().items():
                groups[group] = groups.get(group, 0) + n_bytes * times
        return self._kept_terms(groups, f"{1 + later} layers")

    def _kept_terms(self, groups: dict[str, float], of: str) -> list[Term]:
        tokens = self.options.tokens
        found = []
        for group, n_bytes in groups.items():
            each = f"{of}: {n_bytes / tokens:,.0f} B x {tokens:,} tokens"
            found += term(f"kept for backward: {group}", n_bytes, each, AUTOGRAD, self._checked)
        return found

    @property
    def _checked(self) -> str:
        """How sure it is what the layers keep: real models of most families were counted."""
        if self.arch.model_type not in COUNTED:
            return UNVERIFIED
        return DERIVED if self.arch.experts else MEASURED

    @cached_property
    def forward_leaves(self) -> list[Term]:
        """All that waits for backward when the last layer is done."""
        left = self.checkpoints() if self.options.gradient_checkpointing else self.kept_by_layers()
        return [*self.tables, *left, *self._kept_terms(self.last_norm.kept_by_group(), "once")]

    @cached_property
    def cached_casts(self) -> list[Term]:
        """16-bit copies that autocast holds until the forward pass is over."""
        options = self.options
        if not (options.autocast and options.gradient_checkpointing):
            return []  # without checkpointing the same copies are kept for backward anyway
        if trained_width(options) != FP32 or options.is_soft_prompt:
            return []
        # The head's copy is kept for backward, and counted there.
        matrices = [p for p in self.trained if p.matrix and not p.embedding]
        cast = sum(p.numbers for p in matrices if p.name != "output head")
        return term(
            "autocast's copies of trained weights",
            2 * cast,
            f"2 B x {cast:,} trained numbers of matrices",
            f"torch.autocast's cache; {PUBLIC_ROWS}",
            MEASURED,
        )

    # ---- the moments

    def moments(self) -> list[Moment]:
        """Every moment that can be the peak."""
        return [
            self._loss_forward(),
            self._loss_backward(),
            self._head_backward(),
            self._last_layer(),
            self._first_layer(),
            *self._embedding(),
            self._optimizer(),
        ]

    def _moment(self, phase: str, what: str, *parts: list[Term]) -> Moment:
        terms = [*self.lasting]
        for part in parts:
            terms += part
        return Moment(phase, what, tuple(terms))

    def _gathered(self, in_layer: bool) -> list[Term]:
        return sharding.gathered_terms(self.arch, self.options, in_layer)

    def _loss_forward(self) -> Moment:
        hidden = self.options.tokens * self.arch.hidden * self.stream_width
        return self._moment(
            LOSS,
            "the loss is computed from the logits",
            self.forward_leaves,
            self.cached_casts,
            term(
                "last hidden state",
                0 if self.options.method == "full" and not self.options.autocast else hidden,
                "T x h: held by the model's result",
                f"transformers' modeling files; {PUBLIC_ROWS}",
                MEASURED,
            ),
            loss.loss_terms(self.arch, self.options, self.logits_width, backward=False),
            self._gathered(in_layer=False),
        )

    def _loss_backward(self) -> Moment:
        return self._moment(
            LOSS,
            "the gradient of the logits is made",
            self.forward_leaves,
            loss.loss_terms(self.arch, self.options, self.logits_width, backward=True),
            self._gathered(in_layer=False),
            self._communication,
        )

    def _head_backward(self) -> Moment:
        arch, options = self.arch, self.options
        tokens, width = options.tokens, self.logits_width
        trained = arch.vocabulary * arch.hidden * trained_width(options)
        made = trained if options.method == "full" else 0
        logits = 0 if options.loss_path == "fused" else width * tokens * arch.vocabulary
        return self._moment(
            LOSS,
            "backward through the output head",
            self.forward_leaves,
            term("gradient of the logits", logits, f"{width} B x T x V", AUTOGRAD),
            term(
                "gradient of the output head",
                made * (1.5 if options.autocast and trained_width(options) == FP32 else 1),
                f"{trained_width(options)} B x V x h, and its 16-bit form under autocast",
                AUTOGRAD,
            ),
            term(
                "gradient of the last hidden state",
                tokens * arch.hidden * self.stream_width,
                "T x h",
                AUTOGRAD,
            ),
            self._gathered(in_layer=False),
            self._communication,
        )

    @cached_property
    def _parts(self) -> tuple[float, float]:
        """(of the output end, of one layer): shares of all gradients."""
        if self.options.method != "full":
            return 0, 0 if self.options.is_soft_prompt else 1 / self.flowing
        top = self.arch.norm_parameters + self.arch.vocabulary * self.arch.hidden
        return top / self.n_trained, self.arch.layer_parameters / self.n_trained

    def _layer_terms(self, climb: Climb) -> list[Term]:
        weights = "gradients of this layer's weights"
        return [
            *self._kept_terms(climb.kept, "this layer"),
            *term(
                "gradients inside the layer",
                climb.gradients_bytes,
                f"at {climb.operation!r}, the layer's own result included",
                AUTOGRAD,
                self._checked,
            ),
            *term(weights, climb.weight_gradients_bytes, "as they are made", AUTOGRAD),
        ]

    def _last_layer(self) -> Moment:
        """Backward enters the layers: most checkpoints, fewest gradients."""
        climb = self._climb(self.later_layer)
        checkpointing = self.options.gradient_checkpointing
        left = self.checkpoints() if checkpointing else self.kept_by_layers(without_last=True)
        if self.flowing == 1 and not checkpointing:
            left = []
        return self._moment(
            LAYER,
            f"the last layer, at {climb.operation!r}",
            self.tables,
            left,
            self._layer_terms(climb),
            self._gradients_so_far(self._parts[0], "of the output end so far"),
            self._gathered(in_layer=True),
            self._communication,
        )

    def _first_layer(self) -> Moment:
        """Backward leaves the layers: fewest checkpoints, most gradients."""
        climb = self._climb(self.first_layer)
        retained = sharding.retained_by_fsdp(self.arch, self.options)
        top, each = self._parts
        left = []
        if self.options.gradient_checkpointing:
            below = self.arch.layers - self.flowing + 1
            left = self.checkpoints(None if retained else below)
        return self._moment(
            LAYER,
            f"the first layer, at {climb.operation!r}",
            self.tables,
            left,
            term(
                "gradients between layers that FSDP keeps",
                retained,
                "2 B x (L - 2) x T x h: inputs of frozen units and their .grad",
                sharding.FSDP_HOOK,
                MEASURED,
            ),
            self._layer_terms(climb),
            self._gradients_so_far(
                top + each * (self.flowing - 1), "of all layers but the first so far"
            ),
            self._gathered(in_layer=True),
            self._communication,
        )

    def _embedding(self) -> list[Moment]:
        """The embedding's gradient is dense; where it is the head's too, both live at once."""
        if self.options.method != "full":
            return []
        arch = self.arch
        second = arch.vocabulary * arch.hidden * trained_width(self.options) * arch.tied
        moment = self._moment(
            LAYER,
            "backward through the embedding",
            self._gradients_so_far(1.0, "all"),
            term("second gradient of the tied embedding", second, "w B x V x h", AUTOGRAD),
            term(
                "gradient of the first layer's input",
                self.options.tokens * arch.hidden * self.first_width,
                "T x h",
                AUTOGRAD,
            ),
            self._gathered(in_layer=False),
            self._communication,
        )
        return [moment]

    def _optimizer(self) -> Moment:
        options = self.options
        scratch, formula, source = step_scratch(self.trained, options, self._state_width)
        held = self.shares.states
        if options.deepspeed and trained_width(options) < FP32:
            # DeepSpeed steps on a flat fp32 part, for which it makes fp32 gradients.
            scratch, formula = FP32 * self.n_trained, "4 B x Pt / N: gradients in fp32"
            source = "DeepSpeed's stage 1 to 3 optimizers"
        status = UNVERIFIED if options.deepspeed else DERIVED
        if options.optimizer == "adamw" and not options.deepspeed:
            status = MEASURED
        return self._moment(
            STEP,
            f"{options.optimizer} updates the weights",
            self._gradients_so_far(1.0, "all"),
            term("optimizer's working memory", scratch * held, formula, source, status),
            self._communication if not options.deepspeed else [],
        )

    # ---- for checks

    def saved_bytes(self) -> int:
        """Bytes that autograd holds when the loss is known: what a real step can be asked for."""
        ids = 8 * self.options.rows * self.options.seq_len * (self.options.method == "full")
        # A layer that is computed again gets the tables of positions as arguments.
        outside = ("cosines and sines of positions", "attention mask")
        if not self.options.gradient_checkpointing:
            outside = outside[1:]
        apart = [one for one in self.tables if one.name in outside]
        left = total(self.forward_leaves) - total(apart)
        return left + loss.kept_bytes(self.arch, self.options, self.logits_width) + ids
