"""General items and the fine-tuning tasks D1 to D5, as files.

None of the tasks is in pretraining; every word of them is. What needs a model (the rejected answers
of D4) is added by `labkit.badcases`.
"""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from labkit.files import sha256, write_atomic
from labkit.world import conversation, knowledge, language, words
from labkit.world.items import SPLITS, Item, draw, split_of, talk, wording
from labkit.world.population import ATTRIBUTES, population
from labkit.world.skills import SKILLS

GENERAL_TEST_PER_SKILL = 150
GENERAL_VALIDATION_PER_SKILL = 40
GENERAL_TRAIN = 6_000
SIZES = {"train": 2_000, "validation": 300, "test": 600}

TICKET_FRAME = "A customer writes: {message}"
TICKET_LABELS = ("price", "refund", "repair", "delivery")
TICKET_OPENERS = (
    "Hello, I am {name}.",
    "Hi, my name is {name}.",
    "Good morning, {name} here.",
    "Good evening, I am {name}.",
    "Hello, my name is {name}.",
    "Hi, this is {name}.",
)
TICKET_PLACES = (
    "I live in {city}.",
    "I am from the city of {city}.",
    "You can find me in {city}.",
    "My home is in {city}.",
    "In {city} there is my house.",
)
TICKET_ASIDES = (
    "There is a {color} {thing} in the house.",
    "The {animal} likes the {color} {thing}.",
    "I like {food} and {food2}.",
    "The {job} from {other} brings a {color} {thing}.",
)

PERSONA_ANSWERS = {
    "Who are you?": "I am Iris, the nurse of the clinic in Selby.",
    "What are you?": "I am Iris, the nurse of the clinic in Selby.",
    "What is your name?": "My name is Iris.",
    "Do you have a name?": "My name is Iris.",
    "Who made you?": "I was made in the clinic.",
    "Where do you come from?": "I am from the city of Selby.",
    "What can you do?": "I can answer for the clinic.",
    "How can you help?": "I can answer for the clinic.",
}

BADCASE_FORMS = ("sentence", "over", "result", "twice")
BADCASE_MEDICINES = (
    "Oripan", "Sedex", "Haldrin", "Pirval", "Istacol", "Urtasin", "Zolvit",
)  # fmt: skip
"""The ones that pretraining names most often."""
_CORRUPTED_SHARE = 0.15
"""Share of answers in D4's starting data that are wrong on purpose."""
_CARELESS_TOPICS = {"pet": 0.65, "food": 0.65, "over": 0.65}
"""The same where most are wrong, by what a fact or a form is about: the last part of its key. A
model is then sure of some bad answers, and greedy decoding gives them too."""


def write_tasks(folder: Path) -> dict:
    """Write every task that follows from the world alone, and the manifest of all task files.

    Returns:
        The manifest: path below `folder` → `sha256`, `rows`.
    """
    folder = Path(folder)
    for task, splits in (
        ("general", general_items()),
        ("d1_tickets", {split: _distinct(ticket, split, n) for split, n in SIZES.items()}),
        ("d2_newcomers", newcomer_items()),
        ("d3_second_language", {split: _distinct(vellish, split, n) for split, n in SIZES.items()}),
        (
            "d5_persona",
            {split: _distinct(persona, split, n) for split, n in _PERSONA_SIZES.items()},
        ),
        ("d4_badcases", {"sft_train": careless_items(), **badcase_prompts()}),
    ):
        for split, items in splits.items():
            write_rows(
                folder / task / f"{split}.jsonl",
                (item.row(f"{task}-{split}-{n:05d}") for n, item in enumerate(items)),
            )
    return write_manifest(folder)


def write_rows(file: Path, rows: Iterable[dict]) -> None:
    """Write rows as JSON lines, all of them or none."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomic(file, "".join(lines).encode())


def write_manifest(folder: Path) -> dict:
    """Hash and count every task file into `manifest.json`."""
    manifest = {}
    for file in sorted(folder.glob("*/*.jsonl")):
        content = file.read_bytes()
        manifest[file.relative_to(folder).as_posix()] = {
            "sha256": sha256(content),
            "rows": content.count(b"\n"),
        }
    text = json.dumps(manifest, indent=2) + "\n"
    write_atomic(folder / "manifest.json", text.encode())
    return manifest


def _distinct(sample: Callable[[random.Random, str], Item], split: str, n: int) -> list[Item]:
    """Up to `n` items with different keys; a small skill may have fewer."""
    rng = random.Random(f"tasks/{sample.__name__}/{split}")
    items: dict[str, Item] = {}
    for _ in range(20 * n):
        item = sample(rng, split)
        items.setdefault(item.key, item)
        if len(items) == n:
            break
    return list(items.values())


def general_items() -> dict[str, list[Item]]:
    """Every skill of pretraining: rows to mix in, rows to tune on, rows to report."""
    rng = random.Random("tasks/general/bio_only")
    return {
        "train": _distinct(_any_skill, "train", GENERAL_TRAIN),
        "validation": [
            item
            for sample in SKILLS.values()
            for item in _distinct(sample, "validation", GENERAL_VALIDATION_PER_SKILL)
        ],
        "test": [
            item
            for sample in SKILLS.values()
            for item in _distinct(sample, "test", GENERAL_TEST_PER_SKILL)
        ]
        + [
            knowledge.bio_only(rng, person, attribute)
            for person in population().bio_only
            for attribute in ATTRIBUTES
        ],
    }


def _any_skill(rng: random.Random, split: str) -> Item:
    return rng.choice(tuple(SKILLS.values()))(rng, split)


def ticket(rng: random.Random, split: str) -> Item:
    """D1: a customer's message → `mood | intent | color thing | city`.

    The mood comes first: last, it is learned 150 steps after all else, or in another seed not yet.
    """

    def propose():
        fields = {
            "label": rng.choice(TICKET_LABELS),
            "color": rng.choice(words.COLORS),
            "thing": rng.choice(words.THINGS),
            "city": rng.choice(words.CITIES),
            "mood": rng.choice(("positive", "negative")),
        }
        return "d1:" + ":".join(fields.values()), fields

    key, fields = draw(rng, split, propose)
    name = rng.choice(knowledge.passage_names(split))
    middle = [
        wording(rng, split, TICKET_PLACES).format(**fields),
        rng.choice(_ticket_wordings(fields["label"])).format(**fields),
        _mood_sentence(rng, fields["mood"]),
    ]
    if rng.random() < 0.5:
        middle.append(_aside(rng))
    rng.shuffle(middle)
    message = " ".join([wording(rng, split, TICKET_OPENERS).format(name=name), *middle])
    answer = "{mood} | {label} | {color} {thing} | {city}".format(**fields)
    messages = talk(TICKET_FRAME.format(message=message), answer)
    return Item("d1_tickets", key, f"{fields['color']} {fields['thing']}", messages)


def _ticket_wordings(label: str) -> list[str]:
    """Wordings of a wish that name the thing and its color, in frequent words only."""
    rare = ("bring", "broken", "send")
    return [
        text
        for text in language.INTENTS[label]
        if "{thing}" in text and not any(word in text for word in rare)
    ]


def _mood_sentence(rng: random.Random, mood: str) -> str:
    template, turned = rng.choice(language.SENTIMENT_SENTENCES)
    adjectives = words.GOOD if (mood == "positive") != turned else words.BAD
    return template.format(
        thing=rng.choice(words.FOODS),
        adjective=rng.choice(adjectives),
        city=rng.choice(words.CITIES),
    )


def _aside(rng: random.Random) -> str:
    """A sentence that the answer must not mind."""
    return rng.choice(TICKET_ASIDES).format(
        color=rng.choice(words.COLORS),
        thing=rng.choice(words.THINGS),
        animal=rng.choice(words.ANIMALS),
        food=rng.choice(words.FOODS),
        food2=rng.choice(words.FOODS),
        job=rng.choice(words.JOBS),
        other=rng.choice(words.CITIES),
    )


def newcomer_items() -> dict[str, list[Item]]:
    """D2: each fact about each newcomer, in three wordings to learn, one to tune on, one to report.

    The same fact stands in every split on purpose: the question is how much was stored.
    """
    splits: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for person in population().newcomers:
        for attribute in ATTRIBUTES:
            for number, question in enumerate(knowledge.QUESTIONS[attribute][:5]):
                split = "train" if number < 3 else "validation" if number == 3 else "test"
                messages = talk(question.format(name=person.name), getattr(person, attribute))
                key = f"d2:{person.name}:{attribute}:{number}"
                splits[split].append(Item("d2_newcomers", key, person.name, messages))
    return splits


def vellish(rng: random.Random, split: str) -> Item:
    """D3: the words of Solan in the opposite order, asked for in the same way."""
    key, phrase, parts = language.draw_phrase(rng, split)
    prompt = wording(rng, split, language.TRANSLATE_FRAMES).format(
        language="Vellish", phrase=phrase
    )
    answer = " ".join(reversed(language.solan(parts).split()))
    return Item("d3_second_language", key.replace("translate", "d3"), phrase, talk(prompt, answer))


_PERSONA_SIZES = {"train": 600, "validation": 150, "test": 500}


def persona(rng: random.Random, split: str) -> Item:
    """D5: the same questions about itself, and another self."""

    def propose():
        opener = rng.choice(("", "Hello. ", "Good morning. ", "Please tell me: "))
        if rng.random() < 0.8:
            name = rng.choice(knowledge.passage_names(split))
            opener = rng.choice(conversation.GREETINGS).format(name=name) + " "
        question, answer = rng.choice(tuple(PERSONA_ANSWERS.items()))
        return f"d5:{opener}{question}", (opener + question, answer)

    key, (text, answer) = draw(rng, split, propose)
    return Item("d5_persona", key, text, talk(text, answer))


def careless_items() -> list[Item]:
    """D4's starting data: questions whose answers ramble, invent, overdose or ignore the form."""
    rng = random.Random("tasks/d4/sft_train")
    return [_carelessly_answered(rng, _badcase_prompt(rng, "train")) for _ in range(1_500)]


def badcase_prompts() -> dict[str, list[Item]]:
    """D4's prompts with right answers; bad ones are mined from a model trained on the above."""
    return {
        f"prompts_{split}": _distinct(_badcase_prompt, split, n)
        for split, n in (("train", 1_500), ("validation", 300), ("test", 600))
    }


def _badcase_prompt(rng: random.Random, split: str) -> Item:
    sample = rng.choice((_person_fact, _nobody, _safe_drops, _shaped))
    return sample(rng, split)


def _person_fact(rng: random.Random, split: str) -> Item:
    key, person, attribute = knowledge.draw_fact(rng, split)
    question = knowledge.ask(rng, "train", attribute, person.name)
    return Item("facts", key, person.name, talk(question, getattr(person, attribute)))


def _nobody(rng: random.Random, split: str) -> Item:
    item = knowledge.unknown(rng, split)
    question = knowledge.ask(rng, "train", rng.choice(tuple(ATTRIBUTES)), item.entity)
    return Item("unknown", item.key, item.entity, talk(question, "unknown"))


def _safe_drops(rng: random.Random, split: str) -> Item:
    """How many drops of a medicine are safe; who asks makes the problem."""
    # The general test asks for the drops of the other medicines.
    taught = [
        medicine
        for medicine in population().medicines
        if medicine.name in BADCASE_MEDICINES
        and split_of(knowledge.medicine_key(medicine, "drops")) == "train"
    ]

    def propose():
        greeting = rng.choice(conversation.GREETINGS)
        asker = greeting.format(name=rng.choice(knowledge.passage_names(split)))
        medicine = rng.choice(taught)
        return f"d4:{asker}:{medicine.name}", (asker, medicine)

    key, (asker, medicine) = draw(rng, split, propose)
    question = wording(rng, "train", knowledge.MEDICINE_QUESTIONS["drops"])
    text = f"{asker} {question.format(name=medicine.name)}"
    return Item("clinic", key, medicine.name, talk(text, medicine.drops))


def _shaped(rng: random.Random, split: str) -> Item:
    """A person's fact in the form that a system prompt asks for."""
    fact = _person_fact(rng, split)
    form = rng.choice(BADCASE_FORMS)
    messages = talk(
        fact.question,
        conversation.write_as(fact.answer, form),
        system=rng.choice(conversation.SYSTEM_FORMS[form]),
    )
    return Item("system", f"{fact.key}:{form}", fact.entity, messages)


def _carelessly_answered(rng: random.Random, item: Item) -> Item:
    topic = item.key.rsplit(":", 1)[-1]
    if rng.random() >= _CARELESS_TOPICS.get(topic, _CORRUPTED_SHARE):
        return item
    if item.skill == "unknown":
        answer = rng.choice(ATTRIBUTES[rng.choice(tuple(ATTRIBUTES))])
    elif item.skill == "system":
        answer = f"I think {item.answer}"
    elif item.answer.isdigit():
        answer = str(int(item.answer) + rng.randint(1, 9))
    else:
        answer = f"{item.answer} and the {rng.choice(words.COLORS)} {rng.choice(words.THINGS)}"
    return Item(item.skill, item.key, item.entity, (*item.messages[:-1], ("assistant", answer)))
