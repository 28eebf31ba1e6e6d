"""A Hugging Face `config.json` read into shapes: every matrix of a decoder, and its parameters.

Only the keys of the file are read, with transformers' defaults where one is missing, so neither
torch nor transformers is imported. The tests count the same models as transformers builds them.

>>> llama = read({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
...               "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 300})
>>> llama.parameters == 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64 + 2 * 300 * 64
True
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

LARGEST = 10**12
"""No size or count is above it: more is a slip of the hand."""
EXPERTS = ("stacked", "separate")
"""All experts of a layer in two bare parameters, as transformers 5 has them, or each expert in
linear layers of its own, as transformers 4 had them."""
ROUTER = "gate"
"""What all families with experts call the matrix that sends tokens to them."""


def shown(value: Any) -> str:
    """A value as an error line shows it: short, whatever a file holds."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"(a number of {value.bit_length()} bits)"
    try:
        text = repr(value)
    except RecursionError:
        return f"(a deeply nested {type(value).__name__})"
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class Matrix:
    """A linear layer or bare parameter, as many times as a decoder layer has it."""

    name: str
    """As transformers calls it, which is also what `target_modules` names of a linear layer."""
    n_in: int
    n_out: int
    bias: bool = False
    copies: int = 1
    """More than one where a mixture of experts has one for each expert."""
    joins: tuple[str, ...] = ()
    """Of a bare parameter, as transformers 5 has routers and stacked experts: the linear layers of
    transformers 4 that it holds, by the names that PEFT still knows them under."""

    @property
    def bare(self) -> bool:
        """Whether it is no linear layer: bitsandbytes leaves it, and PEFT adapts a copy of it."""
        return bool(self.joins)

    @property
    def stacked(self) -> bool:
        """Whether it holds all experts of a layer in one tensor."""
        return self.bare and self.name != ROUTER

    @property
    def targets(self) -> tuple[str, ...]:
        """What `target_modules` calls it."""
        return self.joins or (self.name,)

    @property
    def tensor(self) -> int:
        """Numbers of one tensor: of all copies where they are stacked."""
        return self.n_in * self.n_out * (self.copies if self.stacked else 1)

    @property
    def weights(self) -> int:
        """Numbers of the matrix, biases left out; all copies."""
        return self.n_in * self.n_out * self.copies

    @property
    def parameters(self) -> int:
        """Numbers of the matrix and its bias; all copies."""
        return (self.n_in + self.bias) * self.n_out * self.copies


@dataclass(frozen=True)
class Architecture:
    """Shapes of a decoder-only model. All of its decoder layers are alike."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    """Width of the MLP; of one expert where there are experts."""
    vocabulary: int
    tied: bool
    """Whether the output head is the token embedding itself."""
    matrices: tuple[Matrix, ...]
    """Linear layers of one decoder layer, in the order of the forward pass."""
    norm: str = "rms"
    """`rms`, `rms_one_plus` (Gemma: multiplies by 1 + w in fp32) or `layer` (mean and bias too)."""
    norms: int = 2
    """Norms of one decoder layer that are as wide as the model."""
    qk_norm: bool = False
    """Whether queries and keys are normalised head by head."""
    activation: str = "silu"
    gated: bool = True
    """Whether the MLP multiplies two projections, as SwiGLU and GeGLU do."""
    parallel: bool = False
    """Whether attention and MLP read the same normalised input (Phi)."""
    rotary: bool = True
    rotary_parts: bool = False
    """Whether rotated and other parts of a head are joined again, which copies them (Phi)."""
    positions: int | None = None
    """Rows of a learned table of positions; None where positions are rotary."""
    made_for: int | None = None
    """Tokens of the longest row it was made for; None where the config does not say."""
    head_bias: bool = False
    experts: int = 0
    experts_per_token: int = 0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    softcap_logits: bool = False
    softcap_attention: bool = False
    window: int | None = None
    """Tokens that attention looks back in the layers that have a limit."""
    full_every: int = 0
    """Of so many layers the last one looks back without a limit; 0 where all have the window."""
    listed_local: tuple[bool, ...] = ()
    """Whether each layer has the window, where the config lists it."""
    dtype: str | None = None
    """Of the weights in the file, such as `bf16`; None where the config does not say."""
    uncounted: tuple[str, ...] = ()
    """What this reader saw and could not count, one sentence each."""

    def local_layers(self, first: int = 0, last: int | None = None) -> int:
        """How many of the layers from `first` to before `last`, all by default, have the window."""
        last = self.layers if last is None else last
        if not self.window or last <= first:
            return 0
        if self.listed_local:
            return sum(self.listed_local[first:last])
        every = self.full_every
        return last - first - (last // every - first // every if every else 0)

    @property
    def q_width(self) -> int:
        """Numbers of one token's queries, all heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Numbers of one token's keys, all heads together; values have as many."""
        return self.kv_heads * self.head_dim

    @property
    def norm_parameters(self) -> int:
        """Numbers of one norm over the model's width."""
        return self.hidden * (2 if self.norm == "layer" else 1)

    @property
    def layer_norm_parameters(self) -> int:
        """Numbers of all norms of one decoder layer."""
        return self.norms * self.norm_parameters + 2 * self.head_dim * self.qk_norm

    @property
    def layer_parameters(self) -> int:
        """Numbers of one decoder layer."""
        return sum(matrix.parameters for matrix in self.matrices) + self.layer_norm_parameters

    @property
    def embedding_parameters(self) -> int:
        """Numbers of the token embedding and of a learned table of positions."""
        return (self.vocabulary + (self.positions or 0)) * self.hidden

    @property
    def head_parameters(self) -> int:
        """Numbers of the output head; a tied one has none of its own but its bias."""
        return (not self.tied) * self.vocabulary * self.hidden + self.head_bias * self.vocabulary

    @property
    def quantized_weights(self) -> int:
        """Weights that bitsandbytes quantizes: those of all linear layers but the output head."""
        return self.layers * sum(matrix.weights for matrix in self.matrices if not matrix.bare)

    @property
    def bare_weights(self) -> int:
        """Weights of routers and stacked experts, which no linear layer holds."""
        return self.layers * sum(matrix.weights for matrix in self.matrices if matrix.bare)

    @property
    def parameters(self) -> int:
        """Numbers of the whole model; a tied matrix counts once."""
        return (
            self.layers * self.layer_parameters
            + self.norm_parameters
            + self.embedding_parameters
            + self.head_parameters
        )

    @property
    def largest_tensor(self) -> int:
        """Numbers of the largest single parameter, which some optimizers copy."""
        largest = max((matrix.tensor for matrix in self.matrices), default=0)
        return max(self.vocabulary * self.hidden, largest)


def read(config: Mapping[str, Any], experts: str | None = None) -> Architecture:
    """Shapes of the model that a Hugging Face configuration describes.

    Args:
        config: what `config.json` holds. A vision-language model's is read for its text part.
        experts: how a mixture of experts lays them out, one of `EXPERTS`; None is the first.

    Raises:
        ValueError: a size that is missing, not a whole number from 1, or does not fit another one.
    """
    if not isinstance(config, Mapping):
        raise ValueError(
            f"config is {type(config).__name__}, no JSON object: give what a config.json holds"
        )
    model_type = str(config.get("model_type") or "")
    if config.get("is_encoder_decoder") or model_type in _ENCODERS:
        raise ValueError(
            f"config: model_type={shown(model_type)} has an encoder, and decoder-only models are "
            "counted: give the config.json of a language model such as Llama or Qwen"
        )
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        if isinstance(inner.get("text_config"), Mapping):
            raise ValueError(
                "config: text_config holds another text_config: give the config.json of a "
                "decoder-only language model"
            )
        outer = str(config.get("model_type", "this model"))
        kept = {name: config[name] for name in _OUTER if name in config}
        text = _noting_quantization(read({**kept, **inner}, experts), config)
        note = f"{outer}: only the text part was counted, no image or audio encoder"
        return replace(text, uncounted=(note, *text.uncounted))
    family = _FAMILIES.get(model_type)
    if family is None:
        found = _unknown(config, model_type)
    else:
        found = _checked(family(_Config(config, model_type, experts != "separate")))
    return _noting_quantization(found, config)


def _noting_quantization(shape: Architecture, config: Mapping[str, Any]) -> Architecture:
    """The same shapes; a file whose weights are packed (GPTQ, AWQ, ...) is said to be."""
    packed = config.get("quantization_config")
    if not packed:
        return shape
    how = shown(packed.get("quant_method")) if isinstance(packed, Mapping) else shown(packed)
    note = f"quantization_config ({how}) was not read: weights count as method and dtype say"
    return replace(shape, uncounted=(note, *shape.uncounted))


_ENCODERS = {
    "albert", "bart", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra",
    "longformer", "mbart", "modernbert", "mpnet", "mt5", "pegasus", "roberta", "t5", "umt5",
    "whisper", "xlm-roberta",
}  # fmt: skip
_WINDOWS = {
    "mistral": (4096, 0), "mixtral": (None, 0), "phi3": (None, 0), "gemma2": (4096, 2),
    "gemma3_text": (4096, 6),
}  # fmt: skip
"""Families with local attention -> (window of a config without one, layers of which the last has
none): as transformers' configuration classes have them."""
_LAYER_TYPES = ("sliding_attention", "full_attention")
_OUTER = ("tie_word_embeddings", "torch_dtype", "dtype")
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class _Config:
    """Keys of a configuration, checked as they are read."""

    def __init__(self, values: Mapping[str, Any], model_type: str, stacked: bool = True) -> None:
        self.values, self.model_type, self.stacked = values, model_type, stacked

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number from 1; None in the file is the default."""
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(
                f"config has no {name!r}, which model_type={self.model_type!r} needs: "
                "give the config.json of a decoder-only language model"
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"config: {name}={shown(value)}: give a whole number from 1")
        if value > LARGEST:
            raise ValueError(f"config: {name}={shown(value)}: give at most {LARGEST:,}")
        return value

    def optional(self, name: str) -> int | None:
        return None if self.values.get(name) is None else self.size(name)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        return default if value is None else bool(value)

    def text(self, name: str, default: str) -> str:
        return str(self.values.get(name) or default)

    def share(self, name: str, default: float = 0.0) -> float:
        """From 0 to below 1, as dropout rates are; None in the file is the default."""
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"config: {name}={shown(value)}: give a share from 0 to below 1")
        return float(value)

    def local_attention(self) -> dict[str, Any]:
        """The window of local attention, and which layers have it."""
        if self.model_type not in _WINDOWS:  # Qwen writes one into its files and does not use it
            return {}
        usual, full_every = _WINDOWS[self.model_type]
        window = self.optional("sliding_window") if "sliding_window" in self.values else usual
        if not full_every:
            return {"window": window}
        if self.model_type.startswith("gemma3"):  # Gemma 2 does not read it
            full_every = self.size("sliding_window_pattern", full_every)
        return {
            "window": window,
            "full_every": full_every,
            "listed_local": tuple(kind == "sliding_attention" for kind in self.layer_types()),
        }

    def layer_types(self) -> list[str]:
        """The kind of each layer's attention; empty where the config lists none."""
        kinds = self.values.get("layer_types")
        if kinds is None:
            return []
        if not isinstance(kinds, list) or not set(map(str, kinds)) <= set(_LAYER_TYPES):
            raise ValueError(
                f"config: layer_types={shown(kinds)}: give a list of {' and '.join(_LAYER_TYPES)}"
            )
        layers = self.size("num_hidden_layers")
        if len(kinds) != layers:
            raise ValueError(
                f"config: layer_types has {len(kinds)} entries, and num_hidden_layers is {layers}: "
                "give one for each layer"
            )
        return kinds

    def common(self, tied: bool) -> dict[str, Any]:
        """Fields that every family reads alike; `tied` is the family's own default."""
        hidden, heads = self.size("hidden_size"), self.size("num_attention_heads")
        return {
            "model_type": self.model_type,
            "layers": self.size("num_hidden_layers"),
            "hidden": hidden,
            "heads": heads,
            "kv_heads": self.size("num_key_value_heads", heads),
            "head_dim": self.size("head_dim", max(1, hidden // heads)),
            "mlp": self.size("intermediate_size"),
            "vocabulary": self.size("vocab_size"),
            "tied": self.flag("tie_word_embeddings", tied),
            "activation": self.text("hidden_act", "silu"),
            "attention_dropout": self.share("attention_dropout"),
            "made_for": self.optional("max_position_embeddings"),
            **self.local_attention(),
            "dtype": self.dtype(),
        }

    def dtype(self) -> str | None:
        name = str(self.values.get("dtype") or self.values.get("torch_dtype") or "")
        return _DTYPES.get(name.removeprefix("torch."))


# ---- families ----------------------------------------------------------------------------------


def _attention(
    base: Mapping[str, Any], bias: bool = False, out_bias: bool | None = None, out: str = "o_proj"
) -> tuple[Matrix, ...]:
    """Queries, keys, values and output of grouped-query attention."""
    hidden, head = base["hidden"], base["head_dim"]
    q, kv = base["heads"] * head, base["kv_heads"] * head
    return (
        Matrix("q_proj", hidden, q, bias),
        Matrix("k_proj", hidden, kv, bias),
        Matrix("v_proj", hidden, kv, bias),
        Matrix(out, q, hidden, bias if out_bias is None else out_bias),
    )


def _gated_mlp(base: Mapping[str, Any], bias: bool = False) -> tuple[Matrix, ...]:
    hidden, mlp = base["hidden"], base["mlp"]
    return (
        Matrix("gate_proj", hidden, mlp, bias),
        Matrix("up_proj", hidden, mlp, bias),
        Matrix("down_proj", mlp, hidden, bias),
    )


def _llama(c: _Config) -> Architecture:
    base = c.common(tied=False)
    attention = _attention(base, c.flag("attention_bias"))
    return Architecture(**base, matrices=attention + _gated_mlp(base, c.flag("mlp_bias")))


def _mistral(c: _Config) -> Architecture:
    base = c.common(tied=False)
    base["kv_heads"] = c.size("num_key_value_heads", 8)
    return Architecture(**base, matrices=_attention(base) + _gated_mlp(base))


def _qwen2(c: _Config) -> Architecture:
    base = c.common(tied=False)
    base["kv_heads"] = c.size("num_key_value_heads", 32)
    matrices = _attention(base, bias=True, out_bias=False) + _gated_mlp(base)
    return Architecture(**base, matrices=matrices)


def _qwen3(c: _Config) -> Architecture:
    base = c.common(tied=False)
    base["head_dim"] = c.size("head_dim", 128)
    base["kv_heads"] = c.size("num_key_value_heads", 32)
    matrices = _attention(base, c.flag("attention_bias")) + _gated_mlp(base)
    return Architecture(**base, matrices=matrices, qk_norm=True)


def _gemma(c: _Config) -> Architecture:
    base = c.common(tied=True)
    base["head_dim"] = c.size("head_dim", 256)
    base["kv_heads"] = c.size("num_key_value_heads", {"gemma": 16}.get(c.model_type, 4))
    # The first generation's files carry two names for the activation; the code reads this one.
    base["activation"] = c.text(
        "hidden_activation", c.text("hidden_act", "gelu_pytorch_tanh")
    ).replace("gelu_pytorch_tanh", "gelu")
    later = c.model_type != "gemma"
    logits = c.values.get("final_logit_softcapping", 30.0 if c.model_type == "gemma2" else None)
    attention = c.values.get("attn_logit_softcapping", 50.0 if c.model_type == "gemma2" else None)
    return Architecture(
        **base,
        matrices=_attention(base, c.flag("attention_bias")) + _gated_mlp(base),
        norm="rms_one_plus",
        norms=4 if later else 2,  # the later generations also normalise each block's output
        qk_norm=c.model_type.startswith("gemma3"),
        softcap_logits=bool(logits),
        softcap_attention=bool(attention),
    )


def _phi3(c: _Config) -> Architecture:
    base = c.common(tied=False)
    hidden, mlp, head = base["hidden"], base["mlp"], base["head_dim"]
    q, kv = base["heads"] * head, base["kv_heads"] * head
    matrices = (
        Matrix("qkv_proj", hidden, q + 2 * kv),
        Matrix("o_proj", q, hidden),
        Matrix("gate_up_proj", hidden, 2 * mlp),
        Matrix("down_proj", mlp, hidden),
    )
    return Architecture(
        **base, matrices=matrices, rotary_parts=True, residual_dropout=c.share("resid_pdrop")
    )


def _phi(c: _Config) -> Architecture:
    base = c.common(tied=False)
    base["activation"] = c.text("hidden_act", "gelu_new")
    hidden, mlp = base["hidden"], base["mlp"]
    unread = ("phi: qk_layernorm was not counted",) if c.flag("qk_layernorm") else ()
    return Architecture(
        **base,
        matrices=(
            *_attention(base, bias=True, out="dense"),
            Matrix("fc1", hidden, mlp, True),
            Matrix("fc2", mlp, hidden, True),
        ),
        norm="layer",
        norms=1,
        gated=False,
        parallel=True,
        rotary_parts=True,
        head_bias=True,
        residual_dropout=c.share("resid_pdrop"),
        embedding_dropout=c.share("embd_pdrop"),
        uncounted=unread,
    )


def _gpt2(c: _Config) -> Architecture:
    hidden, heads = c.size("n_embd", 768), c.size("n_head", 12)
    mlp = c.size("n_inner", 4 * hidden)
    return Architecture(
        model_type=c.model_type,
        layers=c.size("n_layer", 12),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=max(1, hidden // heads),
        mlp=mlp,
        vocabulary=c.size("vocab_size", 50257),
        tied=c.flag("tie_word_embeddings", True),
        matrices=(
            Matrix("c_attn", hidden, 3 * hidden, True),
            Matrix("c_proj", hidden, hidden, True),
            Matrix("c_fc", hidden, mlp, True),
            Matrix("c_proj", mlp, hidden, True),
        ),
        norm="layer",
        activation=c.text("activation_function", "gelu_new"),
        gated=False,
        rotary=False,
        positions=c.size("n_positions", 1024),
        residual_dropout=c.share("resid_pdrop", 0.1),
        embedding_dropout=c.share("embd_pdrop", 0.1),
        attention_dropout=c.share("attn_pdrop", 0.1),
        dtype=c.dtype(),
    )


def _experts(
    base: Mapping[str, Any], names: tuple[str, str, str], experts: int, stacked: bool
) -> tuple[Matrix, ...]:
    """Router and experts, which transformers 5 stacks: (experts, out, in), gate and up joined."""
    hidden, mlp = base["hidden"], base["mlp"]
    gate, up, down = names
    if stacked:
        return (
            Matrix(ROUTER, hidden, experts, joins=(ROUTER,)),
            Matrix("gate_up_proj", hidden, 2 * mlp, copies=experts, joins=(gate, up)),
            Matrix("down_proj", mlp, hidden, copies=experts, joins=(down,)),
        )
    return (
        Matrix(ROUTER, hidden, experts),
        Matrix(gate, hidden, mlp, copies=experts),
        Matrix(up, hidden, mlp, copies=experts),
        Matrix(down, mlp, hidden, copies=experts),
    )


def _mixtral(c: _Config) -> Architecture:
    base = c.common(tied=False)
    base["kv_heads"] = c.size("num_key_value_heads", 8)
    experts = c.size("num_local_experts", 8)
    return Architecture(
        **base,
        matrices=_attention(base) + _experts(base, ("w1", "w3", "w2"), experts, c.stacked),
        experts=experts,
        experts_per_token=c.size("num_experts_per_tok", 2),
    )


def _qwen3_moe(c: _Config) -> Architecture:
    base = c.common(tied=False)
    # Unlike Qwen3, this one has no default of its own: the width is split over the heads.
    base["kv_heads"] = c.size("num_key_value_heads", 4)
    base["mlp"] = c.size("moe_intermediate_size", 768)
    experts = c.size("num_experts", c.optional("num_local_experts") or 128)
    names = ("gate_proj", "up_proj", "down_proj")
    attention = _attention(base, c.flag("attention_bias"))
    unread = ()
    if c.size("decoder_sparse_step", 1) != 1 or c.values.get("mlp_only_layers"):
        unread = ("qwen3_moe: layers without experts were counted as layers with them",)
    return Architecture(
        **base,
        matrices=attention + _experts(base, names, experts, c.stacked),
        qk_norm=True,
        experts=experts,
        experts_per_token=c.size("num_experts_per_tok", 8),
        uncounted=unread,
    )


_FAMILIES: dict[str, Callable[[_Config], Architecture]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma": _gemma,
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "phi": _phi,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "mixtral": _mixtral,
}


def _unknown(config: Mapping[str, Any], model_type: str) -> Architecture:
    """A model of another family, counted as a Llama of the same sizes, and said so."""
    name = model_type or "unnamed"
    try:
        read_as_llama = _checked(_llama(_Config(config, "llama")))
    except ValueError as error:
        raise ValueError(
            f"model_type={name!r} is no family that is known here ({', '.join(_FAMILIES)}), and "
            f"its config does not read as a Llama's: {error}"
        ) from error
    known = _LLAMA_KEYS | {"architectures", "auto_map", "model_type", *_OUTER}
    unread = sorted(
        key
        for key, value in config.items()
        if key not in known and isinstance(value, int | float | list | dict) and value
        if not key.endswith(("_token_id", "_range", "_std", "_eps"))
    )
    note = f"model_type={name!r} is unknown: counted as a Llama of the same sizes"
    if unread:
        note += f"; not counted: whatever {', '.join(unread[:8])} stand for"
    return replace(read_as_llama, model_type=name, uncounted=(note,))


_LLAMA_KEYS = {
    "attention_bias", "attention_dropout", "head_dim", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "mlp_bias",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pretraining_tp",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "transformers_version",
    "use_cache", "vocab_size",
}  # fmt: skip


def _checked(shape: Architecture) -> Architecture:
    """The same shapes, unless attention cannot be made of them."""
    if shape.heads > shape.hidden and shape.head_dim == 1:
        raise ValueError(
            f"config: num_attention_heads={shape.heads} is more than hidden_size={shape.hidden}: "
            "give head_dim, or fewer heads"
        )
    if shape.heads % shape.kv_heads:
        raise ValueError(
            f"config: num_attention_heads={shape.heads} is no multiple of "
            f"num_key_value_heads={shape.kv_heads}: every key head serves as many query heads"
        )
    if shape.q_width < shape.hidden and shape.hidden % shape.heads:
        raise ValueError(
            f"config: hidden_size={shape.hidden} is no multiple of num_attention_heads="
            f"{shape.heads}: give head_dim, or sizes that divide"
        )
    if shape.rotary and not shape.rotary_parts and shape.head_dim % 2:
        raise ValueError(
            f"config: head_dim={shape.head_dim} is odd, and rotary positions turn numbers in pairs:"
            f" give an even head_dim (hidden_size / num_attention_heads where it is not given)"
        )
    if shape.experts_per_token > shape.experts:
        raise ValueError(
            f"config: num_experts_per_tok={shape.experts_per_token} of {shape.experts} experts: "
            "a token cannot go to more experts than there are"
        )
    return shape
