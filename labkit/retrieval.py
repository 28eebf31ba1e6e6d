"""Find the passage that answers a question and put it into the prompt (retrieval augmentation).

The passages are the world's own public records: a biography of every known person, a leaflet of
every medicine. A question is compared with each by TF-IDF (Salton and Buckley 1988): the words that
both hold, rare ones weighing more, as the cosine of an angle. The base model learned to answer from
a passage in its prompt, so nothing is trained.

No record is made from a question or its answer. A record is told anew, in other sentences than
pretraining drew, so that nothing is retrieved word for word from what the model was trained on.

>>> retriever = Retriever([Passage("Ada Frost", "Ada Frost lives in Jorvik."),
...                        Passage("Uma Holt", "Uma Holt has a mouse.")])
>>> retriever.search("Where does Ada Frost live?")[0].passage.about
'Ada Frost'
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from labkit.world import text
from labkit.world.knowledge import PASSAGE_FRAMES
from labkit.world.population import Medicine, Person, population


@dataclass(frozen=True)
class Passage:
    """A text that can be found and read."""

    about: str
    """The person or medicine it tells of."""
    text: str


@dataclass(frozen=True)
class Hit:
    """A passage that was found."""

    passage: Passage
    score: float
    """Cosine of its TF-IDF vector and the question's, in 0..1."""


def passages(
    people: Iterable[Person] | None = None,
    medicines: Iterable[Medicine] | None = None,
    seed: int = 0,
) -> list[Passage]:
    """A biography of each person and a leaflet of each medicine.

    Args:
        people: default all whom pretraining tells of; `population().newcomers` are known to nobody
            but the records.
        medicines: default all.
        seed: of the order and wording of the sentences.
    """
    rng = random.Random(f"retrieval/{seed}")
    people = population().known if people is None else people
    medicines = population().medicines if medicines is None else medicines
    return [Passage(person.name, text.biography(rng, person)) for person in people] + [
        Passage(medicine.name, text.leaflet(rng, medicine)) for medicine in medicines
    ]


class Retriever:
    """TF-IDF search over some passages.

    Raises:
        ValueError: no passages.
    """

    def __init__(self, passages: Sequence[Passage]):
        from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second

        if not passages:
            raise ValueError("passages is empty: give at least one passage to find")
        self.passages = list(passages)
        # Single words: with pairs of words as well, a leaflet worded like the question is found
        # instead of the right medicine's (recall 0.77 on the clinic's questions, not 1.00).
        self._vectorizer = TfidfVectorizer()
        self._vectors = self._vectorizer.fit_transform(each.text for each in self.passages)

    def search(self, question: str, k: int = 1) -> list[Hit]:
        """The `k` most similar passages, best first; fewer where no word is shared.

        Raises:
            ValueError: k below 1.
        """
        from sklearn.metrics.pairwise import cosine_similarity

        if k < 1:
            raise ValueError(f"k={k} must be 1 or more")
        scores = cosine_similarity(self._vectors, self._vectorizer.transform([question]))[:, 0]
        best = (-scores).argsort(kind="stable")[:k]
        return [Hit(self.passages[i], float(scores[i])) for i in best if scores[i] > 0]


def query_of(messages: Sequence[dict]) -> str:
    """What to search for: the last sentence of the last user message.

    People greet before they ask, and the name in a greeting would find the wrong passage.

    Raises:
        ValueError: no message by the user.
    """
    return _last_question(messages).split(". ")[-1]


def with_passage(messages: Sequence[dict], passage: Passage | str) -> list[dict]:
    """The talk with a passage before its last question, in a form that the base was trained on.

    Raises:
        ValueError: no message by the user.
    """
    told = passage.text if isinstance(passage, Passage) else passage
    question = _last_question(messages)
    asked = PASSAGE_FRAMES[1].format(passage=told, question=question)
    place = max(i for i, message in enumerate(messages) if message["role"] == "user")
    return [*messages[:place], {"role": "user", "content": asked}, *messages[place + 1 :]]


def recall_at(retriever: Retriever, rows: Sequence[dict], k: int = 1) -> float:
    """Share of rows for which the passage about their entity is among the first `k` found.

    Args:
        rows: prompts with right answers (`messages`) about an `entity`.

    Raises:
        ValueError: no rows, or an entity that no passage tells of.
    """
    if not len(rows):
        raise ValueError("rows is empty: give at least one row")
    known = {passage.about for passage in retriever.passages}
    found = 0
    for row in rows:
        if row["entity"] not in known:
            raise ValueError(f"row {row.get('id')!r}: no passage is about {row['entity']!r}")
        hits = retriever.search(query_of(row["messages"][:-1]), k)
        found += row["entity"] in {hit.passage.about for hit in hits}
    return found / len(rows)


def _last_question(messages: Sequence[dict]) -> str:
    for message in reversed(messages):
        if message["role"] == "user":
            return message["content"]
    raise ValueError("messages holds no question by the user: nothing to search for")
