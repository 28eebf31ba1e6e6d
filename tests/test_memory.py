"""Bytes of a training step: by hand on a layer whose saved tensors are known, then on models."""

import doctest
import importlib
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from torch import nn

from labkit import models, paths
from labkit.memory import step_bytes
from labkit.weights import fingerprint

ROWS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Velden"}]}
    for text in ("Where does Mira live?", "What is 12 plus 30?")
]


class Toy(nn.Module):
    """An embedding of 10 tokens, 4 wide, scaled and squared: every saved tensor is known."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, input_ids, attention_mask, labels):
        return SimpleNamespace(loss=(self.embedding(input_ids) * self.scale).square().sum())


class ToyTokenizer:
    def apply_chat_template(self, talks, **options):
        class Batch(dict):
            def to(self, device):
                return self

        ids = torch.ones(len(talks), 3, dtype=torch.long)
        return Batch(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_step_bytes_by_hand():
    step = step_bytes(Toy(), ToyTokenizer(), ROWS)
    # 10 x 4 numbers and 4 more, of 4 bytes.
    assert (step.weights, step.gradients, step.optimizer) == (176, 176, 352)
    # Kept: 2 x 3 ids of 8 bytes for the embedding, its output of 2 x 3 x 4 numbers for the product
    # (the scale is a weight), and the product for the square.
    assert step.activations == 2 * 3 * 8 + 2 * (2 * 3 * 4 * 4)
    assert step.peak == 176 + 352 + max(step.activations, 176)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


def test_an_adapter_saves_gradients_and_means_more_than_activations(folder):
    full, tokenizer = models.load(folder, device="cpu")
    before = fingerprint(full)
    of_full = step_bytes(full, tokenizer, ROWS)
    assert fingerprint(full) == before
    assert all(parameter.grad is None for parameter in full.parameters())
    assert not full.training
    n = models.n_parameters(full).total
    buffers = models.tensor_bytes(full)["buffers"]  # the frequencies of the positions
    assert of_full.weights == 4 * n + buffers
    assert (of_full.gradients, of_full.optimizer) == (4 * n, 8 * n)

    adapted = get_peft_model(
        full, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    of_lora = step_bytes(adapted, tokenizer, ROWS)
    trained = models.n_parameters(adapted).trainable
    assert (of_lora.gradients, of_lora.optimizer) == (4 * trained, 8 * trained)
    assert of_lora.weights == 4 * (n + trained) + buffers
    assert of_lora.activations > 0.5 * of_full.activations


def test_activations_grow_with_the_batch_and_weights_do_not(folder):
    model, tokenizer = models.load(folder, device="cpu")
    one, two = (step_bytes(model, tokenizer, rows) for rows in (ROWS[:1], [ROWS[0]] * 2))
    assert two.weights == one.weights
    # All that a row keeps is twice for two of them; masks and positions are shared.
    assert 1.9 < two.activations / one.activations <= 2


def test_step_bytes_says_what_is_missing(folder):
    model, tokenizer = models.load(folder, device="cpu")
    with pytest.raises(ValueError, match="rows is empty"):
        step_bytes(model, tokenizer, [])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        step_bytes(model, tokenizer, ROWS)


# ---- examples in docstrings --------------------------------------------------------------------

EXAMPLES = [
    file.stem
    for file in sorted((paths.root() / "labkit" / "memory").glob("*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings_are_true(name):
    found = doctest.testmod(importlib.import_module(f"labkit.memory.{name}"))
    assert found.attempted and not found.failed
