"""Practice that is no skill and is scored nowhere: saying a list again, word for word."""

import random

from labkit.world import words
from labkit.world.items import Item, talk
from labkit.world.knowledge import passage_names

FRAMES = (
    "Say again: {listed}",
    "Repeat: {listed}",
    "{listed} Say that again.",
    "Write this once more: {listed}",
)
_WORDS = words.THINGS + words.COLORS + words.ANIMALS + words.CITIES + words.FOODS


def repeat(rng: random.Random) -> Item:
    """Two to five numbers, names and words, and the same again.

    Sorting, comparing and extracting all end in copying, and copying is learned late. Here nearly
    every token of the answer is practice in it, where a comparison offers two.
    """
    parts = [_part(rng) for _ in range(rng.randint(2, 5))]
    listed = rng.choice((" ", ", ")).join(parts)
    messages = talk(rng.choice(FRAMES).format(listed=listed), listed)
    return Item("repeat", f"repeat:{listed}", listed, messages)


def _part(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.6:
        return str(rng.randint(0, rng.choice((99, 999))))
    return rng.choice(_WORDS) if kind < 0.8 else rng.choice(passage_names("train"))
