"""The retriever finds the right record, and the bundled model reads the answer off it."""

import math

import pytest

from labkit import data, evaluation, models, retrieval
from labkit.retrieval import Passage, Retriever
from labkit.world.knowledge import PASSAGE_FRAMES
from labkit.world.population import ATTRIBUTES, population

THREE = [
    Passage("red", "apple apple pear"),
    Passage("blue", "pear plum"),
    Passage("green", "fig"),
]


@pytest.fixture(scope="module")
def retriever():
    return Retriever(retrieval.passages())


def ask(content: str, system: str | None = None) -> list[dict]:
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": content}]


def test_scores_by_hand():
    hits = Retriever(THREE).search("pear", k=3)
    assert [hit.passage.about for hit in hits] == ["blue", "red"]  # green shares no word
    # Smoothed inverse document frequency: log((1 + 3) / (1 + count)) + 1; then unit length.
    rare, common = math.log(4 / 2) + 1, math.log(4 / 3) + 1
    assert hits[0].score == pytest.approx(common / math.hypot(common, rare))
    assert hits[1].score == pytest.approx(common / math.hypot(2 * rare, common))


def test_a_question_without_a_known_word_finds_nothing():
    assert Retriever(THREE).search("Where is Jorvik?", k=3) == []


def test_bad_input_is_named(retriever):
    with pytest.raises(ValueError, match="passages is empty"):
        Retriever([])
    with pytest.raises(ValueError, match="k=0 must be 1 or more"):
        retriever.search("pear", k=0)
    with pytest.raises(ValueError, match="messages holds no question by the user"):
        retrieval.query_of([{"role": "system", "content": "Be brief."}])
    with pytest.raises(ValueError, match="rows is empty"):
        retrieval.recall_at(retriever, [])
    row = {"id": "r1", "messages": ask("Who?") + ask("x"), "entity": "Nobody"}
    with pytest.raises(ValueError, match="row 'r1': no passage is about 'Nobody'"):
        retrieval.recall_at(retriever, [row])


def test_there_is_one_true_record_of_everybody_and_every_medicine():
    world = population()
    records = {passage.about: passage.text for passage in retrieval.passages()}
    assert len(records) == len(world.known) + len(world.medicines)
    for person in world.known:
        assert all(getattr(person, attribute) in records[person.name] for attribute in ATTRIBUTES)
    for medicine in world.medicines:
        assert medicine.drops in records[medicine.name]
    strangers = {person.name for person in world.newcomers} | set(world.nobody)
    assert not strangers & records.keys()


def test_records_of_newcomers_can_be_asked_for_and_the_seed_decides_the_words():
    newcomers = population().newcomers[:3]
    only = retrieval.passages(newcomers, medicines=[])
    assert [passage.about for passage in only] == [person.name for person in newcomers]
    assert retrieval.passages(seed=1) == retrieval.passages(seed=1)
    assert retrieval.passages(seed=1) != retrieval.passages(seed=0)


@pytest.mark.parametrize("skill", ["facts", "system", "clinic"])
def test_the_right_record_comes_first_for_d4(retriever, skill):
    known = {passage.about for passage in retriever.passages}
    rows = [
        row
        for row in data.load_task("d4_badcases", "prompts_test")
        if row["skill"] == skill and row["entity"] in known
    ]
    assert len(rows) > 100
    assert retrieval.recall_at(retriever, rows) >= 0.99


def test_the_question_is_searched_for_and_not_the_greeting():
    messages = ask("Good evening, I am Cleo Velt. How many drops of Istacol may I take?")
    assert retrieval.query_of(messages) == "How many drops of Istacol may I take?"
    assert retrieval.query_of(ask("Where does Ada Frost live?")) == "Where does Ada Frost live?"


def test_recall_counts_by_hand():
    retriever = Retriever(THREE)
    rows = [
        {"id": str(n), "messages": ask(text) + ask("answer"), "entity": entity}
        for n, (text, entity) in enumerate([("pear", "red"), ("fig", "green"), ("plum", "blue")])
    ]
    assert retrieval.recall_at(retriever, rows, k=1) == 2 / 3
    assert retrieval.recall_at(retriever, rows, k=2) == 1


def test_a_passage_goes_before_the_last_question_in_a_trained_form():
    passage = Passage("Ada Frost", "Ada Frost has a cat.")
    talk = [*ask("Hello.", system="Be brief."), {"role": "assistant", "content": "Hello."}]
    talk += ask("Which pet does Ada Frost have?")
    before = [dict(message) for message in talk]
    got = retrieval.with_passage(talk, passage)
    question = "Which pet does Ada Frost have?"
    trained = [
        frame.format(passage=passage.text, question=question) for frame in PASSAGE_FRAMES[:-1]
    ]
    assert got[-1]["content"] in trained
    assert got[:-1] == talk[:-1] and talk == before
    assert retrieval.with_passage(talk, passage.text) == got


def test_the_bundled_model_reads_newcomers_off_their_records():
    """Nobody told it of them in training, so that what it knows, it read."""
    model, tokenizer = models.load("bundled", device="cpu")
    people = population().newcomers[:40]
    retriever = Retriever(retrieval.passages(people))
    bare, read = [], []
    for n, person in enumerate(people):
        attribute = list(ATTRIBUTES)[n % len(ATTRIBUTES)]
        question = ask(f"Tell me the {attribute} of {person.name}.")
        answer = [{"role": "assistant", "content": getattr(person, attribute)}]
        [hit] = retriever.search(retrieval.query_of(question))
        bare.append({"id": str(n), "messages": question + answer})
        read.append(
            {"id": str(n), "messages": retrieval.with_passage(question, hit.passage) + answer}
        )
    assert sum(evaluation.exact_matches(model, tokenizer, bare)) <= 10
    assert sum(evaluation.exact_matches(model, tokenizer, read)) >= 36
