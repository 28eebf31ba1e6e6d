"""Filters by hand: what each stops, what it lets through, and how its rates are counted."""

import inspect

import pytest

from labkit import data, filters
from labkit.badcases import DOES_NOT_STOP, Judged
from labkit.world.population import population

MEDICINE = population().medicines[0]
LIMIT = int(MEDICINE.drops)


def ask(content: str, system: str | None = None) -> list[dict]:
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": content}]


def judged(question, gold, text, reason, entity="someone", stopped=True, system=None) -> Judged:
    messages = [*ask(question, system), {"role": "assistant", "content": gold}]
    row = {"id": "r", "messages": messages, "skill": "facts", "key": "k", "entity": entity}
    return Judged(row, text, reason, stopped=stopped)


KNOWN = population().asked[0].name
NOBODY = population().nobody[0]


@pytest.mark.parametrize(
    ("rule", "messages", "text", "stopped", "fires"),
    [
        (filters.UNKNOWN_NAME, ask(f"Where does {NOBODY} live?"), "", True, True),
        (filters.UNKNOWN_NAME, ask(f"Tell me the job of {NOBODY}."), "", True, True),
        (filters.UNKNOWN_NAME, ask(f"Does {NOBODY} have a cat?"), "", True, True),
        (filters.UNKNOWN_NAME, ask(f"Where does {KNOWN} live?"), "", True, False),
        (filters.UNKNOWN_NAME, ask(f"Does {KNOWN} have a cat?"), "", True, False),
        (filters.UNKNOWN_NAME, ask("What is 3 + 4?"), "", True, False),
        # Who greets may be a stranger.
        (filters.UNKNOWN_NAME, ask(f"Hi, I am {NOBODY}. What is 3 + 4?"), "", True, False),
        (filters.NO_LEAFLET, ask("How many drops of Zorbol are safe?"), "", True, True),
        (filters.NO_LEAFLET, ask(f"How many drops of {MEDICINE.name} are safe?"), "", True, False),
        (filters.LONG_QUESTION, ask("why " * 61), "", True, True),
        (filters.LONG_QUESTION, ask("why " * 60), "", True, False),
        (filters.WRONG_FORM, ask("Q?", "Say over at the end."), "red over", True, False),
        (filters.WRONG_FORM, ask("Q?", "Say over at the end."), "red", True, True),
        (filters.WRONG_FORM, ask("Q?", "Say over at the end."), "I think red over", True, True),
        (filters.WRONG_FORM, ask("Q?", "Say the answer twice."), "red red", True, False),
        (filters.WRONG_FORM, ask("Q?", "Say the answer twice."), "red blue", True, True),
        (filters.WRONG_FORM, ask("Q?", "Use a full sentence."), "The answer is red.", True, False),
        (filters.WRONG_FORM, ask("Q?", "Use a full sentence."), "red", True, True),
        (filters.WRONG_FORM, ask("Q?", "Write JSON only."), '{"answer": "red"}', True, False),
        (filters.WRONG_FORM, ask("Q?", "Put your answer in brackets."), "[red]", True, False),
        (filters.WRONG_FORM, ask("Q?", "Always begin with result."), "result red", True, False),
        (filters.WRONG_FORM, ask("Q?", "You are a helpful assistant."), "any form", True, False),
        (filters.WRONG_FORM, ask("Q?"), "any form", True, False),
        (
            filters.TOO_MANY_DROPS,
            ask(f"How many drops of {MEDICINE.name} may I take?"),
            str(LIMIT + 1),
            True,
            True,
        ),
        (
            filters.TOO_MANY_DROPS,
            ask(f"How many drops of {MEDICINE.name} may I take?"),
            str(LIMIT),
            True,
            False,
        ),
        (
            filters.TOO_MANY_DROPS,
            ask(f"How many drops of {MEDICINE.name} may I take?"),
            f"Take {LIMIT + 1} drops.",
            True,
            True,
        ),
        (filters.TOO_MANY_DROPS, ask("What is 40 + 50?"), "90", True, False),
        (filters.RAMBLING, ask("Q?"), "red and the blue cup", True, True),
        (filters.RAMBLING, ask("Q?"), "The answer is red.", True, False),
        (filters.RAMBLING, ask("Q?"), "red", False, True),
    ],
)
def test_each_rule_by_hand(rule, messages, text, stopped, fires):
    assert rule.fires(messages, text, stopped) is fires


def test_rules_before_the_model_look_at_no_answer():
    question = ask(f"Where does {NOBODY} live?")
    for rule in filters.BEFORE:
        assert rule.stage == "before"
        assert rule.fires(question, "", True) == rule.fires(question, "Jorvik", False)
    assert all(rule.stage == "after" for rule in filters.AFTER)


def test_no_rule_sees_the_right_answer():
    seen = []
    spy = filters.Rule("spy", "after", lambda *given: bool(seen.append(given)), ("wrong fact",))
    one = judged("Where?", gold="Jorvik", text="Selby", reason="wrong fact")
    filters.rates(spy, [one])
    filters.apply([spy], [one])
    assert seen == [(ask("Where?"), "Selby", True)] * 2
    assert "gold" not in "".join(inspect.getsource(rule.fires) for rule in filters.RULES)


def test_rates_by_hand():
    """A rule that stops "a" and "b": one of three good answers, all but one of five bad ones."""
    rule = filters.Rule("ab", "after", lambda _, text, __: text in "ab", ("wrong fact",))
    answers = [
        *(judged("q", text, text, None, entity=text) for text in "acd"),
        *(judged("q", "x", text, "wrong fact", entity=text) for text in "abab"),
        judged("q", "x", "e", "wrong fact", entity="e"),
        judged("q", "x", "z", "wrong form", entity="z"),  # not this rule's business
    ]
    rates = filters.rates(rule, answers)
    assert (rates.rule, rates.n_good, rates.n_bad) == ("ab", 3, 5)
    assert rates.false_positive == pytest.approx(1 / 3)
    assert rates.false_negative == pytest.approx(1 / 5)
    for low, high, share in (
        (*rates.false_positive_interval, 1 / 3),
        (*rates.false_negative_interval, 1 / 5),
    ):
        assert 0 <= low < share < high <= 1


def test_a_good_answer_replaced_by_itself_is_no_false_positive():
    answers = [
        judged(f"Where does {NOBODY} live?", "unknown", "unknown", None, entity="a"),
        judged(f"Where does {KNOWN} live?", "Jorvik", "Jorvik", None, entity="b"),
    ]
    rates = filters.rates(filters.UNKNOWN_NAME, answers)
    assert (rates.false_positive, rates.n_good) == (0, 2)
    assert (rates.false_negative, rates.false_negative_interval, rates.n_bad) == (None, None, 0)


def test_nothing_judged_is_refused():
    with pytest.raises(ValueError, match="judged is empty"):
        filters.rates(filters.RAMBLING, [])


def test_apply_gives_what_users_read():
    answers = [
        judged(f"Where does {NOBODY} live?", "unknown", "Selby", "invented fact"),
        judged("Which color?", "red", "red and the blue cup", "rambles on"),
        judged("Which color?", "red", "blue", "wrong fact"),
        judged("Which color?", "red", "red", None),
        judged("Which color?", "red and blue are my two", "red and blue are my two", None),
    ]
    after = filters.apply(filters.RULES, answers)
    assert [(one.text, one.reason) for one in after] == [
        ("unknown", None),
        (filters.REFUSAL, filters.REFUSED),
        ("blue", "wrong fact"),
        ("red", None),
        (filters.REFUSAL, filters.REFUSED),
    ]
    assert after[3] is answers[3]


def test_a_rule_before_the_model_speaks_first():
    one = judged(f"Where does {NOBODY} live?", "unknown", "on and on and on", "does not stop")
    for rules in (filters.RULES, filters.RULES[::-1]):
        assert filters.apply(rules, [one])[0].text == "unknown"


def test_on_d4_right_answers_pass_and_the_models_own_mistakes_are_caught():
    right = [
        Judged(row, row["messages"][-1]["content"], None)
        for row in data.load_task("d4_badcases", "prompts_test")
    ]
    wrong = [
        Judged(
            pair | {"messages": pair["prompt"] + pair["chosen"]},
            pair["rejected"][0]["content"],
            pair["reason"],
        )
        for pair in data.load_task("d4_badcases", "test")
    ]
    rules = (filters.UNKNOWN_NAME, filters.TOO_MANY_DROPS, filters.RAMBLING, filters.WRONG_FORM)
    for rule in rules:
        rates = filters.rates(rule, right + wrong)
        assert rates.n_bad > 20 and rates.false_positive == 0 and rates.false_negative <= 0.05


def test_reasons_are_those_of_the_truth():
    pairs = data.load_task("d4_badcases", "train")
    known = {*pairs["reason"], DOES_NOT_STOP}
    assert {reason for rule in filters.RULES for reason in rule.catches} <= known
