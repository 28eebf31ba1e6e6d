"""What is trained and how: every choice that moves memory, checked once, with its default."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from labkit.memory.architecture import EXPERTS, LARGEST, ROUTER, Architecture, Matrix, shown
from labkit.memory.gpus import BEFORE_HOPPER

METHODS = ("full", "freeze", "lora", "qlora", "prompt", "p-tuning", "prefix")
OBJECTIVES = ("sft", "dpo")
DTYPES = {"fp32": 4, "fp16": 2, "bf16": 2}
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw-8bit", "sgd", "adafactor")
ATTENTION = ("eager", "sdpa", "flash_attention_2")
LOSS_PATHS = ("shifted", "upcast", "padded", "fused")
SHARDING = ("none", "fsdp")
OFFLOAD = ("none", "cpu", "nvme")
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True, kw_only=True)
class Options:
    """One way to train. Values that cannot be meant raise ValueError."""

    method: str = "full"
    objective: str = "sft"
    lora_rank: int = 16
    target_modules: str | Sequence[str] = "all-linear"
    lora_dropout: float = 0.05
    """Any rate above 0 costs a mask and a copy of each adapter's input; the QLoRA paper trains with
    0.05 and 0.1, PEFT's own default is 0. Where stacked experts or a router are adapted it is 0:
    PEFT refuses any other rate there."""
    num_virtual_tokens: int = 20
    encoder_hidden_size: int | None = None
    """Width of P-tuning's encoder; None is the model's own."""
    trainable_layers: int = 2
    """Decoder layers that `freeze` trains, counted from the top."""
    batch_size: int = 1
    """Rows on one device in one forward pass; a DPO row is a pair and counts twice."""
    seq_len: int = 1024
    accumulation_steps: int = 1
    dtype: str = "bf16"
    autocast: bool = False
    optimizer: str = "adamw"
    foreach: bool = True
    fused: bool = False
    attention: str = "sdpa"
    padding: bool = False
    """Whether rows are padded to one length: sdpa then gets a mask, and repeats shared keys."""
    gradient_checkpointing: bool = True
    reentrant: bool = True
    """Whether a recomputed layer is run to its end before its backward pass begins, as with
    transformers up to 4; False runs it when backward first needs a tensor of it, and as far as
    backward needs it, as transformers 5 does."""
    loss_path: str = "shifted"
    """How the loss is computed from the logits; see `labkit.memory.loss`."""
    double_quant: bool = True
    kbit_prepared: bool = True
    """Whether norms went to fp32 before QLoRA, as `prepare_model_for_kbit_training` does it."""
    experts: str = EXPERTS[0]
    """How a mixture of experts lays them out: `stacked` in two parameters, as transformers 5, or
    `separate`, each in linear layers of its own, as transformers 4. No other model has any."""
    tables_per_layer: bool = False
    """Whether each layer keeps cosines and sines of all positions that the model was made for, as
    those of transformers of early 2024 did; today all layers share those of a row."""
    precompute_reference: bool = False
    """Whether DPO's reference log-probabilities were computed before training."""
    num_devices: int = 1
    zero_stage: int | None = None
    """DeepSpeed's; 0 is DeepSpeed on several devices that divides nothing, None is no DeepSpeed."""
    sharding: str = "none"
    offload: str = "none"
    device: str = "cuda"
    cublas_workspace: int = BEFORE_HOPPER
    """Bytes that cuBLAS keeps to work in for each thread that multiplies: 33,554,432 from Hopper
    on; see `labkit.memory.gpus`."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices or isinstance(value, bool | float):  # True is no 1
                raise ValueError(
                    f"{name}={shown(value)} is unknown: use {', '.join(map(str, choices))}"
                )
        for name in _COUNTS:
            value = getattr(self, name)
            if value is None and name == "encoder_hidden_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={shown(value)}: give a whole number from 1")
            if value > LARGEST:
                raise ValueError(f"{name}={shown(value)}: give at most {LARGEST:,}")
        for name in _SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name}={shown(value)}: give True or False")
        rate = self.lora_dropout
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise ValueError(f"lora_dropout={shown(rate)}: give a share from 0 to below 1")
        wanted = self.target_modules
        if not isinstance(wanted, Collection) or not all(isinstance(one, str) for one in wanted):
            raise ValueError(
                f"target_modules={shown(wanted)}: give 'all-linear', or names such as "
                "['q_proj', 'v_proj']"
            )
        if self.deepspeed and self.sharding == "fsdp":
            raise ValueError(
                f"zero_stage={self.zero_stage} with sharding='fsdp': DeepSpeed and FSDP shard the "
                "same state; give one of them"
            )
        if self.offload != "none" and not self.zero_stage and self.sharding == "none":
            raise ValueError(
                f"offload={self.offload!r} without sharding: offloading is done by DeepSpeed "
                "(zero_stage=1, 2 or 3) or by sharding='fsdp'"
            )
        if self.offload == "nvme" and self.zero_stage != 3:
            raise ValueError("offload='nvme' is done by ZeRO-Infinity only: give zero_stage=3")
        if self.method == "qlora" and self.zero_stage == 3:
            raise ValueError(
                "method='qlora' with zero_stage=3: DeepSpeed cannot shard bitsandbytes' packed "
                "weights without a special storage type; use sharding='fsdp' or zero_stage=2"
            )
        if (
            self.method == "qlora"
            and self.autocast
            and self.dtype == "fp16"
            and self.device == "cpu"
        ):
            raise ValueError("dtype='fp16' with autocast on a CPU: use bf16")

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed runs the step: 16-bit weights, and an fp32 copy in its optimizer."""
        return bool(self.zero_stage) or (self.zero_stage == 0 and self.num_devices > 1)

    @property
    def is_peft(self) -> bool:
        """Whether the base model is frozen and something small beside it is trained."""
        return self.method not in ("full", "freeze")

    @property
    def is_soft_prompt(self) -> bool:
        return self.method in ("prompt", "p-tuning", "prefix")

    @property
    def is_4_bit(self) -> bool:
        return self.method == "qlora"

    @property
    def has_adapters(self) -> bool:
        return self.method in ("lora", "qlora")

    @property
    def masks_all_layers(self) -> bool:
        """Whether there is more to hide than what comes later, whatever the layer."""
        return self.padding or self.method == "prefix"

    @property
    def rows(self) -> int:
        """Rows of one forward pass: DPO runs the chosen and the rejected answers together."""
        return self.batch_size * (2 if self.objective == "dpo" else 1)

    @property
    def queries(self) -> int:
        """Tokens of a row, a soft prompt's included."""
        return self.seq_len + self.num_virtual_tokens * (self.method in ("prompt", "p-tuning"))

    @property
    def keys(self) -> int:
        return self.queries + self.num_virtual_tokens * (self.method == "prefix")

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass on one device."""
        return self.rows * self.queries


_CHOICES: dict[str, Sequence] = {
    "method": METHODS,
    "objective": OBJECTIVES,
    "dtype": tuple(DTYPES),
    "optimizer": OPTIMIZERS,
    "attention": ATTENTION,
    "loss_path": LOSS_PATHS,
    "experts": EXPERTS,
    "zero_stage": (None, 0, 1, 2, 3),
    "sharding": SHARDING,
    "offload": OFFLOAD,
    "device": DEVICES,
}
_COUNTS = (
    "lora_rank", "num_virtual_tokens", "trainable_layers", "batch_size", "seq_len",
    "accumulation_steps", "num_devices", "encoder_hidden_size", "cublas_workspace",
)  # fmt: skip
_SWITCHES = (
    "autocast", "foreach", "fused", "padding", "gradient_checkpointing", "reentrant",
    "double_quant", "kbit_prepared", "precompute_reference", "tables_per_layer",
)  # fmt: skip


def window_ends_in_row(arch: Architecture, options: Options) -> bool:
    """Whether local attention sees less than a whole row in some layer."""
    return bool(arch.window and arch.window <= options.keys and arch.local_layers())


def needs_mask(arch: Architecture, options: Options) -> bool:
    """Whether sdpa gets a mask, and so a kernel that wants keys and values for each head.

    Rows are padded, a prefix comes before them, or a window ends inside them: everything else that
    is causal needs none (transformers.masking_utils).
    """
    return options.masks_all_layers or window_ends_in_row(arch, options)


def adapted_matrices(arch: Architecture, options: Options) -> tuple[Matrix, ...]:
    """The matrices of a decoder layer that LoRA adapts; none where the method is another one.

    Raises:
        ValueError: a name that no layer has, part of what lies in one parameter, or a rank above a
            matrix's smaller side.
    """
    if not options.has_adapters:
        return ()
    wanted = options.target_modules
    names = [name for matrix in arch.matrices for name in matrix.targets]
    if wanted == "all-linear":  # routers and experts included, with transformers 4 and 5 alike
        chosen = arch.matrices
    else:
        listed = wanted.split(",") if isinstance(wanted, str) else list(wanted)
        listed = [name.strip() for name in listed if name.strip()]
        unknown = [name for name in listed if name not in names]
        if unknown or not listed:
            raise ValueError(
                f"target_modules holds {(unknown or [''])[0]!r}, which no layer of "
                f"{arch.model_type} is called: it has {', '.join(dict.fromkeys(names))}"
            )
        chosen = tuple(m for m in arch.matrices if set(m.targets) & set(listed))
        for matrix in chosen:
            missing = [name for name in matrix.targets if name not in listed]
            if missing:
                raise ValueError(
                    f"target_modules lacks {missing[0]!r}: stacked experts have it in one "
                    f"parameter, {matrix.name}, with what is listed: name both, or neither"
                )
    for matrix in chosen:
        smaller = min(matrix.n_in, matrix.n_out // len(matrix.targets))
        # A router has few rows, and all-linear reaches it whatever the rank.
        if options.lora_rank > smaller and matrix.name != ROUTER:
            raise ValueError(
                f"lora_rank={options.lora_rank} is more than {matrix.name} can have, which is "
                f"{matrix.n_in} by {matrix.n_out}: give at most {smaller}"
            )
    return chosen


def adapter_rank(matrix: Matrix, options: Options) -> int:
    """Rank of the adapter of one copy of a matrix.

    Where two linear layers lie in one parameter, PEFT puts their two adapters side by side
    (peft.utils.transformers_weight_conversion).
    """
    return options.lora_rank * len(matrix.targets)


def check_fit(arch: Architecture, options: Options) -> None:
    """Raise ValueError where the options ask for what this architecture or a kernel cannot do."""
    if options.attention == "flash_attention_2":
        fp32 = options.dtype == "fp32" and not options.autocast
        if fp32 or options.device == "cpu":
            why = "dtype='fp32' without autocast" if fp32 else "device='cpu'"
            raise ValueError(
                f"attention='flash_attention_2' with {why}: the kernel computes in 16 bits on a "
                "GPU: use 'sdpa'"
            )
    if options.method == "freeze" and options.trainable_layers > arch.layers:
        raise ValueError(
            f"trainable_layers={options.trainable_layers}: the model has {arch.layers} layers"
        )
    if arch.positions is not None and options.keys > arch.positions:
        extra = " with the virtual tokens" if options.keys > options.seq_len else ""
        raise ValueError(
            f"seq_len={options.seq_len}{extra} is more than the {arch.positions} positions that "
            "this model has learned: give a shorter one"
        )


def check_one_step(arch: Architecture, options: Options) -> None:
    """Raise ValueError for options that no step on one device can follow, whichever it is."""
    if options.tables_per_layer:
        raise ValueError(
            "tables_per_layer=True: the installed transformers shares them, and no other step can "
            "be run: leave it out, or ask `estimate`, which counts both"
        )
    if arch.experts and options.experts == "separate":
        raise ValueError(
            "experts='separate': the installed transformers stacks them, and no other step can be "
            "run: leave it out, or ask `estimate`, which counts both"
        )
    require_one_device(
        options,
        "a step is measured on one device: leave it out, or ask `labkit estimate`, which answers "
        "for several",
    )
    if options.method == "prefix" and options.gradient_checkpointing:
        raise ValueError(
            "method='prefix' with gradient_checkpointing: a layer that is computed again drops the "
            "prefix, and this training fails: give gradient_checkpointing=False"
        )


def check_traceable(arch: Architecture, options: Options) -> None:
    """Raise ValueError for options that no step on fake tensors can follow."""
    check_one_step(arch, options)
    if options.optimizer.endswith("8bit"):
        raise ValueError(
            f"optimizer={options.optimizer!r}: the kernels of bitsandbytes' optimizers read "
            "numbers, which fake tensors have none of: ask `estimate`, or trace 'adamw'"
        )
    if options.attention == "flash_attention_2":
        raise ValueError(
            "attention='flash_attention_2': the package flash-attn needs a GPU: trace 'sdpa', "
            "which runs the same kernel where there is no mask"
        )


def require_one_device(options: Options, reason: str) -> None:
    """Raise ValueError where the options are of several devices, or of a host beside one.

    Args:
        reason: why they cannot be, and what to do; it ends the message.
    """
    several = {
        "num_devices": options.num_devices > 1,
        "zero_stage": options.zero_stage is not None,
        "sharding": options.sharding != "none",
        "offload": options.offload != "none",
    }
    for name, asked in several.items():
        if asked:
            raise ValueError(f"{name}={getattr(options, name)!r}: {reason}")
