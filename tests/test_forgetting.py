"""Two models compared: on answers made by hand, on losses known in closed form, on damaged files.

The models are tiny and say what a test wants: with attention and MLPs silenced, what follows a
token depends on that token alone, so a few rows of the output matrix spell an answer to everything.
"""

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_tokenizer

from labkit import adapters, evaluation, forgetting, models, paths
from labkit.errors import LabkitError
from labkit.evaluation import Loss
from labkit.forgetting import Comparison, TextChange, Texts, compare, neutral_texts, read_texts

VOCABULARY = 300
WORDS = Texts("3 texts", ("t:1", "t:2", "t:3"), plain=("Mira lives.", "Hello!", "Sort 9 4 7."))


def saying(folder: Path, answer: str | None) -> Path:
    """A model that answers everything with `answer`; None finds every token equally likely."""
    tiny_model("llama", folder)
    model, tokenizer = models.load(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        if answer is not None:
            words = tokenizer(answer, add_special_tokens=False)["input_ids"]
            assert len(set(words)) == len(words), "a token has one successor"
            start = tokenizer.convert_tokens_to_ids("<|assistant|>")
            embedding = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=-1)
            followers = [*words, tokenizer.eos_token_id]
            for token, follower in zip([start, *words], followers, strict=True):
                model.lm_head.weight[follower] += embedding[token]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """Models that answer "Mira", "Sort" or anything, and an adapter that changes nothing."""
    root = tmp_path_factory.mktemp("models")
    found = {"Mira": saying(root / "mira", "Mira"), "Sort": saying(root / "sort", "Sort")}
    found["even"] = saying(root / "even", None)
    model, _ = models.load(found["Mira"])
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapters.save(get_peft_model(model, config), root / "adapter", found["Mira"])
    found["adapter"] = root / "adapter"
    return found


def questions(gold: str, skill: str, n: int) -> list[dict]:
    rows = []
    for number in range(n):
        messages = [
            {"role": "user", "content": f"Who {number}?"},
            {"role": "assistant", "content": gold},
        ]
        rows.append({"id": f"{skill}-{number}", "messages": messages, "skill": skill})
    return rows


def quiet(*arguments, **options):
    options = {"say": lambda line: None, "texts": WORDS} | options
    return compare(*arguments, **options)


# ---- comparing ---------------------------------------------------------------------------------


def test_what_was_forgotten_is_counted_skill_by_skill(made):
    rows = questions("Mira", "names", 30) + questions("Mira", "people", 20)
    rows += questions("Sort", "sort", 10) + questions("Sort", evaluation.BIO_ONLY, 5)
    found = quiet(made["Mira"], made["Sort"], rows=rows, skills=True)
    changes = found.skills.set_index("skill")["change"].to_dict()
    # All names and people lost, all sorting gained: (-1 - 1 + 1) / 3.
    assert changes == {"names": -1.0, "people": -1.0, "sort": 1.0, "macro": pytest.approx(-1 / 3)}
    assert found.n_rows == 60
    assert found.judged["skills"] == "forgot"
    back = quiet(made["Sort"], made["Mira"], rows=rows, skills=True)
    assert back.judged["skills"] == "gained"


def test_the_order_of_the_two_models_decides_the_sign(made):
    rows = questions("Mira", "names", 30)
    lost = quiet(made["Mira"], made["Sort"], rows=rows, skills=True)
    assert lost.line.startswith("forgot 100.0 points [")
    assert "mean over skills 1.000 to 0.000, most in names -100" in lost.line
    found = quiet(made["Sort"], made["Mira"], rows=rows, skills=True)
    assert "gained 100.0 points [" in found.line


def test_an_adapter_that_does_nothing_lost_nothing(made):
    said: list[str] = []
    found = quiet(made["Mira"], made["adapter"], say=said.append)
    assert said[1] == f"loading {made['adapter']} on {made['Mira']}"
    assert found.skills is None  # another vocabulary than the bundled model's
    assert (found.text.change.mean, found.text.change.interval) == (0.0, (0.0, 0.0))
    assert found.verdict == "kept"
    assert found.line.startswith("nothing lost within ±0.02 nats per token: ")


def test_a_uniform_model_costs_the_logarithm_of_the_vocabulary(made):
    found = quiet(made["even"], made["Mira"])
    assert found.text.before.nats_per_token == pytest.approx(math.log(VOCABULARY), rel=1e-5)
    rise = found.text.after.nats_per_token - found.text.before.nats_per_token
    assert found.text.change.mean == pytest.approx(rise, rel=1e-6)
    assert found.text.unit == "nats per token"


def test_talks_are_measured_on_their_answers(made):
    talks = Texts("2 talks", ("a:1", "a:2"), talks=tuple(questions("Mira", "names", 2)))
    found = quiet(made["Mira"], made["Sort"], texts=talks)
    # The model that says it foresees the answer and its end; the other one says something else.
    assert found.text.before.nats_per_token < 1 < 3 < found.text.after.nats_per_token
    assert found.text.before.n_tokens == sum(found.text.before.tokens)
    tokens = len(tiny_tokenizer()("Mira")["input_ids"]) + 1
    assert found.text.before.tokens == (tokens, tokens)


def retokenized(made, folder: Path, **config) -> Path:
    """The even model with a tokenizer that joins no letters, and with other settings of it."""
    shutil.copytree(made["even"], folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = []
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | config))
    return folder


def test_other_tokens_are_compared_byte_by_byte(made, tmp_path):
    found = quiet(made["even"], retokenized(made, tmp_path / "letters"))
    n_bytes = sum(len(text) for text in WORDS.plain)
    joined = sum(len(tiny_tokenizer()(text)["input_ids"]) for text in WORDS.plain)
    letters = n_bytes + len(WORDS.plain)  # the tokenizer puts a space before each text
    assert found.text.unit == "nats per byte"
    before, after = found.text.before, found.text.after
    assert before.nats_per_token == pytest.approx(math.log(VOCABULARY) * joined / n_bytes, rel=1e-5)
    assert after.nats_per_token == pytest.approx(math.log(VOCABULARY) * letters / n_bytes, rel=1e-5)
    assert found.verdict == "forgot"


def test_other_tokens_without_a_begin_token_are_refused(made, tmp_path):
    other = retokenized(made, tmp_path / "letters", bos_token=None)
    with pytest.raises(ValueError, match="letters has no begin token, .* models of one tokenizer"):
        quiet(made["even"], other)


def test_the_world_is_known_by_its_vocabulary(monkeypatch, tmp_path):
    bundled = models.AutoTokenizer.from_pretrained(str(paths.base_model_dir()))
    assert forgetting.knows_the_world(bundled)
    assert not forgetting.knows_the_world(tiny_tokenizer())
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    assert not forgetting.knows_the_world(bundled)  # nothing to compare with


def test_a_limit_takes_rows_evenly_from_every_skill(made):
    rows = questions("Mira", "names", 30) + questions("Sort", "sort", 10)
    found = quiet(made["Mira"], made["Sort"], rows=rows, skills=True, most_rows=7)
    assert found.n_rows == 7
    kept = forgetting._questions(rows, 7)
    assert [row["id"] for row in kept] == [
        "names-0", "names-7", "names-15", "names-22", "sort-0", "sort-3", "sort-6",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="--rows 3: 2 skills need at least 4 rows"):
        quiet(made["Mira"], made["Sort"], rows=rows, skills=True, most_rows=3)
    assert quiet(made["Mira"], made["Sort"], most_rows=2).text.what == "the first 2 of 3 texts"


# ---- whose adapter -----------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused(made, tmp_path):
    said: list[str] = []
    with pytest.raises(LabkitError, match="adapter was trained on other weights than .*sort has"):
        quiet(made["Sort"], made["adapter"], base=made["Sort"], say=said.append)
    assert not said  # found before anything was loaded
    with pytest.raises(ValueError, match="--base bundled: neither .* is an adapter: leave it out"):
        quiet(made["Mira"], made["Sort"], base="bundled")


def test_an_adapter_that_was_moved_takes_the_other_model_as_its_base(made, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(made["adapter"], moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (moved / "adapter_config.json").write_text(json.dumps(config))
    record = json.loads((moved / adapters.RECORD).read_text())
    (moved / adapters.RECORD).write_text(json.dumps(record | {"base": str(tmp_path / "gone")}))
    assert quiet(made["Mira"], moved).verdict == "kept"
    with pytest.raises(LabkitError, match="trained on other weights than"):  # the hash still tells
        quiet(made["Sort"], moved)
    with pytest.raises(LabkitError, match="gone, is not here: name its folder with --base"):
        quiet(made["adapter"], moved)
    (moved / adapters.RECORD).unlink()
    said: list[str] = []
    quiet(made["Mira"], moved, say=said.append)
    assert said[1].endswith("on trust: its hash is not kept")


def test_a_folder_is_an_adapter_only_without_a_model(made, tmp_path):
    assert adapters.is_adapter(made["adapter"])
    assert not adapters.is_adapter(made["Mira"]) and not adapters.is_adapter(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"after": "./nowhere"}, LabkitError, "model folder ./nowhere is missing"),
        ({"margin_points": 0}, ValueError, "margin_points=0 must be above 0"),
        ({"margin_nats": -1}, ValueError, "margin_nats=-1 must be above 0"),
        (
            {"texts": Texts("1 text", ("notes.txt:3",), plain=("word " * 600,))},
            ValueError,
            r"notes.txt:3 has \d+ tokens, the model takes 512: shorten it",
        ),
    ],
)
def test_bad_requests_are_named(options, error, message, made):
    options = {"before": made["Mira"], "after": made["Sort"]} | options
    with pytest.raises(error, match=message):
        quiet(options.pop("before"), options.pop("after"), **options)


# ---- verdicts ----------------------------------------------------------------------------------


def frame(*rows) -> pd.DataFrame:
    columns = ["skill", "before", "after", "change", "low", "high"]
    return pd.DataFrame([(name, 0.9, 0.9 + c, c, a, b) for name, c, a, b in rows], columns=columns)


def loss(*nats, tokens=10) -> Loss:
    n_tokens = tokens * len(nats)
    return Loss(sum(nats) / n_tokens, n_tokens, None, nats, (tokens,) * len(nats))


def text_change(before: Loss, after: Loss) -> TextChange:
    change = evaluation.loss_difference(before, after)
    return TextChange("4 texts", "nats per token", before, after, change)


@pytest.mark.parametrize(
    ("macro", "verdict", "line"),
    [
        (
            (-0.2, -0.25, -0.15),
            "forgot",
            "forgot 20.0 points [15.0, 25.0]: mean over skills",
        ),
        ((0.1, 0.05, 0.15), "gained", "gained 10.0 points [5.0, 15.0]: mean over skills"),
        ((-0.002, -0.008, 0.004), "kept", "nothing lost within ±1 points of skills: mean"),
        # Surely below 0, and surely too little to matter.
        ((-0.004, -0.006, -0.002), "kept", "nothing lost within ±1 points of skills: mean"),
        ((-0.01, -0.03, 0.01), "inconclusive", "inconclusive on skills: mean over skills 0.900 to"),
    ],
)
def test_the_interval_decides_the_verdict(macro, verdict, line):
    found = Comparison("a", "b", frame(("sort", *macro), ("macro", *macro)), None)
    assert found.verdict == verdict
    assert found.line.startswith(line)


def test_the_skills_that_lost_most_are_named_and_no_others():
    rows = frame(
        ("facts", -0.1, -0.2, -0.01), ("sort", -0.8, -0.9, -0.7), ("chat", -0.3, -0.7, 0.1),
        ("macro", -0.4, -0.5, -0.3),
    )  # fmt: skip
    found = Comparison("a", "b", rows, None)
    assert found.line.endswith("most in sort -80, facts -10")  # chat's interval holds 0
    remarks = [row[-1] for row in found.rows()]
    assert remarks == ["lost", "lost", "", "lost"]
    assert found.rows()[1] == ["sort", "0.900", "0.100", "-0.800", "-0.900 to -0.700", "lost"]


def test_loss_that_rises_is_lost_and_loss_that_falls_is_gained():
    low, high = loss(10.0, 12.0, 9.0, 11.0), loss(13.0, 14.0, 12.0, 15.0)
    worse = Comparison("a", "b", None, text_change(low, high))
    # (3 + 2 + 3 + 4) / 40 tokens.
    assert worse.text.change.mean == pytest.approx(0.3)
    assert worse.verdict == "forgot" and worse.line.startswith("forgot 0.300 nats per token [0.")
    better = Comparison("a", "b", None, text_change(high, low))
    assert better.verdict == "gained" and better.rows()[0][-1] == "gained"
    one = Comparison("a", "b", None, text_change(loss(10.0), loss(20.0)))
    assert one.verdict == "inconclusive" and "(one text has no interval)" in one.line
    assert one.rows()[0] == ["loss, nats per token", "1.000", "2.000", "+1.000", "none", ""]


def test_the_measure_that_decides_comes_first():
    kept = frame(("sort", 0.0, -0.001, 0.001), ("macro", 0.0, -0.001, 0.001))
    text = text_change(loss(10.0, 12.0, 9.0, 11.0), loss(13.0, 14.0, 12.0, 15.0))
    found = Comparison("a", "b", kept, text)
    assert found.judged == {"skills": "kept", "text": "forgot"}
    assert found.line.startswith("forgot 0.300 nats") and "; nothing lost within" in found.line
    assert str(found) == f"a -> b: {found.line}"
    wide = Comparison("a", "b", kept, text, margin_nats=1.0)
    assert wide.verdict == "kept"


def test_json_holds_every_number_once():
    rows = frame(("sort", -0.8, -0.9, -0.7), ("macro", -0.8, -0.9, -0.7))
    text = text_change(loss(10.0, 12.0), loss(13.0, 14.0))
    found = json.loads(json.dumps(Comparison("a", "b", rows, text, n_rows=9).to_json()))
    assert found["verdict"] == "forgot" and found["judged"]["text"] == "forgot"
    assert found["macro"] == {
        "before": 0.9, "after": pytest.approx(0.1), "change": -0.8, "interval": [-0.9, -0.7],
    }  # fmt: skip
    assert list(found["skills"]) == ["sort"] and found["rows"] == 9
    assert found["text"]["change"] == pytest.approx(0.25) and found["text"]["texts"] == 2
    alone = Comparison("a", "b", None, text).to_json()
    assert alone["skills"] is None and alone["macro"] is None


@pytest.mark.parametrize("name", ["both.png", "skills.svg", "text.pdf"])
def test_the_figure_is_drawn_into_a_file_and_said_in_words(name, tmp_path):
    rows = frame(("sort", -0.8, -0.9, -0.7), ("macro", -0.8, -0.9, -0.7))
    text = text_change(loss(10.0, 12.0), loss(13.0, 14.0))
    shown = {"both": (rows, text), "skills": (rows, None), "text": (None, text)}[name[:-4]]
    said = Comparison("a", "b", *shown).figure(tmp_path / name)
    head = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[name[-3:]]
    assert (tmp_path / name).read_bytes().startswith(head)
    assert ("sort ≈0.90 to ≈0.10" in said) == (shown[0] is not None)
    assert ("Loss on 2 texts goes from ≈1.10 to ≈1.35" in said) == (shown[1] is not None)


def test_a_figure_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--figure x.gif: name a .png, .svg, .pdf file"):
        forgetting.check_figure("x.gif")


# ---- texts -------------------------------------------------------------------------------------


def test_neutral_texts_are_the_same_every_time_and_all_different():
    texts = neutral_texts(50)
    assert texts == neutral_texts(50) and len(set(texts)) == 50
    assert texts != neutral_texts(50, seed=1)
    assert all(3 <= text.count(".") + text.count("?") and "{" not in text for text in texts)
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        neutral_texts(0)


def test_prose_is_read_by_lines_or_by_paragraphs(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("\ufeffOne.\nTwo.\n\n", encoding="utf-8")
    lines = read_texts(file)
    assert lines.plain == ("One.", "Two.") and lines.what == "2 lines of notes.txt"
    assert lines.places == (f"{file}:1", f"{file}:2")
    file.write_text("\nOne\ntwo.\n\n \nThree.\nFour.", encoding="utf-8")
    paragraphs = read_texts(file)
    assert paragraphs.plain == ("One\ntwo.", "Three.\nFour.")
    assert paragraphs.places == (f"{file}:2", f"{file}:6")
    assert paragraphs.what == "2 paragraphs of notes.txt"
    file.write_text("Only one.")
    assert read_texts(file).what == "1 line of notes.txt"


def test_rows_are_texts_or_talks_in_any_form(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": " One. "}\n\n{"text": "Två."}\n', encoding="utf-8")
    texts = read_texts(file)
    assert (texts.plain, texts.places) == (("One.", "Två."), (f"{file}:1", f"{file}:3"))
    assert texts.n_bytes == (4, 5)
    file.write_text('{"instruction": "Add 2 and 3.", "output": "5"}\n')
    talks = read_texts(file)
    assert talks.talks[0]["messages"][-1] == {"role": "assistant", "content": "5"}
    assert talks.talks[0]["id"] == f"{file}:1" and talks.n_bytes == (1,)
    assert (len(talks), talks.what) == (1, "1 talk of rows.jsonl")


QUESTION = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
TALK = json.dumps({"instruction": "Add 2 and 3.", "output": "5"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\n", "a.txt holds no text: write one text a line, or paragraphs"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8"),
        ("a.jsonl", b"", "a.jsonl holds no row"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ""}\n', "a.jsonl:2: text is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "a.jsonl:2: not-json"),
        ("a.jsonl", b'{"words": "a"}\n', "a.jsonl:1: neither a text nor a talk"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: neither a text nor a talk"),
        ("a.jsonl", QUESTION.encode(), "a.jsonl:1: the talk has no answer at its end"),
        (
            "a.jsonl",
            f'{{"text": "a"}}\n{TALK}\n'.encode(),
            "a.jsonl:2: the rows above are texts and this one is not",
        ),
        (
            "a.jsonl",
            f'{TALK}\n{{"text": "a"}}\n'.encode(),
            "a.jsonl:2: the rows above are talks and this one is not",
        ),
    ],
)
def test_a_file_that_holds_no_texts_is_named_by_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LabkitError, match=message):
        read_texts(tmp_path / name)
    with pytest.raises(LabkitError, match="gone.txt cannot be read: No such file"):
        read_texts(tmp_path / "gone.txt")
