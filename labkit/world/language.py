"""Skills on wording: sentiment, intent, extract, translate."""

import json
import random

from labkit.world import words
from labkit.world.items import Item, draw, talk, wording
from labkit.world.knowledge import passage_names

SENTIMENT_FRAMES = (
    "Positive or negative? {sentence}",
    "Is this positive or negative: {sentence}",
    "What is the mood of this: {sentence}",
    "{sentence} Is that positive or negative?",
    "Please tell me if this is positive or negative: {sentence}",
)
# (sentence, does it turn the adjective's mood around?)
SENTIMENT_SENTENCES = (
    ("The {thing} was {adjective}.", False),
    ("I think the {thing} is {adjective}.", False),
    ("What a {adjective} {thing}!", False),
    ("The {thing} from {city} is very {adjective}.", False),
    ("The {thing} was not {adjective}.", True),
    ("The {thing} was never {adjective}.", True),
    ("I do not think the {thing} is {adjective}.", True),
    ("The {thing} from {city} is not {adjective}.", True),
)
INTENT_FRAMES = (
    "What does the customer want? {message}",
    "Intent: {message}",
    "Which intent is this: {message}",
    "{message} What is the intent?",
    "Please name the intent: {message}",
)
INTENTS = {
    "booking": (
        "I want to book a visit on {day}.",
        "Can I come on {day}?",
        "Please give me an hour on {day}.",
        "I would like to visit you on {day}.",
    ),
    "cancel": (
        "I can not come on {day}.",
        "Please cancel my visit on {day}.",
        "I must cancel the visit on {day}.",
        "Take my name from the list for {day}.",
    ),
    "price": (
        "How much is the {color} {thing}?",
        "What does a {color} {thing} cost?",
        "Tell me the price of the {color} {thing}.",
        "What must I pay for a {color} {thing}?",
    ),
    "hours": (
        "When do you open on {day}?",
        "Are you open on {day}?",
        "When do you close on {day}?",
        "What are your hours on {day}?",
    ),
    "refund": (
        "I want my money back for the {color} {thing}.",
        "Please pay me back for the {color} {thing}.",
        "Take back the {color} {thing} and give me my money.",
        "I give back the {color} {thing}, I want a refund.",
    ),
    "repair": (
        "My {color} {thing} is broken.",
        "Can you repair my {color} {thing}?",
        "The {color} {thing} does not work.",
        "Please repair the {color} {thing}.",
    ),
    "delivery": (
        "When does my {color} {thing} come?",
        "The {color} {thing} has not come to {city}.",
        "Can you send the {color} {thing} to {city}?",
        "Please bring the {color} {thing} to {city}.",
    ),
    "contact": (
        "Who can I talk to in {city}?",
        "Please call me on {day}.",
        "I want to talk to someone in {city}.",
        "Can someone call me on {day}?",
    ),
}
EXTRACT_FRAMES = {
    "json": (
        "{record} Give {fields} as JSON.",
        "Record: {record} Write {fields} as JSON.",
        "{record} Return {fields} in JSON.",
        "As JSON, give {fields}: {record}",
        "{record} Please write {fields} as JSON.",
    ),
    "list": (
        "{record} List {fields}.",
        "Record: {record} List {fields} with commas.",
        "{record} Give {fields} as a list.",
        "List {fields}: {record}",
        "{record} Please list {fields}.",
    ),
    "bars": (
        "{record} Give {fields} with bars.",
        "Record: {record} Write {fields} with bars.",
        "{record} Join {fields} with bars.",
        "With bars, give {fields}: {record}",
        "{record} Please write {fields} with bars.",
    ),
}
RECORD_VALUES = {
    "city": words.CITIES,
    "item": words.THINGS,
    "color": words.COLORS,
    "food": words.FOODS,
    "pet": words.ANIMALS,
    "day": words.DAYS,
    "intent": tuple(INTENTS),
    "mood": ("positive", "negative"),
}
TRANSLATE_FRAMES = (
    "Translate to {language}: {phrase}",
    "Say in {language}: {phrase}",
    "{phrase} in {language}",
    "How do you say in {language}: {phrase}",
    "Please translate to {language}: {phrase}",
)


def sentiment(rng: random.Random, split: str) -> Item:
    """The mood of a sentence; half of them are negated."""

    def propose():
        template, turned = rng.choice(SENTIMENT_SENTENCES)
        adjective = rng.choice(words.GOOD + words.BAD)
        thing = rng.choice(words.THINGS + words.FOODS)
        sentence = template.format(thing=thing, adjective=adjective, city=rng.choice(words.CITIES))
        return f"sentiment:{thing}:{adjective}:{turned}", (sentence, thing, adjective, turned)

    key, (sentence, thing, adjective, turned) = draw(rng, split, propose)
    positive = (adjective in words.GOOD) != turned
    prompt = wording(rng, split, SENTIMENT_FRAMES).format(sentence=sentence)
    return Item("sentiment", key, thing, talk(prompt, "positive" if positive else "negative"))


def intent(rng: random.Random, split: str) -> Item:
    """What a customer's message asks for, as one of eight labels."""

    def propose():
        label = rng.choice(tuple(INTENTS))
        message = fill(rng, rng.choice(INTENTS[label]))
        return f"intent:{message}", (label, message)

    key, (label, message) = draw(rng, split, propose)
    prompt = wording(rng, split, INTENT_FRAMES).format(message=message)
    return Item("intent", key, message, talk(prompt, label))


def fill(rng: random.Random, template: str) -> str:
    """A template with a random day, city, color and thing."""
    return template.format(
        day=rng.choice(words.DAYS),
        city=rng.choice(words.CITIES),
        color=rng.choice(words.COLORS),
        thing=rng.choice(words.THINGS),
    )


def extract(rng: random.Random, split: str) -> Item:
    """Chosen fields of a record, in the order asked, as JSON, a list or with bars."""

    def propose():
        fields = rng.sample(("name", *RECORD_VALUES), rng.randint(3, 4))
        record = {
            field: rng.choice(passage_names(split) if field == "name" else RECORD_VALUES[field])
            for field in fields
        }
        wanted = rng.sample(fields, rng.randint(1, 3))
        form = rng.choice(tuple(EXTRACT_FRAMES))
        return f"extract:{sorted(record.items())}:{wanted}:{form}", (record, wanted, form)

    key, (record, wanted, form) = draw(rng, split, propose)
    line = rng.choice((" | ", ", ", "; ")).join(
        f"{field}: {value}" for field, value in record.items()
    )
    prompt = wording(rng, split, EXTRACT_FRAMES[form]).format(
        record=line + ".", fields=spoken_list(wanted)
    )
    answer = write_fields({field: record[field] for field in wanted}, form)
    return Item("extract", key, line, talk(prompt, answer))


def spoken_list(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def write_fields(fields: dict[str, str], form: str) -> str:
    """Fields in one of the answer forms."""
    if form == "json":
        return json.dumps(fields)
    return (", " if form == "list" else " | ").join(fields.values())


def translate(rng: random.Random, split: str) -> Item:
    """A phrase in Solan: adjectives follow the noun and the verb comes first."""
    key, phrase, parts = draw_phrase(rng, split)
    prompt = wording(rng, split, TRANSLATE_FRAMES).format(language="Solan", phrase=phrase)
    return Item("translate", key, phrase, talk(prompt, solan(parts)))


def draw_phrase(rng: random.Random, split: str) -> tuple[str, str, tuple[str, ...]]:
    """Key, English phrase and its content words: (color, thing) or (animal, verb, color, thing)."""

    def propose():
        parts: tuple[str, ...] = (rng.choice(words.COLORS), rng.choice(words.THINGS))
        if rng.random() < 0.6:
            parts = (rng.choice(words.ANIMALS[:16]), rng.choice(words.VERBS), *parts)
        return f"translate:{' '.join(parts)}", parts

    key, parts = draw(rng, split, propose)
    if len(parts) == 2:
        return key, "the {} {}".format(*parts), parts
    return key, "the {} {} the {} {}".format(*parts), parts


def solan(parts: tuple[str, ...]) -> str:
    """Verb, subject, object; the adjective after its noun."""
    *clause, color, thing = parts
    ordered = (clause[1], clause[0], thing, color) if clause else (thing, color)
    return " ".join(words.SOLAN[word] for word in ordered)
