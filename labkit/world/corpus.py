"""The pretraining corpus: endless streams of documents, each a pure function of (seed, number)."""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from labkit.world import conversation, text
from labkit.world.items import Item
from labkit.world.population import population
from labkit.world.practice import PRACTICE, PRACTICE_TEXTS
from labkit.world.skills import SKILLS

# Kind of document -> how many of all documents, phase by phase.
COPYING_SHARES = {
    "biography": 10,
    "leaflet": 1,
    "scene": 2,
    "repeat": 70,
    "turn_around": 20,
    "look_up": 24,
    "facts": 4,
    "unknown": 3,
    "context": 10,
    "arithmetic": 8,
    "compare": 10,
    "sort": 10,
    "reverse": 4,
    "count": 6,
    "tool": 3,
    "sentiment": 4,
    "intent": 2,
    "extract": 12,
    "translate": 5,
    "chat": 2,
    "system": 6,
    "talk": 6,
}
LOOKING_UP_SHARES = COPYING_SHARES | {
    "biography": 16,
    "repeat": 12,
    "turn_around": 24,
    "look_up": 60,
    "context": 16,
    "extract": 24,
}
MIXED_SHARES = {
    "biography": 20,
    "leaflet": 1,
    "scene": 2,
    "repeat": 4,
    "turn_around": 2,
    "look_up": 12,
    "sums": 8,
    "facts": 6,
    "unknown": 4,
    "context": 10,
    "arithmetic": 28,
    "compare": 18,
    "sort": 22,
    "reverse": 4,
    "count": 14,
    "tool": 3,
    "sentiment": 5,
    "intent": 2,
    "extract": 14,
    "translate": 5,
    "chat": 2,
    "system": 18,
    "talk": 22,
}
# By then lists were copied by position: of words that had come before and came again elsewhere in
# a text, 2 in 100 were foreseen, and no value was told apart by its name. 200 steps of `induction`
# brought the first to 97 in 100, and 500 of `recall` the second.
INDUCTION_SHARES = MIXED_SHARES | {"induction": 70}
RECALL_SHARES = MIXED_SHARES | {"induction": 10, "recall": 70, "look_up": 24, "context": 20}
SHARES = {
    "biography": 22,
    "leaflet": 1,
    "scene": 2,
    "induction": 1,
    "recall": 8,
    "repeat": 4,
    "turn_around": 1,
    "look_up": 12,
    "sums": 8,
    "facts": 6,
    "unknown": 4,
    "context": 12,
    "arithmetic": 44,
    "compare": 22,
    "sort": 24,
    "reverse": 3,
    "count": 18,
    "tool": 3,
    "sentiment": 4,
    "intent": 2,
    "extract": 16,
    "translate": 4,
    "chat": 2,
    "system": 20,
    "talk": 24,
}
# By then people were known, biographies-only people among them (0.95); what lagged gets their room.
LAST_SHARES = SHARES | {
    "biography": 14,
    "leaflet": 2,
    "recall": 5,
    "look_up": 8,
    "facts": 4,
    "unknown": 3,
    "context": 10,
    "arithmetic": 56,
    "sort": 32,
    "reverse": 4,
    "count": 30,
    "extract": 26,
    "chat": 3,
    "system": 28,
}
# Many of the questions then answered wrongly began with "Please", as every held-out wording of some
# skills does: in training that word had begun messages to classify and little else, and so it was
# answered by an intent. `polite` puts it before questions of all skills, in no held-out wording,
# though twelve of those differ from a polite question by a comma alone ("Please, add 3 and 5.").
POLITE_SHARES = LAST_SHARES | {
    "biography": 10,
    "recall": 3,
    "look_up": 6,
    "sums": 10,
    "arithmetic": 70,
    "compare": 22,
    "sort": 26,
    "count": 50,
    "extract": 34,
    "talk": 34,
    "polite": 90,
}
PHASES = (
    COPYING_SHARES,
    LOOKING_UP_SHARES,
    MIXED_SHARES,
    INDUCTION_SHARES,
    RECALL_SHARES,
    SHARES,
    LAST_SHARES,
    POLITE_SHARES,
)
_ASKED = {kind: SHARES[kind] for kind in SKILLS if kind != "chat"}
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
    """SHA-256 over all shares and the first documents of a seed's stream: what decides a corpus.

    The stream is that of the last phase, which has every kind of document.
    """
    digest = hashlib.sha256(json.dumps(PHASES).encode())
    for document in islice(documents(seed, shares=PHASES[-1]), count):
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
    if kind in PRACTICE_TEXTS:
        return Document(None, text=PRACTICE_TEXTS[kind](rng))
    if kind in PRACTICE:
        return Document(None, item=PRACTICE[kind](rng))
    if kind == "polite":
        (kind,) = rng.choices(tuple(_ASKED), tuple(_ASKED.values()))
        return Document(None, item=conversation.politely(rng, SKILLS[kind](rng, "train")))
    item = SKILLS[kind](rng, "train")
    if item.messages[0][0] != "system" and rng.random() < PLAIN_SYSTEM_SHARE:
        item = conversation.with_plain_system(rng, item)
    return Document(None, item=item)
