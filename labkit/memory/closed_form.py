"""Peak memory of a training step, in closed form, from a `config.json` alone.

>>> config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
...           "num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 32000}
>>> full, lora = (estimate(config, method=method) for method in ("full", "lora"))
>>> full.phase, lora.phase
('optimizer step', 'layer backward')
>>> full.peak_allocated_bytes > 3 * lora.peak_allocated_bytes
True
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from labkit import paths
from labkit.memory import sharding
from labkit.memory.architecture import Architecture, read
from labkit.memory.options import Options, adapted_matrices, check_fit
from labkit.memory.phases import LAYER, LOSS, STEP, Moment, Step
from labkit.memory.state import state_bytes, trained_width
from labkit.memory.terms import Term


@dataclass(frozen=True)
class MemoryEstimate:
    """What one training step takes on one device at its highest moment, and why."""

    peak_allocated_bytes: int
    """What `torch.cuda.max_memory_allocated` would say: tensors, without the allocator's spare
    room and without the CUDA context of the process."""
    phase: str
    """`loss`, `layer backward` or `optimizer step`: the one that peaks."""
    moment: str
    """What is under way at the peak."""
    terms: tuple[Term, ...]
    """All that is alive at the peak; their bytes sum to it."""
    phases: dict[str, int]
    """Highest bytes of each phase."""
    parameters: int
    """Of the base model; a tied matrix counts once."""
    trainable_parameters: int
    model_states_bytes: int
    """Weights, gradients and optimizer states on this device, fp32 copies included: what tables of
    ZeRO count."""
    saved_activations_bytes: int
    """What autograd holds between forward and backward."""
    paged_bytes: int
    """Optimizer states in managed memory, which moves between device and host."""
    host_bytes: int
    """What offloading moves to all hosts together."""
    notes: tuple[str, ...]
    """What was assumed, and what could not be counted."""

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types; `terms` maps names to bytes, `explained` has the formulas."""
        values = dict(vars(self))
        values["terms"] = {one.name: one.bytes for one in self.terms}
        values["explained"] = [one.to_json() for one in self.terms]
        values["notes"] = list(self.notes)
        return values


def estimate(config: Mapping[str, Any] | str | Path, **options: Any) -> MemoryEstimate:
    """Peak bytes of one training step on one device.

    Args:
        config: a Hugging Face configuration as a dict; or a path to a `config.json` or to a model's
            folder, `bundled`, or the id of a model in the local Hugging Face cache.
        options: fields of `labkit.memory.Options`, such as `method="qlora"` or `seq_len=2048`;
            `dtype` is the config's own where it is not given, bf16 for a 4-bit model.

    Raises:
        ValueError: an unknown option, an impossible value, a config that cannot be read.
    """
    return explain(build_step(config, options))


def explain(step: Step) -> MemoryEstimate:
    """The estimate of a step whose config and options were checked, see `build_step`."""
    arch, chosen, moments = step.arch, step.options, step.moments()
    peak = max(moments, key=lambda moment: moment.bytes)
    phases = {
        phase: max(moment.bytes for moment in moments if moment.phase == phase)
        for phase in (LOSS, LAYER, STEP)
    }
    _, paged = state_bytes(step.trained, chosen, trained_width(chosen))
    return MemoryEstimate(
        peak_allocated_bytes=peak.bytes,
        phase=peak.phase,
        moment=peak.what,
        terms=peak.terms,
        phases=phases,
        parameters=arch.parameters,
        trainable_parameters=step.n_trained,
        model_states_bytes=_model_states(step),
        saved_activations_bytes=step.saved_bytes(),
        paged_bytes=paged,
        host_bytes=sharding.host_bytes(arch, chosen, step.n_trained),
        notes=_notes(arch, chosen),
    )


def moments(config: Mapping[str, Any] | str | Path, **options: Any) -> tuple[Moment, ...]:
    """Every moment of the step at which memory may peak, in the order in which they come.

    The highest is `estimate`'s peak, and its terms are that estimate's.

    Raises:
        ValueError: as `estimate`.
    """
    return tuple(build_step(config, options).moments())


def build_step(config: Mapping[str, Any] | str | Path, options: Mapping[str, Any]) -> Step:
    """The step that a config and options describe, without its moments, which take the time.

    Raises:
        ValueError: as `estimate`.
    """
    arch = read(load_config(config), options.get("experts"))
    chosen = build_options(arch, options)
    check_fit(arch, chosen)
    return Step(arch, chosen)


def build_options(arch: Architecture, given: Mapping[str, Any]) -> Options:
    """Options with what the config decides filled in.

    Args:
        arch: read with the `experts` of the options.

    Raises:
        ValueError: an option that does not exist, or a value that cannot be meant.
    """
    unknown = sorted(set(given) - set(Options.__dataclass_fields__))
    if unknown:
        known = ", ".join(Options.__dataclass_fields__)
        raise ValueError(f"{unknown[0]}={given[unknown[0]]!r}: no such option: use {known}")
    values = {name: value for name, value in given.items() if value is not None}
    values.setdefault("dtype", arch.dtype or "bf16")
    options = Options(**values)
    if arch.softcap_attention and options.attention == "sdpa":
        options = replace(options, attention="eager")  # transformers has no other for it
    if options.is_4_bit and options.kbit_prepared and options.dtype != "fp32":
        # The fp32 results of prepared norms meet 16-bit heads: that computes under autocast only.
        options = replace(options, autocast=True)
    if options.tables_per_layer and not (arch.rotary and arch.made_for):
        raise ValueError(
            "tables_per_layer=True: this config names no max_position_embeddings, or its positions "
            "are not rotary: leave it out"
        )
    if options.lora_dropout and any(matrix.bare for matrix in adapted_matrices(arch, options)):
        options = replace(options, lora_dropout=0.0)  # peft.tuners.lora.ParamWrapper takes no other
    return options


def load_config(where: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """Read a config.json: a file, a model's folder, `bundled`, or the id of a downloaded model.

    A name in `data/memory/models.json`, which ships with the course, will do as well, so that a
    machine without a network has more than one model to ask about. A config that is read already
    comes back as a copy.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    if isinstance(where, Mapping):
        return dict(where)
    file = _find_config(str(where))
    if file is None:
        return _shipped(str(where))
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also a number of too many digits
        raise ValueError(f"config {where} is not JSON ({error}): give a config.json") from error
    if not isinstance(values, dict):
        raise ValueError(f"config {where} holds {type(values).__name__}, no object: give a "
                         "Hugging Face config.json")  # fmt: skip
    return values


def _find_config(where: str) -> Path | None:
    path = paths.base_model_dir() if where == "bundled" else Path(os.path.expanduser(where))
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return path
    return _in_cache(where)


def _shipped(name: str) -> dict[str, Any]:
    """The configuration that the course itself has of a well-known model."""
    file = paths.root() / "data" / "memory" / "models.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if name not in known:
        raise ValueError(
            f"config {name!r}: no such file, no folder with a config.json, no model that was "
            "downloaded, and no name in data/memory/models.json: give the path of a config.json"
        )
    return known[name]


def _in_cache(model_id: str) -> Path | None:
    """The config.json of a downloaded model, found without importing huggingface_hub."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    folder = cache / f"models--{model_id.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    file = folder / "snapshots" / revision / "config.json"
    return file if file.is_file() else None


def _model_states(step: Step) -> int:
    lasting = {one.name: one.bytes for one in step.lasting}
    names = (
        "weights", "4-bit weights", "quantization constants", "weights that stay 16-bit or fp32",
        "adapters", "soft prompt", "optimizer states", "fp32 copies of trained weights",
    )  # fmt: skip
    gradients = sum(one.bytes for one in step.gradient_terms(1.0, "all"))
    return sum(lasting.get(name, 0) for name in names) + gradients


def _notes(arch: Architecture, options: Options) -> tuple[str, ...]:
    notes = list(arch.uncounted)
    if options.device == "cuda":
        notes.append(
            "allocated bytes only: the CUDA context (from 0.1 to over 1 GB) and the allocator's "
            "spare room come on top"
        )
    if options.loss_path == "shifted":
        notes.append(
            "loss_path='shifted' is the Trainer of transformers 4.46 to 4.48 and the highest; "
            "TRL 1.x and Liger use 'fused', which makes no logits of all tokens"
        )
    if options.method == "prefix" and options.gradient_checkpointing:
        notes.append("a recomputed layer drops the prefix: train it without checkpointing")
    notes += _notes_on_experts(arch, options)
    if arch.softcap_attention:
        notes.append("this model caps its attention scores, which sdpa cannot: eager was counted")
    if options.attention == "sdpa" and options.dtype == "fp32" and not options.autocast:
        notes.append("sdpa in fp32 is counted as a fused kernel; some GPUs fall back to eager")
    if options.fused and options.optimizer != "adamw":
        notes.append(f"fused has no meaning for {options.optimizer}")
    return tuple(notes)


def _notes_on_experts(arch: Architecture, options: Options) -> list[str]:
    if not arch.experts:
        return []
    if options.experts == "separate":
        return ["the busiest expert is taken to get twice an even share of the tokens"]
    notes = []
    if any(matrix.stacked for matrix in adapted_matrices(arch, options)):
        notes.append(
            "PEFT adapts stacked experts in a copy of all their weights, kept for backward, and "
            "without lora_dropout, which was counted as 0 (peft.tuners.lora.ParamWrapper): leaving "
            "the experts out of target_modules saves the copies"
        )
    if options.is_4_bit:
        left = "as they are"
        if options.kbit_prepared:
            left = "in 32 bits, which prepare_model_for_kbit_training makes of them"
        notes.append(
            "bitsandbytes quantizes linear layers only, which stacked experts are not: they were "
            f"counted {left} (bitsandbytes issue 1849)"
        )
    return notes
