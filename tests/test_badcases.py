"""Bad answers: the rules that judge them, their rate, the badcase file, the pairs."""

import json

import pytest

from labkit import badcases, data, evaluation, models
from labkit.badcases import DOES_NOT_STOP, Judged
from labkit.errors import LabkitError
from labkit.evaluation import Answer


def row(gold: str, skill: str = "facts", entity: str = "Ada Frost", id: str = "r0") -> dict:
    messages = [
        {"role": "user", "content": f"What about {entity}?"},
        {"role": "assistant", "content": gold},
    ]
    return {"id": id, "messages": messages, "skill": skill, "key": f"k:{id}", "entity": entity}


@pytest.fixture(scope="module")
def bundled():
    return models.load("bundled", device="cpu")


@pytest.fixture(scope="module")
def prompts():
    return data.load_task("d4_badcases", "prompts_validation").select(range(100))


@pytest.mark.parametrize(
    ("skill", "gold", "text", "reason"),
    [
        ("facts", "red", "red", None),
        ("facts", "red", "blue", "wrong fact"),
        ("facts", "red", "red and the blue cup", "rambles on"),
        ("facts", "red", "reddish", "wrong fact"),
        ("unknown", "unknown", "red", "invented fact for an unknown name"),
        ("system", "red over", "red", "wrong form"),
        ("system", "red over", "red red", "wrong form"),
        ("system", "red over", "I think red over", "wrong form"),
        ("system", "red over", "blue over", "wrong fact"),
        ("system", "The answer is red.", "The answer is blue.", "wrong fact"),
        ("clinic", "3", "4", "unsafe number of drops"),
        ("clinic", "3", "2", "wrong number of drops"),
        ("clinic", "3", "many", "wrong number of drops"),
        ("tool", "7898", "7898", None),
        ("tool", "7898", "calculator(4821 + 3077)", "call not executed"),
        ("tool", "7898", "7899", "wrong number"),
    ],
)
def test_what_is_wrong_with_an_answer(skill, gold, text, reason):
    assert badcases.reason_against(row(gold, skill), Answer(text, True, 3)) == reason
    cut = badcases.reason_against(row(gold, skill), Answer(text, False, 3))
    assert cut == DOES_NOT_STOP


# ---- judging a model -----------------------------------------------------------------------------


def test_greedy_judgements_are_those_of_exact_match(bundled, prompts):
    model, tokenizer = bundled
    judged = badcases.judge_samples(model, tokenizer, prompts, 1, do_sample=False, batch_size=100)
    right = evaluation.exact_matches(model, tokenizer, list(prompts))
    assert [one.reason is None for one in judged] == right
    assert all(one.n_tokens > 0 and one.settings["do_sample"] is False for one in judged)


def test_samples_remember_their_seed_and_can_be_had_again(bundled, prompts):
    model, tokenizer = bundled
    few = prompts.select(range(8))
    judged = badcases.judge_samples(model, tokenizer, few, 2, seed=5, temperature=2.0)
    assert [one.settings["seed"] for one in judged] == [5] * 8 + [6] * 8
    again = badcases.judge_samples(model, tokenizer, few, 1, seed=6, temperature=2.0)
    assert again == judged[8:]


def test_other_prompts_are_judged_by_the_rows(bundled):
    model, tokenizer = bundled
    rows = [row("unknown", "unknown"), row("7", "arithmetic")]
    asked = [[{"role": "user", "content": text}] for text in ("What is 3 + 4?", "What is 3 + 4?")]
    judged = badcases.judge_samples(model, tokenizer, rows, 1, do_sample=False, prompts=asked)
    assert [one.text for one in judged] == ["7", "7"]
    assert [one.reason for one in judged] == ["invented fact for an unknown name", None]


def test_impossible_judging_is_refused(bundled):
    model, tokenizer = bundled
    with pytest.raises(ValueError, match="samples=2 with do_sample=False are all alike"):
        badcases.judge_samples(model, tokenizer, [row("red")], 2, do_sample=False)
    with pytest.raises(ValueError, match="prompts has 0 talks for 1 rows"):
        badcases.judge_samples(model, tokenizer, [row("red")], prompts=[])


def test_probabilities_are_what_sampling_tends_to(bundled, prompts):
    """600 samples at temperature 1 are right as often as the probabilities say, within 3 errors."""
    model, tokenizer = bundled
    # Facts of newcomers, which the model can only guess, among prompts that it answers well.
    rows = [*prompts.select(range(60)), *data.load_task("d2_newcomers", "test").select(range(40))]
    right = badcases.right_answer_probabilities(model, tokenizer, rows)
    assert all(0 <= p <= 1 for p in right) and min(right) < 0.2 and max(right) > 0.99
    judged = badcases.judge_samples(model, tokenizer, rows, 6, batch_size=100)
    found = 1 - badcases.badcase_rate(judged).share
    error = sum(p * (1 - p) for p in right) ** 0.5 * 6**0.5 / len(judged)
    assert abs(found - sum(right) / len(right)) < 3 * error + 1e-3


# ---- counting ------------------------------------------------------------------------------------


def test_the_rate_by_hand():
    reasons = ["wrong fact", None, "rambles on", None, "wrong fact", None, None, None]
    judged = [Judged(row("x", entity=f"e{n % 4}"), "y", why) for n, why in enumerate(reasons)]
    rate = badcases.badcase_rate(judged)
    assert (rate.share, rate.n) == (3 / 8, 8)
    assert 0 <= rate.interval[0] < 3 / 8 < rate.interval[1] <= 1
    assert badcases.badcase_rate(judged, "wrong fact").share == 2 / 8
    assert badcases.badcase_rate(judged, "wrong form").share == 0
    assert list(badcases.reason_counts(judged).items()) == [("wrong fact", 2), ("rambles on", 1)]


def test_answers_about_one_entity_count_as_one_for_the_interval():
    """Forty answers about four entities tell less than about forty."""
    verdicts = [None if n % 4 else "wrong fact" for n in range(40)]
    few = [Judged(row("x", entity=f"e{n % 4}"), "y", why) for n, why in enumerate(verdicts)]
    many = [Judged(row("x", entity=f"e{n}"), "y", why) for n, why in enumerate(verdicts)]
    wide, narrow = (badcases.badcase_rate(judged).interval for judged in (few, many))
    assert wide[1] - wide[0] > narrow[1] - narrow[0]


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="judged is empty: judge at least one answer"):
        badcases.badcase_rate([])


# ---- the badcase file ----------------------------------------------------------------------------

JUDGED = [
    Judged(
        row("red", id="a"),
        "red and “blue”",
        "rambles on",
        n_tokens=4,
        settings={"do_sample": True, "seed": 3},
    ),
    Judged(row("red", id="b"), "red", None),
    Judged(row("3", "clinic", "Sedex", id="c"), "9 9 9", DOES_NOT_STOP, stopped=False),
]


def test_a_badcase_file_holds_the_bad_answers_as_they_were_judged(tmp_path):
    file = tmp_path / "bad.jsonl"
    assert badcases.save(file, JUDGED, settings={"model": "careless"}) == 2
    first, second = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert first == {
        "id": "a",
        "prompt": JUDGED[0].row["messages"][:-1],
        "answer": "red and “blue”",
        "stopped": True,
        "n_tokens": 4,
        "reason": "rambles on",
        "gold": "red",
        "skill": "facts",
        "key": "k:a",
        "entity": "Ada Frost",
        "settings": {"do_sample": True, "seed": 3, "model": "careless"},
    }
    assert (second["id"], second["stopped"]) == ("c", False)
    loaded = badcases.load(file)
    assert [one.row for one in loaded] == [JUDGED[0].row, JUDGED[2].row]
    assert [one.text for one in loaded] == ["red and “blue”", "9 9 9"]
    assert [(one.reason, one.stopped, one.n_tokens) for one in loaded] == [
        ("rambles on", True, 4),
        (DOES_NOT_STOP, False, 0),
    ]
    again = tmp_path / "again.jsonl"
    badcases.save(again, loaded)
    assert again.read_bytes() == file.read_bytes()


def test_a_badcase_file_is_never_overwritten(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text("notes of an hour\n", encoding="utf-8")
    with pytest.raises(LabkitError, match=r"bad\.jsonl exists and is not overwritten"):
        badcases.save(file, JUDGED)
    assert file.read_text(encoding="utf-8") == "notes of an hour\n"


def test_no_bad_answer_writes_no_file(tmp_path):
    with pytest.raises(ValueError, match="none of 1 answers is bad"):
        badcases.save(tmp_path / "bad.jsonl", JUDGED[1:2])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reason": None}, r"bad\.jsonl:2: reason must be a text, got None"),
        ({"reason": " "}, r"bad\.jsonl:2: reason is empty"),
        ({"answer": 3}, r"bad\.jsonl:2: answer must be a text, got 3"),
        ({"prompt": "Q?"}, r"bad\.jsonl:2: prompt must be a list of messages .* got 'Q\?'"),
        ({"prompt": [{"role": "user"}]}, r"bad\.jsonl:2: prompt must be a list of messages"),
        ({"prompt": []}, r"bad\.jsonl:2: prompt must be a list of messages"),
        ({"stopped": 1}, r"bad\.jsonl:2: stopped must be true or false, got 1"),
        ({"n_tokens": True}, r"bad\.jsonl:2: n_tokens must be a number of tokens, got True"),
        ({"settings": []}, r"bad\.jsonl:2: settings must be an object"),
        ({"gold": ...}, r"bad\.jsonl:2: field 'gold' is missing"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, change, message):
    file = tmp_path / "bad.jsonl"
    badcases.save(file, JUDGED)
    first, second = file.read_text(encoding="utf-8").splitlines()
    kept = {name: value for name, value in (json.loads(second) | change).items() if value != ...}
    file.write_text(f"{first}\n{json.dumps(kept)}\n", encoding="utf-8")
    with pytest.raises(LabkitError, match=message):
        badcases.load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"bad\.jsonl:1: empty-file"),
        ("[1]\n[2]\n", r"bad\.jsonl:1: a badcase is a JSON object, got \[1\]"),
        ('{"id": "a"\n', r"bad\.jsonl:1: "),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(LabkitError, match=message):
        badcases.load(file)
    with pytest.raises(LabkitError, match="does not exist"):
        badcases.load(tmp_path / "none.jsonl")


def test_pairs_keep_each_bad_answer_once_and_leave_cut_ones_out():
    twice = [*JUDGED, JUDGED[0]]
    [pair] = badcases.pairs(twice, "d4")
    assert pair["chosen"] == [{"role": "assistant", "content": "red"}]
    assert pair["rejected"] == [{"role": "assistant", "content": "red and “blue”"}]
    assert (pair["id"], pair["reason"]) == ("d4-00000", "rambles on")
