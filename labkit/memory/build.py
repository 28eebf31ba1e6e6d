"""The real model, adapter, optimizer and loss that a set of options names, from real libraries.

Memory does not depend on the values of weights, so a `config.json` is enough: the model is built
without weights, and random ones are made where they are needed, quantized one matrix at a time.
"""

import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from labkit import paths
from labkit.errors import LabkitError
from labkit.memory.architecture import Architecture, read
from labkit.memory.closed_form import load_config
from labkit.memory.options import Options, check_one_step
from labkit.quiet import drop_peft_notice, without_progress_bars

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
IGNORED = -100
BETA = 0.1
"""Of DPO's loss; no byte depends on it."""


# ---- the model ---------------------------------------------------------------------------------


def build_model(
    config: Mapping[str, Any] | str | Path, options: Options, device: str | torch.device
) -> nn.Module:
    """The model of a configuration, made ready to be trained as the options say.

    Args:
        config: as for `estimate`; a folder with weights is loaded, anything else gets random ones.

    Raises:
        ValueError: transformers knows no such model, or the options ask for what cannot be trained.
        LabkitError: an attention kernel or a library that is not installed.
    """
    arch = read(load_config(config), options.experts)
    check_trainable(arch, options, torch.device(device).type)
    folder = None if isinstance(config, Mapping) else _folder_with_weights(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = (
            _loaded(folder, options, device) if folder else _random(config, options, device)
        )
        if options.is_4_bit:
            _prepare_4_bit(model, options)
        # Trainers turn the cache off; a prefix is handed over as one.
        model.config.use_cache = options.method == "prefix"
        if options.loss_path == "upcast":  # the model itself cast its logits to fp32 then
            head: Any = model.get_output_embeddings()  # pyright: ignore
            head.register_forward_hook(lambda module, inputs, logits: logits.float())
        if options.loss_path == "fused":
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(model)
        if options.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": options.reentrant})
        return _with_method(model, options).train()


def check_trainable(arch: Architecture, options: Options, device: str) -> None:
    """Raise ValueError or LabkitError for options that no step on one device can follow."""
    check_one_step(arch, options)
    if options.optimizer.startswith("paged") and device != "cuda":
        raise ValueError(
            f"optimizer={options.optimizer!r} on {device}: pages are managed by CUDA: use "
            "'adamw-8bit', whose states are as large"
        )
    if options.attention == "flash_attention_2":
        from transformers.utils.import_utils import is_flash_attn_2_available

        if device != "cuda" or not is_flash_attn_2_available():
            raise LabkitError(
                "attention='flash_attention_2' needs a CUDA device and the package flash-attn: "
                "use 'sdpa', which runs the same kernel where there is no mask"
            )


def _folder_with_weights(where: str | Path) -> Path | None:
    folder = paths.base_model_dir() if where == "bundled" else Path(os.path.expanduser(where))
    return folder if folder.is_dir() and any(folder.glob("*.safetensors")) else None


def _quantization(options: Options):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=TORCH_DTYPES["bf16" if options.autocast else options.dtype],
    )


def _loaded(folder: Path, options: Options, device: str | torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    more = {"quantization_config": _quantization(options)} if options.is_4_bit else {}
    with without_progress_bars():
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=TORCH_DTYPES[options.dtype],
            attn_implementation=options.attention,
            device_map={"": device},
            **more,
        )


def _random(
    config: Mapping[str, Any] | str | Path, options: Options, device: str | torch.device
) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = load_config(config)
    model_type = values.pop("model_type", None)
    try:
        described = AutoConfig.for_model(str(model_type), **values)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                described, dtype=TORCH_DTYPES[options.dtype], attn_implementation=options.attention
            )
    except Exception as error:  # each model class checks its own keys, in its own way
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model_type={model_type!r}: transformers builds no such model: a step can be measured "
            f"for the families it has, with the keys they take ({type(error).__name__}: {why})"
        ) from error
    if options.is_4_bit:
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        head = [name for name, part in model.named_modules() if part is model.lm_head]
        model = replace_with_bnb_linear(
            model, modules_to_not_convert=head, quantization_config=_quantization(options)
        )
        model.is_loaded_in_4bit = True
    _give_weights(model, options, torch.device(device))
    return model


def _give_weights(model: nn.Module, options: Options, device: torch.device) -> None:
    """Put small random numbers where a model has only shapes, in place, matrix by matrix."""
    made: dict[int, nn.Parameter] = {}  # a tied matrix is one parameter under two names
    for layer in model.modules():
        for name, parameter in list(layer._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = _random_weight(layer, name, parameter, options, device)
            layer._parameters[name] = made[id(parameter)]
        for name, buffer in list(layer._buffers.items()):
            if buffer is not None:
                layer._buffers[name] = torch.zeros_like(buffer, device=device)


def _random_weight(
    layer: Any, name: str, shape: nn.Parameter, options: Options, device: torch.device
) -> nn.Parameter:
    four_bit = type(shape).__name__ == "Params4bit"
    dtype = TORCH_DTYPES[options.dtype] if four_bit else shape.dtype
    size = (layer.out_features, layer.in_features) if four_bit else shape.shape
    values = torch.empty(size, dtype=dtype, device=device).normal_(std=0.02)
    if not four_bit:
        return nn.Parameter(values, requires_grad=shape.requires_grad)
    from bitsandbytes.nn import modules

    make: Any = modules.Params4bit
    weight = make(
        values,
        requires_grad=False,
        compress_statistics=options.double_quant,
        quant_type="nf4",
        module=layer,
    )
    return weight.to(device)  # where it is quantized


def _prepare_4_bit(model: Any, options: Options) -> None:
    for layer in model.modules():  # see labkit.models: it would pack weights anew, for speed
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # pyright: ignore
    if not options.kbit_prepared:
        model.requires_grad_(False)
        return
    from peft import prepare_model_for_kbit_training

    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if options.dtype == "bf16":  # TRL casts embedding and head back, see memory.state.head_width
        for ends in (model.get_input_embeddings(), model.get_output_embeddings()):
            ends.to(torch.bfloat16)


def _with_method(model: Any, options: Options) -> nn.Module:
    """Freeze, adapt or prompt the model."""
    if options.method == "full":
        return model
    if options.method == "freeze":
        layers = _decoder_layers(model)
        model.requires_grad_(False)
        for layer in layers[len(layers) - options.trainable_layers :]:
            layer.requires_grad_(True)
        return model
    from peft import get_peft_model

    with warnings.catch_warnings():
        drop_peft_notice()
        return get_peft_model(model, _peft_config(model, options))


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    return next(part for part in model.modules() if isinstance(part, nn.ModuleList))


def _peft_config(model: Any, options: Options):
    from peft import (
        LoraConfig,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        TaskType,
    )

    common: dict[str, Any] = {"task_type": TaskType.CAUSAL_LM}
    if options.has_adapters:
        wanted = options.target_modules
        if isinstance(wanted, str) and wanted != "all-linear":
            wanted = [name.strip() for name in wanted.split(",")]
        conv = getattr(model.config, "model_type", "") == "gpt2" and not options.is_4_bit
        return LoraConfig(
            r=options.lora_rank,
            lora_dropout=options.lora_dropout,
            target_modules=wanted if isinstance(wanted, str) else list(wanted),
            fan_in_fan_out=conv,  # GPT-2's matrices lie the other way round
            **common,
        )
    common["num_virtual_tokens"] = options.num_virtual_tokens
    if options.method == "prompt":
        return PromptTuningConfig(**common)
    if options.method == "prefix":
        return PrefixTuningConfig(**common)
    return PromptEncoderConfig(**common, encoder_hidden_size=options.encoder_hidden_size)  # pyright: ignore


# ---- the optimizer -----------------------------------------------------------------------------


def build_optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """The optimizer of the options, at a rate that moves nothing; no byte depends on the rate."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    still: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0}
    if options.optimizer == "adamw":
        on_gpu = trained[0].device.type == "cuda"
        foreach = options.foreach and on_gpu and not options.fused
        return torch.optim.AdamW(trained, foreach=foreach, fused=options.fused, **still)
    if options.optimizer == "sgd":
        return torch.optim.SGD(trained, **still)
    if options.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(trained, relative_step=False, scale_parameter=False, **still)
    return _eight_bit(model, trained, options, still)


def _eight_bit(
    model: nn.Module, trained: list[nn.Parameter], options: Options, still: dict[str, Any]
) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW, with embeddings in 32 bits, as transformers' Trainer sets it up.

    Its managers are global and would keep an earlier model alive, so they forget it here.
    """
    from bitsandbytes.functional import GlobalPageManager
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    manager.initialize()
    GlobalPageManager.get_instance().paged_tensors.clear()
    for part in model.modules():
        if isinstance(part, nn.Embedding):
            manager.register_module_override(part, "weight", {"optim_bits": 32})
    kind = PagedAdamW8bit if options.optimizer.startswith("paged") else AdamW8bit
    optimizer = kind(trained, **still)
    optimizer.check_overrides()
    manager.module_weight_config_triple.clear()
    return optimizer


# ---- the batch and its loss --------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass: (rows, tokens) ids, mask and labels."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids, self.mask, self.labels


def random_batch(options: Options, vocabulary: int, device: str | torch.device) -> Batch:
    """Rows of random ids; with `padding` the last row ends in a padded quarter."""
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (options.rows, options.seq_len), generator=made)
    mask = torch.ones_like(ids)
    if options.padding:
        mask[-1, options.seq_len - max(1, options.seq_len // 4) :] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    return Batch(ids.to(device), mask.to(device), labels.to(device))


def sft_loss(model: nn.Module, batch: Batch, options: Options) -> Tensor:
    """Mean over the tokens that have a label.

    The model computes it inside its own forward pass, which still holds the last hidden state
    then, as transformers' Trainer has it.
    """
    if options.loss_path == "fused":
        losses = token_losses(model, batch, options.loss_path)
        return losses.sum() / (batch.labels != IGNORED).sum()
    inner: Any = model.get_base_model() if options.is_peft else model  # pyright: ignore

    def loss_function(logits: Tensor, labels: Tensor, *unused: Any, **more: Any) -> Tensor:
        return _losses(logits, labels, options.loss_path, reduction="mean")

    inner.loss_function = loss_function
    ids, mask, labels = batch.tensors
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def token_losses(model: nn.Module, batch: Batch, path: str) -> Tensor:
    """Negative log-likelihood of each token, along one of the loss paths of `memory.loss`.

    Returns:
        (rows, tokens) float32; 0 where there is no label.
    """
    ids, mask, labels = batch.tensors
    if path == "fused":  # TRL's own head
        told = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        return -told.log_probs
    logits = model(input_ids=ids, attention_mask=mask).logits
    virtual = logits.shape[1] - labels.shape[1]
    labels = functional.pad(labels, (virtual, 0), value=IGNORED)
    return _losses(logits, labels, path, reduction="none").view(len(labels), -1)


def _losses(logits: Tensor, labels: Tensor, path: str, reduction: str) -> Tensor:
    """Cross-entropy of logits (rows, tokens, words).

    `padded` is what the installed transformers does, `shifted` and `upcast` are written as in the
    versions that had them. For `upcast` the head's results are fp32 already, see `build_model`.
    """
    exact = logits.float()
    if path == "padded":
        scored, labels = exact, functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    else:
        scored, labels = exact[:, :-1].contiguous(), labels[:, 1:]
    return functional.cross_entropy(
        scored.view(-1, scored.shape[-1]),
        labels.reshape(-1),
        ignore_index=IGNORED,
        reduction=reduction,
    )


def dpo_loss(
    model: nn.Module, reference: nn.Module | None, batch: Batch, options: Options
) -> Tensor:
    """Rafailov et al. 2023, arXiv:2305.18290, eq. 7; the first half of the rows is chosen.

    As in TRL the reference is asked while the policy's graph is alive.

    Args:
        reference: None for the model without its adapter, or where its answers were computed
            before.
    """
    policy = -token_losses(model, batch, options.loss_path).sum(dim=1)
    with torch.no_grad():
        if options.precompute_reference:
            known = torch.zeros_like(policy)
        else:
            alone = nullcontext() if reference else model.disable_adapter()  # pyright: ignore
            with alone, _without_checkpointing(model):
                known = -token_losses(reference or model, batch, options.loss_path).sum(dim=1)
    chosen, rejected = (policy - known).chunk(2)
    return -functional.logsigmoid(BETA * (chosen - rejected)).mean()


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Where there are no gradients there is nothing to compute again; TRL switches it off, too."""
    layers = [part for part in model.modules() if getattr(part, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False  # pyright: ignore
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True  # pyright: ignore


def build_reference(model: nn.Module, options: Options) -> nn.Module | None:
    """DPO's frozen copy of the model, where there is no adapter to switch off."""
    if options.objective != "dpo" or options.is_peft or options.precompute_reference:
        return None
    return copy.deepcopy(model).requires_grad_(False).eval()
