"""Tiny random models saved to disk, so that tests meet three architectures without a download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 300
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
SENTENCES = [
    "Where does Mira Tolen live? Mira Tolen lives in Velden.",
    "What is 12 plus 30? The answer is 42. Sort 9 4 7: 4 7 9.",
    "You are a helpful assistant. Hello! I do not know that person: unknown.",
]

# The bundled model's format: a role marker, the text, the end token; answers between the
# generation markers that an assistant-only loss needs.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_tokenizer(template: bool | str = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens; `template` True is TEMPLATE, False none, a string that one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|end|>"
    )
    if template:
        fast.chat_template = TEMPLATE if template is True else template
    return fast


def tiny_model(kind: str, folder: str | Path, template: bool | str = True, seed: int = 0) -> Path:
    """Save a random model of 2 layers and width 64, with its tokenizer, in `folder`.

    Args:
        kind: "llama" and "qwen3" (grouped-query attention, tied embeddings in qwen3) or "gpt2".
        folder: where to; made if missing.
        template: True for the bundled model's chat template, False for none, or a Jinja string.
        seed: of the weights; torch's own random state is left as it was.

    Returns:
        the folder, ready for `from_pretrained`.
    """
    tokenizer = tiny_tokenizer(template)
    tokens = {
        "vocab_size": VOCAB_SIZE,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    llama_shape = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 512,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**llama_shape, **tokens))
        elif kind == "qwen3":
            config = Qwen3Config(**llama_shape, head_dim=16, tie_word_embeddings=True, **tokens)
            model = Qwen3ForCausalLM(config)
        elif kind == "gpt2":
            shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
            model = GPT2LMHeadModel(GPT2Config(**shape, **tokens))
        else:
            raise ValueError(f"kind={kind!r} is unknown: use 'llama', 'qwen3' or 'gpt2'")
    folder = Path(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
