"""Teacher-forced scores against greedy decoding, losses by hand, and what was forgotten."""

import copy
import math
import random

import pytest
import torch
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from labkit.evaluation import (
    Loss,
    answer_loss,
    answer_losses,
    chance,
    evaluating,
    exact_matches,
    forgetting,
    generate_answers,
    loss_difference,
    neutral_text_loss,
    score,
    skill_report,
)
from labkit.metrics import load_metric

KINDS = ("llama", "qwen3", "gpt2")
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def _row(number: int, question: str, gold: str, *, skill="facts", entity=None, before=()) -> dict:
    messages = [*before, {"role": "user", "content": question}]
    messages.append({"role": "assistant", "content": gold})
    row = {"id": f"r{number}", "messages": messages, "skill": skill, "key": question}
    return row | {"entity": entity or f"e{number}"}


def _turn(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# What the models are trained to say, and the gold answer where that is another one: cut short,
# gone on too long, and wrong in the first token.
TRAINED = [
    _row(0, "Where does Mira Tolen live?", "Velden"),
    _row(1, "What is 12 plus 30?", "42"),
    _row(2, "Sort 9 4 7", "4 7 9", skill="sort"),
    _row(3, "Hello!", "Hello! I am a helpful assistant.", before=[SYSTEM]),
    _row(4, "And 4 plus 7?", "11", before=_turn("What is 4 plus 9?", "13")),
    _row(5, "Who?", "Mira", before=[SYSTEM, *_turn("Where?", "In Velden"), *_turn("Why?", "42")]),
    _row(6, "Say it", "Velden Velden Velden"),
    _row(7, "Sort 7 4", "4 7", skill="sort"),
    _row(8, "Do you know Bo?", "unknown", skill="unknown"),
]
OTHER_GOLD = {6: "Velden", 7: "4 7 9", 8: "Mira"}
EXPECTED = [number not in OTHER_GOLD for number in range(len(TRAINED))]


def _with_gold(row: dict, gold: str) -> dict:
    return row | {"messages": [*row["messages"][:-1], {"role": "assistant", "content": gold}]}


ROWS = [
    _with_gold(row, OTHER_GOLD.get(number, row["messages"][-1]["content"]))
    for number, row in enumerate(TRAINED)
]


def _train(model, tokenizer, rows, steps: int, rate: float = 5e-3) -> None:
    """Overfit on whole conversations in plain PyTorch, so that no code under test takes part."""
    batch = tokenizer.apply_chat_template(
        [row["messages"] for row in rows], padding=True, return_tensors="pt", return_dict=True
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    model.eval()  # dropout only slows overfitting down
    for _ in range(steps):
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module", params=KINDS)
def overfitted(request, tmp_path_factory):
    folder = tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _train(model, tokenizer, TRAINED, steps=80)
    return model, tokenizer


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory):
    folder = tiny_model("llama", tmp_path_factory.mktemp("random"))
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory):
    folder = tiny_model("llama", tmp_path_factory.mktemp("half"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _train(model, tokenizer, TRAINED, steps=60)
    return model, tokenizer


def _generated_matches(model, tokenizer, rows) -> list[bool]:
    """The slow way, one row at a time: transformers' own generate, token by token."""
    verdicts = []
    for row in rows:
        prompt, whole = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=True)
            for messages, ask in ((row["messages"][:-1], True), (row["messages"], False))
        )
        ids = torch.tensor([prompt["input_ids"]])
        gold = whole["input_ids"][ids.shape[1] :]
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=len(gold) + 5,
        )
        verdicts.append(written[0, ids.shape[1] :].tolist() == gold)
    return verdicts


# ---- exact match -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", range(1, 9))
def test_exact_matches_equal_greedy_decoding(overfitted, batch_size):
    model, tokenizer = overfitted
    assert _generated_matches(model, tokenizer, ROWS) == EXPECTED
    assert exact_matches(model, tokenizer, ROWS, batch_size=batch_size) == EXPECTED


def test_order_of_rows_is_kept(overfitted):
    model, tokenizer = overfitted
    order = random.Random(0).sample(range(len(ROWS)), len(ROWS))
    shuffled = exact_matches(model, tokenizer, [ROWS[i] for i in order], batch_size=3)
    assert shuffled == [EXPECTED[i] for i in order]


def test_end_token_is_part_of_the_match(overfitted):
    model, tokenizer = overfitted
    # The model says "Velden Velden Velden": a gold "Velden" is right up to its end token.
    cut_short = _with_gold(TRAINED[6], "Velden")
    assert exact_matches(model, tokenizer, [TRAINED[6], cut_short]) == [True, False]


def test_the_whole_model_gives_the_same_verdicts_as_its_parts(overfitted, monkeypatch):
    model, tokenizer = overfitted
    parts = exact_matches(model, tokenizer, ROWS)
    monkeypatch.setattr("labkit.evaluation._split", lambda model: (None, None))
    assert exact_matches(model, tokenizer, ROWS) == parts == EXPECTED


@pytest.mark.parametrize("steps", [0, 10, 25, 40])
def test_half_trained_models_agree_too(tmp_path, steps):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama", tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    _train(model, tokenizer, TRAINED, steps=steps)
    expected = _generated_matches(model, tokenizer, ROWS)
    assert exact_matches(model, tokenizer, ROWS, batch_size=4) == expected


# PEFT 0.21 asks transformers for a name that transformers 6 will drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    ],
    ids=["lora", "prompt", "p-tuning", "prefix"],
)
def test_adapters_agree_with_greedy_decoding(half_trained, config):
    base, tokenizer = half_trained
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), config)
    _train(model, tokenizer, ROWS, steps=15, rate=2e-2)
    adapted = exact_matches(model, tokenizer, ROWS, batch_size=4)
    assert adapted == _generated_matches(model, tokenizer, ROWS)
    with model.disable_adapter():
        assert exact_matches(model, tokenizer, ROWS) == _generated_matches(model, tokenizer, ROWS)


def test_text_after_the_end_token_does_not_count(overfitted, monkeypatch):
    model, tokenizer = overfitted
    # ChatML writes a line break after every end token; no model ever generates it.
    template = tokenizer.chat_template.replace("{% endgeneration %}", "{% endgeneration %}!")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert tokenizer.apply_chat_template(ROWS[0]["messages"], tokenize=False).endswith("<|end|>!")
    assert exact_matches(model, tokenizer, ROWS[:3]) == EXPECTED[:3]


def test_a_template_without_an_end_token_still_needs_the_model_to_stop(overfitted, monkeypatch):
    model, tokenizer = overfitted
    template = tokenizer.chat_template.replace(
        "{{ message['content'] + '<|end|>' }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}",
    )
    assert template != tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert exact_matches(model, tokenizer, ROWS[:3]) == [True, True, True]
    assert exact_matches(model, tokenizer, [ROWS[6]]) == [False]


def test_a_prompt_that_changes_with_its_answer_is_refused(random_llama, monkeypatch):
    model, tokenizer = random_llama
    template = "{{ messages | length }}" + tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match="row 'r0': the chat template renders the prompt"):
        exact_matches(model, tokenizer, ROWS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows is empty"),
        ([{"id": "r9", "messages": []}], "row 'r9': messages must hold a prompt and end with"),
        ([{"id": "r9", "messages": ROWS[0]["messages"][:1]}], "row 'r9'.*labkit validate"),
        ([_row(9, "x " * 600, "y")], r"row 'r9' has \d+ tokens, the model takes 512"),
    ],
)
def test_bad_rows_are_named(random_llama, rows, message):
    with pytest.raises(ValueError, match=message):
        exact_matches(*random_llama, rows)


def test_bad_settings_are_named(random_llama, monkeypatch):
    model, tokenizer = random_llama
    with pytest.raises(ValueError, match="batch_size=0"):
        exact_matches(model, tokenizer, ROWS, batch_size=0)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        exact_matches(model, tokenizer, ROWS)


def test_progress_counts_every_row(random_llama):
    seen = []
    exact_matches(*random_llama, ROWS, batch_size=4, progress=lambda *done: seen.append(done))
    assert seen == [(4, 9), (8, 9), (9, 9)]


def test_model_is_left_as_it_was(random_llama):
    model, tokenizer = random_llama
    model.train()
    model.model.layers[0].eval()  # someone froze one layer's dropout
    flags = [module.training for module in model.modules()]
    exact_matches(model, tokenizer, ROWS)
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()
    model.eval()


# ---- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_answers_are_what_was_trained(overfitted, batch_size):
    model, tokenizer = overfitted
    prompts = [row["messages"][:-1] for row in TRAINED]
    answers = generate_answers(model, tokenizer, prompts, batch_size=batch_size)
    assert [answer.text for answer in answers] == [
        row["messages"][-1]["content"] for row in TRAINED
    ]
    assert all(answer.stopped for answer in answers)
    gold_ids = tokenizer("Velden", add_special_tokens=False)["input_ids"]
    assert answers[0].n_tokens == len(gold_ids) + 1  # and the end token


def test_an_answer_that_never_stops_says_so(overfitted):
    model, tokenizer = overfitted
    (answer,) = generate_answers(model, tokenizer, [TRAINED[3]["messages"][:-1]], max_new_tokens=3)
    assert not answer.stopped
    assert answer.n_tokens == 3
    assert "Hello! I am a helpful assistant.".startswith(answer.text)


def test_a_models_own_generation_defaults_are_ignored(overfitted, monkeypatch):
    model, tokenizer = overfitted
    prompts = [row["messages"][:-1] for row in TRAINED]
    plain = generate_answers(model, tokenizer, prompts)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 50.0)
    assert generate_answers(model, tokenizer, prompts) == plain


def test_sampling_is_repeatable_and_leaves_the_random_state_alone(random_llama):
    prompts = [row["messages"][:-1] for row in ROWS[:3]]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    settings = {"max_new_tokens": 8, "do_sample": True}
    first = generate_answers(*random_llama, prompts, seed=1, **settings)
    assert generate_answers(*random_llama, prompts, seed=1, **settings) == first
    assert generate_answers(*random_llama, prompts, seed=2, **settings) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_prompts_are_named(random_llama):
    with pytest.raises(ValueError, match="at least one prompt"):
        generate_answers(*random_llama, [])
    with pytest.raises(ValueError, match="temperature=0"):
        generate_answers(*random_llama, [ROWS[0]["messages"][:1]], temperature=0)
    with pytest.raises(ValueError, match=r"prompts\[0\] with its answer has \d+ tokens"):
        generate_answers(*random_llama, [ROWS[0]["messages"][:1]], max_new_tokens=600)


# ---- losses ------------------------------------------------------------------------------------


def test_answer_loss_equals_the_masked_loss_of_transformers(overfitted):
    model, tokenizer = overfitted
    nats = tokens = 0
    for row in ROWS:
        whole = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
        start = len(
            tokenizer.apply_chat_template(
                row["messages"][:-1], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        )
        labels = torch.tensor([[-100] * start + whole[start:]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([whole]), labels=labels).loss.item()
        nats, tokens = nats + loss * (len(whole) - start), tokens + len(whole) - start
    for batch_size in (1, 4, 16):
        found = answer_loss(model, tokenizer, ROWS, batch_size=batch_size)
        assert found == pytest.approx(nats / tokens, rel=1e-4)
    each = answer_losses(model, tokenizer, ROWS)
    assert sum(each.nats) == pytest.approx(nats, rel=1e-4)
    assert (sum(each.tokens), each.n_tokens, len(each.nats)) == (tokens, tokens, len(ROWS))


def test_a_uniform_model_has_the_vocabulary_as_perplexity(random_llama):
    model, tokenizer = random_llama
    head = model.lm_head.weight.data.clone()
    model.lm_head.weight.data.zero_()
    texts = ["Mira Tolen lives in Velden.", "Hello!"]
    try:
        loss = neutral_text_loss(model, tokenizer, texts)
        metric = load_metric("perplexity").compute(
            predictions=texts, model=model, tokenizer=tokenizer
        )
    finally:
        model.lm_head.weight.data.copy_(head)
    assert loss.nats_per_token == pytest.approx(math.log(300), rel=1e-6)
    assert loss.perplexity == pytest.approx(300, rel=1e-5)
    # Every token is predicted, the first one from the begin token.
    assert loss.n_tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert metric["perplexity"] == pytest.approx(300, rel=1e-5)
    assert metric["n_tokens"] == loss.n_tokens


def test_neutral_text_loss_does_not_depend_on_the_batch(overfitted):
    texts = ["Mira Tolen lives in Velden.", "Hello!", "Sort 9 4 7: 4 7 9.", "Where?"]
    losses = [neutral_text_loss(*overfitted, texts, batch_size=size) for size in (1, 2, 4)]
    for loss in losses:
        assert loss.nats_per_token == pytest.approx(losses[0].nats_per_token, rel=1e-5)
        assert (
            loss.interval is not None and loss.interval[0] < loss.nats_per_token < loss.interval[1]
        )
    assert neutral_text_loss(*overfitted, texts[:1]).interval is None
    model, tokenizer = overfitted
    metric = load_metric("perplexity")
    plain = metric.compute(predictions=texts, model=model, tokenizer=tokenizer)
    assert plain["nats_per_token"] == pytest.approx(losses[0].nats_per_token, rel=1e-5)
    assert plain["n_tokens"] == losses[0].n_tokens
    assert plain["perplexity"] == pytest.approx(losses[0].perplexity, rel=1e-4)


def test_perplexity_refuses_dropout_and_empty_texts(random_llama):
    model, tokenizer = random_llama
    metric = load_metric("perplexity")
    with pytest.raises(ValueError, match="predictions holds '': too short"):
        metric.compute(predictions=[""], model=model, tokenizer=tokenizer)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        load_metric("perplexity").compute(predictions=["Hi"], model=model, tokenizer=tokenizer)
    model.eval()


def by_text(*nats: float, tokens: tuple[int, ...]) -> Loss:
    return Loss(sum(nats) / sum(tokens), sum(tokens), None, nats, tokens)


def test_loss_difference_is_paired_over_texts():
    tokens = (2, 4, 2, 2)
    before = by_text(2.0, 40.0, 1.0, 9.0, tokens=tokens)
    after = by_text(6.0, 48.0, 5.0, 13.0, tokens=tokens)
    change = loss_difference(before, after)
    # 4 + 8 + 4 + 4 nats more, over 10 tokens; each text rose by 2 nats a token, however hard it is.
    assert change.mean == pytest.approx(2.0)
    assert change.interval == pytest.approx((2.0, 2.0))
    assert loss_difference(after, before).mean == pytest.approx(-2.0)
    assert loss_difference(before, before).interval == (0.0, 0.0)
    uneven = loss_difference(before, by_text(2.0, 40.0, 1.0, 19.0, tokens=tokens))
    assert uneven.mean == pytest.approx(1.0)
    assert uneven.interval[0] <= 0.0 < 1.0 < uneven.interval[1]  # one text of four did it
    with pytest.raises(ValueError, match="before has 4 texts of 10 tokens, after 1 of 2: measure"):
        loss_difference(before, by_text(2.0, tokens=(2,)))


def test_progress_is_reported_to_the_last_text(random_llama):
    seen: list[tuple[int, int]] = []
    neutral_text_loss(
        *random_llama, ["One.", "Two.", "Three."], 2, lambda done, of: seen.append((done, of))
    )
    assert seen == [(2, 3), (3, 3)]


def test_neutral_text_loss_names_bad_texts(random_llama):
    model, tokenizer = random_llama
    with pytest.raises(ValueError, match=r"notes.txt:2 is '': too short"):
        neutral_text_loss(model, tokenizer, ["Hi!", ""], names=["notes.txt:1", "notes.txt:2"])
    with pytest.raises(ValueError, match="texts is empty"):
        neutral_text_loss(model, tokenizer, [])
    with pytest.raises(ValueError, match=r"texts\[1\] is '': too short"):
        neutral_text_loss(model, tokenizer, ["Hello!", ""])


# ---- scores ------------------------------------------------------------------------------------


def test_score_counts_and_clusters(overfitted):
    result = score(*overfitted, ROWS, name="all")
    assert (result.name, result.n, result.correct) == ("all", 9, tuple(EXPECTED))
    assert result.exact_match == pytest.approx(6 / 9)
    assert result.interval[0] < 6 / 9 < result.interval[1]
    # Three people, each all right or all wrong, say less than nine independent rows.
    people = [row | {"entity": f"p{number // 3}"} for number, row in enumerate(ROWS)]
    clustered = score(*overfitted, people)
    assert clustered.exact_match == result.exact_match
    assert clustered.interval[0] < result.interval[0]


def test_skill_report_by_hand(overfitted):
    bio = _row(20, "What is 12 plus 30?", "42", skill="bio_only")
    report = skill_report(*overfitted, [*ROWS, bio | {"id": "bio"}])
    shares = {name: s.exact_match for name, s in report.skills.items()}
    # facts: rows 0, 1, 3, 4, 5 right, 6 wrong; sort: 2 right, 7 wrong; unknown: 8 wrong.
    assert shares == pytest.approx({"facts": 5 / 6, "sort": 1 / 2, "unknown": 0.0})
    assert report.macro == pytest.approx((5 / 6 + 1 / 2 + 0) / 3)
    assert report.macro_interval[0] <= report.macro <= report.macro_interval[1]
    assert report.unknown_names is report.skills["unknown"]
    assert report.bio_only is not None and report.bio_only.exact_match == 1
    frame = report.to_frame()
    assert list(frame["skill"]) == ["facts", "sort", "unknown", "bio_only", "macro"]
    assert frame["n"].iloc[-1] == 9
    found = report.to_json()
    assert found["skills"]["sort"]["n"] == 2
    assert set(found) == {"macro", "macro_interval", "skills", "bio_only", "unknown_names"}
    assert set(found["skills"]["sort"]) == {"exact_match", "n", "interval"}


def test_skill_report_names_bad_rows(random_llama):
    with pytest.raises(ValueError, match="row 'r0' has no skill"):
        skill_report(*random_llama, [ROWS[0] | {"skill": ""}])
    with pytest.raises(ValueError, match="bio_only questions alone"):
        skill_report(*random_llama, [ROWS[0] | {"skill": "bio_only"}])


def test_forgetting_by_hand(overfitted, random_llama):
    before = skill_report(*overfitted, ROWS)
    after = skill_report(*random_llama, ROWS)
    frame = forgetting(before, after).set_index("skill")
    assert list(frame.columns) == ["before", "after", "change", "low", "high"]
    assert frame.loc["sort", "change"] == -0.5
    assert frame.loc["unknown", "change"] == 0
    macro = frame.loc["macro"]
    assert macro["change"] == pytest.approx(after.macro - before.macro)
    assert (frame["low"] <= frame["change"]).all() and (frame["change"] <= frame["high"]).all()


def test_nothing_forgotten_is_zero_with_room_for_rare_changes(overfitted):
    report = skill_report(*overfitted, ROWS)
    frame = forgetting(report, report)
    assert (frame["change"] == 0).all()
    assert (frame["low"] < 0).all() and (frame["high"] > 0).all()


def test_forgetting_needs_the_same_rows(overfitted):
    whole, part = skill_report(*overfitted, ROWS), skill_report(*overfitted, ROWS[:6])
    with pytest.raises(ValueError, match="same rows"):
        forgetting(whole, part)
    with pytest.raises(ValueError, match="skill 'facts': before and after scored different rows"):
        forgetting(skill_report(*overfitted, ROWS[1:]), whole)


def test_chance_is_the_most_frequent_answer():
    rows = [_row(number, str(number), gold) for number, gold in enumerate("aaab")]
    rows += [_row(9, "x", "only", skill="talk")]
    assert chance(rows) == {"facts": 0.75, "talk": 1.0}
    with pytest.raises(ValueError, match="rows is empty"):
        chance([])
