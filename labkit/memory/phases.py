"""The moments of a training step at which memory may peak, each as a list of terms.

A peak is a maximum over moments, not a sum of everything that ever lives:

- `loss`: all checkpoints, or all that the layers keep, and the logits with their copies;
- `layer backward`: one layer, computed again under checkpointing, with the gradients inside it;
- `optimizer step`: weights, all gradients, all states, and what the step works with.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from labkit.memory import loss, sharding
from labkit.memory.architecture import Architecture
from labkit.memory.layers import Trained, Work, decoder_layer, final_norm
from labkit.memory.options import DTYPES, Options, adapted_matrices, needs_mask
from labkit.memory.state import (
    FP32,
    STATE_FORMULAS,
    buffer_terms,
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

MULTIPLYING_THREADS = 2
"""That of the forward pass and autograd's: each has a workspace of cuBLAS."""
COUNTED = (
    "gemma", "gemma2", "gemma3_text", "gpt2", "llama", "mistral", "mixtral", "phi", "phi3",
    "qwen2", "qwen3", "qwen3_moe",
)  # fmt: skip
"""Families whose saved tensors were counted on real models, small ones, in the tests."""
EMBEDDED = "embedded words"
TRL_DPO = "trl.trainer.dpo_trainer.DPOTrainer._compute_loss"
SUMMED = "the two gradients of the tied embedding are summed"
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
        """Of a layer with a window, where some have one."""
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
            masked=needs_mask(self.arch, options),
            rank=options.lora_rank,
            adapter=trained_width(options),
            adapter_dropout=options.lora_dropout,
            as_needed=options.gradient_checkpointing and not options.reentrant,
            on_gpu=options.device == "cuda",
        )

    @property
    def first_width(self) -> int:
        """Bytes of a number of the residual stream as the embedding gives it.

        A learned table of positions is added, which is as wide as the norms.
        """
        table = self.work.norms if self.arch.positions else 0
        return max(head_width(self.options), table)

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

    def _tape(self, first: bool, local: bool = True) -> Tape:
        """One decoder layer.

        Args:
            first: it is the lowest that a gradient goes through.
            local: its attention has the window, where some layers have one.
        """
        options = self.options
        inner = not first or self.embedding_has_gradient
        names = {id(matrix) for matrix in self.adapted}
        masked = self.work.masked if local else options.masks_all_layers
        return decoder_layer(
            self.arch,
            replace(self.work, masked=masked),
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

    @property
    def lowest(self) -> int:
        """Place of the first layer that a gradient goes through."""
        return self.arch.layers - self.flowing

    @cached_property
    def first_layer(self) -> Tape:
        return self._tape(True, local=self.arch.local_layers(self.lowest, self.lowest + 1) > 0)

    @cached_property
    def local_layer(self) -> Tape:
        """A later layer with a window."""
        return self._tape(False)

    @cached_property
    def unlimited_layer(self) -> Tape:
        """A later layer without one."""
        return self._tape(False, local=False)

    @cached_property
    def later_layer(self) -> Tape:
        """The costliest of the layers above the first one: it may be the last."""
        if self.flowing == 1:
            return self.first_layer
        some = self.arch.local_layers(self.lowest + 1) > 0
        return self.local_layer if some else self.unlimited_layer

    @property
    def accumulates(self) -> bool:
        """Whether a gradient is added to an earlier pass's as soon as it is made, and goes.

        FSDP reduces a whole unit's first, which live until then.
        """
        return self.options.accumulation_steps > 1 and self.options.sharding != "fsdp"

    @cached_property
    def last_norm(self) -> Tape:
        return final_norm(
            self.arch, self.work, self.options.method == "full", self.stream_width, True
        )

    def _climb(self, tape: Tape) -> Climb:
        """The highest moment of one layer: its backward pass, and what computes it again before.

        A reentrant checkpoint makes the layer's result anew, and holds it until backward is
        through; the other kind begins when backward first needs a tensor of the layer, and ends
        with the last one that it needs.
        """
        options, accumulates = self.options, self.accumulates
        if not options.gradient_checkpointing:
            return tape.backward(accumulates=accumulates)
        stream = options.tokens * self.arch.hidden * self.stream_width
        if options.reentrant:
            passes = tape.forward(stream), tape.backward(stream, accumulates)
        else:
            waiting = tape.gradients_before_need()
            passes = (
                tape.forward(waiting, needed_only=True),
                tape.backward(accumulates=accumulates),
            )
        return max(passes, key=lambda climb: climb.peak_bytes)

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
        held += buffer_terms(arch, options)
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
                MULTIPLYING_THREADS * options.cublas_workspace,
                f"2 x {options.cublas_workspace:,} B",
                f"torch CUDABlas parseChosenWorkspaceSize; {PUBLIC_ROWS}",
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

    @property
    def sums_in_place(self) -> bool:
        """Whether the sum of a tied matrix's two gradients takes the room of the first.

        What autocast casts back to fp32 belongs to nobody else, and torch adds to it. Where a mode
        watches, as in the trace and on a CPU here, it makes a new one (can_accumulate_inplace).
        """
        options = self.options
        cast = options.autocast and trained_width(options) == FP32
        return cast and options.device == "cuda"

    @property
    def end_gradient_bytes(self) -> int:
        """Of the gradient of the embedding, or of the output head."""
        return trained_width(self.options) * self.arch.vocabulary * self.arch.hidden

    def _tied_head_waits(self) -> list[Term]:
        """A tied matrix gets a gradient from the head and one from the embedding.

        Their sum is added to what earlier passes left when both are known: until then the head's
        waits beside it. In the first pass it is counted as the gradient itself.
        """
        options = self.options
        if not (self.accumulates and options.method == "full" and self.arch.tied):
            return []
        return term(
            "gradient of the tied head, until the embedding's comes",
            self.end_gradient_bytes,
            f"{trained_width(options)} B x V x h",
            AUTOGRAD,
        )

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
        # A layer that is computed again gets the mask anew; else nothing holds it after forward.
        if options.gradient_checkpointing and (options.attention == "eager" or masked):
            width = 1 if masked else self.first_width
            two_kinds = 0 < arch.local_layers() < arch.layers
            every_kind = options.attention == "eager" or options.masks_all_layers
            masks = 2 if two_kinds and every_kind else 1
            found += term(
                "attention mask",
                masks * options.rows * options.queries * options.keys * width,
                ("2 x " if masks == 2 else "") + f"{width} B x rows x queries x keys",
                "transformers.masking_utils",
            )
        if options.method == "p-tuning":
            found += self._encoder_terms()
        # Where something is done to it before the first layer, it is no checkpoint itself.
        apart = options.method in ("prompt", "p-tuning") or arch.positions is not None
        if apart and options.gradient_checkpointing and options.method != "full":
            words = options.rows * options.seq_len * arch.hidden
            width = head_width(options)
            found += term(
                EMBEDDED,
                words * width,
                f"{width} B x rows x words x h: a leaf that asks for its gradient",
                "transformers' enable_input_require_grads",
            )
        if arch.embedding_dropout and self.embedding_has_gradient:
            mask = 1 if self.work.on_gpu else self.first_width
            found += term(
                "dropout mask of the embedding",
                options.tokens * arch.hidden * mask,
                f"{mask} B x tokens x h",
                AUTOGRAD,
            )
        return found

    def _encoder_terms(self) -> list[Term]:
        """What P-tuning's encoder keeps: the input of each of its layers."""
        options, hidden = self.options, self.arch.hidden
        width = options.encoder_hidden_size or hidden
        each = hidden + 2 * width
        return term(
            "kept for backward: prompt encoder",
            options.num_virtual_tokens * FP32 * each,
            f"4 B x {each:,} x {options.num_virtual_tokens} virtual tokens",
            "peft.tuners.p_tuning.PromptEncoder",
        )

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
        local = self.arch.local_layers(self.lowest + 1, self.lowest + 1 + later)
        tapes = [(self.first_layer, 1)]
        tapes += [(self.local_layer, local)] * (local > 0)
        tapes += [(self.unlimited_layer, later - local)] * (later > local)
        for tape, times in tapes:
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
        by_turns = self.arch.experts and self.options.experts == "separate"
        return DERIVED if by_turns else MEASURED

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
        if options.sharding == "fsdp":
            return []  # it casts a unit's weights as it gathers them, and drops them after use
        if trained_width(options) != FP32 or options.is_soft_prompt:
            return []
        # The head's copy is kept for backward, and counted there.
        matrices = [p for p in self.trained if p.matrix and not p.embedding]
        cast = sum(p.numbers for p in matrices if p.name != "output head" and p.autocast)
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
            *self._reference(),
            self._loss_backward(),
            self._head_backward(),
            self._last_layer(),
            self._first_layer(),
            *self._frozen_layer(),
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
            self._held_by_peft(),
            self._loss_terms(backward=False),
            self._gathered(in_layer=False),
        )

    def _loss_terms(self, backward: bool) -> list[Term]:
        arch, options = self.arch, self.options
        if options.loss_path != "fused":
            return loss.loss_terms(arch, options, self.logits_width, backward)
        compute = self.work.compute if options.autocast else self.stream_width
        width = head_width(options)
        return loss.fused_terms(arch, options, self.stream_width, compute, width, backward)

    def _reference(self) -> list[Moment]:
        """DPO asks the reference while everything waits that the policy's loss has kept."""
        options = self.options
        if options.objective != "dpo" or options.precompute_reference:
            return []
        kept = loss.kept_bytes(self.arch, options, self.logits_width, self.stream_width)
        waiting = [
            *self.forward_leaves,
            *self.cached_casts,
            *term("kept by the policy's loss", kept, "its log-softmax, or hidden states", TRL_DPO),
        ]
        gathered = self._gathered(in_layer=True), self._gathered(in_layer=False)
        return [
            self._moment(LOSS, f"the reference's {what}, after the policy's", waiting, *parts)
            for what, *parts in (
                ("layers", self._layer_without_gradients(), gathered[0]),
                ("loss", self._loss_terms(backward=False), gathered[1]),
            )
        ]

    def _layer_without_gradients(self) -> list[Term]:
        """Embedded words, the layer's input, the residual and the normed stream; and the MLP's."""
        arch, options = self.arch, self.options
        streams, inside = 4 * arch.hidden * self.stream_width, (3 if arch.gated else 2) * arch.mlp
        inside *= self.work.compute * max(1, arch.experts_per_token)
        largest = max(matrix.tensor for matrix in arch.matrices if not matrix.bare)
        unpacked = largest * self.work.compute if options.is_4_bit else 0
        return term(
            "one layer of the reference",
            options.tokens * (streams + inside) + unpacked,
            f"{streams + inside:,} B x tokens" + (", and a matrix unpacked" if unpacked else ""),
            "transformers' modeling files, without gradients",
        )

    def _held_by_peft(self) -> list[Term]:
        """What PEFT's own forward pass holds until the model's is through, loss included."""
        arch, options = self.arch, self.options
        if options.method == "prefix" and arch.heads != arch.kv_heads:
            # Attention keeps repeated keys and values; unrepeated, it keeps the cache itself.
            cached = 2 * arch.layers * options.rows * options.keys * arch.kv_width
            return term(
                "cache of keys and values",
                cached * self.work.compute,
                "2 x L x rows x keys x n_kv x d: the prefix is handed over in a cache",
                "peft.PeftModel.get_prompt; transformers DynamicCache",
            )
        if options.method in ("prompt", "p-tuning") and not options.gradient_checkpointing:
            return term(
                "virtual tokens and words, embedded",
                options.tokens * arch.hidden * self.first_width,
                "T x h: the argument of the model; under checkpointing the first checkpoint",
                "peft.PeftModelForCausalLM.forward",
            )
        return []

    def _loss_backward(self) -> Moment:
        return self._moment(
            LOSS,
            "the gradient of the logits is made",
            self.forward_leaves,
            self._loss_terms(backward=True),
            self._gathered(in_layer=False),
            self._communication,
        )

    def _head_backward(self) -> Moment:
        arch, options = self.arch, self.options
        tokens, width = options.tokens, self.logits_width
        made = self.end_gradient_bytes if options.method == "full" else 0
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
        if sharding.root_gradients_wait(self.options):
            top = 0
        return top / self.n_trained, self.arch.layer_parameters / self.n_trained

    def _waiting_in_root(self, embedding: bool) -> list[Term]:
        return sharding.root_gradient_terms(self.arch, self.options, embedding)

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
            self._tied_head_waits(),
            self._waiting_in_root(embedding=False),
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
            self._tied_head_waits(),
            self._waiting_in_root(embedding=False),
            self._gathered(in_layer=True),
            self._communication,
        )

    def _frozen_layer(self) -> list[Moment]:
        """Checkpointing computes frozen layers again, too: a gradient flows to the embedding."""
        arch, options = self.arch, self.options
        if not (options.gradient_checkpointing and self.flowing < arch.layers):
            return []
        tape = decoder_layer(
            arch, self.work, Trained(False), self.first_width, input_grad=True, recomputed=True
        )
        climb = self._climb(tape)
        moment = self._moment(
            LAYER,
            f"the first layer, at {climb.operation!r}",
            self.tables,
            self.checkpoints(1),
            self._layer_terms(climb),
            self._gradients_so_far(1.0, "all"),
            self._gathered(in_layer=True),
            self._communication,
        )
        return [moment]

    def _embedding(self) -> list[Moment]:
        """The embedding's gradient is dense. Where it is the head's too, their sum is a third."""
        arch, options = self.arch, self.options
        if options.method != "full":
            return []
        again = self.end_gradient_bytes * arch.tied
        reaching = term(
            "gradient of the first layer's input",
            options.tokens * arch.hidden * self.first_width,
            "T x h",
            AUTOGRAD,
        )
        second = term("second gradient of the tied embedding", again, "w B x V x h", AUTOGRAD)
        if self.accumulates and not arch.tied:
            second = term(
                "gradient of the embedding", self.end_gradient_bytes, "w B x V x h", AUTOGRAD
            )
        sums = 1 if self.sums_in_place else 2
        both = term("second gradient and the sum", sums * again, f"{sums} x w B x V x h", AUTOGRAD)
        waiting = self._waiting_in_root(embedding=True)
        layers = self._parts[1] * arch.layers
        return [
            self._moment(
                LAYER,
                what,
                self._gradients_so_far(*((layers, "of all layers") if waiting else (1.0, "all"))),
                self._tied_head_waits(),
                waiting,
                parts,
                self._gathered(in_layer=False),
                self._communication,
            )
            for what, parts in (
                ("backward through the embedding", second + reaching),
                (SUMMED, both),
                ("FSDP's root unit copies its gradients to divide them", sharding.copied(waiting)),
            )
            if parts
        ]

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
        outside = ("attention mask", EMBEDDED, "cosines and sines of positions")
        if not self.options.gradient_checkpointing:
            outside = outside[:-1]
        apart = [one for one in self.tables if one.name in outside]
        left = total(self.forward_leaves) - total(apart)
        kept = loss.kept_bytes(self.arch, self.options, self.logits_width, self.stream_width)
        return left + kept + ids
