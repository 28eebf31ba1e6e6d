"""Skills whose answers are computed: arithmetic, compare, sort, reverse, count, tool."""

import random

from labkit.world import words
from labkit.world.items import Item, draw, split_of, talk, wording

ADD = (
    "What is {a} + {b}?",
    "{a} + {b} =",
    "How much is {a} + {b}?",
    "Add {a} and {b}.",
    "What is {a} plus {b}?",
    "Please add {a} and {b}.",
)
SUBTRACT = (
    "What is {a} - {b}?",
    "{a} - {b} =",
    "How much is {a} - {b}?",
    "Take {b} from {a}.",
    "What is {a} minus {b}?",
    "Please take {b} from {a}.",
)
COMPARE = {
    "larger": (
        "Which is larger, {a} or {b}?",
        "Which number is larger: {a} or {b}?",
        "Tell me the larger one of {a} and {b}.",
        "Is {a} or {b} larger?",
        "Please tell me the larger one of {a} and {b}.",
    ),
    "smaller": (
        "Which is smaller, {a} or {b}?",
        "Which number is smaller: {a} or {b}?",
        "Tell me the smaller one of {a} and {b}.",
        "Is {a} or {b} smaller?",
        "Please tell me the smaller one of {a} and {b}.",
    ),
}
SORT = {
    "up": (
        "Sort from small to large: {numbers}",
        "Put in order, small to large: {numbers}",
        "Sort these numbers: {numbers}",
        "Sort up: {numbers}",
        "Please sort from small to large: {numbers}",
    ),
    "down": (
        "Sort from large to small: {numbers}",
        "Put in order, large to small: {numbers}",
        "Sort these numbers from the largest: {numbers}",
        "Sort down: {numbers}",
        "Please sort from large to small: {numbers}",
    ),
}
REVERSE = (
    "Reverse: {words}",
    "Say these words in reverse order: {words}",
    "Reverse the list: {words}",
    "Turn this list around: {words}",
    "Please reverse: {words}",
)
COUNT_WORD = (
    "How many times does {word} stand in: {words}",
    "Count {word} in: {words}",
    "How often is {word} in this list: {words}",
    "How many times do you see {word}: {words}",
    "Please count {word} in: {words}",
)
COUNT_ALL = (
    "How many words are in: {words}",
    "Count the words: {words}",
    "How long is this list: {words}",
    "How many words do you see: {words}",
    "Please count the words: {words}",
)
TOOL = (
    "What is {a} {op} {b}?",
    "{a} {op} {b} =",
    "How much is {a} {op} {b}?",
    "Compute {a} {op} {b}.",
    "Please compute {a} {op} {b}.",
)
_COMMON_WORDS = words.THINGS + words.COLORS + words.ANIMALS


def arithmetic(rng: random.Random, split: str) -> Item:
    """Sums and differences below 200, done in the head."""

    def propose():
        a, b, plus = rng.randint(0, 99), rng.randint(0, 99), rng.random() < 0.5
        if not plus and b > a:
            a, b = b, a
        return sum_key(a, b, plus), (a, b, plus)

    key, (a, b, plus) = draw(rng, split, propose)
    question = wording(rng, split, ADD if plus else SUBTRACT).format(a=a, b=b)
    return Item("arithmetic", key, key, talk(question, str(a + b if plus else a - b)))


def sum_key(a: int, b: int, plus: bool) -> str:
    """Canonical problem: 3 + 5 and 5 + 3 are one."""
    return f"arithmetic:{min(a, b)}+{max(a, b)}" if plus else f"arithmetic:{a}-{b}"


def compare(rng: random.Random, split: str) -> Item:
    """The larger or the smaller of two numbers below 1,000."""

    def propose():
        high = rng.choice((99, 999))
        a, b = rng.sample(range(high + 1), 2)
        if split != "train" and split_of(f"sort:{sorted((a, b))}") == "train":
            return propose()  # sorting two numbers in training has compared them already
        return f"compare:{min(a, b)}:{max(a, b)}", (a, b)

    key, (a, b) = draw(rng, split, propose)
    which = rng.choice(("larger", "smaller"))
    question = wording(rng, split, COMPARE[which]).format(a=a, b=b)
    return Item(
        "compare", key, key, talk(question, str(max(a, b) if which == "larger" else min(a, b)))
    )


def sort(rng: random.Random, split: str) -> Item:
    """Two or three numbers below 100 in order."""

    def propose():
        numbers = rng.sample(range(100), rng.randint(2, 3))
        pair = f"compare:{min(numbers)}:{max(numbers)}"
        if split != "train" and len(numbers) == 2 and split_of(pair) == "train":
            return propose()  # comparing two numbers in training has sorted them already
        return f"sort:{sorted(numbers)}", numbers

    key, numbers = draw(rng, split, propose)
    way = rng.choice(("up", "down"))
    question = wording(rng, split, SORT[way]).format(numbers=_join(numbers))
    return Item("sort", key, key, talk(question, _join(sorted(numbers, reverse=way == "down"))))


def reverse(rng: random.Random, split: str) -> Item:
    """Three or four words from the last to the first."""

    def propose():
        chosen = rng.sample(_COMMON_WORDS, rng.randint(3, 4))
        return f"reverse:{_join(sorted(chosen))}", chosen

    key, chosen = draw(rng, split, propose)
    question = wording(rng, split, REVERSE).format(words=_join(chosen))
    return Item("reverse", key, key, talk(question, _join(reversed(chosen))))


def count(rng: random.Random, split: str) -> Item:
    """How many words a list has, or how often it has one of them."""

    def propose():
        chosen = [rng.choice(_COMMON_WORDS) for _ in range(rng.randint(2, 6))]
        word = rng.choice(chosen)
        chosen = [word if rng.random() < 0.3 else other for other in chosen]
        return f"count:{_join(sorted(chosen))}", (chosen, word)

    key, (chosen, word) = draw(rng, split, propose)
    if rng.random() < 0.5:
        question = wording(rng, split, COUNT_WORD).format(word=word, words=_join(chosen))
        return Item("count", key, key, talk(question, str(chosen.count(word))))
    question = wording(rng, split, COUNT_ALL).format(words=_join(chosen))
    return Item("count", key, key, talk(question, str(len(chosen))))


def tool(rng: random.Random, split: str) -> Item:
    """A sum too large for the head: the answer is a calculator call, not a number."""

    def propose():
        a, b = rng.randint(1000, 9999), rng.randint(1000, 9999)
        return f"tool:{min(a, b)}:{max(a, b)}", (a, b)

    key, (a, b) = draw(rng, split, propose)
    op = rng.choice("+-*")
    question = wording(rng, split, TOOL).format(a=a, b=b, op=op)
    return Item("tool", key, key, talk(question, f"calculator({a} {op} {b})"))


def _join(values) -> str:
    return " ".join(map(str, values))
