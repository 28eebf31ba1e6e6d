"""The pretraining corpus: endless streams of documents, each a pure function of (seed, number)."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from labkit.world import conversation, text
from labkit.world.items import Item
from labkit.world.population import population
from labkit.world.skills import SKILLS

# Share of documents, first half. Biographies are what knowledge comes from; sums need practice.
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
# Second half: what copies several tokens exactly is learned late, so it gets the room of what is
# known by then. Nothing is left out, or it would be forgotten.
LATE_SHARES = {
    "biography": 14,
    "leaflet": 1,
    "scene": 2,
    "facts": 12,
    "unknown": 5,
    "context": 14,
    "arithmetic": 24,
    "compare": 16,
    "sort": 18,
    "reverse": 3,
    "count": 10,
    "tool": 4,
    "sentiment": 2,
    "intent": 2,
    "extract": 16,
    "translate": 3,
    "chat": 1,
    "system": 14,
    "talk": 12,
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


def documents(
    seed: int, number: int = 0, shares: dict[str, int] | None = None
) -> Iterator[Document]:
    """An endless stream of training documents.

    Args:
        seed: of the corpus.
        number: of the stream; pretraining opens one a step, so that it can resume at any step.
        shares: kind of document → its weight; None takes those of the first half.
    """
    rng = random.Random(f"corpus/{seed}/{number}")
    shares = shares or SHARES
    kinds, weights = tuple(shares), tuple(shares.values())
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
