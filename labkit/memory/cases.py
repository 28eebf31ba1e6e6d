"""What `labkit measure --suite` measures: a fixed list for a CPU, and one for a GPU.

On a CPU models are small, since every byte is counted and none depends on the size of the machine.
On a GPU they have the size and shape of real ones. Each case changes one thing of a training that
people run; the first cases of a list matter most.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from labkit.memory import reference

_SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 688,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 512, "vocab_size": 1024}
SMALL: dict[str, dict[str, Any]] = {
    "small Llama": {"model_type": "llama", **_SMALL},
    "small Qwen3": {
        "model_type": "qwen3", **_SMALL, "head_dim": 32, "tie_word_embeddings": True,
    },
    "small GPT-2": {"model_type": "gpt2", **_GPT2, **_ENDS, "attn_pdrop": 0.0},
    "small GPT-2 with dropout": {"model_type": "gpt2", **_GPT2, **_ENDS},
    "small Mistral": {"model_type": "mistral", **_SMALL},
    "small Gemma 2": {"model_type": "gemma2", **_SMALL, "head_dim": 32},
    "small Phi-3": {"model_type": "phi3", **_SMALL, "pad_token_id": 0, **_ENDS},
    "small Mistral with a window": {"model_type": "mistral", **_SMALL, "sliding_window": 64},
    "small Gemma 3": {
        "model_type": "gemma3_text", **_SMALL, "head_dim": 32, "num_hidden_layers": 7,
        "sliding_window": 64,
    },
}  # fmt: skip
"""Shapes for a CPU: real families, four layers, a width of 256. Gemma 3 has seven: each sixth is
without a window."""


@dataclass(frozen=True)
class Case:
    """One step to be measured."""

    group: str
    model: str
    """A name of `config`."""
    usual: Mapping[str, Any]
    """Options that all cases of its list share, as `measure` takes them."""
    change: Mapping[str, Any]
    """Those that make this case: they are in its name."""
    quick: bool = False
    """Whether `--quick` measures it, too."""

    @property
    def options(self) -> dict[str, Any]:
        """All of them, `device` left out."""
        return {**self.usual, **self.change}

    @property
    def name(self) -> str:
        """The model and what makes the case, in words."""
        return ", ".join([self.model, *map(_words, self.change.items())])


_SPOKEN_ALONE = ("method", "objective", "dtype", "attention", "optimizer")


def _words(option: tuple[str, Any]) -> str:
    name, value = option
    if name in _SPOKEN_ALONE:
        return str(value)
    spoken = {"gradient_checkpointing": "checkpointing"}.get(name, name.replace("_", " "))
    if isinstance(value, bool):
        return spoken if value else f"no {spoken}"
    return f"{spoken} {value}"


def config(model: str) -> dict[str, Any]:
    """Keys of the config.json of a case's model.

    Raises:
        ValueError: no such model.
    """
    return dict(SMALL[model]) if model in SMALL else reference.model(model)


def cases(device: str) -> list[Case]:
    """The fixed list of a kind of device, `cpu` or `cuda`."""
    found = list(_on_cpu() if device == "cpu" else _on_gpu())
    names = [case.name for case in found]
    assert len(set(names)) == len(names), "two cases of one name"
    return found


# ---- CPU ---------------------------------------------------------------------------------------

_TODAY = {"loss_path": "padded", "reentrant": False}
"""What transformers 5 does."""
_CPU = {"dtype": "fp32", "batch_size": 4, "seq_len": 128, **_TODAY}


def _on_cpu() -> Iterator[Case]:
    for model in ("bundled", "small Llama", "small Qwen3", "small GPT-2"):
        for method in ("full", "lora", "qlora", "prefix", "freeze", "prompt", "p-tuning"):
            for again in (False, True):
                if method == "prefix" and again:
                    continue  # a layer that is computed again drops the prefix
                change = {"method": method, "gradient_checkpointing": again}
                quick = model == "small Llama" and method in ("full", "lora", "qlora")
                yield Case("methods", model, _CPU, change, quick)
    kept = {"method": "full", "gradient_checkpointing": False}
    for group, changes in _CPU_CHANGES.items():
        for number, change in enumerate(changes):
            yield Case(group, "small Llama", _CPU, kept | change, quick=number == 0)
    for model in SMALL:
        if model in ("small Llama", "small Qwen3", "small GPT-2"):  # all methods of them are above
            continue
        for method in ("full", "lora"):
            yield Case("families", model, _CPU, kept | {"method": method})
    two_kinds = {"method": "freeze", "gradient_checkpointing": False, "trainable_layers": 3}
    yield Case("families", "small Gemma 3", _CPU, two_kinds)
    yield Case("families", "small Gemma 2", _CPU, kept | {"gradient_checkpointing": True})
    for again in (False, True):  # a tied matrix gets two gradients, which wait for each other
        change = {"gradient_checkpointing": again, "accumulation_steps": 2}
        yield Case("tied", "small Qwen3", _CPU, {"method": "full"} | change)
    yield Case("tied", "small Qwen3", _CPU, kept | {"autocast": True})


_CPU_CHANGES: dict[str, tuple[dict[str, Any], ...]] = {
    "optimizers": (
        {"optimizer": "adamw-8bit"},
        {"optimizer": "sgd"},
        {"optimizer": "adafactor"},
        {"fused": True},
        {"method": "lora", "optimizer": "adamw-8bit"},
        {"accumulation_steps": 2},
    ),
    "precisions": (
        {"dtype": "bf16"},
        {"dtype": "fp16"},
        {"autocast": True},
        {"dtype": "bf16", "gradient_checkpointing": True},
        {"gradient_checkpointing": True, "reentrant": True},
        {"autocast": True, "gradient_checkpointing": True},
        {"method": "lora", "dtype": "bf16"},
        {"method": "lora", "autocast": True},
        {"method": "lora", "dtype": "bf16", "gradient_checkpointing": True},
        {"method": "lora", "dtype": "bf16", "gradient_checkpointing": True, "reentrant": True},
        {"method": "qlora", "dtype": "bf16"},
        {"method": "qlora", "dtype": "bf16", "gradient_checkpointing": True},
        {"method": "qlora", "dtype": "bf16", "kbit_prepared": False},
        {"method": "qlora", "double_quant": False},
        {"method": "prefix", "dtype": "bf16"},
    ),
    "attention": (
        {"attention": "eager"},
        {"dtype": "bf16", "attention": "eager"},
        {"padding": True},
    ),
    "adapters": (
        {"method": "lora", "lora_dropout": 0.0},
        {"method": "lora", "target_modules": "q_proj,v_proj"},
        {"method": "lora", "lora_rank": 4},
    ),
    "loss paths": (
        {"dtype": "bf16", "loss_path": "shifted"},
        {"dtype": "bf16", "loss_path": "upcast"},
        {"dtype": "bf16", "loss_path": "fused"},
        {"method": "lora", "loss_path": "fused"},
    ),
    "DPO": (
        {"objective": "dpo"},
        {"objective": "dpo", "precompute_reference": True},
        {"method": "lora", "objective": "dpo"},
        {"method": "lora", "objective": "dpo", "loss_path": "fused"},
    ),
}


# ---- GPU ---------------------------------------------------------------------------------------

_GPU = {"dtype": "bf16", **_TODAY}
_ATTENTION = "q_proj,k_proj,v_proj,o_proj"


def _on_gpu() -> Iterator[Case]:
    for row in reference.rows("bar"):  # sdpa runs the flash kernel, too
        again = {**row.options, "attention": "sdpa"}
        yield Case("public rows again", row.model, {}, again)
    for model in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B", "Meta-Llama-3-8B"):
        for method in ("full", "lora", "qlora"):
            change = {"method": method, "batch_size": 2, "seq_len": 2048}
            yield Case("methods", model, _GPU, change, quick=model == "Qwen2.5-0.5B")
    usual = {**_GPU, "batch_size": 2, "seq_len": 1024}
    for group, model, changes in _GPU_CHANGES:
        for number, change in enumerate(changes):
            quick = model == "Qwen2.5-0.5B" and number == 0
            yield Case(group, model, usual, {"method": "full"} | change, quick)


_GPU_CHANGES: tuple[tuple[str, str, tuple[dict[str, Any], ...]], ...] = (
    (
        "without checkpointing",
        "Qwen2.5-0.5B",
        tuple(
            {"method": method, "gradient_checkpointing": False}
            for method in ("full", "lora", "qlora", "prefix", "freeze", "prompt", "p-tuning")
        ),
    ),
    (
        "without checkpointing",
        "Mistral-7B-v0.1",
        tuple({"method": m, "gradient_checkpointing": False} for m in ("lora", "qlora")),
    ),
    (
        "optimizers",
        "Qwen2.5-1.5B",
        (
            {"optimizer": "adamw-8bit"},
            {"optimizer": "paged-adamw-8bit"},
            {"optimizer": "adafactor"},
            {"optimizer": "sgd"},
            {"fused": True},
            {"foreach": False},
            {"accumulation_steps": 2},
        ),
    ),
    (
        "precisions",
        "Qwen2.5-1.5B",
        (
            {"dtype": "fp16"},
            {"dtype": "fp32"},
            {"dtype": "fp32", "autocast": True},
            {"dtype": "fp32", "autocast": True, "gradient_checkpointing": False},
            {"method": "lora", "dtype": "fp16"},
            {"method": "lora", "autocast": True},
            {"method": "qlora", "dtype": "fp16"},
            {"method": "qlora", "kbit_prepared": False},
        ),
    ),
    (
        "attention",
        "Qwen2.5-0.5B",
        (
            {"attention": "eager"},
            {"attention": "eager", "gradient_checkpointing": False},
            {"padding": True, "gradient_checkpointing": False},
        ),
    ),
    (
        "loss paths",
        "Meta-Llama-3-8B",
        tuple({"method": "lora", "loss_path": path} for path in ("shifted", "upcast", "fused")),
    ),
    (
        "DPO",
        "Qwen2.5-1.5B",
        (
            {"objective": "dpo"},
            {"objective": "dpo", "precompute_reference": True},
            {"method": "lora", "objective": "dpo"},
            {"method": "lora", "objective": "dpo", "loss_path": "fused"},
        ),
    ),
    ("DPO", "Mistral-7B-v0.1", ({"method": "qlora", "objective": "dpo"},)),
    (
        "shapes",
        "Qwen2.5-1.5B",
        (
            {"method": "lora", "batch_size": 1, "seq_len": 16384},
            {"method": "lora", "batch_size": 32, "seq_len": 256},
            {"method": "lora", "lora_rank": 128},
            {"method": "lora", "target_modules": _ATTENTION, "lora_dropout": 0.0},
        ),
    ),
    ("shapes", "GPT-2", ({"batch_size": 8}, {"batch_size": 8, "gradient_checkpointing": False})),
    ("shapes", "Qwen3-0.6B", ({}, {"gradient_checkpointing": False})),
)
