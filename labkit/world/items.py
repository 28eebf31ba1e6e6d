"""One question with its exact answer, and the split that it belongs to for good."""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

SPLITS = ("train", "validation", "test")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Item:
    """A talk whose last message is the assistant's gold answer."""

    skill: str
    key: str
    """The canonical problem, whatever its wording. Splits are by key, so no rewording leaks."""
    entity: str
    """What the item is about; intervals are bootstrapped over entities."""
    messages: tuple[tuple[str, str], ...]
    """(role, content) pairs."""

    def row(self, id: str) -> dict:
        """The item as a row of a task file."""
        messages = [{"role": role, "content": content} for role, content in self.messages]
        return {
            "id": id,
            "messages": messages,
            "skill": self.skill,
            "key": self.key,
            "entity": self.entity,
        }

    @property
    def question(self) -> str:
        return self.messages[-2][1]

    @property
    def answer(self) -> str:
        return self.messages[-1][1]


Sampler = Callable[[random.Random, str], Item]
"""A skill: draws one item of the given split."""


def with_articles(text: str) -> str:
    """`a owl` → `an owl`, wherever a template met a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def talk(*turns: str, system: str | None = None) -> tuple[tuple[str, str], ...]:
    """Messages from alternating user and assistant turns."""
    messages = [
        ("user" if i % 2 == 0 else "assistant", with_articles(turn)) for i, turn in enumerate(turns)
    ]
    return ((("system", system),) if system else ()) + tuple(messages)


def split_of(key: str) -> str:
    """Split of a canonical problem: 80 % train, 10 % validation, 10 % test, by hash alone.

    A hash and not a shuffle, so that adding items never moves an old one to another split.
    """
    bucket = hashlib.sha256(key.encode()).digest()[0] % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def draw(rng: random.Random, split: str, propose: Callable[[], tuple[str, _T]]) -> tuple[str, _T]:
    """Propose (key, problem) pairs until one belongs to `split`."""
    while True:
        key, problem = propose()
        if split_of(key) == split:
            return key, problem


def wording(rng: random.Random, split: str, phrasings: Sequence[str]) -> str:
    """One phrasing; the last fifth of them (one at least) is never seen in training."""
    n_held_out = max(1, len(phrasings) // 5)
    return rng.choice(phrasings[:-n_held_out] if split == "train" else phrasings)
