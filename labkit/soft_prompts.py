"""What a trained prompt needs: its numbers, by formula, and a trainer that does not drop it.

All three freeze the model and train vectors that no token has. They differ in where the vectors
enter: before the first layer (prompt tuning, and P-tuning through an encoder), or as keys and
values of every layer (prefix tuning, which P-tuning v2 is).
"""

from dataclasses import dataclass
from typing import get_args

from peft import (
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
)
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

SoftPromptConfig = PromptTuningConfig | PromptEncoderConfig | PrefixTuningConfig


@dataclass(frozen=True)
class PromptSize:
    """Numbers of a soft prompt."""

    trained: int
    """While it is trained, an encoder or projection included."""
    kept: int
    """In the file afterwards: the encoder's output is stored, the encoder is dropped."""


def soft_prompt_size(model: PreTrainedModel, config: SoftPromptConfig) -> PromptSize:
    """What PEFT will train and keep in a decoder-only model, before it builds anything.

    The configuration leaves the model's shape to PEFT (`token_dim`, `num_layers` and their like).

    With V virtual tokens, model width H, encoder width E, L layers and keys and values of width K
    (all heads together; smaller than H where heads are shared):

    - prompt tuning (Lester et al. 2021): V x H
    - P-tuning (Liu et al. 2021): V x H, and an encoder over it: three linear layers
      H -> E -> E -> H, or `encoder_num_layers` two-way LSTM layers and two linear ones
    - prefix tuning (Li and Liang 2021): V x 2 x L x K; with a projection V x K, and two linear
      layers K -> E -> 2 x L x K

    Raises:
        ValueError: no virtual tokens, or as many as the model has positions, or more.
        TypeError: a configuration of another method.
    """
    if type(config) not in get_args(SoftPromptConfig):  # a subclass is another method
        raise TypeError(
            f"{type(config).__name__} is no soft prompt counted here: give a PromptTuningConfig, a "
            "PromptEncoderConfig (P-tuning) or a PrefixTuningConfig"
        )
    shape = model.config.get_text_config()
    n = config.num_virtual_tokens
    if not n or n < 1:
        raise ValueError(f"num_virtual_tokens={n}: a soft prompt needs 1 or more")
    positions = getattr(shape, "max_position_embeddings", None)
    if positions is not None and n >= positions:
        raise ValueError(
            f"num_virtual_tokens={n} leaves no room for text: the model has {positions:,} positions"
        )
    if isinstance(config, PrefixTuningConfig):
        return _prefix_size(shape, config, n)
    hidden = shape.hidden_size
    if isinstance(config, PromptEncoderConfig):
        return PromptSize(n * hidden + _encoder_size(hidden, config), n * hidden)
    return PromptSize(n * hidden, n * hidden)


def check_training(config: SoftPromptConfig, args: TrainingArguments) -> None:
    """Raise unless a trainer with these arguments can train this soft prompt.

    A prefix is handed to the model as a cache of keys and values, and a layer that recomputes its
    activations sets its cache aside. In the training step the attention mask is then longer than
    the text by the virtual tokens, and torch reports two sizes that do not match.

    Raises:
        ValueError: prefix tuning with activation checkpointing, which TRL turns on by default.
    """
    if isinstance(config, PrefixTuningConfig) and args.gradient_checkpointing:
        raise ValueError(
            "activation_checkpointing=True (gradient_checkpointing in older code) with prefix "
            "tuning: a layer that is recomputed drops the prefix; SFTConfig turns it on unless you "
            "give activation_checkpointing=False"
        )


def _prefix_size(shape: PretrainedConfig, config: PrefixTuningConfig, n: int) -> PromptSize:
    width, layers = key_width(shape), shape.num_hidden_layers
    kept = n * 2 * layers * width
    if not config.prefix_projection:
        return PromptSize(kept, kept)
    encoder = config.encoder_hidden_size or width
    projection = _linear(width, encoder) + _linear(encoder, 2 * layers * width)
    return PromptSize(n * width + projection, kept)


def key_width(shape: PretrainedConfig) -> int:
    """Numbers of one token's keys in one layer, over all heads."""
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return head * getattr(shape, "num_key_value_heads", shape.num_attention_heads)


def _encoder_size(hidden: int, config: PromptEncoderConfig) -> int:
    width = config.encoder_hidden_size or hidden
    if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.MLP:
        return _linear(hidden, width) + _linear(width, width) + _linear(width, hidden)
    lstm = 0
    for layer in range(config.encoder_num_layers):
        n_in = hidden if layer == 0 else 2 * width  # later layers read both directions
        # Four gates, each with weights from the input and from the state, and two biases.
        lstm += 2 * 4 * width * (n_in + width + 2)
    return lstm + _linear(2 * width, 2 * width) + _linear(2 * width, hidden)


def _linear(n_in: int, n_out: int) -> int:
    """Weights and biases of a linear layer."""
    return n_in * n_out + n_out
