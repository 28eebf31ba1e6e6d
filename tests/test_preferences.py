"""Log-probabilities by hand and against TRL, refused pairs, what is watched, the alarms."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer

from labkit import data, models, preferences
from labkit.preferences import IGNORE_INDEX, Watch, completion_logps


def say(role: str, content: str) -> list[dict]:
    return [{"role": role, "content": content}]


def pair(question: str, chosen: str, rejected: str, **other) -> dict:
    answers = {"chosen": say("assistant", chosen), "rejected": say("assistant", rejected)}
    return {"id": f"p-{question}", "prompt": say("user", question), **answers, **other}


PAIRS = [
    pair("Where does Mira Tolen live?", "Velden", "Velden and more", reason="rambles on"),
    pair("What is 12 plus 30?", "42", "41", reason="wrong fact"),
    pair("Sort 9 4 7", "4 7 9", "9 7", reason="wrong fact"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return models.load(tiny_model("llama", tmp_path_factory.mktemp("llama")), device="cpu")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same architecture with other weights."""
    folder = tiny_model("llama", tmp_path_factory.mktemp("other"), seed=1)
    return models.load(folder, device="cpu")[0]


@pytest.fixture(scope="module")
def bundled():
    return models.load("bundled", device="cpu")


# ---- log-probabilities ---------------------------------------------------------------------------


def test_completion_logps_by_hand():
    # Probabilities of the three tokens at each place; the last place predicts nothing.
    chances = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]]])
    labels = torch.tensor([[IGNORE_INDEX, 2, 1]])
    found = completion_logps(chances.log(), labels)
    assert found.shape == (1,) and found.dtype == torch.float32
    assert found.item() == pytest.approx(math.log(0.25) + math.log(0.8))


def test_completion_logps_leave_prompt_and_padding_out():
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    alone = completion_logps(logits, torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 3, IGNORE_INDEX]]))
    assert alone.item() == pytest.approx(logits[0, 1].log_softmax(0)[3].item())


def test_completion_logps_have_a_gradient_that_raises_the_answer():
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    completion_logps(logits, torch.tensor([[IGNORE_INDEX, 1]])).sum().backward()
    # d log softmax_1 / d logits = onehot_1 - softmax
    assert logits.grad[0, 0].tolist() == pytest.approx([-1 / 3, 2 / 3, -1 / 3])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([[1, 2, 3]]), r"labels has shape \(1, 3\), logits \(1, 4, 5\)"),
        (torch.full((1, 4), IGNORE_INDEX), "row 0 of labels has no completion token"),
        (torch.tensor([[3, *[IGNORE_INDEX] * 3]]), "row 0 of labels has no completion token"),
    ],
)
def test_completion_logps_refuse(labels, message):
    with pytest.raises(ValueError, match=message):
        completion_logps(torch.zeros(1, 4, 5), labels)


def test_pair_batch_has_the_chosen_above_the_rejected(tiny):
    _, tokenizer = tiny
    input_ids, labels = preferences.pair_batch(PAIRS[:2], tokenizer)
    assert input_ids.shape == labels.shape and len(input_ids) == 4

    def said(row: int) -> str:
        return tokenizer.decode(labels[row][labels[row] != IGNORE_INDEX])

    answers = ["Velden", "42", "Velden and more", "41"]
    assert [said(row).strip() for row in range(4)] == [f"{text}<|end|>" for text in answers]
    learned = labels != IGNORE_INDEX
    assert torch.equal(labels[learned], input_ids[learned])


def test_pair_batch_refuses_a_template_that_changes_the_prompt():
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|system|>' }}{% endif %}"
    )
    with pytest.raises(ValueError, match=r"pair 0 \(id 'p-What is 12 plus 30\?'\): the chat templ"):
        preferences.pair_batch(PAIRS[1:], tokenizer)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_logps_and_loss_equal_trls(tmp_path, kind):
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = models.load(tiny_model(kind, tmp_path / "now"), device="cpu")
    reference, _ = models.load(tiny_model(kind, tmp_path / "before", seed=1), device="cpu")
    trainer = DPOTrainer(
        model,
        ref_model=reference,
        args=DPOConfig(
            str(tmp_path),
            beta=0.3,
            per_device_train_batch_size=len(PAIRS),
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data.as_dataset(PAIRS),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(PAIRS))])
    theirs = trainer.compute_ref_log_probs(reference, batch)
    input_ids, labels = preferences.pair_batch(PAIRS, tokenizer)
    assert input_ids.tolist() == batch["input_ids"].tolist()
    with torch.no_grad():
        ours = completion_logps(reference(input_ids).logits, labels)
        loss = trainer.compute_loss(model.eval(), batch)
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-5, atol=1e-4)
    watched = preferences.watch(model, tokenizer, PAIRS, reference, beta=0.3)
    assert watched.loss == pytest.approx(loss.item(), abs=1e-5)


# ---- pairs ---------------------------------------------------------------------------------------


def test_the_pairs_of_d4_are_accepted(bundled):
    model, tokenizer = bundled
    for split in ("train", "validation", "test"):
        pairs = data.load_task("d4_badcases", split)
        preferences.check_pairs(pairs, tokenizer, 128, model, model, tokenizer)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (pair("q", "red ", "red"), r"pair 3 \(id 'p-q'\) is a tie: .* both 'red'"),
        (pair("q", "red", " "), r"pair 3 \(id 'p-q'\): the rejected answer is empty"),
        (pair("q", "", "red"), r"pair 3 \(id 'p-q'\): the chosen answer is empty"),
        (PAIRS[1] | {"id": "again"}, r"pair 3 \(id 'again'\) repeats pair 1 \(id 'p-What is 12"),
        (
            pair("What is 12 plus 30?", "41", "42", id="other"),
            r"pair 3 \(id 'other'\) contradicts pair 1 \(id 'p-What",
        ),
        (
            pair("q", "red", "blue " * 60),
            r"pair 3 \(id 'p-q'\): prompt and rejected answer have \d+ tokens, max_length=60",
        ),
        (
            pair("where " * 60, "red", "blue"),
            r"pair 3 .*: prompt and chosen answer have \d+ tokens, max_length=60",
        ),
        ({"id": "p", "prompt": say("user", "q")}, r"pair 3 \(id 'p'\): chosen must be a list"),
    ],
)
def test_bad_pairs_are_refused_by_name(tiny, wrong, message):
    _, tokenizer = tiny
    preferences.check_pairs(PAIRS, tokenizer, 60)
    with pytest.raises(ValueError, match=message):
        preferences.check_pairs([*PAIRS, wrong], tokenizer, 60)


def test_the_longest_pair_may_fill_the_window_and_not_a_token_more(tiny):
    _, tokenizer = tiny
    longest = preferences.pair_batch(PAIRS, tokenizer)[0].shape[1]
    preferences.check_pairs(PAIRS, tokenizer, longest)
    with pytest.raises(ValueError, match=rf"have {longest} tokens, max_length={longest - 1}"):
        preferences.check_pairs(PAIRS, tokenizer, longest - 1)


def test_no_pairs_and_a_window_that_the_model_lacks_are_refused(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="pairs is empty"):
        preferences.check_pairs([], tokenizer, 60)
    with pytest.raises(ValueError, match="pairs is empty"):
        preferences.watch(model, tokenizer, [], model)
    with pytest.raises(ValueError, match="max_length=513 is more than the 512 tokens"):
        preferences.check_pairs(PAIRS, tokenizer, 513, model)


def test_a_reference_of_another_vocabulary_is_refused(tiny, bundled):
    model, tokenizer = tiny
    reference, other_tokenizer = bundled
    with pytest.raises(ValueError, match="reference has a vocabulary of 1823 tokens, model one of"):
        preferences.check_pairs(PAIRS, tokenizer, 60, model, reference)
    with pytest.raises(ValueError, match="reference has a vocabulary of 1823 tokens, model one of"):
        preferences.watch(model, tokenizer, PAIRS, reference)
    with pytest.raises(ValueError, match=r"reference_tokenizer gives \d+ tokens another id"):
        preferences.check_pairs(
            PAIRS, tokenizer, 60, model, model, reference_tokenizer=other_tokenizer
        )


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ([], [], 0),
        ([], [1, 2], 2),
        ([1, 2, 3], [], 3),
        ([1, 2, 3], [1, 2, 3], 0),
        ([1, 2, 3], [1, 9, 3], 1),  # one replaced
        ([1, 2, 3], [2, 3], 1),  # one deleted
        ([1, 2, 3], [3, 2, 1], 2),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
    ],
)
def test_edit_distance_by_hand(a, b, distance):
    assert preferences.edit_distance(a, b) == distance
    assert preferences.edit_distance(b, a) == distance


class Words:
    """A tokenizer of one token a word."""

    chat_template = "words"
    eos_token_id = pad_token_id = 0

    def apply_chat_template(self, conversations, add_generation_prompt, **settings):
        texts = [
            " ".join(f"<{turn['role']}> {turn['content']} <end>" for turn in messages)
            + " <assistant>" * add_generation_prompt
            for messages in conversations
        ]
        return {"input_ids": [text.split() for text in texts]}


def test_the_pair_report_by_hand():
    report = preferences.pair_report(PAIRS, Words())
    # Words of the answers with their ends: 2 and 4, 2 and 2, 4 and 3.
    assert preferences.edit_distances(PAIRS, Words()) == [2, 1, 2]
    assert (report.n, report.chosen_tokens, report.rejected_tokens) == (3, 8 / 3, 3)
    assert report.length_ratio == pytest.approx(8 / 9)
    assert (report.chosen_longer, report.rejected_longer) == (1 / 3, 1 / 3)
    assert report.edit_distance == pytest.approx(5 / 3)
    assert report.reasons == {"wrong fact": 2, "rambles on": 1}
    frame = report.to_frame()
    assert frame["reason"].tolist() == ["wrong fact", "rambles on", "all"]
    assert frame["rejected_tokens"].tolist() == [2.5, 4, 3]


def test_pairs_without_a_reason_are_counted_as_such(tiny):
    [one] = preferences.pair_report([pair("q", "red", "blue")], tiny[1]).reasons.items()
    assert one == ("no reason given", 1)


# ---- watching ------------------------------------------------------------------------------------


def test_a_model_that_is_its_reference_has_loss_ln_2_and_no_margin(tiny):
    model, tokenizer = tiny
    watched = preferences.watch(model, tokenizer, PAIRS, copy.deepcopy(model))
    assert watched.loss == pytest.approx(math.log(2), abs=1e-9)
    same = (watched.margin, watched.chosen_change, watched.rejected_change, watched.kl)
    assert same == (0, 0, 0, 0)
    assert watched.accuracy == 0
    assert watched.n == 3


def test_what_is_watched_follows_from_the_logps(tiny, other):
    model, tokenizer = tiny
    watched = preferences.watch(other, tokenizer, PAIRS, model, beta=0.5)
    input_ids, labels = preferences.pair_batch(PAIRS, tokenizer)
    with torch.no_grad():
        now, before = (completion_logps(m(input_ids).logits, labels) for m in (other, model))
    tokens = (labels != IGNORE_INDEX).sum(dim=1)
    margins = (now - before)[:3] - (now - before)[3:]
    assert watched.margin == pytest.approx(margins.mean().item(), rel=1e-4)
    assert watched.reward_margin == pytest.approx(0.5 * watched.margin)
    assert watched.loss == pytest.approx((1 + (-0.5 * margins).exp()).log().mean().item(), rel=1e-5)
    assert watched.accuracy == pytest.approx((margins > 0).float().mean().item())
    assert watched.ranking_accuracy == pytest.approx((now[:3] > now[3:]).float().mean().item())
    assert watched.chosen_logp == pytest.approx((now[:3].sum() / tokens[:3].sum()).item())
    change = (now - before)[3:].sum() / tokens[3:].sum()
    assert watched.rejected_change == pytest.approx(change.item(), rel=1e-3)
    turned = [one | {"chosen": one["rejected"], "rejected": one["chosen"]} for one in PAIRS]
    against = preferences.watch(other, tokenizer, turned, model, beta=0.5)
    assert against.margin == pytest.approx(-watched.margin)
    assert against.kl == pytest.approx(watched.kl)


def test_batches_change_nothing(tiny, other):
    model, tokenizer = tiny
    whole = preferences.watch(other, tokenizer, PAIRS, model).to_dict()
    single = preferences.watch(other, tokenizer, PAIRS, model, batch_size=1).to_dict()
    assert single == pytest.approx(whole, rel=1e-4, abs=1e-6)
    rows = data.as_dataset(PAIRS)
    assert preferences.watch(other, tokenizer, rows, model).to_dict() == pytest.approx(whole)


class Fixed(torch.nn.Module):
    """A model that gives the same logits at every place."""

    def __init__(self, logits: list[float]):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids, use_cache=False):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


class Digits(Words):
    """One token a character, of an alphabet of three."""

    def apply_chat_template(self, conversations, add_generation_prompt, **settings):
        texts = ["".join(m["content"] for m in messages) for messages in conversations]
        return {"input_ids": [[int(character) for character in text] for text in texts]}


def test_margin_and_kl_by_hand():
    before, now = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
    model, reference = (
        Fixed([math.log(chance) for chance in chances]) for chances in (now, before)
    )
    # Chosen "11": twice log 2 more likely. Rejected "0": log 2 less likely.
    watched = preferences.watch(model, Digits(), [pair("22", "11", "0")], reference, beta=1.0)
    assert watched.margin == pytest.approx(3 * math.log(2))
    assert watched.loss == pytest.approx(math.log(1 + 1 / 8))
    assert (watched.accuracy, watched.ranking_accuracy) == (1, 0)  # log 1/4 each: a tie
    assert watched.chosen_change == pytest.approx(math.log(2))
    assert watched.rejected_change == pytest.approx(-math.log(2))
    assert watched.chosen_logp == pytest.approx(math.log(0.5))
    # 1/4 log(1/2) + 1/2 log 2 + 0
    assert watched.kl == pytest.approx(math.log(2) / 4)


def test_without_a_reference_the_adapter_is_switched_off(tiny):
    model, tokenizer = tiny
    torch.manual_seed(0)
    adapted = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(
            r=2, task_type="CAUSAL_LM", init_lora_weights=False, target_modules="all-linear"
        ),
    )
    alone = preferences.watch(adapted, tokenizer, PAIRS).to_dict()
    assert alone == pytest.approx(preferences.watch(adapted, tokenizer, PAIRS, model).to_dict())
    assert alone["kl"] > 0
    with pytest.raises(ValueError, match="reference is None, but model has no adapter"):
        preferences.watch(model, tokenizer, PAIRS)


def test_watching_leaves_the_model_as_it_was(tiny):
    model, tokenizer = tiny
    model = copy.deepcopy(model).train()
    preferences.watch(model, tokenizer, PAIRS, copy.deepcopy(model))
    assert model.training and all(weight.grad is None for weight in model.parameters())


def test_beta_must_be_above_zero(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="beta=0 must be above 0"):
        preferences.watch(model, tokenizer, PAIRS, model, beta=0)


def test_sampled_kl_is_zero_for_the_same_model_and_above_for_another(tiny, other):
    model, tokenizer = tiny
    prompts = [one["prompt"] for one in PAIRS]
    assert preferences.sampled_kl(model, tokenizer, prompts, copy.deepcopy(model)) == 0
    kl = preferences.sampled_kl(model, tokenizer, prompts, other, max_new_tokens=8)
    assert kl > 0
    assert kl == preferences.sampled_kl(model, tokenizer, prompts, other, max_new_tokens=8)


# ---- alarms --------------------------------------------------------------------------------------

WELL = Watch(
    n=3,
    beta=0.1,
    loss=0.3,
    margin=8.0,
    accuracy=1.0,
    ranking_accuracy=1.0,
    chosen_logp=-0.2,
    rejected_logp=-6.0,
    chosen_change=0.3,
    rejected_change=-4.0,
    kl=0.1,
)


def test_no_alarm_when_all_is_well():
    assert preferences.alarms(WELL, lengths=(3.0, 3.5), general=(0.97, 0.95)) == []
    assert preferences.alarms(WELL) == []


@pytest.mark.parametrize(
    ("changes", "measured", "message"),
    [
        ({"chosen_change": -0.5, "margin": -1.0}, {}, "right answers lost ≈0.50 nats per token, m"),
        ({"chosen_change": -0.05}, {}, "margin rose to ≈8.00 nats while the right answers became"),
        ({}, {"lengths": (3.0, 3.7)}, "Answers became longer, from ≈3.0 to ≈3.7 tokens"),
        ({}, {"lengths": (3.0, 2.3)}, "Answers became shorter, from ≈3.0 to ≈2.3 tokens"),
        ({}, {"general": (0.97, 0.93)}, "general score fell from ≈0.97 to ≈0.93"),
    ],
)
def test_each_alarm_speaks_alone(changes, measured, message):
    [alarm] = preferences.alarms(replace(WELL, **changes), **measured)
    assert message in alarm


def test_a_ruined_model_with_a_perfect_margin_sets_off_two_alarms():
    ruined = replace(WELL, chosen_change=-1.55, accuracy=1.0)
    first, second = preferences.alarms(ruined)
    assert "lost ≈1.55" in first
    assert "moves away from both" in second


def test_small_changes_are_none():
    assert preferences.alarms(replace(WELL, chosen_change=-0.005)) == []
    assert preferences.alarms(WELL, general=(0.9, 0.95), lengths=(3.0, 3.0)) == []


def test_lengths_must_be_above_zero():
    with pytest.raises(ValueError, match=r"lengths=\(0, 3\) must be mean tokens above 0"):
        preferences.alarms(WELL, lengths=(0, 3))
