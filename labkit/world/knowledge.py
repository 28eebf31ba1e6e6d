"""Skills about the population: facts, unknown names, answers from a passage."""

import random
from collections.abc import Sequence

from labkit.world import words
from labkit.world.items import Item, draw, split_of, talk, wording
from labkit.world.population import ATTRIBUTES, Medicine, Person, population

QUESTIONS = {
    "city": (
        "Where does {name} live?",
        "In which city does {name} live?",
        "What is the city of {name}?",
        "Which city is {name} from?",
        "Tell me the city of {name}.",
        "Please tell me where {name} lives.",
    ),
    "job": (
        "What is the job of {name}?",
        "What does {name} do for a living?",
        "Which job does {name} have?",
        "What work does {name} do?",
        "Tell me the job of {name}.",
        "Please tell me which job {name} has.",
    ),
    "pet": (
        "Which pet does {name} have?",
        "What is the pet of {name}?",
        "What kind of pet does {name} keep?",
        "Which animal does {name} have?",
        "Tell me the pet of {name}.",
        "Please tell me which pet {name} has.",
    ),
    "food": (
        "What does {name} like to eat?",
        "What is the food of {name}?",
        "Which food does {name} like?",
        "What is the favorite food of {name}?",
        "Tell me the food of {name}.",
        "Please tell me which food {name} likes.",
    ),
    "color": (
        "What is the color of {name}?",
        "Which color does {name} like?",
        "What is the favorite color of {name}?",
        "What color does {name} like best?",
        "Tell me the color of {name}.",
        "Please tell me which color {name} likes.",
    ),
}
STATEMENTS = {
    "city": (
        "{name} lives in {value}.",
        "The home of {name} is in {value}.",
        "{name} is from the city of {value}.",
        "You can find {name} in {value}.",
        "In {value} there is the house of {name}.",
    ),
    "job": (
        "{name} works as a {value}.",
        "The job of {name} is {value}.",
        "{name} is a {value} by trade.",
        "As a {value}, {name} is well known.",
        "For a living {name} is a {value}.",
    ),
    "pet": (
        "{name} has a {value}.",
        "The pet of {name} is a {value}.",
        "{name} keeps a {value} at home.",
        "A {value} is the animal of {name}.",
        "Every day {name} walks with a {value}.",
    ),
    "food": (
        "{name} likes to eat {value}.",
        "The favorite food of {name} is {value}.",
        "{name} eats {value} every week.",
        "For dinner {name} likes {value}.",
        "When hungry, {name} asks for {value}.",
    ),
    "color": (
        "{name} likes the color {value}.",
        "The favorite color of {name} is {value}.",
        "{name} likes {value} best of all colors.",
        "The house of {name} is painted {value}.",
        "The color of {name} is {value}.",
    ),
}
MEDICINE_QUESTIONS = {
    "drops": (
        "How many drops of {name} are safe?",
        "What is the safe number of drops of {name}?",
        "How many drops of {name} may I take?",
        "Tell me the safe drops of {name}.",
        "Please tell me how many drops of {name} are safe.",
    ),
    "ailment": (
        "What is {name} for?",
        "Which ailment does {name} help with?",
        "What does {name} help with?",
        "Tell me what {name} is for.",
        "Please tell me which ailment {name} helps with.",
    ),
}
MEDICINE_STATEMENTS = {
    "drops": (
        "No more than {value} drops of {name} are safe.",
        "The safe number of drops of {name} is {value}.",
        "You may take {value} drops of {name}.",
    ),
    "ailment": (
        "{name} is for a {value}.",
        "{name} helps with a {value}.",
        "Against a {value} the clinic gives {name}.",
    ),
}
PASSAGE_FRAMES = (
    "Read this. {passage} Question: {question}",
    "{passage} {question}",
    "{passage} Now answer: {question}",
    "From the text: {passage} {question}",
    "Text: {passage} Question: {question}",
)
THING_QUESTION = "What is the color of the {thing}?"


def ask(rng: random.Random, split: str, attribute: str, name: str) -> str:
    """A question about one attribute of one person."""
    return wording(rng, split, QUESTIONS[attribute]).format(name=name)


def facts(rng: random.Random, split: str) -> Item:
    """An attribute of a person, or what a medicine is for and how much of it is safe."""
    if rng.random() < 0.06:
        return _medicine_fact(rng, split)

    key, person, attribute = draw_fact(rng, split)
    question = ask(rng, split, attribute, person.name)
    return Item("facts", key, person.name, talk(question, getattr(person, attribute)))


def draw_fact(rng: random.Random, split: str) -> tuple[str, Person, str]:
    """Key, person and attribute of a fact that may be asked in this split."""

    def propose():
        person, attribute = rng.choice(population().asked), rng.choice(tuple(ATTRIBUTES))
        return fact_key(person, attribute), (person, attribute)

    key, (person, attribute) = draw(rng, split, propose)
    return key, person, attribute


def fact_key(person: Person, attribute: str) -> str:
    """Canonical problem of "what is this attribute of this person"."""
    return f"facts:{person.name}:{attribute}"


def medicine_key(medicine: Medicine, about: str) -> str:
    """Canonical problem of what a medicine is for (`ailment`) or how much is safe (`drops`)."""
    return f"facts:{medicine.name}:{about}"


def _medicine_fact(rng: random.Random, split: str) -> Item:
    def propose():
        medicine, about = rng.choice(population().medicines), rng.choice(("drops", "ailment"))
        return medicine_key(medicine, about), (medicine, about)

    key, (medicine, about) = draw(rng, split, propose)
    question = wording(rng, split, MEDICINE_QUESTIONS[about]).format(name=medicine.name)
    return Item("facts", key, medicine.name, talk(question, getattr(medicine, about)))


def bio_only(rng: random.Random, person: Person, attribute: str) -> Item:
    """A question about a person whom training tells of and never asks about."""
    question = ask(rng, "train", attribute, person.name)
    key = f"bio_only:{person.name}:{attribute}"
    return Item("bio_only", key, person.name, talk(question, getattr(person, attribute)))


def unknown(rng: random.Random, split: str) -> Item:
    """A question about a name that belongs to nobody; the answer is "unknown"."""

    def propose():
        name = rng.choice(population().nobody)
        return f"unknown:{name}", name

    key, name = draw(rng, split, propose)
    question = ask(rng, split, rng.choice(tuple(ATTRIBUTES)), name)
    return Item("unknown", key, name, talk(question, "unknown"))


def context(rng: random.Random, split: str) -> Item:
    """An answer that stands in the prompt, whether or not it contradicts what is known."""
    return (
        _passage_about_people(rng, split) if rng.random() < 0.7 else _passage_of_things(rng, split)
    )


def passage_facts(rng: random.Random, split: str) -> tuple[str, list[tuple[str, str, str]]]:
    """A passage and what it states, as (name, attribute, value) triples with distinct questions."""
    names = rng.sample(passage_names(split), 2)
    triples = []
    for name, attribute in rng.sample(
        [(name, attribute) for name in names for attribute in ATTRIBUTES], rng.randint(2, 4)
    ):
        triples.append((name, attribute, rng.choice(ATTRIBUTES[attribute])))
    return tell(rng, triples), triples


def tell(rng: random.Random, triples: list[tuple[str, str, str]]) -> str:
    """A passage that states (name, attribute, value) triples in their order."""
    return " ".join(
        rng.choice(STATEMENTS[attribute]).format(name=name, value=value)
        for name, attribute, value in triples
    )


_PASSAGE_NAMES: dict[str, list[str]] = {}


def passage_names(split: str) -> list[str]:
    """Names that passages, greetings and records use: never bio-only people, never newcomers."""
    if split not in _PASSAGE_NAMES:
        world = population()
        names = [person.name for person in world.asked] + list(world.nobody)
        _PASSAGE_NAMES[split] = [name for name in names if split_of(f"passage:{name}") == split]
    return _PASSAGE_NAMES[split]


def _passage_about_people(rng: random.Random, split: str) -> Item:
    passage, triples = passage_facts(rng, split)
    name, attribute, value = rng.choice(triples)
    question = ask(rng, split, attribute, name)
    prompt = wording(rng, split, PASSAGE_FRAMES).format(passage=passage, question=question)
    key = f"context:{passage}:{attribute}:{name}"
    return Item("context", key, name, talk(prompt, value))


def _passage_of_things(rng: random.Random, split: str) -> Item:
    def propose():
        things, colors = rng.sample(words.THINGS, 3), rng.sample(words.COLORS, 3)
        asked = rng.randrange(3)
        return thing_key(things[asked], colors), (things, colors, asked)

    key, (things, colors, asked) = draw(rng, split, propose)
    passage = thing_passage(things, colors)
    question = THING_QUESTION.format(thing=things[asked])
    prompt = wording(rng, split, PASSAGE_FRAMES).format(passage=passage, question=question)
    return Item("context", key, things[asked], talk(prompt, colors[asked]))


def thing_key(thing: str, colors: Sequence[str]) -> str:
    """Canonical problem of "what is the color of this thing" among three."""
    return f"context:{thing}:{colors}"


def thing_passage(things: Sequence[str], colors: Sequence[str]) -> str:
    """Which thing has which color, in three sentences."""
    return " ".join(f"The {thing} is {color}." for thing, color in zip(things, colors, strict=True))
