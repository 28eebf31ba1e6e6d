"""Masks, token counts and mixtures, with a tokenizer whose tokens can be counted by hand."""

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from labkit import data

SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
OPENING = "<|bos|>{% for m in messages %}<|{{ m.role }}|>"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
MARKED = (
    OPENING + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}" + PROMPT
)
PLAIN = OPENING + "{{ m.content }}<|end|>{% endfor %}" + PROMPT


def letter_tokenizer(template=MARKED):
    """One token a byte, and one for each special token: lengths are letters plus markers."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=SPECIAL[3:],
    )
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer()


def turns(*texts):
    return [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]


def chat(*texts, **fields):
    return {"messages": turns(*texts), **fields}


def test_the_mask_by_hand(tokenizer):
    view = data.mask_view(tokenizer, chat("Hi", "Yo"))
    assert [(text, supervised) for _, text, supervised in view.tokens] == [
        ("<|bos|>", False),
        ("<|user|>", False),
        ("H", False),
        ("i", False),
        ("<|end|>", False),
        ("<|assistant|>", False),
        ("Y", True),
        ("o", True),
        ("<|end|>", True),
    ]
    assert [token_id for token_id, *_ in view.tokens] == tokenizer.convert_tokens_to_ids(
        ["<|bos|>", "<|user|>", "H", "i", "<|end|>", "<|assistant|>", "Y", "o", "<|end|>"]
    )


def test_every_answer_of_a_chat_is_learned_but_only_the_last_of_a_pair(tokenizer):
    texts = ("a", "BC", "d", "EFG")
    chat_view = data.mask_view(tokenizer, chat(*texts))
    pair = {"prompt": turns(*texts)[:3], "completion": turns(*texts)[3:]}
    pair_view = data.mask_view(tokenizer, pair)
    assert [t[:2] for t in chat_view.tokens] == [t[:2] for t in pair_view.tokens]
    assert _learned(chat_view) == "BC<|end|>EFG<|end|>"
    assert _learned(pair_view) == "EFG<|end|>"


def _learned(view):
    return "".join(text for _, text, supervised in view.tokens if supervised)


def test_other_formats_are_shown_as_chats(tokenizer):
    view = data.mask_view(tokenizer, {"instruction": "Hi", "output": "Yo"})
    assert view == data.mask_view(tokenizer, chat("Hi", "Yo"))
    assert _learned(data.mask_view(tokenizer, {"prompt": "Hi", "completion": " Yo"})) == "Yo<|end|>"


def test_the_text_table_reads_line_by_line(tokenizer):
    lines = data.mask_view(tokenizer, chat("Hi", "Yo")).text().splitlines()
    assert lines[0] == "9 tokens, 3 of them learned"
    assert lines[2].split() == ["0", "1", "-", "'<|bos|>'"]
    assert lines[8].split()[2:] == ["yes", "'Y'"]
    assert len(lines) == 2 + 9


def test_the_coloured_view_escapes_its_tokens_and_says_it_in_words(tokenizer):
    html = data.mask_view(tokenizer, chat("<b>", "\n"))._repr_html_()
    assert "&lt;|bos|&gt;" in html and "<b>" not in html
    assert "↵" in html and "text-decoration:underline" in html
    assert "9 tokens, 2 of them learned" in html  # 3 letters, 1 line break, 5 markers


def test_part_of_a_character_shows_its_vocabulary_name(tokenizer):
    texts = [text for _, text, _ in data.mask_view(tokenizer, chat("é", "o")).tokens]
    assert texts[2:4] == ["Ã", "©"]


def test_masks_need_a_template_with_markers():
    with pytest.raises(ValueError, match="no .* generation .* models.with_generation_markers"):
        data.mask_view(letter_tokenizer(PLAIN), chat("Hi", "Yo"))
    with pytest.raises(ValueError, match="has no chat template; set tokenizer.chat_template"):
        data.mask_view(letter_tokenizer(None), chat("Hi", "Yo"))
    pair = {"prompt": turns("Hi"), "completion": [{"role": "assistant", "content": "Yo"}]}
    assert _learned(data.mask_view(letter_tokenizer(PLAIN), pair)) == "Yo<|end|>"


def test_a_preference_has_no_single_mask(tokenizer):
    with pytest.raises(ValueError, match=r"two answers; show one of them, .*to_messages\(row\)"):
        data.mask_view(tokenizer, {"prompt": "Hi", "chosen": "Yo", "rejected": "No"})


@pytest.mark.parametrize("kind", ["messages", "prompt/completion"])
def test_the_mask_is_what_trl_learns_from(tokenizer, kind, tmp_path):
    """SFTTrainer's own labels beside the view: the same ids, -100 where nothing is learned."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = [chat("Hi", "Yo"), chat("a", "BC", "d", "EFG")]
    dataset = Dataset.from_list(rows)
    if kind == "prompt/completion":
        dataset = data.to_prompt_completion(dataset)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        activation_checkpointing=False,
        assistant_only_loss=kind == "messages",
    )
    trainer = SFTTrainer(
        LlamaForCausalLM(config), arguments, train_dataset=dataset, processing_class=tokenizer
    )
    for row, prepared in zip(dataset, trainer.train_dataset, strict=True):
        expected = [
            token_id if supervised else -100
            for token_id, _, supervised in data.mask_view(tokenizer, row).tokens
        ]
        assert prepared["labels"] == expected


def test_token_lengths_by_hand(tokenizer):
    rows = [chat("Hi", "Yo"), chat("a", "BC", "d", "EFG")]
    frame = data.token_lengths(tokenizer, Dataset.from_list(rows))
    # "Hi": bos user H i end assistant; then a third turn of 5 more before the last answer.
    assert frame.to_dict("list") == {
        "prompt": [6, 5 + 3 + 3 + 1],
        "completion": [3, 4],
        "total": [9, 16],
    }
    plain = data.token_lengths(letter_tokenizer(PLAIN), rows)
    assert plain.equals(frame)  # lengths need no markers
    assert len(data.token_lengths(tokenizer, [])) == 0


def test_validation_with_a_tokenizer(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(
            data.rows.to_line(row)
            for row in [chat("Hi", "Yo"), chat("Hello", "Yo"), chat("Hello there", "Yo")]
        ),
        encoding="utf-8",
    )

    def found(tokenizer, limit):
        return [(p.line, p.code) for p in data.validate(path, tokenizer, max_tokens=limit)]

    # 9, 12 and 18 tokens, of which the last 3 are the answer.
    assert found(tokenizer, 18) == []
    expected = [(2, "too-long"), (3, "too-long"), (3, "nothing-supervised")]
    assert found(tokenizer, 11) == expected
    assert found(letter_tokenizer(PLAIN), 11) == expected
    with pytest.raises(ValueError, match="max_tokens=5 needs a tokenizer"):
        data.validate(path, max_tokens=5)


def test_validation_reports_what_the_template_refuses(tmp_path):
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    path = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "system", "content": "Be kind."}, *turns("Hi", "Yo")]}
    path.write_text(data.rows.to_line(row), encoding="utf-8")
    (problem,) = data.validate(path, letter_tokenizer(no_system + MARKED))
    assert (problem.code, problem.line) == ("template-error", 1)
    assert "no system" in problem.message


def test_validation_sees_an_empty_mask_and_both_answers_of_a_pair(tokenizer, tmp_path):
    unmarked_answers = PLAIN + "{% generation %}{% endgeneration %}"
    path = tmp_path / "rows.jsonl"
    path.write_text(data.rows.to_line(chat("Hi", "Yo")), encoding="utf-8")
    (problem,) = data.validate(path, letter_tokenizer(unmarked_answers))
    assert problem.code == "nothing-supervised"

    pair = {"prompt": "Hi", "chosen": "Yo", "rejected": "No, never"}
    path.write_text(data.rows.to_line(pair), encoding="utf-8")
    assert data.validate(path, tokenizer, max_tokens=16) == []
    (problem,) = data.validate(path, tokenizer, max_tokens=15)
    assert problem.message.startswith("16 tokens, allowed are 15")


def domain_rows(n):
    return [chat(f"d{i}", "yes", id=f"d{i}") for i in range(n)]


def general_rows(n):
    return [chat(f"g{i}", "no", id=f"g{i}") for i in range(n)]


def test_five_to_one_in_rows():
    domain, general = domain_rows(6), general_rows(40)
    mixture = data.mix(domain, general, ratio=5)
    counts = mixture.dataset.to_pandas()["mixed_from"].value_counts().to_dict()
    assert counts == {"domain": 6, "general": 30}
    assert mixture.report.general_share == {"rows": 30 / 36}
    assert mixture.report.repeats == 0


def test_every_row_at_most_once_and_inputs_untouched():
    domain, general = Dataset.from_list(domain_rows(7)), Dataset.from_list(general_rows(20))
    mixture = data.mix(domain, general, ratio=2)
    ids = mixture.dataset["id"]
    assert len(set(ids)) == len(ids) == 21
    assert {f"d{i}" for i in range(7)} < set(ids)
    assert domain.to_list() == domain_rows(7) and general.to_list() == general_rows(20)


def test_interleaved_spreads_evenly_and_concatenated_does_not():
    interleaved = data.mix(domain_rows(10), general_rows(50), ratio=5).dataset["mixed_from"]
    for start in range(0, 60, 6):
        assert list(interleaved[start : start + 6]).count("domain") == 1
    options = {"ratio": 5, "order": "concatenated"}
    mixed_from = data.mix(domain_rows(10), general_rows(50), **options).dataset["mixed_from"]
    assert list(mixed_from) == ["domain"] * 10 + ["general"] * 50


def test_the_seed_draws_the_general_rows():
    def drawn(seed):
        mixture = data.mix(domain_rows(5), general_rows(50), ratio=1, seed=seed)
        return set(mixture.dataset["id"])

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_a_share_below_one_is_replay():
    mixture = data.mix(domain_rows(100), general_rows(50), ratio=0.05)
    assert mixture.report.general == {"rows": 5}


def test_all_three_units_by_hand(tokenizer):
    # "d0"/"yes": 6 + 4 = 10 tokens, 4 learned. "gg..." of 12 letters/"no": 16 + 3 = 19, 3 learned.
    domain = domain_rows(3)
    general = [chat("g" * 12, "no", id=f"g{i}") for i in range(20)]
    report = data.mix(domain, general, ratio=2, tokenizer=tokenizer).report
    assert report.domain == {"rows": 3, "tokens": 30, "loss_tokens": 12}
    assert report.general == {"rows": 6, "tokens": 6 * 19, "loss_tokens": 6 * 3}
    assert report.general_share["loss_tokens"] == 18 / 30

    by_tokens = data.mix(domain, general, ratio=2, unit="tokens", tokenizer=tokenizer).report
    assert by_tokens.general["tokens"] == 57  # 3 rows of 19 are the nearest to 60
    by_loss = data.mix(domain, general, ratio=2, unit="loss_tokens", tokenizer=tokenizer).report
    assert by_loss.general["loss_tokens"] == 24  # 8 rows of 3 are 2 x 12
    assert "1 : 2 asked for in loss_tokens" in str(by_loss)
    assert "rows" in str(by_loss) and "72.7%" in str(by_loss)  # 8 of 11 rows


def test_prompt_completion_rows_mix_too(tokenizer):
    domain, general = map(data.to_prompt_completion, (domain_rows(2), general_rows(4)))
    report = data.mix(domain, general, ratio=1, tokenizer=tokenizer).report
    assert report.domain["loss_tokens"] == 8


def test_columns_of_only_one_side_are_kept_as_null():
    general = [{**row, "skill": "facts"} for row in general_rows(2)]
    dataset = data.mix(domain_rows(2), general, ratio=1).dataset
    skills = {row["id"]: row["skill"] for row in dataset}
    assert skills == {"d0": None, "d1": None, "g0": "facts", "g1": "facts"}


def test_too_few_general_rows_are_named_never_repeated_in_silence(tokenizer):
    message = (
        r"ratio=5 needs 50 general rows, got 40: 10 are missing; lower ratio to 4, add rows, "
        r"or pass allow_repeats=True"
    )
    with pytest.raises(ValueError, match=message):
        data.mix(domain_rows(10), general_rows(40), ratio=5)
    with pytest.raises(ValueError, match="2 are missing; lower ratio to 0.9"):
        options = {"unit": "tokens", "tokenizer": tokenizer}
        data.mix(domain_rows(10), general_rows(10), ratio=1.1, **options)
    mixture = data.mix(domain_rows(10), general_rows(40), ratio=5, allow_repeats=True)
    assert (mixture.report.repeats, len(set(mixture.dataset["id"]))) == (10, 50)
    assert "10 general rows are repeats" in str(mixture.report)
    assert data.mix(domain_rows(10), general_rows(50), ratio=5).report.repeats == 0


def test_the_shares_as_a_frame(tokenizer):
    general = [chat("g" * 12, "no", id=f"g{i}") for i in range(20)]
    report = data.mix(domain_rows(3), general, ratio=2, tokenizer=tokenizer).report
    assert report.to_frame().values.tolist() == [
        ["rows", 3, 6, 6 / 9],
        ["tokens", 30, 114, 114 / 144],
        ["loss_tokens", 12, 18, 18 / 30],
    ]
    assert list(report.to_frame().columns) == ["unit", "domain", "general", "general_share"]


def test_a_row_that_teaches_nothing_is_named(tokenizer):
    question = {"messages": turns("Hi"), "id": "g1"}
    general = [*general_rows(1), question, {**question, "id": "g2"}]
    message = r"general row 1 \(id 'g1'\) has no token .* learned from, and 1 more like it; look"
    with pytest.raises(ValueError, match=message):
        data.mix(domain_rows(2), general, ratio=1, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"domain row 0 has no token .* learned from; look"):
        data.mix([{"messages": turns("Hi")}], general_rows(3), ratio=1, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": "1:5"}, "ratio='1:5' is no number: give general per one domain, 5 for 1 : 5"),
        ({"ratio": 0}, "ratio=0 must be above 0"),
        ({"ratio": -1}, "ratio=-1 must be above 0"),
        ({"ratio": float("nan")}, "ratio=nan must be above 0"),
        ({"ratio": float("inf")}, "ratio=inf must be above 0"),
        ({"ratio": 0.01}, "ratio=0.01 of 2 domain rows rounds to no general row; raise ratio"),
        ({"unit": "words"}, "unit='words' is unknown; use one of rows, tokens, loss_tokens"),
        ({"order": "random"}, "order='random' is unknown; use one of interleaved, concatenated"),
        ({"unit": "tokens"}, "unit='tokens' counts tokens; pass tokenizer="),
        ({"general": []}, "general has no rows"),
        ({"domain": []}, "domain has no rows"),
        ({"general": [{"text": "a"}] * 9}, "bring both to messages or both to prompt and"),
        (
            {"general": [chat("a", "b", id=1)] * 9},
            "column 'id' is .*string.* in domain and .*int64",
        ),
        ({"general": [chat("a", "b", mixed_from=1)] * 9}, "general has a column 'mixed_from'"),
    ],
)
def test_mix_refuses(change, message):
    arguments = {"domain": domain_rows(2), "general": general_rows(9), "ratio": 1, **change}
    with pytest.raises(ValueError, match=message):
        data.mix(arguments.pop("domain"), arguments.pop("general"), **arguments)
