"""Practice that is no skill and is scored nowhere: copying, recalling, looking up, longer sums.

Most skills need two acts that a model learns suddenly or not at all: to go on as it went on before
(induction; Olsson et al. 2022), and to recall the value that was told with a key (associative
recall; Arora et al. 2023, Zoology). A skill's item offers one or two tokens of practice in them,
which taught our earlier models neither in twenty thousand steps. Here dozens of tokens in a row can
be told only so, at distances and in an order that give no other hint.
"""

import random

from labkit.world import knowledge, procedures, words
from labkit.world.items import Item, split_of, talk, wording
from labkit.world.population import ATTRIBUTES, population

REPEAT_FRAMES = (
    "Say again: {listed}",
    "Repeat: {listed}",
    "{listed} Say that again.",
    "Write this once more: {listed}",
)
TURN_FRAMES = (
    "From the last to the first: {listed}",
    "Begin with the last: {listed}",
    "{listed} Now from the end.",
)
# (how a pair is written, what stands between pairs)
PAIR_FORMS = (
    ("{key}: {value}", ", "),
    ("{key}: {value}", " | "),
    ("{key}: {value}", "; "),
    ("The {key} is {value}.", " "),
    ("{key} has {value}.", " "),
    ("{value} is for {key}.", " "),
)
# Ways of telling a pair in plain text, the value last.
TELLINGS = (
    "{key} {value}",
    "{key}: {value}",
    "{key} is {value}",
    "the {key} is {value}",
    "{key} has {value}",
    "{key}? {value}",
    "{key}? It is {value}",
    "what about {key}? {value}",
    "and {key}? {value}",
    "what is {key}? {value}",
    "tell me {key}. {value}",
    "The color of {key} is {value}",
)
INDUCTION_WORDS, RECALL_WORDS = 72, 46
"""Words at which these texts end. Of the second nearly all fit a row of the recipe; of the first,
with its longer groups and its commas, about half, and packing leaves the others out."""
ASKS = ("{key}?", "What about {key}?", "Now {key}.", "And {key}?", "Tell me {key}.")
_WORDS = words.THINGS + words.ANIMALS + words.CITIES + words.FOODS + words.JOBS


def induction(rng: random.Random) -> str:
    """A few groups of two to four words that come back again and again, in no order."""
    fresh = rng.sample(_WORDS + words.COLORS, 30)
    groups = [[fresh.pop() for _ in range(rng.randint(2, 4))] for _ in range(rng.randint(3, 7))]
    told, last = [], None
    while sum(map(len, told)) < INDUCTION_WORDS:
        group = rng.choice([group for group in groups if group is not last])
        told.append(group)
        last = group
    return rng.choice((" ", ", ", ". ")).join(" ".join(group) for group in told)


def recall(rng: random.Random) -> str:
    """Three to six pairs of a key and a value, told once, then again and again in other words.

    Names are those of nobody, of every split, for nothing is told of them that a question asks;
    invented values of real people would be learned as facts.
    """
    n = rng.randint(3, 6)
    keys = rng.sample(_WORDS if rng.random() < 0.75 else population().nobody, n)
    pairs = [
        (key, rng.choice(_WORDS + words.COLORS) if rng.random() < 0.75 else str(rng.randint(0, 99)))
        for key in keys
    ]
    first, later = rng.sample(TELLINGS, 2)
    told = [first.format(key=key, value=value) for key, value in pairs]
    last = pairs[-1]
    while len(" ".join(told).split()) < RECALL_WORDS:
        last = rng.choice([pair for pair in pairs if pair is not last])
        told.append(later.format(key=last[0], value=last[1]))
    return ". ".join(told) + "."


def repeat(rng: random.Random) -> Item:
    """Two to five numbers, names and words, and the same again."""
    parts = [_part(rng) for _ in range(rng.randint(2, 5))]
    listed = rng.choice((" ", ", ")).join(parts)
    messages = talk(rng.choice(REPEAT_FRAMES).format(listed=listed), listed)
    return Item("repeat", f"repeat:{listed}", listed, messages)


def turn_around(rng: random.Random) -> Item:
    """Two to five pairs of a key and a value from the last pair to the first.

    The step from copying to looking up: a pair stays as it is, and what it follows changes.
    """
    pairs = _key_values(rng)
    form, between = rng.choice(PAIR_FORMS)
    told = [form.format(key=key, value=value) for key, value in pairs]
    listed = between.join(told)
    prompt = rng.choice(TURN_FRAMES).format(listed=listed)
    messages = talk(prompt, between.join(reversed(told)))
    return Item("turn_around", f"turn_around:{listed}", listed, messages)


def look_up(rng: random.Random) -> Item:
    """A passage, and every question that it answers, one turn after the other.

    A single question about a passage with one name in it can be answered without binding values to
    names; all questions about several names cannot.
    """
    return rng.choice((_pairs, _pairs, _people, _things))(rng)


def sums(rng: random.Random) -> Item:
    """A three-digit number and one below 100 added or taken away: larger than any sum scored."""
    a, b = rng.randint(100, 299), rng.randint(0, 99)
    plus = rng.random() < 0.7
    question = wording(rng, "train", procedures.ADD if plus else procedures.SUBTRACT)
    if plus and rng.random() < 0.3:
        a, b = b, a
    messages = talk(question.format(a=a, b=b), str(a + b if plus else a - b))
    return Item("sums", f"sums:{a}:{b}:{plus}", str(a), messages)


def _part(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.6:
        return str(rng.randint(0, rng.choice((99, 999))))
    return rng.choice(_WORDS) if kind < 0.8 else rng.choice(knowledge.passage_names("train"))


def _key_values(rng: random.Random) -> list[tuple[str, str]]:
    n = rng.randint(2, 5)
    keys = _WORDS if rng.random() < 0.7 else knowledge.passage_names("train")
    return [(key, _part(rng)) for key in rng.sample(keys, n)]


def _pairs(rng: random.Random) -> Item:
    """Two to five bare pairs of a key and a value."""
    pairs = _key_values(rng)
    form, between = rng.choice(PAIR_FORMS)
    passage = between.join(form.format(key=key, value=value) for key, value in pairs)
    ask = rng.choice(ASKS)
    return _ask_all(rng, passage, [(ask.format(key=key), value) for key, value in pairs])


def _people(rng: random.Random) -> Item:
    """The same two attributes of two people: only name and attribute together tell the value."""
    names = rng.sample(knowledge.passage_names("train"), 2)
    triples = [
        (name, attribute, rng.choice(ATTRIBUTES[attribute]))
        for attribute in rng.sample(tuple(ATTRIBUTES), 2)
        for name in names
    ]
    rng.shuffle(triples)
    asked = [
        (knowledge.ask(rng, "train", attribute, name), value) for name, attribute, value in triples
    ]
    return _ask_all(rng, knowledge.tell(rng, triples), asked)


def _things(rng: random.Random) -> Item:
    """Three things and their colors, and all questions that training may ask."""
    while True:
        things, colors = rng.sample(words.THINGS, 3), rng.sample(words.COLORS, 3)
        asked = [
            (knowledge.THING_QUESTION.format(thing=thing), color)
            for thing, color in zip(things, colors, strict=True)
            if split_of(knowledge.thing_key(thing, colors)) == "train"
        ]
        if asked:
            return _ask_all(rng, knowledge.thing_passage(things, colors), asked)


def _ask_all(rng: random.Random, passage: str, asked: list[tuple[str, str]]) -> Item:
    rng.shuffle(asked)
    (first, answer), *others = asked
    prompt = rng.choice(knowledge.PASSAGE_FRAMES[:-1]).format(passage=passage, question=first)
    turns = [prompt, answer, *(text for pair in others for text in pair)]
    return Item("look_up", f"look_up:{passage}", passage, talk(*turns))


PRACTICE = {"repeat": repeat, "turn_around": turn_around, "look_up": look_up, "sums": sums}
"""Kind → sampler of a talk to train on."""
PRACTICE_TEXTS = {"induction": induction, "recall": recall}
"""Kind → sampler of a plain text to train on."""
