"""A model and its tokenizer from the bundled folder, any folder or any Hugging Face id."""

import json
import os
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from labkit import machine, paths
from labkit.chat_templates import MINIMAL_CHAT_TEMPLATE, with_generation_markers
from labkit.errors import LabkitError
from labkit.quiet import without_progress_bars
from labkit.weights import (
    Parameters,
    fingerprint,
    n_parameters,
    parameter_table,
    safetensors_problem,
    sha256_of,
    tensor_bytes,
)

__all__ = [
    "PROFILES",
    "Parameters",
    "Profile",
    "check",
    "current_profile",
    "describe_device",
    "fingerprint",
    "load",
    "n_parameters",
    "parameter_table",
    "pick_device",
    "pick_precision",
    "tensor_bytes",
    "with_generation_markers",
]


@dataclass(frozen=True)
class Profile:
    """What the notebooks use on one class of machine: defaults for their experiment cells."""

    name: str
    model: str
    """`bundled`, a folder, or a Hugging Face id."""
    rows: int
    """Training rows of one run."""
    batch_size: int
    """Rows per device and forward pass."""
    accumulation: int
    """Forward passes per optimizer step."""
    max_length: int
    """Longest row, in tokens."""
    precision: str
    """What a training step computes in: fp32, or bf16 autocast; see `pick_precision`."""
    dtype: str
    """What the weights are stored in."""
    steps: int
    """Optimizer steps of one run: a whole number of passes over `rows`."""
    note: str


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            name="cpu",
            model="bundled",
            rows=2000,
            batch_size=8,
            accumulation=1,
            max_length=128,
            precision="fp32",
            dtype="float32",
            steps=500,
            note="the bundled model of about 5 M parameters; bf16 on a CPU that is faster in it",
        ),
        Profile(
            name="gpu-small",
            model="Qwen/Qwen2.5-0.5B-Instruct",
            rows=1600,
            batch_size=8,
            accumulation=2,
            max_length=256,
            precision="bf16",
            dtype="float32",
            steps=200,
            note="every method, full fine-tuning too, in 12 GiB of GPU memory",
        ),
        Profile(
            name="gpu",
            model="Qwen/Qwen2.5-7B-Instruct",
            rows=1600,
            batch_size=4,
            accumulation=4,
            max_length=256,
            precision="bf16",
            dtype="bfloat16",
            steps=200,
            note="QLoRA in 16 GiB, LoRA in 24 GiB; too large for full fine-tuning on one GPU",
        ),
    )
}


def current_profile() -> Profile:
    """Profile that `LABKIT_PROFILE` names, else `cpu`, with the model of `LABKIT_MODEL` if set."""
    name = os.environ.get("LABKIT_PROFILE") or "cpu"
    if name not in PROFILES:
        raise ValueError(f"LABKIT_PROFILE={name!r} is unknown: set it to {', '.join(PROFILES)}")
    model = os.environ.get("LABKIT_MODEL")
    return replace(PROFILES[name], model=model) if model else PROFILES[name]


def pick_device() -> str:
    """Device the current profile trains on: `cpu` for the profile of that name, else the GPU."""
    if current_profile().name == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_precision() -> str:
    """What a training step computes in here: on a CPU bf16 where that is faster, else fp32.

    On a GPU it is the profile's, but fp32 where the GPU has no bf16 (before Ampere, such as a T4).

    Raises:
        LabkitError: LABKIT_PRECISION, which decides where it is set, is neither of the two.
    """
    chosen = os.environ.get("LABKIT_PRECISION")
    if chosen:
        if chosen not in ("bf16", "fp32"):
            raise LabkitError(f"LABKIT_PRECISION={chosen}: set it to bf16 or fp32, or not at all")
        return chosen
    device = pick_device()
    if device == "cpu":
        return "bf16" if machine.bf16_speedup() > 1.3 else "fp32"
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp32"
    return current_profile().precision


def describe_device() -> dict[str, object]:
    """What this machine has: cores, memory, GPU, and whether bf16 is the faster type on its CPU."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    speedup = machine.bf16_speedup()
    return {
        "device": pick_device(),
        "cores": machine.usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu.name if gpu else None,
        "gpu_memory_bytes": gpu.total_memory if gpu else 0,
        "bf16_faster": speedup > 1,
        "bf16_speedup": speedup,
    }


def load(
    model: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    quantization: str | BitsAndBytesConfig | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in eval mode, and its tokenizer with a pad token and a template.

    Args:
        model: `bundled`, a folder, or a Hugging Face id; None takes the current profile's.
        device: `cpu`, `cuda`, `mps`; None picks the current profile's.
        dtype: of the weights; None is float32 on a CPU and the current profile's elsewhere. With
            `quantization` it is the type that is computed in.
        quantization: None, `nf4` (with double quantization), `fp4` or `int8`, by bitsandbytes; or
            a `BitsAndBytesConfig`, which is used as it is.

    Returns:
        (model, tokenizer). A pad token other than the end token is found or added, and a missing
        chat template is replaced by `MINIMAL_CHAT_TEMPLATE`; a warning says so.

    Raises:
        LabkitError: files missing or damaged, no tokenizer, one that does not fit the model, or
            weights to quantize that are quantized already.
        ValueError: an unknown `quantization`, or a configuration that rounds nothing.
    """
    name = str(model or current_profile().model)
    device = device or pick_device()
    dtype = dtype or _default_dtype(device)
    config = None if quantization is None else _quantization_config(quantization, dtype)
    source = _find(name)
    rounded = _is_quantized(source)
    if config and rounded:
        raise LabkitError(
            f"{name} is quantized already: load it without quantization=, or quantize the 16-bit "
            "model that it was made from"
        )
    options: dict[str, object] = {"device_map": {"": device}} if config or rounded else {}
    if config:
        options["quantization_config"] = config
    if name == "bundled" and device == "cpu":
        # In rows this short the plain product is faster on a CPU than a fused kernel.
        options["attn_implementation"] = "eager"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        with without_progress_bars(hide=_loads_at_once(source)):
            loaded, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore
                source,
                dtype=dtype,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise LabkitError(_cannot_load(name, error)) from error
    if info["missing_keys"]:  # transformers would go on with random numbers in their place
        raise LabkitError(
            f"{name} lacks {len(info['missing_keys'])} of its tensors, "
            f"{sorted(info['missing_keys'])[0]} first: {_REPAIR}"
        )
    n_rows = _embedding_rows(loaded)
    if len(tokenizer) > n_rows:
        raise LabkitError(
            f"{name}: its tokenizer has {len(tokenizer)} tokens and its model rows for {n_rows}: "
            "tokenizer and weights are from different models; take both from one source"
        )
    _keep_packed(loaded)
    _ensure_pad_token(loaded, tokenizer, name)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = MINIMAL_CHAT_TEMPLATE
        warnings.warn(
            f"{name} has no chat template, so labkit's minimal ChatML is used: it is no chat "
            "model, and answers like one only after fine-tuning",
            stacklevel=2,
        )
    return (loaded if "device_map" in options else loaded.to(device)).eval(), tokenizer


def _is_quantized(source: str) -> bool:
    """Whether a folder's weights were rounded before; rounding them again would add up."""
    file = Path(source) / "config.json"
    return file.is_file() and "quantization_config" in json.loads(file.read_text(encoding="utf-8"))


def _keep_packed(model: PreTrainedModel) -> None:
    """Keep 4-bit layers from packing their weights anew, for speed, at the first evaluation.

    On CPUs with bf16 instructions bitsandbytes does so in place. Training and merging after it read
    the weights as they were packed before: gradients vanish, and a merged model answers nonsense.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # pyright: ignore


def _default_dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else getattr(torch, current_profile().dtype)


def check(model: str | Path) -> None:
    """Raise LabkitError unless a model's folder is there and whole; an id tells when it is loaded.

    Args:
        model: `bundled`, a folder, or a Hugging Face id.
    """
    _find(str(model))


def _find(name: str) -> str:
    """Folder of a model after its files were checked, or the id as it came."""
    folder = paths.base_model_dir() if name == "bundled" else Path(name).expanduser()
    if folder.is_dir():
        check_files(folder)
        return str(folder)
    if name == "bundled":
        raise LabkitError(
            f"the bundled model's folder {folder} is missing: restore it with "
            "`git checkout -- data/base_model`, or make it with `labkit pretrain`"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise LabkitError(
            f"model folder {name} is missing: check the path given to load() or in LABKIT_MODEL"
        )
    return name


def check_files(folder: Path) -> None:
    """Raise LabkitError unless a model folder has readable JSON, whole weights and a tokenizer.

    Where the folder has a `SHA256SUMS`, every file named there must also match its hash.
    """
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise LabkitError(
            f"{folder} is an adapter, not a model: load its base model first"
            if adapter
            else f"{folder} has no config.json: give a folder that save_pretrained wrote"
        )
    for file in sorted(folder.glob("*.json")):  # the tokenizer's too
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise LabkitError(f"{file} is no JSON ({error}): {_REPAIR}") from error

    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if not weights:
        raise LabkitError(f"{folder} has no weights (*.safetensors): {_REPAIR}")
    for file in weights:
        problem = safetensors_problem(file) if file.suffix == ".safetensors" else None
        if problem:
            raise LabkitError(f"{file} is damaged: it {problem}. {_REPAIR}")
    if not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        raise LabkitError(
            f"{folder} has no tokenizer (tokenizer.json): copy it from the model it was trained "
            "from, or write it there with tokenizer.save_pretrained"
        )
    sums = folder / "SHA256SUMS"
    for line in sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else []:
        wanted, name = line.split(maxsplit=1)
        file = folder / name.lstrip("*")
        if not file.is_file():
            raise LabkitError(f"{file} is missing although SHA256SUMS lists it: {_REPAIR}")
        if sha256_of(file) != wanted:
            raise LabkitError(f"{file} is damaged: its SHA-256 is not the one listed. {_REPAIR}")


_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")
_REPAIR = "restore it with `git checkout`, or copy or save the model again"


def _cannot_load(name: str, error: Exception) -> str:
    """One line for a model that transformers could not read, with the next step."""
    reason = str(error).strip().splitlines()[0]
    if Path(name).expanduser().is_dir() or name == "bundled":
        return f"model {name} cannot be read: {reason}. {_REPAIR}"
    return (
        f"model {name!r} is no folder here and cannot be had from Hugging Face: {reason}. Download "
        f"it while online with `hf download {name}`, or set LABKIT_MODEL to a folder"
    )


def _quantization_config(
    quantization: str | BitsAndBytesConfig, dtype: torch.dtype
) -> BitsAndBytesConfig:
    if isinstance(quantization, BitsAndBytesConfig):
        if not (quantization.load_in_4bit or quantization.load_in_8bit):
            raise ValueError(
                "quantization= is a BitsAndBytesConfig that rounds nothing: set load_in_4bit=True "
                "or load_in_8bit=True"
            )
        return quantization
    if quantization not in ("nf4", "fp4", "int8"):
        raise ValueError(
            f"quantization={quantization!r} is unknown: use None, 'nf4', 'fp4', 'int8' or a "
            "BitsAndBytesConfig"
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=quantization == "nf4",
        bnb_4bit_compute_dtype=dtype,
    )


def _loads_at_once(source: str) -> bool:
    """Whether a model's weights are small enough to need no progress bar."""
    weights_bytes = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    return 0 < weights_bytes < 500e6


def _embedding_rows(model: PreTrainedModel) -> int:
    """Tokens that a model has an embedding for; published models round it up."""
    return next(model.get_input_embeddings().parameters()).shape[0]


# Tokens that published models keep for padding or never use, best first.
_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


def _ensure_pad_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Make the pad token differ from the end token, and tell model and tokenizer.

    A loss that leaves out padding would also leave out an end token with the same id, and the
    model would never learn to stop.
    """
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        taken = (tokenizer.eos_token, tokenizer.bos_token)
        unused = [token for token in _PAD_NAMES if token in vocabulary and token not in taken]
        token = unused[0] if unused else "<|pad|>"
        before = "no pad token" if tokenizer.pad_token is None else "its end token as pad token"
        tokenizer.add_special_tokens({"pad_token": token})
        if len(tokenizer) > _embedding_rows(model):
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        how = "its own token" if unused else "a new token"
        warnings.warn(f"{name} has {before}; {how} {token} now pads", stacklevel=3)
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
