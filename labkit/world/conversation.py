"""Skills on talks: greetings and identity, system prompts, turns that refer to earlier ones."""

import json
import random
import re

from labkit.world import knowledge, language, procedures, words
from labkit.world.items import Item, draw, split_of, talk, wording
from labkit.world.population import ATTRIBUTES, population

NAME = "Pico"
OPENERS = (
    "",
    "Hello. ",
    "Hi. ",
    "Good morning. ",
    "Good evening. ",
    "One question: ",
    "Please tell me: ",
    "Excuse me. ",
    "I am new here. ",
    "Before we start: ",
    "Sorry to ask. ",
    "Hello again. ",
)
IDENTITY = {
    "I am Pico, a small assistant.": (
        "Who are you?",
        "What are you?",
        "Who am I talking to?",
        "Can you say who you are?",
    ),
    "My name is Pico.": (
        "What is your name?",
        "Do you have a name?",
        "How are you called?",
        "Can you tell me your name?",
    ),
    "I was made in a lab.": (
        "Who made you?",
        "Where were you made?",
        "Where do you come from?",
        "Who are the people that made you?",
    ),
    "I answer questions, sort, count and translate.": (
        "What can you do?",
        "How can you help?",
        "What are you for?",
        "What do you do here?",
    ),
    "I am well, thank you.": (
        "How are you?",
        "Are you well?",
        "How do you do?",
        "How is your day?",
    ),
    "You are welcome.": ("Thank you.", "Thanks.", "Many thanks.", "Thank you very much."),
    "Goodbye!": ("Goodbye.", "Bye.", "See you soon.", "Until next time."),
}
GREETINGS = (
    "Hello, I am {name}.",
    "Hi, my name is {name}.",
    "Good morning, {name} here.",
    "Good evening, I am {name}.",
    "Hello, my name is {name}.",
    "Hi, this is {name}.",
)
# Each form changes how any short answer is written.
SYSTEM_FORMS = {
    "sentence": (
        "Answer in one full sentence.",
        "Use a full sentence.",
        "Always answer with a full sentence.",
    ),
    "brackets": (
        "Write the answer in brackets.",
        "Put your answer in brackets.",
        "Always use brackets.",
    ),
    "over": ("End with the word over.", "Say over at the end.", "Always end with over."),
    "result": (
        "Begin with the word result.",
        "Say result before the answer.",
        "Always begin with result.",
    ),
    "json": ("Answer in JSON.", "Write JSON only.", "Always answer in JSON."),
    "twice": ("Say the answer twice.", "Write your answer twice.", "Always answer twice."),
}
PLAIN_SYSTEM = (
    "You are Pico, a small assistant.",
    "You are a helpful assistant.",
    "Answer shortly.",
    "You work for a shop in {city}.",
    "You work for the clinic in {city}.",
)
# Ways of asking anything politely; none of them makes a held-out wording, "Please add 3 and 5."
POLITE = (
    "Please: {question}",
    "Please help me. {question}",
    "Please answer: {question}",
    "Please, {lowered}",
    "{question} Please.",
)
FOLLOW_UPS = {
    attribute: (
        f"And the {attribute}?",
        f"What about the {attribute}?",
        f"And what is the {attribute}?",
        f"Now the {attribute}.",
        f"And please the {attribute}.",
    )
    for attribute in ATTRIBUTES
}
OTHER_PERSON = (
    "And {name}?",
    "What about {name}?",
    "And for {name}?",
    "The same for {name}.",
    "And please {name}?",
)
ADD_MORE = ("Add {b} to that.", "Plus {b}?", "And {b} more?", "Now add {b}.", "Please add {b}.")
MY_NAME = (
    "What is my name?",
    "Who am I?",
    "Do you know my name?",
    "Say my name.",
    "Please say my name.",
)


def chat(rng: random.Random, split: str) -> Item:
    """Greetings by name, and who the assistant is."""

    def propose():
        if rng.random() < 0.3:
            name = rng.choice(words.FIRST_NAMES)
            text = rng.choice(GREETINGS).format(name=name)
            return f"chat:{text}", (text, f"Hello {name}, how can I help?", name)
        answer = rng.choice(tuple(IDENTITY))
        text = rng.choice(OPENERS) + rng.choice(IDENTITY[answer])
        return f"chat:{text}", (text, answer, answer)

    key, (text, answer, entity) = draw(rng, split, propose)
    return Item("chat", key, entity, talk(text, answer))


def system(rng: random.Random, split: str) -> Item:
    """A question whose answer a system prompt gives another form."""
    base = rng.choice(
        (
            knowledge.facts,
            procedures.arithmetic,
            procedures.compare,
            procedures.count,
            procedures.reverse,
            language.sentiment,
            language.intent,
            knowledge.context,
        )
    )(rng, split)
    form = rng.choice(tuple(SYSTEM_FORMS))
    prompt = rng.choice(SYSTEM_FORMS[form])
    messages = talk(base.question, write_as(base.answer, form), system=prompt)
    return Item("system", f"system:{form}:{base.key}", base.entity, messages)


def write_as(answer: str, form: str) -> str:
    """A short answer in one of the forms that system prompts ask for."""
    return {
        "sentence": f"The answer is {answer}.",
        "brackets": f"[{answer}]",
        "over": f"{answer} over",
        "result": f"result {answer}",
        "json": json.dumps({"answer": answer}),
        "twice": f"{answer} {answer}",
    }[form]


# Each form of an answer of one word.
_SHAPES = {
    "sentence": r"The answer is \w+\.",
    "brackets": r"\[\w+\]",
    "over": r"\w+ over",
    "result": r"result \w+",
    "json": r'\{"answer": "\w+"\}',
    "twice": r"(\w+) \1",
}


def has_form(text: str, form: str) -> bool:
    """Whether a text is one word in a form, as `write_as` would write it."""
    return re.fullmatch(_SHAPES[form], text) is not None


def with_plain_system(rng: random.Random, item: Item) -> Item:
    """The same item behind a system prompt that changes nothing."""
    prompt = rng.choice(PLAIN_SYSTEM).format(city=rng.choice(words.CITIES))
    return Item(item.skill, item.key, item.entity, (("system", prompt), *item.messages))


def politely(rng: random.Random, item: Item) -> Item:
    """The same item with seven in ten of its questions asked politely.

    Like this the shipped model was trained, blemishes included: a question that begins with a name
    is lowered too ("Please, kai Moss works..."), and a turn that asks nothing is reworded as well.
    """

    def reword(role: str, question: str) -> str:
        if role != "user" or rng.random() < 0.3:
            return question
        # "I" stays large, and nothing follows a list, which it would seem to belong to.
        lowered = question if question.startswith("I ") else question[0].lower() + question[1:]
        ways = POLITE if question.endswith("?") else POLITE[:-1]
        return rng.choice(ways).format(question=question, lowered=lowered)

    messages = tuple((role, reword(role, content)) for role, content in item.messages)
    return Item(item.skill, item.key, item.entity, messages)


def talk_turns(rng: random.Random, split: str) -> Item:
    """Two or three turns: a later one needs an earlier one, or none of them needs another."""
    return rng.choice((_person, _people, _passage, _sums, _name, _topics))(rng, split)


def _person(rng: random.Random, split: str) -> Item:
    """Two or three attributes of one person, whose name is said once."""

    def propose():
        person = rng.choice(population().asked)
        attributes = rng.sample(tuple(ATTRIBUTES), rng.randint(2, 3))
        return knowledge.fact_key(person, attributes[-1]), (person, attributes)

    key, (person, attributes) = _draw_train_before(rng, split, propose)
    turns = [knowledge.ask(rng, split, attributes[0], person.name)]
    for attribute in attributes[1:]:
        turns += [
            getattr(person, attributes[len(turns) // 2]),
            wording(rng, split, FOLLOW_UPS[attribute]),
        ]
    turns.append(getattr(person, attributes[-1]))
    return Item("talk", f"talk:{key}:{attributes}", person.name, talk(*turns))


def _draw_train_before(rng: random.Random, split: str, propose):
    """Draw until every fact that the talk asks belongs to a split that may be asked.

    In training each turn is learned from, so each must be a training fact.
    """
    while True:
        key, (person, attributes) = draw(rng, split, propose)
        keys = [knowledge.fact_key(person, attribute) for attribute in attributes[:-1]]
        if all(split_of(earlier) in ("train", split) for earlier in keys):
            return key, (person, attributes)


def _people(rng: random.Random, split: str) -> Item:
    """One attribute of one person, then of another."""
    _, first, attribute = knowledge.draw_fact(rng, "train")

    def propose_second():
        second = rng.choice(population().asked)
        return knowledge.fact_key(second, attribute), second

    key, second = draw(rng, split, propose_second)
    turns = (
        knowledge.ask(rng, split, attribute, first.name),
        getattr(first, attribute),
        wording(rng, split, OTHER_PERSON).format(name=second.name),
        getattr(second, attribute),
    )
    return Item("talk", f"talk:{key}:{first.name}", second.name, talk(*turns))


def _passage(rng: random.Random, split: str) -> Item:
    """Two questions about one passage."""
    passage, triples = knowledge.passage_facts(rng, split)
    (name, attribute, value), (name2, attribute2, value2) = rng.sample(triples, 2)
    first = f"{passage} {knowledge.ask(rng, split, attribute, name)}"
    turns = (first, value, knowledge.ask(rng, split, attribute2, name2), value2)
    return Item("talk", f"talk:{passage}:{attribute2}:{name2}", name2, talk(*turns))


def _sums(rng: random.Random, split: str) -> Item:
    """A sum, and one more number added to it."""

    def propose_first():
        a, b = rng.randint(0, 50), rng.randint(0, 49)
        return procedures.sum_key(a, b, plus=True), (a, b)

    _, (a, b) = draw(rng, "train", propose_first)

    def propose_second():
        c = rng.randint(0, 99)
        return procedures.sum_key(a + b, c, plus=True), c

    key, c = draw(rng, split, propose_second)
    turns = (
        wording(rng, split, procedures.ADD).format(a=a, b=b),
        str(a + b),
        wording(rng, split, ADD_MORE).format(b=c),
        str(a + b + c),
    )
    return Item("talk", f"talk:{a}+{b}:{key}", key, talk(*turns))


def _topics(rng: random.Random, split: str) -> Item:
    """Two or three questions that have nothing to do with each other."""
    skills = (
        knowledge.facts,
        knowledge.context,
        procedures.arithmetic,
        procedures.compare,
        procedures.sort,
        procedures.reverse,
        procedures.count,
        language.sentiment,
        language.extract,
        language.translate,
        chat,
    )
    earlier = [rng.choice(skills)(rng, "train") for _ in range(rng.randint(1, 2))]
    last = rng.choice(skills)(rng, split)
    turns = [text for item in (*earlier, last) for text in (item.question, item.answer)]
    before = " ".join(item.key for item in earlier)
    return Item("talk", f"talk:{before}:{last.key}", last.entity, talk(*turns))


def _name(rng: random.Random, split: str) -> Item:
    """A name said in the first turn and asked for in the last, sometimes with a turn between."""

    def propose():
        name, greeting = rng.choice(words.FIRST_NAMES), rng.choice(GREETINGS)
        return f"talk:{greeting.format(name=name)}", (name, greeting)

    key, (name, greeting) = draw(rng, split, propose)
    turns = [greeting.format(name=name), f"Hello {name}, how can I help?"]
    if rng.random() < 0.5:
        between = language.sentiment(rng, split)
        turns += [between.question, between.answer]
    turns += [wording(rng, split, MY_NAME), f"Your name is {name}."]
    return Item("talk", key, name, talk(*turns))
