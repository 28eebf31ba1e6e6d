"""What an adapter trains, what it changed, whose it is, and a merge that comes with its proof.

PEFT saves an adapter without a word on the weights it was trained against, so attaching it to
another model of the same shape goes unnoticed and answers nonsense. `save` writes the hash of the
base model beside the adapter, and `attach` and `merge` refuse any other base.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from labkit import models, paths
from labkit.checkpoints import free_disk_or_raise
from labkit.errors import LabkitError
from labkit.files import sha256, write_atomic
from labkit.machine import versions
from labkit.quiet import drop_peft_notice, without_progress_bars
from labkit.weights import n_parameters, sha256_of

drop_peft_notice()

RECORD = "labkit_base.json"
EVIDENCE = "merge_evidence.json"
PROMPTS = (
    "Where does the teacher live?",
    "What is 23 + 45?",
    "Sort from small to large: 45 3 78",
    "The soup was not good. Is that positive or negative?",
    "A customer writes: when do you open on Monday?",
    "Please answer in one full sentence: which animal do you like?",
    "The city is north of the river. Question: where is the city?",
    "Hello. Who are you?",
)
Say = Callable[[str], None]


# ---- what it trains ----------------------------------------------------------------------------


def target_shapes(
    model: nn.Module, target_modules: str | Sequence[str]
) -> dict[str, tuple[int, int]]:
    """(in, out) of each layer that PEFT adapts for these target modules, by the layer's name.

    Args:
        target_modules: ends of layer names, such as `["q_proj", "v_proj"]`, or `"all-linear"`,
            which is every linear layer except the output head. PEFT's regular expressions are
            not understood here.

    Raises:
        ValueError: a name that no layer has; the message lists those that exist.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
    }
    shapes = {name: _shape(layer) for name, layer in layers.items()}
    if target_modules == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return {name: shapes[name] for name, layer in layers.items() if layer is not head}
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    ends = sorted({name.rpartition(".")[2] for name in shapes})
    for target in wanted:
        if not any(_ends_with(name, target) for name in shapes):
            raise ValueError(
                f"target_modules holds {target!r}, which no layer of this model is called: "
                f"it has {', '.join(ends)}"
            )
    return {
        name: shape
        for name, shape in shapes.items()
        if any(_ends_with(name, target) for target in wanted)
    }


def target_choices(model: nn.Module) -> dict[str, str | list[str]]:
    """The usual choices of layers, by name, as `target_modules` of this model.

    Models that keep queries, keys and values in one layer, or name theirs otherwise, have fewer.
    """
    ends = {name.rpartition(".")[2] for name in target_shapes(model, "all-linear")}
    named = {name: sorted(ends & wanted) for name, wanted in _CHOICES.items()}
    chosen: dict[str, str | list[str]] = {
        name: found for name, found in named.items() if len(found) == len(_CHOICES[name])
    }
    return chosen | {"all linear": "all-linear"}


_CHOICES = {
    "q and v": {"q_proj", "v_proj"},
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "MLP": {"gate_proj", "up_proj", "down_proj"},
}


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(in, out), which a 4-bit layer's packed weight no longer shows."""
    if isinstance(layer, Conv1D):  # GPT-2's layer, whose weight lies the other way round
        n_in, n_out = layer.weight.shape
        return n_in, n_out
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def lora_parameters(model: nn.Module, rank: int, target_modules: str | Sequence[str]) -> int:
    """Numbers that LoRA trains: rank x (in + out) for each layer that it adapts.

    Hu et al. 2021, section 4.1: A is (rank, in) and B is (out, rank).

    Raises:
        ValueError: a rank below 1 or above a layer's smaller side, or an unknown target module.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: give 1 or more")
    shapes = target_shapes(model, target_modules)
    for name, (n_in, n_out) in shapes.items():
        if rank > min(n_in, n_out):
            raise ValueError(
                f"rank={rank} is more than {name} can have, which is {n_in} by {n_out}: "
                f"give at most {min(n_in, n_out)}"
            )
    return sum(rank * (n_in + n_out) for n_in, n_out in shapes.values())


# ---- what it changed ---------------------------------------------------------------------------


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor of the base model, by the name it has when no adapter is attached.

    PEFT puts `base_model.model.` before each name and `.base_layer` into those of adapted layers.
    """
    if not isinstance(model, PeftModel):
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    adapted = set(model.peft_config)
    tensors = {}
    for name, tensor in model.get_base_model().state_dict().items():
        if not _is_adapters(name, adapted):
            plain = name.replace(".base_layer", "").replace(".original_module", "")
            tensors[plain] = tensor.detach().clone()
    return tensors


def _is_adapters(name: str, adapters: set[str]) -> bool:
    """Whether a tensor is an adapter's: `...lora_A.NAME.weight`, `...modules_to_save.NAME...`."""
    parts = name.split(".")
    return any(
        part in adapters and before.startswith(("lora_", "ia3_", "modules_to_save"))
        for before, part in zip(parts, parts[1:], strict=False)
    )


def changed_tensors(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit, and of those that only one side has."""
    both = before.keys() & after.keys()
    differing = {name for name in both if not torch.equal(before[name], after[name])}
    return sorted(differing | (before.keys() ^ after.keys()))


# ---- whose it is -------------------------------------------------------------------------------


def base_sha256(base: str | Path) -> str:
    """One hash for the weights of a model: of the hashes of its weight files, in their order.

    Args:
        base: `bundled`, a folder, or a Hugging Face id that was downloaded before.

    Raises:
        LabkitError: there is no such folder or download, or it holds no weights.
    """
    folder = _folder_of(str(base))
    # As transformers does: the older files count only where there are no newer ones.
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise LabkitError(f"{folder} has no weights (*.safetensors): name a model's folder")
    return sha256("".join(f"{sha256_of(file)}\n" for file in weights).encode())


def _folder_of(base: str) -> Path:
    folder = paths.base_model_dir() if base == "bundled" else Path(base).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(base, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError, OSError) as error:
        raise LabkitError(
            f"base model {base} is no folder and was not downloaded: name its folder"
        ) from error


def save(model: PeftModel, folder: str | Path, base: str | Path) -> None:
    """Save an adapter with the hash of its base model; a folder with files in it is refused.

    Raises:
        LabkitError: the folder is not empty, or the base model is not to be found.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise LabkitError(f"{folder} is not empty: name another folder, or delete it first")
    recorded = {"base": str(base), "weights_sha256": base_sha256(base)}
    write_atomic(folder / RECORD, (json.dumps(recorded, indent=2) + "\n").encode())
    model.save_pretrained(str(folder))


def check_base(folder: str | Path, base: str | Path) -> bool:
    """Raise LabkitError unless `base` is the model that an adapter was trained on.

    Returns:
        True, or False where the adapter has no record and nothing can be said.
    """
    record = Path(folder) / RECORD
    if not record.is_file():
        return False
    wanted, name = _recorded(record)
    if base_sha256(base) != wanted:
        raise LabkitError(
            f"{folder} was trained on other weights than {base} has (on {name}, SHA-256 "
            f"{wanted[:12]}...): an adapter fits only the model that it was trained on"
        )
    return True


def _recorded(record: Path) -> tuple[str, str]:
    """Hash of the weights that an adapter was trained on, and the name of that model."""
    try:
        recorded = json.loads(record.read_text(encoding="utf-8"))
        return str(recorded["weights_sha256"]), str(recorded["base"])
    except (ValueError, KeyError, TypeError) as error:
        raise LabkitError(f"{record} is damaged: delete it to go on without the check") from error


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, and no whole model."""
    folder = Path(folder).expanduser()
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def base_of(folder: str | Path, *others: str) -> str:
    """Where an adapter's base model is: where its files say, or else at the first of `others`.

    Nothing is loaded; `attach` checks that the base is the one that the adapter was trained on.

    Args:
        folder: of the adapter.
        others: models to fall back on, for an adapter that was copied from another machine.

    Raises:
        LabkitError: no readable adapter, or none of the models is here.
    """
    named = [_adapter_config(folder).base_model_name_or_path]
    record = Path(folder) / RECORD
    if record.is_file():
        named.insert(0, _recorded(record)[1])
    for name in [*filter(None, named), *others]:
        try:
            _folder_of(str(name))
        except LabkitError:
            continue
        return str(name)
    wanted = " or ".join(dict.fromkeys(filter(None, named))) or "which it does not name"
    raise LabkitError(
        f"the base model of {folder}, {wanted}, is not here: name its folder with --base"
    )


def attach(
    folder: str | Path, base: str | Path, *, device: str | None = None, **load_options
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load a base model, check that the adapter belongs to it, and attach it, in eval mode.

    Args:
        folder: of the adapter, as `save` wrote it.
        base: `bundled`, a folder, or a Hugging Face id that was downloaded before.
        load_options: for `models.load`, such as `quantization="nf4"`.

    Raises:
        LabkitError: another base model, or no readable adapter.
    """
    check_base(folder, base)
    config = _adapter_config(folder)
    model, tokenizer = models.load(base, device=device, **load_options)
    return _attach(model, folder, config), tokenizer


def _adapter_config(folder: str | Path) -> PeftConfig:
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        raise LabkitError(f"{folder} has no adapter_config.json: name an adapter's folder")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise LabkitError(f"{file} is no adapter's configuration: {error}") from error


def _attach(model: PreTrainedModel, folder: str | Path, config: PeftConfig) -> PeftModel:
    try:
        with warnings.catch_warnings():
            # A part that is missing would stay as it was at the start of training: at nothing.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(folder), config=config).eval()
    except (ValueError, RuntimeError, OSError, UserWarning) as error:
        reason = str(error).strip().splitlines()[0]
        raise LabkitError(f"the adapter {folder} does not fit this model: {reason}") from error


# ---- merging, with proof -----------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What a merge was checked with, as it stands in `merge_evidence.json`."""

    base: str
    base_sha256: str
    base_was_checked: bool
    """False where the adapter has no record of its base model."""
    adapter: str
    adapter_sha256: str
    merged_sha256: str
    dtype: str
    """What the merged weights are stored in."""
    n_prompts: int
    n_logits: int
    """Numbers compared: one for each position of each prompt and each token of the vocabulary."""
    largest_logit: float
    """Largest absolute logit of the model with its adapter attached."""
    difference_in_memory: float
    """Largest absolute difference of a logit, attached against merged."""
    difference_reloaded: float
    """The same against the files that were written, loaded anew: rounding to `dtype` included."""
    same_next_token: float
    """Share of positions where both would say the same next token, 0 to 1."""
    effect: float
    """Largest absolute difference that the adapter makes to a logit of the base model."""
    versions: dict[str, str]


# Merging adds B·A·scale to W once instead of to every output, so only rounding may differ.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.06, "float16": 0.01}
"""Largest difference of a logit, relative to the largest logit."""


def merge(base: str | Path, adapter: str | Path, out: str | Path, say: Say = print) -> Evidence:
    """Merge an adapter into its base model, reload the result, and prove that it says the same.

    Args:
        base: `bundled`, a folder, or a Hugging Face id that was downloaded before.
        adapter: folder of an adapter that has weights to merge, such as LoRA's.
        out: the folder to make: model, tokenizer and `merge_evidence.json`.
        say: called with one line before each step.

    Raises:
        LabkitError: `out` exists or lies in an input, the base is another one or quantized, the
            adapter cannot be merged, or the merged model answers differently; nothing is written.
    """
    adapter, out = Path(adapter), Path(out)
    _refuse_out(base, adapter, out)
    config = _adapter_config(adapter)
    checked = check_base(adapter, base)
    if not checked:
        say(f"{adapter} has no {RECORD}: whether {base} is its base model is taken on trust")
    if getattr(config, "num_virtual_tokens", None):
        raise LabkitError(
            f"{adapter} is a {config.peft_type} adapter: it prepends vectors and has no weights "
            "to merge; keep it beside its base model"
        )
    stored = _stored_dtype(_folder_of(str(base)))
    model, tokenizer = models.load(base, device="cpu", dtype=torch.float32)
    free_disk_or_raise(_existing_parent(out), n_parameters(model).total * stored.itemsize)
    say("comparing the base model, the adapter attached, and merged")
    plain = _logits(model, tokenizer)
    attached_model = _attach(model, adapter, config)
    attached = _logits(attached_model, tokenizer)
    try:
        merged_model = attached_model.merge_and_unload(safe_merge=True)
    except (ValueError, AttributeError, NotImplementedError) as error:
        raise LabkitError(f"{adapter} cannot be merged: {error}") from error
    merged = _logits(merged_model, tokenizer)

    draft = out.with_name(f".{out.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        say("writing the merged model and loading it again")
        with without_progress_bars(hide=n_parameters(merged_model).total < 250e6):
            merged_model.to(stored).save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        reloaded, _ = models.load(draft, device="cpu", dtype=torch.float32)
        again = _logits(reloaded, tokenizer)
        evidence = Evidence(
            base=str(base),
            base_sha256=base_sha256(base),
            base_was_checked=checked,
            adapter=str(adapter),
            adapter_sha256=_adapter_sha256(adapter),
            merged_sha256=base_sha256(draft),
            dtype=str(stored).removeprefix("torch."),
            n_prompts=len(PROMPTS),
            n_logits=attached.numel(),
            largest_logit=attached.abs().max().item(),
            difference_in_memory=(merged - attached).abs().max().item(),
            difference_reloaded=(again - attached).abs().max().item(),
            same_next_token=(again.argmax(-1) == attached.argmax(-1)).float().mean().item(),
            effect=(attached - plain).abs().max().item(),
            versions=versions(),
        )
        _refuse_difference(evidence)
        text = json.dumps(asdict(evidence), indent=2) + "\n"
        (draft / EVIDENCE).write_text(text, encoding="utf-8")
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return evidence


def _refuse_out(base: str | Path, adapter: Path, out: Path) -> None:
    """Raise LabkitError if writing `out` could touch either input or anything that is there."""
    inputs = [adapter] + ([Path(base)] if Path(base).expanduser().is_dir() else [])
    inputs += [paths.base_model_dir()] if str(base) == "bundled" else []
    for given in inputs:
        if out.resolve().is_relative_to(given.expanduser().resolve()):
            raise LabkitError(f"{out} lies in {given}, which is an input: name another folder")
    if out.exists():
        raise LabkitError(f"{out} exists already: name another folder, or delete it first")


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.resolve().parents if parent.exists())


def _stored_dtype(folder: Path) -> torch.dtype:
    """What a model's files hold, from its configuration; float32 where that does not say."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise LabkitError(
            f"{folder} is quantized: merge into the 16-bit model that it was made from"
        )
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return getattr(torch, name.removeprefix("torch."), torch.float32)


def _adapter_sha256(folder: Path) -> str:
    files = sorted([*folder.glob("adapter_model*"), folder / "adapter_config.json"])
    return sha256("".join(f"{sha256_of(file)}\n" for file in files).encode())


@torch.no_grad()
def _logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """(positions of all prompts, vocabulary) next-token logits, in float32."""
    model.eval()
    rows = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
    return torch.cat([model(input_ids=ids).logits[0].float() for ids in rows])


def _refuse_difference(evidence: Evidence) -> None:
    """Raise LabkitError if the merge did anything but round."""
    for what, difference, dtype in (
        ("in memory", evidence.difference_in_memory, "float32"),
        ("reloaded", evidence.difference_reloaded, evidence.dtype),
    ):
        allowed = _TOLERANCE.get(dtype, _TOLERANCE["bfloat16"]) * evidence.largest_logit
        if not difference <= allowed:  # not a number is no pass either
            raise LabkitError(
                f"the merged model, {what}, differs from the adapter by {difference:.3g} in a "
                f"logit, where rounding explains {allowed:.3g}: nothing was written"
            )
        if evidence.effect and difference > evidence.effect / 2:
            raise LabkitError(
                f"the adapter moves no logit by more than {evidence.effect:.3g}, and the merged "
                f"model, {what}, is off by {difference:.3g}: rounding would erase it, so nothing "
                "was written; keep the adapter beside its base model"
            )
