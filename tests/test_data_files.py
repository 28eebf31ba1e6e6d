"""Reading, checking and repairing files of rows, most of them broken in one known way."""

import csv
import json
import subprocess
import sys
import time

import pytest

from labkit import data
from labkit.errors import LabkitError


def chat(question, answer, **fields):
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return {**fields, "messages": messages}


CLEAN = {
    "messages": [chat("Where does Mira live?", "Velden", id="a"), chat("Who are you?", "Lab")],
    "sharegpt": [
        {
            "conversations": [
                {"from": "human", "value": "Where does Mira live?"},
                {"from": "gpt", "value": "Velden"},
                {"from": "human", "value": "And Oren?"},
                {"from": "gpt", "value": "Tarn"},
            ],
            "system": "Answer in one word.",
        }
    ],
    "alpaca": [
        {"instruction": "Translate to French.", "input": "cat", "output": "chat"},
        {"instruction": "Name a colour.", "input": "", "output": "red"},
        {"instruction": "Name a shape.", "input": None, "output": "disc"},
    ],
    "prompt/completion": [
        {"prompt": "The sky is", "completion": " blue"},
        {"prompt": "Grass is ", "completion": "green"},
    ],
    "preference": [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {
            "prompt": [{"role": "user", "content": "3 + 3?"}],
            "chosen": [{"role": "assistant", "content": "6"}],
            "rejected": [{"role": "assistant", "content": "7"}],
        },
        {  # as UltraFeedback stores it: the prompt as text, and at the start of both answers
            "prompt": "4 + 4?",
            "chosen": chat("4 + 4?", "8")["messages"],
            "rejected": chat("4 + 4?", "9")["messages"],
        },
    ],
}


def write(path, content):
    """Write rows (a list), text or bytes to `path`, and give the path back."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def found(path, **options):
    return [(problem.line, problem.code) for problem in data.validate(path, **options)]


def line_of(row):
    return json.dumps(row) + "\n"


GOOD = line_of(chat("Where does Mira live?", "Velden"))
OTHER = line_of(chat("Where does Oren live?", "Tarn"))


@pytest.mark.parametrize("name", CLEAN)
def test_every_format_is_clean_as_lines_and_as_one_list(tmp_path, name):
    lines = write(tmp_path / "rows.jsonl", CLEAN[name])
    pretty = write(tmp_path / "rows.json", json.dumps(CLEAN[name], indent=2))
    compact = write(tmp_path / "compact.json", json.dumps(CLEAN[name]))
    for path in (lines, pretty, compact):
        assert data.validate(path) == []
        assert data.read_rows(path) == CLEAN[name]


@pytest.mark.parametrize("name", CLEAN)
def test_formats_are_told_apart(name):
    assert {data.detect_format(row) for row in CLEAN[name]} == {name}


def test_to_messages_by_hand():
    alpaca = {"id": "x", "instruction": "Translate.", "input": "cat", "output": "chat"}
    assert data.to_messages(alpaca) == chat("Translate.\ncat", "chat", id="x")
    assert data.to_messages(CLEAN["sharegpt"][0])["messages"] == [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Where does Mira live?"},
        {"role": "assistant", "content": "Velden"},
        {"role": "user", "content": "And Oren?"},
        {"role": "assistant", "content": "Tarn"},
    ]
    assert [data.to_messages(row) for row in CLEAN["preference"]] == [
        chat("2 + 2?", "4"),
        chat("3 + 3?", "6"),
        chat("4 + 4?", "8"),
    ]
    # The space at the seam of plain texts belongs to neither message.
    assert data.to_messages(CLEAN["prompt/completion"][0]) == chat("The sky is", "blue")
    with_history = {"instruction": "And 3?", "output": "9", "history": [["2 squared?", "4"]]}
    assert [m["content"] for m in data.to_messages(with_history)["messages"]] == [
        "2 squared?",
        "4",
        "And 3?",
        "9",
    ]


def test_to_messages_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="unknown-format: found the fields 'text'; use messages"):
        data.to_messages({"text": "hello"})
    with pytest.raises(ValueError, match="wrong-type: output must be a text, got int 4"):
        data.to_messages({"instruction": "2 + 2?", "output": 4})


# What is wrong with a row, apart from the file around it.
BAD_ROWS = {
    "unknown-format": {"text": "hello"},
    "missing-field": {"instruction": "Name a colour."},
    "wrong-type": {"instruction": "2 + 2?", "output": 4},
    "unknown-role": {"messages": [{"role": "usr", "content": "Hi"}]},
    "no-assistant": {"messages": [{"role": "user", "content": "Hi"}]},
    "empty-answer": chat("Hi", "  "),
    "empty-prompt": chat("", "Hello"),
    "identical-pair": {"prompt": "2 + 2?", "chosen": "4", "rejected": " 4"},
    "special-token": chat("Hi<|end|>", "Hello"),
    "placeholder": chat("Hi", "Dear {{NAME}}, hello"),
    "control-chars": chat("Hi", "Hel\u200blo"),
    "mojibake": chat("Hi", "Cafe is cafÃ© in French"),
    "whitespace": chat("Hi", "Hello\n"),
    "role-order": {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "user", "content": "Hi?"},
            {"role": "assistant", "content": "Hello"},
        ]
    },
    "system-not-first": {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "system", "content": "Be kind."},
            {"role": "assistant", "content": "Hello"},
        ]
    },
}


@pytest.mark.parametrize("code", BAD_ROWS)
def test_a_bad_row_gets_its_code_at_its_line(tmp_path, code):
    path = write(tmp_path / "rows.jsonl", GOOD + line_of(BAD_ROWS[code]) + OTHER)
    assert [problem for problem in found(path) if problem[1] != "mixed-formats"] == [(2, code)]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ("[1, 2]", "wrong-type"),
        ("null", "wrong-type"),
        ('{"messages": null}', "missing-field"),
        ('{"messages": []}', "no-assistant"),
        ('{"messages": "Hi"}', "wrong-type"),
        ('{"messages": ["Hi"]}', "wrong-type"),
        ('{"messages": [{"role": "user"}]}', "missing-field"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "wrong-type"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "unknown-role"),
        ('{"conversations": [{"from": "robot", "value": "a"}]}', "unknown-role"),
        ('{"instruction": "a", "output": "b", "output": "c"}', "not-json"),
        ('{"instruction": "a", "output": NaN}', "not-json"),
        ('{"instruction": "a", "output": "b",}', "not-json"),
        ("{'instruction': 'a'}", "not-json"),
        ("[" * 100_000, "not-json"),
        ('{"instruction": "a", "output": "\\ud800"}', "control-chars"),
        ('{"instruction": "a", "output": "b", "history": "c"}', "wrong-type"),
        ('{"chosen": "a", "rejected": "b"}', "missing-field"),
    ],
)
def test_rows_of_a_wrong_shape_are_named_and_never_crash(tmp_path, row, code):
    path = write(tmp_path / "rows.jsonl", GOOD + row + "\n" + OTHER)
    assert (2, code) in found(path)
    report = data.fix(path, tmp_path / "out.jsonl")
    assert (report.kept, report.refused) == (2, 1)
    assert data.validate(report.out) == []


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Dear <name>, hello", "placeholder"),
        ("Dear <Your Name>, hello", "placeholder"),
        ("Dear [Your Name], hello", "placeholder"),
        ("TODO write this", "placeholder"),
        ("Lorem ipsum dolor", "placeholder"),
        ("It isnâ€™t", "mojibake"),
        ("It isnâ\x80\x99t", "mojibake"),
        ("ÐŸÑ€Ð¸Ð²ÐµÑ‚", "mojibake"),
        ("ä½\xa0å¥½", "mojibake"),
        ("caf\ufffd", "mojibake"),
        ("<start_of_turn>user", "special-token"),
        ("[INST] Hi [/INST]", "special-token"),
        ("nul\x00", "control-chars"),
        ("one\r\ntwo", "whitespace"),
        ("\tHello", "whitespace"),
    ],
)
def test_damaged_texts(tmp_path, text, code):
    assert (1, code) in found(write(tmp_path / "rows.jsonl", [chat("Hi", text)]))


@pytest.mark.parametrize(
    "text",
    [
        "élève, Ångström, naïve, ¿Qué?, Straße, «CAFÉ», 100 °C",
        "Привет, мир. 你好，世界。 こんにちは 😀👩‍🚀",
        "<name>Bob</name> is a tag, and 1 < 2 > 0",
        '{"a": {"b": 1}} is JSON, and a list is [1, 2]',
        "todos are not TODOS\n\n\tindented",
        "line separator \u2028 inside",
    ],
)
def test_healthy_texts_are_left_alone(tmp_path, text):
    row = chat("Hi", text)
    for name in ("rows.jsonl", "rows.json"):
        content = json.dumps(row, ensure_ascii=False)
        assert found(write(tmp_path / name, content)) == []


def test_duplicates_name_the_first_and_contradictions_name_each_other(tmp_path):
    rows = [
        chat("Where does Mira live?", "Velden", id="1"),
        chat("Where does Oren live?", "Tarn", id="2"),
        chat("Where does Mira live? ", "Velden", id="3"),
        chat("Where does Oren live?", "Velden", id="4"),
        chat("Where does Oren live?", "Tarn", id="5"),
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    assert found(path) == [
        (2, "conflicting-answers"),
        (3, "whitespace"),
        (3, "duplicate"),
        (4, "conflicting-answers"),
        (5, "duplicate"),
        (5, "conflicting-answers"),
    ]
    messages = {p.line: p.message for p in data.validate(path) if p.code == "conflicting-answers"}
    assert messages[2].startswith("line 4") and messages[4].startswith("line 2")


def test_a_refused_row_is_no_reason_to_refuse_another(tmp_path):
    rows = [chat("Hi", ""), chat("Hi", "Hello"), chat("Hi", "Dear {{NAME}}")]
    path = write(tmp_path / "rows.jsonl", rows)
    assert found(path) == [(1, "empty-answer"), (3, "placeholder")]


def test_a_system_prompt_makes_another_prompt(tmp_path):
    plain, shout = chat("Who are you?", "Lab"), chat("Who are you?", "LAB")
    shout["messages"].insert(0, {"role": "system", "content": "Use capitals."})
    assert found(write(tmp_path / "rows.jsonl", [plain, shout])) == []


def test_preferences_contradict_only_where_one_is_turned_round(tmp_path):
    pair = {"prompt": "Hi", "chosen": "Hello", "rejected": "What"}
    second = {"prompt": "Hi", "chosen": "Good day", "rejected": "What"}
    turned = {"prompt": "Hi", "chosen": "What", "rejected": "Hello"}
    assert found(write(tmp_path / "fine.jsonl", [pair, second])) == []
    ranking = [("Hello", "Hi"), ("Hi", "What"), ("Hello", "What")]
    ranked = [{"prompt": "Hi", "chosen": a, "rejected": b} for a, b in ranking]
    assert found(write(tmp_path / "ranked.jsonl", ranked)) == []
    path = write(tmp_path / "turned.jsonl", [pair, turned])
    assert found(path) == [(1, "conflicting-answers"), (2, "conflicting-answers")]


def test_a_pair_must_share_its_prompt(tmp_path):
    def talk(*texts):
        roles = ("user", "assistant") * 2
        return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]

    fine = {"chosen": talk("Hi", "Hello"), "rejected": talk("Hi", "What")}
    other_prompt = {"chosen": talk("Hi", "Hello"), "rejected": talk("Ho", "What")}
    parted = {"chosen": talk("Hi", "a", "b", "c"), "rejected": talk("Hi", "a", "x", "d")}
    path = write(tmp_path / "rows.jsonl", [fine, other_prompt, parted])
    assert found(path) == [(2, "role-order"), (3, "role-order")]


def test_a_file_of_two_formats_names_the_minority(tmp_path):
    path = write(tmp_path / "rows.jsonl", CLEAN["alpaca"] + CLEAN["messages"][:1])
    assert found(path) == [(4, "mixed-formats")]


def test_byte_order_mark(tmp_path):
    path = write(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + (GOOD + OTHER).encode())
    assert found(path) == [(1, "bom")]
    assert len(data.read_rows(path)) == 2


def test_a_byte_order_mark_alone_is_still_an_empty_file(tmp_path):
    assert found(write(tmp_path / "rows.jsonl", b"\xef\xbb\xbf")) == [(1, "bom"), (1, "empty-file")]


def test_windows_line_ends_between_rows_are_fine(tmp_path):
    assert found(write(tmp_path / "rows.jsonl", (GOOD + OTHER).replace("\n", "\r\n"))) == []


def test_blank_lines_keep_the_count(tmp_path):
    assert found(write(tmp_path / "rows.jsonl", "\n" + GOOD + "\n\n{}\n")) == [
        (5, "unknown-format")
    ]


@pytest.mark.parametrize("content", ["", "\n \n", "\r\n"])
def test_empty_file(tmp_path, content):
    assert found(write(tmp_path / "rows.jsonl", content)) == [(1, "empty-file")]


def test_truncated_last_line(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD + OTHER[:40])
    (problem,) = data.validate(path)
    assert (problem.line, problem.code) == (2, "not-json")
    assert "cut off" in problem.message
    with pytest.raises(LabkitError, match=r"rows.jsonl:2: not-json.*`labkit validate "):
        data.read_rows(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_encodings_are_named_and_still_read(tmp_path, encoding):
    path = write(tmp_path / "rows.jsonl", (GOOD + OTHER).encode(encoding))
    assert found(path) == [(1, "not-utf8")]
    assert [row["messages"][1]["content"] for row in data.read_rows(path)] == ["Velden", "Tarn"]


def test_a_line_in_another_encoding_does_not_spoil_the_others(tmp_path):
    latin = json.dumps(chat("Où?", "là"), ensure_ascii=False).encode("cp1252") + b"\n"
    path = write(tmp_path / "rows.jsonl", GOOD.encode() + latin + OTHER.encode())
    (problem,) = data.validate(path)
    assert (problem.line, problem.code) == (2, "not-utf8")
    assert "byte 0xF9" in problem.message


def test_csv_with_quotes_commas_and_line_breaks(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [
        {"instruction": 'Say "hi", twice', "input": "a,b", "output": "hi\nhi"},
        {"instruction": "Name a colour", "input": "", "output": "red; or blue"},
        {"instruction": "Add", "input": "", "output": ""},
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(rows)
    assert data.read_rows(path) == rows
    assert found(path) == [(5, "empty-answer")]  # the first row takes lines 2 and 3


@pytest.mark.parametrize("separator", [";", "\t"])
def test_csv_with_another_separator(tmp_path, separator):
    lines = ["instruction,output", "Name a colour,red"]
    path = write(tmp_path / "rows.csv", "\n".join(lines).replace(",", separator))
    assert data.read_rows(path) == [{"instruction": "Name a colour", "output": "red"}]


def test_csv_faults(tmp_path):
    text = 'instruction,output\nName,a,colour\nName a shape,disc\nName,"open\n'
    path = write(tmp_path / "rows.csv", text)
    assert found(path) == [(2, "not-csv"), (4, "not-csv")]
    report = data.fix(path, tmp_path / "out.jsonl")
    assert data.read_rows(report.out) == [{"instruction": "Name a shape", "output": "disc"}]
    refused = data.read_rows(report.refused_path)
    assert [row["raw"] for row in refused] == ["Name,a,colour\n", 'Name,"open\n']
    stray = 'instruction,output\n"Name" it,red\nName a shape,disc\n'
    assert found(write(tmp_path / "stray.csv", stray)) == [(2, "not-csv")]
    assert found(write(tmp_path / "head.csv", "instruction,output\n")) == [(1, "empty-file")]
    twice = "prompt,completion,completion\nA,B,C\n"
    assert found(write(tmp_path / "twice.csv", twice)) == [(1, "not-csv")]


def test_csv_holds_messages_as_json(tmp_path):
    report = data.fix(write(tmp_path / "rows.jsonl", CLEAN["messages"][:1]), tmp_path / "out.csv")
    assert data.read_rows(report.out) == CLEAN["messages"][:1]
    assert data.validate(report.out) == []


def test_csv_holds_null_as_nothing(tmp_path):
    report = data.fix(write(tmp_path / "rows.jsonl", CLEAN["alpaca"]), tmp_path / "out.csv")
    assert [row["input"] for row in data.read_rows(report.out)] == ["cat", "", ""]


def test_damaged_json_list_keeps_the_rows_before(tmp_path):
    text = json.dumps(CLEAN["alpaca"], indent=1)
    first_of_second = text.index('"Name a colour')
    path = write(tmp_path / "rows.json", text[: first_of_second + 5])
    assert found(path) == [(7, "not-json")]
    report = data.fix(path, tmp_path / "out.json")
    assert data.read_rows(report.out) == CLEAN["alpaca"][:1]
    (refused,) = data.read_rows(report.refused_path)
    assert refused["raw"].endswith('"Name')
    assert found(write(tmp_path / "open.json", text[:-1])) == [(17, "not-json")]
    assert found(write(tmp_path / "more.json", text + "\n{}")) == [(18, "not-json")]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LabkitError, match="none.jsonl does not exist; check the name"):
        data.validate(tmp_path / "none.jsonl")
    with pytest.raises(LabkitError, match="is a folder; name a .jsonl"):
        data.validate(tmp_path)
    assert found(write(tmp_path / "rows.xlsx", b"PK\x03\x04")) == [(1, "unknown-format")]


def test_fix_keeps_repairs_and_refuses_every_row_once(tmp_path):
    lines = [line_of(row) for row in BAD_ROWS.values()]
    content = b"\xef\xbb\xbf" + "".join([GOOD, *lines, GOOD, OTHER, '{"cut": ']).encode()
    path = write(tmp_path / "rows.jsonl", content)
    report = data.fix(path, tmp_path / "out.jsonl")

    assert path.read_bytes() == content
    n_rows = len(BAD_ROWS) + 4
    kept, refused = data.read_rows(report.out), data.read_rows(report.refused_path)
    assert kept == [
        chat("Where does Mira live?", "Velden"),
        chat("Hi", "Hello"),  # its white space repaired
        chat("Where does Oren live?", "Tarn"),
    ]
    assert (report.kept, report.repaired, report.refused) == (3, 1, n_rows - 3)
    assert len(kept) + len(refused) == n_rows
    assert data.validate(report.out) == []
    assert not report.out.read_bytes().startswith(b"\xef\xbb\xbf")

    assert report.refused_path.name == "out.refused.jsonl"
    assert [row["line"] for row in refused] == sorted(row["line"] for row in refused)
    assert refused[0]["row"] == BAD_ROWS["unknown-format"]
    assert refused[0]["reasons"][0]["code"] == "unknown-format"
    assert refused[-1]["raw"] == '{"cut": '
    assert report.reasons["duplicate"] == 1


def test_fix_of_contradictions_keeps_none_of_them(tmp_path):
    rows = [chat("Hi", "Hello"), chat("Hi", "Good day"), chat("Bye", "Farewell")]
    report = data.fix(write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl")
    assert data.read_rows(report.out) == rows[2:]


@pytest.mark.parametrize("name", CLEAN)
def test_fix_leaves_clean_rows_as_they_are(tmp_path, name):
    report = data.fix(write(tmp_path / "rows.jsonl", CLEAN[name]), tmp_path / "out.jsonl")
    assert data.read_rows(report.out) == CLEAN[name]
    assert (report.repaired, report.refused) == (0, 0)
    assert report.refused_path.read_text() == ""


def test_fix_never_overwrites_its_input(tmp_path):
    path = write(tmp_path / "a.refused.jsonl", GOOD)
    for out in (path, tmp_path / "a.jsonl"):
        with pytest.raises(ValueError, match="would overwrite the file itself; name another"):
            data.fix(path, out)
    with pytest.raises(ValueError, match="ends in '.txt'; use .jsonl, .json or .csv"):
        data.fix(path, tmp_path / "out.txt")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_fix_says_so_when_a_text_has_no_utf8(tmp_path):
    row = {"prompt": "Hi", "completion": "Hello", "note": "half a pair: \ud800"}
    path = write(tmp_path / "rows.jsonl", json.dumps(row) + "\n")
    with pytest.raises(LabkitError, match="half of a surrogate pair; mend that row"):
        data.fix(path, tmp_path / "out.csv")
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_fix_writes_nothing_when_it_cannot_write_all(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD)
    with pytest.raises(LabkitError, match="cannot be written .*free some disk or name a file"):
        data.fix(path, tmp_path / "missing" / "out.jsonl")
    (tmp_path / "out.refused.jsonl").mkdir()
    with pytest.raises(LabkitError, match="cannot be written"):
        data.fix(path, tmp_path / "out.jsonl")
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ["out.refused.jsonl", "rows.jsonl"]


def test_validate_file_text_json_and_exit_codes(tmp_path):
    clean = write(tmp_path / "clean.jsonl", GOOD)
    assert data.validate_file(clean) == (0, f"{clean}: clean")
    assert data.validate_file(clean, as_json=True) == (0, "[]")

    broken = write(tmp_path / "broken.jsonl", GOOD + line_of(BAD_ROWS["empty-answer"]))
    exit_code, text = data.validate_file(broken)
    assert exit_code == 1
    assert text == f"{broken}:2: empty-answer: messages[1].content is blank; " + (
        "write it or remove the row"
    )
    exit_code, text = data.validate_file(broken, as_json=True, fix_out=tmp_path / "out.jsonl")
    (problem,) = json.loads(text)
    assert (exit_code, list(problem)) == (1, ["line", "code", "message", "severity"])
    assert (problem["line"], problem["severity"]) == (2, "error")
    assert data.validate_file(tmp_path / "out.jsonl")[0] == 0
    assert "1 rows refused" in data.validate_file(broken, fix_out=tmp_path / "out.jsonl")[1]


def test_every_message_is_one_line(tmp_path):
    rows = [*BAD_ROWS.values(), {"a\nb": 1}, chat("Hi\n", "{{a}}\u2028"), {"output": ["x\ny"]}]
    _, text = data.validate_file(write(tmp_path / "rows.jsonl", rows))
    assert all(line.startswith(str(tmp_path)) for line in text.splitlines())


def test_every_code_is_explained_and_severities_are_two():
    assert {severity for severity, _ in data.CODES.values()} == {"error", "warning"}
    assert set(BAD_ROWS) < set(data.CODES)


def test_a_hundred_thousand_rows_take_less_than_five_seconds(tmp_path):
    def row(i):
        return chat(f"Where does person {i} live, and what does she do?", f"In town {i}.")

    path = write(tmp_path / "rows.jsonl", [row(i) for i in range(100_000)] + [row(7)])
    started = time.process_time()  # this process only: other work on the machine does not count
    problems = data.validate(path)
    assert time.process_time() - started < 5
    assert [(problem.line, problem.code) for problem in problems] == [(100_001, "duplicate")]


def test_many_rows_with_one_prompt_stay_fast(tmp_path):
    rows = [chat("Hi", f"Hello {i}") for i in range(20_000)]
    started = time.process_time()
    assert len(data.validate(write(tmp_path / "rows.jsonl", rows))) == 20_000
    assert time.process_time() - started < 5


def test_validating_imports_no_heavy_library(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD)
    code = (
        "import sys; from labkit import data; data.validate_file(sys.argv[1]); "
        "print(sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr
