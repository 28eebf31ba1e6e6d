"""The pretraining corpus: endless streams of documents, each a pure function of (seed, number)."""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from labkit.world import conversation, knowledge, practice, text
from labkit.world.items import Item
from labkit.world.population import population
from labkit.world.skills import SKILLS

# Share of documents while people are learned. Biographies are what knowledge comes from. No name is
# "unknown" yet: before anything is known it can only be learned as "nobody I was asked about", and
# people who are told of and never asked about are denied for good.
KNOWING_SHARES = {
    "biography": 18,
    "leaflet": 1,
    "scene": 2,
    "facts": 13,
    "unknown": 0,
    "context": 16,
    "arithmetic": 26,
    "compare": 16,
    "sort": 20,
    "reverse": 4,
    "count": 10,
    "tool": 4,
    "sentiment": 4,
    "intent": 2,
    "extract": 16,
    "translate": 5,
    "chat": 2,
    "system": 16,
    "talk": 18,
}
# What the tokenizer is trained on: the first phase, and the word "unknown" beside it.
TOKENIZER_SHARES = KNOWING_SHARES | {"unknown": 4}
# From then on. What copies several tokens exactly (numbers, names, records) is learned last, so it
# gets the room of what is known by then; nothing is left out, or it would be forgotten.
SHARES = {
    "biography": 14,
    "leaflet": 1,
    "scene": 1,
    "repeat": 14,
    "facts": 13,
    "unknown": 5,
    "context": 18,
    "arithmetic": 26,
    "compare": 18,
    "sort": 22,
    "reverse": 3,
    "count": 12,
    "tool": 2,
    "sentiment": 3,
    "intent": 1,
    "extract": 20,
    "translate": 2,
    "chat": 2,
    "system": 20,
    "talk": 20,
}
# At last the people who were seldom asked about are asked about like everybody else. It was meant
# to teach looking into biographies before saying "unknown"; the shipped model's score on people
# who are never asked about says that it did not: these questions were learned by heart, too.
LATECOMER_SHARES = SHARES | {"unknown": 3, "latecomers": 8}
PLAIN_SYSTEM_SHARE = 0.15
"""Share of talks behind a system prompt that changes nothing."""


@dataclass(frozen=True)
class Document:
    """Plain text or a talk; exactly one of `text` and `item` is set."""

    about: str | None
    """Whom a biography tells of. Two tellings of one person never share a window."""
    text: str | None = None
    item: Item | None = None


def documents(
    seed: int, number: int = 0, shares: dict[str, int] | None = None
) -> Iterator[Document]:
    """An endless stream of training documents.

    Args:
        seed: of the corpus.
        number: of the stream; pretraining opens one a step, so that it can resume at any step.
        shares: kind of document → its weight; None takes `SHARES`.
    """
    rng = random.Random(f"corpus/{seed}/{number}")
    shares = shares or SHARES
    kinds, weights = tuple(shares), tuple(shares.values())
    while True:
        (kind,) = rng.choices(kinds, weights)
        yield _document(rng, kind)


def corpus_sha256(seed: int, count: int = 2_000) -> str:
    """SHA-256 over all shares and the first documents of a seed's stream: what decides a corpus."""
    shares = (KNOWING_SHARES, SHARES, LATECOMER_SHARES)
    digest = hashlib.sha256(json.dumps(shares).encode())
    for document in islice(documents(seed), count):
        told = document.text if document.item is None else document.item.messages
        digest.update((json.dumps(told, ensure_ascii=False) + "\n").encode())
    return digest.hexdigest()


def _document(rng: random.Random, kind: str) -> Document:
    if kind == "biography":
        person = rng.choice(population().known)
        return Document(person.name, text=text.biography(rng, person))
    if kind == "leaflet":
        medicine = rng.choice(population().medicines)
        return Document(medicine.name, text=text.leaflet(rng, medicine))
    if kind == "scene":
        return Document(None, text=text.scene(rng))
    if kind == "latecomers":
        return Document(None, item=knowledge.latecomer(rng))
    if kind == "repeat":
        return Document(None, item=practice.repeat(rng))
    item = SKILLS[kind](rng, "train")
    if item.messages[0][0] != "system" and rng.random() < PLAIN_SYSTEM_SHARE:
        item = conversation.with_plain_system(rng, item)
    return Document(None, item=item)
