"""Perplexity: how many tokens a model hesitates between, exp of the mean loss a token.

perplexity = exp( -(1/T) * sum over the T tokens of all texts of log p(token | tokens before) )

A model that gives every token of a vocabulary of V the same chance has perplexity V. One text at a
time, with the model's own loss; `labkit.evaluation.neutral_text_loss` gives the same in batches.
"""

import math

import datasets
import evaluate


def text_loss(model, tokenizer, text: str) -> tuple[float, int]:
    """Loss of a text in nats, summed over its tokens, and their number.

    Raises:
        ValueError: a text too short to predict a token.
    """
    import torch

    ids = list(tokenizer(text)["input_ids"])
    # The first word is predicted too where the tokenizer has a begin token to put before it.
    if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    if len(ids) < 2:
        raise ValueError(f"predictions holds {text!r}: too short to predict a token")
    batch = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        mean = model(input_ids=batch, labels=batch).loss.item()
    return mean * (len(ids) - 1), len(ids) - 1


class Perplexity(evaluate.Metric):
    """`compute(predictions=texts, model=, tokenizer=)`: perplexity, nats_per_token, n_tokens."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Perplexity of texts under a causal language model that is already loaded.",
            citation="",
            inputs_description="predictions: texts; model, tokenizer: loaded, model.eval() called.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model, tokenizer):
        if model.training:
            raise ValueError("model is in training mode, where dropout changes the loss: eval() it")
        losses = [text_loss(model, tokenizer, text) for text in predictions]
        nats, n_tokens = (sum(column) for column in zip(*losses, strict=True))
        mean = nats / n_tokens
        return {"perplexity": math.exp(mean), "nats_per_token": mean, "n_tokens": n_tokens}
