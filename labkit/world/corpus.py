"""The pretraining corpus: endless streams of documents, each a pure function of (seed, number)."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from labkit.world import conversation, text
from labkit.world.items import Item
from labkit.world.population import population
from labkit.world.skills import SKILLS

# Share of documents. Biographies are what knowledge comes from; sums and lists need practice.
SHARES = {
    "biography": 20,
    "leaflet": 1,
    "scene": 4,
    "facts": 13,
    "unknown": 5,
    "context": 10,
    "arithmetic": 24,
    "compare": 5,
    "sort": 8,
    "reverse": 6,
    "count": 8,
    "tool": 2,
    "sentiment": 3,
    "intent": 2,
    "extract": 8,
    "translate": 5,
    "chat": 2,
    "system": 8,
    "talk": 8,
}
PLAIN_SYSTEM_SHARE = 0.15
"""Share of talks behind a system prompt that changes nothing."""


@dataclass(frozen=True)
class Document:
    """Plain text or a talk; exactly one of `text` and `item` is set."""

    about: str | None
    """Whom a biography tells of. Two tellings of one person never share a window."""
    text: str | None = None
    item: Item | None = None


def documents(seed: int, number: int = 0) -> Iterator[Document]:
    """An endless stream of training documents.

    Args:
        seed: of the corpus.
        number: of the stream; pretraining opens one a step, so that it can resume at any step.
    """
    rng = random.Random(f"corpus/{seed}/{number}")
    kinds, weights = tuple(SHARES), tuple(SHARES.values())
    while True:
        (kind,) = rng.choices(kinds, weights)
        yield _document(rng, kind)


def _document(rng: random.Random, kind: str) -> Document:
    if kind == "biography":
        person = rng.choice(population().known)
        return Document(person.name, text=text.biography(rng, person))
    if kind == "leaflet":
        medicine = rng.choice(population().medicines)
        return Document(medicine.name, text=text.leaflet(rng, medicine))
    if kind == "scene":
        return Document(None, text=text.scene(rng))
    item = SKILLS[kind](rng, "train")
    if item.messages[0][0] != "system" and rng.random() < PLAIN_SYSTEM_SHARE:
        item = conversation.with_plain_system(rng, item)
    return Document(None, item=item)
