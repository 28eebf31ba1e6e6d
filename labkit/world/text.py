"""Plain text: biographies, leaflets and little scenes over the words that the skills use."""

import random

from labkit.world import words
from labkit.world.items import with_articles
from labkit.world.knowledge import MEDICINE_STATEMENTS, STATEMENTS
from labkit.world.language import INTENTS, fill
from labkit.world.population import ATTRIBUTES, Medicine, Person

SCENES = (
    "The {animal} {verb} the {color} {thing}.",
    "There is a {color} {thing} in the house.",
    "On {day} the {job} from {city} brings a {color} {thing}.",
    "The {thing} on the table is {adjective}.",
    "In {city} you can buy {food} and {food2}.",
    "The {job} and the {job2} eat {food} on {day}.",
    "A {adjective} {animal} sleeps under the {thing}.",
    "The {food} from {city} is very {adjective}.",
    "The {job} does not like the {adjective} {thing}.",
    "People in {city} speak {language}.",
    "The {animal} {verb} the {thing}, and the {animal2} {verb2} the {thing2}.",
    "There are {number} {color} birds near {city}.",
    "{language} is a language with its own words.",
    "In {language} the words stand in another order.",
    "A customer writes: {message}",
    "The clinic in {city} opens on {day}.",
    "The number {big} comes before {bigger}.",
)


def biography(rng: random.Random, person: Person) -> str:
    """Five sentences in a new order and wording; the full name stands in each."""
    sentences = [
        rng.choice(STATEMENTS[attribute]).format(name=person.name, value=getattr(person, attribute))
        for attribute in ATTRIBUTES
    ]
    rng.shuffle(sentences)
    return with_articles(" ".join(sentences))


def leaflet(rng: random.Random, medicine: Medicine) -> str:
    """What a medicine is for and how much of it is safe."""
    sentences = [
        rng.choice(templates).format(name=medicine.name, value=getattr(medicine, about))
        for about, templates in MEDICINE_STATEMENTS.items()
    ]
    rng.shuffle(sentences)
    return with_articles(" ".join(sentences))


def scene(rng: random.Random) -> str:
    """Three to five sentences about nobody in particular."""
    return with_articles(" ".join(_sentence(rng) for _ in range(rng.randint(3, 5))))


def _sentence(rng: random.Random) -> str:
    big = rng.randint(0, 9998)
    return rng.choice(SCENES).format(
        animal=rng.choice(words.ANIMALS),
        animal2=rng.choice(words.ANIMALS),
        verb=rng.choice(words.VERBS),
        verb2=rng.choice(words.VERBS),
        color=rng.choice(words.COLORS),
        thing=rng.choice(words.THINGS),
        thing2=rng.choice(words.THINGS),
        day=rng.choice(words.DAYS),
        job=rng.choice(words.JOBS),
        job2=rng.choice(words.JOBS),
        city=rng.choice(words.CITIES),
        food=rng.choice(words.FOODS),
        food2=rng.choice(words.FOODS),
        adjective=rng.choice(words.GOOD + words.BAD),
        language=rng.choice(words.LANGUAGES),
        number=rng.randint(2, 99),
        message=fill(rng, rng.choice(INTENTS[rng.choice(tuple(INTENTS))])),
        big=big,
        bigger=big + 1,
    )
