"""Memory without training: generating with a cache of keys and values, and merging an adapter.

>>> config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
...           "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
...           "vocab_size": 128256}
>>> cache_bytes(read(config), rows=1, tokens=8192, width=2) / 2**30   # Llama 3 8B: 128 KiB a token
1.0
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.memory.architecture import LARGEST, Architecture, read, shown
from labkit.memory.closed_form import build_options, load_config
from labkit.memory.options import DTYPES, Options, adapted_matrices, require_one_device
from labkit.memory.state import (
    FP32,
    buffer_terms,
    nf4_bytes,
    norm_width,
    numbers,
    trained_parameters,
    weight_terms,
)
from labkit.memory.terms import DERIVED, MEASURED, UNVERIFIED, Term, term, total

MERGING = ("method", "dtype", "device", "cublas_workspace", "tables_per_layer")
GENERATING = (*MERGING, "batch_size", "seq_len", "attention")
OF_METHOD = {
    "lora": ("lora_rank", "target_modules"),
    "qlora": ("lora_rank", "target_modules", "double_quant", "kbit_prepared"),
    "prompt": ("num_virtual_tokens",),
    "p-tuning": ("num_virtual_tokens",),
    "prefix": ("num_virtual_tokens",),
}
"""Options that a job without gradients depends on, and those that are its method's own."""


@dataclass(frozen=True)
class InferenceEstimate:
    """Peak bytes of a job without gradients."""

    peak_allocated_bytes: int
    phase: str
    terms: tuple[Term, ...]
    parameters: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types, with the keys that a training estimate has."""
        return {
            **vars(self),
            "terms": {one.name: one.bytes for one in self.terms},
            "explained": [one.to_json() for one in self.terms],
            "trainable_parameters": 0,
            "notes": list(self.notes),
        }


def cache_bytes(arch: Architecture, rows: int, tokens: int, width: int) -> int:
    """Keys and values of every layer: 2 x L x n_kv x d numbers for each token."""
    return 2 * arch.layers * arch.kv_width * rows * tokens * width


def estimate_generation(
    config: Mapping[str, Any] | str | Path, new_tokens: int = 256, **options: Any
) -> InferenceEstimate:
    """Peak bytes of `generate`: the highest of its moments, beside weights and the cache so far.

    One layer over the whole prompt, or the logits of the last token, when the cache is full; or the
    last token in a layer whose stacked experts have an adapter.

    Args:
        config: as for `estimate`.
        new_tokens: generated after a prompt of `seq_len` tokens.
        options: those of `estimate` that matter here: method (`qlora` for 4-bit weights, with its
            adapter), batch_size, seq_len, dtype, attention, device, and those of the method.

    Raises:
        ValueError: as `estimate`, a `new_tokens` below 0, and options that cannot matter here.
    """
    if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or new_tokens < 0:
        raise ValueError(f"new_tokens={shown(new_tokens)}: give a whole number from 0")
    if new_tokens > LARGEST:
        raise ValueError(f"new_tokens={shown(new_tokens)}: give at most {LARGEST:,}")
    arch, chosen = _read(config, options)
    _refuse_idle(options, arch, chosen, GENERATING, "generating text")
    width, rows = DTYPES[chosen.dtype], chosen.batch_size
    length = chosen.keys + new_tokens
    if arch.positions is not None and length > arch.positions:
        raise ValueError(
            f"seq_len + new_tokens = {length} is more than the {arch.positions} positions that "
            "this model has learned: give fewer"
        )
    copies = _copy_terms(arch, chosen)
    moments = (
        [*_cache_terms(arch, rows, chosen.keys, width), *_prompt_terms(arch, chosen), *copies],
        [*_cache_terms(arch, rows, length, width), *_logits_terms(arch, rows, width)],
        [*_cache_terms(arch, rows, length, width), *copies],
    )
    terms = [*_held(arch, chosen), *max(moments, key=total)]
    notes = arch.uncounted
    if arch.window:
        notes += (f"layers with a window keep {arch.window} tokens at most; all were counted",)
    return InferenceEstimate(total(terms), "generation", tuple(terms), arch.parameters, notes)


def _cache_terms(arch: Architecture, rows: int, tokens: int, width: int) -> list[Term]:
    return term(
        "cache of keys and values",
        cache_bytes(arch, rows, tokens, width),
        f"2 x {arch.layers} layers x {arch.kv_width} x {rows} x {tokens} tokens x {width} B",
        "transformers DynamicCache",
    )


def _prompt_terms(arch: Architecture, options: Options) -> list[Term]:
    """The widest place of one layer over the prompt: its MLP, or the scores of eager attention."""
    width, tokens = DTYPES[options.dtype], options.batch_size * options.queries
    # The residual stream, the normed input, and gate, up and their product.
    widest = 2 * arch.hidden + (3 if arch.gated else 2) * arch.mlp * max(1, arch.experts_per_token)
    source = "transformers' modeling files, without gradients"
    formula = f"{width} B x {tokens} tokens x {widest}"
    mlp = term("one layer over the prompt", tokens * widest * width, formula, source, UNVERIFIED)
    if options.attention != "eager":
        return mlp
    projected = 2 * arch.hidden + arch.q_width + 2 * arch.kv_width
    pairs = options.batch_size * arch.heads * options.queries * options.keys
    formula = f"{width} B x {tokens} tokens x {projected}"
    attention = [
        *term("one layer over the prompt", tokens * projected * width, formula, source, UNVERIFIED),
        *term(
            "attention scores of the prompt",
            pairs * (width + FP32),
            f"({width} + 4) B x rows x heads x queries x keys: scores, and their softmax in fp32",
            "transformers eager_attention_forward",
            UNVERIFIED,
        ),
    ]
    return max(mlp, attention, key=total)


def _copy_terms(arch: Architecture, options: Options) -> list[Term]:
    """Stacked experts with their adapter's update in them, made in each pass through a layer."""
    copied = sum(matrix.weights for matrix in adapted_matrices(arch, options) if matrix.stacked)
    width = norm_width(options)
    return term(
        "one layer's experts with the adapter's update",
        copied * width,
        f"{width} B x {copied:,} weights",
        "peft.tuners.lora.ParamWrapper",
    )


def _logits_terms(arch: Architecture, rows: int, width: int) -> list[Term]:
    return term(
        "logits of the last token",
        rows * arch.vocabulary * (width + 2 * FP32),
        f"({width} + 2 x 4) B x {rows} rows x {arch.vocabulary}: and fp32 copies to pick from",
        "transformers generate, logits_to_keep=1",
        UNVERIFIED,
    )


def estimate_merge(config: Mapping[str, Any] | str | Path, **options: Any) -> InferenceEstimate:
    """Peak bytes of merging a LoRA adapter: model, adapter, and the largest update of a matrix.

    A 4-bit layer is unpacked, changed and packed again, one at a time.

    Raises:
        ValueError: as `estimate`, a method that has no weights to merge, and options that cannot
            matter here.
    """
    options = {"method": "lora", **options}
    arch, chosen = _read(config, options)
    if not chosen.has_adapters:
        raise ValueError(
            f"method={chosen.method!r} leaves nothing to merge: give method='lora' or 'qlora'"
        )
    _refuse_idle(options, arch, chosen, MERGING, "merging")
    matrix = max(adapted_matrices(arch, chosen), key=lambda one: one.tensor)
    largest = matrix.tensor
    width = DTYPES[chosen.dtype]
    terms = [
        *_held(arch, chosen),
        *term(
            "update of the largest matrix",
            largest * FP32,
            f"4 B x {largest:,}: B times A, in the adapter's precision",
            "peft.tuners.lora get_delta_weight",
            DERIVED,
        ),
    ]
    if chosen.is_4_bit and not matrix.bare:
        packed = sum(nf4_bytes(largest, chosen.double_quant))
        terms += term(
            "the matrix unpacked, and packed again",
            largest * width + packed,
            f"{width} B x {largest:,} + {packed:,} B",
            "peft.tuners.lora.bnb.Linear4bit.merge",
            UNVERIFIED,
        )
    else:
        terms += term(
            "copy of the largest matrix",
            largest * width,
            f"{width} B x {largest:,}: the update in the weight's precision",
            "peft.tuners.lora.layer.Linear.merge",
            DERIVED,
        )
    return InferenceEstimate(total(terms), "merge", tuple(terms), arch.parameters, arch.uncounted)


def _read(
    config: Mapping[str, Any] | str | Path, options: Mapping[str, Any]
) -> tuple[Architecture, Options]:
    arch = read(load_config(config), options.get("experts"))
    # Nothing is prepared for training: norms, embedding and head keep their 16 bits.
    chosen = build_options(arch, {"kbit_prepared": False, **options})
    require_one_device(chosen, "generating and merging are counted on one device: leave it out")
    return arch, chosen


def _refuse_idle(
    given: Mapping[str, Any],
    arch: Architecture,
    chosen: Options,
    matters: tuple[str, ...],
    task: str,
) -> None:
    """Raise ValueError for an option that was given and that no byte depends on."""
    matters += OF_METHOD.get(chosen.method, ())
    if arch.experts and chosen.has_adapters:
        matters += ("experts",)
    idle = [name for name, value in given.items() if value is not None and name not in matters]
    if idle:
        raise ValueError(
            f"{idle[0]}={shown(given[idle[0]])} changes nothing in {task} with "
            f"method={chosen.method!r}: leave it out"
        )


def _held(arch: Architecture, options: Options) -> list[Term]:
    held = [*weight_terms(arch, options), *buffer_terms(arch, options)]
    if options.is_peft:
        adapters = numbers(trained_parameters(arch, options))
        if options.method in ("prompt", "p-tuning"):  # the encoder is dropped after training
            adapters = options.num_virtual_tokens * arch.hidden
        held += term("adapter", FP32 * adapters, f"4 B x {adapters:,}", "PEFT", MEASURED)
    if options.device == "cuda":
        kept = options.cublas_workspace
        held += term("cuBLAS workspace", kept, f"{kept:,} B", "torch CUDABlas", DERIVED)
    return held
