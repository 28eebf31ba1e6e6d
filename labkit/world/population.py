"""Who exists: people with five attributes, newcomers, names that belong to nobody, medicines."""

import random
from dataclasses import dataclass
from functools import cache

from labkit.world import words

ATTRIBUTES = {
    "city": words.CITIES,
    "job": words.JOBS,
    "pet": words.ANIMALS,
    "food": words.FOODS,
    "color": words.COLORS,
}

N_ASKED = 320
N_BIO_ONLY = 80
N_NEWCOMERS = 100


@dataclass(frozen=True)
class Person:
    """One invented person."""

    name: str
    """First and last name; the pair is unique, each half is shared with others."""
    city: str
    job: str
    pet: str
    food: str
    color: str


@dataclass(frozen=True)
class Medicine:
    """One remedy of the invented clinic."""

    name: str
    ailment: str
    """The one complaint it is for."""
    drops: str
    """Largest safe number of drops, as a digit."""


@dataclass(frozen=True)
class Population:
    """Everybody, by what the base model may know of them."""

    asked: tuple[Person, ...]
    """Have biographies and appear in questions."""
    bio_only: tuple[Person, ...]
    """Have biographies and never appear in a question: answering about them is extraction."""
    newcomers: tuple[Person, ...]
    """Unknown to the base model; taught by task D2."""
    nobody: tuple[str, ...]
    """Names of families that do not live in this world: the right answer is "unknown"."""
    medicines: tuple[Medicine, ...]

    @property
    def known(self) -> tuple[Person, ...]:
        """People with biographies in the pretraining corpus."""
        return self.asked + self.bio_only


@cache
def population(seed: int = 0) -> Population:
    """The population of one world; the same seed gives the same one."""
    rng = random.Random(f"population/{seed}")
    names = [f"{first} {last}" for first in words.FIRST_NAMES for last in words.LAST_NAMES]
    rng.shuffle(names)
    nobody = [f"{first} {last}" for first in words.FIRST_NAMES for last in words.STRANGE_LAST_NAMES]
    people = [
        Person(name, **{attribute: rng.choice(values) for attribute, values in ATTRIBUTES.items()})
        for name in names[: N_ASKED + N_BIO_ONLY + N_NEWCOMERS]
    ]
    medicines = tuple(
        Medicine(name, words.AILMENTS[i % len(words.AILMENTS)], str(rng.randint(2, 9)))
        for i, name in enumerate(words.MEDICINES)
    )
    return Population(
        asked=tuple(people[:N_ASKED]),
        bio_only=tuple(people[N_ASKED : N_ASKED + N_BIO_ONLY]),
        newcomers=tuple(people[N_ASKED + N_BIO_ONLY :]),
        nobody=tuple(nobody),
        medicines=medicines,
    )
