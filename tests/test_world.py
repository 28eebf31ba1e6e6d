"""The invented world: exact answers, splits that do not leak, files that follow from the seed."""

import ast
import hashlib
import json
import random
from collections import Counter
from itertools import islice

import pytest

from labkit.paths import base_model_dir, tasks_dir
from labkit.world import conversation, knowledge, language, words
from labkit.world.corpus import documents
from labkit.world.items import SPLITS, split_of, wording
from labkit.world.population import ATTRIBUTES, population
from labkit.world.skills import SKILLS
from labkit.world.tasks import write_tasks

N = 300
KEYS_OF_SPLIT = {
    split: {
        skill: {sample(random.Random(f"test/{split}/{i}"), split).key for i in range(N)}
        for skill, sample in SKILLS.items()
    }
    for split in SPLITS
}


def items(skill: str, split: str = "train", n: int = N):
    rng = random.Random(7)
    return [SKILLS[skill](rng, split) for _ in range(n)]


@pytest.mark.parametrize("skill", SKILLS)
def test_no_problem_is_in_two_splits(skill):
    train, validation, test = (KEYS_OF_SPLIT[split][skill] for split in SPLITS)
    assert not train & test
    assert not train & validation
    assert not validation & test


@pytest.mark.parametrize("skill", SKILLS)
def test_every_item_ends_with_a_short_answer_of_the_assistant(skill):
    for item in items(skill):
        assert item.messages[-1][0] == "assistant"
        assert item.messages[-2][0] == "user"
        assert 0 < len(item.answer) < 120
        assert item.answer == item.answer.strip()


def test_splits_are_by_hash_and_about_eight_one_one():
    counts = Counter(split_of(f"key {i}") for i in range(10_000))
    assert counts["train"] / 10_000 == pytest.approx(0.8, abs=0.03)
    assert counts["test"] / 10_000 == pytest.approx(0.1, abs=0.02)


def test_held_out_wordings_are_never_trained_on():
    phrasings = ("a", "b", "c", "d", "e", "held out")
    rng = random.Random(0)
    assert {wording(rng, "train", phrasings) for _ in range(500)} == set("abcde")
    assert "held out" in {wording(rng, "test", phrasings) for _ in range(500)}


def test_sums_are_right():
    for item in items("arithmetic"):
        body = item.key.removeprefix("arithmetic:")
        a, b = map(int, body.replace("-", "+").split("+"))
        assert item.answer == str(a - b if "-" in body else a + b)
        assert str(a) in item.question
        assert str(b) in item.question


def test_three_plus_five_and_five_plus_three_are_one_problem():
    keys = {item.key for item in items("arithmetic", n=2000) if "+" in item.key}
    for key in keys:
        a, b = map(int, key.removeprefix("arithmetic:").split("+"))
        assert a <= b


def test_lists_are_sorted_reversed_and_counted():
    for item in items("sort"):
        answer = [int(n) for n in item.answer.split()]
        assert answer == sorted(answer) or answer == sorted(answer, reverse=True)
        assert sorted(answer) == sorted(
            int(word) for word in item.question.replace(":", " ").split() if word.isdigit()
        )
    for item in items("reverse"):
        asked = item.question.split(": ")[1].split()
        assert item.answer.split() == asked[::-1]
    for item in items("count"):
        before, listed = item.question.rsplit(": ", 1)
        listed = listed.split()
        counted = [word for word in words.THINGS + words.COLORS + words.ANIMALS
                   if f" {word} " in f"{before} " or before.endswith(word)]  # fmt: skip
        wanted = listed.count(counted[0]) if counted else len(listed)
        assert item.answer == str(wanted), item.question


def test_compare_takes_the_number_asked_for():
    for item in items("compare"):
        a, b = map(int, item.key.split(":")[1:])
        assert item.answer == str(max(a, b) if "larger" in item.question else min(a, b))


def test_the_calculator_call_repeats_the_question():
    for item in items("tool"):
        call = ast.parse(item.answer, mode="eval").body
        assert isinstance(call, ast.Call)
        assert ast.unparse(call.args[0]) in item.question


def test_negation_turns_sentiment_around():
    for item in items("sentiment"):
        negated = any(word in item.question for word in (" not ", "never"))
        _, _, adjective, _ = item.key.split(":")
        assert (item.answer == "positive") == ((adjective in words.GOOD) != negated)


def test_extracted_fields_stand_in_the_record():
    for item in items("extract"):
        if item.answer.startswith("{"):
            values = json.loads(item.answer).values()
        else:
            values = item.answer.replace(" | ", ", ").split(", ")
        for value in values:
            assert str(value) in item.question


def test_solan_puts_the_verb_first_and_the_color_last():
    assert language.solan(("red", "cup")) == f"{words.SOLAN['cup']} {words.SOLAN['red']}"
    sentence = language.solan(("cat", "sees", "red", "cup")).split()
    assert sentence == [words.SOLAN[w] for w in ("sees", "cat", "cup", "red")]
    assert len(set(words.SOLAN.values())) == len(words.SOLAN)


def test_passages_hold_their_answers():
    for item in items("context"):
        assert item.answer in item.question


def test_a_system_prompt_changes_the_form_of_the_answer():
    for item in items("system"):
        form = item.key.split(":")[1]
        assert item.messages[0][0] == "system"
        assert item.messages[0][1] in conversation.SYSTEM_FORMS[form]
        shaped = {
            "sentence": item.answer.startswith("The answer is "),
            "brackets": item.answer[0] + item.answer[-1] == "[]",
            "over": item.answer.endswith(" over"),
            "result": item.answer.startswith("result "),
            "json": item.answer.startswith('{"answer": '),
            "twice": len(set(item.answer.split())) <= (len(item.answer.split()) + 1) // 2,
        }
        assert shaped[form], item


def test_people_are_as_many_as_promised_and_nobody_is_nobody_twice():
    world = population()
    known = {person.name for person in world.known}
    new = {person.name for person in world.newcomers}
    assert (len(world.asked), len(world.bio_only), len(new)) == (320, 80, 100)
    assert len(known | new) == 500
    assert not (known | new) & set(world.nobody)
    assert population(0) == world
    assert population(1) != world


@pytest.fixture(scope="module")
def corpus():
    """The first 20,000 documents as text; about one percent of what the model read."""
    texts = []
    for document in islice(documents(0), 20_000):
        texts.append(document.text or "\n".join(content for _, content in document.item.messages))
    return texts


def test_people_of_biographies_only_are_never_asked_about(corpus):
    names = [person.name for person in population().bio_only]
    told = "\n".join(corpus)
    assert sum(name in told for name in names) > 0.9 * len(names)
    talks = [text for text in corpus if "\n" in text or "?" in text]
    for name in names:
        assert not any(name in text for text in talks)


def test_newcomers_do_not_occur_in_pretraining(corpus):
    told = "\n".join(corpus)
    assert not [person.name for person in population().newcomers if person.name in told]


def test_no_test_question_is_in_the_corpus(corpus):
    learned = set(corpus)
    asked = set()
    for skill in SKILLS:
        for item in items(skill, "test", 100):
            asked.add("\n".join(content for _, content in item.messages))
    assert not learned & asked


def test_documents_are_a_pure_function_of_seed_and_number():
    first = list(islice(documents(3, 14), 50))
    assert first == list(islice(documents(3, 14), 50))
    assert first != list(islice(documents(3, 15), 50))


# ---- task files --------------------------------------------------------------------------------

FROM_THE_WORLD = ("general", "d1_tickets", "d2_newcomers", "d3_second_language", "d5_persona")


def rows(task: str, split: str) -> list[dict]:
    file = tasks_dir() / task / f"{split}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_committed_tasks_are_what_the_seed_gives(tmp_path):
    write_tasks(tmp_path)
    for made in tmp_path.glob("*/*.jsonl"):
        committed = tasks_dir() / made.relative_to(tmp_path)
        assert made.read_bytes() == committed.read_bytes(), committed


def test_the_manifest_names_every_task_file_with_its_hash_and_rows():
    manifest = json.loads((tasks_dir() / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest) == {
        file.relative_to(tasks_dir()).as_posix() for file in tasks_dir().glob("*/*.jsonl")
    }
    for name, entry in manifest.items():
        content = (tasks_dir() / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["rows"] == len(content.splitlines())


@pytest.mark.parametrize("task", [t for t in FROM_THE_WORLD if t != "d2_newcomers"])
def test_task_splits_share_no_problem_and_no_text(task):
    seen: dict[str, str] = {}
    for split in SPLITS:
        for row in rows(task, split):
            for mark in (row["key"], json.dumps(row["messages"][:-1])):
                assert seen.setdefault(mark, split) == split, (task, mark)


def test_newcomers_are_asked_in_wordings_not_trained_on():
    train = {row["messages"][0]["content"] for row in rows("d2_newcomers", "train")}
    test = {row["messages"][0]["content"] for row in rows("d2_newcomers", "test")}
    assert not train & test
    assert len(test) == 100 * len(ATTRIBUTES)


def test_scores_rest_on_at_least_500_rows():
    for task in FROM_THE_WORLD:
        assert len(rows(task, "test")) >= 500, task
    skills = Counter(row["skill"] for row in rows("general", "test"))
    assert skills.pop("bio_only") == 400
    assert set(skills) == set(SKILLS)
    assert min(skills.values()) >= 50


def test_every_token_of_the_tasks_is_frequent_in_pretraining(corpus):
    """At least 500 times in all of pretraining, which is about twenty times this sample."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_model_dir())
    encode = tokenizer.backend_tokenizer.encode_batch
    counts = Counter()
    for text in corpus:
        for encoded in encode(text.split("\n"), add_special_tokens=False):
            counts.update(encoded.ids)
    used = Counter()
    for file in tasks_dir().glob("d*/*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for part in ("messages", "prompt", "chosen"):
                for message in row.get(part, ()):
                    encoded = tokenizer.backend_tokenizer.encode(
                        message["content"], add_special_tokens=False
                    )
                    used.update(encoded.ids)
    documents_read = 500_000  # of 589,008: the second half has other shares
    rare = {
        tokenizer.convert_ids_to_tokens(token): counts[token]
        for token in used
        if counts[token] * documents_read / len(corpus) < 500
    }
    assert not rare


def test_tickets_are_answered_from_their_message():
    for row in rows("d1_tickets", "test"):
        message, answer = (m["content"] for m in row["messages"])
        label, thing, city, mood = answer.split(" | ")
        assert thing in message
        assert city in message
        assert mood in ("positive", "negative")
        assert label in language.INTENTS


def test_vellish_is_solan_backwards_and_asked_in_the_same_frame():
    for row in rows("d3_second_language", "test"):
        prompt, answer = (m["content"] for m in row["messages"])
        assert "Vellish" in prompt
        content = [w for w in prompt.replace(":", " ").split() if w in words.SOLAN]
        assert answer == " ".join(reversed(language.solan(tuple(content)).split()))


def test_the_persona_says_another_name_than_the_base():
    for row in rows("d5_persona", "test"):
        assert "Pico" not in row["messages"][-1]["content"]


def test_facts_agree_with_the_people():
    by_name = {person.name: person for person in population().asked}
    for item in items("facts"):
        if item.entity in by_name:
            _, name, attribute = item.key.split(":")
            assert item.answer == getattr(by_name[name], attribute)
    assert all(item.answer == "unknown" for item in items("unknown"))
    assert not {item.entity for item in items("unknown")} & set(by_name)


def test_statements_and_questions_exist_for_every_attribute():
    assert set(knowledge.QUESTIONS) == set(knowledge.STATEMENTS) == set(ATTRIBUTES)
