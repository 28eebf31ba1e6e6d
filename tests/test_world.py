"""The invented world: exact answers, splits that do not leak, files that follow from the seed."""

import ast
import hashlib
import json
import random
import re
from collections import Counter
from itertools import islice

import pytest

from labkit import evaluation, models
from labkit.paths import tasks_dir
from labkit.world import conversation, knowledge, language, practice, procedures, words
from labkit.world.corpus import PHASES, SHARES, documents
from labkit.world.items import SPLITS, split_of, with_articles, wording
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


def attribute_of(question: str) -> str:
    """Which attribute a question asks for, by its words alone."""
    for attribute in ATTRIBUTES:
        for asked in (*knowledge.QUESTIONS[attribute], *conversation.FOLLOW_UPS[attribute]):
            start, _, end = asked.partition("{name}")
            if question.endswith(end) and start in question:
                return attribute
    raise AssertionError(question)


def test_passages_hold_their_answers():
    for item in items("context"):
        if "What is the color of the " in item.question:
            thing = item.question.split("What is the color of the ")[1].split("?")[0]
            assert f"The {thing} is {item.answer}." in item.question
            continue
        *_, attribute, name = item.key.split(":")
        told = [
            with_articles(statement.format(name=name, value=item.answer))
            for statement in knowledge.STATEMENTS[attribute]
        ]
        assert any(statement in item.question for statement in told), item.question


def test_turns_about_people_are_answered_with_what_they_are():
    by_name = {person.name: person for person in population().asked}
    rng = random.Random(5)
    for kind in (conversation._person, conversation._people):
        for split in SPLITS:
            for _ in range(60):
                _, *turns = ("", *(text for _, text in kind(rng, split).messages))
                name = attribute = None
                for question, answer in zip(turns[::2], turns[1::2], strict=True):
                    named = [known for known in by_name if known in question]
                    name = named[0] if named else name
                    if kind is conversation._person or attribute is None:
                        attribute = attribute_of(question)
                    assert answer == getattr(by_name[name], attribute), turns
                    if split == "train":  # every turn is learned from
                        assert split_of(knowledge.fact_key(by_name[name], attribute)) == "train"


def practised(kind, n=300):
    rng = random.Random(9)
    return [practice.PRACTICE[kind](rng) for _ in range(n)]


def test_practice_in_copying_repeats_word_for_word():
    for item in practised("repeat"):
        assert item.answer in item.question


def test_practice_in_turning_around_keeps_pairs_and_reverses_their_order():
    for item in practised("turn_around"):
        assert item.entity in item.question
        between = next((mark for mark in (" | ", "; ", ", ") if mark in item.answer), ". ")
        told = item.entity.rstrip(".").split(between)
        assert item.answer.rstrip(".").split(between) == told[::-1]


def told_by(passage: str, question: str, answer: str) -> bool:
    """Whether a sentence of the passage tells this answer with what the question asks about."""
    if "What is the color of the " in question:
        thing = question.split("of the ")[-1].rstrip("?")
        return f"The {thing} is {answer}." in passage
    statements = [text for texts in knowledge.STATEMENTS.values() for text in texts]
    people = [name for name in knowledge.passage_names("train") if name in question]
    forms = [form.rstrip(".") for form, _ in practice.PAIR_FORMS]
    keys = set(re.findall(r"[A-Za-z]+", question)) | set(people)
    pairs = re.split(r" \| |; |, |\. ?", passage)
    return any(
        with_articles(statement.format(name=name, value=answer)) in passage
        for statement in statements
        for name in people
    ) or any(form.format(key=key, value=answer) in pairs for form in forms for key in keys)


def test_practice_in_looking_up_asks_for_every_pair_and_answers_from_the_passage():
    for item in practised("look_up"):
        turns = [text for _, text in item.messages]
        passage = with_articles(item.entity)
        for number, (question, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
            asked = question.partition(passage)[2] if number == 0 else question
            assert told_by(passage, asked, answer), (passage, asked, answer)
        assert len(set(turns[::2])) == len(turns) // 2


def test_practice_about_people_cannot_be_answered_without_the_name():
    rng = random.Random(4)
    for _ in range(100):
        turns = [text for _, text in practice._people(rng).messages]
        asked = [attribute_of(question) for question in turns[::2]]
        assert sorted(Counter(asked).values()) == [2, 2]


def test_practice_in_sums_is_right_and_larger_than_the_skill():
    for item in practised("sums"):
        a, b = map(int, re.findall(r"\d+", item.question))
        taken = any(sign in item.question for sign in (" - ", "minus"))
        if "Take" in item.question or "take" in item.question:
            a, b, taken = b, a, True
        assert int(item.answer) == (a - b if taken else a + b)
        assert max(a, b) > 99


def test_practice_names_nobody_new_and_asks_nothing_that_is_tested():
    hidden = {person.name for person in (*population().bio_only, *population().newcomers)}
    held_out = {name for split in ("validation", "test") for name in knowledge.passage_names(split)}
    for kind in practice.PRACTICE:
        for item in practised(kind):
            told = " ".join(text for _, text in item.messages)
            assert not any(name in told for name in hidden | held_out)
            colors = re.findall(r"The \w+ is (\w+)\.", item.entity)
            for thing in re.findall(r"What is the color of the (\w+)\?", told):
                assert split_of(knowledge.thing_key(thing, colors)) == "train"
    rng = random.Random(10)
    for kind, sample in practice.PRACTICE_TEXTS.items():
        for _ in range(200):
            text = sample(rng)
            assert not any(person.name in text for person in population().known), kind
            assert not any(name in text for name in hidden), kind


def test_sums_of_a_talk_go_on_from_the_sum_before():
    rng = random.Random(6)
    for _ in range(100):
        first, total, second, last = (m[1] for m in conversation._sums(rng, "test").messages)
        numbers = [int(n) for n in re.findall(r"\d+", first)]
        assert int(total) == sum(numbers)
        assert int(last) == int(total) + int(re.findall(r"\d+", second)[0])


def test_turns_on_several_topics_keep_their_own_answers(monkeypatch):
    made = []
    for module, skill in ((procedures, "sort"), (procedures, "count"), (knowledge, "facts")):
        sampler = getattr(module, skill)

        def remembered(rng, split, sampler=sampler):
            made.append(sampler(rng, split))
            return made[-1]

        monkeypatch.setattr(module, skill, remembered)
    rng, seen = random.Random(7), 0
    for _ in range(80):
        made.clear()
        messages = conversation._topics(rng, "test").messages
        turns = [text for _, text in messages]
        pairs = set(zip(turns[::2], turns[1::2], strict=True))
        assert {(item.question, item.answer) for item in made} <= pairs
        assert len(turns) in (4, 6)
        seen += len(made)
    assert seen > 20


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


def test_unknown_names_are_of_families_that_nobody_belongs_to():
    world = population()
    known = {person.name.split()[1] for person in (*world.known, *world.newcomers)}
    strange = {name.split()[1] for name in world.nobody}
    assert not known & strange
    assert strange == set(words.STRANGE_LAST_NAMES)
    first_names = {person.name.split()[0] for person in world.known}
    assert {name.split()[0] for name in world.nobody} <= first_names  # no other mark tells them


def test_the_last_phase_has_everything_and_earlier_ones_practise():
    kinds = {"biography", "leaflet", "scene", *practice.PRACTICE, *practice.PRACTICE_TEXTS, *SKILLS}
    assert set(PHASES[-1]) == kinds | {"polite"}
    assert set(SHARES) == kinds
    for kind, phase in (("repeat", 0), ("look_up", 1), ("induction", 3), ("recall", 4)):
        shares = [phase.get(kind, 0) / sum(phase.values()) for phase in PHASES]
        assert max(shares) == shares[phase] > 2 * shares[-1]


def all_phrasings() -> list[tuple[str, ...]]:
    """Every list of wordings that `wording` chooses from."""
    return [
        procedures.ADD,
        procedures.SUBTRACT,
        *procedures.COMPARE.values(),
        *procedures.SORT.values(),
        procedures.REVERSE,
        procedures.COUNT_WORD,
        procedures.COUNT_ALL,
        procedures.TOOL,
        *knowledge.QUESTIONS.values(),
        *knowledge.MEDICINE_QUESTIONS.values(),
        *conversation.FOLLOW_UPS.values(),
        conversation.OTHER_PERSON,
        conversation.ADD_MORE,
        conversation.MY_NAME,
        language.SENTIMENT_FRAMES,
        language.INTENT_FRAMES,
        language.TRANSLATE_FRAMES,
        *language.EXTRACT_FRAMES.values(),
    ]


def held_out(phrasings: tuple[str, ...]) -> tuple[str, ...]:
    """The last fifth, one at least, as `wording` keeps it out of training."""
    return phrasings[-max(1, len(phrasings) // 5) :]


def near_misses() -> list[str]:
    """Held-out wordings that equal a trained one asked politely, but for commas and capitals."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9{}_ +*-]", "", text.lower())

    near = []
    for texts in all_phrasings():
        kept = held_out(texts)
        trained = {plain(f"please {text}") for text in texts[: -len(kept)]}
        near += [text for text in kept if plain(text) in trained]
    return near


def pattern(wording: str) -> re.Pattern:
    """What a wording matches, whatever fills its gaps."""
    return re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(with_articles(wording))))


def test_twelve_held_out_wordings_miss_a_polite_question_by_a_comma():
    near = near_misses()
    assert len(near) == 12 and "Please add {a} and {b}." in near
    assert not any("Please tell me where" in text or "{record}" in text for text in near)


def test_the_bundled_model_meets_its_bars_without_those_wordings_too():
    model, tokenizer = models.load("bundled", device="cpu")
    patterns = [pattern(text) for text in near_misses()]

    def untouched(row) -> bool:
        asked = [m["content"] for m in row["messages"] if m["role"] == "user"]
        return not any(p.search(text) for p in patterns for text in asked)

    every = [row for row in rows("general", "test") if row["skill"] != "bio_only"]
    kept = [row for row in every if untouched(row)]
    assert len(every) - len(kept) == 240
    report = evaluation.skill_report(model, tokenizer, kept)
    assert report.macro >= 0.97
    assert min(score.exact_match for score in report.skills.values()) >= 0.90


def test_polite_questions_are_asked_in_no_held_out_wording():
    rng = random.Random(14)
    patterns = [pattern(text) for texts in all_phrasings() for text in held_out(texts)]
    told = []
    stream = documents(0, number=3, shares={"polite": 1})
    for item in (next(stream).item for _ in range(1_500)):
        told += [text for role, text in item.messages if role == "user"]
    assert any(p.fullmatch("Please add 3 and 5.") for p in patterns)
    assert not [text for text in told if any(p.fullmatch(text) for p in patterns)]
    polite = [text for text in told if "Please" in text]
    assert len(polite) > len(told) / 2
    # Every way is used, and the problem is the same as without it.
    item = SKILLS["arithmetic"](rng, "train")
    ways = {conversation.politely(rng, item).question for _ in range(300)}
    assert len(ways) == 1 + len(conversation.POLITE) - (not item.question.endswith("?"))
    assert conversation.politely(rng, item).answer == item.answer


def test_induction_texts_repeat_groups_in_no_order():
    rng = random.Random(11)
    for _ in range(100):
        text = practice.induction(rng).replace(",", "").replace(".", "").split()
        follows: dict[str, set[str]] = {}
        for word, after in zip(text, text[1:], strict=False):
            follows.setdefault(word, set()).add(after)
        # Inside a group the next word is certain, at its end it is not.
        certain = sum(len(after) == 1 for after in follows.values())
        assert len(follows) / 3 <= certain < len(follows)
        assert max(Counter(text).values()) >= 3


def test_recall_texts_tell_every_value_with_its_own_key():
    rng = random.Random(12)
    known = {person.name for person in (*population().known, *population().newcomers)}
    seen = Counter()
    for _ in range(200):
        text = practice.recall(rng)
        assert not any(name in text for name in known)
        values: dict[str, set[str]] = {}
        for match in re.finditer(r"(\w+(?: \w+)?)\? (?:It is )?(\w+)\.", text):
            key = match[1].removeprefix("about ").removeprefix("and ").removeprefix("is ")
            values.setdefault(key, set()).add(match[2])
        assert all(len(told) == 1 for told in values.values()), text
        seen.update(len(told) for told in values.values())
    assert seen[1] > 200


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


def test_tickets_are_answered_from_their_message():
    for row in rows("d1_tickets", "test"):
        message, answer = (m["content"] for m in row["messages"])
        mood, label, thing, city = answer.split(" | ")
        assert thing in message
        assert city in message
        assert label in language.INTENTS
        adjective = next(w for w in words.GOOD + words.BAD if re.search(rf"\b{w}\b", message))
        turned = bool(re.search(r"\bnot\b(?=[^.!?]*\b" + adjective + r"\b)|\bnever\b", message))
        assert mood == ("positive" if (adjective in words.GOOD) != turned else "negative"), message


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


def test_tasks_never_teach_what_the_general_test_asks():
    asked = {row["key"] for row in rows("general", "test")}
    taught = set()
    for split in ("sft_train", "prompts_train", "train"):
        for row in rows("d4_badcases", split):
            taught.add(row["key"])
            if row["skill"] == "clinic":
                taught.add(f"facts:{row['entity']}:drops")
    assert len(taught) > 500
    assert not taught & asked


def test_sorting_two_numbers_does_not_answer_a_comparison_of_the_test():
    for item in items("compare", "test"):
        a, b = sorted(map(int, item.key.split(":")[1:]))
        assert split_of(f"sort:{[a, b]}") != "train"
    for item in items("sort", "test"):
        numbers = json.loads(item.key.removeprefix("sort:"))
        if len(numbers) == 2:
            assert split_of(f"compare:{numbers[0]}:{numbers[1]}") != "train"


def test_statements_and_questions_exist_for_every_attribute():
    assert set(knowledge.QUESTIONS) == set(knowledge.STATEMENTS) == set(ATTRIBUTES)
