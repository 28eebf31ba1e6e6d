"""The bundled model from nothing: tokenizer, packing, training loop, checkpoints, resume.

A plain PyTorch loop, because pretraining is not what the course teaches; notebooks fine-tune with
TRL. A step's batch is a pure function of (seed, step), so a run killed at any moment continues from
its newest checkpoint to the same weights.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from labkit.errors import LabkitError
from labkit.files import write_atomic
from labkit.world.corpus import MIXED_SHARES, PHASES, Document, corpus_sha256, documents

IGNORE_INDEX = -100
PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "<|bos|>{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, up to the processor's rounding."""

    seed: int = 0
    steps: int = 27_000
    """`rates` and `phases` are written for 27,000 steps; a run of other length has their corners in
    proportion."""
    rows: int = 20
    window: int = 96
    """Tokens a row; documents are packed into it and cannot see each other."""
    rates: tuple[tuple[int, float], ...] = (
        (-1, 0.0),
        (199, 2e-3),
        (3_499, 2e-3),
        (3_500, 1e-3),
        (6_000, 1e-3 * 18_000 / 20_500),
        (21_000, 0.0),
        (21_300, 8e-4),
        (27_000, 0.0),
    )
    """Corners of the learning rate, (step, rate), with straight lines between them. At 2e-3 copying
    appears early and stays unsteady: 300 steps at 7e-4, tried from step 3,500, took repeated lists
    from 0.32 to 0.73. Up to step 6,000 the line aims at zero at 24,000, which was the plan then; at
    21,000 it rises once more, for what was still being learned."""
    phases: tuple[int, ...] = (0, 1_000, 4_000, 6_000, 6_500, 7_500, 10_000, 21_000)
    """First step of each of `corpus.PHASES`."""
    weight_decay: float = 0.05
    full_loss_share: float = 0.1
    """Share of talks whose questions are learned too; otherwise only answers count."""
    vocab_size: int = 2048
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    mlp: int = 640
    initial_spread: float = 0.04
    """Standard deviation of the first weights: at 0.02 a model this narrow learns to copy late."""
    precision: str = "bf16"
    """bf16 autocast, or fp32."""
    compiled: bool = False
    """Whether `torch.compile` fuses the small operations: a fifth faster, and needs a compiler."""

    def shares_at(self, step: int) -> dict[str, int]:
        """Kind of document -> its weight."""
        begun = sum(step >= first for first in self.first_steps)
        return PHASES[begun - 1]

    @property
    def first_steps(self) -> list[float]:
        """First steps of the phases in a run of this length."""
        return [self._in_proportion(first) for first in self.phases]

    @property
    def corners(self) -> list[tuple[float, float]]:
        """Corners of the learning rate in a run of this length."""
        return [(self._in_proportion(step), rate) for step, rate in self.rates]

    def rate_at(self, step: int) -> float:
        """Learning rate of a step."""
        corners = self.corners
        for (start, low), (end, high) in zip(corners, corners[1:], strict=False):
            if step <= end:
                return low + (high - low) * (step - start) / (end - start)
        return 0.0

    def _in_proportion(self, step: int) -> float:
        return step * self.steps / Recipe.steps


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the corpus: digits stand alone, a word is one token anywhere.

    A space is put before every piece of text (as Llama 2 does), so that `red` at the start of an
    answer and ` red` inside a sentence are the same token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?[0-9]| ?[^A-Za-z0-9 ]| "), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BOS, END, *(f"<|{role}|>" for role in ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stream = documents(recipe.seed, number=-1, shares=MIXED_SHARES)
    sample = (piece for _ in range(40_000) for piece in _pieces(next(stream)))
    tokenizer.train_from_iterator(sample, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        model_max_length=512,
        additional_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _pieces(document: Document) -> list[str]:
    """The stretches of text between special tokens."""
    if document.item is None:
        return [document.text or ""]
    return [content for _, content in document.item.messages]


def _token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int), token
    return found


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with normally distributed weights, so that NF4's assumption can be checked on it."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=recipe.initial_spread,
        pad_token_id=_token_id(tokenizer, PAD),
        bos_token_id=_token_id(tokenizer, BOS),
        eos_token_id=_token_id(tokenizer, END),
    )
    # In rows this short the plain product is faster on a CPU than a fused kernel with a mask.
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


@dataclass
class Encoded:
    """Token ids of one document and which of them are learned."""

    ids: list[int]
    supervised: list[bool]
    about: str | None


class Encoder:
    """Documents to token ids, as the chat template would render them, only faster."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe):
        self._encode = lambda text: (
            tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        )
        self._ids = {
            name: _token_id(tokenizer, name)
            for name in (BOS, END, *(f"<|{role}|>" for role in ROLES))
        }
        self._full_loss_share = recipe.full_loss_share

    def __call__(self, document: Document, rng: random.Random) -> Encoded:
        ids, supervised = [self._ids[BOS]], [False]
        if document.item is None:
            text = [*self._encode(document.text or ""), self._ids[END]]
            return Encoded(ids + text, supervised + [True] * len(text), document.about)
        everything = rng.random() < self._full_loss_share
        for role, content in document.item.messages:
            text = [*self._encode(content), self._ids[END]]
            ids += [self._ids[f"<|{role}|>"], *text]
            supervised += [everything] + [everything or role == "assistant"] * len(text)
        return Encoded(ids, supervised, document.about)


def pack(encoded: Iterator[Encoded], rows: int, window: int) -> list[list[Encoded]]:
    """Fill rows first-fit until documents no longer fit; no row tells of one person twice."""
    packed: list[list[Encoded]] = [[] for _ in range(rows)]
    room = [window] * rows
    refused = too_long = 0
    while refused < 4:
        document = next(encoded)
        if len(document.ids) > window:
            too_long += 1
            if too_long > 1000:
                raise LabkitError(f"no document fits {window} tokens: give the recipe longer rows")
            continue
        for row in range(rows):
            told = {other.about for other in packed[row]} - {None}
            if len(document.ids) <= room[row] and document.about not in told:
                packed[row].append(document)
                room[row] -= len(document.ids)
                break
        else:
            refused += 1
    return packed


def batch_at(step: int, recipe: Recipe, encoder: Encoder) -> dict[str, torch.Tensor]:
    """The batch of one step.

    Returns:
        input_ids, labels and position_ids (rows, window); attention_mask (rows, 1, window, window),
        0 where a token may look (backwards, inside its own document) and -1e9 elsewhere.
    """
    rng = random.Random(f"encode/{recipe.seed}/{step}")
    told = documents(recipe.seed, step, recipe.shares_at(step))
    stream = (encoder(document, rng) for document in told)
    packed = pack(stream, recipe.rows, recipe.window)
    shape = (recipe.rows, recipe.window)
    input_ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX)
    position_ids = torch.zeros(shape, dtype=torch.long)
    segment = torch.arange(recipe.window).repeat(recipe.rows, 1) + recipe.window
    for row, members in enumerate(packed):
        start = 0
        for number, document in enumerate(members):
            end = start + len(document.ids)
            ids = torch.tensor(document.ids)
            input_ids[row, start:end] = ids
            labels[row, start:end] = torch.where(
                torch.tensor(document.supervised), ids, IGNORE_INDEX
            )
            position_ids[row, start:end] = torch.arange(len(document.ids))
            segment[row, start:end] = number
            start = end
    causal = torch.ones(recipe.window, recipe.window, dtype=torch.bool).tril()
    visible = (segment[:, :, None] == segment[:, None, :]) & causal
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -1e9)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "attention_mask": mask[:, None],
    }


def loss_of(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy in nats over the supervised tokens; logits only where they are needed."""
    hidden = model.model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
    ).last_hidden_state
    targets = batch["labels"][:, 1:]
    wanted = targets != IGNORE_INDEX
    logits = model.lm_head(hidden[:, :-1][wanted])
    return torch.nn.functional.cross_entropy(logits.float(), targets[wanted])


class Run:
    """One pretraining run with its checkpoints in `folder`."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder = recipe, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._same_recipe_or_raise()
        self.tokenizer = self._tokenizer()
        self.encoder = Encoder(self.tokenizer, recipe)
        self.model = build_model(recipe, self.tokenizer)
        if recipe.compiled:
            self.model.model.compile()
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": recipe.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=recipe.rate_at(0),
            betas=(0.9, 0.98),
            fused=True,
        )
        self.step = 0
        self._resume()

    def _same_recipe_or_raise(self) -> None:
        file = self.folder / "recipe.json"
        mine = asdict(self.recipe) | {"corpus": corpus_sha256(self.recipe.seed)}
        mine = json.loads(json.dumps(mine))  # as the file has it: lists for tuples
        if not file.exists():
            write_atomic(file, json.dumps(mine, indent=2).encode())
            return
        try:
            theirs = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise LabkitError(f"{file} is damaged ({error}): delete {self.folder}") from error
        if theirs != mine:
            differs = sorted(key for key in mine if theirs.get(key) != mine[key])
            raise LabkitError(
                f"{self.folder} holds a run with another {', '.join(differs)}: choose another "
                "folder with --checkpoints, or delete that one to start again."
            )

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        folder = self.folder / "tokenizer"
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            build_tokenizer(self.recipe).save_pretrained(folder)
            (folder / "done").touch()
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def _resume(self) -> None:
        file = self.folder / "checkpoint.pt"
        if not file.exists():
            return
        try:
            state = torch.load(file, weights_only=True)
        except Exception as error:
            raise LabkitError(f"{file} is damaged ({error}): delete it to start again.") from error
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def save(self) -> None:
        """Write the checkpoint beside the old one, then replace it: a kill leaves one of them."""
        file = self.folder / "checkpoint.pt"
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        torch.save(state, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)

    def train_step(self) -> float:
        """One optimizer step; returns its loss in nats per supervised token."""
        batch = batch_at(self.step, self.recipe, self.encoder)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            loss = loss_of(self.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def train(self, save_every: int, report: Callable[[int, float, float], None]) -> None:
        """Train to the last step.

        Args:
            save_every: steps between checkpoints.
            report: called about every 5 seconds with step, mean loss since, seconds a step.
        """
        losses, since = [], time.monotonic()
        self.model.train()
        while self.step < self.recipe.steps:
            losses.append(self.train_step())
            if time.monotonic() - since > 5 or self.step == self.recipe.steps:
                report(
                    self.step, sum(losses) / len(losses), (time.monotonic() - since) / len(losses)
                )
                losses, since = [], time.monotonic()
            if self.step % save_every == 0 or self.step == self.recipe.steps:
                self.save()
